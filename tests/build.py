"""Build small ONNX models in a few lines, and compare two models in onnxruntime.

    g = Graph(opset=17)
    x = g.input("x", ["batch", 3, 8, 8])
    y = g.conv(x, pruned(g.normal(8, 3, 3, 3), [1, 4]), g.normal(8), pads=[1, 1, 1, 1])
    y = g.op("Relu", g.batchnorm(y, 8))
    g.output(y)
    model = g.model()

Nodes and tensors get predictable names (``conv1`` writes ``conv1.out`` and reads ``conv1.weight``),
biases and BatchNormalization statistics are never trivial unless a test says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
import onnxruntime as ort
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

Dim = int | str | None
Feeds = dict[str, np.ndarray]
Source = ModelProto | bytes | str | Path

_IR_VERSIONS = {7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 12: 7, 13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8}


class Graph:
    """A graph under construction.

    Operands are tensor names; an array becomes an initializer, None an omitted optional input.
    """

    def __init__(
        self,
        opset: int = 17,
        *,
        seed: int = 0,
        name: str = "graph",
        ir_version: int | None = None,
        domains: Mapping[str, int] | None = None,
    ):
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.name = name
        self.ir_version = ir_version or _IR_VERSIONS.get(opset, 9)
        self.domains = dict(domains or {})
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.initializers: list[TensorProto] = []
        self.value_info: list[ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self._taken: set[str] = set()

    # Tensors.

    def input(self, name: str, shape: Sequence[Dim] | None, dtype: Any = np.float32) -> str:
        """Declare an input; a string in the shape is a symbolic size, None an unnamed one."""
        self.inputs.append(_info(name, shape, dtype))
        return self._take(name)

    def output(self, *names: str, shape: Sequence[Dim] | None = None, dtype: Any = None) -> None:
        """Declare outputs; types and shapes that are not given are inferred."""
        for name in names:
            if dtype is None and shape is None:
                self.outputs.append(ValueInfoProto(name=name))
            else:
                self.outputs.append(_info(name, shape, dtype or np.float32))

    def const(self, values: Any, name: str | None = None) -> str:
        """Add an initializer."""
        name = self._take(name or self._fresh("const"))
        self.initializers.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def normal(self, *shape: int, dtype: Any = np.float32) -> np.ndarray:
        """Random values, scaled as weights are (by fan-in, if they have one)."""
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 4
        return (self.rng.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(dtype)

    def statistics(self, channels: int, dtype: Any = np.float32) -> list[np.ndarray]:
        """Scale, bias, mean and variance of a BatchNormalization that has been trained."""
        scale = self.rng.uniform(0.5, 1.5, channels)
        bias = self.rng.normal(0, 0.4, channels)
        mean = self.rng.normal(0, 0.4, channels)
        variance = self.rng.uniform(0.5, 2.0, channels)
        return [a.astype(dtype) for a in (scale, bias, mean, variance)]

    # Nodes.

    def op(
        self,
        op_type: str,
        *inputs: str | np.ndarray | None,
        outputs: int | Sequence[str] = 1,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Add a node.

        Args:
            op_type: the operator.
            inputs: its operands.
            outputs: how many outputs, or their names.
            name: the node's name; numbered by operator if not given, "" for an unnamed node.
            domain: the operator's domain.
            attributes: the node's attributes.

        Returns:
            The name of its output; a list of names if it does not have exactly one.
        """
        if name is None:
            name = self._fresh(op_type.lower())
        label = name or self._fresh("tensor")
        if isinstance(outputs, int):
            tails = ["out"] if outputs == 1 else [f"out{i}" for i in range(outputs)]
            outputs = [f"{label}.{t}" for t in tails]
        tails = ["data", "weight", "bias"]
        if op_type == "BatchNormalization":
            tails = ["data", "weight", "bias", "mean", "var"]
        operands = []
        for i, value in enumerate(inputs):
            if isinstance(value, (np.ndarray, np.generic)):
                value = self.const(value, f"{label}.{tails[i] if i < len(tails) else i}")
            operands.append(value or "")
        for tensor in outputs:
            self._take(tensor)
        self.nodes.append(
            helper.make_node(op_type, operands, list(outputs), name, domain=domain, **attributes)
        )
        return outputs[0] if len(outputs) == 1 else list(outputs)

    def conv(
        self,
        x: str,
        weight: str | np.ndarray,
        bias: str | np.ndarray | None = None,
        **attributes: Any,
    ) -> str:
        """Add a convolution."""
        return self.op("Conv", x, weight, *([] if bias is None else [bias]), **attributes)

    def gemm(
        self,
        x: str,
        weight: str | np.ndarray,
        bias: str | np.ndarray | None = None,
        **attributes: Any,
    ) -> str:
        """Add a fully connected layer; the weight is [outputs, inputs] unless ``transB=0``."""
        attributes.setdefault("transB", 1)
        return self.op("Gemm", x, weight, *([] if bias is None else [bias]), **attributes)

    def batchnorm(self, x: str, channels: int, **attributes: Any) -> str:
        """Add a BatchNormalization with statistics of its own."""
        return self.op("BatchNormalization", x, *self.statistics(channels), **attributes)

    def model(self, **fields: Any) -> ModelProto:
        """The model; keyword arguments set fields of it, such as ``producer_name``."""
        inputs = list(self.inputs)
        if self.ir_version < 4:
            # Initializers had to be listed among the inputs.
            inputs += [
                helper.make_tensor_value_info(t.name, t.data_type, t.dims)
                for t in self.initializers
            ]
        graph = helper.make_graph(
            self.nodes,
            self.name,
            inputs,
            self.outputs,
            self.initializers,
            value_info=self.value_info,
        )
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(d, v) for d, v in self.domains.items()]
        model = helper.make_model(
            graph, opset_imports=imports, ir_version=self.ir_version, functions=self.functions
        )
        for key, value in fields.items():
            setattr(model, key, value)
        if any(not o.HasField("type") for o in self.outputs):
            known = {o.name: o for o in onnx.shape_inference.infer_shapes(model).graph.output}
            for info in model.graph.output:
                if not info.HasField("type"):
                    info.CopyFrom(known[info.name])
        return model

    # Names.

    def _fresh(self, prefix: str) -> str:
        number = 1
        while f"{prefix}{number}" in self._taken:
            number += 1
        self._taken.add(f"{prefix}{number}")
        return f"{prefix}{number}"

    def _take(self, name: str) -> str:
        self._taken.add(name)
        return name


