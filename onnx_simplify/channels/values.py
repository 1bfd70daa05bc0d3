"""Levels of constancy, and the measured values of constant channels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

VARYING, MAP, UNIFORM = 0, 1, 2
"""Depends on the input; constant but not the same everywhere in space; one constant everywhere.

The minimum of two levels is their meet.
"""

# A channel counts as uniform in space when it differs by no more than rounding.
_ROUNDING = 4e-7
# Rules prove uniformity; a pooled average of equal numbers may still differ in the last bits.
_LOOSE = 1e-5
# So far may the mean of equal numbers be from that number: float32 loses a step of 6e-8 with each
# of ten thousand sums at worst. Where results are not to depend on that, much less.
_MEAN, _STRICT_MEAN = 1e-3, 4e-6
# Means that are off by no more than this share are not measured once more.
_OFF = 1e-6
# So much may a constant behind a mean change with the size of the input, for the same reason.
_DRIFT, _STRICT_DRIFT, _HALF_DRIFT = 2e-4, 1e-5, 2e-3


@dataclass(frozen=True)
class Seen:
    """What one run shows of a tensor; arrays are shaped like its layout.

    Attributes:
        dtype: type of its elements.
        shape: its shape.
        low: smallest value over the untracked axes, float64.
        high: largest value.
        values: all values, if some constant differs along those axes, else None.
        equal: which positions hold what they held in a first run, where that kept all values.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    low: np.ndarray
    high: np.ndarray
    values: np.ndarray | None
    equal: np.ndarray | None = None

    def after(self, first: Seen | None) -> Seen:
        """The same without values, compared with a first run: only one of them is kept."""
        if self.values is None:
            return self
        equal = None
        if first is not None and first.values is not None and first.shape == self.shape:
            axes = tuple(k for k, s in enumerate(self.low.shape) if s == 1)
            equal = (self.values == first.values).all(axis=axes, keepdims=True)
        return replace(self, values=None, equal=equal)

    @staticmethod
    def of(values: np.ndarray, constant: np.ndarray) -> Seen | None:
        """Look at a tensor.

        Args:
            values: the tensor.
            constant: positions said to be constant, bool, shaped like the layout.

        Returns:
            None if the tensor is not what its layout says, or holds no numbers.
        """
        if values.ndim != constant.ndim or values.size == 0 or values.dtype.kind in "OSU":
            return None
        low, high = _range(values, constant.shape)
        rounding = _ROUNDING if values.dtype.kind == "f" else 0.0
        kept = (constant & ~_uniform(low, high, rounding)).any()
        return Seen(values.dtype, values.shape, low, high, _wide(values) if kept else None)

    @property
    def is_exact(self) -> bool:
        """Whether the values are not subject to rounding: integers or booleans."""
        return self.dtype.kind in "iub"


