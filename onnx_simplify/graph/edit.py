"""Small edits of a working graph that every pass needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnx_simplify.graph.identity import NodeMap, NodeSet
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.quantized import Quantized, QuantizedConstant

# Initializers of so many elements may be copied.
_SMALL = 64


class ZeroedSlices(LazyValues):
    """An array some slices of which are zero, written down without copying the array.

    Attributes:
        base: the array.
        axis: the axis.
        mask: which positions along the axis are zero, bool.
    """

    def __init__(self, base: np.ndarray, axis: int, mask: np.ndarray):
        """Zero ``base`` at ``mask`` along ``axis``."""
        self.base, self.axis, self.mask = base, axis, mask
        self.shape, self.dtype, self.nbytes = list(base.shape), base.dtype, base.nbytes

    def load(self) -> np.ndarray:
        """The array itself."""
        return self.compress({})

    def compress(self, kept: Mapping[int, np.ndarray]) -> np.ndarray:
        """The array with only some positions (indices) along some axes."""
        mask = self.mask[kept[self.axis]] if self.axis in kept else self.mask
        values = np.asarray(compress(self.base, kept))
        if mask.any():
            values = np.array(values) if values is self.base else values
            values[(slice(None),) * self.axis + (mask,)] = 0
        return values


Values = np.ndarray | ZeroedSlices | Quantized


def compress(values: Values, kept: Mapping[int, np.ndarray]) -> np.ndarray | Quantized:
    """Take only some positions (indices) along some axes."""
    if isinstance(values, (ZeroedSlices, Quantized)):
        return values.compress(kept)
    for axis, index in sorted(kept.items(), key=lambda item: item[1].size / values.shape[item[0]]):
        values = np.take(values, index, axis)
    return values


Readers = dict[str, list[tuple[gs.Node, int]]]


def consumers(model: Model) -> Readers:
    """For each tensor name, the top-level nodes (and input positions) that read it."""
    found: Readers = {}
    for node in model.graph.nodes:
        for index, tensor in enumerate(node.inputs):
            if tensor.name:
                found.setdefault(tensor.name, []).append((node, index))
    return found


def shares_weights(readers: Readers, node: gs.Node) -> bool:
    """Whether a node reads an initializer, of some size, that others read as well."""
    return any(
        isinstance(t, gs.Constant) and int(np.prod(t.shape)) > _SMALL and len(readers[t.name]) > 1
        for t in node.inputs
    )


def drop_unused(model: Model) -> None:
    """Remove nodes none of whose outputs is used, in place (nodes must be in execution order)."""
    uses = Counter(t.name for n in model.graph.nodes for t in n.inputs)
    uses.update(t.name for t in model.graph.outputs)
    uses.update(model.pinned)
    for node in model.graph.nodes:
        uses.update(model.captured(node))
    keep = []
    for node in reversed(model.graph.nodes):
        if any(uses[t.name] > 0 for t in node.outputs if t.name):
            keep.append(node)
        else:
            uses.subtract(t.name for t in node.inputs)
            uses.subtract(model.captured(node))
    set_nodes(model, keep[::-1])


def remove_nodes(model: Model, dead: NodeSet) -> None:
    """Remove nodes, in place."""
    if dead:
        set_nodes(model, [n for n in model.graph.nodes if n not in dead])


def set_nodes(model: Model, keep: list[gs.Node]) -> None:
    """Make ``keep`` the graph's nodes; those left out are disconnected."""
    alive = NodeSet(keep)
    for node in model.graph.nodes:
        if node not in alive:
            node.inputs.clear()
            node.outputs.clear()
    model.graph.nodes = keep


