"""The working copy of a model: an onnx-graphsurgeon graph plus what that library does not keep.

onnx-graphsurgeon drops metadata properties, documentation strings and annotations on export, and
copies every weight into protobuf messages.  :class:`Model` keeps the original message *without its
weights* as a template for the export, and holds the weights as numpy arrays which are shared, never
copied, by all working copies and all onnxruntime sessions.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnx_simplify.errors import ModelError
from onnx_simplify.graph.identity import NodeMap, NodeSet
from onnx_simplify.graph.message import (
    INLINE_BYTES,
    MESSAGE_LIMIT,
    add_copy,
    drop_inputs,
    nbytes_of,
    placeholder,
    stays_inline,
    value_info_of,
)
from onnx_simplify.graph.order import body_names, captured_names, has_body, sort_nodes
from onnx_simplify.graph.patterns import Patterns
from onnx_simplify.graph.quantized import READERS, Quantized, QuantizedConstant, read_quantized


@dataclass(frozen=True)
class Observed:
    """What runs tell of a tensor.

    Attributes:
        dtype: type of its elements.
        dims: its sizes, whatever those of the inputs are; None where that cannot be told.
        first: its sizes in the first run.
    """

    dtype: np.dtype
    dims: list[int | str | None]
    first: tuple[int, ...]


class Model:
    """A model under transformation.

    Attributes:
        graph: the onnx-graphsurgeon graph; every ``Constant`` holds a numpy array.
        template: the original message without nodes, initializers and value infos.
        overridable: initializers that are also graph inputs in IR version 4 or newer.  A caller may
            override them at run time, so they are plain inputs to the facts.
        pinned: tensors whose channels must stay, see :meth:`pin`.
        mapped: files mapped into memory that weights are views of.
        disputed: outputs of nodes whose shapes inference gets wrong, by onnxruntime's standards.
        files: what the model was loaded from: its file, then those of external data.
        source_bytes: size of what the model was loaded from, external data included.
        aliases: new tensors that have the value of one that the model as loaded has, and which.
        patterns: which weights are zero.
        observed: what only runs tell of tensors, see :mod:`onnx_simplify.runtime.observed`.
        fused: outputs of nodes that were fused, see :mod:`onnx_simplify.passes.fused`.
        keep_shared: leave nodes alone whose weights others read, too, so that these need no copy.
        stand_in: run a float32 version of the model, see :mod:`onnx_simplify.runtime.widen`.
    """

    def __init__(self, proto: ModelProto, arrays: dict[str, np.ndarray]):
        """Build from a message whose initializers carry no data, and their arrays by name."""
        self.template = ModelProto()
        self.template.CopyFrom(proto)
        graph = proto.graph
        if self.template.ir_version < 4:
            drop_inputs(graph, {i.name for i in graph.initializer})
            self.overridable: dict[str, TensorProto] = {}
        else:
            inputs = {i.name for i in graph.input}
            self.overridable = {
                i.name: numpy_helper.from_array(arrays[i.name], i.name)
                for i in graph.initializer
                if i.name in inputs
            }
        keep = [i for i in graph.initializer if i.name not in self.overridable]
        del graph.initializer[:]
        graph.initializer.extend(keep)
        del graph.sparse_initializer[:]
        sort_nodes(graph)
        nodes = list(graph.node)
        self.graph: gs.Graph = gs.import_onnx(proto)
        self._attributes = NodeMap((n, dict(n.attrs)) for n in self.graph.nodes)
        self._protos = NodeMap(zip(self.graph.nodes, nodes, strict=True))
        tensors = self.graph.tensors()
        for tensor in tensors.values():
            if isinstance(tensor, gs.Constant) and tensor.name in arrays:
                tensor.values = arrays[tensor.name]
        self._captured = NodeMap(
            (node, frozenset(captured_names(message)))
            for node, message in self._protos.items()
            if has_body(message)
        )
        captured = frozenset().union(*self._captured.values())
        self._captured_constants = {
            n: gs.Constant(n, arrays[n]) for n in captured - set(self.overridable) if n in arrays
        }
        for node in self.graph.nodes:
            _adopt_constant_attributes(node)
        self._value_infos = {v.name: v for v in self.template.graph.value_info}
        for field in ("node", "initializer", "value_info"):
            self.template.graph.ClearField(field)
        self._reserved = captured | {n for m in nodes if has_body(m) for n in body_names(m)}
        # Initializers that several nodes read, of those that hold quantised weights.
        self._shared: set[str] = set()
        self._names: set[str] = set()
        self.free_names()
        self._holders = [n for n in self.graph.nodes if n in self._captured]
        self.adopt_quantized()
        self.pinned: set[str] = set()
        self.mapped: list[mmap.mmap] = []
        self.keep_shared = False
        self.aliases: dict[str, str] = {}
        self.patterns = Patterns()
        self.fused: set[str] = set()
        self.observed: dict[str, Observed] = {}
        self.stand_in = False
        self.disputed: frozenset[str] = frozenset()
        self.files: list[Path] = []
        self.source_bytes: int | None = None
        # What training information, if there is any, refers to.
        self._trained = dict(arrays) if proto.training_info else {}

    @property
    def opset(self) -> int:
        """Version of the default operator set (0 when the model imports none)."""
        return next(
            (o.version for o in self.template.opset_import if o.domain in ("", "ai.onnx")), 0
        )

    def free_names(self) -> None:
        """Let names be used again that no tensor or node has any more."""
        self._names = {t for n in self.graph.nodes for t in _node_names(n)} | self._reserved
        self._names |= self._shared
        self._names |= {t.name for t in self.graph.inputs + self.graph.outputs}

    def give_up(self, name: str) -> None:
        """Let the name of a tensor that is about to go be used again."""
        if name not in self._reserved and name not in self._shared and name not in self.kept_names:
            self._names.discard(name)

    def adopt_quantized(self) -> None:
        """Let what reads dequantised initializers read :class:`QuantizedConstant`, in place."""
        found = {
            node.outputs[0].name: (node, values)
            for node in self.graph.nodes
            if node.op == "DequantizeLinear" and (values := read_quantized(node)) is not None
        }
        for tensor in self.graph.outputs:
            found.pop(tensor.name, None)
        for node in self.graph.nodes:
            reads = {t.name for t in node.inputs} if node.op not in READERS or node.domain else ()
            for name in (*reads, *self.captured(node)):
                found.pop(name, None)
        if not found:
            return
        constants = {
            name: QuantizedConstant(
                name, values, [t.name for t in node.inputs], self.export_node(node)
            )
            for name, (node, values) in found.items()
        }
        gone = NodeSet(node for node, _ in found.values())
        uses = Counter(t.name for n in self.graph.nodes for t in n.inputs)
        self._shared |= {name for name, count in uses.items() if count > 1} | self.kept_names
        keep = [n for n in self.graph.nodes if n not in gone]
        for node in keep:
            for index, tensor in enumerate(node.inputs):
                if tensor.name in constants:
                    node.inputs[index] = constants[tensor.name]
        self.graph.nodes = keep

    def replacement(
        self, old: gs.Constant, values: np.ndarray | LazyValues, name: str | None = None
    ) -> gs.Constant:
        """An initializer to stand in for another one.

        Args:
            old: the other one; if it is quantised, and the values are, so is the new one.
            values: the values.
            name: its name; by default that of the old one.
        """
        if not isinstance(values, Quantized) or not isinstance(old, QuantizedConstant):
            return gs.Constant(name or old.name, values)
        before = [part.values for part in old.parts()]
        new = QuantizedConstant(name or old.name, values, list(old.names), old.message)
        if name and new.message.name:
            new.message = NodeProto.FromString(new.message.SerializeToString())
            new.message.name = self.unique(new.message.name)
        for index, part in enumerate(new.parts()):
            if part.values is before[index]:
                # The other one, if it is still there, has the same.
                self._shared |= {part.name} if name else set()
            elif name or part.name in self._shared:
                new.names[index] = self.unique(part.name)
        return new

    def unique(self, hint: str) -> str:
        """A tensor or node name, derived from ``hint``, that the graph does not use yet."""
        name, i = hint, 0
        while name in self._names:
            i += 1
            name = f"{hint}_{i}"
        self._names.add(name)
        return name

    def constant(self, hint: str, values: np.ndarray | LazyValues) -> gs.Constant:
        """A new initializer with a unique name."""
        if isinstance(values, np.ndarray):
            values = np.asarray(values, order="C")
        return gs.Constant(self.unique(hint), values)

    def pin(self, names: Iterable[str]) -> None:
        """Keep all channels of tensors, of nodes' outputs, or of the outputs of weights' users.

        Raises:
            ModelError: nothing has one of these names.
        """
        for name in names:
            found = {
                t.name
                for node in self.graph.nodes
                for t in node.outputs
                if name in (node.name, t.name)
                or any(isinstance(i, gs.Constant) and name in _stored_names(i) for i in node.inputs)
            }
            if not found and name not in self.input_names:
                raise ModelError(
                    f"cannot pin '{name}': no tensor, node or initializer has that name"
                )
            self.pinned |= found

    @property
    def kept_names(self) -> frozenset[str]:
        """Tensors that must survive: graph outputs, and outer values that bodies read."""
        found = {t.name for t in self.graph.outputs}
        for node in self._holders:
            if node.outputs:  # those of nodes that were removed are cleared
                found |= self.captured(node)
        return frozenset(found)

    def is_kept(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor is a graph output or is captured by a subgraph."""
        return tensor.name in self.kept_names

    def initializers(self) -> dict[str, gs.Constant]:
        """All initializers the graph uses, by name.

        Raises:
            RuntimeError: two quantised weights have different values for one name.
        """
        found: dict[str, gs.Constant] = {}
        for tensor in (
            *(t for n in self.graph.nodes for t in n.inputs),
            *self.graph.outputs,
        ):
            if isinstance(tensor, QuantizedConstant):
                for part in tensor.parts():
                    known = found.setdefault(part.name, part).values
                    if known is not part.values and not np.array_equal(known, part.values):
                        raise RuntimeError(f"two values for '{part.name}'")
            elif isinstance(tensor, gs.Constant):
                found[tensor.name] = tensor
        for node in self.graph.nodes:
            for name in sorted(self.captured(node)):
                if name in self._captured_constants:
                    found[name] = self._captured_constants[name]
        return found

    def captured(self, node: gs.Node) -> frozenset[str]:
        """Names of outer tensors that the bodies of an ``If``/``Loop``/``Scan`` node read."""
        return self._captured.get(node, frozenset())

    def release(self) -> None:
        """Let the operating system drop the pages of mapped weights; they can be read again."""
        for mapped in self.mapped:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def copy(self) -> Model:
        """A working copy that shares the weights."""
        proto, _ = self.structure(infos=True)
        arrays = {n: t.values for n, t in self.initializers().items()}
        arrays |= {n: numpy_helper.to_array(t) for n, t in self.overridable.items()}
        other = Model(proto, arrays)
        other.pinned = set(self.pinned)
        other.mapped = self.mapped
        other.files = self.files
        other.stand_in = self.stand_in
        other.keep_shared = self.keep_shared
        other.disputed = self.disputed
        other.aliases = dict(self.aliases)
        other.fused = set(self.fused)
        other.observed = dict(self.observed)
        other._trained = self._trained
        return other

    def training_is_stale(self) -> bool:
        """Whether there is training information about weights that are gone or have changed."""
        constants = self.initializers() if self._trained else {}
        for name, values in self._trained.items():
            if name in constants:
                found = constants[name].values
                if found is not values and not np.array_equal(found, values):
                    return True
            elif name not in self.overridable:
                return True
        return False

    def structure(
        self, extra_outputs: Iterable[str] = (), *, infos: bool = False
    ) -> tuple[ModelProto, dict[str, gs.Constant]]:
        """The model as a message in which large initializers have a type but no data.

        Training information that is stale is left out.

        Args:
            extra_outputs: inner tensors to declare as outputs.
            infos: state shapes of inner tensors where the file did, as far as they are known to
                ``graph``: run :func:`onnx_simplify.graph.shapes.infer` before. What is not known
                any more is left out, since it may be about something that has changed.

        Returns:
            The message, with large initializers marked as external data, and these by name.
        """
        proto = ModelProto()
        proto.CopyFrom(self.template)
        if self.training_is_stale():
            proto.ClearField("training_info")
        graph = proto.graph
        large: dict[str, gs.Constant] = {}
        dequantized: set[str] = set()
        for node in self.graph.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, QuantizedConstant) and tensor.name not in dequantized:
                    graph.node.append(tensor.node())
                    dequantized.add(tensor.name)
            graph.node.append(self.export_node(node))
        constants = self.initializers()
        for name, tensor in constants.items():
            if nbytes_of(tensor) <= INLINE_BYTES or stays_inline(tensor.dtype):
                graph.initializer.append(numpy_helper.from_array(np.asarray(tensor.values), name))
            else:
                graph.initializer.append(placeholder(name, tensor.dtype, tensor.shape))
                large[name] = tensor
        graph.initializer.extend(self.overridable.values())
        if proto.ir_version < 4:
            self._declare_weights(graph, constants)
        if infos:
            self._state_shapes(graph)
        outputs = {o.name for o in graph.output}
        for name in extra_outputs:
            if name not in outputs:
                graph.output.add().name = name
        return proto, large

    def _declare_weights(self, graph: GraphProto, constants: dict[str, gs.Constant]) -> None:
        """Declare initializers as inputs, which IR versions before 4 want."""
        known = {i.name for i in graph.input}
        keep = [i for i in graph.input if i.name in constants or i.name in self.input_names]
        del graph.input[:]
        for info in keep:
            if info.name in constants:
                info = value_info_of(constants[info.name])
            graph.input.append(info)
        graph.input.extend(value_info_of(t) for n, t in constants.items() if n not in known)

    def _state_shapes(self, graph: GraphProto) -> None:
        tensors = {t.name: t for n in self.graph.nodes for t in n.outputs}
        for name, stated in self._value_infos.items():
            shape = tensors[name].shape if name in tensors else None
            dims = stated.type.tensor_type.shape.dim
            if shape is None or len(dims) != len(shape):
                continue
            info = add_copy(graph.value_info, stated)
            for dim, size in zip(info.type.tensor_type.shape.dim, shape, strict=True):
                if dim.HasField("dim_value"):
                    dim.ClearField("dim_value")
                    if isinstance(size, int):
                        dim.dim_value = size

    @property
    def input_names(self) -> set[str]:
        """Names of the graph's inputs (initializers are none, in any IR version)."""
        return {t.name for t in self.graph.inputs}

    def to_proto(self) -> ModelProto:
        """The model as one message with all weights inside.

        Raises:
            ModelError: the weights do not fit into one message (2 GiB); save them to a file with
                external data instead.
        """
        if not fits_message(self):
            raise ModelError("the model exceeds protobuf's 2 GiB: give save_to, a file")
        proto, large = self.structure(infos=True)
        for tensor in proto.graph.initializer:
            if tensor.name in large:
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
                tensor.raw_data = large[tensor.name].values.tobytes()
        return proto

    def export_node(self, node: gs.Node) -> NodeProto:
        """The node as a message, with the documentation and metadata of the node it stems from."""
        original = self._protos.get(node)
        known = self._attributes.get(node, {})
        unchanged = known.keys() == node.attrs.keys() and all(
            known[key] is value for key, value in node.attrs.items()
        )
        if original is not None and (unchanged or has_body(original)):
            # To the letter: some attributes do not survive the library.
            message = NodeProto()
            message.CopyFrom(original)
            del message.input[:], message.output[:]
            message.input.extend(t.name for t in node.inputs)
            message.output.extend(t.name for t in node.outputs)
            return message
        message = OnnxExporter.export_node(node)
        if original is not None:
            for field, value in original.ListFields():
                if field.name not in ("input", "output", "op_type", "attribute", "domain"):
                    if field.is_repeated:
                        getattr(message, field.name).extend(value)
                    else:
                        setattr(message, field.name, value)
        return message


def fits_message(model: Model) -> bool:
    """Whether a single protobuf message can hold the weights."""
    return sum(t.values.nbytes for t in model.initializers().values()) <= MESSAGE_LIMIT


def _node_names(node: gs.Node) -> Iterator[str]:
    yield node.name
    yield from (t.name for t in node.outputs)
    for tensor in node.inputs:
        yield from _stored_names(tensor)


def _stored_names(tensor: gs.Tensor) -> Iterator[str]:
    """A tensor's name and, if it is quantised, those that its file has for it."""
    yield tensor.name
    if isinstance(tensor, QuantizedConstant):
        yield tensor.message.name
        yield from tensor.names


def _adopt_constant_attributes(node: gs.Node) -> None:
    for value in node.attrs.values():
        if isinstance(value, gs.Constant) and not isinstance(value._values, np.ndarray):
            value.values = numpy_helper.to_array(value._values.tensor)
