"""Spoil a result in one place: verification must not pass it.

A mistake of the simplifier looks like this: a wrong channel, a bias that is lost, two channels in
another order on one side only.  Whether a spoiled result really computes something else is found
out with inputs of more sizes and magnitudes than verification tries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

import onnx_simplify
from fuzzing import behind_jumps, difference, jitter, run
from onnx_simplify.errors import CannotVerifyError, SimplifyError
from random_graphs import OVERFLOWS, ancestors, random_feeds, random_model

# An output that is off by this share of its magnitude is wrong.
_WRONG = 1e-3
_EQUAL = 1e-4
_SCALES = (1.0, 1.0, 1.0, 1.0, 4.0, 4.0, 30.0, 30.0)
_LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))


@dataclass
class Spoiled:
    """What became of a spoiled result.

    Attributes:
        kind: ``caught``, ``missed``, or ``same`` (it computes the same but for rounding).
        how: what was spoiled.
        reason: why it was missed, for the counts: ``empty or constant outputs``, ``larger values
            only``, ``operands of other values``, ``behind jumps``, ``some inputs only``, ``below
            the bound`` or ``plain``.
        detail: the output and its error.
    """

    kind: str
    how: str
    reason: str = ""
    detail: str = ""


@dataclass
class _Evidence:
    """An output of a spoiled result that is wrong for one of the inputs."""

    output: int
    gap: float
    usual: bool
    replaced: bool


def check_spoiled(seed: int) -> list[Spoiled]:
    """Spoil the result of this seed's graph, once in each of the ways that fit."""
    model = random_model(seed)
    try:
        result, _ = onnx_simplify.simplify(model, channel_multiple=1)
    except SimplifyError:
        return []
    found = []
    for index, (how, spoil) in enumerate(_WAYS.items()):
        spoiled = onnx.ModelProto()
        spoiled.CopyFrom(result)
        if spoil(spoiled, np.random.default_rng([seed, index])):
            found.append(_judge(model, result, spoiled, how))
    return found


def _judge(
    model: onnx.ModelProto, result: onnx.ModelProto, spoiled: onnx.ModelProto, how: str
) -> Spoiled:
    evidence = list(_evidence(model, result, spoiled))
    if not evidence:
        return Spoiled("same", how)
    try:
        if not onnx_simplify.verify(model, spoiled).passed:
            return Spoiled("caught", how)
    except CannotVerifyError:
        return Spoiled("caught", how)
    best = max(evidence, key=lambda e: (e.usual, not e.replaced, e.gap))
    name = model.graph.output[best.output].name
    few = sum(e.output == best.output and e.usual for e in evidence) < _SCALES.count(1.0)
    reason = _reason(model, best, few)
    return Spoiled("missed", how, reason, f"'{name}' is off by {best.gap:.1e}")


def _evidence(
    model: onnx.ModelProto, result: onnx.ModelProto, spoiled: onnx.ModelProto
) -> Iterator[_Evidence]:
    """Outputs that are wrong, of inputs for which the result is right."""
    jumps = behind_jumps(model.graph)
    names = [o.name for o in model.graph.output]
    defaults = {i.name for i in model.graph.initializer}
    scales = [s for s in _SCALES if s < 30 or model.doc_string != OVERFLOWS]
    feeds = [random_feeds(model, 50 + k, scale=s) for k, s in enumerate(scales)]
    runs = (run(m, feeds) for m in (model, result, spoiled))
    for feed, scale, right, good, bad in zip(feeds, scales, *runs, strict=True):
        if right is None or good is None or bad is None:
            continue
        for k, name in enumerate(names):
            gap = difference(right[k], bad[k])
            if gap <= _WRONG or difference(right[k], good[k]) > _EQUAL:
                continue
            if name in jumps and gap <= 2 * jitter(model, feed, k):
                continue
            yield _Evidence(k, gap, scale == 1, bool(defaults & set(feed)))


