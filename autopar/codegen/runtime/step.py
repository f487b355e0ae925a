"""Forward and backward of one training step: the micro-batches of one data rank, pipelined or one after another."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from .clipping import clip_gradients
from .parameters import Tied
from .tied import TiedWeights

Batch = dict[str, Tensor]


class Step:
    """What every rank runs each step.

    ``stage`` returns the loss *summed* over a micro-batch (on the last stage); it is divided by the number of targets
    in the whole step, over all micro-batches and data ranks, so that gradients are those of the mean over tokens.
    """

    def __init__(
        self,
        stage: nn.Module,
        mesh: DeviceMesh,
        micro_batches: int,
        count_targets: Callable[[Batch], Tensor],
        reduce_each: bool,
        tied: Tied = (),
    ) -> None:
        self.stage, self.mesh, self.micro_batches = stage, mesh, micro_batches
        self.count_targets = count_targets
        # Sharded gradients are reduced at each micro-batch (nothing whole is kept); others once, at the last.
        self.reduce_each = reduce_each
        self.tied = TiedWeights(stage, tied, mesh)
        self.targets: Tensor | int = 1
        # What the loss is multiplied by before the backward (float16), and clipping divides gradients by.
        self.scale = 1.0
        self.schedule: Schedule1F1B | None = None
        stages, index = mesh["pp"].size(), mesh["pp"].get_local_rank()
        if stages > 1:
            device = next(stage.parameters()).device
            self.is_last = index == stages - 1
            pipeline_stage = PipelineStage(stage, index, stages, device, group=mesh["pp"].get_group())
            self.schedule = Schedule1F1B(pipeline_stage, micro_batches, loss_fn=self._mean_loss, scale_grads=False)

    def forward_backward(self, batch: Batch) -> Tensor:
        """Add the gradients of this rank's ``batch`` (all its micro-batches, on dim 0) to the parameters.

        Returns the mean loss over the tokens of the whole step, the same on every rank.
        """
        samples = next(iter(batch.values())).size(0)
        if samples % self.micro_batches:
            raise ValueError(f"{samples} samples do not make {self.micro_batches} micro-batches of equal size")
        dp, pp = self.mesh["dp"].get_group(), self.mesh["pp"].get_group()
        device = next(iter(batch.values())).device
        targets = torch.as_tensor(self.count_targets(batch), device=device).clone()
        dist.all_reduce(targets, group=dp)
        self.targets = targets.clamp(min=1)
        if self.schedule is None:
            loss = self._accumulate(batch)
        else:
            loss = self._pipeline(batch)
        dist.all_reduce(loss, group=dp)
        if self.schedule is not None:
            dist.all_reduce(loss, group=pp)
        self.tied.add_gradients()
        return loss / self.scale

    @property
    def copies(self) -> set[int]:
        """Ids of parameters that are copies of one on another stage (tied weights), which counts and saves it."""
        return self.tied.not_counted

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Clip to the global norm ``max_norm`` (None: do not); returns the norm before."""
        return clip_gradients(self.stage.parameters(), max_norm, self.mesh, self.copies, self.scale)

    def _accumulate(self, batch: Batch) -> Tensor:
        losses = []
        for index in range(self.micro_batches):
            reduce = self.reduce_each or index == self.micro_batches - 1
            self.stage.set_requires_gradient_sync(reduce)
            # Every backward that reduces ends its reductions, as the last of a step does. Otherwise FSDP2 holds the
            # whole gradients of the root group, its reduction's input, through the next micro-batch.
            self.stage.set_is_last_backward(reduce)
            loss = self._mean_loss(self.stage(**{key: self._part(value, index) for key, value in batch.items()}))
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).double().sum()

    def _pipeline(self, batch: Batch) -> Tensor:
        assert self.schedule is not None
        losses: list[Tensor] = []
        # The stage computes the loss from its keyword arguments; the schedule only has to see some target.
        target = next(iter(batch.values())) if self.is_last else None
        self.schedule.step(target=target, losses=losses, return_outputs=False, **batch)
        if self.is_last:
            return torch.stack([loss.detach() for loss in losses]).double().sum()
        return torch.zeros((), device=next(iter(batch.values())).device, dtype=torch.float64)

    def _part(self, value: Tensor, index: int) -> Tensor:
        return value.chunk(self.micro_batches)[index]

    def _mean_loss(self, loss_sum: Tensor, target: Tensor | None = None) -> Tensor:
        return loss_sum / self.targets * self.scale
