"""Simplify every model of onnx's own backend tests: the result must be equal, or refused.

    python scripts/backend_tests.py [NAME ...] [--jobs N] [--write]

The models are those that the installed onnx package has: one per example of each operator, small
models, and what torch exported once. A NAME is a part of a model's name.

Original and result run in onnxruntime on the test's own inputs. What counts as refused is an error
that the tool raises on purpose, with one line. Each model has a worker process that may crash, so
that a crash is a row and not the end. Models that are *wrong* (the result differs, or fails where
the original runs) or *crash* (another exception, native code, more than 120 seconds) are saved as
build/backend_tests/NAME.onnx. --write puts the counts into docs/robustness.md. Exit code 1 if any
is wrong or crashes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime as ort  # noqa: E402
from onnx import numpy_helper  # noqa: E402

_KINDS = ("simple", "pytorch-operator", "pytorch-converted")
_SECONDS = 120
_FOLDER = ROOT / "build" / "backend_tests"
_TOLERANCE = 2e-5
# Of numbers with less bits, so many of the last place (as a share of the largest magnitude).
_LAST_PLACES = 8


@dataclass
class Case:
    """A model, and lists of inputs in the order of the graph's."""

    name: str
    model: bytes
    inputs: list[list[Any]] = field(default_factory=list)


@dataclass
class Row:
    """What became of a model: ``equal``, ``refused``, ``wrong`` or ``crash``.

    Attributes:
        kind: one of these.
        detail: what differs, or the error.
        reason: what errors of this kind have in common, for the counts.
        compared: whether the original runs on any of the test's inputs.
        given: whether the tool was given these, because it could make up none.
    """

    kind: str
    detail: str = ""
    reason: str = ""
    compared: bool = True
    given: bool = False


def cases() -> Iterator[Case]:
    """All models of the installed package that have a file or are made by its examples."""
    from onnx.backend.test.loader import load_model_tests

    def inputs(folder: Path, graph: onnx.GraphProto) -> Iterator[Any]:
        for position, info in enumerate(graph.input):
            path = folder / f"input_{position}.pb"
            if not path.exists():  # an initializer
                return
            if info.type.HasField("sequence_type"):
                sequence = onnx.SequenceProto.FromString(path.read_bytes())
                yield numpy_helper.to_list(sequence)
            else:
                yield numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))

    for kind in _KINDS:
        for test in sorted(load_model_tests(kind=kind), key=lambda t: t.name):
            folder = Path(str(test.model_dir))
            model = onnx.load(folder / "model.onnx")
            sets = [list(inputs(f, model.graph)) for f in sorted(folder.glob("test_data_set_*"))]
            yield Case(f"{kind}/{test.name}", model.SerializeToString(), sets)
    for test in load_model_tests(kind="node"):
        sets = [
            [numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else v for v in given]
            for given, _ in test.data_sets or ()
        ]
        assert test.model is not None
        yield Case(f"node/{test.name}", test.model.SerializeToString(), sets)


def examine(case: Case) -> Row:
    """Simplify one model and compare; where no inputs can be made up, the test's own are given."""
    row = _examine(case, None)
    if row.kind == "refused" and case.inputs and all(hasattr(v, "dtype") for v in case.inputs[0]):
        names = [i.name for i in onnx.ModelProto.FromString(case.model).graph.input]
        other = _examine(case, dict(zip(names, case.inputs[0], strict=False)))
        return row if other.kind == "refused" else replace(other, given=True)
    return row


def _examine(case: Case, data: dict[str, Any] | None) -> Row:
    import onnx_simplify
    from onnx_simplify.errors import SimplifyError

    try:
        result, _ = onnx_simplify.simplify(case.model, input_data=data)
    except SimplifyError as error:
        text = str(error)
        if not text or "\n" in text:
            return Row("crash", f"not one line: {text!r}")
        return Row("refused", text, re.sub("'[^']*'", "...", re.split(r": | \(", text)[0]))
    except Exception as error:
        return Row("crash", f"{type(error).__name__}: {error}")
    try:
        onnx.checker.check_model(result)
    except Exception as error:
        return Row("wrong", f"the result is invalid: {error}")
    return _compare(case, result.SerializeToString())


def _compare(case: Case, result: bytes) -> Row:
    from fuzzing import difference, open_session

    try:
        before, again = open_session(case.model), open_session(case.model)
    except Exception:  # no kernels for bfloat16, which the tool compares in float32
        return Row("equal", compared=False)
    try:
        after = open_session(result)
    except Exception as error:
        return Row("wrong", f"the result does not load: {error}")
    for side in ("get_inputs", "get_outputs"):
        sides = [[(v.name, v.type) for v in getattr(s, side)()] for s in (before, after)]
        if sides[0] != sides[1]:
            return Row("wrong", f"{side[4:]} became {sides[1]}")
    names, compared = [v.name for v in before.get_inputs()], False
    for inputs in case.inputs:
        feeds = {n: _feed(v) for n, v in zip(names, inputs, strict=False)}
        try:
            first, second = _run(before, feeds), _run(again, feeds)
        except Exception:  # of values, like those of types that onnxruntime cannot be given
            continue
        compared = True
        try:
            found = _run(after, feeds)
        except Exception as error:
            return Row("wrong", f"the result does not run: {error}")
        for info, a, b, c in zip(before.get_outputs(), first, second, found, strict=True):
            # Where the original does not agree with itself its numbers are random.
            exact = difference(a, b) == 0
            gap = difference(a, c) if exact else 0.0
            if not gap <= _bound(info.type):
                return Row("wrong", f"'{info.name}' differs by {gap:.1e} of its magnitude")
    return Row("equal", compared=compared)


def _bound(kind: str) -> float:
    """How far a result of this type may be off, relative to the largest magnitude."""
    bits = {"float16": 10, "bfloat16": 7}
    places = [b for name, b in bits.items() if f"({name})" in kind]
    return _LAST_PLACES * 2.0 ** -places[0] if places else _TOLERANCE


def _feed(value: Any) -> Any:
    """A value as onnxruntime takes it."""
    value = np.asarray(value) if isinstance(value, np.generic) else value
    if not isinstance(value, np.ndarray) or value.dtype.type.__module__ != "ml_dtypes":
        return value
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    raw = value.view(f"u{value.dtype.itemsize}")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, kind)


def _run(session: Any, feeds: dict[str, Any]) -> list[Any]:
    """All outputs, those of numpy's and of other types."""
    if not any(isinstance(v, ort.OrtValue) for v in feeds.values()):
        return list(session.run(None, feeds))
    values = {
        n: v if isinstance(v, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(v)
        for n, v in feeds.items()
    }
    return [v.numpy() for v in session.run_with_ort_values(None, values)]


def _serve(pipe: Connection) -> None:
    """What a worker does: examine what it is sent."""
    from onnx_simplify.runtime.session import silence

    warnings.simplefilter("ignore")
    silence()
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        pipe.send(examine(case))


class Worker:
    """A process that examines one model at a time, and is replaced when one brings it down."""

    def __init__(self) -> None:
        """Start the process."""
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def examine(self, case: Case) -> Row:
        """What became of a model; the worker cannot be used again if it died."""
        try:
            self.pipe.send(case)
            if self.pipe.poll(_SECONDS):
                row: Row = self.pipe.recv()
                return row
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Row("crash", f"the process died ({name})")
        self.process.kill()
        self.process.join()
        return Row("crash", f"more than {_SECONDS} seconds")


def main() -> int:
    """Examine the models, print the counts and those that fail."""
    from rich.console import Console
    from rich.progress import track

    import publish

    parser = argparse.ArgumentParser(description="Simplify the models of onnx's backend tests.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="parts of names (default: all)")
    parser.add_argument("--write", action="store_true", help="write docs/robustness.md")
    parser.add_argument("--verbose", action="store_true", help="print those refused as well")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the examples' arithmetic
        known = list(cases())
    chosen = [c for c in known if not options.names or any(n in c.name for n in options.names)]
    local, console = threading.local(), Console(stderr=True)

    def work(case: Case) -> Row:
        if not getattr(local, "worker", None) or not local.worker.process.is_alive():
            local.worker = Worker()
        row: Row = local.worker.examine(case)
        return row

    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    alone = given = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = zip(chosen, pool.map(work, chosen), strict=True)
        for case, row in track(
            rows, total=len(chosen), console=console, disable=not console.is_terminal
        ):
            counts[row.kind] += 1
            reasons[row.reason] += bool(row.reason)
            alone += not row.compared
            given += row.given and row.kind == "equal"
            if row.kind in ("wrong", "crash"):
                publish.write(_FOLDER / f"{Path(case.name).name}.onnx", case.model)
            if row.kind != "equal" and (row.kind != "refused" or options.verbose):
                print(f"{case.name}: {row.kind}: {row.detail[:300]}", flush=True)
            elif options.verbose and not row.compared:
                print(f"{case.name}: compared by the tool alone", flush=True)
    text = (
        f"{len(chosen):,} models: {counts['equal']:,} equal ({given} of them when given the "
        f"test's inputs, {alone} by the tool's own verification alone), "
        f"{counts['refused']:,} refused, {counts['wrong']} wrong, {counts['crash']} crashed.\n"
    )
    text += "".join(f"\n- {n} refused: {why}" for why, n in reasons.most_common() if n)
    print(text)
    if options.write:
        publish.replace_section(ROOT / "docs" / "robustness.md", "backend", text)
    return 1 if counts["wrong"] or counts["crash"] else 0


if __name__ == "__main__":
    sys.exit(main())
