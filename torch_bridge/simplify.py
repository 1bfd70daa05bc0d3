"""Simplify a PyTorch module: export it, remove what its pruning left behind, and check the result.

`simplify` does everything. The steps of the *Simplify* library (Bragagnolo and Barbano, "Simplify:
A Python library for optimizing pruned neural networks", SoftwareX 2022) have their counterparts:
`fuse`, `propagate_bias` and `remove_zeroed`, each taking a module or the result of another step,
and `get_bn_folding` and `get_pinned`. Layers go by their names in ``model.named_modules()``.

    import torch, torch_bridge

    small = torch_bridge.simplify(model, torch.zeros(1, 3, 224, 224))
    small.save("small.onnx")
    outputs = small(images)
"""

from __future__ import annotations

import copy
import difflib
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

import onnx_simplify
from onnx_simplify import PASSES, CannotVerifyError, ModelError, Report, VerificationError
from onnx_simplify.errors import RunError
from onnx_simplify.graph.load import load
from onnx_simplify.pipeline import is_half
from onnx_simplify.runtime.benchmark import Timing, time_calls
from onnx_simplify.runtime.difference import difference
from onnx_simplify.runtime.session import Session
from onnx_simplify.runtime.verify import Verification
from torch_bridge.calls import Call, constants_of, leaves, tensors_of
from torch_bridge.export import Exported, Exporter, ExportError, export_traced, inference, save

# Layers that can be named in any step, not only in the first.
_LAYERS = (_ConvNd, nn.Linear, _BatchNorm)
# Sizes of images to try where no example is given.
_GUESSES = (224, 299, 64, 32, 512)


class CallError(RunError, ValueError):
    """A call with sizes or types that the ONNX model does not take."""


@dataclass(frozen=True)
class _Signature:
    """How a call of the module becomes inputs of the graph, and outputs a return value.

    Attributes:
        model: the module, for its signature.
        names: the graph's inputs, each with the position of its tensor among the call's.
        example: the call that was exported.
        outputs: what the module returned for it; its tensors are placeholders without data.
    """

    model: nn.Module
    names: dict[str, int]
    example: Call
    outputs: Any

    @classmethod
    def of(cls, model: nn.Module, exported: Exported) -> _Signature:
        """The signature of an exported module.

        Raises:
            ExportError: the graph's inputs and outputs are not those of the module.
        """
        graph, names = exported.proto.graph, exported.inputs
        present = [value.name for value in graph.input]
        count = len(tensors_of(exported.outputs))
        if not set(present) <= set(names) or len(graph.output) != count:
            raise ExportError(
                f"the exported model takes {', '.join(present)} and returns {len(graph.output)} "
                f"tensors, the module takes {', '.join(names)} and returns {count}.\n"
                "Try next: the other exporter."
            )
        outputs = pytree.tree_map(_placeholder, exported.outputs)
        return cls(model, {n: names.index(n) for n in present}, exported.call, outputs)

    def feeds(self, call: Call) -> dict[str, np.ndarray]:
        """The graph's inputs for a call.

        Raises:
            ValueError: an argument that is no tensor differs from the exported one: it is part of
                the graph.
        """
        given, known = _leaves(call), _leaves(self.example)
        if [name for name, _ in given] != [name for name, _ in known]:
            raise ValueError(
                "call the model with the arguments that it was exported with: "
                + ", ".join(name for name, _ in known)
            )
        for (name, value), (_, exported) in zip(given, known, strict=True):
            tensor = isinstance(exported, torch.Tensor)
            same = tensor or constants_of(value) == constants_of(exported)
            if tensor != isinstance(value, torch.Tensor) or not same:
                raise ValueError(
                    f"argument '{name}' is fixed in the exported model"
                    if not tensor
                    else f"argument '{name}' must be a tensor"
                )
        tensors = call.tensors()
        return {name: tensors[k].detach().cpu().numpy() for name, k in self.names.items()}

    def outputs_of(self, arrays: Sequence[np.ndarray], device: torch.device) -> Any:
        """The module's return value, out of the graph's outputs."""
        remaining = iter(arrays)

        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return torch.from_numpy(np.asarray(next(remaining))).to(device)

        return pytree.tree_map(fill, self.outputs)


