"""Matrix products with a constant matrix."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.operators.contraction import Contraction, Put, Wiring
from onnx_simplify.operators.interfaces import Removal
from onnx_simplify.operators.nodes import (
    constant_shape,
    has_input,
)


class Gemm(Contraction):
    """``Gemm`` with constant B: ``alpha * A' * B' + beta * C``.

    https://onnx.ai/onnx/operators/onnx__Gemm.html
    """

    @cached_property
    def wiring(self) -> Wiring:
        """A on input 0, B on input 1."""
        if len(constant_shape(self.node, 1)) != 2:
            raise Unsupported("B is not an initializer")
        return Wiring(0, 1, 2, 1, 0 if self.attrs.get("transA", 0) else 1, 1)

    def to_canonical(self, weight: np.ndarray) -> np.ndarray:
        """Outputs first."""
        return (weight if self.attrs.get("transB", 0) else weight.T)[None]

    def from_canonical(self, weight: np.ndarray) -> np.ndarray:
        """Inverse."""
        return weight[0] if self.attrs.get("transB", 0) else weight[0].T

    def column_axis(self) -> int:
        """The axis that is contracted."""
        return 1 if self.attrs.get("transB", 0) else 0

    def shrink_bias(self, cut: Removal, index: int, keep: np.ndarray) -> None:
        """Take positions of C along its last axis unless it is broadcast there."""
        shape = self.inputs[index].shape
        if len(shape) and shape[-1] > 1:
            cut.slice(self.node, index, {len(shape) - 1: keep})

    def add_bias(self, shift: np.ndarray, put: Put) -> bool:
        """C takes ``shift / beta``, broadcast if need be."""
        beta = self.bias_scale()
        if not has_input(self.node, 2) or beta == 0:
            self.attrs["beta"] = 1.0
            put(self.node, 2, shift.astype(self.inputs[1].dtype))
            return True
        return super().add_bias(shift / beta, put)

    def scale(self) -> float:
        """The factor alpha in front of the product."""
        return float(self.attrs.get("alpha", 1.0))

    def bias_scale(self) -> float:
        """The factor beta in front of C."""
        return float(self.attrs.get("beta", 1.0))


class MatMul(Contraction):
    """``MatMul`` with a constant matrix on either side.

    https://onnx.ai/onnx/operators/onnx__MatMul.html
    """

    @cached_property
    def wiring(self) -> Wiring:
        """The constant side is the weight; channels are on the contracted axis."""
        for weight, data, axis in ((1, 0, -1), (0, 1, -2)):
            matrix = self.inputs[weight]
            other = self.inputs[data]
            if isinstance(matrix, gs.Constant) and not isinstance(other, gs.Constant):
                if len(matrix.shape) != 2 or other.shape is None or len(other.shape) < 2:
                    break
                return Wiring(data, weight, None, 1, axis, axis)
        raise Unsupported("no operand is a constant matrix")

    def to_canonical(self, weight: np.ndarray) -> np.ndarray:
        """Outputs first."""
        return (weight.T if self.wiring.weight == 1 else weight)[None]

    def from_canonical(self, weight: np.ndarray) -> np.ndarray:
        """Inverse."""
        return weight[0].T if self.wiring.weight == 1 else weight[0]

    def column_axis(self) -> int:
        """The axis that is contracted."""
        return 0 if self.wiring.weight == 1 else 1

    def layout(self, layouts: Layouts) -> None:
        """As any linear operator, with the axes counted from the end."""
        wiring = self.wiring
        source = layouts(self.inputs[wiring.data])
        shape = layouts.shape(self.inputs[wiring.data])
        _, outputs, inputs = self.dims
        if shape[wiring.axis_in] != inputs:
            raise Unsupported("number of input channels is not known to match the weight")
        self.check_scales()
        axis = wiring.axis_in % source.ndim
        result = layouts.fresh(outputs)
        layouts.collapse(source, [a for a in range(source.ndim) if a != axis])
        layouts.set(
            self.outputs[0],
            result.reshape([outputs if a == axis else 1 for a in range(source.ndim)]),
        )
