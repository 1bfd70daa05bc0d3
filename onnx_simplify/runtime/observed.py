"""Sizes that only runs can tell: those behind operators that nobody here knows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from onnx_simplify.errors import CannotVerifyError, RunError
from onnx_simplify.facts.sizes import Sizes
from onnx_simplify.graph.expressions import Dim, evaluate
from onnx_simplify.graph.model import Model, Observed
from onnx_simplify.graph.shapes import is_unknown
from onnx_simplify.operators import Operator, lookup
from onnx_simplify.runtime.inputs import Feeds
from onnx_simplify.runtime.session import Session

Assignment = dict[str, int]
"""What the symbols of the inputs stand for in a run."""


def is_foreign(model: Model) -> bool:
    """Whether a model has operators of which neither rules nor onnx know the sizes."""
    return any(n.domain not in ("", "ai.onnx") and lookup(n) is Operator for n in model.graph.nodes)


def observe_sizes(model: Model, runs: Sequence[Feeds], doubtful: Collection[str]) -> bool:
    """Look up sizes behind unknown operators in runs, in place.

    Where all sizes of the inputs are static, one run tells them. Otherwise a size is what it is
    in all runs, a number or a size that is known, if it tells itself from all others there.

    Args:
        model: a cleaned model; ``model.observed`` is set.
        runs: inputs, of several sizes where these are free.
        doubtful: tensors whose sizes depend on values; these are not looked at.

    Returns:
        Whether anything was found.
    """
    sizes = Sizes(model)
    names = [
        tensor.name
        for node in model.graph.nodes
        if node.domain not in ("", "ai.onnx")
        for tensor in node.outputs
        if tensor.name and sizes.shapes.get(tensor.name) is None and tensor.name not in doubtful
    ]
    if not names:
        return False
    try:
        session = Session(model, names)
        found = [session.run(feeds, names) for feeds in runs]
    except (RunError, CannotVerifyError):  # then nothing is known of them
        return False
    symbols = [_assigned(sizes, model, feeds) for feeds in runs]
    known = {d for shape in sizes.shapes.values() for d in shape or () if isinstance(d, str)}
    candidates = sorted((d for d in known if not is_unknown(d)), key=lambda d: (len(d), d))
    for k, name in enumerate(names):
        arrays = [values[k] for values in found]
        if all(isinstance(a, np.ndarray) and a.ndim == arrays[0].ndim for a in arrays):
            shapes = [a.shape for a in arrays]
            dims = [_size(column, symbols, candidates) for column in zip(*shapes, strict=True)]
            model.observed[name] = Observed(arrays[0].dtype, dims, shapes[0])
    return bool(model.observed)


def _assigned(sizes: Sizes, model: Model, feeds: Mapping[str, np.ndarray]) -> Assignment:
    found: dict[Dim, int] = {}
    for tensor in model.graph.inputs:
        shape = sizes.shapes.get(tensor.name)
        if shape is not None and tensor.name in feeds:
            found.update(zip(shape, np.shape(feeds[tensor.name]), strict=False))
    return {name: size for name, size in found.items() if isinstance(name, str)}


def _size(
    seen: Sequence[int], symbols: Sequence[Assignment], candidates: Sequence[str]
) -> Dim | None:
    """What a size is, given what it was in each run; None if that cannot be told."""
    if not symbols[0]:
        return seen[0]
    varied = any(symbols[0] != other for other in symbols)
    if not varied:
        return None
    if len(set(seen)) == 1:
        return seen[0]
    fitting = []
    for dim in candidates:
        try:
            values = [evaluate(dim, run.__getitem__) for run in symbols]
        except KeyError:  # of another symbol than the inputs'
            continue
        if values == list(seen):
            fitting.append(dim)
    return fitting[0] if len(fitting) == 1 else None
