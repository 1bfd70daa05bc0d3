"""Simplify many random graphs and check each: same function, and a second run changes nothing.

    python scripts/fuzz.py [FIRST LAST] [--spoil] [--jobs N] [--write]    (default: 0 2000)

--spoil spoils each result in one place instead: verification must not pass it.

Graphs that fail are saved as build/fuzz/SEED.onnx. Exit code 1 if any did.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from fuzzing import Outcome
    from spoiling import Spoiled


Result = TypeVar("Result")


def _check(seed: int) -> Outcome:
    from fuzzing import check

    return check(seed)


def _spoil(seed: int) -> list[Spoiled]:
    from spoiling import check_spoiled

    return check_spoiled(seed)


def _each(
    work: Callable[[int], Result], seeds: range, jobs: int | None
) -> Iterator[tuple[int, Result]]:
    """Results of the seeds from a pool of processes, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    with ProcessPoolExecutor(jobs) as pool:
        results = zip(seeds, pool.map(work, seeds, chunksize=8), strict=True)
        yield from track(
            results, total=len(seeds), console=console, disable=not console.is_terminal
        )


def _fail(seed: int, text: str) -> None:
    """Print what went wrong, and keep the graph."""
    import onnx

    from random_graphs import random_model

    folder = ROOT / "build" / "fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(random_model(seed), folder / f"{seed}.onnx")
    print(f"{seed}: {text[:300]}", flush=True)


def simplify_all(seeds: range, jobs: int | None) -> tuple[str, bool]:
    """Simplify the graphs; gives the counts in a sentence, and whether all are equal."""
    counts: Counter[str] = Counter()
    removed = quantized = 0
    for seed, outcome in _each(_check, seeds, jobs):
        counts[outcome.kind] += 1
        removed += outcome.removed > 0
        quantized += outcome.quantized
        if outcome.kind != "ok":
            _fail(seed, f"{outcome.kind}: {outcome.detail}")
    others = ", ".join(f"{count} {kind}" for kind, count in counts.items() if kind != "ok")
    text = (
        f"{len(seeds):,} graphs, {quantized:,} of them quantised: channels were removed from "
        f"{removed:,}, {counts['ok']:,} are equal" + (f", {others}." if others else ".")
    )
    return text, set(counts) <= {"ok"}


def spoil_all(seeds: range, jobs: int | None) -> tuple[str, bool]:
    """Spoil the results; gives the counts in a sentence, and whether verification saw all."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for seed, outcomes in _each(_spoil, seeds, jobs):
        for outcome in outcomes:
            counts[outcome.kind] += 1
            if outcome.kind == "missed":
                reasons[outcome.reason] += 1
                _fail(seed, f"{outcome.how}: {outcome.reason}: {outcome.detail}")
    wrong = counts["caught"] + counts["missed"]
    share = counts["missed"] / max(wrong, 1)
    why = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    text = (
        f"{wrong:,} spoiled results of {len(seeds):,} graphs: verification passed "
        f"{counts['missed']:,} of them ({share:.2%})" + (f": {why}." if why else ".")
    )
    return text, not counts["missed"]


def main() -> int:
    """Check the seeds given and report."""
    import publish

    parser = argparse.ArgumentParser(description="Check random graphs.")
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("last", type=int, nargs="?", default=2000)
    parser.add_argument("--spoil", action="store_true", help="spoil results and verify them")
    parser.add_argument("--write", action="store_true", help="write docs/robustness.md")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    options = parser.parse_args()
    work, section = (spoil_all, "spoil") if options.spoil else (simplify_all, "fuzz")
    text, good = work(range(options.first, options.last), options.jobs)
    print(text)
    if options.write:
        publish.replace_section(ROOT / "docs" / "robustness.md", section, text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
