"""Why channels stay that hold constants, or that nobody needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.analysis import Analysis
from onnx_simplify.channels.layouts import Unsupported
from onnx_simplify.channels.operators import lookup
from onnx_simplify.channels.operators.base import kind
from onnx_simplify.channels.operators.linear import Linear
from onnx_simplify.channels.values import VARYING
from onnx_simplify.passes.propagate_bias import alive_after, find_readers

COUPLED = "coupled with channels that vary"
SIZES = "sizes are not known"
QUANTISED = "quantised weights cannot take the constant"
READERS = "its readers cannot take the constant"
UNSURE = "measured constants do not agree (rounding of a mean)"
ALIGNMENT = "alignment: whole blocks run faster"
COST = "removing them would cost more than it saves"
OPAQUE = "read by "


def stays(analysis: Analysis, *, absorbing: bool) -> dict[int, Counter[str]]:
    """For each layer, how many of its output channels stay for which reason.

    Args:
        analysis: an analysis with levels.
        absorbing: whether constants are absorbed, so that what is constant could go.

    Returns:
        Counts by reason, by ``id`` of the layer's node; what could go is not among them.
    """
    readers = find_readers(analysis, only_zeros=not absorbing)
    alive = alive_after(analysis, readers)
    names, frozen = _frozen(analysis)
    varying, unsure = _varying(analysis)
    unable = _unable(analysis)
    found: dict[int, Counter[str]] = {}
    for node in analysis.model.graph.nodes:
        rule = lookup(node)
        if not isinstance(rule, Linear):
            continue
        counts = found.setdefault(id(node), Counter())
        if analysis.is_opaque(node):
            rows = _zero_rows(rule, node)
            if rows:
                counts[_blame(analysis, node)] += rows
            continue
        result = node.outputs[0].name
        labels = analysis.layouts.of[result].ravel()
        idle = analysis.level[result].ravel() > VARYING
        idle |= ~analysis.needed[result].ravel()
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


def held_back(counts: Mapping[int, Counter[str]], most: int = 3) -> str:
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


def _frozen(analysis: Analysis) -> tuple[list[str], np.ndarray]:
    """Reasons, and for each label the index of the one that it must stay for, or -1."""
    names: list[str] = []
    found = np.full(analysis.layouts.frozen.size, -1)
    for labels, reason in analysis.layouts.frozen_by:
        if reason not in names:
            names.append(reason)
        free = labels[found[labels] < 0]
        found[free] = names.index(reason)
    return names, found


def _varying(analysis: Analysis) -> tuple[np.ndarray, np.ndarray]:
    """Labels of channels that vary and are needed somewhere; those that only measurement lets vary.

    The latter are constant by the rules, but come out differently in different runs.
    """
    found = np.zeros((2, analysis.layouts.frozen.size), bool)
    for name, level in analysis.level.items():
        layout = analysis.layouts.of[name]
        varies = (level == VARYING) & analysis.needed[name]
        found[0, layout[varies]] = True
        if name in analysis.disputed:
            found[1, layout[varies & analysis.disputed[name]]] = True
    return found[0], found[1]


def _unable(analysis: Analysis) -> dict[int, str]:
    """For labels that a layer reads whose form keeps it from taking constants, why."""
    found: dict[int, str] = {}
    for node in analysis.model.graph.nodes:
        rule = analysis.rule[id(node)]
        if not isinstance(rule, Linear):
            continue
        reason = ""
        if rule.is_quantized(node):
            reason = QUANTISED
        elif rule.spread_axes(node) and not rule.is_static(node, analysis):
            reason = SIZES
        if reason:
            for label in np.unique(rule.channels(node, analysis)[0]):
                found.setdefault(int(label), reason)
    return found


def _zero_rows(rule: Linear, node: gs.Node) -> int:
    """How many output channels of a layer that is not followed have no weights."""
    try:
        return int((~rule.used(node).any(axis=2)).sum())
    except Unsupported:
        return 0


def _blame(analysis: Analysis, node: gs.Node) -> str:
    """Why a layer is not followed: itself, or what lost the shape of its input."""
    reason = analysis.layouts.opaque.get(id(node), "")
    while "shape of" in reason or "no channels to follow" in reason:
        makers = [analysis.producer.get(t.name) for t in node.inputs]
        lost = [m for m in makers if m is not None and any(t.shape is None for t in m.outputs)]
        if not lost or lost[0] is node:
            break
        node = lost[0]
        reason = analysis.layouts.opaque.get(id(node), "")
        if all(t.shape is not None for t in node.inputs if t.name):
            return f"{OPAQUE}{kind(node)}"
    return f"{OPAQUE}{kind(node)} ({reason})" if reason else f"{OPAQUE}{kind(node)}"
