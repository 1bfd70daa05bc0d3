"""The command line: options, tables, the JSON report and exit codes."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_simplify
from build import (
    Graph,
    assert_same_function,
    count,
    initializer,
    parameters,
    pruned,
    random_feeds,
    set_initializer,
    small_cnn,
)
from onnx_simplify import pipeline, schedule

PASSES = ["fold_batchnorm", "propagate_bias", "remove_zeroed"]
# The fixture's network: image 3x12x12, 16 and 24 filters of which half are pruned, 5 classes.
CHANNELS, PRUNED = 16 + 24 + 5, 8 + 12
MACS_BEFORE = 144 * (16 * 3 * 9 + 24 * 16 * 9) + 24 * 5
MACS_AFTER = 144 * (8 * 3 * 9 + 12 * 8 * 9) + 12 * 5


def call(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """``python -m onnx_simplify`` in a process of its own."""
    options.setdefault("stdout", subprocess.PIPE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "onnx_simplify", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env=environment,
        cwd=Path(onnx_simplify.__file__).parent.parent,
        **options,
    )


def table(out: str) -> dict[str, list[str]]:
    """The rows of a printed table: first cell, other cells."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


def number(text: str) -> int:
    return int(text.replace(",", ""))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def report(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def layer(found: dict, name: str) -> dict:
    return next(item for item in found["layers"] if item["name"] == name)


def corrupt(monkeypatch: pytest.MonkeyPatch, factor: float = 1.01) -> None:
    """Let the last pass damage the classifier's weights."""
    original = schedule.rewrite

    def broken(plan):
        original(plan)
        for node in plan.facts.model.graph.nodes:
            if node.op == "Gemm":
                node.inputs[1].values = node.inputs[1].values * np.float32(factor)

    monkeypatch.setattr(schedule, "rewrite", broken)


def custom_operator() -> onnx.ModelProto:
    """A network with an operator that onnxruntime does not have."""
    g = small_cnn()
    g.domains["acme"] = 1
    g.nodes[5].op_type, g.nodes[5].domain = "Swoosh", "acme"
    g.outputs.clear()
    g.output("scores", shape=["batch", 5])
    return g.model()


def impossible() -> onnx.ModelProto:
    """A network that is valid and loads, but runs at no size."""
    g = Graph()
    x = g.input("x", ["n", 3, "h", "w"])
    x = g.conv(x, pruned(g.normal(8, 3, 1, 1), [0, 3, 4, 6]), g.normal(8))
    x = g.conv(g.op("Relu", x), g.normal(4, 8, 1, 1), g.normal(4))
    x = g.op("Reshape", x, np.array([0, 0, 0, 1009, 1013]))
    g.output(x, shape=["n", 4, "h", 1009, 1013])
    return g.model()


# The ordinary run.


def test_writes_a_smaller_model_that_computes_the_same(cli, model, path):
    out = path.with_name("out.onnx")
    before = path.read_bytes()
    result = cli(path, out)
    assert (result.code, result.err) == (0, "")
    found = onnx.load(out)
    onnx.checker.check_model(found, full_check=True)
    assert_same_function(model, found, random_feeds(model, 3))
    assert initializer(found, "conv1.weight").shape == (8, 3, 3, 3)
    assert initializer(found, "conv2.weight").shape == (12, 8, 3, 3)
    assert path.read_bytes() == before
    assert sorted(files(path.parent)) == ["in.onnx", "out.onnx"]


def test_table_shows_the_figures(cli, path):
    out = path.with_name("out.onnx")
    rows = table(cli(path, out).out)
    model, found = onnx.load(path), onnx.load(out)
    assert rows["BatchNormalization"] == ["2", "0", "-2"]
    assert rows["Conv"] == ["2", "2"]
    assert [number(v) for v in rows["nodes"][:2]] == [len(model.graph.node), len(found.graph.node)]
    assert [number(v) for v in rows["parameters"][:2]] == [parameters(model), parameters(found)]
    assert [number(v) for v in rows["MACs"][:2]] == [MACS_BEFORE, MACS_AFTER]
    assert number(rows["file size (bytes)"][1]) == out.stat().st_size
    assert [number(v) for v in rows["channels of layers"][:2]] == [CHANNELS, CHANNELS - PRUNED]
    assert rows["MACs"][2] == f"{MACS_AFTER / MACS_BEFORE - 1:+.1%}"


def test_file_size_before_is_that_of_the_file(cli, sample, path):
    for source in (path, sample):
        rows = table(cli(source, path.with_name("out.onnx")).out)
        assert number(rows["file size (bytes)"][0]) == source.stat().st_size


def test_says_how_well_it_verified(cli, path):
    line = cli(path, path.with_name("out.onnx")).out.strip().splitlines()[-1]
    found = re.fullmatch(
        r"verified on (\d+) inputs: worst relative error (\S+) \(allowed 1e-04\)", line
    )
    assert found and int(found[1]) >= 3 and 0 <= float(found[2]) < 1e-5


def test_json_agrees_with_the_table(cli, path):
    out, target = path.with_name("out.onnx"), path.with_name("report.json")
    rows = table(cli(path, out, "--json", target, "--benchmark").out)
    found = report(target)
    assert set(found) >= {
        "version",
        "input",
        "output",
        "before",
        "after",
        "layers",
        "batchnorms_folded",
        "opaque",
        "input_shapes",
        "target",
        "verification",
        "benchmark",
        "seconds",
        "notes",
        "channels_removed",
        "speedup",
        "plan",
        "plans",
        "threshold",
    }
    assert found["version"] == onnx_simplify.__version__
    assert (found["input"], found["output"]) == (str(path), str(out))
    for k, side in enumerate(("before", "after")):
        figures = found[side]
        assert set(figures) >= {"nodes", "parameters", "macs", "bytes"}
        assert number(rows["nodes"][k]) == sum(figures["nodes"].values())
        assert number(rows["parameters"][k]) == figures["parameters"]
        assert number(rows["MACs"][k]) == figures["macs"]
        assert number(rows["file size (bytes)"][k]) == figures["bytes"]
        assert float(rows["time (ms, median)"][k]) == pytest.approx(
            found["benchmark"][("dense", "simplified")[k]]["median"], abs=1e-3
        )
    assert found["after"]["bytes"] == out.stat().st_size
    assert found["after"]["nodes"]["Conv"] == 2
    assert found["batchnorms_folded"] == 2
    assert found["channels_removed"] == PRUNED
    assert found["input_shapes"] == {"image": [1, 3, 12, 12]}
    assert found["opaque"] == []
    assert found["seconds"] > 0
    dense, simplified = (found["benchmark"][n]["median"] for n in ("dense", "simplified"))
    assert found["speedup"] == pytest.approx(dense / simplified)
    assert rows["time (ms, median)"][2] == f"{found['speedup']:.2f}x faster"


def test_json_layers(cli, path):
    target = path.with_name("report.json")
    cli(path, path.with_name("out.onnx"), "--json", target)
    found = report(target)
    sizes = {
        item["name"]: (item["inputs"], item["outputs"], item["inputs_after"], item["outputs_after"])
        for item in found["layers"]
    }
    assert sizes == {"conv1": (3, 16, 3, 8), "conv2": (16, 24, 8, 12), "gemm1": (24, 5, 12, 5)}
    assert [item["constant"] for item in found["layers"]] == [8, 12, 0]
    assert [item["op"] for item in found["layers"]] == ["Conv", "Conv", "Gemm"]


def test_json_verification(cli, path):
    target = path.with_name("report.json")
    cli(path, path.with_name("out.onnx"), "--json", target, "--rtol", "1e-3")
    found = report(target)["verification"]
    assert found["passed"] is True
    assert 0 <= found["worst"] < 1e-5
    assert found["tolerance"] == 1e-3
    assert found["runs"] == len(found["sizes"])
    assert {"batch": 1} in found["sizes"]
    assert len({s["batch"] for s in found["sizes"]}) > 1, "one batch size alone proves nothing"


def test_layers_are_counted_right_without_node_names(cli, sample, path):
    for source in (path, sample):
        target = path.with_name("report.json")
        model = onnx.load(source)
        cli(source, path.with_name("out.onnx"), "--json", target)
        named = report(target)
        for node in model.graph.node:
            node.ClearField("name")
        unnamed = path.with_name("unnamed.onnx")
        onnx.save(model, unnamed)
        assert cli(unnamed, path.with_name("out.onnx"), "--json", target).code == 0
        found = report(target)
        assert found["channels_removed"] == named["channels_removed"]
        for key in ("outputs", "inputs", "constant", "dead", "outputs_after", "inputs_after"):
            assert [x[key] for x in found["layers"]] == [x[key] for x in named["layers"]]


def test_sample(cli, sample, sample_model, tmp_path):
    out = tmp_path / "out.onnx"
    rows = table(cli(sample, out).out)
    assert number(rows["MACs"][1]) < 0.3 * number(rows["MACs"][0])
    assert_same_function(sample_model, out, random_feeds(sample_model, 2, batch=3))


def test_input_may_be_output(cli, model, path):
    other = path.parent / ".." / path.parent.name / path.name
    assert cli(path, other).code == 0
    assert list(files(path.parent)) == ["in.onnx"]
    found = onnx.load(path)
    assert count(found, "BatchNormalization") == 0
    assert_same_function(model, found, random_feeds(model))


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_output_keeps_its_mode(cli, path):
    out = path.with_name("out.onnx")
    out.write_bytes(b"")
    out.chmod(0o640)
    assert cli(path, out).code == 0
    assert out.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
def test_output_through_a_link(cli, path):
    target, link = path.with_name("target.onnx"), path.with_name("link.onnx")
    target.write_bytes(b"old")
    link.symlink_to(target.name)
    assert cli(path, link).code == 0
    assert link.is_symlink() and onnx.load(target).graph.node


# Options.


@pytest.mark.parametrize(
    "name", ["conv1", "conv1.out", "conv1.weight", "conv1.bias", "batchnormalization1", "relu1.out"]
)
def test_pin(cli, model, path, name):
    out, target = path.with_name("out.onnx"), path.with_name("report.json")
    assert cli(path, out, "--pin", name, "--json", target).code == 0
    found = onnx.load(out)
    assert initializer(found, "conv1.weight").shape[0] == 16
    assert initializer(found, "conv2.weight").shape[:2] == (12, 16)
    assert layer(report(target), "conv1")["outputs_after"] == 16
    assert report(target)["channels_removed"] == 12
    assert_same_function(model, found, random_feeds(model))


def test_pin_is_repeatable(cli, path):
    out = path.with_name("out.onnx")
    assert cli(path, out, "--pin", "conv1", "--pin", "relu2").code == 0
    found = onnx.load(out)
    assert initializer(found, "conv1.weight").shape == (16, 3, 3, 3)
    assert initializer(found, "conv2.weight").shape == (24, 16, 3, 3)
    assert initializer(found, "gemm1.weight").shape == (5, 24)


@pytest.mark.parametrize("name", ["image", "scores"])
def test_pin_of_what_stays_anyway(cli, path, name):
    target = path.with_name("report.json")
    assert cli(path, path.with_name("out.onnx"), "--pin", name, "--json", target).code == 0
    assert report(target)["channels_removed"] == PRUNED


@pytest.mark.parametrize("known", [[], ["--pin", "conv1"]])
def test_unknown_pin(cli, path, known):
    out = path.with_name("out.onnx")
    result = cli(path, out, *known, "--pin", "conv9")
    assert result.code == 2 and "conv9" in result.err and not out.exists()


@pytest.mark.parametrize("skipped", [[p] for p in PASSES] + [PASSES], ids="+".join)
def test_skip(cli, model, path, skipped):
    out, target = path.with_name("out.onnx"), path.with_name("report.json")
    options = [o for p in skipped for o in ("--skip", p)]
    assert cli(path, out, "--json", target, *options).code == 0
    found = onnx.load(out)
    assert_same_function(model, found, random_feeds(model))
    assert count(found, "BatchNormalization") == (2 if "fold_batchnorm" in skipped else 0)
    # The pruned channels are constants, but not zero: nobody may forget them.
    kept = {"propagate_bias", "remove_zeroed"} & set(skipped)
    assert report(target)["channels_removed"] == (0 if kept else PRUNED)
    assert initializer(found, "conv2.weight").shape[:2] == ((24, 16) if kept else (12, 8))


def test_zero_channels_go_without_propagate_bias(cli, path):
    """As in ``onnx_simplify.remove_zeroed``: there is nothing to absorb."""
    model = small_cnn().model()
    dead = ~initializer(model, "conv1.weight").any(axis=(1, 2, 3))
    for name in ("conv1.bias", "batchnormalization1.bias", "batchnormalization1.mean"):
        set_initializer(model, name, np.where(dead, 0, initializer(model, name)))
    onnx.save(model, path)
    expected = onnx_simplify.remove_zeroed(model)
    assert initializer(expected, "conv1.weight").shape[0] == 8
    out = path.with_name("out.onnx")
    assert cli(path, out, "--skip", "propagate_bias").code == 0
    found = onnx.load(out)
    assert_same_function(model, found, random_feeds(model))
    assert initializer(found, "conv1.weight").shape[0] == 8


def test_input_shape(cli, path):
    free = small_cnn(shape=("batch", 3, "height", "width")).model()
    onnx.save(free, path)
    out, target = path.with_name("out.onnx"), path.with_name("report.json")
    result = cli(path, out, "--input-shape", "image:2,3,20,28", "--json", target)
    assert result.code == 0
    found = report(target)
    assert found["input_shapes"] == {"image": [2, 3, 20, 28]}
    assert found["before"]["macs"] == 2 * (20 * 28 * (16 * 27 + 24 * 144) + 24 * 5)
    for sizes in ({"height": 20, "width": 28}, {"height": 9, "width": 31, "batch": 5}):
        assert_same_function(free, out, random_feeds(free, 1, **sizes))


def test_input_shape_for_a_size_that_nobody_would_guess(cli, path):
    g = Graph()
    x = g.input("signal", ["batch", 2, "length"])
    x = g.conv(x, pruned(g.normal(8, 2, 3), [0, 3, 4, 6]), g.normal(8), pads=[1, 1])
    x = g.op("Flatten", g.op("Sigmoid", g.batchnorm(x, 8)))
    g.output(g.gemm(x, g.normal(3, 8 * 37), g.normal(3)), shape=["batch", 3])
    model = g.model()
    onnx.save(model, path)
    out = path.with_name("out.onnx")
    result = cli(path, out)
    assert result.code == 3 and "--input-shape" in result.err and not out.exists()
    assert cli(path, out, "--input-shape", "signal:1,2,37").code == 0
    assert_same_function(model, out, random_feeds(model, length=37))
    out.unlink()
    data = path.with_name("data.npz")
    np.savez(data, signal=np.random.default_rng(3).standard_normal((4, 2, 37)))
    assert cli(path, out, "--input-data", data).code == 0
    assert_same_function(model, out, random_feeds(model, length=37))


@pytest.mark.parametrize("text", ["image:1,3,12,12", "image:1x3x12x12", "image:7,3,12,12"])
def test_input_shape_notations(cli, path, text):
    assert cli(path, path.with_name("out.onnx"), "--input-shape", text).code == 0


def test_input_shape_when_none_is_declared(cli, model, path):
    feeds = random_feeds(model)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    out = path.with_name("out.onnx")
    result = cli(path, out)
    assert result.code == 3 and "'image' has no shape" in result.err and not out.exists()
    np.savez(path.with_name("data.npz"), **feeds[0])
    for options in (
        ["--input-shape", "image:1,3,12,12"],
        ["--input-data", path.with_name("data.npz")],
    ):
        assert cli(path, out, *options).code == 0
        assert_same_function(model, out, feeds)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("image:3,12,12", "4 dimensions"),
        ("picture:1,3,12,12", "picture"),
        ("image:1,3,12,13", "fixed"),
        ("image:1,4,12,12", "fixed"),
    ],
    ids=["rank", "name", "width", "channels"],
)
def test_input_shape_that_does_not_fit(cli, path, text, part):
    out = path.with_name("out.onnx")
    result = cli(path, out, "--input-shape", text)
    assert result.code == 2 and part in result.err and not out.exists()


