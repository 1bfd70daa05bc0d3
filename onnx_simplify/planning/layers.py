"""The layers of a model as the cost model sees them."""

from __future__ import annotations

import numpy as np

from onnx_simplify.facts.facts import Facts
from onnx_simplify.operators import Operator
from onnx_simplify.operators.contraction import Contraction
from onnx_simplify.planning.costs import Layer


def layer_of(product: Contraction, facts: Facts, alive: np.ndarray | None = None) -> Layer:
    """A product with constant weights as the cost model sees it.

    Args:
        product: the product.
        facts: what is known.
        alive: labels that stay; without it, and for groups of several, as before any leaves.
    """
    groups, outputs, inputs = product.dims
    if alive is not None and groups == 1:
        inputs, outputs = (int(alive[s].sum()) for s in product.channels(facts))
    elif alive is not None and outputs == inputs == 1:
        groups = max(int(alive[product.channels(facts)[1]].sum()), 2)
    return Layer(groups, inputs, outputs, product.taps(), product.positions(facts)[1])


def layers_at(facts: Facts, labels: np.ndarray, side: int, alive: np.ndarray) -> list[Layer]:
    """The layers with one group that read (side 0) or make (side 1) some channels."""
    among = np.zeros(alive.size, bool)
    among[labels] = True
    touching: list[Operator] = []
    for name in facts.tensors_with(labels):
        if side == 0:
            touching += [op for op, _ in facts.readers.get(name, ())]
        elif name in facts.producer:
            touching.append(facts.producer[name])
    found = []
    for op in dict.fromkeys(touching):
        for product in op.contractions:
            if among[product.channels(facts)[side]].any():
                layer = layer_of(product, facts, alive)
                if layer.groups == 1:
                    found.append(layer)
    return found
