"""Run the command line in a process of its own, so that a crash ends in a message.

onnx and onnxruntime are native code, which a damaged model can bring down, and which does not hear
of interrupts.  Python cannot catch the one nor help the other; a parent process can.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from types import FrameType

# prctl(2): have this signal sent when the parent dies.
_PR_SET_PDEATHSIG = 1
_CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSYS")
# Seconds that the work may take to end when it is interrupted, before it is killed.
_GRACE = 2
# Exit code of an interrupted child; its parent gives the one that others see.
_INTERRUPTED = 130


class Stage(IntEnum):
    """What an interrupt does: see :func:`enter`."""

    STARTING = 0
    """Ends the process at once."""
    WORKING = 1
    """Raises KeyboardInterrupt, once; work that does not end of that is killed."""
    WRITING = 2
    """Raises KeyboardInterrupt, once, and what was begun is removed, however long that takes."""
    FINISHING = 3
    """Nothing: files are being moved to their places, and the run is as good as done."""
    PRINTING = 4
    """Ends the process without a word: everything is written."""


class _Process:
    """The process that the work is done in; None before there is one."""

    stage: mmap.mmap | None = None
    """One byte, which the parent reads."""
    has_parent = False


def isolated(work: Callable[[], int]) -> int:
    """Call ``work`` in a child process and return its exit code; on Linux only, elsewhere here.

    Where the child crashes, one line on the standard error says so, and the code is 2; likewise
    where either of both is interrupted, see :func:`enter`. Signals that end the child otherwise
    end this process alike.
    """
    stage = mmap.mmap(-1, 1)
    if not sys.platform.startswith("linux"):
        _Process.stage = stage
        enter(Stage.STARTING)
        return _carry_out(work)
    parent = os.getpid()
    # Until each of both knows what to do.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    child = os.fork()
    if child == 0:
        _Process.stage, _Process.has_parent = stage, True
        enter(Stage.STARTING)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            return 2
        return _carry_out(work)

    killed = False

    def forward(number: int, frame: FrameType | None) -> None:
        # The terminal sends an interrupt to both, others to this process alone.
        with suppress(ProcessLookupError):
            os.kill(child, number)
        if number == signal.SIGINT:
            # More of them do not put it off.
            signal.alarm(signal.alarm(0) or _GRACE)

    def give_up(number: int, frame: FrameType | None) -> None:
        nonlocal killed
        if stage[0] <= Stage.WORKING:
            killed = True
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGINT, forward)
    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGALRM, give_up)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if killed or status == _INTERRUPTED << 8:
        return interrupted()
    if not os.WIFSIGNALED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    reason = crash(number)
    if reason is not None:
        return _complain(reason)
    signal.signal(number, signal.SIG_DFL)
    os.kill(parent, number)
    return 2


def enter(stage: Stage) -> None:
    """Say what an interrupt does from now on, in the process that :func:`isolated` works in."""
    if _Process.stage is not None:
        _Process.stage[0] = stage
        signal.signal(signal.SIGINT, _HANDLERS[stage])


def interrupted() -> int:
    """Say that the run was interrupted, and return the exit code."""
    if _Process.has_parent:
        # It says so, and need not wait until all memory is given back.
        os._exit(_INTERRUPTED)
    return _complain("interrupted, nothing written")


def crash(number: int) -> str | None:
    """What is to be said of a process which that signal ended; None if nobody is to blame."""
    for name in _CRASHES:
        if number == getattr(signal, name, None):
            return f"onnx or onnxruntime crashed ({name}): the model is probably damaged"
    if number == getattr(signal, "SIGKILL", None):
        return "killed (SIGKILL), probably for lack of memory"
    return None


def _carry_out(work: Callable[[], int]) -> int:
    code = work()
    enter(Stage.PRINTING)
    return code


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(interrupted())


def _unwind(number: int, frame: FrameType | None) -> None:
    # Another one would disturb the cleaning up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


_HANDLERS: dict[Stage, Callable[[int, FrameType | None], None] | signal.Handlers] = {
    Stage.STARTING: _leave,
    Stage.WORKING: _unwind,
    Stage.WRITING: _unwind,
    Stage.FINISHING: signal.SIG_IGN,
    Stage.PRINTING: signal.SIG_DFL,
}


def _complain(text: str) -> int:
    if sys.stderr is not None:
        # A child that died had no time to take its status line away and show the cursor.
        clear = "\r\x1b[K\x1b[?25h" if os.name == "posix" and sys.stderr.isatty() else ""
        print(f"{clear}onnx-simplify: {text}", file=sys.stderr, flush=True)
    return 2
