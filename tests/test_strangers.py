"""Models as strangers have them: unusual inputs and outputs, computed weights, other operators."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

import onnx_simplify
from build import Graph, assert_same_function, gated_constants, pruned, random_feeds, small_cnn
from onnx_simplify import reasons
from onnx_simplify.channels.values import Constants
from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.load import load
from onnx_simplify.planning import profiles
from onnx_simplify.planning.absorbing import Prospect
from random_graphs import random_model

DEAD = tuple(range(0, 16, 2))


def stem(g: Graph, x: str, inputs: int = 3, kernel: int = 1) -> str:
    """A pruned convolution with a live bias."""
    weight = pruned(g.normal(16, inputs, kernel, kernel), DEAD)
    y = g.conv(x, weight, g.normal(16), pads=[kernel // 2] * 4)
    return g.op("Relu", y)


def head(g: Graph, y: str) -> None:
    """A pruned convolution, and one that reads it."""
    g.output(g.conv(stem(g, y, 16), g.normal(4, 16, 1, 1), g.normal(4)))


def feeds_of(name: str, *shapes: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{name: random.standard_normal(s).astype(np.float32)} for s in shapes]


IMAGES = feeds_of("x", (1, 3, 9, 11), (2, 3, 16, 7))


@pytest.mark.parametrize("what", ["input", "weight"])
def test_an_input_or_a_weight_is_an_output(what):
    g = Graph()
    x = g.input("x", ["n", 3, "h", "w"])
    y = stem(g, x)
    if what == "input":
        g.output("x", shape=["n", 3, "h", "w"])
    else:
        g.const(pruned(g.normal(16, 16, 1, 1), DEAD), "weights")
        y = g.op("Relu", g.conv(y, "weights", g.normal(16)))
        g.output("weights", shape=[16, 16, 1, 1])
    head(g, y)
    result, report = onnx_simplify.simplify(g.model(), channel_multiple=1)
    assert report.channels_removed >= 2 * len(DEAD)
    assert_same_function(g.model(), result, IMAGES)


@pytest.mark.parametrize("opset", [7, 10, 13])
@pytest.mark.parametrize("read", [False, True])
def test_dropout_with_a_mask(read, opset):
    g = Graph(opset=opset)
    y, mask = g.op("Dropout", stem(g, g.input("x", ["n", 3, "h", "w"])), outputs=2)
    if read and opset > 9:
        y = g.op("Where", mask, y, np.float32(0))
    head(g, y)
    result, report = onnx_simplify.simplify(g.model(), channel_multiple=1)
    if not read or opset > 11:
        assert report.channels_removed == 2 * len(DEAD)
    assert_same_function(g.model(), result, IMAGES)


@pytest.mark.parametrize("gain", [False, True])
def test_standardised_weights(gain):
    """What is computed from initializers is folded as a whole, and counted before and after."""
    g = Graph()
    y, width = g.input("x", ["n", 3, 12, 12]), 3
    for _ in range(2):
        weight = g.const(pruned(g.normal(16, width, 3, 3), DEAD))
        centred = g.op("Sub", weight, g.op("ReduceMean", weight, axes=[1, 2, 3], keepdims=1))
        square = g.op("ReduceMean", g.op("Mul", centred, centred), axes=[1, 2, 3], keepdims=1)
        weight = g.op("Div", centred, g.op("Sqrt", g.op("Add", square, np.float32(1e-5))))
        if gain:
            weight = g.op("Mul", weight, g.rng.uniform(0.5, 1.5, (16, 1, 1, 1)).astype("f4"))
        y, width = g.op("Relu", g.conv(y, weight, g.normal(16), pads=[1] * 4)), 16
    g.output(g.conv(y, g.normal(4, 16, 1, 1), g.normal(4)))
    result, report = onnx_simplify.simplify(g.model(), channel_multiple=1)
    assert report.channels_removed == 2 * len(DEAD)
    assert report.after.macs < report.before.macs and report.ideal_macs <= report.after.macs
    assert report.after.parameters < report.before.parameters
    assert_same_function(g.model(), result, feeds_of("x", (1, 3, 12, 12), (3, 3, 12, 12)))


def test_weights_that_a_caller_may_replace():
    g = Graph(ir_version=8)
    head(g, stem(g, g.input("x", ["n", 3, "h", "w"])))
    model = g.model()
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in g.initializers
    )
    result, report = onnx_simplify.simplify(model, channel_multiple=1)
    assert report.channels_removed == 0 and report.before.parameters > 0
    (note,) = [n for n in report.notes if "graph inputs as well" in n]
    assert "freeze_weights" in note and f"{report.before.parameters:,} parameters" in note
    other = {"conv1.weight": np.ones((16, 3, 1, 1), np.float32)}
    assert_same_function(model, result, [feed | more for feed in IMAGES for more in ({}, other)])
    frozen, report = onnx_simplify.simplify(model, channel_multiple=1, freeze_weights=True)
    assert report.channels_removed == 2 * len(DEAD) and not report.notes
    assert [i.name for i in frozen.graph.input] == ["x"]
    assert_same_function(model, frozen, IMAGES)


def test_what_holds_channels_back_is_said(cli, tmp_path):
    g = Graph(domains={"com.microsoft": 1})
    y = g.op("Trilu", stem(g, g.input("x", ["n", 3, 9, 9])), domain="com.microsoft")
    head(g, y)
    _, report = onnx_simplify.simplify(g.model(), channel_multiple=1)
    assert any("8 because of Trilu (com.microsoft)" in n for n in report.notes)
    assert report.layers[0].stays == {"read by Trilu (com.microsoft)": 8}
    # Behind it, sizes are what the runs show.
    assert report.layers[1].stays == {} and report.layers[1].removed == 8
    onnx.save(g.model(), tmp_path / "in.onnx")
    shown = cli(tmp_path / "in.onnx", tmp_path / "out.onnx").out
    assert "8 because of Trilu" in shown and "--inspect" in shown
    shown = " ".join(cli(tmp_path / "in.onnx", "--inspect").out.split())
    assert "why others stay" in shown and "8 read by Trilu" in shown


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda g, y: g.output(g.op("Identity", y), shape=["n", 16, "h", "w"]), "graph output"),
        (lambda g, y: g.output(g.op("Add", y, g.conv("x", g.normal(16, 3, 1, 1)))), "graph output"),
    ],
    ids=["output", "sum"],
)
def test_why_channels_stay(make, reason):
    g = Graph()
    make(g, stem(g, g.input("x", ["n", 3, "h", "w"])))
    _, report = onnx_simplify.simplify(g.model(), channel_multiple=1)
    assert report.layers[0].stays == {reason: len(DEAD)}


def test_channels_that_vary_elsewhere_keep_constants():
    g = Graph()
    x = g.input("x", ["n", 3, "h", "w"])
    y = g.op("Add", stem(g, x), g.conv(x, g.normal(16, 3, 1, 1), g.normal(16)))
    g.output(g.conv(y, g.normal(4, 16, 1, 1), g.normal(4)))
    _, report = onnx_simplify.simplify(g.model(), channel_multiple=1)
    assert report.layers[0].stays == {"coupled with channels that vary": len(DEAD)}


@pytest.mark.parametrize("multiple, stays", [(4, 2), (16, 10), (1, 0)])
def test_channels_that_fill_up_blocks_are_said_to(multiple, stays):
    """Ten of sixteen constant channels: six remain, or more so that a whole number of blocks is."""
    g = Graph()
    x = g.input("x", ["n", 3, "h", "w"])
    y = g.op("Relu", g.conv(x, pruned(g.normal(16, 3, 3, 3), range(10)), g.normal(16)))
    g.output(g.conv(y, g.normal(4, 16, 1, 1), g.normal(4)))
    _, report = onnx_simplify.simplify(g.model(), channel_multiple=multiple)
    layer = report.layers[0]
    assert (layer.outputs_after, sum(layer.stays.values())) == (6 + stays, stays)
    assert layer.stays == ({"alignment: whole blocks run faster": stays} if stays else {})


def test_constants_that_a_mean_makes_uncertain_are_said_to_be():
    """A mean whose constants differ from size to size: what it gives is left alone."""
    g = Graph()
    y = stem(g, g.input("x", ["n", 3, "h", "w"]))
    y = g.op("ReduceMean", y, axes=[2, 3], keepdims=1)
    g.output(g.conv(y, g.normal(4, 16, 1, 1), g.normal(4)))
    facts = Facts(load(g.model()))
    (node, *_) = facts.model.graph.nodes
    mean = next(n.outputs[0].name for n in facts.model.graph.nodes if n.op == "ReduceMean")
    disagreeing = Constants(agreement={mean: np.zeros((1, 16, 1, 1), bool)})
    found = reasons.stays(Prospect.of(facts.measured(disagreeing)))
    assert found[node] == {"measured constants do not agree (rounding of a mean)": len(DEAD)}


def test_names_that_a_dead_body_reads_are_free():
    """An `If` that nobody reads goes, and what it read is pruned in the same run."""
    g = Graph()
    y = stem(g, g.input("x", ["n", 3, "h", "w"]))
    info = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    bodies = [
        helper.make_graph([helper.make_node(op, [y], ["b"])], op, [], [info])
        for op in ("Neg", "Abs")
    ]
    flag = g.op("Greater", g.op("ReduceMax", y, keepdims=0), np.float32(0))
    g.op("If", flag, then_branch=bodies[0], else_branch=bodies[1])
    g.output(g.conv(y, g.normal(4, 16, 1, 1), g.normal(4)))
    result, report = onnx_simplify.simplify(g.model(), channel_multiple=1)
    assert report.channels_removed == len(DEAD)
    assert_same_function(g.model(), result, IMAGES)


@pytest.mark.parametrize("sign", [1, -1])
def test_what_overflows_for_one_sign_is_told(sign):
    g = Graph()
    x = g.input("x", ["n", 3, "h", "w"])
    weight = sign * np.abs(g.normal(16, 3, 1, 1))
    y = g.op("Exp", g.conv(x, weight, g.normal(16)))
    y = g.op("Mul", y, pruned(np.ones((16, 1, 1), np.float32), DEAD))
    g.output(g.conv(y, g.normal(4, 16, 1, 1), g.normal(4)))
    positive = {"x": np.abs(IMAGES[0]["x"])}
    _, report = onnx_simplify.simplify(g.model(), channel_multiple=1, input_data=positive)
    assert report.channels_removed == len(DEAD)
    assert any("Exp" in note and "infinity" in note for note in report.notes)


@pytest.mark.parametrize("names", [("batch_size", "N"), ("B", "n"), ("N", "samples")])
@pytest.mark.parametrize("rank", [2, 3])
def test_lengths_are_long(names, rank):
    g = Graph()
    shape = [names[0], names[1]] if rank == 2 else [names[0], 1, names[1]]
    y = g.input("waveforms", shape)
    y = g.op("Unsqueeze", y, np.array([1])) if rank == 2 else y
    y = g.conv(y, pruned(g.normal(16, 1, 400), DEAD), g.normal(16), strides=[160])
    y = g.op("Relu", g.conv(g.op("Relu", y), g.normal(16, 16, 3), g.normal(16), pads=[1, 1]))
    g.output(g.gemm(g.op("ReduceMean", y, axes=[2], keepdims=0), g.normal(10, 16), g.normal(10)))
    result, report = onnx_simplify.simplify(g.model(), channel_multiple=1)
    assert report.channels_removed >= len(DEAD) - 1
    lengths = {sizes[names[1]] for sizes in report.verification.sizes}
    assert len(lengths) > 1 and min(lengths) >= 400
    middle = (1,) * (rank - 2)
    shapes = [(1, *middle, 16000), (2, *middle, 8123), (1, *middle, 400)]
    assert_same_function(g.model(), result, feeds_of("waveforms", *shapes))


def test_volumes_are_small():
    g = Graph()
    y = g.input("x", ["n", 3, "d", "h", "w"])
    weight = pruned(g.normal(16, 3, 3, 3, 3), DEAD)
    y = g.op("Relu", g.conv(y, weight, g.normal(16), pads=[1] * 6))
    g.output(g.conv(y, g.normal(4, 16, 1, 1, 1)))
    _, report = onnx_simplify.simplify(g.model())
    assert all(
        np.prod([v for k, v in s.items() if k != "n"]) <= 2**18 for s in report.verification.sizes
    )


def with_bodies() -> ModelProto:
    """A network of which the branches of an ``If`` read eight weights."""
    g = Graph()
    x = g.input("x", ["n", 3, 6, 6])
    y = stem(g, x)
    names = [g.const(g.normal(4, 16, 1, 1), f"kernel_{k}") for k in "hgfedcba"]
    branches = []
    for k in (0, 4):
        nodes = [helper.make_node("Conv", [y, name], [f"{k}.{name}"]) for name in names[k : k + 4]]
        total = helper.make_node("Sum", [f"{k}.{n}" for n in names[k : k + 4]], [f"sum.{k}"])
        info = helper.make_tensor_value_info(f"sum.{k}", TensorProto.FLOAT, None)
        branches.append(helper.make_graph([*nodes, total], f"branch{k}", [], [info]))
    g.output(
        g.op("If", g.input("c", [], bool), then_branch=branches[0], else_branch=branches[1]),
        shape=["n", 4, 6, 6],
    )
    head(g, stem(g, x))
    return g.model()


def maps() -> ModelProto:
    """Padding turns constants into maps, which are stored in a compressed form."""
    g = Graph()
    y = stem(g, g.input("x", [1, 3, 40, 40]), kernel=3)
    for _ in range(2):
        y = stem(g, y, 16, 3)
    g.output(g.conv(y, g.normal(4, 16, 1, 1), g.normal(4)))
    return g.model()


MODELS = {
    "bodies": with_bodies,
    "maps": maps,
    "gates": gated_constants,
    "cnn": lambda: small_cnn().model(),
    "sample": lambda: onnx.load(
        Path(__file__).parent.parent / "scripts" / "sample" / "pruned_residual_cnn.onnx"
    ),
}
MODELS |= {f"random {k}": partial(random_model, k) for k in (2, 3, 5, 8, 11, 13, 17)}
_TWICE = """
import hashlib, sys
import onnx_simplify
path, folder = sys.argv[1:]
for k in (1, 2):
    onnx_simplify.simplify(path, save_to=f"{folder}/{k}.onnx", verify=False, target="avx512")
    path = f"{folder}/{k}.onnx"
    print(hashlib.sha256(open(path, "rb").read()).hexdigest())
