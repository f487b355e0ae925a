"""Operators as a user would bring them: one of torch.library, a function, and an autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import autopar


@torch.library.custom_op("own_operators::decay", mutates_args=())
def decay(x: Tensor, rate: Tensor) -> Tensor:
    """``y[t] = sigmoid(rate) * y[t-1] + x[t]``; x [b, s, d], rate [d]."""
    keep = torch.sigmoid(rate)
    states, state = [], torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        state = keep * state + x[:, t]
        states.append(state)
    return torch.stack(states, 1)


@decay.register_fake
def _(x: Tensor, rate: Tensor) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x, rate = (value.detach().requires_grad_() for value in ctx.saved_tensors)
        keep, states, state = torch.sigmoid(rate), [], torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            state = keep * state + x[:, t]
            states.append(state)
        return torch.autograd.grad(torch.stack(states, 1), (x, rate), grad)  # type: ignore[return-value]


decay.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
autopar.register_rule("own_operators::decay", "b s d, d -> b s d", freeze="s")


class Rounded(torch.autograd.Function):
    """Rounds forward, and lets the gradient through: what tracing alone would get wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: int) -> Tensor:
        return (x * steps).round() / steps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Secret(Rounded):
    """The same, of which autopar is not told."""


autopar.leaf(Rounded, "... -> ...")


class Untold(Secret):
    """Another one, which one test alone uses."""


class Scaled(torch.autograd.Function):
    """Scales by the largest along the last dim, and lets the gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.factor = factor * 1.0
        return x * scale * ctx.factor / x.abs().amax(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale = ctx.saved_tensors
        total = grad * x * ctx.factor
        return grad * scale * ctx.factor, total.sum_to_size(scale.shape), None


def _gated(x: Tensor, weight: Tensor, power: float = 1.0) -> Tensor:
    """[..., k], [n, k] -> [..., n]."""
    y = x @ weight.t()
    return y * torch.sigmoid(power * y)


gated = autopar.leaf(_gated, "... k^, n k^ -> ... n")


class Own(nn.Module):
    """Two equal layers of the three of them, between an embedding and a head."""

    def __init__(self, function: Any = Rounded, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Layer(function) for _ in range(layers))
        self.head = nn.Linear(16, 32)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Layer(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.norm = nn.LayerNorm(16)
        self.rate = nn.Parameter(torch.linspace(-1.0, 1.0, 16))
        self.weight = nn.Parameter(torch.randn(16, 16) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.ops.own_operators.decay(self.norm(x), self.rate)
        return x + self.function.apply(gated(x, self.weight, power=1.5), 64)
