"""What free sizes cost: parameters that stay, beside those that stay with fixed sizes.

    python scripts/free_sizes.py [NAME ...] [--exporters ...] [--write]

Each architecture, pruned by P1, is exported twice, once for one image of one size and once for any
number of images of any size (where the exporter refuses that, of one size), and simplified with as
few channels as possible. The results with free sizes are compared with the original at five sizes
that the tool has not tried. The table goes into docs/robustness.md when no NAME is given or with
--write. An interrupted run goes on where it stopped. Needs the ``torch`` extra. Exit code 1 if
more than 1% of the parameters stay for free sizes alone, or an error exceeds 1e-5.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import onnx

import publish
from architectures import EXPORTERS, LIMIT

# Batch, and height and width as shares of the size that the network was made for.
SIZES = ((1, 1.0, 1.0), (2, 1.0, 1.25), (1, 1.5, 1.0), (3, 1.125, 1.0), (1, 1.25, 1.375))
FREE: tuple[dict[int, str], ...] = ({0: "batch", 2: "height", 3: "width"}, {0: "batch"})
PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime")
_SLACK = 0.01


def exported(name: str, exporter: Any, dims: dict[int, str] | None) -> onnx.ModelProto:
    """The pruned network as a model."""
    import torch

    from torch_bridge import export, zoo

    size = zoo.image_size(name)
    return export(
        zoo.prune(zoo.realistic(name), name, "P1"),
        torch.zeros(1, 3, size, size),
        dynamic_shapes=dims,
        exporter=exporter,
        fuse_batchnorm=False,
    )


def runs_at(model: onnx.ModelProto, shape: tuple[int, ...]) -> np.ndarray | None:
    """The model's output for random images; None if it does not take them."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    images = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    try:
        found: np.ndarray = session.run(None, {session.get_inputs()[0].name: images})[0]
    except Exception:  # some heads fix the size
        return None
    return found


def worst(before: onnx.ModelProto, after: onnx.ModelProto, size: int, free: bool) -> float:
    """The largest relative error over the sizes that the original takes."""
    found = 0.0
    for batch, height, width in SIZES:
        shape = (batch, 3, *(int(size * k) if free else size for k in (height, width)))
        expected = runs_at(before, shape)
        if expected is None:
            continue
        actual = runs_at(after, shape)
        if actual is None:
            return float("inf")
        found = max(found, float(np.abs(expected - actual).max() / np.abs(expected).max()))
    return found


def measure(name: str, exporter: str) -> dict[str, Any]:
    """Parameters before, after with fixed sizes and with free ones, what is free, and the error."""
    import onnx_simplify
    from torch_bridge import zoo

    _, fixed = onnx_simplify.simplify(exported(name, exporter, None), channel_multiple=1)
    row: dict[str, Any] = {"before": fixed.before.parameters, "fixed": fixed.after.parameters}
    for dims in FREE:
        try:
            model = exported(name, exporter, dims)
        except Exception:  # not every network takes every size
            continue
        result, report = onnx_simplify.simplify(model, channel_multiple=1)
        row |= {
            "free": report.after.parameters,
            "dims": list(dims.values()),
            "error": worst(model, result, zoo.image_size(name), len(dims) > 1),
        }
        break
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    header = ["architecture, exporter", "before", "fixed sizes", "free sizes", "free", "error"]
    lines = [
        [
            key.replace(" ", ", "),
            f"{row['before'] / 1e6:.2f} M",
            f"{row['fixed'] / 1e6:.3f} M",
            f"{row['free'] / 1e6:.3f} M ({row['free'] / row['fixed'] - 1:+.2%})",
            ", ".join(row["dims"]),
            f"{row['error']:.0e}",
        ]
        for key, row in rows.items()
    ]
    return publish.markdown(header, lines)


def main() -> int:
    """Measure what was asked for, print and perhaps write it."""
    import torch

    from torch_bridge import zoo

    parser = argparse.ArgumentParser(description="Compare free sizes with fixed ones.")
    publish.add_arguments(parser, zoo.ARCHITECTURES)
    parser.add_argument("--exporters", nargs="+", default=EXPORTERS, choices=EXPORTERS)
    options = parser.parse_args()
    names = publish.chosen(parser, options)
    torch.set_num_threads(1)
    env = publish.environment(*PACKAGES)
    results = publish.Results("free_sizes", {"sizes": SIZES}, env, options.fresh)
    wanted = [f"{name} {exporter}" for name in names for exporter in options.exporters]
    for key in publish.progress(wanted, list(results.rows)):
        results.add(key, measure(*key.split()))
    rows = {key: results.rows[key] for key in wanted}
    text = f"{table(rows)}\n\n{publish.describe(results.head['environment'])}"
    print(text)
    if options.write or not options.names:
        publish.replace_section(publish.ROOT / "docs" / "robustness.md", "free", text)
    good = all(
        row["free"] <= row["fixed"] * (1 + _SLACK) and row["error"] <= LIMIT
        for row in rows.values()
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
