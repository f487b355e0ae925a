"""CTC losses, kept whole while a model is traced: how far torch's looks back depends on the longest target.

Targets may be rows with their lengths, or all of them one after another as a mask picks them (``labels[labels >= 0]``).
How many a mask picks no graph can hold, so these are rows too: each row's targets first, the rest after them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.errors import UnsupportedError
from autopar.graph.picks import Picks

_library = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "ctc_loss(Tensor log_probs, Tensor targets, Tensor input_lengths, Tensor target_lengths, int blank, "
    "bool zero_infinity) -> Tensor"
)


@torch.library.register_fake("autopar::ctc_loss", lib=_library)  # type: ignore[untyped-decorator]
def _shape(log_probs: Tensor, targets: Tensor, *_: Any) -> Tensor:
    """One loss for each sample: log_probs [t, b, c], targets [b, s], lengths [b]."""
    return log_probs.new_empty((log_probs.shape[1],))


def _in_front(whole: Tensor, mask: Tensor) -> Tensor:
    """[b, s]: what the mask picks of each row first, in order."""
    places = torch.arange(whole.shape[1], device=whole.device)
    order = (places + (~mask).long() * whole.shape[1]).argsort(1)
    return whole.gather(1, order)


_SIGNATURE = inspect.signature(F.ctc_loss)


def whole_ctc(picks: Picks, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """`F.ctc_loss` as one operator that gives the loss of each sample."""
    if func is not F.ctc_loss:
        return None
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    picked = picks.of(bound.arguments["targets"])
    if picked is not None and picked.mask.ndim == 2:
        bound.arguments["targets"] = _in_front(picked.whole, picked.mask)
    return _loss(**bound.arguments)


def _loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int,
    reduction: str,
    zero_infinity: bool,
) -> Tensor:
    if (
        targets.ndim != 2
        or log_probs.ndim != 3
        or not all(isinstance(x, Tensor) for x in (input_lengths, target_lengths))
    ):
        raise UnsupportedError(
            f"a ctc_loss takes log-probabilities of {log_probs.ndim} dims, targets of {targets.ndim} and lengths as "
            f"{type(input_lengths).__name__} and {type(target_lengths).__name__}; autopar takes log-probabilities "
            "[frames, batch, classes], targets [batch, length] or what a mask of that shape picks, and lengths as "
            "tensors [batch]"
        )
    losses = torch.ops.autopar.ctc_loss(
        log_probs, targets.long(), input_lengths.long(), target_lengths.long(), blank, zero_infinity
    )
    if reduction == "mean":  # of each target, then of the samples
        return (losses / target_lengths.clamp(min=1).to(losses.dtype)).mean()  # type: ignore[no-any-return]
    return losses.sum() if reduction == "sum" else losses  # type: ignore[no-any-return]
