"""Products: linear, matmul, einsum."""

from __future__ import annotations

import re

from autopar.sharding.factors import Mismatch
from autopar.sharding.rules.entry import Call, Entry, table


def _einsum(call: Call) -> str:
    """The equation read as an annotation: letters that the output lacks are summed, a repeated one stays whole."""
    equation = str(call.node.args[0]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    if not arrow:
        letters = re.sub(r"[^a-zA-Z]", "", left)
        right = ("..." if "..." in left else "") + "".join(c for c in sorted(set(letters)) if letters.count(c) == 1)
    names = {c: c if c.islower() else f"{c.lower()}1" for c in left if c.isalpha()}
    terms = left.split(",")
    diagonal = {c for term in (*terms, right) for c in term if c.isalpha() and term.count(c) > 1}

    def spell(term: str) -> str:
        parts = [part for part in re.split(r"(\.\.\.|[a-zA-Z])", term) if part]
        if any(part != "..." and not part.isalpha() for part in parts):
            raise Mismatch(f"einsum equation {equation!r} cannot be read")
        marks = [p if p == "..." else names[p] + ("^" if p in diagonal else "" if p in right else "+") for p in parts]
        return " ".join(marks) or "()"

    if "..." in left and "..." not in right:
        raise Mismatch(f"einsum equation {equation!r} sums over its ellipsis")
    return f"{', '.join(map(spell, terms))} -> {spell(right)}"


def _each_operand(call: Call) -> str:
    return " ".join(str(index) for index in range(len(call.operands)))


ENTRIES = [
    *table("aten.linear: ... k+, n k+, n -> ... n", once="2", uneven="n"),
    *table("aten.addmm: n, i k+, k+ n -> i n | i n, i k+, k+ n -> i n", linear="01 02", once="0"),
    *table("aten.baddbmm: b i n, b i k+, b k+ n -> b i n", linear="01 02", once="0"),
    *table(
        """
        aten.mm: i k+, k+ j -> i j
        aten.bmm: b i k+, b k+ j -> b i j
        aten.mv: i k+, k+ -> i
        aten.dot: k+, k+ -> ()
        aten.matmul: ... i k+, ... k+ j -> ... i j | ... i k+, k+ -> ... i | k+, ... k+ j -> ... j | k+, k+ -> ()
        """,
        linear="0 1",
    ),
    *table("aten.cdist: ... i k^, ... j k^ -> ... i j"),
    Entry("aten.einsum", compute=_einsum, linear=_each_operand),
]
