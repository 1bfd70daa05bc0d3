"""Which architectures survive each step: the worst relative error after each of the three.

    python scripts/status_table.py [NAME ...] [--exporters ...] [--protocols ...] [--write]

For every torchvision architecture, pruned by P1-80 (80% of the filters of every convolution
and of the weights of every BatchNorm, chosen independently) and by P1 (half of the filters), and
exported with both exporters: fold BatchNorm, propagate biases, remove channels, and compare after
each step with the network as exported, in onnxruntime. A tick stands for errors up to 1e-5.

The table goes between the markers of README.md, with every single figure in docs/status.json, when
no NAME is given or with --write. An interrupted run goes on where it stopped. Needs the ``torch``
extra.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import publish
from architectures import EXPORTERS, LIMIT, models, passes
from onnx_simplify.errors import first_line

STEPS = ("BatchNorm folding", "bias propagation", "simplification")
PROTOCOLS = ("P1-80", "P1")
PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime")
Row = dict[str, Any]


def measure(name: str, protocol: str, exporter: str) -> Row:
    """Relative errors after the steps, or the error that stopped them."""
    import onnx_simplify

    errors: list[float] = []
    try:
        (dense,) = models(name, protocol, exporter)
        for model in passes(dense):
            errors.append(onnx_simplify.verify(dense, model).worst)
    except Exception as error:  # whatever it is belongs in the table
        return {"errors": errors, "stopped": f"{type(error).__name__}: {first_line(error)}"}
    return {"errors": errors, "stopped": None}


def cell(rows: Sequence[Row], step: int) -> str:
    """The worst of several measurements of one step."""
    if any(len(row["errors"]) < step for row in rows):
        return "—"  # skipped: the step before failed
    if any(len(row["errors"]) == step for row in rows):
        return "⚠ error"
    worst = max(row["errors"][step] for row in rows)
    return f"{'✔' if worst <= LIMIT else '✘'} {worst:.0e}"


def table(rows: dict[str, Row], names: Sequence[str]) -> str:
    """All architectures, each with the worst of its protocols and exporters."""
    lines = []
    for name in names:
        own = [row for key, row in rows.items() if key.split()[0] == name]
        lines.append([name, *(cell(own, step) for step in range(len(STEPS)))])
    return publish.markdown(("architecture", *STEPS), lines)


def is_good(row: Row) -> bool:
    """Whether all steps were made and are exact."""
    return row["stopped"] is None and max(row["errors"]) <= LIMIT


def main() -> int:
    """Measure and print the table; exit code 1 if a cell is no tick."""
    import torch

    from torch_bridge import zoo

    parser = argparse.ArgumentParser(description="Worst relative error after each step.")
    publish.add_arguments(parser, zoo.ARCHITECTURES)
    parser.add_argument("--protocols", nargs="+", default=PROTOCOLS, choices=zoo.PROTOCOLS)
    parser.add_argument("--exporters", nargs="+", default=EXPORTERS, choices=EXPORTERS)
    options = parser.parse_args()
    names = publish.chosen(parser, options)
    torch.set_num_threads(1)
    env = publish.environment(*PACKAGES)
    results = publish.Results("status", {"limit": LIMIT}, env, options.fresh)
    keys = [f"{n} {p} {e}" for n in names for p in options.protocols for e in options.exporters]
    for key in publish.progress(keys, list(results.rows)):
        results.add(key, measure(*key.split()))
        if not is_good(results.rows[key]):
            print(key, results.rows[key], file=sys.stderr)
    rows = {key: results.rows[key] for key in keys}
    text = table(rows, names)
    note = (
        f"Worst relative error after each step, over {' and '.join(options.protocols)} and the "
        f"exporters {' and '.join(options.exporters)}. ✔: at most {LIMIT:.0e}; ✘: differs; "
        "⚠: an exception; —: skipped, as the step before failed.\n\n"
        f"{publish.describe(results.head['environment'])}"
    )
    print(f"{text}\n\n{note}")
    if options.write or not options.names:
        publish.replace_section(publish.ROOT / "README.md", "status", f"{text}\n\n{note}")
        publish.write(publish.ROOT / "docs" / "status.json", results.text(keys))
    return 0 if all(map(is_good, rows.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
