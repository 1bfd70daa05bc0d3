"""How often the expensive things are done in one run, which no timing shows reliably."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import pytest

import onnx_simplify
from build import Graph, pruned
from onnx_simplify import schedule
from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph import shapes
from onnx_simplify.graph.model import Model
from onnx_simplify.runtime.session import Session

WATCHED = {
    "facts": (Facts, "__init__"),
    "levels": (Facts, "_find_levels"),
    "backward passes": (Facts, "need"),
    "shape inferences": (shapes, "_infer"),
    "messages": (Model, "structure"),
    "copies": (Model, "copy"),
    "sessions": (Session, "__init__"),
    "runs": (Session, "run"),
}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    found: Counter[str] = Counter()

    def watched(what: str, function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            found[what] += 1
            return function(*arguments, **options)

        return call

    for what, (owner, name) in WATCHED.items():
        monkeypatch.setattr(owner, name, watched(what, getattr(owner, name)))
    yield found


def residual(blocks: int, *, static: bool) -> onnx.ModelProto:
    """A residual network with BatchNormalization, half of its filters pruned."""
    g = Graph()
    random = np.random.default_rng(0)

    def layer(x: str, inputs: int, outputs: int, kernel: int) -> str:
        dead = random.permutation(outputs)[: outputs // 2]
        weight = pruned(g.normal(outputs, inputs, kernel, kernel), dead)
        return g.batchnorm(g.conv(x, weight, pads=[kernel // 2] * 4), outputs)

    x = g.input("image", [1, 3, 16, 16] if static else ["n", 3, 16, 16])
    x = g.op("Relu", layer(x, 3, 64, 3))
    for _ in range(blocks):
        y = g.op("Relu", layer(x, 64, 32, 1))
        y = g.op("Relu", layer(y, 32, 32, 3))
        x = g.op("Relu", g.op("Add", layer(y, 32, 64, 1), x))
    x = g.op("Flatten", g.op("GlobalAveragePool", x))
    g.output(g.gemm(x, g.normal(10, 64), g.normal(10)))
    return g.model()


# However long the network is; sums that are split take one more analysis, and sizes that are
# computed one more copy, to count with. Two inputs of one size, and one of another where sizes are
# free, are run through the original and through the result.
MOST = {
    "facts": 2,
    "levels": 3,
    "backward passes": 6,
    "shape inferences": 7,
    "messages": 13,
    "copies": 2,
    "sessions": 2,
}


@pytest.mark.parametrize("blocks", [2, 16])
@pytest.mark.parametrize("static", [True, False])
def test_what_one_run_does(counts, blocks, static):
    _, report = onnx_simplify.simplify(residual(blocks, static=static), target="avx512")
    assert report.channels_removed > 60 and report.plan == "planned"
    assert counts["runs"] == (4 if static else 6)
    assert {what: n for what, n in counts.items() if n > MOST.get(what, n)} == {}


def test_what_the_sample_takes(counts, sample_model):
    _, report = onnx_simplify.simplify(sample_model, target="avx512")
    assert report.channels_removed > 60 and report.plan == "planned"
    assert {what: n for what, n in counts.items() if n > MOST.get(what, n)} == {}


def test_large_weights_are_not_folded_beside_the_running_original(counts, monkeypatch):
    model = residual(2, static=True)
    small, _ = onnx_simplify.simplify(model, target="avx512")
    counts.clear()
    monkeypatch.setattr(schedule, "_LARGEST_COPY", 0)
    asked: list[set[str]] = []
    opened = Session.__init__

    def open_session(self: Session, model: Model, *arguments: object, **options: object) -> None:
        asked.append({n.op for n in model.graph.nodes})
        opened(self, model, *arguments, **options)

    monkeypatch.setattr(Session, "__init__", open_session)
    large, _ = onnx_simplify.simplify(model, target="avx512")
    assert [n.op_type for n in large.graph.node] == [n.op_type for n in small.graph.node]
    assert [list(t.dims) for t in large.graph.initializer] == [
        list(t.dims) for t in small.graph.initializer
    ]
    # All that was to be known was read in the original's runs: there are no others.
    assert ["BatchNormalization" in operators for operators in asked] == [True, False]
    assert counts["facts"] <= MOST["facts"] + 1
