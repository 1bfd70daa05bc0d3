"""The planner: what becomes of a graph, for one target."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.traits import CONCATENATED
from onnx_simplify.operators import Operator
from onnx_simplify.operators.contraction import Contraction
from onnx_simplify.planning.absorbing import (
    Prospect,
    alive_after,
    decide,
)
from onnx_simplify.planning.costs import Layer, convolution, rounded
from onnx_simplify.planning.grouping import merge_groups
from onnx_simplify.planning.layers import layers_at
from onnx_simplify.planning.merge import Merger, is_placement
from onnx_simplify.planning.plan import Plan
from onnx_simplify.planning.profiles import Profile
from onnx_simplify.planning.streams import Operand, arrange, merge_placements

# Operands of a concatenation may grow by this share to be whole blocks: the sums of many small
# ones, as in a DenseNet, would grow by as much.
_CONCAT_GROWTH = 0.125


class Planner:
    """Makes the choices for one target profile."""

    def __init__(self, profile: Profile):
        """Plan for ``profile``."""
        self.profile = profile

    def plan(self, prospect: Prospect, *, cut: bool) -> Plan:
        """Decide what becomes of a graph.

        Args:
            prospect: what is known of it, and could be absorbed; that is decided upon in place.
            cut: whether channels are to go.
        """
        facts, alive = prospect.facts, prospect.alive.copy()
        seen = needed = alive
        if prospect.absorptions:
            # Groups that will merge keep nothing to be as wide as the widest.
            mergers = merge_groups(self.profile, facts, alive)
            seen = decide(self.profile, facts, prospect.absorptions, alive, mergers)
        chosen = tuple(own for own in prospect.absorptions if own.absorb.any())
        if prospect.absorptions:
            needed = alive_after(facts, chosen, decided=True)
        if not cut:
            return Plan(facts, chosen, needed, seen)
        closed, mergers = self.close(facts, needed)
        aligned = closed & ~facts.close(needed.copy(), free=mergers)
        return Plan(facts, chosen, needed, seen, closed, aligned, mergers)

    def close(self, facts: Facts, alive: np.ndarray) -> tuple[np.ndarray, dict[Operator, Merger]]:
        """Decide which channels stay, see :meth:`Facts.close`, and which groups merge.

        Args:
            facts: what is known.
            alive: labels that are needed; not modified.

        Returns:
            Labels that stay, and mergers by operator.
        """
        mergers = merge_groups(self.profile, facts, alive)
        mergers |= merge_placements(self.profile, facts, alive)
        while True:
            closed = alive.copy()
            for merger in mergers.values():
                closed[merger.sources] = closed[merger.results] = True
            closed = facts.close(closed, self.keep_for_alignment, mergers)
            broken = [key for key, merger in mergers.items() if not merger.fits(facts, closed)]
            if not broken:
                return closed, mergers
            for key in broken:
                del mergers[key]

    def keep_for_alignment(self, op: Operator, facts: Facts, alive: np.ndarray) -> bool:
        """Keep dead output channels of a convolution up to the next multiple.

        onnxruntime leaves its blocked kernels when a count is no multiple of four, which costs more
        than computing up to three channels too many. Fewer channels than a block cost as much to
        compute as a whole one, and more to read for a 1x1 convolution.

        Returns:
            Whether any label was revived in ``alive``.
        """
        if op.joins is not None:
            return self._keep_for_concat(op, facts, alive)
        if self.profile.multiple < 2 or facts.is_gone(op, alive):
            return False
        return any([self._align(p, facts, alive) for p in op.contractions if p.regroups])

    def _align(self, product: Contraction, facts: Facts, alive: np.ndarray) -> bool:
        """Keep dead output channels of one convolution, see :meth:`keep_for_alignment`."""
        multiple = self.profile.multiple
        groups, *sizes = product.dims
        labels = product.channels(facts)[1]
        if groups > 1 and sizes != [1, 1]:
            if not is_placement(product, grouped=True):
                return False
            # It was made with groups of whole blocks, for a sum that has them.
            parts = labels.reshape(groups, -1)
            widest = int(alive[parts].sum(axis=1).max())
            changed = False
            for part in parts[alive[parts].any(axis=1)]:
                missing = rounded(widest, multiple) - int(alive[part].sum())
                changed |= _revive(part, missing, alive)
            return changed
        count = int(alive[labels].sum())
        missing = -count % multiple
        block = self.profile.block
        if count < block <= labels.size and self.profile.pointwise_cost:
            readers = layers_at(facts, labels, 0, alive)
            few, whole = (
                sum(convolution(self.profile, layer.with_inputs(n)) for layer in readers)
                for n in (count + missing, block)
            )
            if whole < few:
                missing = block - count
        return _revive(labels, missing, alive)

    def _keep_for_concat(self, op: Operator, facts: Facts, alive: np.ndarray) -> bool:
        """Keep dead channels where that lets all operands of a ``Concat`` be whole blocks.

        onnxruntime concatenates in its blocked layout then, and whatever comes behind stays in it.
        """
        block = self.profile.block
        if not self.profile.rearranges_blocks or op.joins != 1:
            return False
        users = facts.readers.get(op.outputs[0].name, ())
        if not all(user.node.op in CONCATENATED for user, _ in users):
            return False
        operands = []
        for tensor in op.inputs:
            if not facts.has(tensor) or len(facts.shape(tensor)) != 4:
                return False
            labels = facts.layouts.of[tensor.name].ravel()
            if facts.dead(tensor, alive):
                continue
            operands.append((labels, int(alive[labels].sum())))
        wanted = [rounded(count, block) for _, count in operands]
        for size, (labels, count) in zip(wanted, operands, strict=True):
            if size > min(labels.size, count * (1 + _CONCAT_GROWTH)):
                return False
        changed = False
        for size, (labels, count) in zip(wanted, operands, strict=True):
            changed |= _revive(labels, size - count, alive)
        return changed

    def narrow_operands(
        self, operands: Sequence[Operand], users: Sequence[Layer], total: int, movable: bool
    ) -> list[int]:
        """Which operands of a sum shall compute their own channels only.

        Args:
            operands: the operands.
            users: the layers that read the sum.
            total: how many channels there may be, dead ones included.
            movable: whether the sum's channels may be put into another order.
        """
        profile = self.profile
        if not profile.rearrange or not operands:
            return []
        found = arrange(profile, operands, users, total) if movable else None
        chosen = [] if found is None else list(found.rooms)
        for index, operand in enumerate(operands):
            narrow, wide = (
                rounded(int(n), profile.multiple)
                for n in (operand.narrow.sum(), operand.narrow.size)
            )
            if index not in chosen and narrow < wide:
                placed = operand.placed(profile, 1, narrow, wide)
                if placed < operand.wide(profile, wide):
                    chosen.append(index)
        return chosen

    def prefers_zeros(self, layers: Sequence[Layer], channels: int) -> bool:
        """Whether layers had better read more channels, with zeros, than have theirs gathered.

        Args:
            layers: the layers as they are, all of them readers of the same channels.
            channels: how many there are to gather from.
        """
        profile = self.profile
        copied = layers[0].inputs * max(layer.positions for layer in layers)
        saved = copied * profile.copy_cost + profile.node_cost
        for layer in layers:
            saved += convolution(profile, layer)
            saved -= convolution(profile, layer.with_inputs(channels))
        return profile.rearrange and saved > 0


def _revive(labels: np.ndarray, missing: int, alive: np.ndarray) -> bool:
    """Let up to so many dead labels stay; whether there were any."""
    dead = labels[~alive[labels]]
    # Several positions may share a label, and come back together.
    dead = dead[np.sort(np.unique(dead, return_index=True)[1])][:missing]
    alive[dead] = True
    return dead.size > 0
