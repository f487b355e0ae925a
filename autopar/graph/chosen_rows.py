"""Code that works on the rows a mask chooses, run on all rows instead.

How many rows a mask chooses depends on data, which no graph of fixed shapes can hold. While `ChosenRows` is open, rows
that are picked (``x[torch.where(mask)]``, ``x[mask]``) are all rows, and only what is put back (``index_add_``,
assignment) is masked. This is the same as long as what happens in between acts on each row alone and on the rows of one
mask only; whoever opens it must see to that (`autopar.graph.expert_loops` compares numbers).

A mask may have dims of rows (``rows`` says which sizes those are; symbolic sizes are) and dims of slots, of which at
most one is chosen for a row: the experts' choices of a token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autopar.errors import UnsupportedError


def _refusal(what: str) -> UnsupportedError:
    return UnsupportedError(f"the rows that a mask chooses are used in a way that autopar cannot follow ({what})")


class Chosen:
    """What a mask chooses, with the dims of rows flattened to the first: ``valid`` [n] tells which rows."""

    def __init__(self, mask: Tensor, rows: Collection[int]) -> None:
        self.mask = mask if mask.dtype == torch.bool else mask != 0
        self.rows = [dim for dim, size in enumerate(mask.shape) if not isinstance(size, int) or size in rows]
        self.slots = [dim for dim in range(mask.ndim) if dim not in self.rows]
        if not self.rows:
            raise _refusal("the mask has no dim of rows")
        ordered = self.mask.permute(*self.rows, *self.slots)
        self.ordered = ordered.flatten(0, len(self.rows) - 1)
        self.valid = self.ordered.flatten(1).any(1) if self.slots else self.ordered

    def pick(self, x: Tensor, dims: list[int]) -> Tensor:
        """``x``, whose first dims are these dims of the mask, as [n, ...]: of slots, the one that is chosen."""
        if not set(self.rows) <= set(dims) or len(set(dims)) != len(dims):
            raise _refusal("an index without the rows")
        slots = [dim for dim in self.slots if dim in dims]
        if slots and slots != self.slots:
            raise _refusal("an index without all slots")
        order = [dims.index(dim) for dim in (*self.rows, *slots)]
        x = x.permute(*order, *range(len(dims), x.ndim)).flatten(0, len(self.rows) - 1)
        if not slots:
            return x.clone()
        chosen = self.ordered.reshape(*self.ordered.shape, *(1,) * (x.ndim - self.ordered.ndim))
        return (x * chosen).sum(tuple(range(1, 1 + len(slots))))

    def masked(self, source: Tensor, other: Any) -> Tensor:
        """[n, ...]: ``source`` where rows are chosen, elsewhere ``other``."""
        valid = self.valid.reshape(-1, *(1,) * (source.ndim - 1))
        return torch.where(valid, source, other)

    def count(self) -> Any:
        return self.valid.shape[0]


class Places:
    """One of the index tensors that ``torch.where(mask)`` gives."""

    def __init__(self, chosen: Chosen, dim: int) -> None:
        self.chosen, self.dim = chosen, dim

    @property
    def shape(self) -> tuple[Any]:
        return (self.chosen.count(),)

    def size(self, dim: int = 0) -> Any:
        return self.shape[dim]

    def numel(self) -> Any:
        return self.shape[0]

    nelement = numel

    def __len__(self) -> int:
        return self.shape[0]  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise _refusal(getattr(func, "__name__", str(func)))


class Table:
    """What ``torch.nonzero(mask)`` gives: [n, dims of the mask]."""

    def __init__(self, chosen: Chosen) -> None:
        self.columns = tuple(Places(chosen, dim) for dim in range(chosen.mask.ndim))
        self.shape = (chosen.count(), len(self.columns))

    def size(self, dim: int) -> Any:
        return self.shape[dim]

    def numel(self) -> Any:
        return self.shape[0] * self.shape[1]

    def _only(self, *_: int) -> Places:
        if len(self.columns) > 1:
            raise _refusal("nonzero of a mask of several dims, without as_tuple")
        return self.columns[0]

    squeeze = flatten = view = reshape = _only

    def t(self) -> tuple[Places, ...]:
        return self.columns

    def unbind(self, dim: int) -> tuple[Places, ...]:
        if dim not in (1, -1):
            raise _refusal("unbind")
        return self.columns

    def __getitem__(self, index: Any) -> Places:
        match index:
            case (slice() as every, int() as column) if every == slice(None):
                return self.columns[column]
        raise _refusal("a part of nonzero")


class Every(int):
    """One of all the experts, where a loop goes through those that some row chose; as a tensor of one element is."""

    def item(self) -> int:
        return int(self)

    tolist = item

    def __getitem__(self, index: int) -> int:
        return int(self)

    def squeeze(self, *_: int) -> int:
        return int(self)


_PICKS = (torch.Tensor.__getitem__, torch.Tensor.index_select, torch.index_select)
_ADDS = (torch.Tensor.index_add_, torch.Tensor.index_add, torch.index_add)


class ChosenRows(TorchFunctionMode):
    """While open, what masks choose is all rows; see the module. ``rows``: the sizes of dims that are rows. ``used``:
    whether any were chosen."""

    def __init__(self, rows: Collection[int] = ()) -> None:
        super().__init__()
        self.rows, self.used = rows, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.where, torch.Tensor.where) and len(args) == 1 and not kwargs:
            return self._places(args[0])
        if func in (torch.nonzero, torch.Tensor.nonzero):
            return self._nonzero(args[0], bool(kwargs.get("as_tuple")))
        if func is torch.Tensor.__bool__ and args[0].dtype == torch.bool:
            return True  # whether there are any
        if func in _PICKS and self._indexed(args[-1]):
            return self._pick(args[0], args[-1] if isinstance(args[-1], tuple) else (args[-1],))
        if func is torch.Tensor.__setitem__ and self._indexed(args[1]) and isinstance(args[2], Tensor) and args[2].ndim:
            return self._assign(*args)
        if func in _ADDS and len(args) == 4 and isinstance(args[2], Places) and not kwargs:
            x, dim, places, source = args
            if dim % x.ndim or places.chosen.rows != [places.dim]:
                raise _refusal("index_add along another dim than rows")
            total = places.chosen.masked(source, torch.zeros_like(source))
            return x.add_(total) if func is torch.Tensor.index_add_ else x + total
        return func(*args, **kwargs)

    def _nonzero(self, mask: Tensor, as_tuple: bool) -> Any:
        size = mask.shape[0]
        if mask.ndim == 1 and isinstance(size, int) and size not in self.rows:
            every = [Every(place) for place in range(size)]
            return (every,) if as_tuple else every
        return self._places(mask) if as_tuple else Table(self._chosen(mask))

    def _places(self, mask: Tensor) -> tuple[Places, ...]:
        chosen = self._chosen(mask)
        return tuple(Places(chosen, dim) for dim in range(mask.ndim))

    def _indexed(self, index: Any) -> bool:
        """Whether an index chooses rows by a mask."""
        parts = index if isinstance(index, tuple) else (index,)
        return any(isinstance(part, Places | Every) or _is_mask(part) for part in parts)

    def _pick(self, x: Tensor, index: tuple[Any, ...]) -> Tensor:
        if len(index) == 1 and isinstance(index[0], Every):
            return x[int(index[0]) : int(index[0]) + 1]
        before = len(index) > 1 and index[0] is None
        chosen, dims, rest = self._split(index[before:])
        if any(part is not None and part != slice(None) for part in rest):
            raise _refusal("an index of rows and of others")
        picked = chosen.pick(x, dims)[(slice(None), *rest)]
        return picked.unsqueeze(0) if before else picked

    def _chosen(self, mask: Tensor) -> Chosen:
        self.used = True
        return Chosen(mask, self.rows)

    def _assign(self, x: Tensor, index: Any, source: Tensor) -> None:
        chosen, dims, rest = self._split(index if isinstance(index, tuple) else (index,))
        if rest or dims != chosen.rows:
            raise _refusal("assignment to a part of rows")
        flat = x.flatten(0, len(dims) - 1)
        x.copy_(chosen.masked(source.to(x.dtype), flat).reshape(x.shape))

    def _split(self, index: tuple[Any, ...]) -> tuple[Chosen, list[int], tuple[Any, ...]]:
        """What chooses, the dims of its mask that an index begins with, and the rest of the index."""
        if _is_mask(index[0]):
            chosen = self._chosen(index[0])
            return chosen, list(range(index[0].ndim)), index[1:]
        places = list(_leading(index))
        if not places or any(place.chosen is not places[0].chosen for place in places):
            raise _refusal("indices of several masks")
        return places[0].chosen, [place.dim for place in places], index[len(places) :]


def _leading(index: tuple[Any, ...]) -> Iterator[Places]:
    for part in index:
        if not isinstance(part, Places):
            return
        yield part


def _is_mask(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype == torch.bool and part.ndim > 0
