"""Fold BatchNormalization into the linear operator before or after it.

    BN(x) = s * x + t        with  s = scale / sqrt(var + epsilon),  t = bias - s * mean

    after:   BN(W x + b)  =  (s W) x + (s b + t)              always
    before:  W BN(x) + b  =  (W s) x + (W t + b)              without padding, or where t = 0

https://onnx.ai/onnx/operators/onnx__BatchNormalization.html
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.errors import ModelError
from onnx_simplify.graph.edit import (
    Editor,
    Readers,
    consumers,
    label,
    remove_nodes,
    shares_weights,
)
from onnx_simplify.graph.identity import NodeSet
from onnx_simplify.graph.model import Model
from onnx_simplify.operators import bind
from onnx_simplify.operators.contraction import Contraction
from onnx_simplify.operators.nodes import constant_input, has_input
from onnx_simplify.operators.normalization import has_equal_vectors


def foldable(model: Model) -> Iterator[tuple[gs.Node, gs.Node, bool]]:
    """Pairs that can be folded: (linear node, BatchNormalization, whether the latter is behind).

    Shapes must have been inferred.
    """
    readers = consumers(model)
    producer = {t.name: n for n in model.graph.nodes for t in n.outputs if t.name}
    taken = NodeSet()
    for bn in model.graph.nodes:
        if bn.op != "BatchNormalization" or bn.domain or not _is_inference(bn):
            continue
        before = producer.get(bn.inputs[0].name)
        users = readers.get(bn.outputs[0].name, [])
        if model.keep_shared and any(
            shares_weights(readers, n) for n in (before, *(u for u, _ in users)) if n is not None
        ):
            continue
        if before is not None and _folds_behind(model, readers, before, bn):
            yield before, bn, True
            continue
        if len(users) == 1 and not model.is_kept(bn.outputs[0]) and users[0][0] not in taken:
            if _folds_before(model, users[0][0], bn, users[0][1]):
                taken.add(users[0][0])
                yield users[0][0], bn, False


def fold_batchnorm(model: Model, pairs: Collection[tuple[str, str]] | None = None) -> int:
    """Fold all pairs, or those whose (linear, BatchNormalization) names are in ``pairs``.

    Shapes must have been inferred.

    Returns:
        How many were folded.
    """
    count = 0
    while True:
        chosen = [
            p for p in foldable(model) if pairs is None or (label(p[0]), label(p[1])) in pairs
        ]
        if not chosen:
            return count
        editor = Editor(model)
        for node, bn, behind in chosen:
            (_fold_behind if behind else _fold_before)(editor, node, bn)
        remove_nodes(model, NodeSet(bn for _, bn, _ in chosen))
        editor.finish()
        count += len(chosen)


def check_pairs(model: Model, pairs: Collection[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs of names, if all can be folded. Shapes must have been inferred.

    Raises:
        ModelError: one cannot.
    """
    wanted = {(str(a), str(b)) for a, b in pairs}
    unknown = wanted - {(label(node), label(bn)) for node, bn, _ in foldable(model)}
    if unknown:
        raise ModelError(f"cannot fold {sorted(unknown)[0]}: see get_bn_folding")
    return wanted


def affine(bn: gs.Node) -> tuple[np.ndarray, np.ndarray]:
    """``(s, t)`` of a BatchNormalization, float64, one entry per channel."""
    scale, bias, mean, var = (np.asarray(t.values, np.float64) for t in bn.inputs[1:5])
    scale = scale / np.sqrt(var + float(bn.attrs.get("epsilon", 1e-5)))
    return scale, bias - scale * mean


def _is_inference(bn: gs.Node) -> bool:
    return (
        not bn.attrs.get("training_mode", 0)
        and bn.attrs.get("spatial", 1) == 1
        and sum(bool(t.name) for t in bn.outputs) == 1
        and all(isinstance(t, gs.Constant) for t in bn.inputs[1:])
        and has_equal_vectors(bn)
        and all(np.isfinite(v).all() for v in affine(bn))
    )


def _linear(node: gs.Node) -> Contraction | None:
    """The node's product with constant weights, if that is all it does; its bias is constant."""
    products = bind(node).contractions
    if len(products) != 1 or products[0].is_quantized() or not products[0].is_sound:
        return None
    (product,) = products
    wiring = product.wiring
    groups, outputs, _ = product.dims
    if wiring.bias is not None and has_input(node, wiring.bias):
        bias = constant_input(node, wiring.bias)
        if bias is None or bias.shape[-1:] not in ((), (1,), (groups * outputs,)):
            return None
    return product


def _folds_behind(model: Model, readers: Readers, node: gs.Node, bn: gs.Node) -> bool:
    product = _linear(node)
    result = node.outputs[0]
    if product is None or model.is_kept(result):
        return False
    if len(readers.get(result.name, [])) != 1:
        return False
    wiring = product.wiring
    channels = bn.inputs[1].values.size
    return _is_channel_axis(result, wiring.axis_out) and int(np.prod(product.dims[:2])) == channels


def _is_channel_axis(tensor: gs.Tensor, axis: int) -> bool:
    """Whether an axis, perhaps counted from the end, is BatchNormalization's axis 1."""
    if axis < 0 and tensor.shape is None:
        return False
    return (axis if axis >= 0 else axis + len(tensor.shape)) == 1


def _folds_before(model: Model, node: gs.Node, bn: gs.Node, index: int) -> bool:
    product = _linear(node)
    source = bn.outputs[0]
    if product is None:
        return False
    wiring = product.wiring
    groups, _, inputs = product.dims
    if index != wiring.data or not _is_channel_axis(source, wiring.axis_in):
        return False
    if groups * inputs != bn.inputs[1].values.size:
        return False
    return not product.spread_axes() or not affine(bn)[1].any()


def _fold_behind(editor: Editor, node: gs.Node, bn: gs.Node) -> None:
    product = _linear(node)
    assert product is not None
    scale, shift = affine(bn)
    weight = product.weights()
    factor = scale.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    product.set_weights(weight * factor.astype(_wide(weight)), editor.put)
    index = product.wiring.bias
    bias = None if index is None else constant_input(node, index)
    beta = float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else 1.0
    result = bn.outputs[0]
    if node.outputs[0].name in editor.model.pinned:
        editor.model.pinned.add(result.name)
    bn.outputs.clear()
    node.outputs[0] = result
    if index is not None and bias is not None and beta:
        # Rounded once: in half precision the two terms may all but cancel.
        total = bias.astype(np.float64) * scale + shift / beta
        editor.put(node, index, total.astype(bias.dtype))
    elif not product.add_bias(shift, editor.put):
        editor.add_behind(node, product.per_channel(shift))


def _fold_before(editor: Editor, node: gs.Node, bn: gs.Node) -> None:
    product = _linear(node)
    assert product is not None
    scale, shift = affine(bn)
    response = product.response(shift)
    weight = product.weights()
    groups, _, inputs = weight.shape[:3]
    factor = scale.reshape(groups, 1, inputs, *[1] * (weight.ndim - 3))
    product.set_weights(weight * factor.astype(_wide(weight)), editor.put)
    node.inputs[product.wiring.data] = bn.inputs[0]
    if response.any() and not product.add_bias(response, editor.put):
        editor.add_behind(node, product.per_channel(response))


def _wide(array: np.ndarray) -> type:
    """Compute in float32 at least: rounding of the product is then that of the result."""
    return np.float64 if array.dtype.itemsize >= 8 else np.float32
