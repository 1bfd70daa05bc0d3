"""Draw where the channels of a model went, layer by layer.

    python scripts/channel_map.py MODEL.onnx [--out PREFIX] [--title TEXT]

Simplifies the model and writes PREFIX.png and PREFIX.html (default: MODEL-channels in the current
directory). Every layer with weights is a bar in execution order, made of its output channels:

    live       vary with the input and are needed
    kept       constant or dead, but still there: to fill up a multiple, or because something
               coupled to them stays
    constant   removed: they did not depend on the input, and their readers absorbed them
    dead       removed: nothing reads them

The page needs no network and no script; hovering over a layer shows its numbers. The picture needs
matplotlib. docs/channel-map.png shows torchvision's ResNet-18, pruned by the protocol P1 of
`torch_bridge.zoo`. Exit code 2 if the model cannot be read or has no layers with weights, or if
the files cannot be written; otherwise that of onnx-simplify.
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from publish import write

if TYPE_CHECKING:
    from onnx_simplify.report import Layer

# Blue and orange for what is left (Okabe and Ito's), faint colours for what is gone. The blues, and
# orange and grey, differ in lightness: the four are told apart with any colour vision.
COLOURS = {"live": "#0072b2", "kept": "#e69f00", "constant": "#a9d5f2", "dead": "#a0a0a0"}
COLOURS_IN_THE_DARK = {
    "live": "#56b4e9",
    "kept": "#e69f00",
    "constant": "#1f5478",
    "dead": "#666666",
}
LABELS = {
    "live": "live",
    "kept": "constant or dead, kept",
    "constant": "constant, removed",
    "dead": "dead, removed",
}
MEANINGS = {
    "live": "vary with the input and are needed",
    "kept": "constant or dead, but could not be removed, or fill up a multiple",
    "constant": "removed: absorbed by their readers",
    "dead": "removed: nothing reads them",
}
# With more layers than this, bars stand upright and names are left to the page.
NAMED = 45
LONGEST_NAME = 40
# Inches above the bars of the picture.
HEADER = 0.95


class Fate(NamedTuple):
    """How many output channels of a layer went where."""

    live: int
    kept: int
    constant: int
    dead: int


def fate(layer: Layer) -> Fate:
    """Divide a layer's output channels into four kinds that add up to ``layer.outputs``.

    A report counts dead and constant channels (which do not overlap) before anything is removed,
    and how many channels are there afterwards, but not which:

    - More are there than vary: the surplus is *kept*. It is taken from the constant channels
      first: what needs no reader to absorb it mostly goes.
    - Fewer are there than vary: nothing needed the missing ones any more once constants had been
      absorbed, so they are *dead*. Channels that fill up a multiple then pass for live.
    """
    varying = layer.outputs - layer.dead - layer.constant
    live = min(varying, layer.outputs_after)
    kept = layer.outputs_after - live
    constant = max(layer.constant - kept, 0)
    return Fate(live, kept, constant, layer.removed - constant)


def total(fates: Sequence[Fate]) -> Fate:
    """The sum over all layers."""
    return Fate(*map(sum, zip(*fates, strict=True)))


def summary(fates: Sequence[Fate]) -> str:
    """How much is gone, in a few words."""
    everything = total(fates)
    gone, count = everything.constant + everything.dead, sum(everything)
    layers = "1 layer" if len(fates) == 1 else f"{len(fates)} layers"
    return f"{layers}, {gone:,} of {count:,} channels removed ({gone / max(count, 1):.0%})"


def picture(layers: Sequence[Layer], title: str) -> bytes:
    """The map as a PNG file: lying bars with names if they are few, else upright ones without."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    fates = [fate(layer) for layer in layers]
    upright = len(layers) > NAMED
    width, height = 9.0, HEADER + 0.15 + 0.21 * len(layers)
    if upright:
        width, height = min(max(width, 0.08 * len(layers)), 18.0), HEADER + 3.6
    # Names are not formulas, even with dollar signs in them.
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):
        layout = ConstrainedLayoutEngine(w_pad=0.1, rect=(0, 0, 1, 1 - HEADER / height))
        figure = Figure(figsize=(width, height), dpi=130, layout=layout)
        axes = figure.add_subplot()
        axes.spines[:].set_visible(False)
        (_upright if upright else _lying)(axes, layers, fates)
        left = 0.1 / width
        figure.text(left, 1 - 0.1 / height, title, va="top", size=12, weight="bold")
        figure.text(left, 1 - 0.38 / height, summary(fates), va="top", color="#555555")
        figure.legend(
            [Patch(color=colour) for colour in COLOURS.values()],
            [f"{LABELS[kind]}  {n:,}" for kind, n in total(fates)._asdict().items()],
            loc="upper left",
            bbox_to_anchor=(left, 1 - 0.66 / height),
            ncols=len(COLOURS),
            frameon=False,
            handlelength=1,
            handleheight=1,
            handletextpad=0.5,
            columnspacing=2,
            borderpad=0,
            borderaxespad=0,
        )
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def _lying(axes: Any, layers: Sequence[Layer], fates: Sequence[Fate]) -> None:
    """One row per layer, the first on top, with its name before it and its counts behind."""
    rows = range(len(layers))
    for kind, start, count in _segments(fates):
        axes.barh(rows, count, 0.78, start, color=COLOURS[kind], edgecolor="white", linewidth=0.6)
    for row, layer in enumerate(layers):
        text = f"{layer.outputs:,}"
        if layer.removed:
            text += f" → {layer.outputs_after:,}"
        axes.annotate(
            text,
            (layer.outputs, row),
            (4, 0),
            textcoords="offset points",
            va="center_baseline",
            size=8,
            color="#555555",
        )
    axes.set_yticks(rows, [shortened(layer.name) for layer in layers], size=8)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlim(0, max(1, *(layer.outputs for layer in layers)))


