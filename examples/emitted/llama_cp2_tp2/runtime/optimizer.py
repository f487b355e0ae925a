"""What optimizers keep for each parameter, as checkpoints hold it."""

import torch
from torch import Tensor, nn

MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}


def moments(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's tensors for ``weight`` by name, the very ones in use; made if it has not taken a step yet."""
    names = MOMENTS[type(optimizer)]
    kept = optimizer.state[weight]
    if isinstance(optimizer, torch.optim.AdamW) and "step" not in kept:
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        kept["step"] = torch.zeros((), dtype=torch.float32, device=weight.device if on_device else "cpu")
    for name in names:
        # A momentum of zeros is what SGD starts from, too.
        if kept.get(name) is None:
            kept[name] = torch.zeros_like(weight, requires_grad=False)
    return {name: kept[name] for name in names}


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Tell the optimizer how many steps were taken (AdamW corrects its bias by it)."""
    for kept in optimizer.state.values():
        if "step" in kept:
            kept["step"].fill_(steps)
