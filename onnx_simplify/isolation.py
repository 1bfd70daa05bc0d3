"""Run the command line in a process of its own, so that a crash ends in a message.

onnx and onnxruntime are native code, which a damaged model can bring down.  Python cannot catch
that; a parent process can tell.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

# prctl(2): have this signal sent when the parent dies.
_PR_SET_PDEATHSIG = 1
_CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSYS")


def isolated(work: Callable[[], int]) -> int:
    """Call ``work`` in a child process and return its exit code; on Linux only, elsewhere here.

    Where the child crashes, one line on the standard error says so, and the code is 2. Signals
    that end it otherwise end this process alike.
    """
    if not sys.platform.startswith("linux"):
        return work()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            return 2
        return work()
    # The terminal sends this one to both; the child knows what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(child, number))
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    name = signal.Signals(number).name
    if name in _CRASHES:
        return _complain(f"onnx or onnxruntime crashed ({name}): the model is probably damaged")
    if number == signal.SIGKILL:
        return _complain("killed (SIGKILL), probably for lack of memory")
    signal.signal(number, signal.SIG_DFL)
    os.kill(parent, number)
    return 2


def _complain(text: str) -> int:
    print(f"onnx-simplify: {text}", file=sys.stderr)
    return 2