def _upright(axes: Any, layers: Sequence[Layer], fates: Sequence[Fate]) -> None:
    """One column per layer, the first on the left."""
    columns = range(1, len(layers) + 1)
    for kind, start, count in _segments(fates):
        axes.bar(columns, count, 0.85, start, color=COLOURS[kind], linewidth=0)
    axes.set_xlabel("layer, in execution order")
    axes.set_ylabel("output channels")
    axes.set_xlim(0.4, len(layers) + 0.6)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(length=0, colors="#555555")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _segments(fates: Sequence[Fate]) -> Iterator[tuple[str, list[int], list[int]]]:
    """Each kind with where its part of every bar starts and how long that is."""
    start = [0] * len(fates)
    for kind, counts in zip(Fate._fields, zip(*fates, strict=True), strict=True):
        yield kind, start, list(counts)
        start = [s + c for s, c in zip(start, counts, strict=True)]


def shortened(name: str) -> str:
    """The name on one line, without its middle if it is long."""
    name = " ".join(name.split())
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME // 2 - 1]}…{name[-LONGEST_NAME // 2 :]}"


STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --faint: #666; --line: #e2e2e2; --back: #fff }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --faint: #a0a0a0; --line: #333; --back: #16181b }
}
body { font: 14px/1.4 system-ui, sans-serif; color: var(--text); background: var(--back);
  margin: 2em auto; max-width: 84em; padding: 0 1em }
