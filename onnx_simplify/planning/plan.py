"""A plan: what becomes of a graph, decided before anything is rewritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.edit import label
from onnx_simplify.operators import Operator
from onnx_simplify.planning.absorbing import Absorption
from onnx_simplify.planning.merge import Merger


@dataclass(frozen=True)
class Step:
    """What a plan does to one product with constant weights, in numbers.

    Attributes:
        name: the node's name, or its output's.
        reads: input channels that stay, of how many.
        makes: output channels that stay, of how many.
        into_bias: constants that go into the bias.
        into_stand_ins: constants for which other constant channels stand.
        into_map: constants that become a map added to the output.
        groups: the new number of groups, if groups are put together.
        costs: predicted nanoseconds of the ways to absorb that were weighed.
    """

    name: str
    reads: tuple[int, int]
    makes: tuple[int, int]
    into_bias: int = 0
    into_stand_ins: int = 0
    into_map: int = 0
    groups: int | None = None
    costs: dict[str, float] = field(default_factory=dict)

    @property
    def is_idle(self) -> bool:
        """Whether nothing happens to the product."""
        moved = self.into_bias or self.into_stand_ins or self.into_map or self.groups is not None
        return not moved and all(stay == all_ for stay, all_ in (self.reads, self.makes))

    def __str__(self) -> str:
        """One line."""
        parts = [
            f"{what} {all_} -> {stay}"
            for what, (stay, all_) in (("reads", self.reads), ("makes", self.makes))
            if stay < all_
        ]
        for count, where in (
            (self.into_bias, "the bias"),
            (self.into_stand_ins, "stand-ins"),
            (self.into_map, "a map"),
        ):
            if count:
                parts.append(f"{count} constants into {where}")
        if self.groups is not None:
            parts.append(f"{self.groups} groups")
        if self.costs:
            weighed = ", ".join(f"{way} {ns / 1000:.1f} us" for way, ns in self.costs.items())
            parts.append(f"({weighed})")
        return f"{self.name}: {', '.join(parts) or 'stays'}"


@dataclass(frozen=True)
class Preparation:
    """What was done to a tensor so that the plan could be made; it changes no value.

    Attributes:
        name: the tensor's name.
        what: what was done.
    """

    name: str
    what: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.name}: {self.what}"


SPLIT = "an operand of a sum gets channels of its own"
STORED = "a constant is stored"
GATHERED = "a shuffle becomes a gather"


@dataclass(frozen=True)
class Plan:
    """Who absorbs what and by which means, which channels stay, which groups merge.

    Attributes:
        facts: the facts that it was made from; it is about their graph.
        absorptions: what is absorbed.
        needed: labels that are needed once that is done.
        seen: those, and what must stay with them.
        alive: labels that stay for good, dead ones that are kept for speed among them; None if no
            channel is to go.
        aligned: labels that nobody needs, but that stay to fill up blocks.
        mergers: new groups, and the order of channels in them.
        prepared: what was done to the graph before.
    """

    facts: Facts
    absorptions: Sequence[Absorption]
    needed: np.ndarray
    seen: np.ndarray
    alive: np.ndarray | None = None
    aligned: np.ndarray | None = None
    mergers: Mapping[Operator, Merger] = field(default_factory=dict)
    prepared: Sequence[Preparation] = ()

    def steps(self) -> list[Step]:
        """What happens to each product, in execution order."""
        known = {own.product: own for own in self.absorptions}
        found = []
        for product in self.facts.contractions:
            counts = []
            for labels in product.channels(self.facts):
                stay = labels.size if self.alive is None else int(self.alive[labels].sum())
                counts.append((stay, int(labels.size)))
            merger = self.mergers.get(product)
            more: dict[str, Any] = {} if merger is None else {"groups": merger.groups}
            own = known.get(product)
            if own is not None:
                replaced = own.absorb & own.replaced
                scalar = own.absorb & own.scalar & ~replaced
                more |= {
                    "into_bias": int((scalar & (own.values != 0)).sum()),
                    "into_stand_ins": int(replaced.sum()),
                    "into_map": int((own.absorb & ~own.scalar & ~replaced).sum()),
                    "costs": {way: round(ns, 1) for way, ns in own.costs.items()},
                }
            found.append(Step(label(product.node), counts[0], counts[1], **more))
        return found
