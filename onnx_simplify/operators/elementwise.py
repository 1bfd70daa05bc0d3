"""Operators that work position by position, with numpy broadcasting between their operands."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.channels.values import UNIFORM, VARYING, reduce_to
from onnx_simplify.graph.expressions import (
    Dim,
    difference,
    exact_quotient,
    floor_quotient,
    product,
    total,
)
from onnx_simplify.operators.base import Masks, Operator
from onnx_simplify.operators.interfaces import KnownFacts, KnownSizes, Removal
from onnx_simplify.operators.nodes import has_input

NAMES = frozenset(
    """Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr
    BitwiseXor Cast Ceil Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater
    GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max
    Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin
    Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor""".split()
)


Entry = Dim | bool | None
"""An element of a vector of sizes: a number, a size, a truth, or not known."""


def _divided(left: Entry, right: Entry) -> Entry:
    """A quotient of sizes, which are positive: rounding down is rounding to zero."""
    if left is None or not isinstance(right, int) or right < 1:
        return None if left is None or right is None else exact_quotient([left], [right])
    if isinstance(left, int):
        return int(left / right) if abs(left) < 2**53 else None
    return floor_quotient(left, right)


def _remainder(left: Entry, right: Entry) -> Entry:
    """What a division leaves; of what is divided without one, nothing."""
    if isinstance(left, int) and isinstance(right, int) and left >= 0 and right > 0:
        return left % right
    whole = None if left is None or right is None else exact_quotient([left], [right])
    return None if whole is None else 0


def _equal(left: Entry, right: Entry) -> bool | None:
    """Whether two entries are the same, if that can be said: sizes are positive."""
    if left is None or right is None:
        return None
    if left == right:
        return True
    numbers = [v for v in (left, right) if isinstance(v, int)]
    return False if len(numbers) == 2 or any(v < 1 for v in numbers) else None


def _truth(value: Entry) -> bool | None:
    """Whether a number is not zero."""
    return bool(value) if isinstance(value, int) else None


def _both(left: Entry, right: Entry) -> bool | None:
    """Whether two truths hold."""
    if left is False or right is False:
        return False
    return True if left is True and right is True else None


def _either(left: Entry, right: Entry) -> bool | None:
    """Whether one of two truths holds."""
    if left is True or right is True:
        return True
    return False if left is False and right is False else None


def _picked(condition: Entry, left: Entry, right: Entry) -> Entry:
    """One of two."""
    if isinstance(condition, (bool, int)):
        return left if condition else right
    return left if left == right else None


def _largest(*operands: Entry) -> Entry:
    """The largest: of a size and a number that is not positive, the size."""
    rest = {v for v in operands if not (isinstance(v, int) and v < 1)} or set(operands[:1])
    if None not in rest and all(isinstance(v, int) for v in rest):
        return max(rest)  # type: ignore[type-var]
    return rest.pop() if len(rest) == 1 else None


def _smallest(*operands: Entry) -> Entry:
    """The smallest, of numbers or of equals."""
    if None not in operands and all(isinstance(v, int) for v in operands):
        return min(operands)  # type: ignore[type-var]
    return operands[0] if len(set(operands)) == 1 else None


ARITHMETIC: dict[str, Callable[..., Entry]] = {
    "Add": lambda left, right: total([left, right]),
    "Sub": difference,
    "Mul": lambda left, right: product([left, right]),
    "Div": _divided,
    "Mod": _remainder,
    "Neg": lambda value: difference(0, value),
    "Max": _largest,
    "Min": _smallest,
    "Equal": _equal,
    "Not": lambda value: not value if isinstance(value, bool) else None,
    "And": _both,
    "Or": _either,
    "Where": _picked,
    "Identity": lambda value: value,
    "Cast": lambda value: value,
}
"""What operators make of sizes, element by element."""

_INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


class Elementwise(Operator):
    """Any broadcasting operator: operands at the same position share their channel."""

    reorders = True
    channelwise = True

    @property
    def stores_operands(self) -> bool:
        """Unless onnxruntime needs to know which operand is which."""
        return bool(self.node.op != "PRelu")

    def accounts_for(self) -> Collection[int]:
        """All operands."""
        return range(len(self.inputs))

    def shapes(self, known: KnownSizes) -> list[list[Dim | None]]:
        """Where all operands that are not broadcast have the same size, the result has it too."""
        shapes = [known.shape(t) for t in self.inputs if t.name]
        rank = max(len(s) for s in shapes)
        found: list[Dim | None] = []
        for axis in range(-rank, 0):
            dims = {s[axis] for s in shapes if len(s) >= -axis and s[axis] != 1} or {1}
            found.append(dims.pop() if len(dims) == 1 else None)
        return [found]

    def values(self, known: KnownSizes) -> list[np.ndarray | None]:
        """Arithmetic of sizes."""
        rule = ARITHMETIC.get(self.node.op)
        if rule is None or self.node.domain:
            return []
        operands: list[Any] = [known.values(t) for t in self.inputs if t.name]
        if self.node.op == "Cast" and self.attrs.get("to") == onnx.TensorProto.BOOL:
            rule = _truth
        elif self.node.op == "Cast" and self.attrs.get("to") not in _INTEGERS:
            return []
        if not operands or any(o is None for o in operands):
            return []
        return [np.asarray(np.frompyfunc(rule, len(operands), 1)(*operands), object)]

    def layout(self, layouts: Layouts) -> None:
        """Equate the operands' ids where neither is broadcast."""
        output = self.outputs[0]
        rank = len(layouts.shape(output))
        operands: list[tuple[np.ndarray, list[Dim]]] = []
        for tensor in self.inputs:
            if tensor.name and not isinstance(tensor, gs.Constant):
                layout = layouts(tensor)
                lead = rank - layout.ndim
                shape: list[Dim] = [1] * lead
                aligned = layout.reshape((1,) * lead + layout.shape)
                operands.append((aligned, shape + layouts.shape(tensor)))
        if not operands:
            raise Unsupported("all operands are constant")
        tracked = [max(lay.shape[a] for lay, _ in operands) for a in range(rank)]
        for tensor in self.inputs:
            if tensor.name:
                shape = [1] * (rank - len(layouts.shape(tensor)))
                shape += layouts.shape(tensor)
                for axis, size in enumerate(tracked):
                    if size > 1 and shape[axis] not in (1, size):
                        raise Unsupported(f"'{tensor.name}' broadcasts in a way not known before")
        joined = [
            layout
            for layout, shape in operands
            if layout.size > 1 or all(shape[a] == s for a, s in enumerate(tracked) if s > 1)
        ]
        if not joined:
            layouts.set(output, layouts.untracked(output))
            return
        layouts.set(output, layouts.merge(joined))

    def level(self, facts: KnownFacts) -> Masks:
        """Constant where all operands are; a factor of zero is enough."""
        shape = facts.layouts.of[self.outputs[0].name].shape
        rank = len(shape)
        level = np.full(shape, UNIFORM, np.int8)
        for tensor in self.inputs:
            if tensor.name:
                level = np.minimum(level, _aligned(facts.level_of(tensor, shape), rank))
        if self.node.op == "Mul":
            for tensor in self.inputs:
                zero = np.broadcast_to(facts.zero(tensor, shape), shape)
                level = np.where(zero, UNIFORM, level)
        return [level]

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """What is needed of the result is needed of each operand, unless a factor is zero."""
        wanted = outputs[0]
        assert wanted is not None
        found: Masks = []
        for index, tensor in enumerate(self.inputs):
            if not facts.has(tensor):
                found.append(None)
                continue
            mask = wanted
            other = self.inputs[1 - index] if self.node.op == "Mul" else None
            if isinstance(other, gs.Constant):
                mask = mask & ~facts.zero(other, wanted.shape)
            found.append(reduce_to(mask, facts.layouts.of[tensor.name].shape))
        return found

    def shrink(self, cut: Removal) -> None:
        """Slice constant operands."""
        taken = cut.taken(self.outputs[0])
        rank = len(cut.facts.shape(self.outputs[0]))
        for index, tensor in enumerate(self.inputs):
            if isinstance(tensor, gs.Constant):
                offset = rank - len(tensor.shape)
                own = {
                    a - offset: k
                    for a, k in taken.items()
                    if a >= offset and tensor.shape[a - offset] > 1
                }
                cut.slice(self.node, index, own)

    def wants_values(self, facts: KnownFacts) -> list[int]:
        """Factors; and operands that are constant altogether, which can become initializers."""
        wanted = []
        for index, tensor in enumerate(self.inputs):
            if facts.has(tensor):
                constant = facts.level[tensor.name] > VARYING
                whole = (constant | ~facts.needed[tensor.name]).all()
                if whole or (self.node.op == "Mul" and constant.any()):
                    wanted.append(index)
        return wanted


