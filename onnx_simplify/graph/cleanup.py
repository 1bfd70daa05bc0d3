"""Bring a graph into the form the passes expect: no local aliases, no constant arithmetic."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.graph.model import Model, captured_names
from onnx_simplify.runtime.session import run_nodes

# Folding constants must not make the file larger than this many bytes beyond its operands.
_GROWTH = 4096
_NOT_FOLDED = frozenset({"DequantizeLinear", "QuantizeLinear", "RandomNormal", "RandomUniform"})


def clean(model: Model) -> None:
    """Normalise in place: fold constant subgraphs, drop identities and unused nodes."""
    _constants(model)
    _fold(model)
    bypass_identities(model)
    drop_unused(model)


def consumers(model: Model) -> dict[str, list[tuple[gs.Node, int]]]:
    """For each tensor name, the top-level nodes (and input positions) that read it."""
    found: dict[str, list[tuple[gs.Node, int]]] = {}
    for node in model.graph.nodes:
        for index, tensor in enumerate(node.inputs):
            if tensor.name:
                found.setdefault(tensor.name, []).append((node, index))
    return found


def drop_unused(model: Model) -> None:
    """Remove nodes none of whose outputs is used, in place."""
    uses = Counter(t.name for n in model.graph.nodes for t in n.inputs)
    uses.update(model.kept_names)
    keep = []
    for node in reversed(model.graph.nodes):
        if any(uses[t.name] for t in node.outputs if t.name):
            keep.append(node)
        else:
            for tensor in node.inputs:
                uses[tensor.name] -= 1
            uses.subtract(captured_names([node]))
    _set_nodes(model, keep[::-1])


def remove_nodes(model: Model, dead: set[int]) -> None:
    """Remove the nodes whose ``id`` is in ``dead``, in place."""
    _set_nodes(model, [n for n in model.graph.nodes if id(n) not in dead])


def insert_after(model: Model, node: gs.Node, new: gs.Node) -> None:
    """Insert ``new`` right behind ``node`` in execution order."""
    position = next(i for i, n in enumerate(model.graph.nodes) if n is node)
    model.graph.nodes.insert(position + 1, new)


def bypass_identities(model: Model) -> None:
    """Let the users of an ``Identity`` (or of inference-mode ``Dropout``) read its input."""
    kept = model.kept_names
    readers = consumers(model)
    dead = set()
    for node in model.graph.nodes:
        if node.domain or not _is_identity(node):
            continue
        source, result = node.inputs[0], node.outputs[0]
        if result.name in kept or source.name in {i.name for i in model.graph.outputs}:
            continue
        for reader, index in readers.pop(result.name, []):
            reader.inputs[index] = source
            readers.setdefault(source.name, []).append((reader, index))
        dead.add(id(node))
    remove_nodes(model, dead)


def _is_identity(node: gs.Node) -> bool:
    if node.op == "Identity":
        return True
    if node.op != "Dropout":
        return False
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    training = isinstance(mode, gs.Constant) and bool(mode.values)
    known = mode is None or not mode.name or isinstance(mode, gs.Constant)
    mask = len(node.outputs) > 1 and node.outputs[1].outputs
    return known and not training and not mask


def _set_nodes(model: Model, keep: list[gs.Node]) -> None:
    alive = {id(n) for n in keep}
    for node in model.graph.nodes:
        if id(node) not in alive:
            node.inputs.clear()
            node.outputs.clear()
    model.graph.nodes = keep


def _constants(model: Model) -> None:
    """Turn ``Constant`` nodes into initializers."""
    kept = model.kept_names
    readers = consumers(model)
    dead = set()
    for node in model.graph.nodes:
        if node.op != "Constant" or node.domain or node.outputs[0].name in kept:
            continue
        values = _constant_value(node)
        if values is None:
            continue
        tensor = gs.Constant(node.outputs[0].name, values)
        for reader, index in readers.get(tensor.name, []):
            reader.inputs[index] = tensor
        dead.add(id(node))
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


def _fold(model: Model) -> None:
    """Evaluate nodes with constant inputs only, in one onnxruntime session."""
    kept = model.kept_names
    constant: set[str] = set()
    folded: list[gs.Node] = []
    for node in model.graph.nodes:
        simple = (
            not node.domain
            and node.op not in _NOT_FOLDED
            and node.inputs
            and not any(isinstance(v, gs.Graph) for v in node.attrs.values())
            and not any(t.name in kept for t in node.outputs)
        )
        if simple and all(
            isinstance(t, gs.Constant) or not t.name or t.name in constant for t in node.inputs
        ):
            constant |= {t.name for t in node.outputs}
            folded.append(node)
    if not folded:
        return
    inside = {id(n) for n in folded}
    readers = consumers(model)
    frontier = [
        t
        for n in folded
        for t in n.outputs
        if any(id(r) not in inside for r, _ in readers.get(t.name, []))
    ]
    values = run_nodes(model, folded, [t.name for t in frontier])
    if values is None:
        return
    supply = sum(
        t.values.nbytes
        for t in {t.name: t for n in folded for t in n.inputs}.values()
        if isinstance(t, gs.Constant)
    )
    if sum(v.nbytes for v in values) > supply + _GROWTH * len(folded):
        return
    for tensor, value in zip(frontier, values, strict=True):
        new = gs.Constant(tensor.name, np.asarray(value))
        for reader, index in readers.get(tensor.name, []):
            if id(reader) not in inside:
                reader.inputs[index] = new
    remove_nodes(model, inside)