def test_input_data(cli, model, path):
    out, data, target = (path.with_name(n) for n in ("out.onnx", "data.npz", "report.json"))
    np.savez(data, image=np.random.default_rng(1).standard_normal((5, 3, 12, 12)))
    assert cli(path, out, "--input-data", data, "--json", target).code == 0
    assert report(target)["input_shapes"] == {"image": [5, 3, 12, 12]}
    assert_same_function(model, out, random_feeds(model))


def test_input_data_of_another_type_is_converted(cli, model, path):
    out, data = path.with_name("out.onnx"), path.with_name("data.npz")
    np.savez(data, image=np.arange(3 * 144).reshape(1, 3, 12, 12))
    assert cli(path, out, "--input-data", data).code == 0


@pytest.mark.parametrize(
    "shape", [(1, 3, 12, 12), (1, 3, 12), (1, 4, 12, 12)], ids=["name", "rank", "channels"]
)
def test_input_data_that_does_not_fit(cli, path, shape):
    out, data = path.with_name("out.onnx"), path.with_name("data.npz")
    np.savez(data, **{"picture" if shape == (1, 3, 12, 12) else "image": np.zeros(shape)})
    result = cli(path, out, "--input-data", data)
    assert result.code == 2 and result.err.startswith("onnx-simplify: --input-data: ")
    assert not out.exists()