class Dropout(Elementwise):
    """``Dropout`` in inference mode: the identity, and a mask that is true everywhere.

    https://onnx.ai/onnx/operators/onnx__Dropout.html
    """

    def layout(self, layouts: Layouts) -> None:
        """Channels pass through, if the node cannot be in training mode."""
        if not is_inference_dropout(self.node):
            raise Unsupported("may be in training mode")
        if has_mask(self.node) and layouts.model.opset < 12:
            raise Unsupported("what the mask holds was not defined before opset 12")
        super().layout(layouts)
        if has_mask(self.node):
            layouts.set(self.outputs[1], layouts.of[self.outputs[0].name])

    def level(self, facts: KnownFacts) -> Masks:
        """Constants pass through; the mask is one."""
        (level,) = super().level(facts)
        assert level is not None
        mask = np.full(level.shape, UNIFORM, np.int8)
        return [level, mask] if has_mask(self.node) else [level]

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """The mask holds nothing of the input."""
        if outputs[0] is None:
            return [None] * len(self.inputs)
        return super().need(facts, outputs)


def has_mask(node: gs.Node) -> bool:
    """Whether a ``Dropout`` has a second output, that says what it let pass."""
    return sum(bool(t.name) for t in node.outputs) > 1


def is_inference_dropout(node: gs.Node) -> bool:
    """Whether a ``Dropout`` lets everything pass: it is not in training mode."""
    return not has_input(node, 2) or (
        isinstance(node.inputs[2], gs.Constant) and not node.inputs[2].values
    )


def _aligned(array: np.ndarray, rank: int) -> np.ndarray:
    return array.reshape((1,) * (rank - array.ndim) + array.shape)
