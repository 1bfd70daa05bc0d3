"""Push the constants of pruned channels forward into whoever reads them.

A channel that does not depend on the input still costs full price.  Its readers absorb it:

    operand of an elementwise operator, all constant   replaced by an initializer
    output of the graph, all constant                  replaced by an expanded initializer
    W x, no padding, channel k = v                      b += v * sum(W[:, k]);        W[:, k] = 0
    W x, padding, channels k = v_k                      W[:, r] += v_k/v_r * W[:, k]; W[:, k] = 0
                                                        (channel r stays and stands for all others)
    W x, channels k = maps, sum_j c_jk map_j + d_k      W[:, j] += c_jk W[:, k];      W[:, k] = 0
                                                        (a few channels j stay and stand for all;
                                                        b += d_k W[:, k] without padding)
    either, static sizes                                output += map;                W[:, k] = 0

after which nobody needs the channel.  Only channels that become removable this way are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_simplify.channels.values import VARYING
from onnx_simplify.facts.facts import Absorbed, Facts
from onnx_simplify.graph.edit import Editor, label
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.shapes import Dim
from onnx_simplify.operators.contraction import Contraction
from onnx_simplify.passes.clean import clean
from onnx_simplify.passes.regroup_shuffles import regroup_shuffles
from onnx_simplify.passes.split_sums import split_sums
from onnx_simplify.planning.planner import Planner, Work
from onnx_simplify.runtime.inputs import Feeds
from onnx_simplify.runtime.measure import measured
from onnx_simplify.runtime.session import run_proto

# Larger arrays are computed at run time rather than stored.
_LARGEST_CONSTANT = 1 << 24
# A channel stands for others that are up to so many times larger: rounding grows with the ratio.
_LARGEST_RATIO = 8
# A map counts as a combination of others up to this share of its largest value.
_RESIDUE = 1e-6
# More channels than this never stand for others.
_LARGEST_BASIS = 32


def propagate_bias(
    model: Model,
    planner: Planner,
    runs: Sequence[Feeds],
    *,
    only_zeros: bool = False,
    observe: Callable[[Facts], None] | None = None,
) -> None:
    """Absorb constants, in place.

    Args:
        model: a cleaned model.
        planner: chooses among the ways to absorb.
        runs: inputs for measuring constants, see :func:`onnx_simplify.runtime.measure.measured`.
        only_zeros: absorb nothing but zeros, which needs no bias.
        observe: called with the facts before anything is absorbed.
    """
    splitter = None if only_zeros else planner
    facts = _measured(model, runs, splitter)
    if observe is not None:
        observe(facts)
    if not only_zeros:
        stored = _store_constant_operands(facts)
        if _store_constant_results(facts) or stored:
            clean(model)
            facts = _measured(model, runs, splitter)
    readers = find_readers(facts, only_zeros=only_zeros)
    alive = alive_after(facts, readers)
    if regroup_shuffles(facts, alive):
        facts = _measured(model, runs)
        readers = find_readers(facts, only_zeros=only_zeros)
        alive = alive_after(facts, readers)
    _absorb(facts, planner, readers, alive)


def _measured(model: Model, runs: Sequence[Feeds], splitter: Planner | None = None) -> Facts:
    """Facts with measured constants, after sums are split if there is a planner for it."""
    facts = Facts(model)
    if splitter is not None and split_sums(facts, splitter):
        facts = Facts(model)
    return measured(facts, runs)


def _store_constant_operands(facts: Facts) -> bool:
    """Replace operands of elementwise nodes that are constant altogether by initializers."""
    model = facts.model
    need = facts.needed
    changed = False
    for op in facts.operators:
        node = op.node
        if not op.stores_operands:
            continue
        operands = [t for t in node.inputs if t.name and not isinstance(t, gs.Constant)]
        fixed = [t for t in operands if ((facts.level[t.name] > VARYING) | ~need[t.name]).all()]
        if len(fixed) == len(operands):
            continue
        for tensor in fixed:
            values = _stored(facts, tensor, need[tensor.name])
            others = [t for t in operands if t is not tensor]
            if values is None or not _same_shape(facts, node, others, values.shape):
                continue
            constant = model.constant(f"{tensor.name}_constant", values.astype(tensor.dtype))
            for index, other in enumerate(node.inputs):
                if other is tensor:
                    node.inputs[index] = constant
            operands = others
            changed = True
    return changed


def _store_constant_results(facts: Facts) -> bool:
    """Compute tensors that must exist, but are constant altogether, from their constants alone.

    Those are graph outputs and inputs of operators that are not understood.
    """
    model = facts.model
    if model.opset < 8:  # there is no Expand
        return False
    editor = Editor(model, facts.layouts.readers)
    kept = {t.name for t in model.graph.outputs}
    changed = False
    for op in facts.operators:
        node = op.node
        for index, result in enumerate(node.outputs):
            if not facts.has(result) or not (facts.level[result.name] > VARYING).all():
                continue
            users = facts.readers.get(result.name, [])
            if result.name not in kept and not any(user.is_opaque for user, _ in users):
                continue
            values = _stored(facts, result, np.ones(facts.level[result.name].shape, bool))
            shape = _shape_nodes(facts, result)
            if values is None or shape is None:
                continue
            constant = model.constant(f"{result.name}_constant", values.astype(result.dtype))
            name = model.unique(f"{label(node)}_expand")
            node.outputs[index] = gs.Variable(model.unique(f"{result.name}_unused"))
            expand = gs.Node("Expand", name, inputs=[constant, shape[0]], outputs=[result])
            for new in (*shape[1], expand):
                editor.after(node, new)
            changed = True
    editor.finish()
    return changed


def _shape_nodes(facts: Facts, tensor: gs.Tensor) -> tuple[gs.Tensor, list[gs.Node]] | None:
    """A tensor's shape as a vector, and what computes it from the graph's inputs.

    None if a size is not one of an input.
    """
    model = facts.model
    dims = facts.shape(tensor)
    if all(isinstance(d, int) for d in dims):
        return model.constant(f"{tensor.name}_shape", np.array(dims, np.int64)), []
    nodes: list[gs.Node] = []
    parts: list[gs.Tensor] = []

    def add(op: str, inputs: list[gs.Tensor], **attrs: int) -> gs.Tensor:
        output = gs.Variable(model.unique(f"{tensor.name}_size"), np.int64)
        name = model.unique(f"{tensor.name}_{op}")
        nodes.append(gs.Node(op, name, attrs, inputs, [output]))
        return output

    for dim in dims:
        if isinstance(dim, int):
            parts.append(model.constant(f"{tensor.name}_size", np.array([dim], np.int64)))
            continue
        places = [
            (source, axis)
            for source in model.graph.inputs
            for axis, size in enumerate(source.shape or [])
            if size == dim
        ]
        if not places:
            return None
        source, axis = places[0]
        index = model.constant(f"{tensor.name}_axis", np.array([axis], np.int64))
        parts.append(add("Gather", [add("Shape", [source]), index], axis=0))
    return add("Concat", parts, axis=0), nodes


def _stored(facts: Facts, tensor: gs.Tensor, need: np.ndarray) -> np.ndarray | None:
    """The constant as an array that broadcasts to the tensor, if it can be had.

    Where it is not needed, it has some other needed value.
    """
    scalar = facts.scalar(tensor)
    if np.isfinite(scalar[need]).all():
        return np.where(need, scalar, scalar[need].flat[0] if need.any() else 0.0)
    found = facts.array(tensor)
    return found if found is not None and found.nbytes <= _LARGEST_CONSTANT else None


def _same_shape(
    facts: Facts, node: gs.Node, others: list[gs.Tensor], shape: tuple[int, ...]
) -> bool:
    """Whether the remaining operands and an array broadcast to the shape of the output."""
    output = facts.shape(node.outputs[0])
    shapes: list[list[Dim]] = [list(shape), *(facts.shape(t) for t in others)]
    for axis in range(1, len(output) + 1):
        found = [s[-axis] for s in shapes if len(s) >= axis]
        if output[-axis] != 1 and output[-axis] not in found:
            return False
    return True


@dataclass
class Reader:
    """What reads constant channels; arrays have one entry per input channel.

    Attributes:
        product: what they are multiplied with constant weights in.
        labels: the channels.
        scalar: channels whose constant goes into the bias (zeros among them).
        padded: uniform non-zero channels under padding.
        mapped: channels whose constant varies in space.
        values: the constant of uniform channels, NaN elsewhere.
        absorb: the channels to absorb, once decided.
        replaced: channels that others stand for.
        offsets: a constant to add for each of them.
        stand_ins: (channels, those that stand for them, weights ``[stand-ins, channels]``).
    """

    product: Contraction
    labels: np.ndarray
    scalar: np.ndarray
    padded: np.ndarray
    mapped: np.ndarray
    values: np.ndarray
    absorb: np.ndarray = field(init=False)
    replaced: np.ndarray = field(init=False)
    offsets: np.ndarray = field(init=False)
    stand_ins: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Nothing is decided yet."""
        self.absorb = np.zeros(self.labels.size, bool)
        self.replaced = np.zeros(self.labels.size, bool)
        self.offsets = np.zeros(self.labels.size)

    @property
    def candidates(self) -> np.ndarray:
        """Channels that could be absorbed."""
        return self.scalar | self.padded | self.mapped


