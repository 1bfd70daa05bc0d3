"""Make inputs that a model accepts: sizes for free dimensions, values for each type."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import onnx
from onnx import TensorProto

from onnx_simplify.errors import CannotVerifyError, ModelError
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.shapes import EMPTY, input_dims

Feeds = dict[str, np.ndarray]

# Names of free dimensions that are batches wherever they are, and lengths even in the first place.
_BATCH = re.compile(r"batch|(^|_)bs($|_)", re.IGNORECASE)
_LENGTH = re.compile(r"seq|time|len|frame|sample|token|step|point|width|height", re.IGNORECASE)
# Sizes tried for free dimensions besides batches, in order, by how many of them an input has; the
# first that the model accepts beside others is used. A volume of 32 has the elements of an image.
_LENGTHS = (224, 512, 64, 128, 1000, 256, 96, 320, 32, 16, 100, 48, 8, 640, 299, 384, 16000, 1)
_IMAGES = (224, 64, 96, 128, 256, 320, 640, 32, 512, 16, 8, 100, 48, 299, 384, 1, 16000, 1000)
_VOLUMES = (32, 16, 48, 64, 24, 20, 8, 96, 112, 128, 4, 1)
# Sound comes in thousands of samples, and what is too short for a network can bring it down.
_SIGNALS = (16000, 48000, 8000, 4000, 1000, 512, 224, 100, 64, 32, 8, 1)
_ELEMENT_BOUND = 2**21
# Dimensions of this size are not halved any more.
_SMALL = 8
_EXPRESSION = re.compile(r"\s*([A-Za-z_][\w.]*|\d+)((?:\s*[-+*]\s*(?:[A-Za-z_][\w.]*|\d+))+)\s*")
STYLES = ("random", "positive", "ones", "all ones", "zeros", "range", "sizes", "minus one")
"""Kinds of values, the first of which a model accepts is used, see :func:`make_feeds`."""


@dataclass
class InputSpec:
    """One graph input: name, numpy dtype, and dims (an int, or the name of a free dimension).

    Where not even their number is known, ``ranked`` is false.
    """

    name: str
    dtype: np.dtype
    dims: list[int | str]
    ranked: bool = True


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
                    f"input shapes: '{info.name}' has {len(dims)} dimensions, not {len(given)}"
                )
            for axis, (size, dim) in enumerate(zip(given, dims, strict=False)):
                if isinstance(dim, int) and dim != size:
                    raise ModelError(
                        f"input shapes: dimension {axis} of '{info.name}' is fixed to {dim}"
                    )
            dims = list(given)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type or TensorProto.FLOAT)
        ranked = given is not None or kind.HasField("shape")
        specs.append(InputSpec(info.name, np.dtype(dtype), dims, ranked))
    if shapes:
        known = ", ".join(s.name for s in specs) or "none"
        raise ModelError(f"no input is named '{next(iter(shapes))}' (inputs: {known})")
    return specs


def is_free(specs: Sequence[InputSpec]) -> bool:
    """Whether any dimension is free."""
    return any(isinstance(d, str) for s in specs for d in s.dims)


def candidate_sizes(specs: Sequence[InputSpec]) -> Iterator[dict[str, int]]:
    """Assignments of sizes to free dimensions, likely ones first (one empty one if none is free).

    A free first dimension is a batch (1 first, then 2); the others get the same size each, except
    for those that are named as sums or products of others.
    """
    batch, spatial = _free(specs)
    seen = set()
    choice = _choice(specs, spatial)
    for count in (1, 2) if batch else (1,):
        for size in choice if spatial else choice[:1]:
            if spatial and any(_volume(s, size) > _ELEMENT_BOUND for s in specs):
                continue
            sizes = dict.fromkeys(batch, count) | dict.fromkeys(spatial, size)
            key = tuple(sizes.items())
            if key not in seen:
                seen.add(key)
                yield with_expressions(specs, sizes)


def _choice(specs: Sequence[InputSpec], spatial: Sequence[str]) -> tuple[int, ...]:
    """Sizes to try for free dimensions that are no batches."""
    most = max((sum(d in spatial for d in s.dims) for s in specs), default=0)
    if most > 1:
        return _IMAGES if most == 2 else _VOLUMES
    signals = [
        s
        for s in specs
        if s.dtype.kind == "f"
        and any(d in spatial for d in s.dims)
        and int(np.prod([d for d in s.dims if isinstance(d, int)])) <= 2
    ]
    return _SIGNALS if signals and len(specs) == 1 else _LENGTHS


def halved(specs: Sequence[InputSpec], sizes: Mapping[str, int]) -> dict[str, int]:
    """Half the sizes of free dimensions that are no batches; nothing if they are small."""
    _, spatial = _free(specs)
    smaller = dict(sizes) | {n: sizes[n] // 2 for n in spatial if sizes[n] >= 2 * _SMALL}
    smaller = with_expressions(specs, smaller)
    return smaller if smaller != dict(sizes) else {}


def unlikely_sizes(specs: Sequence[InputSpec]) -> Iterator[dict[str, int]]:
    """Assignments with one size for all free dimensions, in case the first is no batch.

    Then with one of them twice as large as the others; at last, with none for those that are
    declared as zero, which mostly means that they are free.
    """
    batch, spatial = _free(specs)
    for size in (64, 16, 32, 128, 8, 4) if batch else ():
        if all(_volume(s, size) * size <= _ELEMENT_BOUND for s in specs):
            yield with_expressions(specs, dict.fromkeys([*batch, *spatial], size))
    for name in spatial:
        # A whole and its two halves, say.
        yield with_expressions(specs, dict.fromkeys([*batch, *spatial], 1) | {name: 2})
    if any(name.endswith(EMPTY) for name in (*batch, *spatial)):
        for size in (1, 2, 8):
            yield {n: 0 if n.endswith(EMPTY) else size for n in (*batch, *spatial)}


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
        other = with_expressions(specs, other)
        if other not in others:
            others.append(other)
    return others


def alike(sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Assignments that change all free dimensions in the same way, in case they are coupled."""
    changes = ((1, 32), (2, 0), (1, 1), (0.5, 0))
    return [
        {n: max(1, round(s * factor) + step) for n, s in sizes.items()} for factor, step in changes
    ]


