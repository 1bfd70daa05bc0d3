"""Layouts: the identity of every channel of every tensor.

A channel is an integer id.  A tensor's *layout* is an integer array of the tensor's rank whose axes
are either full length (*tracked*: one id per position) or of length 1 (*untracked*: the id does not
depend on that axis).  An NCHW tensor has layout ``(1, C, 1, 1)``, a flattened one ``(1, C*H*W)``.
Only tracked axes can ever be cut.  Operators create ids, move them about, or equate them; equal ids
live and die together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.graph.edit import consumers
from onnx_simplify.graph.expressions import Dim
from onnx_simplify.graph.model import Model

# A layout with more positions than this is not tracked: the arrays would cost more than they save.
_LARGEST = 1 << 24


class Unsupported(Exception):
    """An operator's rule does not apply to this node: treat the node as opaque.

    The message says why, for ``--verbose``.
    """


class Layouts:
    """Layouts of all tensors of a model.

    Attributes:
        of: layout by tensor name; ids are final only after :meth:`unite`.
        frozen: labels of channels that must not be removed, with :meth:`unite`.
        frozen_by: such labels and why they are, in the order in which that was said.
    """

    def __init__(self, model: Model):
        """Start with no layout; the shapes of the model's tensors must have been inferred."""
        self.model = model
        self.of: dict[str, np.ndarray] = {}
        self.readers = consumers(model)
        self._count = 0
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._frozen: list[tuple[np.ndarray, str]] = []
        self.frozen_by: list[tuple[np.ndarray, str]] = []
        self.frozen = np.zeros(0, bool)

    def shape(self, tensor: gs.Tensor) -> list[Dim]:
        """The tensor's symbolic shape.

        Raises:
            Unsupported: its rank is not known.
        """
        if tensor.shape is None:
            raise Unsupported(f"shape of '{tensor.name}' is not known")
        return list(tensor.shape)

    def __call__(self, tensor: gs.Tensor) -> np.ndarray:
        """The layout of a variable that has one.

        Raises:
            Unsupported: the tensor is a constant or has no layout.
        """
        layout = self.of.get(tensor.name)
        if layout is None or isinstance(tensor, gs.Constant):
            raise Unsupported(f"'{tensor.name}' has no channels to follow")
        return layout

    def require_where(self, node: gs.Node) -> None:
        """Make sure that computed sizes could be overwritten, see :class:`Cut`.

        Raises:
            Unsupported: the operator set has no ``Where``.
        """
        if self.model.opset < 9:
            raise Unsupported(f"sizes of '{node.op}' could not be overwritten before opset 9")

    def fresh(self, count: int) -> np.ndarray:
        """``count`` new ids."""
        ids = np.arange(self._count, self._count + count)
        self._count += count
        return ids

    def untracked(self, tensor: gs.Tensor) -> np.ndarray:
        """A layout for ``tensor`` with one new id and no tracked axis."""
        return self.fresh(1).reshape([1] * len(self.shape(tensor)))

    def equate(self, left: np.ndarray, right: np.ndarray) -> None:
        """Let the ids of two arrays, broadcast against each other, be the same channels."""
        left, right = np.broadcast_arrays(left, right)
        self._pairs.append((left.ravel(), right.ravel()))

    def merge(self, layouts: Sequence[np.ndarray]) -> np.ndarray:
        """Equate layouts broadcast against each other; the layout of what they become together.

        Where the first one repeats ids along an axis, the result has ids of its own: its rows must
        stay or go together.
        """
        shape = np.broadcast_shapes(*(layout.shape for layout in layouts))
        result = np.broadcast_to(layouts[0], shape)
        for layout in layouts[1:]:
            self.equate(result, layout)
        if layouts[0].size < result.size:
            fresh = self.fresh(result.size).reshape(shape)
            self.equate(fresh, result)
            result = fresh
        return np.array(result)

    def collapse(self, layout: np.ndarray, axes: Iterable[int]) -> np.ndarray:
        """Equate all positions along ``axes`` and return the layout with these untracked."""
        for axis in axes:
            if layout.shape[axis] > 1:
                first = np.take(layout, [0], axis)
                self.equate(layout, first)
                layout = first
        return layout

    def freeze(self, layout: np.ndarray, reason: str = "made in place") -> None:
        """Never remove these channels.

        Args:
            layout: the channels.
            reason: why, for the report.
        """
        self._frozen.append((layout.ravel(), reason))

    def set(self, tensor: gs.Tensor, layout: np.ndarray) -> None:
        """Record the layout of a node's output."""
        if len(self.shape(tensor)) != layout.ndim:
            raise Unsupported(f"'{tensor.name}' does not have the expected rank")
        if layout.size > _LARGEST:
            raise Unsupported(f"'{tensor.name}' has too many positions")
        self.of[tensor.name] = layout

    def unite(self) -> None:
        """Give equated ids one common label and renumber all layouts with these labels."""
        labels = components(self._count, self._pairs)
        count = int(labels.max()) + 1 if labels.size else 0
        self.frozen = np.zeros(count, bool)
        for ids, reason in self._frozen:
            self.frozen[labels[ids]] = True
            self.frozen_by.append((labels[ids], reason))
        self.frozen.flags.writeable = False
        self.of = {name: np.asarray(labels[layout]) for name, layout in self.of.items()}
        for layout in self.of.values():
            layout.flags.writeable = False


def components(count: int, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Label the connected components of ``count`` ids under the given pairs, in O(n log n) numpy.

    Every id adopts the smallest label in its neighbourhood, then labels are resolved to their
    roots (pointer jumping), until nothing changes; scipy's implementation would cost more to
    import than a whole run.

    Returns:
        Consecutive integer labels, shape ``(count,)``, ordered by each component's smallest id.
    """
    parent = np.arange(count)
    if not pairs or not count:
        return parent
    left = np.concatenate([p[0] for p in pairs])
    right = np.concatenate([p[1] for p in pairs])
    while True:
        a, b = parent[left], parent[right]
        open_ = a != b
        if not open_.any():
            break
        left, right, a, b = left[open_], right[open_], a[open_], b[open_]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while True:
            root = parent[parent]
            if np.array_equal(root, parent):
                break
            parent = root
    return np.unique(parent, return_inverse=True)[1].reshape(count)
