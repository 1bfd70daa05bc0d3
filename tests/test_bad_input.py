"""Bad input: one line, the right exit code, and no file touched."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

import onnx_simplify
from build import initializer, node, random_feeds, run, set_initializer, small_cnn
from onnx_simplify.errors import ModelError
from onnx_simplify.graph import store
from versions import has_onnxruntime, needs_onnxruntime

Snapshot = dict[str, bytes | None]


def snapshot(folder: Path) -> Snapshot:
    """Everything below a folder: contents of files, None for folders."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.fixture
def cli(isolated_cli: Callable) -> Callable:
    """A damaged model may bring down the process."""
    return isolated_cli


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a valid model and an older result."""
    (tmp_path / "in.onnx").write_bytes(small_cnn().model().SerializeToString())
    (tmp_path / "out.onnx").write_bytes(b"sentinel")
    return tmp_path


@pytest.fixture
def refuses(cli, folder: Path) -> Callable[..., str]:
    """Run the command line, which must complain in one line and touch nothing."""

    def check(*arguments: object, code: int = 2) -> str:
        before = snapshot(folder)
        result = cli(*arguments)
        assert result.code == code, result.err
        assert result.out == ""
        assert result.err.startswith("onnx-simplify: ")
        assert result.err.endswith("\n") and result.err.count("\n") == 1
        for sign in ("internal error", "Traceback", "Error:", "<class"):
            assert sign not in result.err
        assert snapshot(folder) == before
        return result.err

    return check


# Files that are no models.


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"A text, and no model.\n" * 40,
        b'{"a": [1, 2, 3]}',
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        b"PK\x03\x04" + bytes(200),
        bytes(1000),
        b"\xff" * 1000,
        numpy_helper.from_array(np.zeros(5), "t").SerializeToString(),
        small_cnn().model().graph.SerializeToString(),
    ],
    ids="empty newline text json png zip zeros ones tensor graph".split(),
)
def test_other_files(refuses, folder, content):
    (folder / "in.onnx").write_bytes(content)
    refuses(folder / "in.onnx", folder / "out.onnx")
    refuses(folder / "in.onnx", folder / "out.onnx", "--no-verify")
    refuses(folder / "in.onnx", "--inspect")


@pytest.mark.parametrize("size", [1, 30, 3000])
@pytest.mark.parametrize("seed", range(5))
def test_random_bytes(refuses, folder, seed, size):
    (folder / "in.onnx").write_bytes(np.random.default_rng(seed).bytes(size))
    refuses(folder / "in.onnx", folder / "out.onnx")


def test_missing_file(refuses, folder):
    assert "missing.onnx" in refuses(folder / "missing.onnx", folder / "out.onnx")
    refuses(folder / "missing.onnx", "--inspect")
    refuses("", folder / "out.onnx")


def test_file_in_a_missing_folder(refuses, folder):
    refuses(folder / "no" / "in.onnx", folder / "out.onnx")
    refuses(folder / "in.onnx" / "in.onnx", folder / "out.onnx")


def test_folder(refuses, folder):
    (folder / "sub").mkdir()
    assert "folder" in refuses(folder / "sub", folder / "out.onnx")
    refuses(folder, folder / "out.onnx")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs devices")
@pytest.mark.parametrize("name", ["null", "zero"])
def test_device(refuses, folder, name):
    """Some never end."""
    assert "device" in refuses(f"/dev/{name}", folder / "out.onnx")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read it")
def test_unreadable_file(refuses, folder):
    with tempfile.TemporaryDirectory() as elsewhere:
        secret = Path(elsewhere, "secret.onnx")
        secret.write_bytes((folder / "in.onnx").read_bytes())
        secret.chmod(0)
        assert os.strerror(errno.EACCES) in refuses(secret, folder / "out.onnx")


@pytest.mark.parametrize("share", np.linspace(0, 1, 40, endpoint=False))
def test_truncated(refuses, folder, sample, share):
    data = sample.read_bytes()
    (folder / "in.onnx").write_bytes(data[: 1 + int(share * (len(data) - 1))])
    refuses(folder / "in.onnx", folder / "out.onnx")


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 8, 13, 21, 34])
def test_truncated_at_the_very_end(refuses, folder, cut):
    data = (folder / "in.onnx").read_bytes()
    (folder / "in.onnx").write_bytes(data[:-cut])
    refuses(folder / "in.onnx", folder / "out.onnx")


@pytest.mark.parametrize("kind", ["flip", "set", "delete", "insert"])
def test_corrupted(cli, folder, kind):
    """Whatever happens to single bytes: a verified result or one line."""
    data = small_cnn(widths=(4, 6), classes=3).model().SerializeToString()
    out = folder / "out.onnx"
    refused = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        bytes_ = bytearray(data)
        at = int(rng.integers(len(bytes_)))
        if kind == "flip":
            bytes_[at] ^= 1 << int(rng.integers(8))
        elif kind == "set":
            bytes_[at] = int(rng.integers(256))
        elif kind == "delete":
            del bytes_[at : at + int(rng.integers(1, 6))]
        else:
            bytes_[at:at] = rng.bytes(int(rng.integers(1, 5)))
        (folder / "in.onnx").write_bytes(bytes_)
        out.write_bytes(b"sentinel")
        result = cli(folder / "in.onnx", out)
        assert result.code in (0, 2, 3), (seed, result)
        assert result.err.count("\n") == (1 if result.code else 0), (seed, result)
        assert "internal error" not in result.err, (seed, result)
        assert (out.read_bytes() == b"sentinel") == bool(result.code), (seed, result)
        assert sorted(snapshot(folder)) == ["in.onnx", "out.onnx"]
        refused += bool(result.code)
    assert refused > 20


# Messages that are no valid models.

Damage = Callable[[ModelProto], None]
DAMAGES: dict[str, Damage] = {}


def damage(function: Damage) -> Damage:
    DAMAGES[function.__name__] = function
    return function


@damage
def cycle(model: ModelProto) -> None:
    node(model, "conv1").input[0] = "relu2.out"


@damage
def cycle_of_one(model: ModelProto) -> None:
    node(model, "relu1").input[0] = "relu1.out"


@damage
def missing_tensor(model: ModelProto) -> None:
    node(model, "conv2").input[0] = "nowhere"


@damage
def missing_weight(model: ModelProto) -> None:
    node(model, "conv2").input[1] = "nowhere"


@damage
def missing_output(model: ModelProto) -> None:
    model.graph.output[0].name = "nowhere"


@damage
def duplicate_outputs(model: ModelProto) -> None:
    node(model, "conv2").output[0] = "conv1.out"


@damage
def duplicate_of_input(model: ModelProto) -> None:
    node(model, "relu1").output[0] = "image"


@damage
def duplicate_of_initializer(model: ModelProto) -> None:
    node(model, "conv1").output[0] = "conv2.weight"


@damage
def duplicate_initializers(model: ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


@damage
def duplicate_inputs(model: ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


@damage
def future_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 9999


@damage
def opset_zero(model: ModelProto) -> None:
    model.opset_import[0].version = 0


@damage
def negative_opset(model: ModelProto) -> None:
    model.opset_import[0].version = -1


@damage
def no_opset(model: ModelProto) -> None:
    model.ClearField("opset_import")


@damage
def no_default_opset(model: ModelProto) -> None:
    model.opset_import[0].domain = "acme"


@damage
def unknown_operator(model: ModelProto) -> None:
    node(model, "relu1").op_type = "Frobnicate"


@damage
def unknown_domain(model: ModelProto) -> None:
    node(model, "relu1").domain = "acme"


@damage
def no_operator(model: ModelProto) -> None:
    node(model, "relu1").op_type = ""


@damage
def unknown_attribute(model: ModelProto) -> None:
    node(model, "relu1").attribute.append(helper.make_attribute("slope", 0.1))


@damage
def attribute_of_wrong_type(model: ModelProto) -> None:
    del node(model, "conv1").attribute[:]
    node(model, "conv1").attribute.append(helper.make_attribute("pads", "same"))


@damage
def too_few_operands(model: ModelProto) -> None:
    del node(model, "conv1").input[1:]


@damage
def no_graph(model: ModelProto) -> None:
    model.ClearField("graph")


@damage
def empty_graph(model: ModelProto) -> None:
    model.graph.Clear()


@damage
def no_nodes(model: ModelProto) -> None:
    model.graph.ClearField("node")


@damage
def future_ir(model: ModelProto) -> None:
    model.ir_version = 9999


@damage
def no_ir(model: ModelProto) -> None:
    model.ClearField("ir_version")


@damage
def untyped_input(model: ModelProto) -> None:
    model.graph.input[0].ClearField("type")


@damage
def wrong_dims(model: ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 99


@damage
def negative_dims(model: ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -1


@damage
def wrong_element_type(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


@damage
def data_too_short(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.raw_data = tensor.raw_data[:-3]


@damage
def no_data(model: ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")


@pytest.mark.parametrize("name", DAMAGES)
def test_invalid_models(refuses, folder, name):
    model = small_cnn().model()
    DAMAGES[name](model)
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    refuses(folder / "in.onnx", folder / "out.onnx")
    refuses(folder / "in.onnx", folder / "out.onnx", "--no-verify")
    refuses(folder / "in.onnx", "--inspect")
    for source in (model, model.SerializeToString(), folder / "in.onnx"):
        with pytest.raises(ModelError):
            onnx_simplify.simplify(source)


@pytest.mark.parametrize("name", ["missing_tensor", "missing_weight", "missing_output"])
def test_the_missing_tensor_is_named(refuses, folder, name):
    model = small_cnn().model()
    DAMAGES[name](model)
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    assert "nowhere" in refuses(folder / "in.onnx", folder / "out.onnx")


@pytest.mark.parametrize("field", ["node", "tensor", "dimension", "initializer", "metadata"])
def test_names_that_are_no_unicode(refuses, folder, field):
    model = small_cnn().model()
    helper.set_model_props(model, {"key": "QQQQ"})
    place = {
        "node": "relu1",
        "tensor": "relu1.out",
        "dimension": "batch",
        "initializer": "conv2.weight",
        "metadata": "QQQQ",
    }[field].encode()
    data = model.SerializeToString().replace(place, b"\xff" * len(place))
    (folder / "in.onnx").write_bytes(data)
    refuses(folder / "in.onnx", folder / "out.onnx")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv1.weight", (16, 4, 3, 3)),
        ("conv2.weight", (24, 16, 3)),
        pytest.param(
            *("conv1.bias", (7,)),
            marks=needs_onnxruntime("1.30", "biases are read past their end"),
        ),
        ("batchnormalization1.weight", (7,)),
        ("batchnormalization2.var", (24, 1)),
        ("gemm1.weight", (5, 7)),
        ("gemm1.bias", (6,)),
    ],
)
def test_shapes_that_contradict_each_other(refuses, cli, folder, name, shape):
    """Such a model is well-formed, but runs on no input."""
    model = small_cnn().model()
    set_initializer(model, name, np.ones(shape, np.float32))
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    refuses(folder / "in.onnx", folder / "out.onnx", code=3)
    for options in (["--no-verify"], ["--inspect"]):
        result = cli(folder / "in.onnx", folder / "out.onnx", *options)
        assert result.code in (0, 2) and "internal error" not in result.err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("group", 0),
        ("group", 5),
        ("group", -1),
        ("strides", [0, 0]),
        ("pads", [1, 1]),
        ("kernel_shape", [5, 5]),
        pytest.param(
            *("dilations", [0, 1]), marks=needs_onnxruntime("1.26", "dilations of zero are allowed")
        ),
        ("auto_pad", "SOMEHOW"),
    ],
    ids=str,
)
def test_attributes_out_of_range(refuses, cli, folder, name, value):
    model = small_cnn().model()
    conv = node(model, "conv2")
    if name == "pads":
        del conv.attribute[:]
    conv.attribute.append(helper.make_attribute(name, value))
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    # Strides of zero crash older versions of onnxruntime.
    crash = name == "strides" and not has_onnxruntime("1.28")
    refuses(folder / "in.onnx", folder / "out.onnx", code=2 if crash else 3)
    for options in (["--no-verify"], ["--inspect"]):
        result = cli(folder / "in.onnx", folder / "out.onnx", *options)
        assert result.code in (0, 2) and "internal error" not in result.err


# External data.


@pytest.fixture
def external(folder: Path) -> Path:
    """A model with its weights in a file of their own."""
    inner = folder / "net"
    inner.mkdir()
    onnx.save(
        small_cnn().model(),
        inner / "net.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    return inner / "net.onnx"


def relocate(path: Path, **entries: object) -> None:
    """Change entries of the external data of all initializers; None removes one."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        found = {e.key: e.value for e in tensor.external_data}
        found.update({k: str(v) for k, v in entries.items()})
        del tensor.external_data[:]
        for key, value in found.items():
            if value != "None":
                tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


