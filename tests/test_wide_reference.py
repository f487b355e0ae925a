"""The reference of a proof runs wholly in float64, whatever a model makes or keeps in float32."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

import autopar
from autopar.codegen.verify import verify

WIDTH, SEQ = 8, 6
SAMPLE = {
    "x": torch.randn(SEQ, WIDTH, generator=torch.Generator().manual_seed(1)),
    "ids": torch.zeros(SEQ, dtype=torch.int64),
}


def square(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return outputs.float().square().mean()


@functools.cache
def kept(rows: int) -> Tensor:
    return torch.arange(0.5, rows, dtype=torch.float32) / 7


class Tables(nn.Module):
    """A table made without a dtype, and numbers that a function keeps from an earlier call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        table = torch.zeros(x.shape[1], WIDTH, device=x.device)
        places = torch.arange(x.shape[1], device=x.device).float().unsqueeze(1)
        table[:, 0::2] = torch.sin(places / 3)
        table[:, 1::2] = torch.cos(places / 3)
        angles = 2 * math.pi * kept(WIDTH).to(x.device)
        return self.layer(x + table.to(x.dtype)) * torch.cos(angles).to(x.dtype)  # type: ignore[no-any-return]


def test_tables_made_and_kept_in_float32_are_compared_in_float64() -> None:
    torch.manual_seed(0)
    model = Tables()
    model(torch.zeros(1, SEQ, WIDTH))  # fills the cache with float32
    cluster = autopar.Cluster.parse("1x2:h100")
    plan = autopar.search(model, autopar.Job(4, SEQ), cluster, inputs=SAMPLE, loss=square, fix={"dp": 2})
    report = verify(plan, model, SAMPLE, loss=square)
    assert max(report.loss_error, report.worst[1]) < 1e-12
    assert torch.get_default_dtype() == torch.float32
