"""Simplify many random graphs and check each: same function, and a second run changes nothing.

    python scripts/fuzz.py [FIRST LAST] [--jobs N] [--write]    (default: 0 2000)

Graphs that fail are saved as build/fuzz/SEED.onnx. Exit code 1 if any did.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from fuzzing import Outcome


def _check(seed: int) -> Outcome:
    from fuzzing import check

    return check(seed)


def main() -> int:
    """Check the seeds given and report."""
    import onnx
    from rich.console import Console
    from rich.progress import track

    import publish
    from random_graphs import random_model

    parser = argparse.ArgumentParser(description="Check random graphs.")
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("last", type=int, nargs="?", default=2000)
    parser.add_argument("--write", action="store_true", help="write docs/robustness.md")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    options = parser.parse_args()
    console = Console(stderr=True)
    counts: Counter[str] = Counter()
    removed = quantized = 0
    folder = ROOT / "build" / "fuzz"
    seeds = range(options.first, options.last)
    with ProcessPoolExecutor(options.jobs) as pool:
        outcomes = zip(seeds, pool.map(_check, seeds, chunksize=8), strict=True)
        for seed, outcome in track(
            outcomes, total=len(seeds), console=console, disable=not console.is_terminal
        ):
            counts[outcome.kind] += 1
            removed += outcome.removed > 0
            quantized += outcome.quantized
            if outcome.kind != "ok":
                folder.mkdir(parents=True, exist_ok=True)
                onnx.save(random_model(seed), folder / f"{seed}.onnx")
                print(f"{seed}: {outcome.kind}: {outcome.detail[:300]}", flush=True)
    others = ", ".join(f"{count} {kind}" for kind, count in counts.items() if kind != "ok")
    text = (
        f"{len(seeds):,} graphs, {quantized:,} of them quantised: channels were removed from "
        f"{removed:,}, {counts['ok']:,} are equal" + (f", {others}." if others else ".")
    )
    print(text)
    if options.write:
        publish.replace_section(ROOT / "docs" / "robustness.md", "fuzz", text)
    return 0 if set(counts) <= {"ok"} else 1


if __name__ == "__main__":
    sys.exit(main())
