"""The order of things: prepare a graph, learn facts, plan, rewrite; again where nodes are gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from onnx_simplify.facts.facts import Facts
from onnx_simplify.facts.sizes import settle
from onnx_simplify.graph.edit import label
from onnx_simplify.graph.identity import NodeMap, NodeSet
from onnx_simplify.graph.message import nbytes_of
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.shapes import is_questionable
from onnx_simplify.options import Options
from onnx_simplify.passes.absorb_gathers import absorb_gathers
from onnx_simplify.passes.clean import clean
from onnx_simplify.passes.compress_maps import compress_maps
from onnx_simplify.passes.fold_batchnorm import check_pairs, fold_batchnorm, foldable
from onnx_simplify.passes.fold_shapes import settle_sizes
from onnx_simplify.passes.fused import fuse_again
from onnx_simplify.passes.join_pads import join_pads
from onnx_simplify.passes.reblock_maps import reblock_maps
from onnx_simplify.passes.regroup_shuffles import find_shuffles, regroup_shuffles
from onnx_simplify.passes.rewrite import rewrite
from onnx_simplify.passes.split_sums import narrow_operands, split_sums
from onnx_simplify.passes.store_constants import store_constants
from onnx_simplify.passes.zero_small import zero_small
from onnx_simplify.planning.absorbing import Prospect
from onnx_simplify.planning.plan import GATHERED, SPLIT, STORED, Plan, Preparation
from onnx_simplify.planning.planner import Planner
from onnx_simplify.reasons import ALIGNMENT, COST, held_back, stays
from onnx_simplify.report import Layer, Opaque, Report, add_findings, ideal_macs, layers
from onnx_simplify.runtime.evidence import Evidence, Questions, questions_for
from onnx_simplify.runtime.inputs import Feeds
from onnx_simplify.runtime.observed import is_foreign

# So often a plan is made and carried out at most; almost always one turn is all it takes.
_TURNS = 4
# Bytes of weights that may be there twice while the original runs.
_LARGEST_COPY = 1 << 26

Observer = Callable[[Prospect], None]


@dataclass
class Start:
    """A model that is ready to be planned for.

    Attributes:
        model: the model, cleaned, sizes folded; BatchNormalization as well once it has layers.
        layers: its layers with weights, by node; None before :meth:`fold`.
        folded: how many BatchNormalization nodes were folded.
        facts: what is known of it, if that was looked for already.
        split: operands of sums that have got channels of their own.
    """

    model: Model
    layers: NodeMap[Layer] | None = None
    folded: int = 0
    facts: Facts | None = None
    split: list[str] = field(default_factory=list)

    def fold(self, options: Options) -> NodeMap[Layer]:
        """Fold BatchNormalization and take small channels for zero, in place and once.

        Returns:
            The layers.
        """
        if self.layers is None:
            if options.folds:
                self.folded = fold_batchnorm(self.model, options.bn_folding)
                self.model.release()
            self.layers = layers(self.model)
            if options.threshold:
                for node, count in zero_small(self.model, options.threshold).items():
                    self.layers[node].small = count
        return self.layers


def start(model: Model, options: Options, runs: Sequence[Feeds]) -> Start:
    """Do in place what comes before any plan, but for :meth:`Start.fold`.

    Args:
        model: the model as loaded.
        options: what to do.
        runs: inputs to settle with which sizes are in doubt; none if it does not run, or where
            there is no such doubt.

    Raises:
        ModelError: the options name what cannot be folded.
    """
    clean(model)
    settle_sizes(model, runs)
    join_pads(model)
    if options.bn_folding is not None:
        settle(model)
        check_pairs(model, options.bn_folding)
    return Start(model)


def may_ask(original: Model, options: Options) -> bool:
    """Whether the runs of the original can answer what a plan will ask.

    Not where what onnx infers of sizes may not be what onnxruntime has, nor where weights are not
    to be what they were.
    """
    doubtful = any(is_questionable(n) for n in original.graph.nodes) or is_foreign(original)
    other = options.threshold or options.auto_threshold is not None
    return not doubtful and not other and options.absorbs


def ask(begun: Start, planner: Planner, options: Options, original: Model) -> Questions:
    """What to look at in the runs of the original.

    Folded weights are copies. Where they are large, they had better not be there beside the
    original's while it runs, and the graph is asked about as it is before folding. Otherwise the
    facts are kept for the plan.
    """
    names = {t.name for node in original.graph.nodes for t in node.outputs}
    splitter = None if options.zeros_only else planner
    if options.folds and _copies(begun.model) > _LARGEST_COPY:
        settle(begun.model)
        gone = {n.outputs[0].name for n, _, behind in foldable(begun.model) if behind}
        facts = Facts(begun.model)
        narrow = [] if splitter is None else narrow_operands(facts, splitter)
        return questions_for(facts, names - gone, narrow)
    begun.fold(options)
    begun.facts, begun.split = _unmeasured(begun.model, splitter)
    return questions_for(begun.facts, names)


def _copies(model: Model) -> int:
    """Bytes of weights that folding BatchNormalization makes anew, at most."""
    if not any(n.op == "BatchNormalization" for n in model.graph.nodes):
        return 0
    return sum(map(nbytes_of, model.initializers().values()))


def simplify_in_place(
    begun: Start,
    planner: Planner,
    evidence: Evidence | None,
    report: Report,
    options: Options,
    step: Callable[[str], None],
) -> None:
    """Simplify a model, in place.

    Args:
        begun: the model.
        planner: decides.
        evidence: shows the values of constants; None if the model does not run.
        report: its layers, steps and opaque nodes are filled in.
        options: what to do.
        step: called with what comes next.
    """
    model, before = begun.model, begun.fold(options)
    report.batchnorms_folded = begun.folded
    report.layers = list(before.values())
    report.threshold = options.threshold
    if not options.absorbs:
        evidence = None
    known: Start | None = begun
    aligned: NodeMap[int] = NodeMap()

    def first(prospect: Prospect) -> None:
        # Where constants are not absorbed, what is constant is no finding.
        _observe(Prospect.of(Facts(model)) if options.zeros_only else prospect, before, report)

    observe: Observer | None = first
    for _ in range(_TURNS):
        present = NodeSet(model.graph.nodes)
        step("looking for what can go")
        plan = make_plan(
            model,
            planner,
            evidence,
            zeros_only=options.zeros_only,
            cut=options.cuts,
            observe=observe,
            begun=known,
        )
        observe = known = None
        evidence = None if evidence is None else evidence.afresh()
        step("removing channels")
        aligned = _aligned(plan)
        report.prepared += plan.prepared
        report.steps += [s for s in plan.steps() if not s.is_idle]
        rewrite(plan)
        clean(model)
        if options.folds and any(n.op == "BatchNormalization" for n in model.graph.nodes):
            settle(model)
            report.batchnorms_folded += fold_batchnorm(model, options.bn_folding)
        if present <= NodeSet(model.graph.nodes):
            break
        # Where nodes are gone, others may have become neighbours, or constant.
    # A second run gives what it stores anew the same names.
    model.free_names()
    absorb_gathers(model, planner)
    reblock_maps(model, planner.profile)
    compress_maps(model)
    settle(model)
    _conclude(before, layers(model), aligned)
    fuse_again(model)


def make_plan(
    model: Model,
    planner: Planner,
    evidence: Evidence | None,
    *,
    zeros_only: bool = False,
    cut: bool = True,
    observe: Observer | None = None,
    begun: Start | None = None,
) -> Plan:
    """Prepare a cleaned model, in place, and plan what becomes of it.

    Preparing it does not change what it computes: operands of sums may get channels of their own,
    constants are stored, and shuffles become gathers where they could not follow the plan.

    Args:
        model: the model.
        planner: decides.
        evidence: shows the values of constants; without, none are absorbed.
        zeros_only: absorb nothing but zeros.
        cut: whether channels are to go.
        observe: called with the first facts, before anything is rewritten for them.
        begun: what has been found out of it already.
    """
    absorbs_all = evidence is not None and not zeros_only
    splitter = planner if absorbs_all else None
    prepared: list[Preparation] = []

    def note(what: str, names: list[str]) -> bool:
        prepared.extend(Preparation(name, what) for name in names)
        return bool(names)

    def look(splitter: Planner | None = None) -> Prospect:
        facts, split = _unmeasured(model, splitter)
        note(SPLIT, split)
        return measured(facts)

    def measured(facts: Facts) -> Prospect:
        found = facts if evidence is None else evidence.measured(facts)
        return Prospect.of(found, zeros_only=zeros_only)

    if begun is None or begun.facts is None:
        prospect = look(splitter)
    else:
        note(SPLIT, begun.split)
        prospect = measured(begun.facts)
    if observe is not None:
        observe(prospect)
    if absorbs_all and note(STORED, store_constants(prospect.facts)):
        clean(model)
        prospect = look(splitter)
    shuffles = find_shuffles(prospect.facts)
    if note(GATHERED, regroup_shuffles(prospect.facts, shuffles, prospect.alive)):
        prospect = look()
        shuffles = find_shuffles(prospect.facts)
    plan = planner.plan(prospect, cut=cut)
    if cut and note(GATHERED, regroup_shuffles(prospect.facts, shuffles, plan.needed)):
        plan = planner.plan(look(), cut=cut)
    return replace(plan, prepared=tuple(prepared))


def _unmeasured(model: Model, splitter: Planner | None) -> tuple[Facts, list[str]]:
    """Facts, once sums are split, and the operands that got channels of their own."""
    facts = Facts(model)
    split = [] if splitter is None else split_sums(facts, splitter)
    return Facts(model) if split else facts, split


def _observe(prospect: Prospect, found: NodeMap[Layer], report: Report) -> None:
    """Enter into a report what is known of layers before anything is rewritten."""
    facts = prospect.facts
    add_findings(found, facts)
    if facts.constants is not None:
        counts = stays(prospect)
        report.held_back = held_back(counts)
        for key, layer in found.items():
            layer.stays = dict(counts.get(key, {}))
        report.ideal_macs = ideal_macs(facts, report.input_shapes, found)
    report.opaque = [
        Opaque(label(op.node), op.node.op, op.reason or "operator not known")
        for op in facts.operators
        if op.is_opaque
    ]


def _aligned(plan: Plan) -> NodeMap[int]:
    """By a layer's node, how many dead output channels stay for alignment."""
    if plan.aligned is None:
        return NodeMap()
    return NodeMap(
        (product.node, int(plan.aligned[product.channels(plan.facts)[1]].sum()))
        for product in plan.facts.contractions
    )


def _conclude(before: NodeMap[Layer], after: NodeMap[Layer], aligned: NodeMap[int]) -> None:
    """Enter what is left of each layer, and why what could have gone stays."""
    for node, layer in before.items():
        if node in after:
            layer.outputs_after = after[node].outputs
            layer.inputs_after = after[node].inputs
            could = layer.constant + layer.dead - sum(layer.stays.values())
            kept = min(could - layer.removed, layer.outputs_after)
            counts = Counter({ALIGNMENT: min(kept, aligned.get(node, 0))})
            counts[COST] = kept - counts[ALIGNMENT]
            layer.stays.update(+counts)
