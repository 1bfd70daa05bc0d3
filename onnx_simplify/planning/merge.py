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

from onnx_simplify.facts.facts import Facts
from onnx_simplify.operators import Operator
from onnx_simplify.operators.contraction import Contraction


@dataclass(frozen=True)
class Merger:
    """New groups of a convolution.

    Attributes:
        product: the convolution; weights between different new groups are zero.
        groups: how many.
        sources: labels of the input channels that stay, group by group.
        results: labels of the output channels that stay, group by group.
    """

    product: Contraction
    groups: int
    sources: np.ndarray
    results: np.ndarray

    def fits(self, facts: Facts, alive: np.ndarray) -> bool:
        """Whether exactly these channels of the convolution are alive."""
        source, result = (int(alive[s].sum()) for s in self.product.channels(facts))
        return (source, result) == (self.sources.size, self.results.size)


def can_move(facts: Facts, labels: np.ndarray, free: Collection[Operator] = ()) -> bool:
    """Whether channels may be put into any order.

    That is, whether every tensor that has any of them has each of them once, along one axis, has no
    others, and is touched by operators only that treat channels alike.

    Args:
        facts: what is known.
        labels: the channels.
        free: operators that take them in any order, because they get new groups.
    """
    if np.unique(labels).size != labels.size or facts.layouts.frozen[labels].any():
        return False
    among = np.zeros(facts.layouts.frozen.size, bool)
    among[labels] = True
    touching: set[Operator] = set()
    for name in facts.tensors_with(labels):
        layout = facts.layouts.of[name]
        found = among[layout]
        if not found.any():
            continue
        if not found.all() or layout.size != labels.size or layout.size not in layout.shape:
            return False
        if not np.array_equal(layout.ravel(), labels):
            return False
        if name in facts.producer:
            touching.add(facts.producer[name])
        touching.update(op for op, _ in facts.readers.get(name, ()))
    return all(op in free or op.may_reorder(facts) for op in touching)


def filled_up(groups: Sequence[np.ndarray], size: int, spare: np.ndarray) -> np.ndarray:
    """The labels of each group in turn, filled up to ``size`` with spare ones."""
    found = []
    for own in groups:
        found += [own, spare[: size - own.size]]
        spare = spare[size - own.size :]
    return np.concatenate(found)


def is_placement(product: Contraction, *, grouped: bool = False) -> bool:
    """Whether every input channel goes to one place at most, and one to each.

    Args:
        product: a convolution.
        grouped: whether it may have groups.
    """
    groups, _, inputs = product.dims
    if groups > 1 and not grouped:
        return False
    if inputs == 1 or product.taps() > 1 or product.spread_axes():
        return False
    used = product.used
    return bool((used.sum(axis=1) <= 1).all() and (used.sum(axis=2) <= 1).all())
