"""Compare two models by what they make of the same inputs.

Start reading from :meth:`Judge.compare`. An output that agrees to within the tolerance is fine.
Where it does not, the original itself is asked how much rounding moves it: run as onnxruntime
optimises it, and for inputs that differ by rounding. Where an output says nothing, or so little
that its bound had to be widened, tensors in front of it are compared that both graphs have by one
name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.values import Seen
from onnx_simplify.errors import CannotVerifyError, RunError, first_line
from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.traits import COARSE
from onnx_simplify.runtime.difference import (
    Gap,
    compare,
    is_informative,
    magnitudes,
    spread,
    wide,
)
from onnx_simplify.runtime.inputs import Feeds
from onnx_simplify.runtime.rows import unmatched
from onnx_simplify.runtime.session import Session
from onnx_simplify.runtime.trace import Trace

# Rounding of the original excuses no more than this share of an output, what float32 resolves in
# front of it aside: an original that is never twice the same would excuse everything.
_STEPS = 2e-2
_TRIALS = 8
# Some networks hardly react to their input: an output may not be off by more than this share of
# its variation between two inputs, unless that is rounding, which it may exceed by a margin.
_SHARE = 0.1
_MARGIN = 10
# Where rounding moves an output by more than is allowed, it may be off by so many times that much.
_WIDER = 4
# So many tensors in front of an output are looked at.
_NEAR = 96


@dataclass
class Run:
    """One run of the original: inputs, outputs, sizes of free dimensions, and what was inside."""

    feeds: Feeds
    outputs: list[np.ndarray]
    sizes: dict[str, int] = field(default_factory=dict)
    inner: dict[str, Seen | None] = field(default_factory=dict)


@dataclass
class Compared:
    """What was compared of one output, over all runs.

    Attributes:
        name: the output.
        elements: how many numbers.
        varied: the share of them that was not the same for all inputs of one size.
        low: the smallest number, None if there is none.
        high: the largest number.
        error: the largest error, see :class:`Verification`.
        inside: tensors in front of it that were compared as well, since it says little.
    """

    name: str
    elements: int = 0
    varied: float = 0.0
    low: float | None = None
    high: float | None = None
    error: float = 0.0
    inside: list[str] = field(default_factory=list)


@dataclass
class Verification:
    """The result of a comparison.

    Attributes:
        passed: whether all outputs agree within the tolerance.
        worst: largest relative error: ``max |a - b| / max |a|`` per column of an output and run,
            see :func:`onnx_simplify.runtime.difference.magnitudes`.
        tolerance: the bound ``worst`` was held against.
        runs: number of inputs compared.
        sizes: sizes of free dimensions in each run.
        reason: what differs, when not passed.
        outputs: what was compared.
        notes: where a bound was widened, or something else compared, and why.
    """

    passed: bool
    worst: float
    tolerance: float
    runs: int
    sizes: list[dict[str, int]]
    reason: str = ""
    outputs: list[Compared] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Bounds:
    """What a comparison is held against.

    Attributes:
        tolerance: the relative error allowed.
        rounding: errors up to this are rounding, whatever the output's variation.
        exact: whether both models are meant to compute the same.
        strict: whether the tolerance is the user's word, which rounding does not widen.
    """

    tolerance: float
    rounding: float
    exact: bool
    strict: bool


class Judge:
    """Compares models with the original, whose own rounding it knows.

    Attributes:
        model: the original.
        names: its outputs.
        runs: its runs; the first two have the same sizes.
        trace: where its outputs come from.
        mute: which outputs say nothing for any of the inputs.
    """

    def __init__(
        self, model: Model, names: list[str], runs: list[Run], trace: Trace, mute: list[int]
    ):
        """Judge by these runs."""
        self.model = model
        self.names = names
        self.runs = runs
        self.trace = trace
        self.mute = mute
        self._rounds = any(n.op in COARSE for n in model.graph.nodes)
        self._ties: dict[str, bool] = {}
        self._rounded: dict[int, list[list[np.ndarray]]] = {}

    def compare(
        self,
        simplified: Model,
        rtol: float | None,
        *,
        half: bool,
        exact: bool,
        constant: Callable[[], Collection[str]],
    ) -> Verification:
        """Compare, see :meth:`onnx_simplify.runtime.reference.Reference.compare`."""
        simplified.stand_in = self.model.stand_in
        bounds = Bounds(
            tolerance=rtol if rtol is not None else (1e-2 if half else 1e-4),
            rounding=(5e-3 if half else 5e-6) if exact else float("inf"),
            exact=exact,
            strict=rtol is not None,
        )
        result = Verification(
            True, 0.0, bounds.tolerance, len(self.runs), [dict(r.sizes) for r in self.runs]
        )
        result.outputs = [self._compared(k) for k in range(len(self.names))]
        try:
            found = self._deployed(simplified)
        except Exception as error:
            result.passed, result.worst = False, float("inf")
            result.reason = f"the simplified model does not run: {first_line(error)}"
            return result
        inside = Inside(self, simplified, bounds)
        for k, name in enumerate(self.names):
            outputs = [outputs[k] for outputs in found]
            reason = self._judge(k, outputs, bounds, result, inside, found)
            result.worst = max(result.worst, result.outputs[k].error)
            if reason:
                result.passed, result.reason = False, f"output '{name}': {reason}"
                return result
        proven = constant() if self.mute else ()
        for k in self.mute:
            if self.names[k] not in proven:
                self._look_inside(k, inside, result)
            if not result.passed:
                break
        return result

    def _compared(self, output: int) -> Compared:
        """What there is to compare of an output."""
        arrays = [run.outputs[output] for run in self.runs]
        found = Compared(self.names[output])
        plain = [np.asarray(a) for a in arrays if not isinstance(a, (list, tuple))]
        found.elements = sum(a.size for a in plain)
        finite = [wide(a)[np.isfinite(wide(a))] for a in plain if a.dtype.kind in "fiub"]
        finite = [a for a in finite if a.size]
        if finite:
            found.low = float(min(a.min() for a in finite))
            found.high = float(max(a.max() for a in finite))
        sizes = self.runs[0].sizes
        runs = [a for a, run in zip(plain, self.runs, strict=False) if run.sizes == sizes]
        if any(a.shape != runs[0].shape for a in runs):
            found.varied = 1.0
        elif runs and runs[0].size:
            found.varied = float(1 - np.mean(np.all([a == runs[0] for a in runs], axis=0)))
        return found

    def _judge(
        self,
        output: int,
        outputs: list[np.ndarray],
        bounds: Bounds,
        result: Verification,
        inside: Inside,
        found: list[list[np.ndarray]],
    ) -> str:
        """Why an output is not right, or nothing; what was found goes into ``result``."""
        name, compared = self.names[output], result.outputs[output]
        for index, (run, b) in enumerate(zip(self.runs, outputs, strict=True)):
            a = run.outputs[output]
            gap, reason = self._verdict(output, a, b, bounds)
            if reason and self._optimized is not None:
                # The two can be further apart than the tolerance (means over large maps).
                other, still = self._verdict(output, self._optimized[index][output], b, bounds)
                gap, reason = (gap, reason) if still else (other, "")
            if not reason:
                compared.error = max(compared.error, gap.error)
                continue
            if self._same_rows(output, index, found, bounds):
                result.notes.append(
                    f"output '{name}' was compared as a set of rows: near-ties may come in "
                    "another order"
                )
                continue
            widened = self._widened(output, index, b, gap, bounds)
            if widened is None:
                compared.error = max(compared.error, gap.error)
                return reason
            compared.inside, different = inside.differs_before(name)
            if different:
                return different
            compared.error = max(compared.error, min(gap.error, bounds.tolerance))
            note = (
                f"the bound of output '{name}' was widened to {widened:.1e} of its magnitude: "
                "rounding moves it as much in the original"
            )
            if note not in result.notes:
                result.notes.append(note)
        return ""

    def _verdict(
        self, output: int, a: np.ndarray, b: np.ndarray, bounds: Bounds
    ) -> tuple[Gap, str]:
        """The error of an output, and why that is too much, if it is."""
        gap = compare(a, b, columns=bounds.exact)
        if gap.error > 0 and not gap.error <= bounds.tolerance and self.ties(self.names[output]):
            gap = compare(a, b, ties=True, columns=bounds.exact)
        reason = ""
        if not gap.error <= bounds.tolerance:
            reason = gap.reason or f"differs by {gap.error:.2g} of its magnitude"
        elif gap.whole > bounds.rounding and gap.whole > max(
            self._signal(output) * _SHARE, self._noise(output) * _MARGIN
        ):
            reason = f"differs by {gap.whole:.2g}, as much as between different inputs"
        return gap, reason

    def ties(self, name: str) -> bool:
        """Whether operators in front of a tensor jump."""
        if name not in self._ties:
            self._ties[name] = self.trace.jumps(name)
        return self._ties[name]

    def _widened(
        self, output: int, index: int, b: object, gap: Gap, bounds: Bounds
    ) -> float | None:
        """The relative error that rounding excuses, if that is enough to excuse this one."""
        a: object = self.runs[index].outputs[output]
        if gap.flips:
            return self._flips(output, index, gap)
        if isinstance(a, (list, tuple)) or gap.reason or not bounds.exact or bounds.strict:
            return None
        if gap.error <= bounds.tolerance:
            return None  # it is right, but for saying nothing
        array = wide(np.asarray(a))
        sizes = magnitudes(array)
        step = _step(self.trace, self.names[output])
        moved = (2 if self._rounds else _WIDER) * self._moved(output, index)
        moved = np.minimum(moved, _STEPS * sizes.max())
        allowed = np.maximum(moved + step, bounds.tolerance * sizes)
        with np.errstate(invalid="ignore"):
            gaps = np.nan_to_num(np.abs(array - wide(np.asarray(b))), nan=0.0)
        if (gaps > allowed).any():
            return None
        return float((allowed / sizes).max())

    def _flips(self, output: int, index: int, gap: Gap) -> float | None:
        """The share of integers that may differ, if that is enough: that of the original's own."""
        if not self.ties(self.names[output]):
            return None
        array = self.runs[index].outputs[output]
        others = self._others(index)
        share = 2 * max((compare(array, other[output]).flips for other in others), default=0.0)
        return share if gap.flips <= share else None

    def _others(self, index: int) -> list[list[np.ndarray]]:
        """Outputs of the original for inputs that differ from those of a run by rounding.

        Those of the same inputs with onnxruntime's optimisations come last.
        """
        if index not in self._rounded:
            feeds = self.runs[index].feeds
            session = Session(self.model)
            self._rounded[index] = []
            for seed in range(_TRIALS):
                # What is not a round number any more may be refused.
                with suppress(RunError):
                    found = session.run(_perturbed(feeds, np.random.default_rng(seed)))
                    self._rounded[index].append(found)
            if self._optimized is not None:
                self._rounded[index].append(self._optimized[index])
        return self._rounded[index]

    def _moved(self, output: int, index: int) -> np.ndarray:
        """How far rounding moves each column of an output of the original, in absolute terms."""
        moved = np.zeros(())
        for other in self._others(index):
            found = spread(self.runs[index].outputs[output], other[output])
            if found is not None:
                moved = np.maximum(moved, found)
        return moved

    def _noise(self, output: int) -> float:
        """How much an output of the original changes by mere rounding, relative."""
        first = self.runs[0].outputs[output]
        return max((compare(first, other[output]).whole for other in self._others(0)), default=0.0)

    def _signal(self, output: int) -> float:
        """How much an output varies between inputs, relative to its magnitude."""
        first, second = self.runs[0].outputs[output], self.runs[1].outputs[output]
        return compare(first, second, columns=False).whole

    def _same_rows(
        self, output: int, index: int, found: list[list[np.ndarray]], bounds: Bounds
    ) -> bool:
        """Whether rows differ in their order only, or no more than the original's own do."""
        if not self.trace.selects(self.names[output]):
            return False
        group = [
            k
            for k, name in enumerate(self.names)
            if self.trace.selects(name) and not isinstance(self.runs[index].outputs[k], list)
        ]
        # Those that do not have as many rows are no part of them.
        group = [
            k
            for k in group
            if np.shape(self.runs[index].outputs[k])[:1]
            == np.shape(self.runs[index].outputs[output])[:1]
        ]
        mine = [self.runs[index].outputs[k] for k in group]
        missing = unmatched(mine, [found[index][k] for k in group], bounds.tolerance)
        if not missing:
            return missing == 0
        own = [
            unmatched(mine, [other[k] for k in group], bounds.tolerance)
            for other in self._others(index)
        ]
        return missing <= 2 * max((count or 0 for count in own), default=0)

    def _look_inside(self, output: int, inside: Inside, result: Verification) -> None:
        """Compare what is in front of an output that says nothing.

        Raises:
            CannotVerifyError: there is nothing.
        """
        name, compared = self.names[output], result.outputs[output]
        empty = not compared.elements
        kind = "empty" if empty else "the same"
        if not inside.depends_on_inputs(name):
            # What the other model claims is that this is always so; it was, for all inputs.
            return
        if inside.is_same_computation(name):
            return
        compared.inside, reason = inside.differs(name)
        if reason:
            result.passed, result.reason, result.worst = False, reason, float("inf")
        elif compared.inside:
            result.notes.append(
                f"output '{name}' is {kind} for all inputs that were tried: compared "
                f"{', '.join(compared.inside[:4])} in front of it"
            )
        elif not empty and len(self.mute) < len(self.names):
            result.notes.append(
                f"output '{name}' is the same for all inputs that were tried, which says little"
            )
        else:
            raise CannotVerifyError(
                f"output '{name}' is {kind} for all inputs that were tried, which proves nothing: "
                "give input data for which it is not"
            )

    def _deployed(self, simplified: Model) -> list[list[np.ndarray]]:
        """Outputs for all inputs, optimised by onnxruntime unless that breaks the original too."""
        try:
            return self._outputs(simplified, optimize=True)
        except Exception:
            if self._optimized is not None:
                raise
            return self._outputs(simplified, optimize=False)

    def _outputs(self, model: Model, optimize: bool) -> list[list[np.ndarray]]:
        session = Session(model, optimize=optimize, always=False)
        if session.output_names != self.names:
            raise ValueError("the outputs have other names")
        return [session.run(run.feeds) for run in self.runs]

    @cached_property
    def _optimized(self) -> list[list[np.ndarray]] | None:
        """Outputs of the original with onnxruntime's optimisations; None if they break it."""
        try:
            return self._outputs(self.model, True)
        except Exception:
            return None


