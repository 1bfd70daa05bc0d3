"""Narrow operands of sums, and the order of the channels of the sum that makes them cheap.

A sum ``y = a + b + ...`` has its channels in one order. An operand that computes only some of them,
and puts them in their places with a 1x1 convolution of zeros and ones, pays for a full matrix. If
the channels of the sum are ordered such that each of its groups of 32 holds at most 16 of every
operand, that convolution has groups as well, and costs next to nothing:

    1x1 conv, 128 -> 1024 channels, half of them constant      131,072 MACs per position
    1x1 conv, 128 -> 512; grouped 1x1 conv, 32 x (16 -> 32)     65,536 + 16,384

The order is free ("UPSCALE", McCarter and Dronen, ICML 2023); the same order must do for all
operands, which :func:`balance` sees to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from onnx_simplify.facts.facts import Facts
from onnx_simplify.operators import Operator
from onnx_simplify.operators.contraction import Contraction
from onnx_simplify.planning.costs import Layer, convolution, rounded
from onnx_simplify.planning.layers import layers_at
from onnx_simplify.planning.merge import Merger, can_move, filled_up, is_placement
from onnx_simplify.planning.profiles import Profile

# Groups of a sum's channels have at most so many blocks.
_LARGEST = 8
# So many orders are tried, the most promising first.
_TRIES = 4
# Exchanges without any progress before :func:`balance` gives up, and partners looked at for each.
_PATIENCE = 400
_PARTNERS = 400


@dataclass(frozen=True)
class Operand:
    """One operand of a sum.

    Attributes:
        narrow: which of the sum's channels it has to compute, bool ``(channels,)``.
        maker: the layer that computes it.
        positions: positions in space of the sum.
    """

    narrow: np.ndarray
    maker: Layer
    positions: int

    def wide(self, profile: Profile, channels: int) -> float:
        """Nanoseconds if it computes all channels."""
        return convolution(profile, self.maker.with_outputs(channels))

    def placed(self, profile: Profile, groups: int, inputs: int, outputs: int) -> float:
        """Nanoseconds if it computes some, put in their places group by group."""
        places = Layer(groups, inputs, outputs, 1, self.positions)
        narrow = self.maker.with_outputs(groups * inputs)
        return convolution(profile, narrow) + convolution(profile, places)


@dataclass(frozen=True)
class Arrangement:
    """An order of a sum's channels.

    Attributes:
        members: channels of each group, int ``[groups, size]``; -1 where a dead one fills it up.
        rooms: by operand, how many channels of a group it computes.
    """

    members: np.ndarray
    rooms: dict[int, int]


def arrange(
    profile: Profile, operands: Sequence[Operand], users: Sequence[Layer], total: int
) -> Arrangement | None:
    """The cheapest order found, if it is cheaper than computing all channels in all operands.

    Args:
        profile: the target.
        operands: all operands; at least one.
        users: the layers that read the sum, with its channels as inputs.
        total: how many channels there may be, dead ones included.
    """
    channels = operands[0].narrow.size
    block = profile.block
    if block == 1 or channels < 2 * block:
        return None

    def shared(width: int) -> float:
        return sum(convolution(profile, user.with_inputs(width)) for user in users)

    narrow = np.array([int(o.narrow.sum()) for o in operands])
    aligned = rounded(channels, profile.multiple)
    least = shared(aligned) + sum(o.wide(profile, aligned) for o in operands)
    options = []
    for size in range(2 * block, min(_LARGEST * block, total) + 1, block):
        for groups in range(-(-channels // size), total // size + 1):
            gains, rooms = {}, {}
            for index, operand in enumerate(operands):
                rooms[index] = max(rounded(-(-int(narrow[index]) // groups), block), block)
                gain = operand.wide(profile, groups * size)
                gain -= operand.placed(profile, groups, rooms[index], size)
                if rooms[index] < size and gain > 0:
                    gains[index] = gain
            cost = shared(groups * size) - sum(gains.values())
            cost += sum(o.wide(profile, groups * size) for o in operands)
            if cost < least:
                options.append((cost, groups, size, gains, rooms))
    options.sort(key=lambda option: option[:3])
    for cost, groups, size, gains, rooms in options[:_TRIES]:
        chosen = sorted(gains, key=lambda index: (-gains[index], index))
        while chosen and cost < least:
            needs = np.stack([operands[index].narrow for index in chosen], axis=1)
            limits = np.array([rooms[index] for index in chosen])
            members = _balanced(needs.tobytes(), needs.shape, groups, size, tuple(limits))
            if members is not None:
                return Arrangement(members, {index: rooms[index] for index in chosen})
            dropped = chosen[-max(1, len(chosen) // 6) :]
            chosen = chosen[: -len(dropped)]
            cost += sum(gains[index] for index in dropped)
    return None


@lru_cache(maxsize=64)
def _balanced(
    needs: bytes, shape: tuple[int, int], groups: int, size: int, rooms: tuple[int, ...]
) -> np.ndarray | None:
    """What :func:`balance` finds: a sum is looked at before and after it is split."""
    return balance(np.frombuffer(needs, bool).reshape(shape), groups, size, np.array(rooms))


def balance(needs: np.ndarray, groups: int, size: int, rooms: np.ndarray) -> np.ndarray | None:
    """Share items out to groups of equal size, none of which may hold too many of any kind.

    Items first go where their kinds are rarest so far; then items of groups that hold too many are
    exchanged for others, as long as that makes things no worse.

    Args:
        needs: kinds of each item, bool ``[items, kinds]``.
        groups: number of groups.
        size: items of a group; there may be fewer items than places.
        rooms: most items of each kind in a group, int ``[kinds]``.

    Returns:
        Items of each group, int ``[groups, size]``, -1 where there is none; None if not found.
    """
    count = groups * size
    kinds = np.zeros((count, needs.shape[1]), np.int64)
    kinds[: len(needs)] = needs
    random = np.random.default_rng(0)
    group = np.empty(count, np.int64)
    load = np.zeros((groups, kinds.shape[1]), np.int64)
    held = np.zeros(groups, np.int64)
    share = kinds.sum(axis=0) / count
    for item in np.argsort(-kinds.sum(axis=1), kind="stable"):
        ahead = load + kinds[item] - (held + 1)[:, None] * share
        behind = load - held[:, None] * share
        growth = (ahead**2).sum(axis=1) - (behind**2).sum(axis=1)
        best = int(np.argmin(np.where(held < size, growth, np.inf)))
        group[item] = best
        load[best] += kinds[item]
        held[best] += 1
    excess = np.maximum(load - rooms, 0).sum(axis=1)
    least, patience = int(excess.sum()), _PATIENCE
    while least and patience:
        here = int(random.choice(np.flatnonzero(excess)))
        item = int(random.choice(np.flatnonzero(group == here)))
        others = random.integers(count, size=_PARTNERS)
        there = group[others]
        change = kinds[others] - kinds[item]
        near = np.maximum(load[here] + change - rooms, 0).sum(axis=1)
        far = np.maximum(load[there] - change - rooms, 0).sum(axis=1)
        gain = excess[here] + excess[there] - near - far + random.random(_PARTNERS) / 2
        gain[there == here] = -1
        best = int(np.argmax(gain))
        patience -= 1
        if gain[best] >= 0:
            other, place = int(others[best]), int(there[best])
            load[here] += change[best]
            load[place] -= change[best]
            excess[here], excess[place] = near[best], far[best]
            group[item], group[other] = place, here
            if excess.sum() < least:
                least, patience = int(excess.sum()), _PATIENCE
    if least:
        return None
    members = np.argsort(group, kind="stable").reshape(groups, size)
    return np.where(members < len(needs), members, -1)


def merge_placements(profile: Profile, facts: Facts, alive: np.ndarray) -> dict[Operator, Merger]:
    """New groups for 1x1 convolutions that only put channels in their places.

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
    streams: dict[bytes, list[Contraction]] = {}
    for product in facts.contractions:
        if product.regroups and is_placement(product):
            streams.setdefault(product.channels(facts)[1].tobytes(), []).append(product)
    for products in streams.values():
        found |= _merge_stream(profile, facts, alive, products)
    return found


