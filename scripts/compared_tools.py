"""The tools that are compared, each called as its documentation says, and what they make."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compared_networks import PRUNED, SIZE, Network, to_onnx, weights  # noqa: E402

import onnx_simplify  # noqa: E402


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
