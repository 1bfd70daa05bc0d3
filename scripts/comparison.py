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
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import onnx_simplify  # noqa: E402
import publish  # noqa: E402
from torch_bridge import export  # noqa: E402

LIMIT = 1e-5
SIZE = 16
# Widths are multiples of the blocks in which onnxruntime stores channels: it pads nothing.
WIDTH = 16
# Irregular, but the same in both halves, so that grouped convolutions can lose them.
PRUNED = [0, 3, 4, 6, 8, 11, 12, 14]
DYNAMIC = {0: "batch", 2: "height", 3: "width"}
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

# ------------------------------------------------------------------------------------------------
# Networks


class Net(nn.Module):
    """Named layers and the function that connects them."""

    def __init__(self, connect: Callable[[Any, Tensor], Tensor], **layers: nn.Module):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.connect = connect

    def forward(self, x: Tensor) -> Tensor:
        return self.connect(self, x)


@dataclass(frozen=True)
class Network:
    """A network and what is pruned in it.

    Attributes:
        name: what it is about.
        build: makes the module.
        removable: how many output channels of convolutions and linear layers can go.
        roots: layers that are to lose `PRUNED`, one of each coupled group (for torch-pruning).
        masked: layers whose output channels `PRUNED` get weight zero.
        silent: whether the bias of these channels is zero as well, BatchNorm's included.
        unread: layers whose input channels `PRUNED` get weight zero.
    """

    name: str
    build: Callable[[], nn.Module]
    removable: int
    roots: tuple[str, ...]
    masked: tuple[str, ...] = ()
    silent: bool = False
    unread: tuple[str, ...] = ()

    @functools.cached_property
    def module(self) -> nn.Module:
        """The pruned module, with biases and statistics in which a mistake shows."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            module = self.build().eval()
            for layer in module.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    nn.init.uniform_(layer.weight, 0.5, 1.5)
                    nn.init.normal_(layer.running_mean, 0, 0.5)
                    nn.init.uniform_(layer.running_var, 0.5, 2)
                if getattr(layer, "bias", None) is not None:
                    nn.init.normal_(layer.bias, 0, 0.5)
            for name in self.masked:
                for layer in module.get_submodule(name).modules():
                    if self.silent or isinstance(layer, (nn.Conv2d, nn.Linear)):
                        _mask(layer, self.silent)
            for name in self.unread:
                weights(module, name).weight[:, PRUNED] = 0
        return module

    @functools.cache  # noqa: B019 (networks live as long as the script)
    def model(self, dynamic: bool = False) -> ModelProto:
        """The module as ONNX."""
        return to_onnx(self.module, dynamic)


def _mask(layer: nn.Module, bias: bool) -> None:
    for name, values in layer.named_parameters(recurse=False):
        if bias or name == "weight":
            values[PRUNED] = 0


def weights(module: nn.Module, name: str) -> nn.Module:
    """The convolution or linear layer of this name, or inside the block of this name."""
    layers = module.get_submodule(name).modules()
    return next(layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear)))


def to_onnx(module: nn.Module, dynamic: bool = False) -> ModelProto:
    """A module as ONNX, its BatchNorms as nodes."""
    return export(
        module,
        torch.zeros(1, 3, SIZE, SIZE),
        dynamic_shapes=DYNAMIC if dynamic else None,
        exporter="torchscript",
        fuse_batchnorm=False,
    )


def conv(inputs: int, kernel: int = 3, bias: bool = True, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(inputs, WIDTH, kernel, padding=kernel // 2, bias=bias, groups=groups)


def block(inputs: int, groups: int = 1) -> nn.Sequential:
    """A convolution and a BatchNorm."""
    return nn.Sequential(conv(inputs, bias=False, groups=groups), nn.BatchNorm2d(WIDTH))


def chain(
    layer: Callable[[int], nn.Module], activation: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    """Three layers in a row."""
    return lambda: nn.Sequential(
        layer(3), activation(), layer(WIDTH), activation(), conv(WIDTH, bias=False)
    )


def residual(net: Any, x: Tensor) -> Tensor:
    x = torch.relu(net.stem(x))
    return net.head(torch.relu(x + net.outer(torch.relu(net.inner(x)))))


def concat(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.cat([torch.relu(net.left(x)), torch.relu(net.right(x))], 1))


def flatten(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.flatten(functional.max_pool2d(torch.relu(net.stem(x)), 4), 1))


def sequence(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.relu(net.middle(torch.relu(net.stem(x)))))


def shuffle(net: Any, x: Tensor) -> Tensor:
    x = torch.relu(net.stem(x))
    batch, channels, height, width = x.size()
    x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
    return net.head(x.view(batch, channels, height, width))


def gate(net: Any, x: Tensor) -> Tensor:
    x = torch.relu(net.stem(x))
    squeezed = torch.relu(net.reduce(functional.adaptive_avg_pool2d(x, 1)))
    return net.head(x * torch.sigmoid(net.expand(squeezed)))


N = len(PRUNED)
# The layers of a chain that are pruned, and those that read them.
FRONT, BACK = ("0", "2"), ("2", "4")

ZERO = Network("no bias", chain(lambda i: conv(i, bias=False), nn.ReLU), 2 * N, FRONT, FRONT)
BATCHNORM = Network("BatchNorm", chain(block, nn.ReLU), 2 * N, FRONT, FRONT)
CONSTANT = (
    Network("bias", chain(conv, nn.ReLU), 2 * N, FRONT, FRONT),
    BATCHNORM,
    Network("sigmoid", chain(lambda i: conv(i, bias=False), nn.Sigmoid), 2 * N, FRONT, FRONT),
)
UNREAD = Network("never read", chain(block, nn.ReLU), 2 * N, FRONT, unread=BACK)
COUPLED = (
    Network(
        "residual",
        lambda: Net(
            residual, stem=block(3), inner=block(WIDTH), outer=block(WIDTH), head=conv(WIDTH)
        ),
        3 * N,
        ("stem", "inner"),
        ("stem", "inner", "outer"),
    ),
    Network(
        "concat",
        lambda: Net(concat, left=block(3), right=block(3), head=conv(2 * WIDTH)),
        2 * N,
        ("left", "right"),
        ("left", "right"),
    ),
    Network(
        "flatten",
        lambda: Net(flatten, stem=block(3), head=nn.Linear(WIDTH * (SIZE // 4) ** 2, WIDTH)),
        N,
        ("stem",),
        ("stem",),
    ),
    Network(
        "depthwise",
        lambda: Net(sequence, stem=block(3), middle=block(WIDTH, groups=WIDTH), head=conv(WIDTH)),
        2 * N,
        ("stem",),
        ("stem", "middle"),
    ),
    Network(
        "grouped",
        lambda: Net(sequence, stem=block(3), middle=block(WIDTH, groups=2), head=conv(WIDTH)),
        2 * N,
        ("stem", "middle"),
        ("stem", "middle"),
    ),
    Network(
        "shuffle",
        lambda: Net(shuffle, stem=block(3), head=conv(WIDTH)),
        N,
        ("stem",),
        ("stem",),
    ),
)
# A constant channel times a gate that varies is no constant: only a zero channel can go.
GATE = Network(
    "squeeze-and-excite",
    lambda: Net(
        gate, stem=block(3), reduce=conv(WIDTH, 1), expand=conv(WIDTH, 1), head=conv(WIDTH)
    ),
    2 * N,
    ("stem",),
    ("stem",),
    silent=True,
)
COUPLED_ZERO = (*(replace(n, name=f"{n.name}, zero", silent=True) for n in COUPLED), GATE)
COUPLED_CONSTANT = tuple(replace(n, name=f"{n.name}, constant") for n in COUPLED)
# The stream stays as wide as it is; only the layer that feeds it can compute less. torch-pruning is
# not asked to: its groups contain the living channels of the other branch.
ONE_BRANCH = tuple(
    replace(
        COUPLED[0],
        name=f"one branch, {kind}",
        removable=N,
        roots=(),
        masked=("outer",),
        silent=kind == "zero",
    )
    for kind in ("zero", "constant")
)
NETWORKS = (ZERO, *CONSTANT, UNREAD, *COUPLED_ZERO, *COUPLED_CONSTANT, *ONE_BRANCH)

# ------------------------------------------------------------------------------------------------
# Tools


class Refused(Exception):
    """A tool found by itself that its result is wrong."""


@dataclass(frozen=True)
class Result:
    """What a tool made.

    Attributes:
        channels: number of output channels of convolutions and linear layers.
        nodes: number of nodes.
        parameters: number of weights.
        dims: dimensions of inputs and outputs, None where they vary.
        run: from input arrays to output arrays.
        save: writes it to a path in the tool's format.
        model: the result, where it is ONNX.
    """

    channels: int
    nodes: int
    parameters: int
    dims: list[list[int | None]]
    run: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
    save: Callable[[Path], None]
    model: ModelProto | None = None


def onnx_result(model: ModelProto) -> Result:
    """The figures of an ONNX model."""
    nodes = [node for node in model.graph.node if node.op_type != "Constant"]
    stored = {i.name: list(i.dims) for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            value = onnx.helper.get_node_attr_value(node, node.attribute[0].name)
            stored[node.output[0]] = list(getattr(value, "dims", np.shape(value)))
    # Weights may also be computed from others.
    shapes = stored | {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in onnx.shape_inference.infer_shapes(model).graph.value_info
        if v.name not in stored
    }
    return Result(
        channels=sum(_outputs(node, shapes) for node in nodes),
        nodes=len(nodes),
        parameters=sum(int(np.prod(shape)) for shape in stored.values()),
        dims=[
            [d.dim_value if d.HasField("dim_value") else None for d in v.type.tensor_type.shape.dim]
            for v in (*model.graph.input, *model.graph.output)
        ],
        run=runner(model),
        save=lambda path: onnx.save(model, path),
        model=model,
    )


def _outputs(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int:
    """Output channels of a node with weights; onnxruntime's fused variants have the same layout."""
    kind = node.op_type.removeprefix("Fused")
    if kind not in ("Conv", "Gemm", "MatMul"):
        return 0
    shape = shapes[node.input[1]]
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return shape[0] if kind == "Conv" or transposed else shape[-1]


