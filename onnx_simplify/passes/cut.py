"""Remove channels: in every tensor, drop the positions of dead ids."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.edit import Editor, compress, label, set_input
from onnx_simplify.graph.model import Model
from onnx_simplify.operators import Operator
from onnx_simplify.planning.merge import Merger


class Cut:
    """One removal of channels, and what operators need to rewrite their nodes for it.

    Attributes:
        facts: what is known.
        alive: which labels stay, bool ``(labels,)``, closed under :meth:`Facts.close`.
        mergers: how groups of convolutions are merged.
        model: the model being rewritten.
    """

    def __init__(
        self,
        facts: Facts,
        alive: np.ndarray,
        mergers: Mapping[Operator, Merger] | None = None,
    ):
        """Plan a removal; :meth:`apply` carries it out."""
        self.facts = facts
        self.alive = alive
        self.mergers = mergers or {}
        self._rank = np.zeros(alive.size, np.int64)
        for merger in self.mergers.values():
            for labels in (merger.sources, merger.results):
                self._rank[labels] = np.arange(labels.size)
        self.model: Model = facts.model
        self._editor = Editor(self.model)
        self._kept: dict[str, dict[int, np.ndarray]] = {}

    def apply(self) -> None:
        """Rewrite all nodes, in place."""
        for op in self.facts.operators:
            if not self.facts.is_gone(op, self.alive):
                op.shrink(self)
        for tensor in self.model.graph.tensors().values():
            for axis, mask in self.kept(tensor).items():
                tensor.shape[axis] = int(mask.sum())
        self._editor.finish()

    def rename_moved(self) -> None:
        """Give tensors whose channels have another order new names, in place.

        A name means a value: what is known of the original's tensor is not true of these.
        """
        for tensor in self.model.graph.tensors().values():
            name = tensor.name
            moved = self._moved(name)
            if moved:
                tensor.name = self.model.unique(f"{name}_moved")
                self.model.aliases.pop(name, None)

    def _moved(self, name: str) -> bool:
        """Whether the channels of a tensor that was there before come in another order."""
        layout = self.facts.layouts.of.get(name)
        if layout is None or not self._rank[layout].any():
            return False
        return bool((np.diff(self.stay(layout.ravel())) < 0).any())

    def grouping(self, product: object) -> Merger | None:
        """New groups of a convolution, if it gets any."""
        return self.mergers.get(product) if isinstance(product, Operator) else None

    def kept(self, tensor: gs.Tensor) -> dict[int, np.ndarray]:
        """For each axis along which positions leave, which ones stay (bool ``(size,)``)."""
        if not self.facts.has(tensor):
            return {}
        found = self._kept.get(tensor.name)
        if found is None:
            found = {}
            mask = self.alive[self.facts.layouts.of[tensor.name]]
            if not mask.all():
                for axis in range(mask.ndim):
                    others = tuple(k for k in range(mask.ndim) if k != axis)
                    stay = mask.any(axis=others)
                    if not stay.all():
                        found[axis] = stay
            self._kept[tensor.name] = found
        return found

    def stay(self, labels: np.ndarray) -> np.ndarray:
        """Indices of those of some labels that stay, in their new order."""
        found = np.flatnonzero(self.alive[labels])
        return found[np.argsort(self._rank[labels[found]], kind="stable")]

    def taken(self, tensor: gs.Tensor) -> dict[int, np.ndarray]:
        """For each axis along which positions leave or move, the indices of what is there then.

        Axes of channels that move hold no other ones: see :func:`can_move`.
        """
        if not self.facts.has(tensor):
            return {}
        found = {axis: np.flatnonzero(mask) for axis, mask in self.kept(tensor).items()}
        layout = self.facts.layouts.of[tensor.name]
        if self._rank[layout].any():
            found[int(np.argmax(layout.shape))] = self.stay(layout.ravel())
        return found

    def slice(self, node: gs.Node, index: int, kept: Mapping[int, np.ndarray]) -> None:
        """Take some positions (indices by axis) of a node's initializer.

        Nodes that share it may go on doing so.
        """
        if kept:
            # Not ``values``: those would copy an array only to drop most of it.
            self.put(node, index, compress(node.inputs[index]._values, kept))

    def put(self, node: gs.Node, index: int, values: np.ndarray) -> None:
        """Give one input of a node another initializer, see :meth:`Editor.put`."""
        self._editor.put(node, index, values)

    def set_entries(self, node: gs.Node, index: int, entries: Mapping[int, int]) -> None:
        """Overwrite elements of a shape-like vector input, whether constant or computed."""
        if not entries:
            return
        vector = node.inputs[index]
        if isinstance(vector, gs.Constant):
            values = np.array(vector.values)
            if any(values[k] != -1 and values[k] != v for k, v in entries.items()):
                for position, value in entries.items():
                    if values[position] != -1:
                        values[position] = value
                self.put(node, index, values)
            return
        result = gs.Variable(self.model.unique(vector.name), dtype=vector.dtype)
        self._editor.before(node, self._overwrite(node, vector, entries, result))
        set_input(node, index, result)

    def override_output(self, node: gs.Node, entries: Mapping[int, int]) -> None:
        """Let users of a node's vector output read other values at some positions."""
        result = node.outputs[0]
        raw = gs.Variable(self.model.unique(result.name), dtype=result.dtype, shape=result.shape)
        node.outputs[0] = raw
        self._editor.after(node, self._overwrite(node, raw, entries, result))

    def _overwrite(
        self, node: gs.Node, vector: gs.Tensor, entries: Mapping[int, int], result: gs.Tensor
    ) -> gs.Node:
        """``Where(mask, new, vector)``, on behalf of ``node``."""
        size = self.facts.shape(vector)[0]
        assert isinstance(size, int)
        mask = np.zeros(size, bool)
        new = np.zeros(size, np.int64)
        for position, value in entries.items():
            mask[position], new[position] = True, value
        return gs.Node(
            op="Where",
            name=self.model.unique(f"{label(node)}_sizes"),
            inputs=[
                self.model.constant(f"{vector.name}_mask", mask),
                self.model.constant(f"{vector.name}_sizes", new),
                vector,
            ],
            outputs=[result],
        )

    def gather_before(self, node: gs.Node, axis: int, indices: np.ndarray) -> None:
        """Let a node read positions ``indices`` (numbered after the removal) of its input 0."""
        source = node.inputs[0]
        result = gs.Variable(self.model.unique(source.name), dtype=source.dtype)
        gather = gs.Node(
            op="Gather",
            name=self.model.unique(f"{label(node)}_gather"),
            attrs={"axis": int(axis)},
            inputs=[source, self.model.constant("indices", np.asarray(indices, np.int64))],
            outputs=[result],
        )
        node.inputs[0] = result
        self._editor.before(node, gather)
