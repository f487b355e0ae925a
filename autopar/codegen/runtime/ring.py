"""Ring attention: keys and values stay split by position, and go round the ranks of an axis while each attends.

Every rank holds the queries, keys and values of its positions (Liu, Zaharia, Abbeel, arXiv 2310.01889). In n turns it
attends to the keys and values it has in hand, its own first, and passes them on to the next rank meanwhile; results of
turns are merged by their log-sum-exp. Backward goes round once more: the gradients of keys and values travel with them,
and are home after n turns. What is saved for backward is what the rank itself holds, and its log-sum-exp.

Under a causal mask a turn computes what the mask leaves of it. In balanced order (`runtime.collectives`: rank r holds
chunks r and 2n - 1 - r) that is the same for every rank: half of the queries, or of the keys.

A turn runs the fused kernels that tell their log-sum-exp; where there is none (CUDA in float32), plain matrix products
over a few rows at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_aten = torch.ops.aten
_functional = torch.ops._c10d_functional

ROWS = 1024
"""Queries whose scores are in memory at once where no fused kernel runs."""


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: DeviceMesh,
    balanced: bool = False,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of [batch, heads, positions, width] tensors, keys and values split by position over ``axis``.

    Under a causal mask queries are split alike; others may be any of the sequence.

    ``balanced``: the axis holds the sequence in balanced order. Keys and values may have fewer heads, each for as many
    of the queries. Otherwise as `F.scaled_dot_product_attention`.
    """
    scale = query.size(-1) ** -0.5 if scale is None else scale
    return _Ring.apply(query, key, value, axis, balanced and is_causal, is_causal, scale)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        axis: DeviceMesh,
        balanced: bool,
        causal: bool,
        scale: float,
    ) -> Tensor:
        ctx.axis, ctx.options = axis, (balanced, causal, scale)
        if isinstance(axis.get_local_rank(), int):
            output, sums = _forward(query, key, value, *ctx.options, *_place(axis))
        else:
            output, sums = _attend(_SimulatedTurns(axis, *ctx.options), query, key, value)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if isinstance(ctx.axis.get_local_rank(), int):
            gradients = _backward(gradient, *ctx.saved_tensors, *ctx.options, *_place(ctx.axis))
        else:
            gradients = _attend_back(_SimulatedTurns(ctx.axis, *ctx.options), gradient, *ctx.saved_tensors)
        return *gradients, None, None, None, None


def _place(axis: DeviceMesh) -> tuple[int, int, str]:
    return axis.size(), axis.get_local_rank(), axis.get_group().group_name


# One operator each way, so that selective recomputation can keep the result of all turns, and torch.compile takes them
# as they are. Every copy of this file registers its own.
_NAMESPACE = __name__.replace(".", "_")


