"""Factor tables: what an operator's dims mean, which of them may be split, and the annotation strings they print as.

A rule names the factors of every dim of every operand and of the output, major first:

    "b s k+, n k+, n -> b s n"      a letter is a factor; `+` marks one whose split leaves partial sums in the output;
    "... (h g) q^ d^"               `^` one that must stay whole; `(h g)` a dim made of two factors, h the major;
                                    `...` the leading dims, broadcast as PyTorch does; `1` a dim that is broadcast;
                                    `()` a tensor without dims.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from autopar.graph.size import BATCH, SEQ, Size, divide
from autopar.sharding.layout import R, S, SpmdType

Dim = tuple[str, ...]
"""The names of the factors of one dim, major first; empty for a dim that holds none (size one, broadcast)."""
Dims = tuple[Dim, ...]
Sizes = Sequence[int | Size]

_POOL = "dhefgijlmnopqrtuvwxyzack"


RING = "ring"
"""The collective inside an operator that sends shards round the ranks of an axis while it computes: forward every shard
comes to every rank, backward shards and their gradients do, and gradients go home."""


@dataclass(frozen=True, slots=True)
class Inner:
    """A collective inside a composite operator: ``collective`` on a tensor of ``shape`` and ``dtype``, forward or
    backward. ``shape`` is whole, symbolic in b and s; its dims are the first ones of operand ``like``, and other axes
    split them as they split those."""

    collective: str
    shape: tuple[int | Size, ...]
    dtype: str
    backward: bool = False
    like: int = 0


@dataclass(frozen=True, slots=True)
class Variant:
    """A factor whose split needs another local implementation: its ``name``, the type of its output if it is not the
    usual one, and the collectives inside it."""

    name: str
    output: SpmdType | None = None
    inner: tuple[Inner, ...] = ()


@dataclass(frozen=True, slots=True)
class Together:
    """Factors of one size that a local implementation splits at once, whether or not they may be split alone."""

    factors: tuple[str, ...]
    variant: Variant


@dataclass(frozen=True, slots=True)
class Rule:
    """How one operator call may be split, as a table of factors.

    ``operands``/``output``: factor names of each dim; ``sizes``: of each factor, major blocks excluded;
    ``sums``: factors whose split leaves partial sums; ``whole``: those that stay whole. ``linear``: sets of operands
    in which the operator is jointly linear: if all of a set are partial (and the others replicated), so is the output.
    ``once``: operands added to the output, which under a sum must be added by one rank only (a bias).
    ``uneven``: factors that may be cut into unequal parts, since what runs on a rank does not depend on their size.
    ``together``: factors that may be split at once, by the name of the strategy.
    """

    operands: tuple[Dims, ...]
    output: Dims
    sizes: dict[str, int | Size]
    sums: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    linear: tuple[frozenset[int], ...] = ()
    once: frozenset[int] = frozenset()
    variants: dict[str, Variant] = field(default_factory=dict)
    uneven: frozenset[str] = frozenset()
    together: dict[str, Together] = field(default_factory=dict)

    def splittable(self) -> tuple[str, ...]:
        """The factors that may be split, in order of appearance."""
        names = dict.fromkeys(name for dims in (*self.operands, self.output) for dim in dims for name in dim)
        return tuple(name for name in names if name not in self.whole and self.sizes[name] != 1)

    def position(self, dims: Dims, factor: str) -> tuple[int, int | Size] | None:
        """Where ``factor`` sits in a tensor: the dim, and the product of the factors before it there."""
        for index, dim in enumerate(dims):
            if factor in dim:
                majors: int | Size = 1
                for name in dim[: dim.index(factor)]:
                    majors = majors * self.sizes[name]
                return index, majors
        return None

    def split_type(self, dims: Dims, factor: str, blocks: int | Size = 1) -> SpmdType:
        """The type of a tensor when ``factor``, seen as ``blocks`` blocks, is split; R where it does not occur."""
        place = self.position(dims, factor)
        return R if place is None else S(place[0], place[1] * blocks)

    def __str__(self) -> str:
        tensors = [self._text(dims) for dims in self.operands]
        return f"{', '.join(tensors)} -> {self._text(self.output)}".lstrip()

    def _text(self, dims: Dims) -> str:
        parts = []
        for dim in dims:
            names = [name + ("^" if name in self.whole else "+" if name in self.sums else "") for name in dim]
            parts.append("1" if not names else names[0] if len(names) == 1 else f"({' '.join(names)})")
        return " ".join(parts) or "()"


class Mismatch(ValueError):  # noqa: N818
    """An annotation does not fit the shapes it is applied to; the operator is then treated as having no rule."""


class Names:
    """Hands out factor names: "b" and "s" for the batch and the sequence, else the next unused letter."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self.taken = set(taken)

    def take(self, size: int | Size, wanted: str | None = None) -> str:
        symbol = "b" if size == BATCH else "s" if size == SEQ else None
        options = [*filter(None, (wanted, symbol)), *(letter for letter in _POOL)]
        name = next((option for option in options if option not in self.taken), None)
        count = 2
        while name is None or name in self.taken:
            name, count = f"d{count}", count + 1
        self.taken.add(name)
        return name


