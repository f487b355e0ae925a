"""Values for the parameters of a sharded stage: drawn from a seed or read from a file, one tensor at a time."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .launch import InputError

Tied = tuple[tuple[str, ...], ...]


def first_names(tied: Tied) -> dict[str, str]:
    """For each name of a tied weight, the first name of its group: the one used in files."""
    return {name: group[0] for group in tied for name in group}


def allocate(stage: nn.Module, device: torch.device) -> None:
    """Give the parameters that are on the meta device (uninitialised) memory on ``device``: this rank's shards only."""
    stage._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


def own_slice(whole: Tensor, like: Tensor) -> Tensor:
    """The part of ``whole`` that this rank holds of the DTensor ``like`` (a view, no communication)."""
    if not isinstance(like, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


@torch.no_grad()
def fill(stage: nn.Module, value_of: Callable[[str, torch.Size], Tensor], tied: Tied = ()) -> None:
    """Set every parameter to its part of ``value_of(name, shape)``, a whole CPU tensor; tied copies share a value."""
    first = first_names(tied)
    for name, weight in stage.named_parameters():
        whole = value_of(first.get(name, name), weight.shape)
        if whole.shape != weight.shape:
            raise InputError(f"{name}: the model has shape {tuple(weight.shape)}, the value {tuple(whole.shape)}")
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        local.copy_(own_slice(whole, weight))


def initialise(
    stage: nn.Module,
    init_parameter: Callable[[str, Tensor, torch.Generator], None],
    seed: int,
    tied: Tied = (),
) -> None:
    """Draw every parameter from a generator of its own, so that the values do not depend on how they are sharded."""

    def draw(name: str, shape: torch.Size) -> Tensor:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        weight = torch.empty(shape)
        init_parameter(name, weight, torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))
        return weight

    fill(stage, draw, tied)


def load_weights(stage: nn.Module, path: Path, tied: Tied = ()) -> None:
    """Read the parameters of this stage from a file of ``torch.save({name: tensor})``; only what is used is read."""
    if not path.is_file():
        raise InputError(f"--weights: there is no file {path}")
    copy_weights(stage, torch.load(path, map_location="cpu", mmap=True, weights_only=True), tied)


def copy_weights(stage: nn.Module, weights: Mapping[str, Tensor], tied: Tied = ()) -> None:
    """Set the parameters of this stage from whole tensors by name; a tied weight may be under any of its names.

    Raises InputError naming a weight that is missing or has another shape.
    """
    groups = {group[0]: group for group in tied}

    def value_of(name: str, shape: torch.Size) -> Tensor:
        for held in groups.get(name, (name,)):
            if held in weights:
                return weights[held]
        raise InputError(f"the weights have none named {name}")

    fill(stage, value_of, tied)
