"""Why an operator runs the strategy it runs: every strategy it has, and what the plan would cost with it.

"Alone" is the operator itself, forward and backward for one micro-batch (the forward twice if it is recomputed),
collectives inside it included. "Together" is
the whole model's sharding found anew with the operator held to the strategy (`autopar.solver.forced`): all blocks of
the model, one micro-batch, on one rank of the model axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from autopar.graph.ir import ModelGraph, Node, OpGraph
from autopar.graph.padding import as_planned
from autopar.plan import Plan
from autopar.report.find import find_operator
from autopar.report.words import ATTENTION, operator_name, strategy_words
from autopar.sharding.conversions import COMMUNICATES, path, same
from autopar.sharding.layout import Layout
from autopar.sharding.local import produced_layouts
from autopar.solver.axis_choices import AxesChoice, considered
from autopar.solver.forced import Parts, Question, most_used, parts_of, question_of
from autopar.solver.recompute import runs_again

TIE = 1e-7
"""Share of the whole's seconds up to which two answers are equal: the integers of the ILP are finer."""
VERDICTS = ("chosen", "tie", "dearer alone", "cheaper alone but dearer together", "dearer together", "cheaper")
"""And "dominated" and "unavailable". "dearer together": as dear alone; "cheaper": by seconds alone, where the plan's
sharding was not chosen by them."""


@dataclass(frozen=True, slots=True)
class Whole:
    """What changes in the whole, against the plan: seconds for one micro-batch of all blocks, and of these those of
    this ``operator``, of the ``others``, of ``conversions`` and of ``weights`` (gradients handed on).

    ``saved_bytes``: about how much more is saved for backward. ``proved``: the seconds are the least possible;
    ``more``, ``fewer``: the conversions of a block that come and go, as (tensor, "axis forward / backward")."""

    seconds: float
    operator: float
    others: float
    conversions: float
    weights: float
    saved_bytes: float
    proved: bool
    more: tuple[tuple[str, str], ...]
    fewer: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class StrategyAnswer:
    """One strategy. ``splits``: its name by axis; ``words``: by axis; ``alone_s``: of the operator, None if it cannot
    run; ``reason``: why it cannot, or what dominates it."""

    splits: dict[str, str]
    words: dict[str, str]
    verdict: str
    alone_s: float | None = None
    together: Whole | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class OperatorAnswer:
    """``operator``: "kind/node"; ``name``: as reports call it; ``blocks``: how many run it; ``optimal``: no sharding is
    faster by the measure that the plan's was chosen by, in which a saved byte counts ``byte_price`` seconds.
    ``whole_s``: of all blocks, one micro-batch; ``also``: other candidates of the kind that run it otherwise."""

    operator: str
    name: str
    op: str
    axes: dict[str, int]
    blocks: int
    whole_s: float
    optimal: bool
    byte_price: float
    strategies: tuple[StrategyAnswer, ...]
    also: dict[str, dict[str, str]]

    @property
    def chosen(self) -> StrategyAnswer | None:
        """The strategy that the plan runs; None where there is no model axis."""
        return next((one for one in self.strategies if one.verdict == "chosen"), None)


def explain_operator(plan: Plan, model: ModelGraph, name: str) -> OperatorAnswer:
    """All strategies of the operator called ``name`` (`find.find_operator`) on the plan's model axes.

    Raises BadInputError for an unknown or ambiguous name, or a plan made for another model.
    """
    plan.check_model(model.fingerprint(), model.name)
    axes = plan.mesh.model_axes()
    kind, node = find_operator(as_planned(plan, model), name)
    operator, used = f"{kind.name}/{node.name}", most_used(plan, kind.name).decision.strategies[node.name]
    runs = [run for stage in plan.stages for run in stage.runs]
    taken = [(run.stop - run.start, plan.candidates[run.candidate]) for run in runs]
    ways = {one.name: one.decision.strategies[node.name] for _, one in taken if one.decision.kind == kind.name}
    answer = OperatorAnswer(
        operator=operator,
        name=operator_name(node, kind.graph),
        op=node.op,
        axes=axes,
        blocks=sum(block.kind == kind.name for block in model.blocks),
        whole_s=sum(count * (one.forward_s + one.backward_s) for count, one in taken),
        optimal=True,
        byte_price=0.0,
        strategies=(),
        also={name: splits for name, splits in ways.items() if splits != used},
    )
    if not axes:
        return answer
    question = question_of(plan, model, kind.name)
    graph = question.shardings.context.model.kinds[kind.name].graph
    node = graph.nodes[node.name]
    found = [*_available(question, operator, node, graph), *_left_out(plan, question, operator, node, graph)]
    return replace(
        answer,
        whole_s=question.answer.seconds,
        optimal=question.optimal,
        byte_price=question.byte_price,
        strategies=tuple(sorted(found, key=_rank)),
    )


def _rank(one: StrategyAnswer) -> tuple[int, float]:
    if one.verdict == "chosen":
        return 0, 0.0
    if one.together is not None:
        return 1, one.together.seconds
    return (2 if one.verdict == "dominated" else 3), 0.0


