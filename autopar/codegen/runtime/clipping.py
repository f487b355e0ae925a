"""The gradient norm of the whole model, over every mesh axis and pipeline stage."""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter],
    max_norm: float | None,
    mesh: DeviceMesh,
    not_counted: set[int],
    scale: float = 1.0,
) -> Tensor:
    """Scale the gradients so that their global 2-norm is at most ``max_norm`` (None: leave them); returns the norm.

    ``not_counted``: ids of parameters that are copies of one on another stage. ``scale``: what the loss was multiplied
    by; the gradients and the norm are divided by it.
    """
    # By the axes they are sharded over: a gradient that is whole on an axis must not be counted once per rank.
    # On local tensors: PyTorch would work out the layout of every DTensor first, which takes seconds.
    local = {weight: weight.grad.to_local() for weight in parameters if weight.grad is not None}
    by_axes: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    for weight, gradient in local.items():
        if id(weight) not in not_counted:
            by_axes[_sharded_axes(weight.grad)].append(gradient)

    dtype = max(
        (gradient.dtype for gradient in local.values()), key=lambda dtype: dtype.itemsize, default=torch.float32
    )
    square = torch.zeros((), device=mesh.device_type, dtype=dtype)
    for axes in sorted(by_axes):
        part = get_total_norm(by_axes[axes]) ** 2
        for axis in axes:
            dist.all_reduce(part, group=mesh[axis].get_group())
        square += part
    if mesh["pp"].size() > 1:
        dist.all_reduce(square, group=mesh["pp"].get_group())
    norm = square.sqrt() / scale
    factor = torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if max_norm is not None or scale != 1.0:
        torch._foreach_mul_(list(local.values()), factor / scale)
    return norm


def _sharded_axes(gradient: DTensor) -> tuple[str, ...]:
    mesh = gradient.device_mesh
    names = mesh.mesh_dim_names or ()
    return tuple(
        name
        for dim, (name, placement) in enumerate(zip(names, gradient.placements, strict=True))
        if not placement.is_replicate() and mesh.size(dim) > 1
    )
