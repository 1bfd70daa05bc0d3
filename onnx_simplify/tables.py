"""Reports as text: tables and lines for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnx_simplify.options import as_options
from onnx_simplify.report import Report
from onnx_simplify.runtime.benchmark import Timing


def print_summary(console: Console, report: Report) -> None:
    """What changed, remarks, and the verdict of verification."""
    before, after = report.before, report.after
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("", "before", "after", "change"):
        table.add_column(title, justify="left" if not title else "right")
    for op in sorted({*before.nodes, *after.nodes}):
        old, new = before.nodes.get(op, 0), after.nodes.get(op, 0)
        table.add_row(op, str(old), str(new), f"{new - old:+d}" if new != old else "")
    table.add_section()
    table.add_row("nodes", *_counts(sum(before.nodes.values()), sum(after.nodes.values())))
    table.add_row("parameters", *_counts(before.parameters, after.parameters))
    if before.macs is not None and after.macs is not None:
        table.add_row("MACs", *_counts(before.macs, after.macs))
    table.add_row("file size (bytes)", *_counts(before.bytes, after.bytes))
    outputs = sum(layer.outputs for layer in report.layers)
    table.add_row("channels of layers", *_counts(outputs, outputs - report.channels_removed))
    if report.benchmark is not None:
        dense, simplified = report.benchmark["dense"], report.benchmark["simplified"]
        table.add_section()
        table.add_row(
            "time (ms, median)",
            f"{dense.median:.3f}",
            f"{simplified.median:.3f}",
            f"{report.speedup:.2f}x faster",
        )
        table.add_row(
            "  quartiles",
            f"{dense.low:.3f}..{dense.high:.3f}",
            f"{simplified.low:.3f}..{simplified.high:.3f}",
            "",
        )
    console.print(table)
    if report.plans is not None and len(report.plans) > 1:
        _print_plans(console, report.plans, report.plan)
    _print_notes(console, report)
    if report.threshold:
        _print_small(console, report)
    found = report.verification
    if found is None:
        console.print("not verified")
    else:
        console.print(
            f"verified on {found.runs} inputs: worst relative error {found.worst:.1e} "
            f"(allowed {found.tolerance:.0e})"
        )


def _print_small(console: Console, report: Report) -> None:
    """What a threshold did, layer by layer."""
    layers = [layer for layer in report.layers if layer.small]
    if layers:
        table = Table(box=box.SIMPLE_HEAD)
        for title in ("layer", "outputs", "taken for zero"):
            table.add_column(
                title, justify="left" if title == "layer" else "right", overflow="fold"
            )
        for layer in layers:
            table.add_row(escape(layer.name), str(layer.outputs), str(layer.small))
        console.print(table)
    console.print(
        f"{sum(layer.small for layer in layers)} channels below {report.threshold:.1e} of their "
        "layer were taken for zero"
    )


def _print_plans(console: Console, plans: Mapping[str, Timing], chosen: str) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("plan", "time (ms, median)", "quartiles"):
        table.add_column(title, justify="left" if title == "plan" else "right")
    for name, time in plans.items():
        mark = " (taken)" if name == chosen else ""
        table.add_row(f"{name}{mark}", f"{time.median:.3f}", f"{time.low:.3f}..{time.high:.3f}")
    console.print(table)


def _print_notes(console: Console, report: Report) -> None:
    for note in report.notes:
        console.print(f"note: {as_options(note)}", markup=False)


def _counts(before: int, after: int) -> tuple[str, str, str]:
    change = "" if before == after or not before else f"{(after - before) / before:+.1%}"
    return f"{before:,}", f"{after:,}", change


def print_layers(console: Console, report: Report) -> None:
    """Every layer with weights: which of its channels could go, and why others stay."""
    table = Table(box=box.SIMPLE_HEAD)
    words = ("layer", "operator", "why others stay")
    reasons = words[2:] if any(layer.stays for layer in report.layers) else ()
    for title in (*words[:2], "inputs", "outputs", "dead", "constant", "removable", *reasons):
        table.add_column(title, justify="left" if title in words else "right", overflow="fold")
    for layer in report.layers:
        table.add_row(
            escape(layer.name),
            layer.op,
            *(
                str(v)
                for v in (layer.inputs, layer.outputs, layer.dead, layer.constant, layer.removed)
            ),
            *[
                escape(", ".join(f"{n} {reason}" for reason, n in layer.stays.items()))
                for _ in reasons
            ],
        )
    console.print(table)
    console.print(
        f"{report.channels_removed} of {sum(x.outputs for x in report.layers)} output channels, "
        f"{report.before.parameters - report.after.parameters:,} of "
        f"{report.before.parameters:,} parameters can be removed"
    )
    _print_notes(console, report)


def print_steps(console: Console, report: Report) -> None:
    """The plan as it was carried out, layer by layer."""
    for step in (*report.prepared, *report.steps):
        console.print(escape(str(step)), soft_wrap=True)


def print_opaque(console: Console, report: Report) -> None:
    """The nodes that were left alone, and why."""
    for node in report.opaque:
        console.print(f"left alone: {node.op} '{node.name}': {node.reason}", markup=False)
