"""Forward and backward of one training step: the micro-batches of one data rank, pipelined or one after another."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .clipping import clip_gradients
from .parameters import Tied
from .pipeline import build_schedule, splits_backward
from .scaling import LossScale, scale_gradients
from .sharding import after_step, before_backward, drains, gather_ahead, reduce_in_background
from .tied import TiedWeights

Batch = dict[str, Tensor]


class Stages(nn.Module):
    """The stages of a rank that has several. Their parameters keep the names they have in the model; a weight that two
    stages of this rank share has two copies, and its name comes twice."""

    def __init__(self, stages: dict[int, nn.Module]) -> None:
        super().__init__()
        for index, stage in stages.items():
            self.add_module(str(index), stage)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for stage in self.children():
            yield from stage.named_parameters(prefix, recurse, remove_duplicate)


class Step:
    """What every rank runs each step. ``stages``: those of this rank, by index.

    A stage returns the loss *summed* over a micro-batch (the last one does); it is divided by the number of targets
    in the whole step, over all micro-batches and data ranks, so that gradients are those of the mean over tokens.
    ``stage``: what holds all parameters of this rank. ``scale``: the loss scale of float16. ``compute``: the dtype that
    floating-point tensors of a batch are cast to.
    """

    def __init__(
        self,
        stages: dict[int, nn.Module],
        mesh: DeviceMesh,
        device: torch.device,
        schedule: str,
        micro_batches: int,
        count_targets: Callable[[Batch], Tensor],
        zero: int,
        tied: Tied = (),
        scale: LossScale | None = None,
        compute: torch.dtype | None = None,
    ) -> None:
        self.stages, self.mesh, self.micro_batches = list(stages.values()), mesh, micro_batches
        self.stage = self.stages[0] if len(stages) == 1 else Stages(stages)
        self.count_targets, self.zero = count_targets, zero
        self.tied = TiedWeights(stages, tied, mesh)
        self.scale, self.factor, self.compute = scale, 1.0, compute
        self.targets: Tensor | int = 1
        self.has_last = mesh["pp"].size() * len(stages) - 1 in stages
        self.schedule, self.waits = None, True
        if mesh["pp"].size() > 1:
            self.waits = not drains(zero, micro_batches, splits_backward(schedule))
            if not self.waits:
                for stage in self.stages:
                    reduce_in_background(stage)
            self.schedule = build_schedule(
                schedule, stages, mesh, device, micro_batches, zero, self.waits, self._mean_loss
            )

    def forward_backward(self, batch: Batch) -> Tensor:
        """Add the gradients of this rank's ``batch`` (all its micro-batches, on dim 0) to the parameters.

        Returns the mean loss over the tokens of the whole step, the same on every rank.
        """
        if self.compute is not None:
            batch = {key: x.to(self.compute) if x.is_floating_point() else x for key, x in batch.items()}
        first = next(iter(batch.values()))
        if first.size(0) % self.micro_batches:
            raise ValueError(f"{first.size(0)} samples do not make {self.micro_batches} micro-batches of equal size")
        # Ranks of "cp" have parts of the same samples: they count their targets once, and add up the loss.
        targets = torch.as_tensor(self.count_targets(batch), device=first.device).clone()
        dist.all_reduce(targets, group=self.mesh["dp"].get_group())
        self.targets = targets.clamp(min=1)
        if self.scale is not None:
            self.factor = self.scale.value.item()
            scale_gradients(self.stage.parameters(), self.factor)  # of an earlier call, to be added to
        loss = self._accumulate(batch) if self.schedule is None else self._pipeline(batch)
        for stage in self.stages:
            after_step(stage, self.waits)
        for axis in ("dp", "cp", "pp"):
            if self.mesh[axis].size() > 1:
                dist.all_reduce(loss, group=self.mesh[axis].get_group())
        self.tied.add_gradients()
        if self.scale is not None:
            scale_gradients(self.stage.parameters(), 1 / self.factor)
        return loss / self.factor

    @property
    def copies(self) -> set[int]:
        """Ids of parameters that are copies of one on another stage (tied weights), which counts and saves it."""
        return self.tied.not_counted

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Clip to the global norm ``max_norm`` (None: do not); returns the norm before."""
        return clip_gradients(self.stage.parameters(), max_norm, self.mesh, self.copies)

    def _accumulate(self, batch: Batch) -> Tensor:
        losses = []
        for index in range(self.micro_batches):
            before_backward(self.stages[0], self.zero, is_last=index == self.micro_batches - 1)
            part = {key: value.chunk(self.micro_batches)[index] for key, value in batch.items()}
            loss = self._mean_loss(self.stage(**part))
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).double().sum()

    def _pipeline(self, batch: Batch) -> Tensor:
        assert self.schedule is not None
        losses: list[Tensor] = []
        first = next(iter(batch.values()))
        if self.zero in (1, 2):
            for stage in self.stages:
                gather_ahead(stage)
        # The stage computes the loss from its keyword arguments; the schedule only has to see some target.
        target = first if self.has_last else None
        self.schedule.step(target=target, losses=losses, return_outputs=False, **batch)
        if self.has_last:
            return torch.stack([loss.detach() for loss in losses]).double().sum()
        return torch.zeros((), device=first.device, dtype=torch.float64)

    def _mean_loss(self, loss_sum: Tensor, target: Tensor | None = None) -> Tensor:
        return loss_sum / self.targets * self.factor
