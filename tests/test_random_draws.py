"""Numbers that a model draws beside dropout: emitted code draws them, and proofs compare their middle."""

from __future__ import annotations

import pytest
import torch
from test_dropout import Axis
from torch import Tensor, nn

import autopar
from autopar.codegen.emit_module import module_source
from autopar.codegen.runtime.random_numbers import normal, uniform
from autopar.codegen.verify import verify
from autopar.errors import UnsupportedError
from autopar.graph.trace import trace

WIDTH, SEQ = 8, 6
SAMPLE = {
    "x": torch.randn(SEQ, WIDTH, generator=torch.Generator().manual_seed(1)),
    "ids": torch.zeros(SEQ, dtype=torch.int64),
}


def square(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return outputs.float().square().mean()


class Noisy(nn.Module):
    """A scale for all, noise for each element, and an order drawn for each sample (as masked autoencoders do)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x * torch.empty(1, device=x.device).uniform_(0.5, 2.5).to(x.dtype)
        x = x + 0.1 * torch.randn_like(x)
        noise = torch.rand(x.shape[:2], device=x.device)
        values, order = torch.sort(noise, dim=1)
        x = torch.gather(x, 1, order.unsqueeze(-1).expand(-1, -1, WIDTH))
        return torch.tanh(self.second(x)) * values.unsqueeze(-1).to(x.dtype)


@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2}])
def test_a_model_that_draws_is_planned_and_proved_with_the_middle(fix: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = Noisy()
    plan = autopar.search(
        model, autopar.Job(4, SEQ), autopar.Cluster.parse("1x2:h100"), inputs=SAMPLE, loss=square, fix=fix
    )
    report = verify(plan, model, SAMPLE, loss=square)
    assert report.worst[1] < 1e-10
    assert report.dropout_off
    source = module_source(plan, trace(model, SAMPLE, square))
    assert "from runtime.random_numbers import normal, uniform" in source
    assert "uniform(full, 0.5, 2.5, self.training)" in source


def test_ranks_that_split_a_tensor_draw_their_own_and_others_the_same() -> None:
    def drawn(rank: int | None) -> Tensor:
        torch.manual_seed(3)
        return uniform(torch.zeros(1000), 2.0, 4.0, True, None if rank is None else Axis(rank))

    assert torch.equal(drawn(None), drawn(None))
    assert torch.equal(drawn(1), drawn(1))
    assert (drawn(0) - drawn(1)).abs().mean() > 0.3
    assert drawn(0).min() >= 2.0
    assert drawn(0).max() < 4.0
    assert drawn(0).mean() == pytest.approx(3.0, abs=0.1)
    noise = normal(torch.zeros(4000), 1.0, 2.0, True)
    assert (noise.mean(), noise.std()) == (pytest.approx(1.0, abs=0.2), pytest.approx(2.0, abs=0.2))
    assert torch.equal(uniform(torch.zeros(3), 2.0, 4.0, False), torch.full((3,), 3.0))
    assert torch.equal(normal(torch.zeros(3), 1.0, 2.0, False), torch.ones(3))


def test_orders_drawn_are_refused_by_name() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[:, torch.randperm(x.shape[1])]  # type: ignore[no-any-return]

    with pytest.raises(UnsupportedError, match=r"draws random numbers \(aten.randperm\)"):
        trace(Shuffled(), SAMPLE, square)


class Scaled(nn.Module):
    """Evaluated, scales by what dropout keeps in training: another program than training with nothing dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return nn.functional.dropout(x, 0.2) if self.training else x * 0.8


def test_what_is_compared_with_dropout_off_is_the_training_step() -> None:
    torch.manual_seed(0)
    model = Scaled()
    cluster = autopar.Cluster.parse("1x2:h100")
    plan = autopar.search(model, autopar.Job(4, SEQ), cluster, inputs=SAMPLE, loss=square, fix={"dp": 2})
    assert verify(plan, model, SAMPLE, loss=square).worst[1] < 1e-10
