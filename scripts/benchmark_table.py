"""Inference time of every architecture: dense, pruned, simplified, and what others make of it.

    python scripts/benchmark_table.py [NAME ...] [--also ...] [--threads N] [--write] [--fresh]

Protocol P1: half of the filters of every convolution, chosen independently, with BatchNorm and
biases alive. All variants of an architecture run in turn in one process, in onnxruntime on the CPU,
batch 1: medians over the rounds; quartiles are in the JSON. Run it on an idle machine.

--also adds columns: ``tuned`` (the fastest of several plans, measured; beside it the regret of the
plan that the cost model chose), ``coupled`` (protocol P2: the pruned channels of coupled layers are
the same; our time over that of the network that torch-pruning builds), ``onnxslim``, ``onnxsim``,
``torch`` (the module itself, in PyTorch) and ``torch-simplify``. Those not installed are left out.

The table goes between the markers of README.md, a chart and all figures into docs/, when no NAME is
given or with --write. An interrupted run goes on where it stopped. Needs the ``bench`` extra.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import io
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import onnx

import publish
from onnx_simplify.errors import first_line
from onnx_simplify.graph.load import load
from onnx_simplify.runtime.benchmark import time_calls
from onnx_simplify.runtime.difference import difference
from onnx_simplify.runtime.session import Session

# What --also may add, and the module that each needs.
OTHERS = {
    "tuned": "onnx_simplify",
    "coupled": "torch_pruning",
    "onnxslim": "onnxslim",
    "onnxsim": "onnxsim",
    "torch": "torch",
    "torch-simplify": "simplify",
}
PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "onnxslim", "onnxsim", "torch-simplify")
Row = dict[str, Any]
Run = Callable[[], object]


def measure(name: str, also: Sequence[str], threads: int, rounds: int, amount: float) -> Row:
    """Times, sizes and errors of one architecture."""
    import torch

    import onnx_simplify
    from torch_bridge import export, zoo

    size = zoo.image_size(name)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    to_onnx = partial(export, exporter="torchscript", fuse_batchnorm=False)
    module = zoo.realistic(name)
    dense = to_onnx(module, image)
    zoo.prune(module, name, amount=amount)
    pruned = to_onnx(module, image)
    simplified, report = onnx_simplify.simplify(pruned)
    models = {"dense": dense, "pruned": pruned, "simplified": simplified}
    models |= dict(_others(name, module, image, pruned, also, to_onnx))
    runs: dict[str, Run] = {}
    outputs: dict[str, Any] = {}
    for key, model in models.items():
        session = Session(load(model), threads=threads, optimize=True)
        feeds = {model.graph.input[0].name: image.numpy()}
        runs[key] = partial(session.run, feeds)
        outputs[key] = session.run(feeds)
    expected = Session(load(pruned)).run({pruned.graph.input[0].name: image.numpy()})
    row: Row = {
        "parameters": [report.before.parameters, report.after.parameters],
        "macs": [report.before.macs, report.after.macs],
        "ideal_macs": report.ideal_macs,
        "bytes": [pruned.ByteSize(), simplified.ByteSize()],
        "errors": {
            key: difference(expected, outputs[key])[0]
            for key in models
            if key not in ("dense", "pruned", "coupled", "oracle")
        },
    }
    if "torch" in also:
        torch.set_num_threads(threads)
        runs["torch"] = partial(_eager, module.eval(), image)
    times = time_calls(runs, rounds=rounds)
    return row | {"times": {key: asdict(timing) for key, timing in times.items()}}


def _eager(module: Any, image: Any) -> Any:
    import torch

    with torch.inference_mode():
        return module(image)


def _others(
    name: str,
    module: Any,
    image: Any,
    pruned: onnx.ModelProto,
    also: Sequence[str],
    to_onnx: Callable[..., onnx.ModelProto],
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The models that --also asks for; those that a tool cannot make are left out with a word."""
    import torch

    import onnx_simplify
    from torch_bridge import coupled, zoo

    def coupled_pair() -> Iterator[tuple[str, onnx.ModelProto]]:
        masked, oracle = coupled(zoo.realistic(name), image)
        yield "coupled", onnx_simplify.simplify(to_onnx(masked, image))[0]
        yield "oracle", to_onnx(oracle, image)

    def slim() -> Iterator[tuple[str, onnx.ModelProto]]:
        import onnxslim

        yield "onnxslim", onnxslim.slim(copy.deepcopy(pruned))

    def sim() -> Iterator[tuple[str, onnx.ModelProto]]:
        import onnxsim

        yield "onnxsim", onnxsim.simplify(pruned)[0]

    def torch_simplify() -> Iterator[tuple[str, onnx.ModelProto]]:
        import simplify

        changed = simplify.simplify(copy.deepcopy(module).eval(), torch.zeros_like(image))
        yield "torch-simplify", to_onnx(changed, image)

    def tuned() -> Iterator[tuple[str, onnx.ModelProto]]:
        yield "tuned", onnx_simplify.simplify(pruned, tune=True)[0]

    made = {
        "tuned": tuned,
        "coupled": coupled_pair,
        "onnxslim": slim,
        "onnxsim": sim,
        "torch-simplify": torch_simplify,
    }
    for key in also:
        try:
            yield from made.get(key, lambda: iter(()))()
        except Exception as error:  # whatever another tool raises
            reason = f"{type(error).__name__}: {first_line(error)}"
            print(f"{name}: {key} fails: {reason}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------
# The table and the chart


def speedup(row: Row, key: str = "simplified", base: str = "dense") -> float | None:
    """How many times faster than the dense model a variant is; None if not measured."""
    times = row["times"]
    return times[base]["median"] / times[key]["median"] if key in times else None


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(values))))


