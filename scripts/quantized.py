"""Quantised models with pruned channels: what goes, and what that is worth.

    python scripts/quantized.py [NAME ...] [--protocols ...] [--write]

Each network is pruned and exported, quantised by ``onnxruntime.quantization.quantize_static`` (QDQ,
int8 weights with a scale per channel, uint8 activations), and only then simplified. Compared are
both models, as onnxruntime runs them with its integer kernels. --write puts the table into
docs/robustness.md. Needs the ``torch`` and ``pruning`` extras. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import publish

NAMES = ("resnet18", "resnet50", "mobilenet_v2", "vgg11_bn", "mnasnet1_0")
PROTOCOLS = ("P1-slim", "P2")
_BATCHES = 2


def quantized(name: str, protocol: Any, folder: Path) -> Path:
    """The pruned network as a quantised model in ``folder``."""
    import torch
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    from torch_bridge import export, zoo
    from torch_bridge.pruning import coupled

    size = zoo.image_size(name)
    example = torch.zeros(1, 3, size, size)
    model = zoo.realistic(name)
    model = coupled(model, example)[0] if protocol == "P2" else zoo.prune(model, name, protocol)
    onnx.save(export(model, example, exporter="torchscript"), folder / "float.onnx")

    class Batches(CalibrationDataReader):
        """Random images."""

        def __init__(self) -> None:
            random = np.random.default_rng(0)
            shape = (_BATCHES, 1, 3, size, size)
            self.batches = iter(random.standard_normal(shape, np.float32))

        def get_next(self) -> dict[str, np.ndarray] | None:
            """The next one."""
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch}

    quantize_static(
        folder / "float.onnx",
        folder / "int8.onnx",
        Batches(),
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )
    return folder / "int8.onnx"


def measure(name: str, protocol: str) -> list[str]:
    """One row of the table."""
    import onnx_simplify

    with tempfile.TemporaryDirectory() as folder:
        _, report = onnx_simplify.simplify(quantized(name, protocol, Path(folder)), benchmark=True)
    assert report.benchmark is not None and report.verification is not None
    before, after = report.before, report.after
    dense, small = (report.benchmark[key].median for key in ("dense", "simplified"))
    return [
        f"{name}, {protocol}",
        f"{before.bytes / 1e6:.2f} → {after.bytes / 1e6:.2f}",
        f"{(before.macs or 0) / 1e9:.2f} → {(after.macs or 0) / 1e9:.2f}",
        f"{dense:.2f} → {small:.2f}",
        f"{dense / small:.2f}x",
        f"{report.verification.worst:.0e}",
    ]


def main() -> int:
    """Measure all, print and publish."""
    parser = argparse.ArgumentParser(description="Quantised models with pruned channels.")
    parser.add_argument("names", nargs="*", default=list(NAMES))
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS))
    parser.add_argument("--write", action="store_true", help="write docs/robustness.md")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    keys = [f"{n} {p}" for n in options.names or NAMES for p in options.protocols]
    rows = [measure(*key.split()) for key in publish.progress(keys, [])]
    header = ["network, pruning", "MB", "GMAC", "ms", "speed-up", "worst error"]
    env = publish.describe(publish.environment("onnx", "onnxruntime", "torch"))
    text = f"{publish.markdown(header, rows)}\n\n{env}"
    print(text)
    if options.write:
        publish.replace_section(publish.ROOT / "docs" / "robustness.md", "quantized", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
