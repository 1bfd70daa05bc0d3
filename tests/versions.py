"""What tests say that hold with newer versions of onnxruntime only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnxruntime as ort
import pytest

# The first version of onnxruntime that takes them: all take older ones.
_OPSETS = {22: "1.21", 23: "1.23"}


def has_onnxruntime(version: str) -> bool:
    """Whether onnxruntime is of this version (such as ``1.28``) or a later one."""
    return _numbers(ort.__version__) >= _numbers(version)


def needs_onnxruntime(version: str, reason: str) -> pytest.MarkDecorator:
    """A mark for tests that are skipped with an earlier onnxruntime, and why they would fail."""
    return pytest.mark.skipif(
        not has_onnxruntime(version), reason=f"before onnxruntime {version}: {reason}"
    )


def opsets(numbers: Iterable[int]) -> list[Any]:
    """Operator sets as parameters of a test; skipped where onnxruntime is older than they are."""
    return [
        pytest.param(number, marks=needs_onnxruntime(_OPSETS[number], "unknown operator set"))
        if number in _OPSETS
        else number
        for number in numbers
    ]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