def _available(question: Question, operator: str, node: Node, graph: OpGraph) -> Iterator[StrategyAnswer]:
    """Those in the ILP, each with its own answer."""
    problem = question.built.problem
    used = question.answer.strategies[operator]
    base = parts_of(problem, question.answer)
    mine = _alone(question, operator, node, graph, question.built.choices[operator][used])
    for index, choice in enumerate(question.built.choices[operator]):
        alone = _alone(question, operator, node, graph, choice)
        splits, words = _names(node, graph, choice)
        if index == used:
            yield StrategyAnswer(splits, words, "chosen", alone)
            continue
        answer = question.held(operator, index)
        if answer is None:
            reason = "no conversions lead from what its neighbours make to what it reads, and on"
            yield StrategyAnswer(splits, words, "unavailable", alone, None, reason)
            continue
        parts = parts_of(problem, answer)
        change = _change(base, parts, operator, answer.status == "optimal", graph)
        more = question.measure(answer) - question.measure(question.answer)
        within = TIE * question.answer.seconds
        yield StrategyAnswer(splits, words, _verdict(more, alone - mine, within), alone, change)


def _verdict(together: float, alone: float, within: float) -> str:
    if abs(together) <= within:
        return "tie"
    if together < 0:
        return "cheaper"
    small = 1e-12
    return "dearer alone" if alone > small else "cheaper alone but dearer together" if alone < -small else VERDICTS[4]


def _left_out(plan: Plan, question: Question, operator: str, node: Node, graph: OpGraph) -> Iterator[StrategyAnswer]:
    """Those that are not in the ILP, and why."""
    shardings = question.shardings
    kept = question.built.choices[operator]
    offered = [_key(choice) for choice in kept]
    for choice, refused in considered(node, graph, shardings.axes, shardings.batch, shardings.context.job.seq_len):
        if _key(choice) in offered:
            continue
        splits, words = _names(node, graph, choice)
        if refused:
            yield StrategyAnswer(splits, words, "unavailable", None, None, refused)
            continue
        alone = _alone(question, operator, node, graph, choice)
        over = next((other for other in kept if _alike(node, graph, choice, other)), None)
        if over is None:
            fixed = f"tp={plan.fixed.get('tp', plan.mesh.tp)} is fixed: a matmul splits a feature factor that divides"
            if node.op == ATTENTION:
                fixed = f"context={plan.fixed.get('context')} is fixed"
            yield StrategyAnswer(splits, words, "unavailable", alone, None, fixed)
        else:
            name = ", ".join(dict.fromkeys(strategy.name for strategy in over.values()))
            reason = f"{name} reads and makes the same layouts for no more seconds and bytes"
            yield StrategyAnswer(splits, words, "dominated", alone, None, reason)


def _key(choice: AxesChoice) -> tuple[tuple[str, str], ...]:
    return tuple((axis, strategy.name) for axis, strategy in choice.items())


def _alike(node: Node, graph: OpGraph, one: AxesChoice, other: AxesChoice) -> bool:
    """Whether two choices read and make the same layouts (R and I are one for a tensor without gradient)."""
    (reads, made), (others, theirs) = produced_layouts(node, one), produced_layouts(node, other)
    grads = [graph.nodes[name].meta.requires_grad for name in node.operands()]
    return same(made, theirs, node.meta.requires_grad) and all(
        same(a, b, grad) for a, b, grad in zip(reads, others, grads, strict=True)
    )


def _alone(question: Question, operator: str, node: Node, graph: OpGraph, choice: AxesChoice) -> float:
    price, _ = question.shardings.prices.operator(node, graph, choice)
    name = operator.partition("/")[0]
    kind = question.shardings.context.model.kinds[name]
    twice = name in question.again and node.name in runs_again(kind).runs
    return price.seconds + (price.forward_s if twice else 0.0)


def _names(node: Node, graph: OpGraph, choice: AxesChoice) -> tuple[dict[str, str], dict[str, str]]:
    splits = {axis: strategy.name for axis, strategy in choice.items()}
    return splits, {axis: strategy_words(node, graph, strategy) for axis, strategy in choice.items()}


def _change(base: Parts, parts: Parts, operator: str, proved: bool, graph: OpGraph) -> Whole:
    kind = operator.partition("/")[0]
    own = parts.operators[operator] - base.operators[operator]
    whole = sum(parts.operators.values()) - sum(base.operators.values())
    moved = sum(parts.conversions.values()) - sum(base.conversions.values())
    return Whole(
        seconds=parts.seconds - base.seconds,
        operator=own,
        others=whole - own,
        conversions=moved,
        weights=parts.weights - base.weights,
        saved_bytes=parts.bytes - base.bytes,
        proved=proved,
        more=_moves(parts, base, kind, graph),
        fewer=_moves(base, parts, kind, graph),
    )


def _moves(of: Parts, without: Parts, kind: str, graph: OpGraph) -> tuple[tuple[str, str], ...]:
    """The collectives of conversions of a kind's block that only one of two answers has."""
    found = []
    for tensor, a, b in of.conversions:
        name = tensor.partition("/")[2]
        if (tensor, a, b) in without.conversions or tensor.partition("/")[0] != kind:
            continue
        for axis, step in path(Layout.parse(a), Layout.parse(b), graph.nodes[name].meta.requires_grad):
            if {step.forward, step.backward} & COMMUNICATES:
                found.append((name, f"{axis} {step.forward} / {step.backward}".replace("_", "-")))
    return tuple(found)
