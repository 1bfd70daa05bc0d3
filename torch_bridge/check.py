"""Compare a simplified model with the module itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from onnx_simplify import VerificationError
from onnx_simplify.graph.load import load
from onnx_simplify.pipeline import is_half
from onnx_simplify.runtime.difference import difference
from onnx_simplify.runtime.session import Session
from onnx_simplify.runtime.verdict import Verification
from torch_bridge.calls import Call, constants_of, tensors_of
from torch_bridge.export import inference
from torch_bridge.sessions import CallError, open_model, run_model
from torch_bridge.simplified import SimplifiedModel


def compare(model: SimplifiedModel, rtol: float | None) -> Verification:
    """Compare with the module itself.

    Raises:
        VerificationError: they differ.
    """
    signature = model.stage.signature
    half = is_half(load(model.stage.dense))
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
            gap, reason = _gap(wanted, model.runner, feeds)
            result.runs += 1
            result.sizes.append({})
            result.worst = max(result.worst, gap)
            if not gap <= tolerance:
                blame = ""
                dense = open_model(model.stage.dense, optimize=False)
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
        return difference(wanted, run_model(session, feeds))
    except CallError as error:
        return float("inf"), str(error)


def _calls(model: SimplifiedModel) -> Iterator[Call]:
    """The example, random inputs of its shapes, and larger ones where shapes are dynamic."""
    stage = model.stage
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
