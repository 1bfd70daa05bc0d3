"""Treat channels with very small weights as zero, on request.

    max |W[o]| <= EPS * max |W|    =>    W[o] = 0

Networks trained with weight decay hold channels that are zero but for the last digits. This is the
one rewrite that changes what is computed; how much is measured, never assumed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnx_simplify.graph.edit import Editor
from onnx_simplify.graph.identity import NodeMap
from onnx_simplify.graph.model import Model
from onnx_simplify.operators import contractions
from onnx_simplify.operators.contraction import Contraction


def zero_small(model: Model, threshold: float) -> NodeMap[int]:
    """Set the weights of small output channels to zero, in place; biases stay.

    Args:
        model: a cleaned model, BatchNormalization folded.
        threshold: a channel is small if none of its weights is larger than this share of the
            layer's largest.

    Returns:
        The number of channels, of those that were not zero before, by the layer's node.
    """
    editor = Editor(model)
    found: NodeMap[int] = NodeMap()
    for product, sizes in _sizes(model):
        small = (sizes > 0) & (sizes <= threshold)
        if small.any():
            weight = np.array(product.weights())
            weight[small] = 0
            product.set_weights(weight, editor.put)
            found[product.node] = int(small.sum())
    editor.finish()
    return found


def thresholds(model: Model, largest: float) -> np.ndarray:
    """The thresholds that make a difference: sizes of channels, ascending, up to ``largest``.

    Args:
        model: as for :func:`zero_small`.
        largest: no threshold above this.
    """
    sizes = [sizes.ravel() for _, sizes in _sizes(model)]
    known = np.unique(np.concatenate(sizes)) if sizes else np.zeros(0)
    return known[(known > 0) & (known <= largest)]


def _sizes(model: Model) -> Iterator[tuple[Contraction, np.ndarray]]:
    """Layers, and each output channel's largest weight relative to the layer's.

    The array has shape ``[groups, outputs per group]``.
    """
    for product in contractions(model):
        if product.is_quantized():
            continue
        weight = product.weights()
        if weight.size == 0:
            continue
        axes = tuple(range(2, weight.ndim))
        low = weight.min(axis=axes).astype(np.float64)
        size = np.maximum(weight.max(axis=axes).astype(np.float64), -low)
        if np.isfinite(size).all() and size.max() > 0:
            yield product, size / size.max()
