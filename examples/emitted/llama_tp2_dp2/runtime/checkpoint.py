"""Checkpoints in PyTorch's distributed format, under the model's original parameter names.

Every rank writes its own shards, and a run with another plan reads what it needs of them: a checkpoint written by
tp=2 x dp=2 continues on pp=4. A folder ``step_N`` appears only when it is complete; ``latest`` names the newest.
The folder must be visible to all nodes.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from .launch import InputError
from .optimizer import moments, set_steps
from .parameters import Tied, first_names
from .step import Step


def save(folder: Path, steps: int, step: Step, optimizer: torch.optim.Optimizer, tied: Tied, keep: int) -> None:
    """Write ``folder/step_N``, N = ``steps`` optimizer steps done, and remove all but the ``keep`` newest."""
    target, temporary = folder / f"step_{steps}", folder / f"step_{steps}.tmp"
    state = _state(step.stage, optimizer, tied, step.copies)
    state["step"] = torch.tensor(steps)
    if step.scale is not None:
        state["loss_scale"] = step.scale.state()
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    dcp.save(state, checkpoint_id=temporary)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        pointer = folder / "latest.tmp"
        pointer.write_text(target.name + "\n")
        os.replace(pointer, folder / "latest")
        for old in _complete(folder)[:-keep]:
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def resume(path: Path, step: Step, optimizer: torch.optim.Optimizer, tied: Tied) -> int:
    """Read parameters and optimizer state from ``path`` (a ``step_N`` folder, or the folder that holds them).

    Returns the number of optimizer steps done. Raises InputError if there is no complete checkpoint.
    """
    if not (path / ".metadata").exists():
        pointer = path / "latest"
        if not pointer.exists():
            raise InputError(f"--resume: no complete checkpoint in {path}")
        path = path / pointer.read_text().strip()
    known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for stage in step.stages:  # one by one: two may have a copy of the same weight
        state = _state(stage, optimizer, tied, set())
        state["step"] = torch.tensor(0)
        if step.scale is not None and any(name.startswith("loss_scale") for name in known):
            state["loss_scale"] = step.scale.state()
        dcp.load(state, checkpoint_id=path)
    steps = int(state["step"].item())
    set_steps(optimizer, steps)
    return steps


def _state(stage: nn.Module, optimizer: torch.optim.Optimizer, tied: Tied, skip: set[int]) -> dict[str, Any]:
    """The tensors of a checkpoint by name, the very ones in use: loading fills them in place."""
    first = first_names(tied)
    state: dict[str, Any] = {"model": {}, "optimizer": {}}
    for name, weight in stage.named_parameters():
        if id(weight) in skip:
            continue
        name = first.get(name, name)
        state["model"][name] = weight.detach()
        if weight.requires_grad:
            for moment, value in moments(optimizer, weight).items():
                state["optimizer"][f"{name}.{moment}"] = value
    return state


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))