def test_external_data_is_read(cli, folder, external):
    assert cli(external, folder / "out.onnx").code == 0
    feeds = random_feeds(small_cnn().model(), 1)[0]
    expected, found = run(external, feeds), run(folder / "out.onnx", feeds)
    np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-4, atol=1e-5)


def test_external_data_in_a_subfolder(cli, folder, external):
    (external.parent / "sub").mkdir()
    (external.parent / "weights.bin").rename(external.parent / "sub" / "weights.bin")
    relocate(external, location="sub/weights.bin")
    assert cli(external, folder / "out.onnx").code == 0


def test_missing_external_data(refuses, folder, external):
    (external.parent / "weights.bin").unlink()
    assert "weights.bin" in refuses(external, folder / "out.onnx")


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_external_data_too_short(refuses, folder, external, size):
    data = (external.parent / "weights.bin").read_bytes()
    (external.parent / "weights.bin").write_bytes(data[:size])
    assert "weights.bin" in refuses(external, folder / "out.onnx")


def test_external_data_is_a_folder(refuses, folder, external):
    (external.parent / "weights.bin").unlink()
    (external.parent / "weights.bin").mkdir()
    refuses(external, folder / "out.onnx")


@pytest.mark.parametrize(
    "location", ["../outside.bin", "sub/../../outside.bin", "/etc/passwd", "{outside}", "", "."]
)
def test_external_data_elsewhere(refuses, folder, external, location):
    """Nobody's model reads a file that does not belong to it."""
    data = (external.parent / "weights.bin").read_bytes()
    (folder / "outside.bin").write_bytes(data)
    relocate(external, location=location.replace("{outside}", str(folder / "outside.bin")))
    refuses(external, folder / "out.onnx")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
