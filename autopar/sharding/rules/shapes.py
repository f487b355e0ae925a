"""Operators that only move elements: rules computed from the (symbolic) shapes. They pass partial sums through."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopar.graph.size import Size, divide
from autopar.sharding.factors import Mismatch, Names, Rule, Sizes
from autopar.sharding.rules.entry import Call, Entry
from autopar.sharding.rules.reductions import dims_of, letters


@dataclass(frozen=True, slots=True)
class _Piece:
    """A factor of a source dim and of a target dim; of one of them only (None for the other) when not shared."""

    source: int | None
    target: int | None
    size: int | Size


def _shared(a: int | Size, b: int | Size) -> int | Size | None:
    """The major factor that dims of sizes ``a`` and ``b`` have in common, or None."""
    if a == b or divide(b, a) is not None:
        return a
    if divide(a, b) is not None:
        return b
    common = math.gcd(a, b) if isinstance(a, int) and isinstance(b, int) else 1
    return common if common > 1 else None


def _closed(left: list[tuple[int, int | Size]], right: list[tuple[int, int | Size]]) -> tuple[int, int]:
    """How many leading dims of each side hold equally many elements: the fewest, or all."""
    products: list[list[int | Size]] = []
    for side in (left, right):
        products.append([1])
        for _, size in side:
            products[-1].append(products[-1][-1] * size)
    pairs = [(i, j) for i in range(1, len(left) + 1) for j in range(1, len(right) + 1)]
    equal = [(i, j) for i, j in pairs if products[0][i] == products[1][j]]
    return min(equal, key=sum, default=(len(left), len(right)))


def _pieces(source: Sizes, target: Sizes) -> list[_Piece]:
    """Walk both shapes from the major end, taking the factor the two leading dims share."""
    if 0 in source:
        return []
    left = [(position, size) for position, size in enumerate(source) if size != 1]
    right = [(position, size) for position, size in enumerate(target) if size != 1]
    pieces: list[_Piece] = []
    while left and right:
        (i, a), (j, b) = left[0], right[0]
        shared = _shared(a, b)
        if shared is None:
            take, give = _closed(left, right)
            pieces += [_Piece(position, None, size) for position, size in left[:take]]
            pieces += [_Piece(None, position, size) for position, size in right[:give]]
            left, right = left[take:], right[give:]
            continue
        pieces.append(_Piece(i, j, shared))
        left[0], right[0] = (i, divide(a, shared) or 1), (j, divide(b, shared) or 1)
        left, right = left[left[0][1] == 1 :], right[right[0][1] == 1 :]
    return pieces


def reshape_rule(source: Sizes, target: Sizes) -> Rule:
    """Factors common to both shapes, found major first; where the shapes share none, dims stay whole.

    ``[b, s, 12] -> [b, s, 3, 4]`` gives ``b s (h d) -> b s h d``; symbolic sizes take part as atoms.
    """
    names, pieces = Names(), _pieces(source, target)
    named = [(names.take(piece.size), piece) for piece in reversed(pieces)][::-1]

    def dims(shape: Sizes, side: str) -> tuple[tuple[str, ...], ...]:
        return tuple(
            tuple(n for n, piece in named if getattr(piece, side) == position) for position in range(len(shape))
        )

    return Rule(
        operands=(dims(source, "source"),),
        output=dims(target, "target"),
        sizes={name: piece.size for name, piece in named},
        whole=frozenset(name for name, piece in named if piece.source is None or piece.target is None),
    )


def _reshape(call: Call) -> Rule:
    return reshape_rule(call.shapes[0], call.output)


def _permute(call: Call) -> str:
    names = letters(call)
    op = call.node.op
    if op == "aten.permute":
        order = [int(dim) % len(names) for dim in call.node.args[1]]
    else:
        first, second = (0, len(names) - 1) if op == "aten.t" else (int(dim) for dim in call.node.args[1:3])
        order = list(range(len(names)))
        order[first], order[second] = order[second], order[first]
    return f"{' '.join(names)} -> {' '.join(names[index] for index in order)}"


def _expand(call: Call) -> str:
    """A dim of size one that grows is a factor of the output alone, and stays whole: slicing it after is free."""
    names = Names()
    target = [names.take(size) for size in reversed(call.output)][::-1]
    skipped = len(target) - len(call.shapes[0])
    pairs = zip(call.shapes[0], call.output[skipped:], target[skipped:], strict=True)
    source = [name if size == whole else "1" for size, whole, name in pairs]
    target = [name if name in source else name + "^" for name in target]
    return f"{' '.join(source) or '()'} -> {' '.join(target) or '()'}"


def _select(call: Call) -> str:
    names = letters(call)
    (along,) = dims_of(call.arg(1, "dim", 0), len(names))
    source = [name + "^" if index == along else name for index, name in enumerate(names)]
    return f"{' '.join(source)} -> {' '.join(names[:along] + names[along + 1 :]) or '()'}"


def _slice(call: Call) -> Rule | str:
    """A slice that is one of equal blocks keeps its dim's inner factor splittable: ``(d^ h) -> h``."""
    names = letters(call)
    (along,) = dims_of(call.arg(1, "dim", 0), len(names))
    start, whole, length = call.arg(2, "start", 0) or 0, call.shapes[0][along], call.output[along]
    blocks = divide(whole, length) if length != 0 else None
    source, target = list(names), list(names)
    if length == whole:
        pass
    elif blocks is not None and _aligned(start, length):
        major = Names(names).take(blocks)
        source[along] = f"({major}^ {names[along]})"
    else:
        source[along], target[along] = names[along] + "^", Names(names).take(length) + "^"
    return f"{' '.join(source)} -> {' '.join(target)}"


