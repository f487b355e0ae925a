"""A block's decisions: every operator's strategy, every conversion, where its seconds and bytes go, and why it is
recomputed as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from autopar.graph.ir import BlockKind, ModelGraph
from autopar.plan import Candidate, Plan
from autopar.report.columns import span
from autopar.report.find import find_kind
from autopar.report.gather_choice import GatherChoice, gather_choice
from autopar.report.recompute_choices import RecomputeChoice, recompute_choices
from autopar.report.text import equal_blocks_words
from autopar.report.words import operator_name, strategy_words
from autopar.sharding.check import chosen
from autopar.sharding.conversions import COMMUNICATES, path
from autopar.sharding.rules import Strategy
from autopar.solver.forced import context_of
from autopar.solver.prices import AxisPrices
from autopar.solver.recompute import operator_key, rerun, step_key


@dataclass(frozen=True, slots=True)
class OperatorRow:
    """An operator: its strategy by axis, in words, and seconds of one micro-batch; of these, those in collectives."""

    node: str
    name: str
    op: str
    words: dict[str, str]
    forward_s: float
    backward_s: float
    forward_talk_s: float
    backward_talk_s: float


@dataclass(frozen=True, slots=True)
class ConversionRow:
    """One step of a conversion of ``tensor`` on ``axis``: what it does and moves (bytes of the tensor that is whole on
    the axis, local on the others) forward and backward, and seconds, of which some in collectives."""

    tensor: str
    axis: str
    types: str
    forward: str
    backward: str
    forward_bytes: int
    backward_bytes: int
    forward_s: float
    backward_s: float
    forward_talk_s: float
    backward_talk_s: float


@dataclass(frozen=True, slots=True)
class Split:
    """Seconds of a block's forward or backward for one micro-batch. ``copies``: to and from the host, not hidden."""

    computation: float
    communication: float
    recomputation: float
    copies: float

    @property
    def total(self) -> float:
        return self.computation + self.communication + self.recomputation + self.copies


@dataclass(frozen=True, slots=True)
class CandidateAnswer:
    """One candidate of the kind. ``saved_bytes``: kept for backward by a micro-batch in flight; ``again``: operators
    and conversion steps that backward runs again; ``recompute``: the plan's choice first, then the others; ``fixed``:
    what `fix` said of it, "" if nothing; ``gathering``: whether its blocks stay gathered, where there is a choice."""

    candidate: str
    blocks: tuple[str, ...]
    count: int
    operators: tuple[OperatorRow, ...]
    conversions: tuple[ConversionRow, ...]
    forward: Split
    backward: Split
    parameters: int
    saved_bytes: int
    transient_bytes: int
    again: int
    recompute: tuple[RecomputeChoice, ...]
    fixed: str
    gathering: GatherChoice | None = None


@dataclass(frozen=True, slots=True)
class BlockAnswer:
    """All candidates that the plan has for a block kind."""

    kind: str
    axes: dict[str, int]
    candidates: tuple[CandidateAnswer, ...]
    equal_blocks: str = ""


def explain_block(plan: Plan, model: ModelGraph, name: str) -> BlockAnswer:
    """The decisions for the block kind called ``name`` (`find.find_kind`).

    Raises BadInputError for an unknown name, or a plan made for another model.
    """
    plan.check_model(model.fingerprint(), model.name)
    wanted = find_kind(model, name)
    context = context_of(plan, model).padded(plan.pad_heads)
    kind = context.model.kinds[wanted.name]
    spans: dict[str, list[tuple[int, int]]] = {}
    for run in (run for stage in plan.stages for run in stage.runs):
        if plan.candidates[run.candidate].decision.kind == kind.name:
            spans.setdefault(run.candidate, []).append((run.start, run.stop))
    prices = AxisPrices(context.ops, context.collectives, plan.mesh.model_axes(), plan.micro_batch, plan.mesh.strides())
    answers = [_candidate(plan, model, kind, plan.candidates[name], prices, runs) for name, runs in spans.items()]
    several = sum(answer.count for answer in answers) > 1
    told = equal_blocks_words(plan) if several else ""
    return BlockAnswer(kind.name, plan.mesh.model_axes(), tuple(answers), told)


