"""Recurrences along the sequence: the scans of state-space models and the gated delta rule, in plain PyTorch, without a
loop over positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(x: Tensor, step: Tensor, decay: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """Mamba's recurrence (arXiv 2312.00752, section 3): ``h[t] = exp(step[t] decay) h[t-1] + step[t] write[t] x[t]``,
    ``y[t] = read[t] . h[t]``.

    x, step [b, d, s]; decay [d, n]; write, read [b, n, s] -> [b, d, s].
    """
    kept = torch.exp(step.unsqueeze(-1) * decay.unsqueeze(1))
    added = (step * x).unsqueeze(-1) * write.transpose(1, 2).unsqueeze(1)
    states = _Recurrence.apply(kept, added)
    return torch.einsum("bdsn,bns->bds", states, read)


def state_space_scan(x: Tensor, step: Tensor, decay: Tensor, write: Tensor, read: Tensor, chunk: int) -> Tensor:
    """Mamba-2's recurrence (arXiv 2405.21060, section 6): as `selective_scan`, with one decay for a head, in chunks:
    within a chunk as masked attention, between chunks by their states.

    x [b, s, h, p]; step [b, s, h]; decay [h]; write, read [b, s, g, n], groups of heads -> [b, s, h, p].
    """
    length, heads = x.shape[1], x.shape[2]
    x = x * step.unsqueeze(-1)
    missing = -length % chunk
    x, rate, write, read = (_chunks(value, missing, chunk) for value in (x, step * decay, write, read))
    write, read = (value.repeat_interleave(heads // value.shape[3], 3) for value in (write, read))
    past = rate.cumsum(2)
    last = past[:, :, -1:]
    # From position m to position l of a chunk, what lies between decays.
    between = past.unsqueeze(3) - past.unsqueeze(2)
    before = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    between = between.masked_fill(~before.unsqueeze(-1), float("-inf")).exp()
    scores = torch.einsum("bclhn,bcmhn->bclmh", read, write) * between
    within = torch.einsum("bclmh,bcmhp->bclhp", scores, x)
    made = torch.einsum("bclhn,bclhp->bhpcn", write * (last - past).exp().unsqueeze(-1), x)
    kept = last.squeeze(2).exp().permute(0, 2, 1).unsqueeze(2).unsqueeze(-1)
    states = _Recurrence.apply(kept.expand_as(made), made)
    entering = F.pad(states, (0, 0, 1, 0))[:, :, :, :-1]  # what the chunks before have left
    across = torch.einsum("bclhn,bhpcn->bclhp", read * past.exp().unsqueeze(-1), entering)
    return (within + across).flatten(1, 2)[:, :length]


def gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, chunk: int) -> Tensor:
    """The gated delta rule (arXiv 2412.06464).

    ``y[t] = q[t] h[t]`` of the state ``h[t] = h + k[t] beta[t] (v[t] - k[t] h)``
    with ``h = exp(decay[t]) h[t-1]``.

    In chunks (arXiv 2406.06484, section 3): within a chunk one triangular system says what is written, between chunks
    the state is handed on.

    query, key [b, s, g, n], of groups of heads; value [b, s, h, p]; decay (its logarithm) [b, s, h], or
    [b, s, h, n] with one for each channel (Kimi Delta Attention, arXiv 2510.26692); beta [b, s, h] -> [b, s, h, p].
    """
    length, heads = value.shape[1], value.shape[2]
    decay = decay.unsqueeze(-1) if decay.ndim == 3 else decay
    query, key = (x.repeat_interleave(heads // x.shape[2], 2) for x in (query, key))
    query, key, value, decay, beta = (
        _chunks(x, -length % chunk, chunk).movedim(3, 1) for x in (query, key, value, decay, beta.unsqueeze(-1))
    )
    past = decay.cumsum(3)  # all below are [b, h, c, l, ...]
    scores, system = (_within(x, key, past) for x in (query, key * beta))
    reads = key * beta * past.exp()
    reach = value.shape[-1]
    solved = torch.linalg.solve_triangular(
        system.tril(-1), torch.cat((value * beta, reads), -1), upper=False, unitriangular=True
    )
    written, erased = solved[..., :reach], solved[..., reach:]
    query = query * past.exp()
    last = past[:, :, :, -1:]
    key = (key * (last - past).exp()).transpose(3, 4)
    kept = last.exp().transpose(3, 4)
    state = key.new_zeros((*key.shape[:2], key.shape[3], reach))
    results = []
    for index in range(written.shape[2]):
        new = written[:, :, index] - erased[:, :, index] @ state
        results.append(query[:, :, index] @ state + scores[:, :, index] @ new)
        state = kept[:, :, index] * state + key[:, :, index] @ new
    return torch.stack(results, 2).flatten(2, 3).transpose(1, 2)[:, :length]


def _within(x: Tensor, key: Tensor, past: Tensor) -> Tensor:
    """Products of ``x`` and ``key`` at the positions of a chunk up to x's, with what lies between decayed:
    [..., l, n] -> [..., l, l]."""
    before = torch.ones(key.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device).tril()
    between = past.unsqueeze(-2) - past.unsqueeze(-3)
    between = between.masked_fill(~before.unsqueeze(-1), float("-inf")).exp()
    if between.shape[-1] == 1:
        return x @ key.transpose(-1, -2) * between.squeeze(-1)
    return (x.unsqueeze(-2) * key.unsqueeze(-3) * between).sum(-1)


def _chunks(x: Tensor, missing: int, chunk: int) -> Tensor:
    """[b, s, ...] -> [b, s / chunk, chunk, ...], zeros behind."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)).unflatten(1, (-1, chunk))


class _Recurrence(torch.autograd.Function):
    """``h[t] = kept[t] h[t-1] + added[t]`` along dim -2 of [..., s, n], by doubling: log2(s) passes."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, added: Tensor) -> Tensor:
        states = _scan(kept, added)
        ctx.save_for_backward(kept, states)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        kept, states = ctx.saved_tensors
        # What h[t] does to the loss, by way of h[t+1] too: the same recurrence from the end.
        following = F.pad(kept, (0, 0, 0, 1))[..., 1:, :]
        through = _scan(following.flip(-2), grad.flip(-2)).flip(-2)
        return through * F.pad(states, (0, 0, 1, 0))[..., :-1, :], through


def _scan(kept: Tensor, added: Tensor) -> Tensor:
    reach = 1
    while reach < added.shape[-2]:
        earlier = F.pad(added, (0, 0, reach, 0))[..., :-reach, :]
        added = added + kept * earlier
        kept = kept * F.pad(kept, (0, 0, reach, 0))[..., :-reach, :]
        reach *= 2
    return added


__all__ = ["gated_delta_rule", "selective_scan", "state_space_scan"]
