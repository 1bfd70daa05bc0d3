"""Attention, written out: softmax, and products of two operands that both vary.

S = Q K'        scores: channels are contracted, each head has one channel in the result
A = softmax(S)
O = A V         mixing: positions are contracted, the result has the channels of V
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.channels.values import MAP, UNIFORM, VARYING, reduce_to
from onnx_simplify.operators.base import Masks, Operator
from onnx_simplify.operators.interfaces import KnownFacts
from onnx_simplify.operators.nodes import is_static

_PASSING = frozenset({"Identity", "Cast", "Dropout"})


class Softmax(Operator):
    """``Softmax`` and ``LogSoftmax`` along an axis that holds no channels.

    https://onnx.ai/onnx/operators/onnx__Softmax.html
    """

    def axis(self, layouts: Layouts) -> int:
        """The axis along which the results sum to one.

        Raises:
            Unsupported: before version 13, all axes from the given one on were one.
        """
        rank = len(layouts.shape(self.inputs[0]))
        axis = _softmax_axis(self, layouts)
        if layouts.model.opset < 13 and axis != rank - 1:
            raise Unsupported("softmax over several axes")
        return axis

    def layout(self, layouts: Layouts) -> None:
        """Channels pass through."""
        source = layouts(self.inputs[0])
        if source.shape[self.axis(layouts)] > 1:
            raise Unsupported("softmax over channels")
        layouts.set(self.outputs[0], source)

    def level(self, facts: KnownFacts) -> Masks:
        """Constants come out as constants of a size."""
        source = self.inputs[0]
        worst = MAP if is_static(facts.shape(source)) else VARYING
        return [np.minimum(facts.level[source.name], worst)]

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """Channel by channel."""
        return [outputs[0]]


def _softmax_axis(op: Operator, layouts: Layouts) -> int:
    """The axis that a softmax names, or the one that its version takes for it."""
    default = -1 if layouts.model.opset >= 13 else 1
    return int(op.attrs.get("axis", default)) % len(layouts.shape(op.inputs[0]))


class LiveProduct(Operator):
    """``MatMul`` of two operands that are computed, batches of matrices of one rank.

    A channel that is contracted may go where one of its factors is zero: zero times what the other
    holds, finite as it is, adds nothing. A row of a softmax sums to one, so a number that a channel
    of V is everywhere comes out as it went in.

    https://onnx.ai/onnx/operators/onnx__MatMul.html
    """

    averages = True
    carrier = 1

    def accounts_for(self) -> Collection[int]:
        """Both operands."""
        return (0, 1)

    def layout(self, layouts: Layouts) -> None:
        """One channel for each head, or those of the operand that has any."""
        left, right = (layouts(t) for t in self.inputs)
        if left.ndim != right.ndim or left.ndim < 2:
            raise Unsupported("operands have different ranks")
        heads = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        rows, columns = left.shape[-2], right.shape[-1]
        if left.shape[-1] != right.shape[-2]:
            raise Unsupported("one operand's channels meet the other's positions")
        if left.shape[-1] > 1:
            if rows > 1 or columns > 1:
                raise Unsupported("channels along both axes of an operand")
            self._check_heads(layouts, heads)
            layouts.equate(left, np.swapaxes(right, -1, -2))
            ids = layouts.fresh(int(np.prod(heads))).reshape((*heads, 1, 1))
        else:
            if rows > 1 and columns > 1:
                raise Unsupported("channels of both operands in one result")
            ids = left if rows > 1 else right
            if ids.shape[:-2] != heads:
                raise Unsupported("heads share what they mix")
            self._check_heads(layouts, heads)
        layouts.set(self.outputs[0], ids)

    def _check_heads(self, layouts: Layouts, heads: tuple[int, ...]) -> None:
        """Raise unless an operand whose heads are not followed has one for all of them."""
        for tensor in self.inputs:
            own, sizes = layouts(tensor).shape, layouts.shape(tensor)
            for axis, count in enumerate(heads):
                if count > 1 and own[axis] == 1 and sizes[axis] != 1:
                    raise Unsupported("heads that are not followed")

    def _contracts(self, facts: KnownFacts) -> bool:
        """Whether channels are contracted, rather than positions."""
        return bool(facts.layouts.of[self.inputs[0].name].shape[-1] > 1)

    def _zero(self, facts: KnownFacts, index: int) -> np.ndarray:
        """Where an operand is zero everywhere (optimistic before measuring)."""
        tensor = self.inputs[index]
        level = facts.level[tensor.name]
        return facts.zero(tensor, level.shape) & (level > VARYING)

    def level(self, facts: KnownFacts) -> Masks:
        """Sums of products of constants; zero wherever a factor is."""
        left, right = (facts.level[t.name] for t in self.inputs)
        zeros = self._zero(facts, 0), self._zero(facts, 1)
        if self._contracts(facts):
            right, zero = np.swapaxes(right, -1, -2), np.swapaxes(zeros[1], -1, -2)
            each = np.where(zeros[0] | zero, UNIFORM, np.minimum(left, right))
            return [each.min(axis=-1, keepdims=True)]
        result = facts.layouts.of[self.outputs[0].name]
        # How many are added up is a matter of the size.
        static = is_static(facts.shape(self.inputs[0])[-1:])
        level = np.minimum(np.minimum(left, right), MAP if static else VARYING)
        level = np.where(zeros[0] | zeros[1], UNIFORM, level)
        if self._averages(facts):
            level = np.where(right == UNIFORM, UNIFORM, level)
        return [np.broadcast_to(level, result.shape)]

    def _averages(self, facts: KnownFacts) -> bool:
        """Whether rows of the first operand sum to one: it is a softmax along the axis."""
        maker = facts.producer.get(self.inputs[0].name)
        while maker is not None and maker.node.op in _PASSING and not maker.node.domain:
            maker = facts.producer.get(maker.inputs[0].name)
        if maker is None or maker.node.op != "Softmax" or maker.node.domain or maker.is_opaque:
            return False
        return _softmax_axis(maker, facts.layouts) == len(facts.shape(maker.inputs[0])) - 1

    def passed(self, facts: KnownFacts, values: np.ndarray) -> np.ndarray | None:
        """Means with weights that sum to one, of equal numbers, are that number."""
        same = values.shape == facts.layouts.of[self.outputs[0].name].shape
        return values if same and not self._contracts(facts) and self._averages(facts) else None

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """Of a head that is needed, what is not multiplied by zero; of what is mixed, all heads."""
        wanted = outputs[0]
        assert wanted is not None
        shapes = [facts.layouts.of[t.name].shape for t in self.inputs]
        if not self._contracts(facts):
            return [reduce_to(wanted, shape) for shape in shapes]
        zero = self._zero(facts, 0) | np.swapaxes(self._zero(facts, 1), -1, -2)
        live = wanted & ~zero
        return [reduce_to(live, shapes[0]), reduce_to(np.swapaxes(live, -1, -2), shapes[1])]

    def wants_values(self, facts: KnownFacts) -> list[int]:
        """Zeros drop out."""
        return [0, 1]

    def constrain(self, facts: KnownFacts, alive: np.ndarray) -> bool:
        """Operands and result have the same heads."""
        tensors = (*self.inputs, *self.outputs)
        labels = [facts.layouts.of[t.name] for t in tensors]
        heads = np.broadcast_shapes(*(own.shape[:-2] for own in labels))
        alive_heads = [alive[own].any(axis=(-1, -2)) for own in labels]
        kept = np.zeros(heads, bool)
        for own in alive_heads:
            kept |= np.broadcast_to(own, heads)
        changed = False
        for own, there in zip(labels, alive_heads, strict=True):
            missing = reduce_to(kept, there.shape) & ~there
            for head in zip(*np.nonzero(missing), strict=True):
                alive[own[head].ravel()[0]] = True
                changed = True
        return changed
