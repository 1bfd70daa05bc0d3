"""What onnx infers of types and shapes, and which axes of a reshaped tensor belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.shape_inference
import onnx_graphsurgeon as gs

from onnx_simplify.errors import ModelError
from onnx_simplify.graph.expressions import Dim, product, sample
from onnx_simplify.graph.message import headless
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.traits import DISPUTED

# What symbols start with that stand for nothing, or are expressions.
_RESERVED = ("?", "unk__", "=")
EMPTY = ":empty"
"""End of the symbols of input dimensions that are declared as zero: free, most of the time."""


@dataclass(frozen=True)
class Inferred:
    """What is inferred of one tensor.

    Attributes:
        dtype: the type of its elements, in onnx's numbers where numpy has none; None if unknown.
        shape: its sizes; None if the rank is not known.
    """

    dtype: np.dtype | int | None
    shape: list[Dim] | None


def infer_all(
    model: Model, input_shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Inferred]:
    """What onnx infers of inputs and inner tensors, by name.

    Args:
        model: the model.
        input_shapes: sizes to assume for graph inputs, in place of their declared dynamic shapes.

    Raises:
        ModelError: the graph contradicts itself.
    """
    unknown = 0

    def symbol() -> str:
        nonlocal unknown
        unknown += 1
        return f"?{unknown}:"

    found = _infer(model, input_shapes)
    return {name: shape_of(kind, symbol) for name, kind in found.items()}


def shape_of(info: onnx.TypeProto, symbol: Callable[[], str]) -> Inferred:
    """What a message says of a tensor.

    Args:
        info: the message.
        symbol: makes symbols for sizes of which it says nothing.
    """
    if not info.HasField("tensor_type"):
        return Inferred(None, None)
    kind = info.tensor_type
    dtype: np.dtype | int | None = None
    if kind.elem_type:
        try:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        except KeyError:
            dtype = kind.elem_type
    if not kind.HasField("shape"):
        return Inferred(dtype, None)
    return Inferred(
        dtype,
        [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or symbol()
            for dim in kind.shape.dim
        ],
    )


def static_shapes(model: Model, input_shapes: Mapping[str, Sequence[int]]) -> dict:
    """Shapes by tensor name when the graph inputs have the given sizes (unknown dims are None)."""
    found = {}
    for name, info in _infer(model, input_shapes).items():
        if info.HasField("tensor_type") and info.tensor_type.HasField("shape"):
            found[name] = [
                d.dim_value if d.HasField("dim_value") else None for d in info.tensor_type.shape.dim
            ]
    return found


def types(model: Model) -> dict[str, np.dtype]:
    """Types of the elements of inputs and inner tensors, as far as inference knows them."""
    found = {}
    for name, info in _infer(model, None).items():
        kind = info.tensor_type.elem_type if info.HasField("tensor_type") else 0
        with suppress(KeyError):
            found[name] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    return found


def input_dims(info: onnx.ValueInfoProto) -> list[Dim]:
    """Sizes of a graph input; free ones as symbols.

    Exporters name dimensions ``?``, leave the name out or repeat it for sizes that differ, so
    within one input such names stand for nothing: they get symbols of their own.
    """
    dims = info.type.tensor_type.shape.dim
    names = Counter(d.dim_param for d in dims)
    found: list[Dim] = []
    for axis, dim in enumerate(dims):
        name = dim.dim_param
        if dim.HasField("dim_value") and dim.dim_value > 0:
            found.append(dim.dim_value)
        elif not name or name.startswith(_RESERVED) or names[name] > 1:
            declared = dim.HasField("dim_value") and dim.dim_value == 0
            found.append(f"{info.name}:{axis}{EMPTY if declared else ''}")
        else:
            found.append(name)
    return found


def _infer(
    model: Model, input_shapes: Mapping[str, Sequence[int]] | None
) -> dict[str, onnx.TypeProto]:
    proto, _ = model.structure()
    proto = headless(proto)
    del proto.graph.value_info[:]
    # The values that a caller may override say nothing about sizes.
    plain = [t for t in proto.graph.initializer if t.name not in model.overridable]
    if len(plain) < len(proto.graph.initializer):
        copies = [onnx.TensorProto.FromString(t.SerializeToString()) for t in plain]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(copies)
    for info in proto.graph.input:
        for dim, size in zip(info.type.tensor_type.shape.dim, input_dims(info), strict=True):
            if isinstance(size, str):
                dim.dim_param = size
        shape = (input_shapes or {}).get(info.name)
        if shape is not None:
            info.CopyFrom(
                onnx.helper.make_tensor_value_info(
                    info.name, info.type.tensor_type.elem_type, shape
                )
            )
    known = {t.name for t in (*proto.graph.input, *proto.graph.initializer)}
    outputs = [o for o in proto.graph.output if o.name not in known]
    if len(outputs) < len(proto.graph.output):
        # Those that are inputs or weights as well are known from there.
        outputs = [onnx.ValueInfoProto.FromString(o.SerializeToString()) for o in outputs]
        del proto.graph.output[:]
        proto.graph.output.extend(outputs)
    for info in proto.graph.output:
        # What a model declares of its outputs need not be true.
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    for node in proto.graph.node:
        if model.disputed.intersection(node.output):
            # Of an operator that inference does not know, it leaves the shape open.
            node.op_type += "_disputed"
    try:
        typed = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception as error:
        text = str(error).strip().splitlines()
        raise ModelError(f"invalid graph: {text[0] if text else error}") from error
    return {
        v.name: v.type for v in (*typed.graph.input, *typed.graph.value_info, *typed.graph.output)
    }


_PLAIN = frozenset({"kernel_shape", "strides", "pads", "count_include_pad", "group", "p"})


def is_questionable(node: gs.Node) -> bool:
    """Whether onnx and onnxruntime may not agree on the output's shape.

    They differ on some cases of automatic or dilated pooling, of rounding up, of given output
    sizes, and of scales that are no round numbers.
    """
    if node.domain or node.op not in DISPUTED:
        return False
    return node.op in ("Resize", "Upsample") or any(
        name not in _PLAIN and not _is_default(name, value) for name, value in node.attrs.items()
    )


def _is_default(name: str, value: object) -> bool:
    """Whether an attribute that can make a pooling questionable says what its absence would."""
    match name:
        case "dilations":
            return set(value) == {1}  # type: ignore[call-overload]
        case "auto_pad":
            return value == "NOTSET"
        case "ceil_mode" | "storage_order":
            return value == 0
        case _:
            return False


Blocks = list[tuple[range, range]]
"""Axes before and after a reshape, block by block of equal size."""


def matching_blocks(source: Sequence[Dim], target: Sequence[Dim]) -> Blocks | None:
    """Split two shapes with the same number of elements into the smallest blocks of equal size.

    Returns:
        Pairs of axis ranges, such as ``(range(1, 4), range(1, 2))`` for a flatten; None when the
        shapes cannot be matched.
    """
    found = _equal_products(source, target)
    return _equal_ends(source, target) if found is None else found


def _equal_products(source: Sequence[Dim], target: Sequence[Dim]) -> Blocks | None:
    """Blocks whose sizes have provably equal products."""
    blocks = []
    i = j = 0
    while i < len(source) or j < len(target):
        start = i, j
        left, right = 1, 1
        while True:
            # The smaller product grows. Its factors are of one choice of symbols: wherever both
            # are the same for every choice, they are so for this one.
            if i == start[0] and i < len(source):
                left *= sample(source[i])
                i += 1
            elif j == start[1] and j < len(target):
                right *= sample(target[j])
                j += 1
            elif left == right and _same(source[start[0] : i], target[start[1] : j]):
                break
            elif j < len(target) and (i >= len(source) or right < left):
                right *= sample(target[j])
                j += 1
            elif i < len(source):
                left *= sample(source[i])
                i += 1
            elif j < len(target):
                right *= sample(target[j])
                j += 1
            else:
                return None
        blocks.append((range(start[0], i), range(start[1], j)))
    return blocks


def _equal_ends(source: Sequence[Dim], target: Sequence[Dim]) -> Blocks | None:
    """Blocks where some sizes are not known: what is left between equal ends is equal as well.

    Both shapes have the same number of elements, so once equal factors, none of them zero, are
    taken from the left and the right, so have the axes between, whatever their sizes are.
    """
    lead = 0
    while lead < min(len(source), len(target)) and source[lead] == target[lead] != 0:
        lead += 1
    i, j = len(source), len(target)
    ends = i, j
    left = right = 1
    while True:
        before, after = source[i - 1] if i > lead else None, target[j - 1] if j > lead else None
        if left <= right and isinstance(before, int) and before > 0:
            left, i = left * before, i - 1
        elif left >= right and isinstance(after, int) and after > 0:
            right, j = right * after, j - 1
        else:
            break
        if left == right:
            ends = i, j
    i, j = ends
    last = _equal_products(source[i:], target[j:])
    if last is None or (lead == 0 and (i, j) == (len(source), len(target))):
        return None
    blocks = [(range(k, k + 1), range(k, k + 1)) for k in range(lead)]
    blocks.append((range(lead, i), range(lead, j)))
    return blocks + [
        (range(b.start + i, b.stop + i), range(a.start + j, a.stop + j)) for b, a in last
    ]


def _same(left: Sequence[Dim], right: Sequence[Dim]) -> bool:
    """Whether two products are the same for every choice of symbols."""
    first = product(left)
    return first is not None and first == product(right)


def is_unknown(dim: Dim) -> bool:
    """Whether a symbol stands for nothing but itself: inference left the size open."""
    return isinstance(dim, str) and dim.startswith(("?", "unk__"))
