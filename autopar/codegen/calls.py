"""How the stage calls its blocks: straight, or so that backward recomputes what the plan says."""

from __future__ import annotations

from autopar.codegen.source import Call, Expr, Text, literal, statement
from autopar.errors import UnsupportedError
from autopar.plan import Candidate

MANNER = "recompute"
"""What the last column of ``STAGES`` is called."""


def manner(candidate: Candidate) -> str:
    """How blocks under ``candidate`` are called, as source text: the last column of ``STAGES``.

    Equal texts mean equal calls.
    """
    return literal(candidate.recompute).text


def call(function: str, arguments: tuple[str, ...], candidate: Candidate) -> Expr:
    """The call of one block. Raises UnsupportedError for a way of recomputing that cannot be written."""
    texts = tuple(Text(argument) for argument in arguments)
    if candidate.recompute == "none":
        return Call(function, texts)
    if candidate.recompute != "full":
        raise UnsupportedError(f"recompute {candidate.recompute!r} cannot be emitted; use none or full")
    return Call("checkpoint", (Text(function), *texts, ("use_reentrant", Text("False"))))


def calls_by_manner(result: str, arguments: tuple[str, ...], candidates: list[Candidate], indent: int) -> list[str]:
    """Statements ``result = block(...)`` in a loop over ``STAGES`` where blocks differ in their manner.

    ``candidates``: one of each manner there is.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.recompute == "none")
    lines: list[str] = []
    for place, candidate in enumerate(ordered):
        margin = "    " * indent
        if place + 1 == len(ordered):
            lines.append(f"{margin}else:")
        else:
            lines.append(f"{margin}{'el' if place else ''}if {MANNER} == {manner(candidate)}:")
        lines += statement(result, call("block", arguments, candidate), str, indent + 1)
    return lines