@dataclass(frozen=True)
class _Stage:
    """A module on its way: as exported, or as a step left it.

    Attributes:
        proto: the model.
        dense: the model as exported.
        signature: how it is called.
        tensors: the tensors that modules return, by the module's name.
    """

    proto: onnx.ModelProto
    dense: onnx.ModelProto
    signature: _Signature
    tensors: dict[str, list[str]]


class SimplifiedModel:
    """A simplified module: an ONNX model that is called like the module.

    Calling it runs the model in onnxruntime on the CPU. It takes what the module takes and returns
    what the module returns, without gradients. Sizes are those of the example inputs, except for
    dimensions exported as dynamic; arguments that are not tensors must be those of the example.

    Attributes:
        onnx_model: the model.
        report: what was done, see `onnx_simplify.Report`.
        verification: the comparison with the module itself; None if it was not made.
    """

    def __init__(self, stage: _Stage, report: Report):
        """Made by `simplify` and the steps, not by their users."""
        self.onnx_model = stage.proto
        self.report = report
        self.verification: Verification | None = None
        self._stage = stage
        self._opened: Session | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            TypeError: the arguments do not fit the module's signature.
            ValueError: they are not those that were exported.
            CallError: they are of other sizes or types.
            RunError: onnxruntime cannot load the model.
        """
        call = Call.of(self._stage.signature.model, (args, kwargs))
        feeds = self._stage.signature.feeds(call)
        device = next((t.device for t in call.tensors()), torch.device("cpu"))
        try:
            arrays = _run(self._session, feeds)
        except CallError as error:
            raise CallError(
                f"{error} (dimensions that vary must be exported with dynamic_shapes)"
            ) from error
        return self._stage.signature.outputs_of(arrays, device)

    def __getstate__(self) -> dict[str, Any]:
        """All but the session, which is opened again where it is needed."""
        return {**self.__dict__, "_opened": None}

    @property
    def session(self) -> ort.InferenceSession:
        """An onnxruntime session of the model, on the CPU with default options.

        Raises:
            RunError: onnxruntime cannot load the model.
        """
        return self._session.raw

    @property
    def _session(self) -> Session:
        if self._opened is None:
            self._opened = _open(self.onnx_model)
        return self._opened

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ONNX model; a file of that name is replaced by the complete new one.

        Weights go into the same file, or beside it in ``<name>.data`` above 2 GiB.
        """
        save(self.onnx_model, Path(path))

    def benchmark(
        self, *, threads: int = 1, rounds: int = 15, eager: bool = True
    ) -> dict[str, Timing]:
        """Time it on the example inputs, interleaved with the model as exported.

        Args:
            threads: threads within an operator, of onnxruntime and of torch.
            rounds: counted rounds, after two that are not.
            eager: time the PyTorch module as well.

        Returns:
            Median and quartiles in milliseconds of ``dense``, ``simplified`` and ``torch``.

        Raises:
            RunError: onnxruntime cannot load or run one of the models.
        """
        example = self._stage.signature.example
        feeds = self._stage.signature.feeds(example)
        calls: dict[str, Callable[[], object]] = {}
        for name, proto in (("dense", self._stage.dense), ("simplified", self.onnx_model)):
            calls[name] = partial(_run, _open(proto, threads=threads), feeds)
        if not eager:
            return time_calls(calls, rounds=rounds)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with inference(self._stage.signature.model) as module:
                return time_calls({**calls, "torch": partial(example.run, module)}, rounds=rounds)
        finally:
            torch.set_num_threads(before)


