"""Models larger than protobuf's 2 GiB: make them, simplify them, measure the whole process.

    python scripts/big_models.py [--gigabytes 3] [--folder DIR] [--pruned 0.5] [--write]

A perceptron and a convolutional network with BatchNormalization, their weights in external data, a
share of the channels pruned; written piece by piece. Measured are wall time and peak memory
(resident set, mapped files included) of ``python -m onnx_simplify``. --write puts the table into
docs/robustness.md. Needs three times the size on disk.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

import cost
import publish

_KIND = TensorProto.FLOAT
_ALLOWED_FACTOR, _ALLOWED_MIB = 1.5, 500


class Writer:
    """A model whose weights go to ``<name>.data`` as they are made."""

    def __init__(self, path: Path):
        """Start an empty model.

        Args:
            path: the file; the folder must exist.
        """
        self.path = path
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[TensorProto] = []
        self._data = open(f"{path}.data", "wb")  # noqa: SIM115 - closed by finish()

    def weight(self, name: str, values: np.ndarray) -> str:
        """Append an initializer."""
        tensor = TensorProto(name=name, data_type=_KIND, dims=values.shape)
        tensor.data_location = TensorProto.EXTERNAL
        place = {
            "location": f"{self.path.name}.data",
            "offset": self._data.tell(),
            "length": values.nbytes,
        }
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(np.ascontiguousarray(values).data)
        self.tensors.append(tensor)
        return name

    def finish(self, inputs: list[int | str], outputs: list[int | str], result: str) -> None:
        """Write the model; its input is named ``x``."""
        self._data.close()
        graph = helper.make_graph(
            self.nodes,
            "big",
            [helper.make_tensor_value_info("x", _KIND, inputs)],
            [helper.make_tensor_value_info(result, _KIND, outputs)],
            self.tensors,
        )
        opsets = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), self.path)


def make_perceptron(path: Path, size: int, pruned: float) -> None:
    """Layers of 8192 features, of ``size`` bytes altogether."""
    width = 8192
    depth = max(1, round(size / (4 * width * width)))
    _make(path, depth, (width, width), pruned, "Gemm", [("batch"), width], {"transB": 1})


def make_convolutional(path: Path, size: int, pruned: float) -> None:
    """Convolutions 3x3 of 2048 channels, of ``size`` bytes altogether."""
    width = 2048
    depth = max(1, round(size / (4 * width * width * 9)))
    shape = (width, width, 3, 3)
    _make(path, depth, shape, pruned, "Conv", ["batch", width, 7, 7], {"pads": [1] * 4})


def _make(
    path: Path,
    depth: int,
    shape: tuple[int, ...],
    pruned: float,
    op: str,
    signature: list[int | str],
    attributes: dict[str, Any],
) -> None:
    random = np.random.default_rng(0)
    writer, source = Writer(path), "x"
    for k in range(depth):
        fan_in = int(np.prod(shape[1:]))
        weight = random.standard_normal(shape, np.float32) * np.float32((2 / fan_in) ** 0.5)
        bias = random.standard_normal(shape[0], np.float32) * np.float32(0.1)
        if k < depth - 1:
            weight[random.permutation(shape[0])[: int(pruned * shape[0])]] = 0
        operands = [source, writer.weight(f"w{k}", weight), writer.weight(f"b{k}", bias)]
        writer.nodes.append(helper.make_node(op, operands, [f"c{k}"], f"layer{k}", **attributes))
        result = f"c{k}"
        if op == "Conv":
            result = _batchnorm(writer, result, shape[0], k, random)
        writer.nodes.append(helper.make_node("Relu", [result], [f"r{k}"], f"relu{k}"))
        source = f"r{k}"
    writer.finish(signature, signature, source)


def _batchnorm(
    writer: Writer, source: str, channels: int, number: int, random: np.random.Generator
) -> str:
    """A BatchNormalization with statistics of its own."""
    statistics = random.uniform(0.5, 1.5, (4, channels)).astype(np.float32)
    names = [
        writer.weight(f"{kind}{number}", values)
        for kind, values in zip(("scale", "shift", "mean", "variance"), statistics, strict=True)
    ]
    result = f"n{number}"
    node = helper.make_node("BatchNormalization", [source, *names], [result], f"norm{number}")
    writer.nodes.append(node)
    return result


MAKERS: dict[str, Callable[[Path, int, float], None]] = {
    "perceptron": make_perceptron,
    "convolutional network": make_convolutional,
}


def measure(name: str, folder: Path, size: int, pruned: float) -> list[str]:
    """Make one model, simplify it in a process of its own, and return a row of the table."""
    source, result = folder / "in.onnx", folder / "out.onnx"
    MAKERS[name](source, size, pruned)
    command = [sys.executable, "-m", "onnx_simplify", str(source), str(result), "--quiet"]
    seconds, peak, code = cost.run(command)
    if code:
        raise SystemExit(f"{name}: exit code {code}")
    before, after = (
        sum(p.stat().st_size for p in folder.glob(f"{file.name}*")) / 2**20
        for file in (source, result)
    )
    allowed = _ALLOWED_FACTOR * before + _ALLOWED_MIB
    return [
        f"{name}, {pruned:.0%} pruned",
        f"{before:,.0f} → {after:,.0f}",
        f"{peak:,.0f}",
        f"{allowed:,.0f}",
        f"{seconds:.0f}",
    ]


def main() -> None:
    """Measure both networks, pruned and not, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--pruned", type=float, nargs="*", default=[0.5, 0.1, 0.0])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for name in MAKERS:
        for pruned in arguments.pruned:
            folder = Path(tempfile.mkdtemp(dir=arguments.folder))
            try:
                size = int(arguments.gigabytes * 1e9)
                rows.append(measure(name, folder, size, pruned))
            finally:
                shutil.rmtree(folder)
            print(" | ".join(rows[-1]), flush=True)
    header = ["network", "MiB", "peak MiB", "allowed MiB", "s"]
    env = publish.describe(publish.environment("onnx", "onnxruntime"))
    if arguments.write:
        text = f"{publish.markdown(header, rows)}\n\n{env}"
        publish.replace_section(publish.ROOT / "docs" / "robustness.md", "big", text)


if __name__ == "__main__":
    main()