class Inside:
    """Compares tensors in front of outputs that both graphs have by one name.

    A tensor that exists in the result keeps its name as long as it has its value; what has other
    channels has another shape, and is passed over.
    """

    def __init__(self, judge: Judge, simplified: Model, bounds: Bounds):
        """Compare ``simplified`` with the original of ``judge``."""
        self._judge = judge
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
            mine, its = self._judge.trace.maker(tensor), self._trace.maker(tensor)
            if mine is None or its is None:
                if mine is not its:
                    return False
                continue
            if not _are_alike(self._judge.model, mine, self._simplified, its):
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
        judge = self._judge
        near = self._near(name)
        theirs = [n for n in near if self._trace.maker(n) is not None]
        runs = judge.runs[:2] + judge.runs[2:][-1:]
        try:
            before = _fetch(judge.model, near, runs)
            after = _fetch(self._simplified, theirs, runs)
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
                if right and varies > _MARGIN * self._bounds.tolerance:
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
        ties = self._judge.ties(tensor)
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
        trace = self._judge.trace
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
        runs = self._judge.runs[:2]
        try:
            optimized = _fetch(self._judge.model, [tensor], runs, optimize=True)[tensor]
            near = [
                Run(_perturbed(run.feeds, np.random.default_rng(seed)), [])
                for run in runs
                for seed in range(2)
            ]
            others = _fetch(self._judge.model, [tensor], near)[tensor]
        except Exception:
            return False
        for k, (a, b) in enumerate(zip(before[:2], after[:2], strict=True)):
            moved = [spread(a, o) for o in (optimized[k], *others[2 * k : 2 * k + 2])]
            largest = max((float(m.max()) for m in moved if m is not None), default=0.0)
            bound = min(_WIDER * largest, _STEPS * float(np.abs(wide(a)).max(initial=0.0)))
            bound += _step(self._judge.trace, tensor)
            if not np.abs(wide(a) - wide(b)).max(initial=0.0) <= bound:
                return False
        return True


def _step(trace: Trace, name: str) -> float:
    """Two steps of float32 among the numbers that the operator in front of a tensor works with."""
    return trace.step(name) * 2 * float(np.finfo(np.float32).eps)


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


def _fetch(
    model: Model, names: list[str], runs: Sequence[Run], *, optimize: bool = False
) -> dict[str, list[np.ndarray]]:
    """Values of inner tensors by name, one for each run."""
    if not names:
        return {}
    session = Session(model, names, optimize=optimize)
    values = [session.run(run.feeds, names) for run in runs]
    return {name: [found[k] for found in values] for k, name in enumerate(names)}


def _perturbed(feeds: Feeds, random: np.random.Generator) -> Feeds:
    """Inputs that differ by rounding."""
    return {
        n: (v * (1 + 3e-7 * random.standard_normal(v.shape))).astype(v.dtype)
        if v.dtype.kind == "f"
        else v
        for n, v in feeds.items()
    }
