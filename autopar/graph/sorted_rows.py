"""Tokens sorted by the expert they chose, so that each expert's are neighbours: ``split``, a product each, ``cat``.

How many rows an expert has depends on data, and sorting mixes samples. But what is done to sorted rows acts on each row
alone, by the expert it belongs to, until they are put back where they came from: so nothing needs to be sorted. While
`SortedRows` is open, rows stay in their own order, each expert is given all of them, and of what it gives those that
chose it are kept. This is followed step by step, not guessed: sorted are the choices ``index`` [tokens, k], flattened;
the counts are those of the same choices; and whatever is not known to act on rows alone gets the sorted rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autopar.errors import UnsupportedError
from autopar.graph.expert_loops import NOTE
from autopar.graph.exported import OWN_OPERATOR
from autopar.graph.specialise import place_of


class _Stand:
    """Stands for a tensor; what is called with it is followed (`_followed`)."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _followed(func, getattr(func, "__name__", ""), args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(name)
        method = getattr(torch.Tensor, name)
        if not callable(method):
            return getattr(self.real(), name)
        return lambda *args, **options: _followed(method, name, (self, *args), options)

    def real(self) -> Any:
        raise NotImplementedError


def _operator(name: str) -> Any:
    method = getattr(torch.Tensor, name)
    return lambda self, *args: _followed(method, name, (self, *args), {})


for _name in ("__mul__", "__rmul__", "__add__", "__radd__", "__sub__", "__truediv__", "__floordiv__", "__getitem__"):
    setattr(_Stand, _name, _operator(_name))


@dataclass(frozen=True, eq=False)
class Order(_Stand):
    """The places of ``index`` [tokens, k], flattened, sorted by what it says; ``whole``: of tokens."""

    index: Tensor
    places: Tensor
    tokens: bool = False

    def real(self) -> Tensor:
        return self.places // self.index.shape[1] if self.tokens else self.places


@dataclass(frozen=True, eq=False)
class Rows(_Stand):
    """``rows`` [tokens k, ...], sorted; ``expert``: only those that chose it count."""

    order: Order
    rows: Tensor
    expert: int | None = None

    def real(self) -> Tensor:
        return self.rows[self.order.places]

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        return self.rows.device


@dataclass(frozen=True, eq=False)
class Count:
    """How many chose ``expert``."""

    index: Tensor
    expert: int

    def item(self) -> Count:
        return self


_LISTS = ("tolist", "unbind")
"""``tolist`` of a traced tensor goes through its elements."""

_ON_ROWS = frozenset(
    (
        *("silu", "gelu", "relu", "sigmoid", "tanh", "square", "pow", "neg", "to", "type_as", "float", "dropout"),
        *("mul", "__mul__", "__rmul__", "add", "__add__", "__radd__", "sub", "__sub__"),
    )
)