def test_no_verify(cli, model, path):
    out, target = path.with_name("out.onnx"), path.with_name("report.json")
    result = cli(path, out, "--no-verify", "--json", target)
    assert result.code == 0
    assert "not verified" in result.out
    assert report(target)["verification"] is None
    assert report(target)["channels_removed"] == PRUNED
    assert_same_function(model, out, random_feeds(model))


def test_rtol_too_strict_for_rounding(cli, path):
    out = path.with_name("out.onnx")
    result = cli(path, out, "--rtol", "1e-14")
    assert result.code == 1 and "verification failed" in result.err and not out.exists()


@pytest.mark.parametrize("checks", [2, 5])
def test_check(cli, path, checks):
    target = path.with_name("report.json")
    cli(path, path.with_name("out.onnx"), "--check", checks, "--json", target)
    found = report(target)["verification"]
    assert sum(s == {"batch": 1} for s in found["sizes"]) == checks
    assert found["runs"] > checks, "other sizes come on top"


def test_benchmark(cli, path):
    result = cli(path, path.with_name("out.onnx"), "--benchmark", "--threads", "1")
    rows = table(result.out)
    dense, simplified, speedup = rows["time (ms, median)"]
    assert float(dense) > 0 and float(simplified) > 0 and speedup.endswith("x faster")
    for median, quartiles in zip((dense, simplified), rows["quartiles"][:2], strict=True):
        low, high = map(float, quartiles.split(".."))
        assert low <= float(median) <= high


