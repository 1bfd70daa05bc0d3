"""What the analysis and the passes ask of an operator.

Every array of ids, levels or masks is shaped like the *layout* of the tensor it speaks of (see
:mod:`onnx_simplify.channels.layouts`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Unsupported
from onnx_simplify.channels.values import MAP

if TYPE_CHECKING:
    from onnx_simplify.channels.analysis import Analysis
    from onnx_simplify.channels.cut import Cut
    from onnx_simplify.channels.layouts import Layouts
    from onnx_simplify.graph.shapes import Dim

Masks = list[np.ndarray | None]


class Operator:
    """Rules of one operator family; this base class is the opaque operator.

    An opaque node needs all its inputs and its outputs vary: always correct, never profitable.
    """

    drops_empty_inputs = False
    """Whether inputs without a single live channel are simply left out (``Concat``)."""

    reorders = False
    """Whether channels of a node may come in another order, see :func:`merge.can_move`."""

    def accounts_for(self, node: gs.Node) -> Collection[int]:
        """Inputs that the rules take into account even where they are computed.

        Any other one that is there, but no initializer, makes all outputs vary and is needed as a
        whole: what it holds (a region, bounds, amounts) is known at run time only.
        """
        return (0,)

    def layout(self, node: gs.Node, layouts: Layouts) -> None:
        """Give the node's outputs their layouts; equate and freeze ids of its inputs.

        Raises:
            Unsupported: before anything was recorded, if the rule does not apply to this node.
        """
        for tensor in node.inputs:
            if tensor.name in layouts.of:
                layouts.freeze(layouts.of[tensor.name], f"read by {kind(node)}")
        for tensor in node.outputs:
            if tensor.name and tensor.shape is not None:
                layout = layouts.untracked(tensor)
                layouts.freeze(layout)
                layouts.set(tensor, layout)

    def sizes(self, node: gs.Node, layouts: Layouts) -> Sequence[Dim | None] | None:
        """The first output's shape, where it follows from those of the inputs symbol by symbol.

        Shape inference knows nothing of a dynamic size after a convolution, not even that it is
        the same as before.
        """
        return None

    def level(self, node: gs.Node, analysis: Analysis) -> Masks:
        """Level of constancy of each output (None: everything varies)."""
        return [None] * len(node.outputs)

    def need(self, node: gs.Node, analysis: Analysis, outputs: Masks) -> Masks:
        """Positions of each input that the needed positions of the outputs depend on."""
        return analysis.all_of(node.inputs)

    def constrain(self, node: gs.Node, analysis: Analysis, alive: np.ndarray) -> bool:
        """Revive channels (in ``alive``, by label) so that :meth:`shrink` is possible.

        Returns:
            Whether anything was revived.
        """
        return False

    def shrink(self, node: gs.Node, cut: Cut) -> None:
        """Rewrite the node after channels of its inputs and outputs have left."""

    def may_reorder(self, node: gs.Node, analysis: Analysis) -> bool:
        """Whether :meth:`shrink` can also put channels into another order (``Cut.taken``)."""
        return self.reorders

    def wants_values(self, node: gs.Node, analysis: Analysis) -> list[int]:
        """Inputs whose constant values decide something."""
        return []

    def passed(self, node: gs.Node, analysis: Analysis, values: np.ndarray) -> np.ndarray | None:
        """What uniform constants of the first input become, if they come out as they are.

        Computed from many elements, as means are, a constant can be off by more than rounding of a
        single operation, and differently for every size.

        Args:
            node: the node.
            analysis: the analysis.
            values: shaped like the layout of the first input.

        Returns:
            An array shaped like the layout of the output; None if values are computed.
        """
        return None

    def macs(self, node: gs.Node, shapes: dict[str, list[int]]) -> int:
        """Multiply-accumulate operations for tensors of the given sizes."""
        return 0


class Shape(Operator):
    """``Shape``: reads sizes, not values (https://onnx.ai/onnx/operators/onnx__Shape.html).

    When a size it reports shrinks, the reported number is put back, so that whatever is computed
    from it stays as it was.
    """

    reorders = True

    def layout(self, node: gs.Node, layouts: Layouts) -> None:
        """The input's channels are free to go; the output is an ordinary vector."""
        layouts(node.inputs[0])
        layouts.require_where(node)
        output = layouts.untracked(node.outputs[0])
        layouts.freeze(output)
        layouts.set(node.outputs[0], output)

    def need(self, node: gs.Node, analysis: Analysis, outputs: Masks) -> Masks:
        """No value is needed."""
        return [None]

    def shrink(self, node: gs.Node, cut: Cut) -> None:
        """Overwrite the entries of cut axes with the original sizes."""
        kept = cut.kept(node.inputs[0])
        axes = range(len(cut.analysis.shape(node.inputs[0])))
        start, end = int(node.attrs.get("start", 0)), node.attrs.get("end")
        entries = {
            position: int(kept[axis].size)
            for position, axis in enumerate(axes[start:end])
            if axis in kept
        }
        if entries:
            cut.override_output(node, entries)


OPAQUE = Operator()


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
    """Sizes after a sliding window, where they are those before; None elsewhere."""
    rank = len(sizes)
    pads = attr_ints(node, "pads", [0] * 2 * rank)
    strides = attr_ints(node, "strides", [1] * rank)
    dilations = attr_ints(node, "dilations", [1] * rank)
    if node.attrs.get("auto_pad", "NOTSET") != "NOTSET" or not (
        len(kernel) == len(strides) == len(dilations) == rank == len(pads) // 2
    ):
        return [None] * rank
    return [
        size
        if strides[k] == 1 and pads[k] + pads[k + rank] == dilations[k] * (kernel[k] - 1)
        else None
        for k, size in enumerate(sizes)
    ]


def reduce_to(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Combine a mask with `or` over the axes along which an operand of ``shape`` is broadcast."""
    lead = mask.ndim - len(shape)
    mask = np.asarray(mask.any(axis=tuple(range(lead)))) if lead > 0 else mask
    axes = tuple(a for a, s in enumerate(shape) if s == 1 and mask.shape[a] > 1)
    mask = np.asarray(mask.any(axis=axes, keepdims=True)) if axes else mask
    return np.broadcast_to(mask, shape)


def min_to(level: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The weakest level over axes that the output does not track; positions may then differ."""
    axes = tuple(a for a, s in enumerate(shape) if s == 1 and level.shape[a] > 1)
    if not axes:
        return level
    return np.minimum(level.min(axis=axes, keepdims=True), MAP)
