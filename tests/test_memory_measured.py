"""Predicted bytes against the allocator's, for emitted code with FSDP2: one of two data ranks, collectives faked.

Within 1 %, for every ZeRO level, for blocks of which all, some or nothing runs again, and for experts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

import autopar
from autopar.codegen.emit import emit
from autopar.models import model_graph
from autopar.solver.search import search

MEASURE = """
import json
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

import module
import train
from proof.fused import fused_rms_norm
from runtime import launch, parameters

dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
mesh, fsdp_mesh, device = launch.start(train.MESH, train.FSDP, "cpu")
step = train.parallelize(mesh, fsdp_mesh, device)
parameters.initialise(step.stage, module.init_parameter, 0, module.TIED)
optimizer = torch.optim.AdamW(step.stage.parameters(), lr=1e-3)
ids = torch.zeros(train.MICRO_BATCH * train.MICRO_BATCHES, train.SEQ_LEN, dtype=torch.int64)
fused = fused_rms_norm()
fused.__enter__()
step.forward_backward(train.make_batch(ids))
optimizer.step()
optimizer.zero_grad()
local = lambda t: (t.to_local() if hasattr(t, "to_local") else t).nbytes
held = sum(map(local, step.stage.parameters()))
held += sum(local(value) for state in optimizer.state.values() for value in state.values())
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
    step.forward_backward(train.make_batch(ids))
found.export_chrome_trace("trace.json")
events = [event for event in json.load(open("trace.json"))["traceEvents"] if event.get("name") == "[memory]"]
json.dump(held + max(event["args"]["Total Allocated"] for event in events), open("peak.json", "w"))
"""


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=16384,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=3, n_head=4, vocab_size=8192, n_positions=64, **none))


def mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=8192,
        max_position_embeddings=64,
    )
    return MixtralForCausalLM(config)


@pytest.mark.parametrize(
    ("model", "zero", "recompute"),
    [
        *((llama, zero, "none") for zero in range(4)),
        (llama, 3, "full"),
        (llama, 2, "selective(matmul+attention)"),
        (gpt2, 1, "selective(attention)"),
        (mixtral, 3, "none"),
        (mixtral, 1, "full"),
    ],
)
def test_prediction_is_what_the_allocator_sees(
    tmp_path: Path, model: Callable[[], PreTrainedModel], zero: int, recompute: str
) -> None:
    freed = {"reshard": "true"} if zero == 3 else {}
    predicted, measured = bytes_of(tmp_path, model, {"zero": zero, "recompute": recompute, **freed})
    assert predicted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("model", [llama, mixtral])
def test_where_all_blocks_stay_gathered_little_less_is_predicted(
    tmp_path: Path, model: Callable[[], PreTrainedModel]
) -> None:
    """Within 0.1 % on ranks of their own (`proof.memory`); here, in a faked group, half of what the root group gathers
    stands beside."""
    predicted, measured = bytes_of(tmp_path, model, {"zero": 3, "recompute": "none", "reshard": "false"})
    assert 0.94 * measured <= predicted <= 1.01 * measured


def bytes_of(tmp_path: Path, model: Callable[[], PreTrainedModel], fix: dict[str, object]) -> tuple[int, int]:
    """Predicted and measured, of one of two data ranks."""
    torch.manual_seed(0)
    graph = model_graph(model())
    job = autopar.Job(global_batch=8, seq_len=64)
    plan = search(graph, job, autopar.Cluster.parse("1x2:h100"), {"dp": 2, "micro_batch": 2, **fix})
    emit(plan, graph, tmp_path)
    (tmp_path / "measure.py").write_text(MEASURE)
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "measure.py"],
        cwd=tmp_path,
        env={**os.environ, **ranks, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (tmp_path / "peak.json").exists(), done.stderr[-2000:]
    measured = json.loads((tmp_path / "peak.json").read_text())
    memory = plan.stages[0].memory
    return sum(nbytes for kind, nbytes in memory.items() if kind != "reserve"), measured