def alive_after(facts: Facts, readers: list[Reader], *, decided: bool = False) -> np.ndarray:
    """Labels that stay if everything that can be absorbed is, or all that it was decided to."""
    absorbed: Absorbed = {}
    for reader in readers:
        wiring = reader.product.wiring
        layout = facts.layouts.of[reader.product.inputs[wiring.data].name]
        axis = wiring.axis_in % layout.ndim
        shape = [-1 if a == axis else 1 for a in range(layout.ndim)]
        mask = reader.absorb if decided else reader.candidates
        absorbed[reader.product, wiring.data] = mask.reshape(shape)
    return facts.alive(facts.need(absorbed))


def _absorb(facts: Facts, planner: Planner, readers: list[Reader], alive: np.ndarray) -> None:
    """Absorb what makes channels removable.

    Args:
        facts: what is known.
        planner: chooses among the ways to absorb.
        readers: all readers of constants.
        alive: labels that stay if everything is absorbed.
    """
    # Groups that will merge keep nothing to be as wide as the widest.
    mergers = planner.merge_groups(facts, alive)
    alive = facts.close(alive, free=mergers)
    choice = _Choice(facts, planner, alive)
    # Backwards: a channel that stays for a later reader need not be absorbed by an earlier one.
    for reader in reversed(readers):
        _decide(choice, reader)
    if any(reader.stand_ins for reader in readers):
        # So does what channels are computed from that stay to stand for others.
        needed = alive_after(facts, readers, decided=True)
        alive = alive | facts.close(needed, free=mergers)
    editor = Editor(facts.model, facts.layouts.readers)
    for reader in readers:
        _rewrite(facts, editor, reader, alive)
    editor.finish()


