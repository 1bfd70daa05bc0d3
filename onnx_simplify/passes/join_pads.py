"""Let convolutions pad for themselves.

    Conv(Pad(x, p), pads=q)    =>    Conv(x, pads=p + q)        where Pad adds zeros

Padding with zeros twice is padding with zeros once, and a convolution's own padding is of zeros:
the result is the same to the last bit. What a convolution pads itself, it knows to be constant.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Unsupported
from onnx_simplify.graph.edit import drop_unused
from onnx_simplify.graph.model import Model
from onnx_simplify.operators import bind
from onnx_simplify.operators.nodes import attr_ints


def join_pads(model: Model) -> None:
    """Join padding in front of convolutions to their own, in place. Sizes must be known."""
    makers = {t.name: node for node in model.graph.nodes for t in node.outputs}
    changed = False
    for node in model.graph.nodes:
        if node.op != "Conv" or node.domain or node.attrs.get("auto_pad", "NOTSET") != "NOTSET":
            continue
        pad = makers.get(node.inputs[0].name)
        if pad is None or pad.outputs[0].name in model.pinned:
            continue
        amounts = _amounts(pad)
        if amounts is None:
            continue
        rank = len(amounts) // 2
        own = attr_ints(node, "pads", [0] * 2 * rank)
        joined = [a + b for a, b in zip(amounts, own, strict=True)]
        node.attrs["pads"] = joined
        node.inputs[0] = pad.inputs[0]
        changed = True
    if changed:
        drop_unused(model)


def _amounts(node: gs.Node) -> list[int] | None:
    """The padding of a ``Pad`` as a convolution would state it, if it adds zeros around images."""
    if node.op != "Pad" or node.domain or node.inputs[0].shape is None:
        return None
    rule = bind(node)
    try:
        pairs = rule.padding(len(node.inputs[0].shape))
    except Unsupported:
        return None
    if pairs is None or any(v < 0 for pair in pairs for v in pair) or any(map(any, pairs[:2])):
        return None
    return [before for before, _ in pairs[2:]] + [after for _, after in pairs[2:]]
