"""The loss scale of float16, whose small gradients would vanish and whose large ones overflow."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

GROWTH_INTERVAL = 2000
"""Steps without overflow after which the scale is doubled."""


class LossScale:
    """What the loss is multiplied by before backward, and the gradients are divided by after it.

    Gradients that overflow are found by their norm, which is that of the whole model: every rank and every stage
    skips the step, or none. The scale is then halved; after `GROWTH_INTERVAL` good steps it is doubled.
    """

    def __init__(self, value: float = 1.0, is_dynamic: bool = False) -> None:
        self.value, self.is_dynamic, self.good_steps = value, is_dynamic, 0

    def multiply(self, parameters: Iterable[nn.Parameter]) -> None:
        """Before backward adds to gradients that are already there."""
        self._times(self.value, parameters)

    def divide(self, parameters: Iterable[nn.Parameter]) -> None:
        """After backward: the gradients are those of the loss itself."""
        self._times(1 / self.value, parameters)

    def accept(self, norm: Tensor) -> bool:
        """Whether to take the step, given the norm of all gradients; the same on every rank. Adapts the scale."""
        if not self.is_dynamic:
            return True
        overflows = (~norm.isfinite()).to(torch.int32)
        dist.all_reduce(overflows, op=dist.ReduceOp.MAX)
        if overflows.item():
            self.value, self.good_steps = self.value / 2, 0
            return False
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * 2, 0
        return True

    def state(self) -> Tensor:
        """What a checkpoint keeps: float64 [2]."""
        return torch.tensor([self.value, self.good_steps], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """The inverse of `state`."""
        self.value, self.good_steps = float(state[0]), int(state[1])

    @torch.no_grad()
    def _times(self, factor: float, parameters: Iterable[nn.Parameter]) -> None:
        if factor != 1.0:
            gradients = [weight.grad for weight in parameters if weight.grad is not None]
            if gradients:
                torch._foreach_mul_([gradient.to_local() for gradient in gradients], factor)
