"""A few maps of which all others are linear combinations."""

from __future__ import annotations

import numpy as np

LARGEST_RATIO = 8
"""A channel stands for others that are up to so many times larger: rounding grows with the ratio.
"""

# A map counts as a combination of others up to this share of its largest value.
_RESIDUE = 1e-6


def basis(
    maps: np.ndarray, free: bool, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """A few rows of which all rows are linear combinations; None if there are not few.

    Rows are chosen greedily, each the one that those before explain least (QR decomposition with
    column pivoting, Golub 1965), and checked on all entries.

    Args:
        maps: float64 ``[rows, entries]``.
        free: whether a constant may be added to each combination.
        most: how many rows at most.

    Returns:
        Indices of the rows chosen, the combinations ``[chosen, rows]`` and the constants to add
        ``[rows]``.
    """
    centred = maps - maps.mean(axis=1, keepdims=True) if free else maps
    size = np.abs(maps).max(axis=1)
    rest = centred.copy()
    chosen: list[int] = []
    while (np.abs(rest).max(axis=1) > _RESIDUE * size).any():
        if len(chosen) == most:
            return None
        norms = np.linalg.norm(rest, axis=1)
        best = int(np.argmax(norms))
        chosen.append(best)
        direction = rest[best] / norms[best]
        rest -= np.outer(rest @ direction, direction)
    if not chosen:
        return None
    index = np.array(chosen)
    weights = np.linalg.lstsq(centred[index].T, centred.T, rcond=None)[0]
    error = np.abs(weights.T @ centred[index] - centred).max(axis=1)
    if (error > _RESIDUE * size).any() or np.abs(weights).max() > LARGEST_RATIO:
        return None
    offsets = maps.mean(axis=1) - weights.T @ maps[index].mean(axis=1) if free else 0 * size
    return index, weights, offsets
