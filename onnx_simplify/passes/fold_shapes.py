"""Replace what is computed from static sizes by constants.

Exporters write ``Shape -> Gather -> Mul -> Concat -> Reshape`` even where the sizes are known.  The
elements of such vectors are followed one by one, as numbers or as the symbols of dynamic sizes:

    a vector of numbers                      becomes an initializer
    the target of a Reshape whose elements   becomes an initializer with 0 (copy) or -1 (infer)
    are numbers but for sizes of its input   for these

Everything else stays computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.layouts import Unsupported
from onnx_simplify.graph.edit import consumers, drop_unused
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.shapes import infer
from onnx_simplify.graph.traits import SELECTS
from onnx_simplify.operators.nodes import constant_input, constant_ints
from onnx_simplify.passes.clean import fold_constants
from onnx_simplify.runtime.disputes import settle_disputes
from onnx_simplify.runtime.inputs import Feeds

# Longer vectors are not shapes.
_LONGEST = 64
# Each round resolves one more shape computation of a chain.
_ROUNDS = 200


def fold_shapes(model: Model, input_shapes: Mapping[str, Sequence[int]] | None = None) -> None:
    """Infer all shapes, replacing computed sizes that turn out static, in place.

    Args:
        model: the model, without ``Constant`` nodes.
        input_shapes: sizes to assume for graph inputs; the result is then right for these only.
    """
    for _ in range(_ROUNDS):
        infer(model, input_shapes)
        if not _replace_known(model):
            return
        fold_constants(model)
        drop_unused(model)


def settle_sizes(model: Model, feeds: Feeds | None) -> None:
    """Find out on which shapes onnx and onnxruntime differ, then fold all others, in place.

    A size that is known only once others have been folded is looked at again.

    Args:
        model: a cleaned model.
        feeds: inputs to run it with; without, all doubtful shapes stay in dispute.
    """
    settle_disputes(model, feeds)
    fold_shapes(model)
    while feeds is not None and model.disputed:
        before = len(model.disputed)
        settle_disputes(model, feeds)
        if len(model.disputed) >= before:
            return
        fold_shapes(model)


def _replace_known(model: Model) -> bool:
    known: dict[str, np.ndarray] = {}
    readers = consumers(model)
    changed = False
    sparse = _may_be_empty(model)
    for node in model.graph.nodes:
        if node.domain or len(node.outputs) != 1:
            continue
        if node.op == "Reshape":
            target = _target(node, known, empty=node.inputs[0].name in sparse)
            if target is not None:
                name = model.unique(f"{node.outputs[0].name}_shape")
                node.inputs[1] = gs.Constant(name, np.array(target, np.int64))
                changed = True
            continue
        try:
            values = _evaluate(node, known)
        except Unsupported:
            continue
        if values is None or values.size > _LONGEST:
            continue
        result = node.outputs[0]
        known[result.name] = values
        if not all(isinstance(v, int) for v in values.ravel()) or model.is_kept(result):
            continue
        users = readers.get(result.name, [])
        constant = gs.Constant(result.name, np.asarray(values, np.int64))
        for user, index in users:
            user.inputs[index] = constant
        if users:
            result.name = model.unique(f"{result.name}_unused")
            changed = True
    return changed


def _may_be_empty(model: Model) -> set[str]:
    """Tensors that hold what was selected by values: perhaps nothing."""
    found: set[str] = set()
    for node in model.graph.nodes:
        if node.op in SELECTS or any(t.name in found for t in node.inputs):
            found |= {t.name for t in node.outputs if t.name}
    return found


def _target(node: gs.Node, known: dict[str, np.ndarray], *, empty: bool) -> list[int] | None:
    """A constant target that means the same as the computed one.

    Of nothing, no size can be inferred beside one of zero: where the input may be empty, a target
    does not have both.
    """
    values = known.get(node.inputs[1].name)
    source = node.inputs[0].shape
    if values is None or source is None or node.attrs.get("allowzero", 0):
        return None
    target = []
    for axis, value in enumerate(values):
        if isinstance(value, int):
            target.append(value)
        elif value is not None and axis < len(source) and source[axis] == value:
            target.append(0)
        else:
            target.append(-1)
    if empty and 0 in target and -1 in target:
        return None
    numbers = [v for v in values if isinstance(v, int)]
    return target if target.count(-1) <= 1 and 0 not in numbers else None


def _evaluate(node: gs.Node, known: dict[str, np.ndarray]) -> np.ndarray | None:
    """The node's output: numbers, symbols, or None where an element is not known.

    None altogether if the node is not one of those that are followed.

    Raises:
        Unsupported: bounds, axes or indices are computed themselves.
    """
    if node.op == "Shape":
        shape = node.inputs[0].shape
        if shape is None:
            return None
        values = np.array(shape, object)
        return values[node.attrs.get("start", 0) : node.attrs.get("end")]
    if node.op == "Concat":
        parts = [_value(t, known) for t in node.inputs]
        if any(p is None or p.ndim != 1 for p in parts):
            return None
        return np.concatenate(parts)  # type: ignore[arg-type]
    move = _MOVES.get(node.op)
    if move is None or not node.inputs or node.inputs[0].name not in known:
        return None
    return move(node, known[node.inputs[0].name])


def _gathered(node: gs.Node, values: np.ndarray) -> np.ndarray | None:
    indices = constant_input(node, 1)
    if indices is None or values.ndim != 1 or not _fits(indices, values.size):
        return None
    return np.asarray(values[indices.astype(np.int64)], object)


def _sliced(node: gs.Node, values: np.ndarray) -> np.ndarray | None:
    starts, ends = constant_ints(node, 1, "starts"), constant_ints(node, 2, "ends")
    steps = constant_ints(node, 4, "steps") or [1]
    if starts is None or ends is None or values.ndim != 1 or steps != [1]:
        return None
    return values[starts[0] : ends[0]]


def _unsqueezed(node: gs.Node, values: np.ndarray) -> np.ndarray | None:
    known = constant_ints(node, 1, "axes") == [0] and values.ndim == 0
    return values.reshape(1) if known else None


def _squeezed(node: gs.Node, values: np.ndarray) -> np.ndarray | None:
    known = constant_ints(node, 1, "axes") == [0] and values.shape == (1,)
    return values.reshape(()) if known else None


# What becomes of the elements of a vector, or of a single number; None where that is not known.
_MOVES: dict[str, Callable[[gs.Node, np.ndarray], np.ndarray | None]] = {
    "Identity": lambda node, values: values,
    "Gather": _gathered,
    "Slice": _sliced,
    "Unsqueeze": _unsqueezed,
    "Squeeze": _squeezed,
}


def _fits(indices: np.ndarray, size: int) -> bool:
    """Whether these are positions of a vector, perhaps counted from its end."""
    return bool(((-size <= indices) & (indices < size)).all())


def _value(tensor: gs.Tensor, known: dict[str, np.ndarray]) -> np.ndarray | None:
    if isinstance(tensor, gs.Constant):
        values = np.asarray(tensor.values)
        return values.astype(object) if values.dtype == np.int64 else None
    return known.get(tensor.name)
