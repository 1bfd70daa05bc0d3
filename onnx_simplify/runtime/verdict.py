"""What a comparison is held against, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, field

STEPS = 2e-2
"""Rounding of the original excuses no more than this share of an output, what float32 resolves in
front of it aside: an original that is never twice the same would excuse everything.
"""
MARGIN = 10
"""By so much an error may exceed what is known as noise."""
WIDER = 4
"""Where rounding moves an output by more than is allowed, it may be off by so many times that much.
"""


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
