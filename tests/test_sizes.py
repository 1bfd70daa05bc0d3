"""Sizes that are not known: arithmetic, what operators make of them, and what becomes of graphs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from build import Graph, assert_same_function, count, pruned, random_feeds
from onnx_simplify import simplify
from onnx_simplify.errors import RunError
from onnx_simplify.facts.sizes import Sizes
from onnx_simplify.graph import expressions
from onnx_simplify.graph.expressions import (
    ceil_quotient,
    difference,
    evaluate,
    exact_quotient,
    floor_quotient,
    product,
    total,
)
from onnx_simplify.graph.load import load
from onnx_simplify.passes.clean import clean
from onnx_simplify.passes.fold_shapes import settle_sizes
from onnx_simplify.runtime.session import Session
from random_graphs import random_feeds as random_graph_feeds
from random_graphs import random_model

SYMBOLS = ("h", "w", "n", "h + 1", "floor((h + 1)/2)", "'n'")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "take", "times", "floor", "ceil"]),
        st.one_of(
            st.integers(-9, 9), st.sampled_from(SYMBOLS), st.integers(0, 9).map(lambda k: [k])
        ),
        st.integers(1, 12),
    ),
    max_size=9,
)
VALUES = st.fixed_dictionaries({symbol: st.integers(1, 60) for symbol in SYMBOLS})


@settings(max_examples=400, deadline=None)
@given(STEPS, st.lists(VALUES, min_size=1, max_size=4))
def test_arithmetic_is_exact(steps, choices):
    """Every size has the value that plain integers give, and equal texts have equal values."""
    known = [("h", lambda v: v["h"])]
    for kind, operand, number in steps:
        dim, value = known[-1]
        if isinstance(operand, list):
            other, of = known[operand[0] % len(known)]
        else:
            other = operand
            of = (lambda v, k=operand: v[k]) if isinstance(operand, str) else lambda v, k=operand: k
        made, result = {
            "add": (total([dim, other]), lambda v, a=value, b=of: a(v) + b(v)),
            "take": (difference(dim, other), lambda v, a=value, b=of: a(v) - b(v)),
            "times": (product([dim, other]), lambda v, a=value, b=of: a(v) * b(v)),
            "floor": (floor_quotient(dim, number), lambda v, a=value, k=number: a(v) // k),
            "ceil": (ceil_quotient(dim, number), lambda v, a=value, k=number: -(-a(v) // k)),
        }[kind]
        if made is None:  # too long
            break
        known.append((made, result))
    for choice in choices:
        found = [evaluate(dim, choice.__getitem__) for dim, _ in known]
        assert found == [value(choice) for _, value in known]


@pytest.mark.parametrize(
    "left, right",
    [
        # A window of three with a step of two and a border of one, and what dynamo computes of it.
        (total([floor_quotient(total(["h", -1]), 2), 1]), floor_quotient(total(["h", 1]), 2)),
        (ceil_quotient(ceil_quotient("h", 2), 2), ceil_quotient("h", 4)),
        (floor_quotient(product([6, "h"]), 4), floor_quotient(product([3, "h"]), 2)),
        (product(["h", total(["w", 1])]), total([product(["w", "h"]), "h"])),
        (exact_quotient([2, "n", "h", 8], ["n", 16]), "h"),
        (exact_quotient([product(["n", "h"]), 6], ["h", 3]), product([2, "n"])),
        (difference(total(["h", 3]), "h"), 3),
    ],
)
def test_equal_sizes_have_one_text(left, right):
    assert left == right is not None


@pytest.mark.parametrize(
    "left, right",
    [
        (total(["h", 1]), "h + 1"),
        (total(["h", 1, "w"]), total(["h + 1", "w"])),
        (floor_quotient(total(["h", 1]), 2), "floor((h + 1)/2)"),
        (product(["h", "w"]), "h*w"),
        (total(["n", 1]), total(["'n'", 1])),
    ],
)
def test_symbols_are_no_expressions(left, right):
    assert left != right


def test_what_cannot_be_said():
    assert exact_quotient(["h"], [2]) is None and exact_quotient(["h", 2], ["w"]) is None
    assert exact_quotient([6], [4]) is None and exact_quotient([0, "h"], [0]) is None
    assert total(["h", None]) is product([None]) is floor_quotient("h", 0) is None
    many = total([f"s{k}" for k in range(7)])
    assert product([many, many]) is None
    assert expressions.is_expression(many) and not expressions.is_expression("h")


PADS = st.lists(st.integers(0, 3), min_size=4, max_size=4)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    amounts=st.one_of(PADS, PADS.map(lambda v: [k - 2 for k in v])),
    own=PADS,
    value=st.sampled_from([None, 0.0, 0.5]),
    mode=st.sampled_from(["constant", "constant", "edge"]),
    readers=st.sampled_from([1, 2]),
    opset=st.sampled_from([9, 17]),
    free=st.booleans(),
)
def test_padding_in_front_of_convolutions(seed, amounts, own, value, mode, readers, opset, free):
    """Zeros join the convolution's own, for each reader; all else stays as it is."""
    g = Graph(opset, seed=seed)
    x = g.input("x", ["n", 3, "h", "w"] if free else [1, 3, 8, 9])
    x = g.op("Relu", g.conv(x, pruned(g.normal(8, 3, 1, 1), range(0, 8, 2)), g.normal(8)))
    pads = [0, 0, *amounts[:2], 0, 0, *amounts[2:]]
    if opset < 11:
        given_value = {} if value is None else {"value": value}
        x = g.op("Pad", x, pads=pads, mode=mode, **given_value)
    else:
        extra = [] if value is None else [np.float32(value)]
        x = g.op("Pad", x, np.array(pads), *extra, mode=mode)
    x = g.op("Relu", x) if seed % 3 == 0 else x
    y = g.conv(x, g.normal(4, 8, 3, 3), g.normal(4), pads=own)
    for _ in range(readers - 1):
        y = g.op("Add", y, g.conv(x, g.normal(4, 8, 3, 3), pads=own))
    g.output(y)
    model = g.model()
    result, _ = simplify(model, channel_multiple=1)
    zeros = mode == "constant" and not value and min(amounts) >= 0
    assert count(result, "Pad") == (0 if zeros and seed % 3 else 1)
    assert_same_function(model, result, random_feeds(model, n=2, h=10, w=7))


