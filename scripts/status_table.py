"""Which architectures survive each step: the worst relative error after each of the three.

    python scripts/status_table.py [NAME ...] [--exporters ...] [--protocols ...] [--write]

For every torchvision architecture, exported with both exporters, BatchNorm left in the export:

* pruned by P1-80 (80% of the filters of every convolution) and by P1 (half of them), for one
  image: fold BatchNorm, propagate biases, remove channels;
* pruned by P1-seed (80% of the filters of every convolution and of the weights of every BatchNorm,
  chosen independently), for one image and for any number of them: the same step by step, the same
  without folding BatchNorm, and ``simplify`` at once.

After each step the model is compared with the network as exported, in onnxruntime, on a batch of
four where its size is free. A tick stands for errors up to 1e-5. Networks that P1-seed leaves so
little of that their output is the same for all images are compared all the same, and named.

The table goes between the markers of README.md, with every single figure in docs/status.json, when
no NAME is given or with --write. An interrupted run goes on where it stopped. Needs the ``torch``
extra.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import onnx

import publish
from architectures import EXPORTERS, LIMIT, models, passes
from onnx_simplify.errors import CannotVerifyError, first_line
from onnx_simplify.graph.load import load
from onnx_simplify.runtime.difference import difference
from onnx_simplify.runtime.reference import Reference
from onnx_simplify.runtime.session import Session

STEPS = ("BatchNorm folding", "bias propagation", "simplification")
SEED = "P1-seed"
PROTOCOLS = ("P1-80", "P1", SEED)
BATCHES = ("static", "dynamic")
PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime")
Row = dict[str, Any]


def at_once(dense: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """The model that `simplify` makes."""
    import onnx_simplify

    yield onnx_simplify.simplify(dense)[0]


def unfolded(dense: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """The model after each pass, without the folding of BatchNorm."""
    return passes(dense, fold=False)


# Ways to simplify, each with the title of its column.
WAYS: dict[str, tuple[str, Callable[[onnx.ModelProto], Iterator[onnx.ModelProto]]]] = {
    "at-once": (f"{SEED}: at once", at_once),
    "steps": (f"{SEED}: step by step", passes),
    "unfolded": (f"{SEED}: BatchNorm kept", unfolded),
}


def keys(names: Sequence[str], protocols: Sequence[str], exporters: Sequence[str]) -> list[str]:
    """What to measure: architecture, protocol, exporter, batch and way.

    Those of one exported model follow each other.
    """
    return [
        f"{name} {protocol} {exporter} {batch} {way}"
        for name in names
        for protocol in protocols
        for exporter in exporters
        for batch in (BATCHES if protocol == SEED else BATCHES[:1])
        for way in (WAYS if protocol == SEED else ("steps",))
    ]


@lru_cache(maxsize=1)
def original(
    name: str, protocol: str, exporter: str, batch: str
) -> tuple[onnx.ModelProto, Reference]:
    """The model as exported, and its outputs."""
    dynamic = batch == "dynamic"
    (dense,) = models(name, protocol, exporter, dynamic)
    image = dense.graph.input[0]
    shape = [d.dim_value for d in image.type.tensor_type.shape.dim]
    shape[0] = 4 if dynamic else 1
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    return dense, Reference(load(dense), input_data={image.name: images})


def error(reference: Reference, model: onnx.ModelProto) -> float:
    """The relative error; infinite where that is small, but so is what varies in the outputs."""
    try:
        found = reference.compare(load(model))
    except CannotVerifyError:  # nothing varies: to be equal is all that can be asked
        session = Session(load(model), optimize=True)
        runs = [(run.outputs, session.run(run.feeds)) for run in reference.runs]
        return max(difference(before, after)[0] for before, after in runs)
    return found.worst if found.passed or found.worst > LIMIT else float("inf")


def measure(name: str, protocol: str, exporter: str, batch: str, way: str) -> Row:
    """Relative errors after the steps, the error that stopped them, and whether nothing varies."""
    row: Row = {"errors": [], "stopped": None}
    try:
        dense, reference = original(name, protocol, exporter, batch)
        row["constant"] = bool(reference.mute())
        for model in WAYS[way][1](dense):
            row["errors"].append(error(reference, model))
    except Exception as stop:  # whatever it is belongs in the table
        row["stopped"] = f"{type(stop).__name__}: {first_line(stop)}"
    return row


def cell(rows: Sequence[Row], step: int) -> str:
    """The worst of several measurements of one step."""
    if any(len(row["errors"]) < step for row in rows):
        return "—"  # skipped: the step before failed
    if any(len(row["errors"]) == step for row in rows):
        return "⚠ error"
    return tick(max(row["errors"][step] for row in rows))


def whole(rows: Sequence[Row]) -> str:
    """The worst of several measurements of all steps."""
    if any(row["stopped"] for row in rows):
        return "⚠ error"
    return tick(max(max(row["errors"]) for row in rows))


def tick(worst: float) -> str:
    """An error and whether it is small enough."""
    return f"{'✔' if worst <= LIMIT else '✘'} {worst:.0e}"


def table(rows: dict[str, Row], names: Sequence[str]) -> str:
    """All architectures, each with the worst of its exporters, and of protocols or batches."""
    split = [(key.split(), row) for key, row in rows.items()]
    plain = any(key[1] != SEED for key, _ in split)
    seed = any(key[1] == SEED for key, _ in split)
    lines = []
    for name in names:
        line = [name]
        if plain:
            own = [row for key, row in split if key[0] == name and key[1] != SEED]
            line += [cell(own, step) for step in range(len(STEPS))]
        if seed:
            for way in WAYS:
                own = [r for key, r in split if key[:2] == [name, SEED] and key[-1] == way]
                line.append(whole(own))
        lines.append(line)
    titles = [*(STEPS if plain else ()), *(t for t, _ in WAYS.values() if seed)]
    return publish.markdown(("architecture", *titles), lines)


def note(protocols: Sequence[str], exporters: Sequence[str], rows: dict[str, Row]) -> str:
    """What the table holds."""
    constant = dict.fromkeys(key.split()[0] for key, row in rows.items() if row.get("constant"))
    plain = " and ".join(p for p in protocols if p != SEED)
    lines = [f"Worst relative error over the exporters {' and '.join(exporters)}"]
    if plain:
        lines.append(f", after each step over {plain}")
    if SEED in protocols:
        lines.append(
            f"; over all steps for {SEED}, over batches of fixed size and of any, "
            "the latter compared on four images"
        )
    lines.append(
        f". ✔: at most {LIMIT:.0e}; ✘: differs; ⚠: an exception; "
        "—: skipped, as the step before failed."
    )
    if constant:
        lines.append(f" The same for all images is the output of {', '.join(constant)}.")
    return "".join(lines)


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
    wanted = keys(names, options.protocols, options.exporters)
    for key in publish.progress(wanted, list(results.rows)):
        results.add(key, measure(*key.split()))
        if not is_good(results.rows[key]):
            print(key, results.rows[key], file=sys.stderr)
    rows = {key: results.rows[key] for key in wanted}
    text = table(rows, names)
    legend = (
        f"{note(options.protocols, options.exporters, rows)}\n\n"
        f"{publish.describe(results.head['environment'])}"
    )
    print(f"{text}\n\n{legend}")
    if options.write or not options.names:
        publish.replace_section(publish.ROOT / "README.md", "status", f"{text}\n\n{legend}")
        publish.write(publish.ROOT / "docs" / "status.json", results.text(wanted))
    return 0 if all(map(is_good, rows.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
