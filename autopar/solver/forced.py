"""What the other strategies of an operator would cost: the problem of a plan's blocks solved again, one operator held.

A plan's sharding is the best answer to one question: what a saved byte is worth, and which kinds are recomputed
(`Shardings.ways`). `question_of` finds the question whose answer the plan is, so that held and free answers are
compared by the same measure; a decision that answers none of them is compared by seconds alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from autopar.errors import AutoparError, BadInputError
from autopar.graph.ir import ModelGraph
from autopar.plan import Candidate, Plan
from autopar.sharding.decision import BlockDecision
from autopar.solver.block_problem import ModelProblem, name_now
from autopar.solver.context import Context
from autopar.solver.decisions import decisions_of
from autopar.solver.fix import parse_fix
from autopar.solver.intra_block import solve
from autopar.solver.problem import Answer, Op, Problem, price
from autopar.solver.shardings import Shardings


@dataclass(frozen=True, slots=True)
class Parts:
    """Where an answer's seconds for one micro-batch go, all blocks of the model together (a kind that is recomputed:
    its forward twice). ``operators`` by "kind/node"; ``conversions`` by ("kind/node", from, to); ``weights``: handing
    on gradients of what is held. The three add up to ``seconds``. ``bytes``: about what is saved for backward."""

    seconds: float
    bytes: float
    operators: dict[str, float]
    conversions: dict[tuple[str, str, str], float]
    weights: float


@dataclass(frozen=True, slots=True)
class Question:
    """The problem whose answer a plan's sharding is, and that answer.

    ``byte_price``: seconds that a saved byte counts; ``again``: kinds whose forward counts twice, because they are
    recomputed; ``optimal``: the plan's sharding is the best answer (else it was chosen for another reason, and
    ``answer`` is that sharding, priced)."""

    shardings: Shardings
    built: ModelProblem
    byte_price: float
    again: frozenset[str]
    answer: Answer
    optimal: bool

    def held(self, operator: str, choice: int) -> Answer | None:
        """The best answer in which ``operator`` ("kind/node") runs strategy ``built.choices[operator][choice]``; None
        if no conversions lead to and from its layouts."""
        try:
            return _solve_held(self.built.problem, {operator: choice}, self.byte_price)
        except AutoparError:
            return None

    def measure(self, answer: Answer) -> float:
        """What is minimised, in seconds."""
        return answer.seconds + self.byte_price * answer.bytes


def context_of(plan: Plan, model: ModelGraph) -> Context:
    """The context in which ``plan`` was searched. Raises BadInputError for another model."""
    plan.check_model(model.fingerprint(), model.name)
    context = Context.of(model, plan.job, plan.cluster, parse_fix(plan.fixed), plan.equal_blocks)
    return context.sharing(plan.mesh.ep)


def most_used(plan: Plan, kind: str) -> Candidate:
    """Of the candidates of a kind the one that most blocks run under, the first of equals.

    Raises BadInputError if the plan has none."""
    counts: dict[str, int] = {}
    for run in (run for stage in plan.stages for run in stage.runs):
        if plan.candidates[run.candidate].decision.kind == kind:
            counts[run.candidate] = counts.get(run.candidate, 0) + run.stop - run.start
    if not counts:
        raise BadInputError(f"the plan for {plan.model} has no block of kind {kind!r}")
    return plan.candidates[max(counts, key=lambda name: counts[name])]


def question_of(plan: Plan, model: ModelGraph, kind: str) -> Question:
    """The question that the plan's sharding of ``kind`` answers. Raises BadInputError for another model."""
    context = context_of(plan, model)
    axes, strides = plan.mesh.model_axes(), plan.mesh.strides()
    apart = [strides[axis] for axis in axes]
    shardings = Shardings(context, axes.items(), plan.micro_batch, plan.pad_heads, apart)
    wanted = {name: most_used(plan, name).decision for name in model.kinds}
    for byte_price, again in shardings.ways():
        built = shardings.built(again)
        answer = solve(built.problem, byte_price)
        if decisions_of(shardings.context.model, built, answer)[kind] == wanted[kind]:
            return Question(shardings, built, byte_price, again, answer, True)
    again = frozenset(name for name in wanted if most_used(plan, name).recompute == "full")
    built = shardings.built(again)
    answer = _solve_held(built.problem, _choices_of(built, wanted), 0.0, wanted)
    return Question(shardings, built, 0.0, again, answer, False)


def _choices_of(built: ModelProblem, decisions: Mapping[str, BlockDecision]) -> dict[str, int]:
    """For each operator of the problem the index of the strategy that the decisions have."""
    found = {}
    for operator, choices in built.choices.items():
        kind, _, node = operator.partition("/")
        names = [{axis: strategy.name for axis, strategy in choice.items()} for choice in choices]
        if decisions[kind].strategies[node] not in names:
            raise BadInputError(
                f"the plan runs {operator} as {decisions[kind].strategies[node]}, which the search does not offer now "
                "(another version of autopar made it?): search again"
            )
        found[operator] = names.index(decisions[kind].strategies[node])
    return found


def _solve_held(
    problem: Problem,
    choices: Mapping[str, int],
    byte_price: float,
    decisions: Mapping[str, BlockDecision] | None = None,
) -> Answer:
    """The best answer with some operators held to one strategy; with ``decisions``, sources to the layouts they have
    there. Raises AutoparError if there is none."""

    def one(op: Op) -> Op:
        return replace(op, choices=(op.choices[choices[op.name]],)) if op.name in choices else op

    sources = problem.sources
    if decisions is not None:
        sources = tuple(
            replace(source, layouts={layout: source.layouts[layout]})
            for source in problem.sources
            for kind, _, node in [source.name.partition("/")]
            for layout in [decisions[kind].inputs[node]]
        )
    answer = solve(replace(problem, ops=tuple(map(one, problem.ops)), sources=sources), byte_price)
    return replace(answer, strategies={**answer.strategies, **choices})  # as indices of the whole problem


def parts_of(problem: Problem, answer: Answer) -> Parts:
    """Where the seconds of an answer go."""
    operators: dict[str, float] = {}
    for op in problem.ops:
        kind, _, node = op.name.partition("/")
        name = f"{kind}/{name_now(node)}"
        seconds = problem.weight(op.name) * op.choices[answer.strategies[op.name]].seconds
        operators[name] = operators.get(name, 0.0) + seconds
    conversions: dict[tuple[str, str, str], float] = {}
    for tensor, a, b in answer.conversions:
        key = (f"{tensor.partition('/')[0]}/{name_now(tensor)}", str(a), str(b))
        seconds = problem.weight(tensor) * problem.conversions[tensor][a, b]
        conversions[key] = conversions.get(key, 0.0) + seconds
    weights = sum(problem.weight(s.name) * s.layouts[answer.sources[s.name]][0] for s in problem.sources)
    seconds, size = price(problem, answer)
    return Parts(seconds, size, operators, conversions, weights)
