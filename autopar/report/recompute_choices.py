"""What a block's other recompute choices would cost in seconds and save in bytes, alone and in the whole plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from autopar.graph.ir import ModelGraph
from autopar.plan import Candidate, Plan, Run, Stage
from autopar.report.text import recompute_text
from autopar.solver.candidates import BlockCost
from autopar.solver.capabilities import Chosen, refusals
from autopar.solver.forced import context_of
from autopar.solver.prices import AxisPrices
from autopar.solver.recompute import choices
from autopar.solver.reprice import Repriced, price_plan


@dataclass(frozen=True, slots=True)
class RecomputeChoice:
    """A recompute choice for all blocks of a candidate, the plan's other decisions unchanged.

    ``block_s``: seconds of a block more than under the plan's choice, forward and backward of one micro-batch;
    ``kept``, ``transient``: bytes of a block that it keeps for backward, and needs while it runs. ``step_s``: seconds
    of the step more than the plan's; ``short``: bytes that the fullest rank, ``rank``, lacks (0: it fits), ``on_host``:
    whether it lacks them on its host; ``blocks``: to how many blocks of the candidate it can be given before a rank
    runs out of memory. ``refused``: why the plan's
    schedule does not allow it.
    """

    name: str
    chosen: bool
    block_s: float
    kept: int
    transient: int
    step_s: float = 0.0
    rank: int = 0
    short: int = 0
    on_host: bool = False
    blocks: int = 0
    refused: str = ""


def recompute_choices(plan: Plan, model: ModelGraph, candidate: Candidate) -> tuple[RecomputeChoice, ...]:
    """The plan's choice, then the others, the fastest first. Raises BadInputError for another model."""
    context = context_of(plan, model).padded(plan.pad_heads)
    prices = AxisPrices(
        context.ops, context.collectives, candidate.decision.axes, plan.micro_batch, plan.mesh.strides()
    )
    kind = context.model.kinds[candidate.decision.kind]
    mine = _name(candidate)
    given = context.fix.offload is not None or not context.cluster.device.host_bandwidth
    others = choices(None, candidate.offload if given else None, extended=True)
    names = [mine, *sorted(others, key=lambda name: name.startswith("selective"))]  # "full" names what keeps nothing
    costs = context.costs.of(kind, candidate.decision, prices, dict.fromkeys(names))
    base, own = price_plan(plan, model), costs[mine]
    found = [RecomputeChoice(mine, True, 0.0, own.inflight, own.transient, blocks=_count(plan, candidate))]
    seen = {_entries(own)}
    for name in names:
        cost = costs[name]
        if _entries(cost) in seen:
            continue
        seen.add(_entries(cost))
        more = cost.forward_s + cost.backward_s - own.forward_s - own.backward_s
        one = RecomputeChoice(_name(_switched(candidate, cost)), False, more, cost.inflight, cost.transient)
        recompute = Chosen.of(plan).recompute | {cost.recompute}
        limit = next(refusals(replace(Chosen.of(plan), recompute=recompute)), None)
        found.append(replace(one, refused=limit.reason) if limit else _placed(plan, model, candidate, cost, base, one))
    return tuple(sorted(found, key=lambda one: (not one.chosen, one.block_s)))


def _name(candidate: Candidate) -> str:
    return recompute_text(candidate) + ("/offload" if candidate.offload else "")


def _entries(cost: BlockCost) -> tuple[object, ...]:
    return (cost.forward_s, cost.backward_s, cost.inflight, cost.transient)


def _placed(
    plan: Plan, model: ModelGraph, candidate: Candidate, cost: BlockCost, base: Repriced, one: RecomputeChoice
) -> RecomputeChoice:
    """``one`` with what it means for the plan."""
    every = range(len(model.blocks))
    priced = price_plan(_with(plan, candidate, cost, every), model)
    lacks = {where: lacking(plan, priced, where == "host") for where in ("device", "host")}
    where = "device" if max(lacks["device"]) > 0 else "host"
    short = max(0, *lacks[where])
    rank = lacks[where].index(max(lacks[where]))
    blocks = _count(plan, candidate) if not short else _most_blocks(plan, model, candidate, cost)
    return replace(
        one,
        step_s=priced.step_time - base.step_time,
        rank=rank,
        short=short,
        on_host=where == "host" and short > 0,
        blocks=blocks,
    )


def _most_blocks(plan: Plan, model: ModelGraph, candidate: Candidate, cost: BlockCost) -> int:
    """To how many blocks the choice can be given, found for each rank by bisection."""
    total = 0
    for rank in range(plan.mesh.pp):
        own = [block for stage in plan.stages_of(rank) for block in _blocks(plan.stages[stage], candidate)]
        low, high = 0, len(own)
        while low < high:
            middle = (low + high + 1) // 2
            priced = price_plan(_with(plan, candidate, cost, own[:middle]), model)
            if max(lacking(plan, priced)[rank], lacking(plan, priced, host=True)[rank]) <= 0:
                low = middle
            else:
                high = middle - 1
        total += low
    return total


def lacking(plan: Plan, priced: Repriced, host: bool = False) -> list[int]:
    """Bytes that each rank lacks, on its device or its ``host``; below zero: has to spare."""
    device = plan.cluster.device
    if host:
        return [held - device.host_memory_bytes if device.host_memory_bytes else 0 for held in priced.host]
    ranks = (sum(sum(priced.memory[stage].values()) for stage in plan.stages_of(rank)) for rank in range(plan.mesh.pp))
    return [held - device.memory_bytes for held in ranks]


def _blocks(stage: Stage, candidate: Candidate) -> list[int]:
    return [block for run in stage.runs if run.candidate == candidate.name for block in range(run.start, run.stop)]


def _count(plan: Plan, candidate: Candidate) -> int:
    return sum(len(_blocks(stage, candidate)) for stage in plan.stages)


def _switched(candidate: Candidate, cost: BlockCost) -> Candidate:
    return replace(
        candidate,
        recompute=cost.recompute,
        saved=cost.saved,
        forward_s=cost.forward_s,
        backward_s=cost.backward_s,
        inflight_bytes=cost.inflight,
        transient_bytes=cost.transient,
        offload=cost.offload,
    )


def _with(plan: Plan, candidate: Candidate, cost: BlockCost, blocks: Iterable[int]) -> Plan:
    """The plan with those of ``blocks`` that run under ``candidate`` given another recompute choice; its figures are
    not those of the new plan."""
    name, chosen = f"{candidate.name} (other)", frozenset(blocks)
    stages = []
    for stage in plan.stages:
        runs: list[Run] = []
        for run in stage.runs:
            if run.candidate != candidate.name:
                runs.append(run)
                continue
            runs += [Run(b, b + 1, name if b in chosen else run.candidate) for b in range(run.start, run.stop)]
        stages.append(replace(stage, runs=tuple(runs)))
    other = replace(_switched(candidate, cost), name=name)
    return replace(plan, stages=tuple(stages), candidates={**plan.candidates, name: other})