def simplify(  # noqa: PLR0913  (the options, as keywords)
    model: nn.Module | SimplifiedModel,
    example_inputs: Any = None,
    *,
    pinned: Collection[str] = (),
    skip: Collection[str] = (),
    bn_folding: Collection[tuple[str, str]] | None = None,
    dynamic_shapes: Any = None,
    exporter: Exporter = "dynamo",
    opset: int | None = None,
    verify: bool = True,
    rtol: float | None = None,
    target: str | None = None,
    channel_multiple: int | None = None,
) -> SimplifiedModel:
    """Make a module as small and fast as its pruning allows, as an ONNX model.

    The module is not modified. Masks of ``torch.nn.utils.prune`` and parametrizations may still be
    on: they are applied and gone in the result.

    Args:
        model: the module, or the result of another step, which goes on from there.
        example_inputs: what to call the module with, see `torch_bridge.export`; for image
            classifiers and the like it is guessed from the first layer if None.
        pinned: names of modules that must keep all their output channels.
        skip: passes to leave out, of ``fold_batchnorm``, ``propagate_bias``, ``remove_zeroed``.
        bn_folding: pairs to fold, of those that `get_bn_folding` lists; all by default.
        dynamic_shapes: dimensions that may vary, see `torch_bridge.export`.
        exporter: ``"dynamo"`` or ``"torchscript"``.
        opset: ONNX operator set to export to; torch's choice if None.
        verify: compare the result with the exported model, and with the module itself: on the
            example, on random inputs of its shapes, and on larger ones where shapes are dynamic.
        rtol: bound on the error relative to each output's largest magnitude; by default 1e-4, or
            1e-2 for models with half-precision weights.
        target: see `onnx_simplify.simplify`.
        channel_multiple: see `onnx_simplify.simplify`.

    Returns:
        The simplified model. Its report compares it with the exported one, BatchNorm unfolded.

    Raises:
        ExportError: the module cannot be exported.
        CannotVerifyError: the exported model does not run on the example inputs.
        VerificationError: the result differs from the module, or does not run where that does.
        ValueError: a name of no module, a pair that cannot be folded, or no example inputs where
            they cannot be guessed.
        TypeError: ``model`` is no module, or the inputs do not fit its signature.
    """
    # A single name need not be in a list.
    pinned = [pinned] if isinstance(pinned, str) else list(pinned)
    start = _start(model, example_inputs, pinned, dynamic_shapes, exporter, opset)
    _check_names(pinned, {name for name, _ in start.signature.model.named_modules()})
    lost = [name for name in pinned if name not in start.tensors]
    if lost:
        raise ValueError(f"cannot pin '{lost[0]}': the model does not run it, or a step removed it")
    feeds = start.signature.feeds(start.signature.example)
    nodes = None if bn_folding is None else _nodes(start, bn_folding)
    try:
        proto, report = onnx_simplify.simplify(
            start.proto,
            pinned=[tensor for name in pinned for tensor in start.tensors[name]],
            skip=skip,
            bn_folding=nodes,
            input_data=feeds,
            verify=verify,
            rtol=rtol,
            target=target,
            channel_multiple=channel_multiple,
        )
    except (ModelError, CannotVerifyError, RunError):
        _check_exported(start.proto, feeds)
        raise
    tensors = _survivors(start.proto, proto, start.tensors)
    result = SimplifiedModel(_Stage(proto, start.dense, start.signature, tensors), report)
    if verify:
        result.verification = _compare(result, rtol)
    return result


def fuse(
    model: nn.Module | SimplifiedModel,
    bn_folding: Collection[tuple[str, str]] | None = None,
    example_inputs: Any = None,
    **options: Any,
) -> SimplifiedModel:
    """Fold BatchNorm layers into the layers around them: the first step alone.

    Args:
        model: see `simplify`.
        bn_folding: pairs (layer, BatchNorm) of module names; all that can be folded if None.
        example_inputs: see `simplify`.
        options: as of `simplify`.

    Raises:
        ExportError: see `simplify`.
        VerificationError: see `simplify`.
        ValueError: see `simplify`.
    """
    return _only("fold_batchnorm", model, example_inputs, bn_folding=bn_folding, **options)


def propagate_bias(
    model: nn.Module | SimplifiedModel,
    example_inputs: Any = None,
    pinned: Collection[str] = (),
    **options: Any,
) -> SimplifiedModel:
    """Let the readers of constant channels absorb them: the second step alone.

    Args:
        model: see `simplify`.
        example_inputs: see `simplify`.
        pinned: modules whose output must not change in any channel.
        options: as of `simplify`.

    Raises:
        ExportError: see `simplify`.
        VerificationError: see `simplify`.
        ValueError: see `simplify`.
    """
    return _only("propagate_bias", model, example_inputs, pinned=pinned, **options)


