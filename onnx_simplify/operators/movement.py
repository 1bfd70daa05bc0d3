"""Operators that move elements about without computing anything.

Each one is *executed on the layout array itself*: :meth:`Movement.move` takes arrays shaped like
the layouts of the inputs and returns one for each output.  The same method moves ids (the layout),
levels (constancy) and positions (to find which input element an output element came from).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.channels.values import MAP, UNIFORM, VARYING, min_to
from onnx_simplify.graph.expressions import Dim, exact_quotient, floor_quotient, product
from onnx_simplify.graph.shapes import matching_blocks
from onnx_simplify.operators.base import Masks, Operator
from onnx_simplify.operators.interfaces import KnownFacts, KnownSizes, Removal
from onnx_simplify.operators.nodes import (
    LONGEST,
    attr_ints,
    constant_input,
    constant_ints,
    is_computed,
    is_static,
)

# Stands for an element that comes from no input (padding).
NEW = -1


class Movement(Operator):
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

    def level(self, facts: KnownFacts) -> Masks:
        """Levels move with their elements."""
        levels = [facts.level[t.name] for t in self._data()]
        if any(is_computed(self.node, k) for k in range(len(levels), len(self.inputs))):
            # Where elements go is computed: what is not the same everywhere may come to vary.
            levels = [np.where(level == MAP, VARYING, level) for level in levels]
        results: Masks = []
        moved = self.move(facts.layouts, levels)
        for tensor, level in zip(self.outputs, moved, strict=True):
            if not tensor.name:
                results.append(None)
                continue
            level = np.where(level == NEW, UNIFORM, level)
            results.append(min_to(level, facts.layouts.of[tensor.name].shape))
        return results

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """An element is needed where it went."""
        data = self._data()
        shapes = [facts.layouts.of[t.name].shape for t in data]
        sizes = [int(np.prod(s)) for s in shapes]
        starts = np.cumsum([0, *sizes])
        positions = [
            np.arange(a, a + n).reshape(s) for a, n, s in zip(starts, sizes, shapes, strict=False)
        ]
        found = np.zeros(starts[-1] + 1, bool)
        moved = self.move(facts.layouts, positions)
        for wanted, origin in zip(outputs, moved, strict=True):
            if wanted is not None:
                found[origin[np.broadcast_to(wanted, origin.shape)]] = True
        masks: Masks = facts.all_of(self.inputs)
        for index, (start, size, shape) in enumerate(zip(starts, sizes, shapes, strict=False)):
            masks[index] = found[start : start + size].reshape(shape)
        return masks

    def passed(self, facts: KnownFacts, values: np.ndarray) -> np.ndarray | None:
        """Elements move as they are."""
        if not self.reorders:
            return None
        (moved,) = self.move(facts.layouts, [values])
        same = moved.shape == facts.layouts.of[self.outputs[0].name].shape
        return moved if same else None


def repeated(array: np.ndarray, shape: list[Dim], axes: list[int] | range) -> np.ndarray:
    """Repeat an array along untracked axes up to their static size."""
    target = list(array.shape)
    for axis in axes:
        size = shape[axis]
        if not isinstance(size, int):
            raise Unsupported("a size is not static")
        target[axis] = size
    return np.broadcast_to(array, target)


class Reshape(Movement):
    """``Reshape`` and ``Flatten``, as far as dimensions can be matched symbolically.

    https://onnx.ai/onnx/operators/onnx__Reshape.html
    """

    reorders = True

    def shapes(self, known: KnownSizes) -> list[list[Dim | None]]:
        """The target: zero copies a size, and -1, or one that is not known, is what is left."""
        source = known.shape(self.inputs[0])
        if self.node.op == "Flatten":
            axis = int(self.attrs.get("axis", 1))
            axis += len(source) if axis < 0 else 0
            return [[product(source[:axis]), product(source[axis:])]]
        request = known.values(self.inputs[1])
        if request is None or request.ndim != 1:
            return []
        copies = not self.attrs.get("allowzero", 0)
        target: list[Dim | None] = []
        for axis, size in enumerate(request):
            if size == 0 and copies:
                target.append(source[axis] if axis < len(source) else None)
            else:
                target.append(None if size == -1 else size)
        if target.count(None) == 1:
            rest = [size for size in target if size is not None]
            target[target.index(None)] = exact_quotient(source, rest)
        return [target]

    def values(self, known: KnownSizes) -> list[np.ndarray | None]:
        """The same integers."""
        values = known.values(self.inputs[0])
        if values is None:
            return []
        (shape,) = self.shapes(known) or ([None],)
        sizes = [size for size in shape if isinstance(size, int)]
        fits = len(sizes) == len(shape) and np.prod(sizes) == values.size
        return [values.reshape(sizes)] if fits else []

    def blocks(self, layouts: Layouts) -> list[tuple[range, range]] | None:
        """As the sizes tell."""
        return matching_blocks(*(layouts.shape(t) for t in (self.inputs[0], self.outputs[0])))

    def move(self, layouts: Layouts, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Reshape block by block: axes of a block without tracked axes stay untracked."""
        if self.node.op == "Reshape" and not isinstance(self.inputs[1], gs.Constant):
            layouts.require_where(self.node)
        source, target = (layouts.shape(t) for t in (self.inputs[0], self.outputs[0]))
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
                array = repeated(array, source, before)
                if not all(isinstance(target[a], int) for a in after):
                    raise Unsupported("a size is not static")
                shape += [int(target[a]) for a in after]
            else:
                shape += [1] * len(after)
        return [array.reshape(shape)]

    def shrink(self, cut: Removal) -> None:
        """Put the new sizes into the target."""
        if self.node.op != "Reshape":
            return
        kept = cut.kept(self.outputs[0])
        if not kept and not cut.kept(self.inputs[0]):
            return
        sizes = {axis: int(mask.sum()) for axis, mask in kept.items()}
        request = constant_input(self.node, 1)
        if request is not None and not self.attrs.get("allowzero", 0):
            for axis, size in enumerate(cut.facts.shape(self.outputs[0])):
                if request[axis] == 0 and isinstance(size, int):
                    sizes.setdefault(axis, size)
        cut.set_entries(self.node, 1, sizes)


