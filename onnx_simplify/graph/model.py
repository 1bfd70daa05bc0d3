"""The working copy of a model: an onnx-graphsurgeon graph plus what that library does not keep.

onnx-graphsurgeon drops metadata properties, documentation strings and annotations on export, and
copies every weight into protobuf messages.  :class:`Model` keeps the original message *without its
weights* as a template for the export, and holds the weights as numpy arrays which are shared, never
copied, by all working copies and all onnxruntime sessions.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, Message
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from onnx_simplify.errors import ModelError, first_line
from onnx_simplify.graph.patterns import Patterns
from onnx_simplify.graph.quantized import READERS, Quantized, QuantizedConstant, read_quantized
from onnx_simplify.graph.wire import split_raw_data

ModelSource = str | os.PathLike[str] | bytes | ModelProto

# Tensors up to this many bytes stay inside messages, so that shape inference can read their values.
INLINE_BYTES = 1024
# Operator sets that onnxruntime knows without their being imported.
_DOMAINS = ("ai.onnx.ml", "com.microsoft")
# A single protobuf message cannot exceed 2 GiB; leave room for the nodes.
MESSAGE_LIMIT = 2**31 - 2**24


# It warns of types without a numpy equivalent, which are handled here.
G_LOGGER.severity = G_LOGGER.ERROR


class Model:
    """A model under transformation.

    Attributes:
        graph: the onnx-graphsurgeon graph; every ``Constant`` holds a numpy array.
        template: the original message without nodes, initializers and value infos.
        overridable: initializers that are also graph inputs in IR version 4 or newer.  A caller may
            override them at run time, so they are plain inputs to the facts.
        kept_names: tensors that must survive: graph outputs and outer values used in subgraphs.
        pinned: tensors whose channels must stay, see :meth:`pin`.
        mapped: files mapped into memory that weights are views of.
        disputed: outputs of nodes whose shapes inference gets wrong, by onnxruntime's standards.
        files: what the model was loaded from: its file, then those of external data.
        source_bytes: size of what the model was loaded from, external data included.
        patterns: which weights are zero.
        keep_shared: leave nodes alone whose weights others read, too, so that these need no copy.
        stand_in: run a float32 version of the model, see :mod:`onnx_simplify.runtime.widen`.
    """

    def __init__(self, proto: ModelProto, arrays: dict[str, np.ndarray]):
        """Build from a message whose initializers carry no data, and their arrays by name."""
        self.template = ModelProto()
        self.template.CopyFrom(proto)
        graph = proto.graph
        if self.template.ir_version < 4:
            _drop_inputs(graph, {i.name for i in graph.initializer})
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
        self._protos: dict[int, NodeProto] = {}
        sort_nodes(graph)
        nodes = list(graph.node)
        self.graph: gs.Graph = gs.import_onnx(proto)
        # Keyed by id: all nodes are kept alive so that none is given to a new one.
        self._originals = list(self.graph.nodes)
        self._attributes = {id(n): dict(n.attrs) for n in self._originals}
        for node, message in zip(self.graph.nodes, nodes, strict=True):
            self._protos[id(node)] = message
        tensors = self.graph.tensors()
        for tensor in tensors.values():
            if isinstance(tensor, gs.Constant) and tensor.name in arrays:
                tensor.values = arrays[tensor.name]
        self._captured = {
            id(node): frozenset(_free_names(message))
            for node, message in zip(self.graph.nodes, nodes, strict=True)
            if _has_body(message)
        }
        captured = frozenset().union(*self._captured.values())
        self._captured_constants = {
            n: gs.Constant(n, arrays[n]) for n in captured - set(self.overridable) if n in arrays
        }
        for node in self.graph.nodes:
            _adopt_constant_attributes(node)
        self._value_infos = {v.name: v for v in self.template.graph.value_info}
        for field in ("node", "initializer", "value_info"):
            self.template.graph.ClearField(field)
        self._reserved = captured | {n for m in nodes if _has_body(m) for n in _body_names(m)}
        # Initializers that several nodes read, of those that hold quantised weights.
        self._shared: set[str] = set()
        self._names: set[str] = set()
        self.free_names()
        self.kept_names = frozenset(captured | {t.name for t in self.graph.outputs})
        self.adopt_quantized()
        self.pinned: set[str] = set()
        self.mapped: list[mmap.mmap] = []
        self.keep_shared = False
        self.patterns = Patterns()
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
        gone = {id(node) for node, _ in found.values()}
        uses = Counter(t.name for n in self.graph.nodes for t in n.inputs)
        self._shared |= {name for name, count in uses.items() if count > 1} | self.kept_names
        keep = [n for n in self.graph.nodes if id(n) not in gone]
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
        return self._captured.get(id(node), frozenset())

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
            if _nbytes(tensor) <= INLINE_BYTES or _stays_inline(tensor.dtype):
                graph.initializer.append(numpy_helper.from_array(np.asarray(tensor.values), name))
            else:
                graph.initializer.append(_placeholder(name, tensor.dtype, tensor.shape))
                large[name] = tensor
        graph.initializer.extend(self.overridable.values())
        if proto.ir_version < 4:
            known = {i.name for i in graph.input}
            keep = [i for i in graph.input if i.name in constants or i.name in self.input_names]
            del graph.input[:]
            for info in keep:
                if info.name in constants:
                    info = _value_info(constants[info.name])
                graph.input.append(info)
            graph.input.extend(_value_info(t) for n, t in constants.items() if n not in known)
        if infos:
            self._state_shapes(graph)
        outputs = {o.name for o in graph.output}
        for name in extra_outputs:
            if name not in outputs:
                graph.output.add().name = name
        return proto, large

    def _state_shapes(self, graph: GraphProto) -> None:
        tensors = {t.name: t for n in self.graph.nodes for t in n.outputs}
        for name, stated in self._value_infos.items():
            shape = tensors[name].shape if name in tensors else None
            dims = stated.type.tensor_type.shape.dim
            if shape is None or len(dims) != len(shape):
                continue
            info = _copied(graph.value_info, stated)
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
        original = self._protos.get(id(node))
        known = self._attributes.get(id(node), {})
        unchanged = known.keys() == node.attrs.keys() and all(
            known[key] is value for key, value in node.attrs.items()
        )
        if original is not None and (unchanged or _has_body(original)):
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


def load(source: ModelSource, *, freeze_weights: bool = False) -> Model:
    """Read a model from a path, serialized bytes, or a message (which is not modified).

    Weights inside the file are mapped, not read; so are external ones. A pipe is read to its end.

    Args:
        source: the model.
        freeze_weights: declare initializers final that are graph inputs as well, which a caller
            could replace (IR version 4 and newer); they are no inputs then.

    Raises:
        ModelError: the source cannot be read or is not a valid ONNX model.
    """
    folder: Path | None = None
    source_bytes = None
    arrays: dict[str, np.ndarray] = {}
    if not isinstance(source, (ModelProto, bytes, str, os.PathLike)):
        raise ModelError(f"expected a path, bytes or a ModelProto, got {type(source).__name__}")
    if isinstance(source, ModelProto):
        proto, arrays = _strip(source)
    else:
        if isinstance(source, bytes):
            data: bytes | np.ndarray = source
            label = "the model"
        else:
            path = Path(source)
            label = str(path)
            data, streamed = _read_file(path)
            folder = None if streamed else path.parent
        source_bytes = len(data)
        if len(data) == 0:
            raise ModelError(f"{label} is empty: not an ONNX model")
        buffer = np.frombuffer(data, np.uint8)
        skeleton, spans = split_raw_data(buffer.data, INLINE_BYTES)
        proto = ModelProto()
        try:
            proto.ParseFromString(skeleton)
        except DecodeError as error:
            raise ModelError(f"{label} is not an ONNX model (cannot be decoded)") from error
        for index, (start, stop) in spans.items():
            tensor = proto.graph.initializer[index]
            arrays[tensor.name] = _view(tensor, buffer[start:stop])
    _check_text(proto)
    if not proto.graph.node and not proto.graph.output:
        raise ModelError("not an ONNX model: it has no graph")
    files: dict[Path, np.ndarray] = {}
    for tensor in proto.graph.initializer:
        if tensor.name not in arrays:
            arrays[tensor.name] = _read(tensor, folder, files)
            if source_bytes is not None and tensor.data_location == TensorProto.EXTERNAL:
                source_bytes += arrays[tensor.name].nbytes
    _import_domains(proto)
    _check(proto)
    if freeze_weights:
        _drop_inputs(proto.graph, {i.name for i in proto.graph.initializer})
    for tensor in proto.graph.initializer:
        values = arrays[tensor.name]
        if values.nbytes > INLINE_BYTES and not _stays_inline(values.dtype):
            tensor.CopyFrom(_placeholder(tensor.name, values.dtype, values.shape))
        elif tensor.data_location == TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(np.array(values), tensor.name))
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    try:
        model = Model(proto, arrays)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"not a valid ONNX graph: {first_line(error)}") from error
    model.source_bytes = source_bytes
    if folder is not None and not isinstance(source, (ModelProto, bytes)):
        model.files = [Path(source).resolve(), *files]
    model.mapped = list({id(m): m for m in map(_mapping, arrays.values()) if m}.values())
    return model


def fits_message(model: Model) -> bool:
    """Whether a single protobuf message can hold the weights."""
    return sum(t.values.nbytes for t in model.initializers().values()) <= MESSAGE_LIMIT


def headless(proto: ModelProto) -> ModelProto:
    """A copy in which initializers without data have become graph inputs.

    The ONNX checker and shape inference accept it, and need no weights.
    """
    copy = ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph
    known = {i.name for i in graph.input}
    keep = []
    for tensor in graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            keep.append(tensor)
        elif tensor.name not in known:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    keep = [_copy_tensor(t) for t in keep]
    del graph.initializer[:]
    graph.initializer.extend(keep)
    return copy


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph and those of the bodies inside, at any depth."""
    for node in graph.node:
        yield node
        for body in _bodies(node):
            yield from all_nodes(body)


