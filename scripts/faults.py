"""Damage models, kill the process, let two write at once: what must never go wrong.

    python scripts/faults.py mutants [FIRST LAST]    damaged model files (default: 0 2000)
    python scripts/faults.py kills [COUNT]           SIGKILL at random moments (default: 100)
    python scripts/faults.py writers [COUNT]         two runs on the same output (default: 20)

--write puts the result into docs/robustness.md.

A mutant may be refused (exit code 1 to 3, one line on the standard error, the output file
untouched) or simplified (then original and result are compared once more). Anything else is a
failure: a traceback, an internal error, a crash that no message tells of, more than 60 seconds.
Mutants that fail are saved as build/faults/SEED.onnx. Exit code 1 if anything failed. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime as ort  # noqa: E402
from google.protobuf.message import Message  # noqa: E402

import publish  # noqa: E402

SAMPLE = ROOT / "scripts" / "sample" / "pruned_residual_cnn.onnx"
WRITE = False
_SECONDS = 60
_BASES = 150
_UNTOUCHED = b"what was there before"
_LOCATIONS = ("../../etc/passwd", "/etc/passwd", "", ".", "missing", "in.onnx", "a\0b", "x" * 5000)


def base(seed: int) -> onnx.ModelProto:
    """A valid model to damage: a random graph, or the sample of the repository."""
    from random_graphs import random_model

    return random_model(seed) if seed % 10 else onnx.load(SAMPLE)


def mutant(seed: int) -> bytes:
    """A damaged model file."""
    dice = random.Random(seed)
    model = base(dice.randrange(_BASES))
    if dice.random() < 0.4:
        data = bytearray(model.SerializeToString())
        dice.choice([_flip, _truncate, _cut, _repeat])(data, dice)
        return bytes(data)
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        dice.choice(_FIELD_MUTATIONS)(model, dice)
    return model.SerializeToString()


def _flip(data: bytearray, dice: random.Random) -> None:
    for _ in range(dice.choice([1, 1, 2, 8, 64])):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _truncate(data: bytearray, dice: random.Random) -> None:
    del data[dice.randrange(len(data)) :]


def _cut(data: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(data))
    del data[start : start + dice.randrange(1, 200)]


def _repeat(data: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(data))
    data[start:start] = data[start : start + dice.randrange(1, 200)]


def _messages(message: Message) -> Iterator[Message]:
    """A message and all messages inside."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in value if field.is_repeated else (value,):
                yield from _messages(inner)


def _some_field(model: onnx.ModelProto, dice: random.Random) -> None:
    """Another value for some field of some message."""
    message = dice.choice(list(_messages(model)))
    fields = [(f, v) for f, v in message.ListFields() if f.type != f.TYPE_MESSAGE]
    if not fields:
        return
    field, value = dice.choice(fields)
    new = _another(field.type, value, dice, field)
    if not field.is_repeated:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            setattr(message, field.name, new)
    elif value:
        kind = dice.randrange(4)
        place = dice.randrange(len(value))
        if kind == 0:
            del value[place]
        elif kind == 1:
            value.append(value[place])
        else:
            with contextlib.suppress(ValueError, TypeError, OverflowError):
                value[place] = _another(field.type, value[place], dice, field)


