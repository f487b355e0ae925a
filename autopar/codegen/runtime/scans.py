"""Recurrences along the sequence: the scans of state-space models, in plain PyTorch, without a loop over positions."""

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


__all__ = ["selective_scan", "state_space_scan"]
