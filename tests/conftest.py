from __future__ import annotations

import faulthandler
import io
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto

from build import small_cnn
from onnx_simplify.channels.layouts import Unsupported
from onnx_simplify.cli import main
from onnx_simplify.facts import sizes
from onnx_simplify.isolation import isolated
from onnx_simplify.planning import profiles

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Result:
    """What a run of the command line did."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan alike on every machine: keep channels where that is free, add maps elsewhere."""
    plain = profiles.Profile("generic", 4, 4, map_cost=1e-9, map_start_cost=1e-9, rearrange=False)
    monkeypatch.setattr(profiles, "detect", lambda: plain)


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rules about sizes that go wrong be seen; in use, they just know nothing."""
    monkeypatch.setattr(sizes, "TOLERATED", (Unsupported,))


@pytest.fixture(scope="session")
def sample() -> Path:
    """The pruned model that ships with the repository."""
    return ROOT / "scripts" / "sample" / "pruned_residual_cnn.onnx"


@pytest.fixture
def sample_model(sample: Path) -> ModelProto:
    return onnx.load(sample)


@pytest.fixture
def model() -> ModelProto:
    """A plain network with half of its filters pruned."""
    return small_cnn().model()


@pytest.fixture
def path(model: ModelProto, tmp_path: Path) -> Path:
    """The same network in a file, alone in its folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(model, folder / "in.onnx")
    return folder / "in.onnx"


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Run the command line in this process; its output is 120 columns wide."""
    _plain(monkeypatch)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = _code(arguments)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture
def isolated_cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command line as ``python -m onnx_simplify`` does: a crash of native code is a code.

    In a copy of this process, since starting another one takes long.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    _plain(monkeypatch)

    def run(*arguments: object) -> Result:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if child == 0:
                # Nothing of pytest may go on here, whatever happens.
                code = 1
                try:
                    faulthandler.disable()
                    os.dup2(out.fileno(), 1)
                    os.dup2(err.fileno(), 2)
                    sys.stdout, sys.stderr = (
                        io.TextIOWrapper(io.FileIO(n, "w", closefd=False), write_through=True)
                        for n in (1, 2)
                    )
                    code = isolated(lambda: _code(arguments))
                finally:
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0)
            err.seek(0)
            return Result(code, out.read(), err.read())

    return run


def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("ONNX_SIMPLIFY_DEBUG", raising=False)


def _code(arguments: tuple[object, ...]) -> int:
    try:
        return main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
