"""Let whoever reads a gathered tensor read its source.

    Gather(idx) -> Split            =>    Gather(idx[:k]), Gather(idx[k:])
    Gather(idx) -> Conv, weight W   =>    Conv, weight V with V[:, idx] = W and zeros elsewhere

This is what channel shuffles become. The first is always less to copy; the second is done where the
zeros cost less than the copy.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.edit import Editor, drop_unused, label
from onnx_simplify.graph.model import Model
from onnx_simplify.operators import Operator
from onnx_simplify.operators.contraction import Contraction
from onnx_simplify.planning.layers import layer_of
from onnx_simplify.planning.planner import Planner

Users = list[tuple[Operator, int]]


def absorb_gathers(model: Model, planner: Planner) -> None:
    """Rewrite the readers of gathered channels, in place.

    Args:
        model: a cleaned model.
        planner: knows what copies and zeros cost.
    """
    for rewrite in (_split, _spread):
        if not any(node.op == "Gather" for node in model.graph.nodes):
            return
        facts = Facts(model)
        editor = Editor(model)
        for op in facts.operators:
            indices = _indices(facts, op)
            users = facts.readers.get(op.outputs[0].name, [])
            if indices is not None and users:
                rewrite(facts, editor, planner, op.node, indices, users)
        editor.finish()
        drop_unused(model)


def _indices(facts: Facts, op: Operator) -> np.ndarray | None:
    """Which channels (of axis 1) a node gathers; None if it does something else."""
    if op.node.op != "Gather" or op.is_opaque or facts.model.is_kept(op.outputs[0]):
        return None
    layout = facts.layouts.of[op.inputs[0].name]
    if set(op.picks(facts.layouts)) != {1} or layout.ndim < 3:
        return None
    if not 1 < layout.size == layout.shape[1]:
        return None
    places = np.arange(layout.size).reshape(layout.shape)
    (picked,) = op.move(facts.layouts, [places])
    return picked.ravel() if picked.ndim == layout.ndim else None


def _split(
    facts: Facts,
    editor: Editor,
    planner: Planner,
    node: gs.Node,
    indices: np.ndarray,
    users: Users,
) -> None:
    """Gather piece by piece if all readers take pieces."""
    if not all(_takes_pieces(facts, user) for user, _ in users):
        return
    source = node.inputs[0]
    places = np.arange(indices.size).reshape([1, -1] + [1] * (len(facts.shape(source)) - 2))
    for user, _ in users:
        # Sizes of the pieces may be those of the outputs.
        pieces = user.move(facts.layouts, [places])
        results = list(user.outputs)
        user.node.outputs = [gs.Variable.empty() for _ in results]
        for result, piece in zip(results, pieces, strict=True):
            if result.name:
                taken = editor.model.constant("indices", indices[piece.ravel()].astype(np.int64))
                name = editor.model.unique(f"{label(node)}_piece")
                piece_node = gs.Node("Gather", name, {"axis": 1}, [source, taken], [result])
                editor.after(user.node, piece_node)


def _spread(
    facts: Facts,
    editor: Editor,
    planner: Planner,
    node: gs.Node,
    indices: np.ndarray,
    users: Users,
) -> None:
    """Let convolutions read all channels of the source, most of them with zeros."""
    products = [p for user, _ in users for p in user.contractions if _is_plain(p)]
    if any(index != 0 for _, index in users) or len(products) < len(users):
        return
    channels = facts.layouts.of[node.inputs[0].name].size
    layers = [layer_of(product, facts) for product in products]
    if np.unique(indices).size < indices.size or not planner.prefers_zeros(layers, channels):
        return
    for product in products:
        weight = product.weights()
        wide = np.zeros((*weight.shape[:2], channels, *weight.shape[3:]), weight.dtype)
        wide[:, :, indices] = weight
        product.set_weights(wide, editor.put)
        product.inputs[0] = node.inputs[0]


def _takes_pieces(facts: Facts, op: Operator) -> bool:
    """Whether a node takes pieces along axis 1 and does nothing else."""
    return op.node.op != "Gather" and set(op.picks(facts.layouts)) == {1}


def _is_plain(product: Contraction) -> bool:
    return product.regroups and product.dims[0] == 1 and not product.is_quantized()
