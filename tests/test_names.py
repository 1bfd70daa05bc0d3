"""A name means a value: a tensor of the result that the original has, too, holds the same numbers.

Channels that are gone aside, and those that nobody needs, which may hold anything.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from test_counts import residual
from test_rearranging import KEEN
from test_rearranging import residual as sums

import onnx_simplify
from build import Graph, gated_constants, pruned, small_cnn, with_outputs
from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.load import load
from onnx_simplify.planning import profiles
from random_graphs import random_feeds, random_model

MODELS = {
    "small": lambda: small_cnn().model(),
    "gated constants": gated_constants,
    "residual": lambda: residual(3, static=False),
    "residual of one size": lambda: residual(3, static=True),
}
MODELS["constants into a sum"] = lambda: matrix_product()
# Sums whose channels move.
MODELS |= {
    f"sums {seed}": lambda seed=seed: sums(seed, dynamic=True, share=0.8) for seed in (3, 83221)
}
MODELS |= {f"random {seed}": lambda seed=seed: random_model(seed) for seed in range(40)}


def matrix_product() -> onnx.ModelProto:
    """A product without a bias of its own, behind which there is a sum with a constant."""
    g = Graph()
    x = g.op("Relu", g.gemm(g.input("x", ["n", 4]), pruned(g.normal(8, 4), [1, 3]), g.normal(8)))
    y = g.op("Add", g.op("MatMul", x, g.normal(8, 5)), g.normal(5))
    g.output(g.op("MatMul", g.op("Relu", y), g.normal(5, 3)))
    return g.model()


def inner(model: onnx.ModelProto) -> set[str]:
    """What nodes compute, graph outputs aside."""
    made = {name for node in model.graph.node for name in node.output if name}
    return made - {o.name for o in model.graph.output}


def values(
    model: onnx.ModelProto, names: list[str], feeds: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Inner tensors for some inputs; nothing if they cannot be had."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        exposed = with_outputs(model, *names).SerializeToString()
        session = ort.InferenceSession(exposed, options, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(names, feeds), strict=True))
    except Exception:
        return {}


def unlike(before: np.ndarray, after: np.ndarray, needed: np.ndarray | None) -> bool:
    """Whether what is needed of a tensor is nowhere in what it was.

    Args:
        before: the tensor in the original.
        after: the tensor in the result, perhaps with fewer channels along one axis.
        needed: which positions are needed, broadcast against ``after``; all, if not known.
    """
    scale = max(float(np.abs(before).max(initial=0.0)), 1e-6)
    if needed is None or needed.ndim != after.ndim:
        needed = np.ones((1,) * after.ndim, bool)
    needed = np.broadcast_to(needed, after.shape)
    if (
        before.shape == after.shape
        and np.abs(before - after)[needed].max(initial=0) <= 1e-4 * scale
    ):
        return False
    axes = [k for k in range(after.ndim) if after.shape[k] != before.shape[k]]
    if len(axes) > 1:
        return False  # cut along two axes: not looked at
    axis = axes[0] if axes else min(1, after.ndim - 1)
    own = np.moveaxis(before, axis, 0)
    place = 0
    for channel, mask in zip(
        np.moveaxis(after, axis, 0), np.moveaxis(needed, axis, 0), strict=True
    ):
        if place == len(own):
            return True
        gaps = np.where(mask, np.abs(own[place:] - channel), 0).reshape(len(own) - place, -1)
        same = np.flatnonzero(gaps.max(axis=1, initial=0) <= 1e-4 * scale)
        if not same.size:
            return True
        # The next one comes behind it: what has another order has another name.
        place += int(same[0]) + 1
    return False


@pytest.mark.parametrize("name", MODELS)
def test_a_name_means_a_value(name, monkeypatch):
    model = MODELS[name]()
    target = None
    if name.startswith("sums"):
        monkeypatch.setattr(profiles, "detect", lambda: KEEN)
    else:
        target = "avx512"
    try:
        result, _ = onnx_simplify.simplify(model, target=target)
    except onnx_simplify.CannotVerifyError:
        pytest.skip("does not run")
    shared = sorted(inner(model) & inner(result))
    needed = Facts(load(result)).needed
    feeds = random_feeds(model, 1)
    before, after = values(model, shared, feeds), values(result, shared, feeds)
    for tensor in before.keys() & after.keys():
        a, b = before[tensor], after[tensor]
        if isinstance(a, np.ndarray) and a.dtype == b.dtype == np.float32 and a.ndim == b.ndim:
            if np.isfinite(a).all() and np.isfinite(b).all() and a.ndim:
                assert not unlike(a, b, needed.get(tensor)), tensor


def test_what_is_unlike():
    before = np.random.default_rng(0).standard_normal((1, 6, 4, 4)).astype(np.float32)
    assert not unlike(before, before[:, [1, 4]], None)
    assert unlike(before, before[:, [4, 1]], None)
    assert unlike(before, before[:, ::-1], None)
    shifted = before[:, 1:] + np.float32(0.01)
    assert unlike(before, shifted, None)
    assert not unlike(before, shifted, np.zeros((1, 5, 1, 1), bool))
