"""Attention, written out: heads, channels within them, constants that come through a softmax."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from build import Graph, assert_same_function, parameters, pruned, random_feeds
from onnx_simplify import propagate_bias, remove_zeroed, simplify

HEADS, SIZE, WIDTH = 4, 6, 16
INNER = HEADS * SIZE
ZERO, BIAS, UNREAD = "zero", "bias", "unread"


def channels(heads) -> list[int]:
    return [h * SIZE + d for h in heads for d in range(SIZE)]


def dense(g: Graph, x: str, weight: np.ndarray, bias: np.ndarray) -> str:
    return g.op("Add", g.op("MatMul", x, weight), bias)


def split(g: Graph, y: str, shape: str, perm: list[int]) -> str:
    return g.op("Transpose", g.op("Reshape", y, shape), perm=perm)


def attention(  # noqa: PLR0913  (what may be pruned, as keywords)
    seed: int,
    *,
    free: bool = True,
    dead: tuple = (),
    how: str = ZERO,
    mask: str = "",
    opset: int = 17,
    scores: str = "softmax",
    zeros: tuple = (),
    computed: bool = True,
) -> ModelProto:
    """One layer of attention over ``[n, t, 16]`` with what is pruned in it.

    Args:
        seed: of the weights.
        free: whether batch and length are free.
        dead: heads that are pruned.
        how: rows of q, k and v and their biases zero (ZERO), rows of v only, biases live (BIAS), or
            columns of the output projection (UNREAD).
        mask: what is added to the scores: nothing, a constant with a value for each head, or an
            input.
        opset: version of the operator set.
        scores: what becomes of the scores: softmax, a softmax along another axis, or a sigmoid.
        zeros: ``(channel, of q rather than k)``: channels within heads that are zero there.
        computed: whether targets of reshapes are computed.
    """
    g = Graph(opset, seed=seed)
    x = g.input("x", ["n", "t", WIDTH] if free else [2, 5, WIDTH])
    weights = {name: g.normal(WIDTH, INNER) / 4 for name in "qkv"}
    biases = {name: g.normal(INNER) for name in "qkv"}
    gone = channels(dead)
    out = g.normal(INNER, WIDTH) / 4
    if how == UNREAD:
        out[gone] = 0
    for name in "v" if how == BIAS else "qkv" if how == ZERO else "":
        weights[name][:, gone] = 0
        if how == ZERO:
            biases[name][gone] = 0
    for channel, of_q in zeros:
        name = "q" if of_q else "k"
        weights[name][:, channel::SIZE] = 0
        biases[name][channel::SIZE] = 0
    if free and computed:
        shape = g.op("Shape", x)
        size = [g.op("Gather", shape, np.array([k]), axis=0) for k in (0, 1)]
        target = g.op("Concat", *size, np.array([HEADS, SIZE]), axis=0)
        back = g.op("Concat", *size, np.array([INNER]), axis=0)
    else:
        target, back = (g.const(np.array(v)) for v in ([0, 0, HEADS, SIZE], [0, 0, INNER]))
    parts = {name: dense(g, x, weights[name], biases[name]) for name in "qkv"}
    q, v = (split(g, parts[name], target, [0, 2, 1, 3]) for name in "qv")
    k = split(g, parts["k"], target, [0, 2, 3, 1])
    s = g.op("Div", g.op("MatMul", q, k), np.float32(np.sqrt(SIZE)))
    if mask == "heads":
        s = g.op("Add", s, g.normal(HEADS, 1, 1))
    elif mask:
        s = g.op("Add", s, g.input("mask", ["n", 1, 1, "t"] if free else [2, 1, 1, 5]))
    if scores == "sigmoid":
        s = g.op("Sigmoid", s)
    else:
        s = g.op("Softmax", s, axis=-1 if scores == "softmax" else 2)
    y = g.op("Reshape", g.op("Transpose", g.op("MatMul", s, v), perm=[0, 2, 1, 3]), back)
    g.output(dense(g, y, out, g.normal(WIDTH)))
    return g.model()


def feeds(model: ModelProto) -> list[dict[str, np.ndarray]]:
    found = random_feeds(model, n=1, t=7) + random_feeds(model, n=3, t=4)
    sizes = {d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim}
    return found if "t" in sizes else random_feeds(model)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    free=st.booleans(),
    dead=st.sets(st.integers(0, HEADS - 1)),
    how=st.sampled_from([ZERO, BIAS, UNREAD]),
    mask=st.sampled_from(["", "heads", "input"]),
    opset=st.sampled_from([12, 13, 17]),
    scores=st.sampled_from(["softmax", "softmax", "sigmoid", "rows"]),
    zeros=st.sets(st.tuples(st.integers(0, SIZE - 1), st.booleans()), max_size=3),
    computed=st.booleans(),
)
def test_attention(  # noqa: PLR0913  (what is drawn)
    seed, free, dead, how, mask, opset, scores, zeros, computed
):
    """Pruned heads go, whatever is done to them, and the function stays the same."""
    scores = "softmax" if opset < 13 and scores == "rows" else scores
    model = attention(
        seed,
        **{"free": free, "dead": tuple(dead), "how": how, "mask": mask, "opset": opset},
        **{"scores": scores, "zeros": tuple(zeros), "computed": computed},
    )
    result, report = simplify(model, channel_multiple=1)
    assert_same_function(model, result, feeds(model))
    again, _ = simplify(result, channel_multiple=1)
    # Of a layer whose heads are all constants, a second run may find that nothing varies.
    assert parameters(again) == parameters(result) or len(dead) == HEADS
    # Sums of sigmoids count positions: what they make of a constant depends on the length.
    goes = how != BIAS or scores == "softmax" or not dead
    live = HEADS - len(dead) if goes else HEADS
    within = SIZE - len({channel for channel, _ in zeros})
    *projections, _ = [layer for layer in report.layers if layer.outputs in (INNER, WIDTH)]
    expected = sorted([live * within] * 2 + [live * SIZE])
    if 0 < live and within:
        assert sorted(layer.outputs_after for layer in projections) == expected


@pytest.mark.parametrize("how", [ZERO, BIAS, UNREAD])
def test_step_by_step(how):
    """A factor of zero stays zero between the steps."""
    model = attention(3, dead=(1, 2), how=how, zeros=((0, True), (4, False)))
    shifted = propagate_bias(model)
    assert_same_function(model, shifted, feeds(model))
    result = remove_zeroed(shifted)
    assert_same_function(model, result, feeds(model))
    assert parameters(result) < 0.75 * parameters(model)


@pytest.mark.parametrize("which", "qk")
def test_zeros_that_cancel(which):
    """A channel that is zero because a constant and a bias cancel is kept as it is, or goes."""
    g = Graph(seed=1)
    x = g.input("x", ["n", 1, "t", 8])
    pre = g.op("Relu", dense(g, x, pruned(g.normal(8, 8), [2, 5], axis=1), np.full(8, 0.5, "f")))
    weights = {name: g.normal(8, 4) for name in "qkv"}
    biases = {name: g.normal(4) for name in "qkv"}
    weights[which][:, 1] = 0
    weights[which][2, 1], biases[which][1] = 2, -1
    q, k, v = (dense(g, pre, weights[name], biases[name]) for name in "qkv")
    s = g.op("Softmax", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])))
    g.output(g.op("MatMul", s, v))
    model = g.model()
    sizes = random_feeds(model, n=2, t=5) + random_feeds(model, n=1, t=9)
    for step in (propagate_bias, lambda m: simplify(m, channel_multiple=1)[0], simplify_by_four):
        assert_same_function(model, step(model), sizes)


def simplify_by_four(model: ModelProto) -> ModelProto:
    return simplify(model, channel_multiple=4)[0]


def test_projections_that_are_convolutions():
    """Attention over pictures: channels that stay to fill up blocks multiply by zero still."""
    g = Graph(seed=2)
    x = g.input("x", ["n", 3, "h", "w"])
    x = g.op("Relu", g.conv(x, g.normal(16, 3, 3, 3), g.normal(16), pads=[1] * 4))
    shape = g.op("Shape", x)
    batch = g.op("Gather", shape, np.array([0]), axis=0)
    flat = g.op("Concat", batch, np.array([16, -1]), axis=0)
    parts = []
    for name in "qkv":
        dead = {"q": [1, 3, 4], "k": [3, 8], "v": [0, 5]}[name]
        bias = g.normal(16)
        bias[dead] = 0 if name != "v" else bias[dead]
        y = g.conv(x, pruned(g.normal(16, 16, 1, 1) / 4, dead), bias)
        parts.append(g.op("Reshape", y, flat))
    q, k, v = parts
    s = g.op("Softmax", g.op("MatMul", g.op("Transpose", q, perm=[0, 2, 1]), k))
    y = g.op("MatMul", s, g.op("Transpose", v, perm=[0, 2, 1]))
    y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1]), shape)
    g.output(g.op("Add", x, g.conv(y, g.normal(16, 16, 1, 1), g.normal(16))))
    model = g.model()
    sizes = random_feeds(model, n=2, h=5, w=4) + random_feeds(model, n=1, h=7, w=3)
    for multiple, live in ((1, {12, 14}), (4, {12, 16}), (None, None)):
        # Attention over pictures of a usual size takes a square of their pixels.
        shapes = {"x": [1, 3, 6, 5]}
        result, report = simplify(model, channel_multiple=multiple, input_shapes=shapes)
        assert_same_function(model, result, sizes)
        found = {layer.outputs_after for layer in report.layers[1:4]}
        assert live is None or found == live


def test_scores_that_are_an_output_keep_their_heads():
    g = Graph(seed=5)
    x = g.input("x", ["n", "t", WIDTH])
    weight = g.normal(WIDTH, INNER)
    weight[:, channels([1])] = 0
    target = np.array([0, 0, HEADS, SIZE])
    q = split(g, g.op("MatMul", x, weight), g.const(target), [0, 2, 1, 3])
    k = split(g, g.op("MatMul", x, g.normal(WIDTH, INNER)), g.const(target), [0, 2, 3, 1])
    g.output(g.op("MatMul", q, k))
    model = g.model()
    result, _ = simplify(model, channel_multiple=1)
    assert_same_function(model, result, feeds(model))


def test_keys_that_all_heads_share():
    """Multi-query attention: one key and value for all heads."""
    g = Graph(seed=6)
    x = g.input("x", ["n", "t", WIDTH])
    weight = g.normal(WIDTH, INNER)
    weight[:, 2::SIZE] = 0
    target = np.array([0, 0, HEADS, SIZE])
    q = split(g, g.op("MatMul", x, weight), g.const(target), [0, 2, 1, 3])
    k = g.op("Unsqueeze", g.op("MatMul", x, g.normal(WIDTH, SIZE)), np.array([1]))
    v = g.op("Unsqueeze", g.op("MatMul", x, g.normal(WIDTH, SIZE)), np.array([1]))
    s = g.op("Softmax", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])))
    y = g.op("Transpose", g.op("MatMul", s, v), perm=[0, 2, 1, 3])
    y = g.op("Reshape", y, np.array([0, 0, INNER]))
    g.output(g.op("MatMul", y, g.normal(INNER, WIDTH)))
    model = g.model()
    result, _ = simplify(model, channel_multiple=1)
    assert_same_function(model, result, feeds(model))
    assert parameters(result) <= parameters(model)
