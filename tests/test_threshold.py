"""Channels that are nearly zero: taken for zero only on request, and the difference is measured."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto

from build import Graph, assert_same_function, random_feeds, relative_error, run
from onnx_simplify import ModelError, VerificationError, simplify
from onnx_simplify.graph.load import load
from onnx_simplify.passes.clean import clean
from onnx_simplify.passes.zero_small import thresholds, zero_small


def faint(scales: tuple[float, ...] = (1e-6, 1e-4, 1e-2)) -> ModelProto:
    """A network whose first layer has a channel of each scale beside five of scale one."""
    g = Graph()
    x = g.input("x", ["n", 3, 10, 10])
    weight = g.normal(5 + len(scales), 3, 3, 3)
    weight /= np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
    for k, scale in enumerate(scales):
        weight[k + 1] *= np.float32(scale)
    y = g.op("Relu", g.conv(x, weight, g.normal(len(weight)), pads=[1] * 4, name="first"))
    g.output(g.conv(y, g.normal(4, len(weight), 1, 1), g.normal(4), name="second"))
    return g.model()


@pytest.mark.parametrize("threshold, gone", [(0.0, 0), (1e-5, 1), (1e-3, 2), (0.1, 3)])
def test_channels_below_the_threshold_go(threshold, gone):
    model = faint()
    result, report = simplify(model, threshold=threshold, rtol=0.1, channel_multiple=1)
    first = report.layers[0]
    assert (first.small, first.removed) == (gone, gone) and report.threshold == threshold
    assert report.layers[1].small == 0
    for feeds in random_feeds(model):
        error = relative_error(*(run(m, feeds)["second.out"] for m in (model, result)))
        assert error <= max(10 * threshold, 1e-6)
    assert report.verification.worst <= max(10 * threshold, 1e-6)


def test_without_a_threshold_nothing_changes():
    model = faint()
    result, report = simplify(model, channel_multiple=1)
    assert report.channels_removed == 0 and report.threshold == 0
    assert_same_function(model, result, random_feeds(model))


def test_the_difference_is_bounded():
    with pytest.raises(VerificationError, match="lower threshold or raise rtol"):
        simplify(faint(), threshold=0.1)
    assert simplify(faint(), threshold=1e-5)[1].channels_removed == 0  # kept up to a multiple
    assert simplify(faint(), threshold=1e-5, channel_multiple=1)[1].channels_removed == 1


def test_the_largest_threshold_is_found():
    model = faint((1e-6, 1e-5, 1e-4, 1e-3, 1e-2))
    data = random_feeds(model, 1)[0]
    found = []
    for tolerance in (1e-7, 1e-5, 1e-3, 0.5):
        result, report = simplify(
            model, auto_threshold=tolerance, input_data=data, channel_multiple=1
        )
        found.append(report.channels_removed)
        error = relative_error(*(run(m, data)["second.out"] for m in (model, result)))
        assert error <= tolerance + 1e-6
        # One more channel would have been too much.
        larger = [t for t in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2) if t > report.threshold * 1.01]
        if larger:
            other, _ = simplify(model, threshold=larger[0] * 1.01, rtol=1.0, channel_multiple=1)
            worse = relative_error(*(run(m, data)["second.out"] for m in (model, other)))
            assert worse > tolerance / 3
    assert found == sorted(found) and found[0] < 2 and found[-1] == 5


def test_thresholds_are_the_sizes_of_channels():
    model = load(faint())
    clean(model)
    known = thresholds(model, 0.1)
    np.testing.assert_allclose(known[:3], [1e-6, 1e-4, 1e-2], rtol=1e-4)
    # A channel exactly at the threshold counts.
    assert sum(zero_small(model, float(known[1])).values()) == 2
    assert sum(zero_small(model, float(known[1])).values()) == 0


def test_nan_and_shared_weights_are_left_alone():
    g = Graph()
    x = g.input("x", [1, 3, 4, 4])
    weight = np.ones((4, 3, 1, 1), np.float32)
    weight[0] *= 1e-8
    shared = g.const(weight, "shared")
    broken = weight.copy()
    broken[1, 0] = np.nan
    g.output(g.conv(x, shared, name="a"), g.conv(x, shared, name="b"), g.conv(x, broken, name="c"))
    model = load(g.model())
    clean(model)
    counts = zero_small(model, 1e-6)
    assert {node.name: count for node, count in counts.items()} == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": -0.1}, "at least 0"),
        ({"threshold": 1.0}, "less than 1"),
        ({"auto_threshold": 0.0}, "must be positive"),
        ({"auto_threshold": 1e-3}, "input_data"),
        ({"auto_threshold": 1e-3, "threshold": 0.1}, "not both"),
    ],
)
def test_thresholds_that_make_no_sense(options, message):
    with pytest.raises(ModelError, match=message):
        simplify(faint(), **options)


def test_on_the_command_line(cli, tmp_path):
    source, target, data = tmp_path / "in.onnx", tmp_path / "out.onnx", tmp_path / "data.npz"
    source.write_bytes(faint().SerializeToString())
    result = cli(source, target, "--threshold", "1e-3", "--rtol", "1e-2", "--channel-multiple", "1")
    assert result.code == 0 and "2 channels below 1.0e-03 of their layer" in result.out
    target.unlink()
    result = cli(source, target, "--threshold", "0.1")
    assert result.code == 1 and "lower --threshold" in result.err and not target.exists()
    result = cli(source, target, "--auto-threshold", "1e-3")
    assert result.code == 2 and "--input-data" in result.err and not target.exists()
    np.savez(data, x=np.random.default_rng(0).standard_normal((1, 3, 10, 10)).astype(np.float32))
    result = cli(source, target, "--auto-threshold", "1e-3", "--input-data", data)
    assert result.code == 0 and "were taken for zero" in result.out
    for wrong in (["--threshold", "2"], ["--threshold", "x"], ["--auto-threshold", "-1"]):
        assert cli(source, target, *wrong).code == 2
