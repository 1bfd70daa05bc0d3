"""A float32 stand-in for models in types that onnxruntime's CPU kernels do not cover.

There is no ``bfloat16`` convolution on CPU, nor a ``double`` one.  Such models are measured and
verified with every tensor of these types turned into float32: the same function, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, TypeProto, numpy_helper

_TYPES = (TensorProto.BFLOAT16, TensorProto.DOUBLE)
# Attributes that hold an element type.
_TYPE_ATTRIBUTES = frozenset({"to", "dtype"})


def needs_widening(model: ModelProto) -> bool:
    """Whether the model has tensors that :func:`widen` would change."""
    return any(t.elem_type in _TYPES for t in _tensor_types(model.graph)) or any(
        t.data_type in _TYPES for t in model.graph.initializer
    )


def widen(model: ModelProto) -> None:
    """Turn all ``bfloat16`` and ``double`` tensors of the graph into float32, in place.

    Initializers without data (external ones) change their type only.
    """
    _widen_graph(model.graph)


def as_float32(values: np.ndarray) -> np.ndarray:
    """The array, in float32 if it has one of the types in question."""
    narrow = values.dtype == np.float64 or values.dtype.name == "bfloat16"
    return values.astype(np.float32) if narrow else values


def _tensor_types(graph: GraphProto) -> Iterator[TypeProto.Tensor]:
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.HasField("tensor_type"):
            yield info.type.tensor_type


def _widen_graph(graph: GraphProto) -> None:
    for kind in _tensor_types(graph):
        if kind.elem_type in _TYPES:
            kind.elem_type = TensorProto.FLOAT
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.INT and attribute.name in _TYPE_ATTRIBUTES:
                if attribute.i in _TYPES:
                    attribute.i = TensorProto.FLOAT
            elif attribute.type == AttributeProto.TENSOR:
                _widen_tensor(attribute.t)
            elif attribute.type == AttributeProto.GRAPH:
                _widen_graph(attribute.g)


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type not in _TYPES:
        return
    if tensor.data_location == TensorProto.EXTERNAL:
        tensor.data_type = TensorProto.FLOAT
    else:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
