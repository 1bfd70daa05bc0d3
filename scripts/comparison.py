"""Measure what onnx-simplify does with pruned channels beside the tools one would pick otherwise.

    python scripts/comparison.py [--write]

Prints a Markdown table and, below it, the reasons behind its cells. Every cell comes from running
the tool with its default options (ours with ``channel_multiple=1``) on small seeded networks that
lost half of their channels, and comparing the result with the original in onnxruntime. Tools that
are not installed are left out.
``--write`` puts the table into README.md and the cells, with the versions, into
docs/comparison.json.

Needs the ``bench`` extra; openvino and torch-simplify are on PyPI under these names.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compared_networks import (  # noqa: E402
    BATCHNORM,
    CONSTANT,
    COUPLED_CONSTANT,
    COUPLED_ZERO,
    NETWORKS,
    ONE_BRANCH,
    SIZE,
    UNREAD,
    WIDTH,
    ZERO,
    Network,
)
from compared_tools import (  # noqa: E402
    TOOLS,
    OnnxSimplify,
    Refused,
    Result,
    Tool,
    onnx_result,
    runner,
)

import publish  # noqa: E402

LIMIT = 1e-5
SIZES = ((1, SIZE, SIZE), (2, 24, 20), (3, 9, 31))
SAMPLE = publish.ROOT / "scripts" / "sample" / "pruned_residual_cnn.onnx"

# What an exporter or a converter leaves behind: shapes computed at run time, two transpositions
# that cancel, a repeated subexpression, operators that do nothing, constants computed from others.
CLUTTER = """
<ir_version: 8, opset_import: ["" : 17]>
clutter (float[1, 3, 16, 16] x) => (float[1, 16] y)
<int64[1] minus = {-1}, int64 zero = {0}, float half = {0.5}>
{
    there = Transpose <perm = [0, 2, 3, 1]> (x)
    back = Transpose <perm = [0, 3, 1, 2]> (there)
    one = Relu (back)
    same = Relu (back)
    sum = Add (one, same)
    copied = Identity (sum)
    kept = Dropout (copied)
    shape = Shape (kept)
    size = Gather (shape, zero)
    axes = Constant <value_ints = [0]> ()
    batch = Unsqueeze (size, axes)
    target = Concat <axis = 0> (batch, minus)
    flat = Reshape (kept, target)
    quarter = Mul (half, half)
    scale = Sqrt (quarter)
    scaled = Mul (weight, scale)
    product = MatMul (flat, scaled)
    y = Add (product, bias)
}
"""


@dataclass(frozen=True)
class Verdict:
    """What a tool did to one network.

    Attributes:
        network: its name.
        removable: channels that can go.
        removed: channels that are gone.
        error: worst error relative to the largest output; None when there is no result.
        failure: why there is none.
    """

    network: str
    removable: int
    removed: int = 0
    error: float | None = None
    failure: str = ""

    @property
    def exact(self) -> bool:
        """Whether there is a result and it computes the same."""
        return self.error is not None and self.error <= LIMIT

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.network}: fails: {self.failure}"
        wrong = "" if self.exact else f", output off by {self.error:.2g}"
        return f"{self.network}: {self.removed} of {self.removable} channels removed{wrong}"


@dataclass(frozen=True)
class Cell:
    """A cell of the table, the measurements behind it and remarks on what is missing."""

    text: str
    measured: Any = None
    remarks: tuple[str, ...] = ()


NOT_APPLICABLE = "—"


def images(*sizes: tuple[int, int, int]) -> list[list[np.ndarray]]:
    """Inputs of these batch sizes, heights and widths; by default three of the usual size."""
    random = np.random.default_rng(0)
    return [
        [random.standard_normal((batch, 3, height, width)).astype(np.float32)]
        for batch, height, width in sizes or [(1, SIZE, SIZE)] * 3
    ]


def worst_error(original: ModelProto, result: Result, feeds: list[list[np.ndarray]]) -> float:
    """The largest difference of outputs, relative to the output's largest magnitude."""
    run = runner(original)
    worst = 0.0
    for arrays in feeds:
        for expected, actual in zip(run(arrays), result.run(arrays), strict=True):
            if expected.shape != actual.shape or not np.isfinite(actual).all():
                return float("inf")
            worst = max(worst, float(np.abs(expected - actual).max() / np.abs(expected).max()))
    return worst


