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
    parameters: Iterable[nn.Parameter], max_norm: float | None, mesh: DeviceMesh, not_counted: set[int]
) -> Tensor:
    """Scale the gradients so that their global 2-norm is at most ``max_norm`` (None: leave them); returns the norm.

    ``not_counted``: ids of parameters that are copies of one on another stage. Parameters without a gradient (frozen)
    count nothing; a stage may have none but those.
    """
    # By the axes they are sharded over: a gradient that is whole on an axis must not be counted once per rank.
    # On local tensors: PyTorch would work out the layout of every DTensor first, which takes seconds.
    by_axes: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    groups: dict[str, dist.ProcessGroup] = {}
    gradients = []
    # The norm is computed where the gradients are (offloaded ones: on the host), in the dtype of the parameters.
    device, dtype = torch.device(mesh.device_type), torch.float32
    for weight in parameters:
        device, dtype = weight.to_local().device, weight.dtype
        if weight.grad is None:
            continue
        gradients.append(weight.grad.to_local())
        if id(weight) not in not_counted:
            sharded = _sharded_axes(weight.grad)
            groups |= sharded
            by_axes[tuple(sharded)].append(gradients[-1])

    square = torch.zeros((), device=device, dtype=dtype)
    for axes in sorted(by_axes):
        part = get_total_norm(by_axes[axes]) ** 2
        for axis in axes:
            dist.all_reduce(part, group=groups[axis])
        square += part
    if mesh["pp"].size() > 1:
        dist.all_reduce(square, group=mesh["pp"].get_group())
    norm = square.sqrt()
    if max_norm is not None and gradients:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _sharded_axes(gradient: DTensor) -> dict[str, dist.ProcessGroup]:
    """The axes that a gradient is sharded over, with this rank's group on each."""
    mesh = gradient.device_mesh
    names = mesh.mesh_dim_names or ()
    return {
        name: mesh.get_group(dim)
        for dim, (name, placement) in enumerate(zip(names, gradient.placements, strict=True))
        if not placement.is_replicate() and mesh.size(dim) > 1
    }
