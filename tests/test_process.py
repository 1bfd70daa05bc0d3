"""What a process is given and gives beside files: streams, signals, and processes of its own."""

from __future__ import annotations

import errno
import io
import json
import os
import re
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
    process = start(
        "-m",
        "onnx_simplify",
        path,
        *(o.replace("{out}", str(out)) for o in options),
        stdout=open("/dev/full", "w"),
    )
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


# Isolated calls.


def test_isolated_gives_the_same(sample, tmp_path):
    """And works from a thread beside others, whatever the arguments are made of."""
    found = []

    def work() -> None:
        arguments = dict(
            pinned={"stage1.conv1": 0}.keys(),
            skip={"fold_batchnorm"},
            bn_folding=[],
            input_shapes={"image": (1, 3, 96, 96)},
            input_data={"image": np.ones((1, 3, 96, 96), np.float32)},
            target="avx2",
        )
        for isolated in (False, True):
            out = tmp_path / f"{isolated}.onnx"
            found.append(
                onnx_simplify.simplify(sample, **arguments, save_to=out, isolated=isolated)
            )

    idle = threading.Event()
    other = threading.Thread(target=idle.wait)
    worker = threading.Thread(target=work)
    other.start()
    worker.start()
    worker.join()
    idle.set()
    (model, report), (same, other_report) = found
    assert report.channels_removed and same == model
    report.seconds = other_report.seconds = 0
    assert other_report == report
    assert (tmp_path / "True.onnx").read_bytes() == (tmp_path / "False.onnx").read_bytes()


def test_isolated_takes_every_source(model, path):
    expected = onnx_simplify.simplify(model, target="generic")[0]
    for source in (model, model.SerializeToString(), str(path)):
        assert onnx_simplify.simplify(source, target="generic", isolated=True)[0] == expected


@pytest.mark.parametrize(
    "arguments",
    [
        {"model": "no/such/file.onnx"},
        {"model": b"garbage"},
        {"pinned": ["nothing"]},
        {"rtol": 1e-14},
        {"rtol": -1},
        {"input_data": {"image": np.ones(3)}},
        {"model": endless().SerializeToString()[:-30]},
    ],
    ids=lambda a: next(iter(a)),
)
def test_isolated_raises_the_same(sample, arguments):
    arguments = {"model": sample, "target": "avx2", **arguments}
    with pytest.raises(onnx_simplify.SimplifyError) as expected:
        onnx_simplify.simplify(**arguments)
    with pytest.raises(onnx_simplify.SimplifyError) as found:
        onnx_simplify.simplify(**arguments, isolated=True)
    assert type(found.value) is type(expected.value)
    assert re.sub(r"\S+e-\d+", "#", str(found.value)) == (
        re.sub(r"\S+e-\d+", "#", str(expected.value))
    )


def test_isolated_raises_what_is_not_foreseen(sample):
    """With the traceback of the other process as its cause."""
    with pytest.raises(TypeError) as expected:
        onnx_simplify.simplify(sample, threads="two")  # type: ignore[arg-type]
    with pytest.raises(TypeError) as found:
        onnx_simplify.simplify(sample, threads="two", isolated=True)  # type: ignore[arg-type]
    assert str(found.value) == str(expected.value)
    assert "check_positive" in str(found.value.__cause__)


def test_isolated_cannot_hand_everything_over(sample):
    with pytest.raises(ModelError, match="isolated cannot hand an argument over"):
        onnx_simplify.simplify(sample, input_data={"image": lambda: None}, isolated=True)


def broken_runtime(folder: Path, does: str) -> None:
    """A module in the place of onnxruntime that does something when it is imported."""
    (folder / "onnxruntime.py").write_text(f"import os, signal, sys, time\n{does}\n")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    "does, message",
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"onnxruntime crashed \(SIGSEGV\)"),
        ("os.kill(os.getpid(), signal.SIGFPE)", r"onnxruntime crashed \(SIGFPE\)"),
        ("os.abort()", r"onnxruntime crashed \(SIGABRT\)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "lack of memory"),
        ("os._exit(3)", "exit code 3"),
        ("os.write(1, b'noise'); print('noise'); os._exit(0)", "exit code 0"),
    ],
    ids="SEGV FPE ABRT KILL exit noise".split(),
)
def test_isolated_crash(sample, tmp_path, monkeypatch, does, message):
    broken_runtime(tmp_path, does)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        onnx_simplify.simplify(sample, isolated=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=message):
        onnx_simplify.simplify(bytes(10**7), isolated=True)


def test_isolated_without_an_interpreter(sample, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(sample))
    with pytest.raises(ModelError, match="cannot start"):
        onnx_simplify.simplify(sample, isolated=True)
    for name, value in (("executable", ""), ("frozen", True)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, value, raising=False)
            with pytest.raises(ModelError, match="needs a Python interpreter"):
                onnx_simplify.simplify(sample, isolated=True)


def test_isolated_in_a_script_without_a_guard(sample, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, onnx_simplify\nprint('once')\n"
        "print(onnx_simplify.simplify(sys.argv[1], isolated=True)[1].verification.passed)\n"
    )
    out, err = start(script, sample).communicate(timeout=60)
    assert (out, err) == ("once\nTrue\n", "")


@on_linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_isolated_ends_with_the_caller(sample, tmp_path, number):
    broken_runtime(tmp_path, "time.sleep(60)")
    process = start(
        "-c",
        f"import sys, onnx_simplify, onnx_simplify.worker; sys.path.insert(0, {str(tmp_path)!r})\n"
        "print(flush=True)\n"
        f"onnx_simplify.worker.simplify_apart(dict(model={str(sample)!r}))",
    )
    assert process.stdout is not None
    process.stdout.readline()
    patience = time.monotonic() + 20
    while not children(process) and time.monotonic() < patience:
        time.sleep(0.01)
    (work,) = children(process)
    time.sleep(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == -number
    assert err.count("Traceback") == (number == signal.SIGINT)
    while Path("/proc", work).exists() and time.monotonic() < patience:
        time.sleep(0.01)
    assert not Path("/proc", work).exists()
