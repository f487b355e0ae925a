"""The whole search against enumeration where blocks may be split: every strategy of every operator, every layout of
every weight and between blocks, on every tp that divides a node, in every configuration and split into stages.

The models are tiny, two or three blocks of one or two operators each, so that all of it can be priced. Of decisions for
a block with equal layouts at its ends only those are followed up that none beats in seconds each way and elements: a
step takes no less if one of them grows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import cache

import pytest
from small_spaces import drawn_cluster
from tiny_models import thin

from autopar.cluster import Cluster
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.plan import Plan
from autopar.sharding.decision import BlockDecision, Conversion
from autopar.sharding.layout import Layout
from autopar.solver.candidates import BlockCost
from autopar.solver.context import Context
from autopar.solver.decision_costs import boundary_bytes, decision_price, local_elements
from autopar.solver.decisions import whole_decisions
from autopar.solver.evaluate import Assessment, assess
from autopar.solver.fix import parse_fix
from autopar.solver.problem import path, shortest
from autopar.solver.search import search
from autopar.solver.shardings import KnownShardings, Shardings
from autopar.solver.space import Config, configs

PROBLEMS = 50
ROUNDING = 1 + 1e-9


def every_decision(model: ModelGraph, shardings: Shardings, name: str) -> Iterator[BlockDecision]:
    """All of a kind: layouts of its sources, strategies, the layout it leaves in, and the conversions these need."""
    built = shardings.built(frozenset())
    part, graph = f"{name}/", model.kinds[name].graph
    sources = {s.name: s for s in built.problem.sources if s.name.startswith(part)}
    ops = [op for op in built.problem.ops if op.name.startswith(part)]
    [output] = [o for o in built.problem.outputs if o.tensor.startswith(part)]
    ways = {tensor: shortest(table) for tensor, table in built.problem.conversions.items()}
    options = [list(s.layouts) for s in sources.values()]
    for arrives in itertools.product(*options):
        for picks in itertools.product(*(range(len(op.choices)) for op in ops)):
            for leaves in output.layouts:
                ties = {s.tie: layout for s, layout in zip(sources.values(), arrives, strict=True) if s.tie}
                if ties.get(output.tie, leaves) != leaves:
                    continue
                held = dict(zip(sources, arrives, strict=True))
                needs = {}
                for op, pick in zip(ops, picks, strict=True):
                    held[op.name] = op.choices[pick].output
                    needs |= dict(zip(op.operands, op.choices[pick].inputs, strict=True))
                needs[output.tensor] = leaves  # every tensor of these models has one reader
                moves = [(t, held[t], needs[t]) for t in needs if held[t] != needs[t]]
                if any((a, b) not in ways[t] for t, a, b in moves):
                    continue
                steps = [(t, pair) for t, a, b in moves for pair in itertools.pairwise(path(ways[t], a, b))]
                yield BlockDecision(
                    name,
                    dict(built.axes),
                    {node.removeprefix(part): layout for node, layout in zip(sources, arrives, strict=True)},
                    {
                        node.name: {axis: s.name for axis, s in built.choices[part + node.name][pick].items()}
                        for node, pick in zip(graph.of("op"), picks, strict=True)
                    },
                    tuple(Conversion(t.removeprefix(part), *pair) for t, pair in steps),
                    {output.tensor.removeprefix(part): leaves},
                )


def front(model: ModelGraph, shardings: Shardings) -> dict[str, list[BlockCost]]:
    """Per kind, the costs that none beats of those with the same layouts at both ends; bytes are left out."""
    if shardings.size == 1:
        whole = whole_decisions(model)
        return {name: [cost_of(model, shardings, name, whole[name])] for name in model.kinds}
    found: dict[str, list[BlockCost]] = {}
    for name in model.kinds:
        by_ends: dict[object, dict[tuple[float, ...], BlockCost]] = {}
        for decision in every_decision(model, shardings, name):
            cost = cost_of(model, shardings, name, decision)
            key = cost.forward_s, cost.backward_s, float(cost.elements)
            by_ends.setdefault(ends(decision), {})[key] = cost
        found[name] = [
            entries[key]
            for entries in by_ends.values()
            for key in entries
            if not any(other != key and dominates(other, key) for other in entries)
        ]
    return found


def ends(decision: BlockDecision) -> tuple[Layout | None, Layout]:
    """The layouts in which a block takes what is handed on, and leaves it."""
    return decision.inputs.get("x"), next(iter(decision.outputs.values()))


def chains(options: Sequence[Sequence[BlockCost]]) -> Iterator[tuple[BlockCost, ...]]:
    """One cost for each block, each taking in what the one before hands on."""
    ways: list[tuple[BlockCost, ...]] = [()]
    for some in options:
        fits = {
            between: [cost for cost in some if ends(cost.decision)[0] in (between, None)]
            for between in {ends(way[-1].decision)[1] if way else None for way in ways}
        }
        ways = [(*way, cost) for way in ways for cost in fits[ends(way[-1].decision)[1] if way else None]]
    yield from ways


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


def cost_of(model: ModelGraph, shardings: Shardings, name: str, decision: BlockDecision) -> BlockCost:
    """Seconds and elements alone."""
    price, _ = decision_price(model.kinds[name], decision, shardings.prices)
    elements = local_elements(model.kinds[name], decision)
    return BlockCost(
        name, decision, "none", price.forward_s, price.backward_s, price.communication_s, 0.0, elements, 0, 0
    )


def every_plan(model: ModelGraph, context: Context, space: Sequence[Config]) -> Iterator[tuple[float, Assessment]]:
    """Plans in no order, those left out that are slower than one before."""
    known: dict[object, tuple[Shardings, list[tuple[BlockCost, ...]]]] = {}
    blocks, best = len(model.blocks), float("inf")
    for config in space:
        if config.sharding not in known:
            shardings = KnownShardings(context).of(config.sharding)
            kinds = front(model, shardings)
            known[config.sharding] = shardings, list(chains([kinds[block.kind] for block in model.blocks]))
        shardings, ways = known[config.sharding]
        for way in ways:
            # Some rank has at least its even share of the work.
            if config.micro_batches * sum(cost.forward_s + cost.backward_s for cost in way) / config.pp >= best:
                continue
            handed = max(boundary_bytes(model.kinds[c.kind], c.decision, config.micro_batch, context.job) for c in way)
            for cuts in itertools.combinations(range(1, blocks), config.stages - 1):
                stages = [way[start:stop] for start, stop in itertools.pairwise((0, *cuts, blocks))]
                priced = assess(context, config, stages, handed, beat=best)
                if priced.step_time < best:
                    best = priced.step_time
                    yield best, priced


@cache
def model_of(layers: int, hidden: int, vocab: int) -> ModelGraph:
    return thin(layers, hidden, vocab)


def drawn(seed: int) -> tuple[ModelGraph, Job, Cluster]:
    draw = random.Random(seed)
    model = model_of(draw.choice((0, 1, 2)), draw.choice((16, 256)), draw.choice((64, 1024)))
    cluster = drawn_cluster(draw, draw.choice(("1x2", "1x2", "1x4", "2x2")))
    return model, Job(draw.choice((2, 4)), draw.choice((8, 64)), "bf16"), cluster


@cache
def solved(seed: int) -> tuple[float, Assessment, Plan]:
    """The best by enumeration, and what the search finds."""
    model, job, cluster = drawn(seed)
    fix = {"cp": 1, "offload": "none"}
    context = Context.of(model, job, cluster, parse_fix(fix))
    space = [config for config in configs(model, job, cluster, parse_fix(fix)) if config.pad_heads == 1]
    seconds, best = min(every_plan(model, context, space), key=lambda pair: pair[0])
    return seconds, best, search(model, job, cluster, fix)


@pytest.mark.parametrize("seed", range(PROBLEMS))
def test_no_sharding_beats_the_bound(seed: int) -> None:
    seconds, best, plan = solved(seed)
    assert plan.bound <= seconds * ROUNDING, best
    assert plan.predicted.step_time >= seconds / ROUNDING, "the plan found is none of the space"
    assert plan.predicted.step_time <= seconds * (1 + plan.gap) * ROUNDING


def test_the_draw_is_not_one_sided() -> None:
    best = [solved(seed)[1].config for seed in range(PROBLEMS)]
    assert sum(config.tp > 1 for config in best) > PROBLEMS // 5
    assert sum(config.dp > 1 for config in best) > PROBLEMS // 5