def find_readers(facts: Facts, *, only_zeros: bool) -> list[Reader]:
    """The products that read constant channels, with the ways in which they could absorb them.

    Args:
        facts: what is known of it.
        only_zeros: look at nothing but zeros, which need no bias.
    """
    found = []
    for product in facts.contractions:
        wiring = product.wiring
        tensor = product.inputs[wiring.data]
        layout = facts.layouts.of[tensor.name]
        level = product.input_level(facts)
        if layout.shape[wiring.axis_in] == 1 or not (level > VARYING).any():
            continue
        labels, _ = product.channels(facts)
        values = product.input_values(facts)
        zero, uniform = values == 0, np.isfinite(values)
        spread = bool(product.spread_axes())
        static = product.is_static(facts)
        usable = static and facts.array(tensor) is not None
        mapped = (level > VARYING) & ~uniform & usable
        scalar, padded = (zero, uniform & ~zero) if spread else (uniform, np.zeros_like(zero))
        if product.is_quantized():
            # The bias takes what it can store exactly; nothing else may be added or merged.
            scalar = scalar & product.stores_exactly(np.where(scalar, values, 0))
            padded = mapped = np.zeros_like(zero)
        if product.is_integer():
            # Maps and factors between constants are computed in floating point.
            padded = mapped = np.zeros_like(zero)
        if only_zeros:
            scalar, padded, mapped = zero, np.zeros_like(zero), np.zeros_like(zero)
        reader = Reader(product, labels, scalar, padded, mapped, values)
        if reader.candidates.any():
            found.append(reader)
    return found


@dataclass
class _Choice:
    """What all readers are decided upon with.

    Attributes:
        alive: labels that stay; those of channels that stand for others are added.
    """

    facts: Facts
    planner: Planner
    alive: np.ndarray


def _decide(choice: _Choice, reader: Reader) -> None:
    """Choose what to absorb and how."""
    alive = choice.alive
    used = reader.product.used
    reader.absorb = reader.candidates & ~alive[reader.labels] & used.any(axis=1).ravel()
    varied = reader.absorb & ~reader.scalar
    if not varied.any():
        return
    if not (reader.absorb & reader.mapped).any():
        _decide_uniform(choice, reader, varied)
    elif len(used) == 1:
        _decide_mapped(choice, reader, varied)


