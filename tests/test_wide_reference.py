"""The reference of a proof runs wholly in float64, whatever a model makes or keeps in float32."""

from __future__ import annotations

import functools
import math

import pytest
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


class Halves(nn.Module):
    """A product that the model itself takes in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x).bfloat16() @ self.weight.to(torch.bfloat16)).type_as(x)


class Grouped(nn.Module):
    """Rows sorted by the expert that is chosen for them, each group times its own matrix in one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weight, chosen = self.gate(rows).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        ends = torch.histc(chosen.float(), bins=4, min=0, max=4).cumsum(0, dtype=torch.int32)
        out = torch._grouped_mm(rows[order].bfloat16(), self.experts.bfloat16(), offs=ends).type_as(rows)
        return torch.zeros_like(rows).index_add(0, order, out * weight[order].unsqueeze(1)).view_as(x)


@pytest.mark.parametrize(("make", "most"), [(Halves, 1e-12), (Grouped, 1e-5)])
def test_what_a_model_casts_to_16_bits_is_compared_as_widely_as_kernels_allow(
    make: type[nn.Module], most: float
) -> None:
    torch.manual_seed(0)
    model, inputs = make(), {"x": SAMPLE["x"]}
    job, cluster = autopar.Job(global_batch=4, seq_len=SEQ), autopar.Cluster.parse("1x2:h100")
    plan = autopar.search(model, job, cluster, fix={"dp": 2, "micro_batch": 2}, inputs=inputs, loss=square)
    report = verify(plan, model, inputs, loss=square)
    assert max(report.loss_error, report.worst[1]) < most
