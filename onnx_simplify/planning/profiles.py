"""What the planner knows about a target processor."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Profile:
    """How onnxruntime's CPU kernels treat channels on a target.

    Attributes:
        name: what ``--target`` calls it.
        block: channels that the blocked (NCHWc) convolution kernels process at a time.
        multiple: channel counts of convolutions that are no multiple of this leave the blocked
            kernels; the planner keeps dead channels to reach one.
        channel_cost: nanoseconds to store and load one more channel, per position.
        mac_cost: nanoseconds per multiply-accumulate of a convolution.
        map_cost: nanoseconds per element to add a map, with the reorders around it.
        node_cost: nanoseconds for an operator, however small its tensors, with these reorders.
    """

    name: str
    block: int
    multiple: int
    channel_cost: float = 0.15
    mac_cost: float = 0.0085
    map_cost: float = 0.2
    node_cost: float = 4000


PROFILES = {
    p.name: p
    for p in (Profile("avx2", 8, 4), Profile("avx512", 16, 4), Profile("generic", 1, 1))
}


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

    Raises:
        KeyError: there is no profile of that name.
    """
    found = detect() if name in (None, "auto") else PROFILES[str(name)]
    return found if multiple is None else replace(found, multiple=multiple)
