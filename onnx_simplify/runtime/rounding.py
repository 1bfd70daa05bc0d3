"""How much rounding alone moves what the original computes."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property

import numpy as np

from onnx_simplify.errors import RunError
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.traits import COARSE
from onnx_simplify.runtime.difference import compare, spread
from onnx_simplify.runtime.runs import Run, perturbed
from onnx_simplify.runtime.session import Session
from onnx_simplify.runtime.trace import Trace

# Inputs that differ by rounding, for each run that is asked about.
_TRIALS = 8


class Rounding:
    """What is known of the original's rounding.

    Attributes:
        model: the original.
        names: its outputs.
        runs: its runs; the first two have the same sizes.
        trace: where its outputs come from.
        is_coarse: whether it has operators that round to few digits.
    """

    def __init__(self, model: Model, names: list[str], runs: list[Run], trace: Trace):
        """Learn from these runs."""
        self.model = model
        self.names = names
        self.runs = runs
        self.trace = trace
        self.is_coarse = any(n.op in COARSE for n in model.graph.nodes)
        self._ties: dict[str, bool] = {}
        self._rounded: dict[int, list[list[np.ndarray]]] = {}

    def ties(self, name: str) -> bool:
        """Whether operators in front of a tensor jump."""
        if name not in self._ties:
            self._ties[name] = self.trace.jumps(name)
        return self._ties[name]

    def others(self, index: int) -> list[list[np.ndarray]]:
        """Outputs of the original for inputs that differ from those of a run by rounding.

        Those of the same inputs with onnxruntime's optimisations come last.
        """
        if index not in self._rounded:
            feeds = self.runs[index].feeds
            session = Session(self.model)
            self._rounded[index] = []
            for seed in range(_TRIALS):
                # What is not a round number any more may be refused.
                with suppress(RunError):
                    found = session.run(perturbed(feeds, np.random.default_rng(seed)))
                    self._rounded[index].append(found)
            if self.optimized is not None:
                self._rounded[index].append(self.optimized[index])
        return self._rounded[index]

    def moved(self, output: int, index: int) -> np.ndarray:
        """How far rounding moves each column of an output of the original, in absolute terms."""
        moved = np.zeros(())
        for other in self.others(index):
            found = spread(self.runs[index].outputs[output], other[output])
            if found is not None:
                moved = np.maximum(moved, found)
        return moved

    def noise(self, output: int) -> float:
        """How much an output of the original changes by mere rounding, relative."""
        first = self.runs[0].outputs[output]
        return max((compare(first, other[output]).whole for other in self.others(0)), default=0.0)

    def signal(self, output: int) -> float:
        """How much an output varies between inputs, relative to its magnitude."""
        first, second = self.runs[0].outputs[output], self.runs[1].outputs[output]
        return compare(first, second, columns=False).whole

    def outputs(self, model: Model, optimize: bool) -> list[list[np.ndarray]]:
        """What a model makes of all inputs."""
        session = Session(model, optimize=optimize, always=False)
        if session.output_names != self.names:
            raise ValueError("the outputs have other names")
        return [session.run(run.feeds) for run in self.runs]

    @cached_property
    def optimized(self) -> list[list[np.ndarray]] | None:
        """Outputs of the original with onnxruntime's optimisations; None if they break it."""
        try:
            return self.outputs(self.model, True)
        except Exception:
            return None

    def step(self, name: str) -> float:
        """Two steps of float32 among the numbers that the operator in front works with."""
        return self.trace.step(name) * 2 * float(np.finfo(np.float32).eps)
