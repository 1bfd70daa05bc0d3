"""What is rare in random graphs, and where a simplifier can be wrong without noticing.

Operands that a caller may set, or that are computed from data; integers that wrap around; masks on
what may overflow; rows that a threshold selects; tiny outputs; weights that are computed or may be
replaced; tensors that are outputs besides; sizes taken from the input.  Like other growers these
append to a graph or raise Skip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from random_graphs import Builder, Skip, Tensor

Values = Sequence[Any]


def _operand(b: Builder, choices: Values, dtype: Any = np.int64) -> Tensor:
    """An operand with the first of these values that a caller may set, or that data decide."""
    values = [np.asarray(c, dtype) for c in choices]
    way = b.choose(["default", "default", "required", "computed"])
    if way != "computed":
        return b.open_operand(values[0], values, way == "required")
    axes = list(range(b.fed[0].rank))
    source = b.fed[0]
    if source.values[0].dtype != b.dtype:
        raise Skip
    most = b.op("ReduceMax", source, keepdims=0, keep=False, **_axes_attribute(b, axes))
    threshold = float(b.rng.uniform(1.5, 3.5))
    index = b.op("Cast", b.op("Greater", most, b.const(threshold)), to=TensorProto.INT64)
    return b.op("Gather", b.const(np.stack(values[:2]), dtype), index, axis=0, keep=False)


def _axes_attribute(b: Builder, axes: list[int]) -> dict[str, Any]:
    """All axes, where they are an attribute; later operator sets take all if none are given."""
    return {"axes": axes} if b.opset < 18 else {}


def _layer(b: Builder, out: int | None = None, *ranks: int) -> Tensor:
    """A convolution of 1 or 3 with pruned channels and live biases, at least two of them."""
    x = b.image(*ranks)
    out = out or max(2, b.width())
    weight, mask = b.weight(out, x.dim(1, 64), [size := b.choose([1, 3])] * (x.rank - 2))
    bias = b.param(b.bias(mask))
    attrs = {"kernel_shape": [size] * (x.rank - 2), "pads": [size // 2] * (2 * x.rank - 4)}
    y = b.op("Conv", x, b.param(weight), bias, **attrs)
    return b.op("Relu", y) if b.chance(0.4) else y


def _reader(b: Builder, x: Tensor) -> Tensor:
    """A convolution that reads x's channels."""
    weight, mask = b.weight(b.width(), x.dim(1, 64), [1] * (x.rank - 2))
    return b.op("Conv", x, b.param(weight), b.param(b.bias(mask)))


def _float(b: Builder, x: Tensor) -> Tensor:
    return b.ops(1, "Cast", x, loose=True, to=b.onnx_type)[0]


# Operands that a caller may set, or that are computed.


def sliced_shape(b: Builder) -> None:
    """A part of a shape."""
    x = b.pick(2)
    n = x.rank
    if b.chance(0.3):
        usual: dict[str, Values] = {"starts": [[n - 1]], "ends": [[-n - 1]], "axes": [[0]]}
        usual["steps"] = [[-1], [-2]]
    else:
        usual = {"starts": [[0], [1], [-1]], "ends": [[n], [n - 1], [-1]], "axes": [[0], [-1]]}
        usual["steps"] = [[1], [2], [3]]
    chosen = b.choose([k for k, v in usual.items() if len(v) > 1])
    operands = [_operand(b, v) if k == chosen else b.ints(v[0]) for k, v in usual.items()]
    y = b.ops(1, "Slice", b.op("Shape", x), *operands, loose=True)[0]
    b.wanted.append(_float(b, y))


def sliced(b: Builder) -> None:
    """A part of the channels, or of another axis."""
    y = _layer(b)
    count = y.dim(1)
    usual: dict[str, Values] = {"starts": [[0], [1], [-2]], "ends": [[count], [count - 1], [-1]]}
    usual |= {"axes": [[1], [2], [-1]], "steps": [[1], [2]]}
    chosen = b.choose(list(usual))
    operands = [_operand(b, v) if k == chosen else b.ints(v[0]) for k, v in usual.items()]
    b.wanted += b.ops(1, "Slice", y, *operands, loose=True)


