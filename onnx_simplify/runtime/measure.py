"""Read the values of constant channels from runs of the model itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.values import UNIFORM, VARYING, Constants
from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.shapes import is_questionable, static_shapes
from onnx_simplify.operators import Operator
from onnx_simplify.runtime.inputs import Feeds
from onnx_simplify.runtime.session import Session

# Fetch about this many bytes of activations at a time.
_CHUNK = 1 << 28


def wanted(facts: Facts) -> list[gs.Tensor]:
    """The tensors whose constant values decide something.

    Operators say which of their inputs these are; tensors that must exist in any case are added
    where they are constant altogether.
    """
    found: dict[str, gs.Tensor] = {}
    required = list(facts.model.graph.outputs)
    for op in facts.operators:
        if op.is_opaque:
            required += op.inputs
        for index in op.wants_values(facts):
            tensor = op.inputs[index]
            if facts.has(tensor) and (facts.level[tensor.name] > VARYING).any():
                found[tensor.name] = tensor
    for tensor in required:
        if facts.has(tensor) and (facts.level[tensor.name] > VARYING).all():
            found[tensor.name] = tensor
    return list(found.values())


def measured(facts: Facts, runs: Sequence[Feeds]) -> Facts:
    """Facts with the values of constants, as some runs show them.

    Args:
        facts: what is known without.
        runs: inputs; the first two of the same sizes and different values, any further ones of
            other sizes.
    """
    found = {t.name: t for t in wanted(facts)}
    chains = _chains(facts, found)
    found |= {chain[0].inputs[0].name: chain[0].inputs[0] for chain in chains.values()}
    tensors = [t for t in found.values() if t.name not in facts.model.input_names]
    constants = Constants()
    if tensors:
        session = Session(facts.model, [t.name for t in tensors])
        tensor_of = {t.name: t for t in tensors}
        for names in _chunks(facts, tensors, runs[0]):
            for number, feeds in enumerate(runs):
                # One run's tensors at a time: they are large.
                for name, values in zip(names, session.run(feeds, names), strict=True):
                    if number == 0:
                        constant = facts.level[name] > VARYING
                        dims = facts.shape(tensor_of[name])
                        # Shape inference and onnxruntime do not agree on everything.
                        as_expected = len(dims) == values.ndim and all(
                            d == s
                            for d, s in zip(dims, values.shape, strict=True)
                            if isinstance(d, int)
                        )
                        constants.record(name, constant & as_expected, values)
                    else:
                        constants.confirm(name, values, same_sizes=number == 1)
        facts.model.release()
        for name, chain in chains.items():
            _pass_on(facts, constants, name, chain)
    return facts.measured(constants)


def _chains(facts: Facts, names: Collection[str]) -> dict[str, list[Operator]]:
    """For tensors behind a pooling, the nodes that pass their uniform constants on unchanged."""
    found = {}
    for name in names:
        chain: list[Operator] = []
        op = facts.producer.get(name)
        while op is not None and facts.has(op.inputs[0]):
            zeros = np.zeros(facts.layouts.of[op.inputs[0].name].shape)
            if op.passed(facts, zeros) is None:
                break
            chain.insert(0, op)
            op = facts.producer.get(op.inputs[0].name)
        if any(link.averages for link in chain):
            found[name] = chain
    return found


def _pass_on(facts: Facts, constants: Constants, name: str, chain: list[Operator]) -> None:
    """Take the constants of a tensor from before the poolings, which round."""
    source = chain[0].inputs[0].name
    if source not in constants.low or name not in constants.low:
        return
    good = constants.agreement[source] & (facts.level[source] == UNIFORM)
    ends = []
    for values in (constants.low[source], constants.high[source]):
        passed: np.ndarray | None = np.where(good, values, np.nan)
        for op in chain:
            assert passed is not None
            passed = op.passed(facts, passed)
        ends.append(passed)
    low, high = ends
    if low is not None and high is not None:
        constants.adopt(name, low, high, facts.level[name] == UNIFORM)


def _chunks(facts: Facts, tensors: list[gs.Tensor], feeds: Feeds) -> list[list[str]]:
    """Names in groups whose estimated sizes add up to a bounded amount of memory."""
    pixels = max((int(np.prod(v.shape[2:])) for v in feeds.values()), default=1)
    chunks: list[list[str]] = [[]]
    total = 0
    for tensor in tensors:
        dims = facts.shape(tensor)
        size = 4 * int(np.prod([d for d in dims if isinstance(d, int)] or [1]))
        if not all(isinstance(d, int) for d in dims[1:]):
            size *= pixels
        if chunks[-1] and total + size > _CHUNK:
            chunks.append([])
            total = 0
        chunks[-1].append(tensor.name)
        total += size
    return chunks


def settle_disputes(model: Model, feeds: Feeds | None) -> None:
    """Find the tensors whose shapes in onnxruntime are not those that onnx infers, in place.

    Only outputs of nodes on which the two are known to differ are looked at.

    Args:
        model: a cleaned model; ``model.disputed`` is set.
        feeds: inputs to run it with; without, all of these shapes count as disputed.
    """
    doubtful = {n.outputs[0].name: n.op for n in model.graph.nodes if is_questionable(n)}
    names = list(doubtful)
    model.disputed = frozenset(names if feeds is None else ())
    if not names or feeds is None:
        return
    inferred = static_shapes(model, {n: list(v.shape) for n, v in feeds.items()})
    found = Session(model, names).run(feeds, names)
    model.disputed = frozenset(
        name
        for name, values in zip(names, found, strict=True)
        if not _agree(inferred.get(name), values.shape, doubtful[name])
    )


def _agree(inferred: Sequence[int | None] | None, actual: Sequence[int], op: str) -> bool:
    """Whether what is inferred of a shape, now or once more is known, will be right."""
    if op not in ("Resize", "Upsample") and (inferred is None or None in inferred):
        # Sizes before a pooling are computed, and may be folded later.
        return False
    return all(size in (None, known) for size, known in zip(inferred or (), actual, strict=False))