def _followed(func: Any, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What a function gives of stand-ins: a stand-in where it acts on rows alone, else of the real ones."""
    match name, args:
        case "div" | "floor_divide" | "__floordiv__", (Order(tokens=False) as order, int(count)):
            if count == order.index.shape[1] and (name != "div" or options.get("rounding_mode") in ("trunc", "floor")):
                return Order(order.index, order.places, tokens=True)
        case "__getitem__", (Tensor() as x, Order() as order):
            return Rows(order, _spread(x, order) if order.tokens else x)
        case "__getitem__", (Rows() as rows, (slice() as every, None)) if every == slice(None):
            return Rows(rows.order, rows.rows[:, None], rows.expert)
        case "split", (Rows(expert=None) as rows, list(counts), *_) if _all_counts(counts, rows.order):
            return [Rows(rows.order, rows.rows, count.expert) for count in counts]
        case "linear", (Rows() as rows, Tensor() as weight, *rest) if rows.rows.ndim > 1 and not any(_stands(rest)):
            return Rows(rows.order, func(rows.rows, weight, *rest, **options), rows.expert)
        case "cat", ([Rows(), *_] as parts, *_) if (joined := _joined(list(parts))) is not None:
            return joined
        case "index_add", (Tensor() as x, 0, Order() as order, Rows(expert=None) as rows):
            if _same(rows.order, order) and not options:
                each = rows.rows.view(-1, order.index.shape[1], *rows.rows.shape[1:])
                return x + (each.sum(1) if order.tokens else rows.rows)
        case "chunk", (Rows() as rows, *rest) if options.get("dim", (*rest, 0, 0)[1]) == -1 and rows.rows.ndim > 1:
            return tuple(Rows(rows.order, part, rows.expert) for part in func(rows.rows, *rest, **options))
    if name in _ON_ROWS and (found := _on_rows(func, args, options)) is not None:
        return found
    return func(*_real(args), **_real(options))


def _refusal(place: str, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{place}: the numbers of tokens that chose each expert are sizes in {name}, of what is not known to be rows "
        f"sorted by expert alone, which no graph can hold: make what does so {OWN_OPERATOR}, or let what is between "
        "sorting and putting back act on rows alone"
    )


def _on_rows(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Rows | None:
    """The same of each row; None if other tensors take part."""
    rows = [arg for arg in args if isinstance(arg, Rows)]
    others = [arg for arg in (*args, *options.values()) if isinstance(arg, Tensor | Order)]
    alike = {(id(each.order.index), each.expert, each.rows.ndim) for each in rows}
    if others or len(alike) != 1:  # of other dims: rows would meet columns
        return None
    given = (arg.rows if isinstance(arg, Rows) else arg for arg in args)
    return Rows(rows[0].order, func(*given, **options), rows[0].expert)


def _same(one: Order, other: Order) -> bool:
    return one.index is other.index


def _spread(x: Tensor, order: Order) -> Tensor:
    """[tokens, ...] as [tokens k, ...]."""
    return x.unsqueeze(1).expand(-1, order.index.shape[1], *x.shape[1:]).flatten(0, 1)


def _all_counts(counts: list[Any], order: Order) -> bool:
    return all(
        isinstance(count, Count) and count.index is order.index and count.expert == place
        for place, count in enumerate(counts)
    )


def _joined(parts: list[Any]) -> Rows | None:
    """Of each expert's rows, in order, what belongs to it."""
    if any(not isinstance(part, Rows) or part.expert != place for place, part in enumerate(parts)):
        return None
    chosen = parts[0].order.index.flatten()
    total = None
    for place, part in enumerate(parts):
        mine = (chosen == place).view(-1, *(1,) * (part.rows.ndim - 1))
        kept = torch.where(mine, part.rows, torch.zeros_like(part.rows))
        total = kept if total is None else total + kept
    return Rows(parts[0].order, total) if total is not None else None


def _real(values: Any) -> Any:
    return pytree.tree_map_only(_Stand, lambda stand: stand.real(), values)


def _stands(values: Any) -> Iterator[_Stand]:
    return (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, _Stand))


@dataclass(frozen=True)
class _Mark:
    """What is known of ``tensor``: it is "zeros", the "chosen" of ``index`` as zeros and ones, the "counts" of it, or
    it "flat"."""

    tensor: Tensor
    kind: str
    index: Tensor | None = None


class SortedRows(TorchFunctionMode):
    """While open, rows that would be sorted are not; see the module. ``used``: whether any were."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self.used = False
        self._marks: dict[int, _Mark] = {}
        self._counted: set[int] = set()

    @property
    def notes(self) -> tuple[str, ...]:
        return (NOTE,) * self.used

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        options, name = kwargs or {}, getattr(func, "__name__", "")
        if any(True for _ in _stands((args, options))):
            return _followed(func, name, args, options)
        if any(isinstance(leaf, Count) for leaf in pytree.tree_leaves((args, options))):
            raise _refusal(place_of(self._model), name)
        mark = self._marks.get(id(args[0])) if args else None
        if name in _LISTS and mark is not None and mark.kind == "counts" and mark.index is not None:
            self.used = True
            return [Count(mark.index, expert) for expert in range(mark.tensor.shape[0])]
        result = func(*args, **options)
        if name in ("sort", "argsort") and mark is not None and mark.kind == "flat" and id(mark.index) in self._counted:
            assert mark.index is not None
            places = result if isinstance(result, Tensor) else result[1]
            order = Order(mark.index, places)
            return order if isinstance(result, Tensor) else (result[0], order)
        if isinstance(result, Tensor) and (found := self._marked(name, args, options, mark, result)) is not None:
            self._marks[id(result)] = found
        return result

    def _marked(
        self, name: str, args: tuple[Any, ...], options: dict[str, Any], mark: _Mark | None, result: Tensor
    ) -> _Mark | None:
        if name in ("zeros", "zeros_like", "new_zeros"):
            return _Mark(result, "zeros")
        match name, args:
            case "scatter", (_, 1, Tensor(ndim=2) as index, 1) if mark is not None and mark.kind == "zeros":
                return _Mark(result, "chosen", index)
            case "long" | "int" | "to", (Tensor(), *_) if mark is not None and mark.kind == "chosen":
                return _Mark(result, "chosen", mark.index)
            case "sum", (Tensor(), *rest) if mark is not None and mark.kind == "chosen":
                if (rest or [options.get("dim")])[0] == 0 and isinstance(result.shape[0], int):
                    self._counted.add(id(mark.index))
                    return _Mark(result, "counts", mark.index)
            case "flatten", (Tensor(ndim=2) as index,) if not index.is_floating_point():
                return _Mark(result, "flat", index)
        return None