def test_external_data_through_a_link_to_elsewhere(refuses, folder, external):
    (external.parent / "weights.bin").rename(folder / "outside.bin")
    (external.parent / "weights.bin").symlink_to(folder / "outside.bin")
    refuses(external, folder / "out.onnx")


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": -8},
        {"offset": "start"},
        {"offset": 10**12},
        {"length": -8},
        {"length": "all"},
        {"length": 10**12},
        {"length": 4},
        {"length": 0},
        {"location": None},
        {"offset": 3.5},
    ],
    ids=str,
)
def test_malformed_external_data(refuses, folder, external, entries):
    relocate(external, **entries)
    refuses(external, folder / "out.onnx")


def test_external_data_of_a_message(external):
    model = onnx.load(external, load_external_data=False)
    for source in (model, model.SerializeToString()):
        with pytest.raises(ModelError, match="path"):
            onnx_simplify.simplify(source)


# Output that cannot be written.


def test_output_in_a_missing_folder(refuses, folder):
    assert "does not exist" in refuses(folder / "in.onnx", folder / "no" / "out.onnx")


def test_output_below_a_file(refuses, folder):
    refuses(folder / "in.onnx", folder / "in.onnx" / "out.onnx")


def test_output_is_a_folder(refuses, folder):
    (folder / "sub").mkdir()
    assert "folder" in refuses(folder / "in.onnx", folder / "sub")
    refuses(folder / "in.onnx", folder)
    refuses(folder / "in.onnx", "")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_output_folder_is_write_protected(refuses, folder):
    (folder / "sub").mkdir(mode=0o500)
    try:
        refuses(folder / "in.onnx", folder / "sub" / "out.onnx")
    finally:
        (folder / "sub").chmod(0o700)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_output_folder_takes_no_files(refuses, folder):
    """Not even from root."""
    refuses(folder / "in.onnx", "/proc/out.onnx")


