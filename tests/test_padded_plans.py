"""Plans with padded heads: chosen where faster, priced twice alike, emitted, and equal to the single device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from autopar.cluster import Cluster
from autopar.codegen.emit_module import module_source
from autopar.codegen.typecheck import typecheck
from autopar.codegen.verify import verify
from autopar.errors import BadInputError
from autopar.graph.ir import ModelGraph
from autopar.graph.padding import as_planned
from autopar.job import Job
from autopar.models import model_graph
from autopar.plan import Plan
from autopar.report.words import block_lines
from autopar.solver.context import Context
from autopar.solver.explore import explore
from autopar.solver.fix import Fix, parse_fix
from autopar.solver.plan_of import plan_of
from autopar.solver.reprice import check_price
from autopar.solver.search import search
from autopar.solver.space import configs, shapes
from tests.test_padding import gpt2, grouped

LONG = 2**15
"""Positions that make attention, even of tiny heads, worth splitting."""


@cache
def wide() -> GPT2LMHeadModel:
    """Two layers of GPT-2 XL: 25 heads of 64, here with long sequences."""
    config = GPT2Config(
        n_embd=1600,
        n_head=25,
        n_layer=2,
        n_positions=8192,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        loss_type="ForCausalLM",
    )
    with torch.device("meta"):
        return GPT2LMHeadModel(config)


@cache
def wide_graph() -> ModelGraph:
    return model_graph(wide())


def best(graph: ModelGraph, job: Job, tp: int, fix: Fix, pads: bool) -> Plan:
    """The fastest plan of those that pad heads, or that do not."""
    cluster = Cluster.parse(f"1x{tp}:h100")
    context = Context.of(graph, job, cluster, fix)
    found = explore(context, [s for s in shapes(graph, job, cluster, fix) if (s.outline.pad_heads > 1) == pads])
    assert found.best is not None
    plan = plan_of(context, found.best, found.best.step_time, 1.0, {}, None)
    check_price(plan, graph)
    return plan


@pytest.mark.parametrize(("tp", "times"), [(2, 1.1), (4, 1.3)])
def test_heads_are_padded_where_that_is_faster(tp: int, times: float) -> None:
    graph, job = wide_graph(), Job(1, 8192)
    plan = search(graph, job, Cluster.parse(f"1x{tp}:h100"), {"tp": tp})
    assert plan.pad_heads == tp
    assert plan.predicted.step_time * times < best(graph, job, tp, Fix(tp=tp), pads=False).predicted.step_time
    assert f"padded with zeros to a multiple of {tp}" in str(plan)
    lines = block_lines(as_planned(plan, graph).kinds["GPT2Block"], plan.candidate_of(1).decision)
    assert any(line.startswith("attention ") and " heads " in line for line in lines)


def test_short_sequences_are_not_worth_it() -> None:
    plan = search(wide_graph(), Job(1, 1024), Cluster.parse("1x2:h100"), {"tp": 2})
    assert plan.pad_heads == 1
    assert "padded" not in str(plan)


def test_heads_that_divide_offer_no_padding() -> None:
    graph, job = wide_graph(), Job(1, 1024)
    assert {c.pad_heads for c in configs(graph, job, Cluster.parse("1x5:h100"), Fix(tp=5))} == {1}
    assert {c.pad_heads for c in configs(graph, job, Cluster.parse("1x4:h100"), Fix(tp=4))} == {1, 4}


@pytest.mark.parametrize(("name", "tp", "sp"), [("gpt2", 2, False), ("gpt2", 4, True), ("6 on 3", 4, False)])
def test_emitted_code_equals_the_single_device(name: str, tp: int, sp: bool) -> None:
    model: nn.Module = {
        "gpt2": lambda: gpt2(longest=LONG),
        "6 on 3": lambda: grouped(6, 3, LONG),
    }[name]()
    graph = model_graph(model)
    plan = best(graph, Job(1, LONG), tp, parse_fix({"tp": tp, "sp": sp}), pads=True)
    assert "F.pad(self." in module_source(plan, graph)
    report = verify(plan, model)
    assert report.twin == ""
    assert max(report.loss_error, report.worst[1]) < 1e-12
    typecheck(plan, graph, 8)


def test_the_twin_of_a_padded_plan_is_padded() -> None:
    plan = best(wide_graph(), Job(1, 8192), 4, Fix(tp=4), pads=True)
    report = verify(plan, wide())
    assert "narrow layers" in report.twin
    assert report.worst[1] < 1e-12


def test_plans_are_saved_with_their_padding(tmp_path: Path) -> None:
    plan = best(wide_graph(), Job(1, 8192), 4, Fix(tp=4), pads=True)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(BadInputError, match="heads padded to a multiple of 3"):
        replace(plan, pad_heads=3).check_whole()
