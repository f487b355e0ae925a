"""Many ranks inside one process: a fake process group, its mesh, and local tensors that hold one value per rank."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod

import torch
import torch.distributed as dist
from torch.distributed._local_tensor import LocalTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from autopar.codegen.emulation import Ranks
from autopar.errors import UnsupportedError


@contextmanager
def fake_mesh(axes: Mapping[str, int]) -> Iterator[DeviceMesh]:
    """A device mesh (axis name to size, outermost first) whose collectives do nothing; this process is rank 0."""
    with _fake_group(prod(axes.values())):
        yield _mesh(axes)


@contextmanager
def local_ranks(axes: Mapping[str, int]) -> Iterator[DeviceMesh]:
    """All ranks of a mesh at once: inside, tensors are `LocalTensor` and collectives really exchange values."""
    ranks = prod(axes.values())
    numbers = torch.arange(ranks, dtype=torch.int).view(*axes.values())  # outside the mode: the same for all ranks
    with _fake_group(ranks), Ranks(ranks):
        # The mesh must be made inside the mode: it asks for the rank's coordinates.
        yield DeviceMesh("cpu", numbers, mesh_dim_names=tuple(axes))


@contextmanager
def _fake_group(ranks: int) -> Iterator[None]:
    if dist.is_initialized():
        raise UnsupportedError(
            "proofs in one process set up their own process group, but this process already has one: "
            "run them without torchrun, before torch.distributed is initialised"
        )
    hook = sys.excepthook  # torch puts its own before it, which it never takes away
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def _mesh(axes: Mapping[str, int]) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def per_rank(values: list[torch.Tensor]) -> torch.Tensor:
    """One local tensor out of one plain tensor for each rank."""
    return LocalTensor(dict(enumerate(values)))  # type: ignore[no-untyped-call]


def on_rank(value: torch.Tensor, rank: int) -> torch.Tensor:
    """What one rank holds of a local tensor."""
    return value._local_tensors[rank] if isinstance(value, LocalTensor) else value
