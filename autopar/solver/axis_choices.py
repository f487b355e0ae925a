"""What one tensor or operator may do on all model axes together: the part of the product that is searched.

* On the context axis (cp) every operator with a gradient and positions splits the sequence: attention that of queries,
  or also that of keys and values, which then go round; it may split heads instead. What has no positions runs whole,
  or passes summands on. Parameters are whole there.
* On tensor axes any strategy. Where tp is made of several axes, an operator splits the same factor on all of them, as
  if they were one; only where a factor is too small for that, the outer axes split it, and the inner ones another
  factor, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from autopar.errors import UnsupportedError
from autopar.graph.ir import CONVOLUTIONS, EXPERTS, ModelGraph, Node, OpGraph, TensorMeta
from autopar.graph.size import BATCH, SEQ, Size, divide, size_at
from autopar.sharding.check import fits, refusal
from autopar.sharding.layout import CONTEXT, I, Layout, P, R, S, SpmdType
from autopar.sharding.local import settled, standard
from autopar.sharding.rules import Strategy, strategies_of
from autopar.solver.work import ATTENTION, MATMULS

AxesChoice = dict[str, Strategy]
"""A strategy for each model axis, in mesh order."""

_MATMULS = frozenset((*(f"aten.{name}" for name in MATMULS), EXPERTS))


@dataclass(frozen=True, slots=True)
class Demands:
    """What is asked of the sharding beside being fast: `fix` keys ``tp`` (split matmuls), ``sp`` and ``context``."""

    split_matmuls: bool = False
    sequence: bool | None = None
    context: str | None = None


NO_DEMANDS = Demands()

CONTEXTS: dict[str, Callable[[Strategy], bool]] = {
    "gathered": lambda strategy: strategy.by_sequence and not strategy.is_ring,
    "all-to-all": lambda strategy: not strategy.by_sequence,
    "ring": lambda strategy: strategy.is_ring,
}
"""Of the strategies of attention on the context axis, those that each value of `Demands.context` means."""


def tensor_axes(axes: Mapping[str, int]) -> dict[str, int]:
    """The model axes that may split parameters: all but the context axis."""
    return {axis: size for axis, size in axes.items() if axis != CONTEXT}


def check_axes(model: ModelGraph, axes: Mapping[str, int], seq: int, sequence: bool | None = None) -> None:
    """Raise UnsupportedError if the model's sequences cannot be split on the context axis, or on it and the tensor axes
    where the layout between blocks must be (``sequence``)."""
    ranks = axes.get(CONTEXT, 1)
    if ranks > 1 and sequence and seq % prod(axes.values()):
        raise UnsupportedError(
            f"sp=true splits what cp={ranks} leaves of a sequence again, but seq_len {seq} does not divide by "
            f"{prod(axes.values())}; use sp=false, another mesh or another seq_len"
        )
    if ranks > 1 and seq % ranks:
        raise UnsupportedError(
            f"cp={ranks} splits sequences, but seq_len {seq} does not divide by it; use another cp or seq_len"
        )
    if ranks > 1 and not any(SEQ in meta.shape for meta in model.batch.values()):
        raise UnsupportedError(
            f"cp={ranks} splits sequences, but {model.name} was traced for one sequence length only, so that its "
            "sequence dims are not known; use cp=1"
        )


def splits_sequences(model: ModelGraph, axes: Mapping[str, int], seq: int, sequence: bool | None = None) -> bool:
    """Whether `check_axes` lets the model's sequences be split so."""
    try:
        check_axes(model, axes, seq, sequence)
    except UnsupportedError:
        return False
    return True


def considered(
    node: Node, graph: OpGraph, axes: Mapping[str, int], batch: int, seq: int
) -> list[tuple[AxesChoice, str]]:
    """What an op node may do on all axes, each with the reason why it cannot (`sharding.check.refusal`; "": it can)."""
    strategies = strategies_of(node, graph)
    split = _on_tensor_axes([s for s in strategies if s.variant != "context" and not s.is_ring], tensor_axes(axes))
    found = []
    for first in _on_context(node, graph, strategies, axes, batch, seq):
        for rest in split:
            choice = settled({**first, **rest}, axes)
            found.append((choice, refusal(node, graph, choice, axes, batch, seq)))
    return found


def choices_of(
    node: Node, graph: OpGraph, axes: Mapping[str, int], batch: int, seq: int, demands: Demands = NO_DEMANDS
) -> list[AxesChoice]:
    """The choices of an op node that divide. Under ``demands`` of a matmul those that split a feature factor, and of
    attention those that read keys as is asked, if any."""
    found = [choice for choice, reason in considered(node, graph, axes, batch, seq) if not reason]
    if demands.context and node.op == ATTENTION and CONTEXT in axes:
        found = [choice for choice in found if CONTEXTS[demands.context](choice[CONTEXT])] or found
    return _featured(node, found, axes) if demands.split_matmuls else found


def feature_splits(node: Node, strategies: Iterable[Strategy], convolutions: bool = False) -> list[Strategy]:
    """Of a matmul's strategies (or those of experts, which are matmuls too; also of ``convolutions``, if asked), those
    that split a feature factor: one whose size depends on neither b nor s."""
    if node.op not in _MATMULS and not (convolutions and node.op in CONVOLUTIONS):
        return []
    return [s for s in strategies if isinstance(s.extent, int)]


