"""Levels of constancy, and the measured values of constant channels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

VARYING, MAP, UNIFORM = 0, 1, 2
"""Depends on the input; constant but not the same everywhere in space; one constant everywhere.

The minimum of two levels is their meet.
"""

# A channel counts as uniform in space when it differs by no more than rounding.
_ROUNDING = 4e-7
# Rules prove uniformity; a pooled average of equal numbers may still differ in the last bits.
_LOOSE = 1e-5


@dataclass
class Constants:
    """Values read from two runs with different inputs.

    Attributes:
        agreement: for each tensor, which positions had the same values in both runs.
        low: smallest value over the untracked axes, by tensor (shaped like the layout).
        high: largest value.
        arrays: the whole first measurement of tensors with constant, non-uniform positions.
    """

    agreement: dict[str, np.ndarray] = field(default_factory=dict)
    low: dict[str, np.ndarray] = field(default_factory=dict)
    high: dict[str, np.ndarray] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def add(
        self, name: str, layout_shape: tuple[int, ...], first: np.ndarray, second: np.ndarray
    ) -> None:
        """Record a tensor measured twice, as arrays of the tensor's rank."""
        if first.ndim != len(layout_shape) or first.size == 0:
            self.agreement[name] = np.zeros(layout_shape, bool)
            return
        axes = tuple(k for k, s in enumerate(layout_shape) if s == 1)
        same = first == second if first.shape == second.shape else None
        if same is None:
            agree = np.zeros(layout_shape, bool)
        else:
            agree = same.all(axis=axes, keepdims=True)
        if not agree.any():
            self.agreement[name] = agree
            return
        first = np.asarray(first, np.float64 if first.dtype.itemsize == 8 else np.float32)
        low = first.min(axis=axes, keepdims=True).astype(np.float64)
        high = first.max(axis=axes, keepdims=True).astype(np.float64)
        agree &= np.isfinite(low) & np.isfinite(high)
        self.agreement[name], self.low[name], self.high[name] = agree, low, high
        if (agree & ~_uniform(low, high, _ROUNDING)).any():
            self.arrays[name] = first

    def confirm(self, name: str, layout_shape: tuple[int, ...], other: np.ndarray) -> None:
        """Withdraw positions whose values differ in a run with inputs of other sizes."""
        agree = self.agreement[name]
        if not agree.any():
            return
        if other.ndim != len(layout_shape) or other.size == 0:
            self.agreement[name] = np.zeros(layout_shape, bool)
            return
        axes = tuple(k for k, s in enumerate(layout_shape) if s == 1)
        low, high = self.low[name], self.high[name]
        slack = 1e-4 * np.maximum(np.abs(low), np.abs(high)) + 1e-30
        other = np.asarray(other, np.float64 if other.dtype.itemsize == 8 else np.float32)
        agree = agree & (np.abs(other.min(axis=axes, keepdims=True) - low) <= slack)
        self.agreement[name] = agree & (np.abs(other.max(axis=axes, keepdims=True) - high) <= slack)

    def agree(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Positions whose measurement does not contradict the rules: the same twice, and finite."""
        found = self.agreement.get(name)
        return np.ones(shape, bool) if found is None else found

    def scalar(self, name: str, shape: tuple[int, ...], proven: np.ndarray) -> np.ndarray:
        """The value of each position that is uniform in space, NaN elsewhere.

        Args:
            name: the tensor.
            shape: its layout's shape.
            proven: where the rules prove uniformity (there rounding is forgiven).
        """
        if name not in self.low:
            return np.full(shape, np.nan)
        low, high = self.low[name], self.high[name]
        good = self.agreement[name] & _uniform(low, high, np.where(proven, _LOOSE, _ROUNDING))
        return np.where(good, (low + high) / 2, np.nan)


def _uniform(low: np.ndarray, high: np.ndarray, tolerance: float | np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return high - low <= tolerance * np.maximum(np.abs(low), np.abs(high))
