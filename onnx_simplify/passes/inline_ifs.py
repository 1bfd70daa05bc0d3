"""Put the branch that is taken in the place of an ``If`` whose condition is known.

Exporters write ``If`` where a size decides, as for a ``squeeze`` that may have nothing to squeeze.
Once the size is known, so is the branch; what it holds is then an ordinary part of the graph.

https://onnx.ai/onnx/operators/onnx__If.html
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.graph.edit import label, set_nodes
from onnx_simplify.graph.model import Model

Condition = Callable[[gs.Tensor], bool | None]


def stored(tensor: gs.Tensor) -> bool | None:
    """A condition that is an initializer; None if it is computed."""
    if not isinstance(tensor, gs.Constant) or np.prod(tensor.shape) != 1:
        return None
    return bool(np.asarray(tensor.values).ravel()[0])


def inline_ifs(model: Model, known: Condition = stored) -> bool:
    """Inline the branches that are taken, in place.

    Args:
        model: the model.
        known: tells what a condition is; None if that is not known.

    Returns:
        Whether anything was inlined.
    """
    nodes: list[gs.Node] = []
    changed = False
    for node in model.graph.nodes:
        taken = known(node.inputs[0]) if node.op == "If" and not node.domain else None
        branch = None if taken is None else node.attrs["then_branch" if taken else "else_branch"]
        # Of bodies inside bodies it would not be known what they read.
        if branch is None or any(_has_body(inner) for inner in branch.nodes):
            nodes.append(node)
            continue
        nodes += _unpacked(model, node, branch)
        changed = True
    if changed:
        set_nodes(model, nodes)
    return changed


def _has_body(node: gs.Node) -> bool:
    return any(isinstance(value, gs.Graph) for value in node.attrs.values())


def _unpacked(model: Model, node: gs.Node, branch: gs.Graph) -> list[gs.Node]:
    """The branch's nodes as nodes of the graph, and what gives its results the old names."""
    found, results = list(branch.nodes), list(node.outputs)
    outside = _outside(model, branch)
    node.outputs.clear()
    for inner in found:
        inner.inputs = [outside.get(t.name, t) for t in inner.inputs]
        inner.name = model.unique(inner.name or f"{label(inner)}_inlined")
    sources = [outside.get(t.name, t) for t in branch.outputs]
    for inner in found:
        for tensor in inner.outputs:
            if tensor.name:
                tensor.name = model.unique(tensor.name)
    for source, result in zip(sources, results, strict=True):
        name = model.unique(f"{result.name}_taken")
        found.append(gs.Node("Identity", name, {}, [source], [result]))
    return found


def _outside(model: Model, branch: gs.Graph) -> dict[str, gs.Tensor]:
    """What a branch reads that it does not compute, by name: outer tensors, and its constants."""
    made = {t.name for inner in branch.nodes for t in inner.outputs}
    outer = model.graph.tensors()
    read = [t for inner in branch.nodes for t in inner.inputs] + list(branch.outputs)
    found: dict[str, gs.Tensor] = {}
    for tensor in read:
        if tensor.name in made or not tensor.name or tensor.name in found:
            continue
        if tensor.name in outer:
            found[tensor.name] = outer[tensor.name]
        elif isinstance(tensor, gs.Constant):
            found[tensor.name] = model.constant(tensor.name, tensor.values)
    return found
