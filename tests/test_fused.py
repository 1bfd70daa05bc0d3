"""Operators of onnxruntime's own, and normalisations of groups: what is behind and before them."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from build import Graph, assert_same_function, pruned, random_feeds
from onnx_simplify import fold_batchnorm, remove_zeroed, simplify

MICROSOFT = "com.microsoft"
DEAD = range(0, 24, 2)


def graph(opset: int = 17, seed: int = 0) -> Graph:
    return Graph(opset=opset, seed=seed, domains={MICROSOFT: 1}, ir_version=9)


def layer(g: Graph, x: str, inputs: int, dead=DEAD) -> str:
    weight = pruned(g.normal(24, inputs, 3, 3) / 4, dead)
    return g.op("Relu", g.conv(x, weight, g.normal(24), pads=[1] * 4))


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize(
    "op, operands",
    [("Gelu", 0), ("QuickGelu", 0), ("FastGelu", 0), ("FastGelu", 1), ("BiasGelu", 1)],
)
def test_activations_of_onnxruntime(op, operands, free):
    """Channels go through them, and what is behind has sizes."""
    g = graph()
    x = g.input("x", ["n", 24, 3, "w"] if free else [2, 24, 3, 16])
    y = g.conv(x, pruned(g.normal(24, 24, 1, 1), DEAD), g.normal(24))
    y = g.op("Transpose", y, perm=[0, 2, 3, 1])
    y = g.op(op, y, *[g.normal(24)] * operands, domain=MICROSOFT)
    y = g.op("Transpose", y, perm=[0, 3, 1, 2])
    g.output(g.conv(layer(g, y, 24), g.normal(4, 24, 1, 1)))
    model = g.model()
    result, report = simplify(model, channel_multiple=1)
    assert report.channels_removed >= 12 + (0 if free else 12) and not report.opaque
    assert_same_function(model, result, random_feeds(model, n=2, w=17))


def optimised(model: ModelProto, tmp_path) -> ModelProto:
    """The model as onnxruntime's optimiser saves it."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return ModelProto.FromString((tmp_path / "optimised.onnx").read_bytes())


def residual(activation: str, seed: int = 0, **attributes: float) -> ModelProto:
    """Convolutions with BatchNormalization and activations, and a sum in front of one."""
    g = Graph(seed=seed)
    x = g.input("x", ["n", 3, "h", "w"])
    x = g.op(activation, g.conv(x, pruned(g.normal(24, 3, 3, 3), DEAD), g.normal(24)), **attributes)
    y = g.batchnorm(g.conv(x, pruned(g.normal(24, 24, 1, 1) / 4, DEAD)), 24)
    y = g.op(activation, y, **attributes)
    y = g.conv(y, pruned(g.normal(24, 24, 1, 1) / 4, DEAD), g.normal(24))
    x = g.op(activation, g.op("Add", y, x), **attributes)
    g.output(g.conv(x, g.normal(4, 24, 1, 1)))
    return g.model()


@pytest.mark.parametrize("step", [lambda m: simplify(m, channel_multiple=1)[0], remove_zeroed])
@pytest.mark.parametrize(
    "activation, attributes",
    [("Relu", {}), ("Sigmoid", {}), ("Tanh", {}), ("LeakyRelu", {"alpha": 0.3})],
)
def test_optimised_files(activation, attributes, step, tmp_path):
    """Fused convolutions lose what plain ones lose, and are fused again."""
    plain = residual(activation, **attributes)
    model = optimised(plain, tmp_path)
    fused = [n for n in model.graph.node if n.op_type == "FusedConv"]
    assert fused
    result = step(model)
    again = [n for n in result.graph.node if n.op_type == "FusedConv"]
    assert len(again) == len(fused)
    assert {n.output[0] for n in again} == {n.output[0] for n in fused}
    before, after = (
        sum(int(np.prod(t.dims)) for t in m.graph.initializer) for m in (step(plain), result)
    )
    assert after <= before
    assert_same_function(plain, result, random_feeds(plain, n=2, h=9, w=11))


