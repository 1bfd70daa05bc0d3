"""Layers by their names in the module: which nodes they have become."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator

import onnx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import onnx_simplify
from torch_bridge.stage import Stage

# Layers that can be named in any step, not only in the first.
LAYERS = (_ConvNd, nn.Linear, _BatchNorm)


def check_names(names: Collection[str], known: Collection[str]) -> None:
    """Raise ValueError unless all are names of modules."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"the model has no module '{name}'{hint}")


def modules_of(stage: Stage) -> Callable[[str], str | None]:
    """The module that a node, given by its label, belongs to."""
    owner: dict[str, str] = {}
    modules = dict(stage.signature.model.named_modules())
    # A container returns what its last layer does: the layer's name is the better one.
    names = sorted(stage.tensors, key=lambda name: not isinstance(modules[name], LAYERS))
    for name in names:
        for tensor in stage.tensors[name]:
            owner.setdefault(tensor, name)
    graph = stage.proto.graph
    output = {node.name: node.output[0] for node in graph.node if node.name}
    weights = {tensor.name for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def find(label: str) -> str | None:
        tensor = output.get(label, label)
        # A linear layer may be two nodes: the product, and the sum with the bias.
        users = readers.get(tensor, [])
        if tensor not in owner and len(users) == 1 and users[0].op_type == "Add":
            if any(name in weights for name in users[0].input):
                tensor = users[0].output[0]
        return owner.get(tensor)

    return find


def pairs_of(stage: Stage) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Foldable pairs: (layer, BatchNorm) by module, and the same by node."""
    module = modules_of(stage)
    for layer, norm in onnx_simplify.get_bn_folding(stage.proto):
        names = module(layer), module(norm)
        if names[0] is not None and names[1] is not None:
            yield (names[0], names[1]), (layer, norm)


def nodes_of(stage: Stage, pairs: Collection[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs of nodes that belong to pairs of modules.

    Raises:
        ValueError: a pair that cannot be folded.
    """
    wanted = {(str(a), str(b)) for a, b in pairs}
    found = {nodes: names for names, nodes in pairs_of(stage) if names in wanted}
    for pair in sorted(wanted - set(found.values())):
        raise ValueError(f"cannot fold {pair}: see get_bn_folding")
    return set(found)


def survivors(
    before: onnx.ModelProto, after: onnx.ModelProto, tensors: dict[str, list[str]]
) -> dict[str, list[str]]:
    """Which tensors stand for modules after a step.

    Where a BatchNorm was folded, the layer and it have become one node: both go by its output.
    """
    present = {name for node in after.graph.node for name in node.output}
    merged: dict[str, str] = {}
    for node in before.graph.node:
        if node.op_type in ("BatchNormalization", "Identity"):
            source, result = node.input[0], node.output[0]
            if source not in present:
                merged[source] = result
            elif result not in present:
                merged[result] = source
    found = {}
    for module, names in tensors.items():
        names = [name if name in present else merged.get(name, name) for name in names]
        if set(names) <= present:
            found[module] = names
    return found
