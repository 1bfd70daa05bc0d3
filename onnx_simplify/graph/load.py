"""Read a model from a path, a stream, bytes or a message; its weights are mapped, not read."""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, TensorProto, numpy_helper

from onnx_simplify.errors import ModelError, first_line
from onnx_simplify.graph.message import (
    INLINE_BYTES,
    copy_tensor,
    drop_inputs,
    headless,
    placeholder,
    stays_inline,
)
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.order import all_nodes, sort_nodes
from onnx_simplify.graph.wire import split_raw_data

ModelSource = str | os.PathLike[str] | bytes | ModelProto


# Operator sets that onnxruntime knows without their being imported.
_DOMAINS = ("ai.onnx.ml", "com.microsoft")


@dataclass
class _Source:
    """What was read.

    Attributes:
        proto: the message; initializers that are in ``arrays`` carry no data.
        arrays: weights, by name.
        folder: where files of external data are; None beside a stream, bytes or a message.
        bytes: size of what was read; None for a message.
        files: what was read from.
    """

    proto: ModelProto
    arrays: dict[str, np.ndarray]
    folder: Path | None = None
    bytes: int | None = None
    files: list[Path] = field(default_factory=list)


def load(source: ModelSource, *, freeze_weights: bool = False) -> Model:
    """Read a model from a path, serialized bytes, or a message (which is not modified).

    Weights inside the file are mapped, not read; so are external ones. A pipe is read to its end.

    Args:
        source: the model.
        freeze_weights: declare initializers final that are graph inputs as well, which a caller
            could replace (IR version 4 and newer); they are no inputs then.

    Raises:
        ModelError: the source cannot be read or is not a valid ONNX model.
    """
    found = _opened(source)
    proto, arrays = found.proto, found.arrays
    _check_text(proto)
    if not proto.graph.node and not proto.graph.output:
        raise ModelError("not an ONNX model: it has no graph")
    _read_external(found)
    _import_domains(proto)
    _check(proto)
    if freeze_weights:
        drop_inputs(proto.graph, {i.name for i in proto.graph.initializer})
    for tensor in proto.graph.initializer:
        values = arrays[tensor.name]
        if values.nbytes > INLINE_BYTES and not stays_inline(values.dtype):
            tensor.CopyFrom(placeholder(tensor.name, values.dtype, values.shape))
        elif tensor.data_location == TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(np.array(values), tensor.name))
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    try:
        model = Model(proto, arrays)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"not a valid ONNX graph: {first_line(error)}") from error
    model.source_bytes = found.bytes
    model.files = found.files
    model.mapped = list(dict.fromkeys(filter(None, map(_mapping, arrays.values()))))
    return model


def _opened(source: ModelSource) -> _Source:
    """The message, and the weights that it holds itself."""
    if isinstance(source, ModelProto):
        return _Source(*_strip(source))
    if isinstance(source, bytes):
        return _decoded(source, "the model")
    if not isinstance(source, (str, os.PathLike)):
        raise ModelError(f"expected a path, bytes or a ModelProto, got {type(source).__name__}")
    path = Path(source)
    data, streamed = _read_file(path)
    found = _decoded(data, str(path))
    if not streamed:
        found.folder, found.files = path.parent, [path.resolve()]
    return found


def _decoded(data: bytes | np.ndarray, label: str) -> _Source:
    """A serialized message; its weights stay where they are.

    Args:
        data: the message.
        label: what it is called in what is said of it.
    """
    if len(data) == 0:
        raise ModelError(f"{label} is empty: not an ONNX model")
    buffer = np.frombuffer(data, np.uint8)
    skeleton, spans = split_raw_data(buffer.data, INLINE_BYTES)
    proto = ModelProto()
    try:
        proto.ParseFromString(skeleton)
    except DecodeError as error:
        raise ModelError(f"{label} is not an ONNX model (cannot be decoded)") from error
    arrays = {}
    for index, (start, stop) in spans.items():
        tensor = proto.graph.initializer[index]
        arrays[tensor.name] = _view(tensor, buffer[start:stop])
    return _Source(proto, arrays, bytes=len(data))


def _read_external(found: _Source) -> None:
    """Read the weights that the message does not hold, in place; files are mapped once."""
    files: dict[Path, np.ndarray] = {}
    for tensor in found.proto.graph.initializer:
        if tensor.name not in found.arrays:
            values = _read(tensor, found.folder, files)
            found.arrays[tensor.name] = values
            if found.bytes is not None and tensor.data_location == TensorProto.EXTERNAL:
                found.bytes += values.nbytes
    found.files += files


def _strip(source: ModelProto) -> tuple[ModelProto, dict[str, np.ndarray]]:
    """A copy whose initializers carry no data that could be large, and these by name."""
    proto = ModelProto()
    arrays = {}
    for kind, value in source.ListFields():
        if kind.name != "graph":
            if kind.is_repeated:
                getattr(proto, kind.name).extend(value)
            else:
                setattr(proto, kind.name, value)
    for kind, value in source.graph.ListFields():
        if kind.name == "initializer":
            for tensor in value:
                if tensor.HasField("raw_data"):
                    small = TensorProto(
                        name=tensor.name, data_type=tensor.data_type, dims=tensor.dims
                    )
                    raw = tensor.raw_data
                    if len(raw) <= INLINE_BYTES:
                        small.raw_data = raw
                    arrays[tensor.name] = _view(small, np.frombuffer(raw, np.uint8))
                    proto.graph.initializer.append(small)
                else:
                    proto.graph.initializer.append(tensor)
        elif kind.is_repeated:
            getattr(proto.graph, kind.name).extend(value)
        else:
            setattr(proto.graph, kind.name, value)
    return proto, arrays


