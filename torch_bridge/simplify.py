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

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

import onnx_simplify
from onnx_simplify import PASSES, CannotVerifyError, ModelError
from onnx_simplify.errors import RunError
from torch_bridge.check import compare
from torch_bridge.export import Exporter, export_traced, inference
from torch_bridge.names import LAYERS, check_names, modules_of, nodes_of, pairs_of, survivors
from torch_bridge.sessions import check_exported
from torch_bridge.signature import Signature
from torch_bridge.simplified import SimplifiedModel
from torch_bridge.stage import Stage

# Sizes of images to try where no example is given.
_GUESSES = (224, 299, 64, 32, 512)


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
    check_names(pinned, {name for name, _ in start.signature.model.named_modules()})
    lost = [name for name in pinned if name not in start.tensors]
    if lost:
        raise ValueError(f"cannot pin '{lost[0]}': the model does not run it, or a step removed it")
    feeds = start.signature.feeds(start.signature.example)
    nodes = None if bn_folding is None else nodes_of(start, bn_folding)
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
        check_exported(start.proto, feeds)
        raise
    tensors = survivors(start.proto, proto, start.tensors)
    result = SimplifiedModel(Stage(proto, start.dense, start.signature, tensors), report)
    if verify:
        result.verification = compare(result, rtol)
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
    return list(dict.fromkeys(pair for pair, _ in pairs_of(start)))


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
    module = modules_of(start)
    found = (module(label) for label in onnx_simplify.get_pinned(start.proto))
    return [name for name in dict.fromkeys(found) if name is not None]


def _only(step: str, model: Any, example_inputs: Any, **options: Any) -> SimplifiedModel:
    return simplify(model, example_inputs, skip=[p for p in PASSES if p != step], **options)


def _start(
    model: nn.Module | SimplifiedModel,
    example_inputs: Any,
    pinned: Collection[str],
    dynamic_shapes: Any,
    exporter: Exporter,
    opset: int | None,
) -> Stage:
    """The model as exported, or as the last step left it."""
    if isinstance(model, SimplifiedModel):
        if not (example_inputs is dynamic_shapes is opset is None):
            raise ValueError("example inputs, dynamic shapes and opset are those of the first step")
        return model.stage
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    check_names(pinned, set(modules))
    traced = [n for n, m in modules.items() if n in pinned or isinstance(m, LAYERS)]
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
    return Stage(proto, proto, Signature.of(model, exported), exported.tensors)


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
