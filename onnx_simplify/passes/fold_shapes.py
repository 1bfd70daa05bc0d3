"""Replace what is computed from static sizes by constants.

Exporters write ``Shape -> Gather -> Mul -> Concat -> Reshape`` even where the sizes are known.  The
elements of such vectors are followed one by one, as numbers or as the symbols of dynamic sizes:

    a vector of numbers                      becomes an initializer
    the target of a Reshape whose elements   becomes an initializer with 0 (copy) or -1 (infer)
    are numbers but for sizes of its input   for these

Everything else stays computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.facts.sizes import Sizes, settle
from onnx_simplify.graph.edit import consumers, drop_unused
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.traits import SELECTS
from onnx_simplify.passes.clean import clean, fold_constants
from onnx_simplify.passes.inline_ifs import inline_ifs
from onnx_simplify.runtime.disputes import settle_disputes
from onnx_simplify.runtime.inputs import Feeds
from onnx_simplify.runtime.observed import is_foreign, observe_sizes

# What is folded makes more known where other operators compute in between: seldom more than once.
_ROUNDS = 200


def fold_shapes(model: Model, input_shapes: Mapping[str, Sequence[int]] | None = None) -> None:
    """Infer all shapes, replacing computed sizes that turn out static, in place.

    Args:
        model: the model, without ``Constant`` nodes.
        input_shapes: sizes to assume for graph inputs; the result is then right for these only.
    """
    for _ in range(_ROUNDS):
        sizes = settle(model, input_shapes)
        taken = inline_ifs(model, sizes.truth)
        if taken:
            clean(model)
            continue
        if not _replace_known(model, sizes):
            return
        fold_constants(model)
        drop_unused(model)


def settle_sizes(model: Model, runs: Sequence[Feeds]) -> None:
    """Find out on which shapes onnx and onnxruntime differ, then fold all others, in place.

    Sizes behind operators that nobody knows are looked up in the runs.

    A size that is known only once others have been folded is looked at again.

    Args:
        model: a cleaned model.
        runs: inputs to run it with; without, all doubtful shapes stay in dispute.
    """
    first = runs[0] if runs else None
    settle_disputes(model, first)
    fold_shapes(model)
    if runs and is_foreign(model) and observe_sizes(model, runs, _may_be_empty(model)):
        fold_shapes(model)
    while runs and model.disputed:
        before = len(model.disputed)
        settle_disputes(model, first)
        if len(model.disputed) >= before:
            return
        fold_shapes(model)


def _replace_known(model: Model, sizes: Sizes) -> bool:
    readers = consumers(model)
    changed = False
    sparse = _may_be_empty(model)
    for node in model.graph.nodes:
        if node.op == "Reshape" and not node.domain:
            target = _target(node, sizes, empty=node.inputs[0].name in sparse)
            if target is not None:
                # What is zero in it copies a size; of those that are listed, none is zero.
                node.attrs.pop("allowzero", None)
                name = model.unique(f"{node.outputs[0].name}_shape")
                node.inputs[1] = gs.Constant(name, np.array(target, np.int64))
                changed = True
        for result in node.outputs:
            users = readers.get(result.name, [])
            if not users or not _is_known(sizes, result) or model.is_kept(result):
                continue
            kind = np.dtype(sizes.types[result.name])  # type: ignore[arg-type]
            values = sizes.integers[result.name].astype(kind)
            constant = gs.Constant(result.name, values)
            for user, index in users:
                user.inputs[index] = constant
            result.name = model.unique(f"{result.name}_unused")
            changed = True
    return changed


def _is_known(sizes: Sizes, tensor: gs.Tensor) -> bool:
    """Whether a tensor holds nothing but integers that are known, of a type that holds them."""
    values = sizes.integers.get(tensor.name)
    dtype = sizes.types.get(tensor.name)
    if values is None or dtype not in (np.int64, np.int32):
        return False
    limits = np.iinfo(dtype)
    return all(
        isinstance(v, int) and not isinstance(v, bool) and limits.min <= v <= limits.max
        for v in values.ravel()
    )


def _may_be_empty(model: Model) -> set[str]:
    """Tensors that hold what was selected by values: perhaps nothing."""
    found: set[str] = set()
    for node in model.graph.nodes:
        if node.op in SELECTS or any(t.name in found for t in node.inputs):
            found |= {t.name for t in node.outputs if t.name}
    return found


def _target(node: gs.Node, sizes: Sizes, *, empty: bool) -> list[int] | None:
    """A constant target that means the same as the computed one.

    Of nothing, no size can be inferred beside one of zero: where the input may be empty, a target
    does not have both.
    """
    values = sizes.integers.get(node.inputs[1].name)
    source = sizes.shapes.get(node.inputs[0].name)
    if values is None or values.ndim != 1 or source is None:
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
