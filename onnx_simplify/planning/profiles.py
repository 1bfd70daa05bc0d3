"""What the planner knows about a target processor."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Profile:
    """How onnxruntime's CPU kernels treat channels on a target, on one thread.

    All costs are nanoseconds. ``scripts/calibrate.py`` measures most of them on the machine at
    hand; how they are put together is in :mod:`onnx_simplify.planning.costs`.

    Attributes:
        name: what ``--target`` calls it.
        block: channels that the blocked (NCHWc) convolution kernels process at a time; 1 where
            there are no such kernels.
        multiple: channel counts of convolutions that are no multiple of this leave the blocked
            kernels; the planner keeps dead channels to reach one.
        mac_cost: for each multiply-accumulate of a blocked convolution.
        load_cost: to load one input element, for each tap of each group of a blocked convolution.
        pointwise_cost: for each input element and block of outputs of a 1x1 convolution that reads
            fewer channels than a block; 0 where nothing shall be filled up for it.
        depthwise_mac_cost: for each multiply-accumulate of a blocked depthwise convolution.
        depthwise_load_cost: for each of its output elements.
        plain_mac_cost: for each multiply-accumulate of other convolutions.
        unfold_cost: for each element of the unfolded input (im2col) of other convolutions.
        group_cost: for each group of other convolutions.
        copy_cost: for each element that is gathered.
        map_cost: for each element of an output to which a map is added, reorders included.
        node_cost: for an operator, however small its tensors.
        channel_cost: for each element of a channel that stays only to stand for others. Chosen on
            whole networks, as the next one.
        map_start_cost: for a map, however small: it also breaks up what would run as one kernel.
        rearrange: whether layers may be split, groups merged and channels reordered.
    """

    name: str
    block: int
    multiple: int
    mac_cost: float = 0.0067
    load_cost: float = 0.039
    pointwise_cost: float = 0.22
    depthwise_mac_cost: float = 0.0083
    depthwise_load_cost: float = 0.048
    plain_mac_cost: float = 0.007
    unfold_cost: float = 0.135
    group_cost: float = 175
    copy_cost: float = 0.07
    map_cost: float = 0.2
    node_cost: float = 3000
    channel_cost: float = 0.1
    map_start_cost: float = 8000
    rearrange: bool = True

    @property
    def rearranges_blocks(self) -> bool:
        """Whether channels may be rearranged for the sake of blocks, of which there are any."""
        return self.rearrange and self.block > 1


# Vectors half as wide; 64 channels at 56x56 take about 3.4 ms per 3x3 convolution.
_AVX2 = Profile("avx2", 8, 4, mac_cost=0.03, depthwise_mac_cost=0.03, plain_mac_cost=0.03)
PROFILES = {p.name: p for p in (_AVX2, Profile("avx512", 16, 4), Profile("generic", 1, 1))}


def detect() -> Profile:
    """The profile of the machine this runs on."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return PROFILES["generic"]
    try:
        flags = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return PROFILES["avx2"]
    return PROFILES["avx512" if "avx512f" in flags else "avx2"]


def profile(name: str | None, multiple: int | None = None) -> Profile:
    """A profile by name (None or ``auto``: detect), optionally with another channel multiple.

    Dead channels are then kept for that multiple only; 1 asks for the fewest channels, which leaves
    nothing to rearrange.

    Raises:
        KeyError: there is no profile of that name.
    """
    found = detect() if name in (None, "auto") else PROFILES[str(name)]
    if multiple is None:
        return found
    return replace(found, multiple=multiple, rearrange=multiple > 1, pointwise_cost=0.0)


def alternatives(planned: Profile) -> dict[str, Profile]:
    """Other plans than the cost model's for the same target, by name, to be tried out.

    ``plain`` rearranges nothing, ``fewest`` keeps no dead channel, ``blocks`` fills up whole
    blocks, ``maps`` and ``stand-ins`` always absorb constants the one way or the other.
    """
    return {
        "plain": replace(planned, rearrange=False),
        "fewest": replace(planned, multiple=1, rearrange=False, pointwise_cost=0.0),
        "blocks": replace(planned, multiple=max(planned.block, planned.multiple)),
        "maps": replace(planned, map_cost=0.0, map_start_cost=0.0),
        "stand-ins": replace(planned, map_cost=float("inf")),
    }
