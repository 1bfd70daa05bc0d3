"""Let a narrow operand of a sum be narrow.

    Add(Relu(Conv(x)), y)    =>    Add(Conv_identity(Relu(Conv(x))), y)

A sum makes its operands equally wide: a channel that is constant in one of them is computed all the
same, because it varies in the other. A 1x1 convolution with the identity matrix has channels of its
own on both sides. The passes that follow remove the constant ones before it and put their values
into its bias, and what is left of it puts the channels in their places:

    64 -> 3x3 -> 64 (32 of them constant)    =>    64 -> 3x3 -> 32 -> 1x1 -> 64

onnxruntime adds the other operand in the same kernel. Where the channels of the sum can be ordered
such that this convolution has groups (:mod:`onnx_simplify.planning.streams`), it pays behind 1x1
convolutions as well. Multiplying by one and adding zeros is exact.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.analysis import Analysis
from onnx_simplify.channels.merge import can_move, is_placement
from onnx_simplify.channels.operators import Operator
from onnx_simplify.channels.operators.linear import Linear
from onnx_simplify.channels.values import VARYING
from onnx_simplify.graph.edit import is_add
from onnx_simplify.planning.layers import layer_of, layers_at
from onnx_simplify.planning.planner import Planner
from onnx_simplify.planning.streams import Operand


def split_sums(analysis: Analysis, planner: Planner) -> bool:
    """Insert identity convolutions, in place.

    Args:
        analysis: an analysis with levels, measured or not: they decide about speed only.
        planner: knows where it pays.

    Returns:
        Whether anything was inserted; the analysis is then out of date.
    """
    model = analysis.model
    # What stays if all constants are absorbed.
    alive = analysis.alive(
        {
            name: need & (analysis.level[name] == VARYING)
            for name, need in analysis.needed.items()
            if name in analysis.level
        }
    )
    streams: dict[bytes, dict[str, tuple[gs.Tensor, Operand]]] = {}
    for op in analysis.operators:
        for tensor in _operands(analysis, op):
            operand = _operand(analysis, alive, tensor)
            if operand is not None:
                key = analysis.layouts.of[op.outputs[0].name].tobytes()
                streams.setdefault(key, {})[tensor.name] = tensor, operand
    inserted: dict[str, gs.Node] = {}
    # One array for all of a size: they are large, and most of them are soon cut down.
    weights: dict[tuple[int, int], np.ndarray] = {}
    for stream in streams.values():
        tensors = [tensor for tensor, _ in stream.values()]
        operands = [operand for _, operand in stream.values()]
        labels = analysis.layouts.of[tensors[0].name].ravel()
        users = layers_at(analysis, labels, 0, alive)
        movable = can_move(analysis, labels)
        for index in planner.narrow_operands(operands, users, labels.size, movable):
            inserted[tensors[index].name] = _identity(analysis, tensors[index], weights)
    placed: set[str] = set()
    nodes = []
    for op in analysis.operators:
        for tensor in _operands(analysis, op):
            identity = inserted.get(tensor.name)
            if identity is None:
                continue
            if tensor.name not in placed:
                nodes.append(identity)
                placed.add(tensor.name)
            for index, other in enumerate(op.inputs):
                if other is tensor:
                    op.inputs[index] = identity.outputs[0]
        nodes.append(op.node)
    model.graph.nodes = nodes
    return bool(placed)


def _operands(analysis: Analysis, op: Operator) -> list[gs.Tensor]:
    """The operands of a sum of two tensors that have the same channels."""
    if not is_add(op.node) or op.is_opaque:
        return []
    layout = analysis.layouts.of[op.outputs[0].name]
    found = [t for t in op.inputs if analysis.has(t)]
    same = all(np.array_equal(analysis.layouts.of[t.name], layout) for t in found)
    return found if same and len(found) == 2 else []


def _operand(analysis: Analysis, alive: np.ndarray, tensor: gs.Tensor) -> Operand | None:
    """What the planner has to know of an operand; None if it cannot be narrow."""
    layout = analysis.layouts.of[tensor.name]
    shape = analysis.shape(tensor)
    if tensor.dtype != np.float32 or layout.ndim < 3 or layout.shape[1] != layout.size:
        return None
    maker = _maker(analysis, tensor)
    if maker is None or shape[1] != layout.size or layout.size == 1:
        return None
    layer = layer_of(maker, analysis, alive)
    stay = alive[layout.ravel()]
    varies = analysis.level[tensor.name].ravel()[stay] == VARYING
    if layer.groups > 1 or not varies.any() or varies.all() or is_placement(maker):
        return None
    space = [size for size in shape[2:] if isinstance(size, int)]
    return Operand(varies, layer, int(np.prod(space)))


def _maker(analysis: Analysis, tensor: gs.Tensor) -> Linear | None:
    """The convolution that makes a tensor's channels, with pooling or activations in between."""
    op = analysis.producer.get(tensor.name)
    while op is not None:
        if any(product.regroups for product in op.contractions):
            return op.contractions[0]
        followed = [t for t in op.inputs if analysis.has(t)]
        if len(followed) != 1 or not op.channelwise:
            return None
        op = analysis.producer.get(followed[0].name)
    return None


def _identity(
    analysis: Analysis, tensor: gs.Tensor, weights: dict[tuple[int, int], np.ndarray]
) -> gs.Node:
    """A 1x1 convolution that passes a tensor on; its weights come from ``weights``, if there."""
    model = analysis.model
    channels, rank = analysis.shape(tensor)[1], len(analysis.shape(tensor))
    weight = weights.get((channels, rank))
    if weight is None:
        weight = np.zeros([channels, channels] + [1] * (rank - 2), np.float32)
        weight[np.arange(channels), np.arange(channels)] = 1
        weights[channels, rank] = weight
    result = gs.Variable(model.unique(f"{tensor.name}_wide"), tensor.dtype, list(tensor.shape))
    return gs.Node(
        op="Conv",
        name=model.unique(f"{tensor.name}_widen"),
        inputs=[tensor, model.constant(f"{tensor.name}_places", weight)],
        outputs=[result],
    )