def table(rows: dict[str, Row], names: Sequence[str], also: Sequence[str]) -> str:
    """One line per architecture, and the geometric means."""
    header = ["architecture", "dense ms", "pruned ms", "simplified ms", "speed-up", "ideal"]
    header += ["M parameters", "GMAC", *_titles(also)]
    lines = []
    for name in names:
        row = rows[name]
        line = [name, *(_milliseconds(row, k) for k in ("dense", "pruned", "simplified"))]
        line += [f"**{speedup(row):.2f}x**", f"{row['macs'][0] / row['ideal_macs']:.2f}x"]
        line.append(" → ".join(f"{n / 1e6:.1f}" for n in row["parameters"]))
        line.append(" → ".join(f"{n / 1e9:.2f}" for n in row["macs"]))
        lines.append(line + _cells(row, also))
    mean = ["geometric mean", "", "", ""]
    mean.append(f"**{geometric_mean([speedup(rows[n]) or 1 for n in names]):.2f}x**")
    ideal = [rows[n]["macs"][0] / rows[n]["ideal_macs"] for n in names]
    mean += [f"{geometric_mean(ideal):.2f}x", "", ""]
    for key in also:
        ratios = [r for n in names if (r := _ratio(rows[n], key)) is not None]
        cell = f"{geometric_mean(ratios):.2f}x" if ratios else ""
        if key == "tuned" and ratios:
            regrets = [speedup(rows[n], "tuned", "simplified") or 1 for n in names]
            cell += f", {geometric_mean(regrets):.3f}"
        mean.append(cell)
    return publish.markdown(header, [*lines, mean])


def _titles(also: Sequence[str]) -> list[str]:
    titles = {"coupled": "coupled: ours / oracle", "tuned": "tuned, regret"}
    return [titles.get(key, key) for key in also]


def _ratio(row: Row, key: str) -> float | None:
    if key == "coupled":
        return speedup(row, "oracle", "coupled")
    return speedup(row, key)


def _milliseconds(row: Row, key: str) -> str:
    time = row["times"][key]
    return f"{time['median']:.2f} ± {(time['high'] - time['low']) / 2:.2f}"


def _cells(row: Row, also: Sequence[str]) -> list[str]:
    cells = []
    for key in also:
        if key == "tuned":
            regret = speedup(row, "tuned", "simplified")
            cells.append("fails" if regret is None else f"{speedup(row, key):.2f}x, {regret:.2f}")
            continue
        ratio, error = _ratio(row, key), row["errors"].get(key, 0.0)
        wrong = f", off by {error:.0%}" if error > 1e-3 else ""
        cells.append("fails" if ratio is None else f"{ratio:.2f}x{wrong}")
    return cells