def with_expressions(specs: Sequence[InputSpec], sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes, and those of dimensions with names such as ``past + 1`` that they determine."""
    found = dict(sizes)
    for dim in (d for s in specs for d in s.dims if isinstance(d, str)):
        parts = _expression(dim)
        if parts is None:
            continue
        if any(not p.isdigit() and p not in found for p in parts[::2]):
            continue
        # Terms of a sum; products are formed in the last one.
        terms: list[int] = []
        for sign, part in zip(["+", *parts[1::2]], parts[::2], strict=True):
            value = int(part) if part.isdigit() else found[part]
            if sign == "*":
                terms[-1] *= value
            else:
                terms.append(-value if sign == "-" else value)
        found[dim] = max(0, sum(terms))
    return found


def _expression(name: str) -> list[str] | None:
    """Names or numbers, and the signs between them, if a dimension is named like that."""
    if not _EXPRESSION.fullmatch(name):
        return None
    return [p for p in re.split(r"\s*([-+*])\s*", name.strip()) if p]


def _free(specs: Sequence[InputSpec]) -> tuple[list[str], list[str]]:
    """Names of free batch dimensions and of other free dimensions, in order.

    A batch is the first dimension of an input of several, or is called one. Without those that
    others determine.
    """
    batch: list[str] = []
    other: list[str] = []
    names = {d for s in specs for d in s.dims if isinstance(d, str)}
    for spec in specs:
        for axis, dim in enumerate(spec.dims):
            if isinstance(dim, str) and dim not in batch and dim not in other:
                parts = _expression(dim)
                if parts is not None and all(p.isdigit() or p in names for p in parts[::2]):
                    continue
                first = axis == 0 and len(spec.dims) > 1 and not _LENGTH.search(dim)
                (batch if first or _BATCH.search(dim) else other).append(dim)
    return batch, other


def _volume(spec: InputSpec, size: int) -> int:
    """Number of elements, with ``size`` for free dimensions (but 1 for a batch)."""
    return int(np.prod([d if isinstance(d, int) else size for d in spec.dims[1:]] or [1]))


def make_feeds(
    model: Model,
    specs: Sequence[InputSpec],
    sizes: Mapping[str, int],
    seed: int,
    style: str = "random",
) -> Feeds:
    """Values for all inputs.

    Args:
        model: the model; where an integer input indexes an initializer, its length is the bound.
        specs: the inputs.
        sizes: sizes of the free dimensions.
        seed: seed of the generator.
        style: ``random``, N(0, 1) for floats and indices that fit for integers, or what models
            accept that want ratios, divisors, axes or lengths: floats in (0, 1) (``positive``),
            integers that are one, zero, minus one, the largest free size or different from each
            other (``ones``, ``zeros``, ``minus one``, ``sizes``, ``range``), ``all ones``.
            Integers to divide by are never zero.

    Raises:
        CannotVerifyError: it is not known how many dimensions an input has.
    """
    random = np.random.default_rng(seed)
    feeds = {}
    bounds, divisors = _uses(model)
    for spec in specs:
        if not spec.ranked:
            # Older versions of onnxruntime abort on too few dimensions.
            raise CannotVerifyError(f"input '{spec.name}' has no shape: give input shapes")
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.dims]
        values: np.ndarray
        if spec.dtype.kind in "iu":
            high = bounds.get(spec.name, 2 if spec.dtype.itemsize > 1 else 128)
            values = random.integers(0, max(high, 1), shape)
            if style in ("ones", "all ones", "zeros", "minus one"):
                values = np.full(shape, {"zeros": 0, "minus one": -1}.get(style, 1))
            elif style == "sizes":
                values = np.full(shape, max(sizes.values(), default=1))
            elif style == "range":
                values = random.permutation(values.size).reshape(shape)
            if spec.name in divisors:
                # Older versions of onnxruntime die of that.
                values = np.where(values == 0, 1, values)
        elif spec.dtype.kind == "b":
            values = random.integers(0, 2, shape)
        elif spec.dtype.kind in "OUS":
            values = np.full(shape, "a", object)
        elif style == "all ones":
            values = np.ones(shape)
        elif style == "positive":
            values = random.uniform(0.05, 0.95, shape)
        else:
            values = random.standard_normal(shape, np.float32)
        feeds[spec.name] = np.asarray(values).astype(spec.dtype)
    return feeds


def _uses(model: Model) -> tuple[dict[str, int], set[str]]:
    """The graph inputs that index an initializer, with its number of rows; those divided by."""
    source: dict[str, str] = {t.name: t.name for t in model.graph.inputs}
    bounds: dict[str, int] = {}
    divisors: set[str] = set()
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
        if node.op in ("Div", "Mod") and len(node.inputs) > 1:
            divisors.add(source.get(node.inputs[1].name, ""))
    return bounds, divisors
