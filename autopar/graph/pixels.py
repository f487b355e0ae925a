"""Channels exchanged for pixels (`nn.PixelShuffle` and its inverse), and channels of groups taken in turn."""

from __future__ import annotations

from autopar.errors import UnsupportedError
from autopar.graph.draft import Draft
from autopar.graph.ir import Ref
from autopar.graph.size import Size, divide


def _part(size: int | Size, parts: int, what: str) -> int | Size:
    found = divide(size, parts)
    if found is None:
        raise UnsupportedError(f"{what} divides a dim of size {size} by {parts}")
    return found


def pixel_shuffle(draft: Draft, x: Ref, factor: int) -> Ref:
    """[..., c r r, h, w] -> [..., c, h r, w r]."""
    lead = len(draft.shape(x)) - 3
    channels = _part(draft.shape(x)[lead], factor * factor, "pixel_shuffle")
    x = draft.unflatten(x, lead, (channels, factor, factor))
    x = draft.permute(x, (*range(lead), *(lead + place for place in (0, 3, 1, 4, 2))))
    return draft.flatten(draft.flatten(x, lead + 3, lead + 4), lead + 1, lead + 2)


def pixel_unshuffle(draft: Draft, x: Ref, factor: int) -> Ref:
    """[..., c, h r, w r] -> [..., c r r, h, w]."""
    *_, height, width = draft.shape(x)
    lead = len(draft.shape(x)) - 3
    x = draft.unflatten(x, lead + 2, (_part(width, factor, "pixel_unshuffle"), factor))
    x = draft.unflatten(x, lead + 1, (_part(height, factor, "pixel_unshuffle"), factor))
    x = draft.permute(x, (*range(lead), *(lead + place for place in (0, 2, 4, 1, 3))))
    return draft.flatten(x, lead, lead + 2)


def channel_shuffle(draft: Draft, x: Ref, groups: int) -> Ref:
    """[b, g c, ...] -> [b, c g, ...]: the first channels of all groups, then the second ones."""
    x = draft.unflatten(x, 1, (groups, _part(draft.shape(x)[1], groups, "channel_shuffle")), free=1)
    return draft.flatten(draft.transpose(x, 1, 2), 1, 2)


PIXELS = {
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "channel_shuffle": channel_shuffle,
    "native_channel_shuffle": channel_shuffle,
}
