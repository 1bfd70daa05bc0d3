"""The registry: which rules belong to which operator.

Everything known about an operator, how its channels relate, which facts it passes on, and how it
is rewritten when channels leave, is in one class of this package.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from onnx_simplify.channels.operators import (
    elementwise,
    linear,
    quantization,
    spatial,
    structural,
)
from onnx_simplify.channels.operators.base import Operator, Shape
from onnx_simplify.channels.operators.linear import Linear
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.patterns import Patterns

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
    return lookup(node)(node, patterns)


def contractions(model: Model) -> Iterator[Linear]:
    """The products with constant weights that a model forms, in execution order.

    Whether the channels of all of them can be followed is another matter.
    """
    for node in model.graph.nodes:
        for product in bind(node, model.patterns).contractions:
            if product.is_sound:
                yield product


register(elementwise.Elementwise, *elementwise.NAMES)
register(elementwise.Dropout, "Dropout")
register(elementwise.ChannelAffine, "BatchNormalization")
register(elementwise.InstanceNormalization, "InstanceNormalization")
register(linear.Convolution, "Conv")
register(linear.TransposedConvolution, "ConvTranspose")
register(linear.Gemm, "Gemm")
register(linear.MatMul, "MatMul")
register(quantization.Quantization, "QuantizeLinear", "DequantizeLinear")
register(spatial.GlobalPool, "GlobalAveragePool", "GlobalMaxPool")
register(spatial.MaxPool, "MaxPool")
register(spatial.AveragePool, "AveragePool", "LpPool")
register(spatial.Resize, "Resize", "Upsample")
register(spatial.Pad, "Pad")
register(spatial.Reduce, *spatial.REDUCTIONS)
register(structural.Reshape, "Reshape", "Flatten")
register(structural.Transpose, "Transpose")
register(structural.Squeeze, "Squeeze", "Unsqueeze")
register(structural.Expand, "Expand")
register(structural.Tile, "Tile")
register(structural.Concat, "Concat")
register(structural.Split, "Split")
register(structural.Slice, "Slice")
register(structural.Gather, "Gather")
register(structural.SpaceToDepth, "SpaceToDepth")
register(structural.DepthToSpace, "DepthToSpace")
register(Shape, "Shape")
