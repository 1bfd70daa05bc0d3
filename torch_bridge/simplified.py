"""What the steps return: an ONNX model that is called like the module."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch

from onnx_simplify import Report
from onnx_simplify.runtime.benchmark import Timing, time_calls
from onnx_simplify.runtime.session import Session
from onnx_simplify.runtime.verdict import Verification
from torch_bridge.calls import Call
from torch_bridge.export import inference, save
from torch_bridge.sessions import CallError, open_model, run_model
from torch_bridge.stage import Stage


class SimplifiedModel:
    """A simplified module: an ONNX model that is called like the module.

    Calling it runs the model in onnxruntime on the CPU. It takes what the module takes and returns
    what the module returns, without gradients. Sizes are those of the example inputs, except for
    dimensions exported as dynamic; arguments that are not tensors must be those of the example.

    Attributes:
        onnx_model: the model.
        report: what was done, see `onnx_simplify.Report`.
        verification: the comparison with the module itself; None if it was not made.
    """

    def __init__(self, stage: Stage, report: Report):
        """Made by `simplify` and the steps, not by their users."""
        self.onnx_model = stage.proto
        self.report = report
        self.verification: Verification | None = None
        self.stage = stage
        self._opened: Session | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            TypeError: the arguments do not fit the module's signature.
            ValueError: they are not those that were exported.
            CallError: they are of other sizes or types.
            RunError: onnxruntime cannot load the model.
        """
        call = Call.of(self.stage.signature.model, (args, kwargs))
        feeds = self.stage.signature.feeds(call)
        device = next((t.device for t in call.tensors()), torch.device("cpu"))
        try:
            arrays = run_model(self.runner, feeds)
        except CallError as error:
            raise CallError(
                f"{error} (dimensions that vary must be exported with dynamic_shapes)"
            ) from error
        return self.stage.signature.outputs_of(arrays, device)

    def __getstate__(self) -> dict[str, Any]:
        """All but the session, which is opened again where it is needed."""
        return {**self.__dict__, "_opened": None}

    @property
    def session(self) -> ort.InferenceSession:
        """An onnxruntime session of the model, on the CPU with default options.

        Raises:
            RunError: onnxruntime cannot load the model.
        """
        return self.runner.raw

    @property
    def runner(self) -> Session:
        """The session that calls run in, opened when it is first needed."""
        if self._opened is None:
            self._opened = open_model(self.onnx_model)
        return self._opened

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ONNX model; a file of that name is replaced by the complete new one.

        Weights go into the same file, or beside it in ``<name>.data`` above 2 GiB.
        """
        save(self.onnx_model, Path(path))

    def benchmark(
        self, *, threads: int = 1, rounds: int = 15, eager: bool = True
    ) -> dict[str, Timing]:
        """Time it on the example inputs, interleaved with the model as exported.

        Args:
            threads: threads within an operator, of onnxruntime and of torch.
            rounds: counted rounds, after two that are not.
            eager: time the PyTorch module as well.

        Returns:
            Median and quartiles in milliseconds of ``dense``, ``simplified`` and ``torch``.

        Raises:
            RunError: onnxruntime cannot load or run one of the models.
        """
        example = self.stage.signature.example
        feeds = self.stage.signature.feeds(example)
        calls: dict[str, Callable[[], object]] = {}
        for name, proto in (("dense", self.stage.dense), ("simplified", self.onnx_model)):
            calls[name] = partial(run_model, open_model(proto, threads=threads), feeds)
        if not eager:
            return time_calls(calls, rounds=rounds)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with inference(self.stage.signature.model) as module:
                return time_calls({**calls, "torch": partial(example.run, module)}, rounds=rounds)
        finally:
            torch.set_num_threads(before)
