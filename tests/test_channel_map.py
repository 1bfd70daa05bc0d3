"""The channel map counts every channel once, and draws what it counted."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from build import Graph, pruned
from onnx_simplify import simplify
from onnx_simplify.report import Layer

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import channel_map  # noqa: E402
from channel_map import Fate, fate  # noqa: E402

HOSTILE = """<script>alert("x")</script>&amp;'$\\frac{$"""


def layer(outputs: int, dead: int, constant: int, after: int, name: str = "conv") -> Layer:
    return Layer(name, "Conv", outputs, 3, constant, dead, after, 3)


def network() -> ModelProto:
    """Layers whose channels meet every end.

    ``conv1`` has 12 channels, of which 1, 4 and 7 are pruned, and 9 is not read by ``conv2``.
    ``conv2`` and ``conv3`` are added: 0 and 1 are pruned in both, 2 and 3 in ``conv2`` alone.
    ``conv4`` is pruned altogether.
    """
    g = Graph()
    x = g.input("x", ["batch", 3, 8, 8])
    a = g.op("Relu", g.conv(x, pruned(g.normal(12, 3, 3, 3), [1, 4, 7]), g.normal(12) + 2))
    left = g.conv(a, pruned(pruned(g.normal(8, 12, 1, 1), range(4)), [9], axis=1), g.normal(8))
    right = g.conv(x, pruned(g.normal(8, 3, 3, 3), [0, 1]), g.normal(8))
    nothing = g.conv(x, np.zeros((8, 3, 3, 3), np.float32), g.normal(8))
    y = g.op("Relu", g.op("Add", g.op("Add", left, right), nothing))
    y = g.op("Flatten", g.op("GlobalAveragePool", y))
    g.output(g.gemm(y, g.normal(5, 8), g.normal(5)))
    return g.model()


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(layer(64, 0, 0, 64), Fate(64, 0, 0, 0), id="untouched"),
        pytest.param(layer(64, 8, 24, 32), Fate(32, 0, 24, 8), id="all-removed"),
        pytest.param(layer(64, 8, 24, 36), Fate(32, 4, 20, 8), id="kept-are-constant-first"),
        pytest.param(layer(64, 8, 24, 60), Fate(32, 28, 0, 4), id="then-dead"),
        pytest.param(layer(64, 8, 24, 64), Fate(32, 32, 0, 0), id="all-kept"),
        pytest.param(layer(64, 8, 24, 20), Fate(20, 0, 24, 20), id="more-than-expected-went"),
        pytest.param(layer(64, 8, 24, 0), Fate(0, 0, 24, 40), id="gone"),
        pytest.param(layer(64, 0, 64, 0), Fate(0, 0, 64, 0), id="gone-as-a-constant"),
        pytest.param(layer(64, 64, 0, 4), Fate(0, 4, 0, 60), id="nothing-live-but-there"),
    ],
)
def test_fate(found: Layer, expected: Fate) -> None:
    assert fate(found) == expected


def test_every_channel_is_counted_once() -> None:
    for outputs, dead, constant, after in product(range(7), repeat=4):
        if dead + constant > outputs or after > outputs:
            continue
        counts = fate(layer(outputs, dead, constant, after))
        assert sum(counts) == outputs
        assert min(counts) >= 0
        assert counts.live + counts.kept == after
        assert counts.live <= outputs - dead - constant
        assert counts.constant <= constant


@pytest.mark.parametrize(("multiple", "first"), [(1, Fate(8, 0, 3, 1)), (10, Fate(8, 2, 1, 1))])
def test_a_model_with_every_kind(multiple: int, first: Fate) -> None:
    _, report = simplify(network(), channel_multiple=multiple)
    found = {x.name: fate(x) for x in report.layers}
    assert found["conv1"] == first
    assert found["conv4"] == Fate(0, 0, 8, 0)
    assert found["gemm1"] == Fate(5, 0, 0, 0)
    if multiple == 1:
        # Constant in one branch alone: kept, as the other branch's channel varies.
        assert found["conv2"] == Fate(4, 2, 2, 0)
        assert found["conv3"] == Fate(6, 0, 2, 0)


def test_totals() -> None:
    fates = [Fate(8, 2, 1, 1), Fate(0, 0, 8, 0)]
    assert channel_map.total(fates) == Fate(8, 2, 9, 1)
    assert channel_map.summary(fates) == "2 layers, 10 of 20 channels removed (50%)"


