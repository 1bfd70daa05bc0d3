"""What the attributes and optional inputs of a node say."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Unsupported
from onnx_simplify.graph.expressions import Dim, ceil_quotient, floor_quotient, total

# Longer vectors are not shapes.
LONGEST = 64


def kind(node: gs.Node) -> str:
    """What a node does: its operator, with the domain if that is not the standard one."""
    return f"{node.op} ({node.domain})" if node.domain else str(node.op)


def attr_ints(node: gs.Node, name: str, default: list[int]) -> list[int]:
    """An integer-list attribute."""
    return [int(v) for v in node.attrs.get(name, default)]


def constant_input(node: gs.Node, index: int) -> np.ndarray | None:
    """The value of an optional input if it is an initializer; None when absent or computed."""
    if len(node.inputs) > index and isinstance(node.inputs[index], gs.Constant):
        return np.asarray(node.inputs[index].values)
    return None


def constant_shape(node: gs.Node, index: int) -> list[int]:
    """The shape of an input if it is an initializer; empty when absent, computed or a scalar."""
    if len(node.inputs) > index and isinstance(node.inputs[index], gs.Constant):
        return list(node.inputs[index].shape)
    return []


def has_input(node: gs.Node, index: int) -> bool:
    """Whether the optional input is given."""
    return len(node.inputs) > index and bool(node.inputs[index].name)


def is_computed(node: gs.Node, index: int) -> bool:
    """Whether an optional input is there, but known at run time only.

    To take that for absent would be to take the default for its value.
    """
    return has_input(node, index) and not isinstance(node.inputs[index], gs.Constant)


def constant_ints(node: gs.Node, index: int, attribute: str) -> list[int] | None:
    """Integers given as an initializer input or, in older operator sets, as an attribute.

    Returns:
        None when neither is there.

    Raises:
        Unsupported: the input is computed.
    """
    if is_computed(node, index):
        raise Unsupported(f"{attribute} are computed")
    values = constant_input(node, index)
    if values is not None:
        return [int(v) for v in values.ravel()]
    if attribute in node.attrs:
        found = node.attrs[attribute]
        return [int(v) for v in (found if isinstance(found, (list, tuple)) else [found])]
    return None


def is_static(shape: list[Dim], axes: list[int] | range | None = None) -> bool:
    """Whether the sizes along ``axes`` (all by default) are known."""
    return all(isinstance(shape[a], int) for a in (range(len(shape)) if axes is None else axes))


def windowed(node: gs.Node, sizes: list[Dim], kernel: list[int]) -> list[Dim | None]:
    """The number of places of a sliding window; None where it is not known.

    floor((size + padding - reach) / stride) + 1, where the window reaches over
    ``dilation * (kernel - 1) + 1`` elements; with automatic padding, ceil(size / stride). For sizes
    into which the window fits: onnxruntime rounds what is negative up.
    """
    rank = len(sizes)
    pads = attr_ints(node, "pads", [0] * 2 * rank)
    strides = attr_ints(node, "strides", [1] * rank)
    dilations = attr_ints(node, "dilations", [1] * rank)
    if not len(kernel) == len(strides) == len(dilations) == rank == len(pads) // 2:
        return [None] * rank
    auto = node.attrs.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        return [ceil_quotient(size, stride) for size, stride in zip(sizes, strides, strict=True)]
    found = []
    for k, size in enumerate(sizes):
        padding = 0 if auto == "VALID" else pads[k] + pads[k + rank]
        room = total([size, padding - dilations[k] * (kernel[k] - 1) - 1])
        found.append(total([floor_quotient(room, strides[k]), 1]))
    return found