@dataclass(frozen=True, slots=True)
class Annotation:
    """A parsed annotation string. Tokens of a tensor: a tuple of names per dim, or ``...``."""

    text: str
    operands: tuple[tuple[Dim, ...], ...]
    output: tuple[Dim, ...]
    sums: frozenset[str]
    whole: frozenset[str]

    @staticmethod
    def parse(text: str) -> Annotation:
        """Read an annotation. Raises ValueError naming the part that cannot be read."""
        left, arrow, right = text.partition("->")
        if not arrow:
            raise ValueError(f"annotation {text!r} has no '->'")
        marks: dict[str, set[str]] = {}
        operands = tuple(_dims(part, text, marks) for part in left.split(",")) if left.strip() else ()
        output = _dims(right, text, marks)
        for name, found in marks.items():
            if len(found - {""}) > 1:
                raise ValueError(f"annotation {text!r} marks {name} both + and ^")
        return Annotation(
            text,
            operands,
            output,
            frozenset(name for name, found in marks.items() if "+" in found),
            frozenset(name for name, found in marks.items() if "^" in found),
        )

    def bind(self, shapes: Sequence[Sizes], output: Sizes) -> Rule:
        """The rule for tensors of these shapes. Raises Mismatch when they do not fit the annotation.

        Trailing operands may be missing (an optional bias). A dim of size one where the factor is larger is broadcast.
        """
        if len(shapes) > len(self.operands):
            raise Mismatch(f"{self.text!r} describes {len(self.operands)} operands, not {len(shapes)}")
        templates = self.operands[: len(shapes)]
        batch = self._ellipsis((*zip(templates, shapes, strict=True), (self.output, output)))
        reserved = {name for dims in (*self.operands, self.output) for dim in dims for name in dim}
        names = Names(reserved)
        letters = tuple(reversed([names.take(size) for size in reversed(batch)]))
        sizes: dict[str, int | Size] = dict(zip(letters, batch, strict=True))
        expanded = [_expand(t, len(s), letters, self.text) for t, s in zip(templates, shapes, strict=True)]
        expanded.append(_expand(self.output, len(output), letters, self.text))
        _solve([*zip(expanded, (*shapes, output), strict=True)], sizes, self.text)
        *operand_dims, output_dims = (
            tuple(
                () if size == 1 and any(sizes[n] != 1 for n in dim) else dim
                for dim, size in zip(dims, shape, strict=True)
            )
            for dims, shape in zip(expanded, (*shapes, output), strict=True)
        )
        sums = set(self.sums) | (set(letters) if "..." in self.sums else set())
        whole = set(self.whole) | (set(letters) if "..." in self.whole else set())
        return Rule(tuple(operand_dims), output_dims, sizes, frozenset(sums - {"..."}), frozenset(whole - {"..."}))

    @staticmethod
    def _ellipsis(tensors: Iterable[tuple[tuple[Dim, ...], Sizes]]) -> tuple[int | Size, ...]:
        """Sizes of the dims that `...` stands for: the broadcast of all tensors' leading dims."""
        batch: list[int | Size] = []
        for dims, shape in tensors:
            if ("...",) not in dims:
                continue
            count = len(shape) - (len(dims) - 1)
            lead = list(shape[:count])
            batch = [*([1] * (len(lead) - len(batch))), *batch]
            for back in range(1, len(lead) + 1):
                batch[-back] = lead[-back] if batch[-back] == 1 else batch[-back]
        return tuple(batch)


def _dims(part: str, text: str, marks: dict[str, set[str]]) -> tuple[Dim, ...]:
    tokens = re.findall(r"\(|\)|\.\.\.[+^]?|1|[a-z][a-z0-9]*[+^]?|\S", part)
    dims: list[Dim] = []
    group: list[str] | None = None
    for token in tokens:
        if token == "(":
            group = []
        elif token == ")" and group is not None:
            if group:
                dims.append(tuple(group))
            group = None
        elif token == "1":
            dims.append(())
        elif re.fullmatch(r"(\.\.\.|[a-z][a-z0-9]*)[+^]?", token):
            name = token.rstrip("+^")
            marks.setdefault(name, set()).add(token[len(name) :])
            if group is None:
                dims.append((name,))
            else:
                group.append(name)
        else:
            raise ValueError(f"annotation {text!r}: cannot read {token!r}")
    return tuple(dims)


def _expand(template: tuple[Dim, ...], rank: int, letters: tuple[str, ...], text: str) -> Dims:
    if ("...",) not in template:
        if len(template) != rank:
            raise Mismatch(f"{text!r}: a tensor has {rank} dims, not {len(template)}")
        return template
    at = template.index(("...",))
    count = rank - (len(template) - 1)
    if count < 0:
        raise Mismatch(f"{text!r}: a tensor has {rank} dims, fewer than {len(template) - 1}")
    lead = tuple((name,) for name in letters[len(letters) - count :])
    return (*template[:at], *lead, *template[at + 1 :])


def _solve(tensors: Sequence[tuple[Dims, Sizes]], sizes: dict[str, int | Size], text: str) -> None:
    """Find every factor's size, and check that all dims agree with them."""
    pairs = [(dim, size) for dims, shape in tensors for dim, size in zip(dims, shape, strict=True) if dim]
    for dim, size in pairs:
        if len(dim) == 1 and sizes.get(dim[0], 1) == 1:
            sizes[dim[0]] = size
    for dim, size in pairs * 2:  # what one dim tells may be what another lacks
        unknown = [name for name in dim if name not in sizes]
        if len(unknown) == 1 and len(dim) > 1:
            rest: int | Size | None = size
            for name in dim:
                rest = rest if name in unknown or rest is None else divide(rest, sizes[name])
            if rest is None:
                raise Mismatch(f"{text!r}: a dim of size {size} is no multiple of its other factors")
            sizes[unknown[0]] = rest
    for dim, size in pairs:
        product: int | Size = 1
        for name in dim:
            if name not in sizes:
                raise Mismatch(f"{text!r}: the size of factor {name} does not follow from the shapes")
            product = product * sizes[name]
        if size not in (product, 1):
            raise Mismatch(f"{text!r}: dim ({' '.join(dim)}) has size {size}, not {product}")
