"""What the analysis and the passes ask of an operator.

Every array of ids, levels or masks is shaped like the *layout* of the tensor it speaks of (see
:mod:`onnx_simplify.channels.layouts`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Unsupported
from onnx_simplify.channels.values import MAP
from onnx_simplify.graph.patterns import Patterns

if TYPE_CHECKING:
    from onnx_simplify.channels.analysis import Analysis
    from onnx_simplify.channels.cut import Cut
    from onnx_simplify.channels.layouts import Layouts
    from onnx_simplify.channels.operators.linear import Linear
    from onnx_simplify.graph.shapes import Dim

Masks = list[np.ndarray | None]


class Operator:
    """A node, bound to the rules of its operator family; this base class is the opaque operator.

    An opaque node needs all its inputs and its outputs vary: always correct, never profitable.
    What else a node can do it says by its capabilities, of which nobody need know the class.

    Attributes:
        node: the node.
        reason: why the rules of its family do not apply, empty if they do.
    """

    drops_empty_inputs = False
    """Whether inputs without a single live channel are simply left out (``Concat``)."""

    reorders = False
    """Whether channels of a node may come in another order, see :func:`merge.can_move`."""

    channelwise = False
    """Whether every channel of the output depends on that channel of the inputs only."""

    averages = False
    """Whether elements of the output come from many elements of the input, so that it rounds."""

    def __init__(self, node: gs.Node, patterns: Patterns | None = None, reason: str = ""):
        """Bind a node.

        Args:
            node: the node.
            patterns: where to look up which weights are zero; by default looked up alone.
            reason: why it is bound to the opaque operator.
        """
        self.node = node
        self.patterns = Patterns() if patterns is None else patterns
        self.reason = reason

    @property
    def inputs(self) -> list[gs.Tensor]:
        """The node's inputs as they are now."""
        return self.node.inputs

    @property
    def outputs(self) -> list[gs.Tensor]:
        """The node's outputs as they are now."""
        return self.node.outputs

    @property
    def attrs(self) -> dict[str, Any]:
        """The node's attributes as they are now."""
        return self.node.attrs

    @property
    def contractions(self) -> Sequence[Linear]:
        """The products with constant weights that it forms, which read and make channels."""
        return ()

    @property
    def stores_operands(self) -> bool:
        """Whether operands that are constant altogether may become initializers."""
        return False

    @property
    def joins(self) -> int | None:
        """The axis along which all inputs are concatenated, if that is what the node does."""
        return None

    def picks(self, layouts: Layouts) -> Collection[int]:
        """The axes along which the node picks positions, if it does nothing else; else none."""
        return ()

    def move(self, layouts: Layouts, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Apply a node that moves elements to arrays shaped like the inputs' layouts.

        Raises:
            Unsupported: it does something else, its parameters are computed, or do not fit.
        """
        raise Unsupported(f"{kind(self.node)} does not just move elements")

    def blocks(self, layouts: Layouts) -> list[tuple[range, range]] | None:
        """Axes before and after that hold the same elements, of a node that only joins and splits.

        None for any other node, and where they cannot be matched.
        """
        return None

    @property
    def is_opaque(self) -> bool:
        """Whether nothing is known of what the node does."""
        return type(self) is Operator

    def accounts_for(self) -> Collection[int]:
        """Inputs that the rules take into account even where they are computed.

        Any other one that is there, but no initializer, makes all outputs vary and is needed as a
        whole: what it holds (a region, bounds, amounts) is known at run time only.
        """
        return (0,)

    def layout(self, layouts: Layouts) -> None:
        """Give the node's outputs their layouts; equate and freeze ids of its inputs.

        Raises:
            Unsupported: before anything was recorded, if the rule does not apply to this node.
        """
        for tensor in self.inputs:
            if tensor.name in layouts.of:
                layouts.freeze(layouts.of[tensor.name], f"read by {kind(self.node)}")
        for tensor in self.outputs:
            if tensor.name and tensor.shape is not None:
                layout = layouts.untracked(tensor)
                layouts.freeze(layout)
                layouts.set(tensor, layout)

    def sizes(self, layouts: Layouts) -> Sequence[Dim | None] | None:
        """The first output's shape, where it follows from those of the inputs symbol by symbol.

        Shape inference knows nothing of a dynamic size after a convolution, not even that it is
        the same as before.
        """
        return None

    def level(self, analysis: Analysis) -> Masks:
        """Level of constancy of each output (None: everything varies)."""
        return [None] * len(self.outputs)

    def need(self, analysis: Analysis, outputs: Masks) -> Masks:
        """Positions of each input that the needed positions of the outputs depend on."""
        return analysis.all_of(self.inputs)

    def constrain(self, analysis: Analysis, alive: np.ndarray) -> bool:
        """Revive channels (in ``alive``, by label) so that :meth:`shrink` is possible.

        Returns:
            Whether anything was revived.
        """
        return False

    def shrink(self, cut: Cut) -> None:
        """Rewrite the node after channels of its inputs and outputs have left."""

    def may_reorder(self, analysis: Analysis) -> bool:
        """Whether :meth:`shrink` can also put channels into another order (``Cut.taken``)."""
        return self.reorders

    def wants_values(self, analysis: Analysis) -> list[int]:
        """Inputs whose constant values decide something."""
        return []

    def passed(self, analysis: Analysis, values: np.ndarray) -> np.ndarray | None:
        """What uniform constants of the first input become, if they come out as they are.

        Computed from many elements, as means are, a constant can be off by more than rounding of a
        single operation, and differently for every size.

        Args:
            analysis: the analysis.
            values: shaped like the layout of the first input.

        Returns:
            An array shaped like the layout of the output; None if values are computed.
        """
        return None

    def macs(self, shapes: dict[str, list[int]]) -> int:
        """Multiply-accumulate operations for tensors of the given sizes."""
        return 0


class Shape(Operator):
    """``Shape``: reads sizes, not values (https://onnx.ai/onnx/operators/onnx__Shape.html).

    When a size it reports shrinks, the reported number is put back, so that whatever is computed
    from it stays as it was.
    """

    reorders = True

    def layout(self, layouts: Layouts) -> None:
        """The input's channels are free to go; the output is an ordinary vector."""
        layouts(self.inputs[0])
        layouts.require_where(self.node)
        output = layouts.untracked(self.outputs[0])
        layouts.freeze(output)
        layouts.set(self.outputs[0], output)

    def need(self, analysis: Analysis, outputs: Masks) -> Masks:
        """No value is needed."""
        return [None]

    def shrink(self, cut: Cut) -> None:
        """Overwrite the entries of cut axes with the original sizes."""
        kept = cut.kept(self.inputs[0])
        axes = range(len(cut.analysis.shape(self.inputs[0])))
        start, end = int(self.attrs.get("start", 0)), self.attrs.get("end")
        entries = {
            position: int(kept[axis].size)
            for position, axis in enumerate(axes[start:end])
            if axis in kept
        }
        if entries:
            cut.override_output(self.node, entries)


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