@torch.library.custom_op(f"{_NAMESPACE}::ring_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    balanced: bool,
    causal: bool,
    scale: float,
    ranks: int,
    rank: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    return _attend(_Turns(balanced, causal, scale, ranks, rank, group), query, key, value)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _made_for(query), query.new_empty(query.shape[:-1], dtype=_wide(query.dtype))


@torch.library.custom_op(f"{_NAMESPACE}::ring_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    balanced: bool,
    causal: bool,
    scale: float,
    ranks: int,
    rank: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    turns = _Turns(balanced, causal, scale, ranks, rank, group)
    return _attend_back(turns, gradient, query, key, value, output, sums)


@_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(key.shape), query.new_empty(value.shape)


class _Piece(NamedTuple):
    """What of a turn there is to compute: (first, number) of the queries and of the keys, and which of these pairs the
    mask leaves: all, those on and under the diagonal (``causal``), or the ones of ``mask``."""

    rows: tuple[int, int]
    keys: tuple[int, int]
    causal: bool = False
    mask: Tensor | None = None


class _Turns:
    """The turns of one rank."""

    def __init__(self, balanced: bool, causal: bool, scale: float, ranks: int, rank: int, group: str) -> None:
        self.balanced, self.causal, self.scale = balanced, causal, scale
        self.ranks, self.rank, self.group = ranks, rank, group

    def piece(self, turn: int, rows: int, keys: int) -> _Piece | None:
        """Turn ``turn``, in which the keys of the rank that many places before are here: of so many queries and keys,
        as many of one as of the other if the mask is causal."""
        source, half = (self.rank - turn) % self.ranks, rows // 2
        whole = _Piece((0, rows), (0, keys), self.causal and turn == 0)
        if not self.causal or turn == 0:
            return whole
        if not self.balanced:
            return whole if source < self.rank else None
        # An earlier rank has one chunk before all of ours and one behind them; a later one has both between ours.
        return _Piece((0, rows), (0, half)) if source < self.rank else _Piece((half, half), (0, keys))

    def send(self, x: Tensor) -> Tensor:
        """Begin to send ``x``, of one dim, to the next rank, for what comes from the one before: to be waited for."""
        sent, received = [0] * self.ranks, [0] * self.ranks
        sent[(self.rank + 1) % self.ranks] = received[self.rank - 1] = x.numel()
        return _functional.all_to_all_single(x, received, sent, self.group)

    def wait(self, x: Tensor) -> Tensor:
        return _functional.wait_tensor(x)

    def kernels(self, query: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Attention of a piece, (result, log-sum-exp), and its backward."""
        if query.device.type == "cpu":
            return _cpu_forward, _cpu_backward
        return (_flash_forward, _flash_backward) if _has_flash(query) else (_plain_forward, _plain_backward)


class _SimulatedTurns(_Turns):
    """The turns of all ranks in one process: their pieces differ in form, masks over all pairs do not."""

    def __init__(self, axis: DeviceMesh, balanced: bool, causal: bool, scale: float) -> None:
        super().__init__(balanced, causal, scale, *_place(axis))

    def piece(self, turn: int, rows: int, keys: int) -> _Piece:
        if not self.causal:
            return _Piece((0, rows), (0, keys))
        source = (self.rank + (self.ranks - turn)) % self.ranks
        mask = self._positions(self.rank, rows).unsqueeze(-1) >= self._positions(source, keys)
        return _Piece((0, rows), (0, keys), mask=mask)

    def _positions(self, rank: int, size: int) -> Tensor:
        every = torch.arange(size * self.ranks)
        if not self.balanced:
            return every.narrow(0, rank * size, size)
        chunks = (rank, 2 * self.ranks - 1 - rank)
        return torch.cat([every.narrow(0, chunk * (size // 2), size // 2) for chunk in chunks])

    def send(self, x: Tensor) -> Tensor:
        everyone = _functional.wait_tensor(_functional.all_gather_into_tensor(x, self.ranks, self.group))
        return everyone.narrow(0, (self.rank + (self.ranks - 1)) % self.ranks * x.numel(), x.numel()).clone()

    def wait(self, x: Tensor) -> Tensor:
        return x

    def kernels(self, query: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return _plain_forward, _plain_backward


def _attend(turns: _Turns, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The result and its log-sum-exp, which is float32 or wider."""
    forward, _ = turns.kernels(query)
    wide, sizes = _wide(query.dtype), (query.size(-2), key.size(-2))
    output = sums = query.new_empty(0, dtype=wide)
    held = _packed(key, value)
    for turn in range(turns.ranks):
        coming = turns.send(held) if turn < turns.ranks - 1 else held
        piece = turns.piece(turn, *sizes)
        if piece is not None:
            made = forward(*_taken(piece, query, *_unpacked(held, key, value)), piece, turns.scale)
            if turn == 0:  # a rank's own keys, which all of its queries see some of
                output, sums = made[0].to(wide), made[1].contiguous()
            else:
                _merge(output.narrow(-2, *piece.rows), sums.narrow(-1, *piece.rows), *made)
            del made
        held = turns.wait(coming) if coming is not held else held
    return _made_for(query).copy_(output), sums


def _made_for(query: Tensor) -> Tensor:
    """An empty result, heads beside one another in memory, so that merging them copies nothing."""
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _merge(output: Tensor, sums: Tensor, part: Tensor, part_sums: Tensor) -> None:
    """Attention to more keys is the mean of both results, weighted with their sums of exponentials; in place."""
    total = torch.logaddexp(sums, part_sums)
    output.lerp_(part.to(output.dtype), (part_sums - total).exp_().unsqueeze(-1))
    sums.copy_(total)


def _attend_back(
    turns: _Turns, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _, backward = turns.kernels(query)
    sizes = query.size(-2), key.size(-2)
    of_query = torch.zeros_like(query, dtype=_wide(query.dtype), memory_format=torch.contiguous_format)
    held = _packed(key, value)
    returning: Tensor | None = None
    for turn in range(turns.ranks):
        coming = turns.send(held) if turn < turns.ranks - 1 else held
        piece = turns.piece(turn, *sizes)
        made: list[Tensor] = []
        if piece is not None:
            rows = (x.narrow(dim, *piece.rows) for x, dim in ((gradient, -2), (output, -2), (sums, -1)))
            taken = _taken(piece, query, *_unpacked(held, key, value))
            made = [*backward(*rows, *taken, piece, turns.scale)]
            of_query.narrow(-2, *piece.rows).add_(made.pop(0))
        # What other ranks have given so far came in while this one computed.
        total = torch.zeros_like(held) if returning is None else turns.wait(returning)
        if piece is not None:
            for whole in _unpacked(total, key, value):
                whole.narrow(-2, *piece.keys).add_(made.pop(0))
        returning = turns.send(total)
        held = turns.wait(coming) if coming is not held else held
    assert returning is not None
    return of_query.to(query.dtype), *_unpacked(turns.wait(returning), key, value, copy=True)


def _packed(key: Tensor, value: Tensor) -> Tensor:
    """Keys and values as one message."""
    return torch.cat((key.flatten(), value.flatten()))


def _unpacked(x: Tensor, key: Tensor, value: Tensor, copy: bool = False) -> tuple[Tensor, Tensor]:
    parts = x.split((key.numel(), value.numel()))
    first, second = (part.view(like.shape) for part, like in zip(parts, (key, value), strict=True))
    return (first.clone(), second.clone()) if copy else (first, second)


def _taken(piece: _Piece, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query.narrow(-2, *piece.rows), key.narrow(-2, *piece.keys), value.narrow(-2, *piece.keys)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _has_flash(query: Tensor) -> bool:
    """Whether FlashAttention-2 takes it: on CUDA from Ampere on, in widths of eights up to 256."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    known = bool(torch.version.hip) or torch.cuda.get_device_capability(query.device) >= (8, 0)
    return known and query.size(-1) in range(8, 257, 8)


# The kernels: forward (query, key, value, piece, scale), backward (gradient, output, sums, query, key, value, piece,
# scale). ``output`` and ``sums`` are those of all keys, so that what backward gives is the piece's share.


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, piece: _Piece, scale: float) -> Any:
    return _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, piece.causal, scale=scale)


def _cpu_backward(
    gradient: Tensor, output: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor, piece: _Piece, scale: float
) -> Any:
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, q, k, v, output, sums, 0.0, piece.causal, scale=scale
    )


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, piece: _Piece, scale: float) -> Any:
    made = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, piece.causal, False, scale=scale)
    return made[:2]


def _flash_backward(
    gradient: Tensor, output: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor, piece: _Piece, scale: float
) -> Any:
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of random numbers, which nothing draws
    return _aten._scaled_dot_product_flash_attention_backward(
        gradient,
        q,
        k,
        v,
        output,
        sums.contiguous(),
        None,
        None,
        q.size(-2),
        k.size(-2),
        0.0,
        piece.causal,
        state,
        state[:1],
        scale=scale,
    )


def _plain_forward(query: Tensor, key: Tensor, value: Tensor, piece: _Piece, scale: float) -> tuple[Tensor, Tensor]:
    key, value = _for_heads(key, query.size(1)), _for_heads(value, query.size(1))
    outputs, every = [], []
    for start in range(0, query.size(-2), ROWS):
        rows = query.narrow(-2, start, min(ROWS, query.size(-2) - start))
        scores = _scores(rows, key, piece, start, scale)
        sums = scores.logsumexp(-1)
        # Where the mask leaves a row nothing, its sum is zero and its result counts nothing.
        shares = (scores - sums.masked_fill(sums.isinf(), 0).unsqueeze(-1)).exp()
        outputs.append((shares @ value.to(shares.dtype)).to(query.dtype))
        every.append(sums)
    return torch.cat(outputs, -2), torch.cat(every, -1)


def _plain_backward(
    gradient: Tensor, output: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor, piece: _Piece, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide, heads = _wide(q.dtype), q.size(1)
    keys, values = _for_heads(k, heads).to(wide), _for_heads(v, heads).to(wide)
    of_queries, of_keys, of_values = [], torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, q.size(-2), ROWS):
        part = (start, min(ROWS, q.size(-2) - start))
        rows, given, made = (x.narrow(-2, *part).to(wide) for x in (q, gradient, output))
        shares = (_scores(rows, keys, piece, start, scale) - sums.narrow(-1, *part).unsqueeze(-1)).exp()
        of_values += shares.mT @ given
        of_scores = shares * (given @ values.mT - (given * made).sum(-1, keepdim=True)) * scale
        of_queries.append((of_scores @ keys).to(q.dtype))
        of_keys += of_scores.mT @ rows
    shared = (_of_shared_heads(x, like) for x, like in ((of_keys, k), (of_values, v)))
    return torch.cat(of_queries, -2), *shared  # type: ignore[return-value]


def _scores(rows: Tensor, key: Tensor, piece: _Piece, start: int, scale: float) -> Tensor:
    """Of the queries from ``start`` on, in float32 or wider; minus infinity where the mask leaves nothing."""
    wide = _wide(rows.dtype)
    scores = (rows.to(wide) @ key.to(wide).mT) * scale
    if piece.mask is not None:
        return scores.masked_fill(~piece.mask.narrow(-2, start, rows.size(-2)), -torch.inf)
    if piece.causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=rows.device).tril(start)
        return scores.masked_fill(~seen, -torch.inf)
    return scores


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values, once for each head of the queries."""
    return x.repeat_interleave(heads // x.size(1), 1) if x.size(1) != heads else x


def _of_shared_heads(x: Tensor, like: Tensor) -> Tensor:
    return (x.unflatten(1, (like.size(1), -1)).sum(2) if x.size(1) != like.size(1) else x).to(like.dtype)
