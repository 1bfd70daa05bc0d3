"""Evidence: what runs show of the values of constant channels.

A tensor has one name as long as it has one value, so the runs of the original, which verification
needs anyway, show the constants of a graph that was made from it. What they were not asked for is
read from runs of that graph itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.values import UNIFORM, VARYING, Constants, Seen
from onnx_simplify.errors import CannotVerifyError, RunError
from onnx_simplify.facts.facts import Facts
from onnx_simplify.operators import Operator
from onnx_simplify.runtime.inputs import Feeds
from onnx_simplify.runtime.session import Session

# Fetch about this many bytes of activations at a time.
_CHUNK = 1 << 28

Questions = dict[str, np.ndarray]
"""By the name of a tensor, positions that are constant by the rules, shaped like its layout."""


class Evidence:
    """What is known from runs.

    Attributes:
        runs: inputs; the first two of the same sizes and different values, any further ones of
            other sizes.
        seen: for each run, what the original's tensors held, by name.
        strict: leave constants alone that come out differently for every size, as means do.
    """

    def __init__(
        self,
        runs: Sequence[Feeds],
        seen: Sequence[Mapping[str, Seen | None]] = (),
        *,
        strict: bool = False,
    ):
        """Start from runs, and from what was asked in them, if anything was."""
        self.strict = strict
        self.runs = list(runs)
        self.seen = [dict(found) for found in seen] or [{} for _ in self.runs]

    def afresh(self) -> Evidence:
        """The same runs, to be read in a graph that was rewritten.

        There, a tensor may hold anything where nobody looks, and somebody may look in the end.
        """
        return Evidence(self.runs, strict=self.strict)

    def measured(self, facts: Facts) -> Facts:
        """Facts with the values of constants.

        Args:
            facts: what is known without; a name of the original stands for the original's values.
        """
        asked, chains = _asked(facts)
        aliases = facts.model.aliases
        missing = {}
        for name, constant in asked.items():
            first = self.seen[0].get(aliases.get(name, name))
            if first is None or first.low.shape != constant.shape:
                missing[name] = constant
        found = self._read(facts, missing) if missing else []
        constants = Constants(strict=self.strict)
        for name, constant in asked.items():
            source = aliases.get(name, name)
            answers = [
                fresh.get(name) if name in fresh else known.get(source)
                for known, fresh in zip(self.seen, found or [{}] * len(self.seen), strict=True)
            ]
            constants.record(name, constant & _is_as_expected(facts, name, answers[0]), answers[0])
            for number, answer in enumerate(answers[1:], 1):
                constants.confirm(name, answer, same_sizes=number == 1)
        coarse = [n for n, chain in chains.items() if _pass_on(facts, constants, n, chain)]
        if coarse:
            self._remeasure(facts, constants, coarse)
        return facts.measured(constants)

    def _remeasure(self, facts: Facts, constants: Constants, names: list[str]) -> None:
        """Look at means that round a lot once more, as a deployment computes them.

        onnxruntime's optimised kernels sum in another order than those that are run otherwise.
        """
        try:
            session = Session(facts.model, names, optimize=True, always=False)
            values = session.run(self.runs[0], names)
        except (RunError, CannotVerifyError):  # what is known stays
            return
        for name, array in zip(names, values, strict=True):
            seen = Seen.of(array, constants.agreement[name])
            if seen is not None and seen.low.shape == constants.agreement[name].shape:
                constants.correct(name, seen)

    def _read(self, facts: Facts, questions: Questions) -> list[dict[str, Seen | None]]:
        """Run the graph itself."""
        found: list[dict[str, Seen | None]] = [{} for _ in self.runs]
        session = Session(facts.model, questions)
        for names in _chunks(facts, questions, self.runs[0]):
            for seen, feeds in zip(found, self.runs, strict=True):
                # One run's tensors at a time: they are large.
                values = session.run(feeds, names)
                first = None if seen is found[0] else found[0]
                seen.update(look(dict(zip(names, values, strict=True)), questions, first))
        facts.model.release()
        return found


def look(
    values: Mapping[str, np.ndarray],
    questions: Questions,
    first: Mapping[str, Seen | None] | None = None,
) -> dict[str, Seen | None]:
    """What tensors of a run show of what is asked.

    Args:
        values: the tensors.
        questions: what is asked.
        first: what a first run showed, unless this is the first.
    """
    found = {name: Seen.of(array, questions[name]) for name, array in values.items()}
    if first is None:
        return found
    return {n: None if seen is None else seen.after(first.get(n)) for n, seen in found.items()}


def questions_for(
    facts: Facts, original: Collection[str], more: Collection[gs.Tensor] = ()
) -> Questions:
    """What to ask the original's runs about a graph that was made from it.

    Args:
        facts: what is known of that graph, unmeasured.
        original: names of the original's tensors.
        more: tensors of which to ask in any case.

    Returns:
        Nothing, if it would take much memory to answer at once.
    """
    found: Questions = {}
    aliases = facts.model.aliases
    asked, _ = _asked(facts)
    asked |= {t.name: facts.level[t.name] > VARYING for t in more}
    for name, constant in asked.items():
        source = aliases.get(name, name)
        if source in original:
            found[source] = found[source] | constant if source in found else constant
    pixels = _pixels(
        [d for d in t.shape or () if isinstance(d, int)] for t in facts.model.graph.inputs
    )
    total = sum(_bytes(facts, name, pixels) for name in asked)
    return found if total <= _CHUNK else {}


def _asked(facts: Facts) -> tuple[Questions, dict[str, list[Operator]]]:
    """All that a graph's facts lack, and the chains of nodes behind which some of it lies."""
    names = _wanted(facts)
    chains = _chains(facts, names)
    names = dict.fromkeys(
        [*names, *(chain[0].inputs[chain[0].carrier].name for chain in chains.values())]
    )
    inputs = facts.model.input_names
    return {n: facts.level[n] > VARYING for n in names if n not in inputs}, chains