class Transpose(Movement):
    """``Transpose`` (https://onnx.ai/onnx/operators/onnx__Transpose.html)."""

    reorders = True

    def move(self, layouts: Layouts, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Permute the axes."""
        default = list(range(arrays[0].ndim))[::-1]
        return [arrays[0].transpose(attr_ints(self.node, "perm", default))]


class Squeeze(Movement):
    """``Squeeze`` and ``Unsqueeze``: insert or remove axes of size one."""

    reorders = True

    def values(self, known: KnownSizes) -> list[np.ndarray | None]:
        """The same integers."""
        values, axes = known.values(self.inputs[0]), constant_ints(self.node, 1, "axes")
        if values is None:
            return []
        if self.node.op == "Unsqueeze":
            return [] if axes is None else [np.expand_dims(values, tuple(axes))]
        single = axes is None or all(values.shape[a] == 1 for a in axes)
        return [values.squeeze(None if axes is None else tuple(axes))] if single else []

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


class Expand(Movement):
    """``Expand``: repeats along axes of size one."""

    def shapes(self, known: KnownSizes) -> list[list[Dim | None]]:
        """Both broadcast against each other."""
        source, request = known.shape(self.inputs[0]), known.values(self.inputs[1])
        if request is None or request.ndim != 1:
            return []
        rank = max(len(source), request.size)
        pairs = zip(
            [1] * (rank - len(source)) + source,
            [1] * (rank - request.size) + list(request),
            strict=True,
        )
        return [[a if b in (1, a) else b if a == 1 else None for a, b in pairs]]

    def values(self, known: KnownSizes) -> list[np.ndarray | None]:
        """The integers, repeated."""
        values = known.values(self.inputs[0])
        (shape,) = self.shapes(known) or ([None],)
        sizes = [size for size in shape if isinstance(size, int)]
        if values is None or len(sizes) < len(shape) or np.prod(sizes) > LONGEST:
            return []
        return [np.broadcast_to(values, sizes)]

    def move(self, layouts: Layouts, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Add leading axes; repeated axes are untracked."""
        rank = len(layouts.shape(self.outputs[0]))
        array = arrays[0]
        layouts.require_where(self.node)
        if rank < array.ndim:
            raise Unsupported("rank shrinks")
        return [array.reshape((1,) * (rank - array.ndim) + array.shape)]

    def shrink(self, cut: Removal) -> None:
        """Put the new sizes into the target (1 always fits)."""
        kept = cut.kept(self.outputs[0])
        lead = len(cut.facts.shape(self.outputs[0])) - _length(self.node, 1, cut)
        cut.set_entries(self.node, 1, {axis - lead: 1 for axis in kept if axis >= lead})


def _length(node: gs.Node, index: int, cut: Removal) -> int:
    """Number of elements of a vector input."""
    values = constant_input(node, index)
    if values is not None:
        return int(values.size)
    size = cut.facts.shape(node.inputs[index])[0]
    if not isinstance(size, int):
        raise Unsupported("length of a shape is not static")
    return size


class Tile(Movement):
    """``Tile`` (https://onnx.ai/onnx/operators/onnx__Tile.html)."""

    def shapes(self, known: KnownSizes) -> list[list[Dim | None]]:
        """Products."""
        source = known.shape(self.inputs[0])
        repeats = known.values(self.inputs[1]) if len(self.inputs) == 2 else None
        if repeats is None or repeats.shape != (len(source),):
            return []
        return [[product(pair) for pair in zip(source, repeats, strict=True)]]

    def move(self, layouts: Layouts, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Repeat tracked axes."""
        repeats = constant_ints(self.node, 1, "repeats")
        array = arrays[0]
        if repeats is None or len(repeats) != array.ndim or min(repeats) < 1:
            raise Unsupported("repeats are not known")
        return [
            np.tile(array, [r if s > 1 else 1 for r, s in zip(repeats, array.shape, strict=True)])
        ]


class SpaceToDepth(Movement):
    """``SpaceToDepth``: every channel is spread over ``blocksize**2`` new ones.

    https://onnx.ai/onnx/operators/onnx__SpaceToDepth.html
    """

    def shapes(self, known: KnownSizes) -> list[list[Dim | None]]:
        """Blocks become channels."""
        batch, channels, *space = known.shape(self.inputs[0])
        size = int(self.attrs["blocksize"])
        smaller = [exact_quotient([s], [size]) or floor_quotient(s, size) for s in space]
        return [[batch, product([channels, size * size]), *smaller]]

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

    def shapes(self, known: KnownSizes) -> list[list[Dim | None]]:
        """Channels become blocks."""
        batch, channels, *space = known.shape(self.inputs[0])
        size = int(self.attrs["blocksize"])
        larger = [product([s, size]) for s in space]
        return [[batch, exact_quotient([channels], [size * size]), *larger]]

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

    def level(self, facts: KnownFacts) -> Masks:
        """Constant parts make a pattern in space, unless they are all the same number."""
        source = self.inputs[0]
        level = facts.level[source.name]
        if level.size > 1:
            level = self._grouped(level).min(axis=1).reshape(1, -1, 1, 1)
        same = facts.zero(source, facts.layouts.of[source.name].shape)
        if same.size > 1:
            values = self._grouped(facts.scalar(source))
            same = self._grouped(same).all(axis=1) | (values == values[:, :1]).all(axis=1)
            same = same.reshape(1, -1, 1, 1)
        worst = MAP if is_static(facts.shape(source)[2:]) else VARYING
        return [np.where(same & (level > VARYING), UNIFORM, np.minimum(level, worst))]

    def wants_values(self, facts: KnownFacts) -> list[int]:
        """Equal numbers stay uniform."""
        return [0]

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """All parts of a needed channel."""
        wanted = outputs[0]
        assert wanted is not None
        shape = facts.layouts.of[self.inputs[0].name].shape
        if int(np.prod(shape)) == 1:
            return [np.asarray(wanted.any()).reshape(shape)]
        count = int(self.attrs["blocksize"]) ** 2
        flat = np.broadcast_to(wanted.ravel(), shape[1] // count)
        if self.attrs.get("mode", "DCR") == "CRD":
            return [np.repeat(flat, count).reshape(shape)]
        return [np.tile(flat, count).reshape(shape)]