def _featured(node: Node, found: list[AxesChoice], axes: Mapping[str, int]) -> list[AxesChoice]:
    """Those that split features on all tensor axes, else on some, else all. Uneven ones alone do not count: what makes
    or reads such a tensor may need an even one."""
    inner = tensor_axes(axes)
    split = [(choice, len(feature_splits(node, [choice[axis] for axis in inner]))) for choice in found]
    for least in (len(inner), 1):
        wanted = [choice for choice, count in split if count >= least]
        if any(_even(choice[axis], inner, axis, choice) for choice in wanted for axis in inner if choice[axis].extent):
            return wanted
    return found


def _even(strategy: Strategy, sizes: Mapping[str, int], axis: str, choice: AxesChoice) -> bool:
    ways = prod(size for other, size in sizes.items() if choice[other].name == choice[axis].name)
    return isinstance(strategy.extent, int) and strategy.extent % ways == 0


def _on_context(
    node: Node, graph: OpGraph, strategies: Sequence[Strategy], axes: Mapping[str, int], batch: int, seq: int
) -> list[AxesChoice]:
    if CONTEXT not in axes:
        return [{}]
    alone = {CONTEXT: axes[CONTEXT]}
    split = [s for s in strategies if s.by_sequence and not refusal(node, graph, {CONTEXT: s}, alone, batch, seq)]
    whole = [s for s in strategies if s.extent is None and s.name != "I"]
    if not node.meta.requires_grad:
        found = [*(s for s in whole if s.name == "R"), *split]
    elif split:
        heads = [s for s in strategies if isinstance(s.extent, int) and all(k.kind == "S" for k in s.inputs[:3])]
        found = [*split, *(heads if node.op == ATTENTION else ())]
    else:
        found = whole
    return [{CONTEXT: strategy} for strategy in found]


def _on_tensor_axes(strategies: Sequence[Strategy], axes: Mapping[str, int]) -> list[AxesChoice]:
    found = [dict.fromkeys(axes, strategy) for strategy in strategies] if axes else [{}]
    names, sizes = tuple(axes), tuple(axes.values())
    for strategy in strategies if len(axes) > 1 else ():
        if not isinstance(strategy.extent, int) or strategy.extent % prod(sizes) == 0:
            continue
        for count in range(1, len(axes)):
            if strategy.extent % prod(sizes[:count]):
                continue
            for other in strategies:
                if other is not strategy and (other.name == "R" or isinstance(other.extent, int)):
                    outer, inner = names[:count], names[count:]
                    found.append({**dict.fromkeys(outer, strategy), **dict.fromkeys(inner, other)})
    return found


def boundary_layouts(
    meta: TensorMeta, axes: Mapping[str, int], batch: int, seq: int, sequence: bool | None = None
) -> tuple[Layout, ...]:
    """The layouts a tensor may have between blocks: on cp split by sequence; on tensor axes split by sequence first,
    then invariant, then others; ``sequence`` (the fix ``sp``) leaves one of them."""
    shape, inner = meta.shape, tensor_axes(axes)
    along = sequence_split(shape)
    outer: list[SpmdType | None] = [None]
    if CONTEXT in axes:
        whole = (R, P) if meta.requires_grad else (R,)
        outer = [*((along,) if along else ()), *(whole if along is None or not meta.requires_grad else ())]

    def layouts(kinds: Iterable[SpmdType | None]) -> list[Layout]:
        found = []
        for first in outer:
            for kind in kinds:
                types = {} if first is None else {CONTEXT: first}
                types |= {axis: kind for axis in inner if kind is not None}
                layout = standard({axis: types[axis] for axis in axes}, shape)
                if fits(shape, layout, axes, batch, seq):
                    found.append(layout)
        return found

    if not inner:
        return tuple(layouts([None]))
    splits = [S(dim) for dim in range(len(shape))]
    by_sequence = [kind for kind in splits if shape[kind.dim] == SEQ]
    if sequence is False:
        return tuple(layouts([I]))
    if sequence:
        return tuple(layouts(by_sequence[:1]) or layouts([I]))
    return tuple(layouts([*by_sequence, I, *(kind for kind in splits if kind not in by_sequence), R, P]))


def sequence_split(shape: Sequence[int | Size]) -> SpmdType | None:
    """The type that splits the sequence of a tensor of ``shape``, whose positions may follow the batch in one dim."""
    for dim, size in enumerate(shape):
        for blocks in (1, BATCH):
            rest = divide(size, blocks)
            if isinstance(rest, Size) and all(b == 0 and s > 0 for (b, s), _ in rest.terms):
                return S(dim, blocks)
    return None


def stored_layouts(meta: TensorMeta, axes: Mapping[str, int], read: Iterable[Layout]) -> tuple[Layout, ...]:
    """The layouts a parameter may be stored in: whole on cp; on tensor axes invariant, split evenly on one dim, or as
    some operator reads it (``read``), where that is split unevenly or on some axes only."""
    inner = tensor_axes(axes)
    shape = meta.shape
    first = {CONTEXT: R} if CONTEXT in axes else {}
    kinds = [I, *(S(dim) for dim, extent in enumerate(shape) if size_at(extent, 1, 1) % prod(inner.values()) == 0)]
    found = [Layout(tuple((first | dict.fromkeys(inner, kind)).items())) for kind in (kinds if inner else [I])]
    for layout in read:
        types = {axis: layout[axis] for axis in inner}
        if all(kind.kind != "S" or kind.blocks == 1 for kind in types.values()):
            stored = {axis: kind if kind.kind == "S" else I for axis, kind in types.items()}
            found.append(Layout(tuple((first | stored).items())))
    loose = frozenset(axes)
    return tuple(layout for layout in dict.fromkeys(found) if fits(shape, layout, axes, 1, 1, loose))