def _aligned(start: int | Size, length: int | Size) -> bool:
    return not (isinstance(start, int) and start < 0) and divide(start, length) is not None


def _cat(call: Call) -> str:
    """Equal parts make a dim of blocks, ``f, f -> (d^ f)``; unequal ones stay whole. All are partial together."""
    if not call.operands or len({len(shape) for shape in call.shapes}) != 1:
        raise Mismatch("cat of tensors with different numbers of dims")
    names = letters(call)
    (along,) = dims_of(call.arg(1, "dim", 0), len(names))
    used = Names(names)
    lengths = [shape[along] for shape in call.shapes]
    equal = all(length == lengths[0] for length in lengths)
    parts = [names[along]] * len(lengths) if equal else [used.take(length) + "^" for length in lengths]
    major = used.take(len(lengths))
    joined = f"({major}^ {names[along]})" if equal and len(lengths) > 1 else parts[0] if equal else f"{major}^"
    operands = [" ".join([*names[:along], part, *names[along + 1 :]]) for part in parts]
    return f"{', '.join(operands)} -> {' '.join([*names[:along], joined, *names[along + 1 :]])}"


def _stack(call: Call) -> str:
    names = letters(call)
    (along,) = dims_of(call.arg(1, "dim", 0), len(names) + 1)
    major = Names(names).take(len(call.operands)) + "^"
    target = " ".join([*names[:along], major, *names[along:]])
    return f"{', '.join([' '.join(names) or '()'] * len(call.operands))} -> {target}"


def _repeat(call: Call) -> str:
    """Each repeated dim is ``(r^ f)``: whole copies of the dim, one after the other."""
    names = letters(call)
    counts = list(call.node.args[1])
    used = Names(names)
    target = [used.take(count) + "^" if count != 1 else "1" for count in counts[: len(counts) - len(names)]]
    for name, count in zip(names, counts[len(counts) - len(names) :], strict=True):
        target.append(name if count == 1 else f"({used.take(count)}^ {name})")
    return f"{' '.join(names) or '()'} -> {' '.join(target)}"


def _repeat_interleave(call: Call) -> str:
    """Each element repeated in place: ``f -> (f r^)``."""
    if len(call.operands) != 1 or not isinstance(call.arg(1, "repeats"), int) or call.arg(2, "dim") is None:
        raise Mismatch("repeat_interleave with a tensor of counts, or over the flattened tensor")
    names = letters(call)
    (along,) = dims_of(call.arg(2, "dim"), len(names))
    inner = Names(names).take(call.arg(1, "repeats"))
    target = [f"({name} {inner}^)" if index == along else name for index, name in enumerate(names)]
    return f"{' '.join(names)} -> {' '.join(target)}"


def _pad(call: Call) -> str:
    names = letters(call)
    pads = list(call.arg(1, "pad"))
    touched = {len(names) - 1 - index // 2 for index, pad in enumerate(pads) if pad != 0}
    used = Names(names)
    source = [name + "^" if index in touched else name for index, name in enumerate(names)]
    target = [used.take(0) + "^" if index in touched else name for index, name in enumerate(names)]
    return f"{' '.join(source)} -> {' '.join(target)}"


def _constant(call: Call) -> str:
    """Made whole on every rank; slicing it after is free."""
    names = Names()
    return f"-> {' '.join([names.take(size) + '^' for size in reversed(call.output)][::-1]) or '()'}"


def _all_together(call: Call) -> str:
    return "".join(str(index) for index in range(len(call.operands))) if len(call.operands) <= 10 else ""


def _moves(ops: str, compute: object, linear: object = "0") -> list[Entry]:
    return [Entry(f"aten.{op}", compute=compute, linear=linear) for op in ops.split()]  # type: ignore[arg-type]


ENTRIES = [
    *_moves("view reshape _unsafe_view flatten unflatten unsqueeze squeeze", _reshape),
    *_moves("transpose permute t", _permute),
    *_moves("expand broadcast_to", _expand),
    *_moves("select", _select),
    *_moves("slice narrow", _slice),
    *_moves("cat", _cat, _all_together),
    *_moves("stack", _stack, _all_together),
    *_moves("repeat", _repeat),
    *_moves("repeat_interleave", _repeat_interleave),
    *_moves("constant_pad_nd pad", _pad, ""),
    *_moves("full zeros ones arange scalar_tensor eye linspace", _constant, ""),
]
