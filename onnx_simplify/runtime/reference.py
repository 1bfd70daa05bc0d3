"""Runs of the original model: inputs that it accepts, and what it makes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, islice

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.errors import CannotVerifyError, ModelError, first_line
from onnx_simplify.graph.edit import label
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.traits import OVERFLOWS
from onnx_simplify.runtime.difference import is_informative
from onnx_simplify.runtime.evidence import Evidence, Questions, look
from onnx_simplify.runtime.inputs import (
    STYLES,
    Feeds,
    InputSpec,
    alike,
    candidate_sizes,
    halved,
    input_specs,
    is_free,
    make_feeds,
    unlikely_sizes,
    varied,
)
from onnx_simplify.runtime.rounding import Rounding
from onnx_simplify.runtime.runs import Run
from onnx_simplify.runtime.session import Session
from onnx_simplify.runtime.trace import Trace
from onnx_simplify.runtime.verdict import Verification
from onnx_simplify.runtime.verify import Judge
from onnx_simplify.runtime.widen import needs_widening

_ATTEMPTS = 36
# Of those sizes, so many are tried with other than random values.
_FEW_SIZES = 4
# So many sizes that a model accepts are tried in search of one beside which it accepts others.
_LONELY = 4
# Seconds that a run may take before smaller sizes are tried.
_PATIENCE = 1.5
# Inputs are so much larger than usual in search of what overflows; tensors looked at together.
_LOUD = (100.0, -100.0, 10000.0, -10000.0)
_FEW = 16
# Inputs are scaled like this in search of outputs that are neither empty nor always the same.
_SCALES = (10.0, 40.0, 0.1, 255.0, 2000.0)


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
        questions: Questions | None = None,
    ):
        """Find inputs that the model accepts, and run it.

        Args:
            model: the model as loaded.
            input_shapes: sizes for inputs, by name.
            input_data: values for the first run, by input name.
            count: number of random inputs of the first sizes; two at least are made.
            questions: what to look at inside, see :func:`questions_for`.

        Raises:
            ModelError: the shapes or data do not fit the model's inputs.
            CannotVerifyError: the model does not run on any input that could be made.
        """
        self.model = model
        self.specs = input_specs(model, input_shapes)
        self.runs: list[Run] = []
        self.one_size = False
        self._questions = questions or {}
        session = self._open()
        self.names = session.output_names[: session.own]
        try:
            self._run(session, input_data, max(2, count))
        except CannotVerifyError:
            if model.stand_in or not needs_widening(model.structure()[0]):
                raise
            # There may be kernels, but no way to feed them.
            model.stand_in = True
            session = Session(model, self._questions)
            self._run(session, input_data, max(2, count))
        self._look_further(session)
        if session.is_random:
            # Noise depends on how many runs there were before.
            session = self._open()
            for run in self.runs:
                run.outputs = session.run(run.feeds, self.names)

    def _run(self, session: Session, data: Mapping[str, np.ndarray] | None, count: int) -> None:
        if data is not None:
            self._run_data(session, data, count)
        else:
            self._run_random(session, count)

    @cached_property
    def trace(self) -> Trace:
        """Questions about the original's nodes."""
        return Trace(self.model)

    def mute(self) -> list[int]:
        """Outputs that say nothing of the model: empty, or the same for all inputs so far."""
        return [
            k
            for k, name in enumerate(self.names)
            if not any(
                is_informative(self.runs[0].outputs[k], run.outputs[k])
                for run in self.runs[1:]
                if run.sizes == self.runs[0].sizes
            )
            and self.trace.depends_on_inputs(name)
        ]

    def _look_further(self, session: Session) -> None:
        """Look for inputs for which no output is empty or the same as for others.

        Detectors find nothing in noise, and what is saturated stays so. Runs that help are kept.
        """
        wanted = self.mute()
        for feeds in self._other_values() if wanted else ():
            try:
                outputs = session.run(feeds, self.names)
            except Exception:  # not for this model
                continue
            if not all(_is_finite(o) for o in outputs):
                continue
            self.runs.append(Run(feeds, outputs, dict(self.runs[0].sizes)))
            still = self.mute()
            if len(still) == len(wanted):
                self.runs.pop()
            wanted = still
            if not wanted:
                return

    def overflow(self) -> str:
        """Where ordinary or large inputs make infinity or NaN inside the original, in words.

        Only operators that can make them of ordinary numbers are looked at.
        """
        nodes = {n.outputs[0].name: n for n in self.model.graph.nodes if _may_overflow(n)}
        if not nodes:
            return ""
        try:
            session = Session(self.model, nodes)
            for scale in (1.0, *_LOUD):
                words = f" for inputs {abs(scale):g} times as large" if scale != 1 else ""
                feeds = {
                    n: (v * scale).astype(v.dtype) if v.dtype.kind == "f" and v.ndim > 1 else v
                    for n, v in self.runs[0].feeds.items()
                }
                for names in _batches(nodes, _FEW):
                    for name, values in zip(names, session.run(feeds, names), strict=True):
                        if not _is_finite(values):
                            node = nodes[name]
                            return f"{node.op} '{label(node)}' makes infinity or NaN{words}"
        except Exception:  # large inputs may be none
            return ""
        return ""

    def _other_values(self) -> Iterator[Feeds]:
        """Inputs of the first size with values of other kinds and magnitudes.

        What is a vector, a number or an integer may say how large something shall be: it changes
        by little.
        """
        first = self.runs[0].feeds
        counts = [n for n, v in first.items() if v.dtype.kind in "iu"]
        for sign, step in ((1, 1), (1, 2), (-1, -1)) if counts else ():
            wide = {n: sign * first[n].astype(np.int64) + step for n in counts}
            # Types without a sign know no negative numbers.
            yield first | {
                n: (np.abs(v) if first[n].dtype.kind == "u" else v).astype(first[n].dtype)
                for n, v in wide.items()
            }
        data = {n for n, v in first.items() if v.dtype.kind == "f" and v.ndim > 1}
        changes: list[Callable[[np.ndarray], np.ndarray]] = [
            *(partial(np.multiply, scale) for scale in _SCALES),
            np.abs,
            np.ones_like,
        ]
        for change in changes if data else ():
            for run in self.runs[:2]:
                yield {
                    n: np.asarray(change(v), v.dtype) if n in data else v
                    for n, v in run.feeds.items()
                }

    @cached_property
    def evidence(self) -> Evidence:
        """What runs show: two of the same sizes, then those where more than batches vary."""
        first = self.runs[0]
        others = [r for r in self.runs if not _differ_in_batch(r.feeds, first.feeds)]
        chosen = [first, self.runs[1], *others]
        return Evidence([r.feeds for r in chosen], [r.inner for r in chosen])

    def _open(self) -> Session:
        try:
            return Session(self.model, self._questions)
        except Exception as error:
            reason = first_line(error)
        if needs_widening(self.model.structure()[0]):
            self.model.stand_in = True
            try:
                return Session(self.model, self._questions)
            except Exception:  # the first reason is the better one
                self.model.stand_in = False
        raise CannotVerifyError(f"onnxruntime cannot load the original model: {reason}")

    def _run_random(self, session: Session, count: int) -> None:
        reason = ""
        sizes = list(islice(candidate_sizes(self.specs), _ATTEMPTS))
        attempts = [(s, STYLES[0]) for s in chain(sizes, unlikely_sizes(self.specs))]
        attempts += [(s, style) for style in STYLES[1:] for s in sizes[:_FEW_SIZES]]
        alone: list[list[Run]] = []
        for size, style in attempts:
            try:
                self.runs = self._some(session, size, style, count)
            except CannotVerifyError:
                raise
            except Exception as error:
                reason = reason or first_line(error)
                continue
            if not is_free(self.specs):
                return
            first = self.runs[0].sizes
            self._run_others(session, style, varied(self.specs, first, 3)[1:])
            if len(self.runs) == count:
                self._run_others(session, style, alike(first), most=1)
            if len(self.runs) > count:
                return
            # Perhaps it is too short for anything but itself.
            alone.append(self.runs)
            if len(alone) == _LONELY:
                break
        if not alone:
            raise CannotVerifyError(
                "the original model runs on no input that could be made up "
                f"({reason}): give input shapes or input data"
            )
        self.runs = alone[0]
        self.one_size = True

    def _some(
        self, session: Session, sizes: Mapping[str, int], style: str, count: int
    ) -> list[Run]:
        """Run so many inputs of a size, or of a smaller one if that takes long."""
        start = time.perf_counter()
        first = self._once(session, sizes, 0, style)
        while time.perf_counter() - start > _PATIENCE:
            smaller = halved(self.specs, first.sizes)
            start = time.perf_counter()
            try:
                first = self._once(session, smaller, 0, style) if smaller else first
            except Exception:  # then it must take long
                break
            if not smaller:
                break
        others = (self._once(session, first.sizes, k, style, first) for k in range(1, count))
        return [first, *others]

    def _run_others(
        self, session: Session, style: str, others: Sequence[dict[str, int]], most: int = 2
    ) -> None:
        """Run other sizes, up to so many that the model accepts."""
        for other in others:
            try:
                number = len(self.runs)
                self.runs.append(self._once(session, other, number, style, self.runs[0]))
            except Exception:  # this size is not for this model
                continue
            most -= 1
            if not most:
                return

    def _once(
        self,
        session: Session,
        sizes: Mapping[str, int],
        seed: int,
        style: str,
        first: Run | None = None,
    ) -> Run:
        feeds = make_feeds(self.model, self.specs, sizes, seed, style)
        found = self._looked(session, feeds, sizes, seed, first)
        if not all(_is_finite(o) for o in found.outputs):
            # Logarithms and roots want positive inputs.
            positive = {
                n: (1 / (1 + np.exp(-v.astype(np.float32)))).astype(v.dtype)
                if v.dtype.kind == "f"
                else v
                for n, v in feeds.items()
            }
            better = self._looked(session, positive, sizes, seed, first)
            if all(_is_finite(o) for o in better.outputs):
                return better
        return found

    def _looked(
        self,
        session: Session,
        feeds: Feeds,
        sizes: Mapping[str, int] | None,
        number: int,
        first: Run | None = None,
    ) -> Run:
        """Run, and look at what is asked, in two runs of one size and where more than batches vary.

        Args:
            session: a session of the original.
            feeds: inputs.
            sizes: sizes of free dimensions.
            number: how many runs come before.
            first: the first of them, unless this is it.
        """
        names = session.output_names
        if number > 1 and first is not None and _differ_in_batch(feeds, first.feeds):
            names = self.names
        values = session.run(feeds, names)
        named = zip(names, values, strict=True)
        asked = {n: v for n, v in named if n in self._questions}
        inner = look(asked, self._questions, None if first is None else first.inner)
        return Run(feeds, values[: session.own], dict(sizes or {}), inner)

    def _run_data(self, session: Session, data: Mapping[str, np.ndarray], count: int) -> None:
        feeds = _fit(self.specs, data)
        try:
            self.runs = [self._looked(session, feeds, None, 0)]
        except Exception as error:
            raise ModelError(
                f"input data: the original model rejects them: {first_line(error)}"
            ) from error
        shapes = {n: v.shape for n, v in feeds.items()}
        specs = [InputSpec(s.name, s.dtype, list(shapes[s.name])) for s in self.specs]
        for seed in range(1, count):
            other = make_feeds(self.model, specs, {}, seed)
            try:
                self.runs.append(self._looked(session, other, None, seed, self.runs[0]))
            except Exception:
                other = {n: v[..., ::-1].copy() if v.ndim else v for n, v in feeds.items()}
                try:
                    self.runs.append(self._looked(session, other, None, seed, self.runs[0]))
                except Exception:  # the values are such that no others do
                    self.runs.append(self._looked(session, feeds, None, seed, self.runs[0]))

    def compare(
        self,
        simplified: Model,
        rtol: float | None = None,
        *,
        half: bool = False,
        exact: bool = True,
        constant: Callable[[], Collection[str]] = tuple,
    ) -> Verification:
        """Run the simplified model, optimised as in deployment, on all inputs.

        Args:
            simplified: the model to check.
            rtol: bound on the relative error; by default 1e-4, in half precision 1e-2.
            half: whether the model computes in half precision.
            exact: whether both are meant to compute the same, so that an output may not be off by
                as much as it varies between inputs either, and each column counts for itself.
            constant: gives the outputs that are known to be constant; asked where some are the
                same for all inputs.

        Raises:
            CannotVerifyError: an output says nothing, and there is nothing else to compare.
        """
        return self._judge.compare(simplified, rtol, half=half, exact=exact, constant=constant)

    @cached_property
    def _judge(self) -> Judge:
        return Judge(Rounding(self.model, self.names, self.runs, self.trace), self.mute())


