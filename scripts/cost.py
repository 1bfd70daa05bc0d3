"""What the tool itself costs: time on chains of growing length, or a whole process on one file.

python scripts/cost.py chains          seconds per node for 100 to 10,000 nodes
python scripts/cost.py process FILE    wall time and peak memory of the whole process, beside
                                       onnxslim's (with its own check) if that is installed
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RUNS = 5


def chain(nodes: int) -> onnx.ModelProto:
    """Convolutions and ReLUs in a row, half of the filters pruned, biases alive."""
    random = np.random.default_rng(0)
    body, weights, source = [], [], "x"
    for k in range(nodes // 2):
        weight = random.normal(0, 0.2, (8, 8, 3, 3)).astype(np.float32)
        weight[random.permutation(8)[:4]] = 0
        weights.append(numpy_helper.from_array(weight, f"w{k}"))
        bias = random.normal(0, 0.1, 8).astype(np.float32)
        weights.append(numpy_helper.from_array(bias, f"b{k}"))
        operands = [source, f"w{k}", f"b{k}"]
        body.append(helper.make_node("Conv", operands, [f"c{k}"], f"conv{k}", pads=[1] * 4))
        body.append(helper.make_node("Relu", [f"c{k}"], [f"r{k}"], f"relu{k}"))
        source = f"r{k}"
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        body,
        "chain",
        [helper.make_tensor_value_info("x", kind, [1, 8, 8, 8])],
        [helper.make_tensor_value_info(source, kind, [1, 8, 8, 8])],
        weights,
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def chains() -> None:
    """Print time by length."""
    import onnx_simplify

    for nodes in (100, 300, 1000, 3000, 10000):
        model = chain(nodes)
        start = time.perf_counter()
        onnx_simplify.simplify(model)
        seconds = time.perf_counter() - start
        each = seconds / nodes * 1e3
        print(f"{nodes:6} nodes {seconds:8.2f} s {each:8.2f} ms per node", flush=True)


def process(file: str) -> None:
    """Print wall time and peak memory, medians of interleaved runs."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "out.onnx"))
        commands = {"onnx-simplify": [sys.executable, "-m", "onnx_simplify", file, out, "--quiet"]}
        if importlib.util.find_spec("onnxslim"):
            slim = [sys.executable, "-m", "onnxslim", file, out]
            commands["onnxslim"] = slim
            commands["onnxslim --model-check"] = [*slim, "--model-check"]
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in commands}
        for _ in range(RUNS):
            for name, command in commands.items():
                found[name].append(run(command))
    for name, runs in found.items():
        wall, peak, _ = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{name:24} {wall:6.2f} s {peak:7.0f} MiB")


def run(command: list[str]) -> tuple[float, float, int]:
    """Wall seconds, peak MiB and exit code of a process that prints nothing but errors."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    return seconds, usage.ru_maxrss / 1024, os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    if sys.argv[1:] == ["chains"]:
        chains()
    elif len(sys.argv) == 3 and sys.argv[1] == "process":
        process(os.path.abspath(sys.argv[2]))
    else:
        sys.exit(__doc__)
