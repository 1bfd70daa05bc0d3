"""Convolutions: contractions with a window."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Unsupported
from onnx_simplify.graph.expressions import Dim, product, total
from onnx_simplify.operators.contraction import Contraction, Wiring
from onnx_simplify.operators.interfaces import KnownFacts, KnownSizes
from onnx_simplify.operators.nodes import (
    attr_ints,
    constant_shape,
    windowed,
)


def _convolution_wiring(node: gs.Node) -> Wiring:
    """Data, weight and bias in this order, channels on axis 1."""
    if len(constant_shape(node, 1)) < 3:
        raise Unsupported("weight is not an initializer")
    return Wiring(0, 1, 2, int(node.attrs.get("group", 1)), 1, 1)


class Convolution(Contraction):
    """``Conv``: weight ``[O, I/group, *kernel]``; zero padding turns constants into maps.

    https://onnx.ai/onnx/operators/onnx__Conv.html
    """

    regroups = True

    @cached_property
    def wiring(self) -> Wiring:
        """Input 0 and weight 1, channels on axis 1."""
        return _convolution_wiring(self.node)

    def to_canonical(self, weight: np.ndarray) -> np.ndarray:
        """Split the outputs by group."""
        groups = int(self.attrs.get("group", 1))
        return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])

    def from_canonical(self, weight: np.ndarray) -> np.ndarray:
        """Join the groups' outputs."""
        return weight.reshape(-1, *weight.shape[2:])

    def shapes(self, known: KnownSizes) -> list[list[Dim | None]]:
        """As many positions as the window has."""
        source, weight = known.shape(self.inputs[0]), constant_shape(self.node, 1)
        if len(weight) != len(source):
            return []
        return [[source[0], weight[0], *windowed(self.node, source[2:], weight[2:])]]

    def spread_axes(self) -> list[int]:
        """Axes along which the window may reach over the border."""
        rank = len(self.inputs[1].shape) - 2
        pads = attr_ints(self.node, "pads", [0] * 2 * rank)
        auto = self.attrs.get("auto_pad", "NOTSET")
        kernel = self.inputs[1].shape[2:]
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            return [a + 2 for a in range(rank) if kernel[a] > 1]
        if auto == "VALID":
            return []
        return [a + 2 for a in range(rank) if pads[a] or pads[a + rank]]

    def border_response(self, values: np.ndarray, facts: KnownFacts) -> np.ndarray | None:
        """The response of each tap, summed over the taps that are inside the input.

        A tap of a convolution reads its neighbour's constant, or a zero of the padding: a sum of
        products of one tap's response and an indicator for each axis.
        """
        if self.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return None
        weight = self.weights()
        groups, outputs, inputs, *kernel = weight.shape
        flat = weight.reshape(groups, outputs, inputs, -1)
        value = values.reshape(groups, inputs).astype(np.float64)
        found = np.einsum("goit,gi->got", flat, value, optimize=False)
        found = found.reshape(groups * outputs, *kernel)
        for axis in range(len(kernel)):
            # The axis that comes first is replaced by one at the end.
            found = np.tensordot(found, self._inside(axis, facts), (1, 0))
        return found[None].astype(np.float32)

    def _inside(self, axis: int, facts: KnownFacts) -> np.ndarray:
        """Which taps along a spatial axis read the input, float64 ``[taps, positions]``."""
        rank = len(self.inputs[1].shape) - 2
        taps = self.inputs[1].shape[axis + 2]
        if axis + 2 not in self.spread_axes():
            return np.ones((taps, 1))
        size, result = (facts.shape(t)[axis + 2] for t in (self.inputs[0], self.outputs[0]))
        pad = attr_ints(self.node, "pads", [0] * 2 * rank)[axis]
        stride = attr_ints(self.node, "strides", [1] * rank)[axis]
        dilation = attr_ints(self.node, "dilations", [1] * rank)[axis]
        places = np.arange(result) * stride - pad + np.arange(taps)[:, None] * dilation
        return ((places >= 0) & (places < size)).astype(np.float64)

    def window(self, axis: int) -> int:
        """The reach of the dilated kernel along a spatial axis."""
        if axis < 2:
            return 1
        kernel = self.inputs[1].shape[axis]
        dilations = attr_ints(self.node, "dilations", [1] * (len(self.inputs[1].shape) - 2))
        return int((kernel - 1) * dilations[axis - 2] + 1)


class TransposedConvolution(Contraction):
    """``ConvTranspose``: weight ``[I, O/group, *kernel]``; constants become maps.

    https://onnx.ai/onnx/operators/onnx__ConvTranspose.html
    """

    @cached_property
    def wiring(self) -> Wiring:
        """Input 0 and weight 1, channels on axis 1."""
        return _convolution_wiring(self.node)

    def to_canonical(self, weight: np.ndarray) -> np.ndarray:
        """Split the inputs by group and put outputs first."""
        groups = int(self.attrs.get("group", 1))
        split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        return split.swapaxes(1, 2)

    def from_canonical(self, weight: np.ndarray) -> np.ndarray:
        """Inverse."""
        weight = weight.swapaxes(1, 2)
        return weight.reshape(-1, *weight.shape[2:])

    def macs(self, shapes: dict[str, list[int]]) -> int:
        """One multiply-accumulate per weight and *input* position."""
        source = shapes[self.inputs[0].name]
        positions = int(np.prod(source)) // max(source[1], 1)
        return positions * int(np.prod(self.inputs[1].shape))

    def shapes(self, known: KnownSizes) -> list[list[Dim | None]]:
        """The window's positions, ``stride`` apart, as far as it reaches, less the padding."""
        source, weight = known.shape(self.inputs[0]), constant_shape(self.node, 1)
        rank = len(source) - 2
        auto = self.attrs.get("auto_pad", "NOTSET") != "NOTSET"
        if len(weight) != len(source) or auto or "output_shape" in self.attrs:
            return []
        strides, dilations, extra = (
            attr_ints(self.node, name, [default] * rank)
            for name, default in (("strides", 1), ("dilations", 1), ("output_padding", 0))
        )
        pads = attr_ints(self.node, "pads", [0] * 2 * rank)
        sizes = []
        for k, size in enumerate(source[2:]):
            reach = dilations[k] * (weight[k + 2] - 1) + 1
            more = reach - strides[k] + extra[k] - pads[k] - pads[k + rank]
            sizes.append(total([product([size, strides[k]]), more]))
        return [[source[0], weight[1] * int(self.attrs.get("group", 1)), *sizes]]

    def column_axis(self) -> int:
        """Inputs come first."""
        return 0

    def spread_axes(self) -> list[int]:
        """Each output position sees another part of the kernel."""
        return list(range(2, len(self.inputs[1].shape)))
