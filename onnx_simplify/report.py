"""What a simplification did: figures before and after, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.values import VARYING
from onnx_simplify.facts.facts import Facts
from onnx_simplify.facts.sizes import settle
from onnx_simplify.graph.edit import label
from onnx_simplify.graph.identity import NodeMap
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.quantized import QuantizedConstant
from onnx_simplify.graph.shapes import static_shapes
from onnx_simplify.graph.store import serialized_size
from onnx_simplify.operators import bind, contractions
from onnx_simplify.operators.contraction import Contraction
from onnx_simplify.passes.clean import clean, fold_constants
from onnx_simplify.passes.fold_shapes import fold_shapes
from onnx_simplify.passes.fused import is_fused
from onnx_simplify.planning.plan import Preparation, Step
from onnx_simplify.runtime.benchmark import Timing
from onnx_simplify.runtime.verdict import Verification


@dataclass
class Figures:
    """Size of a model.

    Attributes:
        nodes: number of nodes by operator.
        parameters: number of elements in initializers and ``Constant`` nodes.
        macs: multiply-accumulate operations for one inference at ``sizes``; None if unknown.
        bytes: size of the serialized model.
    """

    nodes: dict[str, int]
    parameters: int
    macs: int | None
    bytes: int


@dataclass
class Layer:
    """One layer with weights.

    Attributes:
        name: the node's name, or its output's.
        op: its operator.
        outputs: output channels before.
        inputs: input channels before.
        constant: output channels that do not depend on the network's input.
        dead: output channels that nothing reads.
        outputs_after: output channels after; 0 when the layer is gone.
        inputs_after: input channels after.
        small: output channels that were taken for zero because of a threshold.
        stays: why constant or dead output channels stay, and how many for each reason.
    """

    name: str
    op: str
    outputs: int
    inputs: int
    constant: int = 0
    dead: int = 0
    outputs_after: int = 0
    inputs_after: int = 0
    small: int = 0
    stays: dict[str, int] = field(default_factory=dict)

    @property
    def removed(self) -> int:
        """Output channels that are gone."""
        return self.outputs - self.outputs_after


@dataclass
class Opaque:
    """A node whose rules are not known, so that its channels were left alone."""

    name: str
    op: str
    reason: str


@dataclass
class Report:
    """The whole report.

    Attributes:
        before: figures of the original.
        after: figures of the result.
        layers: all layers with weights, in execution order.
        prepared: what was done to tensors before, so that more could be done to layers.
        steps: what was done to each layer, where anything was.
        ideal_macs: multiply-accumulates between channels that vary with the input and reach an
            output: a lower bound that no arrangement of channels can beat; None if unknown.
        batchnorms_folded: number of BatchNormalization nodes folded.
        opaque: nodes whose channels were left alone, and why.
        input_shapes: shapes of the inputs that MACs are counted for.
        target: name of the planner's profile.
        threshold: share of a layer's largest weight up to which channels were taken for zero.
        plan: which plan the result follows, ``planned`` by the cost model or one that turned out to
            be better, see :func:`onnx_simplify.planning.profiles.alternatives`; ``shared`` where
            weights that several nodes read were left alone, ``cleaned`` where nothing was removed.
        plans: timings of all plans that were tried out, by name; None unless asked for.
        verification: result of the comparison; None when it was not made.
        benchmark: timings of ``dense`` and ``simplified`` in milliseconds; None unless asked for.
        seconds: time taken by simplification and verification.
        notes: remarks, such as why a pass was left out.
        held_back: the operators without rules that keep most channels from going, in words.
    """

    before: Figures
    after: Figures
    layers: list[Layer] = field(default_factory=list)
    prepared: list[Preparation] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    ideal_macs: int | None = None
    batchnorms_folded: int = 0
    opaque: list[Opaque] = field(default_factory=list)
    input_shapes: dict[str, list[int]] = field(default_factory=dict)
    target: str = ""
    threshold: float = 0.0
    plan: str = "planned"
    plans: dict[str, Timing] | None = None
    verification: Verification | None = None
    benchmark: dict[str, Timing] | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    held_back: str = ""

    @property
    def channels_removed(self) -> int:
        """Output channels of layers that are gone."""
        return sum(layer.removed for layer in self.layers)

    @property
    def speedup(self) -> float | None:
        """Ratio of median times, dense to simplified."""
        if self.benchmark is None:
            return None
        return self.benchmark["dense"].median / self.benchmark["simplified"].median

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists and numbers, ready for JSON."""
        found = asdict(self)
        found["channels_removed"] = self.channels_removed
        found["speedup"] = self.speedup
        return found


def figures(model: Model, shapes: Mapping[str, Sequence[int]]) -> Figures:
    """Count nodes, parameters, MACs and bytes.

    Args:
        model: the model.
        shapes: sizes of the inputs to count MACs for.
    """
    stored = [tuple(t.shape) for t in model.initializers().values()]
    stored += [tuple(t.dims) for t in model.overridable.values()]
    for node in model.graph.nodes:
        if node.op == "Constant":
            stored += [tuple(v.shape) for v in node.attrs.values() if isinstance(v, gs.Constant)]
    nodes = Counter(n.op for n in model.graph.nodes)
    quantized = {
        t.name for n in model.graph.nodes for t in n.inputs if isinstance(t, QuantizedConstant)
    }
    nodes += Counter({"DequantizeLinear": len(quantized)})
    return Figures(
        nodes=dict(sorted(nodes.items())),
        parameters=sum(int(np.prod(shape)) for shape in stored),
        macs=count_macs(model, shapes),
        bytes=serialized_size(model),
    )


