"""Messages whose initializers have a type and a shape, but no data."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, TensorProto
from onnx_graphsurgeon.logger import G_LOGGER

# Tensors up to this many bytes stay inside messages, so that shape inference can read their values.
INLINE_BYTES = 1024


# A single protobuf message cannot exceed 2 GiB; leave room for the nodes.
MESSAGE_LIMIT = 2**31 - 2**24


# It warns of types without a numpy equivalent, which are handled here.
G_LOGGER.severity = G_LOGGER.ERROR


def headless(proto: ModelProto) -> ModelProto:
    """A copy in which initializers without data have become graph inputs.

    The ONNX checker and shape inference accept it, and need no weights.
    """
    copy = ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph
    known = {i.name for i in graph.input}
    keep = []
    for tensor in graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            keep.append(tensor)
        elif tensor.name not in known:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    keep = [copy_tensor(t) for t in keep]
    del graph.initializer[:]
    graph.initializer.extend(keep)
    return copy


def add_copy(container, message):  # type: ignore[no-untyped-def]
    """A copy of a message at the end of a repeated field."""
    new = container.add()
    new.CopyFrom(message)
    return new


def copy_tensor(tensor: TensorProto) -> TensorProto:
    """The same tensor, outside of any other message."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    return copy


def value_info_of(tensor: gs.Constant) -> onnx.ValueInfoProto:
    """Name, type and shape of an initializer."""
    return onnx.helper.make_tensor_value_info(
        tensor.name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)), tensor.shape
    )


def stays_inline(dtype: object) -> bool:
    """Whether bytes of an array of this type are not the bytes of a tensor, or foreign to numpy."""
    kind: np.dtype = np.dtype(dtype)  # type: ignore[call-overload]
    packed = ("int2", "int4", "float4", "float8")
    return kind.kind in "OSU" or kind.name.lstrip("u").startswith(packed)


def nbytes_of(tensor: gs.Constant) -> int:
    """Bytes of an initializer; its values are not looked at."""
    return int(np.dtype(tensor.dtype).itemsize * np.prod(tensor.shape))


def placeholder(name: str, dtype: np.dtype, shape: Iterable[int]) -> TensorProto:
    """An initializer with a type and a shape, whose data are elsewhere."""
    tensor = TensorProto(
        name=name,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)),
        dims=shape,
        data_location=TensorProto.EXTERNAL,
    )
    tensor.external_data.add(key="location", value="memory")
    return tensor


def drop_inputs(graph: GraphProto, names: set[str]) -> None:
    """Remove graph inputs, in place."""
    keep = [i for i in graph.input if i.name not in names]
    keep = [onnx.ValueInfoProto.FromString(i.SerializeToString()) for i in keep]
    del graph.input[:]
    graph.input.extend(keep)
