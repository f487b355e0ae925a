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
from .scaling import LossScale


def save(
    folder: Path,
    step: int,
    stage: nn.Module,
    optimizer: torch.optim.Optimizer,
    tied: Tied,
    copies: set[int],
    keep: int,
    scale: LossScale | None = None,
) -> None:
    """Write ``folder/step_N``, N = ``step`` optimizer steps done, and remove all but the ``keep`` newest.

    ``copies``: ids of parameters that another stage writes (tied weights).
    """
    target, temporary = folder / f"step_{step}", folder / f"step_{step}.tmp"
    state = _state(stage, optimizer, tied, copies, scale)
    state["step"] = torch.tensor(step)
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


def resume(
    path: Path, stage: nn.Module, optimizer: torch.optim.Optimizer, tied: Tied, scale: LossScale | None = None
) -> int:
    """Read parameters and optimizer state from ``path`` (a ``step_N`` folder, or the folder that holds them).

    Returns the number of optimizer steps done. Raises InputError if there is no complete checkpoint.
    """
    if not (path / ".metadata").exists():
        pointer = path / "latest"
        if not pointer.exists():
            raise InputError(f"--resume: no complete checkpoint in {path}")
        path = path / pointer.read_text().strip()
    state = _state(stage, optimizer, tied, set(), scale)
    state["step"] = torch.tensor(0)
    dcp.load(state, checkpoint_id=path)
    step = int(state["step"].item())
    set_steps(optimizer, step)
    return step


def _state(
    stage: nn.Module, optimizer: torch.optim.Optimizer, tied: Tied, skip: set[int], scale: LossScale | None
) -> dict[str, Any]:
    """The tensors of a checkpoint by name, the very ones in use: loading fills them in place."""
    first = first_names(tied)
    state: dict[str, Any] = {"model": {}, "optimizer": {}}
    if scale is not None:
        state["loss_scale"] = {"value": scale.value, "good": scale.good}
    for name, weight in stage.named_parameters():
        if id(weight) in skip:
            continue
        name = first.get(name, name)
        state["model"][name] = weight.detach()
        for moment, value in moments(optimizer, weight).items():
            state["optimizer"][f"{name}.{moment}"] = value
    return state


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))
