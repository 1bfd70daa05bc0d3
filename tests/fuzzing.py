"""Check one random graph: the function must not change, and a second run must change nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import onnx
import onnxruntime as ort

import onnx_simplify
from onnx_simplify.errors import CannotVerifyError, VerificationError
from onnx_simplify.planning import profiles
from random_graphs import random_feeds, random_model

# Operators that jump, and those that divide by the spread of numbers that may all be equal:
# rounding alone can change what is behind them.
JUMPS = frozenset(("Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal", "ArgMax"))
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
    jumps = bool(operators & JUMPS)
    tolerance = 2e-2 if half else 1e-3 if operators & STEEP else 2e-5
    try:
        result, report = onnx_simplify.simplify(model, channel_multiple=multiple)
    except CannotVerifyError as error:
        return Outcome("unverified", str(error))
    except VerificationError as error:
        # Nothing is written then; the rounding of half precision alone can exceed the bound.
        steep = (jumps or operators & STEEP) and "as much as" in str(error)
        return Outcome("ok" if half or steep else "refused", str(error))
    except Exception as error:
        return Outcome("crash", f"{type(error).__name__}: {error}")
    refusal = next((n for n in report.notes if "did not verify" in n), None)
    if refusal and not refusal.startswith("BatchNormalization") and not half:
        return Outcome("refused", refusal)
    try:
        onnx.checker.check_model(result, full_check=True)
    except Exception as error:
        # Of some, onnx infers other sizes than onnxruntime has; only now it knows their input's.
        if not operators & DISPUTED or "differ in dimension" not in str(error):
            return Outcome("invalid", str(error))
    feeds = [random_feeds(model, k) for k in range(4)]
    worst = max(
        difference(a, b, ties=jumps)
        for before, after in zip(_run(model, feeds), _run(result, feeds), strict=True)
        for a, b in zip(before, after, strict=True)
    )
    if not worst <= tolerance and not (half and jumps):
        return Outcome("mismatch", f"relative error {worst:.1e}")
    removed = report.before.parameters - report.after.parameters
    _, again = onnx_simplify.simplify(result, channel_multiple=multiple)
    if (again.after.nodes, again.after.parameters) != (
        report.after.nodes,
        report.after.parameters,
    ):
        return Outcome("unstable", f"{report.after} became {again.after}", removed)
    return Outcome("ok", f"relative error {worst:.1e}", removed)


def open_session(model: bytes) -> ort.InferenceSession:
    """A session that computes what the file says: quiet, one thread, nothing optimised."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _run(model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
    session = open_session(model.SerializeToString())
    return [session.run(None, f) for f in feeds]


def difference(first: object, second: object, ties: bool = False) -> float:
    """Relative error of an output; infinity where something differs that is no rounding.

    That is: types, shapes, lengths, places and signs of what is not finite, and (without ``ties``)
    any integer, boolean or text.

    Args:
        first: an array, None, or a list of these.
        second: what to compare with it.
        ties: an operator that jumps is in front: so few positions as 2% may be anything.
    """
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            return float("inf")
        pairs = zip(first, second, strict=True)
        return max((difference(a, b, ties) for a, b in pairs), default=0.0)
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
    size = np.max(np.abs(a), where=finite, initial=0.0) + 1e-6
    if ties and np.mean(gaps > 1e-4 * size) <= 0.02:
        gaps = np.minimum(gaps, 0)
    return float(gaps.max() / size)
