"""Export a PyTorch module to an in-memory ONNX model, with either of torch's two exporters.

Both are reached through `torch.onnx.export
<https://docs.pytorch.org/docs/stable/onnx_export.html>`_:

* ``"dynamo"`` captures the model with ``torch.export``. It refuses what it cannot represent, such
  as a branch on the values of a tensor.
* ``"torchscript"`` records one run of the model on the example inputs. It takes more models, but a
  Python branch is frozen to the side that the example took.

`export` adds what a caller would otherwise write around them every time: one way to state inputs
and dynamic dimensions for both, names taken from the model's signature and outputs, silence, a
module that comes back exactly as it went in, and one readable reason when the export fails.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import nn
from torch.utils import _pytree as pytree

Exporter = Literal["dynamo", "torchscript"]
EXPORTERS: tuple[Exporter, ...] = ("dynamo", "torchscript")

# A protobuf message ends at 2 GiB. Larger models keep their weights in a second file.
_INLINE_LIMIT = 2**31 - 2**24

_REASON_LINES = 8
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
# What torch adds to its messages for people who debug torch itself.
_DEBUG_HINTS = re.compile(
    r"^(For (more|extended|C\+\+)|If you suspect|Caused by: \(_export|The error above occurred"
    r"|The following call raised|\(Refer to the full stack trace|Torch IR graph)",
)


class ExportError(RuntimeError):
    """A model that the chosen exporter cannot turn into ONNX.

    The message holds the exporter's own reason and what to try next; ``__cause__`` is torch's
    exception, with its full text.
    """


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    dynamic_shapes: Any = None,
    exporter: Exporter = "dynamo",
    opset: int | None = None,
    fuse_batchnorm: bool = True,
) -> onnx.ModelProto:
    """Export ``model`` in inference mode to ONNX.

    Inputs are named after the arguments of ``forward``, outputs ``output`` (one tensor),
    ``output_0``, ``output_1``, ... (a tuple) or after the keys of a dictionary; nested values
    join their names with ``_``. Dictionaries and tuples are flattened: an ONNX model has a plain
    list of inputs and outputs.

    The module is left as it was: training flags, attributes and buffers are restored whatever
    the export did to them. Torch's messages are not shown.

    Args:
        model: The module. It runs in inference mode (``eval``), without gradients.
        example_inputs: What to call the model with: a tensor; a tuple or list of positional
            arguments; a dictionary of keyword arguments; or a pair ``(args, kwargs)`` of a tuple
            and a dictionary. Arguments that are not tensors become constants of the exported
            model.
        path: Where to write the model as well. Weights go into the same file, or beside it in
            ``<name>.data`` when they exceed what one protobuf file can hold (2 GiB).
        dynamic_shapes: Dimensions that may vary, in the shape of the arguments: a tuple with one
            entry per positional argument, or a dictionary keyed by argument name. An entry maps
            a dimension to its name, ``{0: "batch"}`` (or to a ``torch.export.Dim``), and follows
            the nesting of an argument that holds several tensors; ``None`` fixes every dimension.
            ``{0: "batch"}`` alone speaks of the first argument. All other dimensions are fixed
            to the example's.
        exporter: ``"dynamo"`` or ``"torchscript"`` (see the module's docstring).
        opset: The version of the default operator set to target; torch's choice if None.
        fuse_batchnorm: Leave the exporter its habit of folding ``BatchNorm`` into the convolution
            before it. False keeps them as nodes.

    Returns:
        The model with all its weights inside, whatever their size.

    Raises:
        ExportError: The model fails on the example inputs, or the exporter does on the model.
        TypeError: ``model`` is no module, or the example inputs do not fit its signature.
        ValueError: An unknown exporter, or dynamic shapes that do not fit the arguments.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if exporter not in EXPORTERS:
        raise ValueError(f"unknown exporter {exporter!r}; choose one of {', '.join(EXPORTERS)}")
    call = _Call.of(model, example_inputs)
    shapes = call.shapes(dynamic_shapes)
    with _untouched(model), _quiet(), torch.no_grad():
        for module in model.modules():
            module.training = False
        try:
            outputs = call.run(model)
        except Exception as error:
            raise ExportError(
                "cannot export: the model itself fails on the example inputs.\n"
                f"Reason: {_reason(error)}\n"
                "Try next: call the model with these inputs before exporting it."
            ) from error
        job = _Job(model, call, *_names(model, call, outputs), shapes, opset, fuse_batchnorm)
        try:
            proto = job.dynamo() if exporter == "dynamo" else job.torchscript()
        except Exception as error:
            raise ExportError(_advice(error, exporter, opset)) from error
    if path is not None:
        _save(proto, Path(path))
    return proto


# ------------------------------------------------------------------------------------------------
# Arguments, outputs and their names


@dataclass(frozen=True)
class _Call:
    """A call of a module's ``forward``.

    ``args`` holds every argument that can be positional, in the signature's order, whether the
    caller named it or not: both exporters then agree on the order of the inputs. ``arguments``
    maps each parameter's name to its value.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any) -> _Call:
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

    def shapes(self, dynamic_shapes: Any) -> dict[str, Any] | None:
        """``dynamic_shapes`` (see `export`) as one entry per argument; None if nothing varies.

        Raises:
            ValueError: An entry for an argument that the call does not have.
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
        return {name: given.get(name) for name in names}


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


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
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
        yield from _leaves(child, f"{name}_{key}" if name else str(key))


def _names(
    model: nn.Module, call: _Call, outputs: Any
) -> tuple[list[str] | None, list[str] | None]:
    """Names for the inputs and the outputs, each None where the exporter must find its own.

    That is so when something other than a tensor is among them: whether it becomes an input is
    up to the exporter. No name is given twice, nor to a parameter as well: in ONNX all share
    one namespace.
    """
    taken = {name for name, _ in model.named_parameters()} | {n for n, _ in model.named_buffers()}

    def unique(leaves: list[tuple[str, Any]]) -> list[str] | None:
        if not all(isinstance(value, torch.Tensor) for _, value in leaves):
            return None
        names = []
        for name, _ in leaves:
            free, suffix = name, 1
            while free in taken:
                free, suffix = f"{name}_{suffix}", suffix + 1
            taken.add(free)
            names.append(free)
        return names

    inputs = unique([leaf for name, arg in call.arguments.items() for leaf in _leaves(arg, name)])
    keyed = isinstance(outputs, Mapping) or hasattr(outputs, "_fields")
    return inputs, unique(list(_leaves(outputs, "" if keyed else "output")))


# ------------------------------------------------------------------------------------------------
# The two exporters


@dataclass(frozen=True)
class _Job:
    """One export: the model with its call, and how the result shall look."""

    model: nn.Module
    call: _Call
    input_names: list[str] | None
    output_names: list[str] | None
    shapes: dict[str, Any] | None
    opset: int | None
    fuse_batchnorm: bool

    def dynamo(self) -> onnx.ModelProto:
        """Through ``torch.export``."""
        args, kwargs = self.call.copied()
        program = torch.onnx.export(
            self.model,
            args,
            kwargs=kwargs,
            dynamo=True,
            dynamic_shapes=self.shapes,
            input_names=self.input_names,
            output_names=self.output_names,
            opset_version=self.opset,
            external_data=False,
            optimize=self.fuse_batchnorm,
            verbose=False,
        )
        if not self.fuse_batchnorm:
            _tidy(program.model)
        proto: onnx.ModelProto = program.model_proto
        return proto

    def torchscript(self) -> onnx.ModelProto:
        """Through a recording of one run."""
        # With PRESERVE the exporter does not fuse. The modules are in inference mode either way.
        mode = torch.onnx.TrainingMode
        args, kwargs = self.call.copied()
        # Into a file: an export to memory ends at 2 GiB.
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, "model.onnx")
            torch.onnx.export(
                self.model,
                args,
                str(file),
                kwargs=kwargs or None,
                dynamo=False,
                dynamic_axes=self._dynamic_axes(),
                input_names=self.input_names,
                output_names=self.output_names,
                opset_version=self.opset,
                training=mode.EVAL if self.fuse_batchnorm else mode.PRESERVE,
                verbose=False,
            )
            return onnx.load(file)

    def _dynamic_axes(self) -> dict[str, dict[int, str]] | None:
        """`shapes` in the terms of the TorchScript exporter: dimensions named per input.

        Raises:
            ValueError: Inputs without names, or shapes nested otherwise than the arguments.
        """
        if self.shapes is None:
            return None
        if self.input_names is None:
            raise ValueError("dynamic shapes need example inputs that are all tensors")
        entries = [
            entry
            for name, value in self.call.arguments.items()
            for entry in _shape_entries(value, self.shapes[name])
        ]
        axes = {}
        for name, entry in zip(self.input_names, entries, strict=True):
            named = {dim: _dim_name(size, f"{name}_dim_{dim}") for dim, size in entry.items()}
            axes[name] = {dim: text for dim, text in named.items() if text is not None}
        return axes