def count_macs(model: Model, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Multiply-accumulate operations of all layers with weights; None if sizes are not known."""
    found = _macs(model, shapes)
    return None if found is None else sum(found.values())


def _macs(model: Model, shapes: Mapping[str, Sequence[int]]) -> dict[str, int] | None:
    """Multiply-accumulate operations by the layer's output; None if sizes are not known."""
    found = _macs_as_inferred(model, shapes)
    if found is not None:
        return found
    model = model.copy()
    if any(_is_constant(n) or is_fused(n) for n in model.graph.nodes):
        clean(model)
        # Weights that are computed count, whether or not they are stored.
        fold_constants(model, at_any_size=True)
    settle(model, shapes)
    if not all(_is_known(t) for n in model.graph.nodes for t in n.outputs):
        # Sizes are computed on the way: follow the computation for these inputs.
        clean(model)
        fold_shapes(model, shapes)
    tensors = [t for n in model.graph.nodes for t in (*n.inputs, *n.outputs)]
    return _counted(contractions(model), {t.name: t.shape for t in tensors if _is_known(t)})


def _macs_as_inferred(model: Model, shapes: Mapping[str, Sequence[int]]) -> dict[str, int] | None:
    """The same, where inference knows all sizes, and weights are stored."""
    if any(_is_constant(node) or is_fused(node) for node in model.graph.nodes):
        return None
    products = [p for node in model.graph.nodes for p in bind(node).contractions]
    if not all(product.is_sound for product in products):
        return None
    return _counted(products, static_shapes(model, shapes))


def _counted(
    products: Iterable[Contraction], sizes: Mapping[str, Sequence[int | None]]
) -> dict[str, int] | None:
    """MACs of products by output, for the sizes of tensors by name; None if one is missing."""
    found = {}
    for product in products:
        own: dict[str, list] = {}
        for tensor in (*product.inputs, *product.outputs):
            known = tensor.shape if isinstance(tensor, gs.Constant) else sizes.get(tensor.name)
            if tensor.name and (known is None or None in known):
                return None
            own[tensor.name] = list(known or ())
        found[product.outputs[0].name] = product.macs(own)
    return found


def _is_constant(node: gs.Node) -> bool:
    """Whether a node computes from nothing but initializers."""
    return all(isinstance(t, gs.Constant) for t in node.inputs if t.name)


def _is_known(tensor: gs.Tensor) -> bool:
    return tensor.shape is not None and all(isinstance(d, int) for d in tensor.shape)


def layers(model: Model) -> NodeMap[Layer]:
    """The model's layers with weights, in execution order."""
    found: NodeMap[Layer] = NodeMap()
    for product in contractions(model):
        node, (groups, outputs, inputs) = product.node, product.dims
        found[node] = Layer(label(node), node.op, groups * outputs, groups * inputs)
    return found


def add_findings(found: Mapping[gs.Node, Layer], facts: Facts) -> None:
    """Count constant and dead output channels per layer, in place.

    Args:
        found: the layers, as :func:`layers` gives them.
        facts: what is known of the same model.
    """
    for product in contractions(facts.model):
        layer = found.get(product.node)
        result = product.outputs[0].name
        if layer is None or result not in facts.layouts.of:
            continue
        labels = facts.layouts.of[result]
        if labels.size != layer.outputs:
            continue
        dead = ~(facts.needed[result] | facts.layouts.frozen[labels])
        layer.dead = int(dead.sum())
        if facts.constants is not None:
            layer.constant = int(((facts.level[result] > 0) & ~dead).sum())


def ideal_macs(
    facts: Facts, shapes: Mapping[str, Sequence[int]], known: Mapping[gs.Node, Layer]
) -> int | None:
    """Multiply-accumulates between channels that vary and are needed; None if not known.

    Constants count as absorbed, wherever they are read.

    Args:
        facts: what is known of it.
        shapes: sizes of the inputs.
        known: the layers, as :func:`layers` gives them.
    """
    total = _macs(facts.model, shapes)
    if total is None:
        return None
    need = facts.need(
        {
            (op, index): facts.level[tensor.name] > VARYING
            for op in facts.operators
            for index, tensor in enumerate(op.inputs)
            if tensor.name in facts.level and not isinstance(tensor, gs.Constant)
        }
    )
    found = 0.0
    for product in contractions(facts.model):
        if product.node not in known:
            continue
        groups, *sizes = product.dims
        ends = product.outputs[0].name, product.inputs[product.wiring.data].name
        live = [np.full(groups, size) for size in sizes]
        for k, name in enumerate(ends):
            if name in need and need[name].size == groups * sizes[k]:
                varying = need[name] & (facts.level[name] == VARYING)
                live[k] = varying.reshape(groups, -1).sum(1)
        share = float((live[0] * live[1]).sum()) / max(groups * sizes[0] * sizes[1], 1)
        # What does not depend on the inputs' values is gone where sizes had to be followed.
        found += total.get(ends[0], 0) * share
    return round(found)
