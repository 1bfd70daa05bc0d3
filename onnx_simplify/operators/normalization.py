"""Operators that scale and shift every channel."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.channels.values import MAP, UNIFORM, VARYING, min_to
from onnx_simplify.graph.expressions import Dim
from onnx_simplify.operators.base import Masks, Operator
from onnx_simplify.operators.interfaces import KnownFacts, KnownSizes, Removal
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


class GroupNormalization(Operator):
    """Groups of channels normalised together; scales by channel, before version 21 by group.

    The channels of a group live and die together: all of them count into its statistics.

    https://onnx.ai/onnx/operators/onnx__GroupNormalization.html
    """

    def shapes(self, known: KnownSizes) -> list[list[Dim]]:
        """As before."""
        return [known.shape(self.inputs[0])]

    def layout(self, layouts: Layouts) -> None:
        """Channels pass through, whole groups at a time."""
        source = layouts(self.inputs[0])
        if source.ndim < 3 or not all(isinstance(t, gs.Constant) for t in self.inputs[1:]):
            raise Unsupported("parameters are computed")
        layout = layouts.collapse(source, [a for a in range(source.ndim) if a != 1])
        channels, groups = layout.shape[1], self._groups
        if channels == 1 and layouts.shape(self.inputs[0])[1] != 1:
            layouts.set(self.outputs[0], layout)
            return
        if channels % groups or any(t.shape not in ((channels,), (groups,)) for t in self._vectors):
            raise Unsupported("parameters do not fit the channels")
        members = layout.reshape(groups, -1)
        layouts.equate(members, members[:, :1])
        layouts.set(self.outputs[0], layout)

    @property
    def _groups(self) -> int:
        return int(self.attrs["num_groups"])

    @property
    def _vectors(self) -> list[np.ndarray]:
        """Scale and bias."""
        return [np.asarray(t.values) for t in self.inputs[1:3]]

    def _erased(self, channels: int) -> np.ndarray:
        """Which channels have a scale of zero and a bias that is a number."""
        scale, bias = self._vectors
        erased = np.isfinite(bias) & (scale == 0)
        return np.repeat(erased, channels // erased.size).reshape(1, -1)

    def level(self, facts: KnownFacts) -> Masks:
        """A scale of zero leaves the bias; the statistics of constants are constant."""
        source = self.inputs[0]
        shape = facts.layouts.of[self.outputs[0].name].shape
        level = min_to(facts.level[source.name], shape)
        members = level.reshape(self._groups if shape[1] > 1 else 1, -1)
        worst = MAP if is_static(facts.shape(source)[2:]) else VARYING
        whole = np.where(members.min(axis=1, keepdims=True) > VARYING, worst, VARYING)
        level = np.broadcast_to(whole, members.shape).reshape(shape)
        if shape[1] > 1:
            erased = self._erased(shape[1]).reshape(shape)
            level = np.where(erased, UNIFORM, level)
        return [level]

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """All of a group, unless the scale is zero."""
        wanted = outputs[0]
        assert wanted is not None
        shape = facts.layouts.of[self.inputs[0].name].shape
        if wanted.shape[1] > 1:
            wanted = wanted & ~self._erased(wanted.shape[1]).reshape(wanted.shape)
            groups = wanted.reshape(self._groups, -1).any(axis=1, keepdims=True)
            wanted = np.broadcast_to(groups, (self._groups, wanted.shape[1] // self._groups))
            wanted = wanted.reshape(outputs[0].shape)  # type: ignore[union-attr]
        return [np.broadcast_to(wanted, shape), *facts.all_of(self.inputs[1:])]

    def shrink(self, cut: Removal) -> None:
        """Fewer groups; their parameters."""
        kept = cut.kept(self.outputs[0]).get(1)
        if kept is None:
            return
        size = kept.size // self._groups
        groups = np.flatnonzero(kept.reshape(-1, size).any(axis=1))
        for index in (1, 2):
            single = self.inputs[index].shape[0] == self._groups
            cut.slice(
                self.node, index, {0: groups if single and size > 1 else np.flatnonzero(kept)}
            )
        self.attrs["num_groups"] = int(groups.size)


def has_equal_vectors(node: gs.Node) -> bool:
    """Whether all inputs but the first are vectors of the same length."""
    return len({tuple(t.shape) for t in node.inputs[1:]}) == 1 and len(node.inputs[1].shape) == 1
