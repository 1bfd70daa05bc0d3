"""The layers of a model as the cost model sees them."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.analysis import Analysis
from onnx_simplify.channels.operators.linear import Linear
from onnx_simplify.planning.costs import Layer


def layer_of(
    node: gs.Node, rule: Linear, analysis: Analysis, alive: np.ndarray | None = None
) -> Layer:
    """A node with weights as the cost model sees it.

    Args:
        node: the node.
        rule: its rule.
        analysis: the analysis.
        alive: labels that stay; without it, and for groups, as before any channel leaves.
    """
    groups, outputs, inputs = rule.dims(node)
    if alive is not None and groups == 1:
        inputs, outputs = (int(alive[s].sum()) for s in rule.channels(node, analysis))
    return Layer(groups, inputs, outputs, rule.taps(node), rule.positions(node, analysis)[1])


def layers_at(
    analysis: Analysis, labels: np.ndarray, side: int, alive: np.ndarray
) -> list[Layer]:
    """The layers with one group that read (side 0) or make (side 1) some channels."""
    among = np.zeros(alive.size, bool)
    among[labels] = True
    nodes: dict[int, gs.Node] = {}
    for name in analysis.tensors_with(labels):
        if side == 0:
            nodes |= {id(node): node for node, _ in analysis.layouts.readers.get(name, ())}
        elif name in analysis.producer:
            nodes[id(analysis.producer[name])] = analysis.producer[name]
    found = []
    for key, node in nodes.items():
        rule = analysis.rule[key]
        if isinstance(rule, Linear) and among[rule.channels(node, analysis)[side]].any():
            layer = layer_of(node, rule, analysis, alive)
            if layer.groups == 1:
                found.append(layer)
    return found