@functools.cache
def judge(tool: Tool, network: Network, dynamic: bool = False) -> Verdict:
    """Run a tool on a network, or on a network whose batch, height and width are free."""
    verdict = Verdict(network.name, network.removable)
    model = network.model(dynamic)
    original = onnx_result(model)
    try:
        with quiet():
            result = tool.network(network, dynamic)
            worst = worst_error(model, result, images(*SIZES) if dynamic else images())
    except Exception as error:  # whatever a tool fails with is a result
        return replace(verdict, failure=reason(error))
    if _varying(result) != _varying(original):
        return replace(verdict, failure=f"dimensions are {result.dims}")
    return replace(verdict, removed=original.channels - result.channels, error=worst)


def _varying(result: Result) -> list[list[bool]]:
    return [[size is None for size in dims] for dims in result.dims]


def reason(error: Exception) -> str:
    """An exception in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    # An ExportError says on its second line what went wrong in the model.
    cause = next((line for line in lines if line.startswith("Reason: ")), *lines[:1] or [""])
    return f"{type(error).__name__}: {cause.removeprefix('Reason: ')}"[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep tools from printing."""
    logging.disable()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            with contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
    finally:
        logging.disable(logging.NOTSET)


def removal(tool: Tool, networks: Sequence[Network], dynamic: bool = False) -> Cell:
    """How many channels go without changing what the networks compute."""
    verdicts = [judge(tool, network, dynamic) for network in networks]
    removed = sum(v.removed for v in verdicts if v.exact)
    removable = sum(v.removable for v in verdicts)
    text = f"{removed} of {removable}"
    if removed == removable:
        text = f"**{text}**"
    for word, bad in (
        ("wrong", [v for v in verdicts if v.error is not None and not v.exact]),
        ("fails", [v for v in verdicts if v.error is None]),
    ):
        if bad:
            text += f", {word} on {len(bad)} of {len(verdicts)}" if verdicts[1:] else f", {word}"
    remarks = [str(v) for v in verdicts if not v.exact or 0 < v.removed < v.removable]
    if removed and removed < removable:
        remarks += [str(v) for v in verdicts if v.exact and not v.removed]
    return Cell(text, [asdict(v) for v in verdicts], tuple(remarks))


def correctness(tool: Tool) -> Cell:
    """On how many networks the result computes the same."""
    verdicts = [judge(tool, network) for network in NETWORKS]
    exact = sum(v.exact for v in verdicts)
    worst = max(v.error for v in verdicts if v.error is not None)
    text = f"{exact} of {len(verdicts)}"
    return Cell(
        f"**{text}**" if exact == len(verdicts) else f"{text}, off by {worst:.1g}",
        {"exact": exact, "networks": len(verdicts), "worst": worst},
        tuple(str(v) for v in verdicts if not v.exact),
    )


def doubt(tool: Tool) -> Cell:
    """Whether it notices when original and result do not compute the same.

    onnxruntime is made to give other outputs at every run. A tool that compares both models cannot
    find them equal.
    """
    if type(tool).convert is Tool.convert:
        wrong = [v for v in (judge(tool, n) for n in NETWORKS) if v.error and not v.exact]
        if not wrong:
            return Cell(NOT_APPLICABLE, None, ("it runs nothing in onnxruntime",))
        return Cell("no", str(wrong[0]), (f"gave a wrong result without a word ({wrong[0]})",))
    refused = _refusal(tool, {})
    if refused:
        return Cell("**yes**", refused)
    if tool.checked and (refused := _refusal(tool, tool.checked)):
        option = ", ".join(f"{k}={v}" for k, v in tool.checked.items())
        return Cell("on request", refused, (f"with {option}: {refused}",))
    return Cell("no")


