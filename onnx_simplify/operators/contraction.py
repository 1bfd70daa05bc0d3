"""Operators with a weight matrix: convolutions and matrix products.

All of them are brought into one canonical form, a weight array ``[groups, outputs per group, inputs
per group, *kernel]``, on which the rules are written once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.channels.values import MAP, UNIFORM, VARYING, min_to
from onnx_simplify.graph.edit import Values, ZeroedSlices
from onnx_simplify.graph.patterns import Form
from onnx_simplify.graph.quantized import QuantizedConstant
from onnx_simplify.operators.base import Masks, Operator
from onnx_simplify.operators.interfaces import KnownFacts, Removal
from onnx_simplify.operators.nodes import (
    constant_input,
    has_input,
    is_static,
)

# Elements of a weight that are looked at together, and rows that are looked at first.
_PIECE = 1 << 18


_FIRST = 32


Put = Callable[[gs.Node, int, Values], None]


@dataclass(frozen=True)
class Wiring:
    """Where a linear node keeps what.

    Attributes:
        data: index of the varying input.
        weight: index of the constant weight.
        bias: index of the optional bias, or None where the operator has none.
        groups: number of groups.
        axis_in: channel axis of the varying input.
        axis_out: channel axis of the output.
    """

    data: int
    weight: int
    bias: int | None
    groups: int
    axis_in: int
    axis_out: int


class Contraction(Operator):
    """Common rules; subclasses say how their weights map to the canonical form."""

    regroups = False
    """Whether the weights may be brought into other groups."""

    @property
    def contractions(self) -> Sequence[Contraction]:
        """The only one."""
        return (self,)

    @cached_property
    def wiring(self) -> Wiring:
        """Where the node keeps what.

        Raises:
            Unsupported: the weight is not constant, or of unexpected rank.
        """
        raise NotImplementedError

    def accounts_for(self) -> Collection[int]:
        """The data; weights and bias are constant, or the rules do not apply."""
        return (self.wiring.data,)

    def to_canonical(self, weight: np.ndarray) -> np.ndarray:
        """View of the weight as ``[groups, outputs/group, inputs/group, *kernel]``."""
        raise NotImplementedError

    def from_canonical(self, weight: np.ndarray) -> np.ndarray:
        """Inverse of :meth:`to_canonical`."""
        raise NotImplementedError

    def spread_axes(self) -> list[int]:
        """Axes along which a uniform non-zero input does not give a uniform output."""
        return []

    def is_static(self, facts: KnownFacts) -> bool:
        """Whether sizes along :meth:`spread_axes` are static, so that a map may be used."""
        return is_static(facts.shape(self.inputs[0]), self.spread_axes())

    def weights(self) -> np.ndarray:
        """The canonical weights of the node."""
        return self.to_canonical(self.inputs[self.wiring.weight].values)

    def is_quantized(self) -> bool:
        """Whether the weights or the bias are stored as integers."""
        return any(isinstance(t, QuantizedConstant) for t in self.inputs)

    def is_integer(self) -> bool:
        """Whether the node computes in integers, which are exact and wrap around."""
        return np.dtype(self.inputs[self.wiring.weight].dtype).kind in "iu"

    def _stored(self) -> np.ndarray:
        """The canonical weights as they are stored: numbers, or steps from the zero point."""
        tensor = self.inputs[self.wiring.weight]
        quantized = isinstance(tensor, QuantizedConstant)
        return self.to_canonical(tensor.quantized.steps() if quantized else tensor.values)

    def _store(self, weight: np.ndarray, put: Put, outs: np.ndarray | None = None) -> None:
        """Replace the weights by what :meth:`_stored` gave, some of it moved or set to zero.

        Args:
            weight: in canonical form.
            put: gives the node an initializer of its own.
            outs: which outputs there are, if not all.
        """
        index = self.wiring.weight
        array, tensor = self.from_canonical(weight), self.inputs[index]
        quantized = isinstance(tensor, QuantizedConstant)
        put(self.node, index, tensor.quantized.restored(array, outs) if quantized else array)

    def stores_exactly(self, values: np.ndarray) -> np.ndarray:
        """For quantised weights, the input channels whose constants the bias can take exactly.

        Where activations are quantised as well, the scale of the bias is the product of theirs and
        that of the weights, so that it can, wherever there is no padding.

        Args:
            values: the constant of each channel, float64 ``(inputs,)``.

        Returns:
            bool ``(inputs,)``.
        """
        wiring = self.wiring
        index = wiring.bias
        bias = self.inputs[index] if index is not None and has_input(self.node, index) else None
        if not isinstance(bias, QuantizedConstant):
            return np.full(values.size, bias is not None) | (values == 0)
        groups, outputs, inputs = self.dims
        found = values == 0
        weight = self.inputs[wiring.weight]
        factor = self.bias_scale()
        if list(bias.shape) != [groups * outputs] or not factor:
            return found
        if not isinstance(weight, QuantizedConstant):
            return found
        for channel in np.flatnonzero(values):
            group = channel // inputs
            if groups == 1:
                # One column at a time: all of them as numbers would take much memory.
                column = weight.quantized.compress({self.column_axis(): np.array([channel])})
                taps = self.to_canonical(column.load())[0, :, 0]
            else:
                taps = self.weights()[group, :, channel % inputs]
            shift = taps.reshape(outputs, -1).astype(np.float64).sum(axis=1) * values[channel]
            rows = np.arange(group * outputs, (group + 1) * outputs)
            whole = bias.quantized.compress({0: rows}).plus(shift * self.scale() / factor)
            found[channel] = whole is not None
        return found

    def check_scales(self) -> None:
        """Refuse quantised weights whose scales do not go with the outputs.

        Raises:
            Unsupported: onnxruntime's integer kernels do not agree with their definition.
        """
        weight = self.inputs[self.wiring.weight]
        if isinstance(weight, QuantizedConstant) and weight.quantized.is_per_axis:
            axis, column = weight.quantized.axis, self.column_axis()
            if axis == column or (self.dims[0] > 1 and (column, axis) != (1, 0)):
                raise Unsupported("scales along another axis than that of the outputs")

    @cached_property
    def dims(self) -> tuple[int, int, int]:
        """(groups, outputs per group, inputs per group), without touching the weights."""
        shape = self.inputs[self.wiring.weight].shape
        dummy = np.broadcast_to(np.zeros((), bool), shape)
        groups = int(self.attrs.get("group", 1))
        if groups < 1 or any(shape[a] % groups for a in range(1 if groups > 1 else 0)):
            raise Unsupported(f"{groups} groups do not fit the weights")
        groups, outputs, inputs = self.to_canonical(dummy).shape[:3]
        return groups, outputs, inputs

    @property
    def is_sound(self) -> bool:
        """Whether weights are constant and of a form that fits the node."""
        try:
            return bool(self.dims)
        except Unsupported:
            return False

    @property
    def used(self) -> np.ndarray:
        """Which weights are not zero, bool ``[groups, outputs/group, inputs/group]``."""
        index = self.wiring.weight
        tensor = self.inputs[index]

        def compute() -> np.ndarray:
            weight = tensor.quantized.used() if isinstance(tensor, QuantizedConstant) else None
            used = self.weights() != 0 if weight is None else self.to_canonical(weight)
            axes = tuple(range(3, used.ndim))
            return np.asarray(used.any(axis=axes) if axes else used)

        return self.patterns.get(tensor, self._orientation(), compute)

    def _ends(self, side: int) -> np.ndarray:
        """Which inputs (side 0) or outputs (1) have weights at all, bool ``[groups, channels]``."""
        tensor = self.inputs[self.wiring.weight]
        form = (*self._orientation(), side)
        return self.patterns.get(tensor, form, lambda: np.asarray(self.used.any(axis=side + 1)))

    def _orientation(self) -> Form:
        """All that :meth:`to_canonical` depends on."""
        index = self.wiring.weight
        return self.node.op, index, self.attrs.get("group"), self.attrs.get("transB")

    def zero_columns(self, mask: np.ndarray, put: Put) -> None:
        """Set the weights of some input channels to zero.

        The weights themselves are not copied before somebody asks for them: most of these columns
        are removed later.

        Args:
            mask: which input channels, bool ``(inputs,)``.
            put: gives the node an initializer of its own.
        """
        groups, _, inputs = self.dims
        index = self.wiring.weight
        used = self.used & ~mask.reshape(groups, 1, inputs)
        axis, tensor = self.column_axis(), self.inputs[index]
        if groups > 1:
            weight = np.array(self._stored())
            for part, columns in zip(weight, mask.reshape(groups, inputs), strict=True):
                part[:, columns] = 0
            self._store(weight, put)
        elif isinstance(tensor, QuantizedConstant):
            put(self.node, index, tensor.quantized.zeroed(axis, mask))
        else:
            put(self.node, index, ZeroedSlices(tensor.values, axis, mask))
        self.patterns.set(self.inputs[index], self._orientation(), used)

    def column_axis(self) -> int:
        """Axis of the weight (0 or 1) that runs over input channels, for a single group."""
        return 1

    def layout(self, layouts: Layouts) -> None:
        """Fresh channels on the output axis; the input's other axes hold whole channels."""
        wiring = self.wiring
        source = layouts(self.inputs[wiring.data])
        shape = layouts.shape(self.inputs[wiring.data])
        groups, outputs, inputs = self.dims
        if shape[wiring.axis_in] != groups * inputs:
            raise Unsupported("number of input channels is not known to match the weight")
        self.check_scales()
        output = self.outputs[0]
        ids = layouts.fresh(groups * outputs)
        rank = len(layouts.shape(output))
        if wiring.bias is not None and has_input(self.node, wiring.bias):
            bias = constant_input(self.node, wiring.bias)
            if bias is None:
                raise Unsupported("bias is computed")
            if bias.size and bias.shape[-1:] not in ((), (1,), (groups * outputs,)):
                raise Unsupported("the bias does not fit the weights")
        layouts.collapse(source, [a for a in range(source.ndim) if a != wiring.axis_in])
        axis = wiring.axis_out % rank
        result = ids.reshape([ids.size if a == axis else 1 for a in range(rank)])
        layouts.set(output, result)
        if groups > 1 and inputs == 1 and outputs == 1:
            flat = self._flat(source, wiring)
            if flat.size == ids.size:
                layouts.equate(ids, flat)

    def _flat(self, array: np.ndarray, wiring: Wiring) -> np.ndarray:
        axes = tuple(a for a in range(array.ndim) if a != wiring.axis_in % array.ndim)
        first = array
        for axis in axes:
            first = np.take(first, [0], axis)
        return first.ravel()

    def input_level(self, facts: KnownFacts) -> np.ndarray:
        """Level of each input channel, shape ``(inputs,)``."""
        wiring = self.wiring
        tensor = self.inputs[wiring.data]
        level = facts.level[tensor.name]
        shape = [s if a == wiring.axis_in % level.ndim else 1 for a, s in enumerate(level.shape)]
        return self._expand(min_to(level, tuple(shape)).ravel())

    def _expand(self, flat: np.ndarray) -> np.ndarray:
        groups, _, inputs = self.dims
        return flat if flat.size == groups * inputs else np.repeat(flat, groups * inputs)

    def input_zero(self, facts: KnownFacts) -> np.ndarray:
        """Which input channels are constant zero (optimistic before measuring)."""
        tensor = self.inputs[self.wiring.data]
        wiring = self.wiring
        zero = facts.zero(tensor, facts.layouts.of[tensor.name].shape)
        axes = tuple(a for a in range(zero.ndim) if a != wiring.axis_in % zero.ndim)
        return self._expand(zero.all(axis=axes).ravel())

    def input_values(self, facts: KnownFacts) -> np.ndarray:
        """The constant of each uniform input channel, NaN elsewhere (float64 ``(inputs,)``)."""
        wiring = self.wiring
        value = facts.scalar(self.inputs[wiring.data])
        axes = tuple(a for a in range(value.ndim) if a != wiring.axis_in % value.ndim)
        first = value.min(axis=axes)
        return self._expand(np.where(first == value.max(axis=axes), first, np.nan))

    def window(self, axis: int) -> int:
        """The smallest size of the input along an axis for which there is an output."""
        return 1

    def level(self, facts: KnownFacts) -> Masks:
        """An output is constant when every input it really reads is."""
        used = self.used
        groups, outputs, inputs = used.shape
        shape = facts.layouts.of[self.outputs[0].name].shape
        level = self.input_level(facts)
        if self.spread_axes():
            zero = self.input_zero(facts) & (level > VARYING)
            worst = MAP if self.is_static(facts) else VARYING
            level = np.where(zero, UNIFORM, np.minimum(level, worst))
        level = level.reshape(groups, inputs)
        weakest = np.full((groups, outputs), UNIFORM, np.int8)
        for limit in (UNIFORM, MAP):
            below = level < limit
            if below.any():
                hit = _any_used(used, below, self._ends(1))
                weakest[hit] = np.minimum(weakest[hit], limit - 1)
        result = weakest.ravel()
        bias = self._bias()
        if bias is not None:
            finite = np.isfinite(bias)
            finite = finite.ravel() if bias.size == result.size else finite.all()
            result = np.where(finite, result, VARYING)
            if bias.ndim > 1 and bias.shape[0] > 1:
                result = np.minimum(result, MAP)
        if result.size != np.prod(shape):
            result = result.min(keepdims=True)
        return [result.reshape(shape)]

    def _bias(self) -> np.ndarray | None:
        index = self.wiring.bias
        return None if index is None else constant_input(self.node, index)

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """The inputs with a non-zero weight to a needed output."""
        wanted = outputs[0]
        assert wanted is not None
        used = self.used
        groups, count, inputs = used.shape
        rows = np.broadcast_to(wanted.ravel(), groups * count).reshape(groups, count)
        columns = np.stack(
            [_any_along(u, r, p) for u, r, p in zip(used, rows, self._ends(0), strict=True)]
        )
        wiring = self.wiring
        shape = facts.layouts.of[self.inputs[wiring.data].name].shape
        axis = wiring.axis_in % len(shape)
        mask = columns.ravel() if shape[axis] > 1 else np.array([columns.any()])
        mask = mask.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        found: Masks = [None] * len(self.inputs)
        found[wiring.data] = np.broadcast_to(mask, shape)
        return found

    def channels(self, facts: KnownFacts) -> tuple[np.ndarray, np.ndarray]:
        """Labels of the input and output channels, each one-dimensional."""
        wiring = self.wiring
        source = self._flat(facts.layouts.of[self.inputs[wiring.data].name], wiring)
        return self._expand(source), facts.layouts.of[self.outputs[0].name].ravel()

    def constrain(self, facts: KnownFacts, alive: np.ndarray) -> bool:
        """Groups that stay have equally many channels."""
        groups, outputs, inputs = self.used.shape
        if groups == 1:
            return False
        source, result = self.channels(facts)
        changed = False
        ins = alive[source].reshape(groups, inputs)
        outs = alive[result].reshape(groups, outputs)
        kept = ins.any(axis=1) | outs.any(axis=1)
        for mask, labels in ((ins, source), (outs, result)):
            counts = mask.sum(axis=1)
            wanted = max(int(counts.max()), 1)
            for group in np.flatnonzero(kept & (counts < wanted)):
                dead = np.flatnonzero(~mask[group])[: wanted - counts[group]]
                alive[labels.reshape(groups, -1)[group, dead]] = True
                changed = True
        return changed

    def shrink(self, cut: Removal) -> None:
        """Slice the weight and the bias; drop groups that are gone."""
        wiring = self.wiring
        groups, outputs, inputs = self.dims
        source, result = self.channels(cut.facts)
        ins, outs = cut.stay(source), cut.stay(result)
        merger = cut.grouping(self)
        if merger is None and _is_all(ins, source.size) and _is_all(outs, result.size):
            return
        if groups == 1 and merger is None:
            axis = self.column_axis()
            sides = (axis, ins, source.size), (1 - axis, outs, result.size)
            cut.slice(self.node, wiring.weight, {a: i for a, i, n in sides if not _is_all(i, n)})
        else:
            kept = int(np.unique(ins // inputs).size) if merger is None else merger.groups
            weight = self._regrouped(self._stored(), kept, ins, outs)
            self.attrs["group"] = kept
            self._store(weight, cut.put, outs)
        if wiring.bias is not None and has_input(self.node, wiring.bias):
            self.shrink_bias(cut, wiring.bias, outs)

    def _regrouped(
        self, weight: np.ndarray, groups: int, ins: np.ndarray, outs: np.ndarray
    ) -> np.ndarray:
        """The weights between channels in another order and other groups, in canonical form.

        Args:
            weight: the canonical weights.
            groups: the new number of groups.
            ins: indices of input channels, group by group.
            outs: indices of output channels, group by group.
        """
        columns, rows = ins.reshape(groups, 1, -1), outs.reshape(groups, -1, 1)
        of_row, of_column = rows // weight.shape[1], columns // weight.shape[2]
        found = weight[of_row, rows % weight.shape[1], columns % weight.shape[2]]
        found[of_row != of_column] = 0
        return found

    def may_reorder(self, facts: KnownFacts) -> bool:
        """Rows and columns of the weights go along, unless groups hold several of them.

        Those of a depthwise convolution only if its inputs do, too.
        """
        if int(self.attrs.get("group", 1)) == 1:
            return True
        source, result = self.channels(facts)
        return self.dims[1:] == (1, 1) and np.array_equal(source, result)

    def shrink_bias(self, cut: Removal, index: int, keep: np.ndarray) -> None:
        """Take some elements of the bias, a vector."""
        cut.slice(self.node, index, {0: keep})

    def wants_values(self, facts: KnownFacts) -> list[int]:
        """The data input, where any of it may be constant."""
        wiring = self.wiring
        level = facts.level.get(self.inputs[wiring.data].name)
        return [wiring.data] if level is not None and (level > VARYING).any() else []

    def add_bias(self, shift: np.ndarray, put: Put) -> bool:
        """Add ``shift`` (float64, shape ``(outputs,)``) to the bias.

        Args:
            shift: what to add to each output channel.
            put: ``put(node, input index, array)`` gives this node an initializer of its own.

        Returns:
            False if there is no bias, or it is quantised and cannot hold the sum.
        """
        wiring = self.wiring
        if wiring.bias is None:
            return False
        old = self.inputs[wiring.bias] if has_input(self.node, wiring.bias) else None
        new: Values | None
        if isinstance(old, QuantizedConstant):
            new = old.quantized.plus(shift)
        else:
            new = shift if old is None else old.values.astype(np.float64) + shift
            new = new.astype(self.inputs[wiring.weight].dtype)
        if new is not None:
            put(self.node, wiring.bias, new)
        return new is not None

    def response(self, values: np.ndarray) -> np.ndarray:
        """What uniform inputs add to each output where no padding interferes.

        Sums are float64; those of integers are formed in 64 bits, modulo the size of their type.
        That is exact: wrapping around is a homomorphism of sums and products, so it does not matter
        when it happens.

        Args:
            values: one value per input channel, shape ``(inputs,)``.

        Returns:
            Array of shape ``(outputs,)``, float64 or of the weights' integer type.
        """
        weight = self.weights()
        groups, outputs, inputs = weight.shape[:3]
        taps = self.taps()
        wide: type = np.int64 if self.is_integer() else np.float64
        result: np.ndarray = np.zeros((groups, outputs), wide)
        # In pieces, so that the float64 copies stay in the processor's cache.
        rows = max(1, _PIECE // max(1, inputs * taps))
        value: np.ndarray
        for group, value in enumerate(values.reshape(groups, inputs).astype(wide)):
            factors: np.ndarray = np.repeat(value, taps)
            for start in range(0, outputs if value.any() else 0, rows):
                part = weight[group, start : start + rows].reshape(-1, factors.size)
                found = part.astype(wide) @ factors
                if not np.isfinite(found).all():
                    # Infinite weights of channels that are not looked at.
                    found = np.where(factors, part, 0).astype(wide) @ factors
                result[group, start : start + rows] = found
        if self.is_integer():
            return result.ravel().astype(weight.dtype)
        return result.ravel() * self.scale()

    def border_response(self, values: np.ndarray, facts: KnownFacts) -> np.ndarray | None:
        """What uniform inputs add to each output where padding interferes, position by position.

        Args:
            values: one value per input channel, shape ``(inputs,)``.
            facts: what is known; sizes along :meth:`spread_axes` are static.

        Returns:
            Float32 array of the output's rank, of size 1 along axes without padding; None if it
            has to be measured.
        """
        return None

    def scale(self) -> float:
        """A factor in front of the product."""
        return 1.0

    def bias_scale(self) -> float:
        """A factor in front of the bias."""
        return 1.0

    def per_channel(self, values: np.ndarray) -> np.ndarray:
        """One value per output channel, shaped so that it broadcasts to the output."""
        axis = self.wiring.axis_out
        rank = len(self.outputs[0].shape)
        return values.reshape([-1] + [1] * (rank - 1 - axis % rank))

    def set_weights(self, weight: np.ndarray, put: Put) -> None:
        """Replace the weights by an array in canonical form, cast to the type they had."""
        index = self.wiring.weight
        dtype = self.inputs[index].dtype
        put(self.node, index, self.from_canonical(weight).astype(dtype, copy=False))

    def taps(self) -> int:
        """Weights between one input and one output channel."""
        weight = self.inputs[self.wiring.weight]
        groups, outputs, inputs = self.dims
        return int(np.prod(weight.shape)) // max(groups * outputs * inputs, 1)

    def positions(self, facts: KnownFacts) -> tuple[int, int]:
        """Positions in space of the input and the output, as far as sizes are known."""
        wiring = self.wiring
        found = []
        ends = (self.inputs[wiring.data], wiring.axis_in), (self.outputs[0], wiring.axis_out)
        for tensor, axis in ends:
            shape = facts.shape(tensor)
            space = [d for k, d in enumerate(shape) if k > axis % len(shape) and isinstance(d, int)]
            found.append(int(np.prod(space)))
        return found[0], found[1]

    def macs(self, shapes: dict[str, list[int]]) -> int:
        """One multiply-accumulate per weight and output position."""
        wiring = self.wiring
        output = shapes[self.outputs[0].name]
        positions = int(np.prod(output)) // max(output[wiring.axis_out], 1)
        return positions * int(np.prod(self.inputs[wiring.weight].shape))


def _is_all(index: np.ndarray, size: int) -> bool:
    """Whether all positions stay, in order."""
    return index.size == size and bool((np.diff(index) == 1).all())


def _any_used(used: np.ndarray, columns: np.ndarray, able: np.ndarray) -> np.ndarray:
    """For each group and output, whether it uses one of the columns.

    Args:
        used: bool ``[groups, outputs, inputs]``.
        columns: bool ``[groups, inputs]``.
        able: outputs that use any, bool ``[groups, outputs]``.
    """
    return np.stack([_any_along(u.T, c, a) for u, c, a in zip(used, columns, able, strict=True)])


def _any_along(array: np.ndarray, mask: np.ndarray, able: np.ndarray) -> np.ndarray:
    """``array[mask].any(axis=0)`` for a boolean matrix, looking at a few rows first.

    Args:
        array: the matrix.
        mask: which of its rows.
        able: ``array.any(axis=0)``.
    """
    rows = np.flatnonzero(mask)
    found = np.asarray(array[rows[:_FIRST]].any(axis=0))
    if rows.size > _FIRST and not (found | ~able).all():
        rest = np.flatnonzero(able & ~found)
        if array.flags.f_contiguous and rest.size * 4 > found.size:
            # Reading all of it in order is faster than picking from it.
            found = (array.T & mask).any(axis=1)
        else:
            found[rest] = array[np.ix_(rows[_FIRST:], rest)].any(axis=0)
    return found