def headline(rows: dict[str, Row], names: Sequence[str]) -> str:
    """The figures in a sentence or two."""
    ratios = {name: speedup(rows[name]) or 1 for name in names}
    slowest, fastest = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    error = max(rows[name]["errors"]["simplified"] for name in names)
    share = statistics.mean(1 - rows[n]["parameters"][1] / rows[n]["parameters"][0] for n in names)
    mean = geometric_mean(list(ratios.values()))
    return (
        f"**{mean:.2f} times faster** in onnxruntime (geometric mean "
        f"over {len(names)} torchvision architectures; {ratios[slowest]:.2f}x for {slowest}, "
        f"{ratios[fastest]:.2f}x for {fastest}) with half of the filters of every convolution "
        f"pruned, {share:.0%} fewer parameters on average, outputs equal to {error:.0e} of their "
        "magnitude. Measured on one thread, all variants interleaved in one run: see "
        "[the table](#inference-time)."
    )


def chart(rows: dict[str, Row], names: Sequence[str], also: Sequence[str]) -> bytes:
    """A PNG: speed-up per architecture, with the ratio of MACs that no arrangement exceeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = ["simplified", *(k for k in also if k not in ("coupled", "torch", "tuned"))]
    figure, axes = pyplot.subplots(figsize=(13, 5), dpi=90)
    places, width = np.arange(len(names)), 0.8 / len(bars)
    colours = ("#0072B2", "#E69F00", "#999999", "#CC79A7")
    for k, key in enumerate(bars):
        heights = [speedup(rows[n], key) or 0 for n in names]
        label = "onnx-simplify" if key == "simplified" else key
        offset = (k - (len(bars) - 1) / 2) * width
        axes.bar(places + offset, heights, width, label=label, color=colours[k % len(colours)])
    ideal = [rows[n]["macs"][0] / rows[n]["ideal_macs"] for n in names]
    axes.plot(places, ideal, "D-", color="#D55E00", lw=0.7, ms=4, label="ideal ratio of MACs")
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(places, names, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("times faster than dense")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(bars) + 1)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def main() -> int:
    """Measure, print and publish."""
    import torch

    from torch_bridge import zoo

    parser = argparse.ArgumentParser(description="Inference time per architecture.")
    publish.add_arguments(parser, zoo.ARCHITECTURES)
    parser.add_argument("--also", nargs="+", default=[], choices=list(OTHERS), help="more columns")
    parser.add_argument("--threads", type=int, default=1, help="onnxruntime threads (default: 1)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds (default: 15)")
    parser.add_argument("--amount", type=float, default=0.5, help="share pruned (default: 0.5)")
    options = parser.parse_args()
    names = publish.chosen(parser, options)
    torch.set_num_threads(1)
    also = []
    for key in options.also:
        if importlib.util.find_spec(OTHERS[key]) is None:
            print(f"{key} is left out: {OTHERS[key]} is not installed", file=sys.stderr)
        else:
            also.append(key)
    settings = {
        "threads": options.threads,
        "rounds": options.rounds,
        "amount": options.amount,
        "also": also,
    }
    env = publish.environment(*PACKAGES)
    results = publish.Results("benchmark", settings, env, options.fresh)
    for name in publish.progress(names, list(results.rows)):
        row = measure(name, also, options.threads, options.rounds, options.amount)
        results.add(name, row)
    text = table(results.rows, names, also)
    times = [t for n in names for t in results.rows[n]["times"].values()]
    spread = statistics.median((t["high"] - t["low"]) / t["median"] for t in times)
    note = (
        f"Medians of {options.rounds} interleaved rounds ± half the distance of the quartiles "
        f"(typically {spread / 2:.1%}), batch 1, {options.threads} thread(s), onnxruntime on CPU. "
        f"P1: {options.amount:.0%} of the filters of every convolution. *ideal*: ratio of the "
        "multiply-accumulates of all channels to those of channels that vary and are needed.\n\n"
        f"{publish.describe(results.head['environment'])}"
    )
    print(f"{text}\n\n{note}")
    if options.write or not options.names:
        docs = publish.ROOT / "docs"
        readme = publish.ROOT / "README.md"
        publish.replace_section(readme, "benchmark", f"{text}\n\n{note}")
        publish.replace_section(readme, "headline", headline(results.rows, names))
        publish.write(docs / "benchmark.json", results.text(names))
        publish.write(docs / "benchmark.png", chart(results.rows, names, also))
    return 0


if __name__ == "__main__":
    sys.exit(main())