def _another(kind: int, value: object, dice: random.Random, field: object) -> object:
    if kind in (1, 2):
        return dice.choice([0.0, -1.0, float("nan"), float("inf"), 1e30, 1e-40])
    if kind == 9:
        return dice.choice(["", "x", "é" * 50, str(value)[:-1], str(value) + "_", "../x", "a\0b"])
    if kind == 12:
        raw = bytearray(value if isinstance(value, bytes) else b"")
        if raw:
            _flip(raw, dice)
        return bytes(raw) if dice.random() < 0.7 else bytes(raw[: len(raw) // 2])
    if kind == 8:
        return not value
    number = value if isinstance(value, int) else 0
    return dice.choice(
        [0, -1, 1, 2, number + 1, number - 1, number * 2, -number, 7, 2**31 - 1, 2**62, -(2**63)]
    )


def _swap_inputs(model: onnx.ModelProto, dice: random.Random) -> None:
    nodes = [n for n in model.graph.node if n.input]
    if nodes:
        one, two = dice.choice(nodes), dice.choice(nodes)
        i, k = dice.randrange(len(one.input)), dice.randrange(len(two.input))
        one.input[i], two.input[k] = two.input[k], one.input[i]


def _swap_operators(model: onnx.ModelProto, dice: random.Random) -> None:
    one, two = dice.choice(model.graph.node), dice.choice(model.graph.node)
    one.op_type, two.op_type = two.op_type, one.op_type


def _swap_data(model: onnx.ModelProto, dice: random.Random) -> None:
    if model.graph.initializer:
        one, two = dice.choice(model.graph.initializer), dice.choice(model.graph.initializer)
        name, other = one.name, two.name
        copy = onnx.TensorProto.FromString(one.SerializeToString())
        one.CopyFrom(two)
        two.CopyFrom(copy)
        one.name, two.name = name, other


def _drop(model: onnx.ModelProto, dice: random.Random) -> None:
    graph = model.graph
    rows = dice.choice([graph.node, graph.initializer, graph.input, graph.output])
    if rows:
        del rows[dice.randrange(len(rows))]


def _double(model: onnx.ModelProto, dice: random.Random) -> None:
    graph = model.graph
    rows = dice.choice([graph.node, graph.initializer, graph.input, graph.output])
    if rows:
        rows.append(dice.choice(rows))


def _external(model: onnx.ModelProto, dice: random.Random) -> None:
    if model.graph.initializer:
        tensor = dice.choice(model.graph.initializer)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=dice.choice(_LOCATIONS))
        tensor.external_data.add(key="offset", value=dice.choice(["0", "-1", "x", str(2**70)]))
        tensor.external_data.add(key="length", value=dice.choice(["4", "-4", "", str(2**40)]))


def _opset(model: onnx.ModelProto, dice: random.Random) -> None:
    model.opset_import[0].version = dice.choice([0, -1, 1, 5, 9, 12, 13, 17, 18, 20, 23, 99, 2**62])
    if dice.random() < 0.2:
        model.opset_import[0].domain = dice.choice(["ai.onnx.ml", "com.microsoft", "x"])


_FIELD_MUTATIONS: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    _some_field, _some_field, _some_field, _some_field, _swap_inputs, _swap_operators, _swap_data,
    _drop, _double, _external, _opset,
)  # fmt: skip


@dataclass
class Outcome:
    """What became of one mutant: ``ok``, ``refused``, ``crash told`` or a failure."""

    seed: int
    kind: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        """Whether this must not happen."""
        return self.kind not in ("ok", "refused", "crash told")


