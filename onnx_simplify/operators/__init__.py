"""The registry: which rules belong to which operator.

Everything known about an operator, how its channels relate, which facts it passes on, and how it
is rewritten when channels leave, is in one class of this package.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from onnx_simplify.graph.model import Model
from onnx_simplify.graph.patterns import Patterns
from onnx_simplify.operators import (
    attention,
    convolution,
    elementwise,
    foreign,
    matrix,
    movement,
    normalization,
    pooling,
    quantization,
    selection,
    sizes,
)
from onnx_simplify.operators.base import Operator
from onnx_simplify.operators.contraction import Contraction

__all__ = ["Operator", "bind", "contractions", "lookup", "register"]

_REGISTRY: dict[tuple[str, str], type[Operator]] = {}


def register(rules: type[Operator], *names: str, domain: str = "") -> None:
    """Give operators rules (replacing those they had).

    Args:
        rules: what nodes of these operators are bound to.
        names: the operators.
        domain: their domain, empty for the standard one.
    """
    for name in names:
        _REGISTRY[domain, name] = rules


def lookup(node: gs.Node) -> type[Operator]:
    """The rules of a node's operator; :class:`Operator` itself for one that is not known."""
    domain = "" if node.domain in (None, "ai.onnx") else node.domain
    return _REGISTRY.get((domain, node.op), Operator)


def bind(node: gs.Node, patterns: Patterns | None = None) -> Operator:
    """A node with the rules of its operator, see :class:`Operator`."""
    return lookup(node).suited(node)(node, patterns)


def contractions(model: Model) -> Iterator[Contraction]:
    """The products with constant weights that a model forms, in execution order.

    Whether the channels of all of them can be followed is another matter.
    """
    for node in model.graph.nodes:
        for product in bind(node, model.patterns).contractions:
            if product.is_sound:
                yield product


register(elementwise.Elementwise, *elementwise.NAMES)
register(elementwise.Dropout, "Dropout")
register(normalization.ChannelAffine, "BatchNormalization")
register(normalization.InstanceNormalization, "InstanceNormalization")
register(normalization.GroupNormalization, "GroupNormalization")
register(convolution.Convolution, "Conv")
register(convolution.TransposedConvolution, "ConvTranspose")
register(matrix.Gemm, "Gemm")
register(matrix.MatMul, "MatMul")
register(attention.Softmax, "Softmax", "LogSoftmax")
register(matrix.Einsum, "Einsum")
register(matrix.FusedMatMul, "FusedMatMul", domain=foreign.DOMAIN)
register(quantization.Quantization, "QuantizeLinear", "DequantizeLinear")
register(pooling.GlobalPool, "GlobalAveragePool", "GlobalMaxPool")
register(pooling.MaxPool, "MaxPool")
register(pooling.AveragePool, "AveragePool", "LpPool")
register(pooling.Resize, "Resize", "Upsample")
register(pooling.Sampled, "GridSample", "RoiAlign", "MaxRoiPool")
register(pooling.Pad, "Pad")
register(pooling.Reduce, *pooling.REDUCTIONS)
register(movement.Reshape, "Reshape", "Flatten")
register(movement.Transpose, "Transpose")
register(movement.Squeeze, "Squeeze", "Unsqueeze")
register(movement.Expand, "Expand")
register(movement.Tile, "Tile")
register(selection.Concat, "Concat")
register(selection.Split, "Split")
register(selection.Slice, "Slice")
register(selection.Gather, "Gather")
register(movement.SpaceToDepth, "SpaceToDepth")
register(movement.DepthToSpace, "DepthToSpace")
register(sizes.Shape, "Shape")
register(sizes.Size, "Size")
register(foreign.Activation, *foreign.ACTIVATIONS, domain=foreign.DOMAIN)
register(foreign.LikeFirst, *foreign.LIKE_FIRST, domain=foreign.DOMAIN)
register(foreign.LikeFirst, *foreign.NORMALIZATIONS)
register(sizes.ConstantOfShape, "ConstantOfShape")