def _refusal(tool: Tool, options: dict[str, Any]) -> str:
    run = onnxruntime.InferenceSession.run
    calls = 0

    def unreliable(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        values = run(self, *args, **kwargs)
        return [value + calls if value.dtype.kind == "f" else value for value in values]

    onnxruntime.InferenceSession.run = unreliable
    try:
        with quiet():
            tool.convert(copy.deepcopy(BATCHNORM.model()), **options)
    except Refused as error:
        return str(error).splitlines()[0]
    finally:
        onnxruntime.InferenceSession.run = run
    return ""


def any_file(tool: Tool) -> Cell:
    """Whether it takes an ONNX file, and writes one."""
    model = onnx.load(SAMPLE)
    original = onnx_result(model)
    try:
        with quiet():
            result = tool.file(model)
    except Exception as error:
        return Cell("no", None, (reason(error),))
    shape = [size or 1 for size in original.dims[0]]
    feeds = [[np.random.default_rng(0).standard_normal(shape).astype(np.float32)]]
    worst = worst_error(model, result, feeds)
    share = result.parameters / original.parameters
    measured = {"parameters": share, "error": worst}
    if worst > LIMIT:
        return Cell(f"wrong ({worst:.2g})", measured)
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            result.save(Path(folder, "model.onnx"))
            onnx.load(Path(folder, "model.onnx"))
    except Exception as error:
        return Cell("reads only", measured, (f"writes no ONNX: {reason(error)}",))
    assert result.model is not None
    own = {node.domain for node in result.model.graph.node} - {"", "ai.onnx"}
    if own:
        return Cell("own operators", measured, (f"uses operators of {', '.join(sorted(own))}",))
    return Cell("**yes**", measured)


def dynamic(tool: Tool) -> Cell:
    """Whether batch, height and width stay free and every size gives the right result.

    The channels of the first network are zero, those of the second are constants.
    """
    networks = (ZERO, BATCHNORM)
    found = removal(tool, networks, dynamic=True)
    works = all(judge(tool, network, dynamic=True).error is not None for network in networks)
    return replace(found, text=f"{'stay' if works else 'partly'}; {found.text}")


def properties(tool: Tool) -> Cell:
    """Whether metadata_props survive."""
    model = copy.deepcopy(BATCHNORM.model())
    model.metadata_props.add(key="labels", value="cat,dog")
    try:
        with quiet():
            result = tool.file(model)
    except Exception:
        return Cell(NOT_APPLICABLE, None, ("takes no ONNX",))
    if result.model is None:
        return Cell(NOT_APPLICABLE, None, ("writes no ONNX",))
    found = {p.key: p.value for p in result.model.metadata_props}
    return Cell("**yes**" if found.get("labels") == "cat,dog" else "no", found)


def cleaning(tool: Tool) -> Cell:
    """How many nodes are left of a graph full of clutter."""
    model = onnx.parser.parse_model(CLUTTER)
    random = np.random.default_rng(0)
    for name, shape in {"weight": (3 * SIZE**2, WIDTH), "bias": (WIDTH,)}.items():
        array = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(model, full_check=True)
    before = onnx_result(model).nodes
    try:
        with quiet():
            result = tool.file(model)
    except Exception:
        return Cell(NOT_APPLICABLE, None, ("takes no ONNX",))
    error = worst_error(model, result, images())
    text = f"{before} to {result.nodes}"
    kinds = [n.op_type for n in result.model.graph.node] if result.model else None
    measured = {"nodes": result.nodes, "kinds": kinds, "error": error}
    return Cell(text if error <= LIMIT else f"{text}, wrong ({error:.2g})", measured)


def training(tool: Tool) -> Cell:
    """Whether it chooses channels of a dense network, and whether its result can be trained."""
    dense = Network("dense", BATCHNORM.build, 0, ())
    with quiet():
        chosen = onnx_result(dense.model()).channels - tool.choose(dense).channels
        module = tool.module(BATCHNORM)
    trains = module is not None and _trains(module)
    measured = {"chosen": chosen, "trains": trains}
    match chosen > 0, trains:
        case True, True:
            return Cell("**yes**", measured, (f"chose {chosen} channels by magnitude",))
        case False, True:
            return Cell("trains only", measured)
        case True, False:
            return Cell("prunes only", measured)
    return Cell("no", measured)


def _trains(module: nn.Module) -> bool:
    """Whether a few steps of gradient descent lower a loss."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, SIZE, SIZE)
    target = torch.randn(4, WIDTH, SIZE, SIZE)
    module.eval()
    optimiser = torch.optim.SGD(module.parameters(), 1e-4)
    losses = []
    for _ in range(5):
        loss = functional.mse_loss(module(x), target)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return losses[-1] < losses[0]


ROWS: dict[str, Callable[[Tool], Cell]] = {
    "zero channels removed": lambda tool: removal(tool, [ZERO]),
    "constant channels (bias, BatchNorm, sigmoid) removed": lambda tool: removal(tool, CONSTANT),
    "channels that nothing reads removed": lambda tool: removal(tool, [UNREAD]),
    "zero channels in coupled layers removed": lambda tool: removal(tool, COUPLED_ZERO),
    "constant channels in coupled layers removed": lambda tool: removal(tool, COUPLED_CONSTANT),
    "channels of one residual branch alone removed": lambda tool: removal(tool, ONE_BRANCH),
    "dynamic batch, height, width; channels removed": dynamic,
    "networks that compute the same afterwards": correctness,
    "runs both models to compare them, by default": doubt,
    "takes an ONNX file and writes one": any_file,
    "`metadata_props` survive": properties,
    "general clean-up, number of nodes": cleaning,
    "prunes a dense network; result can be trained": training,
}

NOTES = """
Counted are channels removed without changing what the network computes: relative error up to 1e-5
in onnxruntime. Coupled layers: residual, concatenation, flattening, depthwise and grouped
convolution, channel shuffle and, for zero channels, squeeze-and-excite. torch-pruning is told which
channels to remove, the others find them; it is made for training afterwards and promises no equal
function. The reasons are in `docs/comparison.json`.
"""


def installed() -> list[Tool]:
    """The tools that there are; says which are not."""
    found: list[Tool] = []
    for tool in TOOLS:
        try:
            if not isinstance(tool, OnnxSimplify):
                metadata.version(tool.package)
            found.append(tool)
        except metadata.PackageNotFoundError:
            print(f"{tool.name} is left out: {tool.package} is not installed", file=sys.stderr)
    return found


def main() -> int:
    """Measure all cells, print and perhaps write them."""
    parser = argparse.ArgumentParser(description="Compare tools on pruned networks.")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    tools = installed()
    cells = {row: {tool.name: measure(tool) for tool in tools} for row, measure in ROWS.items()}
    header = ["", *(tool.name for tool in tools)]
    rows = [[row, *(cell.text for cell in line.values())] for row, line in cells.items()]
    env = publish.environment("torch", "onnx", *(tool.package for tool in tools))
    parts = (publish.markdown(header, rows), NOTES.strip(), publish.describe(env))
    table = "\n\n".join(parts)
    print(table, end="\n\n")
    for row, line in cells.items():
        for name, cell in line.items():
            if cell.remarks:
                print(f"{row} / {name}: {'; '.join(cell.remarks)}")
    if options.write:
        found = {row: {k: asdict(cell) for k, cell in line.items()} for row, line in cells.items()}
        text = json.dumps({"environment": env, "rows": found}, indent=1, ensure_ascii=False)
        publish.write(publish.ROOT / "docs" / "comparison.json", text + "\n")
        publish.replace_section(publish.ROOT / "README.md", "comparison", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