def test_fused_layers_are_counted(tmp_path):
    model = optimised(residual("Relu"), tmp_path)
    _, report = simplify(model, channel_multiple=1)
    plain, _ = simplify(residual("Relu"), channel_multiple=1)
    assert report.before.macs and report.after.macs and report.before.macs > report.after.macs
    assert [layer.op for layer in report.layers] == ["Conv"] * 4
    assert report.channels_removed == 36


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    opset=st.sampled_from([18, 21]),
    groups=st.sampled_from([1, 3, 6, 24]),
    erased=st.sets(st.integers(0, 23)),
    unread=st.sets(st.integers(0, 23)),
    free=st.booleans(),
)
def test_group_normalization(seed, opset, groups, erased, unread, free):
    """Whole groups go; a scale of zero leaves the bias."""
    g = graph(opset, seed)
    x = g.input("x", ["n", 3, "h", "w"] if free else [1, 3, 8, 7])
    y = g.conv(x, g.normal(24, 3, 3, 3), g.normal(24))
    count = 24 if opset == 21 else groups
    scale = g.normal(count)
    scale[[k for k in erased if k < count]] = 0
    y = g.op("GroupNormalization", y, scale, g.normal(count), num_groups=groups)
    y = g.op("Relu", y)
    weight = pruned(g.normal(5, 24, 1, 1), sorted(unread), axis=1)
    g.output(g.conv(y, weight, g.normal(5)))
    model = g.model()
    result, report = simplify(model, channel_multiple=1)
    size = 24 // groups
    zero = {k for k in range(24) if scale[k * count // 24] == 0}
    gone = [k for k in range(groups) if {*range(k * size, k * size + size)} <= zero | unread]
    assert report.channels_removed == len(gone) * size or len(gone) == groups
    assert_same_function(model, result, random_feeds(model, n=2, h=6, w=9))


def test_folding_leaves_group_normalization_alone():
    g = graph(21)
    y = g.conv(g.input("x", ["n", 3, "h", "w"]), g.normal(24, 3, 1, 1))
    y = g.op("GroupNormalization", y, g.normal(24), g.normal(24), num_groups=4)
    g.output(g.batchnorm(y, 24))
    model = g.model()
    assert_same_function(model, fold_batchnorm(model), random_feeds(model, n=2, h=6, w=9))


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_sizes_behind_what_nobody_knows_are_observed(free, first):
    """Channels behind an unknown operator go, whatever its output's sizes are called."""
    g = graph()
    x = g.input("x", ["n", 24, "h", "w"] if free else [2, 24, 9, 9])
    y = x if first else layer(g, x, 24)
    y = g.op("Trilu", y, domain=MICROSOFT)
    y = g.op("Pad", y, np.array([0, 0, 1, 1, 0, 0, 0, 0]), domain=MICROSOFT)
    g.output(g.conv(layer(g, layer(g, y, 24), 24), g.normal(4, 24, 1, 1)))
    model = g.model()
    result, report = simplify(model, channel_multiple=1)
    assert {o.op for o in report.opaque} == {"Trilu", "Pad"}
    assert report.before.macs and report.after.macs and report.after.macs < report.before.macs
    assert report.channels_removed >= (23 if free else 24)
    assert_same_function(model, result, random_feeds(model, n=3, h=13, w=7))


def test_what_was_observed_is_not_written():
    """A size that was the same in all runs may be another one tomorrow."""
    g = graph()
    x = g.input("x", ["n", 24, "h", "w"])
    y = g.op("Trilu", layer(g, x, 24), domain=MICROSOFT)
    shape = g.op("Shape", y)
    total = g.op("ReduceProd", shape, keepdims=0)
    g.output(g.op("Mul", y, g.op("Cast", total, to=1)))
    model = g.model()
    result, _ = simplify(model)
    assert [n.op_type for n in result.graph.node if n.op_type in ("Shape", "ReduceProd")] == [
        "Shape",
        "ReduceProd",
    ]
    assert_same_function(model, result, random_feeds(model, n=3, h=13, w=7))


EQUATIONS = {
    "bsi,io->bso": (["n", "t", 8], (8, 6)),
    "bsi,oi->bso": (["n", "t", 8], (6, 8)),
    "io,bsi->bso": (["n", "t", 8], (8, 6)),
    "bchw,oc->bohw": (["n", 8, "h", "w"], (6, 8)),
    "bchw,co->bhwo": (["n", 8, "h", "w"], (8, 6)),
    "i b s, i o -> b o s": ([8, "n", "t"], (8, 6)),
}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    equation=st.sampled_from(sorted(EQUATIONS)),
    dead=st.sets(st.integers(0, 7), max_size=6),
    gone=st.sets(st.integers(0, 5), max_size=4),
)
def test_products_as_einsum(seed, equation, dead, gone):
    """Constants are absorbed, and channels go on both sides, wherever the axes are."""
    g = Graph(seed=seed)
    shape, sizes = EQUATIONS[equation]
    x = g.input("x", shape)
    terms, _, output = equation.replace(" ", "").partition("->")
    data, matrix = sorted(terms.split(","), key=len, reverse=True)
    letter = next(c for c in matrix if c in data)
    axis, rank = data.index(letter), len(data)
    column = [-1 if a == axis else 1 for a in range(rank)]
    keep = np.array([k not in dead for k in range(8)], np.float32).reshape(column)
    x = g.op("Relu", g.op("Add", g.op("Mul", x, keep), g.normal(8).reshape(column)))
    weight = g.normal(*sizes)
    weight[(slice(None),) * (1 - matrix.index(letter)) + (sorted(gone),)] = 0
    operands = (x, weight) if terms.index(",") > 2 else (weight, x)
    y = g.op("Einsum", *operands, equation=equation)
    made = next(c for c in matrix if c not in data)
    g.output(g.op("Relu", y), shape=[f"d{k}" for k in range(len(output))])
    model = g.model()
    result, report = simplify(model, channel_multiple=1)
    assert not report.opaque and made in output
    assert_same_function(model, result, random_feeds(model, n=2, t=5, h=6, w=7))


def test_layers_of_einsum_lose_channels():
    g = Graph()
    y = g.op(
        "Einsum", g.input("x", ["n", 3, "h", "w"]), layer_of_einsum(g), equation="bchw,oc->bohw"
    )
    y = g.op("Relu", g.op("Add", y, g.normal(24, 1, 1)))
    g.output(g.op("Einsum", y, g.normal(24, 5), equation="bchw,co->bohw"))
    model = g.model()
    result, report = simplify(model, channel_multiple=1)
    assert report.channels_removed == len(DEAD)
    assert_same_function(model, result, random_feeds(model, n=2, h=6, w=7))


def layer_of_einsum(g: Graph) -> np.ndarray:
    return pruned(g.normal(24, 3), DEAD)


@pytest.mark.parametrize("mode, live", [("zeros", 24), ("border", 12)])
def test_channels_go_through_looking_up(mode, live):
    """Behind a border that goes on, constants stay constant; zeros do in any case."""
    g = Graph()
    places = g.input("places", ["n", "k", "l", 2])
    x = layer(g, g.input("x", ["n", 3, "h", "w"]), 3)
    y = g.op("GridSample", x, places, padding_mode=mode)
    g.output(g.conv(y, g.normal(5, 24, 1, 1)))
    model = g.model()
    result, report = simplify(model, channel_multiple=1)
    assert report.layers[0].outputs_after <= live
    assert_same_function(model, result, random_feeds(model, n=2, h=6, w=7, k=4, l=3))
