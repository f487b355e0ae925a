"""Equal blocks share one sharding unless told otherwise, and the plan says what that costs."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from functools import cache

import pytest
from hand_plans import graph_of, llama
from small_spaces import with_memory
from test_exhaustive_tp import chains, drawn, every_decision

import autopar
from autopar.errors import InfeasibleError
from autopar.plan import Plan
from autopar.report.explain_block import explain_block
from autopar.report.explain_text import block_text
from autopar.report.record import plan_record
from autopar.solver import op_costs
from autopar.solver.context import Context
from autopar.solver.decision_costs import boundary_bytes
from autopar.solver.evaluate import assess
from autopar.solver.fix import parse_fix
from autopar.solver.reprice import check_price
from autopar.solver.search import search
from autopar.solver.shardings import KnownShardings
from autopar.solver.space import configs

ROUNDING = 1 + 1e-9
LAYER = "LlamaDecoderLayer"


@pytest.fixture(autouse=True)
def tiles_that_fill_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that at these small widths two shardings are worth mixing where memory is short."""
    monkeypatch.setattr(op_costs, "FILL_K", 128)


@cache
def model() -> autopar.graph.ir.ModelGraph:
    return graph_of(llama(6))


@cache
def plans(share: float, **fix: str) -> dict[bool, Plan]:
    """Of six layers on four ranks of tp, with so much of the memory that the fastest sharding takes; by the option."""
    cluster = autopar.Cluster.parse("1x4:h100")
    device = replace(cluster.device, reserve_bytes=0, launch_s=0.0, collective_s=0.0)
    link = replace(cluster.intra_node, latency_s=0.0)
    cluster = replace(cluster, groups=(replace(cluster.groups[0], device=device, intra_node=link),))
    job = autopar.Job(global_batch=8, seq_len=64, dtype="bf16")
    given = {"pp": 1, "dp": 1, "tp": 4, "micro_batch": 2, "zero": 0, "recompute": "none", "offload": "none", **fix}
    given = {key: value for key, value in given.items() if value != "open"}
    whole = search(model(), job, cluster, given).stages[0].total_bytes
    there = with_memory(cluster, int(share * whole))
    return {equal: search(model(), job, there, given, equal_blocks=equal) for equal in (True, False)}


def shardings_of(plan: Plan, kind: str) -> set[str]:
    used = {run.candidate for stage in plan.stages for run in stage.runs}
    decisions = [plan.candidates[name].decision for name in used]
    return {json.dumps(one.to_json(), sort_keys=True) for one in decisions if one.kind == kind}


def test_where_memory_is_short_equal_blocks_cost_what_the_plan_says() -> None:
    found = plans(0.92)
    equal, free = found[True], found[False]
    assert len(shardings_of(equal, LAYER)) == 1
    assert len(shardings_of(free, LAYER)) == 2
    assert free.predicted.step_time < 0.8 * equal.predicted.step_time
    assert equal.free_step_time == pytest.approx(free.predicted.step_time)
    assert equal.equal_blocks
    assert not free.equal_blocks
    assert free.free_step_time is None
    assert equal.bound <= free.predicted.step_time * ROUNDING
    for plan in found.values():
        check_price(plan, model())


def test_what_they_cost_is_told() -> None:
    equal, free = plans(0.92)[True], plans(0.92)[False]
    record = plan_record(equal)["equal_blocks"]
    gain, most = equal.predicted.step_time - equal.free_step_time, equal.predicted.step_time - equal.bound
    assert record == {
        "on": True,
        "free_step_time_s": equal.free_step_time,
        "gain_s": pytest.approx(gain),
        "gain_at_most_s": pytest.approx(most),
    }
    assert 0 < gain <= most
    assert plan_record(free)["equal_blocks"] == {"on": False}
    share = gain / equal.predicted.step_time
    told = f"sharded alike; free, they gain {gain * 1e6:.0f} µs ({share:.1%}) here, at most {most * 1e6:.0f} µs"
    assert f"equal blocks {told}" in " ".join(str(equal).split())
    assert "equal blocks may be sharded differently" in " ".join(str(free).split())
    assert told in " ".join(block_text(explain_block(equal, model(), LAYER)).split())
    assert "equal blocks" not in block_text(explain_block(equal, model(), "Epilogue"))


def test_recomputation_may_differ_between_equal_blocks() -> None:
    """Memory decides it; with one sharding for all, and nothing that freedom would gain."""
    plan = plans(0.9, recompute="open")[True]
    ways = {plan.candidate_of(block).recompute for block in range(1, 7)}
    assert len(ways) > 1
    assert len(shardings_of(plan, LAYER)) == 1


def test_with_ample_memory_freedom_gains_nothing() -> None:
    found = plans(1.1)
    assert found[True].free_step_time == found[True].predicted.step_time == found[False].predicted.step_time
    assert "free, they gain nothing here" in str(found[True])


def test_plans_keep_it_and_older_ones_load() -> None:
    for plan in plans(0.92).values():
        assert Plan.from_json(plan.to_json()) == plan
    older = plans(0.92)[True].to_json()
    del older["equal_blocks"], older["free_step_time"]
    plan = Plan.from_json(older)
    assert (plan.equal_blocks, plan.free_step_time) == (True, None)
    assert "equal blocks" not in str(plan)


@pytest.mark.parametrize("seed", range(10))
def test_the_bound_covers_free_blocks_where_memory_is_short(seed: int) -> None:
    """Random plans whose blocks decide one by one, also blocks of a kind, in just as much memory as each takes: none is
    faster than the bound of a search that holds equal blocks equal."""
    draw = random.Random(seed)
    graph, job, cluster = drawn(seed)
    fix = {"cp": 1, "offload": "none"}
    context = Context.of(graph, job, cluster, parse_fix(fix))
    space = [c for c in configs(graph, job, cluster, parse_fix(fix)) if c.tp > 1 and c.pad_heads == 1 and c.vpp == 1]
    config = draw.choice(space)
    shardings = KnownShardings(context).of(config.sharding)
    costs = {}
    for kind in graph.kinds:
        decisions = list(every_decision(graph, shardings, kind))
        some = draw.sample(decisions, min(24, len(decisions)))
        names = context.choices_of(kind) if config.schedule not in ("zbv", "dualpipev") else ("none",)
        every = [context.costs.of(graph.kinds[kind], one, shardings.prices, names) for one in some]
        costs[kind] = [cost for by_name in every for cost in {c.recompute: c for c in by_name.values()}.values()]
    found = []
    for way in itertools.islice(chains([costs[block.kind] for block in graph.blocks]), 20_000):
        handed = max(boundary_bytes(graph.kinds[c.kind], c.decision, config.micro_batch, job) for c in way)
        cuts = sorted(draw.sample(range(1, len(way)), config.pp - 1))
        stages = [way[start:stop] for start, stop in itertools.pairwise((0, *cuts, len(way)))]
        found.append((sum(c.forward_s + c.backward_s for c in way), stages, handed))
    assert found
    found.sort(key=lambda one: one[0])
    priced = [assess(context, config, stages, handed) for _, stages, handed in found[: len(found) // 4 + 1 : 7][:40]]
    for one in draw.sample(priced, min(3, len(priced))):
        room = max(*one.rank_bytes(), cluster.device.reserve_bytes + 1)
        given = {**fix, "pp": config.pp, "dp": config.dp, "zero": config.zero, "micro_batch": config.micro_batch}
        try:
            plan = search(graph, job, with_memory(cluster, room), given)
        except InfeasibleError:
            continue
        assert plan.bound <= one.step_time * ROUNDING, one
