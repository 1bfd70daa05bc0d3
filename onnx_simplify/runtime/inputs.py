"""Make inputs that a model accepts: sizes for free dimensions, values for each type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import onnx
from onnx import TensorProto

from onnx_simplify.errors import CannotVerifyError, ModelError
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.shapes import input_dims

Feeds = dict[str, np.ndarray]

_BATCH_HINTS = ("batch", "n", "bs", "b")
# Sizes tried for free spatial dimensions, in order; the first that the model accepts is used.
_SIZES = (224, 64, 96, 128, 256, 320, 640, 32, 512, 16, 8, 100, 48, 299, 384, 1, 16000, 1000)
_ELEMENT_BOUND = 2**21


@dataclass
class InputSpec:
    """One graph input: name, numpy dtype, and dims (an int, or the name of a free dimension)."""

    name: str
    dtype: np.dtype
    dims: list[int | str]


def input_specs(model: Model, shapes: Mapping[str, Sequence[int]] | None = None) -> list[InputSpec]:
    """The inputs that a caller must feed.

    Args:
        model: the model.
        shapes: sizes to use instead of the declared ones, by input name.

    Raises:
        ModelError: a name is unknown, or a shape contradicts the declared one.
        CannotVerifyError: an input is not a tensor.
    """
    specs = []
    shapes = dict(shapes or {})
    for info in model.template.graph.input:
        if info.name in model.overridable or info.name not in model.input_names:
            continue
        if not info.type.HasField("tensor_type"):
            raise CannotVerifyError(
                f"input '{info.name}' is not a tensor: no values can be made up"
            )
        kind = info.type.tensor_type
        dims = input_dims(info)
        given = shapes.pop(info.name, None)
        if given is not None:
            if kind.HasField("shape") and len(given) != len(dims):
                raise ModelError(
                    f"--input-shape: '{info.name}' has {len(dims)} dimensions, not {len(given)}"
                )
            for axis, (size, dim) in enumerate(zip(given, dims, strict=False)):
                if isinstance(dim, int) and dim != size:
                    raise ModelError(
                        f"--input-shape: dimension {axis} of '{info.name}' is fixed to {dim}"
                    )
            dims = list(given)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type or TensorProto.FLOAT)
        specs.append(InputSpec(info.name, np.dtype(dtype), dims))
    if shapes:
        known = ", ".join(s.name for s in specs) or "none"
        raise ModelError(f"no input is named '{next(iter(shapes))}' (inputs: {known})")
    return specs


def is_free(specs: Sequence[InputSpec]) -> bool:
    """Whether any dimension is free."""
    return any(isinstance(d, str) for s in specs for d in s.dims)


def candidate_sizes(specs: Sequence[InputSpec]) -> Iterator[dict[str, int]]:
    """Assignments of sizes to free dimensions, likely ones first (one empty one if none is free).

    A free first dimension is a batch (1 first, then 2); the others get the same size each.
    """
    batch, spatial = _free(specs)
    seen = set()
    for size in _SIZES if spatial else _SIZES[:1]:
        if spatial and any(_volume(s, size) > _ELEMENT_BOUND for s in specs):
            continue
        for count in (1, 2) if batch else (1,):
            sizes = dict.fromkeys(batch, count) | dict.fromkeys(spatial, size)
            key = tuple(sizes.items())
            if key not in seen:
                seen.add(key)
                yield sizes


def unlikely_sizes(specs: Sequence[InputSpec]) -> Iterator[dict[str, int]]:
    """Assignments with one size for all free dimensions, in case the first is no batch."""
    batch, spatial = _free(specs)
    for size in (64, 16, 32, 128, 8, 4) if batch else ():
        if all(_volume(s, size) * size <= _ELEMENT_BOUND for s in specs):
            yield dict.fromkeys([*batch, *spatial], size)


def varied(
    specs: Sequence[InputSpec], sizes: Mapping[str, int], count: int
) -> list[dict[str, int]]:
    """The assignment given and up to ``count - 1`` others, to show that no size was baked in."""
    batch, spatial = _free(specs)
    others = [dict(sizes)]
    changes = ((1, 1.0, 32), (0, 1.5, 32), (2, 0.5, 0), (0, 1.25, -7))
    for more, factor, step in islice(changes, count - 1):
        other = {n: sizes[n] + more for n in batch}
        for k, name in enumerate(spatial):
            grown = round(sizes[name] * factor)
            other[name] = max(1, grown + step * (k % 2) if sizes[name] > 64 else grown)
        if other not in others:
            others.append(other)
    return others


def _free(specs: Sequence[InputSpec]) -> tuple[list[str], list[str]]:
    """Names of free batch dimensions and of other free dimensions, in order."""
    batch: list[str] = []
    other: list[str] = []
    for spec in specs:
        for axis, dim in enumerate(spec.dims):
            if isinstance(dim, str) and dim not in batch and dim not in other:
                hint = dim.lower()
                first = axis == 0 and len(spec.dims) > 1
                is_batch = first or any(
                    hint == h or (len(h) > 2 and hint.startswith(h)) for h in _BATCH_HINTS
                )
                (batch if is_batch else other).append(dim)
    return batch, other


def _volume(spec: InputSpec, size: int) -> int:
    """Number of elements, with ``size`` for free dimensions (but 1 for a batch)."""
    return int(np.prod([d if isinstance(d, int) else size for d in spec.dims[1:]] or [1]))


def make_feeds(
    model: Model, specs: Sequence[InputSpec], sizes: Mapping[str, int], seed: int
) -> Feeds:
    """Random values for all inputs: N(0, 1) for floats, indices that fit for integers.

    Args:
        model: the model; where an integer input indexes an initializer, its length is the bound.
        specs: the inputs.
        sizes: sizes of the free dimensions.
        seed: seed of the generator.
    """
    random = np.random.default_rng(seed)
    feeds = {}
    bounds = _index_bounds(model)
    for spec in specs:
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.dims]
        values: np.ndarray
        if spec.dtype.kind in "iu":
            high = bounds.get(spec.name, 2 if spec.dtype.itemsize > 1 else 128)
            values = random.integers(0, max(high, 1), shape)
        elif spec.dtype.kind == "b":
            values = random.integers(0, 2, shape)
        elif spec.dtype.kind in "OUS":
            values = np.full(shape, "a", object)
        else:
            values = random.standard_normal(shape, np.float32)
        feeds[spec.name] = np.asarray(values).astype(spec.dtype)
    return feeds


def _index_bounds(model: Model) -> dict[str, int]:
    """For graph inputs that index an initializer, the number of its rows."""
    source: dict[str, str] = {t.name: t.name for t in model.graph.inputs}
    bounds: dict[str, int] = {}
    for node in model.graph.nodes:
        if node.op in ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze") and node.inputs:
            origin = source.get(node.inputs[0].name)
            if origin is not None and node.outputs:
                source[node.outputs[0].name] = origin
        if node.op == "Gather" and isinstance(node.inputs[0].shape, (list, tuple)):
            index = source.get(node.inputs[1].name)
            rows = node.inputs[0].shape[node.attrs.get("axis", 0)]
            if index is not None and isinstance(rows, int):
                bounds[index] = min(rows, bounds.get(index, rows))
    return bounds
