"""Write models: atomically, and without building one message that holds all weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, TensorProto

from onnx_simplify.errors import ModelError
from onnx_simplify.graph.model import MESSAGE_LIMIT, Model
from onnx_simplify.graph.wire import GRAPH, INITIALIZER, RAW_DATA, length_prefix

# Where external tensors start in the data file: page-aligned, so that they can be mapped.
_ALIGNMENT = 4096
# The file system allows 255 bytes; the data file's name has five more.
_LONGEST_NAME = 250


def save(model: Model, path: str | os.PathLike[str], *, external: bool = False) -> int:
    """Write a model; an existing file is replaced by the complete new one or not at all.

    Args:
        model: the model.
        path: the file.
        external: put large weights into ``<name>.data`` beside it; also done when the model would
            exceed protobuf's 2 GiB.

    Returns:
        Number of bytes written.

    Raises:
        ModelError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    proto, large = model.structure()
    external = external or sum(t.values.nbytes for t in large.values()) > MESSAGE_LIMIT
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=_prefix(path)) as folder:
            new = Path(folder, path.name)
            with open(new, "wb") as file:
                if external:
                    data = Path(folder, f"{path.name}.data")
                    _write_external(proto, large, file, data, f"{path.name}.data")
                else:
                    for piece in _pieces(proto, large):
                        file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            _keep_mode(path, new)
            size = new.stat().st_size
            if external:
                size += data.stat().st_size
                os.replace(data, path.with_name(f"{path.name}.data"))
            os.replace(new, path)
            return size
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror or error}") from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Complain now rather than after all the work.

    Raises:
        ModelError: the folder is missing or cannot be written, or the path is a folder.
    """
    path = Path(os.path.realpath(path))
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a folder: name the output file")
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is not an ordinary file: name another output file")
        if not path.parent.is_dir():
            raise ModelError(f"folder {path.parent} does not exist")
        if not os.access(path.parent, os.W_OK):
            raise ModelError(f"folder {path.parent} cannot be written")
        if len(os.fsencode(path.name)) > _LONGEST_NAME:
            raise ModelError(f"the name of the output file is too long: {path.name[:40]}...")
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror or error}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file; an existing one is replaced by the complete new one or not at all.

    Raises:
        ModelError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=_prefix(path)) as folder:
            new = Path(folder, path.name)
            new.write_text(text, encoding="utf-8")
            _keep_mode(path, new)
            os.replace(new, path)
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror or error}") from error


def _prefix(path: Path) -> str:
    return f".{path.name[:32]}."


def serialized_size(model: Model) -> int:
    """Size in bytes of the model as a single file."""
    return sum(memoryview(piece).nbytes for piece in _pieces(*model.structure()))


def _keep_mode(old: Path, new: Path) -> None:
    if old.exists():
        os.chmod(new, old.stat().st_mode & 0o7777)
    else:
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(new, 0o666 & ~mask)


def _pieces(proto: ModelProto, large: dict[str, gs.Constant]) -> Iterator[bytes | memoryview]:
    """The serialized model, weights spliced in where a message would hold them."""
    graph = GraphProto()
    graph.CopyFrom(proto.graph)
    heads = []
    for tensor in proto.graph.initializer:
        if tensor.name in large:
            head = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            heads.append((head.SerializeToString(), large[tensor.name].values))
    small = [t for t in proto.graph.initializer if t.name not in large]
    del graph.initializer[:]
    graph.initializer.extend(small)
    rest = ModelProto()
    rest.CopyFrom(proto)
    rest.ClearField("graph")
    tensors: list[bytes | memoryview] = []
    for head, values in heads:
        raw = _bytes(values)
        field = length_prefix(RAW_DATA, raw.nbytes)
        tensors += [length_prefix(INITIALIZER, len(head) + len(field) + raw.nbytes), head, field]
        tensors.append(raw)
    skeleton = graph.SerializeToString()
    total = len(skeleton) + sum(
        t.nbytes if isinstance(t, memoryview) else len(t) for t in tensors
    )
    yield rest.SerializeToString()
    yield length_prefix(GRAPH, total)
    yield skeleton
    yield from tensors


def _write_external(
    proto: ModelProto, large: dict[str, gs.Constant], file: BinaryIO, data: Path, location: str
) -> None:
    with open(data, "wb") as out:
        for tensor in proto.graph.initializer:
            if tensor.name not in large:
                continue
            out.seek(-out.tell() % _ALIGNMENT, os.SEEK_CUR)
            raw = _bytes(large[tensor.name].values)
            del tensor.external_data[:]
            for key, value in (
                ("location", location),
                ("offset", str(out.tell())),
                ("length", str(raw.nbytes)),
            ):
                tensor.external_data.add(key=key, value=value)
            out.write(raw)
        out.truncate()
        out.flush()
        os.fsync(out.fileno())
    file.write(proto.SerializeToString())


def _bytes(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
