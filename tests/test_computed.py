"""Further inputs of operators (bounds, regions, amounts) that are known at run time only."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper, numpy_helper

import onnx_simplify
from build import Graph, assert_same_function, pruned
from versions import needs_onnxruntime

# What the input is called in the specification, the operator around it, and values to feed.
INT = np.int64


def resize(g, y, extra, position, **attributes):
    inputs = [None, None, None]
    inputs[position - 1] = extra
    if position == 1:
        inputs[2] = np.array([1, 8, 5, 5])
    return g.op("Resize", y, *inputs, **attributes)


CROP = {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.0}
BOX = [0, 0, 0.2, 0.2, 1, 1, 0.9, 0.9], [0, 0, -0.5, 0.1, 1, 1, 1.5, 0.8], [0, 0, 2, 2, 1, 1, 3, 3]

OPERATORS = {
    "resize roi": (
        lambda g, y, e: resize(g, y, e, 1, mode="linear", **CROP),
        (8,),
        np.float32,
        BOX,
    ),
    "resize roi, nearest": (
        lambda g, y, e: resize(g, y, e, 1, mode="nearest", **CROP),
        (8,),
        np.float32,
        BOX,
    ),
    "resize scales": (
        lambda g, y, e: resize(g, y, e, 2, mode="linear"),
        (4,),
        np.float32,
        ([1, 1, 1, 1], [1, 1, 1.5, 1.25], [1, 1, 0.5, 0.7]),
    ),
    "resize sizes": (
        lambda g, y, e: resize(g, y, e, 3, mode="linear"),
        (4,),
        INT,
        ([1, 8, 8, 8], [1, 8, 5, 11], [1, 8, 16, 3]),
    ),
    "pad amounts": (
        lambda g, y, e: g.op("Pad", y, e),
        (8,),
        INT,
        ([0] * 8, [0, 0, 1, 2, 0, 0, 3, 0], [0, 0, 0, 0, 0, 0, 1, 1]),
    ),
    "pad value": (
        lambda g, y, e: g.op("Pad", y, np.array([0, 0, 1, 1, 0, 0, 1, 1]), e),
        (),
        np.float32,
        (0.0, 3.0, -7.0),
    ),
    "clip bound": (lambda g, y, e: g.op("Clip", y, e), (), np.float32, (-9.0, 0.0, 0.7)),
    "slice starts": (
        lambda g, y, e: g.op("Slice", y, e, np.array([8]), np.array([2])),
        (1,),
        INT,
        ([0], [2], [-3]),
    ),
    "slice ends": (
        lambda g, y, e: g.op("Slice", y, np.array([0]), e, np.array([2])),
        (1,),
        INT,
        ([8], [2], [-3]),
    ),
    "slice axes": (
        lambda g, y, e: g.op("Slice", y, np.array([1]), np.array([8]), e),
        (1,),
        INT,
        ([2], [3], [-1]),
    ),
    "slice steps": (
        lambda g, y, e: g.op("Slice", y, np.array([0]), np.array([8]), np.array([2]), e),
        (1,),
        INT,
        ([1], [2], [3]),
    ),
    "gather indices": (
        lambda g, y, e: g.op("Gather", y, e, axis=2),
        (3,),
        INT,
        ([0, 1, 2], [7, 7, 0], [-1, 3, 3]),
    ),
    "tile repeats": (
        lambda g, y, e: g.op("Tile", y, e),
        (4,),
        INT,
        ([1, 1, 1, 1], [1, 1, 2, 1], [1, 1, 1, 3]),
    ),
    "dropout ratio": (lambda g, y, e: g.op("Dropout", y, e), (), np.float32, (0.0, 0.5, 0.9)),
    "sum of a part of the shape": (
        lambda g, y, e: g.op(
            "Mul",
            y,
            g.op(
                "Cast",
                g.op(
                    "ReduceMax",
                    g.op(
                        "Slice",
                        g.op("Shape", g.op("Transpose", y, perm=[1, 0, 2, 3])),
                        np.array([0]),
                        np.array([4]),
                        np.array([0]),
                        e,
                    ),
                    keepdims=0,
                ),
                to=1,
            ),
        ),
        (1,),
        INT,
        ([1], [2], [3]),
    ),
}


def network(name: str, overridable: bool):
    """Pruned convolution with live biases, the operator, a 1x1 convolution."""
    middle, shape, dtype, values = OPERATORS[name]
    g = Graph(opset=18)
    x = g.input("x", [1, 3, 8, 8])
    y = g.op("Relu", g.conv(x, pruned(g.normal(8, 3, 3, 3), (0, 2, 5)), g.normal(8), pads=[1] * 4))
    extra = g.input("extra", list(shape), dtype)
    if overridable:
        first = np.asarray(values[0], dtype)
        g.initializers.append(numpy_helper.from_array(first, "extra"))
    y = middle(g, y, extra)
    g.nodes.append(
        helper.make_node("Conv", [y, g.const(g.normal(4, 8, 1, 1)), g.const(g.normal(4))], ["y"])
    )
    g.output("y", shape=[None] * 4)
    return g.model(), [np.asarray(v, dtype) for v in values]


@pytest.mark.parametrize("overridable", [False, True], ids=["input", "overridable"])
@pytest.mark.parametrize("name", OPERATORS)
def test_computed_is_not_absent(name, overridable):
    model, values = network(name, overridable)
    data = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    result, _ = onnx_simplify.simplify(
        model,
        channel_multiple=1,
        input_data={"x": data, "extra": values[0]} if not overridable else {"x": data},
    )
    assert_same_function(model, result, [{"x": data, "extra": v} for v in values])


@pytest.mark.parametrize("what", ["starts", "ends", "axes", "steps"])
@pytest.mark.parametrize("overridable", [False, True], ids=["input", "overridable"])
def test_shapes_cut_at_run_time(what, overridable):
    g = Graph()
    shape = g.op("Shape", g.input("x", [2, 3, 4, 5]))
    given = {"starts": [0], "ends": [4], "axes": [0], "steps": [1]}
    others = {"starts": [2], "ends": [-1], "axes": [-1], "steps": [3]}
    operands = []
    for name, values in given.items():
        if name == what:
            operands.append(g.input(name, [1], INT))
            if overridable:
                g.initializers.append(numpy_helper.from_array(np.array(values), name))
        else:
            operands.append(np.array(values))
    g.output(g.op("Cast", g.op("Slice", shape, *operands), to=1), shape=["k"])
    result, _ = onnx_simplify.simplify(g.model())
    x = np.zeros((2, 3, 4, 5), np.float32)
    feeds = [{"x": x, what: np.array(v)} for v in (given[what], others[what])]
    assert_same_function(g.model(), result, feeds)


@pytest.mark.parametrize(
    "dtype",
    [
        np.int64,
        np.int32,
        *(
            pytest.param(t, marks=needs_onnxruntime("1.23", "no sums of unsigned integers"))
            for t in (np.uint64, np.uint32)
        ),
    ],
)
@pytest.mark.parametrize(
    "constant, weight", [(5, 7), (2**31 - 3, 2**20 + 1), (2**40 + 1, 2**30 + 1)]
)
def test_integers_are_exact(dtype, constant, weight):
    # Sums of floats are not beyond 2**53, and do not wrap around.
    g = Graph()
    bound = int(np.iinfo(dtype).max)
    first = pruned(g.rng.integers(0, 4, (8, 16)).astype(dtype), (3, 7), axis=1)
    bias = np.zeros(16, dtype)
    bias[3] = min(constant, bound - 1)
    second = g.rng.integers(0, 4, (16, 5)).astype(dtype)
    second[3, 2] = min(weight, bound - 2)
    y = g.op("Add", g.op("MatMul", g.input("x", ["n", 8], dtype), first), bias)
    y = g.op("Add", g.op("MatMul", y, second), np.full(5, bound - 1, dtype))
    g.output(y, shape=["n", 5], dtype=dtype)
    result, report = onnx_simplify.simplify(g.model(), channel_multiple=1)
    assert report.channels_removed == 2
    x = np.random.default_rng(1).integers(0, 9, (4, 8)).astype(dtype)
    assert_same_function(g.model(), result, [{"x": x}], rtol=0)