"""


@pytest.mark.parametrize("name", MODELS)
def test_same_input_same_bytes_and_a_second_run_changes_nothing(name, tmp_path):
    """In fresh processes, whose sets have other orders."""
    onnx.save(MODELS[name](), tmp_path / "in.onnx")
    found = set()
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", _TWICE, tmp_path / "in.onnx", folder],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        found |= set(done.stdout.split())
    assert len(found) == 1, name


@pytest.mark.parametrize("multiple", [1, None])
@pytest.mark.parametrize("name", [name for name in MODELS if "random" not in name])
def test_a_second_run_changes_nothing(name, multiple, monkeypatch):
    for profile in profiles.PROFILES.values():
        monkeypatch.setattr(profiles, "detect", lambda profile=profile: profile)
        once, _ = onnx_simplify.simplify(MODELS[name](), channel_multiple=multiple)
        twice, _ = onnx_simplify.simplify(once, channel_multiple=multiple)
        assert digest(once) == digest(twice), profile.name
    assert_same_function(MODELS[name](), once, random_feeds(MODELS[name]()))


def test_sizes_in_dispute_are_looked_at_again_once_more_is_known():
    """What onnx infers of a pooling that rounds up counts only where onnxruntime agrees."""
    g = Graph(opset=11)  # inference follows no values of sizes there
    x = g.input("x", ["n", 4, 10, "w"])
    y = g.op("Transpose", g.op("Reshape", x, np.array([0, 4, 1, -1])), perm=[0, 2, 1, 3])
    y = g.op("Reshape", y, g.op("Shape", x))
    y = g.op("MaxPool", g.op("Relu", y), kernel_shape=[2, 2], ceil_mode=1)
    sizes = g.op("Slice", g.op("Shape", y), np.array([0]), np.array([2]))
    g.output(g.op("Reshape", y, g.op("Concat", sizes, np.array([-1]), axis=0)))
    result, _ = onnx_simplify.simplify(g.model())
    assert "Shape" not in {n.op_type for n in result.graph.node}
    assert_same_function(g.model(), result, feeds_of("x", (1, 4, 10, 10), (3, 4, 10, 7)))


def digest(model: ModelProto) -> str:
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
