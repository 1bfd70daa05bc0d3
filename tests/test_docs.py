"""The documents tell the truth: options, names and outputs exist, and examples run."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import ModelProto

import onnx_simplify
from build import Graph, assert_same_function, pruned, random_feeds
from documents import DOCS, Block, blocks, execute, section
from onnx_simplify import operators
from onnx_simplify.cli import _parser
from onnx_simplify.operators import Operator, lookup
from onnx_simplify.options import PASSES
from onnx_simplify.planning.profiles import PROFILES
from onnx_simplify.report import Layer, Report
from onnx_simplify.runtime.verdict import Verification
from versions import needs_onnxruntime

COMMAND = "python -m onnx_simplify "


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: Path) -> Path:
    """The current folder, with the files that examples read."""
    shutil.copy(sample, tmp_path / "pruned.onnx")
    images = np.random.default_rng(0).standard_normal((2, 3, 96, 96)).astype(np.float32)
    np.savez(tmp_path / "images.npz", image=images)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The command line.


@dataclass(frozen=True)
class Row:
    """A row of the tables of options."""

    options: list[str]
    meaning: str
    default: str
    example: str


def rows() -> list[Row]:
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    found = []
    for line in text.splitlines():
        if line.startswith("| `-"):
            head, meaning, default, example = (cell.strip() for cell in line[1:-1].split("|"))
            names = re.findall(r"(?<!\S)`(-[\w-]+)", head)
            found.append(Row(names, meaning, default, example))
    return found


ACTIONS = {tuple(a.option_strings): a for a in _parser()._actions if a.option_strings}


@pytest.mark.parametrize("names", ACTIONS, ids=" ".join)
def test_every_option_is_documented(names):
    action = ACTIONS[names]
    row = next((r for r in rows() if r.options == list(names)), None)
    assert row is not None, (
        f"docs/command-line.md: add {', '.join(names)} to a table of options, "
        "with meaning, default and example"
    )
    assert row.meaning, f"docs/command-line.md: say what {names[0]} means"
    assert names[0] in row.example or names[-1] in row.example, (
        f"docs/command-line.md: the example of {names[0]} does not use it"
    )
    if action.default not in (None, True, False, [], argparse.SUPPRESS):
        assert row.default == f"`{action.default}`", (
            f"docs/command-line.md: the default of {names[0]} is {action.default}"
        )
    for choice in action.choices or ():
        assert f"`{choice}`" in row.meaning, (
            f"docs/command-line.md: {names[0]} also takes '{choice}'"
        )


def test_every_documented_option_exists():
    known = {name for names in ACTIONS for name in names}
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
        assert name in known, f"docs/command-line.md: there is no option {name}"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.options[-1])
def test_examples_of_options_run(row, folder, cli):
    arguments = shlex.split(row.example.strip("`"))
    result = cli("pruned.onnx", "small.onnx", *arguments)
    assert result.code == 0, f"docs/command-line.md: {row.example} fails: {result.err}"


@dataclass
class Command:
    """A command of a document: its arguments, its exit code, and the lines printed below it."""

    text: str
    code: int = 0
    output: list[str] | None = None


def commands(block: Block) -> list[Command]:
    """The commands of the tool in a block; ``$ echo $?`` asks for the code of the last one."""
    found: list[Command] = []
    lines = iter(block.text.splitlines())
    for line in lines:
        line = line.removeprefix("$ ")
        if line.startswith(COMMAND):
            found.append(Command(line.removeprefix(COMMAND)))
        elif line == "echo $?":
            found[-1].code = int(next(lines))
        elif block.language == "console" and found:
            found[-1].output = [*(found[-1].output or []), line]
    return found


SHELL = blocks("command-line.md", "console", "bash")


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"line {block.line}")
def test_commands_run(block, folder, cli):
    found = commands(block)
    assert found, f"{block}: no command begins with '{COMMAND}'"
    for command in found:
        result = cli(*shlex.split(command.text))
        assert result.code == command.code, f"{block}: '{command.text}' gives {result}"
        if command.output is not None:
            printed = (result.out + result.err).splitlines()
            assert shape(printed) == shape(command.output), (
                f"{block}: '{command.text}' prints something else now; put it there:\n"
                f"{result.out}{result.err}"
            )


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
@pytest.mark.parametrize(
    "line", [x for b in blocks("command-line.md", "sh") for x in b.text.splitlines()]
)
def test_pipelines_run(line, folder):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(DOCS.parent)}
    done = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (folder / "small.onnx").stat().st_size > 0


def shape(lines: list[str]) -> list[str]:
    """Lines without blank ones, alignment, and numbers that are not the same everywhere."""
    found = []
    for line in lines:
        line = re.sub(r"─+", "─", " ".join(line.split()))
        number = r"\d[\d.,]*" if "bytes" in line else r"\d+(\.\d+)?e[+-]\d+|\d+\.\d+"
        found.append(re.sub(number, "#", line))
    return [line for line in found if line]


def test_exit_codes_are_documented():
    text = section("command-line.md", "Exit codes")
    documented = {int(code) for code in re.findall(r"^\| (\d) \|", text, re.M)}
    errors = (getattr(onnx_simplify, name) for name in onnx_simplify.__all__)
    codes = {e.exit_code for e in errors if isinstance(e, type) and issubclass(e, Exception)}
    assert documented == {0, *codes}, "docs/command-line.md: the table of exit codes is wrong"


def test_recipes_in_python_run(folder, cli):
    """They read what a command of the recipe has written, or write what the next one reads."""
    (folder / "images.npz").unlink()
    for block in blocks("command-line.md", "console", "bash", "python"):
        if block.language == "python":
            execute([block])
        else:
            for command in commands(block):
                if "--json" in command.text or "--input-data" in command.text:
                    assert cli(*shlex.split(command.text)).code == 0


# The Python API.


def heading(name: str) -> str:
    return name.replace("_", r"\_") if name.startswith("__") else name


@pytest.mark.parametrize("name", onnx_simplify.__all__)
def test_every_name_is_documented(name):
    thing = getattr(onnx_simplify, name)
    if isinstance(thing, type) and issubclass(thing, Exception):
        row = f"| `{name}` | {thing.exit_code} |"
        assert row in section("api.md", "Errors"), f"docs/api.md, Errors: add the row {row}"
        return
    text = section("api.md", heading(name))
    assert text, f"docs/api.md: add a section '{heading(name)}'"
    if not inspect.isfunction(thing):
        return
    signature = inspect.signature(thing)
    plain = signature.replace(
        parameters=[p.replace(annotation=p.empty) for p in signature.parameters.values()],
        return_annotation=signature.empty,
    )
    written = re.search(r"```\n(.*?)```", text, re.S)
    assert written and words(written[1]) == words(f"{name}{plain}"), (
        f"docs/api.md, {name}: the signature is {name}{plain}"
    )
    told = text.replace(written[0], "") + section(
        "api.md", "Arguments that several functions share"
    )
    for argument in set(signature.parameters) - {"model"}:
        assert f"`{argument}`" in told, f"docs/api.md, {name}: say what `{argument}` means"


def words(text: str) -> list[str]:
    return re.findall(r"[\w.]+|\S", text)


def test_every_name_in_the_api_exists():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in re.findall(r"onnx_simplify\.([A-Za-z_]\w*)", text):
        assert name in onnx_simplify.__all__, f"docs/api.md: there is no onnx_simplify.{name}"


def test_attributes_are_documented():
    names = {f.name for f in fields(Report)} | {"channels_removed", "speedup"}
    assert cells("Report") == names, "docs/api.md: the table of Report's attributes"
    layer = {f.name for f in fields(Layer)} | {"removed"}
    assert layer <= set(re.findall(r"`(\w+)`", section("api.md", "Report")))
    names = {f.name for f in fields(Verification)}
    assert cells("verify") == names, "docs/api.md: the table of what verify returns"


def cells(title: str) -> set[str]:
    """Names in the first column of a section's table."""
    first = re.findall(r"^\| (`.*?) \|", section("api.md", title), re.M)
    return {name for cell in first for name in re.findall(r"`(\w+)`", cell)}


