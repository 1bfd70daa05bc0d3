"""The passes in order, with measurement and verification around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from onnx_simplify.channels.values import VARYING
from onnx_simplify.errors import CannotVerifyError, SimplifyError, VerificationError
from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.traits import AVERAGES
from onnx_simplify.options import PASSES, Options
from onnx_simplify.passes.clean import clean
from onnx_simplify.passes.fold_shapes import settle_sizes
from onnx_simplify.passes.zero_small import thresholds, zero_small
from onnx_simplify.planning.planner import Planner
from onnx_simplify.planning.profiles import Profile, alternatives, profile
from onnx_simplify.report import (
    Figures,
    Report,
    figures,
)
from onnx_simplify.runtime.benchmark import Timing, time_models
from onnx_simplify.runtime.evidence import Questions
from onnx_simplify.runtime.inputs import Feeds, candidate_sizes, input_specs
from onnx_simplify.runtime.reference import Reference
from onnx_simplify.schedule import Start, ask, may_ask, simplify_in_place, start

# No channel larger than this share of its layer is taken for zero unasked.
_LARGEST_THRESHOLD = 0.1
# A plan that is faster than the cost model's by less than this is not.
_NOISE = 0.01


@dataclass(frozen=True)
class Caution:
    """What to do less of where a result does not verify.

    Attributes:
        operators: the model has one of these.
        note: what it means.
        skip: a pass to leave out, if that is it.
    """

    operators: frozenset[str]
    note: str
    skip: str | None = None

    def applied(self, options: Options) -> Options | None:
        """The options with that; None if that is what they are already."""
        if self.skip is None:
            return None if options.cautious else replace(options, cautious=True)
        return (
            None if self.skip in options.skip else replace(options, skip={*options.skip, self.skip})
        )


# In turn. Means of equal numbers are off by what rounding makes of many sums. Folding rounds
# weights once more, which neither half precision nor sums that all but cancel forgive;
# onnxruntime's integer kernels do not take all constants.
CAUTION: tuple[Caution, ...] = (
    Caution(AVERAGES, "constants behind means left alone: absorbing them"),
    Caution(
        frozenset({"BatchNormalization"}),
        "BatchNormalization left alone: folding it",
        "fold_batchnorm",
    ),
    Caution(
        frozenset({"QuantizeLinear"}), "constants left alone: absorbing them", "propagate_bias"
    ),
)
# A file that grows by no more bytes than this has gained a few names.
_MARGIN = 1024
_HALF_PRECISION = ("float16", "bfloat16")


@np.errstate(all="ignore")
def run(original: Model, options: Options) -> tuple[Model, Report]:
    """Simplify a model.

    Args:
        original: the model as loaded; it is not modified.
        options: what to do.

    Returns:
        The simplified model and the report.

    Raises:
        ModelError: an option does not fit the model.
        CannotVerifyError: the original runs on no input and verification was asked for.
        VerificationError: the result differs.
    """
    begin = time.perf_counter()
    step = options.progress or (lambda text: None)
    target = profile(options.target, options.channel_multiple)
    step("analysing")
    begun, questions = _asked(original, options, target)
    step("running the original")
    reference, trouble = _reference(original, options, questions)
    original.release()
    if options.auto_threshold is not None:
        step("looking for a threshold")
        found = _largest_threshold(original, options, reference)
        rtol = options.auto_threshold if options.rtol is None else options.rtol
        options = replace(options, threshold=found, auto_threshold=None, rtol=rtol)
    task = _Task(original, options, reference, trouble, step, begun)
    try:
        model, report = task.carry_out(target)
    except VerificationError as error:
        operators = {n.op for n in original.graph.nodes}
        for caution in CAUTION:
            less = caution.applied(options) if operators & caution.operators else None
            if less is not None:
                model, report = run(original, less)
                reason = str(error).partition(": ")[2]
                report.notes.append(f"{caution.note} did not verify ({reason})")
                return model, report
        raise
    if report.after.bytes > report.before.bytes and options.cuts:
        model, report = task.smallest(target, model, report)
    if (options.benchmark or options.tune) and reference is not None:
        model, report = task.fastest(target, model, report)
    if reference is not None and reference.one_size:
        report.notes.append("run with one size only: no other that was tried is accepted")
    report.notes += _remarks(original, reference, report)
    if report.after.bytes > report.before.bytes + _MARGIN:
        report.notes.append("the file grows: constants that were computed are stored")
    report.seconds = time.perf_counter() - begin
    return model, report


def _asked(original: Model, options: Options, target: Profile) -> tuple[Start | None, Questions]:
    """What can be done before the original runs, and what to look at when it does."""
    if not may_ask(original, options):
        return None, {}
    begun = start(_working_copy(original, options), options, ())
    return begun, ask(begun, Planner(target), options, original)


def _feeds(reference: Reference | None) -> list[Feeds]:
    """The inputs of all runs."""
    return [] if reference is None else [run.feeds for run in reference.runs]


def _working_copy(original: Model, options: Options) -> Model:
    model = original.copy()
    model.pin(options.pinned)
    return model


@dataclass
class _Task:
    """A model to simplify according to one plan or several.

    Attributes:
        original: the model as loaded.
        options: what to do.
        reference: its runs; None if it does not run.
        trouble: why it does not.
        step: called with what comes next.
        begun: a copy that is ready for the first plan, if there is one.
    """

    original: Model
    options: Options
    reference: Reference | None
    trouble: str | None
    step: Callable[[str], None]
    begun: Start | None

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Shapes to count MACs for."""
        return _shapes(self.original, self.options, self.reference)

    @cached_property
    def before(self) -> Figures:
        """Figures of the original."""
        found = figures(self.original, self.shapes)
        found.bytes = self.original.source_bytes or found.bytes
        return found

    def carry_out(self, plan: Profile, skip: Collection[str] = ()) -> tuple[Model, Report]:
        """Simplify and verify, see :meth:`plan`.

        Raises:
            VerificationError: the result differs.
        """
        model, report = self.plan(plan, skip)
        self.verify(model, report)
        return model, report

    def plan(
        self, plan: Profile, skip: Collection[str] = (), *, keep_shared: bool = False
    ) -> tuple[Model, Report]:
        """Simplify.

        Args:
            plan: what the planner decides by.
            skip: passes to leave out besides those of the options.
            keep_shared: leave weights alone that several nodes share.
        """
        options = replace(self.options, skip={*self.options.skip, *skip})
        begun, self.begun = self.begun, None
        if begun is None or skip or keep_shared:
            model = _working_copy(self.original, options)
            model.keep_shared = keep_shared
            begun = start(model, options, _feeds(self.reference))
            self.original.observed.update(model.observed)
        report = Report(before=self.before, after=self.before)
        report.input_shapes = self.shapes
        report.target = plan.name
        if self.original.stand_in:
            report.notes.append(
                "run in float32: onnxruntime's CPU kernels do not cover this model's types"
            )
        if self.trouble is not None:
            report.notes.append(f"constants were not looked for: {self.trouble}")
        evidence = None if self.reference is None else self.reference.evidence
        if evidence is not None:
            evidence.strict = options.cautious
        simplify_in_place(begun, Planner(plan), evidence, report, options, self.step)
        model = begun.model
        if model.training_is_stale():
            report.notes.append(
                "training information was dropped: it is about weights that are gone or changed"
            )
        report.after = figures(model, self.shapes)
        self.original.release()
        return model, report

    def verify(self, model: Model, report: Report) -> None:
        """Compare a result with the original, if that was asked for, and enter the verdict.

        Raises:
            VerificationError: it differs.
        """
        options = self.options
        if self.reference is None or not options.verify:
            return
        self.step("verifying")
        found = report.verification = self.reference.compare(
            model,
            options.rtol,
            half=is_half(self.original),
            exact=not options.threshold,
            constant=lambda: constant_outputs(self.original, self.reference),
        )
        if not found.passed:
            advice = " (lower threshold or raise rtol)" if options.threshold else ""
            raise VerificationError(f"verification failed, nothing written: {found.reason}{advice}")

    def smallest(self, target: Profile, model: Model, report: Report) -> tuple[Model, Report]:
        """Look for a plan whose result is no larger than the original, if there is one.

        Maps and merged groups can outweigh what is removed from a very small model. The first plan
        that fits is taken; what does not fit is not verified either, unless none does.

        Args:
            target: what the first result was planned by.
            model: the first result.
            report: its report.
        """
        plain = replace(target, rearrange=False)
        plans: list[tuple[str, Profile, Collection[str], bool]] = [
            ("plain", plain, (), False),
            ("stand-ins", replace(plain, map_cost=float("inf")), (), False),
            ("shared", plain, (), True),
            ("cleaned", target, PASSES, False),
        ]
        made = {"planned": (model, report)}
        for name, plan, skip, keep_shared in plans:
            self.step(f"trying plan '{name}'")
            found, its = self.plan(plan, skip, keep_shared=keep_shared)
            if its.after.bytes <= report.before.bytes and self._passes(found, its):
                return self._chosen(name, found, its)
            made[name] = found, its
        for name in sorted(made, key=lambda name: made[name][1].after.bytes):
            if name == "planned" or self._passes(*made[name]):
                return self._chosen(name, *made[name])
        return model, report

    def _chosen(self, name: str, model: Model, report: Report) -> tuple[Model, Report]:
        report.plan = name
        if name == "cleaned":
            report.notes.append("nothing was removed: the file would be larger than before")
        return model, report

    def _passes(self, model: Model, report: Report) -> bool:
        """Whether a result verifies."""
        try:
            self.verify(model, report)
        except VerificationError:
            return False
        return True

    def fastest(self, target: Profile, model: Model, report: Report) -> tuple[Model, Report]:
        """Time the result, with ``tune`` those of other plans as well, and choose.

        A result that is slower than the original, beyond noise, gives way to the original, merely
        cleaned.

        Args:
            target: what the first result was planned by.
            model: the first result.
            report: its report.
        """
        made = {report.plan: (model, report)}
        if self.options.tune:
            for name, plan in alternatives(target).items():
                self._try(made, name, plan)
            self._try(made, "cleaned", target, PASSES)
        times = self._time(made)
        first = report.plan
        if times[first].low > times["dense"].high and "cleaned" not in made:
            self._try(made, "cleaned", target, PASSES)
            times = self._time(made)
        chosen = min(made, key=lambda name: times[name].median)
        if times[first].median <= times[chosen].median * (1 + _NOISE):
            chosen = first
        if times[chosen].low > times["dense"].high and "cleaned" in made:
            chosen = "cleaned"
        model, report = made[chosen]
        report.plan = chosen
        report.plans = {name: times[name] for name in made}
        report.benchmark = {"dense": times["dense"], "simplified": times[chosen]}
        if chosen == "cleaned":
            report.notes.append("nothing was removed: on this machine that would not be faster")
        return model, report

    def _try(
        self,
        made: dict[str, tuple[Model, Report]],
        name: str,
        plan: Profile,
        skip: Collection[str] = (),
    ) -> None:
        """Add the result of a plan, if it verifies and no other plan gave the same."""
        self.step(f"trying plan '{name}'")
        try:
            model, report = self.carry_out(plan, skip)
        except VerificationError:
            return
        if all(report.after != other.after for _, other in made.values()):
            made[name] = model, report

    def _time(self, made: Mapping[str, tuple[Model, Report]]) -> dict[str, Timing]:
        assert self.reference is not None
        self.step("benchmarking")
        return time_models(
            {"dense": self.original, **{name: model for name, (model, _) in made.items()}},
            self.reference.runs[0].feeds,
            threads=self.options.threads,
            progress=lambda done, total: self.step(f"benchmarking: round {done} of {total}"),
        )