def pruned(weight: np.ndarray, channels: Iterable[int], axis: int = 0) -> np.ndarray:
    """A copy of the weight with some slices set to zero."""
    weight = weight.copy()
    index: list[Any] = [slice(None)] * weight.ndim
    index[axis] = list(channels)
    weight[tuple(index)] = 0
    return weight


def small_cnn(
    *,
    seed: int = 0,
    shape: Sequence[Dim] = ("batch", 3, 12, 12),
    widths: Sequence[int] = (16, 24),
    keep: float = 0.5,
    classes: int = 5,
    opset: int = 17,
    name: str = "graph",
) -> Graph:
    """A plain network: two rounds of Conv, BatchNormalization, Relu, then pooling and a Gemm.

    All filters have biases; all but a share of ``keep`` of them are pruned, so that their channels
    are constants that are not zero.  Its nodes are ``conv1, batchnormalization1, relu1, conv2, ...,
    globalaveragepool1, flatten1, gemm1``; its output is ``scores``.
    """
    g = Graph(opset, seed=seed, name=name)
    x, width = g.input("image", shape), shape[1]
    assert isinstance(width, int)
    for size in widths:
        weight = g.normal(size, width, 3, 3)
        dead = g.rng.permutation(size)[round(size * keep) :]
        x = g.conv(x, pruned(weight, dead), g.normal(size), pads=[1, 1, 1, 1])
        x = g.op("Relu", g.batchnorm(x, size))
        width = size
    x = g.op("Flatten", g.op("GlobalAveragePool", x))
    g.output(g.gemm(x, g.normal(classes, width), g.normal(classes), outputs=["scores"]))
    return g


