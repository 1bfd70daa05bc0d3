"""How far two arrays are apart, in relation to what they hold.

A tensor may hold numbers of different magnitudes side by side: coordinates up to 640 beside scores
up to 1. Relative to its largest number, an error of 0.06 in a score would be one of 1e-4; so
numbers are compared with the largest one of their column.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Columns are told apart along axes of up to so many positions, each with so many numbers.
_MOST_COLUMNS = 1024
_COLUMN = 32
# What float32 resolves beside the largest number of the tensor; a column counts as no smaller.
_SMALLEST = 1e-4
# Where operators jump, so many positions of an output do not count.
TIES_OF_VALUES = 1e-4
# So many integers, which are positions or classes, may be others.
TIES = 1e-3


@dataclass
class Gap:
    """Two arrays, compared.

    Attributes:
        error: the largest difference, relative to the magnitude of its column; infinite where the
            arrays cannot be compared number by number.
        whole: the largest difference relative to the largest magnitude of all.
        reason: what is different in kind, such as types or shapes.
        flips: the share of integers or booleans that differ.
    """

    error: float = 0.0
    whole: float = 0.0
    reason: str = ""
    flips: float = 0.0


def compare(first: object, second: object, *, ties: bool = False, columns: bool = True) -> Gap:
    """Compare two outputs.

    Args:
        first: an array, or a list of them; magnitudes are its.
        second: what to compare with it.
        ties: leave out a ten-thousandth of the positions, those that differ most, and forgive one
            in a thousand integers.
        columns: relate differences to columns' magnitudes, see :func:`magnitudes`.
    """
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            return _unlike("sequences of different lengths")
        found = [
            compare(a, b, ties=ties, columns=columns) for a, b in zip(first, second, strict=True)
        ]
        return max(found, key=lambda gap: gap.error, default=Gap())
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or a.dtype != b.dtype:
        return _unlike(f"{a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}")
    if a.size == 0:
        return Gap()
    if a.dtype.kind not in "fV":
        flips = float(np.mean(a != b))
        if flips <= (TIES if ties else 0.0):
            return Gap(flips=flips)
        return Gap(float("inf"), float("inf"), f"{flips:.1%} of elements differ", flips)
    a, b = wide(a), wide(b)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(
        a[~finite], b[~finite], equal_nan=True
    ):
        return _unlike("NaN or infinity at different places")
    if not finite.any():
        return Gap()
    gaps = np.abs(a - b, where=finite, out=np.zeros_like(a))
    size = float(np.max(np.abs(a), where=finite, initial=0.0))
    whole = float(gaps.max())
    if whole == 0:
        return Gap()
    if size == 0:
        return Gap(float("inf"), float("inf"))
    if columns:
        gaps = gaps / magnitudes(a)
    else:
        gaps = gaps / size
    skip = int(gaps.size * TIES_OF_VALUES) if ties else 0
    error = float(np.partition(gaps, -1 - skip, axis=None)[-1 - skip] if skip else gaps.max())
    return Gap(error, min(whole / size, error))


def difference(first: object, second: object, ties: bool = False) -> tuple[float, str]:
    """Relative error between two outputs, and what is wrong if it is not a matter of numbers.

    The error is ``max |a - b| / max |a|``, of integers and booleans zero or infinite.

    Args:
        first: an array, or a list of them.
        second: what to compare with it.
        ties: as for :func:`compare`.
    """
    gap = compare(first, second, ties=ties, columns=False)
    return gap.error, gap.reason


def magnitudes(array: np.ndarray) -> np.ndarray:
    """The largest finite magnitude in the column of each number.

    Columns run along axis 1 and along the last one, where these have no more than 1024 positions
    and each holds 32 numbers at least: fewer say little of what is small there.

    Args:
        array: floating point, with a number that is neither zero nor infinite.

    Returns:
        An array that broadcasts to ``array``, positive.
    """
    sizes = np.where(np.isfinite(array), np.abs(array), 0)
    largest = sizes.max()
    found = np.full((1,) * array.ndim, largest)
    for axis in sorted({1, array.ndim - 1}) if array.ndim > 1 else ():
        count = array.shape[axis]
        if 1 < count <= _MOST_COLUMNS and array.size // count >= _COLUMN:
            others = tuple(k for k in range(array.ndim) if k != axis)
            found = np.minimum(found, sizes.max(axis=others, keepdims=True))
    return np.maximum(found, _SMALLEST * largest)


def spread(first: object, second: object) -> np.ndarray | None:
    """How far apart two outputs are, column by column: the largest difference of each.

    Returns:
        An array that broadcasts to ``first``; None where they cannot be compared.
    """
    if isinstance(first, (list, tuple)) or isinstance(second, (list, tuple)):
        return None
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or a.dtype.kind not in "fV" or a.size == 0:
        return None
    a, b = wide(a), wide(b)
    with np.errstate(invalid="ignore"):
        gaps = np.nan_to_num(np.abs(a - b), nan=0.0, posinf=0.0)
    largest = gaps.max()
    return magnitudes(gaps) if largest > 0 else np.zeros((1,) * a.ndim)


def is_informative(first: object, second: object) -> bool:
    """Whether an output says something of what a model computes: not empty, not always the same.

    Args:
        first: the output for one input.
        second: the output for another one.
    """
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) != len(second) or any(
            is_informative(a, b) for a, b in zip(first, second, strict=True)
        )
    a, b = np.asarray(first), np.asarray(second)
    if a.size == 0 and b.size == 0:
        return False
    return a.shape != b.shape or not np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def wide(array: np.ndarray) -> np.ndarray:
    """The numbers as float32, or as float64 if that is what they are."""
    return array.astype(np.float64 if array.dtype.itemsize == 8 else np.float32)


def _unlike(reason: str) -> Gap:
    return Gap(float("inf"), float("inf"), reason)
