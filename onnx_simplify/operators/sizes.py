"""Operators that read sizes, not values."""

from __future__ import annotations

from onnx_simplify.channels.layouts import Layouts
from onnx_simplify.operators.base import Masks, Operator
from onnx_simplify.operators.interfaces import KnownFacts, Removal


class Shape(Operator):
    """``Shape``: reads sizes, not values (https://onnx.ai/onnx/operators/onnx__Shape.html).

    When a size it reports shrinks, the reported number is put back, so that whatever is computed
    from it stays as it was.
    """

    reorders = True

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
