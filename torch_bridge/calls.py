"""A call of a module: its arguments, and names for the tensors that go in and come out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

# What may stand among arguments and outputs beside tensors: constants, compared by value.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), slice, Enum, torch.dtype, torch.device)


@dataclass(frozen=True)
class Call:
    """A call of a module's ``forward``.

    ``args`` holds every argument that can be positional, in the signature's order, whether the
    caller named it or not: both exporters then agree on the order of the inputs. ``arguments``
    maps each parameter's name to its value.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any) -> Call:
        """Bind ``example_inputs`` (see `export`) to the signature of ``model.forward``.

        Raises:
            TypeError: They do not fit.
        """
        args, kwargs = _args_and_kwargs(example_inputs)
        signature = inspect.signature(model.forward)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
            ) from error
        arguments = dict(bound.arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        return cls(bound.args, bound.kwargs, arguments)

    def copied(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with copies of their tensors: in-place operations do them no harm."""

        def copy(leaf: Any) -> Any:
            return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf

        args, kwargs = pytree.tree_map(copy, (self.args, self.kwargs))
        return args, kwargs

    def run(self, model: nn.Module) -> Any:
        """What the model returns."""
        args, kwargs = self.copied()
        return model(*args, **kwargs)

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments, nested ones included, in order."""
        return tensors_of((self.args, self.kwargs))

    def filled(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors in the places of these."""
        remaining = iter(tensors)

        def fill(leaf: Any) -> Any:
            return next(remaining) if isinstance(leaf, torch.Tensor) else leaf

        args, kwargs = pytree.tree_map(fill, (self.args, self.kwargs))
        return args, kwargs

    def shapes(self, dynamic_shapes: Any) -> list[dict[int, Any]] | None:
        """``dynamic_shapes`` (see `export`) as one entry per tensor; None if nothing varies.

        Raises:
            ValueError: An entry for an argument that the call does not have, or entries nested
                otherwise than the arguments.
        """
        if not dynamic_shapes:
            return None
        names = list(self.arguments)
        if not isinstance(dynamic_shapes, Mapping):
            entries = list(dynamic_shapes)
            if len(entries) > len(names):
                raise ValueError(
                    f"dynamic_shapes has {len(entries)} entries for {len(names)} arguments"
                )
            given = dict(zip(names, entries, strict=False))
        elif all(isinstance(key, int) for key in dynamic_shapes):
            given = {names[0]: dict(dynamic_shapes)}
        else:
            given = dict(dynamic_shapes)
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(
                f"dynamic_shapes speaks of {', '.join(map(repr, unknown))}, "
                f"but the arguments are {', '.join(map(repr, names))}"
            )
        found = []
        for name, value in self.arguments.items():
            found += list(_shape_entries(value, given.get(name)))
        return found


def check_plain(value: Any, what: str) -> None:
    """Raise TypeError where a nested value holds more than tensors and plain constants.

    The tensors in objects that torch's pytree does not know would go unnoticed.
    """
    for leaf in pytree.tree_leaves(value):
        if not isinstance(leaf, (torch.Tensor, *_PLAIN)):
            raise TypeError(
                f"{what} hold a {type(leaf).__name__}, which cannot be followed: use tensors, "
                "plain constants, tuples, lists and dictionaries, or register the type with "
                "torch.utils._pytree"
            )


def constants_of(value: Any) -> list[tuple[type, Any]]:
    """What is no tensor in a nested value, in order, with its type: 1 is not True."""
    plain = [leaf for leaf in pytree.tree_leaves(value) if not isinstance(leaf, torch.Tensor)]
    return [(type(leaf), leaf) for leaf in plain]


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in a nested value, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _shape_entries(value: Any, spec: Any) -> Iterator[dict[int, Any]]:
    """The entry of each tensor in ``value``, from a spec of the same nesting."""
    if isinstance(value, (tuple, list, Mapping)):
        keys = list(value) if isinstance(value, Mapping) else range(len(value))
        if spec is not None and len(spec) != len(keys):
            raise ValueError(f"dynamic_shapes has {len(spec)} entries for {len(keys)} values")
        for key in keys:
            yield from _shape_entries(value[key], None if spec is None else spec[key])
    elif isinstance(value, torch.Tensor):
        yield _dims(spec, value.dim())


def _dims(spec: Any, rank: int) -> dict[int, Any]:
    """The dynamic dimensions of one tensor: what varies by its index from the front.

    Raises:
        ValueError: not a mapping from dimensions, or one entry for each; or no such dimension.
    """
    if spec is None:
        return {}
    if isinstance(spec, Mapping):
        given = dict(spec)
    elif isinstance(spec, (tuple, list)) and len(spec) == rank:
        given = dict(enumerate(spec))
    else:
        raise ValueError(
            f"dynamic_shapes: {spec!r} does not say which dimensions vary; "
            'write {0: "batch"}, or one entry for each dimension'
        )
    found = {}
    for dim, size in given.items():
        if not isinstance(dim, int) or not -rank <= dim < rank:
            raise ValueError(f"dynamic_shapes: there is no dimension {dim!r} of {rank}")
        if isinstance(size, bool) or (isinstance(size, (Mapping, tuple, list, set))):
            raise ValueError(f"dynamic_shapes: {size!r} is no name of a dimension")
        found[dim % rank] = size
    return found


def _args_and_kwargs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments out of the forms that `export` takes."""
    match example_inputs:
        case ((tuple() | list()) as args, dict() as kwargs):
            return tuple(args), dict(kwargs)
        case tuple() | list():
            return tuple(example_inputs), {}
        case Mapping():
            return (), dict(example_inputs)
        case _:
            return (example_inputs,), {}


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The values inside nested tuples, lists and mappings, each named by its place."""
    children: list[tuple[Any, Any]]
    if isinstance(value, Mapping):
        children = list(value.items())
    elif isinstance(value, (tuple, list)):
        fields = getattr(value, "_fields", range(len(value)))  # a namedtuple knows its names
        children = list(zip(fields, value, strict=True))
    else:
        yield name, value
        return
    for key, child in children:
        yield from leaves(child, f"{name}_{key}" if name else str(key))


def tensor_names(model: nn.Module, call: Call, outputs: Any) -> tuple[list[str], list[str]]:
    """Names for the tensors that go in and those that come out.

    No name is given twice, nor to a parameter as well: in ONNX all share one namespace.
    """
    taken = {name for name, _ in model.named_parameters()} | {n for n, _ in model.named_buffers()}

    def unique(leaves: list[tuple[str, Any]]) -> list[str]:
        names = []
        for name, value in leaves:
            if not isinstance(value, torch.Tensor):
                continue
            free, suffix = name, 1
            while free in taken:
                free, suffix = f"{name}_{suffix}", suffix + 1
            taken.add(free)
            names.append(free)
        return names

    inputs = unique([leaf for name, arg in call.arguments.items() for leaf in leaves(arg, name)])
    keyed = isinstance(outputs, Mapping) or hasattr(outputs, "_fields")
    return inputs, unique(list(leaves(outputs, "" if keyed else "output")))
