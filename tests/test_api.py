"""The Python functions: the three steps and their helpers, verification, timing, examples."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import shutil
import textwrap
import typing
from dataclasses import fields

import numpy as np
import onnx
import pytest
from onnx import ModelProto

import onnx_simplify
from build import (
    Graph,
    assert_same_function,
    count,
    initializer,
    node,
    parameters,
    pruned,
    random_feeds,
    run,
    set_initializer,
    small_cnn,
    with_outputs,
)
from onnx_simplify import (
    CannotVerifyError,
    ModelError,
    Report,
    SimplifyError,
    VerificationError,
    benchmark,
    fold_batchnorm,
    get_bn_folding,
    get_pinned,
    propagate_bias,
    remove_zeroed,
    schedule,
    simplify,
    verify,
)
from onnx_simplify.graph import model as graph_model
from onnx_simplify.options import Options

PAIRS = [("conv1", "batchnormalization1"), ("conv2", "batchnormalization2")]


def check(model: ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def dead_filters(model: ModelProto, name: str) -> np.ndarray:
    return np.flatnonzero(~initializer(model, name).any(axis=(1, 2, 3)))


def scaled(model: ModelProto, name: str, factor: float, elements: int | None = None) -> ModelProto:
    """A copy with the first elements of an initializer (all by default) multiplied."""
    copy = ModelProto.FromString(model.SerializeToString())
    values = initializer(copy, name).copy()
    values.reshape(-1)[:elements] *= np.float32(factor)
    set_initializer(copy, name, values)
    return copy


# simplify


def test_simplify(model):
    result, report = simplify(model)
    check(result)
    assert isinstance(report, Report)
    assert report.verification is not None and report.verification.passed
    assert report.verification.worst < 1e-5
    assert report.channels_removed == 20
    assert report.batchnorms_folded == 2
    assert report.after.parameters == parameters(result) < report.before.parameters
    assert report.before.parameters == parameters(model)
    assert report.after.bytes == pytest.approx(len(result.SerializeToString()), abs=64)
    assert_same_function(model, result, random_feeds(model, 3))


def test_simplify_again_changes_nothing(model, sample_model):
    for original in (model, sample_model):
        result, _ = simplify(original)
        again, report = simplify(result)
        assert report.channels_removed == 0 and report.batchnorms_folded == 0
        assert parameters(again) == parameters(result)
        assert [n.op_type for n in again.graph.node] == [n.op_type for n in result.graph.node]


def test_a_dense_model_loses_nothing():
    model = small_cnn(keep=1).model()
    result, report = simplify(model)
    assert report.channels_removed == 0
    assert initializer(result, "conv2.weight").shape == (24, 16, 3, 3)
    assert_same_function(model, result, random_feeds(model))


@pytest.mark.parametrize(
    "pinned",
    [["conv1"], ("conv1",), {"conv1.weight"}, {"relu1": 0}.keys()],
    ids=["list", "tuple", "set", "keys"],
)
def test_pinned_in_any_collection(model, pinned):
    result, _ = simplify(model, pinned=pinned)
    assert initializer(result, "conv1.weight").shape[0] == 16


def test_pinned_tensors_keep_their_values(model):
    """Their channels stay for a reason: someone reads the tensor."""
    result, _ = simplify(model, pinned=["relu1.out"])
    feeds = random_feeds(model)
    outer, inner = (with_outputs(m, "relu1.out") for m in (model, result))
    assert_same_function(outer, inner, feeds)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"pinned": ["nothing"]}, ModelError),
        ({"skip": ["everything"]}, ModelError),
        ({"target": "z80"}, ModelError),
        ({"input_shapes": {"picture": [1]}}, ModelError),
        ({"input_shapes": {"image": [1, 3, 12]}}, ModelError),
        ({"input_shapes": {"image": [1, 4, 12, 12]}}, ModelError),
        ({"input_data": {}}, ModelError),
        ({"input_data": {"image": np.zeros((1, 3, 12))}}, ModelError),
        ({"input_data": {"image": np.zeros((1, 4, 12, 12), np.float32)}}, ModelError),
        ({"rtol": 1e-14}, VerificationError),
    ],
    ids=("pin pass target input-name rank size no-data data-rank data-size tolerance").split(),
)
def test_bad_arguments(model, arguments, error):
    with pytest.raises(error) as caught:
        simplify(model, **arguments)
    assert isinstance(caught.value, SimplifyError) and "\n" not in str(caught.value)


def test_a_model_that_does_not_run(model):
    set_initializer(model, "gemm1.weight", np.ones((5, 7), np.float32))
    with pytest.raises(CannotVerifyError):
        simplify(model)
    for function in (propagate_bias, remove_zeroed):
        with pytest.raises(CannotVerifyError):
            function(model)


def test_a_wrong_result_is_not_returned(model, monkeypatch):
    original = schedule.rewrite

    def broken(plan):
        original(plan)
        conv = next(n for n in plan.facts.model.graph.nodes if n.op == "Conv")
        conv.inputs[2].values = conv.inputs[2].values + np.float32(0.01)

    monkeypatch.setattr(schedule, "rewrite", broken)
    with pytest.raises(VerificationError, match="scores"):
        simplify(model)
    result, report = simplify(model, verify=False)
    assert report.verification is None
    assert not verify(model, result).passed


def test_arrays_to_run_with(model):
    data = {"image": np.random.default_rng(0).standard_normal((3, 3, 12, 12))}
    before = data["image"].copy()
    _, report = simplify(model, input_data=data)
    assert report.input_shapes == {"image": [3, 3, 12, 12]}
    assert np.array_equal(data["image"], before) and list(data) == ["image"]


@pytest.mark.parametrize("checks", [0, 1, 2, 4])
def test_checks(model, checks):
    _, report = simplify(model, checks=checks)
    assert report.verification.runs == max(2, checks) + 1
    assert len(report.verification.sizes) == report.verification.runs


def test_simplify_with_benchmark(model):
    _, report = simplify(model, benchmark=True, threads=1)
    assert report.benchmark is not None and list(report.benchmark) == ["dense", "simplified"]
    assert report.speedup == pytest.approx(
        report.benchmark["dense"].median / report.benchmark["simplified"].median
    )


# The three steps.


def test_the_steps_in_a_row(sample_model):
    """Each gives a valid model of the same function; together they do what simplify does."""
    whole, _ = simplify(sample_model)
    feeds = random_feeds(sample_model, 2, batch=3)
    folded = fold_batchnorm(sample_model)
    absorbed = propagate_bias(folded)
    small = remove_zeroed(absorbed)
    for step in (folded, absorbed, small):
        check(step)
        assert_same_function(sample_model, step, feeds)
    assert count(folded, "BatchNormalization") == 0
    for name in (t.name for t in whole.graph.initializer if t.name.endswith(".weight")):
        assert initializer(small, name).shape == initializer(whole, name).shape
        assert initializer(absorbed, name).shape == initializer(sample_model, name).shape


def test_fold_batchnorm(model):
    result = fold_batchnorm(model)
    check(result)
    assert count(result, "BatchNormalization") == 0
    assert initializer(result, "conv2.weight").shape == (24, 16, 3, 3)
    assert_same_function(model, result, random_feeds(model))
    # A filter that is zero stays zero; its bias is what the normalisation makes of it.
    scale, bias, mean, var = (
        initializer(model, f"batchnormalization1.{n}") for n in ("weight", "bias", "mean", "var")
    )
    expected = (initializer(model, "conv1.bias") - mean) * scale / np.sqrt(var + 1e-5) + bias
    np.testing.assert_allclose(initializer(result, "conv1.bias"), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        dead_filters(result, "conv1.weight"), dead_filters(model, "conv1.weight")
    )


def test_get_bn_folding(model):
    assert get_bn_folding(model) == PAIRS
    assert get_bn_folding(fold_batchnorm(model)) == []


@pytest.mark.parametrize("number", [0, 1])
def test_fold_some_pairs(model, number):
    result = fold_batchnorm(model, [PAIRS[number]])
    check(result)
    assert [n.name for n in result.graph.node if n.op_type == "BatchNormalization"] == [
        PAIRS[1 - number][1]
    ]
    assert get_bn_folding(result) == [PAIRS[1 - number]]
    assert_same_function(model, result, random_feeds(model))


def test_fold_no_pairs(model):
    assert count(fold_batchnorm(model, []), "BatchNormalization") == 2


def test_fold_all_pairs(sample_model):
    pairs = get_bn_folding(sample_model)
    assert len(pairs) == count(sample_model, "BatchNormalization") == 9
    assert ("stem.conv", "stem.bn") in pairs
    result = fold_batchnorm(sample_model, pairs)
    assert result == fold_batchnorm(sample_model)


@pytest.mark.parametrize(
    "pair",
    [
        ("conv1", "batchnormalization2"),
        ("batchnormalization1", "conv1"),
        ("conv9", "batchnormalization1"),
        ("conv1", "relu1"),
    ],
)
def test_pairs_that_cannot_be_folded(model, pair):
    with pytest.raises(ModelError, match=pair[0]):
        fold_batchnorm(model, [PAIRS[0], pair])


def test_fold_before_and_not_where_it_would_be_wrong():
    g = Graph()
    x = g.input("x", ["n", 3, 9, 9])
    x = g.conv(g.batchnorm(x, 3, name="bn_a"), g.normal(8, 3, 3, 3), g.normal(8), name="valid")
    x = g.op("Relu", x)
    x = g.batchnorm(x, 8, name="bn_b")
    x = g.conv(x, g.normal(8, 8, 3, 3), pads=[1, 1, 1, 1], name="padded")
    x = g.batchnorm(x, 8, name="bn_c")
    g.output(g.op("Relu", x), x)
    model = g.model()
    assert get_bn_folding(model) == [("valid", "bn_a"), ("padded", "bn_c")]
    result = fold_batchnorm(model)
    check(result)
    assert [n.name for n in result.graph.node if n.op_type == "BatchNormalization"] == ["bn_b"]
    assert_same_function(model, result, random_feeds(model))


def test_a_convolution_with_two_readers_is_not_folded():
    g = Graph()
    x = g.conv(g.input("x", ["n", 3, 9, 9]), g.normal(8, 3, 3, 3), g.normal(8))
    g.output(g.op("Add", g.batchnorm(x, 8), x))
    model = g.model()
    assert get_bn_folding(model) == []
    assert_same_function(model, fold_batchnorm(model), random_feeds(model))


def test_unnamed_nodes_are_called_by_their_outputs(model):
    for n in model.graph.node:
        n.ClearField("name")
    pairs = get_bn_folding(model)
    assert pairs == [(f"conv{k}.out", f"batchnormalization{k}.out") for k in (1, 2)]
    assert count(fold_batchnorm(model, pairs[:1]), "BatchNormalization") == 1
    assert get_pinned(model) == ["scores"]


@pytest.mark.parametrize("fold", [True, False])
def test_propagate_bias(model, fold):
    source = fold_batchnorm(model) if fold else model
    result = propagate_bias(source)
    check(result)
    assert_same_function(model, result, random_feeds(model))
    # Nothing has shrunk, but nobody reads the constant channels.
    for name in ("conv1.weight", "conv2.weight", "gemm1.weight"):
        assert initializer(result, name).shape == initializer(model, name).shape
    for filters, reader in (("conv1.weight", "conv2.weight"), ("conv2.weight", "gemm1.weight")):
        dead = dead_filters(model, filters)
        assert len(dead) and not initializer(result, reader)[:, dead].any()
        live = np.setdiff1d(np.arange(initializer(result, reader).shape[1]), dead)
        assert (
            initializer(result, reader)[:, live]
            .any(axis=tuple(k for k in range(initializer(result, reader).ndim) if k != 1))
            .all()
        )


def test_propagate_bias_for_any_size():
    model = small_cnn(shape=("batch", 3, "height", "width")).model()
    result = propagate_bias(model, input_shapes={"image": [1, 3, 12, 12]})
    check(result)
    for sizes in ({"height": 7, "width": 19}, {"height": 30, "width": 12, "batch": 1}):
        assert_same_function(model, result, random_feeds(model, 1, **sizes))


def test_propagate_bias_respects_pins(model):
    result = propagate_bias(model, ["relu1"])
    np.testing.assert_array_equal(
        initializer(result, "conv2.weight"), initializer(model, "conv2.weight")
    )
    assert_same_function(model, result, random_feeds(model))
    with pytest.raises(ModelError, match="nothing"):
        propagate_bias(model, ["nothing"])


def zeros_and_constants() -> ModelProto:
    """Eight filters: 0 and 1 give zero, 2 and 3 a constant that is not zero."""
    g = Graph()
    bias = np.abs(g.normal(8)) + np.float32(0.1)
    bias[:2] = 0
    x = g.conv(g.input("x", ["n", 3, 8, 8]), pruned(g.normal(8, 3, 3, 3), range(4)), bias)
    g.output(g.conv(g.op("Relu", x), g.normal(4, 8, 3, 3), g.normal(4), pads=[1, 1, 1, 1]))
    return g.model()


def test_remove_zeroed_removes_zeros_only():
    model = zeros_and_constants()
    result = remove_zeroed(model, channel_multiple=1)
    check(result)
    assert initializer(result, "conv1.weight").shape == (6, 3, 3, 3)
    np.testing.assert_array_equal(
        initializer(result, "conv1.bias"), initializer(model, "conv1.bias")[2:]
    )
    np.testing.assert_array_equal(
        initializer(result, "conv2.weight"), initializer(model, "conv2.weight")[:, 2:]
    )
    np.testing.assert_array_equal(
        initializer(result, "conv2.bias"), initializer(model, "conv2.bias")
    )
    assert_same_function(model, result, random_feeds(model))


def test_remove_zeroed_leaves_live_shifts(model):
    """With biases and shifts the pruned channels are not zero."""
    result = remove_zeroed(model, channel_multiple=1)
    assert_same_function(model, result, random_feeds(model))
    # What a Relu cuts off altogether is zero, too.
    feeds = random_feeds(model, 1)[0]
    activations = run(with_outputs(model, "relu1.out"), feeds)["relu1.out"]
    zero = ~activations.any(axis=(0, 2, 3))
    assert 0 < zero.sum() < 8
    assert initializer(result, "conv1.weight").shape[0] == 16 - zero.sum()


def test_remove_zeroed_finds_channels_that_nobody_reads():
    g = Graph()
    x = g.conv(g.input("x", ["n", 3, 8, 8]), g.normal(8, 3, 3, 3), g.normal(8))
    x = g.op("Sigmoid", g.batchnorm(x, 8))
    g.output(g.conv(x, pruned(g.normal(4, 8, 1, 1), [0, 2, 5, 7], axis=1), g.normal(4)))
    model = g.model()
    result = remove_zeroed(model)
    check(result)
    assert initializer(result, "conv1.weight").shape == (4, 3, 3, 3)
    assert initializer(result, "batchnormalization1.var").shape == (4,)
    assert_same_function(model, result, random_feeds(model))


def test_remove_zeroed_respects_pins_and_multiples():
    model = zeros_and_constants()
    assert initializer(remove_zeroed(model, ["conv1"]), "conv1.weight").shape[0] == 8
    assert initializer(remove_zeroed(model, channel_multiple=4), "conv1.weight").shape[0] == 8
    assert initializer(remove_zeroed(model, channel_multiple=3), "conv1.weight").shape[0] == 6


def test_get_pinned(model, sample_model):
    assert get_pinned(model) == ["gemm1"]
    assert get_pinned(sample_model) == ["classifier"]


def test_get_pinned_behind_a_pooling_whose_size_is_in_dispute():
    g = Graph()
    x = g.conv(g.input("x", ["n", 3, 9, 9]), g.normal(8, 3, 3, 3), g.normal(8), name="free")
    x = g.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    g.output(g.conv(x, g.normal(8, 8, 1, 1), g.normal(8), name="last"))
    assert get_pinned(g.model()) == ["last"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: simplify(m, rtol=-1), "rtol is -1"),
        (lambda m: simplify(m, threads=0), "threads is 0"),
        (lambda m: remove_zeroed(m, channel_multiple=0), "channel_multiple is 0"),
        (lambda m: benchmark({"m": m}, rounds=0), "rounds is 0"),
        (lambda m: verify(m, m, rtol=0), "rtol is 0"),
        (lambda m: simplify(m, bn_folding=[("a", "b")]), "cannot fold .'a', 'b'."),
        (lambda m: simplify(3), "expected a path, bytes or a ModelProto, got int"),
    ],
)
def test_arguments_are_checked(model, call, message):
    with pytest.raises(ModelError, match=message):
        call(model)


def test_one_name_need_not_be_in_a_list(model):
    _, report = simplify(model, pinned="conv1", skip="fold_batchnorm")
    assert report.batchnorms_folded == 0
    assert report.layers[0].outputs_after == report.layers[0].outputs


def test_only_the_pairs_asked_for_are_folded(model):
    result, report = simplify(model, bn_folding=PAIRS[:1])
    assert report.batchnorms_folded == 1 and count(result, "BatchNormalization") == 1


def test_get_pinned_behind_opaque_operators():
    g = Graph()
    x = g.conv(g.input("x", ["n", 3, 8, 8]), g.normal(8, 3, 3, 3), g.normal(8), name="free")
    x = g.conv(g.op("Relu", x), g.normal(8, 8, 3, 3), g.normal(8), name="stuck")
    x = g.op("LRN", x, size=3)
    x = g.conv(x, g.normal(8, 8, 1, 1), g.normal(8), name="inner")
    g.output(g.conv(g.op("Relu", x), g.normal(8, 8, 1, 1), name="last"))
    assert get_pinned(g.model()) == ["stuck", "last"]


# verify


def test_verify_accepts_the_same_and_the_simplified(model):
    assert verify(model, model).worst == pytest.approx(0, abs=1e-6)
    found = verify(model, simplify(model)[0])
    assert found.passed and 0 <= found.worst < 1e-5 and found.reason == ""
    assert found.tolerance == 1e-4
    assert found.runs == len(found.sizes) >= 3


@pytest.mark.parametrize(
    ("name", "factor", "elements"),
    [
        ("gemm1.weight", 1.001, None),
        ("gemm1.bias", 1.01, 1),
        ("conv1.weight", 1.01, None),
        ("conv2.bias", 1.05, None),
        ("batchnormalization2.mean", 1.02, None),
        ("gemm1.weight", -1, 1),
        ("gemm1.weight", np.nan, 1),
        ("gemm1.weight", np.inf, 1),
    ],
)
def test_verify_detects_a_wrong_weight(model, name, factor, elements):
    found = verify(model, scaled(model, name, factor, elements))
    assert not found.passed
    assert "scores" in found.reason


def test_verify_detects_one_tiny_weight_in_the_sample(sample_model):
    found = verify(sample_model, scaled(sample_model, "classifier.weight", 1.05, 1))
    assert not found.passed and 0 < found.worst < 0.05


def hardly_varying(spread: float = 1e-5) -> ModelProto:
    """A network whose outputs are 100 and react very little to the input."""
    g = small_cnn()
    model = g.model()
    weight = initializer(model, "gemm1.weight") * np.float32(100 * spread)
    set_initializer(model, "gemm1.weight", weight)
    set_initializer(model, "gemm1.bias", np.full(5, 100, np.float32))
    return model


def test_verify_detects_a_constant_in_place_of_a_network():
    """Relative to their magnitude the outputs are right; all that they say is lost."""
    model = hardly_varying()
    constant = scaled(model, "gemm1.weight", 0)
    found = verify(model, constant)
    assert not found.passed
    assert found.worst < found.tolerance


def test_verify_accepts_a_network_that_hardly_varies():
    model = hardly_varying()
    result, report = simplify(model)
    assert report.verification.passed
    assert verify(model, result).passed


def test_verify_detects_a_swapped_output():
    g = Graph()
    x = g.conv(g.input("x", ["n", 3, 8, 8]), g.normal(4, 3, 3, 3), g.normal(4))
    g.output(g.op("Relu", x, outputs=["a"]), g.op("Sigmoid", x, outputs=["b"]))
    model = g.model()
    swapped = ModelProto.FromString(model.SerializeToString())
    node(swapped, "relu1").output[0], node(swapped, "sigmoid1").output[0] = "b", "a"
    assert not verify(model, swapped).passed
    reordered = ModelProto.FromString(model.SerializeToString())
    outputs = list(reordered.graph.output)[::-1]
    del reordered.graph.output[:]
    reordered.graph.output.extend(outputs)
    assert not verify(model, reordered).passed


def test_verify_detects_other_names_shapes_and_types(model):
    renamed = ModelProto.FromString(model.SerializeToString())
    renamed.graph.output[0].name = node(renamed, "gemm1").output[0] = "other"
    assert not verify(model, renamed).passed
    g = small_cnn(classes=4)
    assert not verify(model, g.model()).passed
    cast = small_cnn()
    cast.nodes[-1].output[0] = "raw"
    cast.outputs.clear()
    cast.output(cast.op("Cast", "raw", to=onnx.TensorProto.DOUBLE, outputs=["scores"]))
    found = verify(model, cast.model())
    assert not found.passed and "float64" in found.reason


def test_verify_detects_what_shows_at_other_sizes_only():
    """A model that is right for the batch it was probed with, and for no other."""

    def build(target):
        g = Graph()
        x = g.conv(g.input("x", ["n", 3, 8, 8]), g.normal(4, 3, 3, 3), g.normal(4))
        x = g.op("Reshape", g.op("Relu", x), np.array(target))
        g.output(g.gemm(x, g.normal(5, 144), g.normal(5)), shape=["n", 5])
        return g.model()

    assert verify(build([0, -1]), build([-1, 144])).passed
    assert not verify(build([0, -1]), build([1, 144])).passed


def test_verify_detects_a_wrong_border():
    """Only the padding of a constant channel is wrong."""
    g = Graph()
    weight = pruned(g.normal(8, 3, 3, 3), [0, 1, 2, 3])
    x = g.conv(g.input("x", ["n", 3, 32, 32]), weight, g.normal(8), pads=[1, 1, 1, 1])
    x = g.op("Sigmoid", x)
    g.output(g.conv(x, g.normal(4, 8, 3, 3), g.normal(4), pads=[1, 1, 1, 1]))
    model = g.model()
    wrong = ModelProto.FromString(model.SerializeToString())
    constant = 1 / (1 + np.exp(-initializer(model, "conv1.bias").astype(np.float64)))
    constant[4:] = 0
    w = initializer(model, "conv2.weight")
    shift = np.einsum("oikl,i->o", w.astype(np.float64), constant)
    set_initializer(wrong, "conv2.weight", pruned(w, [0, 1, 2, 3], axis=1))
    set_initializer(
        wrong, "conv2.bias", (initializer(model, "conv2.bias") + shift).astype(np.float32)
    )
    assert not verify(model, wrong).passed


@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-6])
def test_verify_with_a_tolerance(model, rtol):
    wrong = scaled(model, "gemm1.weight", 1 + 5e-4)
    found = verify(model, wrong, rtol=rtol)
    assert found.tolerance == rtol
    assert found.passed == (rtol == 1e-2)


def test_verify_on_given_inputs(model):
    data = {"image": np.random.default_rng(0).standard_normal((4, 3, 12, 12))}
    found = verify(model, simplify(model)[0], input_data=data)
    assert found.passed
    assert verify(model, model, input_shapes={"image": [5, 3, 12, 12]}).passed


def test_verify_takes_files_and_bytes(model, path):
    result, _ = simplify(model)
    for original in (path, str(path), path.read_bytes(), model):
        assert verify(original, result.SerializeToString()).passed


def test_verify_without_a_runnable_original(model):
    broken = ModelProto.FromString(model.SerializeToString())
    set_initializer(broken, "gemm1.weight", np.ones((5, 7), np.float32))
    with pytest.raises(CannotVerifyError):
        verify(broken, model)
    found = verify(model, broken)
    assert not found.passed and "does not run" in found.reason


# benchmark


def test_benchmark(model):
    result, _ = simplify(model)
    found = benchmark({"dense": model, "small": result.SerializeToString()}, rounds=5)
    assert list(found) == ["dense", "small"]
    for timing in found.values():
        assert 0 < timing.low <= timing.median <= timing.high
        assert timing.rounds == 5


def test_benchmark_on_given_inputs(model):
    shapes = {"image": [3, 3, 12, 12]}
    assert list(benchmark({"a": model}, input_shapes=shapes, rounds=2)) == ["a"]
    data = {"image": np.zeros((2, 3, 12, 12), np.float32)}
    assert list(benchmark({"a": model}, input_data=data, rounds=2)) == ["a"]
    with pytest.raises(ModelError):
        benchmark({"a": model}, input_shapes={"image": [3, 3]})


def test_benchmark_of_nothing():
    assert benchmark({}) == {}


# Documentation.

MODULES = [
    m.name
    for m in pkgutil.walk_packages(onnx_simplify.__path__, "onnx_simplify.")
    if not m.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name, tmp_path, monkeypatch, sample):
    shutil.copy(sample, tmp_path / "pruned.onnx")
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.failed == 0


def examples() -> list[str]:
    """Indented code that imports the package, from all docstrings of the public interface."""
    docs = [importlib.import_module(n).__doc__ or "" for n in ("onnx_simplify", *MODULES)]
    docs += [getattr(onnx_simplify, n).__doc__ or "" for n in onnx_simplify.__all__]
    blocks = [b for d in docs for b in re.findall(r"(?:^    .*\n|^\n)+", d + "\n", re.M)]
    return [textwrap.dedent(b) for b in blocks if "import onnx_simplify" in b and ">>>" not in b]


def test_examples_run(tmp_path, monkeypatch, sample, capsys):
    shutil.copy(sample, tmp_path / "pruned.onnx")
    monkeypatch.chdir(tmp_path)
    found = examples()
    assert found
    for text in found:
        exec(compile(text, "example", "exec"), {})


@pytest.mark.parametrize("name", onnx_simplify.__all__)
def test_public_names_are_documented_and_typed(name):
    thing = getattr(onnx_simplify, name)
    if name == "__version__":
        assert re.fullmatch(r"\d+\.\d+\.\d+\S*", thing)
        return
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing):
        hints = typing.get_type_hints(thing)
        arguments = inspect.signature(thing).parameters
        assert set(hints) == {*arguments, "return"}
        for argument in arguments if len(arguments) > 1 else ():
            assert re.search(rf"\b{argument}\b", thing.__doc__ or "")


def test_errors_carry_exit_codes():
    assert issubclass(ModelError, SimplifyError) and ModelError.exit_code == 2
    assert issubclass(VerificationError, SimplifyError) and VerificationError.exit_code == 1
    assert issubclass(CannotVerifyError, SimplifyError) and CannotVerifyError.exit_code == 3


def test_results_that_fit_no_message(model, tmp_path, monkeypatch):
    """Above 2 GiB (here: 4 kB) a result needs a file, beside which its weights are."""
    monkeypatch.setattr(graph_model, "MESSAGE_LIMIT", 4096)
    with pytest.raises(onnx_simplify.ModelError, match="give save_to"):
        onnx_simplify.simplify(model)
    path = tmp_path / "small.onnx"
    found, report = onnx_simplify.simplify(model, save_to=path)
    assert {p.name for p in tmp_path.iterdir()} == {"small.onnx", "small.onnx.data"}
    assert any(t.external_data for t in found.graph.initializer)
    assert report.after.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert_same_function(model, path, random_feeds(model))


def test_save_to(model, tmp_path):
    path = tmp_path / "small.onnx"
    found, report = onnx_simplify.simplify(model, save_to=path)
    stored = onnx.load(path)
    weights = [sorted(m.graph.initializer, key=lambda t: t.name) for m in (stored, found)]
    assert weights[0] == weights[1] and stored.graph.node == found.graph.node
    assert report.after.bytes == path.stat().st_size
    with pytest.raises(onnx_simplify.ModelError, match="does not exist"):
        onnx_simplify.simplify(model, save_to=tmp_path / "no" / "small.onnx")


@pytest.mark.parametrize("module", ["onnx_simplify", "torch_bridge"])
def test_options_have_one_default(module):
    if module == "torch_bridge":
        pytest.importorskip("torch")
    function = importlib.import_module(module).simplify
    known = Options()
    taken = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if hasattr(known, name)
    }
    expected = {name: getattr(known, name) for name in taken}
    expected |= {"input_shapes": None} if "input_shapes" in taken else {}
    assert taken == expected
    if module == "onnx_simplify":
        assert {f.name for f in fields(Options)} - set(taken) == {"progress", "cautious"}
