"""Small random ONNX models with pruned channels, for property tests and fuzzing.

A model grows node by node.  Every new node runs in onnxruntime at once, on a few "probe" inputs
that cover the dynamic sizes; a node that onnxruntime rejects, or whose values are huge or not
finite, is taken back.  So shapes are observed, not derived.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper

_IR_VERSIONS = {11: 6, 13: 7, 17: 8, 18: 8, 20: 9}
# Doc string of models whose inner values are not finite for large inputs.
OVERFLOWS = "overflows for large inputs"
_LARGEST = 150.0  # magnitude
_MOST = 150_000  # elements
_LAST = 2**63 - 1
# A batch takes 1..3, a spatial axis 7..12, and both a larger size; no two axes change alike.
_PROBES = {
    "batch": (1, 2, 3, 5, 1, 3, 2),
    "height": (7, 8, 9, 10, 11, 12, 17),
    "width": (9, 12, 7, 11, 17, 8, 10),
    "depth": (10, 7, 12, 8, 9, 11, 13),
    "time": (8, 11, 10, 7, 12, 9, 17),
}
_FREE_AXES = {
    "1d": ("batch", "width"),
    "2d": ("batch", "height", "width"),
    "3d": ("batch", "depth", "height", "width"),
    "nhwc": ("batch", "height", "width"),
    "mlp": ("batch",),
    "sequence": ("batch", "time"),
}


class Skip(Exception):
    """The drawn operator does not fit here."""


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor and its value for each probe; constants are the same for all."""

    name: str
    values: tuple[np.ndarray, ...]
    const: bool = False

    @property
    def rank(self) -> int:
        """The number of axes."""
        return self.values[0].ndim

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """For each axis, its size for every probe."""
        return list(zip(*(v.shape for v in self.values), strict=True))

    @property
    def dims(self) -> tuple[int | None, ...]:
        """The shape, None where it depends on the input's."""
        return tuple(s[0] if len(set(s)) == 1 else None for s in self.sizes)

    def dim(self, axis: int, most: int = 512) -> int:
        """A dimension that must be known and not too large."""
        size = self.dims[axis] if -self.rank <= axis < self.rank else None
        if size is None or size > most:
            raise Skip
        return size