def remove_zeroed(
    model: nn.Module | SimplifiedModel,
    example_inputs: Any = None,
    pinned: Collection[str] = (),
    **options: Any,
) -> SimplifiedModel:
    """Remove channels that are zero or that nothing reads: the third step alone.

    Args:
        model: see `simplify`.
        example_inputs: see `simplify`.
        pinned: modules that must keep all their output channels.
        options: as of `simplify`.

    Raises:
        ExportError: see `simplify`.
        VerificationError: see `simplify`.
        ValueError: see `simplify`.
    """
    return _only("remove_zeroed", model, example_inputs, pinned=pinned, **options)


def get_bn_folding(
    model: nn.Module | SimplifiedModel, example_inputs: Any = None, *, exporter: Exporter = "dynamo"
) -> list[tuple[str, str]]:
    """The pairs (layer, BatchNorm) of module names that `fuse` can fold.

    Args:
        model: see `simplify`.
        example_inputs: see `simplify`.
        exporter: see `simplify`.

    Raises:
        ExportError: see `simplify`.
        ValueError: see `simplify`.
    """
    start = _start(model, example_inputs, (), None, exporter, None)
    return list(dict.fromkeys(pair for pair, _ in _pairs(start)))


def get_pinned(
    model: nn.Module | SimplifiedModel, example_inputs: Any = None, *, exporter: Exporter = "dynamo"
) -> list[str]:
    """Names of the layers whose output channels cannot be removed; there is no need to pin them.

    Args:
        model: see `simplify`.
        example_inputs: see `simplify`.
        exporter: see `simplify`.

    Raises:
        ExportError: see `simplify`.
        ValueError: see `simplify`.
    """
    start = _start(model, example_inputs, (), None, exporter, None)
    module = _modules(start)
    found = (module(label) for label in onnx_simplify.get_pinned(start.proto))
    return [name for name in dict.fromkeys(found) if name is not None]


def _only(step: str, model: Any, example_inputs: Any, **options: Any) -> SimplifiedModel:
    return simplify(model, example_inputs, skip=[p for p in PASSES if p != step], **options)


# ------------------------------------------------------------------------------------------------
# Modules and their tensors


def _start(
    model: nn.Module | SimplifiedModel,
    example_inputs: Any,
    pinned: Collection[str],
    dynamic_shapes: Any,
    exporter: Exporter,
    opset: int | None,
) -> _Stage:
    """The model as exported, or as the last step left it."""
    if isinstance(model, SimplifiedModel):
        if not (example_inputs is dynamic_shapes is opset is None):
            raise ValueError("example inputs, dynamic shapes and opset are those of the first step")
        return model._stage
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    _check_names(pinned, set(modules))
    traced = [n for n, m in modules.items() if n in pinned or isinstance(m, _LAYERS)]
    if example_inputs is None:
        example_inputs = _guess_inputs(model)
    exported = export_traced(
        model,
        example_inputs,
        traced,
        dynamic_shapes=dynamic_shapes,
        exporter=exporter,
        opset=opset,
        fuse_batchnorm=False,
    )
    proto = exported.proto
    return _Stage(proto, proto, _Signature.of(model, exported), exported.tensors)


def _check_names(names: Collection[str], known: Collection[str]) -> None:
    """Raise ValueError unless all are names of modules."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"the model has no module '{name}'{hint}")


def _modules(stage: _Stage) -> Callable[[str], str | None]:
    """The module that a node, given by its label, belongs to."""
    owner: dict[str, str] = {}
    modules = dict(stage.signature.model.named_modules())
    # A container returns what its last layer does: the layer's name is the better one.
    names = sorted(stage.tensors, key=lambda name: not isinstance(modules[name], _LAYERS))
    for name in names:
        for tensor in stage.tensors[name]:
            owner.setdefault(tensor, name)
    graph = stage.proto.graph
    output = {node.name: node.output[0] for node in graph.node if node.name}
    weights = {tensor.name for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def find(label: str) -> str | None:
        tensor = output.get(label, label)
        # A linear layer may be two nodes: the product, and the sum with the bias.
        users = readers.get(tensor, [])
        if tensor not in owner and len(users) == 1 and users[0].op_type == "Add":
            if any(name in weights for name in users[0].input):
                tensor = users[0].output[0]
        return owner.get(tensor)

    return find


def _pairs(stage: _Stage) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Foldable pairs: (layer, BatchNorm) by module, and the same by node."""
    module = _modules(stage)
    for layer, norm in onnx_simplify.get_bn_folding(stage.proto):
        names = module(layer), module(norm)
        if names[0] is not None and names[1] is not None:
            yield (names[0], names[1]), (layer, norm)


