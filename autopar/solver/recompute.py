"""What recomputation keeps of a block and what it runs again: `codegen/runtime/recompute.py`, read off the graph.

A block's forward is a sequence of pieces, operators and the steps of conversions, in the order in which the emitted
code runs them. Selective recomputation keeps the results of some families of pieces (`FAMILIES`):

* a result is kept if the second run reads it (that of attention always is: its own gradient does). One that passes
  only through additions and views into a kept collective, or out of the block, is not read: its producer is neither
  run again nor kept;
* the second run, of full recomputation too, stops as soon as everything saved for backward is there again: after the
  last piece that saves something (a matmul or product that comes last is not run: what it saves are its operands);
* attention keeps, beside its output, one float32 per query and head.

What a block kept or saves may wait on the host ("/offload"): tensors of at least `SMALL` bytes are moved, each way
once. A copy hides behind the computation of the block in the same direction.

Choices are named "none", "full", "selective(matmul+attention)", and each with "/offload".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from autopar.errors import UnsupportedError
from autopar.graph.ir import BlockKind, Node
from autopar.job import Job
from autopar.plan import SAVEABLE
from autopar.sharding.check import chosen, operand_layouts
from autopar.sharding.conversions import path, same
from autopar.sharding.decision import BlockDecision
from autopar.sharding.layout import Layout
from autopar.sharding.local import local_shape, produced_layouts
from autopar.solver.prices import element_bytes
from autopar.solver.work import ATTENTION, MATMULS, VIEWS

SMALL = 1 << 20
"""Bytes below which a tensor is not moved to the host (`codegen/runtime/offload.py`)."""

SELECTIVE = (
    ("matmul", "attention", "all_gather", "all_reduce", "reduce_scatter", "all_to_all"),
    ("matmul", "attention", "all_reduce", "reduce_scatter", "all_to_all"),
    ("matmul", "attention"),
    ("attention", "all_gather", "all_reduce", "reduce_scatter", "all_to_all"),
    ("attention",),
)
"""What is offered where "selective" leaves the list open; the second gathers again in backward."""

_FAMILIES = {f"aten.{name}": "matmul" for name in MATMULS} | {ATTENTION: "attention"}
_COPIES = ("clone", "contiguous", "_to_copy", "copy", "cat", "stack")
_PASSING = frozenset(f"aten.{name}" for name in ("add", "sub", "neg", *_COPIES, *VIEWS)) | {"autopar.cast", "aten.to"}
"""Operators whose gradient needs none of their values."""
_SAVES_NOTHING = _PASSING | {"aten.sum", "aten.mean"}
_SAVES_OPERANDS = frozenset(f"aten.{name}" for name in (*MATMULS, "mul", "embedding"))
"""Operators that have saved all they save before they compute."""


def selective_name(saved: Sequence[str]) -> str:
    """The name of the choice that keeps these families."""
    return f"selective({'+'.join(name for name in SAVEABLE if name in saved)})"


def choices(fixed: str | None, offload: bool | None, extended: bool = False) -> tuple[str, ...]:
    """The choices of a block. ``fixed``: as in `Fix.recompute_of`, None if open; ``offload``: whether what it keeps
    waits on the host, None if that is open; ``extended``: open choices include selective lists and offload."""
    lists = tuple(selective_name(saved) for saved in SELECTIVE)
    if fixed is None:
        found: tuple[str, ...] = ("none", *(lists if extended else ()), "full")
    else:
        found = lists if fixed == "selective" else (fixed,)
    moved = tuple(f"{choice}/offload" for choice in found)
    if offload is None:
        return (*found, *moved) if extended else found
    return moved if offload else found


@dataclass(frozen=True, slots=True)
class Recompute:
    """A choice taken apart."""

    recompute: str
    saved: tuple[str, ...]
    offload: bool

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(name: str) -> Recompute:
        how, _, where = name.partition("/")
        kept = re.fullmatch(r"selective\((.*)\)", how)
        return Recompute(
            "selective" if kept else how, tuple(filter(None, kept[1].split("+"))) if kept else (), bool(where)
        )

    @property
    def name(self) -> str:
        how = selective_name(self.saved) if self.recompute == "selective" else self.recompute
        return f"{how}/offload" if self.offload else how


@dataclass(frozen=True, slots=True)
class Piece:
    """An operator, or a step of a conversion. ``key``: as in `operator_key` and `step_key`; ``family``: of `SAVEABLE`,
    or ""; ``nbytes``: of its result on this rank, if it has a family; ``reads``: places of the pieces whose results it
    reads."""

    key: str
    family: str
    nbytes: int
    reads: tuple[int, ...]
    passes: bool
    saves: bool
    saves_before: bool


@dataclass(frozen=True, slots=True)
class Rerun:
    """``again``: keys of the pieces that backward runs again, in order; ``kept``: bytes of each result kept, by key;
    ``families``: those of the names asked for that the block has."""

    again: tuple[str, ...]
    kept: dict[str, int]
    families: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Again:
    """Operators of a block that full recomputation ``runs`` again, and those whose operands it converts again to what
    each ``reads``."""

    runs: frozenset[str]
    reads: frozenset[str]


NOTHING_AGAIN = Again(frozenset(), frozenset())


def runs_again(kind: BlockKind) -> Again:
    """What backward runs again of a block that keeps nothing; at least this, however it is split."""
    nodes = list(kind.graph.of("op"))
    last = max((place for place, node in enumerate(nodes) if _saves(node)), default=-1)
    names = [node.name for node in nodes[: last + 1]]
    runs = names[:-1] if names and _saves_before(nodes[last]) else names
    return Again(frozenset(runs), frozenset(names))


def _saves(node: Node) -> bool:
    """Whether autograd saves something of an operator."""
    return node.meta.requires_grad and node.op not in _SAVES_NOTHING


def _saves_before(node: Node) -> bool:
    """Whether it has saved all it saves before it computes."""
    return node.op in _SAVES_OPERANDS


def operator_key(node: Node) -> str:
    """What an operator's forward is known by."""
    return node.name