class Builder:
    """The growing graph, its random source and the style drawn for this model."""

    def __init__(self, *seed: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.opset = int(rng.choice(list(_IR_VERSIONS)))
        self.dtype = np.dtype(rng.choice(["f4", "f2", "f8"], p=[0.93, 0.04, 0.03]))
        self.onnx_type = helper.np_dtype_to_tensor_dtype(self.dtype)
        self.family = str(rng.choice(list(_FREE_AXES), p=[0.1, 0.5, 0.1, 0.1, 0.1, 0.1]))
        self.dynamic = self.chance(0.5)
        self.coupled = self.chance(0.5)
        self.anonymous = self.chance(0.25)
        # Of a generator of its own, so that the other models stay what they are.
        integers = np.random.default_rng([*seed, 1]).random() < 0.1
        self.quantized = integers and self.dtype == np.float32
        self.twist_rng = np.random.default_rng([*seed, 2])
        self.twisted = self.dtype == np.float32 and self.twist_rng.random() < 0.3
        self.style = int(rng.integers(3))
        self.widths = [int(w) for w in rng.choice([1, 2, 3, 4, 4, 6, 8, 8, 12], 3)]
        self.masks: dict[int, np.ndarray] = {}
        self.symbols: dict[tuple[int, ...], str] = {}
        self.overflows = False  # for inputs much larger than the probes
        self.count = 0
        # What a rejected operator has appended to these lists is taken back.
        self.nodes: list[NodeProto] = []
        self.inits: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.pool: list[Tensor] = []  # live, of the model's type
        self.extras: list[Tensor] = []  # live, of another type
        self.params: list[Tensor] = []
        self.used: list[str] = []
        self.stored: list[Tensor] = []  # weights behind DequantizeLinear
        self.fed: list[Tensor] = []  # inputs without a default
        self.made: list[Tensor] = []  # whatever a node made, but for sizes that inputs may change
        self.wanted: list[Tensor] = []  # outputs for certain, of sizes that inputs may change

    def attempt(self, grow: Callable[[Builder], Any]) -> None:
        """Apply a grower; if it does not fit leave no trace."""
        lists: list[list[Any]] = [v for v in vars(self).values() if isinstance(v, list)]
        lengths = [len(items) for items in lists]
        try:
            grow(self)
        except Skip:
            for items, length in zip(lists, lengths, strict=True):
                del items[length:]

    # Random choices.

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self.rng.random() < probability)

    def choose(self, options: Sequence[Any]) -> Any:
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    def many(self, options: Sequence[int], count: int) -> list[int]:
        """As many independent draws from the options."""
        return [int(self.choose(options)) for _ in range(count)]

    def either(self, x: Tensor, y: Tensor, first: float = 0.5) -> tuple[Tensor, Tensor]:
        """The two in either order, x first with this probability."""
        return (x, y) if self.chance(first) else (y, x)

    def width(self) -> int:
        """A channel count."""
        return self.choose(self.widths) if self.chance(0.8) else int(self.rng.integers(1, 13))

    def axis(self, x: Tensor, channels: float = 1.0) -> int:
        """The channel axis, with this probability, or any other."""
        if not self.chance(channels):
            return int(self.rng.integers(x.rank))
        return x.rank - 1 if self.family == "sequence" else min(1, x.rank - 1)

    def signed(self, axis: int, rank: int) -> int:
        """The axis, sometimes counted from the end."""
        return axis - rank if self.chance(0.2) else axis

    def pick(self, least: int = 1, where: Callable[[Tensor], bool] | None = None) -> Tensor:
        """A live tensor of at least this rank, preferably new or unused."""
        found = [t for t in self.pool if t.rank >= least and (where is None or where(t))]
        if self.chance(0.5):
            found = [t for t in found if t.name not in self.used] or found
        if not found:
            raise Skip
        return found[-min(int(self.rng.geometric(0.45)), len(found))]

    def image(self, *ranks: int) -> Tensor:
        """A live tensor that a convolution can read."""
        return self.pick(3, lambda t: t.rank in (ranks or (3, 4, 5)) and 0 < (t.dims[1] or 0) < 33)

    # Constants.

    def const(self, array: Any, dtype: Any = None) -> Tensor:
        """A constant, as an initializer or a Constant node."""
        value = np.asarray(array, dtype or self.dtype)
        tensor = Tensor(self.name("Constant"), (value,) * len(self.probes), const=True)
        if self.chance(0.12):
            proto = numpy_helper.from_array(value)
            self.nodes.append(helper.make_node("Constant", [], [tensor.name], value=proto))
        else:
            self.inits.append(numpy_helper.from_array(value, tensor.name))
        return tensor

    def ints(self, values: Any) -> Tensor:
        """An int64 constant."""
        return self.const(values, np.int64)

    def param(self, array: Any) -> Tensor:
        """A weight: sometimes shared, behind an Identity, or also a graph input."""
        value = np.asarray(array, self.dtype)
        shared = [p for p in self.params if p.values[0].shape == value.shape]
        if shared and self.chance(0.06):
            return self.choose(shared)
        tensor = self.const(value)
        if self.chance(0.012) and self.inits and self.inits[-1].name == tensor.name:
            info = helper.make_tensor_value_info(tensor.name, self.onnx_type, value.shape)
            self.inputs.append(info)
        elif self.chance(0.04):
            alias = Tensor(self.name("Identity"), tensor.values, const=True)
            self.nodes.append(helper.make_node("Identity", [tensor.name], [alias.name]))
            tensor = alias
        self.params.append(tensor)
        return tensor

    def normal(self, shape: Any) -> Tensor:
        """A weight of random values."""
        return self.param(self.rng.normal(size=shape))

    def dead(self, count: int, coupled: bool = False) -> np.ndarray:
        """A mask of pruned channels; coupled layers of the same width share it."""
        if coupled and count in self.masks:
            return self.masks[count]
        mask = self.rng.random(count) < self.rng.uniform(0.2, 0.8)
        if mask.all() and self.chance(0.9):
            mask[self.rng.integers(count)] = False
        if coupled:
            self.masks[count] = mask
        return mask

    def weight(self, rows: int, cols: int, kernel: Sequence[int] = ()) -> tuple[Any, Any]:
        """A weight [rows, cols, *kernel] with random zero rows and columns, and the row mask."""
        shape = (rows, cols, *kernel)
        weight = self.rng.normal(0, math.sqrt(2 / math.prod(shape[1:])), shape)
        mask = self.dead(rows, self.coupled) if self.chance(0.7) else np.zeros(rows, bool)
        weight[mask] = 0
        if cols > 1 and self.chance(0.3):
            weight[:, self.dead(cols)] = 0
        if self.chance(0.03):
            weight[:] = 0
        return weight, mask

    def bias(self, mask: np.ndarray) -> np.ndarray:
        """A bias, mostly not zero where the weights are."""
        bias = self.rng.normal(0, 0.5, mask.shape)
        if self.chance(0.45 if self.coupled else 0.2):
            bias[mask] = 0
        return bias

    # Nodes.

    @property
    def probes(self) -> range:
        """The numbers of the probe inputs."""
        return range(len(_PROBES["batch"]) if self.dynamic else 1)

    def name(self, kind: str) -> str:
        """A fresh tensor name in the model's style."""
        self.count += 1
        n = self.count
        return (f"t{n}", f"/block.{n % 4}/{kind}_{n}_output_0", str(n + 100))[self.style]

    def add_input(self, shape: Sequence[int | str]) -> Tensor:
        """A graph input; a string is a dynamic dimension."""
        name = self.choose(["input", "x", "images"]) + str(len(self.inputs))
        self.inputs.append(helper.make_tensor_value_info(name, self.onnx_type, shape))
        self.symbols |= {_PROBES[d]: d for d in shape if isinstance(d, str)}
        sizes = [[_PROBES[d][i] if isinstance(d, str) else d for d in shape] for i in self.probes]
        values = tuple(self.rng.normal(size=s).astype(self.dtype) for s in sizes)
        self.pool.append(Tensor(name, values))
        self.fed.append(self.pool[-1])
        return self.pool[-1]

    def open_operand(self, default: Any, choices: Sequence[Any], required: bool) -> Tensor:
        """An operand that a caller may set to one of these values; they are kept in its doc string.

        Args:
            default: its value in the probes, and where nobody sets it.
            choices: what :func:`random_feeds` draws from.
            required: whether it is a mere input, or an initializer that is an input as well.
        """
        value = np.asarray(default)
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        tensor = Tensor(self.name("operand"), (value,) * len(self.probes))
        info = helper.make_tensor_value_info(tensor.name, kind, value.shape)
        info.doc_string = json.dumps([np.asarray(c).tolist() for c in choices])
        self.inputs.append(info)
        if required:
            self.fed.append(tensor)
        else:
            self.inits.append(numpy_helper.from_array(value, tensor.name))
        return tensor

    def op(self, kind: str, *operands: Tensor | None, **attrs: Any) -> Tensor:
        """Append a node with one output."""
        return self.ops(1, kind, *operands, **attrs)[0]

    def ops(
        self,
        outputs: int,
        kind: str,
        *operands: Tensor | None,
        captures: Sequence[Tensor] = (),
        keep: bool = True,
        loose: bool = False,
        **attrs: Any,
    ) -> list[Tensor]:
        """Append a node, run it on the probes, and put its outputs into the pool.

        Args:
            outputs: how many.
            kind: the operator.
            operands: what it reads.
            captures: what its bodies read.
            keep: whether other operators may read the outputs.
            loose: the outputs may be empty, or their sizes depend on what a caller sets; they are
                not kept.
            attrs: attributes.
        """
        label = "" if self.anonymous or self.chance(0.1) else f"{kind}_{self.count}"
        names = [self.name(kind) for _ in range(outputs)]
        operands = operands[: max(i + 1 for i, t in enumerate(operands) if t)]
        reads = [t.name if t else "" for t in operands]
        node = helper.make_node(kind, reads, names, name=label, **attrs)
        inputs = [t for t in (*operands, *captures) if t]
        values = _run(node, inputs, self.opset)
        for value in (v for vs in values for v in vs):
            sane = value.dtype != self.dtype or np.abs(value).max(initial=0) < _LARGEST
            full = 0 < value.size < _MOST and value.ndim == values[0][0].ndim
            if not (sane and (full or loose)):
                raise Skip
        self.nodes.append(node)
        self.used.extend(t.name for t in inputs)
        made = [Tensor(n, v) for n, v in zip(names, values, strict=True)]
        if loose:
            return made
        self.made.extend(made)
        if keep and made[0].values[0].dtype == self.dtype:
            self.pool.extend(made)
        return made


