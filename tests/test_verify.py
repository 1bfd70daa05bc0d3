"""Verification: what proves nothing is no proof, rounding is no error, and errors are seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper

import onnx_simplify
from build import Graph, assert_same_function, initializer, pruned, set_initializer
from onnx_simplify.errors import CannotVerifyError
from onnx_simplify.graph.load import load
from onnx_simplify.runtime.difference import compare, magnitudes
from onnx_simplify.runtime.rows import unmatched
from onnx_simplify.runtime.trace import Trace

DEAD = (0, 2, 5, 7, 11)


def spoiled(model: ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> ModelProto:
    """A copy with one initializer changed."""
    copy = ModelProto()
    copy.CopyFrom(model)
    values = initializer(model, name)
    set_initializer(copy, name, change(values).astype(values.dtype))
    return copy


def body(g: Graph, channels: int = 12, sizes: Sequence[int | str] = ("n", 3, "h", "w")) -> str:
    """Two pruned convolutions with live biases and BatchNormalization, of free sizes."""
    x = g.input("image", sizes)
    for inputs in (3, channels):
        weight = pruned(g.normal(channels, inputs, 3, 3), DEAD)
        x = g.batchnorm(g.conv(x, weight, g.normal(channels), pads=[1] * 4), channels)
        x = g.op("Relu", x)
    return x


def detector(pick: str, threshold: float) -> ModelProto:
    """Boxes and scores of what is above a threshold."""
    g = Graph()
    y = body(g)
    scores = g.conv(y, g.normal(1, 12, 1, 1), np.full(1, -40, np.float32))
    scores = g.op("Reshape", g.op("Sigmoid", scores), np.array([-1]))
    boxes = g.op("Transpose", g.conv(y, g.normal(4, 12, 1, 1)), perm=[0, 2, 3, 1])
    boxes = g.op("Reshape", boxes, np.array([-1, 4]))
    good = g.op("Greater", scores, np.float32(threshold))
    if pick == "compress":
        found = [g.op("Compress", t, good, axis=0) for t in (boxes, scores)]
    elif pick == "gathernd":
        rows = g.op("Transpose", g.op("NonZero", good), perm=[1, 0])
        found = [g.op("GatherND", t, rows) for t in (boxes, scores)]
    else:
        rows = g.op("Reshape", g.op("NonZero", good), np.array([-1]))
        found = [g.op("Gather", t, rows, axis=0) for t in (boxes, scores)]
    for name, tensor, shape in zip(("boxes", "scores"), found, (["k", 4], ["k"]), strict=True):
        g.nodes.append(helper.make_node("Identity", [tensor], [name]))
        g.output(name, shape=shape)
    return g.model()


# Loud images reach the first threshold, nothing the second one.
REACH = {"loud": 0.5, "never": 2.0}


@pytest.mark.parametrize("pick", ["gather", "compress", "gathernd"])
@pytest.mark.parametrize("reach", REACH)
def test_empty_outputs_are_compared_by_what_is_in_front(pick, reach):
    model = detector(pick, REACH[reach])
    result, report = onnx_simplify.simplify(model, channel_multiple=1)
    # One channel stays behind the padding to stand for the others.
    assert report.channels_removed == 2 * len(DEAD) - 1
    assert any("in front of it" in note for note in report.notes) == (reach == "never")
    images = np.random.default_rng(0).standard_normal((2, 3, 12, 10)).astype(np.float32)
    assert_same_function(model, result, [{"image": images * 60}])
    for name in ("conv1.weight", "conv4.weight"):
        for original in (model, result):
            if any(t.name == name for t in original.graph.initializer):
                broken = spoiled(original, name, lambda w: w * 3)
                assert not onnx_simplify.verify(model, broken).passed, name


def test_outputs_that_say_nothing_prove_nothing():
    model = detector("gather", REACH["never"])
    other = ModelProto()
    other.CopyFrom(model)
    # No tensor in front of the outputs can be recognised.
    outputs = {o.name for o in model.graph.output}
    inner = {t: f"{t}.other" for n in model.graph.node for t in n.output if t not in outputs}
    for node in other.graph.node:
        for names in (node.input, node.output):
            renamed = [inner.get(name, name) for name in names]
            del names[:]
            names.extend(renamed)
    other = spoiled(other, "conv1.weight", lambda w: w * 3)
    with pytest.raises(CannotVerifyError, match="empty.*proves nothing"):
        onnx_simplify.verify(model, other)


def test_channels_that_are_left_are_compared_however_far_in_front():
    """Nothing gets past the second layer; what is before it has lost channels."""
    g = Graph()
    y = body(g, sizes=["n", 3, 12, 10])
    weight = g.normal(12, 12, 1, 1)
    y = g.op("Relu", g.conv(y, weight, np.full(12, -1e5, np.float32)))
    for _ in range(60):
        y = g.op("Relu", g.conv(y, g.normal(12, 12, 1, 1), g.normal(12)))
    g.output(g.conv(y, g.normal(3, 12, 1, 1), g.normal(3)))
    model = g.model()
    result, report = onnx_simplify.simplify(model, channel_multiple=1)
    assert report.channels_removed >= 2 * len(DEAD) - 1
    assert any("is the same for all inputs" in note for note in report.notes)
    wrong = spoiled(result, "conv1.weight", lambda w: w * np.float32(1.01))
    assert not onnx_simplify.verify(model, wrong).passed
    # The channels that are left, in another order, are not what the next layer expects.
    swapped = spoiled(result, "conv2.weight", lambda w: w[:, ::-1])
    assert not onnx_simplify.verify(model, swapped).passed


def test_what_was_compared_is_told():
    model = detector("gather", REACH["loud"])
    found = onnx_simplify.simplify(model)[1].verification
    boxes = next(o for o in found.outputs if o.name == "boxes")
    assert boxes.elements > 0 and boxes.low < boxes.high and boxes.varied > 0
    assert boxes.error <= found.worst


def rare(bias: float, form: str) -> ModelProto:
    """Probabilities of about exp(bias), which float32 knows in steps of 6e-8 only."""
    g = Graph()
    z = g.conv(body(g), g.normal(5, 12, 1, 1) * np.float32(0.3), np.full(5, bias, np.float32))
    if form == "sigmoid":
        z = g.op("Sigmoid", z)
    else:
        one = np.float32(1)
        if form == "difference from a Constant":
            one = g.op("Constant", value=numpy_helper.from_array(np.ones(1, np.float32)))
        z = g.op("Sub", one, g.op("Sigmoid", g.op("Neg", z)))
    g.output(z)
    return g.model()


@pytest.mark.parametrize("form", ["sigmoid", "difference", "difference from a Constant"])
@pytest.mark.parametrize("bias", [-14.5, -12.5, -9.5])
def test_tiny_outputs(bias, form):
    model = rare(bias, form)
    result, report = onnx_simplify.simplify(model, channel_multiple=1)
    # One channel stays behind the padding to stand for the others.
    assert report.channels_removed == 2 * len(DEAD) - 1
    if bias < -14:
        assert any("was widened" in note for note in report.notes)
    # A bias that is wrong by one percent is seen, in front of the output if not there.
    wrong = spoiled(result, "conv3.bias", lambda b: b * np.float32(1.01))
    assert not onnx_simplify.verify(model, wrong).passed
    assert onnx_simplify.verify(model, result).passed


def test_small_columns_beside_large_ones():
    g = Graph()
    y = body(g)
    boxes = g.op("Mul", g.conv(y, g.normal(4, 12, 1, 1), g.normal(4)), np.float32(300))
    scores = g.op("Sigmoid", g.conv(y, g.normal(3, 12, 1, 1), g.normal(3)))
    g.output(g.op("Concat", boxes, scores, axis=1))
    model = g.model()
    wrong = spoiled(model, "conv4.bias", lambda b: b + np.float32(0.05))
    found = onnx_simplify.verify(model, wrong)
    assert not found.passed
    assert onnx_simplify.verify(model, onnx_simplify.simplify(model)[0]).passed


def test_integers_are_equal_unless_something_jumps():
    g = Graph()
    x = g.input("x", ["n", 64], np.int64)
    g.output(g.op("Add", x, np.zeros(64, np.int64)), shape=["n", 64], dtype=np.int64)
    wrong = g.model()
    values = np.zeros(64, np.int64)
    values[5] = 1
    wrong = spoiled(wrong, "add1.weight", lambda _: values)
    assert not onnx_simplify.verify(g.model(), wrong).passed
    a = np.arange(4000)
    b = a.copy()
    b[17] += 1
    assert compare(a, b).error == float("inf")
    assert compare(a, b, ties=True).error == 0
    b[18:40] += 1
    assert compare(a, b, ties=True).error == float("inf")


def selection(tie: float) -> ModelProto:
    """The best ten of a list, the first two of which differ by so much."""
    g = Graph()
    y = g.op("Flatten", g.conv(g.input("x", ["n", 1, 8, 8]), g.normal(1, 1, 1, 1)))
    scores = g.op("Add", g.op("Mul", y, np.float32(tie)), np.linspace(5, 1, 64, dtype=np.float32))
    values, rows = g.op("TopK", scores, np.array([10]), outputs=2)
    g.output(values, shape=["n", 10])
    g.output(rows, shape=["n", 10], dtype=np.int64)
    return g.model()


def test_rows_may_change_places_where_they_tie():
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 640, (1, 50, 4)).astype(np.float32)
    scores = np.sort(rng.uniform(0, 1, (1, 50)).astype(np.float32))[:, ::-1].copy()
    labels = rng.integers(0, 9, (1, 50))
    order = np.arange(50)
    order[[10, 11]] = 11, 10
    rows = [boxes, scores, labels]
    swapped = [a[:, order] for a in rows]
    assert unmatched(rows, [boxes[:, order], scores, labels[:, order]], 1e-4) in (1, 2)
    close = scores.copy()
    close[0, 11] = close[0, 10]
    tied = [boxes, close, labels]
    assert unmatched(tied, [a[:, order] for a in tied], 1e-4) == 0
    assert unmatched(rows, swapped, 1e-4) == 0
    other = labels.copy()
    other[0, 3] += 1
    assert unmatched(rows, [boxes, scores, other], 1e-4) == 1


def test_a_wrong_selection_is_seen():
    model = selection(1.0)
    wrong = spoiled(model, "add1.weight", lambda v: v[::-1])
    assert not onnx_simplify.verify(model, wrong).passed
    assert onnx_simplify.verify(model, model).passed


@pytest.mark.parametrize("shape", [(1, 84, 500), (1, 300, 6), (2, 7, 9, 11), (40, 5)])
def test_magnitudes_are_those_of_columns(shape):
    rng = np.random.default_rng(1)
    array = rng.standard_normal(shape).astype(np.float32)
    found = np.broadcast_to(magnitudes(array), shape)
    assert (found >= np.abs(array).max() * 1e-4).all() and (found <= np.abs(array).max()).all()
    axis = len(shape) - 1 if array.size // shape[-1] >= 32 else 1
    others = tuple(k for k in range(len(shape)) if k != axis)
    assert (found <= np.abs(array).max(axis=others, keepdims=True) + 1e-7).all()


@pytest.mark.parametrize("kind", ["Exp", "Reciprocal"])
def test_infinity_inside_is_noted(kind):
    g = Graph()
    y = g.conv(g.input("x", ["n", 3, "h", "w"]), g.normal(8, 3, 1, 1), g.normal(8))
    y = g.op("Exp", y) if kind == "Exp" else g.op("Reciprocal", g.op("Relu", y))
    mask = np.array([1, 0, 1, 1, 0, 1, 0, 1], np.float32).reshape(8, 1, 1)
    g.output(g.conv(g.op("Mul", y, mask), g.normal(5, 8, 1, 1)))
    _, report = onnx_simplify.simplify(g.model(), channel_multiple=1, verify=kind == "Exp")
    if report.channels_removed:
        assert any("finite" in note for note in report.notes)
    else:
        assert kind == "Reciprocal"


@pytest.mark.parametrize(
    "kind, jumps",
    [("MaxPool", False), ("Relu", False), ("Floor", True), ("Cast", True), ("Shape", False)],
)
def test_what_jumps(kind, jumps):
    g = Graph()
    x = g.conv(g.input("x", ["n", 3, "h", "w"]), g.normal(4, 3, 1, 1))
    attributes = {"MaxPool": {"kernel_shape": [2, 2]}, "Cast": {"to": 7}}.get(kind, {})
    y = g.op("Cast", g.op(kind, x, **attributes), to=1)
    g.output(y, shape=None, dtype=np.float32)
    assert Trace(load(g.model())).jumps(y) == jumps


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.uint64])
def test_integers_in_search_of_other_outputs(dtype):
    g = Graph()
    x = g.op("Cast", g.input("x", ["n", 4], dtype), to=1)
    g.output(g.op("Min", g.op("Abs", x), np.zeros(4, np.float32)), shape=["n", 4])
    assert onnx_simplify.verify(g.model(), g.model()).passed
