"""Exceptions raised by the toolkit; each carries the command line's exit code."""

from __future__ import annotations

from typing import ClassVar


class SimplifyError(Exception):
    """Base class of all errors the toolkit raises on purpose.

    The message is one line that says what is wrong and what to do.
    """

    exit_code: ClassVar[int] = 2


class ModelError(SimplifyError):
    """The model cannot be read, is not valid ONNX, or an argument does not fit it."""


class VerificationError(SimplifyError):
    """The simplified model's outputs differ from the original's."""

    exit_code = 1


class CannotVerifyError(SimplifyError):
    """The original model itself does not run on any input that could be made."""

    exit_code = 3


class RunError(SimplifyError):
    """onnxruntime does not load or run a model."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, without onnxruntime's error codes."""
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    return line.split(" : ", 3)[-1] if line.startswith("[ONNXRuntimeError]") else line
