"""Operators that onnxruntime has and the standard has not, or not in all of its versions.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from onnx_simplify.graph.expressions import Dim
from onnx_simplify.operators.base import Operator
from onnx_simplify.operators.elementwise import Elementwise
from onnx_simplify.operators.interfaces import KnownSizes

DOMAIN = "com.microsoft"
ACTIVATIONS = ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")
"""Operators position by position, some with a bias."""

LIKE_FIRST = ("GroupNorm", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
"""Operators of onnxruntime's domain whose first and fourth output are as large as their input."""

NORMALIZATIONS = ("LayerNormalization", "SimplifiedLayerNormalization")
"""Operators in the standard domain that onnxruntime has in earlier versions, or alone."""


class Activation(Elementwise):
    """``Gelu`` and its kin; a bias is a vector along the last axis."""

    @property
    def stores_operands(self) -> bool:
        """onnxruntime needs to know which operand is which."""
        return False


class LikeFirst(Operator):
    """An operator of which nothing is known but that its output is as large as its input."""

    @property
    def is_opaque(self) -> bool:
        """No rules apply."""
        return True

    def shapes(self, known: KnownSizes) -> list[list[Dim] | None]:
        """As before; what comes between holds statistics."""
        shape = known.shape(self.inputs[0])
        return [shape if k in (0, 3) else None for k in range(len(self.outputs))]
