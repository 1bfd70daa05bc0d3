"""Rewrite channel shuffles whose remaining channels no longer form a grid.

    Reshape -> Transpose -> Reshape, together a permutation of the channels   =>   Gather

A ``Reshape`` to ``[N, groups, C / groups, H, W]`` forces the same number of channels on every
group; a ``Gather`` takes any.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.analysis import Analysis
from onnx_simplify.channels.operators.structural import Reshape, Structural
from onnx_simplify.graph.edit import drop_unused, label, set_nodes
from onnx_simplify.graph.shapes import matching_blocks


def regroup_shuffles(analysis: Analysis, alive: np.ndarray) -> bool:
    """Rewrite in place where the labels in ``alive`` (bool ``(labels,)``) do not form a grid.

    Returns:
        Whether anything was rewritten; the analysis is then out of date.
    """
    model = analysis.model
    swap: dict[int, gs.Node] = {}
    for node in model.graph.nodes:
        if node.op != "Reshape" or not analysis.has(node.outputs[0]):
            continue
        chain = _chain(analysis, node)
        if chain is None or all(_is_grid(analysis, n.outputs[0], alive) for n in chain):
            continue
        found = _permutation(analysis, chain)
        if found is not None:
            axis, indices = found
            name = model.unique(f"{label(node)}_gather")
            constant = model.constant("indices", indices.astype(np.int64))
            swap[id(node)] = gs.Node(
                op="Gather", name=name, attrs={"axis": axis}, inputs=[chain[0].inputs[0], constant]
            )
    if not swap:
        return False
    nodes = []
    for node in list(model.graph.nodes):
        new = swap.get(id(node))
        if new is not None:
            results = list(node.outputs)
            node.outputs.clear()
            new.outputs = results
        nodes.append(new or node)
    set_nodes(model, nodes)
    drop_unused(model)
    return True


def _chain(analysis: Analysis, last: gs.Node) -> list[gs.Node] | None:
    """The nodes Reshape, Transpose, ..., Reshape that end at ``last``, first one first."""
    nodes = [last]
    while True:
        node = analysis.producer.get(nodes[-1].inputs[0].name)
        if node is None or node.op not in ("Reshape", "Transpose"):
            break
        nodes.append(node)
    while nodes and nodes[-1].op != "Reshape":
        nodes.pop()
    known = all(
        analysis.has(t) and not analysis.is_opaque(n)
        for n in nodes
        for t in (n.inputs[0], n.outputs[0])
    )
    return nodes[::-1] if len(nodes) > 2 and known else None


def _is_grid(analysis: Analysis, tensor: gs.Tensor, alive: np.ndarray) -> bool:
    return not analysis.grid_gaps(tensor, alive).any()


def _permutation(analysis: Analysis, chain: list[gs.Node]) -> tuple[int, np.ndarray] | None:
    """(axis, indices) if the chain as a whole gathers along one tracked axis."""
    source, result = chain[0].inputs[0], chain[-1].outputs[0]
    if analysis.shape(source) != analysis.shape(result):
        return None
    layout = analysis.layouts.of[source.name]
    tracked = [a for a, s in enumerate(layout.shape) if s > 1]
    if len(tracked) != 1:
        return None
    array = np.arange(layout.size).reshape(layout.shape)
    for node in chain:
        array = _rule(analysis, node).move(node, analysis.layouts, [array])[0]
    if array.shape != layout.shape:
        return None
    # Untracked axes must have come through in their places.
    if not _untracked_axes_stay(analysis, chain, tracked[0]):
        return None
    return tracked[0], array.ravel()


def _rule(analysis: Analysis, node: gs.Node) -> Structural:
    rule = analysis.rule[id(node)]
    assert isinstance(rule, Structural)
    return rule


def _untracked_axes_stay(analysis: Analysis, chain: list[gs.Node], axis: int) -> bool:
    """Whether a chain moves no element along any axis but ``axis``."""
    order: list[object] = list(range(len(analysis.shape(chain[0].inputs[0]))))
    for node in chain:
        if node.op == "Transpose":
            perm = node.attrs.get("perm", list(range(len(order)))[::-1])
            order = [order[p] for p in perm]
            continue
        rule = _rule(analysis, node)
        assert isinstance(rule, Reshape)
        source = analysis.shape(node.inputs[0])
        blocks = matching_blocks(source, rule.target(node, analysis.layouts))
        new: list[object] = []
        for before, after in blocks or []:
            origins = {order[a] for a in before if source[a] != 1} or {None}
            if origins <= {axis}:
                new += [axis] * len(after)
            elif len(before) == len(after) == 1:
                new += [order[before[0]]]
            elif origins == {None}:
                new += [None] * len(after)
            else:
                return False
        order = new
    expected = list(range(len(order)))
    sizes = analysis.shape(chain[-1].outputs[0])
    return all(o == e or s == 1 for o, e, s in zip(order, expected, sizes, strict=True))
