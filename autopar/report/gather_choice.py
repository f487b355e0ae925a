"""Why the blocks of a candidate stay gathered under zero 3, or are freed after each use: what the other would make of
the step and of memory, priced anew."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autopar.graph.ir import ModelGraph
from autopar.plan import Candidate, Plan
from autopar.report.recompute_choices import lacking
from autopar.solver.groups import root_blocks
from autopar.solver.reprice import price_plan


@dataclass(frozen=True, slots=True)
class GatherChoice:
    """``gathered``: whether the blocks stay so; ``step_s``: how many seconds longer the step is if all of them do the
    other; ``short``: bytes that rank ``rank`` then lacks, 0 where it fits; ``fixed``: whether `fix` said so."""

    gathered: bool
    step_s: float
    short: int
    rank: int
    fixed: bool


def gather_choice(plan: Plan, model: ModelGraph, candidate: Candidate, block: int, fixed: bool) -> GatherChoice | None:
    """For ``candidate``, one of whose blocks is ``block``; None where there is no choice: below zero 3, and in the root
    group, which stays gathered between a forward and its backward in any case."""
    if plan.zero != 3 or root_blocks(model, range(len(model.blocks)))[block]:
        return None
    other = {**plan.candidates, candidate.name: replace(candidate, gathered=not candidate.gathered)}
    base, priced = price_plan(plan, model), price_plan(replace(plan, candidates=other), model)
    short = lacking(plan, priced)
    rank = short.index(max(short))
    return GatherChoice(candidate.gathered, priced.step_time - base.step_time, max(0, short[rank]), rank, fixed)