def _merge_stream(
    profile: Profile, facts: Facts, alive: np.ndarray, products: list[Contraction]
) -> dict[Operator, Merger]:
    """Mergers for the placements of one sum."""
    result = products[0].channels(facts)[1]
    if not can_move(facts, result, products):
        return {}
    stay = np.flatnonzero(alive[result])
    operands, places = [], []
    for product in products:
        source = product.channels(facts)[0]
        makers = layers_at(facts, source, 1, alive)
        if not makers or not can_move(facts, source, products):
            continue
        used = product.used[0] & alive[source]
        operands.append(Operand(used.any(axis=1)[stay], makers[0], product.positions(facts)[1]))
        places.append((product, source, used))
    if not operands:
        return {}
    found = arrange(profile, operands, layers_at(facts, result, 0, alive), result.size)
    if found is None:
        return {}
    size = found.members.shape[1]
    groups = [stay[members[members >= 0]] for members in found.members]
    ordered = filled_up([result[g] for g in groups], size, result[~alive[result]])
    mergers: dict[Operator, Merger] = {}
    for index, room in found.rooms.items():
        product, source, used = places[index]
        own = [source[used[g].any(axis=0)] for g in groups]
        if len(groups) * room > source.size:
            continue
        sources = filled_up(own, room, source[~np.isin(source, np.concatenate(own))])
        mergers[product] = Merger(product, len(groups), sources, ordered)
    return mergers
