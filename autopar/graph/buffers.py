"""Values of buffers, also of a model on meta, where non-persistent ones (rotary frequencies) have lost theirs."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

LARGEST = 4096
"""Elements up to which a buffer's values are kept with the graph."""
LARGEST_FILED = 1 << 20
"""Elements up to which those of a buffer that no formula is found for are kept, to be written into a file."""
SMALLEST = 64
"""Elements below which a buffer is written down as it is, whatever formula it follows."""
_SMALL_MODULE = 10_000_000
"""Elements of all buffers of a module up to which they are recovered beside parameters on meta; where it has to be made
anew, of its parameters as well."""


def known_values(model: nn.Module, names: Iterable[str], most: int = LARGEST) -> dict[str, torch.Tensor]:
    """For each buffer (full name) of at most ``most`` values that can be known, a CPU tensor. Nothing is guessed.

    A buffer on meta is recomputed by the model's own code: its ``_init_weights`` on a small twin of the owning module
    (Hugging Face models restore non-persistent buffers there), or the module's constructor from its ``config``.
    """
    found: dict[str, torch.Tensor] = {}
    for full in names:
        path, _, name = full.rpartition(".")
        buffer = model.get_submodule(path)._buffers.get(name)
        if buffer is None or buffer.numel() > most:
            continue
        value = value_of(model, full)
        if value is not None:
            found[full] = torch.view_as_real(value) if value.is_complex() else value
    return found


def value_of(model: nn.Module, full: str) -> torch.Tensor | None:
    """The values of one buffer of any size, on the CPU; None if they cannot be known."""
    path, _, name = full.rpartition(".")
    buffer = model.get_submodule(path)._buffers.get(name)
    if buffer is None:
        return None
    value = buffer.detach().cpu() if buffer.device.type != "meta" else _recovered(model, path, name)
    return value if value is not None and value.shape == buffer.shape and value.dtype == buffer.dtype else None


def _recovered(model: nn.Module, path: str, name: str) -> torch.Tensor | None:
    owner = model.get_submodule(path)
    tensors = {id(tensor): tensor for tensor in (*owner.parameters(), *owner.buffers())}
    if sum(tensor.numel() for tensor in owner.buffers()) > _SMALL_MODULE:
        return None
    if not owner._buffers[name].is_floating_point():  # type: ignore[union-attr]
        return _rebuilt(owner, name)
    return _reinitialised(model, path, name, tensors) if _initialiser(model, path) else _rebuilt(owner, name)


def _initialiser(model: nn.Module, path: str) -> nn.Module | None:
    """The innermost module around ``path`` that has ``_init_weights``."""
    parts = path.split(".") if path else []
    for count in range(len(parts), -1, -1):
        around = model.get_submodule(".".join(parts[:count]))
        if callable(getattr(around, "_init_weights", None)):
            return around
    return None


def _reinitialised(model: nn.Module, path: str, name: str, tensors: dict[int, torch.Tensor]) -> torch.Tensor | None:
    owner, around = model.get_submodule(path), _initialiser(model, path)
    memo: dict[int, object] = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):  # drawn for nothing; a router's is large, and there is one in every layer
            memo[key] = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=tensor.requires_grad)
        else:
            memo[key] = torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0, device="cpu")
    try:
        twin = copy.deepcopy(owner, memo)
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            around._init_weights(twin)  # type: ignore[union-attr, operator]
    except Exception:  # the model's own code on a lone module: anything may be missing
        return _rebuilt(owner, name)
    value = twin._buffers[name]
    if value is None or value.device.type == "meta" or bool(value.isnan().any()):
        return _rebuilt(owner, name)
    return value.detach()


def _rebuilt(owner: nn.Module, name: str) -> torch.Tensor | None:
    """The buffer of a new module made from ``owner.config``."""
    config = getattr(owner, "config", None)
    if config is None or sum(tensor.numel() for tensor in (*owner.parameters(), *owner.buffers())) > _SMALL_MODULE:
        return None
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=()):
            value = type(owner)(config)._buffers.get(name)
    except Exception:  # another constructor signature
        return None
    return None if value is None else value.detach()
