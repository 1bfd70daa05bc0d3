"""Compare outputs that are sets of rows: those behind TopK and NonMaxSuppression.

Rows are sorted by a score, or chosen by it. Where scores all but tie, rounding decides which comes
first, or is in at all, in the original as well; the boxes, scores and labels of a row go together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_simplify.runtime.difference import magnitudes, wide

# So many rows out of place can be searched, each among all others.
_MOST = 4096


def unmatched(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], tolerance: float
) -> int | None:
    """How many rows of one set are not in the other.

    Args:
        first: the outputs that make up the rows: of equal sizes along their first axes.
        second: what to compare with them.
        tolerance: how much numbers may differ, relative to the largest of their column.

    Returns:
        The larger of both numbers, counting rows that one set has more of; None if these are no
        rows, or too many are out of place.
    """
    if len(first) != len(second) or any(
        a.dtype != b.dtype or a.ndim != b.ndim for a, b in zip(first, second, strict=True)
    ):
        return None
    counts = [_unmatched(first, second, tolerance, depth) for depth in (1, 2)]
    return min((count for count in counts if count is not None), default=None)


def _unmatched(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], tolerance: float, depth: int
) -> int | None:
    """As :func:`unmatched`, for rows along axis ``depth - 1``, those before it being batches."""
    for arrays in (first, second):
        leads = {a.shape[:depth] for a in arrays}
        if len(leads) != 1 or len(leads.pop()) < depth:
            return None
    batches = first[0].shape[: depth - 1]
    if batches != second[0].shape[: depth - 1]:
        return None
    if any(a.shape[depth:] != b.shape[depth:] for a, b in zip(first, second, strict=True)):
        return None
    total = 0
    for batch in np.ndindex(*batches):
        found = _search([a[batch] for a in first], [b[batch] for b in second], tolerance)
        if found is None:
            return None
        total += found
    return total


def _search(first: list[np.ndarray], second: list[np.ndarray], tolerance: float) -> int | None:
    """As :func:`unmatched`, for rows along the first axis."""
    a, b = _columns(first), _columns(second)
    bound = np.concatenate(
        [
            _bound(x, tolerance).reshape(-1)
            if x.dtype.kind in "fV" and x.size
            else np.zeros(int(np.prod(x.shape[1:])))
            for x in first
        ]
    )
    common = min(len(a), len(b))
    apart = (np.abs(a[:common] - b[:common]) > bound).any(axis=1)
    left = np.concatenate([a[:common][apart], a[common:]])
    right = np.concatenate([b[:common][apart], b[common:]])
    if max(len(left), len(right)) > _MOST:
        return None
    free = np.ones(len(right), bool)
    missing = 0
    for row in left:
        fits = np.flatnonzero(free & (np.abs(right - row) <= bound).all(axis=1))
        if fits.size:
            free[fits[0]] = False
        else:
            missing += 1
    return max(missing, int(free.sum()))


def _columns(arrays: list[np.ndarray]) -> np.ndarray:
    """All rows, as float64 ``[rows, numbers]``; integers as far as float64 holds them."""
    parts = [a.reshape(len(a), int(np.prod(a.shape[1:]))).astype(np.float64) for a in arrays]
    return np.nan_to_num(np.concatenate(parts, axis=1))


def _bound(array: np.ndarray, tolerance: float) -> np.ndarray:
    """How much each number of a row may differ."""
    flat = wide(array).reshape(len(array), -1)
    if not np.isfinite(flat).any() or not np.abs(np.nan_to_num(flat)).any():
        return np.zeros(flat.shape[1])
    return np.broadcast_to(tolerance * magnitudes(flat), flat.shape).max(axis=0)
