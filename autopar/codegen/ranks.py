"""Many ranks inside one process: a fake process group, its mesh, and local tensors that hold one value per rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._local_tensor import LocalIntNode, LocalTensor, LocalTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_flatten, tree_unflatten

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
    with _fake_group(ranks), _Ranks(ranks) as mode:
        # The mode remembers coordinates by the id of the mesh object, which the next submesh may get once one is freed.
        mode._coordinate_cache = _Forgetful()
        # The mesh must be made inside the mode: it asks for the rank's coordinates.
        yield _mesh(axes)


class _Ranks(LocalTensorMode):  # type: ignore[no-untyped-call]
    """Also where a tensor that is the same on all ranks (a buffer) meets a number that differs (a rank's first row)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, form = tree_flatten((args, kwargs or {}))
        differs = any(isinstance(value, torch.SymInt) and isinstance(value.node, LocalIntNode) for value in flat)
        if differs and not any(isinstance(value, LocalTensor) for value in flat):
            flat = [per_rank([value] * len(self.ranks)) if isinstance(value, torch.Tensor) else value for value in flat]
            args, kwargs = tree_unflatten(flat, form)
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Forgetful(dict[int, Any]):
    """A cache that never hits."""

    def __contains__(self, key: object) -> bool:
        return False


@contextmanager
def _fake_group(ranks: int) -> Iterator[None]:
    if dist.is_initialized():
        raise UnsupportedError(
            "proofs in one process set up their own process group, but this process already has one: "
            "run them without torchrun, before torch.distributed is initialised"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _mesh(axes: Mapping[str, int]) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def per_rank(values: list[torch.Tensor]) -> torch.Tensor:
    """One local tensor out of one plain tensor for each rank."""
    return LocalTensor(dict(enumerate(values)))  # type: ignore[no-untyped-call]


def on_rank(value: torch.Tensor, rank: int) -> torch.Tensor:
    """What one rank holds of a local tensor."""
    return value._local_tensors[rank] if isinstance(value, LocalTensor) else value
