"""The standard streams of the command line, where ``-`` stands for one instead of a file."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from onnx_simplify.errors import ModelError
from onnx_simplify.graph.model import Model, fits_message
from onnx_simplify.graph.store import pieces
from onnx_simplify.isolation import Stage, enter

# The devices may be no files that can be opened or replaced: sockets, pipes, terminals.
_INPUT = ("-", "/dev/stdin", "/dev/fd/0")
_OUTPUT = ("-", "/dev/stdout", "/dev/fd/1")


def is_input(name: str) -> bool:
    """Whether the name of an input file stands for the standard input."""
    return name in _INPUT


def is_output(name: str | None) -> bool:
    """Whether the name of an output file stands for the standard output."""
    return name in _OUTPUT


def read_input() -> bytes:
    """What the standard input holds, to its end.

    Raises:
        ModelError: it is closed, a terminal, or cannot be read.
    """
    if sys.stdin is None:
        raise ModelError("the standard input is closed: pipe a model into it or name a file")
    if sys.stdin.isatty():
        raise ModelError("the standard input is a terminal: pipe a model into it or name a file")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise ModelError(f"the standard input cannot be read: {error.strerror or error}") from error


def check_output() -> None:
    """Complain now rather than after all the work if no model can go to the standard output.

    Raises:
        ModelError: it is closed or a terminal.
    """
    if sys.stdout is None:
        raise ModelError("the standard output is closed: name an output file")
    if sys.stdout.isatty():
        raise ModelError("a model is nothing for a terminal: redirect it or name an output file")


def write_model(model: Model) -> int:
    """Write a model to the standard output.

    Returns:
        Number of bytes written.

    Raises:
        ModelError: it exceeds 2 GiB, or cannot be written.
    """
    if not fits_message(model):
        raise ModelError("the result exceeds protobuf's 2 GiB, for one stream: name an output file")
    enter(Stage.PRINTING)
    size = 0
    try:
        for piece in pieces(model):
            size += memoryview(piece).nbytes
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    except OSError as error:
        _abandon(sys.stdout)
        raise ModelError(
            f"the standard output cannot be written: {error.strerror or error}"
        ) from error
    return size


def show(text: str, stream: TextIO | None) -> None:
    """Write to a standard stream, whatever it can show; a reader may have seen enough.

    Args:
        text: the text.
        stream: the stream; None if it is closed.

    Raises:
        OSError: it cannot be written.
    """
    enter(Stage.PRINTING)
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except OSError as error:
        _abandon(stream)
        if not isinstance(error, BrokenPipeError):
            raise


def _abandon(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere, rather than fail once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
