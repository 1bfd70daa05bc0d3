"""Write models: atomically, and without building one message that holds all weights.

A file is written in a hidden folder beside its place and moved there when it is complete.  A model
with external data is two files, which no file system replaces at once; the old pair is left in
steps, after each of which the model names a data file that is its own (see `_replace_pair`).

Whoever writes holds a lock on his hidden folder, so that the next one knows which were left behind
by a process that died, and removes them; moving files about is done under a lock on the folder.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, TensorProto

from onnx_simplify.errors import ModelError
from onnx_simplify.graph.model import Model, fits_message
from onnx_simplify.graph.wire import GRAPH, INITIALIZER, RAW_DATA, length_prefix

try:
    import fcntl
except ImportError:  # Windows: no locks, and what a dead process leaves stays
    fcntl = None  # type: ignore[assignment]

# Where external tensors start in the data file: page-aligned, so that they can be mapped.
_ALIGNMENT = 4096
# Names beside that of the output contain it.
_MARK = "onnx-simplify"
# So many bytes may a name have, as file systems go.
_LONGEST_NAME = 255
# Seconds to wait for others that move files about.
_PATIENCE = 10.0

Places = dict[str, tuple[int, int]]
"""Offset and length of each tensor in a data file."""


def save(
    model: Model,
    path: str | os.PathLike[str],
    *,
    external: bool = False,
    complete: Callable[[], None] = lambda: None,
) -> int:
    """Write a model; an existing file is replaced by the complete new one or not at all.

    Args:
        model: the model.
        path: the file.
        external: put large weights into ``<name>.data`` beside it; also done when the model would
            exceed protobuf's 2 GiB.
        complete: called when everything is written and has only to be moved to its place.

    Returns:
        Number of bytes written.

    Raises:
        ModelError: the file cannot be written.
    """
    path = _real(path)
    proto, large = model.structure(infos=True)
    external = external or not fits_message(model)
    try:
        with _workspace(path) as folder:
            if external:
                data = folder / "data"
                places = _write_data(proto, large, data)
                size = data.stat().st_size
                with _locked(path.parent):
                    return size + _replace_pair(model, path, data, proto, places, complete)
            new = folder / path.name
            size = _write(new, _pieces(proto, large))
            _keep_mode(path, new)
            with _locked(path.parent):
                complete()
                os.replace(new, path)
                _drop_leftovers(path)
            return size
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror or error}") from error


def check_writable(path: str | os.PathLike[str], *, external: bool = False) -> None:
    """Complain now rather than after all the work.

    Args:
        path: the file that will be written.
        external: whether there will be a data file beside it.

    Raises:
        ModelError: the folder is missing or cannot be written, or the path is a folder.
    """
    path = _real(path)
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a folder: name the output file")
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is not an ordinary file: name another output file")
        if not path.parent.is_dir():
            raise ModelError(f"folder {path.parent} does not exist")
        if not os.access(path.parent, os.W_OK):
            raise ModelError(f"folder {path.parent} cannot be written")
        if external:
            _data_path(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror or error}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file; an existing one is replaced by the complete new one or not at all.

    Raises:
        ModelError: the file cannot be written.
    """
    path = _real(path)
    try:
        with _workspace(path) as folder:
            new = folder / path.name
            _write(new, [text.encode()])
            _keep_mode(path, new)
            os.replace(new, path)
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror or error}") from error


def serialized_size(model: Model) -> int:
    """Size in bytes of the model as a single file."""
    return sum(memoryview(piece).nbytes for piece in pieces(model))


def pieces(model: Model) -> Iterator[bytes | memoryview]:
    """The model as a single file, in pieces; it must fit into one message."""
    return _pieces(*model.structure(infos=True))


def _real(path: str | os.PathLike[str]) -> Path:
    """The path behind symbolic links, of a file that need not exist.

    Raises:
        ModelError: it can only be a folder's, or its links lead nowhere.
    """
    name = os.fspath(path)
    if name and os.path.basename(name) in ("", os.curdir, os.pardir):
        raise ModelError(f"{name} is a folder: name the output file")
    try:
        os.stat(name)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ModelError(f"{name} cannot be written: its links lead in a circle") from error
    except ValueError as error:
        raise ModelError(f"{name!r} is no name of a file") from error
    return Path(os.path.realpath(name))


def _data_path(path: Path) -> Path:
    """Where the external data of a model belong.

    Raises:
        ModelError: no file can have that name, or no model can refer to it.
    """
    name = f"{path.name}.data"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise ModelError(f"{path.name[:40]}...: the name is too long for a data file beside it")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ModelError(f"{name!r}, the data file, would not be Unicode: rename it") from error
    return path.with_name(name)


