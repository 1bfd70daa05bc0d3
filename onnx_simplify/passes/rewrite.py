"""Carry out a plan: absorb constants and remove channels, in one go.

A label (a channel with everything equated to it) is dead when none of its positions, in any tensor,
is needed.  Every tensor drops the positions of dead labels:

    X [N, 64, H, W], W1 [64, 32, 3, 3], W2 [128, 64, 3, 3]   and labels 3, 17 dead
    X [N, 62, H, W], W1 [62, 32, 3, 3], W2 [128, 62, 3, 3]

and what they added to the outputs of those who read them goes to where the plan says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.edit import Editor, drop_unused
from onnx_simplify.graph.model import Model
from onnx_simplify.operators.contraction import Contraction
from onnx_simplify.passes.cut import Cut
from onnx_simplify.planning.absorbing import Absorption
from onnx_simplify.planning.plan import Plan
from onnx_simplify.runtime.session import run_proto


@dataclass
class _Addend:
    """What constants added to the output of a product.

    Attributes:
        product: the product.
        shift: one value for each output channel.
        map: an array that broadcasts to the output, channels along its axis of channels; or None.
    """

    product: Contraction
    shift: np.ndarray
    map: np.ndarray | None


def rewrite(plan: Plan) -> None:
    """Rewrite the graph that a plan is about, in place; its facts are then out of date.

    Args:
        plan: what to do. Channels go only where it says which ones stay.
    """
    facts = plan.facts
    model = facts.model
    # What stays though nobody needs it keeps its value: a factor of zero stays zero.
    kept = np.ones_like(plan.seen) if plan.alive is None else plan.seen | plan.alive
    addends = [_addend(facts, own, plan.seen, kept) for own in plan.absorptions]
    editor = Editor(model)
    for own in plan.absorptions:
        if own.stand_ins:
            _merge_columns(own, editor)
        own.product.zero_columns(own.absorb, editor.put)
    cut = None
    if plan.alive is not None:
        cut = Cut(facts, plan.alive, plan.mergers)
        cut.apply()
    editor = Editor(model)
    for addend in addends:
        if cut is None or not facts.is_gone(addend.product, cut.alive):
            _add(editor, facts, addend, cut)
    editor.finish()
    if cut is not None:
        cut.rename_moved()
    drop_unused(model)


def _addend(facts: Facts, own: Absorption, seen: np.ndarray, kept: np.ndarray) -> _Addend:
    """What the constants to be absorbed add now.

    Args:
        facts: measured facts.
        own: what is absorbed.
        seen: labels that stay; nobody looks at any other output.
        kept: labels that are there in the end.
    """
    product = own.product
    scalar = own.absorb & own.scalar
    mapped = own.absorb & ~scalar & ~own.replaced
    visible = seen[product.channels(facts)[1]]
    shift = product.response(np.where(scalar, own.values, own.offsets))
    shift = shift * kept[product.channels(facts)[1]]
    if not mapped.any() or not visible.any():
        return _Addend(product, shift, None)
    addend = None
    if not (mapped & own.mapped).any():
        addend = product.border_response(np.where(mapped, own.values, 0), facts)
    if addend is None:
        addend = _response_map(facts, own, mapped)
    axis = product.wiring.axis_out % addend.ndim
    addend *= visible.reshape([-1 if a == axis else 1 for a in range(addend.ndim)])
    flat = np.moveaxis(addend, axis, 0).reshape(addend.shape[axis], -1)
    if np.allclose(flat, flat[:, :1], rtol=1e-6, atol=1e-12):
        return _Addend(product, shift + flat[:, 0], None)
    return _Addend(product, shift, addend)


def _add(editor: Editor, facts: Facts, addend: _Addend, cut: Cut | None) -> None:
    """Put what constants added into the bias of a product, or behind it."""
    product, shift, array = addend.product, addend.shift, addend.map
    if cut is not None:
        outputs = cut.stay(product.channels(facts)[1])
        shift = shift[outputs]
        if array is not None:
            array = array.take(outputs, product.wiring.axis_out % array.ndim)
    if shift.any() and not product.add_bias(shift, editor.put):
        editor.add_behind(product.node, product.per_channel(shift))
    if array is not None and array.any():
        editor.add_behind(product.node, array)


def _merge_columns(own: Absorption, editor: Editor) -> None:
    """Add the scaled weights of channels to those of the channels that stand for them."""
    weight = np.array(own.product.weights())
    inputs = weight.shape[2]
    for members, chosen, factors in own.stand_ins:
        if not members.size:
            continue
        group = members[0] // inputs
        columns = weight[group][:, members % inputs].astype(np.float64)
        extra = np.einsum("om...,km->ok...", columns, factors)
        weight[group][:, chosen % inputs] += extra.astype(weight.dtype)
    own.product.set_weights(weight, editor.put)


def _response_map(facts: Facts, own: Absorption, mask: np.ndarray) -> np.ndarray:
    """What the constants of some input channels add to the output, as an array (float32).

    The node itself is run on these channels alone, with size 1 along axes where nothing varies.
    """
    product = own.product
    wiring = product.wiring
    source = product.inputs[wiring.data]
    sizes = facts.shape(source)
    axis = wiring.axis_in % len(sizes)
    known = facts.array(source)
    spread = product.spread_axes()
    shape = []
    for a, size in enumerate(sizes):
        varies = known is not None and known.shape[a] > 1
        if a == axis or a in spread or varies:
            assert isinstance(size, int)
            shape.append(size)
        else:
            shape.append(product.window(a))
    column = [-1 if a == axis else 1 for a in range(len(sizes))]
    values = np.where(np.isfinite(own.values), own.values, 0).reshape(column)
    if known is not None:
        values = np.where(np.isfinite(own.values).reshape(column), values, known)
    data = np.broadcast_to(np.where(mask.reshape(column), values, 0), shape).astype(np.float32)
    return _run_alone(facts.model, product.node, wiring.data, wiring.weight, data)


def _run_alone(
    model: Model, node: gs.Node, data: int, weight: int, values: np.ndarray
) -> np.ndarray:
    """The node's output for one input, in float32 and without bias."""
    proto = model.export_node(node)
    del proto.input[:], proto.output[:]
    names = {data: "data", weight: "weight"}
    proto.input.extend([names[0], names[1]])
    proto.output.append("result")
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [proto],
        "alone",
        [onnx.helper.make_tensor_value_info("data", kind, values.shape)],
        [onnx.helper.make_tensor_value_info("result", kind, None)],
        [onnx.numpy_helper.from_array(node.inputs[weight].values.astype(np.float32), "weight")],
    )
    # Of this operator set, in which the bias of all of them is optional.
    opsets = [onnx.helper.make_opsetid("", 13)]
    single = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return run_proto(single, {"data": values})[0]