@functools.cache
def _options() -> ort.SessionOptions:
    """Quiet, single-threaded, no graph optimisations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return options


def _run(node: NodeProto, inputs: Sequence[Tensor], opset: int) -> list[tuple[np.ndarray, ...]]:
    """The outputs of one node, each with a value for every probe."""
    unique = {t.name: t for t in inputs}.values()
    live = [t for t in unique if not t.const]
    kinds = [helper.np_dtype_to_tensor_dtype(t.values[0].dtype) for t in live]
    infos = [
        helper.make_tensor_value_info(t.name, k, t.dims) for t, k in zip(live, kinds, strict=True)
    ]
    outputs = [onnx.ValueInfoProto(name=o) for o in node.output]  # onnxruntime infers the types
    inits = [numpy_helper.from_array(t.values[0], t.name) for t in unique if t.const]
    model = _model(helper.make_graph([node], "node", infos, outputs, inits), opset)
    feeds = [{t.name: t.values[i] for t in live} for i in range(len(inputs[0].values))]
    try:
        onnx.defs.get_schema(node.op_type, opset)
        runs = _session_runs(model, feeds)
    except Exception as error:  # the exceptions of onnxruntime have no narrower base
        raise Skip from error
    return list(zip(*([np.asarray(v) for v in run] for run in runs), strict=True))


def _session_runs(model: ModelProto, feeds: Sequence[dict[str, np.ndarray]]) -> list[list[Any]]:
    """What onnxruntime computes for each of the feeds."""
    data = model.SerializeToString()
    session = ort.InferenceSession(data, _options(), providers=["CPUExecutionProvider"])
    return [session.run(None, feed) for feed in feeds]


def _valid(b: Builder, model: ModelProto) -> bool:
    """Whether onnx and onnxruntime accept the whole model; seldom they disagree about shapes."""
    try:
        onnx.checker.check_model(model, full_check=True)
        _session_runs(model, [{t.name: t.values[i] for t in b.fed} for i in b.probes])
    except Exception:  # as above
        return False
    return True


def _model(graph: GraphProto, opset: int) -> ModelProto:
    """A model message for this opset."""
    ids = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=ids, ir_version=_IR_VERSIONS[opset])


# Growers append an operator or a small block, or raise Skip.  First the layers with weights.


def _window(b: Builder, n: int, pool: bool = False, dilate: bool = True) -> dict[str, Any]:
    """Kernel, strides, dilations and padding of a convolution or pooling."""
    kernel = [1] * n if not pool and b.chance(0.3) else b.many([1, 2, 3, 3, 3, 5], n)
    attrs: dict[str, Any] = {"kernel_shape": kernel}
    dilations = [1] * n
    if b.chance(0.25):
        attrs["strides"] = b.many([1, 2, 2], n)
    if dilate and b.chance(0.15):
        attrs["dilations"] = dilations = b.many([1, 2], n)
    mode = b.choose(["none", "half", "half", "half", "any", "SAME_UPPER", "SAME_LOWER", "VALID"])
    if mode == "half":
        attrs["pads"] = [d * (k - 1) // 2 for k, d in zip(kernel, dilations, strict=True)] * 2
    elif mode == "any":
        attrs["pads"] = [int(b.rng.integers(k)) for k in kernel * 2]
    elif mode != "none":
        attrs["auto_pad"] = mode
    return attrs


def _quantize(b: Builder, x: Tensor) -> tuple[Tensor, float]:
    """An activation through QuantizeLinear and DequantizeLinear, and its scale."""
    kind = np.dtype(b.choose([np.int8, np.uint8]))
    largest = max(float(np.abs(v).max()) for v in x.values) or 1.0
    scales, attrs = np.array(largest / 120, np.float32), {}
    channels = x.dims[1] if x.rank > 1 else None
    if b.opset >= 13 and channels is not None and b.chance(0.15):
        scales = (scales * b.rng.uniform(0.7, 1.3, channels)).astype(np.float32)
        attrs = {"axis": 1}
    zeros = np.full(scales.shape, 128 if kind == np.uint8 else b.choose([0, 3]), kind)
    parameters = [b.const(scales), b.const(zeros, kind)]
    q = b.op("QuantizeLinear", x, *parameters, keep=False, **attrs)
    return b.op("DequantizeLinear", q, *parameters, **attrs), float(scales.max())


def _dequantize(
    b: Builder, weight: np.ndarray, bias: np.ndarray | None, axis: int, scale: float
) -> list[Tensor | None]:
    """A weight and a bias that are stored as integers; axis is the weight's output axis."""
    known = [w for w in b.stored if w.values[0].shape == weight.shape]
    if known and b.chance(0.25):
        return [b.choose(known), None if bias is None else b.param(bias)]
    kind = np.dtype(b.choose([np.int8, np.int8, np.uint8]))
    per_axis = b.opset >= 13 and b.chance(0.5)
    axes = tuple(a for a in range(weight.ndim) if a != axis) if per_axis else None
    largest = np.abs(weight).max(axis=axes)
    scales = np.where(largest > 0, largest / 120, 0.01).astype(np.float32)
    zeros = np.full(scales.shape, 128 if kind == np.uint8 else b.choose([0, 0, 2]), kind)
    shape = [-1 if a == axis and per_axis else 1 for a in range(weight.ndim)]
    stored = np.rint(weight / scales.reshape(shape)) + zeros.reshape(shape).astype(float)
    attrs = {"axis": axis} if per_axis else {}
    q = [b.const(stored, kind), b.const(scales), b.const(zeros, kind)]
    numbers = b.op("DequantizeLinear", *q, keep=False, **attrs)
    found: list[Tensor | None] = [numbers, None]
    b.stored.append(numbers)
    if bias is not None and b.chance(0.2):
        found[1] = b.param(bias)
    elif bias is not None:
        of_bias = (scales * scale).astype(np.float32)
        q = [b.const(np.rint(bias / of_bias), np.int32), b.const(of_bias)]
        attrs = {"axis": 0} if per_axis else {}
        found[1] = b.op("DequantizeLinear", *q, keep=False, **attrs)
    return found


