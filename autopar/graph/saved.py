"""What a piece of a model keeps for its backward pass, read off autograd rather than guessed.

The piece runs on fake tensors (no memory, no arithmetic) under `saved_tensors_hooks`. Each storage counts once, whole,
however many views of it are saved. Attention, RMS norm and dropout are replaced by stand-ins that save what the fused
GPU kernels save (a fake CPU tensor would run the unfused ones, which keep several times as much):

* attention (FlashAttention-2, arXiv 2307.08691): q, k, v, output, and one float32 log-sum-exp per query and head;
* RMS norm: input, weight, one float32 reciprocal root per row;
* CTC loss: the log-probabilities, and one number for each frame and each state of a target (2 s + 1);
* dropout: one byte per element (the mask), unless p is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from autopar.graph.ops import attention_of_last


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One storage kept for backward.

    ``bytes``: of the whole storage. ``shape``/``dtype``: of the first tensor saved from it. ``argument``: place among
    the tensors given (None: made inside), ``output``: place among the tensors returned (None: not returned).
    """

    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    argument: int | None = None
    output: int | None = None

    @property
    def is_input(self) -> bool:
        """Whether the caller handed it in (a parameter or an activation that exists anyway)."""
        return self.argument is not None


def saved_for_backward(
    fn: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, fused: bool = True
) -> list[SavedTensor]:
    """Run ``fn(*args, **kwargs)`` on fake tensors and list what autograd saves, in the order of saving.

    ``args``/``kwargs`` may nest; their tensors (real, meta or fake; shapes, dtypes, requires_grad and sharing of
    storage count) are numbered in order for `SavedTensor.argument`. ``fused=False`` runs the CPU's plain operators.
    Custom `autograd.Function`s and functional collectives inside ``fn`` run as they are.
    """
    given = (tuple(args), dict(kwargs or {}))
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    mode = next((tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor)), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    faked, place_of = _fakes(tensors, mode)
    fake_args, fake_kwargs = tree_map(lambda leaf: faked.get(id(leaf), leaf), given)
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(storage_key(tensor), tensor)
        return tensor

    stand_ins = fused_kernels() if fused else _NoChange()
    with mode, torch.enable_grad(), stand_ins, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = fn(*fake_args, **fake_kwargs)
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    returned = {storage_key(tensor): place for place, tensor in reversed(list(enumerate(outputs)))}
    return [
        SavedTensor(
            tensor.untyped_storage().nbytes(), tuple(tensor.shape), tensor.dtype, place_of.get(key), returned.get(key)
        )
        for key, tensor in kept.items()
    ]


def saved_bytes(records: Sequence[SavedTensor]) -> int:
    """Bytes made by the piece itself: neither handed in nor handed on."""
    return sum(record.bytes for record in records if record.argument is None and record.output is None)


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share storage (as long as one of them lives)."""
    return int(tensor.untyped_storage()._cdata)


def _fakes(tensors: Sequence[torch.Tensor], mode: FakeTensorMode) -> tuple[dict[int, torch.Tensor], dict[int, int]]:
    """id → fake twin; storage of the twin → place of the first tensor on it."""
    faked: dict[int, torch.Tensor] = {}
    storages: dict[int, torch.Tensor] = {}
    place_of: dict[int, int] = {}
    for place, tensor in enumerate(tensors):
        if isinstance(tensor, FakeTensor):
            twin: torch.Tensor = tensor
        elif id(tensor) in faked:
            twin = faked[id(tensor)]
        else:
            base = storages.setdefault(storage_key(tensor), tensor)
            with mode:
                if base is tensor:
                    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                else:  # another tensor on a storage that is here already
                    whole = faked[id(base)].detach()
                    twin = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
                twin = twin.requires_grad_(tensor.requires_grad)
        faked[id(tensor)] = twin
        place_of.setdefault(storage_key(twin), place)
    return faked, place_of


def fused_kernels(attention: bool = True) -> TorchFunctionMode:
    """Inside it, attention (if asked), RMS norm and dropout make and save what the fused GPU kernels do; attention
    that is not fused keeps its probabilities, and with dropout also the mask and what is left of them."""
    return _FusedKernels(attention)


class _NoChange(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class _FusedKernels(TorchFunctionMode):
    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.scaled_dot_product_attention, attention_of_last) and not self.attention:
            dropout = func is not attention_of_last and (kwargs.get("dropout_p") or (args[4:5] or (0.0,))[0])
            query, key, value = args[:3]
            return _unfused_attention(query, key, value, bool(dropout))
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is attention_of_last:  # the kernel needs no mask in memory
            return _attention(*args[:3])
        if func is F.rms_norm or func is torch.rms_norm:
            return _rms_norm(*args, **kwargs)
        if func is F.ctc_loss:
            return _ctc_loss(*args[:2])
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    kept = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    # The kernels write [batch, positions, heads, width] and return a transposed view: merging heads after it is free.
    output = query.new_empty(*query.shape[:-3], query.shape[-2], query.shape[-3], value.shape[-1]).transpose(-3, -2)
    statistics = torch.empty(query.shape[:-1], dtype=torch.float32)
    return _Saving.apply(output, statistics, True, *kept)  # type: ignore[no-any-return, no-untyped-call]


def _unfused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: bool) -> torch.Tensor:
    scores = query.new_empty(*query.shape[:-1], key.shape[-2])
    extra = (scores, scores.new_empty(scores.shape), torch.empty(scores.shape, dtype=torch.bool))
    output = query.new_empty(*query.shape[:-3], query.shape[-2], query.shape[-3], value.shape[-1]).transpose(-3, -2)
    return _Probabilities.apply(output, dropout, *(extra if dropout else extra[:1]), query, key, value)  # type: ignore[no-any-return, no-untyped-call]


def _rms_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None = None, eps: Any = None
) -> torch.Tensor:
    rows = x.shape[: x.ndim - len(shape)]
    kept = (x,) if weight is None else (x, weight)
    return _Saving.apply(torch.empty_like(x), torch.empty(rows, dtype=torch.float32), False, *kept)  # type: ignore[no-any-return, no-untyped-call]


def _ctc_loss(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    frames, batch, _ = log_probs.shape
    states = log_probs.new_empty((batch, frames, 2 * targets.shape[-1] + 1))
    return _Saving.apply(log_probs.new_empty((batch,)), states, True, log_probs)  # type: ignore[no-any-return, no-untyped-call]


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    if p == 0 or not training:
        return x
    return _Mask.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class _Saving(torch.autograd.Function):
    """Returns ``output``; saves its inputs, some statistics, and (if asked) the output."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, statistics: torch.Tensor, keep_output: bool, *inputs: torch.Tensor
    ) -> torch.Tensor:
        result = output.view_as(output)
        ctx.save_for_backward(*inputs, statistics, *((result,) if keep_output else ()))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        inputs = ctx.saved_tensors[: len(ctx.needs_input_grad) - 3]
        return (None, None, None, *(tensor.new_empty(tensor.shape) for tensor in inputs))


class _Probabilities(torch.autograd.Function):
    """Returns ``output``; saves all the rest. Its backward makes the gradient of the probabilities, then that of the
    scores in its place."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, dropout: bool, *kept: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*kept)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        kept = ctx.saved_tensors
        inputs = kept[-3:]
        scores = kept[0].new_empty(kept[0].shape)
        made = tuple(tensor.new_empty(tensor.shape) for tensor in inputs)
        del scores
        return (*(None,) * (2 + len(kept) - 3), *made)


class _Mask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.empty(x.shape, dtype=torch.bool))
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0].new_empty(grads[0].shape)
