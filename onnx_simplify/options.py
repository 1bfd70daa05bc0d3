"""How to simplify: every option, its default and what may be said of it, stated once.

The command line makes its flags from this; ``simplify`` and ``torch_bridge.simplify`` list the
names again in their signatures, for editors and type checkers to see, and a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from onnx_simplify.errors import ModelError
from onnx_simplify.planning.profiles import PROFILES

PASSES = ("fold_batchnorm", "propagate_bias", "remove_zeroed")
"""What ``skip`` may name."""


# What messages of the API call things, and what the command line does.
_OPTIONS = {
    "input data": "--input-data",
    "input_data": "--input-data",
    "input shapes": "--input-shape",
    "freeze_weights": "--freeze-weights",
    "lower threshold or raise rtol": "lower --threshold or raise --rtol",
    "the layers' stays": "--inspect",
}


def _option(default: Any, text: str) -> Any:
    """A field with a default (a type: an empty one of that type) and a line of help."""
    metadata = {"help": text}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Options:
    """How to simplify; see :func:`onnx_simplify.simplify` for the meaning of each.

    Raises:
        ModelError: a value makes no sense.
    """

    pinned: Collection[str] = _option(
        (), "tensor, node or initializer whose channels must stay (repeatable)"
    )
    skip: Collection[str] = _option((), f"leave out a pass: {', '.join(PASSES)} (repeatable)")
    bn_folding: Collection[tuple[str, str]] | None = _option(None, "pairs to fold")
    input_shapes: Mapping[str, Sequence[int]] = _option(
        dict, "shape to run the model with (repeatable)"
    )
    input_data: Mapping[str, np.ndarray] | None = _option(
        None, "arrays to run the model with, by input name"
    )
    verify: bool = _option(True, "do not compare the result with the original")
    rtol: float | None = _option(
        None,
        "bound on the error relative to an output's magnitude (default: 1e-4, half precision 1e-2)",
    )
    checks: int = _option(2, "random inputs to compare (default: 2; other sizes come on top)")
    benchmark: bool = _option(
        False,
        "time the original and the result in onnxruntime, interleaved; if the result is slower, "
        "remove nothing",
    )
    tune: bool = _option(False, "time several plans on this machine and take the fastest")
    threads: int = _option(1, "onnxruntime threads for --benchmark and --tune (default: 1)")
    target: str | None = _option(None, "processor to plan for (default: this machine)")
    channel_multiple: int | None = _option(
        None, "keep dead channels up to a multiple of N (default: the target's; 1: keep none)"
    )
    threshold: float = _option(
        0.0,
        "take channels for zero none of whose weights exceeds EPS times the layer's largest "
        "(default: 0, exact); --rtol bounds the difference",
    )
    auto_threshold: float | None = _option(
        None,
        "find the largest such EPS that changes no output by more than TOL of its magnitude on "
        "--input-data",
    )
    progress: Callable[[str], None] | None = None
    cautious: bool = False
    """Leave constants behind means alone: set where trusting them did not verify."""

    def __post_init__(self) -> None:
        """Take single names for lists of one, and complain of what makes no sense."""
        self.pinned = as_names(self.pinned)
        self.skip = as_names(self.skip)
        self.input_shapes = dict(self.input_shapes or {})
        for name in self.skip:
            if name not in PASSES:
                raise ModelError(f"unknown pass '{name}': choose from {', '.join(PASSES)}")
        checked_target(self.target)
        check_positive(
            rtol=self.rtol,
            channel_multiple=self.channel_multiple,
            threads=self.threads,
            auto_threshold=self.auto_threshold,
        )
        if not 0 <= self.threshold < 1:
            raise ModelError(
                f"threshold is {self.threshold}, but must be at least 0 and less than 1"
            )
        if self.auto_threshold is not None and self.threshold:
            raise ModelError("give a threshold or let it be found, not both")
        if self.auto_threshold is not None and self.input_data is None:
            raise ModelError(
                "a threshold can only be found on input_data: random inputs say little"
            )

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> Options:
        """The options among some arguments."""
        known = {f.name for f in fields(Options)}
        return Options(**{name: value for name, value in arguments.items() if name in known})

    @property
    def folds(self) -> bool:
        """Whether BatchNormalization is folded."""
        return "fold_batchnorm" not in self.skip

    @property
    def cuts(self) -> bool:
        """Whether channels are removed."""
        return "remove_zeroed" not in self.skip

    @property
    def zeros_only(self) -> bool:
        """Whether no constants but zeros are absorbed."""
        return "propagate_bias" in self.skip

    @property
    def absorbs(self) -> bool:
        """Whether any constants are absorbed: zeros only for the sake of what is removed."""
        return self.cuts or not self.zeros_only


def as_options(text: str) -> str:
    """A message of the Python interface, with the names that the command line has for things."""
    for name, option in _OPTIONS.items():
        text = text.replace(name, option)
    return text


def as_names(names: Collection[str]) -> Collection[str]:
    """The names; a single one need not be in a list."""
    return [names] if isinstance(names, str) else names


def check_positive(**numbers: float | None) -> None:
    """Check that the numbers that are given are positive.

    Raises:
        ModelError: one is not.
    """
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ModelError(f"{name} is {number}, but must be positive")


def checked_target(name: str | None) -> str | None:
    """The name, if it is a planner profile.

    Raises:
        ModelError: it is not.
    """
    if name not in (None, "auto", *PROFILES):
        raise ModelError(f"unknown target '{name}': choose from auto, {', '.join(PROFILES)}")
    return name
