"""The command line: ``python -m onnx_simplify IN OUT [options]``."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NoReturn, TextIO

import numpy as np
from rich.console import Console

from onnx_simplify import pipeline, streams
from onnx_simplify.errors import CannotVerifyError, ModelError, SimplifyError, first_line
from onnx_simplify.graph.load import load
from onnx_simplify.graph.store import check_writable, save, write_text
from onnx_simplify.isolation import Stage, enter, interrupted
from onnx_simplify.options import PASSES, Options, as_options
from onnx_simplify.planning.profiles import PROFILES
from onnx_simplify.report import Report
from onnx_simplify.runtime.session import silence
from onnx_simplify.tables import print_layers, print_opaque, print_steps, print_summary
from onnx_simplify.version import __version__

_EPILOG = """exit codes:
  0  written and verified
  1  verification failed, nothing written
  2  bad usage, or the input cannot be read or the output not written
  3  could not verify, because the original runs on no input that could be made; nothing written
     (unless --no-verify)
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name.

    Returns:
        The exit code.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.output is None and not options.inspect:
        parser.error("OUT is missing (only --inspect goes without)")
    silence()
    try:
        return _run(options)
    except SimplifyError as error:
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return interrupted()
    except MemoryError:
        return _complain("out of memory, nothing written", 2)
    except Exception as error:
        if os.environ.get("ONNX_SIMPLIFY_DEBUG"):
            raise
        text = f"{type(error).__name__}: {first_line(error)}"
        return _complain(
            f"internal error ({text}), nothing written; ONNX_SIMPLIFY_DEBUG=1 shows where", 2
        )


def _complain(text: str, code: int) -> int:
    line = as_options(" ".join(text.split()))
    print(f"onnx-simplify: {line}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help shows all options)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="onnx-simplify",
        description="Remove the pruned channels of an ONNX model, exactly, and verify the result.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("input", metavar="IN", help="the model; - is the standard input")
    add(
        "output",
        metavar="OUT",
        nargs="?",
        help="where to write the result; may be IN; - is the standard output",
    )
    texts = {f.name: f.metadata.get("help") for f in fields(Options)}
    known = Options()
    small = parser.add_mutually_exclusive_group()
    for flag, (name, how) in _FLAGS.items():
        if how.get("action") == "append":
            how = {**how, "default": []}
        elif how.get("action") is None:
            how = {"default": getattr(known, name), **how}
        group = small if name in ("threshold", "auto_threshold") else parser
        group.add_argument(flag, dest=name, help=texts[name], **how)
    add(
        "--inspect",
        action="store_true",
        help="report per layer what is dead, constant and removable; write nothing",
    )
    add("--json", metavar="FILE", help="write the whole report as JSON (-: standard output)")
    add(
        "--freeze-weights",
        action="store_true",
        help="declare weights final that are graph inputs as well, which a caller could replace",
    )
    add("--save-external-data", action="store_true", help="write large weights to OUT.data")
    add("--quiet", action="store_true", help="print nothing but errors")
    add(
        "--verbose",
        action="store_true",
        help="say what was done to each layer, which nodes were left alone, and why",
    )
    add("--version", action="version", version=f"onnx-simplify {__version__}")
    return parser


def _shape(text: str) -> tuple[str, list[int]]:
    name, _, sizes = text.rpartition(":")
    try:
        shape = [int(s) for s in sizes.replace("x", ",").split(",")] if sizes else []
    except ValueError:
        shape = [0]
    if not name or any(s < 1 for s in shape):
        raise argparse.ArgumentTypeError(f"'{text}' does not look like NAME:1,3,224,224")
    return name, shape


def _positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive whole number")
    return int(text)


def _number(text: str) -> float:
    """The number, or a negative one if it is none."""
    try:
        return float(text)
    except ValueError:
        return -1.0


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 1")
    return value


def _positive_float(text: str) -> float:
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return value


# The flag of each option that has one, and how it is read.
_FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "--pin": ("pinned", {"metavar": "NAME", "action": "append"}),
    "--skip": ("skip", {"metavar": "PASS", "action": "append", "choices": PASSES}),
    "--input-shape": (
        "input_shapes",
        {"metavar": "NAME:1,3,224,224", "action": "append", "type": _shape},
    ),
    "--input-data": ("input_data", {"metavar": "FILE.npz"}),
    "--no-verify": ("verify", {"action": "store_false"}),
    "--rtol": ("rtol", {"metavar": "X", "type": _positive_float}),
    "--check": ("checks", {"metavar": "N", "type": _positive_int}),
    "--benchmark": ("benchmark", {"action": "store_true"}),
    "--tune": ("tune", {"action": "store_true"}),
    "--threads": ("threads", {"metavar": "N", "type": _positive_int}),
    "--target": ("target", {"choices": ["auto", *PROFILES], "default": "auto"}),
    "--channel-multiple": ("channel_multiple", {"metavar": "N", "type": _positive_int}),
    "--threshold": ("threshold", {"metavar": "EPS", "type": _share}),
    "--auto-threshold": ("auto_threshold", {"metavar": "TOL", "type": _positive_float}),
}


