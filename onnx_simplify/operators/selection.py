"""Operators that join tensors, take them apart, or pick positions."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.channels.values import MAP, UNIFORM, VARYING, reduce_to
from onnx_simplify.graph.expressions import Dim, ceil_quotient, exact_quotient, total
from onnx_simplify.graph.shapes import is_unknown
from onnx_simplify.operators.base import Masks
from onnx_simplify.operators.interfaces import KnownFacts, KnownSizes, Removal
from onnx_simplify.operators.movement import Movement, repeated
from onnx_simplify.operators.nodes import (
    LONGEST,
    constant_input,
    constant_ints,
    is_computed,
    is_static,
)


def _rank(size: Dim) -> int:
    """How little a size says."""
    return 0 if isinstance(size, int) else 2 if is_unknown(size) else 1


class Concat(Movement):
    """``Concat`` (https://onnx.ai/onnx/operators/onnx__Concat.html)."""

    data_inputs = 0
    drops_empty_inputs = True

    @property
    def joins(self) -> int:
        """The axis as it is given."""
        return int(self.attrs.get("axis", 0))

    def _tracked(self, layouts: Layouts) -> bool:
        axis = self.attrs["axis"]
        return any(layouts.of[t.name].shape[axis] > 1 for t in self.inputs)

    def _join(self, layouts: Layouts, arrays: list[np.ndarray]) -> np.ndarray:
        axis = self.attrs["axis"] % arrays[0].ndim
        parts = []
        for tensor, array in zip(self.inputs, arrays, strict=True):
            parts.append(repeated(array, layouts.shape(tensor), [axis]))
        common = np.broadcast_shapes(*(p.shape[:axis] + (1,) + p.shape[axis + 1 :] for p in parts))
        parts = [
            np.broadcast_to(p, common[:axis] + (p.shape[axis],) + common[axis + 1 :]) for p in parts
        ]
        return np.concatenate(parts, axis)

    def shapes(self, known: KnownSizes) -> list[list[Dim | None]]:
        """The sum along the axis; elsewhere all have the same size."""
        parts = [known.shape(t) for t in self.inputs]
        axis = self.joins % len(parts[0])
        # The one that says most: numbers first.
        found: list[Dim | None] = [min(s, key=_rank) for s in zip(*parts, strict=True)]
        found[axis] = total(part[axis] for part in parts)
        return [found]

    def values(self, known: KnownSizes) -> list[np.ndarray | None]:
        """One vector behind the other; of what is not followed, only the length is known."""
        found = [known.values(t) for t in self.inputs]
        if all(values is None for values in found):
            return []
        parts = []
        for tensor, values in zip(self.inputs, found, strict=True):
            shape = known.shape(tensor)
            if len(shape) != 1 or not isinstance(shape[0], int) or shape[0] > LONGEST:
                return []
            parts.append(np.full(shape[0], None, object) if values is None else values)
        return [np.concatenate(parts)]

    def move(self, layouts: Layouts, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Concatenate along a tracked axis."""
        return [self._join(layouts, arrays)]

    def layout(self, layouts: Layouts) -> None:
        """Along a tracked axis the ids are joined, along any other they are equated."""
        ids = [layouts(t) for t in self.inputs]
        if self._tracked(layouts):
            super().layout(layouts)
            return
        layouts.set(self.outputs[0], layouts.merge(ids))

    def level(self, facts: KnownFacts) -> Masks:
        """Along an untracked axis the operands may hold different constants."""
        if self._tracked(facts.layouts):
            return super().level(facts)
        level = np.full(facts.layouts.of[self.outputs[0].name].shape, MAP, np.int8)
        for tensor in self.inputs:
            level = np.minimum(level, facts.level[tensor.name])
        axis = self.attrs["axis"]
        if not isinstance(facts.shape(self.outputs[0])[axis], int):
            zero = np.ones(level.shape, bool)
            for tensor in self.inputs:
                zero &= facts.zero(tensor, facts.layouts.of[tensor.name].shape)
            level = np.where(zero & (level > VARYING), UNIFORM, VARYING)
        return [level]

    def wants_values(self, facts: KnownFacts) -> list[int]:
        """Along a dynamic axis only zeros stay constant."""
        if self._tracked(facts.layouts):
            return []
        return list(range(len(self.inputs)))

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """What is needed of the result is needed of all operands along untracked axes."""
        if self._tracked(facts.layouts):
            return super().need(facts, outputs)
        wanted = outputs[0]
        assert wanted is not None
        return [reduce_to(wanted, facts.layouts.of[t.name].shape) for t in self.inputs]

    def shrink(self, cut: Removal) -> None:
        """Leave out inputs without channels."""
        keep = [t for t in self.inputs if not cut.facts.dead(t, cut.alive)]
        if len(keep) < len(self.inputs):
            self.node.inputs = keep


class Split(Movement):
    """``Split`` with known sizes (https://onnx.ai/onnx/operators/onnx__Split.html)."""

    def pieces(self, layouts: Layouts) -> list[Dim]:
        """Size of each output along the split axis."""
        axis = self.attrs.get("axis", 0)
        given = None if is_computed(self.node, 1) else constant_ints(self.node, 1, "split")
        if given is not None:
            return list(given)
        return [layouts.shape(t)[axis] for t in self.outputs]

    def shapes(self, known: KnownSizes) -> list[list[Dim | None] | None]:
        """The sizes that are listed, or equal ones if there are any."""
        source = known.shape(self.inputs[0])
        axis = self.attrs.get("axis", 0) % len(source)
        pieces: list[Dim | None] | None = self.attrs.get("split")
        if len(self.inputs) > 1 and self.inputs[1].name:
            listed = known.values(self.inputs[1])
            pieces = [None] * len(self.outputs) if listed is None else list(listed)
        elif pieces is None:
            pieces = [exact_quotient([source[axis]], [len(self.outputs)])] * len(self.outputs)
        return [[*source[:axis], size, *source[axis + 1 :]] for size in pieces]

    def values(self, known: KnownSizes) -> list[np.ndarray | None]:
        """The integers, part by part."""
        values = known.values(self.inputs[0])
        sizes = [s[0] for s in self.shapes(known) if s and isinstance(s[0], int)]
        if values is None or values.ndim != 1 or len(sizes) < len(self.outputs):
            return []
        return [*np.split(values, np.cumsum(sizes)[:-1].astype(int))]

    def picks(self, layouts: Layouts) -> Collection[int]:
        """The axis that is split."""
        return (self.attrs.get("axis", 0) % len(layouts.shape(self.inputs[0])),)

    def move(self, layouts: Layouts, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Split a tracked axis."""
        array = arrays[0]
        axis = self.attrs.get("axis", 0)
        if array.shape[axis] == 1:
            return [array] * len(self.outputs)
        sizes = self.pieces(layouts)
        if not is_static(sizes) or sum(sizes) != array.shape[axis]:  # type: ignore[arg-type]
            raise Unsupported("sizes are not known")
        return np.split(array, np.cumsum(sizes)[:-1].astype(int), axis)

    def shrink(self, cut: Removal) -> None:
        """Give the new sizes; leave out outputs without channels."""
        axis = self.attrs.get("axis", 0)
        source = self.inputs[0]
        axis %= len(cut.facts.shape(source))
        if axis not in cut.kept(source):
            return
        outputs, sizes = [], []
        for tensor in self.outputs:
            if not tensor.name or cut.facts.dead(tensor, cut.alive):
                continue
            mask = cut.kept(tensor).get(axis)
            size = cut.facts.shape(tensor)[axis] if mask is None else mask.sum()
            outputs.append(tensor)
            sizes.append(int(size))
        self.node.outputs = outputs
        self.attrs.pop("num_outputs", None)
        if cut.model.opset >= 13:
            cut.put(self.node, 1, np.array(sizes, np.int64))
        else:
            self.attrs["split"] = sizes


class Slice(Movement):
    """``Slice`` with constant bounds (https://onnx.ai/onnx/operators/onnx__Slice.html)."""

    def bounds(self, rank: int) -> dict[int, tuple[int, int, int]] | None:
        """(start, end, step) by axis; None when they are computed."""
        if any(is_computed(self.node, k) for k in range(1, 5)):
            return None
        starts, ends = constant_ints(self.node, 1, "starts"), constant_ints(self.node, 2, "ends")
        if starts is None or ends is None:
            raise Unsupported("bounds are not given")
        axes = constant_ints(self.node, 3, "axes") or list(range(len(starts)))
        steps = constant_ints(self.node, 4, "steps") or [1] * len(starts)
        return {a % rank: b for a, *b in zip(axes, starts, ends, steps, strict=True)}  # type: ignore[misc]

    def shapes(self, known: KnownSizes) -> list[list[Dim | None]]:
        """What is left, of sizes that are known and of others where that is a matter of course."""
        sizes: list[Dim | None] = list(known.shape(self.inputs[0]))
        bounds = self.bounds(len(sizes))
        if bounds is None:
            return []
        for axis, bound in bounds.items():
            size = sizes[axis]
            if isinstance(size, int):
                sizes[axis] = self.index(bound, size).size
            else:
                sizes[axis] = _sliced(size, *bound)
        return [sizes]

    def values(self, known: KnownSizes) -> list[np.ndarray | None]:
        """The integers within the bounds."""
        values = known.values(self.inputs[0])
        if values is None or values.ndim != 1:
            return []
        # There is only one axis, whether or not it is computed which.
        starts, ends = constant_ints(self.node, 1, "starts"), constant_ints(self.node, 2, "ends")
        steps = constant_ints(self.node, 4, "steps") or [1]
        if starts is None or ends is None:
            return []
        return [values[self.index((starts[0], ends[0], steps[0]), values.size)]]

    def index(self, bound: tuple[int, int, int], size: int) -> np.ndarray:
        """The positions taken from an axis of the given size."""
        start, end, step = bound
        if step < 0 and end < -size:
            end = -size - 1
        stop: int | None = end
        if step < 0 and end == -size - 1:
            stop = None
        return np.arange(size)[slice(start, stop, step)]

    def picks(self, layouts: Layouts) -> Collection[int]:
        """The axes that are sliced, if it is known how."""
        return set(self.bounds(len(layouts.shape(self.inputs[0]))) or ())

    def move(self, layouts: Layouts, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Slice tracked axes."""
        array = arrays[0]
        bounds = self.bounds(array.ndim)
        if bounds is None:
            given = constant_ints(self.node, 3, "axes")
            if given is None or any(array.shape[a] > 1 for a in given):
                raise Unsupported("bounds are computed")
            return [array]
        for axis, bound in bounds.items():
            if array.shape[axis] > 1:
                array = array.take(self.index(bound, array.shape[axis]), axis)
        return [array]

    def shrink(self, cut: Removal) -> None:
        """Slice at the new positions; a slice with a step becomes a ``Gather``."""
        source = self.inputs[0]
        shape = cut.facts.shape(source)
        kept = cut.kept(source)
        bounds = self.bounds(len(shape)) or {}
        changed = False
        for axis in bounds.keys() & kept.keys():
            mask = kept[axis]
            order = np.cumsum(mask) - 1
            index = self.index(bounds[axis], mask.size)
            index = order[index[mask[index]]]
            step = int(index[1] - index[0]) if index.size > 1 else 1
            changed = True
            if not (np.diff(index) == step).all():
                cut.gather_before(self.node, axis, index)
                bounds[axis] = (0, 2**31 - 1, 1)
                continue
            end = int(index[-1]) + (1 if step > 0 else -1)
            bounds[axis] = (int(index[0]), end if end >= 0 else -(2**31), step)
        if not changed:
            return
        axes = sorted(bounds)
        columns = [[bounds[a][k] for a in axes] for k in range(3)]
        if cut.model.opset >= 10:
            for index_, column in enumerate([columns[0], columns[1], axes, columns[2]], start=1):
                cut.put(self.node, index_, np.array(column, np.int64))
        else:
            self.node.attrs |= {"starts": columns[0], "ends": columns[1], "axes": axes}


def _sliced(size: Dim | None, start: int, end: int, step: int) -> Dim | None:
    """The size of a slice of a dynamic axis that is long enough not to end before it begins."""
    if step == -1 and start in (-1, _LAST) and end < -(2**31) + 2:
        return size
    if step < 1 or not 0 <= start <= _EDGE or not (-_EDGE <= end < 0 or end >= _LAST):
        return None
    # All of it, from the start on, up to the end or so many before it.
    return ceil_quotient(total([size, -start, end if end < 0 else 0]), step)


_LAST = 2**31 - 1
# So much may be cut off at either end of what is taken to be longer than that.
_EDGE = 64


class Gather(Movement):
    """``Gather`` with constant indices along a tracked axis.

    https://onnx.ai/onnx/operators/onnx__Gather.html
    """

    def indices(self, layouts: Layouts) -> np.ndarray:
        """The indices, none negative.

        Raises:
            Unsupported: they are computed, or the size of the axis is not static.
        """
        values = constant_input(self.node, 1)
        size = layouts.shape(self.inputs[0])[self.attrs.get("axis", 0)]
        if values is None or values.ndim > 1 or not isinstance(size, int) or values.size == 0:
            raise Unsupported("indices are not a constant vector")
        return np.where(values < 0, values + size, values)

    def values(self, known: KnownSizes) -> list[np.ndarray | None]:
        """The integers at these places."""
        values, indices = known.values(self.inputs[0]), known.values(self.inputs[1])
        if values is None or values.ndim != 1 or indices is None:
            return []
        if not all(isinstance(k, int) and -values.size <= k < values.size for k in indices.ravel()):
            return []
        return [np.asarray(values[indices.astype(np.int64)], object)]

    def picks(self, layouts: Layouts) -> Collection[int]:
        """The axis, if indices are constant."""
        axis = self.attrs.get("axis", 0) % len(layouts.shape(self.inputs[0]))
        return () if is_computed(self.node, 1) else (axis,)

    def move(self, layouts: Layouts, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Gather from the layout; a scalar index removes the axis."""
        axis = self.attrs.get("axis", 0)
        array = arrays[0]
        if array.shape[axis] == 1:
            values = constant_input(self.node, 1)
            rank = values.ndim if values is not None else len(layouts.shape(self.inputs[1]))
            if rank > 1:
                raise Unsupported("indices are not a vector")
            return [array.take(0, axis) if rank == 0 else array]
        indices = self.indices(layouts)
        return [array.take(indices if indices.ndim else int(indices), axis)]

    def shrink(self, cut: Removal) -> None:
        """Drop and renumber indices."""
        axis = self.attrs.get("axis", 0) % len(cut.facts.shape(self.inputs[0]))
        mask = cut.kept(self.inputs[0]).get(axis)
        if mask is None:
            return
        indices = self.indices(cut.facts.layouts)
        order = np.cumsum(mask) - 1
        if indices.ndim:
            indices = indices[mask[indices]]
        dtype = self.inputs[1].values.dtype
        cut.put(self.node, 1, np.asarray(order[indices], dtype))
