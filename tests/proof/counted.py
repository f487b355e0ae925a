"""Emitted folders on real ranks: `torchrun ... counted.py OUT FOLDER...` writes how often each block runs in a step."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from autopar.codegen.loading import load_train


def runs(folder: Path) -> list[int]:
    """Calls of each block of this rank, recomputation included, divided by micro-batches."""
    train = load_train(folder)
    mesh, fsdp_mesh, device = train.launch.start(train.MESH, train.FSDP, "cpu")
    step = train.parallelize(mesh, fsdp_mesh, device)
    train.parameters.initialise(step.stage, train.module.init_parameter, 0)
    counts: Counter[int] = Counter()
    for stage in step.stages:
        blocks = [module for module in stage.modules() if isinstance(module, FSDPModule) and module is not stage]
        for block in blocks:
            block.register_forward_pre_hook(lambda block, _: counts.update([id(block)]))
    count = train.MICRO_BATCH * train.MICRO_BATCHES
    ids = torch.randint(0, 64, (count, train.SEQ_LEN), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the first step also finds out what stages send each other
        counts.clear()
        step.forward_backward({"input_ids": ids, "labels": ids})
    return [times // train.MICRO_BATCHES for times in counts.values()]


def main() -> None:
    torch.set_num_threads(1)
    out, *folders = map(Path, sys.argv[1:])
    found = {}
    for folder in folders:
        own = runs(folder)
        everyone: list[list[int]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        found[folder.name] = [times for part in everyone for times in part]
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
