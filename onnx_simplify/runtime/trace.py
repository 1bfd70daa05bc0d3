"""Where a graph's outputs come from: which operators their values pass through."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_simplify.errors import ModelError
from onnx_simplify.graph.identity import NodeSet
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.order import all_nodes
from onnx_simplify.graph.shapes import types
from onnx_simplify.graph.traits import BOUNDED, JUMPS, PASSES, SELECTS, SIZES


class Trace:
    """Questions about the nodes between the inputs and an output of a model."""

    def __init__(self, model: Model):
        """Look at a model, which is not modified, and must not be as long as this is used."""
        self.model = model
        self._makers = {t.name: n for n in model.graph.nodes for t in n.outputs if t.name}

    @cached_property
    def _types(self) -> dict[str, np.dtype]:
        try:
            return types(self.model)
        except ModelError:  # to know nothing is always right
            return {}

    @cached_property
    def _varying(self) -> set[str]:
        """Tensors whose values depend on those of the graph's inputs."""
        found = self.model.input_names - set(self.model.overridable)
        for node in self.model.graph.nodes:
            if found.intersection(self.reads(node)):
                found |= {t.name for t in node.outputs if t.name}
        return found

    def reads(self, node: gs.Node) -> Iterator[str]:
        """Names of the tensors whose values a node reads, bodies included."""
        if node.op not in SIZES or node.domain:
            yield from (t.name for t in node.inputs if t.name)
            yield from sorted(self.model.captured(node))

    def maker(self, name: str) -> gs.Node | None:
        """The node that makes a tensor."""
        return self._makers.get(name)

    def depends_on_inputs(self, name: str) -> bool:
        """Whether a tensor's values depend on those of an input, by what is connected."""
        return name in self._varying

    def jumps(self, name: str) -> bool:
        """Whether rounding can change the tensor by more than rounding."""
        return any(self._jumps(node) for node in self._upstream(name))

    def selects(self, name: str) -> bool:
        """Whether the tensor holds rows that were chosen or sorted by their values."""
        return any(SELECTS & self._operators(node) for node in self._upstream(name))

    def step(self, name: str) -> float:
        """The magnitude of what the operator in front of a tensor computes with.

        A sigmoid of -14 is 1e-6, yet made from numbers around one; so is one minus a sigmoid. Zero
        where the result is as large as its operands.
        """
        node = self.maker(name)
        while node is not None and node.op in PASSES and not node.domain:
            node = self.maker(node.inputs[0].name)
        if node is None or node.domain:
            return 0.0
        if node.op in BOUNDED:
            return 1.0
        if node.op in ("Add", "Sub"):
            constants = [self._constant(t) for t in node.inputs]
            sizes = [np.abs(c).max(initial=0.0) for c in constants if c is not None]
            return float(max(sizes, default=0.0))
        return 0.0

    def _constant(self, tensor: gs.Tensor) -> np.ndarray | None:
        """The floats of an initializer, or of what a ``Constant`` node gives."""
        if not isinstance(tensor, gs.Constant):
            node = self.maker(tensor.name)
            values = node.attrs.values() if node is not None and node.op == "Constant" else ()
            found = [v.values if isinstance(v, gs.Constant) else np.asarray(v) for v in values]
        else:
            found = [tensor.values]
        return next((v for v in found if v.dtype.kind == "f"), None)

    def _upstream(self, name: str) -> Iterator[gs.Node]:
        """The nodes that a tensor's values come from, nearest first."""
        waiting, seen = deque([name]), {name}
        nodes = NodeSet()
        while waiting:
            node = self.maker(waiting.popleft())
            if node is None or node in nodes:
                continue
            nodes.add(node)
            yield node
            for source in self.reads(node):
                if source in self._varying and source not in seen:
                    seen.add(source)
                    waiting.append(source)

    def _operators(self, node: gs.Node) -> set[str]:
        """The operator of a node and those of its bodies."""
        found = {str(node.op)}
        if any(isinstance(v, gs.Graph) for v in node.attrs.values()):
            holder = onnx.GraphProto(node=[self.model.export_node(node)])
            found |= {n.op_type for n in all_nodes(holder)}
        return found

    def _jumps(self, node: gs.Node) -> bool:
        """Whether a node makes jumps of floats that may be rounded."""
        operators = self._operators(node)
        if len(operators) > 1:
            return bool(operators & JUMPS or "Cast" in operators)
        match node.op:
            case "Cast":
                jumps = self._rounds(node)
            case "GridSample":
                jumps = node.attrs.get("mode") == "nearest"
            case "MaxPool":  # where the largest was
                jumps = sum(bool(t.name) for t in node.outputs) > 1
            case _:
                jumps = node.op in JUMPS
        if not jumps:
            return False
        return any(self._is_float(t.name) for t in node.inputs if t.name in self._varying)

    def _rounds(self, node: gs.Node) -> bool:
        """Whether a ``Cast`` makes integers or booleans."""
        kind = int(node.attrs.get("to", 0))
        try:
            return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).kind in "iub"
        except (KeyError, TypeError):
            return True

    def _is_float(self, name: str) -> bool:
        """Whether a tensor may hold floats (also where its type is not known)."""
        known = self._types.get(name)
        return known is None or np.dtype(known).kind not in "iubOSU"