def sort_nodes(graph: GraphProto) -> None:
    """Sort the nodes topologically, in place; stable where the order is already valid.

    Raises:
        ModelError: there is a cycle, or two nodes produce the same tensor.
    """
    producer: dict[str, int] = {}
    for i, node in enumerate(graph.node):
        for name in node.output:
            if not name:
                continue
            if name in producer:
                raise ModelError(f"invalid graph: tensor '{name}' is produced twice")
            producer[name] = i
    needs = []
    users: dict[int, list[int]] = {}
    for i, node in enumerate(graph.node):
        sources = {producer[n] for n in _reads(node) if n in producer}
        if i in sources:
            raise ModelError(f"invalid graph: node '{node.name or node.op_type}' reads itself")
        needs.append(len(sources))
        for source in sources:
            users.setdefault(source, []).append(i)
    if all(producer.get(n, -1) < i for i, node in enumerate(graph.node) for n in _reads(node)):
        return
    ready = deque(i for i, n in enumerate(needs) if n == 0)
    order = []
    while ready:
        i = ready.popleft()
        order.append(i)
        for user in users.get(i, ()):
            needs[user] -= 1
            if needs[user] == 0:
                ready.append(user)
    if len(order) != len(graph.node):
        raise ModelError("invalid graph: its nodes form a cycle")
    nodes = [NodeProto.FromString(graph.node[i].SerializeToString()) for i in order]
    del graph.node[:]
    graph.node.extend(nodes)


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


