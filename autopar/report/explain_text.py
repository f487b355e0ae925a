"""Explanations as text, at most 100 columns wide but for tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autopar.plan import Plan
from autopar.report.columns import counted, item, pairs, paragraph, percent, signed, table
from autopar.report.diff import fullest_rank, rank_bytes, split_words
from autopar.report.explain_block import BlockAnswer, CandidateAnswer, OperatorRow, Split
from autopar.report.explain_op import OperatorAnswer, StrategyAnswer, Whole
from autopar.report.gather_choice import GatherChoice
from autopar.report.recompute_choices import RecomputeChoice
from autopar.report.record import plan_record
from autopar.report.text import decision_lines
from autopar.report.units import bytes_text, memory_unit, seconds_text

MOVES = 6
"""Conversions listed at most of those that come or go."""


def plan_account(plan: Plan) -> str:
    """A short account: what is decided, what the step is made of, what fills the fullest rank, what can be asked."""
    found, rank = plan.predicted, fullest_rank(plan)
    held = rank_bytes(plan)[rank]
    total, room = sum(held.values()), plan.cluster.device.memory_bytes
    unit, scale = memory_unit(room)
    shares = {name: s / found.step_time for name, s in found.breakdown.items() if s > 1e-4 * found.step_time}
    made = ", ".join(f"{name} {percent(share)}" for name, share in sorted(shares.items(), key=lambda one: -one[1]))
    sizes = ", ".join(f"{kind} {bytes_text(size, scale)}" for kind, size in held.items() if size)
    kinds = dict.fromkeys(candidate.decision.kind for candidate in plan.candidates.values())
    lines = [
        *decision_lines(plan),
        "",
        *item("step time", f"{seconds_text(found.step_time)}: {made}"),
        *item(
            "fullest rank",
            f"{rank} of {plan.mesh.pp}: {bytes_text(total, scale)} {unit} of {bytes_text(room, scale)}: {sizes}",
        ),
        *item(
            "certificate",
            f"nothing searched is faster than {seconds_text(plan.bound)}: at most {percent(plan.gap)} to gain",
        ),
        *item("ask", f"--block {' | '.join(kinds)}, --op NAME of an operator in them, --why-not KEY=VALUE"),
    ]
    return "\n".join(lines)


def account_record(plan: Plan) -> dict[str, Any]:
    """`plan_account` as plain JSON values: the record of the plan, with what the step and the fullest rank hold, and
    the operators by block kind that can be asked for."""
    rank = fullest_rank(plan)
    operators = {one.decision.kind: list(one.decision.strategies) for one in plan.candidates.values()}
    return {
        **plan_record(plan),
        "breakdown": dict(plan.predicted.breakdown),
        "fullest_rank": {"rank": rank, "bytes": rank_bytes(plan)[rank], "room": plan.cluster.device.memory_bytes},
        "operators": operators,
    }


def operator_text(answer: OperatorAnswer) -> str:
    """The strategies as a table, then for each that was not chosen what changes, or why it cannot be."""
    told = f"{answer.name} ({answer.operator}, {answer.op}), in {counted(answer.blocks, 'blocks')}"
    if not answer.axes:
        whole = "the mesh has no model axis (tp=1, cp=1): every rank runs it whole. Ask --why-not tp=2"
        return "\n".join(paragraph(f"{told}: {whole}"))
    lines = [f"{told}, on {pairs({axis: str(size) for axis, size in answer.axes.items()})}", ""]
    lines += table(
        ["strategy", "", "alone", "together", "conversions"], [_strategy_row(one) for one in answer.strategies], 2
    )
    lines += ["", *paragraph(_measure(answer), 0)]
    for name, splits in answer.also.items():
        lines += paragraph(f"The plan's blocks under {name} run it as {split_words(splits)}.", 0)
    reasons: dict[str, list[StrategyAnswer]] = {}
    for one in answer.strategies:
        told = one.reason or (_change(one.together) if one.together else "")
        if told:
            reasons.setdefault(f"{one.verdict}: {told}", []).append(one)
    for told, some in reasons.items():
        lines += ["", *paragraph(f"{'; '.join(_words(one.words) for one in some)}: {told}")]
    return "\n".join(lines)


def _strategy_row(one: StrategyAnswer) -> Sequence[str]:
    alone = "" if one.alone_s is None else seconds_text(one.alone_s)
    if one.together is None:
        return _words(one.words), one.verdict, alone, "", ""
    whole = one.together
    return (
        _words(one.words),
        one.verdict,
        alone,
        signed(whole.seconds, seconds_text),
        signed(whole.conversions, seconds_text),
    )


def _measure(answer: OperatorAnswer) -> str:
    text = (
        "alone: the operator, forward and backward of one micro-batch. together: all blocks of the model, one "
        f"micro-batch, sharded anew with the operator held to the strategy, against {seconds_text(answer.whole_s)}; "
        "conversions: of that. Collectives read forward / backward."
    )
    if not answer.optimal:
        text += (
            " The plan's sharding is not the fastest for one micro-batch: memory or the stages decided, so that some "
            "are cheaper."
        )
    elif answer.byte_price:
        text += f" Memory is short: a GiB saved for backward counts {seconds_text(answer.byte_price * 2**30)} here."
    return text


def _change(whole: Whole) -> str:
    parts = {
        "the operator": whole.operator,
        "other operators": whole.others,
        "conversions": whole.conversions,
        "gradients handed on": whole.weights,
    }
    told = [f"{name} {signed(s, seconds_text)}" for name, s in parts.items() if abs(s) > 1e-3 * abs(whole.seconds)]
    text = ", ".join(told) or "nothing changes"
    unit, scale = memory_unit(abs(whole.saved_bytes))
    if abs(whole.saved_bytes) >= 2**20:
        text += f", about {signed(whole.saved_bytes, lambda size: bytes_text(size, scale))} {unit} saved for backward"
    for word, moves in (("; more: ", whole.more), ("; fewer: ", whole.fewer)):
        if moves:
            listed = ", ".join(f"{what} of {tensor}" for tensor, what in moves[:MOVES])
            text += f"{word}{listed}" + (f" and {len(moves) - MOVES} others" if len(moves) > MOVES else "")
    return text + ("" if whole.proved else " (the ILP stopped at its work limit: not proved the least)")


def _words(words: Mapping[str, str]) -> str:
    if len(set(words.values())) == 1 and len(words) > 1:
        return f"{', '.join(words)} {next(iter(words.values()))}"
    return "; ".join(f"{axis} {text}" for axis, text in words.items()) or "whole"


def block_text(answer: BlockAnswer) -> str:
    """Every candidate of the kind: operators, conversions, seconds, bytes, recomputation."""
    sections = [_candidate_lines(answer.kind, one) for one in answer.candidates]
    if answer.equal_blocks:
        sections.append(item("equal blocks", answer.equal_blocks))
    return "\n\n".join(map("\n".join, sections))


def _candidate_lines(kind: str, one: CandidateAnswer) -> list[str]:
    noun = "block" if one.count == 1 else "blocks"
    rows: list[Sequence[str]]
    lines = [f"{kind}, {noun} {', '.join(one.blocks)}: recompute {one.recompute[0].name}", ""]
    told = [row for row in one.operators if row.forward_s or row.backward_s]
    lines += table(["operator", "strategy", "forward", "backward"], map(_operator_row, told), 2)
    if len(told) < len(one.operators):
        lines.append(f"(and {counted(len(one.operators) - len(told), 'views')} that take no time)")
    if one.conversions:
        rows = [
            (
                row.tensor,
                f"{row.axis} {row.types}",
                _action(row.forward, row.forward_bytes, row.forward_s),
                _action(row.backward, row.backward_bytes, row.backward_s),
            )
            for row in one.conversions
        ]
        lines += ["", *table(["conversion", "", "forward", "backward"], rows, 4)]
    unit, scale = memory_unit(max(one.saved_bytes, one.transient_bytes))
    rows = [(name, *_split_cells(split)) for name, split in (("forward", one.forward), ("backward", one.backward))]
    lines += [
        "",
        *table(["one micro-batch", "computation", "communication", "recomputation", "host", "total"], rows, 1),
    ]
    lines += [
        "",
        *item(
            "bytes",
            f"{bytes_text(one.saved_bytes, scale)} {unit} kept for backward by each micro-batch in flight, "
            f"{bytes_text(one.transient_bytes, scale)} {unit} while the block runs, {one.parameters:,} parameter "
            "elements on a rank of the model axes",
        ),
        *(item("parameters", _gathering(one.gathering)) if one.gathering else ()),
        *item("recompute", _why(one)),
    ]
    if len(one.recompute) > 1:
        rows = [_choice_row(choice, scale) for choice in one.recompute]
        head = [
            f"all {one.count} blocks so" if one.count > 1 else "the block so",
            "a block",
            f"kept {unit}",
            "the step",
            "",
        ]
        lines += ["", *table(head, rows, 1)]
    return lines


def _operator_row(row: OperatorRow) -> Sequence[str]:
    return row.name, _words(row.words), seconds_text(row.forward_s), seconds_text(row.backward_s)


def _action(action: str, nbytes: int, seconds: float) -> str:
    if action == "none":
        return "-"
    unit, scale = memory_unit(nbytes)
    moved = f" {bytes_text(nbytes, scale)} {unit}" if nbytes else ""
    return f"{action.replace('_', '-')}{moved}, {seconds_text(seconds)}"


def _split_cells(split: Split) -> Sequence[str]:
    parts = (split.computation, split.communication, split.recomputation, split.copies, split.total)
    return tuple(seconds_text(part) for part in parts)


def _gathering(choice: GatherChoice) -> str:
    """Whether parameters stay gathered under zero 3, and what the other choice would do."""
    mine, other = ("stay gathered through the step", "freeing them after each use")
    if not choice.gathered:
        mine, other = ("freed after each forward and backward", "keeping them gathered")
    told = mine + (" (fixed)" if choice.fixed else "")
    way = "longer" if choice.step_s >= 0 else "shorter"
    told += f"; {other} in all of these blocks would make the step {seconds_text(abs(choice.step_s))} {way}"
    return told + (f", and lack {choice.short:,} bytes on rank {choice.rank}" if choice.short else "")


def _why(one: CandidateAnswer) -> str:
    """Why the plan's choice, in a sentence."""
    mine, others = one.recompute[0], [choice for choice in one.recompute[1:] if not choice.refused]
    faster = [choice for choice in others if choice.step_s < -1e-9]
    if one.fixed:
        told = f"{mine.name}, because it was fixed ({one.fixed})"
        fitting = min((c for c in faster if not c.short), key=lambda c: c.step_s, default=None)
        return told + (
            f"; {fitting.name} would fit and be {seconds_text(-fitting.step_s)} a step faster" if fitting else ""
        )
    if not faster:
        return f"{mine.name}: no other choice makes the step faster, and it fits"
    best = min(faster, key=lambda c: c.step_s)
    if not best.short:
        return f"{mine.name}; {best.name} would be {seconds_text(-best.step_s)} a step faster: within the search's gap"
    unit, scale = memory_unit(best.short)
    return (
        f"{mine.name}, because memory is short: {best.name} would be {seconds_text(-best.step_s)} a step faster, but "
        f"{_where(best)} would lack {bytes_text(best.short, scale)} {unit}; there is room for {best.blocks} of "
        f"{one.count} blocks so"
    )


def _where(choice: RecomputeChoice) -> str:
    return f"rank {choice.rank}'s host" if choice.on_host else f"rank {choice.rank}"


def _choice_row(choice: RecomputeChoice, scale: int) -> Sequence[str]:
    if choice.chosen:
        return choice.name, "", bytes_text(choice.kept, scale), "", "chosen"
    if choice.refused:
        return (
            choice.name,
            signed(choice.block_s, seconds_text),
            bytes_text(choice.kept, scale),
            "",
            "refused by the schedule",
        )
    unit, size = memory_unit(choice.short)
    note = f"{_where(choice)} short of {bytes_text(choice.short, size)} {unit}" if choice.short else "fits"
    return (
        choice.name,
        signed(choice.block_s, seconds_text),
        bytes_text(choice.kept, scale),
        signed(choice.step_s, seconds_text),
        note,
    )
