"""Check every torchvision architecture under every pruning protocol, pass by pass.

    python scripts/architectures.py [NAME ...] [--protocols P1 P2 ...] [--exporters ...]

One line per architecture, protocol, exporter and BatchNormalization folding on or off: the worst
relative error after each pass, and GMACs and parameters before and after. For P2 (coupled pruning)
the result is compared with the network that torch-pruning builds. Needs the ``torch`` extra, P2 the
``pruning`` extra as well. Exit code 1 if an error exceeds 1e-5 or an oracle is smaller.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PROTOCOLS = ("P1", "P1-80", "P1-seed", "P1-in", "P1-slim", "P2")
EXPORTERS = ("torchscript", "dynamo")
LIMIT = 1e-5


def models(
    name: str, protocol: Any, exporter: Any, dynamic: bool = False
) -> Iterator[onnx.ModelProto]:
    """The pruned model, of one image or of any number of them, and for P2 its oracle."""
    import torch

    from torch_bridge import export, zoo
    from torch_bridge.pruning import coupled

    size = zoo.image_size(name)
    example = torch.zeros(1, 3, size, size)
    model = zoo.realistic(name)
    pruned = coupled(model, example) if protocol == "P2" else (zoo.prune(model, name, protocol),)
    for one in pruned:
        yield export(
            one,
            example,
            dynamic_shapes={0: "batch"} if dynamic else None,
            exporter=exporter,
            fuse_batchnorm=False,
        )


def passes(dense: onnx.ModelProto, fold: bool = True) -> Iterator[onnx.ModelProto]:
    """The model after each of the three passes, with or without the first."""
    import onnx_simplify

    folded = onnx_simplify.fold_batchnorm(dense) if fold else dense
    yield folded
    shifted = onnx_simplify.propagate_bias(folded)
    yield shifted
    yield onnx_simplify.remove_zeroed(shifted)


def check(name: str, protocol: str, exporter: str) -> bool:
    """Print the lines of one model; whether all is well."""
    import onnx_simplify

    try:
        dense, *oracle = models(name, protocol, exporter)
    except ValueError as error:
        print(f"{name:20} {protocol:8} left out: {str(error).splitlines()[0]}", flush=True)
        return True
    good = True
    for fold in (True, False):
        skip = () if fold else ("fold_batchnorm",)
        errors = [onnx_simplify.verify(dense, step).worst for step in passes(dense, fold)]
        # With as few channels as possible, to be compared with those that have to stay.
        _, report = onnx_simplify.simplify(dense, skip=skip, channel_multiple=1)
        errors.append(report.verification.worst if report.verification else float("inf"))
        before, after = report.before, report.after
        line = (
            f"{name:20} {protocol:8} {exporter:12} fold={'on' if fold else 'off':4}"
            + "".join(f"{e:9.1e}" for e in errors)
            + f"  GMAC {(before.macs or 0) / 1e9:.3f} -> {(after.macs or 0) / 1e9:.3f}"
            + f"  M {before.parameters / 1e6:.2f} -> {after.parameters / 1e6:.2f}"
        )
        good &= max(errors) <= LIMIT
        if oracle:
            _, other = onnx_simplify.simplify(oracle[0], skip=(*skip, *onnx_simplify.PASSES[1:]))
            line += f"  oracle {(other.after.macs or 0) / 1e9:.3f}"
            line += f" {other.after.parameters / 1e6:.2f}"
            good &= (after.macs or 0) <= (other.after.macs or 0)
            good &= after.parameters <= other.after.parameters
        print(line, flush=True)
    return good


def main() -> int:
    """Check what was asked for."""
    import torch

    from torch_bridge import zoo

    parser = argparse.ArgumentParser(description="Check architectures under pruning protocols.")
    parser.add_argument("names", nargs="*", default=zoo.ARCHITECTURES)
    parser.add_argument("--protocols", nargs="+", default=PROTOCOLS, choices=PROTOCOLS)
    parser.add_argument("--exporters", nargs="+", default=EXPORTERS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("worst relative error after: fold, propagate, remove, all at once")
    good = True
    for name in options.names or zoo.ARCHITECTURES:
        for protocol in options.protocols:
            for exporter in options.exporters:
                good &= check(name, protocol, exporter)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
