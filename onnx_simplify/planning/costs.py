"""The cost model: how long onnxruntime's CPU kernels take, in nanoseconds, on one thread.

A convolution of ordinary or depthwise kind is computed in blocks of channels (NCHWc) if its channel
counts allow it (``MlasNchwcConv``); all others unfold their input and multiply matrices:

    blocked     inputs * taps * positions * (mac * outputs + load), per group, inputs and outputs
                rounded up to blocks
    depthwise   positions * channels, rounded up to blocks * (mac' * taps + load')
    plain       inputs * taps * positions * (mac" * outputs + unfold) + start, per group

and one operator's overhead. Fewer inputs than a block are read in the plain layout, which is slow
where a convolution has a single tap:

    + inputs * positions * pointwise * blocks of outputs
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from onnx_simplify.planning.profiles import Profile


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product as its cost sees it.

    Attributes:
        groups: number of groups.
        inputs: input channels of each group.
        outputs: output channels of each group.
        taps: weights between one input and one output channel.
        positions: positions in space of the output.
    """

    groups: int
    inputs: int
    outputs: int
    taps: int
    positions: int

    def with_outputs(self, outputs: int) -> Layer:
        """With another number of output channels in all, in a single group."""
        return replace(self, outputs=outputs)

    def with_inputs(self, inputs: int) -> Layer:
        """With another number of input channels in all, in a single group."""
        return replace(self, inputs=inputs)

    def with_more(self, *, inputs: int = 0, outputs: int = 0) -> Layer:
        """With more channels on either side; those of a depthwise convolution are the same."""
        if self.is_depthwise:
            return replace(self, groups=self.groups + max(inputs, outputs))
        return replace(
            self,
            inputs=self.inputs + -(-inputs // self.groups),
            outputs=self.outputs + -(-outputs // self.groups),
        )

    @property
    def is_depthwise(self) -> bool:
        """Whether every channel has a filter of its own."""
        return self.groups > 1 and self.inputs == self.outputs == 1


def is_blocked(profile: Profile, layer: Layer) -> bool:
    """Whether onnxruntime computes the layer with its blocked kernels."""
    if layer.is_depthwise:
        return layer.groups % profile.multiple == 0
    if layer.groups == 1:
        return layer.outputs % profile.multiple == 0
    return layer.inputs % profile.block == 0 and layer.outputs % profile.block == 0


def convolution(profile: Profile, layer: Layer) -> float:
    """Nanoseconds for one layer."""
    return float(sum(n * getattr(profile, name) for name, n in terms(profile, layer).items()))


def grown(profile: Profile, layer: Layer, *, inputs: int = 0, outputs: int = 0) -> float:
    """Nanoseconds for channels that a layer reads or makes only to stand for others.

    Dead channels that fill up blocks anyway cost nothing.

    Args:
        profile: the target.
        layer: the layer without them.
        inputs: how many more it reads.
        outputs: how many more it makes.
    """
    before, after = (
        _aligned(profile, layer.with_more(inputs=a, outputs=b))
        for a, b in ((0, 0), (inputs, outputs))
    )
    cost = convolution(profile, after) - convolution(profile, before)
    made = after.groups * after.outputs - before.groups * before.outputs if outputs else 0
    return cost + made * layer.positions * profile.channel_cost


def added_map(profile: Profile, elements: int) -> float:
    """Nanoseconds to add a map to an output of so many elements.

    onnxruntime leaves its blocked layout for it and comes back.
    """
    return profile.map_cost * elements + profile.map_start_cost


def _aligned(profile: Profile, layer: Layer) -> Layer:
    """With its channels in whole blocks, as they are computed."""
    if layer.is_depthwise:
        return replace(layer, groups=rounded(layer.groups, profile.block))
    if layer.groups > 1:
        return layer
    return replace(
        layer,
        inputs=rounded(layer.inputs, profile.block),
        outputs=rounded(layer.outputs, profile.block),
    )


def terms(profile: Profile, layer: Layer) -> dict[str, int]:
    """How often each cost of a profile is paid for one layer, by the name of its attribute."""
    if not is_blocked(profile, layer):
        unfolded = layer.groups * layer.inputs * layer.taps * layer.positions
        work = {"plain_mac_cost": unfolded * layer.outputs, "unfold_cost": unfolded}
        work["group_cost"] = layer.groups
    elif layer.is_depthwise:
        elements = rounded(layer.groups, profile.block) * layer.positions
        work = {"depthwise_mac_cost": elements * layer.taps, "depthwise_load_cost": elements}
    else:
        outputs = rounded(layer.outputs, profile.block)
        inputs = layer.inputs
        if inputs > profile.block:
            inputs = rounded(inputs, profile.block)
        unfolded = layer.groups * inputs * layer.taps * layer.positions
        work = {"mac_cost": unfolded * outputs, "load_cost": unfolded}
        if inputs < profile.block and layer.taps == 1:
            work["pointwise_cost"] = unfolded * outputs // profile.block
    return work | {"node_cost": 1}


def rounded(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple
