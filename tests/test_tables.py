"""The scripts behind the README's tables: rows that survive, cells that say what was measured."""

from __future__ import annotations

import json
import re
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import benchmark_table  # noqa: E402
import publish  # noqa: E402
import status_table  # noqa: E402
from onnx_simplify.graph.load import load  # noqa: E402
from onnx_simplify.runtime.reference import Reference  # noqa: E402


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    return tmp_path


def test_replace_section(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- t starts -->\nold\n<!-- t ends -->\nb\n")
    publish.replace_section(path, "t", "new\n")
    expected = "a\n<!-- t starts -->\nnew\n<!-- t ends -->\nb\n"
    assert path.read_text() == expected
    with pytest.raises(ValueError, match="no section between"):
        publish.replace_section(path, "other", "x")
    assert path.read_text() == expected
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_results_go_on_where_they_stopped(root):
    env = {"date": "2000-01-01", "cpu": "x"}
    first = publish.Results("t", {"rounds": 3}, env, fresh=False)
    first.add("a", {"ms": 1})
    later = {"date": "2000-01-02", "cpu": "x"}
    assert publish.Results("t", {"rounds": 3}, later, fresh=False).rows == {"a": {"ms": 1}}
    assert publish.Results("t", {"rounds": 4}, env, fresh=False).rows == {}
    assert publish.Results("t", {"rounds": 3}, {**env, "cpu": "y"}, fresh=False).rows == {}
    assert publish.Results("t", {"rounds": 3}, env, fresh=True).rows == {}


def test_results_of_other_code_are_dropped(root, monkeypatch):
    first = publish.Results("t", {}, publish.environment(), fresh=False)
    first.add("a", 1)
    assert json.loads(first.text(["a"]))["code"] == publish.fingerprint()
    (root / "onnx_simplify").mkdir()
    (root / "onnx_simplify" / "new.py").write_text("")
    assert publish.Results("t", {}, publish.environment(), fresh=False).rows == {}


def test_progress_passes_over_what_is_done():
    assert list(publish.progress(["a", "b", "c"], ["b"])) == ["a", "c"]


def test_environment_leaves_out_missing_packages():
    found = publish.environment("numpy", "no-such-package")
    assert "numpy" in found and "no-such-package" not in found
    assert found["cpu"] in publish.describe(found)


@pytest.mark.parametrize(
    "rows, cells",
    [
        ([{"errors": [1e-7, 2e-7, 9e-6]}], ["✔ 1e-07", "✔ 2e-07", "✔ 9e-06"]),
        ([{"errors": [1e-7] * 3}, {"errors": [0, 3e-5, 0]}], ["✔ 1e-07", "✘ 3e-05", "✔ 1e-07"]),
        ([{"errors": [1e-7] * 3}, {"errors": [1e-7]}], ["✔ 1e-07", "⚠ error", "—"]),
        ([{"errors": [float("inf")] * 3}], ["✘ inf"] * 3),
    ],
)
def test_status_cells(rows, cells):
    assert [status_table.cell(rows, step) for step in range(3)] == cells


def test_status_measures_the_models_of_a_protocol_one_after_the_other():
    keys = status_table.keys(["a", "b"], ["P1", "P1-seed"], ["torchscript", "dynamo"])
    assert len(keys) == len(set(keys)) == 2 * 2 * (1 + 2 * 3)
    assert keys[0] == "a P1 torchscript static steps"
    models = [key.rpartition(" ")[0] for key in keys]
    assert len(list(groupby(models))) == len(set(models))


def test_status_columns():
    good, bad = {"errors": [1e-7, 2e-7], "stopped": None}, {"errors": [1e-7], "stopped": "x"}
    rows = {key: good for key in status_table.keys(["a", "b"], status_table.PROTOCOLS, ["dynamo"])}
    rows = {k: {**r, "errors": [1e-7] * 3} if "seed" not in k else r for k, r in rows.items()}
    rows["a P1-seed dynamo dynamic at-once"] = bad
    rows["b P1-seed dynamo static unfolded"] = {"errors": [3e-5], "stopped": None}
    cells = [line.strip("| ").split(" | ") for line in status_table.table(rows, "ab").splitlines()]
    titles = [title for title, _ in status_table.WAYS.values()]
    assert cells[0] == ["architecture", *status_table.STEPS, *titles]
    plain, both = ["✔ 1e-07"] * 3, "✔ 2e-07"
    assert cells[2] == ["a", *plain, "⚠ error", both, both]
    assert cells[3] == ["b", *plain, both, both, "✘ 3e-05"]
    seed = {key: row for key, row in rows.items() if "seed" in key}
    assert status_table.table(seed, "a").splitlines()[0].count("|") == 5


@pytest.mark.parametrize("scale", [0.5, 0])
@pytest.mark.parametrize("factor, passes", [(1, True), (1 + 3e-5, False)])
def test_status_error(scale, factor, passes):
    """Of a network that reacts to its input, and of one that does not."""

    def network(factor: float) -> onnx.ModelProto:
        return onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : 17]>
            g (float[2, 3] x) => (float[2, 3] y)
            <float s = {{{scale:.1f}}}, float one = {{1.0}}, float c = {{{factor:.8f}}}>
            {{ z = Mul(x, s)  w = Add(z, one)  y = Mul(w, c) }}"""
        )

    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3), np.float32)}
    reference = Reference(load(network(1)), input_data=feeds)
    assert bool(reference.mute()) == (scale == 0)
    assert (status_table.error(reference, network(factor)) <= status_table.LIMIT) == passes


def test_status_names_networks_whose_output_is_always_the_same():
    rows = {"a P1-seed dynamo static steps": {"errors": [0], "stopped": None, "constant": True}}
    assert status_table.note(["P1-seed"], ["dynamo"], rows).endswith("is the output of a.")
    assert "same" not in status_table.note(["P1-seed"], ["dynamo"], {})


def timing(median: float) -> dict[str, float]:
    return {"median": median, "low": median - 0.1, "high": median + 0.3, "rounds": 15}


ROWS = {
    name: {
        "parameters": [4_000_000, 1_000_000],
        "macs": [2_000_000_000, 800_000_000],
        "ideal_macs": 500_000_000,
        "errors": {"simplified": 2e-7, "onnxslim": 0.25},
        "times": {"dense": timing(8), "pruned": timing(8), "simplified": timing(ms)}
        | {"coupled": timing(2), "oracle": timing(1.9), "onnxslim": timing(8)},
    }
    for name, ms in (("one", 2.0), ("two", 8.0))
}


def test_benchmark_table():
    text = benchmark_table.table(ROWS, ["one", "two"], ["coupled", "onnxslim", "torch"])
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    one = dict(zip(lines[0], lines[2], strict=True))
    assert one["dense ms"] == "8.00 ± 0.20" and one["speed-up"] == "**4.00x**"
    assert one["ideal"] == "4.00x" and one["M parameters"] == "4.0 → 1.0"
    assert one["GMAC"] == "2.00 → 0.80" and one["coupled: ours / oracle"] == "1.05x"
    assert one["onnxslim"] == "1.00x, off by 25%" and one["torch"] == "fails"
    assert dict(zip(lines[0], lines[4], strict=True))["speed-up"] == "**2.00x**"


def test_benchmark_headline_and_chart():
    text = benchmark_table.headline(ROWS, ["one", "two"])
    assert text.startswith("**2.00 times faster**")
    assert "1.00x for two" in text and "4.00x for one" in text and "75% fewer" in text
    pytest.importorskip("matplotlib")
    assert benchmark_table.chart(ROWS, ["one", "two"], ["onnxslim"]).startswith(b"\x89PNG")


def test_the_readme_holds_the_tables_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for marker in ("headline", "comparison", "benchmark", "status"):
        body = text.split(f"<!-- {marker} starts -->")[1].split(f"<!-- {marker} ends -->")[0]
        assert body.strip(), marker
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (ROOT / target).exists(), target
    for name in ("benchmark", "status"):
        rows = json.loads((ROOT / "docs" / f"{name}.json").read_text())["rows"]
        assert len({key.split()[0] for key in rows}) == 37
