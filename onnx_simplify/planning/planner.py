"""The planner: which dead channels to keep, and how to absorb constants through padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.analysis import Analysis
from onnx_simplify.channels.operators.linear import Convolution
from onnx_simplify.planning.profiles import Profile


@dataclass(frozen=True)
class Work:
    """What a layer does for its channels on one side.

    Attributes:
        channels: how many stay.
        macs: multiply-accumulates for each.
        positions: positions in space of each.
    """

    channels: int
    macs: int
    positions: int


class Planner:
    """Makes the choices for one target profile."""

    def __init__(self, profile: Profile):
        """Plan for ``profile``."""
        self.profile = profile

    def keep_for_alignment(self, node: gs.Node, analysis: Analysis, alive: np.ndarray) -> bool:
        """Keep dead output channels of a convolution up to the next multiple.

        onnxruntime leaves its blocked kernels when a count is no multiple of four, which costs more
        than computing up to three channels too many.

        Returns:
            Whether any label was revived in ``alive``.
        """
        multiple = self.profile.multiple
        rule = analysis.rule[id(node)]
        if multiple < 2 or not isinstance(rule, Convolution) or analysis.node_dead(node, alive):
            return False
        if rule.wiring(node).groups > 1:
            return False
        labels = analysis.layouts.of[node.outputs[0].name].ravel()
        stay = alive[labels]
        missing = -int(stay.sum()) % multiple
        dead = labels[~stay]
        # Several positions may share a label, and come back together.
        dead = dead[np.sort(np.unique(dead, return_index=True)[1])][:missing]
        alive[dead] = True
        return dead.size > 0

    def prefers_stand_ins(
        self, rank: int, producers: list[Work], reader: Work, result: int
    ) -> bool:
        """How a convolution of static size absorbs constants that a bias cannot express.

        Args:
            rank: constant channels that must stay to stand for all others.
            producers: the layers that compute these channels.
            reader: the convolution, with its input channels.
            result: elements of its output.

        Returns:
            True to keep constant channels that stand for the others. False to add a map to the
            output, for which onnxruntime leaves its blocked layout and comes back.
        """
        profile = self.profile
        if profile.multiple == 1:
            return False  # asked for the fewest channels
        cost = self._grown(reader.channels, rank, profile.block) * reader.macs * profile.mac_cost
        for layer in producers:
            each = layer.positions * profile.channel_cost + layer.macs * profile.mac_cost
            cost += self._grown(layer.channels, rank, profile.block) * each
        return cost < profile.map_cost * result + profile.node_cost

    def _grown(self, count: int, more: int, multiple: int) -> int:
        """By how much a number of channels grows, both times rounded up."""
        return _rounded(count + more, multiple) - _rounded(count, multiple)


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
