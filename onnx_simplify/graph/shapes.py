"""Types and shapes of all tensors, by ONNX shape inference with data propagation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
import onnx
import onnx.shape_inference
import onnx_graphsurgeon as gs

from onnx_simplify.errors import ModelError
from onnx_simplify.graph.message import headless
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.traits import DISPUTED

Dim = int | str
"""A static size, or the symbol of a dynamic one (unknown sizes have symbols of their own)."""


EMPTY = ":empty"
"""End of the symbols of input dimensions that are declared as zero: free, most of the time."""


def infer(model: Model, input_shapes: Mapping[str, Sequence[int]] | None = None) -> None:
    """Set ``dtype`` and ``shape`` of every tensor of the graph, in place.

    Args:
        model: the model.
        input_shapes: sizes to assume for graph inputs, in place of their declared dynamic shapes.

    Raises:
        ModelError: the graph contradicts itself.
    """
    inferred = _infer(model, input_shapes)
    unknown = 0
    for tensor in model.graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            continue
        info = inferred.get(tensor.name)
        if info is None or not info.HasField("tensor_type"):
            tensor.shape = None
            continue
        kind = info.tensor_type
        if kind.elem_type:
            try:
                tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            except KeyError:
                tensor.dtype = kind.elem_type
        if not kind.HasField("shape"):
            tensor.shape = None
            continue
        shape: list[Dim] = []
        for dim in kind.shape.dim:
            if dim.HasField("dim_value"):
                shape.append(dim.dim_value)
            elif dim.dim_param:
                shape.append(dim.dim_param)
            else:
                unknown += 1
                shape.append(f"?{unknown}")
        tensor.shape = shape


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
        elif not name or name.startswith(("?", "unk__")) or names[name] > 1:
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


class Extent:
    """The size of a group of axes: a product of an integer and symbols."""

    def __init__(self, dims: Sequence[Dim] = ()):
        """The product of ``dims``."""
        self.number = 1
        self.symbols: Counter[str] = Counter()
        for dim in dims:
            self.multiply(dim)

    def multiply(self, dim: Dim) -> None:
        """Multiply by one more dimension, in place."""
        if isinstance(dim, str):
            self.symbols[dim] += 1
        else:
            self.number *= dim

    def __eq__(self, other: object) -> bool:
        """Whether both are the same product."""
        return (
            isinstance(other, Extent)
            and self.number == other.number
            and self.symbols == other.symbols
        )

    __hash__ = None  # type: ignore[assignment]

    def over(self, other: Extent) -> Dim | None:
        """The quotient, if it is one dimension."""
        rest = self.symbols - other.symbols
        if other.symbols - self.symbols or not other.number or self.number % other.number:
            return None
        number = self.number // other.number
        if not rest:
            return number
        if number == 1 and sum(rest.values()) == 1:
            return next(iter(rest))
        return None


def matching_blocks(
    source: Sequence[Dim], target: Sequence[Dim]
) -> list[tuple[range, range]] | None:
    """Split two shapes with the same number of elements into the smallest blocks of equal size.

    Returns:
        Pairs of axis ranges, such as ``(range(1, 4), range(1, 2))`` for a flatten; None when the
        shapes do not match.
    """
    blocks = []
    i = j = 0
    while i < len(source) or j < len(target):
        start = i, j
        left, right = Extent(), Extent()
        while True:
            if i == start[0] and i < len(source):
                left.multiply(source[i])
                i += 1
            elif j == start[1] and j < len(target):
                right.multiply(target[j])
                j += 1
            elif left == right:
                break
            elif j < len(target) and (i >= len(source) or _smaller(right, left)):
                right.multiply(target[j])
                j += 1
            elif i < len(source):
                left.multiply(source[i])
                i += 1
            elif j < len(target):
                right.multiply(target[j])
                j += 1
            else:
                return None
        blocks.append((range(start[0], i), range(start[1], j)))
    return blocks


def _smaller(left: Extent, right: Extent) -> bool:
    weight = (sum(left.symbols.values()), left.number)
    return weight < (sum(right.symbols.values()), right.number)


def is_unknown(dim: Dim) -> bool:
    """Whether a symbol stands for nothing but itself: inference left the size open."""
    return isinstance(dim, str) and dim.startswith(("?", "unk__"))


def resolve(
    source: Sequence[Dim], inferred: Sequence[Dim], request: Sequence[int] | None = None
) -> list[Dim]:
    """Output shape of a ``Reshape``, with sizes that inference did not find where possible.

    Args:
        source: the input's shape.
        inferred: what shape inference found (symbols that start with ``?`` stand for nothing).
        request: the target, where it is constant: 0 copies an input dimension, -1 is inferred.
    """
    shape = list(inferred)
    for axis, size in enumerate(request or ()):
        if size == 0 and axis < len(source):
            shape[axis] = source[axis]
        elif size > 0:
            shape[axis] = int(size)
    unknown = [a for a, d in enumerate(shape) if isinstance(d, str) and d not in source]
    if request is not None and -1 in list(request):
        unknown = [list(request).index(-1)]
    if len(unknown) == 1:
        rest = Extent([d for a, d in enumerate(shape) if a != unknown[0]])
        whole = Extent(source).over(rest)
        if whole is not None:
            shape[unknown[0]] = whole
    return shape
