"""Where PyTorch is the reason for a limit: what it says, or does without a word, when the limit is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage
from torch.testing._internal.distributed.fake_pg import FakeStore

from autopar.plan import Mesh
from autopar.schedule import SCHEDULES
from autopar.solver.capabilities import LIMITS, Choice

AVOIDS = {limit.name: limit.avoids for limit in LIMITS}


def schedule(choice: Choice) -> Any:
    """The schedule of `torch.distributed.pipelining` as it would be built on rank 0, with a trivial stage."""
    kind = SCHEDULES[choice.schedule]
    made: Callable[..., Any] = getattr(pipelining, kind.torch_name)
    ranks, count = choice.mesh.pp, choice.mesh.pp * choice.vpp
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        own = [index for index in range(count) if kind.rank_of(index, ranks) == 0]
        stages = [PipelineStage(nn.Linear(2, 2), index, count, torch.device("cpu")) for index in own]
        return made(stages if kind.stages != 1 else stages[0], choice.micro_batches, loss_fn=nn.functional.mse_loss)
    finally:
        dist.destroy_process_group()


def choice(name: str, pp: int, vpp: int, micro_batches: int) -> Choice:
    return Choice(Mesh(pp=pp), name, vpp, micro_batches, 0, 1)


SAYS = {
    "1f1b fills the pipeline": (choice("1f1b", 4, 1, 2), choice("1f1b", 4, 1, 4)),
    "interleaved goes in rounds": (choice("interleaved", 2, 2, 5), choice("interleaved", 2, 2, 4)),
    "dualpipev fills the pipeline": (choice("dualpipev", 2, 2, 3), choice("dualpipev", 2, 2, 4)),
    "stages on a rank": (choice("zbv", 2, 3, 4), choice("zbv", 2, 2, 4)),
}
"""For each limit that PyTorch states itself: a choice just past it, and one just inside."""


@pytest.mark.parametrize("name", SAYS)
def test_torch_says_what_the_limit_quotes(name: str) -> None:
    limit = next(limit for limit in LIMITS if limit.name == name)
    past, inside = SAYS[name]
    assert limit.breaks(past)
    assert not limit.breaks(inside)
    with pytest.raises(ValueError, match=r"\w+") as error:
        schedule(past)
    quoted = AVOIDS[name].partition('"')[2].rpartition('"')[0]
    assert quoted
    assert all(part in str(error.value) for part in quoted.split(" ... "))
    assert schedule(inside) is not None


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"])
def test_limits_refuse_no_more_than_torch(name: str) -> None:
    """For every small number of ranks and micro-batches, the table and the schedule's constructor agree."""
    for ranks in (2, 3, 4):
        for count in range(1, 13):
            made = choice(name, ranks, SCHEDULES[name].stages or 2, count)
            refused = any(limit.breaks(made) for limit in LIMITS)
            try:
                schedule(made)
            except ValueError:
                assert refused, (name, ranks, count)
            else:
                assert not refused, (name, ranks, count)
