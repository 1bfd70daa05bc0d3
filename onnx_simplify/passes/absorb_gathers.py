"""Let whoever reads a gathered tensor read its source.

    Gather(idx) -> Split            =>    Gather(idx[:k]), Gather(idx[k:])
    Gather(idx) -> Conv, weight W   =>    Conv, weight V with V[:, idx] = W and zeros elsewhere

This is what channel shuffles become. The first is always less to copy; the second is done where the
zeros cost less than the copy.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.analysis import Analysis
from onnx_simplify.channels.operators.linear import Convolution
from onnx_simplify.channels.operators.structural import Gather, Slice, Split
from onnx_simplify.graph.edit import Editor, drop_unused, label
from onnx_simplify.graph.model import Model
from onnx_simplify.planning.layers import layer_of
from onnx_simplify.planning.planner import Planner

Users = list[tuple[gs.Node, int]]


def absorb_gathers(model: Model, planner: Planner) -> None:
    """Rewrite the readers of gathered channels, in place.

    Args:
        model: a cleaned model.
        planner: knows what copies and zeros cost.
    """
    for rewrite in (_split, _spread):
        if not any(node.op == "Gather" for node in model.graph.nodes):
            return
        analysis = Analysis(model)
        editor = Editor(model, analysis.layouts.readers)
        for node in model.graph.nodes:
            indices = _indices(analysis, node)
            users = analysis.layouts.readers.get(node.outputs[0].name, [])
            if indices is not None and users:
                rewrite(analysis, editor, planner, node, indices, users)
        editor.finish()
        drop_unused(model)


def _indices(analysis: Analysis, node: gs.Node) -> np.ndarray | None:
    """Which channels (of axis 1) a node gathers; None if it does something else."""
    rule = analysis.rule[id(node)]
    if not isinstance(rule, Gather) or analysis.model.is_kept(node.outputs[0]):
        return None
    layout = analysis.layouts.of[node.inputs[0].name]
    if node.attrs.get("axis", 0) != 1 or layout.ndim < 3 or not 1 < layout.size == layout.shape[1]:
        return None
    indices = rule.indices(node, analysis.layouts)
    return indices if indices.ndim == 1 else None


def _split(
    analysis: Analysis,
    editor: Editor,
    planner: Planner,
    node: gs.Node,
    indices: np.ndarray,
    users: Users,
) -> None:
    """Gather piece by piece if all readers take pieces."""
    if not all(_takes_pieces(analysis, user) for user, _ in users):
        return
    source = node.inputs[0]
    places = np.arange(indices.size).reshape([1, -1] + [1] * (len(analysis.shape(source)) - 2))
    for user, _ in users:
        rule = analysis.rule[id(user)]
        assert isinstance(rule, (Split, Slice))
        # Sizes of the pieces may be those of the outputs.
        pieces = rule.move(user, analysis.layouts, [places])
        results = list(user.outputs)
        user.outputs = [gs.Variable.empty() for _ in results]
        for result, piece in zip(results, pieces, strict=True):
            if result.name:
                taken = editor.model.constant("indices", indices[piece.ravel()].astype(np.int64))
                name = editor.model.unique(f"{label(node)}_piece")
                editor.after(user, gs.Node("Gather", name, {"axis": 1}, [source, taken], [result]))


def _spread(
    analysis: Analysis,
    editor: Editor,
    planner: Planner,
    node: gs.Node,
    indices: np.ndarray,
    users: Users,
) -> None:
    """Let convolutions read all channels of the source, most of them with zeros."""
    if any(index != 0 or not _is_plain(analysis, user) for user, index in users):
        return
    channels = analysis.layouts.of[node.inputs[0].name].size
    layers = [layer_of(user, Convolution(), analysis) for user, _ in users]
    if np.unique(indices).size < indices.size or not planner.prefers_zeros(layers, channels):
        return
    for user, _ in users:
        weight = user.inputs[1].values
        wide = np.zeros((weight.shape[0], channels, *weight.shape[2:]), weight.dtype)
        wide[:, indices] = weight
        editor.put(user, 1, wide)
        user.inputs[0] = node.inputs[0]


def _takes_pieces(analysis: Analysis, node: gs.Node) -> bool:
    """Whether a node takes pieces along axis 1 and does nothing else."""
    rule = analysis.rule[id(node)]
    rank = len(analysis.shape(node.inputs[0]))
    if isinstance(rule, Split):
        return bool(node.attrs.get("axis", 0) % rank == 1)
    return isinstance(rule, Slice) and set(rule.bounds(node, rank) or ()) == {1}


def _is_plain(analysis: Analysis, node: gs.Node) -> bool:
    rule = analysis.rule[id(node)]
    return (
        isinstance(rule, Convolution) and rule.dims(node)[0] == 1 and not rule.is_quantized(node)
    )