def try_mutant(seed: int) -> Outcome:
    """Run the command line on one mutant, in a forked process."""
    data = mutant(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source, result, errors = folder / "in.onnx", folder / "out.onnx", folder / "errors"
        source.write_bytes(data)
        result.write_bytes(_UNTOUCHED)
        child = os.fork()
        if child == 0:
            _child(source, result, errors)
        code = _wait(child)
        text = errors.read_text(errors="replace")
        outcome = _judge(seed, code, text, source, result)
        left = {p.name for p in folder.iterdir()} - {"in.onnx", "out.onnx", "errors"}
        if left and not outcome.failed:
            outcome = Outcome(seed, "left behind", ", ".join(left))
    if outcome.failed:
        path = ROOT / "build" / "faults" / f"{seed}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return outcome


def _child(source: Path, result: Path, errors: Path) -> None:
    """Be the command line."""
    from onnx_simplify.__main__ import main

    target = os.open(errors, os.O_WRONLY | os.O_CREAT)
    os.dup2(target, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.setpgid(0, 0)
    sys.argv = ["onnx-simplify", str(source), str(result)]
    code = 99
    try:
        code = main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException as error:
        os.write(2, f"Traceback: {type(error).__name__}: {error}\n".encode(errors="replace"))
    finally:
        os._exit(code)


def _wait(child: int) -> int | None:
    """The exit code, or None after too long a time."""
    patience = time.monotonic() + _SECONDS
    while time.monotonic() < patience:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _judge(seed: int, code: int | None, text: str, source: Path, result: Path) -> Outcome:
    if code is None:
        return Outcome(seed, "hang")
    if code not in (0, 1, 2, 3):
        return Outcome(seed, "crash", f"exit code {code}: {text[-200:]}")
    if "Traceback" in text or "internal error" in text:
        return Outcome(seed, "internal error", text[-300:])
    if code:
        if result.read_bytes() != _UNTOUCHED:
            return Outcome(seed, "output touched", text)
        if "crashed" in text:
            return Outcome(seed, "crash told", text.splitlines()[-1])
        if text.count("\n") != 1:
            return Outcome(seed, "not one line", text)
        return Outcome(seed, "refused", text)
    child = os.fork()
    if child == 0:
        try:
            gap = compare(source, result)
        except Exception:  # what cannot be run twice cannot be compared
            gap = 0.0
        os._exit(gap > 2e-2)
    return Outcome(seed, "mismatch") if _wait(child) else Outcome(seed, "ok")


def compare(source: Path, result: Path) -> float:
    """The largest relative error, on inputs made by another generator than the tool's."""
    from onnx_simplify.runtime.difference import difference
    from random_graphs import random_feeds

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers = ["CPUExecutionProvider"]
    before, after = (
        ort.InferenceSession(str(p), options, providers=providers) for p in (source, result)
    )
    ties = any(n.op_type in ("ArgMax", "Greater", "TopK") for n in onnx.load(source).graph.node)
    worst = 0.0
    for number in range(2):
        feeds = random_feeds(onnx.load(source), number)
        for a, b in zip(before.run(None, feeds), after.run(None, feeds), strict=True):
            if np.isfinite(np.asarray(a)).all():
                worst = max(worst, difference(a, b, ties)[0])
    return worst


def mutants(first: int, last: int) -> int:
    """Try all mutants; returns the number of failures."""
    from rich.console import Console
    from rich.progress import track

    import onnx_simplify  # noqa: F401 - children are forked with everything imported

    counts: Counter[str] = Counter()
    failures = 0
    console = Console(stderr=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        outcomes = pool.map(try_mutant, range(first, last), chunksize=4)
        for outcome in track(
            outcomes, total=last - first, console=console, disable=not console.is_terminal
        ):
            counts[outcome.kind] += 1
            failures += outcome.failed
            if outcome.failed or outcome.kind == "crash told":
                print(f"{outcome.seed}: {outcome.kind}: {outcome.detail.strip()[:300]}", flush=True)
    told = counts["crash told"]
    say(
        "mutants",
        f"{last - first:,} damaged models: {counts['refused'] + told:,} refused with one line "
        f"({told} of them because native code crashed), {counts['ok']:,} simplified and equal, "
        f"{failures} failures.",
    )
    return failures


def say(marker: str, text: str) -> None:
    """Print a result and, if that was asked for, put it into docs/robustness.md."""
    print(text, flush=True)
    if WRITE:
        publish.replace_section(ROOT / "docs" / "robustness.md", marker, text)


def _command(source: Path, result: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "onnx_simplify", str(source), str(result), "--quiet", *options]


def kills(count: int) -> int:
    """Kill runs that replace a model or a pair of files; returns the number of failures."""
    dice = random.Random(0)
    failures = done = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result = folder / "out.onnx"
        start = time.monotonic()
        subprocess.run(_command(SAMPLE, result, "--save-external-data"), cwd=ROOT, check=True)
        seconds = time.monotonic() - start
        for number in range(count):
            options = ["--save-external-data"] if number % 2 else []
            options += ["--channel-multiple", str(1 + number % 4)]
            process = subprocess.Popen(_command(SAMPLE, result, *options), cwd=ROOT)
            # Most of the moments near the end, where files are written.
            time.sleep(seconds * dice.choice([dice.uniform(0, 1), dice.uniform(0.7, 1.1)]))
            process.send_signal(signal.SIGKILL)
            done += process.wait() == 0
            time.sleep(0.05)
            try:
                gap = compare(SAMPLE, result)
            except Exception as error:
                gap = float("inf")
                print(f"{number}: {error}")
            left = [p.name for p in folder.iterdir() if p.name not in ("out.onnx", "out.onnx.data")]
            # One killed process leaves one folder, which the next run removes.
            if gap > 1e-4 or len(left) > 2:
                failures += 1
                print(f"{number}: error {gap:.1e}, left behind: {left}", flush=True)
        subprocess.run(_command(SAMPLE, result), cwd=ROOT, check=True)
        left = [p.name for p in folder.iterdir() if p.name not in ("out.onnx", "out.onnx.data")]
        failures += bool(left)
    say("kills", f"{count} kills ({done} came too late): {failures} failures.")
    return failures


def writers(count: int) -> int:
    """Two runs at once on one output, different each; returns the number of failures."""
    failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary, "out.onnx")
        for number in range(count):
            kinds = [["--save-external-data"], ["--channel-multiple", "1"]]
            kinds[1] += ["--save-external-data"] * (number % 2)
            both = [subprocess.Popen(_command(SAMPLE, result, *k), cwd=ROOT) for k in kinds]
            codes = [p.wait() for p in both]
            gap = compare(SAMPLE, result)
            names = {p.name for p in result.parent.iterdir()} - {"out.onnx", "out.onnx.data"}
            if any(codes) or gap > 1e-4 or names:
                failures += 1
                print(f"{number}: exit codes {codes}, error {gap:.1e}, left: {names}", flush=True)
    say("writers", f"{count} pairs of runs: {failures} failures.")
    return failures


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    each = kinds.add_parser("mutants")
    each.add_argument("first", type=int, nargs="?", default=0)
    each.add_argument("last", type=int, nargs="?", default=2000)
    for name, default in (("kills", 100), ("writers", 20)):
        kinds.add_parser(name).add_argument("count", type=int, nargs="?", default=default)
    for each in kinds.choices.values():
        each.add_argument("--write", action="store_true", help="write docs/robustness.md")
    options = parser.parse_args()
    global WRITE
    WRITE = options.write
    if options.kind == "mutants":
        return bool(mutants(options.first, options.last))
    return bool((kills if options.kind == "kills" else writers)(options.count))


if __name__ == "__main__":
    sys.exit(main())
