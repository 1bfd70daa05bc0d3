"""Why channels stay that hold constants, or that nobody needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.values import VARYING
from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.identity import NodeMap
from onnx_simplify.operators import Operator, contractions
from onnx_simplify.operators.nodes import kind
from onnx_simplify.planning.absorbing import Prospect

COUPLED = "coupled with channels that vary"
SIZES = "sizes are not known"
QUANTISED = "quantised weights cannot take the constant"
READERS = "its readers cannot take the constant"
UNSURE = "measured constants do not agree (rounding of a mean)"
ALIGNMENT = "alignment: whole blocks run faster"
COST = "removing them would cost more than it saves"
OPAQUE = "read by "


def stays(prospect: Prospect) -> NodeMap[Counter[str]]:
    """For each layer, how many of its output channels stay for which reason.

    Args:
        prospect: what is known, measured, and could be absorbed.

    Returns:
        Counts by reason, by the layer's node; what could go is not among them.
    """
    facts, alive = prospect.facts, prospect.alive
    names, frozen = _frozen(facts)
    varying, unsure = _varying(facts)
    unable = _unable(facts)
    found: NodeMap[Counter[str]] = NodeMap()
    for product in contractions(facts.model):
        counts = found.setdefault(product.node, Counter())
        result = product.outputs[0].name
        op = facts.producer[result]
        if op.is_opaque:
            # Output channels without weights.
            rows = int((~product.used.any(axis=2)).sum())
            if rows:
                counts[_blame(facts, op)] += rows
            continue
        labels = facts.layouts.of[result].ravel()
        idle = facts.level[result].ravel() > VARYING
        idle |= ~facts.needed[result].ravel()
        for label in labels[idle]:
            if frozen[label] >= 0:
                counts[names[frozen[label]]] += 1
            elif alive[label] and unsure[label]:
                counts[UNSURE] += 1
            elif alive[label] and varying[label]:
                counts[COUPLED] += 1
            elif alive[label]:
                counts[unable.get(int(label), READERS)] += 1
    return found


def held_back(counts: Mapping[gs.Node, Counter[str]], most: int = 3) -> str:
    """What holds back most channels, of operators without rules, in words; empty if nothing does.

    Args:
        counts: as :func:`stays` gives them.
        most: how many operators to name.
    """
    total: Counter[str] = Counter()
    for layer in counts.values():
        total.update({r: n for r, n in layer.items() if r.startswith(OPAQUE)})
    named = total.most_common(most)
    return ", ".join(f"{count} because of {r.removeprefix(OPAQUE)}" for r, count in named)


def _frozen(facts: Facts) -> tuple[list[str], np.ndarray]:
    """Reasons, and for each label the index of the one that it must stay for, or -1."""
    names: list[str] = []
    found = np.full(facts.layouts.frozen.size, -1)
    for labels, reason in facts.layouts.frozen_by:
        if reason not in names:
            names.append(reason)
        free = labels[found[labels] < 0]
        found[free] = names.index(reason)
    return names, found


def _varying(facts: Facts) -> tuple[np.ndarray, np.ndarray]:
    """Labels of channels that vary and are needed somewhere; those that only measurement lets vary.

    The latter are constant by the rules, but come out differently in different runs.
    """
    found = np.zeros((2, facts.layouts.frozen.size), bool)
    for name, level in facts.level.items():
        layout = facts.layouts.of[name]
        varies = (level == VARYING) & facts.needed[name]
        found[0, layout[varies]] = True
        if name in facts.disputed:
            found[1, layout[varies & facts.disputed[name]]] = True
    return found[0], found[1]


def _unable(facts: Facts) -> dict[int, str]:
    """For labels that a layer reads whose form keeps it from taking constants, why."""
    found: dict[int, str] = {}
    for product in facts.contractions:
        reason = ""
        if product.is_quantized():
            reason = QUANTISED
        elif product.spread_axes() and not product.is_static(facts):
            reason = SIZES
        if reason:
            for label in np.unique(product.channels(facts)[0]):
                found.setdefault(int(label), reason)
    return found


def _blame(facts: Facts, op: Operator) -> str:
    """Why a layer is not followed: itself, or what lost the shape of its input."""
    while "shape of" in op.reason or "no channels to follow" in op.reason:
        makers = [facts.producer.get(t.name) for t in op.inputs]
        lost = [m for m in makers if m is not None and any(t.shape is None for t in m.outputs)]
        if not lost or lost[0] is op:
            break
        op = lost[0]
        if all(t.shape is not None for t in op.inputs if t.name):
            return f"{OPAQUE}{kind(op.node)}"
    reason = f" ({op.reason})" if op.reason else ""
    return f"{OPAQUE}{kind(op.node)}{reason}"