def _candidate(
    plan: Plan,
    model: ModelGraph,
    kind: BlockKind,
    candidate: Candidate,
    prices: AxisPrices,
    runs: list[tuple[int, int]],
) -> CandidateAnswer:
    operators, steps = tuple(_operators(kind, candidate, prices)), dict(_conversions(kind, candidate, prices))
    conversions = tuple(steps.values())
    rows: list[OperatorRow | ConversionRow] = [*operators, *conversions]
    again: tuple[str, ...] = ()
    if candidate.recompute != "none":
        again = rerun(kind, candidate.decision, candidate.saved, plan.micro_batch, plan.job).again
    seconds = {row.node: row.forward_s for row in operators} | {key: row.forward_s for key, row in steps.items()}
    talk = [sum(row.forward_talk_s for row in rows), sum(row.backward_talk_s for row in rows)]
    own = [sum(row.forward_s for row in rows), sum(row.backward_s for row in rows)]
    twice = sum(seconds[key] for key in again)
    context = context_of(plan, model)
    first = runs[0][0]
    fixed = context.fix.recompute_of(first, kind.name, context.repeated(model.blocks[first]))
    held = context.fix.reshard_of(first, kind.name) is not None
    return CandidateAnswer(
        candidate=candidate.name,
        blocks=tuple(span(start, stop) for start, stop in runs),
        count=sum(stop - start for start, stop in runs),
        operators=operators,
        conversions=conversions,
        forward=Split(own[0] - talk[0], talk[0], 0.0, max(0.0, candidate.forward_s - own[0])),
        backward=Split(own[1] - talk[1], talk[1], twice, max(0.0, candidate.backward_s - own[1] - twice)),
        parameters=candidate.parameters,
        saved_bytes=candidate.inflight_bytes,
        transient_bytes=candidate.transient_bytes,
        again=len(again),
        recompute=recompute_choices(plan, model, candidate),
        fixed=fixed or "",
        gathering=gather_choice(plan, model, candidate, first, held),
    )


def _operators(kind: BlockKind, candidate: Candidate, prices: AxisPrices) -> Iterator[OperatorRow]:
    graph = kind.graph
    for node in graph.of("op"):
        choice = chosen(node, graph, candidate.decision)
        whole, quiet = (prices.operator(node, graph, way)[0] for way in (choice, _quiet(choice)))
        yield OperatorRow(
            operator_key(node),
            operator_name(node, graph),
            node.op,
            {axis: strategy_words(node, graph, strategy) for axis, strategy in choice.items()},
            whole.forward_s,
            whole.backward_s,
            whole.forward_s - quiet.forward_s,
            whole.backward_s - quiet.backward_s,
        )


def _quiet(choice: Mapping[str, Strategy]) -> dict[str, Strategy]:
    """The strategies without the collectives inside the operator; what a ring waits for counts as its own."""
    return {axis: strategy if strategy.is_ring else replace(strategy, inner=()) for axis, strategy in choice.items()}


def _conversions(kind: BlockKind, candidate: Candidate, prices: AxisPrices) -> Iterator[tuple[str, ConversionRow]]:
    for conversion in candidate.decision.conversions:
        meta = kind.graph.nodes[conversion.tensor].meta
        layout = conversion.source
        for place, (axis, step) in enumerate(path(layout, conversion.target, meta.requires_grad)):
            price = prices.conversion(meta, layout, axis, step)
            nbytes = prices.across(meta, layout, axis).nbytes
            talk = [
                prices.collective(action, nbytes, axis) if action in COMMUNICATES else 0.0
                for action in (step.forward, step.backward)
            ]
            yield (
                step_key(conversion.tensor, conversion.source, conversion.target, place),
                ConversionRow(
                    conversion.tensor,
                    axis,
                    f"{step.source} -> {step.target}",
                    step.forward,
                    step.backward,
                    int(nbytes * step.forward_bytes),
                    int(nbytes * step.backward_bytes),
                    price.forward_s,
                    price.backward_s,
                    *talk,
                ),
            )
            layout = layout.with_type(axis, step.target)