def _is_as_expected(facts: Facts, name: str, seen: Seen | None) -> bool:
    """Whether a tensor has the sizes that were inferred.

    Shape inference and onnxruntime do not agree on everything.
    """
    dims = facts.sizes[name]
    return seen is not None and all(
        d == s for d, s in zip(dims, seen.shape, strict=True) if isinstance(d, int)
    )


def _wanted(facts: Facts) -> dict[str, None]:
    """The names, in order, of tensors whose constant values decide something.

    Operators say which of their inputs these are; tensors that must exist in any case are added
    where they are constant altogether.
    """
    found: dict[str, None] = {}
    required = list(facts.model.graph.outputs)
    for op in facts.operators:
        if op.is_opaque:
            required += op.inputs
        for index in op.wants_values(facts):
            tensor = op.inputs[index]
            if facts.has(tensor) and (facts.level[tensor.name] > VARYING).any():
                found[tensor.name] = None
    for tensor in required:
        if facts.has(tensor) and (facts.level[tensor.name] > VARYING).all():
            found[tensor.name] = None
    return found


def _chains(facts: Facts, names: Collection[str]) -> dict[str, list[Operator]]:
    """For tensors behind a pooling, the nodes that pass their uniform constants on unchanged."""
    found = {}
    for name in names:
        chain: list[Operator] = []
        op = facts.producer.get(name)
        while op is not None and op.inputs and facts.has(op.inputs[op.carrier]):
            source = op.inputs[op.carrier].name
            if op.passed(facts, np.zeros(facts.layouts.of[source].shape)) is None:
                break
            chain.insert(0, op)
            op = facts.producer.get(source)
        if any(link.averages for link in chain):
            found[name] = chain
    return found


def _pass_on(facts: Facts, constants: Constants, name: str, chain: list[Operator]) -> bool:
    """Take the constants of a tensor from before the poolings, which round.

    Returns:
        Whether what was measured instead counts, and is off by more than a few roundings.
    """
    source = chain[0].inputs[chain[0].carrier].name
    if source not in constants.low or name not in constants.low:
        return False
    good = constants.agreement[source] & (facts.level[source] == UNIFORM)
    ends = []
    for values in (constants.low[source], constants.high[source]):
        passed: np.ndarray | None = np.where(good, values, np.nan)
        for op in chain:
            assert passed is not None
            passed = op.passed(facts, passed)
        ends.append(passed)
    low, high = ends
    if low is None or high is None:
        return False
    free = not all(isinstance(d, int) for d in facts.sizes[source][1:])
    constants.adopt(name, low, high, facts.level[name] == UNIFORM, free=free)
    return not free and not constants.strict and constants.is_off(name, low)


def _chunks(facts: Facts, names: Iterable[str], feeds: Feeds) -> Iterator[list[str]]:
    """Names in groups whose estimated sizes add up to a bounded amount of memory."""
    pixels = _pixels(v.shape for v in feeds.values())
    chunk: list[str] = []
    total = 0
    for name in names:
        size = _bytes(facts, name, pixels)
        if chunk and total + size > _CHUNK:
            yield chunk
            chunk, total = [], 0
        chunk.append(name)
        total += size
    yield chunk


def _pixels(shapes: Iterable[Sequence[int]]) -> int:
    """Positions in space of the largest input."""
    return max((int(np.prod(shape[2:])) for shape in shapes), default=1)


def _bytes(facts: Facts, name: str, pixels: int) -> int:
    """About how large a tensor is."""
    dims = facts.sizes[name]
    size = 4 * int(np.prod([d for d in dims if isinstance(d, int)] or [1]))
    return size if all(isinstance(d, int) for d in dims[1:]) else size * pixels
