"""How to simplify: every option, stated once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

PASSES = ("fold_batchnorm", "propagate_bias", "remove_zeroed")
"""What ``skip`` may name."""


# What messages of the API call things, and what the command line does.
_OPTIONS = {
    "input data": "--input-data",
    "input shapes": "--input-shape",
    "freeze_weights": "--freeze-weights",
    "lower threshold or raise rtol": "lower --threshold or raise --rtol",
    "the layers' stays": "--inspect",
}


@dataclass
class Options:
    """How to simplify; see :func:`onnx_simplify.simplify` for the meaning of each."""

    pinned: Collection[str] = ()
    skip: Collection[str] = ()
    bn_folding: Collection[tuple[str, str]] | None = None
    input_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    input_data: Mapping[str, np.ndarray] | None = None
    verify: bool = True
    rtol: float | None = None
    checks: int = 2
    target: str | None = None
    channel_multiple: int | None = None
    benchmark: bool = False
    tune: bool = False
    threshold: float = 0.0
    auto_threshold: float | None = None
    threads: int = 1
    progress: Callable[[str], None] | None = None

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
