"""Operators that read sizes, not values."""

from __future__ import annotations

import numpy as np

from onnx_simplify.channels.layouts import Layouts, Unsupported
from onnx_simplify.graph.expressions import Dim, product
from onnx_simplify.operators.base import Masks, Operator
from onnx_simplify.operators.interfaces import KnownFacts, KnownSizes, Removal


class Shape(Operator):
    """``Shape``: reads sizes, not values (https://onnx.ai/onnx/operators/onnx__Shape.html).

    When a size it reports shrinks, the reported number is put back, so that whatever is computed
    from it stays as it was.
    """

    reorders = True

    def values(self, known: KnownSizes) -> list[np.ndarray | None]:
        """The sizes."""
        shape = known.shape(self.inputs[0])
        start, end = int(self.attrs.get("start", 0)), self.attrs.get("end")
        return [np.array(shape, object)[start:end]]

    def layout(self, layouts: Layouts) -> None:
        """The input's channels are free to go; the output is an ordinary vector."""
        layouts(self.inputs[0])
        layouts.require_where(self.node)
        output = layouts.untracked(self.outputs[0])
        layouts.freeze(output)
        layouts.set(self.outputs[0], output)

    def need(self, facts: KnownFacts, outputs: Masks) -> Masks:
        """No value is needed."""
        return [None]

    def shrink(self, cut: Removal) -> None:
        """Overwrite the entries of cut axes with the original sizes."""
        kept = cut.kept(self.inputs[0])
        axes = range(len(cut.facts.shape(self.inputs[0])))
        start, end = int(self.attrs.get("start", 0)), self.attrs.get("end")
        entries = {
            position: int(kept[axis].size)
            for position, axis in enumerate(axes[start:end])
            if axis in kept
        }
        if entries:
            cut.override_output(self.node, entries)


class Size(Operator):
    """``Size``: how many elements there are (https://onnx.ai/onnx/operators/onnx__Size.html)."""

    def values(self, known: KnownSizes) -> list[np.ndarray | None]:
        """The product of the sizes."""
        return [np.array(product(known.shape(self.inputs[0])), object)]

    def layout(self, layouts: Layouts) -> None:
        """Nobody may change the number.

        Raises:
            Unsupported: always.
        """
        raise Unsupported("counts elements")


class ConstantOfShape(Operator):
    """``ConstantOfShape``: a size for every element.

    https://onnx.ai/onnx/operators/onnx__ConstantOfShape.html
    """

    def shapes(self, known: KnownSizes) -> list[list[Dim | None]]:
        """What is asked for."""
        request = known.values(self.inputs[0])
        return [] if request is None or request.ndim != 1 else [list(request)]

    def values(self, known: KnownSizes) -> list[np.ndarray | None]:
        """Equal integers."""
        (shape,) = self.shapes(known) or ([None],)
        value = self.attrs.get("value")
        array = np.zeros(1) if value is None else np.asarray(getattr(value, "values", value))
        sizes = [s for s in shape if isinstance(s, int) and s < 64]
        if array.dtype.kind != "i" or len(sizes) < len(shape):
            return []
        return [np.full(sizes, int(array.ravel()[0]), object)]

    def layout(self, layouts: Layouts) -> None:
        """Made in place.

        Raises:
            Unsupported: always.
        """
        raise Unsupported("makes a tensor of a size that is computed")