def step_key(tensor: str, source: Layout, target: Layout, place: int) -> str:
    """What step ``place`` of a conversion is known by."""
    return f"{tensor}: {source} > {target} #{place}"


def rerun(kind: BlockKind, decision: BlockDecision, saved: Sequence[str], batch: int, job: Job) -> Rerun:
    """What backward runs again of a block that keeps the results of the families ``saved``."""
    return rerun_of(pieces_of(kind, decision, batch, job), saved)


def pieces_of(kind: BlockKind, decision: BlockDecision, batch: int, job: Job) -> tuple[Piece, ...]:
    """The pieces of a block, in the order in which they run."""
    return tuple(_Pieces(kind, decision, batch, job).pieces)


def rerun_of(pieces: Sequence[Piece], saved: Sequence[str]) -> Rerun:
    """`rerun` of a block of these pieces."""
    is_kept = [piece.family in saved for piece in pieces]
    made_of: list[frozenset[int]] = []
    is_read: set[int] = set()
    stop = 0
    for place, piece in enumerate(pieces):
        sources = frozenset().union(*(made_of[read] for read in piece.reads))
        is_collective = piece.family not in ("", "matmul", "attention")
        if not piece.passes and not (is_kept[place] and is_collective):
            is_read |= sources
        if piece.family == "attention":
            is_read.add(place)  # by its own gradient
        made_of.append(frozenset((place,)) if is_kept[place] else sources if piece.passes else frozenset())
        if piece.saves:
            stop = place + (not piece.saves_before)
    again = tuple(piece.key for piece, kept in zip(pieces[:stop], is_kept, strict=False) if not kept)
    kept = {piece.key: piece.nbytes for place, piece in enumerate(pieces) if is_kept[place] and place in is_read}
    present = {piece.family for piece in pieces}
    return Rerun(again, kept, tuple(name for name in SAVEABLE if name in saved and name in present))


class _Pieces:
    """The pieces of a block in order of execution: a conversion runs where its result is first read."""

    def __init__(self, kind: BlockKind, decision: BlockDecision, batch: int, job: Job) -> None:
        self.graph, self.decision, self.batch, self.job = kind.graph, decision, batch, job
        self.pieces: list[Piece] = []
        self.held: dict[str, list[tuple[Layout, int | None]]] = {}
        for node in self.graph.nodes.values():
            if node.kind == "op":
                self._operator(node)
            else:
                self.held[node.name] = [(decision.inputs[node.name], None)]
        for name in self.graph.outputs:
            self._available(name, decision.outputs[name])

    def _operator(self, node: Node) -> None:
        needs = operand_layouts(node, self.graph, self.decision)
        reads = [self._available(name, need) for name, need in zip(node.operands(), needs, strict=True)]
        choice = chosen(node, self.graph, self.decision)
        _, layout = produced_layouts(node, choice)
        family = _FAMILIES.get(node.op, "")
        nbytes = self._bytes(node, layout) if family else 0
        if family == "attention":
            width = node.meta.at(self.batch, self.job.seq_len)[-1] * element_bytes(node.meta.dtype, self.job)
            nbytes += 4 * (nbytes // width)
        self.held[node.name] = [(layout, len(self.pieces))]
        self.pieces.append(
            Piece(
                operator_key(node),
                family,
                nbytes,
                tuple(read for read in reads if read is not None),
                node.op in _PASSING,
                _saves(node),
                _saves_before(node) and not any(strategy.variant for strategy in choice.values()),
            )
        )

    def _available(self, name: str, layout: Layout) -> int | None:
        """The piece that makes ``name`` in ``layout``, None for what arrives so; appends the steps still needed."""
        node = self.graph.nodes[name]
        grad = node.meta.requires_grad
        for there, place in self.held[name]:
            if same(there, layout, grad):
                return place
        conversion = next(c for c in self.decision.conversions if c.tensor == name and same(c.target, layout, grad))
        source = self._available(name, conversion.source)
        here = conversion.source
        for index, (axis, step) in enumerate(path(conversion.source, conversion.target, grad)):
            here = here.with_type(axis, step.target)
            family = step.forward if step.forward in SAVEABLE else ""
            self.pieces.append(
                Piece(
                    step_key(name, conversion.source, conversion.target, index),
                    family,
                    self._bytes(node, here) if family else 0,
                    () if source is None else (source,),
                    step.forward != "keep",
                    False,
                    False,
                )
            )
            source = len(self.pieces) - 1
        self.held[name].append((conversion.target, source))
        return source

    def _bytes(self, node: Node, layout: Layout) -> int:
        count = element_bytes(node.meta.dtype, self.job)
        for size in local_shape(node.meta.at(self.batch, self.job.seq_len), layout, self.decision.axes):
            count *= size
        return count


def moved_of(sizes: Iterable[int]) -> int:
    """Bytes that go to the host, of tensors of these sizes."""
    return sum(size for size in sizes if size >= SMALL)


def exposed_copy(moved: int, bandwidth: float, busy_s: float) -> float:
    """Seconds of a copy of ``moved`` bytes that ``busy_s`` of computation do not hide.

    Raises UnsupportedError where the bandwidth between host and device is not known.
    """
    if not bandwidth:
        raise UnsupportedError(
            "offload cannot be priced: the device's host_bandwidth is not known; give it in the cluster file, or leave "
            "offload=none"
        )
    return max(0.0, moved / bandwidth - busy_s)