def cropped(b: Builder) -> None:
    """A region of a map, with a value of its own outside."""
    y = _layer(b, None, 4)
    boxes = ((0, 0, 1, 1), (0.2, 0.2, 0.9, 0.9), (-0.5, 0.1, 1.5, 0.8), (2, 2, 3, 3))
    regions = [[0, 0, *box[:2], 1, 1, *box[2:]] for box in boxes]
    order = b.rng.permutation(len(regions))
    roi = _operand(b, [regions[i] for i in order], np.float32)
    start = b.op("Slice", b.op("Shape", y), b.ints([0]), b.ints([2]))
    sizes = b.op("Concat", start, b.ints(b.many(range(3, 8), 2)), axis=0)
    empty = None if b.opset >= 13 else b.const(np.zeros(0), np.float32)
    y = b.op(
        "Resize",
        y,
        roi,
        empty,
        sizes,
        mode=b.choose(["linear", "nearest"]),
        extrapolation_value=b.choose([0.0, 7.0]),
        coordinate_transformation_mode="tf_crop_and_resize",
    )
    _reader(b, y)


def resized(b: Builder) -> None:
    """Resize by scales or to sizes."""
    y = _layer(b)
    n = y.rank - 2
    mode, empty = b.choose(["nearest", "linear"]), None
    if b.opset < 13:
        empty = b.const(np.zeros(0), np.float32)
    if b.chance(0.5) or None in y.dims:
        scales = _operand(b, [[1, 1, *[f] * n] for f in (2, 1, 1.5)], np.float32)
        b.wanted += b.ops(1, "Resize", y, empty, scales, loose=True, mode=mode)
    else:
        sizes = _operand(b, [[*y.dims[:2], *[s] * n] for s in (8, 5)])
        b.wanted += b.ops(1, "Resize", y, empty, empty, sizes, loose=True, mode=mode)


def padded(b: Builder) -> None:
    """Pad by amounts, or with a value."""
    y = _layer(b)
    mode = b.choose(["constant", "constant", "edge", "reflect"])
    pads = np.zeros((3, 2, y.rank), int)
    pads[0, :, 2:] = pads[1, :, 3:] = 1
    pads[2, :, -1] = -1
    if mode == "constant" and b.chance(0.3):
        pads[1, :, 1] = 1
    if mode == "constant" and b.chance(0.5):
        value = _operand(b, [b.choose([0, 0.5]), 1.5, -2], b.dtype)
        _reader(b, b.op("Pad", y, b.ints(pads[0].ravel()), value))
    else:
        amounts = _operand(b, [p.ravel() for p in pads])
        b.wanted += b.ops(1, "Pad", y, amounts, mode=mode, loose=True)


def clipped(b: Builder) -> None:
    """Bounds of Clip."""
    y = _layer(b)
    bounds: list[Tensor | None] = [b.const(-0.3), b.const(0.9)]
    if b.chance(0.3):
        bounds[0] = None
    which = int(b.rng.integers(2))
    choices = ([-0.2, -1.5, 0.1], [0.4, 6, 0.2])[which]
    bounds[which] = _operand(b, choices, b.dtype)
    _reader(b, b.op("Clip", y, *bounds))


def top(b: Builder) -> None:
    """The number of values that TopK takes, and both of its outputs."""
    y = _layer(b)
    axis = b.choose([1, -1])
    b.wanted += b.ops(2, "TopK", y, _operand(b, [[2], [1]]), axis=axis, loose=True)


def axes(b: Builder) -> None:
    """Axes of Unsqueeze, Squeeze and reductions, where these are an operand."""
    if b.opset < 13:
        raise Skip
    y = _layer(b)
    kind = b.choose(["Unsqueeze", "Squeeze", "ReduceSum", "ReduceMean"])
    if kind == "ReduceMean" and b.opset < 18:
        raise Skip
    choices: Values = [[1], [2]]
    if kind == "Unsqueeze":
        choices = [[1], [0], [-1]]
    elif kind == "Squeeze":
        y = b.op("Unsqueeze", y, b.ints([0, 3]), keep=False)
        choices = [[0], [3]]
    b.wanted += b.ops(1, kind, y, _operand(b, choices), loose=True)


