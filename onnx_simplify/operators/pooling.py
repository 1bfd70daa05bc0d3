"""Operators that combine the positions of one channel and leave channels apart."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fractions import Fraction

import numpy as np

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.channels.values import MAP, UNIFORM, VARYING, min_to
from onnx_simplify.graph.expressions import Dim, floor_quotient, product, total
from onnx_simplify.operators.base import Masks, Operator
from onnx_simplify.operators.interfaces import KnownFacts, KnownSizes, Removal
from onnx_simplify.operators.nodes import (
    attr_ints,
    constant_input,
    constant_ints,
    has_input,
    is_computed,
    is_static,
    windowed,
)


class Spatial(Operator):
    """Common rules: channels pass through on axis 1; the other axes must be untracked.

    Subclasses say what happens to a constant: :meth:`keeps_uniform`, and on which axes the result
    depends on the position or the size (:meth:`spread_axes`).
    """

    reorders = True
    channelwise = True
    averages = True

    def keeps_uniform(self, facts: KnownFacts) -> bool:
        """Whether a channel with one value everywhere comes out with one value everywhere."""
        return True

    def spread_axes(self, facts: KnownFacts) -> list[int]:
        """Axes along which constants come out as maps if :meth:`keeps_uniform` is false."""
        return list(range(2, len(facts.shape(self.inputs[0]))))

    def layout(self, layouts: Layouts) -> None:
        """The output has the channels of the input."""
        if sum(bool(t.name) for t in self.outputs) > 1:
            raise Unsupported("a second output holds positions")
        source = layouts(self.inputs[0])
        if source.ndim < 3 or len(layouts.shape(self.outputs[0])) != source.ndim:
            raise Unsupported("unexpected rank")
        channels = layouts.collapse(source, [a for a in range(source.ndim) if a != 1])
        layouts.set(self.outputs[0], channels)

    def level(self, facts: KnownFacts) -> Masks:
        """Constants stay constant; as maps where positions differ and sizes are static."""
        source = self.inputs[0]
        level = min_to(facts.level[source.name], facts.layouts.of[self.outputs[0].name].shape)
        output = facts.shape(self.outputs[0])
        if not is_static(output[2:]):
            level = np.where(level == MAP, VARYING, level)
        if not self.keeps_uniform(facts):
            shapes = facts.shape(source), facts.shape(self.outputs[0])
            axes = self.spread_axes(facts)
            static = all(is_static(shape, axes) for shape in shapes)
            zero = facts.zero(source, facts.layouts.of[source.name].shape)
            merged = tuple(a for a, size in enumerate(level.shape) if size == 1)
            zero = np.asarray(zero.all(axis=merged, keepdims=True)) & (level > VARYING)
            spread = np.minimum(level, MAP if static else VARYING)
            level = np.where(zero & self.keeps_zero(), level, spread)
        return [level]

    def keeps_zero(self) -> bool:
        """Whether a zero channel comes out as zero."""
        return True

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """Channel by channel."""
        assert outputs[0] is not None
        shape = facts.layouts.of[self.inputs[0].name].shape
        return [np.broadcast_to(outputs[0], shape), *facts.all_of(self.inputs[1:])]

    def passed(self, facts: KnownFacts, values: np.ndarray) -> np.ndarray | None:
        """Means, maxima and interpolations of equal numbers are that number."""
        same = values.shape == facts.layouts.of[self.outputs[0].name].shape
        same &= self.node.op != "LpPool" and self.keeps_uniform(facts)
        return values if same else None

    def wants_values(self, facts: KnownFacts) -> list[int]:
        """Zeros are special where padding brings in zeros."""
        return [] if self.keeps_uniform(facts) else [0]


def settled(level: np.ndarray, sizes: Sequence[Dim], reduced: Collection[int]) -> np.ndarray:
    """Levels after a reduction, where a map becomes a number.

    Maps differ along axes of static size only. If none of more than one position is left, there
    is one number for each channel, the same for every size of the others.

    Args:
        level: what is said of the result, of the input's rank.
        sizes: sizes of the input.
        reduced: the axes that are reduced.
    """
    left = [
        size
        for axis, size in enumerate(sizes)
        if axis not in reduced and level.shape[axis] == 1 and isinstance(size, int)
    ]
    return level if any(size > 1 for size in left) else np.where(level == MAP, UNIFORM, level)


class GlobalPool(Spatial):
    """``GlobalAveragePool`` and ``GlobalMaxPool``."""

    def level(self, facts: KnownFacts) -> Masks:
        """Constants stay constant; a map becomes a number."""
        (level,) = super().level(facts)
        assert level is not None
        sizes = facts.shape(self.inputs[0])
        return [settled(level, sizes, range(2, len(sizes)))]


class Window(Spatial):
    """Pooling over a sliding window."""

    def shapes(self, known: KnownSizes) -> list[list[Dim | None]]:
        """As many positions as the window has."""
        source = known.shape(self.inputs[0])
        kernel = attr_ints(self.node, "kernel_shape", [])
        if self.attrs.get("ceil_mode", 0):
            return [[*source[:2], *[None] * len(source[2:])]]
        return [[*source[:2], *windowed(self.node, source[2:], kernel)]]


class MaxPool(Window):
    """``MaxPool``: padding never wins (https://onnx.ai/onnx/operators/onnx__MaxPool.html)."""


class AveragePool(Window):
    """``AveragePool`` (also ``LpPool``): padding may count as zeros.

    https://onnx.ai/onnx/operators/onnx__AveragePool.html
    """

    def keeps_uniform(self, facts: KnownFacts) -> bool:
        """Unless zeros of the padding take part."""
        padded = any(attr_ints(self.node, "pads", []))
        padded |= self.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        ragged = padded or bool(self.attrs.get("ceil_mode", 0))
        if self.node.op == "LpPool":
            return not ragged
        return not (ragged and self.attrs.get("count_include_pad", 0))


class Resize(Spatial):
    """``Resize`` and ``Upsample`` along spatial axes.

    https://onnx.ai/onnx/operators/onnx__Resize.html
    """

    def shapes(self, known: KnownSizes) -> list[list[Dim | None]]:
        """Sizes that are listed, or products with the scales, rounded down."""
        source = known.shape(self.inputs[0])
        if "axes" in self.attrs or self._crops():
            return []
        if has_input(self.node, 3):
            listed = known.values(self.inputs[3])
            stretch = self.attrs.get("keep_aspect_ratio_policy", "stretch") == "stretch"
            return [] if listed is None or not stretch else [list(listed)]
        index = 2 if len(self.inputs) > 2 else 1
        scales = constant_input(self.node, index)
        if scales is None or scales.size != len(source):
            return []
        return [[_scaled(size, float(scale)) for size, scale in zip(source, scales, strict=True)]]

    def layout(self, layouts: Layouts) -> None:
        """The channel axis must keep its size."""
        if "axes" in self.attrs:
            raise Unsupported("axes attribute")
        before, after = layouts.shape(self.inputs[0]), layouts.shape(self.outputs[0])
        if len(before) < 3 or before[1] != after[1] or not isinstance(before[1], int):
            raise Unsupported("number of channels changes")
        super().layout(layouts)

    def accounts_for(self) -> Collection[int]:
        """Scales and sizes; the region only where it is not looked at."""
        # Before version 11 there was no region, and scales came second.
        return [k for k in range(len(self.inputs)) if k != 1 or not self._crops()]

    def level(self, facts: KnownFacts) -> Masks:
        """What differs from place to place varies with scales that are computed."""
        (level,) = super().level(facts)
        if level is not None and any(is_computed(self.node, k) for k in range(1, len(self.inputs))):
            level = np.where(level == MAP, VARYING, level)
        return [level]

    def _crops(self) -> bool:
        """Whether there is a region, outside of which there is another value."""
        mode = self.attrs.get("coordinate_transformation_mode")
        return bool(mode == "tf_crop_and_resize")

    def keeps_uniform(self, facts: KnownFacts) -> bool:
        """Interpolation weights sum to one, but not beyond the border of a crop."""
        return not self._crops()

    def keeps_zero(self) -> bool:
        """The value outside a crop need not be zero."""
        return False

    def shrink(self, cut: Removal) -> None:
        """Give the new number of channels if sizes are listed."""
        kept = cut.kept(self.outputs[0])
        if 1 in kept and has_input(self.node, 3):
            cut.set_entries(self.node, 3, {1: int(kept[1].sum())})


def _scaled(size: Dim, scale: float) -> Dim | None:
    """A size times a scale, rounded down, as float32 gives it for scales that are exact in it."""
    if isinstance(size, int):
        return None
    exact = Fraction(scale)
    if exact.denominator > 64 or exact.numerator > 64 or exact <= 0:
        return None
    return floor_quotient(product([size, exact.numerator]), exact.denominator)


class Sampled(Spatial):
    """``GridSample``, ``RoiAlign`` and ``MaxRoiPool``: looked up at places that are computed.

    https://onnx.ai/onnx/operators/onnx__GridSample.html
    https://onnx.ai/onnx/operators/onnx__RoiAlign.html
    """

    def accounts_for(self) -> Collection[int]:
        """The places."""
        return range(len(self.inputs))

    def keeps_uniform(self, facts: KnownFacts) -> bool:
        """Beyond the border there are zeros, unless what is at the border goes on."""
        return self.attrs.get("padding_mode", "zeros") != "zeros"

    def level(self, facts: KnownFacts) -> Masks:
        """What differs from place to place varies with places that are computed."""
        (level,) = super().level(facts)
        if level is not None and any(is_computed(self.node, k) for k in range(1, len(self.inputs))):
            level = np.where(level == MAP, VARYING, level)
        return [level]


class Pad(Operator):
    """``Pad`` with known amounts (https://onnx.ai/onnx/operators/onnx__Pad.html)."""

    reorders = True

    def accounts_for(self) -> Collection[int]:
        """The value; amounts are constant, or the rules do not apply."""
        return (0, 2)

    def shapes(self, known: KnownSizes) -> list[list[Dim | None]]:
        """What is there, before and behind."""
        source = known.shape(self.inputs[0])
        pairs = self.amounts(len(source))
        return [[total([size, *pair]) for size, pair in zip(source, pairs, strict=True)]]

    def amounts(self, rank: int) -> list[tuple[int, int]]:
        """(before, after) by axis of a tensor of this rank.

        Raises:
            Unsupported: they are computed.
        """
        pads = constant_ints(self.node, 1, "pads")
        given = constant_ints(self.node, 3, "axes")
        axes = list(range(rank)) if given is None else [a % rank for a in given]
        if pads is None or len(pads) != 2 * len(axes):
            raise Unsupported("amounts are not known")
        found = [(0, 0)] * rank
        for axis, before, after in zip(axes, pads, pads[len(axes) :], strict=False):
            found[axis] = (before, after)
        return found

    def padding(self, rank: int) -> list[tuple[int, int]] | None:
        """The amounts, where zeros are added."""
        plain = self.attrs.get("mode", "constant") == "constant"
        return self.amounts(rank) if plain and self._adds_zeros() else None

    def _adds_zeros(self) -> bool:
        """Whether the value is known to be zero."""
        if not has_input(self.node, 2):
            return bool(self.attrs.get("value", 0.0) == 0)
        value = constant_input(self.node, 2)
        return value is not None and value.size == 1 and bool(value.ravel()[0] == 0)

    def layout(self, layouts: Layouts) -> None:
        """Channels pass through; a padded channel axis gets new ones, never removed."""
        source = layouts(self.inputs[0])
        amounts = self.amounts(source.ndim)
        tracked = [a for a, s in enumerate(source.shape) if s > 1]
        width = [amounts[a] if a in tracked else (0, 0) for a in range(source.ndim)]
        if any(v < 0 for pair in width for v in pair):
            raise Unsupported("channels are cropped")
        if any(v for pair in width for v in pair):
            if self.attrs.get("mode", "constant") != "constant":
                raise Unsupported("channels are mirrored")
            ids = np.pad(source, width, constant_values=-1)
            new = ids == -1
            fresh = layouts.fresh(int(new.sum()))
            layouts.freeze(fresh)
            ids[new] = fresh
            source = ids
        layouts.set(self.outputs[0], source)

    def level(self, facts: KnownFacts) -> Masks:
        """Padding with another value makes a map of a constant; mirroring does not."""
        source = self.inputs[0]
        level = facts.level[source.name]
        shape = facts.layouts.of[self.outputs[0].name].shape
        amounts = self.amounts(level.ndim)
        # What is cut off changes nothing.
        axes = [a for a, s in enumerate(level.shape) if s == 1 and max(amounts[a]) > 0]
        known = not is_computed(self.node, 2)
        if not known and axes:
            level = np.full(level.shape, VARYING, np.int8)
        elif self.attrs.get("mode", "constant") == "constant" and axes:
            sizes = facts.shape(source), facts.shape(self.outputs[0])
            static = all(is_static(s, axes) for s in sizes)
            same = np.zeros(level.shape, bool)
            if self._adds_zeros():
                same = facts.zero(source, level.shape) & (level > VARYING)
            level = np.where(same, level, np.minimum(level, MAP if static else VARYING))
        if level.shape != shape:
            width = [p if s > 1 else (0, 0) for p, s in zip(amounts, level.shape, strict=True)]
            level = np.pad(level, width, constant_values=UNIFORM if known else VARYING)
        return [level]

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """Channel by channel."""
        wanted = outputs[0]
        assert wanted is not None
        source = self.inputs[0]
        shape = facts.layouts.of[source.name].shape
        amounts = self.amounts(len(shape))
        if wanted.shape != shape:
            wanted = wanted[
                tuple(
                    slice(before, before + size) if size > 1 else slice(None)
                    for (before, _), size in zip(amounts, shape, strict=True)
                )
            ]
        return [wanted, *facts.all_of(self.inputs[1:])]

    def wants_values(self, facts: KnownFacts) -> list[int]:
        """Zeros padded with zeros stay uniform."""
        return [0]


class Reduce(Operator):
    """``ReduceMean``, ``ReduceSum``, ... over axes that hold no channels.

    https://onnx.ai/onnx/operators/onnx__ReduceMean.html
    """

    reorders = True
    averages = True

    def axes(self, layouts: Layouts) -> list[int]:
        """The reduced axes.

        Raises:
            Unsupported: they are computed.
        """
        rank = len(layouts.shape(self.inputs[0]))
        axes = constant_ints(self.node, 1, "axes")
        if not axes:
            return [] if self.attrs.get("noop_with_empty_axes", 0) else list(range(rank))
        return [a % rank for a in axes]

    def values(self, known: KnownSizes) -> list[np.ndarray | None]:
        """The number of elements of a shape."""
        values = known.values(self.inputs[0])
        if self.node.op not in ("ReduceProd", "ReduceSum") or values is None or values.ndim != 1:
            return []
        rule = product if self.node.op == "ReduceProd" else total
        rank = int(self.attrs.get("keepdims", 1))
        if constant_ints(self.node, 1, "axes") in (None, [0], [-1]) and values.size:
            return [np.array(rule(values), object).reshape([1] * rank)]
        return []

    def layout(self, layouts: Layouts) -> None:
        """Reduced axes disappear or have size one."""
        source = layouts(self.inputs[0])
        axes = self.axes(layouts)
        if any(source.shape[a] > 1 for a in axes):
            raise Unsupported("reduces over channels")
        layouts.set(self.outputs[0], self._fit(layouts, source))

    def _fit(self, layouts: Layouts, array: np.ndarray) -> np.ndarray:
        if self.attrs.get("keepdims", 1):
            return array
        return array.squeeze(tuple(self.axes(layouts)))

    def level(self, facts: KnownFacts) -> Masks:
        """Means and extrema keep constants; sums count positions, so sizes must be static."""
        level = facts.level[self.inputs[0].name]
        axes = self.axes(facts.layouts)
        free = self.node.op in ("ReduceMean", "ReduceMax", "ReduceMin")
        if not free and not is_static(facts.shape(self.inputs[0]), axes):
            shape = facts.layouts.of[self.inputs[0].name].shape
            zero = facts.zero(self.inputs[0], shape) & (self.node.op in _ZERO_REDUCTIONS)
            level = np.where(zero & (level > VARYING), level, VARYING)
        level = settled(level, facts.shape(self.inputs[0]), axes)
        return [self._fit(facts.layouts, level)]

    def passed(self, facts: KnownFacts, values: np.ndarray) -> np.ndarray | None:
        """Means and extrema of equal numbers are that number."""
        if self.node.op not in ("ReduceMean", "ReduceMax", "ReduceMin"):
            return None
        return self._fit(facts.layouts, values)

    def wants_values(self, facts: KnownFacts) -> list[int]:
        """Zeros add up to zero, however many."""
        return [0] if self.node.op in _ZERO_REDUCTIONS else []

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """Channel by channel."""
        assert outputs[0] is not None
        shape = facts.layouts.of[self.inputs[0].name].shape
        return [outputs[0].reshape(shape), *facts.all_of(self.inputs[1:])]


_ZERO_REDUCTIONS = frozenset({"ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"})
REDUCTIONS = frozenset(
    """ReduceMean ReduceMax ReduceMin ReduceSum ReduceL1 ReduceL2 ReduceSumSquare ReduceProd
    ReduceLogSum ReduceLogSumExp""".split()
)