def gated_constants() -> ModelProto:
    """Constants times a map, clipped to one value, beside channels that vary; a padded reader."""
    g = Graph()
    x = g.input("x", ["n", 3, 8, 8])
    fixed = g.conv(x, np.zeros((4, 3, 1, 1), np.float32), np.abs(g.normal(4)) + 1)
    weight = np.abs(g.normal(1, 4, 3, 3)) + 0.5
    gate = g.conv(fixed, weight, np.array([-3], np.float32), pads=[1] * 4)
    wide = g.conv(x, np.zeros((2, 3, 1, 1), np.float32), np.array([1, 2], np.float32))
    low, high = np.array(0.05, np.float32), np.array(0.1, np.float32)
    clipped = g.op("Clip", g.op("Mul", wide, gate), low, high)
    y = g.op("Concat", clipped, g.conv(x, g.normal(3, 3, 1, 1), g.normal(3)), axis=1)
    g.output(g.conv(y, g.normal(4, 5, 3, 3), g.normal(4), pads=[1] * 4))
    return g.model()


def initializer(model: ModelProto, name: str) -> np.ndarray:
    """The values of an initializer."""
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def set_initializer(model: ModelProto, name: str, values: np.ndarray) -> None:
    """Give an initializer other values, in place."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(values), name))


def node(model: ModelProto, name: str) -> onnx.NodeProto:
    """The node of this name."""
    return next(n for n in model.graph.node if n.name == name)


def count(model: ModelProto, op_type: str) -> int:
    """How many nodes the model has of an operator."""
    return sum(n.op_type == op_type for n in model.graph.node)


def parameters(model: ModelProto) -> int:
    """The number of elements of all initializers."""
    return sum(int(np.prod(t.dims)) for t in model.graph.initializer)


def with_outputs(model: ModelProto, *names: str) -> ModelProto:
    """A copy with inner tensors as further outputs."""
    copy = ModelProto.FromString(model.SerializeToString())
    present = {o.name for o in copy.graph.output}
    copy.graph.output.extend(ValueInfoProto(name=n) for n in names if n not in present)
    return copy


def random_feeds(model: ModelProto, count: int = 2, *, seed: int = 7, **sizes: int) -> list[Feeds]:
    """Inputs N(0, 1) for a model; free dimensions are 2, or the size given for their symbol."""
    rng = np.random.default_rng(seed)
    weights = {t.name for t in model.graph.initializer}
    found = []
    for _ in range(count):
        feeds = {}
        for info in model.graph.input:
            if info.name in weights:
                continue
            kind = info.type.tensor_type
            shape = [d.dim_value or sizes.get(d.dim_param, 2) for d in kind.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            values: np.ndarray = rng.standard_normal(shape)
            if dtype.kind in "iu":
                values = rng.integers(0, 3, shape)
            elif dtype.kind == "b":
                values = values > 0
            feeds[info.name] = np.asarray(values).astype(dtype)
        found.append(feeds)
    return found


def run(source: Source, feeds: Feeds, *, optimize: bool = True) -> dict[str, np.ndarray]:
    """Run a model in onnxruntime; the outputs by name."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if isinstance(source, ModelProto):
        source = source.SerializeToString()
    model = source if isinstance(source, bytes) else str(source)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def relative_error(expected: np.ndarray, actual: np.ndarray) -> float:
    """The largest difference, relative to the largest magnitude expected."""
    assert expected.shape == actual.shape and expected.dtype == actual.dtype
    if expected.size == 0 or np.array_equal(expected, actual, equal_nan=True):
        return 0.0
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(a)
    assert np.array_equal(a[~finite], b[~finite], equal_nan=True), "NaN or infinity differ"
    gap = np.max(np.abs(a - b), where=finite, initial=0.0)
    return float(gap / max(np.max(np.abs(a), where=finite, initial=0.0), np.finfo(float).tiny))


def assert_same_function(
    original: Source, other: Source, feeds_list: Iterable[Feeds], rtol: float = 1e-5
) -> None:
    """Assert that two models give the same values, relative to each output's magnitude.

    The original runs as it is; the other one with onnxruntime's optimisations, as in deployment.
    """
    for feeds in feeds_list:
        expected = run(original, feeds, optimize=False)
        actual = run(other, feeds)
        assert list(actual) == list(expected)
        for name, values in expected.items():
            error = relative_error(values, actual[name])
            assert error <= rtol, f"output '{name}' is off by {error:.2g} of its magnitude"


def _info(name: str, shape: Sequence[Dim] | None, dtype: Any) -> ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, kind, shape)
