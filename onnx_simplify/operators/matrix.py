"""Matrix products with a constant matrix."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.graph.expressions import Dim
from onnx_simplify.operators.attention import LiveProduct
from onnx_simplify.operators.base import Operator
from onnx_simplify.operators.contraction import Contraction, Put, Wiring
from onnx_simplify.operators.interfaces import KnownSizes, Removal
from onnx_simplify.operators.nodes import (
    constant_shape,
    has_input,
)


class Matrix(Contraction):
    """A contraction whose weights are a matrix, stored either way: :meth:`column_axis` tells."""

    def to_canonical(self, weight: np.ndarray) -> np.ndarray:
        """Outputs first."""
        return (weight if self.column_axis() == 1 else weight.T)[None]

    def from_canonical(self, weight: np.ndarray) -> np.ndarray:
        """Inverse."""
        return weight[0] if self.column_axis() == 1 else weight[0].T


class Gemm(Matrix):
    """``Gemm`` with constant B: ``alpha * A' * B' + beta * C``.

    https://onnx.ai/onnx/operators/onnx__Gemm.html
    """

    @cached_property
    def wiring(self) -> Wiring:
        """A on input 0, B on input 1."""
        if len(constant_shape(self.node, 1)) != 2:
            raise Unsupported("B is not an initializer")
        return Wiring(0, 1, 2, 1, 0 if self.attrs.get("transA", 0) else 1, 1)

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


class MatMul(Matrix):
    """``MatMul`` with a constant matrix on either side.

    https://onnx.ai/onnx/operators/onnx__MatMul.html
    """

    @classmethod
    def suited(cls, node: gs.Node) -> type[Operator]:
        """Of two operands that are computed, none holds weights."""
        live = cls is MatMul and not any(isinstance(t, gs.Constant) for t in node.inputs)
        return LiveProduct if live else cls

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


class FusedMatMul(MatMul):
    """``FusedMatMul`` of onnxruntime with a constant matrix behind: ``alpha * A * B'``.

    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    """

    @cached_property
    def wiring(self) -> Wiring:
        """B on input 1; A and batches as they are."""
        wiring = super().wiring
        if self._turned or wiring.weight != 1:
            raise Unsupported("operands are transposed")
        return wiring

    def shapes(self, known: KnownSizes) -> list[list[Dim | None]]:
        """The last size is the product's; of other operands nothing is said."""
        source, weight = known.shape(self.inputs[0]), known.shape(self.inputs[1])
        if self._turned or len(weight) != 2 or len(source) < 2:
            return []
        return [[*source[:-1], weight[1 - self.column_axis()]]]

    @property
    def _turned(self) -> bool:
        """Whether axes of A, or of batches, are exchanged."""
        return any(self.attrs.get(n, 0) for n in ("transA", "transBatchA", "transBatchB"))

    def column_axis(self) -> int:
        """The axis that is contracted."""
        return 1 if self.attrs.get("transB", 0) else 0

    def scale(self) -> float:
        """The factor alpha in front of the product."""
        return float(self.attrs.get("alpha", 1.0))


class Einsum(Matrix):
    """``Einsum`` of data and a constant matrix that contracts one axis of the data.

    One letter of the data, the inputs, makes way for another, the outputs; the others pass through:
    ``bsi,io->bso`` is a matrix product, ``bchw,oc->bohw`` a 1x1 convolution.

    https://onnx.ai/onnx/operators/onnx__Einsum.html
    """

    @cached_property
    def _terms(self) -> tuple[int, str, str, str]:
        """Which input the matrix is, and the letters of data, matrix and output."""
        left, arrow, output = self.attrs["equation"].replace(" ", "").partition("->")
        terms = left.split(",")
        places = [k for k, t in enumerate(self.inputs) if isinstance(t, gs.Constant)]
        if not arrow or len(terms) != 2 or len(places) != 1 or "." in left:
            raise Unsupported("not a product with a constant matrix")
        (place,) = places
        data, matrix = terms[1 - place], terms[place]
        if any(len(set(t)) < len(t) for t in (data, matrix, output)) or len(matrix) != 2:
            raise Unsupported("not a product with a constant matrix")
        return place, data, matrix, output

    @cached_property
    def wiring(self) -> Wiring:
        """The letter that is contracted, and the one that takes its place."""
        place, data, matrix, output = self._terms
        inputs, outputs = set(matrix) & set(data), set(matrix) - set(data)
        if len(inputs) != 1 or set(output) != (set(data) - inputs) | outputs:
            raise Unsupported("not a product with a constant matrix")
        (source,), (result,) = inputs, outputs
        return Wiring(1 - place, place, None, 1, data.index(source), output.index(result))

    def column_axis(self) -> int:
        """The axis that is contracted."""
        _, data, matrix, _ = self._terms
        return 1 if matrix[1] in data else 0
