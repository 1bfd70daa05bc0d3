"""Rewrite channel shuffles whose remaining channels no longer form a grid.

    Reshape -> Transpose -> Reshape, together a permutation of the channels   =>   Gather

A ``Reshape`` to ``[N, groups, C / groups, H, W]`` forces the same number of channels on every
group; a ``Gather`` takes any.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.edit import drop_unused, label, set_nodes
from onnx_simplify.operators import Operator


def find_shuffles(facts: Facts) -> list[list[Operator]]:
    """The chains Reshape, Transpose, ..., Reshape, whatever they do."""
    chains = []
    for op in facts.operators:
        if op.node.op == "Reshape" and facts.has(op.outputs[0]):
            chain = _chain(facts, op)
            if chain is not None:
                chains.append(chain)
    return chains


def regroup_shuffles(
    facts: Facts, shuffles: Sequence[Sequence[Operator]], alive: np.ndarray
) -> list[str]:
    """Rewrite in place where the labels in ``alive`` (bool ``(labels,)``) do not form a grid.

    Returns:
        Names of the shuffled tensors; if there are any, the facts are out of date.
    """
    model = facts.model
    swap: dict[str, gs.Node] = {}
    for chain in shuffles:
        node = chain[-1].node
        if all(_is_grid(facts, o.outputs[0], alive) for o in chain):
            continue
        found = _permutation(facts, chain)
        if found is not None:
            axis, indices = found
            name = model.unique(f"{label(node)}_gather")
            constant = model.constant("indices", indices.astype(np.int64))
            swap[node.outputs[0].name] = gs.Node(
                op="Gather", name=name, attrs={"axis": axis}, inputs=[chain[0].inputs[0], constant]
            )
    if not swap:
        return []
    nodes = []
    for node in list(model.graph.nodes):
        new = swap.get(node.outputs[0].name)
        if new is not None:
            results = list(node.outputs)
            node.outputs.clear()
            new.outputs = results
        nodes.append(new or node)
    set_nodes(model, nodes)
    drop_unused(model)
    return list(swap)


def _chain(facts: Facts, last: Operator) -> list[Operator] | None:
    """The nodes Reshape, Transpose, ..., Reshape that end at ``last``, first one first."""
    chain = [last]
    while True:
        op = facts.producer.get(chain[-1].inputs[0].name)
        if op is None or op.node.op not in ("Reshape", "Transpose"):
            break
        chain.append(op)
    while chain and chain[-1].node.op != "Reshape":
        chain.pop()
    known = all(
        facts.has(t) and not op.is_opaque for op in chain for t in (op.inputs[0], op.outputs[0])
    )
    return chain[::-1] if len(chain) > 2 and known else None


def _is_grid(facts: Facts, tensor: gs.Tensor, alive: np.ndarray) -> bool:
    return not facts.grid_gaps(tensor, alive).any()


def _permutation(facts: Facts, chain: Sequence[Operator]) -> tuple[int, np.ndarray] | None:
    """(axis, indices) if the chain as a whole gathers along one tracked axis."""
    source, result = chain[0].inputs[0], chain[-1].outputs[0]
    if facts.shape(source) != facts.shape(result):
        return None
    layout = facts.layouts.of[source.name]
    tracked = [a for a, s in enumerate(layout.shape) if s > 1]
    if len(tracked) != 1:
        return None
    array = np.arange(layout.size).reshape(layout.shape)
    for op in chain:
        array = op.move(facts.layouts, [array])[0]
    if array.shape != layout.shape:
        return None
    # Untracked axes must have come through in their places.
    if not _untracked_axes_stay(facts, chain, tracked[0]):
        return None
    return tracked[0], array.ravel()


def _untracked_axes_stay(facts: Facts, chain: Sequence[Operator], axis: int) -> bool:
    """Whether a chain moves no element along any axis but ``axis``."""
    order: list[object] = list(range(len(facts.shape(chain[0].inputs[0]))))
    for op in chain:
        if op.node.op == "Transpose":
            perm = op.attrs.get("perm", list(range(len(order)))[::-1])
            order = [order[p] for p in perm]
            continue
        source = facts.shape(op.inputs[0])
        new: list[object] = []
        for before, after in op.blocks(facts.layouts) or []:
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
    sizes = facts.shape(chain[-1].outputs[0])
    return all(o == e or s == 1 for o, e, s in zip(order, expected, sizes, strict=True))
