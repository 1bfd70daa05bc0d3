"""Write onnxruntime's fused convolutions out, and fuse them again in the end.

    FusedConv(x, W, b, z)    =    activation(Conv(x, W, b) + z)

is how onnxruntime's optimiser saves a convolution, what is added to it and an activation. Written
out, it is a linear operator among others. A file that was optimised may be meant to be loaded
without optimisation, so what still belongs together is put together again.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_graphsurgeon as gs

from onnx_simplify.graph.edit import consumers, is_add, label, set_nodes
from onnx_simplify.graph.identity import NodeSet
from onnx_simplify.graph.model import Model
from onnx_simplify.operators.foreign import DOMAIN
from onnx_simplify.operators.nodes import has_input

# Activations, and the attributes that their parameters are, in order.
_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "Relu": (),
    "Tanh": (),
    "Sigmoid": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
}


def is_fused(node: gs.Node) -> bool:
    """Whether a node computes a linear operator and an activation that can be written out."""
    return node.op == "FusedConv" and node.domain == DOMAIN and _activation(node) in _ACTIVATIONS


def _activation(node: gs.Node) -> str:
    return str(node.attrs.get("activation", ""))


def write_out(model: Model) -> None:
    """Replace fused convolutions by what they compute, in place.

    The names of their outputs are kept in ``model.fused``, see :func:`fuse_again`.
    """
    nodes: list[gs.Node] = []
    for node in model.graph.nodes:
        nodes += _parts(model, node) if is_fused(node) else [node]
    model.graph.nodes = nodes


def _parts(model: Model, node: gs.Node) -> list[gs.Node]:
    """The convolution, with the node's name, a sum where there is one, and the activation."""
    result = node.outputs[0]
    kind = _activation(node)
    parameters = [float(v) for v in node.attrs.get("activation_params", ())]
    attributes = {k: v for k, v in node.attrs.items() if not k.startswith("activation")}

    def inner(suffix: str) -> gs.Variable:
        return gs.Variable(model.unique(f"{result.name}_{suffix}"), result.dtype, result.shape)

    source, addend = inner("linear"), node.inputs[3] if has_input(node, 3) else None
    operands = [t for t in node.inputs[:3] if t.name]
    parts = [gs.Node("Conv", node.name, attributes, operands, [source])]
    if addend is not None:
        total = inner("sum")
        name = model.unique(f"{label(node)}_sum")
        parts.append(gs.Node("Add", name, {}, [source, addend], [total]))
        source = total
    node.outputs.clear()
    node.inputs.clear()
    names = dict(zip(_ACTIVATIONS[kind], parameters, strict=False))
    name = model.unique(f"{label(parts[0])}_{kind}")
    parts.append(gs.Node(kind, name, names, [source], [result]))
    model.fused.add(result.name)
    return parts


def fuse_again(model: Model) -> None:
    """Fuse convolutions with their activations where they were fused before, in place."""
    if not model.fused:
        return
    makers = {t.name: node for node in model.graph.nodes for t in node.outputs}
    readers = consumers(model)

    def private(tensor: gs.Tensor) -> bool:
        return len(readers.get(tensor.name, ())) == 1 and not model.is_kept(tensor)

    def convolution(tensor: gs.Tensor) -> gs.Node | None:
        node = makers.get(tensor.name)
        plain = node is not None and node.op == "Conv" and not node.domain
        return node if plain and private(tensor) else None

    gone, nodes = NodeSet(), []
    for node in model.graph.nodes:
        found = None
        if node.outputs and node.outputs[0].name in model.fused and node.op in _ACTIVATIONS:
            found = _linear(node, makers, private, convolution)
        if found is None:
            nodes.append(node)
            continue
        linear, addend, between = found
        nodes.append(_fused(linear, addend, node))
        for part in (node, linear, *between):
            gone.add(part)
    set_nodes(model, [node for node in nodes if node not in gone])


def _linear(
    node: gs.Node,
    makers: Mapping[str, gs.Node],
    private: Callable[[gs.Tensor], bool],
    convolution: Callable[[gs.Tensor], gs.Node | None],
) -> tuple[gs.Node, gs.Tensor | None, list[gs.Node]] | None:
    """The convolution in front of an activation, what is added to it, and the sum's node."""
    source = node.inputs[0]
    linear = convolution(source)
    if linear is not None:
        return linear, None, []
    add = makers.get(source.name)
    if add is None or not is_add(add) or not private(source):
        return None
    for first, second in (add.inputs, reversed(add.inputs)):
        linear = convolution(first)
        same = second.shape is not None and second.shape == node.outputs[0].shape
        if linear is not None and same and not isinstance(second, gs.Constant):
            return linear, second, [add]
    return None


def _fused(linear: gs.Node, addend: gs.Tensor | None, activation: gs.Node) -> gs.Node:
    """One node for all."""
    attributes = dict(linear.attrs) | {"activation": activation.op}
    names = _ACTIVATIONS[activation.op]
    if names:
        attributes["activation_params"] = [float(activation.attrs[n]) for n in names]
    inputs = list(linear.inputs)
    if addend is not None:
        inputs += [gs.Variable.empty()] * (3 - len(inputs)) + [addend]
    outputs = list(activation.outputs)
    activation.outputs.clear()
    return gs.Node("FusedConv", linear.name, attributes, inputs, outputs, domain=DOMAIN)