def _shape_entries(value: Any, spec: Any) -> Iterator[dict[int, Any]]:
    """The entry of each tensor in ``value``, from a spec of the same nesting."""
    if isinstance(value, (tuple, list, Mapping)):
        keys = list(value) if isinstance(value, Mapping) else range(len(value))
        if spec is not None and len(spec) != len(keys):
            raise ValueError(f"dynamic_shapes has {len(spec)} entries for {len(keys)} values")
        for key in keys:
            yield from _shape_entries(value[key], None if spec is None else spec[key])
    elif spec is None:
        yield {}
    elif isinstance(spec, Mapping):
        yield dict(spec)
    else:
        yield dict(enumerate(spec))


def _dim_name(size: Any, default: str) -> str | None:
    """The name of a dynamic dimension; None for a fixed one.

    ``size`` is a name, a ``torch.export.Dim`` (a class or an object, named), a hint without a
    name (``Dim.DYNAMIC``, ``Dim.AUTO``), or what stands for "fixed": None, a number,
    ``Dim.STATIC``.
    """
    if size is None or isinstance(size, int) or size == torch.export.Dim.STATIC:
        return None
    if isinstance(size, str):
        return size
    return getattr(size, "__name__", None) or default


def _tidy(model: Any) -> None:
    """Fold what an unoptimized graph of the dynamo exporter computes from constants.

    That is onnxscript's optimizer without its rewrite rules, among which is the fusion of
    BatchNorm. ``model`` is an ``onnx_ir.Model``, changed in place.
    """
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    passes.InlinePass()(model)
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.OutputFixPass()(model)


