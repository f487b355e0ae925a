"""Start and stop: one process per device, started by torchrun, joined into the plan's device mesh."""

import atexit
import os
import sys
import time
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .meshes import data_axis


class InputError(ValueError):
    """What the user gave cannot be used: train.py says so in one line and leaves with status 2."""


def check_launch(axes: dict[str, int], devices_per_node: int, any_topology: bool = False) -> None:
    """Raise InputError if torchrun started something else than the plan needs.

    ``axes``: sizes of the mesh axes. ``any_topology``: do not insist on ``devices_per_node`` processes on each node.
    """
    needed = 1
    for size in axes.values():
        needed *= size
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shape = " x ".join(f"{axis}={size}" for axis, size in axes.items() if axis != "cp" or size > 1)
    if world != needed:
        raise InputError(
            f"this plan needs {needed} process{'es' * (needed > 1)} ({shape}), but {world} were started: use launch.sh"
        )
    if not any_topology and local != min(devices_per_node, needed):
        raise InputError(
            f"this plan was made for {devices_per_node} devices per node, but {local} processes were started on one: "
            "search again for this cluster, or pass --any-topology to run it all the same"
        )


def start(
    axes: dict[str, int], fsdp: int, device_type: str, timeout_s: float | None = None
) -> tuple[DeviceMesh, DeviceMesh, torch.device]:
    """Join the process group; returns the device mesh, the mesh that FSDP2 works on, and this rank's device.

    ``axes``: the axes as ranks go through them, outermost first; torchrun gives neighbouring ranks to a node, so that
    the last ones lie inside it. The device mesh has "pp", "dp" and "cp" first, whatever the order of ranks. FSDP2's is
    made of the ranks of "dp" and "cp" together, which hold the same parameters: groups of ``fsdp`` of them, those of cp
    first, shard, and the groups are replicas of each other. ``device_type``: "cuda" or "cpu"; a machine without GPUs
    runs a plan made for GPUs on its CPU.
    """
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    if device_type == "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s) if timeout_s else None)
    names = sorted(axes, key=lambda axis: ("pp", "dp", "cp").index(axis) if axis in ("pp", "dp", "cp") else 3)
    ranks = torch.arange(dist.get_world_size()).view(tuple(axes.values()))
    ranks = ranks.permute([list(axes).index(name) for name in names])
    mesh = DeviceMesh(device.type, ranks, mesh_dim_names=tuple(names))
    data_mesh = data_axis(mesh)
    if fsdp == data_mesh.size():
        return mesh, data_mesh, device
    groups = (data_mesh.size() // fsdp, fsdp)
    return mesh, data_mesh._unflatten(0, groups, ("replicate", "shard")), device


def stop() -> None:
    """Leave the process group together: a rank that leaves early makes gloo abort the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def leave() -> NoReturn:
    """End the process with status 0. Exit handlers run, but the interpreter does not shut down: a thread of gloo that
    lets go of a tensor meanwhile would abort it (pytorch/pytorch pull request 179291)."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def refuse(message: str) -> NoReturn:
    """Print one line and leave with status 2. All ranks may call it for the same reason; then rank 0 speaks."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)  # as soon as one rank has left, torchrun ends the others: rank 0 first, if it has this to say
    print(f"train.py: {message}", file=sys.stderr, flush=True)
    os._exit(2)  # not through the process group's shutdown, which would wait for ranks that are still working