def test_without_benchmark_no_times(cli, path):
    target = path.with_name("report.json")
    assert "time" not in cli(path, path.with_name("out.onnx"), "--json", target).out
    assert report(target)["benchmark"] is None and report(target)["speedup"] is None


@pytest.mark.parametrize("target", ["auto", "avx2", "avx512", "generic"])
def test_target(cli, model, path, target):
    out, where = path.with_name("out.onnx"), path.with_name("report.json")
    assert cli(path, out, "--target", target, "--json", where).code == 0
    found = report(where)["target"]
    assert found == target if target != "auto" else found in ("avx2", "avx512", "generic")
    assert_same_function(model, out, random_feeds(model))


def test_channel_multiple(cli, path):
    model = small_cnn(keep=7 / 16).model()
    onnx.save(model, path)
    out = path.with_name("out.onnx")
    for multiple, expected in (("1", (7, 10)), ("4", (8, 12))):
        assert cli(path, out, "--channel-multiple", multiple).code == 0
        found = onnx.load(out)
        sizes = [initializer(found, f"conv{k}.weight").shape[0] for k in (1, 2)]
        assert tuple(sizes) == expected
        assert_same_function(model, found, random_feeds(model))


def test_inspect_needs_no_output_and_writes_nothing(cli, path):
    before = files(path.parent)
    result = cli(path, "--inspect")
    assert (result.code, result.err) == (0, "")
    rows = table(result.out)
    # Inputs, outputs, dead, constant, removable.
    assert rows["conv1"] == ["Conv", "3", "16", "0", "8", "8"]
    assert rows["conv2"] == ["Conv", "16", "24", "0", "12", "12"]
    assert rows["gemm1"] == ["Gemm", "24", "5", "0", "0", "0"]
    assert f"{PRUNED} of {CHANNELS} output channels" in result.out
    assert cli(path, path.with_name("out.onnx"), "--inspect").code == 0
    assert files(path.parent) == before


