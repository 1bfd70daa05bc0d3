"""Simplify many random graphs and check each: same function, and a second run changes nothing.

    python scripts/fuzz.py [FIRST LAST]        (default: 0 2000)

Graphs that fail are saved as build/fuzz/SEED.onnx. Exit code 1 if any did.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> int:
    """Check the seeds given and report."""
    import onnx
    from rich.console import Console
    from rich.progress import track

    from fuzzing import check
    from random_graphs import random_model

    parser = argparse.ArgumentParser(description="Check random graphs.")
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("last", type=int, nargs="?", default=2000)
    options = parser.parse_args()
    console = Console(stderr=True)
    counts: Counter[str] = Counter()
    removed = 0
    folder = ROOT / "build" / "fuzz"
    seeds = range(options.first, options.last)
    for seed in track(seeds, console=console, disable=not console.is_terminal):
        outcome = check(seed)
        counts[outcome.kind] += 1
        removed += outcome.removed > 0
        if outcome.kind != "ok":
            folder.mkdir(parents=True, exist_ok=True)
            onnx.save(random_model(seed), folder / f"{seed}.onnx")
            print(f"{seed}: {outcome.kind}: {outcome.detail[:300]}", flush=True)
    print(f"{len(seeds)} graphs: {dict(counts)}; something was removed from {removed}")
    return 0 if set(counts) <= {"ok"} else 1


if __name__ == "__main__":
    sys.exit(main())
