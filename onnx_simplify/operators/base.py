"""What facts, planner and passes ask of an operator.

Every array of ids, levels or masks is shaped like the *layout* of the tensor it speaks of (see
:mod:`onnx_simplify.channels.layouts`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.graph.expressions import Dim
from onnx_simplify.graph.patterns import Patterns
from onnx_simplify.operators.interfaces import KnownFacts, KnownSizes, Removal
from onnx_simplify.operators.nodes import kind

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

    carrier = 0
    """The input that :meth:`passed` is about."""

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

    @classmethod
    def suited(cls, node: gs.Node) -> type[Operator]:
        """The rules for a node of this family, if families share an operator."""
        return cls

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
    def contractions(self) -> Sequence[Any]:
        """The products with constant weights that it forms, which read and make channels.

        Each is a :class:`~onnx_simplify.operators.contraction.Contraction`.
        """
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

    def padding(self, rank: int) -> list[tuple[int, int]] | None:
        """Zeros before and after by axis, negative where it cuts off, if that is all it does.

        Args:
            rank: the input's rank.
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

    def shapes(self, known: KnownSizes) -> Sequence[Sequence[Dim | None] | None]:
        """The outputs' shapes, as far as they follow from those of the inputs.

        onnx's inference knows all standard operators, but not that a dynamic size after a
        convolution is the same as before, or half of it. What is None is left to that.
        """
        return ()

    def values(self, known: KnownSizes) -> Sequence[np.ndarray | None]:
        """The integers in the outputs, where those are computed from sizes."""
        return ()

    def level(self, facts: KnownFacts) -> Masks:
        """Level of constancy of each output (None: everything varies)."""
        return [None] * len(self.outputs)

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """Positions of each input that the needed positions of the outputs depend on."""
        return facts.all_of(self.inputs)

    def constrain(self, facts: KnownFacts, alive: np.ndarray) -> bool:
        """Revive channels (in ``alive``, by label) so that :meth:`shrink` is possible.

        Returns:
            Whether anything was revived.
        """
        return False

    def shrink(self, cut: Removal) -> None:
        """Rewrite the node after channels of its inputs and outputs have left."""

    def may_reorder(self, facts: KnownFacts) -> bool:
        """Whether :meth:`shrink` can also put channels into another order (``Cut.taken``)."""
        return self.reorders

    def wants_values(self, facts: KnownFacts) -> list[int]:
        """Inputs whose constant values decide something."""
        return []

    def passed(self, facts: KnownFacts, values: np.ndarray) -> np.ndarray | None:
        """What uniform constants of the :attr:`carrier` become, if they come out as they are.

        Computed from many elements, as means are, a constant can be off by more than rounding of a
        single operation, and differently for every size.

        Args:
            facts: what is known.
            values: shaped like the layout of that input.

        Returns:
            An array shaped like the layout of the output; None if values are computed.
        """
        return None

    def macs(self, shapes: dict[str, list[int]]) -> int:
        """Multiply-accumulate operations for tensors of the given sizes."""
        return 0
