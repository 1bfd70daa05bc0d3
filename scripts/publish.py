"""What the measuring scripts share: results that survive an interruption, and tables in documents.

`Results` keeps one row per key in a JSON file under ``build/``, written after every row; a run on
the same code, with the same settings, packages and processor, goes on where the last one stopped.
`replace_section` puts a table between the markers of a document.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def write(path: Path, content: str | bytes) -> None:
    """Write a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def replace_section(path: Path, marker: str, text: str) -> None:
    """Replace what is between ``<!-- MARKER starts -->`` and ``<!-- MARKER ends -->``.

    Raises:
        ValueError: the document has no such markers.
    """
    start, end = f"<!-- {marker} starts -->", f"<!-- {marker} ends -->"
    content = path.read_text()
    before, found_start, rest = content.partition(start)
    _, found_end, after = rest.partition(end)
    if not found_start or not found_end:
        raise ValueError(f"{path} has no section between '{start}' and '{end}'")
    write(path, f"{before}{start}\n{text.strip()}\n{end}{after}")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(*packages: str) -> dict[str, str]:
    """Versions, processor and date of a measurement; packages that are missing are left out."""
    found = {"date": datetime.date.today().isoformat(), "cpu": processor()}
    found["python"] = platform.python_version()
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe(env: Mapping[str, str]) -> str:
    """The environment in one line."""
    versions = ", ".join(f"{k} {v}" for k, v in env.items() if k not in ("date", "cpu"))
    return f"{env['date']}, {env['cpu']}, {versions}"


def fingerprint() -> str:
    """A digest of the code that a measurement depends on."""
    digest = hashlib.sha256()
    for package in ("onnx_simplify", "torch_bridge"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """Rows by key, on disk.

    Attributes:
        rows: what has been measured, by key.
        head: the settings, environment and code that all rows share.
    """

    def __init__(self, name: str, settings: dict[str, Any], env: dict[str, str], fresh: bool):
        """Open ``build/tables/NAME.json``.

        Args:
            name: the table's.
            settings: what the rows depend on.
            env: see `environment`; rows measured under another are dropped, except for the date.
            fresh: drop all rows.
        """
        self.path = ROOT / "build" / "tables" / f"{name}.json"
        self.head: dict[str, Any] = {
            "settings": settings,
            "environment": env,
            "code": fingerprint(),
        }
        self.rows: dict[str, Any] = {}
        if not fresh and self.path.exists():
            stored = json.loads(self.path.read_text())
            if _dateless(stored) == _dateless(json.loads(json.dumps(self.head))):
                self.rows = stored["rows"]

    def add(self, key: str, row: Any) -> None:
        """Keep a row, on disk as well."""
        self.rows[key] = row
        write(self.path, self.text())

    def text(self, keys: Sequence[str] | None = None) -> str:
        """The rows (those named) with their head, as JSON."""
        rows = {k: self.rows[k] for k in (self.rows if keys is None else keys)}
        return json.dumps({**self.head, "rows": rows}, indent=1) + "\n"


def _dateless(stored: dict[str, Any]) -> dict[str, Any]:
    env = {k: v for k, v in stored["environment"].items() if k != "date"}
    return {"settings": stored["settings"], "environment": env, "code": stored["code"]}


def progress(keys: Sequence[str], done: Sequence[str]) -> Iterator[str]:
    """The keys that are not done, with a progress bar on a terminal and silence elsewhere."""
    columns = (TextColumn("{task.description:20}"), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(keys))
        for key in keys:
            bar.update(task, description=key)
            if key not in done:
                yield key
            bar.advance(task)


def add_arguments(parser: argparse.ArgumentParser, known: Sequence[str]) -> None:
    """The arguments that all tables take: a list of architectures, ``--fresh`` and ``--write``."""
    parser.add_argument("names", metavar="NAME", nargs="*", help="architectures (default: all)")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument(
        "--write",
        action="store_true",
        help="put the table into README.md and docs/ (done anyway when no NAME is given)",
    )
    parser.set_defaults(known=tuple(known))


def chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """The architectures asked for, in their usual order; exits when one is unknown."""
    unknown = sorted(set(options.names) - set(options.known))
    if unknown:
        parser.error(f"unknown architecture '{unknown[0]}': choose from {', '.join(options.known)}")
    return [n for n in options.known if not options.names or n in options.names]