def test_inspect_finds_dead_channels(cli, path):
    g = Graph()
    x = g.input("x", [1, 3, 8, 8])
    x = g.op("Relu", g.batchnorm(g.conv(x, g.normal(8, 3, 3, 3), g.normal(8)), 8))
    x = g.conv(x, pruned(g.normal(4, 8, 3, 3), [1, 2, 6, 7], axis=1), g.normal(4))
    g.output(x)
    onnx.save(g.model(), path)
    assert table(cli(path, "--inspect").out)["conv1"] == ["Conv", "3", "8", "4", "0", "4"]


def test_inspect_writes_json_only(cli, path):
    target = path.with_name("report.json")
    assert cli(path, "--inspect", "--json", target).code == 0
    assert sorted(files(path.parent)) == ["in.onnx", "report.json"]
    found = report(target)
    assert found["output"] is None
    cli(path, path.with_name("out.onnx"), "--json", target)
    assert found["layers"] == report(target)["layers"]


def test_inspect_when_the_model_does_not_run(cli, path):
    onnx.save(custom_operator(), path)
    result = cli(path, "--inspect")
    assert result.code == 0
    assert "Swoosh" in result.out
    assert "constants were not looked for" in " ".join(result.out.split())


@pytest.mark.parametrize("name", ["block[/conv]", "block[red]x", "Schicht-é", "卷积"])
def test_names_are_printed_literally(cli, model, path, name):
    model.graph.node[0].name = name
    onnx.save(model, path)
    result = cli(path, "--inspect")
    assert (result.code, result.err) == (0, "")
    assert name in result.out


