"""Time models in onnxruntime against each other, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnx_simplify.graph.model import Model
from onnx_simplify.runtime.inputs import Feeds
from onnx_simplify.runtime.session import Session


@dataclass(frozen=True)
class Timing:
    """Milliseconds per run: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def time_models(
    models: Mapping[str, Model],
    feeds: Feeds,
    *,
    threads: int = 1,
    rounds: int = 15,
    warmup: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Run all models in turn with onnxruntime's default optimisations, see :func:`time_calls`.

    Args:
        models: models by name; all take the same inputs.
        feeds: the inputs.
        threads: intra-op threads.
        rounds: counted rounds.
        warmup: rounds before these.
        progress: called with (round, total) after each round.

    Returns:
        Timings by name.
    """
    sessions = {
        name: Session(model, threads=threads, optimize=True) for name, model in models.items()
    }
    calls = {name: partial(session.run, feeds) for name, session in sessions.items()}
    return time_calls(calls, rounds=rounds, warmup=warmup, progress=progress)


def time_calls(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Make all calls in turn, once in every round, in an order that changes from round to round.

    In a fixed order each would always find the caches as the same other one has left them.

    Args:
        calls: what to time, by name.
        rounds: counted rounds.
        warmup: rounds before these.
        progress: called with (round, total) after each round.

    Returns:
        Timings by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = np.random.default_rng(0)
    names = list(calls)
    for done in range(warmup + rounds):
        for place in order.permutation(len(names)):
            name = names[place]
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
        if progress is not None:
            progress(done + 1, warmup + rounds)
    found = {}
    for name, values in seconds.items():
        low, median, high = np.percentile(np.array(values[warmup:]) * 1e3, [25, 50, 75])
        found[name] = Timing(float(median), float(low), float(high), rounds)
    return found
