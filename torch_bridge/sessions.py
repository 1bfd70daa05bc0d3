"""Sessions of models that came from modules."""

from __future__ import annotations

import numpy as np
import onnx

from onnx_simplify import CannotVerifyError
from onnx_simplify.errors import RunError
from onnx_simplify.graph.load import load
from onnx_simplify.runtime.session import Session


class CallError(RunError, ValueError):
    """A call with sizes or types that the ONNX model does not take."""


def open_model(proto: onnx.ModelProto, *, threads: int = 0, optimize: bool = True) -> Session:
    """A session of a model; see `Session`.

    Raises:
        RunError: onnxruntime cannot load it.
    """
    try:
        return Session(load(proto), threads=threads, optimize=optimize)
    except RunError as error:
        raise RunError(f"onnxruntime cannot load the model: {error}") from error


def run_model(session: Session, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What a model returns.

    Raises:
        CallError: it does not run on these inputs.
    """
    try:
        return session.run(feeds)
    except RunError as error:
        sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        raise CallError(f"the model does not take {sizes}: {error}") from error


def check_exported(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    """Tell an export that went wrong from other troubles.

    Raises:
        CannotVerifyError: the model does not run on the example inputs.
    """
    try:
        run_model(open_model(proto, optimize=False), feeds)
    except RunError as error:
        raise CannotVerifyError(
            "the exported model does not run on the example inputs: try the other exporter "
            f"({error})"
        ) from error