def _reads(node: NodeProto) -> Iterator[str]:
    """Names of the tensors a node reads, those captured by its bodies among them."""
    yield from node.input
    if _has_body(node):
        yield from _free_names(node)


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _has_body(node: NodeProto) -> bool:
    return any(_is_graph(a) for a in node.attribute)


def _free_names(node: NodeProto) -> set[str]:
    """Names that the bodies of a node use without defining them."""
    free: set[str] = set()
    for body in _bodies(node):
        local = {i.name for i in body.input} | {i.name for i in body.initializer}
        local |= {name for inner in body.node for name in inner.output}
        used = {name for inner in body.node for name in _reads(inner)}
        used |= {o.name for o in body.output}
        free |= used - local
    return free - {""}


def _body_names(node: NodeProto) -> Iterator[str]:
    for body in _bodies(node):
        yield from (i.name for i in (*body.input, *body.initializer, *body.output))
        for inner in body.node:
            yield from (*inner.input, *inner.output)
            yield from _body_names(inner)


def _is_graph(attribute: AttributeProto) -> bool:
    return attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS)


def _adopt_constant_attributes(node: gs.Node) -> None:
    for value in node.attrs.values():
        if isinstance(value, gs.Constant) and not isinstance(value._values, np.ndarray):
            value.values = numpy_helper.to_array(value._values.tensor)


