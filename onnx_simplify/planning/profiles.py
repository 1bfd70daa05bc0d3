"""What the planner knows about a target processor."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Profile:
    """How onnxruntime's CPU kernels treat channels on a target.

    Attributes:
        name: what ``--target`` calls it.
        block: channels that the blocked (NCHWc) convolution kernels process at a time.
        multiple: channel counts of convolutions that are no multiple of this leave the blocked
            kernels; the planner keeps dead channels to reach one.
    """

    name: str
    block: int
    multiple: int


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
    return found if multiple is None else Profile(found.name, found.block, multiple)
