"""Copies of one weight on several pipeline stages, on real ranks: gradients summed, whatever each copy's layout."""

from __future__ import annotations

from pathlib import Path

from autopar.codegen.prove import run_ranks

SCRIPT = """
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from autopar.codegen.runtime.clipping import clip_gradients
from autopar.codegen.runtime.launch import start, stop
from autopar.codegen.runtime.parameters import fill
from autopar.codegen.runtime.tied import TiedWeights

torch.set_num_threads(1)
mesh, _, device = start({"pp": 2, "dp": 1, "cp": 1, "tp": 2}, 1, "cpu")
pp, tp = mesh["pp"].get_local_rank(), mesh["tp"]
TIED = (("embed", "head"),)
for first, second in ((Shard(0), Shard(0)), (Shard(0), Shard(1)), (Replicate(), Shard(1))):
    stage = nn.Module()
    name = ("embed", "head")[pp]
    weight = distribute_tensor(torch.zeros(6, 4, dtype=torch.float64), tp, [(first, second)[pp]])
    stage.register_parameter(name, nn.Parameter(weight))
    own = distribute_tensor(torch.full((3,), 2.0, dtype=torch.float64), tp, [Replicate()])
    stage.own = nn.Parameter(own)
    value = torch.arange(24.0, dtype=torch.float64).reshape(6, 4)
    fill(stage, lambda name, shape: value if name == "embed" else torch.zeros(shape), TIED)
    assert torch.equal(stage.get_parameter(name).full_tensor(), value)

    gradients = [value * 0.5, value.flip(0) ** 2]
    total = gradients[0] + gradients[1]
    copy = stage.get_parameter(name)
    copy.grad = distribute_tensor(gradients[pp], tp, copy.placements)
    stage.own.grad = distribute_tensor(torch.full((3,), 1.0 + pp, dtype=torch.float64), tp, [Replicate()])
    tied = TiedWeights({pp: stage}, TIED, mesh)
    tied.add_gradients()
    assert torch.equal(copy.grad.full_tensor(), total)
    assert tied.not_counted == ({id(copy)} if pp == 1 else set())

    right = torch.cat([total.flatten(), torch.ones(3).double(), torch.full((3,), 2.0).double()]).norm()
    norm = clip_gradients(stage.parameters(), 1.0, mesh, tied.not_counted)
    torch.testing.assert_close(norm, right, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(copy.grad.full_tensor(), total / (right + 1e-6), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(clip_gradients(stage.parameters(), None, mesh, tied.not_counted).item(), 1.0)

# A V: the ends of the model are both on rank 0, each with a copy; rank 1 has none.
stages = {}
for index in (0, 3) if pp == 0 else (1, 2):
    stages[index] = nn.Module()
    weight = distribute_tensor(torch.zeros(6, 4, dtype=torch.float64), tp, [Shard(int(index == 3))])
    name = {0: "embed", 3: "head"}.get(index, f"own{index}")
    stages[index].register_parameter(name, nn.Parameter(weight))
    weight.grad = None
    copy = stages[index].get_parameter(name)
    copy.grad = distribute_tensor(value if index in (0, 3) else torch.zeros_like(value), tp, copy.placements)
tied = TiedWeights(stages, TIED, mesh)
tied.add_gradients()
weights = [stage.get_parameter(name) for stage in stages.values() for name, _ in stage.named_parameters()]
if pp == 0:
    assert all(torch.equal(weight.grad.full_tensor(), 2 * value) for weight in weights)
    assert tied.not_counted == {id(weights[1])}
norm = clip_gradients(weights, None, mesh, tied.not_counted)
torch.testing.assert_close(norm, (2 * value).norm(), rtol=1e-14, atol=0.0)
print("agreed")
stop()
"""


def test_copies_add_up_and_count_once(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    assert run_ranks(["script.py"], 4, 600, folder=tmp_path).count("agreed") == 4
