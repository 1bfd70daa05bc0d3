"""Check one random graph: the function must not change, and a second run must change nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import onnx
import onnxruntime as ort

import onnx_simplify
from onnx_simplify.channels.layouts import Unsupported
from onnx_simplify.errors import CannotVerifyError, VerificationError
from onnx_simplify.facts import sizes
from onnx_simplify.planning import profiles
from random_graphs import OVERFLOWS, random_feeds, random_model

# Operators that jump, and those that divide by the spread of numbers that may all be equal:
# rounding alone can change what is behind them.
JUMPS = frozenset(
    """ArgMax ArgMin Ceil Equal Floor Greater GreaterOrEqual Less LessOrEqual NonMaxSuppression
    Round Sign TopK""".split()
)
# These do not round: what jumps on their outputs jumps in both models.
_EXACT = frozenset(
    """Cast Concat Constant Expand Flatten Gather Identity Max MaxPool Min Neg Pad ReduceMax
    ReduceMin Relu Reshape Shape Slice Split Squeeze Tile Transpose Unsqueeze""".split()
)
# Numbers up to one, of which only so much is left of tiny ones.
_UNITS = frozenset(("Sigmoid", "Softmax"))
_LEAST = 3e-7
STEEP = frozenset(("InstanceNormalization", "LayerNormalization"))
DISPUTED = frozenset(("AveragePool", "ConvTranspose", "LpPool", "MaxPool", "Resize", "Upsample"))
# Splits sums, merges groups and reorders channels wherever it can.
KEEN = profiles.Profile(
    "keen", 2, 2, mac_cost=1, load_cost=0, plain_mac_cost=3, map_start_cost=0, node_cost=0
)


@dataclass
class Outcome:
    """What became of one graph.

    Attributes:
        kind: ``ok``, ``mismatch``, ``unstable`` (a second run changed something), ``unverified``,
            ``refused`` (the tool's own verification failed), ``invalid`` (the checker complains) or
            ``crash``.
        detail: figures or message.
        removed: parameters removed.
        quantized: whether it has weights that are stored as integers.
    """

    kind: str
    detail: str = ""
    removed: int = 0
    quantized: bool = False


def check(seed: int) -> Outcome:
    """Simplify the random graph of this seed, and compare on inputs of several sizes.

    In turn with as few channels as possible, as on this machine, and as a keen planner does it.
    """
    operators = {n.op_type for n in random_model(seed).graph.node}
    # Rules about sizes that go wrong are to be seen.
    sizes.TOLERATED = (Unsupported,)
    return replace(_check_in_turn(seed), quantized="QuantizeLinear" in operators)


def _check_in_turn(seed: int) -> Outcome:
    if seed % 4 < 2:
        return _check(seed, 1)
    if seed % 4 == 2:
        return _check(seed, None)
    with mock.patch.object(profiles, "detect", lambda: KEEN):
        outcome = _check(seed, None)
    # It can find more to rearrange in what it made, which changes sizes.
    return replace(outcome, kind="ok") if outcome.kind == "unstable" else outcome


def _check(seed: int, multiple: int | None) -> Outcome:
    model = random_model(seed)
    operators = {n.op_type for n in model.graph.node}
    types = {t.data_type for t in model.graph.initializer}
    types |= {i.type.tensor_type.elem_type for i in model.graph.input}
    half = onnx.TensorProto.FLOAT16 in types
    jumps = behind_jumps(model.graph)
    tolerance = 2e-2 if half else 1e-3 if operators & STEEP else 2e-5
    try:
        result, report = onnx_simplify.simplify(model, channel_multiple=multiple)
    except CannotVerifyError as error:
        # Some operands that are inputs take few values, which the tool cannot know.
        known = any(i.doc_string for i in model.graph.input)
        mute = "proves nothing" in str(error) and says_nothing(model)
        return Outcome("ok" if known or mute else "unverified", str(error))
    except VerificationError as error:
        # Nothing is written then; the rounding of half precision alone can exceed the bound.
        steep = (jumps or operators & STEEP) and "as much as" in str(error)
        return Outcome("ok" if half or steep else "refused", str(error))
    except Exception as error:
        return Outcome("crash", f"{type(error).__name__}: {error}")
    refusal = next((n for n in report.notes if "did not verify" in n), None)
    if refusal and not half and not _is_rounding(refusal):
        return Outcome("refused", refusal)
    try:
        onnx.checker.check_model(result, full_check=True)
    except Exception as error:
        # Of some, onnx infers other sizes than onnxruntime has; only now it knows their input's.
        if not operators & DISPUTED or "differ in dimension" not in str(error):
            return Outcome("invalid", str(error))
    feeds = [random_feeds(model, k) for k in range(4)]
    worst, where = _worst(model, result, feeds)
    if not worst <= tolerance and not (half and jumps):
        return Outcome("mismatch", f"'{where}': relative error {worst:.1e}")
    if model.doc_string == OVERFLOWS and not _overflows_as_told(model, result, report.notes):
        return Outcome("mismatch", "differs where the original is not finite, and no note says so")
    removed = report.before.parameters - report.after.parameters
    _, again = onnx_simplify.simplify(result, channel_multiple=multiple)
    if (again.after.nodes, again.after.parameters) != (
        report.after.nodes,
        report.after.parameters,
    ):
        return Outcome("unstable", f"{report.after} became {again.after}", removed)
    return Outcome("ok", f"relative error {worst:.1e}", removed)


def _is_rounding(refusal: str) -> bool:
    """Whether a first result was refused for so small a difference that it may be rounding."""
    found = re.search(r"differs by ([0-9.]+(e-\d+)?)", refusal)
    rounds = refusal.startswith(("BatchNormalization", "constants behind means"))
    return rounds and found is not None and float(found[1]) < 1e-2


def behind_jumps(graph: onnx.GraphProto) -> set[str]:
    """The tensors that rounding can change to something else, as a score changes who is first."""
    rounded: set[str] = set()
    jumped: set[str] = set()
    for node in graph.node:
        reads = set(node.input)
        if any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute):
            reads |= rounded | jumped  # a body may read any
        if jumped & reads or node.op_type in JUMPS and rounded & reads:
            jumped.update(node.output)
        if node.op_type not in _EXACT or rounded & reads:
            rounded.update(node.output)
    return jumped


def _worst(
    model: onnx.ModelProto, result: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]
) -> tuple[float, str]:
    """The largest relative error of an output, and which."""
    names, jumps = [o.name for o in model.graph.output], behind_jumps(model.graph)
    least = _LEAST if {n.op_type for n in model.graph.node} & _UNITS else 0.0
    worst, where = 0.0, ""
    for feed, before, after in zip(feeds, run(model, feeds), run(result, feeds), strict=True):
        if before is None:
            continue
        if after is None:
            return float("inf"), "all"
        for k, (name, a, b) in enumerate(zip(names, before, after, strict=True)):
            gap = difference(a, b, name in jumps, least)
            if gap > 1e-5 and name in jumps and gap <= jitter(model, feed, k):
                continue
            if gap > worst:
                worst, where = gap, name
    return worst, where


def jitter(model: onnx.ModelProto, feed: dict[str, np.ndarray], output: int) -> float:
    """How much an output changes where inputs change by rounding."""
    random, feeds = np.random.default_rng(0), [feed]
    for _ in range(8):
        feeds.append(
            {
                n: (v * (1 + 3e-7 * random.standard_normal(v.shape))).astype(v.dtype)
                if v.dtype.kind == "f"
                else v
                for n, v in feed.items()
            }
        )
    first, *others = run(model, feeds)
    assert first is not None
    return max(difference(first[output], o[output]) if o else float("inf") for o in others)


def _overflows_as_told(model: onnx.ModelProto, result: onnx.ModelProto, notes: list[str]) -> bool:
    """Whether large inputs give the same, or a note says that it differs where it is not finite."""
    feeds = [random_feeds(model, k, scale=100.0) for k in range(4)]
    told = any(re.search("finite|overflow|NaN", note) for note in notes)
    pairs = (
        (a, b)
        for before, after in zip(run(model, feeds), run(result, feeds), strict=True)
        if before and after
        for a, b in zip(before, after, strict=True)
    )
    return told or all(
        np.array_equal(np.isfinite(a), np.isfinite(b)) for a, b in pairs if a.dtype.kind == "f"
    )


def says_nothing(model: onnx.ModelProto) -> bool:
    """Whether an output of a model is empty, or the same for two inputs of one size."""
    feed = random_feeds(model, 1)
    other = {n: v[..., ::-1] * 2 if v.dtype.kind == "f" and v.ndim else v for n, v in feed.items()}
    first, second = run(model, [feed, other])
    return (
        first is None
        or second is None
        or any(
            np.size(a) == 0 or np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f")
            for a, b in zip(first, second, strict=True)
        )
    )


def open_session(model: bytes) -> ort.InferenceSession:
    """A session that computes what the file says: quiet, one thread, nothing optimised."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(
    model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]
) -> list[list[np.ndarray] | None]:
    """The outputs for each of the inputs; None for one that onnxruntime rejects."""
    session = open_session(model.SerializeToString())
    found: list[list[np.ndarray] | None] = []
    for feed in feeds:
        try:
            found.append(session.run(None, feed))
        except Exception:  # sizes or operands that do not go together
            found.append(None)
    return found


def difference(first: object, second: object, ties: bool = False, least: float = 0.0) -> float:
    """Relative error of an output; infinity where something differs that is no rounding.

    That is: types, shapes, lengths, places and signs of what is not finite, and (without ``ties``)
    any integer, boolean or text.

    Args:
        first: an array, None, or a list of these.
        second: what to compare with it.
        ties: an operator that jumps is in front: so few positions as 2% may be anything.
        least: absolute errors up to this do not count.
    """
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            return float("inf")
        pairs = zip(first, second, strict=True)
        return max((difference(a, b, ties, least) for a, b in pairs), default=0.0)
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.size == 0:
        return 0.0
    if a.dtype.kind not in "fc":
        return 0.0 if np.mean(a != b) <= (0.02 if ties else 0) else float("inf")
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    a, b = a.astype(wide), b.astype(wide)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return float("inf")
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    gaps = np.abs(np.subtract(a, b, where=finite, out=np.zeros_like(a)))
    gaps = np.where(gaps > least, gaps, 0)
    size = np.max(np.abs(a), where=finite, initial=0.0) + 1e-6
    if ties and np.mean(gaps > 1e-4 * size) <= 0.02:
        gaps = np.minimum(gaps, 0)
    return float(gaps.max() / size)
