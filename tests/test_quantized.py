"""Quantised models: integers, scales and zero points shrink together; nothing is rounded anew."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

import onnx_simplify
from build import (
    Graph,
    assert_same_function,
    count,
    initializer,
    pruned,
    random_feeds,
    set_initializer,
)
from onnx_simplify.graph.load import load
from onnx_simplify.graph.quantized import Quantized, QuantizedConstant
from versions import needs_onnxruntime

DEAD = range(0, 16, 2)


def network(*, biases: str = "zero") -> onnx.ModelProto:
    """Convolutions (plain, depthwise, 1x1), a residual sum, a Gemm; half of the filters pruned."""
    g = Graph(opset=17)

    def conv(x: str, inputs: int, size: int, **options: int) -> str:
        bias = g.normal(16)
        if biases != "random":
            bias[DEAD] = 0 if biases == "zero" else -np.abs(bias[DEAD])
        weight = pruned(g.normal(16, inputs, size, size), DEAD)
        return g.op("Relu", g.conv(x, weight, bias, pads=[size // 2] * 4, **options))

    first = conv(g.input("x", ["n", 3, 12, 10]), 3, 3)
    y = conv(conv(first, 16, 3), 1, 3, group=16)
    y = conv(g.op("Add", conv(y, 16, 1), first), 16, 1)
    y = g.op("Flatten", g.op("GlobalAveragePool", y))
    g.output(g.gemm(y, g.normal(5, 16), g.normal(5), transB=1))
    return g.model()


class Batches(CalibrationDataReader):
    """A few random images."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.batches = iter(random.standard_normal((4, 4, 3, 12, 10)).astype(np.float32))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch."""
        batch = next(self.batches, None)
        return None if batch is None else {"x": batch}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The quantiser recommends preprocessing."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def quantized(folder: Path, model: onnx.ModelProto, **options: object) -> onnx.ModelProto:
    onnx.save(model, folder / "float.onnx")
    quantize_static(folder / "float.onnx", folder / "int8.onnx", Batches(), **options)
    return onnx.load(folder / "int8.onnx")


