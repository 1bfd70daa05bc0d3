"""How a call of a module becomes inputs of a graph, and outputs a return value."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from torch_bridge.calls import Call, constants_of, leaves, tensors_of
from torch_bridge.export import Exported, ExportError


@dataclass(frozen=True)
class Signature:
    """How a call of the module becomes inputs of the graph, and outputs a return value.

    Attributes:
        model: the module, for its signature.
        names: the graph's inputs, each with the position of its tensor among the call's.
        example: the call that was exported.
        outputs: what the module returned for it; its tensors are placeholders without data.
    """

    model: nn.Module
    names: dict[str, int]
    example: Call
    outputs: Any

    @classmethod
    def of(cls, model: nn.Module, exported: Exported) -> Signature:
        """The signature of an exported module.

        Raises:
            ExportError: the graph's inputs and outputs are not those of the module.
        """
        graph, names = exported.proto.graph, exported.inputs
        present = [value.name for value in graph.input]
        count = len(tensors_of(exported.outputs))
        if not set(present) <= set(names) or len(graph.output) != count:
            raise ExportError(
                f"the exported model takes {', '.join(present)} and returns {len(graph.output)} "
                f"tensors, the module takes {', '.join(names)} and returns {count}.\n"
                "Try next: the other exporter."
            )
        outputs = pytree.tree_map(_placeholder, exported.outputs)
        return cls(model, {n: names.index(n) for n in present}, exported.call, outputs)

    def feeds(self, call: Call) -> dict[str, np.ndarray]:
        """The graph's inputs for a call.

        Raises:
            ValueError: an argument that is no tensor differs from the exported one: it is part of
                the graph.
        """
        given, known = _leaves(call), _leaves(self.example)
        if [name for name, _ in given] != [name for name, _ in known]:
            raise ValueError(
                "call the model with the arguments that it was exported with: "
                + ", ".join(name for name, _ in known)
            )
        for (name, value), (_, exported) in zip(given, known, strict=True):
            tensor = isinstance(exported, torch.Tensor)
            same = tensor or constants_of(value) == constants_of(exported)
            if tensor != isinstance(value, torch.Tensor) or not same:
                raise ValueError(
                    f"argument '{name}' is fixed in the exported model"
                    if not tensor
                    else f"argument '{name}' must be a tensor"
                )
        tensors = call.tensors()
        return {name: tensors[k].detach().cpu().numpy() for name, k in self.names.items()}

    def outputs_of(self, arrays: Sequence[np.ndarray], device: torch.device) -> Any:
        """The module's return value, out of the graph's outputs."""
        remaining = iter(arrays)

        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return torch.from_numpy(np.asarray(next(remaining))).to(device)

        return pytree.tree_map(fill, self.outputs)


def _leaves(call: Call) -> list[tuple[str, Any]]:
    return [leaf for name, value in call.arguments.items() for leaf in leaves(value, name)]


def _placeholder(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else copy.copy(leaf)
