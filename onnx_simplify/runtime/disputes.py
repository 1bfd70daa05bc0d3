"""Shapes on which onnx and onnxruntime differ."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_simplify.graph.model import Model
from onnx_simplify.graph.shapes import is_questionable, static_shapes
from onnx_simplify.runtime.inputs import Feeds
from onnx_simplify.runtime.session import Session


def settle_disputes(model: Model, feeds: Feeds | None) -> None:
    """Find the tensors whose shapes in onnxruntime are not those that onnx infers, in place.

    Only outputs of nodes on which the two are known to differ are looked at.

    Args:
        model: a cleaned model; ``model.disputed`` is set.
        feeds: inputs to run it with; without, all of these shapes count as disputed.
    """
    doubtful = {n.outputs[0].name: n.op for n in model.graph.nodes if is_questionable(n)}
    names = list(doubtful)
    model.disputed = frozenset(names if feeds is None else ())
    if not names or feeds is None:
        return
    inferred = static_shapes(model, {n: list(v.shape) for n, v in feeds.items()})
    found = Session(model, names).run(feeds, names)
    model.disputed = frozenset(
        name
        for name, values in zip(names, found, strict=True)
        if not _agree(inferred.get(name), values.shape, doubtful[name])
    )


def _agree(inferred: Sequence[int | None] | None, actual: Sequence[int], op: str) -> bool:
    """Whether what is inferred of a shape, now or once more is known, will be right."""
    if op not in ("Resize", "Upsample") and (inferred is None or None in inferred):
        # Sizes before a pooling are computed, and may be folded later.
        return False
    return all(size in (None, known) for size, known in zip(inferred or (), actual, strict=False))
