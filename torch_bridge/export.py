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
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import nn
from torch.utils import _pytree as pytree

from torch_bridge.calls import Call, check_plain, tensor_names, tensors_of

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
        TypeError: ``model`` is no module, the example inputs do not fit its signature, or inputs or
            outputs are neither tensors nor plain constants.
        ValueError: An unknown exporter, or dynamic shapes that do not fit the arguments.
    """
    exported = export_traced(
        model,
        example_inputs,
        dynamic_shapes=dynamic_shapes,
        exporter=exporter,
        opset=opset,
        fuse_batchnorm=fuse_batchnorm,
    )
    if path is not None:
        save(exported.proto, Path(path))
    return exported.proto


@dataclass(frozen=True)
class Exported:
    """An exported model, and what relates it to the module.

    Attributes:
        proto: the model.
        call: the call that was exported.
        outputs: what the module returned for it.
        inputs: names for the tensors of the call, in order; the graph may lack some.
        tensors: names of the tensors that traced modules return, by the module's name: one for
            every call of the module and every tensor it returns.
    """

    proto: onnx.ModelProto
    call: Call
    outputs: Any
    inputs: list[str]
    tensors: dict[str, list[str]]


def export_traced(
    model: nn.Module,
    example_inputs: Any,
    traced: Collection[str] = (),
    *,
    dynamic_shapes: Any = None,
    exporter: Exporter = "dynamo",
    opset: int | None = None,
    fuse_batchnorm: bool = True,
) -> Exported:
    """Export as `export` does, and tell which tensors come out of some of the modules.

    Args:
        model: See `export`.
        example_inputs: See `export`.
        traced: Names, as in ``model.named_modules()``, of the modules to follow.
        dynamic_shapes: See `export`.
        exporter: See `export`.
        opset: See `export`.
        fuse_batchnorm: See `export`.

    Raises:
        ExportError: See `export`.
        TypeError: See `export`.
        ValueError: See `export`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if exporter not in EXPORTERS:
        raise ValueError(f"unknown exporter {exporter!r}; choose one of {', '.join(EXPORTERS)}")
    call = Call.of(model, example_inputs)
    check_plain((call.args, call.kwargs), "the arguments")
    shapes = call.shapes(dynamic_shapes)
    with inference(model), _quiet():
        try:
            outputs = call.run(model)
        except Exception as error:
            raise ExportError(
                "cannot export: the model itself fails on the example inputs.\n"
                f"Reason: {_reason(error)}\n"
                "Try next: call the model with these inputs before exporting it."
            ) from error
        check_plain(outputs, "the model's outputs")
        if not tensors_of(outputs):
            raise ExportError("cannot export: the model returns no tensor.")
        inputs, names = tensor_names(model, call, outputs)
        with _flat(model, call, outputs) as root, _Marks(model, root, traced) as marks:
            if traced:
                root(*call.tensors())
                names += marks.labels()
            job = _Job(root, call, inputs, names, shapes, opset, fuse_batchnorm)
            try:
                proto = job.dynamo() if exporter == "dynamo" else job.torchscript()
            except Exception as error:
                raise ExportError(_advice(error, exporter, opset)) from error
    return Exported(proto, call, outputs, inputs, marks.take(proto))


@contextlib.contextmanager
def _flat(model: nn.Module, call: Call, outputs: Any) -> Iterator[nn.Module]:
    """The model taking and returning plain tensors, which both exporters understand alike.

    That is the model itself with another ``forward``, so that parameters keep their names. Hooks
    of its own would see plain tensors too, and some modules' code is fixed: these are wrapped.
    """
    fixed = isinstance(model, (torch.jit.ScriptModule, torch.fx.GraphModule))
    if fixed or model._forward_hooks or model._forward_pre_hooks:
        yield _Flat(model, call, outputs).eval()
        return
    model.forward = _Flat(model.forward, call, outputs).forward
    try:
        yield model
    finally:
        del model.forward


class _Flat(nn.Module):
    """A model, or its ``forward``, behind a call of plain tensors."""

    def __init__(self, model: Callable[..., Any], call: Call, outputs: Any):
        super().__init__()
        self.model = model
        self._call = call
        # While recording, torch hands out sizes as tensors.
        self._is_tensor = [isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(outputs)]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The model's output tensors."""
        args, kwargs = self._call.filled(tensors)
        leaves = pytree.tree_leaves(self.model(*args, **kwargs))
        return tuple(x for x, keep in zip(leaves, self._is_tensor, strict=True) if keep)