def _drop_inputs(graph: GraphProto, names: set[str]) -> None:
    keep = [i for i in graph.input if i.name not in names]
    keep = [onnx.ValueInfoProto.FromString(i.SerializeToString()) for i in keep]
    del graph.input[:]
    graph.input.extend(keep)


def _copied(container, message):  # type: ignore[no-untyped-def]
    new = container.add()
    new.CopyFrom(message)
    return new


def _copy_tensor(tensor: TensorProto) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    return copy


def _value_info(tensor: gs.Constant) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(
        tensor.name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)), tensor.shape
    )


def _stays_inline(dtype: object) -> bool:
    """Whether bytes of an array of this type are not the bytes of a tensor, or foreign to numpy."""
    kind: np.dtype = np.dtype(dtype)  # type: ignore[call-overload]
    packed = ("int2", "int4", "float4", "float8")
    return kind.kind in "OSU" or kind.name.lstrip("u").startswith(packed)


def _nbytes(tensor: gs.Constant) -> int:
    return int(np.dtype(tensor.dtype).itemsize * np.prod(tensor.shape))


def _placeholder(name: str, dtype: np.dtype, shape: Iterable[int]) -> TensorProto:
    tensor = TensorProto(
        name=name,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)),
        dims=shape,
        data_location=TensorProto.EXTERNAL,
    )
    tensor.external_data.add(key="location", value="memory")
    return tensor


def _strip(source: ModelProto) -> tuple[ModelProto, dict[str, np.ndarray]]:
    proto = ModelProto()
    arrays = {}
    for field, value in source.ListFields():
        if field.name != "graph":
            if field.is_repeated:
                getattr(proto, field.name).extend(value)
            else:
                setattr(proto, field.name, value)
    for field, value in source.graph.ListFields():
        if field.name == "initializer":
            for tensor in value:
                if tensor.HasField("raw_data"):
                    small = TensorProto(
                        name=tensor.name, data_type=tensor.data_type, dims=tensor.dims
                    )
                    raw = tensor.raw_data
                    if len(raw) <= INLINE_BYTES:
                        small.raw_data = raw
                    arrays[tensor.name] = _view(small, np.frombuffer(raw, np.uint8))
                    proto.graph.initializer.append(small)
                else:
                    proto.graph.initializer.append(tensor)
        elif field.is_repeated:
            getattr(proto.graph, field.name).extend(value)
        else:
            setattr(proto.graph, field.name, value)
    return proto, arrays


def _view(tensor: TensorProto, raw: np.ndarray) -> np.ndarray:
    try:
        if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4) or tensor.data_type >= 17:
            full = _copy_tensor(tensor)
            full.raw_data = raw.tobytes()
            return numpy_helper.to_array(full)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if any(d < 0 for d in tensor.dims):
            raise ValueError("negative size")
        return raw.view(dtype).reshape(tuple(tensor.dims))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"initializer '{tensor.name}' has data that do not fit its shape"
        ) from error


def _read(tensor: TensorProto, folder: Path | None, files: dict[Path, np.ndarray]) -> np.ndarray:
    """The values of an initializer; files of external data are mapped once, into ``files``."""
    if tensor.data_location != TensorProto.EXTERNAL:
        try:
            return numpy_helper.to_array(tensor)
        except Exception as error:
            raise ModelError(
                f"initializer '{tensor.name}' cannot be read: {first_line(error)}"
            ) from error
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise ModelError(
            f"initializer '{tensor.name}' is in a file beside the model: pass the model's path"
        )
    shown = location[:200]
    try:
        base = folder.resolve()
        path = (base / location).resolve()
        if not location or os.path.isabs(location) or not path.is_relative_to(base):
            raise ModelError(f"external data location '{shown}' points outside the model's folder")
        if not path.is_file():
            raise ModelError(f"external data file '{shown}' is missing: put it beside the model")
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"external data location '{shown}' is no name of a file") from error
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", path.stat().st_size - offset))
    except ValueError as error:
        raise ModelError(
            f"initializer '{tensor.name}' has a malformed external location"
        ) from error
    if path not in files:
        files[path] = _map_file(path)
    data = files[path]
    if offset < 0 or length < 0 or offset + length > len(data):
        raise ModelError(f"external data file '{shown}' is too short for '{tensor.name}'")
    raw = np.frombuffer(data, np.uint8)[offset : offset + length]
    return _view(tensor, raw)