def set_input(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Set an input, appending empty optional inputs as needed."""
    while len(node.inputs) <= index:
        node.inputs.append(gs.Variable.empty())
    node.inputs[index] = tensor


def label(node: gs.Node) -> str:
    """What a node is called: its name or, without one, the name of its first output."""
    return str(node.name or next((t.name for t in node.outputs), ""))


def is_add(node: gs.Node) -> bool:
    """Whether a node is the standard sum of two tensors."""
    return node.op == "Add" and not node.domain


_NOTHING = np.zeros(0, np.float32)
# After so many bytes of new weights, the pages of mapped ones are dropped.
_RELEASE = 1 << 28


class Editor:
    """Gives nodes initializers of their own, and collects nodes to insert."""

    def __init__(self, model: Model):
        """Edit ``model``; call :meth:`finish` at the end."""
        self.model = model
        self.readers = consumers(model)
        self._users = Counter({name: len(users) for name, users in self.readers.items()})
        self._shared: dict[tuple[object, ...], gs.Constant] = {}
        self._written = 0
        self._before: NodeMap[list[gs.Node]] = NodeMap()
        self._after: NodeMap[list[gs.Node]] = NodeMap()

    def put(self, node: gs.Node, index: int, values: Values) -> None:
        """Give one input of a node another initializer; other users keep the old one.

        The initializer keeps its name when it has no other user, and users that all want the same
        new values share one new initializer.
        """
        old = node.inputs[index] if len(node.inputs) > index else gs.Variable.empty()
        if isinstance(values, np.ndarray):
            values = np.asarray(values, order="C")
        if not isinstance(old, gs.Constant):
            suffix = {1: "weight", 2: "bias"}.get(index, str(index))
            new = self.model.constant(f"{node.outputs[0].name}_{suffix}", values)
        elif self._users[old.name] <= 1 and not self.model.is_kept(old):
            new = self.model.replacement(old, values)
            # Tensors are in reference cycles: without this, the array would live on for long.
            if not isinstance(old, QuantizedConstant):
                old.values = _NOTHING
        else:
            values = values.load() if isinstance(values, ZeroedSlices) else values
            arrays = values.arrays() if isinstance(values, Quantized) else [values]
            key = (old.name, *((a.shape, a.dtype.str, a.tobytes()) for a in arrays))
            new = self._shared.get(key) or self.model.replacement(
                old, values, self.model.unique(old.name)
            )
            self._shared[key] = new
            # It may get more users, so none of them has it for itself.
            self._users[new.name] = 2
        set_input(node, index, new)
        self._written += values.nbytes
        if self._written > _RELEASE:
            self.model.release()
            self._written = 0

    def before(self, node: gs.Node, new: gs.Node) -> None:
        """Insert ``new`` in front of ``node`` at the end."""
        self._before.setdefault(node, []).append(new)

    def after(self, node: gs.Node, new: gs.Node) -> None:
        """Insert ``new`` behind ``node`` at the end."""
        self._after.setdefault(node, []).append(new)

    def add_behind(self, node: gs.Node, values: np.ndarray) -> None:
        """Add an array, broadcast, to the node's output.

        An ``Add`` of a constant that is there already takes it; the sum keeps the output's name.
        """
        result = node.outputs[0]
        users = self.readers.get(result.name, [])
        if len(users) == 1 and not self.model.is_kept(result) and is_add(users[0][0]):
            add, position = users[0]
            other = add.inputs[1 - position]
            if isinstance(other, gs.Constant) and other.values.ndim <= len(result.shape):
                wide = other.dtype if np.dtype(other.dtype).kind in "iu" else np.float64
                total = np.asarray(other.values, wide) + values.astype(wide)
                if total.size <= max(values.size, other.values.size):
                    self.put(add, 1 - position, total.astype(other.values.dtype))
                    # A name means a value: without what was added, it is another one.
                    users = self.readers.pop(result.name)
                    result.name = self.model.unique(f"{result.name}_raw")
                    self.readers[result.name] = users
                    return
        raw = gs.Variable(self.model.unique(f"{result.name}_raw"), result.dtype, result.shape)
        node.outputs[0] = raw
        addend = self.model.constant(f"{result.name}_map", values.astype(result.dtype))
        name = self.model.unique(f"{label(node)}_add")
        new = gs.Node(op="Add", name=name, inputs=[raw, addend], outputs=[result])
        self.readers[raw.name] = [(new, 0)]
        self._users[addend.name] = 1
        self.after(node, new)

    def finish(self) -> None:
        """Insert the collected nodes."""
        nodes: list[gs.Node] = []
        for node in self.model.graph.nodes:
            nodes += [*self._before.get(node, ()), node, *self._after.get(node, ())]
        self.model.graph.nodes = nodes