def _run(arguments: argparse.Namespace) -> int:
    text = io.StringIO()
    width = shutil.get_terminal_size((100, 24)).columns
    console = Console(file=text, quiet=arguments.quiet, highlight=False, width=width)
    _check_places(arguments)
    streamed = not arguments.inspect and streams.is_output(arguments.output)
    given = vars(arguments)
    if arguments.input_data is not None:
        given["input_data"] = _read_data(arguments.input_data)
    given["verify"] &= not arguments.inspect
    options = Options.of(given)
    original = load(
        streams.read_input() if streams.is_input(arguments.input) else arguments.input,
        freeze_weights=arguments.freeze_weights,
    )
    with _progress(arguments.quiet) as progress:
        options.progress = progress
        try:
            model, report = pipeline.run(original, options)
        except CannotVerifyError as error:
            raise CannotVerifyError(f"{error} (or --no-verify)") from error
        if not arguments.inspect and not streamed:
            progress("writing")
            beside = f"{os.path.realpath(arguments.output)}.data"
            before = os.stat(beside).st_ino if os.path.exists(beside) else None
            enter(Stage.WRITING)
            size = save(
                model,
                arguments.output,
                external=arguments.save_external_data,
                complete=lambda: enter(Stage.FINISHING),
            )
            report.after.bytes = size
            if before is not None and os.path.exists(beside) and os.stat(beside).st_ino == before:
                report.notes.append(f"{beside} is as it was: the new model does not need it")
    if streamed:
        report.after.bytes = streams.write_model(model)
    if arguments.json is not None:
        _write_json(report, arguments)
    if arguments.inspect:
        print_layers(console, report)
    else:
        print_summary(console, report)
    if arguments.verbose:
        print_steps(console, report)
    if arguments.verbose or arguments.inspect:
        print_opaque(console, report)
    taken = streamed or streams.is_output(arguments.json)
    _show(text.getvalue(), arguments, sys.stderr if taken else sys.stdout)
    return 0


def _check_places(arguments: argparse.Namespace) -> None:
    """Complain about where to write before all the work.

    Raises:
        ModelError: something cannot be written there.
    """
    model = None if arguments.inspect else arguments.output
    if streams.is_output(model):
        if streams.is_output(arguments.json):
            raise ModelError("OUT and --json cannot both be the standard output: name a file")
        if arguments.save_external_data:
            raise ModelError("--save-external-data needs an output file, not the standard output")
        streams.check_output()
    elif model is not None:
        check_writable(model, external=arguments.save_external_data)
    if arguments.json is not None and not streams.is_output(arguments.json):
        check_writable(arguments.json)
        for other in (arguments.input, arguments.output):
            if other is not None and os.path.realpath(other) == os.path.realpath(arguments.json):
                raise ModelError(f"--json: {arguments.json} is the model: name another file")


def _show(text: str, arguments: argparse.Namespace, stream: TextIO | None) -> None:
    """Print a report."""
    try:
        streams.show(text, stream)
    except OSError as error:
        what = "" if arguments.inspect else "the model was written, but "
        raise ModelError(
            f"{what}the report cannot be printed: {error.strerror or error}"
        ) from error


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A status line on a terminal; silence elsewhere."""
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("loading") as status:
        yield lambda text: status.update(text)


def _read_data(path: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (
        OSError,
        ValueError,
        AttributeError,
        EOFError,
        TypeError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ModelError(f"--input-data: {path} is not an .npz file of arrays") from error


def _write_json(report: Report, arguments: argparse.Namespace) -> None:
    content = {
        "version": __version__,
        "input": arguments.input,
        "output": None if arguments.inspect else arguments.output,
        **report.to_dict(),
    }
    text = json.dumps(content, indent=2) + "\n"
    if streams.is_output(arguments.json):
        _show(text, arguments, sys.stdout)
    else:
        enter(Stage.FINISHING)
        write_text(arguments.json, text)
