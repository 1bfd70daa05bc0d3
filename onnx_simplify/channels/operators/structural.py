"""Operators that move elements about without computing anything.

Each one is *executed on the layout array itself*: :meth:`Structural.move` takes arrays shaped like
the layouts of the inputs and returns one for each output.  The same method moves ids (the layout),
levels (constancy) and positions (to find which input element an output element came from).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.channels.operators.base import (
    Masks,
    Operator,
    attr_ints,
    constant_input,
    constant_ints,
    is_computed,
    is_static,
    min_to,
    reduce_to,
)
from onnx_simplify.channels.values import MAP, UNIFORM, VARYING
from onnx_simplify.graph.shapes import Dim, matching_blocks, resolve

if TYPE_CHECKING:
    from onnx_simplify.channels.analysis import Analysis
    from onnx_simplify.channels.cut import Cut

# Stands for an element that comes from no input (padding).
NEW = -1


class Structural(Operator):
    """Common rules; subclasses define :meth:`move` and, where need be, :meth:`shrink`."""

    data_inputs = 1
    """How many leading inputs carry elements; 0 means all of them."""

    def accounts_for(self) -> Collection[int]:
        """All inputs, see :meth:`level`."""
        return range(len(self.inputs))

    def _data(self) -> list[gs.Tensor]:
        return list(self.inputs[: self.data_inputs or None])

    def layout(self, layouts: Layouts) -> None:
        """Move the ids; axes along which they do not differ become untracked."""
        moved = self.move(layouts, [layouts(t) for t in self._data()])
        if len(moved) != len(self.outputs):
            raise Unsupported("unexpected number of outputs")
        for tensor, ids in zip(self.outputs, moved, strict=True):
            if not tensor.name:
                continue
            if ids.ndim != len(layouts.shape(tensor)) or 0 in ids.shape:
                raise Unsupported(f"'{tensor.name}' does not have the expected rank")
            for axis, size in enumerate(ids.shape):
                if size > 1 and layouts.shape(tensor)[axis] != size:
                    raise Unsupported(f"'{tensor.name}' does not have the expected shape")
        for tensor, ids in zip(self.outputs, moved, strict=True):
            if not tensor.name:
                continue
            new = ids == NEW
            if new.any():
                fresh = layouts.fresh(int(new.sum()))
                layouts.freeze(fresh)
                ids = ids.copy()
                ids[new] = fresh
            for axis, size in enumerate(ids.shape):
                if size > 1 and (ids == ids.take([0], axis)).all():
                    ids = ids.take([0], axis)
            layouts.set(tensor, ids)

    def level(self, analysis: Analysis) -> Masks:
        """Levels move with their elements."""
        levels = [analysis.level[t.name] for t in self._data()]
        if any(is_computed(self.node, k) for k in range(len(levels), len(self.inputs))):
            # Where elements go is computed: what is not the same everywhere may come to vary.
            levels = [np.where(level == MAP, VARYING, level) for level in levels]
        results: Masks = []
        moved = self.move(analysis.layouts, levels)
        for tensor, level in zip(self.outputs, moved, strict=True):
            if not tensor.name:
                results.append(None)
                continue
            level = np.where(level == NEW, UNIFORM, level)
            results.append(min_to(level, analysis.layouts.of[tensor.name].shape))
        return results

    def need(self, analysis: Analysis, outputs: Masks) -> Masks:
        """An element is needed where it went."""
        data = self._data()
        shapes = [analysis.layouts.of[t.name].shape for t in data]
        sizes = [int(np.prod(s)) for s in shapes]
        starts = np.cumsum([0, *sizes])
        positions = [
            np.arange(a, a + n).reshape(s) for a, n, s in zip(starts, sizes, shapes, strict=False)
        ]
        found = np.zeros(starts[-1] + 1, bool)
        moved = self.move(analysis.layouts, positions)
        for wanted, origin in zip(outputs, moved, strict=True):
            if wanted is not None:
                found[origin[np.broadcast_to(wanted, origin.shape)]] = True
        masks: Masks = analysis.all_of(self.inputs)
        for index, (start, size, shape) in enumerate(zip(starts, sizes, shapes, strict=False)):
            masks[index] = found[start : start + size].reshape(shape)
        return masks


    def passed(self, analysis: Analysis, values: np.ndarray) -> np.ndarray | None:
        """Elements move as they are."""
        if not self.reorders:
            return None
        (moved,) = self.move(analysis.layouts, [values])
        same = moved.shape == analysis.layouts.of[self.outputs[0].name].shape
        return moved if same else None


def _full(array: np.ndarray, shape: list[Dim], axes: list[int] | range) -> np.ndarray:
    """Repeat an array along untracked axes up to their static size."""
    target = list(array.shape)
    for axis in axes:
        size = shape[axis]
        if not isinstance(size, int):
            raise Unsupported("a size is not static")
        target[axis] = size
    return np.broadcast_to(array, target)


class Reshape(Structural):
    """``Reshape`` and ``Flatten``, as far as dimensions can be matched symbolically.

    https://onnx.ai/onnx/operators/onnx__Reshape.html
    """

    reorders = True

    def target(self, layouts: Layouts) -> list[Dim]:
        """The output's symbolic shape."""
        source = layouts.shape(self.inputs[0])
        values = constant_input(self.node, 1) if self.node.op == "Reshape" else None
        known = values is not None and not self.attrs.get("allowzero", 0)
        request = [int(v) for v in values] if values is not None and known else None
        return resolve(source, layouts.shape(self.outputs[0]), request)

    def blocks(self, layouts: Layouts) -> list[tuple[range, range]] | None:
        """As the sizes tell."""
        return matching_blocks(layouts.shape(self.inputs[0]), self.target(layouts))

    def move(self, layouts: Layouts, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Reshape block by block: axes of a block without tracked axes stay untracked."""
        if self.node.op == "Reshape" and not isinstance(self.inputs[1], gs.Constant):
            layouts.require_where(self.node)
        source, target = layouts.shape(self.inputs[0]), self.target(layouts)
        if 0 in source or 0 in target:
            raise Unsupported("an empty tensor")
        blocks = self.blocks(layouts)
        if blocks is None:
            raise Unsupported("cannot match the dimensions before and after")
        array = arrays[0]
        # Decided on the layout, so that all arrays of its shape are treated alike.
        shape: list[int] = []
        for before, after in blocks:
            if any(array.shape[a] > 1 for a in before):
                array = _full(array, source, before)
                if not all(isinstance(target[a], int) for a in after):
                    raise Unsupported("a size is not static")
                shape += [int(target[a]) for a in after]
            else:
                shape += [1] * len(after)
        return [array.reshape(shape)]

    def shrink(self, cut: Cut) -> None:
        """Put the new sizes into the target."""
        if self.node.op != "Reshape":
            return
        kept = cut.kept(self.outputs[0])
        if not kept and not cut.kept(self.inputs[0]):
            return
        sizes = {axis: int(mask.sum()) for axis, mask in kept.items()}
        request = constant_input(self.node, 1)
        if request is not None and not self.attrs.get("allowzero", 0):
            for axis, size in enumerate(self.target(cut.analysis.layouts)):
                if request[axis] == 0 and isinstance(size, int):
                    sizes.setdefault(axis, size)
        cut.set_entries(self.node, 1, sizes)


class Transpose(Structural):
    """``Transpose`` (https://onnx.ai/onnx/operators/onnx__Transpose.html)."""

    reorders = True

    def move(self, layouts: Layouts, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Permute the axes."""
        default = list(range(arrays[0].ndim))[::-1]
        return [arrays[0].transpose(attr_ints(self.node, "perm", default))]


class Squeeze(Structural):
    """``Squeeze`` and ``Unsqueeze``: insert or remove axes of size one."""

    reorders = True

    def move(self, layouts: Layouts, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Drop or add axes."""
        array = arrays[0]
        axes = constant_ints(self.node, 1, "axes")
        if self.node.op == "Unsqueeze":
            if axes is None:
                raise Unsupported("axes are not known")
            return [np.expand_dims(array, tuple(axes))]
        if axes is None:
            if len(self.inputs) > 1 or not is_static(layouts.shape(self.inputs[0])):
                raise Unsupported("axes are not known")
            axes = [a for a, s in enumerate(layouts.shape(self.inputs[0])) if s == 1]
        if any(array.shape[a] != 1 for a in axes):
            raise Unsupported("a squeezed axis has more than one element")
        return [array.squeeze(tuple(a % array.ndim for a in axes))]


class Expand(Structural):
    """``Expand``: repeats along axes of size one."""

    def move(self, layouts: Layouts, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Add leading axes; repeated axes are untracked."""
        rank = len(layouts.shape(self.outputs[0]))
        array = arrays[0]
        layouts.require_where(self.node)
        if rank < array.ndim:
            raise Unsupported("rank shrinks")
        return [array.reshape((1,) * (rank - array.ndim) + array.shape)]

    def shrink(self, cut: Cut) -> None:
        """Put the new sizes into the target (1 always fits)."""
        kept = cut.kept(self.outputs[0])
        lead = len(cut.analysis.shape(self.outputs[0])) - _length(self.node, 1, cut)
        cut.set_entries(self.node, 1, {axis - lead: 1 for axis in kept if axis >= lead})


def _length(node: gs.Node, index: int, cut: Cut) -> int:
    """Number of elements of a vector input."""
    values = constant_input(node, index)
    if values is not None:
        return int(values.size)
    size = cut.analysis.shape(node.inputs[index])[0]
    if not isinstance(size, int):
        raise Unsupported("length of a shape is not static")
    return size


class Tile(Structural):
    """``Tile`` (https://onnx.ai/onnx/operators/onnx__Tile.html)."""

    def move(self, layouts: Layouts, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Repeat tracked axes."""
        repeats = constant_ints(self.node, 1, "repeats")
        array = arrays[0]
        if repeats is None or len(repeats) != array.ndim or min(repeats) < 1:
            raise Unsupported("repeats are not known")
        return [np.tile(array, [r if s > 1 else 1 for r, s in zip(repeats, array.shape,
                                                                 strict=True)])]


class Concat(Structural):
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
            parts.append(_full(array, layouts.shape(tensor), [axis]))
        common = np.broadcast_shapes(*(p.shape[:axis] + (1,) + p.shape[axis + 1 :] for p in parts))
        parts = [
            np.broadcast_to(p, common[:axis] + (p.shape[axis],) + common[axis + 1 :])
            for p in parts
        ]
        return np.concatenate(parts, axis)

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

    def level(self, analysis: Analysis) -> Masks:
        """Along an untracked axis the operands may hold different constants."""
        if self._tracked(analysis.layouts):
            return super().level(analysis)
        level = np.full(analysis.layouts.of[self.outputs[0].name].shape, MAP, np.int8)
        for tensor in self.inputs:
            level = np.minimum(level, analysis.level[tensor.name])
        axis = self.attrs["axis"]
        if not isinstance(analysis.shape(self.outputs[0])[axis], int):
            zero = np.ones(level.shape, bool)
            for tensor in self.inputs:
                zero &= analysis.zero(tensor, analysis.layouts.of[tensor.name].shape)
            level = np.where(zero & (level > VARYING), UNIFORM, VARYING)
        return [level]

    def wants_values(self, analysis: Analysis) -> list[int]:
        """Along a dynamic axis only zeros stay constant."""
        if self._tracked(analysis.layouts):
            return []
        return list(range(len(self.inputs)))

    def need(self, analysis: Analysis, outputs: Masks) -> Masks:
        """What is needed of the result is needed of all operands along untracked axes."""
        if self._tracked(analysis.layouts):
            return super().need(analysis, outputs)
        wanted = outputs[0]
        assert wanted is not None
        return [reduce_to(wanted, analysis.layouts.of[t.name].shape) for t in self.inputs]

    def shrink(self, cut: Cut) -> None:
        """Leave out inputs without channels."""
        keep = [t for t in self.inputs if not cut.analysis.dead(t, cut.alive)]
        if len(keep) < len(self.inputs):
            self.node.inputs = keep


class Split(Structural):
    """``Split`` with known sizes (https://onnx.ai/onnx/operators/onnx__Split.html)."""

    def pieces(self, layouts: Layouts) -> list[Dim]:
        """Size of each output along the split axis."""
        axis = self.attrs.get("axis", 0)
        given = None if is_computed(self.node, 1) else constant_ints(self.node, 1, "split")
        if given is not None:
            return list(given)
        return [layouts.shape(t)[axis] for t in self.outputs]

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

    def shrink(self, cut: Cut) -> None:
        """Give the new sizes; leave out outputs without channels."""
        axis = self.attrs.get("axis", 0)
        source = self.inputs[0]
        axis %= len(cut.analysis.shape(source))
        if axis not in cut.kept(source):
            return
        outputs, sizes = [], []
        for tensor in self.outputs:
            if not tensor.name or cut.analysis.dead(tensor, cut.alive):
                continue
            mask = cut.kept(tensor).get(axis)
            size = cut.analysis.shape(tensor)[axis] if mask is None else mask.sum()
            outputs.append(tensor)
            sizes.append(int(size))
        self.node.outputs = outputs
        self.attrs.pop("num_outputs", None)
        if cut.model.opset >= 13:
            cut.put(self.node, 1, np.array(sizes, np.int64))
        else:
            self.attrs["split"] = sizes


class Slice(Structural):
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

    def shrink(self, cut: Cut) -> None:
        """Slice at the new positions; a slice with a step becomes a ``Gather``."""
        source = self.inputs[0]
        shape = cut.analysis.shape(source)
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


class Gather(Structural):
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

    def shrink(self, cut: Cut) -> None:
        """Drop and renumber indices."""
        axis = self.attrs.get("axis", 0) % len(cut.analysis.shape(self.inputs[0]))
        mask = cut.kept(self.inputs[0]).get(axis)
        if mask is None:
            return
        indices = self.indices(cut.analysis.layouts)
        order = np.cumsum(mask) - 1
        if indices.ndim:
            indices = indices[mask[indices]]
        dtype = self.inputs[1].values.dtype
        cut.put(self.node, 1, np.asarray(order[indices], dtype))


class SpaceToDepth(Structural):
    """``SpaceToDepth``: every channel is spread over ``blocksize**2`` new ones.

    https://onnx.ai/onnx/operators/onnx__SpaceToDepth.html
    """

    def move(self, layouts: Layouts, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Repeat the channels."""
        array = arrays[0]
        if array.shape[1] == 1 and layouts.shape(self.inputs[0])[1] != 1:
            return [array]
        if array.size > array.shape[1]:
            raise Unsupported("spatial axes are tracked")
        return [np.tile(array, (1, int(self.attrs["blocksize"]) ** 2, 1, 1))]


class DepthToSpace(Operator):
    """``DepthToSpace``: ``blocksize**2`` channels are interleaved into one.

    https://onnx.ai/onnx/operators/onnx__DepthToSpace.html
    """

    def _grouped(self, array: np.ndarray) -> np.ndarray:
        """Channels as ``(channel of the output, its parts)``."""
        count = int(self.attrs["blocksize"]) ** 2
        flat = array.ravel()
        if self.attrs.get("mode", "DCR") == "CRD":
            return flat.reshape(-1, count)
        return flat.reshape(count, -1).T

    def layout(self, layouts: Layouts) -> None:
        """The parts of a channel live and die together."""
        ids = layouts(self.inputs[0])
        if ids.size > 1 and ids.shape[1] != ids.size:
            raise Unsupported("spatial axes are tracked")
        if ids.size > 1:
            parts = self._grouped(ids)
            layouts.equate(parts, parts[:, :1])
            ids = parts[:, 0].reshape(1, -1, 1, 1)
        layouts.set(self.outputs[0], ids)

    def level(self, analysis: Analysis) -> Masks:
        """Constant parts make a pattern in space."""
        level = analysis.level[self.inputs[0].name]
        if level.size > 1:
            level = self._grouped(level).min(axis=1).reshape(1, -1, 1, 1)
        zero = analysis.zero(self.inputs[0], analysis.layouts.of[self.inputs[0].name].shape)
        if zero.size > 1:
            zero = self._grouped(zero).all(axis=1).reshape(1, -1, 1, 1)
        shape = analysis.shape(self.inputs[0])
        worst = MAP if is_static(shape[2:]) else VARYING
        return [np.where(zero & (level > VARYING), UNIFORM, np.minimum(level, worst))]

    def wants_values(self, analysis: Analysis) -> list[int]:
        """Zeros stay uniform."""
        return [0]

    def need(self, analysis: Analysis, outputs: Masks) -> Masks:
        """All parts of a needed channel."""
        wanted = outputs[0]
        assert wanted is not None
        shape = analysis.layouts.of[self.inputs[0].name].shape
        if int(np.prod(shape)) == 1:
            return [np.asarray(wanted.any()).reshape(shape)]
        count = int(self.attrs["blocksize"]) ** 2
        flat = np.broadcast_to(wanted.ravel(), shape[1] // count)
        if self.attrs.get("mode", "DCR") == "CRD":
            return [np.repeat(flat, count).reshape(shape)]
        return [np.tile(flat, count).reshape(shape)]