@pytest.mark.parametrize("options", [[], ["--inspect"], ["--benchmark"], ["--verbose"]], ids=str)
def test_quiet(cli, path, options):
    result = cli(path, path.with_name("out.onnx"), "--quiet", *options)
    assert (result.code, result.out, result.err) == (0, "", "")
    assert path.with_name("out.onnx").exists() == (options != ["--inspect"])


def test_quiet_still_complains(cli, path):
    result = cli(path, path.with_name("out.onnx"), "--quiet", "--pin", "conv9")
    assert result.code == 2 and result.out == "" and "conv9" in result.err


def test_verbose_names_opaque_operators(cli, path):
    g = Graph()
    x = g.input("x", ["n", 3, 8, 8])
    x = g.conv(x, pruned(g.normal(8, 3, 3, 3), [0, 3]), g.normal(8))
    x = g.op("LRN", x, size=3, name="norm")
    g.output(g.conv(x, g.normal(4, 8, 1, 1), g.normal(4)))
    onnx.save(g.model(), path)
    out, target = path.with_name("out.onnx"), path.with_name("report.json")
    assert "left alone" not in cli(path, out).out
    result = cli(path, out, "--verbose", "--json", target)
    assert re.search(r"left alone: LRN 'norm': \w+", result.out)
    (found,) = report(target)["opaque"]
    assert (found["op"], found["name"]) == ("LRN", "norm") and found["reason"]


def test_save_external_data(cli, sample, sample_model, tmp_path):
    out, target = tmp_path / "out.onnx", tmp_path / "report.json"
    assert cli(sample, out, "--save-external-data", "--json", target).code == 0
    assert sorted(files(tmp_path)) == ["out.onnx", "out.onnx.data", "report.json"]
    skeleton = onnx.load(out, load_external_data=False)
    locations = {
        e.value for t in skeleton.graph.initializer for e in t.external_data if e.key == "location"
    }
    assert locations == {"out.onnx.data"}
    assert out.stat().st_size < 40_000
    sizes = [p.stat().st_size for p in (out, tmp_path / "out.onnx.data")]
    assert report(target)["after"]["bytes"] == sum(sizes)
    onnx.checker.check_model(str(out), full_check=True)
    assert_same_function(sample_model, onnx.load(out), random_feeds(sample_model))
    assert_same_function(sample_model, out, random_feeds(sample_model))


def test_external_data_in_and_out(cli, sample_model, tmp_path):
    path, plain = tmp_path / "net.onnx", tmp_path / "plain.onnx"
    original = onnx.ModelProto.FromString(sample_model.SerializeToString())
    onnx.save(sample_model, path, save_as_external_data=True, location="net.onnx.data")
    assert cli(path, plain).code == 0
    assert_same_function(original, plain, random_feeds(original))
    # The data file that is read is replaced by the one that is written.
    assert cli(path, path, "--save-external-data").code == 0
    assert sorted(files(tmp_path)) == ["net.onnx", "net.onnx.data", "plain.onnx"]
    assert_same_function(original, path, random_feeds(original))
    assert cli(path, path, "--save-external-data").code == 0
    assert_same_function(original, path, random_feeds(original))