def deployed(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """The output, with onnxruntime's integer kernels."""
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize(
    "weight, activation, per_channel",
    [
        (QuantType.QInt8, QuantType.QUInt8, False),
        (QuantType.QInt8, QuantType.QUInt8, True),
        (QuantType.QInt8, QuantType.QInt8, False),
        (QuantType.QInt8, QuantType.QInt8, True),
        (QuantType.QUInt8, QuantType.QUInt8, False),
        pytest.param(
            *(QuantType.QUInt8, QuantType.QUInt8, True),
            marks=needs_onnxruntime("1.27", "the quantiser makes a model that does not run"),
        ),
    ],
)
@pytest.mark.parametrize("biases", ["zero", "negative", "random"])
def test_static_quantization(tmp_path, weight, activation, per_channel, biases):
    """Equal to the last bit, in float and in onnxruntime's integer kernels."""
    model = quantized(
        tmp_path,
        network(biases=biases),
        weight_type=weight,
        activation_type=activation,
        per_channel=per_channel,
    )
    result, report = onnx_simplify.simplify(model, channel_multiple=1)
    x = np.random.default_rng(1).standard_normal((3, 3, 12, 10)).astype(np.float32)
    np.testing.assert_array_equal(deployed(result, x), deployed(model, x))
    assert_same_function(model, result, [{"x": x}, {"x": x[:1]}], rtol=1e-6)
    integers = {t.data_type for t in result.graph.initializer if len(t.dims) > 1}
    assert integers <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    for op in ("QuantizeLinear", "DequantizeLinear"):
        assert count(result, op) == count(model, op)
    if biases != "random":
        # One set of filters for the residual stream, of which the sum's second operand has all.
        assert [layer.outputs_after for layer in report.layers] == [8, 8, 8, 8, 8, 5]
    else:
        assert 0 < report.channels_removed < 40
    shapes = {t.name: list(t.dims) for t in result.graph.initializer}
    for node in result.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in shapes:
            stored, scale, zero = (shapes[name] for name in node.input)
            assert scale in ([], [1], stored[:1])
            assert len(zero) == 0 or zero == scale
    again, second = onnx_simplify.simplify(result, channel_multiple=1)
    assert second.after.parameters == second.before.parameters


@pytest.mark.parametrize("how", ["dynamic", "QOperator"])
def test_other_formats_are_left_alone(tmp_path, how):
    model = network()
    if how == "dynamic":
        onnx.save(model, tmp_path / "float.onnx")
        quantize_dynamic(
            tmp_path / "float.onnx", tmp_path / "int8.onnx", weight_type=QuantType.QUInt8
        )
        model = onnx.load(tmp_path / "int8.onnx")
        assert count(model, "ConvInteger")
    else:
        model = quantized(tmp_path, model, quant_format=QuantFormat.QOperator)
        assert count(model, "QLinearConv")
    result, _ = onnx_simplify.simplify(model, channel_multiple=1)
    x = np.random.default_rng(1).standard_normal((3, 3, 12, 10)).astype(np.float32)
    np.testing.assert_array_equal(deployed(result, x), deployed(model, x))


def activation(g: Graph, x: str, scale: float, zero: int = 0) -> str:
    """Quantise and dequantise."""
    parameters = np.float32(scale), np.uint8(zero)
    return g.op("DequantizeLinear", g.op("QuantizeLinear", x, *parameters), *parameters)


def by_hand(size: int, pads: int, *, bias_scale: float = 0.5 * 0.25) -> onnx.ModelProto:
    """Two convolutions; the first has four dead filters with biases that survive the ReLU."""
    g = Graph(opset=17)
    random = np.random.default_rng(0)
    weight = random.integers(-7, 8, (8, 3, 1, 1)).astype(np.int8)
    weight[:4] = 0
    bias = np.array([8, 16, 24, 32, 1, 2, 3, 4], np.int32)
    x = activation(g, g.input("x", ["n", 3, 9, 9]), 0.25, 128)
    dequantized = [
        g.op("DequantizeLinear", weight, np.float32(0.5), name="w"),
        g.op("DequantizeLinear", bias, np.float32(0.5 * 0.25), name="b"),
    ]
    y = activation(g, g.op("Relu", g.op("Conv", x, *dequantized, name="first")), 0.25)
    weight = random.integers(-7, 8, (5, 8, size, size)).astype(np.int8)
    dequantized = [
        g.op("DequantizeLinear", weight, np.float32(0.5), name="v"),
        g.op("DequantizeLinear", np.arange(5, dtype=np.int32), np.float32(bias_scale), name="c"),
    ]
    g.output(g.op("Conv", y, *dequantized, name="second", pads=[pads] * 4))
    return g.model()


@pytest.mark.parametrize(
    "model, left",
    [
        (by_hand(1, 0), 4),
        (by_hand(3, 0), 4),
        # At the border the constants are missing: no bias says that.
        (by_hand(3, 1), 8),
        # This bias cannot hold the sums.
        (by_hand(1, 0, bias_scale=0.37), 8),
    ],
    ids=["1x1", "3x3", "padded", "coarse bias"],
)
def test_constants_are_absorbed_only_where_exact(model, left):
    result, report = onnx_simplify.simplify(model, channel_multiple=1)
    feeds = {"x": np.random.default_rng(2).uniform(-30, 30, (2, 3, 9, 9)).astype(np.float32)}
    assert_same_function(model, result, [feeds], rtol=1e-7)
    assert report.layers[0].outputs_after == left
    assert {t.data_type for t in result.graph.initializer if len(t.dims) == 1} <= {
        onnx.TensorProto.INT32
    }


def test_shared_weights_and_shared_parameters():
    """One weight, read by two layers of which one loses inputs; one scale for all."""
    g = Graph(opset=17)
    scale, zero = g.const(np.float32(0.5), "scale"), g.const(np.int8(3), "zero")
    stored = g.rng.integers(-7, 8, (8, 8, 3, 3)).astype(np.int8)
    first = g.rng.integers(-7, 8, (8, 64, 3, 3)).astype(np.int8)
    first[[1, 4, 6]] = 3
    x = g.input("x", ["n", 64, 9, 9])
    y = g.op("Conv", x, g.op("DequantizeLinear", first, scale, zero))
    weight = g.op("DequantizeLinear", stored, scale, zero)
    g.output(g.op("Conv", g.op("Conv", y, weight), weight))
    model = g.model()
    result, _ = onnx_simplify.simplify(model, channel_multiple=1)
    feeds = {"x": g.rng.standard_normal((2, 64, 9, 9)).astype(np.float32)}
    assert_same_function(model, result, [feeds], rtol=1e-6)
    shapes = [list(t.dims) for t in result.graph.initializer if len(t.dims) == 4]
    assert sorted(shapes) == [[5, 64, 3, 3], [8, 5, 3, 3], [8, 8, 3, 3]]
    assert sum(t.name == "scale" for t in result.graph.initializer) == 1


def test_batchnorm_behind_quantized_weights_stays():
    """Folding it would round the weights anew."""
    g = Graph(opset=17)
    stored = g.rng.integers(-7, 8, (8, 3, 3, 3)).astype(np.int8)
    weight = g.op("DequantizeLinear", stored, np.float32(0.1))
    y = g.op("Conv", g.input("x", ["n", 3, 9, 9]), weight)
    g.output(g.batchnorm(y, 8))
    result, _ = onnx_simplify.simplify(g.model())
    assert count(result, "BatchNormalization") == 1
    assert initializer(result, result.graph.node[0].input[0]).dtype == np.int8


def test_scales_of_activations_shrink():
    """With one scale per channel."""
    g = Graph(opset=17)
    weight = pruned(g.normal(8, 3, 3, 3), [1, 5])
    y = g.conv(g.input("x", ["n", 3, 9, 9]), weight, np.zeros(8, np.float32))
    scales = g.rng.uniform(0.01, 0.02, 8).astype(np.float32)
    zeros = np.full(8, 128, np.uint8)
    y = g.op("QuantizeLinear", y, scales, zeros, axis=1)
    y = g.op("DequantizeLinear", y, scales, zeros, axis=1)
    g.output(g.conv(y, g.normal(4, 8, 3, 3), g.normal(4)))
    model = g.model()
    result, report = onnx_simplify.simplify(model, channel_multiple=1)
    feeds = {"x": g.rng.standard_normal((2, 3, 9, 9)).astype(np.float32)}
    # Rounding to 8 bits magnifies that of the sums before it.
    assert_same_function(model, result, [feeds], rtol=1e-2)
    assert report.layers[0].outputs_after == 6
    sizes = {tuple(t.dims) for t in result.graph.initializer if t.data_type == 2}
    assert sizes == {(6,)}


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.int32])
def test_arithmetic(axis, kind):
    """Taking, restoring and adding do on the integers what is meant for the numbers."""
    random = np.random.default_rng(0)
    stored = random.integers(0, 100, (6, 4, 3)).astype(kind)
    size = () if axis is None else (stored.shape[axis],)
    scale = random.uniform(0.1, 0.9, size).astype(np.float32)
    zero = None if kind == np.int32 else random.integers(0, 9, size).astype(kind)
    values = Quantized(stored, scale, zero, axis or 0)
    g = Graph(opset=21)
    g.output(g.op("DequantizeLinear", stored, scale, zero, axis=axis or 0))
    (expected,) = ort.InferenceSession(g.model().SerializeToString()).run(None, {})
    np.testing.assert_array_equal(values.load(), expected)
    kept = {0: np.array([5, 0, 2]), 1: np.array([3, 1])}
    np.testing.assert_array_equal(values.compress(kept).load(), expected[np.ix_(kept[0], kept[1])])
    steps = values.steps()
    np.testing.assert_array_equal(values.restored(steps).stored, stored)
    steps[:, 2] = 0
    expected[:, 2] = 0
    np.testing.assert_array_equal(values.restored(steps).load(), expected)
    more = values.plus(3 * np.broadcast_to(values._along(scale), stored.shape).astype(float))
    assert more is not None
    np.testing.assert_array_equal(more.stored, stored + 3)
    assert values.plus(0.4 * np.broadcast_to(values._along(scale), stored.shape)) is None
    assert values.plus(np.full(stored.shape, 1e12)) is None


