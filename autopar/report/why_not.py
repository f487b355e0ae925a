"""Why a plan does not have what a user would have given it: the search again with that fixed and all else free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autopar.errors import BadInputError, InfeasibleError, UnsupportedError
from autopar.graph.ir import ModelGraph
from autopar.plan import Plan
from autopar.report.columns import percent, value_text
from autopar.report.diff import PlanDiff, diff
from autopar.solver.capabilities import CAPABILITIES
from autopar.solver.fix import parse_fix
from autopar.solver.search import search

EQUAL = 1e-9
"""Share of the step time up to which two plans are as fast."""


@dataclass(frozen=True, slots=True)
class WhyNot:
    """The answer. ``asked``: what was fixed; ``verdict``: "same" (the plan has it, the search finds it again),
    "unavailable" (``reason``: what does not divide, what cannot run, or how many bytes are short and where; ``short``:
    whether memory is), "slower", "equal" (as fast) or "faster" (``reason``: how that can be). ``diff``: from the plan
    to the one found; ``status``, ``bound`` (seconds), ``gap``: of that one."""

    asked: dict[str, str]
    verdict: str
    reason: str = ""
    short: bool = False
    diff: PlanDiff | None = None
    status: str = ""
    bound: float = 0.0
    gap: float = 0.0


def why_not(plan: Plan, model: ModelGraph, asked: Iterable[str]) -> WhyNot:
    """Search again for the plan's model, job and cluster with ``asked`` ("tp=4", ...) fixed and all else free.

    What the plan itself was made with is not fixed. Raises BadInputError for unknown keys or a plan made for another
    model.
    """
    plan.check_model(model.fingerprint(), model.name)
    wishes = list(asked)
    told = {key.strip(): value.strip() for key, _, value in (wish.partition("=") for wish in wishes)}
    try:
        fix = parse_fix(wishes)
    except UnsupportedError as error:
        return WhyNot(told, "unavailable", str(error))
    try:
        found = search(model, plan.job, plan.cluster, fix, equal_blocks=plan.equal_blocks)
    except InfeasibleError as error:
        return WhyNot(told, "unavailable", str(error), short=True)
    except (BadInputError, UnsupportedError) as error:
        return WhyNot(told, "unavailable", str(error))
    compared = diff(plan, found)
    more = compared.step.more
    if compared.same:
        verdict = "same"
    elif abs(more) <= EQUAL * plan.predicted.step_time:
        verdict = "equal"
    else:
        verdict = "slower" if more > 0 else "faster"
    reason = _how_faster(plan, found, told) if verdict == "faster" else ""
    return WhyNot(told, verdict, reason, diff=compared, status=found.status, bound=found.bound, gap=found.gap)


def _how_faster(plan: Plan, found: Plan, told: dict[str, str]) -> str:
    """How a search with more fixed can find a faster plan."""
    if plan.fixed:
        given = ", ".join(f"{key}={value_text(value)}" for key, value in plan.fixed.items())
        return f"the plan was made with {given} fixed, which this search left free"
    if found.predicted.step_time >= plan.bound:
        return f"the search for the plan stopped {percent(plan.gap)} above its bound, and this one lies between"
    looked = "; ".join(f"{key}: {CAPABILITIES[key].searched or 'as fixed'}" for key in told)
    return f"the search does not look at it unless it is fixed ({looked})"