@pytest.mark.parametrize("name", ["x" * 240, "x" * 255, "é" * 127 + "x"], ids=["240", "255", "é"])
def test_output_with_a_long_name(cli, folder, name):
    """Names beside it are derived from it."""
    report = "r" * 255
    for _ in range(2):
        assert cli(folder / "in.onnx", folder / name, "--json", folder / report).code == 0
        assert set(snapshot(folder)) == {"in.onnx", "out.onnx", name, report}
    assert len(onnx.load(folder / name).graph.node)


@pytest.mark.parametrize("length", [230, 250])
def test_external_data_with_a_long_name(cli, folder, length):
    name, other = "x" * length, "x" * (length - 1) + "y"
    assert store._data_prefix(folder / name) != store._data_prefix(folder / other)
    for path in (name, other, name):
        assert cli(folder / "in.onnx", folder / path, "--save-external-data").code == 0
    names = {"in.onnx", "out.onnx", name, f"{name}.data", other, f"{other}.data"}
    assert set(snapshot(folder)) == names
    run(folder / name, random_feeds(small_cnn().model(), 1)[0])


def test_output_name_too_long(refuses, folder):
    message = refuses(folder / "in.onnx", folder / ("x" * 251), "--save-external-data")
    assert "too long for a data file" in message
    assert os.strerror(errno.ENAMETOOLONG) in refuses(folder / "in.onnx", folder / ("x" * 256))
    refuses(folder / "in.onnx", folder.joinpath(*["x" * 200] * 30))