def branch(name: str, *nodes: onnx.NodeProto, result: str = "r", **weights: np.ndarray):
    """The body of an ``If``."""
    return helper.make_graph(
        list(nodes),
        name,
        [],
        [helper.make_tensor_value_info(result, 1, None)],
        [numpy_helper.from_array(array, key) for key, array in weights.items()],
    )


def squeezing(g: Graph, x: str, axis: int) -> str:
    """What torchscript writes for a ``squeeze``: it depends on the size whether there is one."""
    size = g.op("Gather", g.op("Shape", x), np.array(axis), axis=0)
    single = g.op("Equal", size, np.array(1))
    axes = helper.make_node("Constant", [], ["axes"], value_ints=[axis])
    then = branch("then", axes, helper.make_node("Squeeze", [x, "axes"], ["r"]))
    other = branch("else", helper.make_node("Identity", [x], ["r"]))
    return g.op("If", single, then_branch=then, else_branch=other)


@pytest.mark.parametrize("width", [1, "w"])
@pytest.mark.parametrize("free", [False, True])
def test_branches_that_are_known_are_inlined(width, free):
    """Channels go through them; names that both bodies use are kept apart."""
    g = Graph()
    x = g.input("x", ["n", 3, "h", width] if free else [2, 3, 8, width])
    x = g.op("Relu", g.conv(x, pruned(g.normal(8, 3, 1, 1), range(0, 8, 2)), g.normal(8)))
    y = squeezing(g, x, 3)
    if width == 1:
        y = squeezing(g, g.op("ReduceMax", y, axes=[2], keepdims=1), 2)
        g.output(g.gemm(y, g.normal(5, 8), g.normal(5)), shape=["n", 5])
    else:
        g.output(g.op("Relu", y), shape=["n", 8, "h", "w"])
    model = g.model()
    result, report = simplify(model, channel_multiple=1)
    assert count(result, "If") == (0 if width == 1 else 1)
    assert report.channels_removed == (4 if width == 1 else 0)
    assert_same_function(model, result, random_feeds(model, n=3, h=7, w=5))


