"""A module on its way from step to step."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from torch_bridge.signature import Signature


@dataclass(frozen=True)
class Stage:
    """A module on its way: as exported, or as a step left it.

    Attributes:
        proto: the model.
        dense: the model as exported.
        signature: how it is called.
        tensors: the tensors that modules return, by the module's name.
    """

    proto: onnx.ModelProto
    dense: onnx.ModelProto
    signature: Signature
    tensors: dict[str, list[str]]