def _view(tensor: TensorProto, raw: np.ndarray) -> np.ndarray:
    try:
        if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4) or tensor.data_type >= 17:
            full = copy_tensor(tensor)
            full.raw_data = raw.tobytes()
            return numpy_helper.to_array(full)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if any(d < 0 for d in tensor.dims):
            raise ValueError("negative size")
        return raw.view(dtype).reshape(tuple(tensor.dims))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"initializer '{tensor.name}' has data that do not fit its shape"
        ) from error


def _read(tensor: TensorProto, folder: Path | None, files: dict[Path, np.ndarray]) -> np.ndarray:
    """The values of an initializer; files of external data are mapped once, into ``files``."""
    if tensor.data_location != TensorProto.EXTERNAL:
        try:
            return numpy_helper.to_array(tensor)
        except Exception as error:
            raise ModelError(
                f"initializer '{tensor.name}' cannot be read: {first_line(error)}"
            ) from error
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise ModelError(
            f"initializer '{tensor.name}' is in a file beside the model: pass the model's path"
        )
    shown = location[:200]
    try:
        base = folder.resolve()
        path = (base / location).resolve()
        if not location or os.path.isabs(location) or not path.is_relative_to(base):
            raise ModelError(f"external data location '{shown}' points outside the model's folder")
        if not path.is_file():
            raise ModelError(f"external data file '{shown}' is missing: put it beside the model")
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"external data location '{shown}' is no name of a file") from error
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", path.stat().st_size - offset))
    except ValueError as error:
        raise ModelError(
            f"initializer '{tensor.name}' has a malformed external location"
        ) from error
    if path not in files:
        files[path] = _map_file(path)
    data = files[path]
    if offset < 0 or length < 0 or offset + length > len(data):
        raise ModelError(f"external data file '{shown}' is too short for '{tensor.name}'")
    raw = np.frombuffer(data, np.uint8)[offset : offset + length]
    return _view(tensor, raw)


def _read_file(path: Path) -> tuple[np.ndarray | bytes, bool]:
    """What a path holds, and whether that came as a stream, beside which there are no files."""
    try:
        kind = path.stat().st_mode
        if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
            raise ModelError(f"{path} is a device, not an ONNX file")
        if stat.S_ISFIFO(kind):
            return path.read_bytes(), True
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return _map_file(path), False


def _map_file(path: Path) -> np.ndarray:
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a folder, not an ONNX file")
        if path.stat().st_size == 0:
            return np.zeros(0, np.uint8)
        return np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | ValueError) -> ModelError:
    if isinstance(error, FileNotFoundError):
        return ModelError(f"{path} does not exist")
    reason = error.strerror if isinstance(error, OSError) else None
    return ModelError(f"{path} cannot be read: {reason or error}")


def _check_text(message: Message) -> None:
    """Refuse names that are not UTF-8: nothing could be said about such a model."""
    try:
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                for child in value if field.is_repeated else (value,):
                    _check_text(child)
            elif field.type == field.TYPE_STRING:
                for text in value if field.is_repeated else (value,):
                    if not isinstance(text, str):
                        raise ModelError("not an ONNX model: it has names that are not UTF-8")
    except UnicodeDecodeError as error:
        raise ModelError("not an ONNX model: it has names that are not UTF-8") from error


def _mapping(array: np.ndarray) -> mmap.mmap | None:
    """The file mapping that an array is a view of."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, mmap.mmap) else None


def _check(proto: ModelProto) -> None:
    if not proto.opset_import:
        raise ModelError("not a valid ONNX model: it imports no operator set")
    newest = onnx.defs.onnx_opset_version()
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx") and not 0 < opset.version <= newest:
            raise ModelError(
                f"operator set {opset.version} is not known (up to {newest} is): "
                "upgrade the onnx package"
            )
    names: set[str] = set()
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            raise ModelError(f"invalid graph: two initializers are named '{tensor.name}'")
        names.add(tensor.name)
    sort_nodes(proto.graph)
    stripped = ModelProto()
    stripped.CopyFrom(proto)
    for tensor in stripped.graph.initializer:
        if not any(f.name.endswith("_data") for f, _ in tensor.ListFields()):
            tensor.data_location = TensorProto.EXTERNAL
    stripped = headless(stripped)
    _forgive(stripped)
    try:
        onnx.checker.check_model(stripped)
    except Exception as error:
        raise ModelError(f"not a valid ONNX model: {first_line(error)}") from error


def _forgive(model: ModelProto) -> None:
    """Add what the checker insists on and nobody needs, in place."""
    graph = model.graph
    graph.name = graph.name or "graph"
    for info in graph.output:
        if info.type.WhichOneof("value") is None:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    for info in (*graph.input, *graph.output):
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.shape.SetInParent()
    # Version 18 was withdrawn by version 21; onnxruntime runs both.
    for node in all_nodes(graph):
        if node.op_type == "GroupNormalization" and node.domain in ("", "ai.onnx"):
            node.op_type = "InstanceNormalization"
            del node.attribute[:]
    # Older checkers know only the short name of the default domain.
    if "" not in {o.domain for o in model.opset_import}:
        for item in (*model.opset_import, *all_nodes(graph)):
            item.domain = "" if item.domain == "ai.onnx" else item.domain


def _import_domains(model: ModelProto) -> None:
    """Import the operator sets that nodes use, as onnxruntime does unasked, in place."""
    known = {o.domain for o in model.opset_import}
    for domain in sorted({n.domain for n in model.graph.node} - known):
        if domain == "ai.onnx" and "" in known:
            for node in model.graph.node:
                node.domain = "" if node.domain == domain else node.domain
        elif domain in _DOMAINS:
            model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