@pytest.mark.parametrize("flag", [False, True])
def test_conditions_that_are_stored(flag):
    """Bodies with weights of their own, of outer ones, and of a result from outside."""
    g = Graph()
    x = g.conv(g.input("x", ["n", 3, "h", "w"]), pruned(g.normal(8, 3, 1, 1), [1, 4]), g.normal(8))
    weight = g.normal(8, 8, 1, 1)
    then = branch("then", helper.make_node("Conv", [x, "w"], ["r"]), w=weight)
    other = branch("else", helper.make_node("Identity", [x], ["r"]))
    y = g.op("If", np.array(flag), then_branch=then, else_branch=other)
    w = branch("then", helper.make_node("Conv", [y, "w"], ["r"]), w=weight + 1)
    y = g.op("If", np.array(True), then_branch=w, else_branch=w)
    g.output(g.op("Relu", y))
    model = g.model()
    result, report = simplify(model, channel_multiple=1)
    assert count(result, "If") == 0 and report.channels_removed >= 2
    assert_same_function(model, result, random_feeds(model, n=3, h=7, w=5))


def check_claims(model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]) -> int:
    """Compare all sizes and integers that are said of a model with what runs show; how many."""
    working = load(model)
    clean(working)
    settle_sizes(working, ())
    sizes = Sizes(working)
    names = [
        t.name
        for node in working.graph.nodes
        for t in node.outputs
        if t.name and sizes.shapes.get(t.name) is not None
    ]
    if not names:
        return 0
    session = Session(working, names)
    checked = 0
    for feed in feeds:
        try:
            found = session.run(feed, names)
        except RunError:  # not every size goes with every graph
            continue
        symbols = {
            d: size
            for t in working.graph.inputs
            if t.name in feed
            for d, size in zip(sizes.shapes[t.name] or (), feed[t.name].shape, strict=True)
            if isinstance(d, str)
        }

        def value(dim: object, symbols: dict[str, int] = symbols) -> object:
            try:
                return evaluate(dim, symbols.__getitem__) if isinstance(dim, str) else dim
            except KeyError:  # stands for nothing but itself
                return None

        for name, array in zip(names, found, strict=True):
            claim = sizes.shapes[name]
            assert len(claim) == array.ndim, name
            for said, actual in zip(map(value, claim), array.shape, strict=True):
                # Slices are taken to leave something; what is empty goes nowhere.
                assert said in (None, actual) or not array.size, (name, claim, array.shape)
                checked += said is not None
            known = sizes.integers.get(name)
            if known is not None and array.size:
                for said, actual in zip(map(value, known.ravel()), array.ravel(), strict=True):
                    assert said is None or said == actual, (name, known, array)
                    checked += said is not None
    return checked


def window(op: str, **attributes: object):
    """A sliding window over pictures."""
    return lambda g, x, y: g.op(op, x, **attributes)


def weights(g: Graph, kernel: int) -> np.ndarray:
    return g.normal(3, 3, kernel, kernel)


