"""Runs of a model, kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_simplify.channels.values import Seen
from onnx_simplify.graph.model import Model
from onnx_simplify.runtime.inputs import Feeds
from onnx_simplify.runtime.session import Session


@dataclass
class Run:
    """One run of the original: inputs, outputs, sizes of free dimensions, and what was inside."""

    feeds: Feeds
    outputs: list[np.ndarray]
    sizes: dict[str, int] = field(default_factory=dict)
    inner: dict[str, Seen | None] = field(default_factory=dict)


def fetch(
    model: Model, names: list[str], runs: Sequence[Run], *, optimize: bool = False
) -> dict[str, list[np.ndarray]]:
    """Values of inner tensors by name, one for each run."""
    if not names:
        return {}
    session = Session(model, names, optimize=optimize)
    values = [session.run(run.feeds, names) for run in runs]
    return {name: [found[k] for found in values] for k, name in enumerate(names)}


def perturbed(feeds: Feeds, random: np.random.Generator) -> Feeds:
    """Inputs that differ by rounding."""
    return {
        n: (v * (1 + 3e-7 * random.standard_normal(v.shape))).astype(v.dtype)
        if v.dtype.kind == "f"
        else v
        for n, v in feeds.items()
    }
