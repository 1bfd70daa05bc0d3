"""Compare two models by running both in onnxruntime on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice

import numpy as np

from onnx_simplify.errors import CannotVerifyError, ModelError, first_line
from onnx_simplify.graph.model import Model
from onnx_simplify.runtime.inputs import (
    STYLES,
    Feeds,
    InputSpec,
    alike,
    candidate_sizes,
    input_specs,
    is_free,
    make_feeds,
    unlikely_sizes,
    varied,
)
from onnx_simplify.runtime.session import Session
from onnx_simplify.runtime.widen import needs_widening

# Integer outputs such as arg-max may flip where two scores tie to within rounding.
_TIES = 1e-3
# So may values behind operators that jump; then so many positions of an output do not count.
_TIES_OF_VALUES = 1e-4
_JUMPS = frozenset(
    """ArgMax ArgMin Ceil Equal Floor Greater GreaterOrEqual Less LessOrEqual Mod
    NonMaxSuppression Round Sign TopK""".split()
)
# Activations are rounded to a few bits; an output may be off by as much as it is for inputs that
# differ by rounding, within a bound.
_COARSE = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})
_STEPS = 2e-2
_TRIALS = 8
_ATTEMPTS = 36
# Of those sizes, so many are tried with other than random values.
_FEW_SIZES = 4
# Some networks hardly react to their input: an output may not be off by more than this share of
# its variation between two inputs, unless that is rounding, which it may exceed by a margin.
_NOISE = 0.1
_MARGIN = 10


@dataclass
class Run:
    """One run of the original: inputs, outputs, and sizes of free dimensions."""

    feeds: Feeds
    outputs: list[np.ndarray]
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass
class Verification:
    """The result of a comparison.

    Attributes:
        passed: whether all outputs agree within the tolerance.
        worst: largest relative error: ``max |a - b| / max |a|`` per output and run.
        tolerance: the bound ``worst`` was held against.
        runs: number of inputs compared.
        sizes: sizes of free dimensions in each run.
        reason: what differs, when not passed.
    """

    passed: bool
    worst: float
    tolerance: float
    runs: int
    sizes: list[dict[str, int]]
    reason: str = ""


class Reference:
    """Runs of the original model, kept to compare simplified ones with.

    Attributes:
        model: the model.
        names: its outputs.
        specs: its inputs.
        runs: at least two runs of the same sizes, then runs of other sizes where any are free.
        one_size: whether sizes are free, but no others than the first were accepted.
    """

    def __init__(
        self,
        model: Model,
        *,
        input_shapes: Mapping[str, Sequence[int]] | None = None,
        input_data: Mapping[str, np.ndarray] | None = None,
        count: int = 2,
    ):
        """Find inputs that the model accepts, and run it.

        Args:
            model: the model as loaded.
            input_shapes: sizes for inputs, by name.
            input_data: values for the first run, by input name.
            count: number of random inputs of the first sizes; two at least are made.

        Raises:
            ModelError: the shapes or data do not fit the model's inputs.
            CannotVerifyError: the model does not run on any input that could be made.
        """
        self.model = model
        self.specs = input_specs(model, input_shapes)
        self.runs: list[Run] = []
        self.one_size = False
        self._noise: list[float] | None = None
        self._rounds = any(n.op in _COARSE for n in model.graph.nodes)
        self._ties = any(n.op in _JUMPS for n in model.graph.nodes)
        session = self._open()
        self.names = session.output_names
        try:
            self._run(session, input_data, max(2, count))
        except CannotVerifyError:
            if model.stand_in or not needs_widening(model.structure()[0]):
                raise
            # There may be kernels, but no way to feed them.
            model.stand_in = True
            self._run(Session(model), input_data, max(2, count))
        if session.is_random:
            # Noise depends on how many runs there were before.
            session = self._open()
            for run in self.runs:
                run.outputs = session.run(run.feeds)

    def _run(
        self, session: Session, data: Mapping[str, np.ndarray] | None, count: int
    ) -> None:
        if data is not None:
            self._run_data(session, data, count)
        else:
            self._run_random(session, count)

    @property
    def feeds(self) -> list[Feeds]:
        """Inputs for measuring: two of the same sizes, then those where more than batches vary."""
        first = self.runs[0]
        shapes = {n: v.shape[1:] for n, v in first.feeds.items()}
        other = [
            r.feeds
            for r in self.runs
            if any(v.shape[1:] != shapes[n] for n, v in r.feeds.items())
        ]
        return [first.feeds, self.runs[1].feeds, *other]

    def _open(self) -> Session:
        try:
            return Session(self.model)
        except Exception as error:
            reason = first_line(error)
        if needs_widening(self.model.structure()[0]):
            self.model.stand_in = True
            try:
                return Session(self.model)
            except Exception:  # the first reason is the better one
                self.model.stand_in = False
        raise CannotVerifyError(f"onnxruntime cannot load the original model: {reason}")

    def _run_random(self, session: Session, count: int) -> None:
        reason = ""
        sizes = list(islice(candidate_sizes(self.specs), _ATTEMPTS))
        attempts = [(s, STYLES[0]) for s in chain(sizes, unlikely_sizes(self.specs))]
        attempts += [(s, style) for style in STYLES[1:] for s in sizes[:_FEW_SIZES]]
        for size, style in attempts:
            try:
                self.runs = [self._once(session, size, seed, style) for seed in range(count)]
            except CannotVerifyError:
                raise
            except Exception as error:
                reason = reason or first_line(error)
                continue
            break
        if not self.runs:
            raise CannotVerifyError(
                "the original model runs on no input that could be made up "
                f"({reason}): give --input-shape or --input-data"
            )
        if is_free(self.specs):
            first = self.runs[0].sizes
            self._run_others(session, style, varied(self.specs, first, 3)[1:])
            if len(self.runs) == count:
                self._run_others(session, style, alike(first), most=1)
            self.one_size = len(self.runs) == count

    def _run_others(
        self, session: Session, style: str, others: Sequence[dict[str, int]], most: int = 2
    ) -> None:
        """Run other sizes, up to so many that the model accepts."""
        for other in others:
            try:
                self.runs.append(self._once(session, other, len(self.runs), style))
            except Exception:  # this size is not for this model
                continue
            most -= 1
            if not most:
                return

    def _once(self, session: Session, sizes: dict[str, int], seed: int, style: str) -> Run:
        feeds = make_feeds(self.model, self.specs, sizes, seed, style)
        outputs = session.run(feeds)
        if not all(_is_finite(o) for o in outputs):
            # Logarithms and roots want positive inputs.
            positive = {
                n: (1 / (1 + np.exp(-v.astype(np.float32)))).astype(v.dtype)
                if v.dtype.kind == "f"
                else v
                for n, v in feeds.items()
            }
            better = session.run(positive)
            if all(_is_finite(o) for o in better):
                return Run(positive, better, dict(sizes))
        return Run(feeds, outputs, dict(sizes))

    def _run_data(self, session: Session, data: Mapping[str, np.ndarray], count: int) -> None:
        feeds = _fit(self.specs, data)
        try:
            self.runs = [Run(feeds, session.run(feeds))]
        except Exception as error:
            raise ModelError(
                f"--input-data: the original model rejects it: {first_line(error)}"
            ) from error
        shapes = {n: v.shape for n, v in feeds.items()}
        specs = [InputSpec(s.name, s.dtype, list(shapes[s.name])) for s in self.specs]
        for seed in range(1, count):
            other = make_feeds(self.model, specs, {}, seed)
            try:
                self.runs.append(Run(other, session.run(other)))
            except Exception:
                other = {n: v[..., ::-1].copy() if v.ndim else v for n, v in feeds.items()}
                try:
                    self.runs.append(Run(other, session.run(other)))
                except Exception:  # the values are such that no others do
                    self.runs.append(Run(feeds, session.run(feeds)))

    def compare(
        self,
        simplified: Model,
        rtol: float | None = None,
        *,
        half: bool = False,
        exact: bool = True,
    ) -> Verification:
        """Run the simplified model, optimised as in deployment, on all inputs.

        Args:
            simplified: the model to check.
            rtol: bound on the relative error; by default 1e-4, in half precision 1e-2.
            half: whether the model computes in half precision.
            exact: whether both are meant to compute the same, so that an output may not be off by
                as much as it varies between inputs either.
        """
        simplified.stand_in = self.model.stand_in
        tolerance = rtol if rtol is not None else (1e-2 if half else 1e-4)
        rounding = (5e-3 if half else 5e-6) if exact else float("inf")
        result = Verification(
            True, 0.0, tolerance, len(self.runs), [dict(r.sizes) for r in self.runs]
        )
        try:
            self._judge(self._deployed(simplified), result, rounding)
        except Exception as error:
            result.passed, result.worst = False, float("inf")
            result.reason = f"the simplified model does not run: {first_line(error)}"
        return result

    def _judge(
        self, outputs_of: list[list[np.ndarray]], result: Verification, rounding: float
    ) -> None:
        """Compare outputs, up to the first that differs, and enter the verdict into ``result``.

        What counts is the original as it is or, where that differs, as onnxruntime optimises it:
        the two can be further apart than the tolerance (quantised models, means over large maps).
        """
        for index, (run, outputs) in enumerate(zip(self.runs, outputs_of, strict=True)):
            for k, (name, a, b) in enumerate(zip(self.names, run.outputs, outputs, strict=True)):
                gap, reason = self._verdict(k, a, b, result.tolerance, rounding)
                if reason and self._optimized is not None:
                    other, worse = self._verdict(
                        k, self._optimized[index][k], b, result.tolerance, rounding
                    )
                    gap, reason = (gap, reason) if worse else (other, "")
                if reason and self._rounds and gap <= min(_STEPS, 2 * self._jitter[k]):
                    reason = ""
                result.worst = max(result.worst, gap)
                if reason:
                    result.passed, result.reason = False, f"output '{name}': {reason}"
                    return

    def _verdict(
        self, output: int, a: np.ndarray, b: np.ndarray, tolerance: float, rounding: float
    ) -> tuple[float, str]:
        """The relative error of an output, and why that is too much, if it is."""
        gap, reason = difference(a, b, self._ties)
        if not gap <= tolerance:
            reason = reason or f"differs by {gap:.2g} of its magnitude"
        elif gap > rounding and gap > max(
            self._signal(output) * _NOISE, self._rounding(output) * _MARGIN
        ):
            reason = f"differs by {gap:.2g}, as much as between different inputs"
        return gap, reason

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

    def _rounding(self, output: int) -> float:
        """How much an output of the original changes by mere rounding, relative."""
        if self._noise is None:
            first = self.runs[0]
            feeds = _perturbed(first.feeds, np.random.default_rng(0))
            others = [Session(self.model).run(feeds)]
            if self._optimized is not None:
                others.append(self._optimized[0])
            self._noise = [
                max(difference(a, o[k])[0] for o in others) for k, a in enumerate(first.outputs)
            ]
        return self._noise[output]

    @cached_property
    def _jitter(self) -> list[float]:
        """How much each output changes where inputs change by rounding, relative.

        In a model that rounds activations to a few bits, now and then one of them goes to the other
        side. That is a whole step, and no error.
        """
        session, worst = Session(self.model), [0.0] * len(self.names)
        for index, run in enumerate(self.runs):
            others = [
                session.run(_perturbed(run.feeds, np.random.default_rng(seed)))
                for seed in range(_TRIALS)
            ]
            if self._optimized is not None:
                others.append(self._optimized[index])
            for k, a in enumerate(run.outputs):
                worst[k] = max(worst[k], *(difference(a, o[k])[0] for o in others))
        return worst

    def _signal(self, output: int) -> float:
        """How much an output varies between inputs, relative to its magnitude."""
        return difference(self.runs[0].outputs[output], self.runs[1].outputs[output])[0]


def difference(first: object, second: object, ties: bool = False) -> tuple[float, str]:
    """Relative error between two outputs, and what is wrong if it is not a matter of numbers.

    The error is ``max |a - b| / max |a|``; for integers and booleans, zero unless more than one in
    a thousand differs.

    Args:
        first: an array, or a list of them.
        second: what to compare with it.
        ties: leave out a ten-thousandth of the positions, those that differ most.
    """
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            return float("inf"), "sequences of different lengths"
        found = [difference(a, b, ties) for a, b in zip(first, second, strict=True)]
        return max(found, default=(0.0, ""))
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf"), f"{a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}"
    if a.size == 0:
        return 0.0, ""
    if a.dtype.kind not in "fV":
        share = float(np.mean(a != b))
        return (0.0, "") if share <= _TIES else (float("inf"), f"{share:.1%} of elements differ")
    wide = np.float64 if a.dtype.itemsize == 8 else np.float32
    a, b = a.astype(wide), b.astype(wide)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(
        a[~finite], b[~finite], equal_nan=True
    ):
        return float("inf"), "NaN or infinity at different places"
    if not finite.any():
        return 0.0, ""
    gaps = np.abs(a - b, where=finite, out=np.zeros_like(a))
    skip = int(gaps.size * _TIES_OF_VALUES) if ties else 0
    gap = float(np.partition(gaps, -1 - skip, axis=None)[-1 - skip] if skip else gaps.max())
    size = float(np.max(np.abs(a), where=finite, initial=0.0))
    return (gap / size if size > 0 else (0.0 if gap == 0 else float("inf"))), ""


def _perturbed(feeds: Feeds, random: np.random.Generator) -> Feeds:
    """Inputs that differ by rounding."""
    return {
        n: (v * (1 + 3e-7 * random.standard_normal(v.shape))).astype(v.dtype)
        if v.dtype.kind == "f"
        else v
        for n, v in feeds.items()
    }


def _is_finite(array: object) -> bool:
    values = np.asarray(array) if not isinstance(array, (list, tuple)) else np.zeros(1)
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def _fit(specs: Sequence[InputSpec], data: Mapping[str, np.ndarray]) -> Feeds:
    """The data for each input, cast to its type."""
    feeds = {}
    for spec in specs:
        if spec.name not in data:
            raise ModelError(f"--input-data: no array for input '{spec.name}'")
        values = np.asarray(data[spec.name])
        if spec.ranked and values.ndim != len(spec.dims):
            raise ModelError(
                f"--input-data: '{spec.name}' has {values.ndim} dimensions, not {len(spec.dims)}"
            )
        if not np.can_cast(values.dtype, spec.dtype, "same_kind") and not (
            values.dtype.kind in "fiub" and spec.dtype.kind in "fiubV"
        ):
            raise ModelError(
                f"--input-data: '{spec.name}' holds {values.dtype}, not {spec.dtype}"
            )
        if values.size == 0:
            raise ModelError(f"--input-data: '{spec.name}' is empty: nothing could be compared")
        feeds[spec.name] = values.astype(spec.dtype)
    return feeds
