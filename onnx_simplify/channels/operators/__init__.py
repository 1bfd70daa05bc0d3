"""The registry: which rules belong to which operator.

Everything known about an operator, how its channels relate, which facts it passes on, and how it
is rewritten when channels leave, is in one class of this package.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnx_simplify.channels.operators import (
    elementwise,
    linear,
    quantization,
    spatial,
    structural,
)
from onnx_simplify.channels.operators.base import OPAQUE, Operator, Shape

__all__ = ["OPAQUE", "Operator", "lookup", "register"]

_REGISTRY: dict[str, Operator] = {}


def register(rule: Operator, *names: str) -> None:
    """Give operators of the default domain a rule (replacing the one they had)."""
    for name in names:
        _REGISTRY[name] = rule


def lookup(node: gs.Node) -> Operator:
    """The rule of a node; the opaque one for unknown operators and other domains."""
    if node.domain not in (None, "", "ai.onnx"):
        return OPAQUE
    return _REGISTRY.get(node.op, OPAQUE)


register(elementwise.Elementwise(), *elementwise.NAMES)
register(elementwise.Dropout(), "Dropout")
register(elementwise.ChannelAffine(), "BatchNormalization")
register(elementwise.InstanceNormalization(), "InstanceNormalization")
register(linear.Convolution(), "Conv")
register(linear.TransposedConvolution(), "ConvTranspose")
register(linear.Gemm(), "Gemm")
register(linear.MatMul(), "MatMul")
register(quantization.Quantization(), "QuantizeLinear", "DequantizeLinear")
register(spatial.GlobalPool(), "GlobalAveragePool", "GlobalMaxPool")
register(spatial.MaxPool(), "MaxPool")
register(spatial.AveragePool(), "AveragePool", "LpPool")
register(spatial.Resize(), "Resize", "Upsample")
register(spatial.Pad(), "Pad")
register(spatial.Reduce(), *spatial.REDUCTIONS)
register(structural.Reshape(), "Reshape", "Flatten")
register(structural.Transpose(), "Transpose")
register(structural.Squeeze(), "Squeeze", "Unsqueeze")
register(structural.Expand(), "Expand")
register(structural.Tile(), "Tile")
register(structural.Concat(), "Concat")
register(structural.Split(), "Split")
register(structural.Slice(), "Slice")
register(structural.Gather(), "Gather")
register(structural.SpaceToDepth(), "SpaceToDepth")
register(structural.DepthToSpace(), "DepthToSpace")
register(Shape(), "Shape")