def split_sizes(b: Builder) -> None:
    """Sizes of Split."""
    if b.opset < 13:
        raise Skip
    y = _layer(b, b.choose([3, 4, 6, 8]))
    count = y.dim(1)
    choices = [[count - 1, 1], [1, count - 1], [count // 2, count - count // 2]]
    b.wanted += b.ops(2, "Split", y, _operand(b, choices), axis=1, loose=True)


def gathered(b: Builder) -> None:
    """Indices of Gather."""
    y = _layer(b)
    count = y.dim(1)
    choices = [b.rng.integers(-count, count, count) for _ in range(3)]
    _reader(b, b.op("Gather", y, _operand(b, choices), axis=1))


def dropped(b: Builder) -> None:
    """Dropout with an open ratio or mode, and a mask that is read or an output."""
    y = _layer(b)
    operands: list[Tensor | None] = []
    if b.opset > 11 and b.chance(0.7):
        operands.append(_operand(b, [0.3, 0.6, 0.0], np.float32))
        if b.chance(0.4):
            operands.append(b.open_operand(np.array(False), [False], b.chance(0.5)))
    way = b.choose(["unread", "read", "output"])
    z, mask = b.ops(2, "Dropout", y, *operands, keep=False)
    if way == "read":
        z = b.op("Where", mask, z, b.const(0))
    if way == "output":
        b.wanted.append(mask)
    _reader(b, z)


def tiled(b: Builder) -> None:
    """Repeats of Tile."""
    y = _layer(b)
    ones = [1] * (y.rank - 2)
    b.wanted += b.ops(1, "Tile", y, _operand(b, [[1, 2, *ones], [1, 1, *ones]]), loose=True)


def viewed(b: Builder) -> None:
    """Target of Reshape."""
    y = _layer(b)
    rest = [1] * (y.rank - 3)
    choices = [[0, *rest, -1, y.dim(1)], [0, y.dim(1), *rest, -1], [-1, *rest, y.dim(1), 1]]
    b.wanted += b.ops(1, "Reshape", y, _operand(b, choices), loose=True)


# Integers.


def integers(b: Builder) -> None:
    """Integer products with constants that no float can hold, or that wrap around."""
    dtype = b.choose([np.int64, np.int64, np.int32])
    size, width = int(b.rng.integers(2, 9)), int(b.rng.integers(3, 12))
    name, count = b.name("integers"), b.choose([1, 2, 3])
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    b.inputs.append(helper.make_tensor_value_info(name, kind, [count, size]))
    value = b.rng.integers(-8, 9, (count, size)).astype(dtype)
    y = Tensor(name, (value,) * len(b.probes))
    b.fed.append(y)
    exponents = [30, 31, 40, 53, 62] if dtype == np.int64 else [15, 24, 29, 30]

    def large(shape: Any) -> np.ndarray:
        sizes = 2 ** b.rng.choice(exponents, shape) + b.rng.integers(-3, 4, shape)
        return np.where(b.rng.random(shape) < 0.5, sizes, b.rng.integers(-3, 4, shape))

    for _ in range(int(b.rng.integers(2, 4))):
        weight = b.rng.integers(-3, 4, (size, width))
        if b.chance(0.4):
            weight = large((size, width))
        dead = b.dead(width)
        weight[:, dead] = 0
        y = b.op("MatMul", y, b.const(weight, dtype))
        if b.chance(0.8):
            bias = b.rng.integers(-3, 4, width)
            bias[dead] = large(int(dead.sum()))
            y = b.op(b.choose(["Add", "Add", "Sub"]), y, b.const(bias, dtype))
        if b.chance(0.4):
            factors = large(width) * (b.rng.random(width) < 0.7)
            y = b.op("Mul", y, b.const(factors, dtype))
        size, width = width, int(b.rng.integers(3, 12))
    b.wanted.append(y)


# Values that are infinite or not a number for inputs that were not tried.


def masked_overflow(b: Builder) -> None:
    """A mask of zeros on what is finite for usual inputs only."""
    y = _layer(b)
    kind = b.choose(["Exp", "Sqrt", "Log", "Exp"])
    if kind != "Exp":
        y = b.op("Add", y, b.const(12))
    y = b.op(kind, y)
    mask = ~b.dead(y.dim(1))
    y = b.op("Mul", *b.either(y, b.const(mask.reshape(-1, *[1] * (y.rank - 2)))))
    _reader(b, y)
    b.overflows = True


# Rows that are selected.


def detector(b: Builder) -> None:
    """Boxes with scores above a threshold that is reached always, seldom or never."""
    x = _layer(b, None, 4)
    bias = b.choose([0.0, -3.0, -40.0])
    weight, _ = b.weight(1, x.dim(1), [1, 1])
    logits = b.op("Conv", x, b.param(weight), b.param([bias]), keep=False)
    scores = b.op("Sigmoid", logits, keep=False)
    weight, mask = b.weight(4, x.dim(1), [1, 1])
    boxes = b.op("Conv", x, b.param(weight), b.param(b.bias(mask)), keep=False)
    boxes = b.op("Transpose", boxes, perm=[0, 2, 3, 1], keep=False)
    pick = b.choose(["gather", "compress", "gathernd", "topk", "nms"])
    if pick == "nms":
        if x.dims[0] != 1:
            raise Skip
        boxes = b.op("Reshape", boxes, b.ints([1, -1, 4]), keep=False)
        scores = b.op("Reshape", scores, b.ints([1, 1, -1]), keep=False)
        limits = b.ints([5]), b.const([0.5], np.float32), b.const([0.4], np.float32)
        chosen = b.ops(1, "NonMaxSuppression", boxes, scores, *limits, loose=True)[0]
        rows = b.ops(1, "Gather", chosen, b.ints(2), axis=1, loose=True)[0]
        b.wanted += [chosen, *b.ops(1, "Gather", boxes, rows, axis=1, loose=True)]
        return
    boxes = b.op("Reshape", boxes, b.ints([-1, 4]), keep=False)
    scores = b.op("Reshape", scores, b.ints([-1]), keep=False)
    if pick == "topk":
        values, rows = b.ops(2, "TopK", scores, b.ints([3]), axis=0, keep=False)
        b.wanted += [values, *b.ops(1, "Gather", boxes, rows, axis=0, loose=True)]
        return
    good = b.op("Greater", scores, b.const(0.5), keep=False)
    if pick == "compress":
        b.wanted += [b.ops(1, "Compress", t, good, axis=0, loose=True)[0] for t in (boxes, scores)]
        return
    rows = b.ops(1, "NonZero", good, loose=True)[0]
    if pick == "gather":
        rows = b.ops(1, "Reshape", rows, b.ints([-1]), loose=True)[0]
        found = [b.ops(1, "Gather", t, rows, axis=0, loose=True)[0] for t in (boxes, scores)]
    else:
        rows = b.ops(1, "Transpose", rows, perm=[1, 0], loose=True)[0]
        found = [b.ops(1, "GatherND", t, rows, loose=True)[0] for t in (boxes, scores)]
    b.wanted += found


# Outputs of which only few bits are left.


def tiny(b: Builder) -> None:
    """Probabilities of rare classes."""
    x = _layer(b)
    bias = b.choose([-9.0, -12.5, -14.5])
    kind = b.choose(["sigmoid", "softmax", "difference"])
    count = max(2, b.width())
    weight = b.weight(count, x.dim(1), [1] * (x.rank - 2))[0] * 0.3
    biases = np.full(count, bias)
    biases[0] = 0 if kind == "softmax" else bias
    y = b.op("Conv", x, b.param(weight), b.param(biases), keep=False)
    if kind == "softmax":
        y = b.op("Softmax", y, axis=1)
    elif kind == "sigmoid":
        y = b.op("Sigmoid", y)
    else:
        y = b.op("Sub", b.const(1), b.op("Sigmoid", b.op("Neg", y, keep=False), keep=False))
    b.wanted.append(y)


# Weights.


def computed_weight(b: Builder) -> None:
    """A convolution with a weight that the graph computes from initializers."""
    x = b.image()
    n = x.rank - 2
    out = max(2, b.width())
    size = b.choose([1, 3])
    weight, mask = b.weight(out, x.dim(1), [size] * n)
    column = (out, *[1] * (n + 1))
    rest = list(range(1, n + 2))
    kind = b.choose(["standardised", "norm", "mask", "where", "transposed", "pieces"])
    if kind in ("mask", "where"):
        weight = b.rng.normal(0, 0.5, weight.shape)
    w = b.param(weight)

    def reduced(kind: str, t: Tensor) -> Tensor:
        if b.opset >= 18:
            return b.op(kind, t, b.ints(rest), keepdims=1, keep=False)
        return b.op(kind, t, axes=rest, keepdims=1, keep=False)

    def step(kind: str, *operands: Tensor, **attrs: Any) -> Tensor:
        return b.op(kind, *operands, keep=False, **attrs)

    if kind == "standardised":
        w = step("Sub", w, reduced("ReduceMean", w))
        spread = step("Add", reduced("ReduceMean", step("Mul", w, w)), b.const(1e-5))
        w = step("Div", w, step("Sqrt", spread))
    elif kind == "norm":
        length = step("Add", reduced("ReduceL2", w), b.const(1e-5))
        w = step("Mul", step("Div", w, length), b.param(b.rng.uniform(0.5, 1.5, column)))
    elif kind == "mask":
        keep = b.const(~b.dead(out).reshape(column), bool)
        w = step("Mul", w, step("Cast", keep, to=b.onnx_type))
    elif kind == "where":
        w = step("Where", b.const(b.dead(out).reshape(column), bool), b.const(0), w)
    elif kind == "transposed":
        w = step("Transpose", w, perm=[1, 0, *range(2, n + 2)])
        w = step("Transpose", w, perm=[1, 0, *range(2, n + 2)])
    else:
        w = step("Concat", w, b.normal((2, *weight.shape[1:])), axis=0)
        mask = np.append(mask, [False, False])
    y = b.op("Conv", x, w, b.param(b.bias(mask)), pads=[size // 2] * (2 * n))
    _reader(b, b.op("Relu", y))


def open_weight(b: Builder) -> None:
    """Layers some of whose weights and biases a caller may replace."""
    y = _layer(b)
    for _ in range(int(b.rng.integers(1, 3))):
        weight, mask = b.weight(b.width(), y.dim(1, 64), [1] * (y.rank - 2))
        made = [_replaceable(b, v) for v in (weight, b.bias(mask))]
        y = b.op("Conv", y, *made)
    if b.chance(0.5):
        _reader(b, b.op("Relu", y))


def _replaceable(b: Builder, array: Any) -> Tensor:
    """A weight that mostly is an input as well."""
    if b.chance(0.25):
        return b.param(array)
    value = np.asarray(array, b.dtype)
    name = b.name("weight")
    b.inits.append(numpy_helper.from_array(value, name))
    b.inputs.append(helper.make_tensor_value_info(name, b.onnx_type, value.shape))
    return Tensor(name, (value,) * len(b.probes), const=True)


# Tensors that are outputs besides.


def passed_through(b: Builder) -> None:
    """An input that is an output, or a weight that is."""
    stored = {i.name for i in b.inits} - {i.name for i in b.inputs}
    if b.chance(0.5):
        b.wanted.append(b.choose(b.fed))
        return
    found = [p for p in b.params if p.name in stored and p.name in b.used]
    if not found:
        raise Skip
    b.wanted.append(b.choose(found))


# Sizes that are computed from the input's.


def view_of_input(b: Builder) -> None:
    """A channel shuffle, or a flattened layer, whose batch size comes from the graph's input."""
    x = b.image()
    if x.sizes[0] != b.fed[0].sizes[0]:
        raise Skip
    if None in x.dims[2:]:
        x = b.op("GlobalAveragePool", x)
    y = _same_size(b, x)
    batch = _batch(b)
    count, space = y.dim(1), [y.dim(i) for i in range(2, y.rank)]
    if b.chance(0.5):
        groups = b.choose([g for g in range(2, count + 1) if count % g == 0] or [1])
        y = b.op("Reshape", y, _target(b, batch, groups, count // groups, *space), keep=False)
        y = b.op("Transpose", y, perm=[0, 2, 1, *range(3, y.rank)], keep=False)
        _reader(b, b.op("Reshape", y, _target(b, batch, b.choose([-1, count]), *space)))
        return
    total = count * math.prod(space)
    if total > 512:
        raise Skip
    y = b.op("Reshape", y, _target(b, batch, total))
    weight, mask = b.weight(b.width(), total)
    b.op("Gemm", y, b.param(weight), b.param(b.bias(mask)), transB=1)


def _same_size(b: Builder, x: Tensor) -> Tensor:
    """A layer on x that keeps its sizes."""
    n = x.rank - 2
    weight, mask = b.weight(b.choose([4, 6, 8]), x.dim(1), [1] * n)
    return b.op("Relu", b.op("Conv", x, b.param(weight), b.param(b.bias(mask))))


def _batch(b: Builder) -> Tensor:
    """The size of the input's first axis as a vector, by one of the ways exporters write it."""
    source = b.fed[0]
    if b.opset >= 17 and b.chance(0.4):
        size = b.op("Shape", source, start=0, end=1)
    elif b.chance(0.5):
        size = b.op("Slice", b.op("Shape", source), b.ints([0]), b.ints([1]))
    else:
        size = b.op("Gather", b.op("Shape", source), b.ints(0), axis=0)
        return b.op("Reshape", size, b.ints([-1]))
    if b.chance(0.4):
        size = b.op("Reshape", size, b.ints(np.zeros(0)))
        size = b.op("Cast", b.op("Cast", size, to=TensorProto.INT32), to=TensorProto.INT64)
        size = b.op("Reshape", size, b.ints([-1]))
    return size


def _target(b: Builder, batch: Tensor, *sizes: int) -> Tensor:
    """Target of a Reshape: the batch size and numbers."""
    return b.op("Concat", batch, *(b.ints([s]) for s in sizes), axis=0)


TWISTS: tuple[Callable[[Builder], None], ...] = (
    sliced_shape,
    sliced,
    cropped,
    resized,
    padded,
    clipped,
    top,
    axes,
    split_sizes,
    gathered,
    dropped,
    tiled,
    viewed,
    integers,
    integers,
    masked_overflow,
    detector,
    detector,
    tiny,
    computed_weight,
    computed_weight,
    open_weight,
    passed_through,
    view_of_input,
    view_of_input,
)
