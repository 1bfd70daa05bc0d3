"""The facts: sparse conditional constant propagation and dead-code elimination, per channel.

Two facts for each channel of each tensor.  *Constant* flows forward: the value does not depend on
the graph's inputs.  *Needed* flows backward: some live output depends on it.  This is Wegman and
Zadeck's scheme ("Constant propagation with conditional branches", TOPLAS 1991) with channels in
place of scalars; the rules of each operator are in :mod:`onnx_simplify.operators`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.channels.values import MAP, UNIFORM, VARYING, Constants
from onnx_simplify.facts.sizes import settle
from onnx_simplify.graph.edit import shares_weights
from onnx_simplify.graph.model import Model
from onnx_simplify.operators import Operator, bind
from onnx_simplify.operators.contraction import Contraction
from onnx_simplify.operators.nodes import is_computed

Chooser = Callable[[Operator, "Facts", np.ndarray], bool]
Absorbed = dict[tuple[Operator, int], np.ndarray]
"""Masks of input positions by operator and input index."""


class Facts:
    """What is known of the channels of one graph.

    Facts are about the graph as it stood when they were made, and do not change: :meth:`measured`
    gives others.

    Attributes:
        model: the model.
        operators: all nodes, bound to their rules, in execution order.
        layouts: the layouts, united.
        constants: measured values of constant channels. Without them levels are optimistic:
            wherever a value decides, it is assumed to be the one that makes the result constant.
        level: constancy of each position, an int8 array shaped like the layout, by tensor name.
        disputed: positions that are constant by the rules and were not so when measured, as means
            over many elements may be, by tensor name.
        kept_names: tensors that must exist.
    """

    def __init__(self, model: Model):
        """Infer shapes and follow all channels of a cleaned model."""
        self.model = model
        settle(model)
        self.layouts = Layouts(model)
        self.operators: list[Operator] = []
        self.kept_names = model.kept_names
        for tensor in model.graph.inputs:
            if tensor.shape is not None:
                layout = self.layouts.untracked(tensor)
                self.layouts.set(tensor, layout)
                self.layouts.freeze(layout, "graph input")
        for node in model.graph.nodes:
            self.operators.append(self._followed(node))
        outputs = {t.name for t in model.graph.outputs}
        for names, reason in (
            (outputs, "graph output"),
            (self.kept_names - outputs, "read inside a body"),
            (model.pinned, "pinned"),
        ):
            for name in sorted(names & self.layouts.of.keys()):
                self.layouts.freeze(self.layouts.of[name], reason)
        self.layouts.unite()
        self.constants: Constants | None = None
        self._find_levels()

    def measured(self, constants: Constants) -> Facts:
        """The facts of the same graph with measured constants."""
        found = copy.copy(self)
        found.constants = constants
        found._find_levels()
        return found

    def _find_levels(self) -> None:
        """Compute ``level`` and ``disputed`` for all tensors, in execution order."""
        self.level: dict[str, np.ndarray] = {}
        self.disputed: dict[str, np.ndarray] = {}
        for tensor in self.model.graph.inputs:
            if self.has(tensor):
                self._settle(tensor.name, np.int8(VARYING))
        for op in self.operators:
            # See Operator.accounts_for.
            results = [None] * len(op.outputs) if self._strays(op) else op.level(self)
            for tensor, level in zip(op.outputs, results, strict=False):
                if self.has(tensor):
                    self._settle(tensor.name, np.int8(VARYING) if level is None else level)

    def _settle(self, name: str, level: np.ndarray | np.int8) -> None:
        """Record how constant a tensor is, unless measurement contradicts the rules."""
        shape = self.layouts.of[name].shape
        if self.constants is not None:
            agree = self.constants.agree(name, shape)
            disputed = np.broadcast_to((level > VARYING) & ~agree, shape)
            if disputed.any():
                self.disputed[name] = disputed
            level = np.where(agree, level, VARYING)
        self.level[name] = np.array(np.broadcast_to(level, shape), np.int8)
        self.level[name].flags.writeable = False

    def _followed(self, node: gs.Node) -> Operator:
        """The node, bound to rules that apply, once its outputs have layouts."""
        patterns = self.model.patterns
        # Before version 7 of the operator set, broadcasting followed other rules.
        op = bind(node, patterns) if self.model.opset >= 7 else Operator(node)
        if self.model.keep_shared and shares_weights(self.layouts.readers, node):
            op = Operator(node, reason="weights are shared")
        try:
            op.layout(self.layouts)
        except Unsupported as reason:
            op = Operator(node, reason=str(reason))
            op.layout(self.layouts)
        return op

    def all_of(self, tensors: Sequence[gs.Tensor]) -> list[np.ndarray | None]:
        """Masks that say that all of some inputs is needed (None where nothing is followed)."""
        return [
            np.ones(self.layouts.of[t.name].shape, bool) if self.has(t) else None for t in tensors
        ]

    def _strays(self, op: Operator) -> set[int]:
        """Computed inputs of which the node's rules know nothing."""
        computed = {k for k in range(len(op.inputs)) if is_computed(op.node, k)}
        return computed.difference(op.accounts_for()) if computed else computed

    @cached_property
    def sizes(self) -> dict[str, list]:
        """Symbolic shapes of inputs and of what nodes compute, by tensor name."""
        tensors = [*self.model.graph.inputs, *(t for op in self.operators for t in op.outputs)]
        return {t.name: self.shape(t) for t in tensors if t.name in self.layouts.of}

    @cached_property
    def contractions(self) -> list[Contraction]:
        """All products with constant weights, in execution order."""
        return [product for op in self.operators for product in op.contractions]

    @cached_property
    def needed(self) -> dict[str, np.ndarray]:
        """Which positions some live output depends on, by tensor name, as the graph stands."""
        found = self.need()
        for mask in found.values():
            mask.flags.writeable = False
        return found

    @cached_property
    def makers(self) -> dict[int, list[Contraction]]:
        """The products with constant weights that make each label, in execution order."""
        found: dict[int, list[Contraction]] = {}
        for product in self.contractions:
            if self.has(product.outputs[0]):
                for channel in np.unique(product.channels(self)[1]):
                    found.setdefault(int(channel), []).append(product)
        return found

    @cached_property
    def places(self) -> dict[Operator, int]:
        """Where each operator comes in the order of execution."""
        return {op: place for place, op in enumerate(self.operators)}

    def tensors_with(self, labels: np.ndarray) -> list[str]:
        """Names of the tensors that may have some of these labels (their ranges overlap)."""
        names, lowest, highest = self._ranges
        return [
            names[k] for k in np.flatnonzero((lowest <= labels.max()) & (highest >= labels.min()))
        ]

    @cached_property
    def _ranges(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Names of all tensors, and their smallest and largest labels."""
        layouts = self.layouts.of
        lowest = np.array([layout.min() for layout in layouts.values()], np.int64)
        highest = np.array([layout.max() for layout in layouts.values()], np.int64)
        return list(layouts), lowest, highest

    @cached_property
    def producer(self) -> dict[str, Operator]:
        """The operator that computes each tensor, by the tensor's name."""
        return {t.name: op for op in self.operators for t in op.outputs if t.name}

    @cached_property
    def readers(self) -> dict[str, list[tuple[Operator, int]]]:
        """The operators that read each tensor, and at which input, by the tensor's name."""
        found: dict[str, list[tuple[Operator, int]]] = {}
        for op in self.operators:
            for index, tensor in enumerate(op.inputs):
                if tensor.name:
                    found.setdefault(tensor.name, []).append((op, index))
        return found

    def has(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor is a variable whose channels are followed."""
        return tensor.name in self.layouts.of and not isinstance(tensor, gs.Constant)

    def shape(self, tensor: gs.Tensor) -> list:
        """The tensor's symbolic shape."""
        return self.layouts.shape(tensor)

    def level_of(self, tensor: gs.Tensor, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Level of a node's input; an initializer's is derived from its own shape.

        Args:
            tensor: the input.
            shape: for an initializer, the layout shape its level is wanted in.
        """
        if not isinstance(tensor, gs.Constant):
            return self.level[tensor.name]
        dims = (1,) * (len(shape or ()) - len(tensor.shape)) + tuple(tensor.shape)
        varies = any(d > 1 and s == 1 for d, s in zip(dims, shape or (), strict=True))
        return np.full((1,) * len(dims), MAP if varies else UNIFORM, np.int8)

    def zero(self, tensor: gs.Tensor, shape: tuple[int, ...]) -> np.ndarray:
        """Where a constant input is zero everywhere; optimistic for values not measured yet.

        Returns:
            Boolean array that broadcasts to ``shape`` (the layout shape).
        """
        if isinstance(tensor, gs.Constant):
            values = np.asarray(tensor.values)
            values = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
            axes = tuple(k for k, s in enumerate(shape) if s == 1)
            return (values == 0).all(axis=axes, keepdims=True)
        constant = self.level[tensor.name] > VARYING
        if self.constants is not None:
            constant = constant & (self.scalar(tensor) == 0)
        pad = (1,) * (len(shape) - constant.ndim)
        return constant.reshape(pad + constant.shape)

    def scalar(self, tensor: gs.Tensor) -> np.ndarray:
        """Value of each position that is one constant everywhere, NaN elsewhere (float64).

        For an initializer, its values (of the initializer's own shape).
        """
        if isinstance(tensor, gs.Constant):
            return np.asarray(tensor.values, np.float64)
        level = self.level[tensor.name]
        if self.constants is None:
            return np.full(level.shape, np.nan)
        value = self.constants.scalar(tensor.name, level.shape, proven=level == UNIFORM)
        return np.where(level > VARYING, value, np.nan)

    def array(self, tensor: gs.Tensor) -> np.ndarray | None:
        """The measured values of a tensor some of whose positions are maps, if usable.

        The result has size 1 along axes where constants do not vary.  None when there is no
        measurement, or when constants vary along an axis of dynamic size.
        """
        if self.constants is None or tensor.name not in self.constants.arrays:
            return None
        found = self.constants.arrays[tensor.name]
        layout = self.layouts.of[tensor.name]
        constant = np.broadcast_to(self.level[tensor.name] > VARYING, found.shape)
        for axis, size in enumerate(self.shape(tensor)):
            if layout.shape[axis] > 1 or found.shape[axis] == 1:
                continue
            first = found.take([0], axis)
            rounding = 0.0 if self.constants.is_exact(tensor.name) else 1e-6
            same = np.isclose(found, first, rtol=rounding, atol=0) | ~constant
            if same.all():
                found = first
                constant = constant.take([0], axis)
            elif not isinstance(size, int):
                return None
        return found

    def need(self, absorbed: Absorbed | None = None) -> dict[str, np.ndarray]:
        """Which positions some live output depends on, by tensor name.

        Args:
            absorbed: positions of inputs that are no longer read, by (operator, input index), as
                if their constants had been absorbed already.
        """
        need = {n: np.zeros(a.shape, bool) for n, a in self.layouts.of.items()}
        for name in self.kept_names:
            if name in need:
                need[name][...] = True
        for op in reversed(self.operators):
            outputs = [need.get(t.name) for t in op.outputs]
            known = any(o is not None and o.any() for o in outputs)
            if not known and not any(
                o is None and t.name and self._read(t)
                for t, o in zip(op.outputs, outputs, strict=True)
            ):
                continue
            wanted = op.need(self, outputs)
            strays = self._strays(op)
            if strays:
                whole = self.all_of(op.inputs)
                wanted = [*wanted, *[None] * (len(op.inputs) - len(wanted))]
                wanted = [whole[k] if k in strays else mask for k, mask in enumerate(wanted)]
            for index, (tensor, mask) in enumerate(zip(op.inputs, wanted, strict=False)):
                if mask is None or not self.has(tensor):
                    continue
                skip = (absorbed or {}).get((op, index))
                if skip is not None:
                    mask = mask & ~skip
                need[tensor.name] |= mask
        return need

    def _read(self, tensor: gs.Tensor) -> bool:
        return tensor.name in self.kept_names or bool(self.layouts.readers.get(tensor.name))

    def alive(self, need: dict[str, np.ndarray]) -> np.ndarray:
        """Labels of channels that stay: needed somewhere, or frozen."""
        alive = self.layouts.frozen.copy()
        for name, mask in need.items():
            alive[self.layouts.of[name][mask]] = True
        return alive

    def close(
        self,
        alive: np.ndarray,
        choose: Chooser | None = None,
        free: Collection[Operator] = (),
    ) -> np.ndarray:
        """Revive channels until every node can be rewritten; the argument is modified.

        Args:
            alive: labels that stay.
            choose: optional callable ``(operator, facts, alive) -> bool`` that revives channels
                for speed and says whether it did.
            free: operators that are rewritten in some other way.
        """
        again = True
        while again:
            again = False
            for op in self.operators:
                if not self._partial(op, alive):
                    continue
                if op not in free:
                    again |= op.constrain(self, alive)
                again |= self._never_empty(op, alive)
                if choose is not None:
                    again |= choose(op, self, alive)
                for tensor in (*op.inputs, *op.outputs):
                    again |= self._grid(tensor, alive)
        return alive

    def _partial(self, op: Operator, alive: np.ndarray) -> bool:
        return any(
            not alive[self.layouts.of[t.name]].all()
            for t in (*op.inputs, *op.outputs)
            if self.has(t)
        )

    def dead(self, tensor: gs.Tensor, alive: np.ndarray) -> bool:
        """Whether no channel of the tensor is alive."""
        return self.has(tensor) and not alive[self.layouts.of[tensor.name]].any()

    def is_gone(self, op: Operator, alive: np.ndarray) -> bool:
        """Whether a node disappears: no channel of any output is alive."""
        return all(
            self.dead(t, alive) or (not self.has(t) and not self._read(t))
            for t in op.outputs
            if t.name
        )

    def _never_empty(self, op: Operator, alive: np.ndarray) -> bool:
        changed = False
        if op.drops_empty_inputs or self.is_gone(op, alive):
            return False
        for tensor in op.inputs:
            if self.dead(tensor, alive):
                alive[self.layouts.of[tensor.name].ravel()[0]] = True
                changed = True
        return changed

    def _grid(self, tensor: gs.Tensor, alive: np.ndarray) -> bool:
        if not self.has(tensor):
            return False
        gaps = self.grid_gaps(tensor, alive)
        alive[self.layouts.of[tensor.name][gaps]] = True
        return bool(gaps.any())

    def grid_gaps(self, tensor: gs.Tensor, alive: np.ndarray) -> np.ndarray:
        """Dead positions that must stay so that the tensor's positions form a grid."""
        mask = alive[self.layouts.of[tensor.name]]
        if sum(s > 1 for s in mask.shape) < 2:
            return np.zeros_like(mask)
        full = np.ones_like(mask)
        for axis in range(mask.ndim):
            others = tuple(k for k in range(mask.ndim) if k != axis)
            full &= mask.any(axis=others, keepdims=True)
        return full & ~mask