def test_external_data_when_all_weights_are_small(cli, path):
    g = Graph()
    x = g.conv(g.input("x", [1, 3, 8, 8]), pruned(g.normal(4, 3, 1, 1), [0]), g.normal(4))
    g.output(g.conv(g.op("Relu", x), g.normal(2, 4, 1, 1)))
    onnx.save(g.model(), path)
    out = path.with_name("out.onnx")
    assert cli(path, out, "--save-external-data").code == 0
    assert_same_function(path, onnx.load(out), random_feeds(g.model()))


# Exit codes.


@pytest.mark.parametrize("options", [[], ["--quiet"], ["--benchmark"], ["--save-external-data"]])
@pytest.mark.parametrize("factor", [1.01, -1, math.nan, 1.0003])
def test_failed_verification_writes_nothing(cli, path, monkeypatch, options, factor):
    out, target = path.with_name("out.onnx"), path.with_name("report.json")
    out.write_bytes(b"sentinel")
    before = files(path.parent)
    corrupt(monkeypatch, factor)
    result = cli(path, out, "--json", target, *options)
    assert result.code == 1 and result.out == ""
    assert result.err.startswith("onnx-simplify: verification failed, nothing written: ")
    assert "scores" in result.err and result.err.count("\n") == 1
    assert files(path.parent) == before


def test_failed_verification_leaves_the_input(cli, path, monkeypatch):
    before = files(path.parent)
    corrupt(monkeypatch)
    assert cli(path, path).code == 1
    assert files(path.parent) == before


def test_a_result_that_does_not_run_fails_verification(cli, path, monkeypatch):
    original = schedule.rewrite

    def broken(plan):
        original(plan)
        gemm = next(n for n in plan.facts.model.graph.nodes if n.op == "Gemm")
        gemm.inputs[1].values = gemm.inputs[1].values[:, :-1]

    monkeypatch.setattr(schedule, "rewrite", broken)
    result = cli(path, path.with_name("out.onnx"))
    assert result.code == 1 and result.err.count("\n") == 1
    assert list(files(path.parent)) == ["in.onnx"]


def test_failed_verification_goes_unseen_without_it(cli, path, monkeypatch):
    out = path.with_name("out.onnx")
    corrupt(monkeypatch)
    assert cli(path, out, "--no-verify").code == 0 and out.exists()


@pytest.mark.parametrize("build", [custom_operator, impossible])
def test_an_original_that_does_not_run(cli, path, build):
    onnx.save(build(), path)
    out = path.with_name("out.onnx")
    out.write_bytes(b"sentinel")
    before = files(path.parent)
    result = cli(path, out)
    assert result.code == 3 and result.out == ""
    assert result.err.startswith("onnx-simplify: ") and result.err.count("\n") == 1
    assert "--no-verify" in result.err
    assert files(path.parent) == before
    result = cli(path, out, "--no-verify")
    assert (result.code, result.err) == (0, "")
    assert "constants were not looked for" in " ".join(result.out.split())
    assert "not verified" in result.out
    onnx.checker.check_model(onnx.load(out))


def test_inputs_that_cannot_be_made_up(cli, path):
    g = Graph()
    x = g.input("x", [1, 3, 8, 8])
    kind = onnx.TensorProto.FLOAT
    g.inputs.append(onnx.helper.make_tensor_sequence_value_info("others", kind, [1, 4, 8, 8]))
    x = g.op("Relu", g.conv(x, pruned(g.normal(8, 3, 1, 1), [0, 1, 2, 5]), g.normal(8)))
    x = g.conv(x, g.normal(4, 8, 1, 1), g.normal(4))
    g.output(g.op("Add", x, g.op("SequenceAt", "others", np.array(0))), shape=[1, 4, 8, 8])
    model = g.model()
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    out = path.with_name("out.onnx")
    result = cli(path, out)
    assert result.code == 3 and "others" in result.err and not out.exists()
    assert cli(path, out, "--no-verify").code == 0
    onnx.checker.check_model(onnx.load(out), full_check=True)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["{in}"],
        ["{in}", "{out}", "{out}"],
        ["{in}", "{out}", "--bogus"],
        ["{in}", "{out}", "--pin"],
        ["{in}", "{out}", "--skip", "everything"],
        ["{in}", "{out}", "--target", "z80"],
        ["{in}", "{out}", "--rtol", "0"],
        ["{in}", "{out}", "--rtol", "-1"],
        ["{in}", "{out}", "--rtol", "nan"],
        ["{in}", "{out}", "--rtol", "small"],
        ["{in}", "{out}", "--check", "0"],
        ["{in}", "{out}", "--check", "2.5"],
        ["{in}", "{out}", "--threads", "-1"],
        ["{in}", "{out}", "--channel-multiple", "0"],
        ["{in}", "{out}", "--quie"],
    ],
    ids=" ".join,
)
def test_bad_usage(cli, path, arguments):
    out = path.with_name("out.onnx")
    result = cli(*(a.replace("{in}", str(path)).replace("{out}", str(out)) for a in arguments))
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("onnx-simplify: error: ") and result.err.count("\n") == 1
    assert list(files(path.parent)) == ["in.onnx"]


