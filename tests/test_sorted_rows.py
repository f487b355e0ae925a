"""Tokens sorted by the expert they chose, for experts that each take their neighbours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_odd_models import SAMPLE, WIDTH, proved, square
from torch import Tensor, nn

from autopar.errors import UnsupportedError
from autopar.graph.expert_loops import NOTE
from autopar.graph.trace import trace


class Sorted(nn.Module):
    """A mixture of 4 experts, 2 for each token; ``mixes``: subtracts from each row that before it, once sorted."""

    def __init__(self, mixes: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, 4)
        self.first = nn.Parameter(torch.randn(4, 2 * WIDTH, WIDTH) / 3)
        self.second = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 3)
        self.mixes = mixes

    def experts(self, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        parts = rows.split(counts, dim=0)
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weights, strict=True)], dim=0)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        scores, chosen = self.router(tokens).topk(2, dim=1)
        zeros = torch.zeros([tokens.shape[0], 4], dtype=tokens.dtype, device=tokens.device)
        counts = zeros.scatter(1, chosen, 1).long().sum(0).tolist()
        _, order = chosen.flatten().sort(0)
        origin = order.div(2, rounding_mode="trunc")
        rows = tokens[origin]
        if self.mixes:
            rows = rows - rows.roll(1, 0)
        gate, up = self.experts(rows, self.first, counts).chunk(2, dim=-1)
        rows = self.experts(F.silu(gate) * up, self.second, counts)
        rows = rows * torch.softmax(scores, 1).flatten()[order][:, None]
        return torch.zeros_like(tokens).index_add(0, origin, rows).view(x.shape)


@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2}])
def test_what_is_sorted_by_expert_is_computed_in_its_own_order(fix: dict[str, int]) -> None:
    assert proved(Sorted(), {**SAMPLE, "x": torch.randn(SAMPLE["x"].shape)}, square, **fix).notes == (NOTE,)


def test_sorted_rows_that_are_mixed_are_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"the model \(Sorted.forward, .*: .* sizes in split, .* act on rows alone"
    ):
        trace(Sorted(mixes=True), SAMPLE, square)
