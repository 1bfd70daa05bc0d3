"""Remove channels that nothing live depends on.

A label (a channel with everything equated to it) is dead when none of its positions, in any tensor,
is needed.  Every tensor then drops the positions of dead labels:

    X [N, 64, H, W], W1 [64, 32, 3, 3], W2 [128, 64, 3, 3]   and labels 3, 17 dead
    X [N, 62, H, W], W1 [62, 32, 3, 3], W2 [128, 62, 3, 3]
"""

from __future__ import annotations

from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.model import Model
from onnx_simplify.passes.cut import Cut
from onnx_simplify.passes.regroup_shuffles import regroup_shuffles
from onnx_simplify.planning.planner import Planner


def remove_zeroed(model: Model, planner: Planner) -> dict[int, int]:
    """Remove dead channels, in place.

    Args:
        model: a cleaned model.
        planner: decides which dead channels stay because the rest runs faster with them.

    Returns:
        By ``id`` of a layer's node, how many dead output channels stay for alignment.
    """
    facts = Facts(model)
    alive = facts.alive(facts.needed)
    if regroup_shuffles(facts, alive):
        facts = Facts(model)
        alive = facts.alive(facts.needed)
    closed, mergers = planner.close(facts, alive)
    aligned = closed & ~facts.close(alive, free=mergers)
    found = {
        id(product.node): int(aligned[product.channels(facts)[1]].sum())
        for product in facts.contractions
    }
    Cut(facts, closed, mergers).apply()
    return found