def _nodes(stage: _Stage, pairs: Collection[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs of nodes that belong to pairs of modules.

    Raises:
        ValueError: a pair that cannot be folded.
    """
    wanted = {(str(a), str(b)) for a, b in pairs}
    found = {nodes: names for names, nodes in _pairs(stage) if names in wanted}
    for pair in sorted(wanted - set(found.values())):
        raise ValueError(f"cannot fold {pair}: see get_bn_folding")
    return set(found)


def _survivors(
    before: onnx.ModelProto, after: onnx.ModelProto, tensors: dict[str, list[str]]
) -> dict[str, list[str]]:
    """Which tensors stand for modules after a step.

    Where a BatchNorm was folded, the layer and it have become one node: both go by its output.
    """
    present = {name for node in after.graph.node for name in node.output}
    merged: dict[str, str] = {}
    for node in before.graph.node:
        if node.op_type in ("BatchNormalization", "Identity"):
            source, result = node.input[0], node.output[0]
            if source not in present:
                merged[source] = result
            elif result not in present:
                merged[result] = source
    found = {}
    for module, names in tensors.items():
        names = [name if name in present else merged.get(name, name) for name in names]
        if set(names) <= present:
            found[module] = names
    return found


# ------------------------------------------------------------------------------------------------
# onnxruntime


def _open(proto: onnx.ModelProto, *, threads: int = 0, optimize: bool = True) -> Session:
    """A session of a model; see `Session`.

    Raises:
        RunError: onnxruntime cannot load it.
    """
    try:
        return Session(load(proto), threads=threads, optimize=optimize)
    except RunError as error:
        raise RunError(f"onnxruntime cannot load the model: {error}") from error


def _run(session: Session, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What a model returns.

    Raises:
        CallError: it does not run on these inputs.
    """
    try:
        return session.run(feeds)
    except RunError as error:
        sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        raise CallError(f"the model does not take {sizes}: {error}") from error


def _check_exported(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    """Tell an export that went wrong from other troubles.

    Raises:
        CannotVerifyError: the model does not run on the example inputs.
    """
    try:
        _run(_open(proto, optimize=False), feeds)
    except RunError as error:
        raise CannotVerifyError(
            "the exported model does not run on the example inputs: try the other exporter "
            f"({error})"
        ) from error


# ------------------------------------------------------------------------------------------------
# Inputs and outputs


def _leaves(call: Call) -> list[tuple[str, Any]]:
    return [leaf for name, value in call.arguments.items() for leaf in leaves(value, name)]


def _placeholder(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else copy.copy(leaf)


def _guess_inputs(model: nn.Module) -> torch.Tensor:
    """Images, a signal or a vector that the first layer takes, and the model after it.

    Raises:
        ValueError: the model takes other arguments, or none of the sizes that were tried.
    """
    first = next((m for m in model.modules() if isinstance(m, (_ConvNd, nn.Linear))), None)
    required = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    shapes: list[tuple[int, ...]] = []
    if isinstance(first, nn.Linear):
        shapes = [(1, first.in_features)]
    elif isinstance(first, _ConvNd):
        space = len(first.kernel_size)
        shapes = [(1, first.in_channels, *[size] * space) for size in _GUESSES[space == 3 and 2 :]]
    if len(required) == 1:
        with inference(model) as module:
            for shape in shapes:
                example = torch.zeros(shape, dtype=next(model.parameters()).dtype)
                try:
                    module(example.clone())
                except Exception:  # this size is not for this model
                    continue
                return example
    raise ValueError("example inputs cannot be guessed for this model: give example_inputs")


def _compare(model: SimplifiedModel, rtol: float | None) -> Verification:
    """Compare with the module itself.

    Raises:
        VerificationError: they differ.
    """
    signature = model._stage.signature
    half = is_half(load(model._stage.dense))
    tolerance = rtol if rtol is not None else (1e-2 if half else 1e-4)
    result = Verification(True, 0.0, tolerance, 0, [])
    with inference(signature.model) as module:
        for call in _calls(model):
            try:
                expected = call.run(module)
            except Exception:
                if call is signature.example:
                    raise
                continue  # a size or values that are not for this model
            if constants_of(expected) != constants_of(signature.outputs):
                raise VerificationError(
                    "the torch model returns something beside tensors that depends on its inputs, "
                    "which an ONNX model cannot"
                )
            wanted = [tensor.detach().cpu().numpy() for tensor in tensors_of(expected)]
            feeds = signature.feeds(call)
            gap, reason = _gap(wanted, model._session, feeds)
            result.runs += 1
            result.sizes.append({})
            result.worst = max(result.worst, gap)
            if not gap <= tolerance:
                blame = ""
                dense = _open(model._stage.dense, optimize=False)
                if not _gap(wanted, dense, feeds)[0] <= tolerance:
                    blame = "; so does the exported model: try the other exporter"
                    if _shapes(call) != _shapes(signature.example):
                        blame += ", or fewer dynamic_shapes"
                raise VerificationError(
                    "the result differs from the torch model"
                    f" ({reason or f'relative error {gap:.2g}'}){blame}"
                )
    return result


def _gap(
    wanted: list[np.ndarray], session: Session, feeds: dict[str, np.ndarray]
) -> tuple[float, str]:
    """The relative error of a model's outputs, and what is wrong if not a matter of numbers."""
    try:
        return difference(wanted, _run(session, feeds))
    except CallError as error:
        return float("inf"), str(error)


def _calls(model: SimplifiedModel) -> Iterator[Call]:
    """The example, random inputs of its shapes, and larger ones where shapes are dynamic."""
    stage = model._stage
    module, example = stage.signature.model, stage.signature.example
    yield example
    shapes = _shapes(example)
    yield _varied(module, example, shapes, 1)
    if not all(tensor.is_floating_point() for tensor in example.tensors()):
        # In a run of their own: the module may not accept other integers.
        yield _varied(module, example, shapes, 3, integers=True)
    dynamic = {
        value.name: [bool(d.dim_param) for d in value.type.tensor_type.shape.dim]
        for value in stage.dense.graph.input
    }
    if any(map(any, dynamic.values())):
        for name, k in stage.signature.names.items():
            shapes[k] = tuple(
                2 * size if free else size
                for size, free in zip(shapes[k], dynamic[name], strict=True)
            )
        yield _varied(module, example, shapes, 2)


def _shapes(call: Call) -> list[tuple[int, ...]]:
    """The shapes of a call's tensors."""
    return [tuple(tensor.shape) for tensor in call.tensors()]


def _varied(
    model: nn.Module,
    call: Call,
    shapes: Sequence[tuple[int, ...]],
    seed: int,
    *,
    integers: bool = False,
) -> Call:
    """The call with tensors of other shapes: normal where they are real, else the example's.

    With ``integers``, these vary as well, between the smallest and the largest of the example.
    """
    random = torch.Generator().manual_seed(seed)
    tensors = []
    for tensor, shape in zip(call.tensors(), shapes, strict=True):
        if tensor.is_floating_point():
            tensors.append(torch.randn(shape, generator=random).to(tensor))
            continue
        if integers and tensor.numel():
            tensor = _other_integers(tensor, random)
        repeats = [new // old for new, old in zip(shape, tensor.shape, strict=True)]
        tensors.append(tensor.repeat(repeats) if repeats else tensor)
    return Call.of(model, call.filled(tensors))


def _other_integers(tensor: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Other integers or booleans like these."""
    if tensor.dtype == torch.bool:
        return ~tensor
    low, high = int(tensor.min()), int(tensor.max())
    if low == high:
        return tensor + 1
    return torch.randint(low, high + 1, tensor.shape, generator=random).to(tensor)
