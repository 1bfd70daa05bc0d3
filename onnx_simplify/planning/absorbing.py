"""Who absorbs which constants, and by which means.

A channel that does not depend on the input still costs full price.  Its readers absorb it:

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

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_simplify.channels.values import VARYING
from onnx_simplify.facts.facts import Absorbed, Facts
from onnx_simplify.operators import Operator
from onnx_simplify.operators.contraction import Contraction
from onnx_simplify.planning.basis import LARGEST_RATIO, basis
from onnx_simplify.planning.costs import added_map, grown
from onnx_simplify.planning.layers import layer_of
from onnx_simplify.planning.profiles import Profile

# More channels than this never stand for others.
_LARGEST_BASIS = 32


@dataclass
class Absorption:
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
        costs: predicted nanoseconds of the ways that were weighed against each other.
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
    costs: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Nothing is decided yet."""
        self.absorb = np.zeros(self.labels.size, bool)
        self.replaced = np.zeros(self.labels.size, bool)
        self.offsets = np.zeros(self.labels.size)

    @property
    def candidates(self) -> np.ndarray:
        """Channels that could be absorbed."""
        return self.scalar | self.padded | self.mapped


def find_absorptions(facts: Facts, *, only_zeros: bool) -> list[Absorption]:
    """The products that read constant channels, with the ways in which they could absorb them.

    Args:
        facts: measured facts.
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
        own = Absorption(product, labels, scalar, padded, mapped, values)
        if own.candidates.any():
            found.append(own)
    return found


@dataclass(frozen=True)
class Prospect:
    """What could be absorbed, and what would be left.

    Attributes:
        facts: what is known.
        absorptions: all that are possible; nothing is decided yet.
        alive: labels that stay if all of them are made.
    """

    facts: Facts
    absorptions: list[Absorption]
    alive: np.ndarray

    @staticmethod
    def of(facts: Facts, *, zeros_only: bool = False) -> Prospect:
        """Look for what could be absorbed: nothing, if nothing was measured.

        Args:
            facts: what is known.
            zeros_only: look at nothing but zeros, which need no bias.
        """
        found: list[Absorption] = []
        if facts.constants is not None:
            found = find_absorptions(facts, only_zeros=zeros_only)
        return Prospect(facts, found, alive_after(facts, found))


def alive_after(
    facts: Facts, absorptions: Sequence[Absorption], *, decided: bool = False
) -> np.ndarray:
    """Labels that stay if everything that can be absorbed is, or all that it was decided to."""
    absorbed: Absorbed = {}
    for own in absorptions:
        wiring = own.product.wiring
        layout = facts.layouts.of[own.product.inputs[wiring.data].name]
        axis = wiring.axis_in % layout.ndim
        shape = [-1 if a == axis else 1 for a in range(layout.ndim)]
        mask = own.absorb if decided else own.candidates
        absorbed[own.product, wiring.data] = mask.reshape(shape)
    return facts.alive(facts.need(absorbed))


@dataclass
class _Choice:
    """What all absorptions are decided upon with.

    Attributes:
        facts: measured facts.
        profile: the target.
        alive: labels that stay; those of channels that stand for others are added.
    """

    facts: Facts
    profile: Profile
    alive: np.ndarray


def decide(
    profile: Profile,
    facts: Facts,
    absorptions: Sequence[Absorption],
    alive: np.ndarray,
    free: Collection[Operator],
) -> np.ndarray:
    """Choose what is absorbed and how, in place: what makes channels removable.

    Args:
        profile: the target.
        facts: measured facts.
        absorptions: all that are possible.
        alive: labels that stay if all of them are made; modified.
        free: operators that are rewritten in some other way, see :meth:`Facts.close`.

    Returns:
        Labels that stay after what was decided.
    """
    choice = _Choice(facts, profile, facts.close(alive, free=free))
    # Backwards: a channel that stays for a later reader need not be absorbed by an earlier one.
    for own in reversed(absorptions):
        _decide(choice, own)
    if not any(own.stand_ins for own in absorptions):
        return choice.alive
    # So does what channels are computed from that stay to stand for others.
    needed = alive_after(facts, absorptions, decided=True)
    return choice.alive | facts.close(needed, free=free)


def _decide(choice: _Choice, own: Absorption) -> None:
    """Choose what to absorb and how."""
    alive = choice.alive
    used = own.product.used
    own.absorb = own.candidates & ~alive[own.labels] & used.any(axis=1).ravel()
    varied = own.absorb & ~own.scalar
    if not varied.any():
        return
    if not (own.absorb & own.mapped).any():
        _decide_uniform(choice, own, varied)
    elif len(used) == 1:
        _decide_mapped(choice, own, varied)


def _decide_uniform(choice: _Choice, own: Absorption, padded: np.ndarray) -> None:
    """One channel of each group stands for all others: their constants are multiples of its."""
    groups, _, inputs = own.product.used.shape
    # A constant channel that stays anyway stands for the others at no cost.
    staying = own.padded & choice.alive[own.labels]
    largest = np.abs(own.values[padded]).max()
    staying &= np.abs(np.nan_to_num(own.values)) * LARGEST_RATIO >= largest
    found = []
    for start in range(0, groups * inputs, inputs):
        members = np.flatnonzero(padded[start : start + inputs]) + start
        if members.size:
            able = np.flatnonzero(staying[start : start + inputs]) + start
            able = able if able.size else members
            found.append((members, able[int(np.argmax(np.abs(own.values[able])))]))
    more = np.array([best for _, best in found if not staying[best]], int)
    # Where sizes are free, there is no map to add instead.
    if own.product.is_static(choice.facts) and more.size and not _is_cheaper(choice, own, more):
        return
    for members, best in found:
        ratios = own.values[members] / own.values[best]
        _stand_for(choice, own, members, np.array([best]), ratios[None, :])


def _decide_mapped(choice: _Choice, own: Absorption, varied: np.ndarray) -> None:
    """A few channels stand for all others, whose maps are linear combinations of theirs."""
    facts = choice.facts
    wiring = own.product.wiring
    source = own.product.inputs[wiring.data]
    known = facts.array(source)
    axis = wiring.axis_in % len(facts.shape(source))
    members = np.flatnonzero(varied)
    if known is None or known.shape[axis] != own.labels.size:
        return
    maps = np.moveaxis(known, axis, 0)[members].reshape(members.size, -1).astype(np.float64)
    uniform = np.isfinite(own.values[members])
    maps[uniform] = own.values[members][uniform, None]
    # Without padding the bias takes what is the same everywhere.
    free = not own.product.spread_axes()
    found = basis(maps, free, _LARGEST_BASIS)
    if found is None:
        return
    chosen, weights, offsets = found
    if not _is_cheaper(choice, own, members[chosen]):
        return
    _stand_for(choice, own, members, members[chosen], weights)
    own.offsets[members] = offsets


def _is_cheaper(choice: _Choice, own: Absorption, stand_ins: np.ndarray) -> bool:
    """Whether these channels shall stay to stand for others, rather than a map be added."""
    profile, facts, alive = choice.profile, choice.facts, choice.alive
    if profile.multiple == 1 and np.isfinite(profile.map_cost):
        return False  # asked for the fewest channels
    product, places = own.product, facts.places
    makers = {
        maker
        for channel in own.labels[stand_ins]
        for maker in facts.makers.get(int(channel), [])
        if places[maker] < places[product]
    }
    reader = layer_of(product, facts, alive)
    more = stand_ins.size
    cost = grown(profile, reader, inputs=more)
    for maker in sorted(makers, key=places.__getitem__):
        cost += grown(profile, layer_of(maker, facts, alive), outputs=more)
    elements = int(alive[product.channels(facts)[1]].sum()) * reader.positions
    own.costs = {"stand-ins": cost, "map": added_map(profile, elements)}
    return own.costs["stand-ins"] < own.costs["map"]


def _stand_for(
    choice: _Choice,
    own: Absorption,
    members: np.ndarray,
    chosen: np.ndarray,
    weights: np.ndarray,
) -> None:
    """Let channels stand for others: ``weights[k, m]`` times ``chosen[k]`` for ``members[m]``."""
    own.absorb[chosen] = False
    choice.alive[own.labels[chosen]] = True
    rest = ~np.isin(members, chosen)
    own.stand_ins.append((members[rest], chosen, weights[:, rest]))
    own.replaced[members[rest]] = True
