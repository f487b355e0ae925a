"""Stock parts of PyTorch together, without autopar, on two pipeline and two data ranks: `torchrun ... stock.py OUT`.

Writes, for each of `CASES`, the error of the worst gradient against one device and how often each block ran; for each
of `JOINED`, whether FSDP2 and DTensor mean the same shards.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV, ScheduleZBVZeroBubble
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

WIDTH, BLOCKS, MICRO_BATCHES, SAMPLES = 8, 4, 4, 8
"""Blocks of the whole model; micro-batches, and samples in all of them, of one data rank."""

CASES = {
    # schedule, whether FSDP2 frees parameters after each forward (None: no FSDP2), whether blocks are checkpointed
    "1f1b frees": ("1f1b", True, False),
    "zbv": ("zbv", False, False),
    "zbv frees": ("zbv", True, False),
    "dualpipev": ("dualpipev", False, False),
    "dualpipev frees": ("dualpipev", True, False),
    "1f1b recomputes": ("1f1b", None, True),
    "zbv recomputes": ("zbv", None, True),
}


JOINED = {"ranks rise": [[0, 1], [2, 3]], "ranks do not rise": [[0, 2], [1, 3]]}
"""Meshes whose two axes FSDP2 shards over as one."""


class Block(nn.Module):
    """Two linear layers with a residual; counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.recompute, self.runs = False, 0

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)

    def body(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + self.down(torch.tanh(self.up(x)))


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """A part of the mean over the samples of all data ranks."""
    return (output - target).square().sum() / (2 * SAMPLES)


def measured(name: str, frees: bool | None, recompute: bool) -> tuple[float, list[int]]:
    """Error of the worst gradient of this rank's blocks, and the runs of each of them in a micro-batch."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(BLOCKS)).double()
    x, target = torch.randn(2, 2, SAMPLES, WIDTH, dtype=torch.float64)
    out = x.flatten(0, 1)
    for block in blocks:
        out = block(out)
    loss_of(out, target.flatten(0, 1)).backward()
    right = {name: weight.grad.clone() for name, weight in blocks.named_parameters()}
    blocks.zero_grad()

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    rank, count = mesh["pp"].get_local_rank(), 2 if name == "1f1b" else 4
    stages = []
    for index in [rank] if count == 2 else [rank, 3 - rank]:
        stage = nn.Sequential(*blocks[index * BLOCKS // count : (index + 1) * BLOCKS // count])
        for block in stage:
            block.recompute = recompute
        if frees is not None:
            for module in (*stage, stage):
                fully_shard(module, mesh=mesh["dp"], reshard_after_forward=frees)
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        stages.append(PipelineStage(stage, index, count, torch.device("cpu"), group=mesh["pp"].get_group()))
    kind = {"1f1b": Schedule1F1B, "zbv": ScheduleZBVZeroBubble, "dualpipev": ScheduleDualPipeV}[name]
    schedule = kind(stages[0] if count == 2 else stages, MICRO_BATCHES, loss_fn=loss_of, scale_grads=False)
    own = mesh["dp"].get_local_rank()
    for _ in range(2):  # the first step also finds out what stages send each other
        for stage in stages:
            stage.submod.zero_grad()
            for block in stage.submod:
                block.runs = 0
        schedule.step(*([x[own]] if rank == 0 else []), target=target[own])

    worst = 0.0
    held = {id(block) for stage in stages for block in stage.submod}
    for place, block in enumerate(blocks):
        for key, weight in block.named_parameters():
            if id(block) not in held:
                continue
            whole = right[f"{place}.{key}"]
            grad = weight.grad
            if grad is None:
                grad = torch.zeros_like(whole)
            elif frees is None:
                dist.all_reduce(grad, group=mesh["dp"].get_group())
            else:
                grad = grad.full_tensor()
            worst = max(worst, float((grad - whole).norm() / whole.norm()))
    return worst, [block.runs // MICRO_BATCHES for block in blocks if id(block) in held]


def joined(ranks: list[list[int]]) -> float:
    """How far the shard that FSDP2 gives this rank is from the one that DTensor says it has."""
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH, bias=False).double()
    whole = layer.weight.detach().clone()
    fully_shard(layer, mesh=DeviceMesh("cpu", ranks, mesh_dim_names=("dp", "cp"))["dp", "cp"]._flatten("data"))
    weight: Any = layer.weight
    shape, offset = compute_local_shape_and_global_offset(whole.shape, weight.device_mesh, weight.placements)
    told = whole.narrow(0, offset[0], shape[0])
    return float((weight.to_local().detach() - told).norm() / told.norm())


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for case, (name, frees, recompute) in CASES.items():
        everyone: list[tuple[float, list[int]]] = [(0.0, [])] * dist.get_world_size()
        dist.all_gather_object(everyone, measured(name, frees, recompute))
        found[case] = {"error": max(error for error, _ in everyone), "runs": [n for _, runs in everyone for n in runs]}
    for case, ranks in JOINED.items():
        errors = [0.0] * dist.get_world_size()
        dist.all_gather_object(errors, joined(ranks))
        found[case] = {"error": max(errors)}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
