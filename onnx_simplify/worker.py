"""Simplify in a process of its own, so that a crash of native code is an exception in this one.

The process is a fresh interpreter, which shares nothing with this one: neither its threads nor its
``__main__``, which may have no guard.  Both speak in pickles, through pipes.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import EncodeError
from onnx import ModelProto

from onnx_simplify.errors import ModelError, SimplifyError, first_line
from onnx_simplify.isolation import crash

if TYPE_CHECKING:
    from onnx_simplify.report import Report

# What the interpreter runs. It finds modules where this one does, whatever else is installed.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from onnx_simplify.worker import serve; serve()"
)


def simplify_apart(arguments: Mapping[str, Any]) -> tuple[ModelProto, Report]:
    """Call :func:`onnx_simplify.simplify` in another process.

    Args:
        arguments: its arguments by name.

    Returns:
        What it returns.

    Raises:
        ModelError: the process crashed, cannot be started, or cannot be given the arguments.
        SimplifyError: as the function itself.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise ModelError("isolated needs a Python interpreter, and this program is none of its own")
    try:
        request = pickle.dumps({name: _plain(value) for name, value in arguments.items()}, 5)
    except (EncodeError, ValueError) as error:
        raise ModelError(
            f"isolated cannot hand the model over ({first_line(error)}): give its path"
        ) from error
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ModelError(f"isolated cannot hand an argument over: {first_line(error)}") from error
    path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            **_apart(),
        )
    except OSError as error:
        raise ModelError(
            f"isolated cannot start {sys.executable}: {error.strerror or error}"
        ) from error
    with process:
        assert process.stdin is not None and process.stdout is not None
        try:
            # Where the process is gone already, its exit code tells more.
            with suppress(OSError):
                process.stdin.write(request)
                process.stdin.flush()
            # This end stays open: where it is closed, the other process ends as well.
            answer = pickle.load(process.stdout)
        except (EOFError, pickle.UnpicklingError):
            answer = None
        except BaseException:
            process.kill()
            raise
        finally:
            with suppress(OSError):
                process.stdin.close()
    if answer is None:
        raise ModelError(_epitaph(process.returncode))
    result, problem, trace = answer
    if problem is None:
        return result
    if isinstance(problem, SimplifyError):
        raise problem
    raise problem from RuntimeError(f"in the other process:\n{trace}")


def serve() -> None:
    """Answer the request on the standard input on the standard output, and end the process."""
    output = os.fdopen(os.dup(1), "wb")
    # Whatever else is printed must not get in between.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        arguments = pickle.load(sys.stdin.buffer)
        if os.name == "posix":  # elsewhere, a thread that reads keeps libraries from being loaded
            threading.Thread(target=_end_with_the_caller, daemon=True).start()
        from onnx_simplify.api import simplify

        answer = pickle.dumps((simplify(**arguments), None, ""), 5)
    except BaseException as error:
        answer = _failure(error)
    output.write(answer)
    output.flush()
    os._exit(0)


def _failure(error: BaseException) -> bytes:
    """The answer that there was an error."""
    trace = traceback.format_exc()
    try:
        answer = pickle.dumps((None, error, trace))
        pickle.loads(answer)
    except Exception:  # some say more to their constructor than they keep
        text = f"{type(error).__name__}: {first_line(error)}"
        answer = pickle.dumps((None, RuntimeError(text), trace))
    return answer


def _end_with_the_caller() -> None:
    os.read(0, 1)
    os._exit(1)


def _plain(value: Any) -> Any:
    """An argument as types that can be handed over."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Collection) and not isinstance(value, (str, bytes, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    return value


def _apart() -> dict[str, Any]:
    """What keeps a terminal from interrupting the other process: it ends with this one."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def _epitaph(code: int) -> str:
    """Why a process ended without an answer."""
    reason = crash(-code)
    if code >= 0xC0000000:  # Windows' exceptions
        reason = f"onnx or onnxruntime crashed (0x{code:08X}): the model is probably damaged"
    return reason or f"the process that simplified ended too soon (exit code {code})"
