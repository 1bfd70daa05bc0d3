"""Models as other exporters write them: layouts, recurrences, bodies, particular inputs, opsets.

Each is simplified without any option, and must be verified.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_simplify
from build import Graph, assert_same_function, count, pruned, random_feeds
from onnx_simplify.runtime import session
from versions import opsets

DEAD = range(0, 16, 2)


def simplified(model: onnx.ModelProto, *sizes: dict[str, int], **options: object):
    """Simplify, and compare values at several sizes; the signature and the metadata stay."""
    model.metadata_props.add(key="labels", value="cat,dog")
    result, report = onnx_simplify.simplify(model, **options)
    for size in sizes or ({},):
        assert_same_function(model, result, random_feeds(model, **size))
    assert result.metadata_props == model.metadata_props
    weights = {t.name for m in (model, result) for t in m.graph.initializer}
    inputs = [[i for i in m.graph.input if i.name not in weights] for m in (model, result)]
    assert inputs[0] == inputs[1]
    assert [o.name for o in result.graph.output] == [o.name for o in model.graph.output]
    return result, report


# Channels on the last axis.


def classifier(layout: str, *, free: bool, biases: str) -> onnx.ModelProto:
    """The same network with channels first, or last, as converters from Keras write it."""
    g = Graph(opset=13)
    last = layout == "NHWC"
    size = ["n", "h", "w"] if free else [1, 10, 12]
    x = g.input("x", [*size, 3] if last else [size[0], 3, *size[1:]])

    def layer(x: str, inputs: int, outputs: int, dead: range, group: int = 1) -> str:
        weight = pruned(g.normal(outputs, inputs // group, 3, 3), dead)
        bias = g.normal(outputs)
        if biases == "zero":
            bias[dead] = 0
        y = g.op("Transpose", x, perm=[0, 3, 1, 2]) if last else x
        y = g.conv(y, weight, auto_pad="SAME_UPPER", group=group)
        y = g.op("Transpose", y, perm=[0, 2, 3, 1]) if last else y
        return g.op("Relu", g.op("Add", y, bias if last else bias[:, None, None]))

    y = layer(x, 3, 16, DEAD)
    z = layer(layer(y, 16, 16, DEAD), 16, 16, range(0), group=16)
    z = layer(g.op("Add", z, y), 16, 16, DEAD)
    z = g.op("ReduceMean", z, axes=[1, 2] if last else [2, 3], keepdims=0)
    for inputs, outputs, dead in ((16, 12, range(0, 12, 3)), (12, 5, range(0))):
        z = g.op("MatMul", z, pruned(g.normal(inputs, outputs), dead, axis=1))
        z = g.op("Add", z, g.normal(outputs))
    g.output(z)
    return g.model()


@pytest.mark.parametrize("free", [False, True], ids=["fixed", "free"])
@pytest.mark.parametrize("biases", ["zero", "random"])
def test_channels_last_lose_what_channels_first_lose(free, biases):
    found = {}
    for layout in ("NCHW", "NHWC"):
        model = classifier(layout, free=free, biases=biases)
        sizes = ({"n": 2, "h": 9, "w": 14}, {"n": 1, "h": 16, "w": 7}) if free else ({},)
        # Means over large pictures round by more than verification allows, and differently.
        shape = [1, 3, 24, 20] if layout == "NCHW" else [1, 24, 20, 3]
        shapes = {"input_shapes": {"x": shape}} if free else {}
        _, report = simplified(model, *sizes, channel_multiple=1, **shapes)
        found[layout] = [layer.outputs_after for layer in report.layers]
    assert found["NCHW"] == found["NHWC"]
    assert sum(found["NHWC"]) < (64 if biases == "zero" or not free else 73)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("target", ["flatten", "tokens", "split heads"])
def test_computed_reshapes(layout, target):
    """Shape -> Gather -> Concat -> Reshape, the number of channels among what is computed."""
    g = Graph(opset=13)
    x = g.input("x", ["n", 3, "h", "w"])
    y = g.conv(x, pruned(g.normal(8, 3, 3, 3), [1, 4, 6]), np.zeros(8, np.float32), pads=[1] * 4)
    axis = 1
    if layout == "NHWC":
        y, axis = g.op("Transpose", y, perm=[0, 2, 3, 1]), 3
    shape = g.op("Shape", y)

    def size(of: int) -> str:
        return g.op("Gather", shape, np.array([of]), axis=0)

    ones = np.array([-1])
    if target == "flatten":
        z = g.op("Reshape", y, g.op("Concat", size(0), ones, axis=0))
        g.output(g.op("ReduceSum", z, np.array([1])))
        # All positions are added: what is removed was zero.
    elif target == "tokens":
        order = [size(0), size(axis), ones] if axis == 1 else [size(0), ones, size(axis)]
        z = g.op("Reshape", y, g.op("Concat", *order, axis=0))
        z = g.op("Transpose", z, perm=[0, 2, 1]) if axis == 1 else z
        g.output(g.op("MatMul", z, g.normal(8, 5)))
    else:
        half = g.op("Div", size(axis), np.array([2]))
        order = [size(0), np.array([2]), half, ones]
        if axis == 3:
            order = [size(0), ones, np.array([2]), half]
        z = g.op("Reshape", y, g.op("Concat", *order, axis=0))
        g.output(g.op("Softmax", z, axis=-1))
    simplified(g.model(), {"n": 2, "h": 9, "w": 5}, {"n": 1, "h": 4, "w": 11}, channel_multiple=1)


# Operators without rules, with layers that lose channels before or after them.


def features(g: Graph, x: str, inputs: int = 3) -> str:
    """A convolution of 16 filters, half of them pruned, the dead ones zero."""
    y = g.conv(x, pruned(g.normal(16, inputs, 3, 3), DEAD), g.normal(16) * 0, pads=[1] * 4)
    return g.op("Relu", y)


def recurrent(g: Graph, kind: str) -> None:
    """Convolutions, then a bidirectional LSTM or GRU over the columns."""
    y = features(g, features(g, g.input("x", ["n", 3, 8, "w"])), 16)
    y = g.op("Reshape", g.op("ReduceMean", y, axes=[2], keepdims=0), np.array([0, 16, -1]))
    y = g.op("Transpose", y, perm=[2, 0, 1])
    gates = 4 if kind == "LSTM" else 3
    weights = g.normal(2, gates * 6, 16), g.normal(2, gates * 6, 6), g.normal(2, gates * 12)
    outputs = ["sequence", "last"] + ["cell"] * (kind == "LSTM")
    g.op(kind, y, *weights, outputs=outputs, hidden_size=6, direction="bidirectional")
    y = g.op("Reshape", g.op("Transpose", "sequence", perm=[0, 2, 1, 3]), np.array([0, 0, -1]))
    g.output(g.op("MatMul", y, g.normal(12, 5)))


def looped(g: Graph, kind: str) -> None:
    """The same convolution, captured by a body, several times over."""
    y = features(g, features(g, g.input("x", ["n", 3, 8, 8])), 16)
    weight = g.const(g.normal(16, 16, 1, 1), "captured")
    info = helper.make_tensor_value_info
    flags = [info("go", TensorProto.BOOL, []), info("on", TensorProto.BOOL, [])]
    state = [info(name, TensorProto.FLOAT, None) for name in ("state", "next")]
    nodes = [
        helper.make_node("Conv", ["state", weight], ["moved"]),
        helper.make_node("Tanh", ["moved"], ["next"]),
    ]
    if kind == "Loop":
        nodes.append(helper.make_node("Identity", ["go"], ["on"]))
        inputs = [info("step", TensorProto.INT64, []), flags[0], state[0]]
        body = helper.make_graph(nodes, "body", inputs, [flags[1], state[1]])
        y = g.op("Loop", np.array(3), np.array(True), y, body=body)
    elif kind == "Scan":
        nodes.append(helper.make_node("Identity", ["moved"], ["kept"]))
        steps = info("row", TensorProto.FLOAT, [1])
        kept = info("kept", TensorProto.FLOAT, None)
        body = helper.make_graph(nodes, "body", [state[0], steps], [state[1], kept])
        rows = np.zeros((3, 1), np.float32)
        y, _ = g.op("Scan", y, rows, outputs=2, body=body, num_scan_inputs=1)
    else:
        nodes[0].input[0] = y
        then = helper.make_graph(nodes, "then", [], [state[1]])
        other = helper.make_graph(
            [helper.make_node("Neg", [y], ["negative"])],
            "other",
            [],
            [info("negative", TensorProto.FLOAT, None)],
        )
        mean = g.op("ReduceMean", y, keepdims=0)
        y = g.op("If", g.op("Less", mean, np.float32(1e9)), then_branch=then, else_branch=other)
    g.output(g.conv(y, g.normal(4, 16, 1, 1)))


def detector(g: Graph, kind: str) -> None:
    """Boxes and scores, of which NonMaxSuppression keeps some."""
    y = features(g, features(g, g.input("x", [1, 3, "h", "w"])), 16)
    boxes = g.op("Reshape", g.conv(y, g.normal(4, 16, 1, 1)), np.array([0, 4, -1]))
    scores = g.op("Reshape", g.conv(y, g.normal(3, 16, 1, 1)), np.array([0, 3, -1]))
    boxes = g.op("Transpose", boxes, perm=[0, 2, 1])
    limits = np.array([5]), np.array([0.5], np.float32), np.array([0.1], np.float32)
    kept = g.op("NonMaxSuppression", boxes, scores, *limits)
    rows = g.op("Gather", kept, np.array(2), axis=1)
    g.output(g.op("Gather", g.op("Squeeze", boxes, np.array([0])), rows, axis=0))


def language(g: Graph, kind: str) -> None:
    """Tokens of a small vocabulary at positions that are few, through a projection."""
    tokens = g.input("tokens", ["n", "length"], np.int64)
    table = g.op("Gather", g.normal(7, 16), g.op("Cast", tokens, to=TensorProto.INT32))
    length = g.op("Slice", g.op("Shape", tokens), np.array([1]), np.array([2]))
    places = g.op("Slice", g.normal(40, 16), np.array([0]), length, np.array([0]))
    y = g.op("Add", table, places)
    y = g.op("MatMul", y, pruned(g.normal(16, 12), range(0, 12, 2), axis=1))
    g.output(g.op("MatMul", g.op("Relu", y), g.normal(12, 7)))


def audio(g: Graph, kind: str) -> None:
    """Frames of 400 samples that are not padded: shorter inputs have none."""
    x = g.op("Unsqueeze", g.input("samples", ["n", "length"]), np.array([1]))
    y = g.op("Relu", g.conv(x, pruned(g.normal(16, 1, 400), DEAD), g.normal(16) * 0, strides=[160]))
    y = g.conv(y, g.normal(8, 16, 5), g.normal(8), strides=[2])
    g.output(g.op("ReduceMean", y, axes=[2], keepdims=0))


MODELS: dict[str, tuple[Callable[[Graph, str], None], list[dict[str, int]]]] = {
    "LSTM": (recurrent, [{"n": 2, "w": 9}, {"n": 1, "w": 20}]),
    "GRU": (recurrent, [{"n": 2, "w": 9}, {"n": 1, "w": 20}]),
    "Loop": (looped, [{"n": 3}]),
    "Scan": (looped, [{"n": 3}]),
    "If": (looped, [{"n": 3}]),
    "NonMaxSuppression": (detector, [{"h": 9, "w": 12}]),
    "language": (language, [{"n": 2, "length": 11}]),
    "audio": (audio, [{"n": 2, "length": 4000}]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_all_kinds(kind):
    grow, sizes = MODELS[kind]
    g = Graph(opset=13)
    grow(g, kind)
    _, report = simplified(g.model(), *sizes, channel_multiple=1)
    assert report.layers[0].outputs_after < report.layers[0].outputs
    if kind != "Loop":
        assert len(report.verification.sizes) >= 2


@pytest.mark.parametrize("opset", opsets(range(7, 24)))
def test_opsets(opset):
    """The same network in every operator set; where inputs became attributes or back."""
    g = Graph(opset=opset, ir_version=3 if opset < 9 else 8)
    y = features(g, g.input("x", ["n", 3, 8, 8]))
    y = g.batchnorm(g.conv(y, g.normal(8, 16, 3, 3)), 8)
    y = g.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    if opset >= 13:
        y = g.op("Squeeze", g.op("Unsqueeze", y, np.array([4])), np.array([4]))
    else:
        y = g.op("Squeeze", g.op("Unsqueeze", y, axes=[4]), axes=[4])
    if opset >= 18:
        y = g.op("ReduceMean", y, np.array([2, 3]), keepdims=0)
    else:
        y = g.op("ReduceMean", y, axes=[2, 3], keepdims=0)
    y = g.op("Dropout", y, **({"ratio": 0.5} if opset < 12 else {}))
    g.output(g.gemm(y, g.normal(5, 8), g.normal(5)))
    result, report = simplified(g.model(), {"n": 3})
    assert report.layers[0].outputs_after == 8
    assert count(result, "BatchNormalization") == count(result, "Dropout") == 0


# Inputs that are not just any.


def reciprocal_of_size(g: Graph) -> None:
    g.output(g.op("Div", g.input("k", [3], np.int64), g.input("d", [3], np.int64)))


def logarithm(g: Graph) -> None:
    g.output(g.op("Sqrt", g.op("Log", g.op("Add", g.input("x", []), np.float32(1)))))


def permutation(g: Graph) -> None:
    axes = g.input("axes", [2], np.int64)
    g.output(g.op("ReduceSum", g.input("x", [2, 3]), axes), shape=[1, 1])


def past_and_present(g: Graph) -> None:
    past, now = g.input("past", ["n", "p", 4]), g.input("x", ["n", "s", 4])
    mask = g.input("mask", ["n", "p + s", 1])
    g.output(g.op("Mul", g.op("Concat", past, now, axis=1), mask))


def empty_cache(g: Graph) -> None:
    # Declared as having none at first.
    cache = g.input("cache", [1, 0, 4])
    g.output(g.op("Concat", cache, g.input("x", [1, 5, 4]), axis=1))


def equal_lengths(g: Graph) -> None:
    """Sizes of the same length without a common name."""
    x, y = g.input("x", [1, None, 4]), g.input("y", [1, None, 4])
    g.output(g.op("Add", g.op("Tanh", x), g.op("Add", y, x)))


def scalar(g: Graph) -> None:
    g.output(g.op("Pow", g.input("x", [4]), g.input("p", [])))


@pytest.mark.parametrize(
    "grow",
    [
        reciprocal_of_size,
        logarithm,
        permutation,
        past_and_present,
        empty_cache,
        equal_lengths,
        scalar,
    ],
)
def test_inputs_are_found(grow):
    g = Graph(opset=17)
    grow(g)
    _, report = onnx_simplify.simplify(g.model())
    assert report.verification.passed


@pytest.mark.parametrize("operator", ["RandomNormalLike", "Dropout", "RandomUniform", "Bernoulli"])
def test_noise(operator):
    """Whose numbers depend on how many nodes there are, unless a seed is given."""
    g = Graph(opset=17)
    y = g.batchnorm(features(g, g.input("x", ["n", 3, 8, 8])), 16)
    if operator == "Dropout":
        noise = g.op("Dropout", y, np.float32(0.5), np.array(True))
    elif operator == "RandomUniform":
        noise = g.op("RandomUniform", shape=[1, 16, 1, 1], dtype=1)
    else:
        noise = g.op(operator, g.op("Sigmoid", y))
    g.output(g.conv(g.op("Add", y, noise), g.normal(4, 16, 3, 3)))
    result, report = onnx_simplify.simplify(g.model())
    assert report.verification.passed
    (node,) = [n for n in result.graph.node if n.op_type == operator]
    assert not any(a.name == "seed" for a in node.attribute)


# What is stored once stays stored once.


def test_aliases_of_a_weight_do_not_multiply_it():
    g = Graph(opset=17)
    weight, x = g.const(g.normal(64, 64), "w"), g.input("x", ["n", 64])
    for number in range(6):
        alias = g.op("Identity", weight)
        if number % 2:
            alias = g.op("Transpose", weight, perm=[1, 0])
        x = g.op("Tanh", g.op("MatMul", x, alias))
    g.output(x)
    model = g.model()
    result, report = simplified(model)
    assert report.after.bytes <= 2.1 * 64 * 64 * 4
    assert sum(numpy_helper.to_array(t).size for t in result.graph.initializer) <= 2 * 64 * 64


def test_removing_channels_does_not_multiply_a_shared_weight():
    """One set of weights for nine inputs, of which one has dead channels; others are pruned."""
    g = Graph(opset=17)
    shared = g.const(g.normal(32, 16, 3, 3), "shared")
    x = g.input("x", ["n", 3, 8, 8])
    heads = [g.conv(features(g, x), shared)]
    for _ in range(8):
        heads.append(g.conv(g.conv(x, g.normal(16, 3, 3, 3), pads=[1] * 4), shared))
    y = g.op("Sum", *heads)
    y = g.op("Relu", g.conv(y, pruned(g.normal(16, 32, 1, 1), DEAD), g.normal(16) * 0))
    g.output(g.conv(y, g.normal(4, 16, 1, 1)))
    model = g.model()
    result, report = simplified(model, {"n": 2})
    assert report.after.bytes < report.before.bytes
    assert report.layers[-2].outputs_after == 8


def test_a_loop_without_end(monkeypatch):
    """Is given up, not waited for; what needs no run is still done on request."""
    monkeypatch.setattr(session, "_PATIENCE", 0.5)
    g = Graph(opset=17)
    y = features(g, g.input("x", ["n", 3, 8, 8]))
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Tanh", ["s"], ["t"])],
        "body",
        [
            info("step", TensorProto.INT64, []),
            info("go", TensorProto.BOOL, []),
            info("s", TensorProto.FLOAT, None),
        ],
        [info("on", TensorProto.BOOL, []), info("t", TensorProto.FLOAT, None)],
    )
    g.output(g.op("Loop", np.array(2**62), np.array(True), y, body=body), shape=["n", 16, 8, 8])
    with pytest.raises(onnx_simplify.CannotVerifyError, match="loops for more than"):
        onnx_simplify.simplify(g.model())
    result, _ = onnx_simplify.simplify(g.model(), verify=False)
    assert count(result, "Loop") == 1


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64"])
def test_number_formats(name, mixed):
    """Weights keep their type; in mixed precision channels pass through Casts."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    g = Graph(opset=17)
    outer = np.float32 if mixed else dtype
    y = g.input("x", ["n", 3, 9, 9], outer)
    for inputs in (3, 16):
        y = g.op("Cast", y, to=kind) if mixed else y
        weight = pruned(g.normal(16, inputs, 3, 3), DEAD).astype(dtype)
        y = g.op("Relu", g.conv(y, weight, g.normal(16).astype(dtype), pads=[1] * 4))
        y = g.op("Sigmoid", g.op("Cast", y, to=TensorProto.FLOAT)) if mixed else y
    y = g.op("Cast", y, to=kind) if mixed else y
    y = g.conv(y, g.normal(8, 16, 1, 1).astype(dtype), g.normal(8).astype(dtype))
    y = g.op("Cast", y, to=TensorProto.FLOAT) if mixed else y
    g.output(y, shape=["n", 8, 9, 9], dtype=outer)
    result, report = onnx_simplify.simplify(g.model(), channel_multiple=1)
    assert [layer.outputs_after for layer in report.layers] == [8, 8, 8]
    assert report.verification.worst < {"float16": 2e-3, "bfloat16": 1e-2, "float64": 2e-6}[name]
    weights = [t for t in result.graph.initializer if len(t.dims) == 4 and t.dims[0] > 1]
    assert {t.data_type for t in weights} == {kind}
    assert bool(report.notes) == (name != "float16")
