"""The column of the comparison table that is about onnx-simplify."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import comparison  # noqa: E402

pytestmark = pytest.mark.torch
OURS = comparison.TOOLS[0]


@pytest.mark.parametrize("network", comparison.NETWORKS, ids=lambda network: network.name)
def test_what_can_go_goes_and_the_function_stays(network: comparison.Network) -> None:
    verdict = comparison.judge(OURS, network)
    assert verdict.exact, verdict
    # A known limit: a branch that feeds a residual link stays as wide as the stream.
    if network not in comparison.ONE_BRANCH:
        assert verdict.removed == verdict.removable, verdict


def test_dynamic_dimensions_stay() -> None:
    zero = comparison.judge(OURS, comparison.ZERO, dynamic=True)
    assert zero.exact and zero.removed == zero.removable, zero
    # One constant channel per layer stands for the others; more stay to fill up a multiple.
    constant = comparison.judge(OURS, comparison.BATCHNORM, dynamic=True)
    assert constant.exact and constant.removed >= constant.removable // 2, constant


def test_a_wrong_result_is_refused() -> None:
    assert comparison.doubt(OURS).text == "**yes**"


def test_files_and_their_metadata() -> None:
    assert comparison.any_file(OURS).text == "**yes**"
    assert comparison.properties(OURS).text == "**yes**"


def test_clutter_computes_the_same() -> None:
    cell = comparison.cleaning(OURS)
    assert cell.measured["error"] <= comparison.LIMIT
    assert cell.measured["nodes"] < 17
