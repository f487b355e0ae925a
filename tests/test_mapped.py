"""Functions that are written for one item and mapped over a dim by `torch.vmap`, and other functions of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_odd_models import CLUSTER, ops
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

import autopar
from autopar.errors import UnsupportedError
from autopar.models import model_graph

WIDTH, TOKENS = 8, torch.randint(16, (12,), generator=torch.Generator().manual_seed(0))
BATCH = {"ids": TOKENS, "labels": TOKENS}


class Mapped(nn.Module):
    """A mask by the positions of one query and one key; several maps stacked, each applied by itself; and samples one
    by one, with a table that is the same for all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, 16)
        self.register_buffer("read", torch.rand(24, 24) < 0.8)
        self.maps = nn.Parameter(torch.randn(3, WIDTH, WIDTH))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.table(ids)
        places = torch.arange(ids.shape[1], device=ids.device)
        near = torch.vmap(lambda query: torch.vmap(lambda key: (key <= query) & (query - key < 5))(places))(places)
        with TransformGetItemToIndex():  # as transformers does, for a table read at a place that is mapped
            at, turned = (
                torch.vmap(lambda query, read=read: torch.vmap(lambda key: read[query, key])(places))(places)
                for read in (self.read, self.read.T)
            )
        several = torch.vmap(lambda weight, rows: torch.tanh(rows @ weight), (0, None), out_dims=2)(self.maps, x)
        x = x + several.sum(2)
        seen = nn.functional.scaled_dot_product_attention(x, x, x, near & (at | turned | (places == 0)))
        scored = torch.func.vmap(lambda rows: self.head(rows).log_softmax(-1))(seen)
        return nn.functional.nll_loss(scored.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2}, {"cp": 2}])
def test_what_is_mapped_is_what_it_does_to_all_items(fix: dict[str, Any]) -> None:
    model = Mapped()
    plan = autopar.search(model, autopar.Job(4, 12), CLUSTER, inputs=BATCH, fix={"micro_batch": 2, **fix})
    assert autopar.verify(plan, model, BATCH).worst[1] < 1e-12


def test_nothing_of_the_mapping_is_left() -> None:
    graph = model_graph(Mapped(), BATCH)
    assert not graph.notes
    assert not {op for op in ops(graph) if "batch_dim" in op}


class Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(WIDTH, WIDTH), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (torch.func.grad(lambda y: y.pow(3).sum()), r"a transform of torch\.func .*torch\.autograd\.grad"),
        (lambda y: torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,)), r"calls cond, .*torch\.where of both"),
    ],
)
def test_other_functions_of_functions_are_refused_by_name(function: Callable[[Tensor], Tensor], told: str) -> None:
    with pytest.raises(UnsupportedError, match=told):
        model_graph(Called(function), {"x": torch.randn(6, WIDTH)}, lambda outputs, batch: outputs.square().mean())