def test_names_to_choose_from_are_documented():
    text = section("api.md", "PASSES")
    assert re.findall(r"`(\w+)`", text.replace("`skip`", "")) == list(PASSES)
    text = section("api.md", "Arguments that several functions share")
    for name in PROFILES:
        assert f'`"{name}"`' in text, f"docs/api.md: `target` also takes '{name}'"


def test_examples_of_the_api_run(folder):
    found = [b for b in blocks("api.md", "python") if "torch" not in b.text]
    assert found
    names = execute(found)
    assert names["report"].verification.passed


# Adding an operator.


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(operators, "_REGISTRY", dict(operators._REGISTRY))
    yield


def reversed_sequences(lengths: bool) -> ModelProto:
    """Channels that are pruned, one of them to a map, before ``ReverseSequence``.

    Args:
        lengths: whether the lengths are an input, rather than an initializer.
    """
    g = Graph()
    x = g.input("x", [2, 3, 9])
    dead = [0, 2, 5]
    x = g.op("Relu", g.conv(x, pruned(g.normal(8, 3, 3), dead), np.abs(g.normal(8)), pads=[1, 1]))
    weight = g.normal(8, 8, 3)
    weight[1, [k for k in range(8) if k not in dead]] = 0
    y = g.conv(x, pruned(weight, [3, 4]), g.normal(8), pads=[1, 1])
    y = g.op("Transpose", y, perm=[2, 0, 1])
    count = g.input("lengths", [2], np.int64) if lengths else np.array([7, 4], np.int64)
    y = g.op("ReverseSequence", y, count, time_axis=0, batch_axis=1)
    y = g.op("Transpose", y, perm=[1, 2, 0])
    g.output(g.conv(y, g.normal(4, 8, 3), g.normal(4), pads=[1, 1], outputs=["y"]))
    return g.model()


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(False, id="fixed lengths"),
        pytest.param(
            True,
            id="computed lengths",
            marks=needs_onnxruntime("1.28", "a length of zero leaves memory unset"),
        ),
    ],
)
def test_example_of_an_operator(registry, lengths):
    model = reversed_sequences(lengths)
    _, report = onnx_simplify.simplify(model, channel_multiple=1)
    assert [n.op for n in report.opaque] == ["ReverseSequence"], "choose another example"
    assert report.layers[1].removed == 0
    execute(blocks("adding-an-operator.md", "python"))
    result, report = onnx_simplify.simplify(model, channel_multiple=1)
    assert not report.opaque
    assert report.layers[1].removed == (2 if lengths else 3)
    feeds = random_feeds(model)
    for feed in feeds if lengths else ():
        feed["lengths"] = np.array([5, 8])
    assert_same_function(model, result, feeds, rtol=1e-5)


