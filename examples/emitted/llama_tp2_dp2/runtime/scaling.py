"""Loss scaling for float16, whose smallest gradients would vanish.

The loss is multiplied by the scale, so all gradients are; after the backward they are divided by it again. The global
gradient norm is the same number on every rank and not finite if any gradient anywhere overflowed, so all ranks agree,
without asking each other, whether a step is taken. The scale halves after an overflow and doubles after ``interval``
steps without (Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, section 3.2).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LossScale:
    """``value``: what the loss is multiplied by; ``good``: steps since it last changed. Checkpoints hold both."""

    def __init__(self, initial: float = 2.0**16, interval: int = 2000, largest: float = 2.0**24) -> None:
        self.value = torch.tensor(initial, dtype=torch.float32)
        self.good = torch.tensor(0)
        self.interval, self.largest = interval, largest

    def accepts(self, norm: Tensor) -> bool:
        """Whether the step with this gradient norm may be taken; adapts the scale either way."""
        if not torch.isfinite(norm):
            self.value.mul_(0.5).clamp_(min=1.0)
            self.good.zero_()
            return False
        self.good += 1
        if self.good >= self.interval:
            self.value.mul_(2.0).clamp_(max=self.largest)
            self.good.zero_()
        return True

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, the very tensors in use."""
        return {"value": self.value, "good": self.good}


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply the gradients that are there."""
    gradients = [weight.grad.to_local() for weight in parameters if weight.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)
