"""A model with an operator of its own: its sharding rule, the proof of that rule, and a plan that uses it.

    python examples/custom_operator.py

The operator is an exponential moving average along the sequence. autopar cannot know how it may be split; one line says
so. The other piece is an autograd Function (a rounding that lets gradients through): tracing would lose its backward,
so it is made a leaf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import autopar

WIDTH, VOCABULARY, LAYERS = 64, 256, 4


@torch.library.custom_op("example::average", mutates_args=())
def average(x: Tensor, keep: Tensor) -> Tensor:
    """``y[t] = keep * y[t-1] + (1 - keep) * x[t]``; x [b, s, d], keep [d]."""
    return _average(x, keep)


def _average(x: Tensor, keep: Tensor) -> Tensor:
    states = [(1 - keep) * x[:, 0]]
    for t in range(1, x.shape[1]):
        states.append(keep * states[-1] + (1 - keep) * x[:, t])
    return torch.stack(states, 1)


@average.register_fake
def _(x: Tensor, keep: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x, keep = (value.detach().requires_grad_() for value in ctx.saved_tensors)
        return torch.autograd.grad(_average(x, keep), (x, keep), grad)


average.register_autograd(_backward, setup_context=_save)

# Samples and channels are averaged apart; positions need the ones before them, so they stay together.
autopar.register_rule("example::average", "b s d, d -> b s d", freeze="s")


class Rounded(torch.autograd.Function):
    """Rounds to 1/64; the gradient passes as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 64).round() / 64

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


autopar.leaf(Rounded, "... -> ...")


class Layer(nn.Module):
    """Averages, then mixes channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.keep = nn.Parameter(torch.linspace(0.1, 0.9, WIDTH))
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.ops.example.average(self.norm(x), self.keep)
        return x + self.down(Rounded.apply(nn.functional.gelu(self.up(mixed))))


class Model(nn.Module):
    """Predicts the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def main() -> None:
    """Prove the rules, plan, prove the plan."""
    x, keep = torch.randn(4, 6, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    print(f"example::average: {autopar.check_rule('example::average', [(x, keep)])} splits proved")
    print(f"Rounded: {autopar.check_rule(Rounded, [(x,)])} splits proved")
    torch.manual_seed(0)
    model = Model()
    job = autopar.Job(global_batch=16, seq_len=32)
    plan = autopar.search(model, job, autopar.Cluster.parse("1x4:h100"), fix={"dp": 2, "tp": 2})
    print(plan)
    print(autopar.verify(plan, model))


if __name__ == "__main__":
    main()
