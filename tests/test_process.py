"""What a process is given and gives beside files: streams, signals, and processes of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import onnx_simplify
from build import assert_same_function, random_feeds, small_cnn
from onnx_simplify.errors import ModelError

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
