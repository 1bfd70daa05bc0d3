"""Sizes of all tensors, and the integers that are computed from them, in one walk over a graph.

Sizes have several witnesses, in this order:

1. the rule of the node's operator (:meth:`Operator.shapes`), which computes with expressions;
2. onnx's inference of the whole graph, which knows all standard operators, but gives a size that
   is no symbol of an input a symbol of its own;
3. onnx's inference of the single node, where what is in front of it is known better by now;
4. runs, of operators that nobody knows: see :mod:`onnx_simplify.runtime.observed`.

A symbol that onnx's inference made up is replaced, wherever it occurs, by what a rule says of it.
Where a number contradicts a number, the size is not known. What the file itself states of inner
tensors is not listened to: it need not be true.

Integers are followed as well (:meth:`Operator.values`): a vector of sizes is an array of numbers
and sizes, so that ``Shape -> Gather -> Add -> Concat -> Reshape`` gives the sizes behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.shape_inference import infer_node_outputs

from onnx_simplify.channels.layouts import Unsupported
from onnx_simplify.graph.expressions import Dim
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.shapes import Inferred, infer_all, is_unknown, shape_of
from onnx_simplify.operators import Operator, bind
from onnx_simplify.operators.nodes import LONGEST

# What a rule that goes wrong raises: then it knows nothing, which is always right.
TOLERATED: tuple[type[Exception], ...] = (Exception,)


class Sizes:
    """Types and sizes of a graph's tensors as they are when this is made.

    Attributes:
        shapes: by tensor name; None where not even the rank is known.
        types: elements' types by tensor name, as far as they are known.
        integers: by tensor name, the integers in small tensors: numbers, sizes, or None where an
            element is not known.
    """

    def __init__(self, model: Model, input_shapes: Mapping[str, Sequence[int]] | None = None):
        """Find out.

        Args:
            model: the model; it is not modified.
            input_shapes: sizes to assume for graph inputs, in place of their declared ones: those
                of the first run, if any tensor was observed.

        Raises:
            ModelError: the graph contradicts itself.
        """
        self._model = model
        self._inferred: dict[str, Inferred] = infer_all(model, input_shapes)
        self._better: dict[str, Dim] = {}
        self._fresh = 0
        self._unproved: set[str] = set()
        self._assumed = bool(input_shapes)
        self.shapes: dict[str, list[Dim] | None] = {}
        self.types: dict[str, np.dtype | int] = {}
        self.integers: dict[str, np.ndarray] = {}
        self._opsets = list(model.template.opset_import)
        for tensor in model.graph.inputs:
            self._enter(tensor, self._inferred.get(tensor.name))
        for node in model.graph.nodes:
            self._follow(bind(node, model.patterns))

    def apply(self) -> Sizes:
        """Set ``dtype`` and ``shape`` of all variables of the graph; the sizes themselves."""
        for tensor in self._model.graph.tensors().values():
            if isinstance(tensor, gs.Constant):
                continue
            shape = self.shapes.get(tensor.name)
            tensor.shape = None if shape is None else list(shape)
            if tensor.name in self.types:
                tensor.dtype = self.types[tensor.name]
        return self

    def shape(self, tensor: gs.Tensor) -> list[Dim]:
        """The tensor's sizes.

        Raises:
            Unsupported: its rank is not known.
        """
        if isinstance(tensor, gs.Constant):
            return list(tensor.shape)
        found = self.shapes.get(tensor.name)
        if found is None:
            raise Unsupported(f"shape of '{tensor.name}' is not known")
        return list(found)

    def values(self, tensor: gs.Tensor) -> np.ndarray | None:
        """The integers in a small tensor, as an array of objects; None if they are not followed."""
        if not isinstance(tensor, gs.Constant):
            return self.integers.get(tensor.name)
        if np.dtype(tensor.dtype).kind != "i" or np.prod(tensor.shape) > LONGEST:
            return None
        return np.array(np.asarray(tensor.values).tolist(), object).reshape(tensor.shape)

    def truth(self, tensor: gs.Tensor) -> bool | None:
        """Whether a single truth that follows from sizes holds; None if that is not known."""
        values = self.integers.get(tensor.name)
        if values is None or values.size != 1:
            return None
        (found,) = values.ravel()
        return found if isinstance(found, bool) else None

    def _follow(self, op: Operator) -> None:
        outputs = op.outputs
        known = [self._known(self._inferred.get(t.name)) for t in outputs]
        own = self._by_rule(op)
        each = list(zip(outputs, known, own, strict=True))
        if any(t.name and self._is_vague(found, rule) for t, found, rule in each):
            alone = self._alone(op.node)
            known = [
                self._merged(k, alone.get(t.name)) for k, t in zip(known, outputs, strict=True)
            ]
        for tensor, inferred, rule in zip(outputs, known, own, strict=True):
            if not tensor.name:
                continue
            if rule is not None and tensor.name not in self._model.disputed:
                inferred = self._refined(op.node, inferred, rule)
            if tensor.name in self._model.observed and (inferred is None or inferred.shape is None):
                inferred = self._seen(tensor.name)
            self._enter(tensor, inferred)
        if self._unproved.intersection(t.name for t in op.inputs):
            # What was observed may guide a plan, but is not written into a graph.
            self._unproved.update(t.name for t in outputs)
            return
        try:
            results = op.values(self)
        except TOLERATED:
            return
        for tensor, values in zip(outputs, results, strict=False):
            if tensor.name and values is not None and values.size <= LONGEST:
                self.integers[tensor.name] = values

    def _seen(self, name: str) -> Inferred:
        """What runs tell of a tensor; for inputs of one size only, it is so always."""
        found = self._model.observed[name]
        if self._assumed:
            # Sizes are assumed as they were in the first run.
            return Inferred(found.dtype, list(found.first))
        if any(isinstance(d, str) for t in self._model.graph.inputs for d in self.shape(t)):
            self._unproved.add(name)
        return Inferred(found.dtype, [self._symbol() if d is None else d for d in found.dims])

    def _enter(self, tensor: gs.Tensor, found: Inferred | None) -> None:
        self.shapes[tensor.name] = None if found is None else found.shape
        if found is not None and found.dtype is not None:
            self.types[tensor.name] = found.dtype

    def _known(self, inferred: Inferred | None) -> Inferred | None:
        """What was inferred, with better sizes where there are any by now."""
        if inferred is None or inferred.shape is None:
            return inferred
        shape = [self._better.get(d, d) if isinstance(d, str) else d for d in inferred.shape]
        return Inferred(inferred.dtype, shape)

    def _by_rule(self, op: Operator) -> list[list[Dim | None] | None]:
        """What the operator's rule says of each output."""
        try:
            found = [None if s is None else list(s) for s in op.shapes(self)]
        except TOLERATED:
            found = []
        return found + [None] * (len(op.outputs) - len(found))

    @staticmethod
    def _is_vague(inferred: Inferred | None, rule: Sequence[Dim | None] | None) -> bool:
        """Whether it is worth asking once more: something is not known yet."""
        if inferred is None or inferred.dtype is None:
            return True
        if rule is not None and None not in rule:
            return False
        return inferred.shape is None or any(map(is_unknown, inferred.shape))

    def _alone(self, node: gs.Node) -> dict[str, Inferred]:
        """What onnx infers of one node, given what is known of its inputs by now."""
        version = next((o.version for o in self._opsets if o.domain == (node.domain or "")), 0)
        try:
            schema = onnx.defs.get_schema(node.op, version, node.domain or "")
            types, data = {}, {}
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant):
                    types[tensor.name] = _type(np.dtype(tensor.dtype), list(tensor.shape))
                    if self.values(tensor) is not None:
                        data[tensor.name] = onnx.numpy_helper.from_array(np.asarray(tensor.values))
                elif tensor.name:
                    dtype = self.types.get(tensor.name)
                    types[tensor.name] = _type(dtype, self.shapes.get(tensor.name))
            found = infer_node_outputs(
                schema,
                self._model.export_node(node),
                types,
                data,
                opset_imports=self._opsets,
                ir_version=self._model.template.ir_version,
            )
        except Exception:  # then this witness knows nothing
            return {}
        inferred = {name: shape_of(kind, self._symbol) for name, kind in found.items()}
        for name in self._model.disputed & inferred.keys():
            inferred[name] = Inferred(inferred[name].dtype, None)
        return inferred

    def _symbol(self) -> str:
        """A symbol for a size of which nothing is known."""
        self._fresh += 1
        return f"?{self._fresh}"

    def _merged(self, first: Inferred | None, second: Inferred | None) -> Inferred | None:
        """What two inferences say together."""
        if first is None or second is None:
            return first or second
        dtype = second.dtype if first.dtype is None else first.dtype
        if first.shape is None or second.shape is None:
            return Inferred(dtype, second.shape if first.shape is None else first.shape)
        if len(first.shape) != len(second.shape):
            return Inferred(dtype, first.shape)
        shape = [self._one(a, b) for a, b in zip(first.shape, second.shape, strict=True)]
        return Inferred(dtype, shape)

    def _refined(
        self, node: gs.Node, inferred: Inferred | None, rule: Sequence[Dim | None]
    ) -> Inferred:
        """What inference and a rule say together."""
        dtype = None if inferred is None else inferred.dtype
        if dtype is None and node.inputs:
            first = node.inputs[0]
            dtype = first.dtype if isinstance(first, gs.Constant) else self.types.get(first.name)
        if inferred is None or inferred.shape is None or len(inferred.shape) != len(rule):
            if inferred is not None and inferred.shape is not None:
                return inferred
            return Inferred(dtype, [self._symbol() if d is None else d for d in rule])
        shape = [
            a if b is None else self._one(a, b) for a, b in zip(inferred.shape, rule, strict=True)
        ]
        return Inferred(dtype, shape)

    def _one(self, size: Dim, other: Dim) -> Dim:
        """One size for two that are said to be the same; both witnesses may be right."""
        if isinstance(size, int) and isinstance(other, int):
            return size if size == other else self._symbol()
        if is_unknown(size) and not is_unknown(other):
            self._better[str(size)] = other
            return other
        return other if isinstance(other, int) else size


def _type(dtype: np.dtype | int | None, shape: Sequence[Dim] | None) -> onnx.TypeProto:
    """A tensor's type as a message."""
    if dtype is None:
        return onnx.TypeProto()
    kind = dtype if isinstance(dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(dtype)
    return onnx.helper.make_tensor_type_proto(kind, shape)


def settle(model: Model, input_shapes: Mapping[str, Sequence[int]] | None = None) -> Sizes:
    """Find out all sizes and set ``dtype`` and ``shape`` of every variable, in place.

    Args:
        model: the model.
        input_shapes: sizes to assume for graph inputs, in place of their declared ones.

    Raises:
        ModelError: the graph contradicts itself.
    """
    return Sizes(model, input_shapes).apply()
