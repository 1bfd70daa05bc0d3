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

from onnx_simplify.channels.values import VARYING
from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.edit import is_add
from onnx_simplify.operators import Operator
from onnx_simplify.operators.contraction import Contraction
from onnx_simplify.planning.layers import layer_of, layers_at
from onnx_simplify.planning.merge import can_move, is_placement
from onnx_simplify.planning.planner import Planner
from onnx_simplify.planning.streams import Operand


def split_sums(facts: Facts, planner: Planner) -> list[str]:
    """Insert identity convolutions, in place.

    Args:
        facts: what is known, measured or not: they decide about speed only.
        planner: knows where it pays.

    Returns:
        Names of the operands; if there are any, the facts are out of date.
    """
    model = facts.model
    # One array for all of a size: they are large, and most of them are soon cut down.
    weights: dict[tuple[int, int], np.ndarray] = {}
    inserted = {t.name: _identity(facts, t, weights) for t in narrow_operands(facts, planner)}
    placed: set[str] = set()
    nodes = []
    for op in facts.operators:
        for tensor in _operands(facts, op):
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
    return list(inserted)


def narrow_operands(facts: Facts, planner: Planner) -> list[gs.Tensor]:
    """The operands of sums that had better have channels of their own."""
    # What stays if all constants are absorbed.
    alive = facts.alive(
        {name: need & (facts.level[name] == VARYING) for name, need in facts.needed.items()}
    )
    streams: dict[bytes, dict[str, tuple[gs.Tensor, Operand]]] = {}
    for op in facts.operators:
        for tensor in _operands(facts, op):
            operand = _operand(facts, alive, tensor)
            if operand is not None:
                key = facts.layouts.of[op.outputs[0].name].tobytes()
                streams.setdefault(key, {})[tensor.name] = tensor, operand
    found = []
    for stream in streams.values():
        tensors = [tensor for tensor, _ in stream.values()]
        operands = [operand for _, operand in stream.values()]
        labels = facts.layouts.of[tensors[0].name].ravel()
        users = layers_at(facts, labels, 0, alive)
        movable = can_move(facts, labels)
        narrow = planner.narrow_operands(operands, users, labels.size, movable)
        found += [tensors[index] for index in narrow]
    return found


def _operands(facts: Facts, op: Operator) -> list[gs.Tensor]:
    """The operands of a sum of two tensors that have the same channels."""
    if not is_add(op.node) or op.is_opaque:
        return []
    layout = facts.layouts.of[op.outputs[0].name]
    found = [t for t in op.inputs if facts.has(t)]
    same = all(np.array_equal(facts.layouts.of[t.name], layout) for t in found)
    return found if same and len(found) == 2 else []


def _operand(facts: Facts, alive: np.ndarray, tensor: gs.Tensor) -> Operand | None:
    """What the planner has to know of an operand; None if it cannot be narrow."""
    layout = facts.layouts.of[tensor.name]
    shape = facts.shape(tensor)
    if tensor.dtype != np.float32 or layout.ndim < 3 or layout.shape[1] != layout.size:
        return None
    maker = _maker(facts, tensor)
    if maker is None or shape[1] != layout.size or layout.size == 1:
        return None
    layer = layer_of(maker, facts, alive)
    stay = alive[layout.ravel()]
    varies = facts.level[tensor.name].ravel()[stay] == VARYING
    if layer.groups > 1 or not varies.any() or varies.all() or is_placement(maker):
        return None
    space = [size for size in shape[2:] if isinstance(size, int)]
    return Operand(varies, layer, int(np.prod(space)))


def _maker(facts: Facts, tensor: gs.Tensor) -> Contraction | None:
    """The convolution that makes a tensor's channels, with pooling or activations in between."""
    op = facts.producer.get(tensor.name)
    while op is not None:
        if any(product.regroups for product in op.contractions):
            return op.contractions[0]
        followed = [t for t in op.inputs if facts.has(t)]
        if len(followed) != 1 or not op.channelwise:
            return None
        op = facts.producer.get(followed[0].name)
    return None


def _identity(
    facts: Facts, tensor: gs.Tensor, weights: dict[tuple[int, int], np.ndarray]
) -> gs.Node:
    """A 1x1 convolution that passes a tensor on; its weights come from ``weights``, if there."""
    model = facts.model
    channels, rank = facts.shape(tensor)[1], len(facts.shape(tensor))
    weight = weights.get((channels, rank))
    if weight is None:
        weight = np.zeros([channels, channels] + [1] * (rank - 2), np.float32)
        weight[np.arange(channels), np.arange(channels)] = 1
        weights[channels, rank] = weight
    result = gs.Variable(model.unique(f"{tensor.name}_wide"), tensor.dtype, list(tensor.shape))
    model.aliases[result.name] = tensor.name
    return gs.Node(
        op="Conv",
        name=model.unique(f"{tensor.name}_widen"),
        inputs=[tensor, model.constant(f"{tensor.name}_places", weight)],
        outputs=[result],
    )