def _may_overflow(node: gs.Node) -> bool:
    """Whether a node can make infinity or NaN of ordinary numbers."""
    if node.domain or node.op not in OVERFLOWS or not node.outputs[0].name:
        return False
    # Divisors that are known are not zero, and small powers of ordinary numbers are ordinary.
    return node.op not in ("Div", "Pow") or not isinstance(node.inputs[1], gs.Constant)


def _differ_in_batch(feeds: Feeds, others: Feeds) -> bool:
    """Whether inputs have the same sizes but for their first axes."""
    return all(v.shape[1:] == others[n].shape[1:] for n, v in feeds.items())


def _batches(names: Iterable[str], count: int) -> Iterator[list[str]]:
    """Names in lists of so many."""
    rest = list(names)
    while rest:
        yield rest[:count]
        rest = rest[count:]


def _is_finite(array: object) -> bool:
    values = np.asarray(array) if not isinstance(array, (list, tuple)) else np.zeros(1)
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def _fit(specs: Sequence[InputSpec], data: Mapping[str, np.ndarray]) -> Feeds:
    """The data for each input, cast to its type."""
    feeds = {}
    for spec in specs:
        if spec.name not in data:
            raise ModelError(f"input data: no array for input '{spec.name}'")
        values = np.asarray(data[spec.name])
        if spec.ranked and values.ndim != len(spec.dims):
            raise ModelError(
                f"input data: '{spec.name}' has {values.ndim} dimensions, not {len(spec.dims)}"
            )
        if not np.can_cast(values.dtype, spec.dtype, "same_kind") and not (
            values.dtype.kind in "fiub" and spec.dtype.kind in "fiubV"
        ):
            raise ModelError(f"input data: '{spec.name}' holds {values.dtype}, not {spec.dtype}")
        if values.size == 0:
            raise ModelError(f"input data: '{spec.name}' is empty: nothing could be compared")
        feeds[spec.name] = values.astype(spec.dtype)
    return feeds
