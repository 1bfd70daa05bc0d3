"""Constant channels that stand for others: when, and that the function stays the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from build import (
    Graph,
    assert_same_function,
    gated_constants,
    initializer,
    pruned,
    random_feeds,
)
from onnx_simplify import propagate_bias, simplify
from onnx_simplify.planning import costs, profiles
from onnx_simplify.planning.basis import basis
from onnx_simplify.planning.plan import GATHERED, SPLIT, STORED

ALWAYS, NEVER = {"map_cost": 1e9}, {"map_cost": 0.0, "map_start_cost": 0.0}


@pytest.fixture
def plan(monkeypatch):
    """Make maps dear, or cheap."""

    def set_costs(**costs: float) -> None:
        changed = dataclasses.replace(profiles.PROFILES["avx512"], **costs)
        monkeypatch.setitem(profiles.PROFILES, "avx512", changed)

    return set_costs


def separable(channels: int = 24, kernel: int = 3, stride: int = 1, size: int = 12) -> ModelProto:
    """Pointwise, depthwise, pointwise: pruned pointwise channels are maps behind the depthwise."""
    g = Graph()
    x = g.input("x", [1, 8, size, size])
    x = g.conv(x, pruned(g.normal(channels, 8, 1, 1), range(0, channels, 2)), g.normal(channels))
    x = g.op("Relu", g.batchnorm(x, channels))
    pads = [kernel // 2] * 4
    weight = pruned(g.normal(channels, 1, kernel, kernel), range(0, channels, 3))
    x = g.conv(x, weight, g.normal(channels), pads=pads, strides=[stride] * 2, group=channels)
    x = g.op("Clip", g.batchnorm(x, channels), np.array(0, np.float32), np.array(6, np.float32))
    g.output(g.conv(x, g.normal(12, channels, 1, 1), g.normal(12)))
    return g.model()


def maps(model: ModelProto) -> int:
    """How many maps are added."""
    return sum(n.op_type == "Add" for n in model.graph.node)


@pytest.mark.parametrize("kernel, stride, rank", [(3, 1, 8), (3, 2, 3), (5, 1, 24)])
def test_a_few_channels_stand_for_the_maps_of_all_others(plan, kernel, stride, rank):
    # Positions in a padded map differ by which taps lie inside: 3 x 3 kinds for a kernel of three
    # (2 x 2 with a stride of two), one of which the bias takes.
    model = separable(96, kernel, stride)
    plan(**ALWAYS)
    kept, report = simplify(model, target="avx512")
    assert_same_function(model, kept, random_feeds(model))
    assert maps(kept) == 0
    # Of 96 channels, 32 vary, 32 are uniform, and 32 are maps.
    assert 32 < report.layers[1].outputs_after <= -(-(32 + rank) // 4) * 4
    plan(**NEVER)
    added, report = simplify(model, target="avx512")
    assert_same_function(model, added, random_feeds(model))
    assert maps(added) == 1 and report.layers[1].outputs_after == 32


def test_no_map_is_added_for_channels_that_nobody_reads(plan):
    # Ten channels vary; two dead ones stay to fill up a multiple of four. Their maps are nobody's
    # business.
    model = separable(30)
    plan(pointwise_cost=0.0, **NEVER)
    result, report = simplify(model, target="avx512")
    assert report.layers[1].outputs_after == 12
    assert_same_function(model, result, random_feeds(model))
    assert maps(result) == 1  # of the pointwise convolution behind


@pytest.mark.parametrize(
    "kernel, options, expected",
    [
        (1, {}, 16),
        (3, {}, 8),
        (1, {"channel_multiple": 4}, 8),
        (1, {"channel_multiple": 1}, 7),
    ],
)
def test_a_pointwise_convolution_reads_whole_blocks(plan, kernel, options, expected):
    # Reading 8 channels takes a 1x1 convolution longer than reading a block of 16.
    g = Graph()
    x = g.input("x", [1, 16, 8, 8])
    weight = pruned(g.normal(32, 16, 3, 3), range(7, 32))
    x = g.op("Relu", g.conv(x, weight, g.normal(32), pads=[1] * 4))
    pads = [kernel // 2] * 4
    g.output(g.conv(x, g.normal(32, 32, kernel, kernel), g.normal(32), pads=pads))
    model = g.model()
    plan(**NEVER)
    result, report = simplify(model, target="avx512", **options)
    assert report.layers[0].outputs_after == expected
    assert_same_function(model, result, random_feeds(model))


def test_the_fewest_channels_on_request(plan):
    plan(**ALWAYS)
    result, report = simplify(separable(), target="avx512", channel_multiple=1)
    assert report.layers[1].outputs_after == 8 and maps(result) == 1


def test_uniform_and_mapped_channels_of_a_padded_convolution(plan):
    g = Graph()
    x = g.input("x", [1, 4, 9, 9])
    a = g.conv(x, pruned(g.normal(16, 4, 1, 1), range(8)), g.normal(16))
    a = g.conv(g.op("Relu", a), g.normal(16, 1, 3, 3), g.normal(16), pads=[1] * 4, group=16)
    b = g.conv(x, pruned(g.normal(16, 4, 1, 1), range(8)), g.normal(16))
    y = g.op("Sigmoid", g.op("Concat", a, b, axis=1))
    g.output(g.conv(y, g.normal(8, 32, 3, 3), g.normal(8), pads=[1] * 4))
    model = g.model()
    for ways in (ALWAYS, NEVER):
        plan(**ways)
        result, _ = simplify(model, target="avx512")
        assert_same_function(model, result, random_feeds(model))
        assert maps(result) == (0 if ways is ALWAYS else 1)
    assert initializer(model, "conv1.weight").shape[0] == 16


def test_what_stand_ins_are_computed_from_stays_whole(plan):
    # The gate is a map that only the channel needs that stands for the other one; it reads
    # constants, which are absorbed.
    model = gated_constants()
    for ways in (ALWAYS, NEVER):
        plan(**ways)
        step = propagate_bias(model, target="avx512")
        assert_same_function(model, step, random_feeds(model))
        result, _ = simplify(model, target="avx512", verify=False)
        assert_same_function(model, result, random_feeds(model))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 40),
    entries=st.integers(2, 60),
    rank=st.integers(1, 12),
    free=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_basis(rows, entries, rank, free, seed):
    random = np.random.default_rng(seed)
    maps = random.normal(size=(rows, rank)) @ random.normal(size=(rank, entries))
    if free:
        maps += random.normal(size=(rows, 1))
    found = basis(maps, free, 12)
    if found is None:
        assert min(rows, entries, rank + 1) > 1
        return
    chosen, weights, offsets = found
    assert len(chosen) <= min(rows, rank, entries) and np.abs(weights).max() <= 8
    again = weights.T @ maps[chosen] + offsets[:, None]
    assert np.abs(again - maps).max() <= 1e-5 * np.abs(maps).max()
    assert free or not offsets.any()


def test_basis_gives_up_on_what_has_none():
    random = np.random.default_rng(0)
    assert basis(random.normal(size=(20, 40)), True, 12) is None
    # The second differs from the first by too little to be told apart from rounding.
    base = random.normal(size=40)
    maps = np.stack([base, base * (1 + 1e-9 * random.normal(size=40)), 2 * base])
    chosen, weights, _ = basis(maps, False, 12)
    assert len(chosen) == 1 and np.abs(weights).max() <= 8


@pytest.mark.parametrize("channels, room", [(12, True), (16, False)])
def test_stand_ins_are_free_where_a_block_has_room(channels, room):
    profile = profiles.PROFILES["avx512"]
    for groups in (1, channels):
        inner = channels // groups
        layer = costs.Layer(groups, inner, inner, 9, 10**4)
        assert (costs.grown(profile, layer, inputs=4) == 0) is room
        assert (costs.grown(profile, layer, outputs=4) == 0) is room
        # Adding a map to a huge output costs more than a few channels.
        assert costs.grown(profile, layer, outputs=4) < costs.added_map(profile, 10**8)


def test_the_plan_says_what_was_prepared():
    """Sums split, constants stored, shuffles that became gathers, with the names of tensors."""
    g = Graph()
    x = g.input("x", [1, 3, 32, 32])
    x = g.op("Relu", g.conv(x, g.normal(64, 3, 1, 1), g.normal(64)))
    dead = [k for k in range(64) if k % 3]
    narrow = g.conv(x, pruned(g.normal(64, 64, 3, 3), dead), g.normal(64), pads=[1] * 4)
    x = g.op("Relu", g.op("Add", narrow, x))
    still = g.op("Sigmoid", g.conv(x, np.zeros((64, 64, 1, 1), np.float32), g.normal(64)))
    x = g.conv(g.op("Mul", x, still), g.normal(64, 64, 1, 1))
    parts = g.op("Reshape", x, np.array([1, 2, 32, 32, 32]))
    x = g.op("Reshape", g.op("Transpose", parts, perm=[0, 2, 1, 3, 4]), np.array([1, 64, 32, 32]))
    weight = pruned(g.normal(8, 64, 1, 1), range(0, 40, 2), axis=1)
    g.output(g.conv(x, weight, g.normal(8)))
    _, report = simplify(g.model(), target="avx512")
    assert {(p.name, p.what) for p in report.prepared} == {
        (narrow, SPLIT),
        (still, STORED),
        (x, GATHERED),
    }
    assert f"{narrow}: {SPLIT}" in [str(p) for p in report.prepared]


def decoder(seed: int, size: int, groups: int, kernel: int, dead: int) -> ModelProto:
    """Layers that double the size of a picture; constants in front of each make a pattern."""
    g = Graph(seed=seed)
    x = g.conv(g.input("x", [1, 3, size, size]), pruned(g.normal(24, 3, 3, 3), range(dead)))
    for _ in range(2):
        x = g.op("Relu", g.op("Add", x, np.abs(g.normal(24, 1, 1))))
        weight = g.normal(24, 24 // groups, kernel, kernel) / 4
        weight[:, : dead // groups] = 0
        pad = (kernel - 2) // 2
        extra = {"output_padding": [1, 1]} if kernel % 2 else {}
        x = g.op(
            "ConvTranspose",
            *(x, weight, g.normal(24)),
            group=groups,
            strides=[2, 2],
            pads=[pad] * 4,
            **extra,
        )
    g.output(g.conv(g.op("Relu", x), g.normal(5, 24, 1, 1)))
    return g.model()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([5, 12]),
    groups=st.sampled_from([1, 2, 3]),
    kernel=st.sampled_from([2, 3, 4]),
    dead=st.sampled_from([6, 12, 18]),
    costs=st.sampled_from([{}, ALWAYS, NEVER]),
    multiple=st.sampled_from([None, 1]),
)
def test_decoders(seed, size, groups, kernel, dead, costs, multiple):
    """Patterns of transposed convolutions, with groups or without, as maps and as stand-ins."""
    model = decoder(seed, size, groups, kernel, dead)
    with pytest.MonkeyPatch.context() as patch:
        changed = dataclasses.replace(profiles.PROFILES["avx512"], **costs)
        patch.setitem(profiles.PROFILES, "avx512", changed)
        result, report = simplify(model, target="avx512", channel_multiple=multiple)
    assert report.channels_removed >= 2 * (dead - groups) or multiple is None
    assert_same_function(model, result, random_feeds(model))


def test_patterns_are_stored_once():
    model = decoder(0, 48, 1, 4, 12)
    result, report = simplify(model, channel_multiple=1)
    assert report.plan == "planned" and report.channels_removed >= 24
    maps = [i for i in result.graph.initializer if i.name.endswith("_distinct")]
    assert maps and all(max(i.dims[2:]) <= 8 for i in maps)
    assert_same_function(model, result, random_feeds(model))
