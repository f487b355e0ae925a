"""Blocks that stay gathered under zero 3: the search keeps as many as fit and pay, what it says they save is so, and no
choice of them takes less than the bound."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import random
from pathlib import Path

import pytest
from small_spaces import AMPLE, drawn_cluster, model_of, with_memory

from autopar.cluster import Cluster
from autopar.codegen.emit import emit
from autopar.errors import UnsupportedError
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.plan import Plan
from autopar.report.explain_block import explain_block
from autopar.report.explain_text import block_text
from autopar.report.text import gathered_blocks, plan_text, reshard_words
from autopar.solver.capabilities import check_executable
from autopar.solver.config_bounds import stage_bound
from autopar.solver.context import Context
from autopar.solver.evaluate import assess
from autopar.solver.fix import parse_fix
from autopar.solver.gather_bound import Traced, gather_bound, parts_of
from autopar.solver.groups import root_blocks
from autopar.solver.hiding import hidden_backward, hidden_forward
from autopar.solver.least_problem import least_problems
from autopar.solver.search import search
from autopar.solver.shardings import KnownShardings
from autopar.solver.space import configs

JOB = Job(8, 32)
ALONE = {"mesh": "pp=1,dp=4,cp=1,tp=1", "zero": 3, "fsdp": 4, "offload": "none"}


def model() -> ModelGraph:
    return model_of((64,) * 6, 32, 64, False, False)


def slow() -> Cluster:
    """Links so slow that gathers are seen."""
    cluster = Cluster.parse("1x4:h100")
    link = dataclasses.replace(cluster.intra_node, bandwidth=cluster.intra_node.bandwidth / 1e4)
    return with_memory(cluster.with_links(intra_node=link), AMPLE)


def plan_of(nbytes: int = AMPLE, **fix: object) -> Plan:
    return search(model(), JOB, with_memory(slow(), nbytes), {**ALONE, "micro_batch": 1, **fix})


def needs(plan: Plan) -> int:
    return plan.stages[0].total_bytes


def test_the_longest_way_is_told_by_its_parts() -> None:
    compute = [Traced(float(s), (("compute", i),)) for i, s in enumerate((4, 1, 4))]
    gathers = [Traced(float(s), (("gather", i),)) for i, s in enumerate((1, 2, 2))]
    total = hidden_forward(compute, gathers)
    # The second gather hides behind the first block, the third does not behind the second.
    assert float(total) == 1 + 4 + 2 + 4
    assert sorted(parts_of(total)) == [("compute", 0), ("compute", 2), ("gather", 0), ("gather", 2)]
    back = hidden_backward(compute, gathers, [0.0] * 3, 0.5, 1.0)
    assert (
        float(back) == sum(float({"compute": compute, "gather": gathers}[name][i]) for name, i in parts_of(back)) + 1.5
    )


@pytest.mark.parametrize("seed", range(12))
def test_no_mix_takes_less_than_the_bounds(seed: int) -> None:
    """Any blocks gathered, any recomputed, with memory as small as that mix needs."""
    draw = random.Random(seed)
    cluster, job = drawn_cluster(draw, draw.choice(("1x4", "2x2"))), Job(8, draw.choice((8, 64)))
    micro = draw.choice((1, 2))
    context = Context.of(model(), job, cluster, parse_fix({**ALONE, "micro_batch": micro}))
    [config] = list(configs(model(), job, cluster, context.fix))
    shardings = KnownShardings(context).of(config.sharding)
    answer, roots = shardings.fastest(), root_blocks(context.model, range(len(context.model.blocks)))
    base = [answer.costs[block.kind]["none"] for block in context.model.blocks]
    none = assess(context, config, [base], answer.boundary)
    tight = 0
    for _ in range(20):
        mix = [
            answer.costs[cost.kind][draw.choice(("none", "none", "full"))] if block.path else cost
            for cost, block in zip(base, context.model.blocks, strict=True)
        ]
        share = draw.random()
        mix = [
            dataclasses.replace(cost, gathered=not root and draw.random() < share)
            for cost, root in zip(mix, roots, strict=True)
        ]
        found = assess(context, config, [mix], answer.boundary)
        room = Context.of(model(), job, with_memory(cluster, max(found.rank_bytes())), context.fix)
        known = KnownShardings(room).of(config.sharding)
        problem = least_problems(room, [config], known)[0]
        bound = gather_bound(room, config, problem, base, known.fastest())
        assert bound <= found.step_time * (1 + 1e-9)
        assert stage_bound(room, config, known, sharp=True) <= found.step_time * (1 + 1e-9)
        if max(found.rank_bytes()) < max(none.rank_bytes()):
            tight += bound > none.step_time
    assert none.step_time > 0
    assert tight or seed != 0


def test_as_many_blocks_stay_gathered_as_fit() -> None:
    every, nothing = (plan_of(reshard=way, recompute="none") for way in (False, True))
    assert gathered_blocks(every) == 6
    assert gathered_blocks(nothing) == 0
    assert every.predicted.step_time < 0.95 * nothing.predicted.step_time
    assert needs(every) > needs(nothing)
    # Free to choose: all where memory is ample; fewer and fewer where it is not, and none slower than needed.
    assert plan_of(recompute="none").predicted.step_time == pytest.approx(every.predicted.step_time)
    counts, steps = [], []
    for share in (0.8, 0.6, 0.4, 0.3, 0.0):
        plan = plan_of(needs(nothing) + int(share * (needs(every) - needs(nothing))), recompute="none")
        counts.append(gathered_blocks(plan))
        steps.append(plan.predicted.step_time)
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) >= 4
    assert counts[-1] == 0
    assert all(one <= other for one, other in itertools.pairwise(steps))
    assert steps[-1] == pytest.approx(nothing.predicted.step_time)


def test_fixed_blocks_stay_and_the_plan_says_which() -> None:
    plan = plan_of(reshard="true,2-3:false")
    assert [plan.candidate_of(block).gathered for block in range(8)] == [False, False, True, True, *[False] * 4]
    assert reshard_words(plan) == "true,2-3:false"
    assert "2 blocks staying gathered" in plan_text(plan)
    assert "parameters stay gathered" in plan_text(plan)
    assert Plan.from_json(plan.to_json()) == plan
    again = plan_of(reshard=reshard_words(plan))
    assert again.predicted.step_time == plan.predicted.step_time


def test_explanations_price_the_other_choice() -> None:
    some, every = (plan_of(reshard=way, recompute="none") for way in ("true,1-3:false", False))
    graph = model()
    kind = graph.blocks[2].kind
    answers = {one.gathering.gathered: one for one in explain_block(some, graph, kind).candidates}
    assert set(answers) == {False, True}
    freed = answers[False].gathering
    assert freed.step_s == pytest.approx(every.predicted.step_time - some.predicted.step_time)
    assert (freed.short, freed.fixed) == (0, True)
    assert answers[True].gathering.step_s > 0 > freed.step_s
    told = block_text(explain_block(some, graph, kind)).replace("\n" + " " * 13, " ")
    assert "stay gathered through the step (fixed); freeing them after each use in all of these" in told
    tight = plan_of(needs(plan_of(reshard=True, recompute="none")), recompute="none")
    [only] = explain_block(tight, graph, kind).candidates
    assert only.gathering.short == needs(every) - needs(tight)
    assert f"lack {only.gathering.short:,} bytes on rank 0" in block_text(explain_block(tight, graph, kind))
    ends = explain_block(some, graph, graph.blocks[0].kind).candidates
    assert [one.gathering for one in ends] == [None]


def test_emitted_code_names_the_blocks(tmp_path: Path) -> None:
    graph = model()
    plan = plan_of(reshard="true,1:false,3-5:false")
    emit(plan, graph, tmp_path / "some")
    train = ast.parse((tmp_path / "some" / "train.py").read_text())
    [value] = [n.value for n in train.body if isinstance(n, ast.Assign) and n.targets[0].id == "GATHERED"]
    named = eval(compile(ast.Expression(value), "train.py", "eval"))
    assert named == [graph.blocks[index].path for index in (1, 3, 4, 5)]
    emit(plan_of(reshard=True), graph, tmp_path / "none")
    assert "GATHERED" not in (tmp_path / "none" / "train.py").read_text()


def test_only_zero_3_has_the_choice() -> None:
    plan = plan_of(reshard=False)
    with pytest.raises(UnsupportedError, match="only zero 3 frees parameters"):
        check_executable(dataclasses.replace(plan, zero=2))
    told = search(model(), JOB, slow(), {**ALONE, "zero": 2, "micro_batch": 1, "recompute": "none"})
    assert gathered_blocks(told) == 0
    three = plan_of(reshard=False, recompute="none")
    assert three.predicted.step_time >= told.predicted.step_time
