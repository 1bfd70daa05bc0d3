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

# So many tensors in front of an output are looked at, and so many numbers of a channel to see
# which one it is.
_NEAR = 96
_PLACES = 256


class Inside:
    """Compares tensors in front of outputs that both graphs have by one name.

    A tensor that exists in the result keeps its name as long as it has its value. Where channels
    are gone, each one that is left must be one of those that were.
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
        upstream = self._upstream(name)
        start = [name] if itself else self._sources(name)
        for first in range(0, len(upstream), _NEAR):
            chunk = upstream[first : first + _NEAR]
            compared, reason = self._compare_some(name, start if not first else chunk, chunk)
            if compared or reason:
                return compared, reason
        return [], ""

    def _compare_some(
        self, name: str, start: Sequence[str], chunk: Sequence[str]
    ) -> tuple[list[str], str]:
        """Compare some tensors in front of an output, and those in front of them that say little.

        Args:
            name: the output.
            start: where to start.
            chunk: tensors that are looked at at all.
        """
        rounding = self._rounding
        theirs = [n for n in chunk if self._trace.maker(n) is not None]
        runs = rounding.runs[:2] + rounding.runs[2:][-1:]
        try:
            before = fetch(rounding.model, list(chunk), runs)
            after = fetch(self._simplified, theirs, runs)
        except Exception:  # an inner tensor of a type that cannot be an output
            return [], ""
        compared: list[str] = []
        weak: list[str] = []
        waiting, seen = list(start), {name, *start}
        while waiting:
            tensor = waiting.pop(0)
            verdict, reason = "", ""
            if tensor in before and tensor in after:
                verdict, reason = self._weigh(tensor, before[tensor], after[tensor])
            if reason:
                return compared, f"'{tensor}' in front of output '{name}' {reason}"
            if verdict == "right":
                compared.append(tensor)
                continue
            if verdict:
                weak.append(tensor)
            for source in self._sources(tensor):
                if source not in seen and source in before:
                    seen.add(source)
                    waiting.append(source)
        return compared or weak, ""

    def _weigh(
        self, tensor: str, before: Sequence[np.ndarray], after: Sequence[np.ndarray]
    ) -> tuple[str, str]:
        """Whether a tensor is right, or says little, or nothing; and what is wrong, if it is not.

        What hardly varies, or is rounded as much as it varies, says little.
        """
        a, b = _matched(before, after), list(after)
        if a is None or not self._is_evidence(a, b):
            return "", ""
        gap = self._gap(tensor, a, b)
        if not gap.error <= self._bounds.tolerance:
            # Channels that nobody needs may hold anything.
            b = self._where_needed(tensor, a, b)
            gap = self._gap(tensor, a, b)
        right = gap.error <= self._bounds.tolerance
        if not right and not self._is_rounding(tensor, before, a, b):
            return "", gap.reason or f"differs by {gap.error:.2g} of its magnitude"
        varies = compare(a[0], a[1], columns=False).whole
        return "right" if right and varies > MARGIN * self._bounds.tolerance else "weak", ""

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

    def _upstream(self, name: str) -> list[str]:
        """Tensors in front of an output, nearest first."""
        found, place = [name], 0
        known = {name}
        while place < len(found):
            more = [t for t in dict.fromkeys(self._sources(found[place])) if t not in known]
            found += more
            known.update(more)
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
        self,
        tensor: str,
        whole: Sequence[np.ndarray],
        before: Sequence[np.ndarray],
        after: Sequence[np.ndarray],
    ) -> bool:
        """Whether rounding moves a tensor as much in the original.

        Args:
            tensor: the tensor.
            whole: what it is there.
            before: the same without the channels that are gone.
            after: what it is in the simplified model.
        """
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
            near_by = (optimized[k], *others[2 * k : 2 * k + 2])
            moved = [spread(whole[k], other) for other in near_by]
            largest = max((float(m.max()) for m in moved if m is not None), default=0.0)
            bound = min(WIDER * largest, STEPS * float(np.abs(wide(a)).max(initial=0.0)))
            bound += self._rounding.step(tensor)
            if not np.abs(wide(a) - wide(b)).max(initial=0.0) <= bound:
                return False
        return True


def _matched(
    before: Sequence[np.ndarray], after: Sequence[np.ndarray]
) -> Sequence[np.ndarray] | None:
    """The channels of a tensor that are those of what is left of it, by the first run.

    Args:
        before: the tensor, one array for each run.
        after: the same with channels along one axis gone, and perhaps in another order.

    Returns:
        Arrays of the shapes of the latter; None if they do not differ along one axis only, or
        cannot be told apart.
    """
    a, b = before[0], after[0]
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)) or a.dtype.kind != "f":
        return before
    if a.shape == b.shape or a.ndim != b.ndim:
        return before
    axes = [k for k in range(a.ndim) if a.shape[k] != b.shape[k]]
    if len(axes) > 1 or a.shape[axes[0]] < b.shape[axes[0]] or not np.isfinite(a).all():
        return None
    axis = axes[0]
    own, left = (np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (a, b))
    places = np.linspace(0, own.shape[1] - 1, min(own.shape[1], _PLACES)).astype(np.int64)
    own, left = own[:, places], left[:, places]
    index = [int(np.abs(own - channel).max(axis=1).argmin()) for channel in left]
    return [x.take(index, axis) for x in before]


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
