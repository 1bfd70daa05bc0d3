"""What a process is given and gives beside files: streams, signals, and processes of its own."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnx_simplify
from build import assert_same_function, random_feeds, small_cnn
from onnx_simplify import streams
from onnx_simplify.errors import ModelError

ROOT = Path(__file__).resolve().parent.parent

# Streams.


@pytest.fixture
def pipe(tmp_path: Path) -> Callable[[bytes], Path]:
    """Write to a named pipe in the background, in pieces."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs named pipes")
    name = tmp_path / "pipe"
    os.mkfifo(name)

    def start(content: bytes) -> Path:
        def write() -> None:
            with open(name, "wb", buffering=0) as file:
                for k in range(0, len(content), 3000):
                    file.write(content[k : k + 3000])

        threading.Thread(target=write, daemon=True).start()
        return name

    return start


def test_pipe(cli, pipe, model, tmp_path):
    content = model.SerializeToString()
    assert len(content) > 3000
    out = tmp_path / "out.onnx"
    result = cli(pipe(content), out)
    assert (result.code, result.err) == (0, "")
    assert_same_function(model, onnx.load(out), random_feeds(model))
    small, report = onnx_simplify.simplify(pipe(content))
    assert report.before.bytes == len(content)


@pytest.mark.parametrize("content", [b"", b"no model", small_cnn().model().SerializeToString()[:9]])
def test_pipe_without_a_model(cli, pipe, tmp_path, content):
    result = cli(pipe(content), tmp_path / "out.onnx")
    assert result.code == 2 and result.err.count("\n") == 1 and "internal" not in result.err
    assert os.listdir(tmp_path) == ["pipe"]


