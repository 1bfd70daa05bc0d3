"""Operators that work position by position, with numpy broadcasting between their operands."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.channels.operators.base import (
    Masks,
    Operator,
    has_input,
    is_static,
    min_to,
    reduce_to,
)
from onnx_simplify.channels.values import MAP, UNIFORM, VARYING
from onnx_simplify.graph.shapes import Dim

if TYPE_CHECKING:
    from onnx_simplify.channels.analysis import Analysis
    from onnx_simplify.channels.cut import Cut

NAMES = frozenset(
    """Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr
    BitwiseXor Cast Ceil Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater
    GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max
    Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin
    Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor""".split()
)


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

    def sizes(self, layouts: Layouts) -> list[Dim | None] | None:
        """Where all operands that are not broadcast have the same size, the result has it too."""
        shapes = [layouts.shape(t) for t in self.inputs if t.name]
        rank = max(len(s) for s in shapes)
        found: list[Dim | None] = []
        for axis in range(-rank, 0):
            dims = {s[axis] for s in shapes if len(s) >= -axis and s[axis] != 1} or {1}
            found.append(dims.pop() if len(dims) == 1 else None)
        return found

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

    def level(self, analysis: Analysis) -> Masks:
        """Constant where all operands are; a factor of zero is enough."""
        shape = analysis.layouts.of[self.outputs[0].name].shape
        rank = len(shape)
        level = np.full(shape, UNIFORM, np.int8)
        for tensor in self.inputs:
            if tensor.name:
                level = np.minimum(level, _aligned(analysis.level_of(tensor, shape), rank))
        if self.node.op == "Mul":
            for tensor in self.inputs:
                zero = np.broadcast_to(analysis.zero(tensor, shape), shape)
                level = np.where(zero, UNIFORM, level)
        return [level]

    def need(self, analysis: Analysis, outputs: Masks) -> Masks:
        """What is needed of the result is needed of each operand, unless a factor is zero."""
        wanted = outputs[0]
        assert wanted is not None
        found: Masks = []
        for index, tensor in enumerate(self.inputs):
            if not analysis.has(tensor):
                found.append(None)
                continue
            mask = wanted
            other = self.inputs[1 - index] if self.node.op == "Mul" else None
            if isinstance(other, gs.Constant):
                mask = mask & ~analysis.zero(other, wanted.shape)
            found.append(reduce_to(mask, analysis.layouts.of[tensor.name].shape))
        return found

    def shrink(self, cut: Cut) -> None:
        """Slice constant operands."""
        taken = cut.taken(self.outputs[0])
        rank = len(cut.analysis.shape(self.outputs[0]))
        for index, tensor in enumerate(self.inputs):
            if isinstance(tensor, gs.Constant):
                offset = rank - len(tensor.shape)
                own = {a - offset: k for a, k in taken.items()
                       if a >= offset and tensor.shape[a - offset] > 1}
                cut.slice(self.node, index, own)

    def wants_values(self, analysis: Analysis) -> list[int]:
        """Factors; and operands that are constant altogether, which can become initializers."""
        wanted = []
        for index, tensor in enumerate(self.inputs):
            if analysis.has(tensor):
                constant = analysis.level[tensor.name] > VARYING
                whole = (constant | ~analysis.needed[tensor.name]).all()
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

    def level(self, analysis: Analysis) -> Masks:
        """Constants pass through; the mask is one."""
        (level,) = super().level(analysis)
        assert level is not None
        mask = np.full(level.shape, UNIFORM, np.int8)
        return [level, mask] if has_mask(self.node) else [level]

    def need(self, analysis: Analysis, outputs: Masks) -> Masks:
        """The mask holds nothing of the input."""
        if outputs[0] is None:
            return [None] * len(self.inputs)
        return super().need(analysis, outputs)


def has_mask(node: gs.Node) -> bool:
    """Whether a ``Dropout`` has a second output, that says what it let pass."""
    return sum(bool(t.name) for t in node.outputs) > 1


def is_inference_dropout(node: gs.Node) -> bool:
    """Whether a ``Dropout`` lets everything pass: it is not in training mode."""
    return not has_input(node, 2) or (
        isinstance(node.inputs[2], gs.Constant) and not node.inputs[2].values
    )


class ChannelAffine(Operator):
    """``BatchNormalization`` in inference mode: one set of parameters per channel of axis 1.

    https://onnx.ai/onnx/operators/onnx__BatchNormalization.html
    """

    reorders = True

    def layout(self, layouts: Layouts) -> None:
        """Channels pass through."""
        if self.attrs.get("training_mode", 0) or sum(bool(t.name) for t in self.outputs) > 1:
            raise Unsupported("training mode")
        if not all(isinstance(t, gs.Constant) for t in self.inputs[1:]):
            raise Unsupported("parameters are computed")
        source = layouts(self.inputs[0])
        if source.ndim < 2:
            raise Unsupported("no channel axis")
        if not has_equal_vectors(self.node):
            raise Unsupported("parameters do not fit each other")
        layout = layouts.collapse(source, [a for a in range(source.ndim) if a != 1])
        layouts.set(self.outputs[0], layout)

    def level(self, analysis: Analysis) -> Masks:
        """Constant in, constant out; a scale of zero leaves the bias, whatever comes in."""
        shape = analysis.layouts.of[self.outputs[0].name].shape
        level = min_to(analysis.level[self.inputs[0].name], shape)
        finite = np.ones(1, bool)
        for tensor in self.inputs[1:]:
            finite = finite & np.isfinite(tensor.values)
        level = self.passed_on(analysis, level)
        level = np.where(self._per_channel(self._erased(), shape), UNIFORM, level)
        return [np.where(self._per_channel(finite, shape), level, VARYING)]

    def passed_on(self, analysis: Analysis, level: np.ndarray) -> np.ndarray:
        """Level of the result where the scale is not zero."""
        return level

    def need(self, analysis: Analysis, outputs: Masks) -> Masks:
        """Channel by channel, unless the scale is zero."""
        wanted = outputs[0]
        assert wanted is not None
        wanted = wanted & ~self._per_channel(self._erased(), wanted.shape)
        shape = analysis.layouts.of[self.inputs[0].name].shape
        return [np.broadcast_to(wanted, shape)]

    def _erased(self) -> np.ndarray:
        return np.asarray(self.inputs[1].values == 0)

    def _per_channel(self, mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A mask per channel as an array that broadcasts to the layout's shape."""
        mask = mask if shape[1] == mask.size else mask.all(keepdims=True).reshape(1)
        return mask.reshape([1, -1] + [1] * (len(shape) - 2))

    def shrink(self, cut: Cut) -> None:
        """Slice the parameters."""
        taken = cut.taken(self.outputs[0])
        if 1 in taken:
            for index in range(1, len(self.inputs)):
                cut.slice(self.node, index, {0: taken[1]})



class InstanceNormalization(ChannelAffine):
    """Every channel normalised over its positions.

    https://onnx.ai/onnx/operators/onnx__InstanceNormalization.html
    """

    def passed_on(self, analysis: Analysis, level: np.ndarray) -> np.ndarray:
        """Other constants than zero come out as amplified rounding, which depends on the size."""
        source = self.inputs[0]
        zero = analysis.zero(source, analysis.layouts.of[source.name].shape)
        axes = tuple(a for a, s in enumerate(level.shape) if s == 1)
        zero = np.asarray(zero.all(axis=axes, keepdims=True))
        worst = MAP if is_static(analysis.shape(source)[2:]) else VARYING
        return np.where(zero & (level > VARYING), level, np.minimum(level, worst))

    def wants_values(self, analysis: Analysis) -> list[int]:
        """Zeros stay exact."""
        return [0]


def has_equal_vectors(node: gs.Node) -> bool:
    """Whether all inputs but the first are vectors of the same length."""
    return len({tuple(t.shape) for t in node.inputs[1:]}) == 1 and len(node.inputs[1].shape) == 1


def _aligned(array: np.ndarray, rank: int) -> np.ndarray:
    return array.reshape((1,) * (rank - array.ndim) + array.shape)
