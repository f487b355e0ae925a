"""`autopar.parallelize` under torchrun: the emitted source, run in the calling process."""

from __future__ import annotations

from pathlib import Path

import pytest
from plain_plans import plain_plan, small_gpt2, small_llama

import autopar
from autopar.codegen.prove import run_ranks
from autopar.models import model_graph

SCRIPT = """
import sys
import torch
import torch.distributed as dist

sys.path.insert(0, {tests!r})
from plain_plans import small_gpt2, small_llama

import autopar

torch.set_num_threads(1)
ids = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
for name, model in (("llama", small_llama()), ("gpt2", small_gpt2())):
    module = autopar.parallelize(model, autopar.Plan.load(name + ".json"))
    step = module.training_step
    right = model(input_ids=ids, labels=ids).loss
    right.backward()
    data_rank = step.mesh["dp"].get_local_rank()
    data_ranks = step.mesh["dp"].size()
    micro_batch = 4 // data_ranks
    rows = [m * 4 + data_rank * micro_batch + place for m in range(2) for place in range(micro_batch)]
    loss = step.forward_backward({{"input_ids": ids[rows], "labels": ids[rows]}})
    assert abs(loss.item() - right.item()) < 1e-6 * right.item(), (loss, right)
    gradients = {{name: weight.grad for name, weight in model.named_parameters()}}
    gradients["lm_head.weight"] = model.lm_head.weight.grad
    for name, weight in module.named_parameters():
        torch.testing.assert_close(weight.grad.full_tensor(), gradients[name], rtol=1e-4, atol=1e-6)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.testing.assert_close(step.clip_gradients(1.0), norm, rtol=1e-5, atol=0.0)
    if step.mesh["pp"].size() == 1:
        module.eval()
        with torch.no_grad():
            loss_sum = module(input_ids=ids, labels=ids)
        torch.testing.assert_close(loss_sum / (8 * 15), right.detach(), rtol=1e-5, atol=0.0)
print("agreed")
dist.barrier()
dist.destroy_process_group()
"""


def test_parallelize_runs_this_ranks_part(tmp_path: Path) -> None:
    job = autopar.Job(global_batch=8, seq_len=16, dtype="fp32")
    plain_plan(model_graph(small_llama()), dp=2, zero=3, micro_batches=2, job=job).save(tmp_path / "llama.json")
    plain_plan(model_graph(small_gpt2()), pp=2, micro_batches=2, job=job).save(tmp_path / "gpt2.json")
    (tmp_path / "script.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    assert run_ranks(["script.py"], 2, 600, folder=tmp_path).count("agreed") == 2


def test_parallelize_says_what_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    model = small_llama()
    plan = plain_plan(model_graph(model), dp=4)
    with pytest.raises(autopar.BadInputError, match=r"needs 4 processes .*torchrun --nproc-per-node 4"):
        autopar.parallelize(model, plan)
    with pytest.raises(autopar.BadInputError, match="fingerprint"):
        autopar.parallelize(small_llama(tied=True), plan)