ENDS = (-(2**31), -7, -3, -2, -1, 0, 1, 2, 5, 2**31 - 1)
# Operators at which a size is easily said wrong.
HOSTILE = {
    "broadcast of two symbols": lambda g, x, y: g.op("Add", g.op("Transpose", x), y),
    "ceil pooling": window("MaxPool", kernel_shape=[3, 2], strides=[2, 3], ceil_mode=1),
    "pooling": window("MaxPool", kernel_shape=[3, 2], strides=[2, 3], pads=[1, 0, 1, 1]),
    "dilated pooling": window("MaxPool", kernel_shape=[2, 3], dilations=[2, 1]),
    "average pooling": window("AveragePool", kernel_shape=[2, 2], strides=[2, 2]),
    "pooling, same": window("MaxPool", kernel_shape=[3, 2], strides=[2, 3], auto_pad="SAME_LOWER"),
    "pooling, valid": window("AveragePool", kernel_shape=[3, 2], auto_pad="VALID"),
    "convolution": lambda g, x, y: g.conv(x, weights(g, 3), strides=[2, 3], pads=[1, 0, 2, 1]),
    "dilated convolution": lambda g, x, y: g.conv(x, weights(g, 2), dilations=[3, 2]),
    "convolution, same": lambda g, x, y: g.conv(
        x, weights(g, 3), strides=[2, 3], auto_pad="SAME_UPPER"
    ),
    "transposed": lambda g, x, y: g.op("ConvTranspose", x, weights(g, 3), strides=[2, 3]),
    "transposed, padded": lambda g, x, y: g.op(
        "ConvTranspose", x, weights(g, 4), strides=[3, 2], pads=[1, 0, 2, 1], output_padding=[1, 0]
    ),
    "transposed, same": lambda g, x, y: g.op(
        "ConvTranspose", x, weights(g, 3), strides=[2, 2], auto_pad="SAME_UPPER"
    ),
    "crop": lambda g, x, y: g.op("Pad", x, np.array([0, 0, -1, 2, 0, 0, 3, -2])),
    "concatenation": lambda g, x, y: g.op("Concat", x, x, g.op("Relu", x), axis=3),
    "shape and back": lambda g, x, y: g.op("Reshape", x, g.op("Shape", x)),
    "flat": lambda g, x, y: g.op("Reshape", x, np.array([0, -1])),
    "flattened": lambda g, x, y: g.op("Flatten", x, axis=2),
    "halves": lambda g, x, y: g.op("Div", g.op("Shape", x), np.array([1, 2, 2, 3])),
    "remainders": lambda g, x, y: g.op("Mod", g.op("Shape", x), np.array([1, 2, 2, 3])),
    "differences": lambda g, x, y: g.op("Sub", g.op("Shape", x), g.op("Shape", y)),
    "products": lambda g, x, y: g.op("Mul", g.op("Shape", x), g.op("Shape", y)),
    "largest": lambda g, x, y: g.op("Max", g.op("Shape", x), np.array([0, 5, -1, 9])),
    "smallest": lambda g, x, y: g.op("Min", g.op("Shape", x), g.op("Shape", y)),
    "count": lambda g, x, y: g.op("Size", x),
    "product": lambda g, x, y: g.op("ReduceProd", g.op("Shape", x), axes=[0], keepdims=0),
    "made": lambda g, x, y: g.op("ConstantOfShape", g.op("Shape", x)),
    "expanded": lambda g, x, y: g.op("Expand", np.ones((1, 1), "f"), g.op("Shape", x)),
    "repeated": lambda g, x, y: g.op("Tile", x, np.array([2, 1, 1, 3])),
    "blocks": lambda g, x, y: g.op(
        "DepthToSpace", g.op("Tile", x, np.array([1, 4, 1, 1])), blocksize=2
    ),
    "equal or not": lambda g, x, y: g.op(
        "Where",
        g.op("Equal", g.op("Shape", x), g.op("Shape", y)),
        *(g.op("Shape", x), g.op("Neg", g.op("Shape", y))),
    ),
    "resized to sizes": lambda g, x, y: g.op(
        "Resize", x, "", "", g.op("Mul", g.op("Shape", x), np.array([1, 1, 2, 3]))
    ),
} | {
    f"resized by {scale}": lambda g, x, y, scale=scale: g.op(
        "Resize", x, "", np.array([1, 1, scale, 1 / scale], "f"), mode="nearest"
    )
    for scale in (0.3, 0.5, 0.75, 1.5, 2.0, 2.6, 3.0)
} | {
    f"split in {parts}": lambda g, x, y, parts=parts: g.op("Split", x, axis=2, outputs=parts)[-1]
    for parts in (2, 3)
} | {
    f"slice {start}:{end}:{step}": lambda g, x, y, bounds=(start, end, step): g.op(
        "Slice", x, *(np.array([v]) for v in (bounds[0], bounds[1], 3, bounds[2]))
    )
    for start in ENDS
    for end in ENDS
    for step in (1, 2, 3, -1, -2)
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_sizes_are_true(name):
    g = Graph()
    x, y = g.input("x", ["n", 3, "h", "w"]), g.input("y", ["m", 3, "w", "h"])
    g.output(HOSTILE[name](g, x, y))
    model = g.model()
    random = np.random.default_rng(0)
    feeds = [
        {
            "x": random.standard_normal((n, 3, h, w)).astype(np.float32),
            "y": random.standard_normal((m, 3, w, h)).astype(np.float32),
        }
        for n, m, h, w in ((1, 1, 8, 8), (2, 1, 9, 12), (1, 3, 12, 7), (2, 2, 5, 6), (3, 3, 16, 15))
    ]
    check_claims(model, feeds)


@pytest.mark.parametrize("seed", [*range(0, 60, 3), 644, 786, 972])
def test_sizes_of_random_graphs_are_true(seed):
    model = random_model(seed)
    check_claims(model, [random_graph_feeds(model, k) for k in range(4)])