def _largest_threshold(original: Model, options: Options, reference: Reference | None) -> float:
    """The largest threshold that keeps the outputs within ``auto_threshold``, by bisection.

    Raises:
        CannotVerifyError: the model does not run.
    """
    if reference is None:
        raise CannotVerifyError("a threshold cannot be found: the original model does not run")
    begun = start(original.copy(), options, _feeds(reference))
    begun.fold(options)
    base = begun.model
    known = thresholds(base, _LARGEST_THRESHOLD)
    low, high = -1, len(known) - 1
    while low < high:
        middle = (low + high + 1) // 2
        trial = base.copy()
        zero_small(trial, float(known[middle]))
        if reference.compare(trial, options.auto_threshold, exact=False).passed:
            low = middle
        else:
            high = middle - 1
    return float(known[low]) if low >= 0 else 0.0


def constant_outputs(model: Model, reference: Reference | None) -> list[str]:
    """Outputs that provably do not depend on the inputs, by name."""
    if reference is None:
        return []
    working = model.copy()
    clean(working)
    settle_sizes(working, _feeds(reference))
    facts = reference.evidence.measured(Facts(working))
    return [
        t.name
        for t in working.graph.outputs
        if t.name in facts.level and (facts.level[t.name] > VARYING).all()
    ]