def test_version(cli):
    result = cli("--version")
    assert (result.code, result.out) == (0, f"onnx-simplify {onnx_simplify.__version__}\n")


def test_help_explains_exit_codes_and_options(cli):
    result = cli("--help")
    assert result.code == 0 and "exit codes:" in result.out
    for option in (
        "--pin --skip --input-shape --input-data --no-verify --rtol --check --benchmark --tune "
        "--threads --threshold --auto-threshold --target --inspect --json --quiet --verbose "
        "--save-external-data --version"
    ).split():
        assert option in result.out


def test_interruption(cli, path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupt)
    result = cli(path, path.with_name("out.onnx"))
    assert result.code != 0 and result.err.count("\n") == 1
    assert list(files(path.parent)) == ["in.onnx"]


@pytest.mark.parametrize("error", [ValueError("two\nlines"), MemoryError(), AssertionError()])
def test_internal_errors_are_one_line(cli, path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(pipeline, "run", fail)
    result = cli(path, path.with_name("out.onnx"))
    assert result.code == 2 and result.err.count("\n") == 1
    assert result.err.startswith("onnx-simplify: ")
    assert list(files(path.parent)) == ["in.onnx"]


def test_no_warnings_about_special_values(cli, path, recwarn):
    model = small_cnn().model()
    rng = np.random.default_rng(0)
    for name, value in (
        ("conv1.weight", np.nan),
        ("conv2.weight", np.inf),
        ("conv1.bias", -np.inf),
        ("batchnormalization2.var", -1),
        ("gemm1.weight", np.nan),
    ):
        values = initializer(model, name).copy()
        values.reshape(-1)[rng.integers(values.size)] = value
        set_initializer(model, name, values)
    onnx.save(model, path)
    # All outputs are NaN, for all inputs: that proves nothing.
    result = cli(path, path.with_name("out.onnx"))
    assert result.code == 3 and "proves nothing" in result.err and result.err.count("\n") == 1
    result = cli(path, path.with_name("out.onnx"), "--no-verify")
    assert (result.code, result.err) == (0, "")
    assert [str(w.message) for w in recwarn] == []
    assert_same_function(model, path.with_name("out.onnx"), random_feeds(model))


# Real processes.


def test_module(sample, sample_model, tmp_path):
    out = tmp_path / "out.onnx"
    done = call(sample, out)
    assert (done.returncode, done.stderr) == (0, "")
    assert "verified on" in done.stdout
    assert_same_function(sample_model, out, random_feeds(sample_model))


def test_module_with_a_missing_file(tmp_path):
    done = call(tmp_path / "missing.onnx", tmp_path / "out.onnx")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("onnx-simplify: ") and done.stderr.count("\n") == 1


def test_reader_of_the_output_has_gone(path):
    """As in ``onnx-simplify IN OUT | head -1``; 1 would mean that nothing was written."""
    read, write = os.pipe()
    os.close(read)
    out = path.with_name("out.onnx")
    with os.fdopen(write, "w") as pipe:
        done = call(path, out, stdout=pipe)
    assert out.exists()
    assert done.returncode != 1
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_of_the_table_fails(path):
    out = path.with_name("out.onnx")
    with open("/dev/full", "w") as full:
        done = call(path, out, stdout=full)
    assert done.stderr.startswith("onnx-simplify: ") and done.stderr.count("\n") == 1
    assert out.exists() != ("nothing written" in done.stderr)
    assert os.strerror(errno.ENOSPC) in done.stderr


def test_terminal_without_unicode(path, model):
    model.graph.node[0].name = "Schicht-é"
    onnx.save(model, path)
    done = call(path, "--inspect", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "Schicht-" in done.stdout