def test_example_of_an_operator_refuses_what_it_cannot_do(registry):
    execute(blocks("adding-an-operator.md", "python"))
    g = Graph()
    x = g.input("x", [2, 3, 9])
    x = g.conv(x, pruned(g.normal(8, 3, 3), [1, 6]), g.normal(8), pads=[1, 1])
    x = g.op("Transpose", x, perm=[1, 0, 2])
    x = g.op("ReverseSequence", x, np.array([5, 8]), time_axis=0, batch_axis=1)
    g.output(g.op("Identity", x))
    result, report = onnx_simplify.simplify(g.model(), channel_multiple=1)
    assert [n.reason for n in report.opaque] == ["channels are reversed"]
    assert_same_function(g.model(), result, random_feeds(g.model()))


def two_products(first: np.ndarray, second: np.ndarray, **attributes: float) -> ModelProto:
    """Two layers of ``TransposeMatMul``, with a live bias in between."""
    g = Graph(domains={"com.microsoft": 1}, ir_version=9)
    own = {"domain": "com.microsoft", **attributes}
    y = g.op("TransposeMatMul", g.input("x", ["n", "length", 3]), first, **own)
    y = g.op("Relu", g.op("Add", y, g.normal(16)))
    g.output(g.op("TransposeMatMul", y, second, **own))
    return g.model()


@pytest.mark.parametrize("turned", [0, 1])
def test_example_of_an_operator_with_weights(registry, turned):
    random = np.random.default_rng(0)
    first = pruned(random.standard_normal((16, 3)).astype(np.float32), range(6))
    second = random.standard_normal((5, 16)).astype(np.float32)
    weights = (first, second) if turned else (first.T.copy(), second.T.copy())
    model = two_products(*weights, transB=turned, alpha=0.7)
    _, report = onnx_simplify.simplify(model, channel_multiple=1)
    assert [n.op for n in report.opaque].count("TransposeMatMul") == 2, "choose another example"
    code = blocks("adding-an-operator.md", "python")
    execute(code)
    result, report = onnx_simplify.simplify(model, channel_multiple=1)
    assert not report.opaque and [layer.removed for layer in report.layers] == [6, 0]
    assert_same_function(model, result, random_feeds(model))
    example = next(block.text for block in code if "class TransposeMatMul" in block.text)
    assert example.count("\n") < 40


def test_what_the_example_with_weights_leaves_alone(registry):
    execute(blocks("adding-an-operator.md", "python"))
    g = Graph(domains={"com.microsoft": 1}, ir_version=9)
    x = g.input("x", ["n", 3, 4])
    y = g.op("TransposeMatMul", x, g.normal(3, 5), transA=1, domain="com.microsoft")
    g.output(y, shape=["n", 4, 5])
    result, report = onnx_simplify.simplify(g.model())
    assert [n.reason for n in report.opaque] == ["not a product with a constant matrix behind"]
    assert_same_function(g.model(), result, random_feeds(g.model()))


def test_domains_are_apart(registry):
    execute(blocks("adding-an-operator.md", "python"))
    assert lookup(gs.Node("ReverseSequence")) is not Operator
    assert lookup(gs.Node("ReverseSequence", domain="ai.onnx")) is not Operator
    own = gs.Node("ReverseSequence", domain="com.microsoft")
    assert lookup(own) is Operator
    operators.register(lookup(gs.Node("ReverseSequence")), "ReverseSequence", domain=own.domain)
    assert isinstance(operators.bind(own), lookup(gs.Node("ReverseSequence")))


def test_the_example_is_forgotten():
    assert lookup(gs.Node("ReverseSequence")) is Operator, (
        "docs/adding-an-operator.md: choose an operator without rules as the example"
    )


def test_every_rule_is_documented():
    own = {"inputs", "outputs", "attrs"}
    rules = {name for name in vars(Operator) if not name.startswith("_")} - own
    text = section("adding-an-operator.md", "The rules")
    found = {}
    for name, arguments in re.findall(r"^\| `(\w+)(?:\((.*?)\))?` \|", text, re.M):
        found[name] = arguments
    assert set(found) == rules, "docs/adding-an-operator.md: the table of rules"
    for name, arguments in found.items():
        thing = getattr(Operator, name)
        if callable(thing):
            given = [p for p in inspect.signature(thing).parameters if p != "self"]
            assert arguments == ", ".join(given), f"docs/adding-an-operator.md: {name}"