def _read_file(path: Path) -> tuple[np.ndarray | bytes, bool]:
    """What a path holds, and whether that came as a stream, beside which there are no files."""
    try:
        kind = path.stat().st_mode
        if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
            raise ModelError(f"{path} is a device, not an ONNX file")
        if stat.S_ISFIFO(kind):
            return path.read_bytes(), True
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return _map_file(path), False


def _map_file(path: Path) -> np.ndarray:
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a folder, not an ONNX file")
        if path.stat().st_size == 0:
            return np.zeros(0, np.uint8)
        return np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | ValueError) -> ModelError:
    if isinstance(error, FileNotFoundError):
        return ModelError(f"{path} does not exist")
    reason = error.strerror if isinstance(error, OSError) else None
    return ModelError(f"{path} cannot be read: {reason or error}")


def _check_text(message: Message) -> None:
    """Refuse names that are not UTF-8: nothing could be said about such a model."""
    try:
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                for child in value if field.is_repeated else (value,):
                    _check_text(child)
            elif field.type == field.TYPE_STRING:
                for text in value if field.is_repeated else (value,):
                    if not isinstance(text, str):
                        raise ModelError("not an ONNX model: it has names that are not UTF-8")
    except UnicodeDecodeError as error:
        raise ModelError("not an ONNX model: it has names that are not UTF-8") from error


def _mapping(array: np.ndarray) -> mmap.mmap | None:
    """The file mapping that an array is a view of."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, mmap.mmap) else None


def _check(proto: ModelProto) -> None:
    if not proto.opset_import:
        raise ModelError("not a valid ONNX model: it imports no operator set")
    newest = onnx.defs.onnx_opset_version()
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx") and not 0 < opset.version <= newest:
            raise ModelError(
                f"operator set {opset.version} is not known (up to {newest} is): "
                "upgrade the onnx package"
            )
    names: set[str] = set()
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            raise ModelError(f"invalid graph: two initializers are named '{tensor.name}'")
        names.add(tensor.name)
    sort_nodes(proto.graph)
    stripped = ModelProto()
    stripped.CopyFrom(proto)
    for tensor in stripped.graph.initializer:
        if not any(f.name.endswith("_data") for f, _ in tensor.ListFields()):
            tensor.data_location = TensorProto.EXTERNAL
    stripped = headless(stripped)
    _forgive(stripped)
    try:
        onnx.checker.check_model(stripped)
    except Exception as error:
        raise ModelError(f"not a valid ONNX model: {first_line(error)}") from error


def _forgive(model: ModelProto) -> None:
    """Add what the checker insists on and nobody needs, in place."""
    graph = model.graph
    graph.name = graph.name or "graph"
    for info in graph.output:
        if info.type.WhichOneof("value") is None:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    for info in (*graph.input, *graph.output):
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.shape.SetInParent()
    # Older checkers know only the short name of the default domain.
    if "" not in {o.domain for o in model.opset_import}:
        for item in (*model.opset_import, *all_nodes(graph)):
            item.domain = "" if item.domain == "ai.onnx" else item.domain


def _import_domains(model: ModelProto) -> None:
    """Import the operator sets that nodes use, as onnxruntime does unasked, in place."""
    known = {o.domain for o in model.opset_import}
    for domain in sorted({n.domain for n in model.graph.node} - known):
        if domain == "ai.onnx" and "" in known:
            for node in model.graph.node:
                node.domain = "" if node.domain == domain else node.domain
        elif domain in _DOMAINS:
            model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
