"""Groups of a convolution that become one, and channels that move for it.

A grouped convolution has equally many channels in all groups, so it shrinks to its widest one only.
Where its channels are free to move, groups can be put together:

    groups of 2, 1, 3, 2 live channels   4 groups of 3 (trimmed) or, merged, 2 groups of 4

The order of channels is nobody's business but that of the layers that make and read them
(McCarter and Dronen, "UPSCALE: unconstrained channel pruning", ICML 2023, use the same freedom).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.analysis import Analysis
from onnx_simplify.channels.operators.linear import Convolution, Linear


@dataclass(frozen=True)
class Merger:
    """New groups of a convolution.

    Attributes:
        node: the convolution; weights between different new groups are zero.
        groups: how many.
        sources: labels of the input channels that stay, group by group.
        results: labels of the output channels that stay, group by group.
    """

    node: gs.Node
    groups: int
    sources: np.ndarray
    results: np.ndarray

    def fits(self, analysis: Analysis, alive: np.ndarray) -> bool:
        """Whether exactly these channels of the node are alive."""
        rule = analysis.rule[id(self.node)]
        assert isinstance(rule, Linear)
        source, result = (int(alive[s].sum()) for s in rule.channels(self.node, analysis))
        return (source, result) == (self.sources.size, self.results.size)


def can_move(analysis: Analysis, labels: np.ndarray, free: Collection[int] = ()) -> bool:
    """Whether channels may be put into any order.

    That is, whether every tensor that has any of them has each of them once, along one axis, has no
    others, and is touched by operators only that treat channels alike.

    Args:
        analysis: the analysis.
        labels: the channels.
        free: ``id(node)`` of nodes that take them in any order, because they get new groups.
    """
    if np.unique(labels).size != labels.size or analysis.layouts.frozen[labels].any():
        return False
    among = np.zeros(analysis.layouts.frozen.size, bool)
    among[labels] = True
    nodes: dict[int, gs.Node] = {}
    for name in analysis.tensors_with(labels):
        layout = analysis.layouts.of[name]
        found = among[layout]
        if not found.any():
            continue
        if not found.all() or layout.size != labels.size or layout.size not in layout.shape:
            return False
        if not np.array_equal(layout.ravel(), labels):
            return False
        if name in analysis.producer:
            nodes[id(analysis.producer[name])] = analysis.producer[name]
        nodes |= {id(node): node for node, _ in analysis.layouts.readers.get(name, ())}
    return all(
        key in free or analysis.rule[key].may_reorder(node, analysis)
        for key, node in nodes.items()
    )


def filled_up(groups: Sequence[np.ndarray], size: int, spare: np.ndarray) -> np.ndarray:
    """The labels of each group in turn, filled up to ``size`` with spare ones."""
    found = []
    for own in groups:
        found += [own, spare[: size - own.size]]
        spare = spare[size - own.size :]
    return np.concatenate(found)


def is_placement(node: gs.Node, rule: Convolution, *, grouped: bool = False) -> bool:
    """Whether every input channel goes to one place at most, and one to each.

    Args:
        node: a convolution.
        rule: its rule.
        grouped: whether it may have groups.
    """
    groups, _, inputs = rule.dims(node)
    if groups > 1 and not grouped:
        return False
    if inputs == 1 or rule.taps(node) > 1 or rule.spread_axes(node):
        return False
    used = rule.used(node)
    return bool((used.sum(axis=1) <= 1).all() and (used.sum(axis=2) <= 1).all())
