"""Store bias maps by their distinct rows and columns.

A constant that went through a padded convolution is the same everywhere but near the border, and
behind a transposed one with a stride its rows alternate, so most of its rows and columns are equal:

    Add(x, M [1, C, H, W])   =>   Add(x, Gather(Gather(D [1, C, 3, 3], rows), columns))

onnxruntime computes the two ``Gather`` once, when it loads the model.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.graph.edit import Editor, is_add, set_input
from onnx_simplify.graph.model import Model

# Smaller arrays are not worth two nodes.
_SMALLEST = 1 << 12


def compress_maps(model: Model) -> None:
    """Replace addends that repeat rows or columns, in place."""
    editor = Editor(model)
    done: dict[str, gs.Tensor] = {}
    for node in model.graph.nodes:
        if not is_add(node):
            continue
        for index, tensor in enumerate(node.inputs):
            if not isinstance(tensor, gs.Constant) or tensor.values.nbytes < _SMALLEST:
                continue
            if tensor.name not in done:
                if all(is_add(user) for user, _ in editor.readers[tensor.name]):
                    # Nobody reads it any more: what is computed instead may have its name, so that
                    # a second run names it alike.
                    model.give_up(tensor.name)
                done[tensor.name] = _compressed(model, editor, node, tensor)
            set_input(node, index, done[tensor.name])
    editor.finish()


def _compressed(model: Model, editor: Editor, node: gs.Node, tensor: gs.Constant) -> gs.Tensor:
    """The tensor, or what computes it from its distinct rows and columns."""
    values = tensor.values
    hint = re.sub(r"_\d+$", "", tensor.name)
    steps = []
    for axis in range(2, values.ndim):
        first, places = _distinct(np.moveaxis(values, axis, 0))
        if first.size <= places.size // 2:
            values = values.take(first, axis)
            steps.append((axis, places))
    if values.nbytes + sum(i.nbytes for _, i in steps) > tensor.values.nbytes // 2:
        return tensor
    result: gs.Tensor = model.constant(f"{hint}_distinct", values)
    for axis, indices in steps:
        gathered = gs.Variable(model.unique(hint), tensor.dtype)
        editor.before(
            node,
            gs.Node(
                op="Gather",
                name=model.unique(f"{hint}_expand"),
                attrs={"axis": axis},
                inputs=[result, model.constant("indices", indices.astype(np.int64))],
                outputs=[gathered],
            ),
        )
        result = gathered
    return result


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the distinct rows, in order, and for each row, which of them it equals."""
    known: dict[bytes, int] = {}
    first: list[int] = []
    places = np.zeros(len(rows), np.int64)
    for index, row in enumerate(rows):
        # Plus zero: what compares equal has the same bytes.
        places[index] = known.setdefault((row + row.dtype.type(0)).tobytes(), len(known))
        if len(first) < len(known):
            first.append(index)
    return np.array(first, np.int64), places