def test_only_weights_are_unwrapped():
    """An embedding that is stored as integers stays as it is, whoever reads it."""
    g = Graph(opset=17)
    table = g.op("DequantizeLinear", np.ones((9, 4), np.int8), np.float32(0.5))
    g.output(g.op("Gather", table, g.input("x", ["n"], np.int64)))
    model = load(g.model())
    assert not any(isinstance(t, QuantizedConstant) for n in model.graph.nodes for t in n.inputs)
    result, _ = onnx_simplify.simplify(g.model())
    assert [n.op_type for n in result.graph.node] == ["DequantizeLinear", "Gather"]
    values = numpy_helper.to_array(result.graph.initializer[0])
    assert values.dtype == np.int8


def test_verification_sees_a_wrong_bias(tmp_path):
    """However coarse the activations are."""
    model = quantized(tmp_path, network(), per_channel=True)
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    (conv,) = [n for n in model.graph.node if n.name == "conv2"]
    dequantize = {n.output[0]: n.input[0] for n in model.graph.node}
    name = dequantize[conv.input[2]]
    bias = initializer(model, name).copy()
    bias[1] += np.int32(np.abs(bias).max())
    set_initializer(wrong, name, bias)
    assert onnx_simplify.verify(model, model).passed
    assert not onnx_simplify.verify(model, wrong).passed


def per_row(g: Graph, stored: np.ndarray, name: str = "w") -> str:
    """Weights with one scale per output."""
    scales = g.rng.uniform(0.01, 0.03, len(stored)).astype(np.float32)
    parts = g.const(stored, f"{name}q"), g.const(scales, f"{name}s")
    return g.op("DequantizeLinear", *parts, axis=0)