def _data_prefix(path: Path) -> str:
    """What the names of data files begin with that are not at their place yet."""
    name, tail = path.name, f".{_MARK}-"
    room = _LONGEST_NAME - len(f"{tail}12345678.data")
    if len(os.fsencode(name)) > room:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        name = os.fsencode(name)[: room - len(digest)].decode("utf-8", "ignore") + digest
    return f"{name}{tail}"


@contextmanager
def _workspace(path: Path) -> Iterator[Path]:
    """A hidden folder beside a file, for this process alone; it is removed in the end."""
    prefix = f".{path.name[:32]}.{_MARK}-"
    with _locked(path.parent):
        for old in path.parent.glob(f"{glob.escape(prefix)}*"):
            with suppress(BlockingIOError):
                lock = _lock(old)
                if lock is not None:
                    shutil.rmtree(old, ignore_errors=True)
                    os.close(lock)
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
        lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds a lock on a folder, or None where there are no locks.

    Raises:
        BlockingIOError: another process has it.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for a lock on a folder and hold it; whoever waits in vain goes on without."""
    patience = time.monotonic() + _PATIENCE
    lock = None
    while time.monotonic() < patience:
        try:
            lock = _lock(folder)
            break
        except BlockingIOError:
            time.sleep(0.01)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> int:
    """Write a file to the disk; returns its size."""
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
        _sync(file)
    return path.stat().st_size


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _replace_pair(
    model: Model,
    path: Path,
    data: Path,
    proto: ModelProto,
    places: Places,
    complete: Callable[[], None],
) -> int:
    """Move a model and its data to their places; the folder must be locked.

    The model must never name the data of another one.  So where there is a data file already, the
    new one gets a name of its own at first, the model names that, and both get their final names
    when nobody refers to the old file any more.  The file having two names for an instant, which
    some readers refuse, everything is ready before.

    Args:
        model: the model, which knows what it was loaded from.
        path: its place.
        data: the complete data file.
        proto: the model's message.
        places: where its tensors are in the data file.
        complete: called before the first of both is moved.

    Returns:
        The size of the model without its data.
    """
    final = _data_path(path)
    new = data.with_name(path.name)
    if final.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{final.name} is a folder")
    if model.files and model.files[0] != path and final in model.files:
        raise ModelError(f"{final} holds the weights of the input: name another output")
    size = _write(new, [_naming(proto, places, final.name)])
    _keep_mode(path, new)
    _keep_mode(final, data)
    if final.exists():
        own = path.with_name(f"{_data_prefix(path)}{data.parent.name[-8:]}.data")
        first = data.with_name("first")
        _write(first, [_naming(proto, places, own.name)])
        _keep_mode(path, first)
        complete()
        os.replace(data, own)
        os.replace(first, path)
        try:
            os.link(own, data)
        except OSError:  # a file system without links: the name of its own has to do
            final.unlink()
            return size
    complete()
    os.replace(data, final)
    os.replace(new, path)
    _drop_leftovers(path)
    return size


def _drop_leftovers(path: Path) -> None:
    """Remove data files with names of their own, to which no model refers any more."""
    for old in path.parent.glob(f"{glob.escape(_data_prefix(path))}*.data"):
        with suppress(OSError):
            old.unlink()


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
    total = len(skeleton) + sum(t.nbytes if isinstance(t, memoryview) else len(t) for t in tensors)
    yield rest.SerializeToString()
    yield length_prefix(GRAPH, total)
    yield skeleton
    yield from tensors


def _write_data(proto: ModelProto, large: dict[str, gs.Constant], path: Path) -> Places:
    """Write large initializers to a file; returns where each of them is."""
    places = {}
    with open(path, "wb") as file:
        for tensor in proto.graph.initializer:
            if tensor.name in large:
                file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
                raw = _bytes(large[tensor.name].values)
                places[tensor.name] = file.tell(), raw.nbytes
                file.write(raw)
        file.truncate()
        _sync(file)
    return places


def _naming(proto: ModelProto, places: Places, location: str) -> bytes:
    """The serialized model, its large initializers being in the data file of that name."""
    for tensor in proto.graph.initializer:
        if tensor.name in places:
            offset, length = places[tensor.name]
            del tensor.external_data[:]
            for key, value in (("location", location), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
    return proto.SerializeToString()


def _bytes(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
