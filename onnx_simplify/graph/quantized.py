"""Weights that are stored as integers.

    Conv(x, DequantizeLinear(q, scale, zero_point))

is how quantised models hold them (https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html):
weight = (q - zero_point) * scale, with one scale for all or one for each position along an axis. In
a working graph such a node is not there: what reads it reads a :class:`QuantizedConstant`, whose
``values`` are the numbers that it stands for. Taking some positions, moving them and setting some
to zero works on the integers; the rest of the toolkit need not know. The node comes back when the
model is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_graphsurgeon as gs
from onnx import NodeProto
from onnx_graphsurgeon.ir.tensor import LazyValues

# What may read such weights.
READERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_STORED = frozenset({"int8", "uint8", "int16", "uint16", "int32"})
# A sum of float32 products counts as a whole number of steps up to this error, and this share.
_INEXACT, _ROUNDING = 1e-3, 1e-6


class Quantized(LazyValues):
    """An array of numbers, stored as integers.

    Attributes:
        stored: the integers.
        scale: float, one number or a vector along ``axis``.
        zero: the zero points, shaped like ``scale`` and typed like ``stored``; None for zero.
        axis: the axis of ``stored`` that a vector of scales runs along.
    """

    def __init__(self, stored: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, axis: int):
        """Wrap the inputs of a ``DequantizeLinear``."""
        self.stored, self.scale, self.zero, self.axis = stored, scale, zero, axis
        self.shape, self.dtype = list(stored.shape), scale.dtype
        self.nbytes = stored.size * scale.dtype.itemsize

    @property
    def is_per_axis(self) -> bool:
        """Whether scales differ along the axis."""
        return self.scale.size > 1

    def load(self) -> np.ndarray:
        """The numbers, of the type of ``scale``."""
        return self.steps().astype(self.dtype) * self._along(self.scale)

    def arrays(self) -> list[np.ndarray]:
        """The integers, the scales and, if there are any, the zero points."""
        return [a for a in (self.stored, self.scale, self.zero) if a is not None]

    def used(self) -> np.ndarray:
        """Which numbers are not zero, bool."""
        return self.stored != (0 if self.zero is None else self._along(self.zero))

    def zeroed(self, axis: int, mask: np.ndarray) -> Quantized:
        """The array with some positions (bool) along an axis set to zero."""
        new = self._with(self.stored.copy(), None)
        zero = np.zeros((), self.stored.dtype) if self.zero is None else self._along(self.zero)
        place = (slice(None),) * axis + (mask,)
        new.stored[place] = np.broadcast_to(zero, new.stored.shape)[place]
        return new

    def steps(self) -> np.ndarray:
        """The integers counted from the zero point (int32; int64 for int32)."""
        steps = self.stored.astype(np.int64 if self.stored.dtype.itemsize > 2 else np.int32)
        return steps if self.zero is None else steps - self._along(self.zero).astype(steps.dtype)

    def compress(self, kept: Mapping[int, np.ndarray]) -> Quantized:
        """The array with only some positions (indices) along some axes."""
        stored = self.stored
        for axis, index in kept.items():
            stored = np.take(stored, index, axis)
        return self._with(stored, kept.get(self.axis))

    def restored(self, steps: np.ndarray, positions: np.ndarray | None = None) -> Quantized:
        """An array of the same kind from the integers counted from the zero point.

        Args:
            steps: what :meth:`steps` gives, some of it taken, moved or set to zero.
            positions: which positions there are along the axis, if not all.
        """
        new = self._with(np.zeros(steps.shape, self.stored.dtype), positions)
        zero = 0 if new.zero is None else new._along(new.zero).astype(steps.dtype)
        new.stored = (steps + zero).astype(self.stored.dtype)
        return new

    def plus(self, shift: np.ndarray) -> Quantized | None:
        """The array with some numbers added; None if the sum cannot be stored exactly.

        Args:
            shift: float64, shaped like the array.
        """
        steps = shift / self._along(self.scale).astype(np.float64)
        whole = np.rint(steps)
        if not (np.abs(steps - whole) <= _INEXACT + _ROUNDING * np.abs(steps)).all():
            return None
        total = self.stored + whole
        limits = np.iinfo(self.stored.dtype)
        if (total < limits.min).any() or (total > limits.max).any():
            return None
        new = self._with(self.stored, None)
        new.stored = total.astype(self.stored.dtype)
        return new

    def _with(self, stored: np.ndarray, positions: np.ndarray | None) -> Quantized:
        scale, zero = self.scale, self.zero
        if positions is not None and self.is_per_axis:
            scale = scale[positions]
            zero = None if zero is None else zero[positions]
        return Quantized(stored, scale, zero, self.axis)

    def _along(self, vector: np.ndarray) -> np.ndarray:
        """A scalar, or a vector along the axis, shaped so that it broadcasts to the array."""
        if vector.size == 1:
            return vector.reshape(())
        return vector.reshape([-1 if a == self.axis else 1 for a in range(self.stored.ndim)])


class QuantizedConstant(gs.Constant):
    """An initializer that is stored as integers.

    Attributes:
        names: of the initializers that hold the integers, the scales and the zero points.
        message: the ``DequantizeLinear``.
    """

    def __init__(self, name: str, values: Quantized, names: list[str], message: NodeProto):
        """Wrap what the node computes from the initializers of these names."""
        super().__init__(name, values)
        self.names = names
        self.message = message

    @property
    def quantized(self) -> Quantized:
        """The integers and what they mean."""
        found = self._values
        assert isinstance(found, Quantized)
        return found

    @property
    def values(self) -> np.ndarray:
        """The numbers, computed anew each time: they take much more memory."""
        return self.quantized.load()

    @values.setter
    def values(self, values: Quantized) -> None:
        self._values = values

    def parts(self) -> Iterator[gs.Constant]:
        """The initializers."""
        for name, array in zip(self.names, self.quantized.arrays(), strict=True):
            yield gs.Constant(name, array)

    def node(self) -> NodeProto:
        """The node that computes the numbers from the initializers."""
        message = NodeProto()
        message.CopyFrom(self.message)
        del message.input[:], message.output[:]
        message.input.extend(self.names)
        message.output.append(self.name)
        return message


def read_quantized(node: gs.Node) -> Quantized | None:
    """What a ``DequantizeLinear`` computes, if all its inputs are initializers of known types."""
    inputs = [t for t in node.inputs if t.name]
    if node.op != "DequantizeLinear" or node.domain or len(inputs) != len(node.inputs):
        return None
    if len(inputs) not in (2, 3) or not all(type(t) is gs.Constant for t in inputs):
        return None
    if node.attrs.get("block_size", 0) or node.attrs.get("output_dtype", 0):
        return None
    stored, scale = (np.asarray(t.values) for t in inputs[:2])
    zero = np.asarray(inputs[2].values) if len(inputs) == 3 else None
    if stored.dtype.name not in _STORED or scale.dtype not in (np.float32, np.float16):
        return None
    axis = int(node.attrs.get("axis", 1))
    axis += stored.ndim * (axis < 0)
    if scale.ndim > 1:
        return None
    if zero is not None and (zero.size, zero.dtype) != (scale.size, stored.dtype):
        return None
    if scale.size != 1 and not (0 <= axis < stored.ndim and stored.shape[axis] == scale.size):
        return None
    return Quantized(stored, scale, zero, axis)