def _reason(model: onnx.ModelProto, evidence: _Evidence, few: bool) -> str:
    """Why nobody saw it; ``few``: whether it is seen for some of the usual inputs only."""
    name = model.graph.output[evidence.output].name
    usual = run(model, [random_feeds(model, k, _sizes(model)) for k in range(1, 9)])
    values = [np.asarray(outputs[evidence.output]) for outputs in usual if outputs is not None]
    if all(not v.size or np.array_equal(v, values[0]) for v in values):
        return "empty or constant outputs"
    if not evidence.usual:
        return "larger values only"
    defaults = {i.name for i in model.graph.initializer}
    operands = {i.name for i in model.graph.input if i.doc_string} - defaults
    if evidence.replaced or operands & ancestors(model.graph, name):
        return "operands of other values"
    if name in behind_jumps(model.graph):
        return "behind jumps"
    if few:
        return "some inputs only"
    half = onnx.TensorProto.FLOAT16 in {t.data_type for t in model.graph.initializer}
    return "below the bound" if half and evidence.gap <= 1e-2 else "plain"


def _sizes(model: onnx.ModelProto) -> dict[str, int]:
    """One size for each free dimension."""
    dims = (d for i in model.graph.input for d in i.type.tensor_type.shape.dim)
    return {d.dim_param: 2 if d.dim_param == "batch" else 9 for d in dims if d.dim_param}


# Ways to spoil a model in place; they return whether they could.

_Spoil = Callable[[onnx.ModelProto, np.random.Generator], bool]


def _layer(
    model: onnx.ModelProto, random: np.random.Generator, operand: int
) -> tuple[onnx.NodeProto, onnx.TensorProto, np.ndarray, int] | None:
    """Some layer, its weight (or bias), the values and the axis of output channels."""
    stored = {i.name: i for i in model.graph.initializer}
    found = [
        n
        for n in model.graph.node
        if n.op_type in _LAYERS and len(n.input) > operand and n.input[operand] in stored
    ]
    found = [n for n in found if stored[n.input[operand]].data_type == onnx.TensorProto.FLOAT]
    if not found:
        return None
    node = found[int(random.integers(len(found)))]
    values = numpy_helper.to_array(stored[node.input[operand]]).copy()
    flipped = any(a.name == "transB" and a.i for a in node.attribute)
    axis = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1}.get(node.op_type, 0 if flipped else -1)
    return node, stored[node.input[operand]], values, axis if operand == 1 else -1


def _store(tensor: onnx.TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def _replace_channel(model: onnx.ModelProto, random: np.random.Generator) -> bool:
    """Other random weights for one channel."""
    if not (found := _layer(model, random, 1)):
        return False
    _, tensor, values, axis = found
    rows = np.moveaxis(values, axis, 0)
    row = int(random.integers(len(rows)))
    spread = float(values.std()) or 1.0
    rows[row] = random.normal(0, spread, rows[row].shape)
    _store(tensor, values)
    return True


def _exchange_channels(model: onnx.ModelProto, random: np.random.Generator) -> bool:
    """Two channels in another order than the readers expect."""
    if not (found := _layer(model, random, 1)):
        return False
    _, tensor, values, axis = found
    rows = np.moveaxis(values, axis, 0)
    if len(rows) < 2:
        return False
    pair = random.choice(len(rows), 2, replace=False)
    rows[pair] = rows[pair[::-1]]
    _store(tensor, values)
    return True


def _change_bias(model: onnx.ModelProto, random: np.random.Generator) -> bool:
    """Another bias for one channel."""
    if not (found := _layer(model, random, 2)):
        return False
    _, tensor, values, _ = found
    if not values.size:
        return False
    values.flat[int(random.integers(values.size))] += random.normal() * (values.std() or 1)
    _store(tensor, values)
    return True


def _drop_bias(model: onnx.ModelProto, random: np.random.Generator) -> bool:
    """No bias at all."""
    if not (found := _layer(model, random, 2)):
        return False
    del found[0].input[2]
    return True


_WAYS: dict[str, _Spoil] = {
    "other weights": _replace_channel,
    "exchanged channels": _exchange_channels,
    "another bias": _change_bias,
    "no bias": _drop_bias,
}
