"""What is handed over in place of a plain module, or with it: one clear error that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar

JOB, CLUSTER = autopar.Job(4, 6), autopar.Cluster.parse("1x2:h100")
INPUTS = {"x": torch.zeros(6)}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().mean()


def frozen() -> nn.Module:
    return Plain().requires_grad_(False)


def lazy() -> nn.Module:
    model = Plain()
    model.layer = nn.LazyLinear(6)  # type: ignore[assignment]
    return model


def spectral() -> nn.Module:
    model = Plain()
    nn.utils.parametrizations.spectral_norm(model.layer)
    return model


def compiled() -> nn.Module:
    model = Plain()
    model.layer = torch.compile(model.layer)  # type: ignore[assignment]
    return model


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # of torch's own compiler
def test_a_compiled_module_is_taken_as_it_is_written() -> None:
    torch.manual_seed(0)
    model = compiled()
    plan = autopar.search(model, JOB, CLUSTER, INPUTS, fix={"dp": 2})
    assert autopar.verify(plan, model, INPUTS).worst[1] < 1e-10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.DataParallel(Plain()), "the model is wrapped in DataParallel: hand over the plain module"),
        (lambda: nn.Sequential(nn.DataParallel(Plain())), "module '0' is wrapped in DataParallel"),
        (spectral, "module 'layer' has a spectral norm, whose vectors change in every forward"),
        (frozen, "no parameter of Plain trains"),
        (lazy, r"parameter layer\.weight has no shape yet"),
    ],
)
def test_such_modules_are_refused(make: Any, message: str) -> None:
    with pytest.raises(autopar.BadInputError, match=message):
        autopar.search(make(), JOB, CLUSTER, INPUTS)


def test_a_loss_that_fails_is_told_of() -> None:
    def loss(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return batch["y"].mean()

    with pytest.raises(autopar.BadInputError, match=r"loss\(outputs, batch\) fails with KeyError: 'y'; .* batch has x"):
        autopar.search(Plain(), JOB, CLUSTER, INPUTS, loss)


def test_wrong_shapes_are_told_with_what_was_traced() -> None:
    with pytest.raises(autopar.UnsupportedError, match=r"traced with x \[b, 5\]: inputs are of one sample"):
        autopar.search(Plain(), JOB, CLUSTER, {"x": torch.zeros(5)})


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    plan = autopar.search(Plain(), JOB, CLUSTER, INPUTS)
    for place in ("/proc/out", "/proc/deep/out"):
        with pytest.raises(autopar.BadInputError, match=f"cannot write the folder {place}"):
            autopar.emit(plan, Plain(), place, INPUTS)
    with pytest.raises(autopar.BadInputError, match=r"cannot write /proc/plan\.json: No such file"):
        plan.save("/proc/plan.json")


def test_what_is_refused_in_a_module_says_in_which() -> None:
    class OneWay(torch.autograd.Function):
        """Its backward is not that of its forward; emitted code cannot import it."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return OneWay.apply(x)  # type: ignore[no-any-return]

    model = Plain()
    model.layer = nn.Sequential(nn.Linear(6, 6), Inner())  # type: ignore[assignment]
    refused = (
        r"OneWay is a torch.autograd.Function .*autopar.leaf\(.*OneWay.* \(in module 'layer.1' \(Inner, .*py:\d+\)\)"
    )
    with pytest.raises(autopar.UnsupportedError, match=refused):
        autopar.search(model, JOB, CLUSTER, inputs=INPUTS)