def _decide_uniform(choice: _Choice, reader: Reader, padded: np.ndarray) -> None:
    """One channel of each group stands for all others: their constants are multiples of its."""
    groups, _, inputs = reader.product.used.shape
    static = reader.product.is_static(choice.facts)
    if groups > 1 and static:
        return
    # A constant channel that stays anyway stands for the others at no cost.
    staying = reader.padded & choice.alive[reader.labels]
    largest = np.abs(reader.values[padded]).max()
    staying &= np.abs(np.nan_to_num(reader.values)) * _LARGEST_RATIO >= largest
    if static and not staying.any():
        best = np.flatnonzero(padded)[[int(np.argmax(np.abs(reader.values[padded])))]]
        if not _is_cheaper(choice, reader, best):
            return
    for group in range(groups):
        start = group * inputs
        members = np.flatnonzero(padded[start : start + inputs]) + start
        if not members.size:
            continue
        able = np.flatnonzero(staying[start : start + inputs]) + start
        able = able if able.size else members
        best = able[int(np.argmax(np.abs(reader.values[able])))]
        ratios = reader.values[members] / reader.values[best]
        _stand_for(choice, reader, members, np.array([best]), ratios[None, :])


def _decide_mapped(choice: _Choice, reader: Reader, varied: np.ndarray) -> None:
    """A few channels stand for all others, whose maps are linear combinations of theirs."""
    facts = choice.facts
    wiring = reader.product.wiring
    source = reader.product.inputs[wiring.data]
    known = facts.array(source)
    axis = wiring.axis_in % len(facts.shape(source))
    members = np.flatnonzero(varied)
    if known is None or known.shape[axis] != reader.labels.size:
        return
    maps = np.moveaxis(known, axis, 0)[members].reshape(members.size, -1).astype(np.float64)
    uniform = np.isfinite(reader.values[members])
    maps[uniform] = reader.values[members][uniform, None]
    # Without padding the bias takes what is the same everywhere.
    free = not reader.product.spread_axes()
    found = basis(maps, free, _LARGEST_BASIS)
    if found is None:
        return
    chosen, weights, offsets = found
    if not _is_cheaper(choice, reader, members[chosen]):
        return
    _stand_for(choice, reader, members, members[chosen], weights)
    reader.offsets[members] = offsets


