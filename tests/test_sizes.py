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
