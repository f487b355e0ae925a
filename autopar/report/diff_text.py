"""The difference of two plans, and the answer to "why not", as text."""

from __future__ import annotations

from collections.abc import Callable

from autopar.report.columns import indented, item, paragraph, percent, signed, table
from autopar.report.diff import Amount, PlanDiff
from autopar.report.units import bytes_text, memory_unit, seconds_text
from autopar.report.why_not import WhyNot

SMALL = 1e-3
"""Share of the step time below which a difference is not told as a reason."""


def diff_text(found: PlanDiff, first: str = "A", second: str = "B") -> str:
    """All of it: what the plans were made for, decisions, seconds, bytes. ``first``, ``second``: what to call them."""
    sections = [
        _premises(found, first, second),
        _decisions(found, first, second),
        _seconds(found, first, second),
        _bytes(found, first, second),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def why_not_text(answer: WhyNot) -> str:
    """The verdict in a sentence, and if another plan was found how it differs."""
    asked = ", ".join(f"{key}={value}" for key, value in answer.asked.items())
    found = answer.diff
    if answer.verdict == "unavailable":
        return "\n".join(
            paragraph(f"{asked}: unavailable{', memory is short' if answer.short else ''}: {answer.reason}")
        )
    assert found is not None
    if answer.verdict == "same":
        return "\n".join(
            paragraph(f"{asked}: the plan has it: the search finds the same one ({_step(found.step.second)})")
        )
    apart = f"{seconds_text(abs(found.step.more))} ({percent(abs(found.step.more) / found.step.first)})"
    told = {
        "slower": f"slower by {apart} a step",
        "faster": f"faster by {apart} a step: {answer.reason}",
        "equal": "as fast, by other decisions",
    }[answer.verdict]
    certificate = f"(gap {percent(answer.gap)}, {answer.status})"
    told += f". Nothing searched with it is faster than {seconds_text(answer.bound)} {certificate}"
    return "\n".join(
        [*paragraph(f"{asked}: {told}"), "", diff_text(found, "plan", asked if len(asked) <= 12 else "other")]
    )


def _step(seconds: float) -> str:
    return f"step time {seconds_text(seconds)}"


def _premises(found: PlanDiff, first: str, second: str) -> list[str]:
    if not found.premises:
        return []
    lines = [f"{first} and {second} were made for different things; their seconds and bytes are not of one job:"]
    rows = [(pair.name, pair.first, pair.second) for pair in found.premises]
    speeds = found.tokens_per_second
    rows.append((speeds.name, f"{speeds.first:,.0f}", f"{speeds.second:,.0f}"))
    return [*lines, *indented(table(["", first, second], rows, 3))]


def _decisions(found: PlanDiff, first: str, second: str) -> list[str]:
    if not (found.decisions or found.operators):
        return ["the plans decide the same" if found.premises else "the plans are the same"]
    lines = []
    long = [pair for pair in found.decisions if max(len(pair.first), len(pair.second)) > 34]
    short = [(pair.name, pair.first, pair.second) for pair in found.decisions if pair not in long]
    if short:
        lines += table(["decisions that differ", first, second], short, 3)
    for pair in long:
        lines += [pair.name, *indented(item(first, pair.first)), *indented(item(second, pair.second))]
    for change in found.operators:
        operators = ", ".join(change.operators)
        lines += paragraph(f"{change.kind}: {change.first} -> {change.second}: {operators}")
    if found.operators:
        lines += ["(tp n: factor n of the operator's rule is split over tp; whole: every rank runs the whole operator)"]
    return lines


def _seconds(found: PlanDiff, first: str, second: str) -> list[str]:
    rows = [amount for amount in found.seconds if max(abs(amount.first), abs(amount.second)) > 0]
    lines = table(
        ["seconds of a step", first, second, "difference"],
        [_row(amount, seconds_text) for amount in [*rows, found.step]],
        1,
    )
    apart = [a for a in sorted(rows, key=lambda a: -abs(a.more)) if abs(a.more) > SMALL * found.step.first]
    if apart and found.step.more:
        reasons = ", ".join(f"{a.name} {signed(a.more, seconds_text)}" for a in apart)
        lines += ["", *item("comes from", reasons)]
    return lines


def _bytes(found: PlanDiff, first: str, second: str) -> list[str]:
    unit, scale = memory_unit(max(found.held.first, found.held.second))

    def told(size: float) -> str:
        return bytes_text(size, scale)

    ranks = " and ".join(map(str, dict.fromkeys(found.ranks)))
    rows = [amount for amount in found.bytes if amount.first or amount.second]
    head = [f"{unit} of the fullest rank ({ranks})", first, second, "difference"]
    return table(head, [_row(amount, told) for amount in [*rows, found.held]], 1)


def _row(amount: Amount, told: Callable[[float], str]) -> tuple[str, str, str, str]:
    return amount.name, told(amount.first), told(amount.second), signed(amount.more, told)
