"""Store what is constant altogether.

operand of an elementwise operator           replaced by an initializer
output of the graph, or of what is opaque    replaced by an expanded initializer
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.values import VARYING
from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.edit import Editor, label
from onnx_simplify.graph.expressions import Dim

# Larger arrays are computed at run time rather than stored.
_LARGEST_CONSTANT = 1 << 24


def store_constants(facts: Facts) -> list[str]:
    """Store operands and results that are constant, in place.

    A constant channel is the same for every input, so what holds nothing else is too.

    Args:
        facts: measured facts.

    Returns:
        The tensors' names; if there are any, the facts are out of date.
    """
    return _store_operands(facts) + _store_results(facts)


def _store_operands(facts: Facts) -> list[str]:
    """Replace operands of elementwise nodes that are constant altogether by initializers."""
    model = facts.model
    need = facts.needed
    stored = []
    for op in facts.operators:
        node = op.node
        if not op.stores_operands:
            continue
        operands = [t for t in node.inputs if t.name and not isinstance(t, gs.Constant)]
        fixed = [t for t in operands if ((facts.level[t.name] > VARYING) | ~need[t.name]).all()]
        if len(fixed) == len(operands):
            continue
        for tensor in fixed:
            values = _stored(facts, tensor, need[tensor.name])
            others = [t for t in operands if t is not tensor]
            if values is None or not _same_shape(facts, node, others, values.shape):
                continue
            constant = model.constant(f"{tensor.name}_constant", values.astype(tensor.dtype))
            for index, other in enumerate(node.inputs):
                if other is tensor:
                    node.inputs[index] = constant
            operands = others
            stored.append(tensor.name)
    return stored


def _store_results(facts: Facts) -> list[str]:
    """Compute tensors that must exist, but are constant altogether, from their constants alone.

    Those are graph outputs and inputs of operators that are not understood.
    """
    model = facts.model
    if model.opset < 8:  # there is no Expand
        return []
    editor = Editor(model)
    kept = {t.name for t in model.graph.outputs}
    stored = []
    for op in facts.operators:
        node = op.node
        for index, result in enumerate(node.outputs):
            if not facts.has(result) or not (facts.level[result.name] > VARYING).all():
                continue
            users = facts.readers.get(result.name, [])
            if result.name not in kept and not any(user.is_opaque for user, _ in users):
                continue
            values = _stored(facts, result, np.ones(facts.level[result.name].shape, bool))
            shape = _shape_nodes(facts, result)
            if values is None or shape is None:
                continue
            constant = model.constant(f"{result.name}_constant", values.astype(result.dtype))
            name = model.unique(f"{label(node)}_expand")
            node.outputs[index] = gs.Variable(model.unique(f"{result.name}_unused"))
            expand = gs.Node("Expand", name, inputs=[constant, shape[0]], outputs=[result])
            for new in (*shape[1], expand):
                editor.after(node, new)
            stored.append(result.name)
    editor.finish()
    return stored


def _shape_nodes(facts: Facts, tensor: gs.Tensor) -> tuple[gs.Tensor, list[gs.Node]] | None:
    """A tensor's shape as a vector, and what computes it from the graph's inputs.

    None if a size is not one of an input.
    """
    model = facts.model
    dims = facts.shape(tensor)
    if all(isinstance(d, int) for d in dims):
        return model.constant(f"{tensor.name}_shape", np.array(dims, np.int64)), []
    nodes: list[gs.Node] = []
    parts: list[gs.Tensor] = []

    def add(op: str, inputs: list[gs.Tensor], **attrs: int) -> gs.Tensor:
        output = gs.Variable(model.unique(f"{tensor.name}_size"), np.int64)
        name = model.unique(f"{tensor.name}_{op}")
        nodes.append(gs.Node(op, name, attrs, inputs, [output]))
        return output

    for dim in dims:
        if isinstance(dim, int):
            parts.append(model.constant(f"{tensor.name}_size", np.array([dim], np.int64)))
            continue
        places = [
            (source, axis)
            for source in model.graph.inputs
            for axis, size in enumerate(source.shape or [])
            if size == dim
        ]
        if not places:
            return None
        source, axis = places[0]
        index = model.constant(f"{tensor.name}_axis", np.array([axis], np.int64))
        parts.append(add("Gather", [add("Shape", [source]), index], axis=0))
    return add("Concat", parts, axis=0), nodes


def _stored(facts: Facts, tensor: gs.Tensor, need: np.ndarray) -> np.ndarray | None:
    """The constant as an array that broadcasts to the tensor, if it can be had.

    Where it is not needed, it has some other needed value.
    """
    scalar = facts.scalar(tensor)
    if np.isfinite(scalar[need]).all():
        return np.where(need, scalar, scalar[need].flat[0] if need.any() else 0.0)
    found = facts.array(tensor)
    return found if found is not None and found.nbytes <= _LARGEST_CONSTANT else None


def _same_shape(
    facts: Facts, node: gs.Node, others: list[gs.Tensor], shape: tuple[int, ...]
) -> bool:
    """Whether the remaining operands and an array broadcast to the shape of the output."""
    output = facts.shape(node.outputs[0])
    shapes: list[list[Dim]] = [list(shape), *(facts.shape(t) for t in others)]
    for axis in range(1, len(output) + 1):
        found = [s[-axis] for s in shapes if len(s) >= axis]
        if output[-axis] != 1 and output[-axis] not in found:
            return False
    return True
