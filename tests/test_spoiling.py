"""Spoiled results: verification sees nearly all of them."""

from collections import Counter

import pytest

from spoiling import check_spoiled


def shares(seeds: range) -> tuple[int, float]:
    """How many spoiled results compute something else, and the share that passes verification."""
    counts = Counter(o.kind for seed in seeds for o in check_spoiled(seed))
    wrong = counts["caught"] + counts["missed"]
    return wrong, counts["missed"] / max(wrong, 1)


def test_spoiled_results_do_not_verify():
    wrong, missed = shares(range(20, 60))
    assert wrong > 50
    assert missed == 0


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_most_of_many_spoiled_results_do_not_verify(start):
    wrong, missed = shares(range(start, start + 100))
    assert wrong > 150
    # Some are wrong only for inputs that nobody can make up.
    assert missed < 0.05