def _is_cheaper(choice: _Choice, reader: Reader, stand_ins: np.ndarray) -> bool:
    """Whether these channels shall stay to stand for others, rather than a map be added."""
    facts, alive = choice.facts, choice.alive
    product = reader.product
    source, result = product.positions(facts)
    outputs = int(alive[product.channels(facts)[1]].sum()) * result
    own = Work(int(alive[reader.labels].sum()), product.taps() * outputs, source)
    places = facts.places
    makers = {
        maker
        for channel in reader.labels[stand_ins]
        for maker in facts.makers.get(int(channel), [])
        if places[maker] < places[product]
    }
    producers = []
    for maker in sorted(makers, key=places.__getitem__):
        inputs, results = maker.channels(facts)
        each = max(1, int(alive[inputs].sum()) // maker.dims[0]) * maker.taps()
        positions = maker.positions(facts)[1]
        producers.append(Work(int(alive[results].sum()), each * positions, positions))
    return choice.planner.prefers_stand_ins(stand_ins.size, producers, own, outputs)


def _stand_for(
    choice: _Choice,
    reader: Reader,
    members: np.ndarray,
    chosen: np.ndarray,
    weights: np.ndarray,
) -> None:
    """Let channels stand for others: ``weights[k, m]`` times ``chosen[k]`` for ``members[m]``."""
    reader.absorb[chosen] = False
    choice.alive[reader.labels[chosen]] = True
    rest = ~np.isin(members, chosen)
    reader.stand_ins.append((members[rest], chosen, weights[:, rest]))
    reader.replaced[members[rest]] = True


def basis(
    maps: np.ndarray, free: bool, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """A few rows of which all rows are linear combinations; None if there are not few.

    Rows are chosen greedily, each the one that those before explain least (QR decomposition with
    column pivoting, Golub 1965), and checked on all entries.

    Args:
        maps: float64 ``[rows, entries]``.
        free: whether a constant may be added to each combination.
        most: how many rows at most.

    Returns:
        Indices of the rows chosen, the combinations ``[chosen, rows]`` and the constants to add
        ``[rows]``.
    """
    centred = maps - maps.mean(axis=1, keepdims=True) if free else maps
    size = np.abs(maps).max(axis=1)
    rest = centred.copy()
    chosen: list[int] = []
    while (np.abs(rest).max(axis=1) > _RESIDUE * size).any():
        if len(chosen) == most:
            return None
        norms = np.linalg.norm(rest, axis=1)
        best = int(np.argmax(norms))
        chosen.append(best)
        direction = rest[best] / norms[best]
        rest -= np.outer(rest @ direction, direction)
    if not chosen:
        return None
    index = np.array(chosen)
    weights = np.linalg.lstsq(centred[index].T, centred.T, rcond=None)[0]
    error = np.abs(weights.T @ centred[index] - centred).max(axis=1)
    if (error > _RESIDUE * size).any() or np.abs(weights).max() > _LARGEST_RATIO:
        return None
    offsets = maps.mean(axis=1) - weights.T @ maps[index].mean(axis=1) if free else 0 * size
    return index, weights, offsets


def _rewrite(facts: Facts, editor: Editor, reader: Reader, alive: np.ndarray) -> None:
    if not reader.absorb.any():
        return
    product = reader.product
    scalar = reader.absorb & reader.scalar
    mapped = reader.absorb & ~scalar & ~reader.replaced
    # Nobody looks at an output that is dead.
    seen = alive[product.channels(facts)[1]]
    shift = product.response(np.where(scalar, reader.values, reader.offsets)) * seen
    addend = None
    if mapped.any() and seen.any():
        addend = _response_map(facts, reader, mapped)
        axis = product.wiring.axis_out % addend.ndim
        addend *= seen.reshape([-1 if a == axis else 1 for a in range(addend.ndim)])
        flat = np.moveaxis(addend, axis, 0).reshape(addend.shape[axis], -1)
        if np.allclose(flat, flat[:, :1], rtol=1e-6, atol=1e-12):
            shift += flat[:, 0]
            addend = None
    if reader.stand_ins:
        _merge_columns(reader, editor)
    product.zero_columns(reader.absorb, editor.put)
    if shift.any() and not product.add_bias(shift, editor.put):
        editor.add_behind(product.node, product.per_channel(shift))
    if addend is not None:
        editor.add_behind(product.node, addend)


def _merge_columns(reader: Reader, editor: Editor) -> None:
    """Add the scaled weights of channels to those of the channels that stand for them."""
    weight = np.array(reader.product.weights())
    inputs = weight.shape[2]
    for members, chosen, factors in reader.stand_ins:
        if not members.size:
            continue
        group = members[0] // inputs
        columns = weight[group][:, members % inputs].astype(np.float64)
        extra = np.einsum("om...,km->ok...", columns, factors)
        weight[group][:, chosen % inputs] += extra.astype(weight.dtype)
    reader.product.set_weights(weight, editor.put)


def _response_map(facts: Facts, reader: Reader, mask: np.ndarray) -> np.ndarray:
    """What the constants of some input channels add to the output, as an array (float32).

    The node itself is run on these channels alone, with size 1 along axes where nothing varies.
    """
    product = reader.product
    wiring = product.wiring
    source = product.inputs[wiring.data]
    sizes = facts.shape(source)
    axis = wiring.axis_in % len(sizes)
    known = facts.array(source)
    spread = product.spread_axes()
    shape = []
    for a, size in enumerate(sizes):
        varies = known is not None and known.shape[a] > 1
        if a == axis or a in spread or varies:
            assert isinstance(size, int)
            shape.append(size)
        else:
            shape.append(product.window(a))
    column = [-1 if a == axis else 1 for a in range(len(sizes))]
    values = np.where(np.isfinite(reader.values), reader.values, 0).reshape(column)
    if known is not None:
        values = np.where(np.isfinite(reader.values).reshape(column), values, known)
    data = np.broadcast_to(np.where(mask.reshape(column), values, 0), shape).astype(np.float32)
    return _run_alone(facts.model, product.node, wiring.data, wiring.weight, data)


def _run_alone(
    model: Model, node: gs.Node, data: int, weight: int, values: np.ndarray
) -> np.ndarray:
    """The node's output for one input, in float32 and without bias."""
    proto = model.export_node(node)
    del proto.input[:], proto.output[:]
    names = {data: "data", weight: "weight"}
    proto.input.extend([names[0], names[1]])
    proto.output.append("result")
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [proto],
        "alone",
        [onnx.helper.make_tensor_value_info("data", kind, values.shape)],
        [onnx.helper.make_tensor_value_info("result", kind, None)],
        [onnx.numpy_helper.from_array(node.inputs[weight].values.astype(np.float32), "weight")],
    )
    # Of this operator set, in which the bias of all of them is optional.
    opsets = [onnx.helper.make_opsetid("", 13)]
    single = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return run_proto(single, {"data": values})[0]
