"""What rules need of those who ask them: facts about a graph, and the removal of channels from it.

Rules stand below facts and passes, so they know them by these interfaces only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Layouts
from onnx_simplify.graph.expressions import Dim
from onnx_simplify.graph.model import Model


class KnownSizes(Protocol):
    """Sizes as rules see them, see :class:`onnx_simplify.facts.sizes.Sizes`."""

    def shape(self, tensor: gs.Tensor) -> list[Dim]:
        """The tensor's sizes.

        Raises:
            Unsupported: its rank is not known.
        """
        ...

    def values(self, tensor: gs.Tensor) -> np.ndarray | None:
        """The integers in a small tensor, as an array of numbers, sizes and None."""
        ...


class KnownFacts(Protocol):
    """Facts as rules see them, see :class:`onnx_simplify.facts.facts.Facts`."""

    layouts: Layouts
    level: dict[str, np.ndarray]

    @property
    def producer(self) -> Mapping[str, Any]:
        """The operator that computes each tensor, by the tensor's name."""
        ...

    @property
    def needed(self) -> dict[str, np.ndarray]:
        """Which positions some live output depends on, by tensor name."""
        ...

    def has(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor is a variable whose channels are followed."""
        ...

    def shape(self, tensor: gs.Tensor) -> list:
        """The tensor's symbolic shape."""
        ...

    def all_of(self, tensors: Sequence[gs.Tensor]) -> list[np.ndarray | None]:
        """Masks that say that all of some inputs is needed."""
        ...

    def dead(self, tensor: gs.Tensor, alive: np.ndarray) -> bool:
        """Whether no channel of the tensor is alive."""
        ...

    def level_of(self, tensor: gs.Tensor, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Level of a node's input, of an initializer as well."""
        ...

    def zero(self, tensor: gs.Tensor, shape: tuple[int, ...]) -> np.ndarray:
        """Where a constant input is zero everywhere."""
        ...

    def scalar(self, tensor: gs.Tensor) -> np.ndarray:
        """Value of each position that is one constant everywhere, NaN elsewhere."""
        ...


class Grouping(Protocol):
    """New groups of a convolution."""

    @property
    def groups(self) -> int:
        """How many."""
        ...


class Removal(Protocol):
    """The removal of channels as rules see it, see :class:`onnx_simplify.passes.cut.Cut`."""

    model: Model
    alive: np.ndarray

    @property
    def facts(self) -> KnownFacts:
        """The facts that it is based on."""
        ...

    def grouping(self, product: object) -> Grouping | None:
        """New groups of a product with constant weights, if it gets any."""
        ...

    def kept(self, tensor: gs.Tensor) -> dict[int, np.ndarray]:
        """For each axis along which positions leave, which ones stay."""
        ...

    def taken(self, tensor: gs.Tensor) -> dict[int, np.ndarray]:
        """For each axis along which positions leave or move, the indices of what is there then."""
        ...

    def stay(self, labels: np.ndarray) -> np.ndarray:
        """Indices of those of some labels that stay, in their new order."""
        ...

    def slice(self, node: gs.Node, index: int, kept: Mapping[int, np.ndarray]) -> None:
        """Take some positions of a node's initializer."""
        ...

    def put(self, node: gs.Node, index: int, values: np.ndarray) -> None:
        """Give one input of a node another initializer."""
        ...

    def set_entries(self, node: gs.Node, index: int, entries: Mapping[int, int]) -> None:
        """Overwrite elements of a shape-like vector input, whether constant or computed."""
        ...

    def override_output(self, node: gs.Node, entries: Mapping[int, int]) -> None:
        """Let users of a node's vector output read other values at some positions."""
        ...

    def gather_before(self, node: gs.Node, axis: int, indices: np.ndarray) -> None:
        """Let a node read some positions of its first input only."""
        ...
