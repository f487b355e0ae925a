"""Questions about saved plans, as the command asks them: each answer as text and as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autopar.plan import Plan


@dataclass(frozen=True, slots=True)
class Told:
    """``record``: plain JSON values; seconds, bytes and counts."""

    text: str
    record: dict[str, Any]


def answer(
    plan: Plan, model: str | None = None, op: str | None = None, block: str | None = None, why_not: Sequence[str] = ()
) -> Told:
    """Why ``plan`` is as it is: its operator ``op``, its block kind ``block``, or not as ``why_not`` ("tp=4", ...).
    Without a question a short account, for which ``model`` (a MODEL string, `autopar.models`) is not needed.

    Raises BadInputError for unknown names and keys, or a model that the plan was not made for.
    """
    if not (op or block or why_not):
        from autopar.report.explain_text import account_record, plan_account

        return Told(plan_account(plan), account_record(plan))
    from autopar.models import model_graph

    graph = model_graph(model or plan.model)
    if op:
        from autopar.report.explain_op import explain_operator
        from autopar.report.explain_text import operator_text

        strategies = explain_operator(plan, graph, op)
        return Told(operator_text(strategies), asdict(strategies))
    if block:
        from autopar.report.explain_block import explain_block
        from autopar.report.explain_text import block_text

        decisions = explain_block(plan, graph, block)
        return Told(block_text(decisions), asdict(decisions))
    from autopar.report.diff_text import why_not_text
    from autopar.report.why_not import why_not as search_again

    found = search_again(plan, graph, why_not)
    return Told(why_not_text(found), asdict(found))


def difference(first: Plan, second: Plan) -> Told:
    """What differs from ``first`` to ``second``."""
    from autopar.report.diff import diff
    from autopar.report.diff_text import diff_text

    found = diff(first, second)
    return Told(diff_text(found), asdict(found))