@pytest.mark.parametrize("name", ["new.onnx/", "out.onnx/", "no/", "new.onnx/.", "sub/.."])
def test_output_with_a_trailing_slash(refuses, folder, name):
    refuses(folder / "in.onnx", f"{folder}/{name}")
    refuses(folder / "in.onnx", folder / "out.onnx", "--json", f"{folder}/{name}")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
def test_links_in_a_circle(refuses, folder):
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    for out in (folder / "a", folder / "a" / "out.onnx"):
        assert "circle" in refuses(folder / "in.onnx", out)
        assert "circle" in refuses(folder / "in.onnx", folder / "out.onnx", "--json", out)
        assert os.strerror(errno.ELOOP) in refuses(out, folder / "out.onnx")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of bytes")
def test_output_name_that_is_no_unicode(cli, refuses, folder):
    """A model cannot refer to such a data file."""
    out = os.fsdecode(os.fsencode(folder) + b"/\xff.onnx")
    assert "Unicode" in refuses(folder / "in.onnx", out, "--save-external-data")
    assert cli(folder / "in.onnx", out).code == 0
    with pytest.raises(ModelError, match="no name of a file"):
        onnx_simplify.simplify(folder / "in.onnx", save_to="a\0b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_output_is_no_ordinary_file(refuses, folder):
    """``onnx-simplify IN /dev/null``, run by root, must not replace the device."""
    os.mkfifo(folder / "pipe")
    refuses(folder / "in.onnx", folder / "pipe")
    assert (folder / "pipe").is_fifo()


def test_data_file_cannot_be_replaced(refuses, folder):
    (folder / "out.onnx.data").mkdir()
    refuses(folder / "in.onnx", folder / "out.onnx", "--save-external-data")


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("options", [[], ["--save-external-data"], ["--no-verify"]], ids=str)
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk_at_the_end(refuses, folder, monkeypatch, function, options):
    monkeypatch.setattr(store.os, function, full_disk)
    message = refuses(folder / "in.onnx", folder / "out.onnx", *options)
    assert os.strerror(errno.ENOSPC) in message


@pytest.mark.parametrize("target", ["in.onnx", "out.onnx", "new.onnx"])
@pytest.mark.parametrize("room", [0, 100, 3000])
@pytest.mark.parametrize("options", [[], ["--save-external-data"]], ids=str)
def test_full_disk(refuses, folder, monkeypatch, room, target, options):
    class Full(io.FileIO):
        def write(self, data):
            nonlocal room
            room -= memoryview(data).nbytes
            return full_disk() if room < 0 else super().write(data)

    monkeypatch.setattr(store, "open", lambda path, mode: Full(path, "w"), raising=False)
    message = refuses(folder / "in.onnx", folder / target, *options)
    assert os.strerror(errno.ENOSPC) in message


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
@pytest.mark.parametrize("options", [[], ["--save-external-data"]], ids=str)
def test_write_that_really_fails(folder, sample, options):
    """The operating system refuses after 20 kB."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    before = snapshot(folder)
    done = subprocess.run(
        [sys.executable, "-m", "onnx_simplify", str(sample), str(folder / "out.onnx"), *options],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=limit,
        cwd=Path(onnx_simplify.__file__).parent.parent,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("onnx-simplify: ") and done.stderr.count("\n") == 1
    assert snapshot(folder) == before


def test_full_disk_for_the_report(cli, folder, monkeypatch):
    (folder / "report.json").write_text("old")
    write = store._write

    def fail(path: Path, data: object) -> int:
        return full_disk() if path.suffix == ".json" else write(path, data)

    monkeypatch.setattr(store, "_write", fail)
    result = cli(folder / "in.onnx", folder / "out.onnx", "--json", folder / "report.json")
    assert result.code == 2 and result.err.count("\n") == 1
    assert os.strerror(errno.ENOSPC) in result.err
    assert sorted(snapshot(folder)) == ["in.onnx", "out.onnx", "report.json"]
    assert (folder / "report.json").read_text() == "old"


@pytest.mark.parametrize("where", ["no/report.json", "in.onnx/report.json", "."])
def test_report_in_an_impossible_place(refuses, folder, where):
    refuses(folder / "in.onnx", folder / "out.onnx", "--json", folder / where)
    refuses(folder / "in.onnx", "--inspect", "--json", folder / where)


@pytest.mark.parametrize("where", ["in.onnx", "out.onnx"])
def test_report_must_not_replace_a_model(refuses, folder, where):
    refuses(folder / "in.onnx", folder / "out.onnx", "--json", folder / where)


# Options that do not fit.


@pytest.mark.parametrize("name", ["nothing", "", "conv", "Conv1", "image "])
def test_unknown_pin(refuses, folder, name):
    message = refuses(folder / "in.onnx", folder / "out.onnx", "--pin", name)
    assert f"'{name}'" in message
    refuses(folder / "in.onnx", "--inspect", "--pin", name)


@pytest.mark.parametrize(
    "shape", ["image:3,12,12", "picture:1,3,12,12", "image:1,3,12,13", "image:1,1,3,12,12"]
)
def test_wrong_input_shape(refuses, folder, shape):
    refuses(folder / "in.onnx", folder / "out.onnx", "--input-shape", shape)
    refuses(folder / "in.onnx", "--inspect", "--input-shape", shape)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "image",
        ":1,3",
        "image:x",
        "image:1,3,,12",
        "image:0,3,12,12",
        "image:-1,3,12,12",
        "image:1.5,3,12,12",
        "image=1,3,12,12",
    ],
)
def test_garbled_input_shape(cli, folder, text):
    before = snapshot(folder)
    result = cli(folder / "in.onnx", folder / "out.onnx", "--input-shape", text)
    assert result.code == 2 and result.out == ""
    assert result.err.count("\n") == 1
    assert result.err.splitlines()[-1].startswith("onnx-simplify: error: argument --input-shape: ")
    assert snapshot(folder) == before


def _npz(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((1, 3, 12, 12), np.float32))
    return file.getvalue()


GOOD = _npz(image=np.random.default_rng(0).standard_normal((1, 3, 12, 12)))


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"not an archive",
        _npy(),
        GOOD[:10],
        GOOD[:1000],
        GOOD[:-1],
        GOOD[:400] + bytes(50) + GOOD[450:],
        _npz(),
        _npz(picture=np.zeros((1, 3, 12, 12))),
        _npz(image=np.zeros((3, 12, 12))),
        _npz(image=np.zeros((1, 3, 12, 13))),
        _npz(image=np.full((1, 3, 12, 12), "a")),
        _npz(image=np.full((1, 3, 12, 12), 1j)),
        _npz(image=np.full((1, 3, 12, 12), None)),
    ],
    ids=(
        "missing empty text npy cut10 cut1000 cut1 damaged no-arrays name rank size strings "
        "complex objects"
    ).split(),
)
def test_wrong_input_data(refuses, folder, content):
    data = folder / "data.npz"
    if content is not None:
        data.write_bytes(content)
    message = refuses(folder / "in.onnx", folder / "out.onnx", "--input-data", data)
    assert "--input-data" in message


def test_input_data_is_a_folder(refuses, folder):
    refuses(folder / "in.onnx", folder / "out.onnx", "--input-data", folder)


def test_input_data_without_any_sample(refuses, folder):
    """An empty batch would verify anything."""
    (folder / "data.npz").write_bytes(_npz(image=np.zeros((0, 3, 12, 12))))
    refuses(folder / "in.onnx", folder / "out.onnx", "--input-data", folder / "data.npz")


# The Python interface.


@pytest.mark.parametrize("source", ["no/such/file.onnx", b"", b"garbage", ModelProto()], ids=repr)
@pytest.mark.parametrize(
    "function",
    [
        "simplify",
        "fold_batchnorm",
        "propagate_bias",
        "remove_zeroed",
        "get_bn_folding",
        "get_pinned",
    ],
)
def test_every_function_refuses(source, function):
    with pytest.raises(ModelError) as caught:
        getattr(onnx_simplify, function)(source)
    assert "\n" not in str(caught.value)


def test_a_good_model_is_not_refused(cli, folder):
    """So that the tests above fail for the reason they name."""
    assert cli(folder / "in.onnx", folder / "out.onnx").code == 0
    found = onnx.load(folder / "out.onnx")
    assert initializer(found, "conv1.weight").shape == (8, 3, 3, 3)
