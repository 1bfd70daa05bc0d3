"""How the groups of a convolution with unevenly pruned groups are put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from onnx_simplify.facts.facts import Facts
from onnx_simplify.operators import Operator
from onnx_simplify.operators.contraction import Contraction
from onnx_simplify.planning.costs import Layer, convolution, rounded
from onnx_simplify.planning.layers import layer_of, layers_at
from onnx_simplify.planning.merge import Merger, can_move, filled_up
from onnx_simplify.planning.profiles import Profile

# New groups have at most so many blocks of channels on either side.
_LARGEST = 8


def merge_groups(profile: Profile, facts: Facts, alive: np.ndarray) -> dict[Operator, Merger]:
    """New groups for grouped convolutions, where they are faster than the trimmed old ones.

    Args:
        profile: the target.
        facts: what is known.
        alive: labels that are needed, before :meth:`Facts.close`; not modified.

    Returns:
        By operator. The channels of a merger may not all be alive: dead ones fill it up.
    """
    found: dict[Operator, Merger] = {}
    if not profile.rearranges_blocks:
        return found
    taken: set[int] = set()
    for product in facts.contractions:
        if not product.regroups or product.is_quantized():
            continue
        groups, outputs, inputs = product.dims
        if groups == 1 or (outputs, inputs) == (1, 1):
            continue
        source, result = product.channels(facts)
        labels = set(source.tolist()) | set(result.tolist())
        if taken & labels or set(source.tolist()) & set(result.tolist()):
            continue
        merger = _best(profile, facts, product, alive)
        if merger is not None and all(can_move(facts, s, {product}) for s in (source, result)):
            found[product] = merger
            taken |= labels
    return found


def _best(profile: Profile, facts: Facts, product: Contraction, alive: np.ndarray) -> Merger | None:
    """The cheapest merger, if it is cheaper than trimming all groups to the widest."""
    layer = layer_of(product, facts)
    source, result = (s.reshape(layer.groups, -1) for s in product.channels(facts))
    needs = np.stack([alive[source].sum(axis=1), alive[result].sum(axis=1)], axis=1)
    needs = needs[needs.any(axis=1)]
    if not len(needs):
        return None
    makers, users = layers_at(facts, source, 1, alive), layers_at(facts, result, 0, alive)

    def cost(groups: int, inputs: int, outputs: int) -> float:
        own = Layer(groups, inputs, outputs, layer.taps, layer.positions)
        total = convolution(profile, own)
        total += sum(convolution(profile, m.with_outputs(groups * inputs)) for m in makers)
        return total + sum(convolution(profile, u.with_inputs(groups * outputs)) for u in users)

    least = cost(len(needs), *(max(int(n), 1) for n in needs.max(axis=0)))
    best: tuple[list[list[int]], tuple[int, int]] | None = None
    pairs = [(int(a), int(b)) for a, b in needs]
    live = np.flatnonzero(alive[source].any(axis=1) | alive[result].any(axis=1))
    for room in _rooms(profile.block, needs):
        bins = pack(pairs, room)
        if len(bins) * room[0] > source.size or len(bins) * room[1] > result.size:
            continue
        found = cost(len(bins), *room)
        if found < least:
            least, best = found, (bins, room)
    if best is None:
        return None
    bins, room = best
    if (len(bins), *room) == (layer.groups, source.shape[1], result.shape[1]):
        # They have that form: leave them in their order.
        return Merger(product, layer.groups, source.ravel(), result.ravel())
    old = [live[members] for members in bins]
    sides = [
        _filled(labels, alive, old, size)
        for labels, size in zip((source, result), room, strict=True)
    ]
    return Merger(product, len(bins), *sides)


def _rooms(block: int, needs: np.ndarray) -> Iterator[tuple[int, int]]:
    """Sizes that groups could have: multiples of the block that hold the widest old one."""
    least = [rounded(max(int(n), 1), block) // block for n in needs.max(axis=0)]
    for inputs in range(least[0], _LARGEST + 1):
        for outputs in range(max(least[1], inputs - 1), min(inputs + 1, _LARGEST) + 1):
            yield inputs * block, outputs * block


def pack(needs: Sequence[tuple[int, int]], room: tuple[int, int]) -> list[list[int]]:
    """Put items into as few bins as a greedy rule finds: each bin takes what suits it best.

    What suits it is the item with the largest scalar product with the room that is left
    (Panigrahy et al., "Heuristics for vector bin packing", 2011).

    Args:
        needs: what each item needs in two dimensions, none more than ``room``.
        room: what a bin holds.

    Returns:
        The items of each bin.
    """
    left = list(range(len(needs)))
    bins = []
    while left:
        first, second = room
        members: list[int] = []
        while True:
            able = [k for k in left if needs[k][0] <= first and needs[k][1] <= second]
            if not able:
                break
            best = max(able, key=lambda k: (needs[k][0] * first + needs[k][1] * second, -k))
            members.append(best)
            left.remove(best)
            first, second = first - needs[best][0], second - needs[best][1]
        bins.append(sorted(members))
    return bins


def _filled(labels: np.ndarray, alive: np.ndarray, bins: list[np.ndarray], size: int) -> np.ndarray:
    """The channels of each bin in turn, filled up to ``size`` with dead ones.

    Args:
        labels: labels ``[old groups, channels]``.
        alive: labels that are needed.
        bins: the old groups in each new one.
        size: channels of a new group.
    """
    own = [labels[members][alive[labels[members]]] for members in bins]
    return filled_up(own, size, labels[~alive[labels]])
