"""Operators that scale and shift every channel."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.channels.values import MAP, UNIFORM, VARYING, min_to
from onnx_simplify.operators.base import Masks, Operator
from onnx_simplify.operators.interfaces import KnownFacts, Removal
from onnx_simplify.operators.nodes import is_static


class ChannelAffine(Operator):
    """``BatchNormalization`` in inference mode: one set of parameters per channel of axis 1.

    https://onnx.ai/onnx/operators/onnx__BatchNormalization.html
    """

    reorders = True
    channelwise = True

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

    def level(self, facts: KnownFacts) -> Masks:
        """Constant in, constant out; a scale of zero leaves the bias, whatever comes in."""
        shape = facts.layouts.of[self.outputs[0].name].shape
        level = min_to(facts.level[self.inputs[0].name], shape)
        finite = np.ones(1, bool)
        for tensor in self.inputs[1:]:
            finite = finite & np.isfinite(tensor.values)
        level = self.passed_on(facts, level)
        level = np.where(self._per_channel(self._erased(), shape), UNIFORM, level)
        return [np.where(self._per_channel(finite, shape), level, VARYING)]

    def passed_on(self, facts: KnownFacts, level: np.ndarray) -> np.ndarray:
        """Level of the result where the scale is not zero."""
        return level

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """Channel by channel, unless the scale is zero."""
        wanted = outputs[0]
        assert wanted is not None
        wanted = wanted & ~self._per_channel(self._erased(), wanted.shape)
        shape = facts.layouts.of[self.inputs[0].name].shape
        return [np.broadcast_to(wanted, shape)]

    def _erased(self) -> np.ndarray:
        return np.asarray(self.inputs[1].values == 0)

    def _per_channel(self, mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A mask per channel as an array that broadcasts to the layout's shape."""
        mask = mask if shape[1] == mask.size else mask.all(keepdims=True).reshape(1)
        return mask.reshape([1, -1] + [1] * (len(shape) - 2))

    def shrink(self, cut: Removal) -> None:
        """Slice the parameters."""
        taken = cut.taken(self.outputs[0])
        if 1 in taken:
            for index in range(1, len(self.inputs)):
                cut.slice(self.node, index, {0: taken[1]})


class InstanceNormalization(ChannelAffine):
    """Every channel normalised over its positions.

    https://onnx.ai/onnx/operators/onnx__InstanceNormalization.html
    """

    def passed_on(self, facts: KnownFacts, level: np.ndarray) -> np.ndarray:
        """Other constants than zero come out as amplified rounding, which depends on the size."""
        source = self.inputs[0]
        zero = facts.zero(source, facts.layouts.of[source.name].shape)
        axes = tuple(a for a, s in enumerate(level.shape) if s == 1)
        zero = np.asarray(zero.all(axis=axes, keepdims=True))
        worst = MAP if is_static(facts.shape(source)[2:]) else VARYING
        return np.where(zero & (level > VARYING), level, np.minimum(level, worst))

    def wants_values(self, facts: KnownFacts) -> list[int]:
        """Zeros stay exact."""
        return [0]


def has_equal_vectors(node: gs.Node) -> bool:
    """Whether all inputs but the first are vectors of the same length."""
    return len({tuple(t.shape) for t in node.inputs[1:]}) == 1 and len(node.inputs[1].shape) == 1
