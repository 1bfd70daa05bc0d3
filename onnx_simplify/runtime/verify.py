"""Compare two models by what they make of the same inputs.

Start reading from :meth:`Judge.compare`. An output that agrees to within the tolerance is fine.
Where it does not, the original itself is asked how much rounding moves it: run as onnxruntime
optimises it, and for inputs that differ by rounding. Where an output says nothing, or so little
that its bound had to be widened, tensors in front of it are compared that both graphs have by one
name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from onnx_simplify.errors import CannotVerifyError, first_line
from onnx_simplify.graph.model import Model
from onnx_simplify.runtime.difference import (
    Gap,
    compare,
    magnitudes,
    wide,
)
from onnx_simplify.runtime.inside import Inside
from onnx_simplify.runtime.rounding import Rounding
from onnx_simplify.runtime.rows import unmatched
from onnx_simplify.runtime.verdict import MARGIN, STEPS, WIDER, Bounds, Compared, Verification

# Some networks hardly react to their input: an output may not be off by more than this share of
# its variation between two inputs, unless that is rounding.
_SHARE = 0.1


class Judge:
    """Compares models with the original, whose own rounding it knows.

    Attributes:
        rounding: what is known of the original's rounding.
        names: its outputs.
        runs: its runs; the first two have the same sizes.
        trace: where its outputs come from.
        mute: which outputs say nothing for any of the inputs.
    """

    def __init__(self, rounding: Rounding, mute: list[int]):
        """Judge by the runs of an original."""
        self.rounding = rounding
        self.names, self.runs, self.trace = rounding.names, rounding.runs, rounding.trace
        self.mute = mute

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
        simplified.stand_in = self.rounding.model.stand_in
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
        inside = Inside(self.rounding, simplified, bounds)
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
            if reason and self.rounding.optimized is not None:
                # The two can be further apart than the tolerance (means over large maps).
                other, still = self._verdict(
                    output, self.rounding.optimized[index][output], b, bounds
                )
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
        if (
            gap.error > 0
            and not gap.error <= bounds.tolerance
            and self.rounding.ties(self.names[output])
        ):
            gap = compare(a, b, ties=True, columns=bounds.exact)
        reason = ""
        if not gap.error <= bounds.tolerance:
            reason = gap.reason or f"differs by {gap.error:.2g} of its magnitude"
        elif gap.whole > bounds.rounding and gap.whole > max(
            self.rounding.signal(output) * _SHARE, self.rounding.noise(output) * MARGIN
        ):
            reason = f"differs by {gap.whole:.2g}, as much as between different inputs"
        return gap, reason

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
        step = self.rounding.step(self.names[output])
        moved = (2 if self.rounding.is_coarse else WIDER) * self.rounding.moved(output, index)
        moved = np.minimum(moved, STEPS * sizes.max())
        allowed = np.maximum(moved + step, bounds.tolerance * sizes)
        with np.errstate(invalid="ignore"):
            gaps = np.nan_to_num(np.abs(array - wide(np.asarray(b))), nan=0.0)
        if (gaps > allowed).any():
            return None
        return float((allowed / sizes).max())

    def _flips(self, output: int, index: int, gap: Gap) -> float | None:
        """The share of integers that may differ, if that is enough: that of the original's own."""
        if not self.rounding.ties(self.names[output]):
            return None
        array = self.runs[index].outputs[output]
        others = self.rounding.others(index)
        share = 2 * max((compare(array, other[output]).flips for other in others), default=0.0)
        return share if gap.flips <= share else None

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
            for other in self.rounding.others(index)
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
            return self.rounding.outputs(simplified, optimize=True)
        except Exception:
            if self.rounding.optimized is not None:
                raise
            return self.rounding.outputs(simplified, optimize=False)
