"""What the analysis and the passes ask of an operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import numpy as np
import onnx_graphsurgeon as gs

if TYPE_CHECKING:
    from onnx_simplify.channels.analysis import Analysis
    from onnx_simplify.channels.cut import Cut
    from onnx_simplify.channels.layouts import Layouts

Masks = list[Optional[np.ndarray]]


class Operator:
    """Rules of one operator family; this base class is the opaque operator.

    An opaque node needs all its inputs and its outputs vary: always correct, never profitable.
    """

    drops_empty_inputs = False
    """Whether inputs without a single live channel are simply left out (``Concat``)."""

    def layout(self, node: gs.Node, layouts: Layouts) -> None:
        """Give the node's outputs their layouts; equate and freeze ids of its inputs.

        Raises:
            Unsupported: before anything was recorded, if the rule does not apply to this node.
        """
        for tensor in node.inputs:
            if tensor.name in layouts.of:
                layouts.freeze(layouts.of[tensor.name])
        for tensor in node.outputs:
            if tensor.name and tensor.shape is not None:
                layout = layouts.untracked(tensor)
                layouts.freeze(layout)
                layouts.set(tensor, layout)

    def level(self, node: gs.Node, analysis: Analysis) -> Masks:
        """Level of constancy of each output (None: everything varies)."""
        return [None] * len(node.outputs)

    def need(self, node: gs.Node, analysis: Analysis, outputs: Masks) -> Masks:
        """Positions of each input that the needed positions of the outputs depend on."""
        return [
            np.ones(analysis.layouts.of[t.name].shape, bool) if analysis.has(t) else None
            for t in node.inputs
        ]

    def constrain(self, node: gs.Node, analysis: Analysis, alive: np.ndarray) -> bool:
        """Revive channels (in ``alive``, by label) so that :meth:`shrink` is possible.

        Returns:
            Whether anything was revived.
        """
        return False

    def shrink(self, node: gs.Node, cut: Cut) -> None:
        """Rewrite the node after channels of its inputs and outputs have left."""

    def wants_values(self, node: gs.Node, analysis: Analysis) -> list[int]:
        """Inputs whose constant values decide something."""
        return []


class Shape(Operator):
    """``Shape``: reads sizes, not values.

    When a size it reports shrinks, the reported number is put back, so that whatever is computed
    from it stays as it was.
    """

    def layout(self, node: gs.Node, layouts: Layouts) -> None:
        """The input's channels are free to go; the output is an ordinary vector."""
        layouts(node.inputs[0])
        output = layouts.untracked(node.outputs[0])
        layouts.freeze(output)
        layouts.set(node.outputs[0], output)

    def need(self, node: gs.Node, analysis: Analysis, outputs: Masks) -> Masks:
        """No value is needed."""
        return [None]

    def shrink(self, node: gs.Node, cut: Cut) -> None:
        """Overwrite the entries of cut axes with the original sizes."""
        source = node.inputs[0]
        sizes = cut.analysis.shape(source)
        axes = list(range(len(sizes)))
        axes = axes[node.attrs.get("start", 0) :][: None]
        end = node.attrs.get("end")
        if end is not None:
            axes = [a for a in axes if a < (end if end >= 0 else end + len(sizes))]
        kept = cut.kept(source)
        if any(a in kept for a in axes):
            cut.override_output(node, [sizes[a] if a in kept else None for a in axes])


OPAQUE = Operator()


def attr_ints(node: gs.Node, name: str, default: list[int]) -> list[int]:
    """An integer-list attribute."""
    return [int(v) for v in node.attrs.get(name, default)]


def constant_input(node: gs.Node, index: int) -> np.ndarray | None:
    """The value of an optional input if it is an initializer; None when absent or computed."""
    if len(node.inputs) > index and isinstance(node.inputs[index], gs.Constant):
        return node.inputs[index].values
    return None


def has_input(node: gs.Node, index: int) -> bool:
    """Whether the optional input is given."""
    return len(node.inputs) > index and bool(node.inputs[index].name)


def is_static(shape: list, axes: list[int]) -> bool:
    """Whether the sizes along all ``axes`` are known."""
    return all(isinstance(shape[a], int) for a in axes)
