"""Output files when a process dies at the worst moment, or two write at once."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_simplify.cli import main
from onnx_simplify.graph import store
from onnx_simplify.graph.load import load
from onnx_simplify.graph.model import Model
from onnx_simplify.runtime.session import Session

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("replace", "link", "unlink", "fsync", "write")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def labelled(value: float) -> Model:
    """A model all of whose weights are ``value``."""
    weight = numpy_helper.from_array(np.full((32, 16), value, np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "labelled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])],
        [weight],
    )
    opsets = [helper.make_opsetid("", 17)]
    return load(helper.make_model(graph, opset_imports=opsets, ir_version=9))


def value(path: Path) -> float:
    """The value of all weights of the model that is stored there."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"x": np.eye(32, dtype=np.float32)})
    found = np.unique(product)
    assert found.size == 1, "a mixture"
    return float(found[0])


def dies_at(step: int, path: Path, external: bool) -> bool:
    """Save value 2 in a process that dies before its ``step``-th call to the operating system."""
    child = os.fork()
    if child == 0:
        count = 0

        def deadly(real):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count == step:
                    os._exit(9)
                return real(*arguments, **options)

            return call

        for name in STEPS:
            setattr(os, name, deadly(getattr(os, name)))
        Path.unlink = deadly(Path.unlink)
        store._keep_mode = deadly(store._keep_mode)
        store.save(labelled(2), path, external=external)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("before", ["nothing", "one file", "a pair"])
@pytest.mark.parametrize("external", [False, True])
def test_death_at_every_step(tmp_path, before, external):
    """The old model or the new one; what is left over goes with the next run."""
    path = tmp_path / "out.onnx"
    step, outcomes = 0, set()
    while True:
        step += 1
        for file in tmp_path.iterdir():
            file.unlink()
        if before != "nothing":
            store.save(labelled(1), path, external=before == "a pair")
        died = dies_at(step, path, external)
        outcomes.add(value(path) if path.exists() else None)
        store.save(labelled(3), path, external=external)
        assert value(path) == 3
        assert {p.name for p in tmp_path.iterdir()} <= {"out.onnx", "out.onnx.data"}
        if not died:
            break
    assert step > 3
    assert outcomes == {None if before == "nothing" else 1, 2}


def test_without_links(tmp_path, monkeypatch):
    """Some file systems have none: then the data keep a name of their own until the next run."""
    path = tmp_path / "out.onnx"

    def refuse(*_: object) -> None:
        raise PermissionError

    for number in (1, 2, 3):
        store.save(labelled(number), path, external=True)
        monkeypatch.setattr(store.os, "link", refuse)
        assert value(path) == number
        assert len(list(tmp_path.iterdir())) == 2


def test_what_others_write_stays(tmp_path):
    """Only folders nobody holds a lock on are leftovers."""
    path = tmp_path / "out.onnx"
    with store._workspace(path) as folder:
        (folder / "theirs").touch()
        store.save(labelled(1), path)
        assert (folder / "theirs").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


@pytest.mark.parametrize("kinds", [(True, True), (True, False)])
def test_two_writers(tmp_path, kinds):
    """Whoever is last wins, as a whole; a reader finds a model at any time."""
    path = tmp_path / "out.onnx"
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_faults as t\n"
        "for k in range(60): t.store.save(t.labelled(float(sys.argv[3])), sys.argv[2], "
        "external=sys.argv[4] == 'True')"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(Path(__file__).parent), str(path), str(k), str(e)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for k, e in enumerate(kinds, 1)
    ]
    assert [w.wait(120) for w in writers] == [0, 0]
    assert value(path) in (1, 2)
    assert {p.name for p in tmp_path.iterdir()} <= {"out.onnx", "out.onnx.data"}


def test_many_external_tensors(tmp_path):
    """A data file is mapped once, however many tensors it holds, and need not be aligned."""
    count = 1500
    tensors, offset = [], 1
    data = tmp_path / "in.data"
    values = np.random.default_rng(0).standard_normal((count, 300)).astype(np.float32)
    with open(data, "wb") as file:
        file.write(b"x" + values.tobytes())
    for k in range(count):
        tensor = TensorProto(name=f"b{k}", data_type=1, dims=[300], data_location=1)
        for key, entry in (("location", "in.data"), ("offset", offset), ("length", 1200)):
            tensor.external_data.add(key=key, value=str(entry))
        tensors.append(tensor)
        offset += 1200
    nodes = [helper.make_node("Add", [f"x{k}", f"b{k}"], [f"x{k + 1}"]) for k in range(count)]
    kind = [helper.make_tensor_value_info(n, 1, [1, 300]) for n in ("x0", f"x{count}")]
    graph = helper.make_graph(nodes, "sum", kind[:1], kind[1:], tensors)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9),
        tmp_path / "in.onnx",
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        model = load(tmp_path / "in.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(model.initializers()) == count
    np.testing.assert_array_equal(model.initializers()["b7"].values, values[7])
    got = Session(model).run({"x0": np.zeros((1, 300), np.float32)})[0][0]
    np.testing.assert_allclose(got, values.sum(0), rtol=1e-3, atol=1e-3)


def in_isolation(work: str) -> subprocess.Popen[str]:
    program = f"import os, sys, time\nfrom onnx_simplify.isolation import isolated\n{work}"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the work is done in one process")
@pytest.mark.parametrize(
    "work, code, message",
    [
        ("lambda: 3", 3, ""),
        ("lambda: sys.exit(1)", 1, ""),
        ("lambda: os.kill(os.getpid(), signal.SIGSEGV)", 2, "SIGSEGV"),
        ("os.abort", 2, "SIGABRT"),
        ("lambda: os.kill(os.getpid(), signal.SIGKILL)", 2, "lack of memory"),
        ("lambda: os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
    ],
)
def test_crash_of_native_code(work, code, message):
    process = in_isolation(f"import signal\nsys.exit(isolated({work}))")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert message in errors and errors.count("\n") == bool(message)


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the work is done in one process")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_work_ends_with_the_process(number):
    process = in_isolation("isolated(lambda: print(os.getpid(), flush=True) or time.sleep(60))")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(10) == -number
    patience = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < patience:
        time.sleep(0.01)
    assert not is_alive(child)


def test_data_file_that_is_no_longer_needed(tmp_path, cli):
    """It may belong to another model, too: it stays, and a note says so."""
    path = tmp_path / "model.onnx"
    store.save(labelled(1), path, external=True)
    result = cli(path, path)
    assert result.code == 0 and "model.onnx.data is as it was" in " ".join(result.out.split())
    (path.parent / "model.onnx.data").unlink()
    assert value(path) == 1


def test_data_of_the_input_are_not_overwritten(tmp_path, cli):
    """A copy of a model refers to the same data file as the original does."""
    path, copy = tmp_path / "model.onnx", tmp_path / "copy.onnx"
    store.save(labelled(1), path, external=True)
    copy.write_bytes(path.read_bytes())
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    result = cli(copy, path, "--save-external-data")
    assert result.code == 2 and "holds the weights of the input" in result.err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert cli(path, path, "--save-external-data").code == 0
    assert value(path) == 1


def test_closed_standard_output(tmp_path, monkeypatch, sample):
    monkeypatch.setattr(sys, "stdout", None)
    assert main([str(sample), str(tmp_path / "out.onnx")]) == 0
    assert (tmp_path / "out.onnx").exists()
