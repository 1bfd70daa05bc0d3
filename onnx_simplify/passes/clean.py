"""Bring a graph into the form the other passes expect: no local aliases, no constant arithmetic.

``Constant`` nodes become initializers, nodes with constant inputs are evaluated (unless that makes
the file larger), ``Identity``, inference-mode ``Dropout`` and one-operand ``Concat`` are bypassed,
and nodes nobody uses are dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import components
from onnx_simplify.graph.edit import Readers, consumers, drop_unused, remove_nodes
from onnx_simplify.graph.identity import NodeMap, NodeSet
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.quantized import QuantizedConstant
from onnx_simplify.operators.elementwise import has_mask, is_inference_dropout
from onnx_simplify.passes.fused import write_out
from onnx_simplify.passes.inline_ifs import inline_ifs
from onnx_simplify.runtime.session import run_nodes

# A folded constant may be larger than its operands together by this many bytes.
_GROWTH = 256
# ... or up to this size when it is gathered: the compressed form of a bias map.
_LARGEST_MAP = 1 << 26
_NOT_FOLDED = frozenset(
    """DequantizeLinear QuantizeLinear DynamicQuantizeLinear RandomNormal RandomUniform
    RandomNormalLike RandomUniformLike Multinomial Bernoulli""".split()
)


def clean(model: Model) -> None:
    """Normalise the model, in place."""
    _constants(model)
    if inline_ifs(model):
        _constants(model)
    write_out(model)
    _drop_masks(model)
    _drop_ones(model)
    bypass_identities(model)
    fold_constants(model)
    model.adopt_quantized()
    drop_unused(model)


def _drop_masks(model: Model) -> None:
    """Leave out masks of ``Dropout`` that nobody reads."""
    readers = consumers(model)
    for node in model.graph.nodes:
        if node.op == "Dropout" and not node.domain and has_mask(node):
            mask = node.outputs[1]
            if mask.name not in readers and not model.is_kept(mask):
                node.outputs = node.outputs[:1]


def _drop_ones(model: Model) -> None:
    """Take out depthwise convolutions of ones, which only change the layout in onnxruntime.

    What is in front of one takes the name of its output, so that putting it in again, see
    :mod:`onnx_simplify.passes.reblock_maps`, gives the graph that was there.
    """
    readers = consumers(model)
    makers = {t.name: node for node in model.graph.nodes for t in node.outputs}
    dead = NodeSet()
    for node in model.graph.nodes:
        if node.op != "Conv" or node.domain or not _is_ones(node):
            continue
        source, maker = node.inputs[0], makers.get(node.inputs[0].name)
        private = len(readers[source.name]) == 1 and not model.is_kept(source)
        if maker is None or not private or source.name in model.pinned:
            continue
        result = node.outputs[0]
        node.outputs.clear()
        maker.outputs[[t is source for t in maker.outputs].index(True)] = result
        makers[result.name] = maker
        dead.add(node)
    remove_nodes(model, dead)


def _is_ones(node: gs.Node) -> bool:
    """A depthwise 1x1 convolution of ones, without bias: its output is its input."""
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant) or isinstance(weight, QuantizedConstant):
        return False
    if len(node.inputs) > 2 and node.inputs[2].name:
        return False
    groups = node.attrs.get("group", 1)
    return (
        list(weight.shape) == [groups, *[1] * (len(weight.shape) - 1)]
        and all(v == 1 for v in node.attrs.get("strides", ()))
        and not any(node.attrs.get("pads", ()))
        and bool((weight.values == 1).all())
    )


def bypass_identities(model: Model) -> None:
    """Let the users of a node that only passes its input on read that input, in place."""
    kept = model.kept_names
    outputs = {t.name for t in model.graph.outputs}
    readers = consumers(model)
    dead = NodeSet()
    for node in model.graph.nodes:
        if node.domain or not _is_identity(node):
            continue
        source, result = node.inputs[0], node.outputs[0]
        if result.name in kept or result.name in model.pinned or source.name in outputs:
            continue
        for reader, index in readers.pop(result.name, []):
            reader.inputs[index] = source
            readers.setdefault(source.name, []).append((reader, index))
        dead.add(node)
    remove_nodes(model, dead)


def _is_identity(node: gs.Node) -> bool:
    if node.op == "Identity" or (node.op in ("Concat", "Sum") and len(node.inputs) == 1):
        return True
    if node.op == "Split" and len(node.outputs) == 1:
        return True
    if node.op == "Conv":
        return _is_identity_convolution(node)
    return node.op == "Dropout" and is_inference_dropout(node) and not has_mask(node)


def _is_identity_convolution(node: gs.Node) -> bool:
    """A 1x1 convolution with the identity matrix."""
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant) or len(node.inputs) > 2 and node.inputs[2].name:
        return False
    channels, inputs, *kernel = weight.shape
    if any(k != 1 for k in kernel) or channels != inputs or node.attrs.get("group", 1) != 1:
        return False
    if any(v != 1 for v in node.attrs.get("strides", ())) or any(node.attrs.get("pads", ())):
        return False
    return bool((weight.values.reshape(channels, channels) == np.eye(channels)).all())


def _constants(model: Model) -> None:
    """Turn ``Constant`` nodes into initializers."""
    kept = model.kept_names
    readers = consumers(model)
    dead = NodeSet()
    for node in model.graph.nodes:
        if node.op != "Constant" or node.domain or node.outputs[0].name in kept:
            continue
        values = _constant_value(node)
        if values is None:
            continue
        tensor = gs.Constant(node.outputs[0].name, values)
        for reader, index in readers.get(tensor.name, []):
            reader.inputs[index] = tensor
        dead.add(node)
    remove_nodes(model, dead)


def _constant_value(node: gs.Node) -> np.ndarray | None:
    for key, value in node.attrs.items():
        if key == "value" and isinstance(value, gs.Constant):
            return np.asarray(value.values)
        if key in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
        if key in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
    return None


def fold_constants(model: Model, *, at_any_size: bool = False) -> None:
    """Evaluate nodes with constant inputs only, all in one onnxruntime session.

    What is computed is stored where that makes the file no larger: a whole computation, such as
    the standardisation of a weight, if its results need no more room than what only it reads;
    otherwise those of its nodes of which that is true.

    Args:
        model: the model, changed in place.
        at_any_size: store results however large they are, in a model that is never written.
    """
    kept = model.kept_names
    constant: set[str] = set()
    inside: list[gs.Node] = []
    for node in model.graph.nodes:
        if _foldable(node, kept) and all(
            isinstance(t, gs.Constant) or not t.name or t.name in constant for t in node.inputs
        ):
            constant |= {t.name for t in node.outputs}
            inside.append(node)
    if not inside:
        return
    results = [t for n in inside for t in n.outputs if t.name]
    values = run_nodes(model, inside, [t.name for t in results])
    if values is None:
        return
    value_of = {
        t.name: v
        for t, v in zip(results, values, strict=True)
        if isinstance(v, np.ndarray) and v.dtype.kind in "fiubcV"
    }
    readers = consumers(model)
    dead = NodeSet()
    known: dict[str, list[gs.Constant]] = {}
    fitting = _fitting(inside, readers, {name: v.nbytes for name, v in value_of.items()})
    for node in inside:
        # Decided node by node, in order, so that a result does not depend on its neighbours.
        ready = all(isinstance(t, gs.Constant) or not t.name for t in node.inputs)
        if not ready or not all(t.name in value_of for t in node.outputs if t.name):
            continue
        same = _computation(node)
        stored = same in known or node in fitting or at_any_size
        size = sum(value_of[t.name].nbytes for t in node.outputs if t.name)
        if not stored and not _is_worth_storing(node, same, readers, size):
            continue
        if same not in known:
            known[same] = [gs.Constant(t.name, value_of.get(t.name)) for t in node.outputs]
        for tensor, new in zip(node.outputs, known[same], strict=True):
            for reader, index in readers.get(tensor.name, []) if tensor.name else ():
                reader.inputs[index] = new
        dead.add(node)
    remove_nodes(model, dead)


def _is_worth_storing(node: gs.Node, same: str, readers: Readers, size: int) -> bool:
    """Whether results of so many bytes may take the place of a node and what it reads alone.

    Args:
        node: the node.
        same: its computation, which other nodes may make as well.
        readers: readers of all tensors.
        size: bytes of its results.
    """
    # What others read as well stays in the file.
    supply = sum(
        t.values.nbytes
        for t in node.inputs
        if isinstance(t, gs.Constant)
        and all(_computation(user) == same for user, _ in readers[t.name])
    )
    return size <= supply + _GROWTH or (node.op == "Gather" and size <= _LARGEST_MAP)


def _fitting(nodes: list[gs.Node], readers: Readers, sizes: Mapping[str, int]) -> NodeSet:
    """Nodes of computations whose results are no larger than what only they read.

    Args:
        nodes: nodes with constant inputs only; those that are connected are one computation.
        readers: readers of all tensors.
        sizes: bytes of their outputs by name; what is missing cannot be stored.
    """
    maker = {t.name: k for k, node in enumerate(nodes) for t in node.outputs if t.name}
    edges = [
        (k, maker[t.name]) for k, node in enumerate(nodes) for t in node.inputs if t.name in maker
    ]
    left, right = np.array(edges, np.int64).reshape(-1, 2).T
    labels = components(len(nodes), [(left, right)])
    part = NodeMap(zip(nodes, map(int, labels), strict=True))
    growth = dict.fromkeys(part.values(), 0)
    counted: set[str] = set()
    for node in nodes:
        own = part[node]
        for tensor in node.outputs:
            users = readers.get(tensor.name, ())
            if tensor.name and tensor.name not in sizes:
                growth[own] = _LARGEST_MAP
            elif any(user not in part for user, _ in users):
                growth[own] += sizes[tensor.name]
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and tensor.name not in counted:
                counted.add(tensor.name)
                if all(part.get(user) == own for user, _ in readers[tensor.name]):
                    growth[own] -= tensor.values.nbytes
    return NodeSet(node for node in nodes if growth[part[node]] <= 0)


def _computation(node: gs.Node) -> str:
    """What a node computes: nodes for which it is the same have the same results."""
    attributes = sorted(
        (name, repr(value) if isinstance(value, (int, float, str, list)) else id(value))
        for name, value in node.attrs.items()
    )
    names = [t.name for t in node.inputs]
    return repr((node.op, node.domain, attributes, names, [bool(t.name) for t in node.outputs]))


def _foldable(node: gs.Node, kept: Collection[str]) -> bool:
    return (
        not node.domain
        and node.op not in _NOT_FOLDED
        and (node.op != "Dropout" or _is_identity(node))
        and bool(node.inputs)
        and not any(isinstance(v, gs.Graph) for v in node.attrs.values())
        and not any(t.name in kept for t in node.outputs)
        and not any(isinstance(t, QuantizedConstant) for t in node.inputs)
    )
