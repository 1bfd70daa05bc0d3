"""The documents' code that needs torch: the deployment guide from end to end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")

import onnx_simplify  # noqa: E402
import torch_bridge  # noqa: E402
from build import count, parameters  # noqa: E402
from documents import blocks, execute, section  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The names that the guide's code leaves behind; its files are in the current folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("deployment"))
        yield execute(blocks("deployment.md", "python"))
    torch.set_num_threads(threads)


def test_simplified_model_is_the_pruned_one(guide):
    report = guide["report"]
    assert report.verification.worst <= 1e-5
    assert report.after.parameters < 0.6 * report.before.parameters


def test_quantised_model_is_close(guide):
    assert guide["error"] < 0.1
    assert guide["agreement"] > 0.95
    assert guide["accuracy"] > 0.95


def test_quantised_model_is_smaller_than_without_simplifying(guide):
    guide["quantize"]("pruned.onnx", "pruned-int8.onnx")
    dense, small = onnx.load("pruned-int8.onnx"), onnx.load("int8.onnx")
    assert parameters(small) < 0.7 * parameters(dense)
    assert Path("int8.onnx").stat().st_size < 0.7 * Path("pruned-int8.onnx").stat().st_size
    assert Path("int8.onnx").stat().st_size < 0.5 * Path("small.onnx").stat().st_size


def test_interface_stays(guide):
    for name in ("pruned.onnx", "small.onnx", "int8.onnx", "int8.ort"):
        session = ort.InferenceSession(name, providers=["CPUExecutionProvider"])
        (image,), (output,) = session.get_inputs(), session.get_outputs()
        assert (image.name, image.shape) == ("image", ["batch", 3, 32, 32])
        assert (output.name, output.shape) == ("output", ["batch", 4])


def test_maps_are_expanded_before_quantising(guide):
    assert count(onnx.load("small.onnx"), "Gather") > 0, "no map: say so in docs/deployment.md"
    assert count(onnx.load("prepared.onnx"), "Gather") == 0
    assert count(onnx.load("int8.onnx"), "Gather") == 0


def test_sessions_agree(guide):
    (cached,) = guide["cached"].run(None, {"image": guide["images"].numpy()})
    assert np.abs(guide["scores"] - guide["actual"]).max() == 0
    error = guide["relative_error"]
    assert error(guide["actual"], cached) < 0.5 * error(guide["expected"], cached)


def test_quantised_graphs_lose_less(guide):
    """Why to simplify first; what goes afterwards goes exactly."""
    guide["quantize"]("pruned.onnx", "pruned-int8.onnx")
    result, report = onnx_simplify.simplify("pruned-int8.onnx", save_to="late.onnx")
    assert report.verification.worst <= 1e-6
    assert parameters(onnx.load("int8.onnx")) < parameters(result)
    assert parameters(result) < 0.9 * parameters(onnx.load("pruned-int8.onnx"))


def test_every_session_option_exists(guide):
    options = ort.SessionOptions()
    names = re.findall(r"^\| `(\w+)` \|", section("deployment.md", "Session options"), re.M)
    assert len(names) >= 5
    for name in names:
        assert hasattr(options, name), f"docs/deployment.md speaks of the option '{name}'"


def test_dynamic_quantisation_of_a_model_without_convolutions(guide):
    from onnxruntime.quantization import quantize_dynamic

    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    torch_bridge.export(model, torch.zeros(1, 16), "gemm.onnx", dynamic_shapes={0: "batch"})
    quantize_dynamic("gemm.onnx", "gemm-int8.onnx")
    assert count(onnx.load("gemm-int8.onnx"), "MatMulInteger") == 2


# The parts of other documents that need torch.


def test_torch_examples_of_the_api(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [b for b in blocks("api.md", "python") if "torch" in b.text]
    assert found
    execute(found)


def test_torch_bridge_is_documented():
    text = section("api.md", "torch_bridge")
    for name in torch_bridge.__all__:
        assert re.search(rf"\b{name}\b", text), f"docs/api.md, torch_bridge: describe '{name}'"
    for name in re.findall(r"torch_bridge\.(\w+)", text):
        assert hasattr(torch_bridge, name), f"docs/api.md: there is no torch_bridge.{name}"
