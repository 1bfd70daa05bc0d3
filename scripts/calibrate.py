"""Measure the figures of the cost model on this machine, and how well it predicts.

    python scripts/calibrate.py [--target NAME] [--write]

Times single layers of many sizes in onnxruntime (one thread, kernel times from its profiler, the
median of each), and fits the costs of `onnx_simplify/planning/profiles.py` to them: nonnegative
least squares on relative errors. Prints the profile as Python, the errors by kind of layer, and
what the profile that ships predicts. --write puts the figures and a plot of predicted against
measured times into docs/. Run it on an idle machine. Needs the ``bench`` extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

import publish
from kernel_times import kernel_events
from onnx_simplify.planning import profiles
from onnx_simplify.planning.costs import Layer, convolution, is_blocked, terms

RUNS = 25
FITTED = (
    "mac_cost",
    "load_cost",
    "pointwise_cost",
    "depthwise_mac_cost",
    "depthwise_load_cost",
    "plain_mac_cost",
    "unfold_cost",
    "group_cost",
    "node_cost",
)


def layers() -> Iterator[Layer]:
    """The layers to time: those of usual networks, and their neighbours."""
    usual = {56: (16, 32, 64), 28: (32, 64, 128), 14: (64, 128, 256), 7: (256,)}
    for side, widths in usual.items():
        for inputs in (8, 12, 24, *widths):
            for outputs in (*widths, 48, 2 * widths[-1]):
                for taps in (1, 9):
                    yield Layer(1, inputs, outputs, taps, side * side)
        for channels in (*widths, 4 * widths[0], 144):
            for taps in (9, 25):
                yield Layer(channels, 1, 1, taps, side * side)
                yield Layer(channels - 1, 1, 1, taps, side * side)
        for groups in (4, 32):
            for each in (2, 4, 8, 12, 16, 32):
                if groups * each <= 8 * widths[-1]:
                    yield Layer(groups, each, each, 9, side * side)
                yield Layer(groups, 16, 32, 1, side * side)
        for outputs in (widths[0] - 1, widths[-1] + 2):
            yield Layer(1, widths[0], outputs, 9, side * side)


def session(
    nodes: list[onnx.NodeProto],
    arrays: dict[str, np.ndarray],
    shape: list[int],
    prefix: str | None = None,
) -> ort.InferenceSession:
    """A session for ``x -> y``, with onnxruntime's profiler if a prefix for its file is given."""
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = prefix
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def kernel_times(layer: Layer, folder: str) -> dict[str, float]:
    """Nanoseconds of each kernel that runs for a layer, by operator."""
    side, reach = round(layer.positions**0.5), round(layer.taps**0.5)
    random = np.random.default_rng(0)
    weight = random.normal(0, 0.1, (layer.groups * layer.outputs, layer.inputs, reach, reach))
    node = helper.make_node(
        "Conv", ["x", "w", "b"], ["y"], group=layer.groups, pads=[reach // 2] * 4
    )
    shape = [1, layer.groups * layer.inputs, side, side]
    arrays = {"w": weight.astype(np.float32), "b": np.ones(len(weight), np.float32)}
    run = session([node], arrays, shape, os.path.join(folder, "profile"))
    data = random.normal(size=shape).astype(np.float32)
    for _ in range(RUNS):
        run.run(None, {"x": data})
    found: dict[str, list[float]] = {}
    for event in kernel_events(run):
        found.setdefault(event["args"]["op_name"], []).append(event["dur"] * 1e3)
    return {op: statistics.median(times[2:]) for op, times in found.items()}


def seconds(nodes: list[onnx.NodeProto], arrays: dict[str, np.ndarray], shape: list[int]) -> float:
    """The median time of a run."""
    run = session(nodes, arrays, shape)
    data = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = []
    for _ in range(4 * RUNS):
        start = time.perf_counter()
        run.run(None, {"x": data})
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def chain(length: int, channels: int, side: int, maps: bool) -> float:
    """Nanoseconds of 1x1 convolutions in a row, a map added behind each on request."""
    random = np.random.default_rng(0)
    nodes, arrays, source = [], {}, "x"
    for k in range(length):
        arrays[f"w{k}"] = random.normal(0, 0.1, (channels, channels, 1, 1)).astype(np.float32)
        last = "y" if k == length - 1 else f"t{k}"
        nodes.append(helper.make_node("Conv", [source, f"w{k}"], [f"c{k}" if maps else last]))
        if maps:
            arrays[f"m{k}"] = random.normal(size=(1, channels, side, side)).astype(np.float32)
            nodes.append(helper.make_node("Add", [f"c{k}", f"m{k}"], [last]))
        source = last
    return seconds(nodes, arrays, [1, channels, side, side]) * 1e9


def overheads() -> dict[str, float]:
    """Costs that are not those of a single kernel."""
    start = (chain(8, 16, 3, True) - chain(8, 16, 3, False)) / 8
    sizes = ((32, 56), (64, 28), (256, 14))
    maps = [
        ((chain(8, n, s, True) - chain(8, n, s, False)) / 8 - start) / (n * s * s) for n, s in sizes
    ]
    copies = []
    for channels, side in sizes:
        indices = np.random.default_rng(0).permutation(channels)
        node = helper.make_node("Gather", ["x", "i"], ["y"], axis=1)
        both = [
            helper.make_node("Gather", ["x", "i"], ["z"], axis=1),
            helper.make_node("Gather", ["z", "i"], ["y"], axis=1),
        ]
        shape = [1, channels, side, side]
        time_of = [seconds(nodes, {"i": indices}, shape) for nodes in ([node], both)]
        copies.append((time_of[1] - time_of[0]) * 1e9 / (channels * side * side))
    return {
        "node_cost": (chain(48, 16, 1, False) - chain(16, 16, 1, False)) / 32,
        "map_cost": max(statistics.median(maps), 0.0),
        "copy_cost": statistics.median(copies),
    }


def kind(profile: profiles.Profile, layer: Layer) -> str:
    """What sort of kernel computes a layer."""
    if not is_blocked(profile, layer):
        return "plain"
    if layer.is_depthwise:
        return "depthwise"
    return "grouped" if layer.groups > 1 else "3x3" if layer.taps > 1 else "1x1"


def fit(profile: profiles.Profile, timed: list[tuple[Layer, float]]) -> dict[str, float]:
    """The costs that predict kernel times best, by relative error."""
    from scipy.optimize import nnls

    rows = [[terms(profile, layer).get(name, 0) / t for name in FITTED] for layer, t in timed]
    found, _ = nnls(np.array(rows), np.ones(len(rows)))
    return dict(zip(FITTED, found.tolist(), strict=True))


def chart(points: list[tuple[str, float, float]]) -> bytes:
    """A PNG: predicted against measured microseconds, by kind of layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 6), dpi=90)
    colours = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999")
    for colour, name in zip(colours, sorted({p[0] for p in points}), strict=False):
        own = [(m / 1e3, p / 1e3) for k, m, p in points if k == name]
        axes.plot(*zip(*own, strict=True), "o", ms=4, color=colour, label=name)
    ends = [min(p[1] for p in points) / 2e3, max(p[1] for p in points) / 5e2]
    axes.plot(ends, ends, color="black", lw=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured (µs)", ylabel="predicted (µs)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def errors(
    profile: profiles.Profile, timed: list[tuple[Layer, float]]
) -> dict[str, dict[str, float]]:
    """Median and largest factor between predicted and measured time, by kind of layer."""
    factors: dict[str, list[float]] = {}
    for layer, measured in timed:
        ratio = convolution(profile, layer) / measured
        factors.setdefault(kind(profile, layer), []).append(max(ratio, 1 / ratio))
    return {
        name: {
            "layers": len(found),
            "median": round(statistics.median(found), 3),
            "worst": round(max(found), 3),
        }
        for name, found in sorted(factors.items())
    }


def main() -> int:
    """Measure, fit, print and publish."""
    parser = argparse.ArgumentParser(description="Calibrate the cost model.")
    parser.add_argument("--target", choices=list(profiles.PROFILES), help="default: this machine")
    parser.add_argument("--write", action="store_true", help="write docs/costs.json and .png")
    options = parser.parse_args()
    shipped = profiles.profile(options.target)
    timed: list[tuple[Layer, float]] = []
    todo = list(dict.fromkeys(layers()))
    keys = [str(k) for k in range(len(todo))]
    with tempfile.TemporaryDirectory() as folder:
        for key in publish.progress(keys, []):
            layer = todo[int(key)]
            found = kernel_times(layer, folder)
            conv = found.get("Conv") or found.get("FusedConv")
            # The profiler counts in microseconds.
            if conv and conv >= 5000:
                timed.append((layer, conv))
    rest = overheads()
    costs = fit(shipped, timed)
    timed = [(layer, kernel + rest["node_cost"]) for layer, kernel in timed]
    # What a kernel needs to start comes on top of what onnxruntime needs to call it.
    costs = {**rest, **costs, "node_cost": costs["node_cost"] + rest["node_cost"]}
    costs = {name: float(f"{value:.3g}") for name, value in costs.items()}
    here = dataclasses.replace(shipped, **costs)  # type: ignore[arg-type]
    print("\n".join(f"    {name}: float = {value:g}" for name, value in costs.items()))
    report = {"fitted": errors(here, timed), "shipped": errors(shipped, timed)}
    for title, kinds in report.items():
        print(f"\n{title} costs: factor between predicted and measured")
        for name, row in kinds.items():
            print(
                f"  {name:10} {row['layers']:4} layers  median {row['median']:.2f}"
                f"  worst {row['worst']:.2f}"
            )
    if options.write:
        docs = publish.ROOT / "docs"
        content = {
            "environment": publish.environment("onnxruntime"),
            "profile": shipped.name,
            "costs": costs,
            "errors": report,
        }
        publish.write(docs / "costs.json", json.dumps(content, indent=1) + "\n")
        points = [(kind(shipped, n), t, convolution(shipped, n)) for n, t in timed]
        publish.write(docs / "costs.png", chart(points))
    return 0


if __name__ == "__main__":
    sys.exit(main())
