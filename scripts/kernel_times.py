"""Where a model's time goes in onnxruntime: its own profiler's kernel times, summed up.

    python scripts/kernel_times.py FILE [FILE ...] [--top N]

One thread. For every operator that runs (after onnxruntime's optimisations) the number of nodes,
microseconds, their share, and for convolutions and matrix products the multiply-accumulates per
second; then the same for the slowest nodes. The last line compares with the time that all
multiply-accumulates would take at the rate of the fastest node. Needs nothing but the package.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

import publish  # noqa: F401 - puts the package on the path
from onnx_simplify.graph.load import load
from onnx_simplify.runtime.reference import Reference

RUNS = 30


@dataclass
class Kernel:
    """One node as onnxruntime runs it: its median time in microseconds, and its work."""

    name: str
    op: str
    time: float
    macs: int
    shapes: str


def kernel_events(session: ort.InferenceSession) -> list[dict[str, Any]]:
    """What a session's profiler recorded of its kernels; ends the profiling."""
    events = json.loads(Path(session.end_profiling()).read_text())
    return [
        event
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]


def kernels(path: str) -> list[Kernel]:
    """All kernels of a model, in execution order."""
    model = load(path)
    feeds = Reference(model).runs[0].feeds
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(RUNS):
            session.run(None, feeds)
        events = kernel_events(session)
    times: dict[str, list[float]] = {}
    first: dict[str, dict] = {}
    for event in events:
        times.setdefault(event["name"], []).append(event["dur"])
        first.setdefault(event["name"], event["args"])
    found = []
    for name, values in times.items():
        arguments = first[name]
        inputs = [next(iter(s.values())) for s in arguments["input_type_shape"]]
        outputs = [next(iter(s.values())) for s in arguments["output_type_shape"]]
        macs, op = 0, arguments["op_name"]
        if "Conv" in op and len(inputs) > 1:
            macs = int(np.prod(outputs[0]) * np.prod(inputs[1][1:]))
        elif op in ("Gemm", "FusedGemm", "MatMul") and inputs and outputs:
            macs = int(np.prod(outputs[0]) * inputs[0][-1])
        shapes = f"{inputs[:2]} -> {outputs[:1]}"
        label = name.removesuffix("_kernel_time")
        found.append(Kernel(label, op, statistics.median(values[2:]), macs, shapes))
    return found


def report(path: str, top: int) -> None:
    """Print the tables of one model."""
    found = kernels(path)
    total = sum(k.time for k in found)
    console = Console(width=150)
    table = Table("operator", "nodes", "µs", "share", "GMAC/s", title=Path(path).name)
    by_op: dict[str, list[Kernel]] = {}
    for kernel in found:
        by_op.setdefault(kernel.op, []).append(kernel)
    for op, group in sorted(by_op.items(), key=lambda item: -sum(k.time for k in item[1])):
        time, macs = sum(k.time for k in group), sum(k.macs for k in group)
        table.add_row(op, str(len(group)), f"{time:.0f}", f"{time / total:.0%}", _rate(macs, time))
    console.print(table)
    slow = Table("node", "operator", "µs", "share", "GMAC/s", "shapes")
    for k in sorted(found, key=lambda k: -k.time)[:top]:
        rate = _rate(k.macs, k.time)
        slow.add_row(k.name, k.op, f"{k.time:.0f}", f"{k.time / total:.0%}", rate, k.shapes)
    console.print(slow)
    macs = sum(k.macs for k in found)
    best = max((k.macs / k.time for k in found if k.macs > 1e6), default=0.0)
    if best:
        console.print(
            f"{total:.0f} µs in kernels; {macs / 1e6:.0f} million multiply-accumulates at the rate "
            f"of the fastest node ({best / 1e3:.0f} GMAC/s) would take {macs / best:.0f} µs"
        )


def _rate(macs: int, time: float) -> str:
    return f"{macs / time / 1e3:.0f}" if macs and time else ""


def main() -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description="Kernel times in onnxruntime.")
    parser.add_argument("files", metavar="FILE", nargs="+")
    parser.add_argument("--top", type=int, default=12, help="slowest nodes to list (default: 12)")
    options = parser.parse_args()
    for path in options.files:
        report(path, options.top)
    return 0


if __name__ == "__main__":
    sys.exit(main())