def _conv(b: Builder, x: Tensor, out: int, groups: int = 1, **attrs: Any) -> Tensor:
    """A convolution with a possibly pruned weight."""
    weight, mask = b.weight(out, x.dim(1, 64) // groups, attrs["kernel_shape"])
    bias = b.bias(mask) if b.chance(0.7) else None
    if b.chance(0.15):
        del attrs["kernel_shape"]
    if groups > 1 or b.chance(0.5):
        attrs["group"] = groups
    if b.quantized and b.chance(0.8):
        x, scale = _quantize(b, x)
        return b.op("Conv", x, *_dequantize(b, weight, bias, 0, scale), **attrs)
    constant = None if bias is None else b.param(bias)
    return b.op("Conv", x, b.param(weight), constant, **attrs)


def _same(b: Builder, x: Tensor, out: int, size: int | None = None, groups: int = 1) -> Tensor:
    """A convolution that keeps the spatial size."""
    n, size = x.rank - 2, size or b.choose([1, 3, 3, 5])
    return _conv(b, x, out, groups, kernel_shape=[size] * n, pads=[size // 2] * (2 * n))


def _groups(b: Builder, channels: int) -> int:
    """A divisor of the channel count, greater than one if possible."""
    return b.choose([g for g in range(2, channels + 1) if channels % g == 0] or [1])


def conv(b: Builder) -> None:
    """Conv: plain, grouped, depthwise or depthwise with a multiplier."""
    x = b.image()
    channels = x.dim(1)
    kind = b.choose(["plain"] * 5 + ["grouped", "grouped", "depthwise", "multiplier"])
    groups = {"plain": 1, "grouped": _groups(b, channels)}.get(kind, channels)
    out = {"depthwise": channels, "multiplier": 2 * channels}.get(kind) or b.width()
    y = _conv(b, x, max(1, out // groups) * groups, groups, **_window(b, x.rank - 2))
    y = batchnorm(b, y) if b.chance(0.4) else y
    if b.chance(0.3):
        unary(b, y)


def conv_transpose(b: Builder) -> None:
    """ConvTranspose, also grouped and with output_padding."""
    x = b.image()
    n, channels = x.rank - 2, x.dim(1)
    groups = b.choose([1, 1, _groups(b, channels)])
    out = max(1, b.width() // groups) * groups
    kernel, strides = b.many([1, 2, 3, 4], n), b.many([1, 2, 2], n)
    attrs = {"kernel_shape": kernel, "strides": strides, "group": groups}
    if b.chance(0.15):
        attrs["dilations"] = b.many([1, 2], n)
    if b.chance(0.2):
        attrs["auto_pad"] = b.choose(["SAME_UPPER", "SAME_LOWER", "VALID"])
    elif b.chance(0.5):
        attrs["pads"] = [int(b.rng.integers(k)) for k in kernel * 2]
    if b.chance(0.4):
        attrs["output_padding"] = [s - 1 for s in strides]
    weight, mask = b.weight(out, channels // groups, kernel)
    weight = weight.reshape(groups, out // groups, channels // groups, *kernel).swapaxes(1, 2)
    bias = b.param(b.bias(mask)) if b.chance(0.7) else None
    b.op("ConvTranspose", x, b.param(weight.reshape(channels, -1, *kernel)), bias, **attrs)


def gemm(b: Builder, x: Tensor | None = None) -> None:
    """A Gemm whose A is x, or seldom B."""
    x = x or b.pick(2, lambda t: t.rank == 2)
    left = x.dims[0] is not None and b.chance(0.15)  # the weight's side
    out = b.width()
    weight, mask = b.weight(out, x.dim(0 if left else 1))
    flips = int(b.chance(0.5)), int(b.chance(0.25))  # weight, x
    const = b.param(weight if flips[0] != left else weight.T)
    operand = b.op("Transpose", x, perm=[1, 0], keep=False) if flips[1] else x
    attrs = {"transA": flips[int(not left)], "transB": flips[int(left)]}
    attrs |= {k: b.choose([0.5, 0.8, 1.5]) for k in ("alpha", "beta") if b.chance(0.3)}
    shapes: list[tuple[int, ...]] = [(), (1,), (1, 1)]
    shapes += [(out, 1)] * 5 if left else [(out,), (out,), (out,), (1, out), (1, out)]
    if not left and x.dims[0] is not None:
        shapes += [(x.dims[0], 1), (x.dims[0], out)]
    shape = b.choose(shapes)
    fits = math.prod(shape) == out
    bias = b.param(b.bias(mask).reshape(shape)) if fits else b.normal(shape)
    pair = (const, operand) if left else (operand, const)
    y = b.op("Gemm", *pair, bias if b.chance(0.8) else None, **attrs)
    if b.chance(0.4):
        unary(b, y)


def matmul(b: Builder) -> None:
    """MatMul with a constant on either side, mostly with a bias behind it."""
    x = b.pick(2)
    left = b.chance(0.25)
    out = b.width()
    weight, mask = b.weight(out, x.dim(-2 if left else -1, 96))
    weight = weight if left else weight.T
    if b.quantized and b.chance(0.8):
        x, scale = _quantize(b, x)
        const = _dequantize(b, weight, None, int(not left), scale)[0]
        assert const is not None
    else:
        const = b.param(weight[None] if b.chance(0.15) else weight)
    y = b.op("MatMul", *((const, x) if left else (x, const)))
    if b.chance(0.7):
        bias = b.param(b.bias(mask).reshape((out, 1) if left else (out,)))
        b.op("Add", *b.either(y, bias))


def batchnorm(b: Builder, x: Tensor) -> Tensor:
    """BatchNormalization; its scale is sometimes zero in some channels."""
    count = x.dim(1, 64)
    scale, var = b.rng.uniform(0.5, 1.5, (2, count))
    shift, mean = b.rng.normal(0, 0.4, (2, count))
    mask = b.dead(count, b.coupled)
    if b.chance(0.3):
        scale[mask] = 0
        shift[mask] *= b.choose([0, 1, 1])
    attrs = {"epsilon": 1e-3} if b.chance(0.3) else {}
    return b.op("BatchNormalization", x, *map(b.param, (scale, shift, mean, var)), **attrs)


def normalize(b: Builder) -> None:
    """InstanceNormalization, LRN or LayerNormalization."""
    kind = b.choose(["InstanceNormalization", "LRN", "LayerNormalization"])
    if kind == "LRN":
        b.op(kind, b.image(4), size=b.choose([3, 5]), alpha=0.3, beta=0.75, bias=1.0)
        return
    x, axis = (b.pick(2), -1) if kind == "LayerNormalization" else (b.pick(3), 1)
    scale = b.rng.uniform(0.5, 1.5, x.dim(axis, 64))
    scale[b.dead(len(scale))] *= b.choose([0, 1, 1])
    b.op(kind, x, b.param(scale), b.normal(scale.shape))


# Elementwise operators.

_UNARY = (
    "Relu Relu Relu Sigmoid HardSigmoid Softplus LeakyRelu Elu HardSwish Tanh Exp Neg Abs Sqrt "
    "Clip Clip PRelu PRelu Pow Softsign Erf Selu Log Gelu Mish Dropout Identity"
).split()


def unary(b: Builder, x: Tensor) -> Tensor:
    """A random activation; steep ones behind a squashing one."""
    kind = b.choose(_UNARY)
    match kind:
        case "HardSigmoid":
            return b.op(kind, x, alpha=b.choose([1 / 6, 0.2, 0.3]), beta=b.choose([0.5, 0.4]))
        case "LeakyRelu" | "Elu":
            return b.op(kind, x, alpha=b.choose([0.1, 0.3, 1.2]))
        case "HardSwish" if b.opset < 14:
            return b.op("Mul", x, b.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))
        case "Clip":
            low, high = (b.const(v) if b.chance(0.7) else None for v in (-0.3, b.choose([0.9, 6])))
            return b.op(kind, x, low, high)
        case "PRelu":
            shape = b.choose([(1,), (x.dim(b.axis(x), 64), *[1] * (x.rank - 1 - b.axis(x)))])
            return b.op(kind, x, b.param(b.rng.uniform(-0.2, 0.6, shape)))
        case "Exp":
            return b.op(kind, b.op("Tanh", x) if b.chance(0.5) else b.op("Neg", b.op("Abs", x)))
        case "Pow":
            return b.op(kind, b.op("Tanh", x), b.const(b.choose([2, 3])))
        case "Sqrt" | "Log":
            x = b.op("Abs", x)
            plain = kind == "Sqrt" and b.chance(0.5)
            return b.op(kind, x if plain else b.op("Add", x, b.const(0.3)))
        case "Dropout":
            return b.op(kind, x, b.const(0.3) if b.opset > 11 and b.chance(0.5) else None)
        case _:
            return b.op(kind, x)


def _partner(b: Builder, x: Tensor) -> np.ndarray:
    """A random constant of a shape that broadcasts with x's, sometimes with zeros."""
    axis, ones = b.axis(x), (1,) * x.rank
    channels: tuple[Any] = (x.dims[axis],)
    if channels == (1,) and b.chance(0.3):
        channels = (b.width(),)
    tail = ones[axis + 1 :]
    shapes: list[tuple[Any, ...]] = [(), (1,)]
    shapes += [channels + tail, ones[:axis] + channels + tail] * 3
    shapes += [x.dims[i:] for i in range(x.rank)] + [(1, *x.dims[i:]) for i in range(1, x.rank)]
    if x.rank < 5 and b.chance(0.03):
        shapes = [(1, *ones)]
    shape = b.choose([s for s in shapes if None not in s])
    value = b.rng.normal(0, 1, shape)
    if b.chance(0.3):
        value = value * (b.rng.random(shape) < 0.6)
    if b.coupled and math.prod(shape) == channels[0] and b.chance(0.5):
        value = value * ~b.dead(channels[0], True).reshape(shape)
    return np.asarray(value)


def arithmetic(b: Builder) -> None:
    """An elementwise operator with a constant on either side."""
    x = b.pick()
    kind = b.choose("Add Add Sub Mul Mul Div Min Max Sum Mean".split())
    value, flip = _partner(b, x), b.chance(0.4)
    if kind == "Div" and flip:
        x = b.op("Add", b.op("Abs", x), b.const(0.5))
    elif kind == "Div":
        value = np.where(np.abs(value) < 0.4, 0.7, value)
    const = b.param(value)
    b.op(kind, *((const, x) if flip else (x, const)))


def binary(b: Builder) -> None:
    """An elementwise operator on two live tensors."""
    x = b.pick()
    shapes = [v.shape for v in x.values]

    def fits(t: Tensor) -> bool:
        pairs = [(s, v.shape) for s, v in zip(shapes, t.values, strict=True)]
        ends = (zip(s[::-1], r[::-1], strict=False) for s, r in pairs)
        return t is not x and t.rank <= x.rank and all(j in (1, i) for e in ends for i, j in e)

    b.op(b.choose("Add Add Add Mul Sub Max Min".split()), *b.either(x, b.pick(0, fits)))


def compare(b: Builder) -> None:
    """A comparison with a constant, then Cast or Where."""
    x = b.pick()
    value = _partner(b, x)
    const = b.param(np.where(np.abs(value) < 0.05, 0.37, value))  # not at an activation's zero
    kinds = ["Greater", "Less", "GreaterOrEqual", "LessOrEqual"][: 4 if b.opset > 11 else 2]
    y = b.op(b.choose(kinds), *b.either(x, const, 0.7))
    if b.chance(0.15):
        y = b.op("Not", y)
    if b.chance(0.6):
        b.op("Cast", y, to=b.onnx_type)
    elif b.chance(0.8):
        b.op("Where", y, x, b.param(_partner(b, x)))
    else:
        b.extras.append(y)


def where(b: Builder) -> None:
    """Where with a constant condition."""
    x = b.pick()
    condition = b.const(_partner(b, x) > 0, bool)
    fits = b.chance(0.5)
    other = b.pick(1, lambda t: t.sizes == x.sizes) if fits else b.param(_partner(b, x))
    b.op("Where", condition, *b.either(x, other))


# Blocks.


def residual(b: Builder) -> None:
    """A residual block, also with an inverted bottleneck."""
    x, width = b.image(), b.width()
    y = _same(b, x, width)
    for _ in range(int(b.rng.integers(3))):
        y = batchnorm(b, y) if b.chance(0.5) else unary(b, y)
    if b.chance(0.3):
        y = _same(b, y, width, 3, groups=width)
    y = _same(b, y, x.dim(1))
    y = b.op("Add", *b.either(x, batchnorm(b, y) if b.chance(0.5) else y))
    if b.chance(0.5):
        b.op("Relu", y)


def branches(b: Builder) -> None:
    """Parallel branches joined by Concat."""
    x = b.image()
    n = x.rank - 2
    made = [x] if b.chance(0.3) else []
    if b.chance(0.3):
        kind = b.choose(["MaxPool", "AveragePool"])
        made.append(b.op(kind, x, kernel_shape=[3] * n, pads=[1] * (2 * n)))
    for _ in range(int(b.rng.integers(2 if not made else 1, 3))):
        y = _same(b, x, b.width())
        made.append(unary(b, y) if b.chance(0.4) else y)
    b.op("Concat", *made, axis=1)


def channel_gate(b: Builder) -> None:
    """Squeeze-and-excite."""
    x = b.image()
    y = b.op("Relu", _same(b, global_pool(b, x), b.width(), 1))
    y = b.op(b.choose(["Sigmoid", "HardSigmoid"]), _same(b, y, x.dim(1), 1))
    b.op("Mul", *b.either(x, y))


def spatial_gate(b: Builder) -> None:
    """A one-channel gate over space."""
    x = b.image()
    b.op("Mul", *b.either(x, b.op("Sigmoid", _same(b, x, 1))))


def head(b: Builder) -> None:
    """Global pooling, flatten, Gemm."""
    y = global_pool(b, b.image())
    gemm(b, b.op("Flatten", y) if b.chance(0.5) else b.op("Reshape", y, b.ints([0, -1])))


def attention(b: Builder) -> None:
    """Softmax(x x^T) x: MatMul of two live tensors."""
    x = b.pick(3, lambda t: t.rank == 3)
    scores = b.op("MatMul", x, b.op("Transpose", x, perm=[0, 2, 1]), keep=False)
    scores = b.op("Mul", scores, b.const(0.3), keep=False)
    b.op("MatMul", b.op("Softmax", scores, axis=-1, keep=False), x)


def channels_last(b: Builder) -> None:
    """Something elementwise between Transposes to channels-last and back, then a Conv."""
    x = b.image()
    y = b.op("Transpose", x, perm=[0, *range(2, x.rank), 1])
    y = b.op(b.choose(["Add", "Mul"]), y, b.normal(x.dim(1)))
    y = b.op("Transpose", y, perm=[0, x.rank - 1, *range(1, x.rank - 1)])
    _same(b, y, b.width())


def branch(b: Builder) -> None:
    """If, with a constant or computed condition and bodies that capture an outer tensor."""
    x = b.pick(2)
    condition = b.const(b.chance(0.5), bool)
    if b.chance(0.5):
        mean = _with_axes(b, "ReduceMean", x, list(range(x.rank)), 18, keepdims=0)
        condition = b.op("Greater", mean, b.const(0.0123))
    (then, reads), (other, more) = _body(b, x), _body(b, x)
    b.op("If", condition, captures=reads + more, then_branch=then, else_branch=other)


def _body(b: Builder, x: Tensor) -> tuple[GraphProto, list[Tensor]]:
    """A body that reads x and keeps its shape (perhaps no probe takes it), and its captures."""
    kind = b.choose(["Relu", "Identity", "Mul", "Add", "Conv"])
    if kind == "Conv" and not (3 <= x.rank <= 5 and b.axis(x) == 1):
        raise Skip
    result, reads, inits = b.name(kind), [x.name], []
    captures = [x]
    if kind in ("Mul", "Add", "Conv"):
        channels = x.dim(b.axis(x), 32)
        value = b.rng.normal(0, 1, (channels, *[1] * (x.rank - 1 - b.axis(x))))
        if kind == "Conv":
            value, _ = b.weight(channels, channels, [1] * (x.rank - 2))
        if b.chance(0.5):
            captures.append(b.param(value))
            reads.append(captures[-1].name)
        else:
            reads.append(b.name("inner"))
            inits = [numpy_helper.from_array(value.astype(b.dtype), reads[-1])]
    outputs = [helper.make_tensor_value_info(result, b.onnx_type, None)]
    node = helper.make_node(kind, reads, [result])
    return helper.make_graph([node], "body", [], outputs, inits), captures


# Pooling, reductions and resampling.


def pool(b: Builder) -> None:
    """MaxPool or AveragePool."""
    x = b.image()
    kind = b.choose(["MaxPool", "AveragePool"])
    attrs = _window(b, x.rank - 2, pool=True, dilate=kind == "MaxPool" or b.opset > 18)
    attrs["ceil_mode"] = int(b.chance(0.3))
    if kind == "AveragePool":
        attrs["count_include_pad"] = int(b.chance(0.5))
    b.op(kind, x, **attrs)


def global_pool(b: Builder, x: Tensor) -> Tensor:
    """Global pooling that keeps the rank."""
    kind = b.choose(["GlobalAveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"])
    if kind == "ReduceMean":
        return _with_axes(b, kind, x, list(range(2, x.rank)), 18, keepdims=1)
    return b.op(kind, x)


def reduce(b: Builder) -> None:
    """A reduction, mostly over spatial axes."""
    x = b.pick(2)
    axes = [i for i in range(1, x.rank) if i != b.axis(x) and b.chance(0.7)]
    if not axes or b.chance(0.2):
        axes = [b.axis(x)]
    kind = b.choose("ReduceMean ReduceMean ReduceSum ReduceMax ReduceL2 ReduceMin".split())
    since = 13 if kind == "ReduceSum" else 18
    axes = [b.signed(a, x.rank) for a in axes]
    _with_axes(b, kind, x, axes, since, keepdims=int(b.chance(0.5)))


def _with_axes(b: Builder, kind: str, x: Tensor, axes: list[int], since: int, **a: Any) -> Tensor:
    """An operator whose axes became an input in opset ``since``."""
    if b.opset >= since:
        return b.op(kind, x, b.ints(axes), **a)
    return b.op(kind, x, axes=axes, **a)


def resize(b: Builder) -> None:
    """Resize by scales or to sizes, constant or computed."""
    x = b.image()
    n = x.rank - 2
    coordinates = b.choose(["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
    attrs = {"mode": b.choose(["nearest", "nearest", "linear", "linear", "cubic"])}
    attrs |= {"coordinate_transformation_mode": coordinates}
    if attrs["mode"] == "nearest":
        attrs["nearest_mode"] = b.choose(["floor", "round_prefer_floor", "ceil"])
    lead = 2
    if b.opset >= 18 and b.chance(0.4):
        attrs["axes"], lead = list(range(2, x.rank)), 0
    empty = None if b.opset >= 13 else b.const(np.zeros(0), np.float32)
    if b.chance(0.5):
        scales = [1.0] * lead + [b.choose([0.5, 1.5, 2.0, 2.0]) for _ in range(n)]
        b.op("Resize", x, empty, b.const(scales, np.float32), **attrs)
        return
    sizes = b.many(range(4, 15), n)
    if lead and (x.dims[0] is None or b.chance(0.5)):
        start = _slice(b, b.op("Shape", x), [0], [2], [0])
        target = b.op("Concat", start, b.ints(sizes), axis=0)
    else:
        target = b.ints([*x.dims[:lead], *sizes])
    b.op("Resize", x, empty, empty, target, **attrs)


def pad(b: Builder) -> None:
    """Pad, seldom along the channels or negative."""
    x = b.pick(2)
    mode = b.choose(["constant", "constant", "constant", "reflect", "edge"])
    axes = [i for i in range(1, x.rank) if i != b.axis(x)]
    if not axes or mode == "constant" and b.chance(0.25):
        axes.append(b.axis(x))
    amounts = [-1, 0, 1] if mode == "constant" and b.chance(0.15) else [0, 1, 1, 2]
    pads = np.zeros((2, x.rank), int)
    pads[:, axes] = b.rng.choice(amounts, (2, len(axes)))
    value = b.const(b.choose([0, 0.6, -0.4])) if mode == "constant" and b.chance(0.8) else None
    if b.opset >= 18 and b.chance(0.4):
        b.op("Pad", x, b.ints(pads[:, axes].ravel()), value, b.ints(axes), mode=mode)
    else:
        b.op("Pad", x, b.ints(pads.ravel()), value, mode=mode)


# Operators that move channels.


def reshape(b: Builder) -> None:
    """Reshape that merges or splits axes, to a constant or computed target."""
    x = b.pick(2)
    groups: list[Any] = [[i] for i in range(x.rank)]  # source axes, or a size
    if b.chance(0.5):
        start = int(b.rng.integers(1, x.rank))
        stop = x.rank if b.chance(0.5) else min(start + 2, x.rank)
        groups[start:stop] = [list(range(start, stop))]
    else:
        axis = b.axis(x, 0.7)
        factor = _groups(b, x.dim(axis))
        groups[axis : axis + 1] = [factor, x.dim(axis) // factor]
    shape = b.op("Shape", x) if b.chance(0.3) else None
    target = [_target(b, x, group, i, shape) for i, group in enumerate(groups)]
    if target.count(-1) > 1:
        raise Skip
    if shape is None:
        b.op("Reshape", x, b.ints(target))
    else:
        pieces = [t if isinstance(t, Tensor) else b.ints([t]) for t in target]
        b.op("Reshape", x, b.op("Concat", *pieces, axis=0))


def _target(b: Builder, x: Tensor, group: Any, position: int, shape: Tensor | None) -> Any:
    """One entry of a Reshape's target: a number, or a piece of the computed shape."""
    axes = group if isinstance(group, list) else []
    sizes = [x.dims[i] for i in axes] if axes else [group]
    special = None in sizes or b.chance(0.3)
    if special and shape and len(axes) == 1:
        if b.chance(0.5):
            return _slice(b, shape, axes, [axes[0] + 1], [0])
        return _with_axes(b, "Unsqueeze", b.op("Gather", shape, b.ints(axes[0])), [0], 13)
    if special and axes == [position]:
        return 0
    return -1 if None in sizes else math.prod(sizes)


def shuffle(b: Builder) -> None:
    """Channel shuffle: Reshape, Transpose, Reshape."""
    x = b.image()
    groups = _groups(b, x.dim(1))
    static = None not in x.dims and b.chance(0.7)
    space = x.dims[2:] if static else [-1]
    y = b.op("Reshape", x, b.ints([0, groups, x.dim(1) // groups, *space]), keep=False)
    y = b.op("Transpose", y, perm=[0, 2, 1, *range(3, y.rank)], keep=False)
    b.op("Reshape", y, b.ints([-1, *x.dims[1:]]) if static else b.op("Shape", x))


def transpose(b: Builder) -> None:
    """Transpose, mostly between channels-first and channels-last."""
    x = b.pick(2)
    n = x.rank
    first, last = [0, *range(2, n), 1], [0, n - 1, *range(1, n - 1)]
    b.op("Transpose", x, perm=b.choose([first, last, [int(i) for i in b.rng.permutation(n)]]))


def squeeze(b: Builder) -> None:
    """Squeeze axes of size one."""
    x = b.pick(2, lambda t: 1 in t.dims)
    axes = [b.signed(i, x.rank) for i, d in enumerate(x.dims) if d == 1 and b.chance(0.8)]
    if not axes:
        raise Skip
    if None not in x.dims and b.chance(0.15):
        b.op("Squeeze", x)
    else:
        _with_axes(b, "Squeeze", x, axes, 13)


def unsqueeze(b: Builder) -> None:
    """Unsqueeze one or two axes."""
    x = b.pick(1, lambda t: t.rank < 5)
    rank = x.rank + (2 if x.rank < 4 and b.chance(0.4) else 1)
    axes = sorted(int(a) for a in b.rng.choice(rank, rank - x.rank, replace=False))
    _with_axes(b, "Unsqueeze", x, [b.signed(a, rank) for a in axes], 13)


def concat(b: Builder) -> None:
    """Concat, mostly along the channels, seldom with a constant."""
    x = b.pick(2)
    axis = b.axis(x, 0.75)

    def fits(t: Tensor) -> bool:
        rest = range(axis), range(axis + 1, x.rank)
        return t.rank == x.rank and all(t.sizes[i] == x.sizes[i] for r in rest for i in r)

    parts = [x, *(b.pick(2, fits) for _ in range(int(b.rng.integers(1, 3))))]
    if None not in x.dims and b.chance(0.2):
        parts[-1] = b.normal(x.dims)
    order = b.rng.permutation(len(parts))
    b.op("Concat", *(parts[i] for i in order), axis=b.signed(axis, x.rank))


def split(b: Builder) -> None:
    """Split in this opset's forms; the outputs may stay unused."""
    x = b.pick(2)
    axis = b.axis(x, 0.75)
    size, parts = x.dim(axis, 64), int(b.rng.integers(2, 5))
    if parts > size:
        raise Skip
    by_count = (parts - 1) * -(-size // parts) < size if b.opset >= 18 else size % parts == 0
    cuts = np.sort(b.rng.choice(np.arange(1, size), parts - 1, replace=False))
    sizes = [int(s) for s in np.diff([0, *cuts, size])]
    attrs: dict[str, Any] = {"axis": b.signed(axis, x.rank)}
    by_count = by_count and b.chance(0.5)
    if by_count and b.opset >= 18:
        attrs["num_outputs"] = parts
    elif not by_count and b.opset < 13:
        attrs["split"] = sizes
    b.ops(parts, "Split", x, None if by_count or b.opset < 13 else b.ints(sizes), **attrs)


def slice_(b: Builder) -> None:
    """Slice one or two axes, with negative indices and steps."""
    x = b.pick(2)
    axes = {b.axis(x, 0.6) for _ in range(2)}
    bounds = [_bounds(b, x.dims[a]) for a in axes]
    starts, ends, steps = (list(v) for v in zip(*bounds, strict=True))
    _slice(b, x, starts, ends, [b.signed(a, x.rank) for a in axes], steps)


def _bounds(b: Builder, size: int | None) -> tuple[int, int, int]:
    """Start, end and step for an axis."""
    if size is None or size < 2:
        whole = (0, _LAST, 1), (-1, -_LAST, -1)
        return b.choose(whole if size else [(1, _LAST, 2), (0, -1, 1), (-3, _LAST, 1), *whole])
    start = int(b.rng.integers(size // 2 + 1))
    end = int(b.rng.integers(start + 1, size + 1))
    step = b.choose([1, 1, 1, 2])
    if b.chance(0.2):
        return end - 1, start - size - 1, -step
    ends = [end, end, _LAST if end == size else end - size]
    return b.choose([start, start - size]), b.choose(ends), step


def _slice(b: Builder, x: Tensor, *ranges: list[int]) -> Tensor:
    """Slice with starts, ends, axes and steps; steps of one are mostly left out."""
    if set(ranges[-1]) == {1} and len(ranges) == 4 and b.chance(0.7):
        ranges = ranges[:3]
    return b.op("Slice", x, *map(b.ints, ranges))


def gather(b: Builder) -> None:
    """Gather with constant indices: permuted, repeated, a scalar or a matrix."""
    x = b.pick(2)
    axis = b.axis(x, 0.75)
    size = x.dim(axis, 64)
    repeats = b.rng.integers(size, size=int(b.rng.integers(1, size + 3)))
    kinds = [b.rng.permutation(size), repeats] * 3
    kinds += [b.rng.integers(size, size=shape) for shape in ((), (2, 2))]
    indices = np.asarray(b.choose(kinds)) - size * b.chance(0.2)
    dtype = np.int32 if b.chance(0.2) else np.int64
    b.op("Gather", x, b.const(indices, dtype), axis=b.signed(axis, x.rank))


def expand(b: Builder) -> None:
    """Expand axes of size one, to a constant shape or another tensor's."""
    x = b.pick(1, lambda t: 1 in t.dims)
    if b.chance(0.3):
        b.op("Expand", x, b.op("Shape", b.pick(x.rank, lambda t: t.rank == x.rank and t is not x)))
    else:
        shape = [int(b.rng.integers(1, 7)) if d == 1 else 1 for d in x.dims]
        b.op("Expand", x, b.ints([1, *shape] if x.rank < 5 and b.chance(0.1) else shape))


def tile(b: Builder) -> None:
    """Tile one axis."""
    x = b.pick(2)
    repeats = [1] * x.rank
    repeats[b.axis(x, 0.6)] = b.choose([2, 3])
    b.op("Tile", x, b.ints(repeats))


def depth_to_space(b: Builder) -> None:
    """DepthToSpace, behind a convolution that makes enough channels if need be."""
    x = b.image(4)
    x = _same(b, x, 4 * b.choose([1, 2, 3])) if x.dim(1) % 4 else x
    b.op("DepthToSpace", x, blocksize=2, mode=b.choose(["DCR", "CRD"]))


def space_to_depth(b: Builder) -> None:
    """SpaceToDepth, of even static sizes."""
    x = b.pick(4, lambda t: t.rank == 4 and all(d and d % 2 == 0 for d in t.dims[2:]))
    b.op("SpaceToDepth", x, blocksize=2)


def opaque(b: Builder) -> None:
    """Softmax, LogSoftmax or ArgMax over the channels."""
    x = b.pick(2)
    kind = b.choose(["Softmax", "Softmax", "LogSoftmax", "ArgMax", "ArgMax"])
    y = b.op(kind, x, axis=b.axis(x), **({"keepdims": 0} if kind == "ArgMax" else {}))
    if kind == "ArgMax" and b.chance(0.6):
        b.op("Cast", y, to=b.onnx_type)
    elif kind == "ArgMax":
        b.extras.append(y)


# Weights in image models and in MLP-like ones.
_GROWERS: tuple[tuple[float, float, Callable[[Builder], Any]], ...] = (
    (9, 1, conv),
    (1.5, 0.2, conv_transpose),
    (1.5, 7, gemm),
    (1, 6, matmul),
    (3, 1, lambda b: batchnorm(b, b.pick(2))),
    (0.8, 0.8, normalize),
    (4.5, 4, lambda b: unary(b, b.pick())),
    (4, 4, arithmetic),
    (3, 3, binary),
    (0.8, 0.8, compare),
    (0.8, 0.8, where),
    (1.5, 0.3, residual),
    (1, 0.2, branches),
    (1, 0.2, channel_gate),
    (0.6, 0.1, spatial_gate),
    (0.6, 0.2, head),
    (0.1, 0.8, attention),
    (0.5, 0, channels_last),
    (0.7, 0.7, branch),
    (2, 0.2, pool),
    (0.6, 0.1, lambda b: global_pool(b, b.image())),
    (1, 1, reduce),
    (1, 0.1, resize),
    (1.2, 0.6, pad),
    (2, 2, reshape),
    (0.8, 0.8, lambda b: b.op("Flatten", b.pick(2), axis=b.choose([1, 1, 1, 1, 0, 2, -1]))),
    (1, 0.2, shuffle),
    (1, 1, transpose),
    (0.8, 0.8, squeeze),
    (0.8, 0.8, unsqueeze),
    (3, 3, concat),
    (2, 2, split),
    (2, 2, slice_),
    (1.5, 1.5, gather),
    (0.7, 0.7, expand),
    (0.6, 0.6, tile),
    (0.8, 0.1, depth_to_space),
    (1, 0.1, space_to_depth),
    (0.9, 0.9, opaque),
)


# Putting the model together.


def _add_inputs(b: Builder) -> None:
    """One or two graph inputs of this family."""
    axes = _FREE_AXES[b.family]
    channels = b.width() if b.chance(0.5) else 3
    sizes = [4, 5, 6] if b.family == "3d" else [6, 7, 8, 8, 9, 10]
    fixed = [b.choose([1, 1, 2, 3]), *b.many(sizes, len(axes) - 1)]
    free = [b.dynamic and b.chance(0.6) for _ in axes]
    free[0] |= b.dynamic and not any(free)
    dims = [a if f else d for a, f, d in zip(axes, free, fixed, strict=True)]
    last = b.family in ("nhwc", "sequence", "mlp")
    shape = [*dims, channels] if last else [dims[0], channels, *dims[1:]]
    if b.chance(0.2):
        vector = [dims[0], b.width()]
        b.add_input(b.choose([shape, vector, vector + [1] * (len(shape) - 2)]))
    x = b.add_input(shape)
    if b.family == "nhwc":
        b.attempt(lambda b: b.op("Transpose", x, perm=[0, 3, 1, 2]))


def _reads(node: NodeProto) -> Iterator[str]:
    """The names a node reads, also from within its bodies."""
    yield from (n for n in node.input if n)
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            local = {i.name for i in attribute.g.initializer}
            for inner in attribute.g.node:
                yield from (n for n in _reads(inner) if n not in local)


def _live(nodes: Sequence[NodeProto], names: Sequence[str]) -> list[NodeProto]:
    """The nodes that these tensors depend on."""
    needed, live = set(names), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(_reads(node))
            live.append(node)
    return live[::-1]


def ancestors(graph: GraphProto, name: str) -> set[str]:
    """The tensors that this one depends on."""
    return {n for node in _live(graph.node, [name]) for n in _reads(node)}


def _shuffled(nodes: Sequence[NodeProto], rng: np.random.Generator) -> list[NodeProto]:
    """The nodes in a random topological order."""
    pending, order = list(nodes), []
    while pending:
        missing = {o for n in pending for o in n.output}
        ready = [i for i, n in enumerate(pending) if missing.isdisjoint(_reads(n))]
        order.append(pending.pop(int(rng.choice(ready))))
    return order


def _outputs(b: Builder) -> list[Tensor]:
    """One to three outputs: the deepest tensor, others nobody reads, seldom one in between."""
    inputs = {i.name for i in b.inputs}
    made = [t for t in b.pool if t.name not in inputs]
    ends = [t for t in made if t.name not in b.used] or made[-1:]
    ends.sort(key=lambda t: len(_live(b.nodes, [t.name])))
    others = ends[:-1] + b.extras + (made if b.chance(0.3) else [])
    if b.chance(0.03):
        inits = {i.name for i in b.inits} - inputs
        others = [p for p in b.params if p.name in inits] or others
    count = min(int(b.rng.integers(3)), len(others))
    chosen = [others[int(i)] for i in b.rng.choice(len(others), count, replace=False)]
    return list({t.name: t for t in [ends[-1], *chosen, *b.wanted]}.values())


def _finish(b: Builder) -> ModelProto:
    """Choose outputs, drop most of the dead nodes, order the nodes."""
    outputs = _outputs(b)
    live = _live(b.nodes, [t.name for t in outputs])
    nodes = live if len(live) >= 3 and b.chance(0.75) else b.nodes
    if b.chance(0.4):
        nodes = _shuffled(nodes, b.rng)
    reads = {n for node in nodes for n in _reads(node)} | {t.name for t in outputs}
    inits = [i for i in b.inits if i.name in reads]
    unread = {i.name for i in b.inits} - reads
    results = []
    for tensor in outputs:
        dims = zip(tensor.sizes, tensor.dims, strict=True)
        kind = helper.np_dtype_to_tensor_dtype(tensor.values[0].dtype)
        shape = [None if tensor in b.wanted else b.symbols.get(s) or d for s, d in dims]
        results.append(helper.make_tensor_value_info(tensor.name, kind, shape))
    inputs = [i for i in b.inputs if i.name not in unread]
    model = _model(helper.make_graph(nodes, "graph", inputs, results, inits), b.opset)
    if b.overflows:
        model.doc_string = OVERFLOWS
    if b.twisted and b.twist_rng.random() < 0.5:
        _note_shapes(b, model)
        return model
    return onnx.shape_inference.infer_shapes(model) if b.chance(0.3) else model


def _note_shapes(b: Builder, model: ModelProto) -> None:
    """Write the shapes of all tensors, or only some, into the model: more than onnx could infer."""
    done = {o for n in model.graph.node for o in n.output} - {o.name for o in model.graph.output}
    share = b.twist_rng.choice([0.3, 1.0])
    for tensor in b.made:
        if tensor.name in done and b.twist_rng.random() < share:
            kind = helper.np_dtype_to_tensor_dtype(tensor.values[0].dtype)
            dims = [b.symbols.get(s) or d for s, d in zip(tensor.sizes, tensor.dims, strict=True)]
            info = helper.make_tensor_value_info(tensor.name, kind, dims)
            model.graph.value_info.append(info)


def _twist(b: Builder) -> None:
    """Add what is rare in random graphs, with a random source of its own."""
    from random_twists import TWISTS  # which imports this module

    b.rng, plain = b.twist_rng, b.rng
    length = len(b.nodes)
    for _ in range(30):
        b.attempt(b.choose(TWISTS))
        if len(b.nodes) > length and b.chance(0.5):
            break
    b.rng = plain


def _grown(b: Builder) -> Builder:
    """Grow the graph to its size."""
    _add_inputs(b)
    column = 1 if b.family in ("mlp", "sequence") else 0
    weights = np.array([g[column] for g in _GROWERS], float)
    weights /= weights.sum()
    target = int(b.rng.integers(3, 23))
    for _ in range(400):
        b.attempt(_GROWERS[int(b.rng.choice(len(_GROWERS), p=weights))][2])
        if len(b.nodes) >= target:
            break
    if b.twisted:
        _twist(b)
    return b


def random_model(seed: int) -> ModelProto:
    """A small valid model, the same for the same seed.

    Comparisons, ArgMax and computed conditions are discontinuous: in rare cases rounding alone
    changes what they give.
    """
    builders = (_grown(Builder(seed, attempt)) for attempt in range(100))
    models = ((b, _finish(b)) for b in builders)
    return next(model for b, model in models if _valid(b, model))


def random_feeds(
    model: ModelProto, seed: int, sizes: dict[str, int] | None = None, scale: float = 1.0
) -> dict[str, np.ndarray]:
    """Inputs for a model: the free dimensions by name, or drawn from 1..3 (batch) and 7..12.

    Initializers that are also graph inputs are overridden for half of the seeds; the doc string of
    an input may list its values.  Much larger sizes
    mostly work too, but a dimension that was 1 for all probes may no longer be.
    """
    rng = np.random.default_rng(seed)
    free = dict(sizes or {})
    defaults = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    override = rng.random() < 0.5
    feeds = {}
    for info in model.graph.input:
        dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        shape = []
        for dim in info.type.tensor_type.shape.dim:
            drawn = int(rng.integers(1, 4) if dim.dim_param == "batch" else rng.integers(7, 13))
            shape.append(free.setdefault(dim.dim_param, drawn) if dim.dim_param else dim.dim_value)
        if info.doc_string:
            choices = json.loads(info.doc_string)
            if info.name not in defaults or override:
                feeds[info.name] = np.asarray(choices[int(rng.integers(len(choices)))], dtype)
        elif info.name not in defaults and dtype.kind in "iu":
            feeds[info.name] = rng.integers(-8, 9, shape).astype(dtype)
        elif info.name not in defaults:
            feeds[info.name] = (scale * rng.normal(size=shape)).astype(dtype)
        elif override:
            default = defaults[info.name]
            noise = rng.normal(0, 0.3, shape) * (default == 0)
            value = default * rng.uniform(0.5, 1.5, shape) + noise
            feeds[info.name] = np.asarray(value, dtype)
    return feeds
