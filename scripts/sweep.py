"""Speed-up by how much is pruned: even and uneven amounts, with and without rounding.

    python scripts/sweep.py [NAME ...] [--patterns ...] [--threads N] [--batch N] [--write]

For every architecture and pattern three models run in turn in onnxruntime: the pruned one, the
simplified one, and the same without rounding (``channel_multiple=1``: as few channels as possible,
no layer split, nothing reordered). Patterns are the share of the filters of every convolution,
or ``uneven``: a share of its own for every convolution, drawn from U(0.1, 0.9). File sizes are
compared with those without bias maps. Without NAME, one architecture or two of each family. The
table goes between the markers of docs/performance.md with --write (or when nothing is named). Run
it on an idle machine. Needs the ``torch`` extra.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import publish
from benchmark_table import geometric_mean, speedup
from onnx_simplify.graph.load import load
from onnx_simplify.planning import profiles
from onnx_simplify.runtime.benchmark import time_models

NAMES = (
    "alexnet",
    "vgg11_bn",
    "resnet18",
    "resnet50",
    "squeezenet1_1",
    "densenet121",
    "inception_v3",
    "googlenet",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "resnext50_32x4d",
    "mnasnet0_5",
    "mnasnet1_0",
)
PATTERNS = {"30%": 0.3, "37.5%": 0.375, "50%": 0.5, "70%": 0.7, "90%": 0.9, "uneven": None}
Row = dict[str, Any]


def prune(name: str, pattern: str) -> Any:
    """The architecture, pruned."""
    import torch

    from torch_bridge import zoo

    module, amount = zoo.realistic(name), PATTERNS[pattern]
    if amount is not None:
        return zoo.prune(module, name, amount=amount)
    chance = torch.Generator().manual_seed(0)
    for path, layer in module.named_modules():
        if isinstance(layer, torch.nn.Conv2d) and path != "classifier.1":
            share = 0.1 + 0.8 * float(torch.rand((), generator=chance))
            filters = torch.randperm(layer.out_channels, generator=chance)
            layer.weight.data[filters[: round(share * layer.out_channels)]] = 0
    return module


def measure(name: str, pattern: str, threads: int, batch: int, rounds: int) -> Row:
    """Times and sizes of one architecture under one pattern."""
    import torch

    import onnx_simplify
    from torch_bridge import export, zoo

    size = zoo.image_size(name)
    image = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    pruned = export(prune(name, pattern), image, exporter="torchscript", fuse_batchnorm=False)
    simplified, report = onnx_simplify.simplify(pruned)
    fewest, _ = onnx_simplify.simplify(pruned, channel_multiple=1)
    without_maps = replace(profiles.detect(), map_cost=float("inf"))
    profiles.PROFILES["without maps"] = without_maps
    unmapped, _ = onnx_simplify.simplify(pruned, target="without maps")
    models = {"dense": pruned, "simplified": simplified, "fewest": fewest}
    times = time_models(
        {key: load(model) for key, model in models.items()},
        {pruned.graph.input[0].name: image.numpy()},
        threads=threads,
        rounds=rounds,
    )
    assert report.verification is not None
    return {
        "times": {key: vars(timing) for key, timing in times.items()},
        "bytes": [pruned.ByteSize(), simplified.ByteSize(), unmapped.ByteSize()],
        "error": report.verification.worst,
    }


def table(rows: dict[str, Row], names: list[str], patterns: list[str]) -> str:
    """Speed-ups, and in brackets how much faster than without rounding."""
    lines = []
    for name in names:
        line = [name]
        for pattern in patterns:
            row = rows[f"{name} {pattern}"]
            gain = speedup(row, "simplified", "fewest") or 1
            line.append(f"{speedup(row):.2f}x ({gain:.2f})")
        lines.append(line)
    mean = ["geometric mean"]
    for pattern in patterns:
        found = [rows[f"{name} {pattern}"] for name in names]
        ratios = [
            geometric_mean([speedup(r, "simplified", base) or 1 for r in found])
            for base in ("dense", "fewest")
        ]
        mean.append(f"**{ratios[0]:.2f}x ({ratios[1]:.2f})**")
    return publish.markdown(["architecture", *patterns], [*lines, mean])


def note(rows: list[Row], threads: int, batch: int, rounds: int) -> str:
    """What the table says in words."""
    slowest = min(speedup(r) or 1 for r in rows)
    least = min(speedup(r, "simplified", "fewest") or 1 for r in rows)
    growth = max(r["bytes"][1] / r["bytes"][2] for r in rows)
    share = max(r["bytes"][1] / r["bytes"][0] for r in rows)
    noise = statistics.median(
        (t["high"] - t["low"]) / t["median"] for r in rows for t in r["times"].values()
    )
    return (
        f"Batch {batch}, {threads} thread(s), medians of {rounds} rounds (quartiles typically "
        f"{noise:.1%} apart). Lowest speed-up {slowest:.2f}x; at worst {1 / least:.2f} times the "
        f"time without rounding. Files are at most {share:.0%} of the size of their input, and "
        f"{growth - 1:+.1%} against those without maps. Largest error "
        f"{max(r['error'] for r in rows):.0e}."
    )


def main() -> int:
    """Measure, print and publish."""
    import torch

    from torch_bridge import zoo

    parser = argparse.ArgumentParser(description="Speed-up by how much is pruned.")
    publish.add_arguments(parser, zoo.ARCHITECTURES)
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=list(PATTERNS))
    parser.add_argument("--threads", type=int, default=1, help="onnxruntime threads (default: 1)")
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds (default: 15)")
    options = parser.parse_args()
    names = publish.chosen(parser, options) if options.names else list(NAMES)
    torch.set_num_threads(1)
    section = "sweep"
    if (options.threads, options.batch) != (1, 1):
        section = f"sweep-{options.threads}-threads-batch-{options.batch}"
    settings = {"threads": options.threads, "batch": options.batch, "rounds": options.rounds}
    env = publish.environment("torch", "torchvision", "onnx", "onnxruntime")
    results = publish.Results(section, settings, env, options.fresh)
    keys = [f"{name} {pattern}" for name in names for pattern in options.patterns]
    run = partial(measure, threads=options.threads, batch=options.batch, rounds=options.rounds)
    for key in publish.progress(keys, list(results.rows)):
        results.add(key, run(*key.split(" ")))
    text = table(results.rows, names, options.patterns)
    rows = [results.rows[key] for key in keys]
    text += f"\n\n{note(rows, options.threads, options.batch, options.rounds)}"
    text += f"\n\n{publish.describe(results.head['environment'])}"
    print(text)
    if options.write or not options.names:
        docs = publish.ROOT / "docs"
        publish.replace_section(docs / "performance.md", section, text)
        publish.write(docs / f"{section}.json", results.text(keys))
    return 0


if __name__ == "__main__":
    sys.exit(main())
