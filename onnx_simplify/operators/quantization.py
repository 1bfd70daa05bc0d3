"""Operators that change how numbers are stored, position by position."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.channels.values import MAP
from onnx_simplify.graph.expressions import Dim
from onnx_simplify.operators.base import Masks, Operator
from onnx_simplify.operators.interfaces import KnownFacts, KnownSizes, Removal


class Quantization(Operator):
    """``QuantizeLinear`` and ``DequantizeLinear`` of activations, with known scales.

    https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html. Those of weights are not there, see
    :mod:`onnx_simplify.graph.quantized`.
    """

    reorders = True

    def shapes(self, known: KnownSizes) -> list[list[Dim]]:
        """As before."""
        return [known.shape(self.inputs[0])]

    def axis(self, rank: int) -> int | None:
        """The axis along which scales differ; None if there is one scale for all."""
        if np.prod(self.inputs[1].shape) == 1:
            return None
        return int(self.attrs.get("axis", 1)) % rank

    def layout(self, layouts: Layouts) -> None:
        """Channels pass through."""
        source = layouts(self.inputs[0])
        parameters = [t for t in self.inputs[1:] if t.name]
        if not parameters or not all(isinstance(t, gs.Constant) for t in parameters):
            raise Unsupported("scales are computed")
        if self.attrs.get("block_size", 0) or any(len(t.shape) > 1 for t in parameters):
            raise Unsupported("scales of blocks")
        axis = self.axis(source.ndim)
        if axis is not None and source.shape[axis] > 1:
            if any(list(t.shape) != [source.shape[axis]] for t in parameters):
                raise Unsupported("scales do not fit the channels")
        layouts.set(self.outputs[0], source)

    def level(self, facts: KnownFacts) -> Masks:
        """Constants stay constant; not uniform if scales differ within a channel."""
        level = facts.level[self.inputs[0].name]
        axis = self.axis(level.ndim)
        if axis is not None and level.shape[axis] == 1:
            level = np.minimum(level, MAP)
        return [level]

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """Channel by channel."""
        return [outputs[0]]

    def shrink(self, cut: Removal) -> None:
        """Slice scales and zero points."""
        taken = cut.taken(self.outputs[0])
        axis = self.axis(len(cut.facts.shape(self.inputs[0])))
        if axis is not None and axis in taken:
            for index, tensor in enumerate(self.inputs[1:], 1):
                if tensor.name:
                    cut.slice(self.node, index, {0: taken[axis]})