@dataclass
class Constants:
    """Values read from two runs with different inputs, and from others of other sizes.

    Attributes:
        agreement: for each tensor, which positions had the same values in all runs.
        low: smallest value over the untracked axes, by tensor (shaped like the layout).
        high: largest value.
        exact: tensors of integers or booleans, whose values are not subject to rounding.
        arrays: the whole first measurement of tensors with constant, non-uniform positions.
        strict: leave constants alone that come out differently for every size, as means do.
    """

    agreement: dict[str, np.ndarray] = field(default_factory=dict)
    low: dict[str, np.ndarray] = field(default_factory=dict)
    high: dict[str, np.ndarray] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    exact: set[str] = field(default_factory=set)
    strict: bool = False

    def record(self, name: str, constant: np.ndarray, seen: Seen | None) -> None:
        """Record a first measurement.

        Args:
            name: the tensor.
            constant: positions said to be constant, bool, shaped like the layout.
            seen: what the run shows of it.
        """
        self.agreement[name] = np.zeros(constant.shape, bool)
        if seen is None or seen.low.shape != constant.shape:
            return
        if seen.is_exact:
            self.exact.add(name)
        low, high = seen.low, seen.high
        # Larger integers have no float64 of their own.
        agree = constant & (np.abs(low) < 2.0**53) & (np.abs(high) < 2.0**53)
        if seen.dtype.kind == "f":
            agree = constant & np.isfinite(low) & np.isfinite(high)
        self.agreement[name], self.low[name], self.high[name] = agree, low, high
        if seen.values is not None:
            self.arrays[name] = seen.values

    def confirm(self, name: str, seen: Seen | None, *, same_sizes: bool) -> None:
        """Withdraw positions that are not what they were in the first measurement.

        Args:
            name: the tensor.
            seen: what another run shows of it.
            same_sizes: whether the inputs had the same sizes; constants are then equal to the last
                bit.
        """
        agree = self.agreement[name]
        if not agree.any():
            return
        if seen is None or seen.low.shape != agree.shape:
            self.agreement[name] = np.zeros(agree.shape, bool)
            return
        low, high = self.low[name], self.high[name]
        slack = np.zeros(agree.shape)
        if not same_sizes and not self.is_exact(name):
            slack = self._drift(seen.dtype) * np.maximum(np.abs(low), np.abs(high))
        agree = agree & (np.abs(seen.low - low) <= slack) & (np.abs(seen.high - high) <= slack)
        if same_sizes and name in self.arrays:
            # Where nothing was kept to compare, nothing but uniform constants may agree.
            agree &= low == high if seen.equal is None else seen.equal
        self.agreement[name] = agree

    def adopt(
        self, name: str, low: np.ndarray, high: np.ndarray, where: np.ndarray, *, free: bool
    ) -> None:
        """Put what is known of a tensor in place of a measurement that rounds.

        The mean of equal numbers is that number, whatever runs at some sizes make of it. At the
        only size there is, what they make of it is what the original computes.

        Args:
            name: the tensor.
            low: smallest values, shaped like the layout; NaN where nothing is known.
            high: largest values.
            where: positions said to be uniform.
            free: whether they are means over free sizes.
        """
        # Levels are optimistic before anything is measured: a map may pass for uniform.
        where = where & _uniform(low, high, _LOOSE)
        mean = 0.0 if self.is_exact(name) else _STRICT_MEAN if self.strict else _MEAN
        slack = mean * np.maximum(np.abs(low), np.abs(high))
        close = (np.abs(self.low[name] - low) <= slack) & (np.abs(self.high[name] - high) <= slack)
        known = where if free or self.strict else where & ~self.agreement[name]
        self.low[name] = np.where(known, low, self.low[name])
        self.high[name] = np.where(known, high, self.high[name])
        trusted = self.agreement[name] if self.strict else self.agreement[name] | where
        self.agreement[name] = trusted & (close | ~where)

    def _drift(self, dtype: np.dtype) -> float:
        """How much a constant may change with the size of the input.

        The mean of equal numbers is that number, but for rounding, which grows with their count.
        Where it grows beyond this, the channel is better left alone.
        """
        if dtype.itemsize < 4:
            return _HALF_DRIFT
        return _STRICT_DRIFT if self.strict else _DRIFT

    def is_off(self, name: str, exact: np.ndarray) -> bool:
        """Whether a measurement is off by more than a few roundings somewhere.

        Args:
            name: the tensor.
            exact: what it should be, shaped like the layout; NaN where that is not known.
        """
        known = self.agreement[name] & np.isfinite(exact)
        return bool((np.abs(self.low[name] - exact) > _OFF * np.abs(exact))[known].any())

    def correct(self, name: str, seen: Seen) -> None:
        """Replace a measurement by another one of the same inputs, where the two are close."""
        slack = _MEAN * np.maximum(np.abs(self.low[name]), np.abs(self.high[name]))
        close = self.agreement[name] & (np.abs(seen.low - self.low[name]) <= slack)
        close &= np.abs(seen.high - self.high[name]) <= slack
        self.low[name] = np.where(close, seen.low, self.low[name])
        self.high[name] = np.where(close, seen.high, self.high[name])

    def is_exact(self, name: str) -> bool:
        """Whether the tensor's values are not subject to rounding."""
        return name in self.exact

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
        rounding = np.where(proven, _LOOSE, _ROUNDING) * (not self.is_exact(name))
        good = self.agreement[name] & _uniform(low, high, rounding)
        return np.where(good, (low + high) / 2, np.nan)


def _uniform(low: np.ndarray, high: np.ndarray, tolerance: float | np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return high - low <= tolerance * np.maximum(np.abs(low), np.abs(high))


def _range(values: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value over the axes that are untracked in ``shape`` (float64)."""
    axes = tuple(k for k, s in enumerate(shape) if s == 1)
    low = values.min(axis=axes, keepdims=True).astype(np.float64)
    return low, values.max(axis=axes, keepdims=True).astype(np.float64)


def _wide(values: np.ndarray) -> np.ndarray:
    """As float32, or float64 where that would lose digits."""
    wide = np.float64 if values.dtype.itemsize == 8 or values.dtype.kind in "iu" else np.float32
    return values.astype(wide, copy=False)


def reduce_to(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Combine a mask with `or` over the axes along which an operand of ``shape`` is broadcast."""
    lead = mask.ndim - len(shape)
    mask = np.asarray(mask.any(axis=tuple(range(lead)))) if lead > 0 else mask
    axes = tuple(a for a, s in enumerate(shape) if s == 1 and mask.shape[a] > 1)
    mask = np.asarray(mask.any(axis=axes, keepdims=True)) if axes else mask
    return np.broadcast_to(mask, shape)


def min_to(level: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The weakest level over axes that the output does not track; positions may then differ."""
    axes = tuple(a for a, s in enumerate(shape) if s == 1 and level.shape[a] > 1)
    if not axes:
        return level
    return np.minimum(level.min(axis=axes, keepdims=True), MAP)