class _Marks:
    """While open, the model returns what some of its modules return behind its own outputs.

    Copies of it, so that an operation in place on a module's output, such as a ``relu_`` behind
    it, is not taken for the module's doing.
    """

    def __init__(self, model: nn.Module, root: nn.Module, names: Collection[str]):
        self._modules = {name: model.get_submodule(name) for name in names}
        self._root = root
        self._found: list[tuple[str, torch.Tensor]] = []
        self._order: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> _Marks:
        if self._modules:
            self._handles.append(self._root.register_forward_pre_hook(self._start))
            for name, module in self._modules.items():
                self._handles.append(module.register_forward_hook(partial(self._see, name)))
            self._handles.append(self._root.register_forward_hook(self._end))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._found.clear()

    def _start(self, module: nn.Module, args: Any) -> None:
        self._found.clear()

    def _see(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._found += [(name, tensor.clone()) for tensor in tensors_of(output)]

    def _end(self, module: nn.Module, args: Any, output: Any) -> tuple[torch.Tensor, ...]:
        self._order = [name for name, _ in self._found]
        return (*tensors_of(output), *(tensor for _, tensor in self._found))

    def labels(self) -> list[str]:
        """A name for each output that is added, in order."""
        return [f"{name}:{k}" for k, name in enumerate(self._order)]

    def take(self, proto: onnx.ModelProto) -> dict[str, list[str]]:
        """Take the added outputs away again; the names of the tensors behind them, by module."""
        outputs, count = proto.graph.output, len(self._order)
        marks = [output.name for output in outputs[len(outputs) - count :]]
        del outputs[len(outputs) - count :]
        producer = {name: node for node in proto.graph.node for name in node.output}
        found: dict[str, list[str]] = {}
        for module, name in zip(self._order, marks, strict=True):
            while name in producer and producer[name].op_type == "Identity":
                name = producer[name].input[0]
            found.setdefault(module, []).append(name)
        read = {name for node in proto.graph.node for name in node.input}
        read |= {output.name for output in outputs}
        for node in list(proto.graph.node):
            if node.op_type == "Identity" and node.output[0] in set(marks) - read:
                proto.graph.node.remove(node)
        return found


# ------------------------------------------------------------------------------------------------
# The two exporters


@dataclass(frozen=True)
class _Job:
    """One export: the model with its call, and how the result shall look."""

    model: nn.Module
    call: Call
    input_names: list[str]
    output_names: list[str]
    shapes: list[dict[int, Any]] | None
    opset: int | None
    fuse_batchnorm: bool

    def dynamo(self) -> onnx.ModelProto:
        """Through ``torch.export``."""
        program = torch.onnx.export(
            self.model,
            self._tensors(),
            dynamo=True,
            dynamic_shapes=self.shapes and (tuple(entry or None for entry in self.shapes),),
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
        # Into a file: an export to memory ends at 2 GiB.
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, "model.onnx")
            torch.onnx.export(
                self.model,
                self._tensors(),
                str(file),
                dynamo=False,
                dynamic_axes=self._dynamic_axes(),
                input_names=self.input_names,
                output_names=self.output_names,
                opset_version=self.opset,
                training=mode.EVAL if self.fuse_batchnorm else mode.PRESERVE,
                verbose=False,
            )
            return onnx.load(file)

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.detach().clone() for tensor in self.call.tensors())

    def _dynamic_axes(self) -> dict[str, dict[int, str]] | None:
        """`shapes` in the terms of the TorchScript exporter: dimensions named per input."""
        if self.shapes is None:
            return None
        axes = {}
        for name, entry in zip(self.input_names, self.shapes, strict=True):
            named = {dim: _dim_name(size, f"{name}_dim_{dim}") for dim, size in entry.items()}
            axes[name] = {dim: text for dim, text in named.items() if text is not None}
        return axes


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
    _drop_zero_biases(model)
    optimizer.remove_unused_nodes(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.OutputFixPass()(model)


def _drop_zero_biases(model: Any) -> None:
    """Take from convolutions the bias of zeros that the exporter makes up where there is none.

    That of a three-dimensional convolution has a rank that no runtime accepts. The exporter leaves
    it to its rewrite rules to remove them.
    """
    for node in model.graph.all_nodes():
        if node.domain == "" and node.op_type == "Conv" and len(node.inputs) == 3:
            bias = node.inputs[2]
            value = None if bias is None else bias.const_value
            if value is not None and not value.numpy().any():
                node.resize_inputs(2)


# ------------------------------------------------------------------------------------------------
# Manners


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[nn.Module]:
    """The module in inference mode, without gradients; afterwards it is as it was."""
    # The exporters do not know the fused operator for attention.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _untouched(model), torch.no_grad():
            for module in model.modules():
                module.training = False
            yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Give the module back as it was: flags, attributes, buffers, and torch's random state."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    scripted = [(m, m.training) for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    registries = ("_parameters", "_buffers", "_modules")
    attributes = [dict(m.__dict__) for m in modules]
    registered = [{name: dict(m.__dict__[name]) for name in registries} for m in modules]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
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
            # Not by their version: some operations change statistics without counting it.
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
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


def save(proto: onnx.ModelProto, path: Path) -> None:
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
