"""The cost model: how long onnxruntime's CPU kernels take, in nanoseconds, on one thread.

A convolution of ordinary or depthwise kind is computed in blocks of channels (NCHWc) if its channel
counts allow it (``MlasNchwcConv``); all others unfold their input and multiply matrices:

    blocked     inputs * taps * positions * (mac * outputs, rounded up to blocks + load), per group
    depthwise   taps * positions * depthwise * channels, rounded up to blocks
    plain       inputs * taps * positions * (mac' * outputs + unfold), per group

each with its outputs stored, and one operator's overhead.
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
    outputs = layer.groups * layer.outputs
    unfolded = layer.groups * layer.inputs * layer.taps * layer.positions
    if not is_blocked(profile, layer):
        work = unfolded * (layer.outputs * profile.plain_mac_cost + profile.unfold_cost)
    elif layer.is_depthwise:
        outputs = rounded(outputs, profile.block)
        work = outputs * layer.taps * layer.positions * profile.depthwise_cost
    else:
        each = rounded(layer.outputs, profile.block)
        outputs = layer.groups * each
        work = unfolded * (each * profile.mac_cost + profile.load_cost)
    return work + outputs * layer.positions * profile.channel_cost + profile.node_cost


def rounded(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple
