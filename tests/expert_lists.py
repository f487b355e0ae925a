"""Mixtures whose experts are a list of modules, each called with the tokens that chose it, as people write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced import VOCABULARY

WIDTH, INNER, EXPERTS, CHOSEN = 16, 24, 4, 2


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.w2 = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class Mixture(nn.Module):
    """A router and its experts; ``forward`` differs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def routed(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = F.softmax(self.gate(flat), -1).topk(CHOSEN)
        return weights / weights.sum(-1, keepdim=True), index


class ByMask(Mixture):
    """A mask of slots and tokens for each expert, results added at the tokens' places."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, WIDTH)
        weights, index = self.routed(flat)
        result = torch.zeros_like(flat)
        mask = F.one_hot(index, EXPERTS).permute(2, 1, 0)
        for number in range(EXPERTS):
            slot, token = torch.where(mask[number])
            picked = flat[None, token].reshape(-1, WIDTH)
            result.index_add_(0, token, self.experts[number](picked) * weights[token, slot, None])
        return result.view_as(x)


class OnlyHit(Mixture):
    """The same, over experts that some token chose."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, WIDTH)
        weights, index = self.routed(flat)
        result = torch.zeros_like(flat)
        mask = F.one_hot(index, EXPERTS).permute(2, 1, 0)
        for number in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[number].squeeze(0))
            result.index_add_(0, token, self.experts[number](flat[token]) * weights[token, slot, None])
        return result.view_as(x)


class Listed(nn.ModuleList):
    """Experts that are a list with a forward of its own, which drops out what they give."""

    def __init__(self) -> None:
        super().__init__(Expert() for _ in range(EXPERTS))
        self.dropout = nn.Dropout(0.1)

    def forward(self, flat: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(flat)
        for number in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[number].squeeze(0))
            given = self[int(number[0])](flat[None, token].reshape(-1, WIDTH))
            result.index_add_(0, token, self.dropout(given) * weights[token, slot, None])
        return result


class OwnForward(Mixture):
    """The list of experts itself is called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Listed()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, WIDTH)
        weights, index = self.routed(flat)
        mask = F.one_hot(index, EXPERTS).permute(2, 1, 0)
        return self.experts(flat, mask, weights).view_as(x)  # type: ignore[no-any-return]


class ByComparison(Mixture):
    """Results added to what indexing takes out."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, WIDTH)
        weights, index = self.routed(flat)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(index == number)
            result[token] += weights[token, slot, None] * expert(flat[token])
        return result.view_as(x)


class ByBooleans(Mixture):
    """Boolean masks, of experts that are in use."""

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.routed(x)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = (index == number).any(-1)
            if mask.any():
                weight = (weights * (index == number)).sum(-1)
                result[mask] = result[mask] + expert(x[mask]) * weight[mask].unsqueeze(-1)
        return result


class OneEach(Mixture):
    """One expert for a token, whose result is written."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, WIDTH)
        weights, index = F.softmax(self.gate(flat), -1).max(-1)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token = (index == number).nonzero().squeeze(-1)
            if token.numel() == 0:
                continue
            result[token] = expert(flat[token]) * weights[token, None]
        return result.view_as(x)


class Centred(Mixture):
    """What no row computes alone: the chosen rows without their mean."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, WIDTH)
        _, index = F.softmax(self.gate(flat), -1).max(-1)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            mask = index == number
            picked = expert(flat[mask])
            result[mask] = picked - picked.mean(0)
        return result.view_as(x)


class EveryToken(Mixture):
    """No choice: a loop that can be traced as it is."""

    def forward(self, x: Tensor) -> Tensor:
        gates = F.softmax(self.gate(x), -1)
        return sum(gates[..., number, None] * expert(x) for number, expert in enumerate(self.experts))  # type: ignore[return-value]


class Layer(nn.Module):
    def __init__(self, mixture: Any) -> None:
        super().__init__()
        self.mixture = mixture()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixture(x)  # type: ignore[no-any-return]


class Model(nn.Module):
    """Two layers of a mixture between an embedding and a head."""

    def __init__(self, mixture: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(mixture) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
