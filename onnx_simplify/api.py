"""The Python interface: functions from model to model.

Every function takes a path, serialized bytes or a ``ModelProto`` (which is never modified) and
gives a new, valid ``ModelProto``.

    import onnx_simplify

    model, report = onnx_simplify.simplify("pruned.onnx")
    print(report.channels_removed, report.verification.worst)

or step by step:

    import onnx_simplify

    print(onnx_simplify.get_bn_folding("pruned.onnx"))
    folded = onnx_simplify.fold_batchnorm("pruned.onnx")
    shifted = onnx_simplify.propagate_bias(folded, pinned=onnx_simplify.get_pinned(folded))
    small = onnx_simplify.remove_zeroed(shifted)
    assert onnx_simplify.verify("pruned.onnx", small).passed
    times = onnx_simplify.benchmark({"dense": "pruned.onnx", "small": small}, rounds=3)
    print(times["dense"].median / times["small"].median)
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
from onnx import ModelProto

from onnx_simplify import pipeline
from onnx_simplify.errors import CannotVerifyError
from onnx_simplify.facts.facts import Facts
from onnx_simplify.facts.sizes import settle
from onnx_simplify.graph.edit import label
from onnx_simplify.graph.load import ModelSource, load
from onnx_simplify.graph.model import Model, fits_message
from onnx_simplify.graph.store import check_writable, save
from onnx_simplify.options import Options, as_names, check_positive, checked_target
from onnx_simplify.passes.clean import clean
from onnx_simplify.passes.fold_batchnorm import check_pairs, foldable
from onnx_simplify.passes.fold_batchnorm import fold_batchnorm as _fold_batchnorm
from onnx_simplify.passes.fold_shapes import settle_sizes
from onnx_simplify.passes.fused import fuse_again
from onnx_simplify.passes.join_pads import join_pads
from onnx_simplify.passes.rewrite import rewrite
from onnx_simplify.pipeline import constant_outputs, is_half
from onnx_simplify.planning.planner import Planner
from onnx_simplify.planning.profiles import profile
from onnx_simplify.report import Report
from onnx_simplify.runtime.benchmark import Timing, time_models
from onnx_simplify.runtime.evidence import Evidence
from onnx_simplify.runtime.reference import Reference
from onnx_simplify.runtime.verdict import Verification
from onnx_simplify.schedule import make_plan
from onnx_simplify.worker import simplify_apart

Shapes = Mapping[str, Sequence[int]]


def simplify(  # noqa: PLR0913  (the options, as keywords)
    model: ModelSource,
    *,
    pinned: Collection[str] = (),
    skip: Collection[str] = (),
    bn_folding: Collection[tuple[str, str]] | None = None,
    input_shapes: Shapes | None = None,
    input_data: Mapping[str, np.ndarray] | None = None,
    verify: bool = True,
    rtol: float | None = None,
    checks: int = 2,
    target: str | None = None,
    channel_multiple: int | None = None,
    benchmark: bool = False,
    tune: bool = False,
    threads: int = 1,
    threshold: float = 0.0,
    auto_threshold: float | None = None,
    freeze_weights: bool = False,
    save_to: str | os.PathLike[str] | None = None,
    isolated: bool = False,
) -> tuple[ModelProto, Report]:
    """Make a model as small and fast as its pruned channels allow.

    Args:
        model: a path, serialized bytes, or a message (not modified).
        pinned: names of tensors, nodes or initializers whose channels must stay.
        skip: passes to leave out, of ``fold_batchnorm``, ``propagate_bias``, ``remove_zeroed``.
        bn_folding: pairs to fold, of those that :func:`get_bn_folding` lists; all by default.
        input_shapes: shapes to run the model with, by input name; needed only where it accepts no
            shape that can be guessed.
        input_data: arrays to run the model with, by input name.
        verify: compare the result with the original in onnxruntime.
        rtol: bound on the error relative to each output's largest magnitude; by default 1e-4, or
            1e-2 for models with half-precision weights.
        checks: number of random inputs (two at least; other sizes come on top).
        target: planner profile, ``avx2``, ``avx512`` or ``generic``; by default this machine's.
        channel_multiple: keep dead channels so that channel counts of convolutions are multiples
            of this; by default the profile's (1: keep none).
        benchmark: time the original and the result, see ``Report.benchmark``; a result that turns
            out slower gives way to the original, merely cleaned.
        tune: try out other plans than the cost model's as well, and take the fastest, see
            ``Report.plans``.
        threads: onnxruntime threads for the timings.
        threshold: take channels for zero none of whose weights is larger than this share of the
            layer's largest; 0 is exact. ``rtol`` bounds how much that changes the outputs.
        auto_threshold: find the largest threshold that changes no output by more than this,
            relative to its magnitude, on ``input_data``; instead of ``threshold``.
        freeze_weights: declare weights final that are graph inputs as well (IR version 4 and
            newer), which a caller could replace; they are no inputs of the result.
        save_to: write the result to this file as well, replacing it as a whole or not at all. The
            only way to get at results of more than 2 GiB, which get a data file beside it.
        isolated: work in a process of its own, so that a crash of native code, which a damaged
            model can cause, becomes a ModelError.

    Returns:
        The simplified model and the report. A model that was too large for one message refers to
        the data file beside ``save_to``.

    Raises:
        ModelError: the model cannot be read or is invalid, or an argument does not fit it; or the
            result is larger than 2 GiB and ``save_to`` is not given; or, with ``isolated``, the
            process crashed.
        CannotVerifyError: the original itself does not run, and ``verify`` is true.
        VerificationError: the result differs from the original.
    """
    arguments = dict(locals())
    if arguments.pop("isolated"):
        return simplify_apart(arguments)
    options = Options.of(arguments)
    if save_to is not None:
        check_writable(save_to)
    result, report = pipeline.run(load(model, freeze_weights=freeze_weights), options)
    if save_to is None:
        return result.to_proto(), report
    report.after.bytes = save(result, save_to)
    if fits_message(result):
        return result.to_proto(), report
    return onnx.load(os.fspath(save_to), load_external_data=False), report


def fold_batchnorm(
    model: ModelSource, pairs: Collection[tuple[str, str]] | None = None
) -> ModelProto:
    """Fold BatchNormalization nodes into the linear nodes around them.

    Args:
        model: the model.
        pairs: (linear node, BatchNormalization node) by name, as :func:`get_bn_folding` lists
            them; all by default.

    Raises:
        ModelError: the model is invalid, or a pair cannot be folded.
    """
    working = _cleaned(model)
    if pairs is not None:
        settle(working)
        pairs = check_pairs(working, pairs)
    _fold_batchnorm(working, pairs)
    return _finished(working)


def propagate_bias(
    model: ModelSource,
    pinned: Collection[str] = (),
    *,
    input_shapes: Shapes | None = None,
    input_data: Mapping[str, np.ndarray] | None = None,
    target: str | None = None,
) -> ModelProto:
    """Let the readers of constant channels absorb them, so that nobody needs these channels.

    Shapes do not change; :func:`remove_zeroed` removes the channels.

    Args:
        model: the model.
        pinned: names of tensors, nodes or initializers whose channels must stay.
        input_shapes: as for :func:`simplify`.
        input_data: as for :func:`simplify`.
        target: planner profile; by default this machine's.

    Raises:
        ModelError: the model is invalid, or an argument does not fit it.
        CannotVerifyError: the model does not run, so constants cannot be measured.
    """
    working = _cleaned(model, pinned)
    planner = Planner(profile(checked_target(target)))
    rewrite(make_plan(working, planner, _evidence(working, input_shapes, input_data), cut=False))
    return _finished(working)


def remove_zeroed(
    model: ModelSource,
    pinned: Collection[str] = (),
    *,
    input_shapes: Shapes | None = None,
    input_data: Mapping[str, np.ndarray] | None = None,
    target: str | None = None,
    channel_multiple: int | None = None,
) -> ModelProto:
    """Remove channels that are zero or that nothing reads, and everything coupled to them.

    Args:
        model: the model.
        pinned: names of tensors, nodes or initializers whose channels must stay.
        input_shapes: as for :func:`simplify`.
        input_data: as for :func:`simplify`.
        target: planner profile; by default this machine's.
        channel_multiple: as for :func:`simplify`.

    Raises:
        ModelError: the model is invalid, or an argument does not fit it.
        CannotVerifyError: the model does not run, so zeros cannot be measured.
    """
    check_positive(channel_multiple=channel_multiple)
    working = _cleaned(model, pinned)
    planner = Planner(profile(checked_target(target), channel_multiple))
    evidence = _evidence(working, input_shapes, input_data)
    rewrite(make_plan(working, planner, evidence, zeros_only=True))
    clean(working)
    return _finished(working)


def get_bn_folding(model: ModelSource) -> list[tuple[str, str]]:
    """The (linear node, BatchNormalization node) pairs that can be folded, by name.

    A node without a name is called by its first output.
    """
    return _pairs(_cleaned(model))


def get_pinned(model: ModelSource) -> list[str]:
    """Layers whose output channels cannot be removed, by name.

    These are layers whose channels reach a graph output or an operator without rules; there is no
    need to pin them.
    """
    working = _cleaned(model)
    try:
        _evidence(working, None, None)
    except CannotVerifyError:
        pass  # then sizes that are in dispute stay so, and with them their channels
    facts = Facts(working)
    found = []
    for product in facts.contractions:
        if facts.layouts.frozen[product.channels(facts)[1]].all():
            found.append(label(product.node))
    return found


def verify(
    original: ModelSource,
    simplified: ModelSource,
    *,
    input_shapes: Shapes | None = None,
    input_data: Mapping[str, np.ndarray] | None = None,
    rtol: float | None = None,
    checks: int = 2,
) -> Verification:
    """Run two models in onnxruntime on the same inputs and compare their outputs.

    Args:
        original: the model to compare with.
        simplified: the model to check.
        input_shapes: as for :func:`simplify`.
        input_data: as for :func:`simplify`.
        rtol: as for :func:`simplify`.
        checks: number of random inputs (two at least; other sizes come on top).

    Raises:
        ModelError: a model is invalid, or an argument does not fit it.
        CannotVerifyError: the original runs on no input that could be made.
    """
    check_positive(rtol=rtol)
    dense = load(original)
    reference = Reference(dense, input_shapes=input_shapes, input_data=input_data, count=checks)
    return reference.compare(
        load(simplified),
        rtol,
        half=is_half(dense),
        constant=lambda: constant_outputs(dense, reference),
    )


def benchmark(
    models: Mapping[str, ModelSource],
    *,
    input_shapes: Shapes | None = None,
    input_data: Mapping[str, np.ndarray] | None = None,
    threads: int = 1,
    rounds: int = 15,
) -> dict[str, Timing]:
    """Time models against each other in onnxruntime, interleaved in one run.

    Args:
        models: models by name; all take the inputs of the first.
        input_shapes: as for :func:`simplify`.
        input_data: as for :func:`simplify`.
        threads: intra-op threads.
        rounds: counted rounds, after two that are not.

    Returns:
        Median and quartiles in milliseconds, by name.

    Raises:
        ModelError: a model is invalid, or an argument does not fit it.
        CannotVerifyError: the first model runs on no input that could be made.
    """
    check_positive(threads=threads, rounds=rounds)
    loaded = {name: load(model) for name, model in models.items()}
    if not loaded:
        return {}
    first = next(iter(loaded.values()))
    feeds = Reference(first, input_shapes=input_shapes, input_data=input_data).runs[0].feeds
    return time_models(loaded, feeds, threads=threads, rounds=rounds)


def _cleaned(source: ModelSource, pinned: Collection[str] = ()) -> Model:
    working = load(source)
    working.pin(as_names(pinned))
    clean(working)
    settle_sizes(working, ())
    join_pads(working)
    return working


def _finished(model: Model) -> ModelProto:
    """The model as a message that states the shapes it has now."""
    settle(model)
    fuse_again(model)
    return model.to_proto()


def _pairs(model: Model) -> list[tuple[str, str]]:
    settle(model)
    return [(label(node), label(bn)) for node, bn, _ in foldable(model)]


def _evidence(
    model: Model, shapes: Shapes | None, data: Mapping[str, np.ndarray] | None
) -> Evidence:
    found = Reference(model, input_shapes=shapes, input_data=data).evidence
    settle_sizes(model, found.runs)
    return found