def test_a_copy_of_a_weight_has_scales_of_its_own():
    """One reader of a shared weight keeps one row of it, the other all: with all scales."""
    g = Graph(opset=17)
    weight = per_row(g, g.rng.integers(-100, 100, (8, 16, 3, 3)).astype(np.int8))
    bias = np.zeros(16, np.float32)
    bias[1] = 0.7
    first = pruned(g.normal(16, 64, 3, 3), [1])
    a = g.op("Relu", g.conv(g.input("x", ["n", 64, 9, 9]), first, bias))
    last = g.normal(2, 8, 1, 1)
    last[:, 1:] = 0
    g.output(g.conv(g.conv(a, weight, np.zeros(8, np.float32)), last))
    g.output(g.conv(g.input("other", ["n", 16, 9, 9]), weight))
    model = g.model()
    result, report = onnx_simplify.simplify(model, channel_multiple=1)
    assert_same_function(model, result, random_feeds(model), rtol=1e-6)
    assert report.channels_removed == 8


def test_cuts_with_other_scales_are_not_the_same():
    """Two cuts of one weight with equal integers."""
    g = Graph(opset=17)
    half = g.rng.integers(-100, 100, (4, 16, 3, 3)).astype(np.int8)
    weight = per_row(g, np.concatenate([half, half]))
    for name, dead in (("x", range(4)), ("z", range(4, 8))):
        reader = g.normal(8, 8, 3, 3)
        reader[:, dead] = 0
        g.output(g.conv(g.conv(g.input(name, ["n", 16, 9, 9]), weight), reader))
    model = g.model()
    result, _ = onnx_simplify.simplify(model, channel_multiple=1)
    assert_same_function(model, result, random_feeds(model), rtol=1e-6)


@pytest.mark.parametrize("captured", ["wq", "ws", "w"])
def test_a_body_reads_the_stored_weight(captured):
    """It must find all of it."""
    g = Graph(opset=17)
    stored = g.rng.integers(-100, 100, (8, 3, 3, 3)).astype(np.int8)
    stored[::2] = 0
    weight = per_row(g, stored)
    name = weight if captured == "w" else captured
    result = [onnx.helper.make_tensor_value_info("total", onnx.TensorProto.FLOAT, [])]
    nodes = [
        onnx.helper.make_node("Cast", [name], ["float"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("ReduceSum", ["float"], ["total"], keepdims=0),
    ]
    body = onnx.helper.make_graph(nodes, "body", [], result)
    y = g.op("Relu", g.conv(g.input("x", ["n", 3, 9, 9]), weight))
    g.output(g.conv(y, g.normal(4, 8, 1, 1)))
    g.output(g.op("If", g.input("c", [], bool), then_branch=body, else_branch=body))
    model = g.model()
    model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    simplified, _ = onnx_simplify.simplify(model, channel_multiple=1)
    assert_same_function(model, simplified, random_feeds(model), rtol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1,), (), (1, 1)])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_quantized_bias_of_a_gemm(shape, beta):
    """Of whatever shape, and scaled."""
    g = Graph(opset=17)
    first = pruned(g.normal(8, 6), [2, 5])
    y = g.op("Relu", g.gemm(g.input("x", ["n", 6]), first, np.full(8, 0.5, np.float32)))
    scale = np.float32(0.25)
    weight = g.op("DequantizeLinear", g.rng.integers(-9, 9, (5, 8)).astype(np.int8), scale)
    bias = np.full(shape, 3, np.int32)
    bias = g.op("DequantizeLinear", bias, np.float32(0.125))
    g.output(g.op("Gemm", y, weight, bias, transB=1, beta=beta))
    model = g.model()
    result, report = onnx_simplify.simplify(model, channel_multiple=1)
    assert_same_function(model, result, random_feeds(model), rtol=1e-6)
    assert report.layers[0].outputs_after == (6 if shape == (5,) else 8)


def test_scales_along_the_inputs_are_left_alone():
    """onnxruntime takes them for those of the outputs."""
    g = Graph(opset=17)
    x = activation(g, g.input("x", ["n", 6]), 0.02, 128)
    scales = g.rng.uniform(0.01, 0.03, 6).astype(np.float32)
    stored = g.rng.integers(-9, 9, (6, 6)).astype(np.int8)
    stored[:, [1, 3]] = 0
    y = g.op("MatMul", x, g.op("DequantizeLinear", stored, scales, axis=0))
    g.output(g.op("MatMul", y, g.normal(6, 4)))
    _, report = onnx_simplify.simplify(g.model(), channel_multiple=1)
    assert report.channels_removed == 0