def runner(model: ModelProto) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """Runs a model in onnxruntime as it is, without further optimisation."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [i.name for i in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


class Tool:
    """A tool that turns an ONNX model into another.

    Attributes:
        name: its column.
        package: its distribution.
        checked: the option that makes it compare its result with the original, if there is one.
    """

    name: str
    package: str
    checked: dict[str, Any] = {}

    def convert(self, model: ModelProto, **options: Any) -> ModelProto:
        """Run the tool; it may modify its argument."""
        raise NotImplementedError

    def network(self, network: Network, dynamic: bool = False) -> Result:
        """What it makes of a network."""
        return self.file(network.model(dynamic))

    def file(self, model: ModelProto) -> Result:
        """What it makes of an ONNX model."""
        return onnx_result(self.convert(copy.deepcopy(model)))

    def module(self, network: Network) -> nn.Module | None:
        """What it makes of a network, as a module to train; None if it makes no modules."""
        return None

    def choose(self, network: Network) -> Result:
        """What it makes of a network that nobody pruned."""
        return self.network(network)


class OnnxSimplify(Tool):
    """Asked for the fewest channels: by default it keeps some where that makes a model faster."""

    name = "onnx-simplify"
    package = "onnx-simplify"

    def convert(self, model: ModelProto, **options: Any) -> ModelProto:
        options.setdefault("channel_multiple", 1)
        try:
            return onnx_simplify.simplify(model, **options)[0]
        except onnx_simplify.VerificationError as error:
            raise Refused(str(error)) from error


class OnnxSim(Tool):
    name = "onnxsim"
    package = "onnxsim"
    checked = {"check_n": 1}

    def convert(self, model: ModelProto, **options: Any) -> ModelProto:
        import onnxsim

        result, good = onnxsim.simplify(model, **options)
        if not good:
            raise Refused("it returned check = False")
        return result


class OnnxSlim(Tool):
    name = "onnxslim"
    package = "onnxslim"
    checked = {"model_check": True}

    def convert(self, model: ModelProto, **options: Any) -> ModelProto:
        import onnxslim

        result = onnxslim.slim(model, **options)
        if result is None:
            raise Refused("it returned nothing")
        return result


class OnnxRuntime(Tool):
    """Its graph optimisations, all of them, written to a file."""

    name = "onnxruntime"
    package = "onnxruntime"

    def convert(self, model: ModelProto, **options: Any) -> ModelProto:
        with tempfile.TemporaryDirectory() as folder:
            settings = onnxruntime.SessionOptions()
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
            settings.optimized_model_filepath = str(Path(folder, "model.onnx"))
            settings.log_severity_level = 4
            onnxruntime.InferenceSession(model.SerializeToString(), settings)
            return onnx.load(settings.optimized_model_filepath)


class OpenVino(Tool):
    """OpenVINO's pruning transformation, after the common ones that fold BatchNorm."""

    name = "OpenVINO"
    package = "openvino"

    def file(self, model: ModelProto) -> Result:
        import openvino
        from openvino import _offline_transformations as transformations

        core = openvino.Core()
        changed = core.read_model(model.SerializeToString(), b"")
        transformations.apply_moc_transformations(changed, cf=True)
        transformations.apply_pruning_transformation(changed)
        # On some processors it would compute in bfloat16.
        compiled = core.compile_model(changed, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        nodes = [
            op
            for op in changed.get_ordered_ops()
            if op.get_type_name() not in ("Constant", "Parameter", "Result")
        ]
        ports = (*changed.inputs, *changed.outputs)
        return Result(
            channels=sum(map(self._outputs, nodes)),
            nodes=len(nodes),
            parameters=sum(
                int(np.prod(op.get_output_shape(0)))
                for op in changed.get_ordered_ops()
                if op.get_type_name() == "Constant"
            ),
            dims=[
                [None if d.is_dynamic else d.get_length() for d in port.partial_shape]
                for port in ports
            ],
            run=lambda arrays: list(compiled(list(arrays)).values()),
            save=lambda path: openvino.save_model(changed, path),
        )

    def _outputs(self, node: Any) -> int:
        if node.get_type_name() not in ("Convolution", "GroupConvolution", "MatMul"):
            return 0
        shape = list(node.input(1).get_shape())
        if node.get_type_name() == "MatMul":
            return shape[-2] if node.get_attributes()["transpose_b"] else shape[-1]
        # [groups, outputs per group, ...] or [outputs, ...]
        return shape[0] * shape[1] if node.get_type_name() == "GroupConvolution" else shape[0]


class TorchTool(Tool):
    """A tool that turns a PyTorch module into another, which is exported then."""

    def shrink(self, module: nn.Module, roots: Sequence[str]) -> nn.Module:
        """Run the tool on a module that may be modified, see `Network.roots`."""
        raise NotImplementedError

    def module(self, network: Network) -> nn.Module:
        return self.shrink(copy.deepcopy(network.module), network.roots)

    def network(self, network: Network, dynamic: bool = False) -> Result:
        return onnx_result(to_onnx(self.module(network), dynamic))

    def file(self, model: ModelProto) -> Result:
        return onnx_result(to_onnx(self.shrink(model, ())))


class TorchPruning(TorchTool):
    """Told which channels to remove; it finds everything coupled to them."""

    name = "torch-pruning"
    package = "torch-pruning"

    def shrink(self, module: nn.Module, roots: Sequence[str]) -> nn.Module:
        import torch_pruning

        example = torch.zeros(1, 3, SIZE, SIZE)
        graph = torch_pruning.DependencyGraph().build_dependency(module, example)
        for name in roots:
            layer = weights(module, name)
            function = graph.get_pruner_of_module(layer).prune_out_channels
            group = graph.get_pruning_group(layer, function, PRUNED)
            if graph.check_pruning_group(group):
                group.prune()
        return module

    def choose(self, network: Network) -> Result:
        import torch_pruning

        module = copy.deepcopy(network.module)
        torch_pruning.pruner.MagnitudePruner(
            module,
            torch.zeros(1, 3, SIZE, SIZE),
            importance=torch_pruning.importance.MagnitudeImportance(),
            pruning_ratio=0.5,
            ignored_layers=[list(module.modules())[-1]],
        ).step()
        return onnx_result(to_onnx(module))


class TorchSimplify(TorchTool):
    name = "torch-simplify"
    package = "torch-simplify"

    def shrink(self, module: nn.Module, roots: Sequence[str]) -> nn.Module:
        import simplify

        return simplify.simplify(module, torch.zeros(1, 3, SIZE, SIZE))


TOOLS = (
    OnnxSimplify(),
    OnnxSim(),
    OnnxSlim(),
    OnnxRuntime(),
    OpenVino(),
    TorchPruning(),
    TorchSimplify(),
)

# ------------------------------------------------------------------------------------------------
# Measurements


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