# ------------------------------------------------------------------------------------------------
# Manners


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Give the module back as it was: flags, attributes, buffers, and torch's random state."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    scripted = [(m, m.training) for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    registries = ("_parameters", "_buffers", "_modules")
    attributes = [dict(m.__dict__) for m in modules]
    registered = [{name: dict(m.__dict__[name]) for name in registries} for m in modules]
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, saved, contents in zip(modules, attributes, registered, strict=True):
            module.__dict__.clear()
            module.__dict__.update(saved)
            for name, content in contents.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(content)
        for module, flag in scripted:
            module.training = flag
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallow what torch prints, logs and warns about; errors pass."""
    logged = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logged)


def _advice(error: BaseException, exporter: Exporter, opset: int | None) -> str:
    """The message of an `ExportError`: what failed, why, and what to try next."""
    if exporter == "dynamo":
        tries = [
            'exporter="torchscript", which records one run of the model instead of analysing it '
            "(a branch on the values of a tensor is then frozen to the example's side)"
        ]
    else:
        tries = ['exporter="dynamo"']
    if opset is not None:
        tries.append(f"another opset than {opset}")
    return (
        f"the {exporter} exporter cannot export this model.\n"
        f"Reason: {_reason(error)}\n"
        f"Try next: {'; '.join(tries)}."
    )


def _reason(error: BaseException) -> str:
    """The first cause of an exception, without the hints for debugging torch, a few lines long."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.rstrip() for line in _ANSI.sub("", str(error)).splitlines()]
    lines = [line for line in lines if line.strip() and not _DEBUG_HINTS.match(line.strip())]
    if len(lines) > _REASON_LINES:
        lines = [*lines[:_REASON_LINES], "..."]
    text = "\n".join(lines)
    kind = type(error).__name__
    return f"{kind}: {text}" if text else kind


def _save(proto: onnx.ModelProto, path: Path) -> None:
    """Write the model, replacing a file of that name only by a complete one."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
        partial = Path(directory, path.name)
        size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
        if size <= _INLINE_LIMIT:
            onnx.save(proto, partial)
        else:
            # Saving to a second file empties the tensors of the given model, hence the copy.
            outside = onnx.ModelProto()
            outside.CopyFrom(proto)
            data = f"{path.name}.data"
            onnx.save(outside, partial, save_as_external_data=True, location=data)
            os.replace(Path(directory, data), path.with_name(data))
        os.replace(partial, path)
