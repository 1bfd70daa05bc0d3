"""Trained models from PyPI packages (``pytest -m models``): skipped where they cannot be had."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import real_models  # noqa: E402

import onnx_simplify  # noqa: E402

pytestmark = [pytest.mark.models, pytest.mark.slow]


@pytest.fixture(scope="module")
def models() -> dict[str, Path]:
    try:
        return {path.name: path for path in real_models.fetch()}
    except OSError as error:
        pytest.skip(str(error))


def test_every_model_without_flags(models):
    assert len(models) >= 10
    for name, path in models.items():
        before = onnx.load(path)
        result, report = onnx_simplify.simplify(path)
        assert report.verification.worst <= 1e-4, name
        assert report.after.bytes <= report.before.bytes, name
        for field in ("input", "output"):
            old, new = getattr(before.graph, field), getattr(result.graph, field)
            names = {t.name for t in before.graph.initializer}
            assert [i for i in old if i.name not in names] == list(new), name
        assert before.metadata_props == result.metadata_props, name


def test_the_detector_loses_a_fifth(models):
    path = models[real_models.DETECTOR]
    result, report = onnx_simplify.simplify(path, channel_multiple=1)
    assert 1 - report.after.parameters / report.before.parameters > 0.2
    dims = result.graph.input[0].type.tensor_type.shape.dim
    assert all(d.dim_param or not d.dim_value for d in dims[2:])
    assert real_models.worst_at(path, result) <= 1e-4
