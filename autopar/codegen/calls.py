"""How the stage calls its blocks: straight, so that backward recomputes what the plan says, or with what it saves on
the host meanwhile."""

from __future__ import annotations

from autopar.codegen.source import Argument, Call, Expr, Text, literal, statement
from autopar.codegen.statements import wrap_comment
from autopar.errors import UnsupportedError
from autopar.plan import SAVEABLE, Candidate

MANNER = "recompute"
"""What the last column of ``STAGES`` is called."""

IMPORTS = {"runtime.offload": ("offload",), "runtime.recompute": ("selective",)}
"""Functions that calls are written with, by the module that has them (besides torch's ``checkpoint``)."""


def manner(candidate: Candidate) -> str:
    """How blocks under ``candidate`` are called, as source text: the last column of ``STAGES``.

    Equal texts mean equal calls.
    """
    kept = f"({'+'.join(candidate.saved)})" if candidate.recompute == "selective" else ""
    return literal(f"{candidate.recompute}{kept}{'/offload' if candidate.offload else ''}").text


def call(function: str, arguments: tuple[str, ...], candidate: Candidate) -> Expr:
    """The call of one block. Raises UnsupportedError for a way of recomputing that cannot be written."""
    way, options = "", list[Argument]()
    if candidate.recompute == "full":
        way, options = "checkpoint", [("use_reentrant", Text("False"))]
    elif candidate.recompute == "selective":
        unknown = [name for name in candidate.saved if name not in SAVEABLE]
        if unknown:
            raise UnsupportedError(
                f"selective recomputation cannot keep {', '.join(unknown)}; it can keep {', '.join(SAVEABLE)}"
            )
        way, options = "selective", [("keep", literal(candidate.saved))]
    elif candidate.recompute != "none":
        raise UnsupportedError(f"recompute {candidate.recompute!r} cannot be emitted; use none, full or selective(...)")
    parts = [*filter(None, ("offload" if candidate.offload else "", way)), function]
    return Call(parts[0], (*map(Text, (*parts[1:], *arguments)), *options))


def remark(candidate: Candidate, indent: int) -> list[str]:
    """A comment over the call: what it keeps for backward, in bytes per micro-batch where they are predicted."""
    if candidate.recompute == "none" and not candidate.offload:
        return []
    what = {
        "none": "saves for backward on the host",
        "full": "keeps its input, backward runs it again",
        "selective": "keeps its input and the results named, backward runs the rest again",
    }[candidate.recompute]
    if candidate.offload and candidate.recompute != "none":
        what = what.replace("keeps", "keeps on the host")
    if candidate.inflight_bytes > 0:
        what += f": {_bytes(candidate.inflight_bytes)} per micro-batch{' stay here' if candidate.offload else ''}"
    return wrap_comment(what, indent)


def calls_by_manner(result: str, arguments: tuple[str, ...], candidates: list[Candidate], indent: int) -> list[str]:
    """Statements ``result = block(...)`` in a loop over ``STAGES`` where blocks differ in their manner.

    ``candidates``: one of each manner there is.
    """
    ordered = sorted(candidates, key=lambda candidate: (candidate.recompute == "none", not candidate.offload))
    lines: list[str] = []
    for place, candidate in enumerate(ordered):
        margin = "    " * indent
        if place + 1 == len(ordered):
            lines.append(f"{margin}else:")
        else:
            lines.append(f"{margin}{'el' if place else ''}if {MANNER} == {manner(candidate)}:")
        lines += remark(candidate, indent + 1)
        lines += statement(result, call("block", arguments, candidate), str, indent + 1)
    return lines


def _bytes(count: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} bytes"