class Page(HTMLParser):
    """What a page holds: text by cell, tooltips, widths and weights of bars, and open tags."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.tips: list[str | None] = []
        self.parts: list[list[tuple[str | None, str | None]]] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        found = dict(attrs)
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr" and "title" in found:
            self.rows.append([])
            self.tips.append(found["title"])
            self.parts.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag == "i" and "td" in self.open:
            self.parts[-1].append((found["class"], found["style"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.rows[-1][-1] += data


def test_the_page_shows_the_counts() -> None:
    text = channel_map.page([layer(1200, 8, 24, 1170, "a"), layer(600, 0, 0, 600, "b")], "T")
    page = Page(text)
    assert not page.open
    assert page.rows == [
        ["1", "a", "Conv", "", "1,168", "2", "22", "8", "1,200", "1,170"],
        ["2", "b", "Conv", "", "600", "0", "0", "0", "600", "600"],
    ]
    assert page.tips[0] == (
        "a (Conv)\n1,200 channels, 1,170 after\nlive 1,168, kept 2, constant 22, dead 8"
    )
    assert page.parts[0] == [
        ("live", "flex: 1168"),
        ("kept", "flex: 2"),
        ("constant", "flex: 22"),
        ("dead", "flex: 8"),
    ]
    assert page.parts[1] == [("live", "flex: 600")]
    assert '<div style="width: 50.00%"><i class="live" style="flex: 600">' in text
    for total in ("live 1,768", "kept 2", "constant 22", "dead 8"):
        assert f"</i>{total}</dt>" in text
    assert "2 layers, 30 of 1,800 channels removed (2%)" in text


def test_the_page_escapes_names() -> None:
    found = layer(4, 0, 0, 4, HOSTILE)
    found.op = "<Op>"
    text = channel_map.page([found], HOSTILE)
    page = Page(text)
    assert page.rows[0][1:3] == [HOSTILE, "<Op>"]
    assert page.tips[0] is not None and page.tips[0].startswith(f"{HOSTILE} (<Op>)\n")
    assert "script" not in page.tags
    assert "<script" not in text and "<Op>" not in text


def test_the_page_refers_to_nothing_outside() -> None:
    text = channel_map.page([layer(4, 0, 0, 4)], "T")
    page = Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not page.attributes & {"src", "href", "srcset"}
    for word in ("http", "url(", "@import", "//"):
        assert word not in text
    assert "prefers-color-scheme: dark" in text


def pixels(png: bytes) -> tuple[dict[str, int], tuple[int, int]]:
    """How many pixels have each kind's colour, and width and height of the picture."""
    image = pytest.importorskip("matplotlib.image").imread(io.BytesIO(png), format="png")
    image = np.round(image[..., :3] * 255).astype(int)
    found = {}
    for kind, colour in channel_map.COLOURS.items():
        wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
        found[kind] = int((image == wanted).all(axis=-1).sum())
    return found, (image.shape[1], image.shape[0])


@pytest.mark.parametrize("count", [20, channel_map.NAMED, channel_map.NAMED + 1, 200])
def test_areas_in_the_picture_are_the_counts(count: int) -> None:
    pytest.importorskip("matplotlib")
    one = layer(512, 64, 256, 320)
    found, (width, height) = pixels(channel_map.picture([one] * count, "T"))
    areas = {kind: found[kind] / sum(found.values()) for kind in found}
    expected = dict(live=192 / 512, kept=128 / 512, constant=128 / 512, dead=64 / 512)
    assert areas == pytest.approx(expected, abs=0.02)
    assert 1000 < width < 2500 and 400 < height < 1400


def test_the_picture_takes_any_name() -> None:
    pytest.importorskip("matplotlib")
    png = channel_map.picture([layer(4, 0, 0, 4, HOSTILE)], HOSTILE)
    assert png.startswith(b"\x89PNG")


def test_long_names_lose_their_middle() -> None:
    assert channel_map.shortened("a" * 40) == "a" * 40
    assert channel_map.shortened("a" * 30 + "\n" + "b" * 30) == "a" * 19 + "…" + "b" * 20


def test_the_script_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "models").mkdir()
    onnx.save(network(), tmp_path / "models" / "net.v1.onnx")
    monkeypatch.chdir(tmp_path)
    assert channel_map.main(["models/net.v1.onnx"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "models",
        "net.v1-channels.html",
        "net.v1-channels.png",
    ]
    assert (tmp_path / "net.v1-channels.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "net.v1-channels.html").read_text(encoding="utf-8")
    assert "<h1>net.v1.onnx</h1>" in text
    # Eight fill up every target's multiple, so that the counts are the same on all machines.
    rows = Page(text).rows
    assert rows[0] == ["1", "conv1", "Conv", "", "8", "0", "3", "1", "12", "8"]
    assert "net.v1-channels.png, net.v1-channels.html: 5 layers" in capsys.readouterr().out
    assert channel_map.main(["models/net.v1.onnx", "--out", "sub/map", "--title", "A & B"]) == 0
    assert "<h1>A &amp; B</h1>" in (tmp_path / "sub" / "map.html").read_text(encoding="utf-8")
    assert (tmp_path / "sub" / "map.png").exists()


def weightless() -> bytes:
    g = Graph()
    g.output(g.op("Relu", g.input("x", [1, 3])))
    return g.model().SerializeToString()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (lambda: b"", "is empty"),
        (lambda: b"not a model", "not an ONNX model"),
        (weightless, "no layers with weights"),
    ],
    ids=["missing", "empty", "garbage", "weightless"],
)
def test_bad_input(
    content: Callable[[], bytes] | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    model = tmp_path / "in.onnx"
    if content is not None:
        model.write_bytes(content())
    out = tmp_path / "out"
    assert channel_map.main([str(model), "--out", str(out / "map")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("channel_map: ") and message in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()


def test_an_unwritable_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    onnx.save(network(), tmp_path / "in.onnx")
    out = tmp_path / "in.onnx" / "map"
    assert channel_map.main([str(tmp_path / "in.onnx"), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("channel_map: ") and captured.err.count("\n") == 1


def test_matplotlib_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    onnx.save(network(), tmp_path / "in.onnx")
    assert channel_map.main([str(tmp_path / "in.onnx"), "--out", str(tmp_path / "map")]) == 2
    assert capsys.readouterr().err == (
        "channel_map: matplotlib is missing: pip install matplotlib\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]
