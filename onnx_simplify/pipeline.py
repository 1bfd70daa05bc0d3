"""The passes in order, with measurement and verification around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnx_simplify.channels.analysis import Analysis
from onnx_simplify.errors import CannotVerifyError, SimplifyError, VerificationError
from onnx_simplify.graph.edit import label
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.shapes import infer
from onnx_simplify.passes.absorb_gathers import absorb_gathers
from onnx_simplify.passes.clean import clean
from onnx_simplify.passes.compress_maps import compress_maps
from onnx_simplify.passes.fold_batchnorm import check_pairs, fold_batchnorm
from onnx_simplify.passes.fold_shapes import fold_shapes
from onnx_simplify.passes.propagate_bias import propagate_bias
from onnx_simplify.passes.reblock_maps import reblock_maps
from onnx_simplify.passes.remove_zeroed import remove_zeroed
from onnx_simplify.planning.planner import Planner
from onnx_simplify.planning.profiles import profile
from onnx_simplify.report import Opaque, Report, add_findings, figures, ideal_macs, layers
from onnx_simplify.runtime.benchmark import time_models
from onnx_simplify.runtime.inputs import candidate_sizes, input_specs
from onnx_simplify.runtime.measure import settle_disputes
from onnx_simplify.runtime.verify import Reference

PASSES = ("fold_batchnorm", "propagate_bias", "remove_zeroed")

# So often the passes run at most; almost always one turn is all it takes.
_TURNS = 4
_HALF_PRECISION = ("float16", "bfloat16")


@dataclass
class Options:
    """How to simplify; see :func:`onnx_simplify.simplify` for the meaning of each."""

    pinned: Collection[str] = ()
    skip: Collection[str] = ()
    bn_folding: Collection[tuple[str, str]] | None = None
    input_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    input_data: Mapping[str, np.ndarray] | None = None
    verify: bool = True
    rtol: float | None = None
    checks: int = 2
    target: str | None = None
    channel_multiple: int | None = None
    benchmark: bool = False
    threads: int = 1
    progress: Callable[[str], None] | None = None


@np.errstate(all="ignore")
def run(original: Model, options: Options) -> tuple[Model, Report]:
    """Simplify a model.

    Args:
        original: the model as loaded; it is not modified.
        options: what to do.

    Returns:
        The simplified model and the report.

    Raises:
        ModelError: an option does not fit the model.
        CannotVerifyError: the original runs on no input and verification was asked for.
        VerificationError: the result differs.
    """
    start = time.perf_counter()
    step = options.progress or (lambda text: None)
    planner = Planner(profile(options.target, options.channel_multiple))
    half = is_half(original)
    step("running the original")
    reference, trouble = _reference(original, options)
    original.release()
    shapes = _shapes(original, options, reference)
    model = original.copy()
    model.pin(options.pinned)
    before = figures(original, shapes)
    before.bytes = original.source_bytes or before.bytes
    report = Report(before=before, after=before)
    report.input_shapes = shapes
    report.target = planner.profile.name
    if original.stand_in:
        report.notes.append(
            "run in float32: onnxruntime's CPU kernels do not cover this model's types"
        )
    if trouble is not None:
        report.notes.append(f"constants were not looked for: {trouble}")
    step("analysing")
    simplify_in_place(model, planner, reference, report, options, step)
    report.after = figures(model, shapes)
    original.release()
    if reference is not None and options.verify:
        step("verifying")
        found = report.verification = reference.compare(model, options.rtol, half=half)
        if not found.passed:
            if half and "fold_batchnorm" not in options.skip:
                # Folding rounds the weights once more, which half precision may not forgive.
                skip = {*options.skip, "fold_batchnorm"}
                model, report = run(original, replace(options, skip=skip))
                report.notes.append("BatchNormalization left alone: folding it costs precision")
                return model, report
            raise VerificationError(f"verification failed, nothing written: {found.reason}")
    report.seconds = time.perf_counter() - start
    if options.benchmark and reference is not None:
        step("benchmarking")
        report.benchmark = time_models(
            {"dense": original, "simplified": model},
            reference.runs[0].feeds,
            threads=options.threads,
            progress=lambda done, total: step(f"benchmarking: round {done} of {total}"),
        )
    return model, report


def simplify_in_place(
    model: Model,
    planner: Planner,
    reference: Reference | None,
    report: Report,
    options: Options,
    step: Callable[[str], None],
) -> None:
    """Run the passes, and fill in the report's layers."""
    clean(model)
    settle_disputes(model, None if reference is None else reference.feeds[0])
    fold_shapes(model)
    if options.bn_folding is not None:
        infer(model)
        check_pairs(model, options.bn_folding)
    if "fold_batchnorm" not in options.skip:
        report.batchnorms_folded = fold_batchnorm(model, options.bn_folding)
        model.release()
    before = layers(model)
    report.layers = list(before.values())

    def observe(analysis: Analysis) -> None:
        add_findings(before, analysis)
        if analysis.level:
            report.ideal_macs = ideal_macs(analysis, report.input_shapes, before)
        report.opaque = [
            Opaque(label(n), n.op, analysis.layouts.opaque.get(id(n), "operator not known"))
            for n in model.graph.nodes
            if analysis.is_opaque(n)
        ]

    if reference is None or "propagate_bias" in options.skip:
        observe(Analysis(model))
    for turn in range(_TURNS):
        present = {id(n) for n in model.graph.nodes}
        if reference is not None and not {"propagate_bias", "remove_zeroed"} <= set(options.skip):
            step("absorbing constants")
            propagate_bias(
                model,
                planner,
                reference.feeds,
                only_zeros="propagate_bias" in options.skip,
                observe=observe if turn == 0 and "propagate_bias" not in options.skip else None,
            )
        if "remove_zeroed" not in options.skip:
            step("removing channels")
            remove_zeroed(model, planner)
        clean(model)
        if "fold_batchnorm" not in options.skip and any(
            n.op == "BatchNormalization" for n in model.graph.nodes
        ):
            infer(model)
            report.batchnorms_folded += fold_batchnorm(model, options.bn_folding)
        if present <= {id(n) for n in model.graph.nodes}:
            break
        # Where nodes are gone, others may have become neighbours, or constant.
    absorb_gathers(model, planner)
    reblock_maps(model, planner.profile)
    compress_maps(model)
    after = layers(model)
    for node, layer in before.items():
        if node in after:
            layer.outputs_after = after[node].outputs
            layer.inputs_after = after[node].inputs


def is_half(model: Model) -> bool:
    """Whether any weights have half precision."""
    return any(
        str(np.dtype(t.dtype)) in _HALF_PRECISION for t in model.initializers().values()
    )


def _reference(model: Model, options: Options) -> tuple[Reference | None, str | None]:
    """Runs of the original, or why there are none (only if verification was not asked for)."""
    try:
        reference = Reference(
            model,
            input_shapes=options.input_shapes,
            input_data=options.input_data,
            count=options.checks,
        )
        return reference, None
    except CannotVerifyError as error:
        if options.verify:
            raise
        return None, str(error)


def _shapes(
    model: Model, options: Options, reference: Reference | None
) -> dict[str, list[int]]:
    """Shapes to count MACs for."""
    if reference is not None:
        return {n: list(v.shape) for n, v in reference.runs[0].feeds.items()}
    try:
        specs = input_specs(model, options.input_shapes)
    except SimplifyError:
        return {}
    sizes = next(candidate_sizes(specs), {})
    return {s.name: [sizes[d] if isinstance(d, str) else d for d in s.dims] for s in specs}
