"""The planner: which dead channels to keep, and how to absorb constants through padding."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_simplify.channels.analysis import Analysis
from onnx_simplify.channels.operators.linear import Convolution
from onnx_simplify.planning.profiles import Profile


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

    def prefers_representative(self, live: int, static: bool) -> bool:
        """How a padded convolution absorbs non-zero constants.

        Args:
            live: channels that its input keeps anyway.
            static: whether a bias map is possible.

        Returns:
            True to keep one constant channel that stands for the others: free when the count
            rounds up anyway. False for a bias map.
        """
        return not static or live % max(self.profile.multiple, 1) != 0
