"""The models of onnx's own backend tests: equal, or refused with a documented error."""

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "backend_tests.py"

pytestmark = pytest.mark.skipif(
    tuple(int(n) for n in onnx.__version__.split(".")[:2]) < (1, 20),
    reason="before onnx 1.20: the data of the tests are not in memory",
)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=1800
    )


def test_some_models_are_equal():
    done = run("node/test_relu", "node/test_add", "simple/test_expand", "--jobs", "1")
    assert done.returncode == 0, done.stdout
    assert "0 wrong, 0 crashed" in done.stdout and " 0 equal" not in done.stdout


@pytest.mark.slow
def test_every_model_is_equal_or_refused():
    done = run()
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split(" equal")[0].split()[-1].replace(",", "")) > 1500