def _remarks(original: Model, reference: Reference | None, report: Report) -> list[str]:
    """What a user should know of the model, its verification, and what holds channels back."""
    found = [] if report.verification is None else list(report.verification.notes)
    if original.overridable:
        count = sum(int(np.prod(t.dims)) for t in original.overridable.values())
        found.append(
            f"{len(original.overridable)} weights ({count:,} parameters) are graph inputs as well: "
            "a caller may replace them, so their channels stay; freeze_weights declares them final"
        )
    changed = report.channels_removed or report.after.parameters != report.before.parameters
    overflow = reference.overflow() if reference is not None and changed else ""
    if overflow:
        found.append(
            f"{overflow}: a result assumes finite values inside, for zero times infinity is NaN, "
            "and may differ where the original's are not"
        )
    if report.held_back:
        found.append(f"channels that could go stay: {report.held_back}; see the layers' stays")
    return found


def is_half(model: Model) -> bool:
    """Whether any weights have half precision."""
    return any(str(np.dtype(t.dtype)) in _HALF_PRECISION for t in model.initializers().values())


def _reference(
    model: Model, options: Options, questions: Questions
) -> tuple[Reference | None, str | None]:
    """Runs of the original, or why there are none (only if verification was not asked for)."""
    try:
        reference = Reference(
            model,
            input_shapes=options.input_shapes,
            input_data=options.input_data,
            count=options.checks,
            questions=questions,
        )
        return reference, None
    except CannotVerifyError as error:
        if options.verify:
            raise
        return None, str(error)


def _shapes(model: Model, options: Options, reference: Reference | None) -> dict[str, list[int]]:
    """Shapes to count MACs for."""
    if reference is not None:
        return {n: list(v.shape) for n, v in reference.runs[0].feeds.items()}
    try:
        specs = input_specs(model, options.input_shapes)
    except SimplifyError:
        return {}
    sizes = next(candidate_sizes(specs), {})
    return {s.name: [sizes[d] if isinstance(d, str) else d for d in s.dims] for s in specs}