h1 { font-size: 1.4em; margin: 0; overflow-wrap: anywhere }
p { color: var(--faint); margin: .2em 0 1.2em }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11em, 1fr)); gap: 1em }
dt { font-weight: bold }
dt i { display: inline-block; width: .8em; height: .8em; margin-right: .4em }
dd { margin: 0; color: var(--faint); font-size: .9em }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { position: sticky; top: 0; background: var(--back); text-align: left }
th, td { padding: .15em .5em; border-bottom: 1px solid var(--line) }
td.n, th.n { text-align: right }
td.name { max-width: 22em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
td.map { width: 45% }
td.map div { display: flex; height: 1.1em; min-width: 2px }
tr:hover td { background: var(--line) }
"""


def page(layers: Sequence[Layer], title: str) -> str:
    """The map as an HTML document that refers to nothing outside of itself."""
    fates = [fate(layer) for layer in layers]
    dark = f"@media (prefers-color-scheme: dark) {{\n{_rules(COLOURS_IN_THE_DARK)}}}\n"
    totals = "\n".join(
        f'<div><dt><i class="{kind}"></i>{kind} {count:,}</dt><dd>{MEANINGS[kind]}</dd></div>'
        for kind, count in total(fates)._asdict().items()
    )
    widest = max(1, *(layer.outputs for layer in layers))
    rows = "\n".join(
        _row(number, layer, found, widest)
        for number, (layer, found) in enumerate(zip(layers, fates, strict=True), 1)
    )
    numbers = "".join(f'<th class="n">{h}</th>' for h in (*Fate._fields, "before", "after"))
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>{STYLE}{_rules(COLOURS)}{dark}</style>
<h1>{html.escape(title)}</h1>
<p>{summary(fates)}</p>
<dl>
{totals}
</dl>
<table>
<thead>
<tr><th class="n">#</th><th>layer</th><th>operator</th><th>channels</th>{numbers}</tr>
</thead>
<tbody>
{rows}
</tbody>
</table>
</html>
"""


def _rules(colours: Mapping[str, str]) -> str:
    return "".join(f".{kind} {{ background: {colour} }}\n" for kind, colour in colours.items())


def _row(number: int, layer: Layer, found: Fate, widest: int) -> str:
    counts = found._asdict()
    tip = f"{layer.name} ({layer.op})\n{layer.outputs:,} channels, {layer.outputs_after:,} after\n"
    tip += ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    bar = "".join(f'<i class="{k}" style="flex: {n}"></i>' for k, n in counts.items() if n)
    cells = [
        f'<td class="n">{number}</td>',
        f'<td class="name">{html.escape(layer.name)}</td>',
        f"<td>{html.escape(layer.op)}</td>",
        f'<td class="map"><div style="width: {layer.outputs / widest:.2%}">{bar}</div></td>',
        *(f'<td class="n">{n:,}</td>' for n in (*found, layer.outputs, layer.outputs_after)),
    ]
    return f'<tr title="{html.escape(tip)}">{"".join(cells)}</tr>'


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the map of one model."""
    parser = argparse.ArgumentParser(description="Draw where the channels of a model went.")
    parser.add_argument("model", metavar="MODEL.onnx", help="the model, before simplification")
    parser.add_argument("--out", metavar="PREFIX", help="write PREFIX.png and PREFIX.html")
    parser.add_argument("--title", metavar="TEXT", help="heading (default: the file's name)")
    options = parser.parse_args(arguments)
    prefix = options.out or f"{Path(options.model).stem}-channels"
    title = options.title or Path(options.model).name
    if importlib.util.find_spec("matplotlib") is None:
        return _complain("matplotlib is missing: pip install matplotlib", 2)
    import onnx_simplify

    try:
        _, report = onnx_simplify.simplify(options.model)
        if not report.layers:
            return _complain(f"{options.model} has no layers with weights: nothing to draw", 2)
        # Both are made before either is written.
        png, document = picture(report.layers, title), page(report.layers, title)
        write(Path(f"{prefix}.png"), png)
        write(Path(f"{prefix}.html"), document)
    except onnx_simplify.SimplifyError as error:
        return _complain(str(error), error.exit_code)
    except OSError as error:
        return _complain(f"{error.filename or prefix}: {error.strerror or error}", 2)
    print(f"{prefix}.png, {prefix}.html: {summary([fate(x) for x in report.layers])}")
    return 0


def _complain(text: str, code: int) -> int:
    print(f"channel_map: {' '.join(text.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