def external(folder: Path) -> bytes:
    """A model whose weights are in a file in the folder."""
    path = folder / "external.onnx"
    onnx.save(
        small_cnn().model(), path, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    return path.read_bytes()


def test_pipe_with_external_data(pipe, tmp_path):
    with pytest.raises(ModelError, match="beside the model: pass the model's path"):
        onnx_simplify.simplify(pipe(external(tmp_path)))


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Let the standard input hold something."""

    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return give


def piped(*arguments: object, content: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "onnx_simplify", *map(str, arguments)],
        input=content,
        capture_output=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("source", ["-", "/dev/stdin"])
@pytest.mark.parametrize("target", ["-", "/dev/stdout"])
def test_from_stream_to_stream(model, tmp_path, source, target):
    report = tmp_path / "report.json"
    done = piped(source, target, "--json", report, content=model.SerializeToString())
    assert done.returncode == 0
    found = ModelProto.FromString(done.stdout)
    assert_same_function(model, found, random_feeds(model))
    assert b"verified on" in done.stderr and b"parameters" in done.stderr
    assert json.loads(report.read_text())["after"]["bytes"] == len(done.stdout)
    assert os.listdir(tmp_path) == ["report.json"]
    done = piped(source, target, "--quiet", content=done.stdout)
    assert done.returncode == 0 and done.stderr == b""
    assert_same_function(model, ModelProto.FromString(done.stdout), random_feeds(model))


@pytest.mark.parametrize("options", [[], ["--verbose"], ["--inspect"]], ids=str)
def test_report_alone_on_the_standard_output(cli, path, options):
    out = path.with_name("out.onnx")
    result = cli(path, out, "--json", "-", *options)
    assert result.code == 0 and json.loads(result.out)["channels_removed"] == 20
    assert "channels" in result.err
    assert out.exists() != ("--inspect" in options)
    quiet = cli(path, out, "--json", "-", "--quiet", *options)
    assert quiet.err == "" and json.loads(quiet.out)["channels_removed"] == 20


def test_standard_input_is_inspected(cli, given, model):
    given(model.SerializeToString())
    result = cli("-", "--inspect")
    assert result.code == 0 and "20 of 45 output channels" in result.out
    given(model.SerializeToString())
    # Nothing is written, so the table has the place.
    assert cli("-", "-", "--inspect").out == result.out


def test_a_file_of_that_name(cli, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(model, "-")
    assert cli("./-", "./-").code == 0
    assert not [n for n in onnx.load("./-").graph.node if n.op_type == "BatchNormalization"]


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def refuses(cli, tmp_path: Path) -> Callable[..., str]:
    """Run the command line, which must complain in one line and touch nothing."""

    def check(*arguments: object) -> str:
        before = sorted(os.listdir(tmp_path))
        result = cli(*arguments)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("onnx-simplify: ") and result.err.count("\n") == 1
        assert "internal" not in result.err
        assert sorted(os.listdir(tmp_path)) == before
        return result.err

    return check


def test_streams_that_do_not_fit(refuses, given, path, tmp_path, monkeypatch):
    given(b"")
    assert "is empty" in refuses("-", tmp_path / "out.onnx")
    given(external(tmp_path))
    assert "pass the model's path" in refuses("-", tmp_path / "out.onnx")
    assert "both" in refuses(path, "-", "--json", "-")
    assert "--save-external-data needs" in refuses(path, "-", "--save-external-data")
    monkeypatch.setattr(streams, "fits_message", lambda model: False)
    assert "2 GiB" in refuses(path, "-")
    for name in ("stdin", "stdout"):
        arguments = ("-", tmp_path / "out.onnx") if name == "stdin" else (path, "-")
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, None)
            assert "is closed" in refuses(*arguments)
            patch.setattr(sys, name, Terminal(io.BytesIO()))
            assert "terminal" in refuses(*arguments)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("options", [["-"], ["{out}", "--json", "-"]], ids=" ".join)
def test_full_standard_output(path, options):
    out = path.with_name("out.onnx")
    process = start("-m", "onnx_simplify", path, *(o.replace("{out}", str(out)) for o in options),
                    stdout=open("/dev/full", "w"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1
    assert os.strerror(errno.ENOSPC) in err
    assert out.exists() == (options != ["-"])
    assert ("the model was written, but" in err) == out.exists()


def test_reader_of_the_model_has_gone(path):
    """It is lost, then: that is no success."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        process = start("-m", "onnx_simplify", path, "-", stdout=pipe)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1


# Signals.

INTERRUPTED = "onnx-simplify: interrupted, nothing written\n"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one process")


def endless() -> ModelProto:
    """A network that onnxruntime runs for longer than anyone waits."""
    body = helper.make_graph(
        [helper.make_node("Identity", [a], [b]) for a, b in (("go", "more"), ("in", "out"))],
        "body",
        [
            helper.make_tensor_value_info("k", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("in", TensorProto.FLOAT, [4]),
        ],
        [
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("out", TensorProto.FLOAT, [4]),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["", "true", "x"], ["y"], body=body)],
        "endless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [numpy_helper.from_array(np.array(True), "true")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def start(*command: object, **options) -> subprocess.Popen[str]:
    """Python in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        **options,
    )


def parent(process: subprocess.Popen) -> None:
    """Interrupt the process alone, as ``kill -INT`` does."""
    process.send_signal(signal.SIGINT)


def terminal(process: subprocess.Popen) -> None:
    """Interrupt the process and its child, as Ctrl-C does."""
    os.killpg(process.pid, signal.SIGINT)


def impatient(process: subprocess.Popen) -> None:
    for _ in range(5):
        terminal(process)
        time.sleep(0.1)


def children(process: subprocess.Popen) -> list[str]:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


@on_linux
@pytest.mark.parametrize("send", [parent, terminal])
def test_interrupt_of_native_code(tmp_path, send):
    """It does not hear of it."""
    onnx.save(endless(), tmp_path / "in.onnx")
    process = start("-m", "onnx_simplify", tmp_path / "in.onnx", tmp_path / "out.onnx")
    time.sleep(2)
    work = children(process)
    assert work
    begun = time.monotonic()
    send(process)
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - begun < 8
    assert (process.returncode, out, err) == (2, "", INTERRUPTED)
    assert os.listdir(tmp_path) == ["in.onnx"]
    assert not Path("/proc", *work).exists()


# The command line; it says when it has begun.
STARTED = """
import sys, onnx_simplify.__main__
try:
    print("begun", flush=True)
    sys.exit(onnx_simplify.__main__.main())
except KeyboardInterrupt:
    sys.exit(onnx_simplify.__main__.interrupted())
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("send", [parent, terminal])
def test_interrupt_at_any_time(tmp_path, sample, send):
    """From the first imports on: one line, or all is written."""
    out = tmp_path / "out.onnx"
    codes = set()
    for k in range(8):
        out.write_bytes(b"old")
        process = start("-c", STARTED, sample, out)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.15 * k)
        send(process)
        _, err = process.communicate(timeout=20)
        if process.returncode == 2:
            assert err == INTERRUPTED
            assert out.read_bytes() == b"old"
        else:
            assert process.returncode in (0, -signal.SIGINT) and err == ""
            assert onnx.load(out).graph.node
        codes.add(process.returncode)
        assert os.listdir(tmp_path) == ["out.onnx"]
    assert 2 in codes




def in_isolation(work: str) -> subprocess.Popen[str]:
    """Python that has printed a line in the midst of isolated work, and then does this."""
    lines = "\n    ".join(["enter(Stage.WORKING)", "print(os.getpid(), flush=True)", work])
    return start(
        "-c",
        "import os, signal, sys, time\n"
        "from onnx_simplify.isolation import Stage, enter, interrupted, isolated\n"
        f"def work():\n    {lines}\n    return 0\n"
        "try:\n    sys.exit(isolated(work))\n"
        "except KeyboardInterrupt:\n    sys.exit(interrupted())",
    )


@on_linux
@pytest.mark.parametrize("send", [parent, impatient])
@pytest.mark.parametrize(
    "work, code, err",
    [
        ("time.sleep(30)", 2, INTERRUPTED),
        ("enter(Stage.STARTING); time.sleep(30)", 2, INTERRUPTED),
        ("enter(Stage.WRITING); time.sleep(30)", 2, INTERRUPTED),
        ("enter(Stage.FINISHING); time.sleep(2.5)", 0, ""),
        ("enter(Stage.PRINTING); time.sleep(30)", -signal.SIGINT, ""),
        # What was begun is cleaned up, however often the interrupt comes.
        (
            "\n    try: time.sleep(30)\n    finally: time.sleep(1); print('cleaned', flush=True)",
            2,
            INTERRUPTED,
        ),
        # Work that swallows the interrupt, and writing that takes its time.
        ("\n    try: time.sleep(30)\n    except: time.sleep(30)", 2, INTERRUPTED),
        (
            "enter(Stage.WRITING)\n    try: time.sleep(30)\n"
            "    finally: time.sleep(2.5); print('cleaned', flush=True)",
            2,
            INTERRUPTED,
        ),
    ],
    ids="working starting writing finishing printing cleaning deaf slow".split(),
)
def test_what_an_interrupt_does(send, work, code, err):
    process = in_isolation(work)
    assert process.stdout is not None
    child = process.stdout.readline().strip()
    time.sleep(0.2)
    begun = time.monotonic()
    send(process)
    out, found = process.communicate(timeout=20)
    assert time.monotonic() - begun < 8
    assert (process.returncode, found) == (code, err)
    assert out == ("cleaned\n" if "cleaned" in work else "")
    assert not Path("/proc", child).exists()


@on_linux
def test_interrupt_of_the_work_alone():
    process = in_isolation("os.kill(os.getpid(), signal.SIGINT)")
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (2, INTERRUPTED)
