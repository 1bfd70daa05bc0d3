"""Return to the blocked layout right behind a bias map.

    Conv -> Add(map) -> ...    =>    Conv -> Add(map) -> Conv(depthwise, ones) -> ...

onnxruntime computes convolutions in a blocked layout (NCHWc) that it leaves for an ``Add`` with an
initializer, and does not enter again before the next convolution: sums, concatenations and poolings
in between run unfused in the plain layout. A depthwise 1x1 convolution of ones is that next
convolution, and takes the activation or the other operand of a sum into its kernel.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.graph.edit import Readers, consumers
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.traits import ACTIVATES, BLOCKED
from onnx_simplify.planning.profiles import Profile


def reblock_maps(model: Model, profile: Profile) -> None:
    """Insert convolutions behind maps, in place.

    Args:
        model: a simplified model, its maps being initializers.
        profile: the target; nothing is done where there is no blocked layout.
    """
    if not profile.rearranges_blocks:
        return
    readers = consumers(model)
    producer = {t.name: n for n in model.graph.nodes for t in n.outputs}
    nodes = []
    for node in model.graph.nodes:
        nodes.append(node)
        users = _users(readers, node)
        if len(users) == 1 and users[0].op in ACTIVATES:
            users = _users(readers, users[0])
        if any(u.op not in BLOCKED or u.domain for u in users):
            continue
        if all(u.op == "Conv" for u in users):
            continue  # these enter it themselves
        if model.is_kept(node.outputs[0]) or not _is_map(node, producer, profile.block):
            continue
        result = node.outputs[0]
        channels = result.shape[1]
        raw = gs.Variable(model.unique(f"{result.name}_plain"), result.dtype, result.shape)
        ones = model.constant(f"{result.name}_ones", np.ones((channels, 1, 1, 1), result.dtype))
        node.outputs[0] = raw
        name = model.unique(f"{result.name}_reblock")
        nodes.append(gs.Node("Conv", name, {"group": channels}, [raw, ones], [result]))
    model.graph.nodes = nodes


def _users(readers: Readers, node: gs.Node) -> list[gs.Node]:
    return [user for t in node.outputs for user, _ in readers.get(t.name, ())]


def _is_map(node: gs.Node, producer: dict[str, gs.Node], block: int) -> bool:
    """Whether a node adds a map to the output of a convolution that is computed in blocks."""
    if node.op != "Add" or node.domain or node.outputs[0].dtype != np.float32:
        return False
    shape = node.outputs[0].shape
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or shape[1] % block:
        return False
    constant = [t for t in node.inputs if isinstance(t, gs.Constant)]
    varying = [producer.get(t.name) for t in node.inputs if not isinstance(t, gs.Constant)]
    if len(constant) != 1 or varying[0] is None or varying[0].op != "Conv":
        return False
    return any(size > 1 for size in constant[0].shape[-2:]) and len(constant[0].shape) >= 2
