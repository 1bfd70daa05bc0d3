"""Tensors in front of outputs that both graphs have by one name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.model import Model
from onnx_simplify.runtime.difference import Gap, compare, is_informative, spread, wide
from onnx_simplify.runtime.rounding import Rounding
from onnx_simplify.runtime.runs import Run, fetch, perturbed
from onnx_simplify.runtime.trace import Trace
from onnx_simplify.runtime.verdict import MARGIN, STEPS, WIDER, Bounds

# So many tensors in front of an output are looked at.
_NEAR = 96


class Inside:
    """Compares tensors in front of outputs that both graphs have by one name.

    A tensor that exists in the result keeps its name as long as it has its value; what has other
    channels has another shape, and is passed over.
    """

    def __init__(self, rounding: Rounding, simplified: Model, bounds: Bounds):
        """Compare ``simplified`` with the original that ``rounding`` knows."""
        self._rounding = rounding
        self._simplified = simplified
        self._bounds = bounds
        self._found: dict[tuple[str, bool], tuple[list[str], str]] = {}

    @cached_property
    def _trace(self) -> Trace:
        return Trace(self._simplified)

    def depends_on_inputs(self, name: str) -> bool:
        """Whether the simplified model computes an output from its inputs."""
        return self._trace.depends_on_inputs(name)

    def is_same_computation(self, name: str) -> bool:
        """Whether both models compute a tensor by the same nodes with the same constants."""
        waiting, seen = [name], {name}
        while waiting:
            tensor = waiting.pop()
            mine, its = self._rounding.trace.maker(tensor), self._trace.maker(tensor)
            if mine is None or its is None:
                if mine is not its:
                    return False
                continue
            if not _are_alike(self._rounding.model, mine, self._simplified, its):
                return False
            for source in (*(t.name for t in its.inputs), *self._simplified.captured(its)):
                if source not in seen:
                    seen.add(source)
                    waiting.append(source)
        return True

    def differs(self, name: str) -> tuple[list[str], str]:
        """Compare what is in front of an output that says nothing.

        Args:
            name: the output.

        Returns:
            The tensors that were compared, and what differs, if anything does.
        """
        return self._walk(name, itself=True)

    def differs_before(self, name: str) -> tuple[list[str], str]:
        """As :meth:`differs`, for an output that does say something."""
        return self._walk(name, itself=False)

    def _walk(self, name: str, *, itself: bool) -> tuple[list[str], str]:
        if (name, itself) not in self._found:
            self._found[name, itself] = self._compare(name, itself)
        return self._found[name, itself]

    def _compare(self, name: str, itself: bool) -> tuple[list[str], str]:
        rounding = self._rounding
        near = self._near(name)
        theirs = [n for n in near if self._trace.maker(n) is not None]
        runs = rounding.runs[:2] + rounding.runs[2:][-1:]
        try:
            before = fetch(rounding.model, near, runs)
            after = fetch(self._simplified, theirs, runs)
        except Exception:  # an inner tensor of a type that cannot be an output
            return [], ""
        compared: list[str] = []
        weak: list[str] = []
        waiting, seen = [name] if itself else self._sources(name), {name}
        while waiting:
            tensor = waiting.pop(0)
            a, b = before.get(tensor), after.get(tensor)
            if a is not None and b is not None and self._is_evidence(a, b):
                gap = self._gap(tensor, a, b)
                if not gap.error <= self._bounds.tolerance:
                    # Channels that nobody needs may hold anything.
                    b = self._where_needed(tensor, a, b)
                    gap = self._gap(tensor, a, b)
                right = gap.error <= self._bounds.tolerance
                if not right and not self._is_rounding(tensor, a, b):
                    text = gap.reason or f"differs by {gap.error:.2g} of its magnitude"
                    return compared, f"'{tensor}' in front of output '{name}' {text}"
                varies = compare(a[0], a[1], columns=False).whole
                if right and varies > MARGIN * self._bounds.tolerance:
                    compared.append(tensor)
                    continue
                # What hardly varies, or is rounded that much, says little: look further.
                weak.append(tensor)
            for source in self._sources(tensor):
                if source not in seen and source in before:
                    seen.add(source)
                    waiting.append(source)
        return compared or weak, ""

    def _gap(self, tensor: str, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> Gap:
        """The largest gap of all runs."""
        ties = self._rounding.ties(tensor)
        found = [compare(x, y, ties=ties) for x, y in zip(a, b, strict=True)]
        return max(found, key=lambda gap: gap.error)

    @cached_property
    def _needed(self) -> dict[str, np.ndarray]:
        """Which channels of the simplified model's tensors its outputs depend on."""
        try:
            return Facts(self._simplified.copy()).needed
        except Exception:  # all of them then
            return {}

    def _where_needed(
        self, tensor: str, a: Sequence[np.ndarray], b: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """The second values where they are needed, the first ones elsewhere."""
        mask = self._needed.get(tensor)
        if mask is None or mask.ndim != a[0].ndim:
            return list(b)
        return [np.where(mask, y, x) for x, y in zip(a, b, strict=True)]

    def _sources(self, name: str) -> list[str]:
        """Tensors that the node in front of a tensor reads and that vary."""
        trace = self._rounding.trace
        node = trace.maker(name)
        if node is None:
            return []
        return [t for t in trace.reads(node) if trace.depends_on_inputs(t) and trace.maker(t)]

    def _near(self, name: str) -> list[str]:
        """Tensors in front of an output, nearest first."""
        found, place = [name], 0
        while place < len(found) and len(found) < _NEAR:
            found += [t for t in self._sources(found[place]) if t not in found]
            place += 1
        return found[1:]

    def _is_evidence(self, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
        """Whether a tensor is of the same shape in both, of floats, and says something."""
        if any(
            isinstance(x, (list, tuple)) or isinstance(y, (list, tuple))
            for x, y in zip(a, b, strict=True)
        ):
            return False
        if any(x.shape != y.shape or x.dtype != y.dtype for x, y in zip(a, b, strict=True)):
            return False
        return a[0].dtype.kind in "fV" and is_informative(a[0], a[1])

    def _is_rounding(
        self, tensor: str, before: Sequence[np.ndarray], after: Sequence[np.ndarray]
    ) -> bool:
        """Whether rounding moves a tensor as much in the original."""
        runs = self._rounding.runs[:2]
        try:
            optimized = fetch(self._rounding.model, [tensor], runs, optimize=True)[tensor]
            near = [
                Run(perturbed(run.feeds, np.random.default_rng(seed)), [])
                for run in runs
                for seed in range(2)
            ]
            others = fetch(self._rounding.model, [tensor], near)[tensor]
        except Exception:
            return False
        for k, (a, b) in enumerate(zip(before[:2], after[:2], strict=True)):
            moved = [spread(a, o) for o in (optimized[k], *others[2 * k : 2 * k + 2])]
            largest = max((float(m.max()) for m in moved if m is not None), default=0.0)
            bound = min(WIDER * largest, STEPS * float(np.abs(wide(a)).max(initial=0.0)))
            bound += self._rounding.step(tensor)
            if not np.abs(wide(a) - wide(b)).max(initial=0.0) <= bound:
                return False
        return True


def _are_alike(first: Model, a: gs.Node, second: Model, b: gs.Node) -> bool:
    """Whether two nodes of two models are the same, constants included."""
    one, other = first.export_node(a), second.export_node(b)
    if (one.op_type, one.domain, list(one.input), list(one.output)) != (
        other.op_type,
        other.domain,
        list(other.input),
        list(other.output),
    ) or list(one.attribute) != list(other.attribute):
        return False
    return all(
        isinstance(s, gs.Constant) == isinstance(t, gs.Constant)
        and (not isinstance(s, gs.Constant) or np.array_equal(s.values, t.values))
        for s, t in zip(a.inputs, b.inputs, strict=True)
    )
