"""Pipeline schedules: which stages a rank has, and how they run together with FSDP2."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining._backward import stage_backward_weight
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from .launch import InputError
from .sharding import before_backward, take_up_gradients

SCHEDULES = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
ONE_STAGE = ("gpipe", "1f1b")
"""Schedules of one stage a rank."""

THERE_AND_BACK = ("zbv", "dualpipev")
"""Schedules of two stages a rank, one on the way there and one on the way back. They split the backward: gradients of
weights are computed later than those of inputs."""


def splits_backward(schedule: str) -> bool:
    """Whether gradients of weights are computed later than those of inputs."""
    return schedule in THERE_AND_BACK


def stages_of_rank(schedule: str, rank: int, ranks: int, per_rank: int) -> list[int]:
    """The stages of pipeline rank ``rank`` of ``ranks``."""
    if schedule in THERE_AND_BACK:
        return [rank, 2 * ranks - 1 - rank]
    return [rank + lap * ranks for lap in range(per_rank)]


def build_schedule(
    schedule: str,
    stages: dict[int, nn.Module],
    mesh: DeviceMesh,
    device: torch.device,
    micro_batches: int,
    zero: int,
    waits: bool,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """The schedule, ready to step. ``stages``: those of this rank, by index; all ranks have as many. ``waits``: whether
    the last backward of a stage waits for its reductions.

    Raises InputError for a schedule that splits the backward on a PyTorch that may count gradients twice there.
    """
    splits = splits_backward(schedule)
    if splits and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        raise InputError(
            f"schedule {schedule} needs PyTorch 2.13 or newer (this is {torch.__version__}): before it, nothing keeps "
            "a split backward from adding a gradient twice; use another schedule"
        )
    count, group = len(stages) * mesh["pp"].size(), mesh["pp"].get_group()
    pieces = [_Piece(_Hidden(stage, splits), index, count, device, group=group) for index, stage in stages.items()]
    for piece in pieces:
        piece.zero, piece.splits_backward, piece.waits = zero, splits, waits
    # Gradients are not divided by the number of micro-batches: the loss is already a part of the whole step's mean.
    options: dict[str, Any] = {"n_microbatches": micro_batches, "loss_fn": loss, "scale_grads": False}
    return SCHEDULES[schedule](pieces[0] if schedule in ONE_STAGE else pieces, **options)


class _Hidden(nn.Module):
    """Hides from the schedule that the stage is sharded. It would keep parameters and gradients whole to the end of the
    step; so FSDP2's own hooks gather, reduce and free, at every micro-batch, as they do without a pipeline."""

    def __init__(self, stage: nn.Module, splits_backward: bool) -> None:
        super().__init__()
        self.stage, self.splits_backward = stage, splits_backward
        self.reaches: list[bool] = []

    def forward(self, *args: Any, **batch: Any) -> Any:
        result = self.stage(*args, **batch)
        if not self.splits_backward or not torch.is_grad_enabled():
            return tree_map_only(Tensor, Tensor.contiguous, result)
        leaves, form = tree_flatten(result)
        inputs = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.requires_grad]
        if not self.reaches:
            self.reaches = [not isinstance(x, Tensor) or not inputs or _reaches(x, inputs) for x in leaves]
        for place, (x, reaches) in enumerate(zip(leaves, self.reaches, strict=True)):
            if isinstance(x, Tensor) and x.is_floating_point():
                leaves[place] = _handed_on(x) if reaches else _Joined.apply(x, *inputs)
        return tree_unflatten(leaves, form)


def _handed_on(x: Tensor) -> Tensor:
    """``x`` as a split backward takes it: no view, since it is detached in place; asking for a gradient also where all
    before it is frozen, for weights are found on the way from a stage's input, and those of the next stage would have
    no gradients, without a word; and in one piece, which is what can be sent."""
    if not x.requires_grad:
        return x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    return x.clone(memory_format=torch.contiguous_format) if x._is_view() else x.contiguous()


class _Joined(torch.autograd.Function):
    """A stage's output that is made of its weights alone (a table of position biases): for the same reason it needs a
    way from the stage's inputs, to which it hands no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Tensor) -> Tensor:
        ctx.others = len(inputs)
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, *(None for _ in range(ctx.others))


def _reaches(output: Tensor, inputs: list[Tensor]) -> bool:
    """Whether the backward of ``output`` comes to one of ``inputs``, or ends at once."""
    goals, nodes = {id(x) for x in inputs}, [output.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None or id(getattr(node, "variable", None)) in goals:
            return True
        after = {other for other, _ in node.next_functions if other is not None} - seen
        seen |= after
        nodes += after
    return False


def joined_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of weights whose gradients the second half of a backward computes together, none in two of them.

    PyTorch groups weights by the nodes at which the way from the inputs passes them, in no certain order. One that is
    read in several places (a table of position biases) may come out in a group of its own and again in that of another
    weight: its gradient would be added twice, or its graph gone through when it is already freed.
    """
    joined: dict[int, dict[str, Any]] = {}
    home: dict[Any, int] = {}  # of each weight and node, the group it is in
    for number, group in enumerate(groups):
        params = set(group["params"])
        found = dict(zip(group["intermediates"], group["grads"], strict=True))
        for other in {home[key] for key in (*params, *found) if key in home}:
            before = joined.pop(other)
            params |= before["params"]
            found = dict(zip(before["intermediates"], before["grads"], strict=True)) | found
        joined[number] = {"params": params, "intermediates": list(found), "grads": list(found.values())}
        home |= dict.fromkeys((*params, *found), number)
    return list(joined.values())


def weight_gradients(weights: list[nn.Parameter], groups: list[dict[str, Any]]) -> None:
    """The second half of a backward: gradients of weights, from those at the nodes of their groups.

    From one node of a group the way to its weights may lead by another (a table of biases that two layers read), and so
    through the graphs of other groups: such groups come first, and leave these graphs to them.
    """
    several = [len(group["intermediates"]) > 1 for group in groups]
    for first in (True, False):
        chosen = [group for group, more in zip(groups, several, strict=True) if more == first]
        stage_backward_weight(iter(weights), chosen, retain_graph=first)


class _Piece(PipelineStage):
    """A stage of a schedule that tells FSDP2 before each backward what to do with its gradients."""

    zero: int
    splits_backward: bool
    waits: bool

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: Any, last_backward: bool = False) -> Any:
        # Where the backward is split, FSDP2's hooks run before the gradients of weights are there.
        before_backward(self.submod.stage, self.zero, last_backward and not self.splits_backward, self.waits)
        if backward_type == "weight":
            weight_gradients(list(self.submod.parameters()), bwd_kwargs["param_groups"])
            return (), None
        gradients, rest = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        # They are sent, and only what is in one piece can be.
        return tree_map_only(Tensor, Tensor.contiguous, gradients), rest and joined_groups(rest)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Called by schedules of several stages after the last backward of this one."""
        if not self.splits_backward:
            return
        hidden: Any = self.submod
        stage: FSDPModule = hidden.stage
        # What hooks took up before is in the dtype of the reduction, the last gradients of weights are not yet.
        before_backward(stage, self.zero, is_last=False)
        take_up_gradients(stage)
        before_backward(stage, self.zero, is_last=True, waits=self.waits)
        if not self.waits:
            take_up_gradients(stage)  # and reduce them
            return
        self.submod = hidden.stage
        super().perform_reduce_grad(grad_scale_factor)
        self.submod = hidden
