"""Phi-3: one projection for queries, keys and values of unequal widths, and rotary embeddings of the whole head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain_plans import plain_plan
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

import autopar
from autopar.codegen.emit_module import module_source
from autopar.graph.trace import trace

CLUSTER = autopar.Cluster.parse("1x2:h100")
JOB = autopar.Job(4, 16, "bf16")


def phi3() -> Phi3ForCausalLM:
    torch.manual_seed(0)
    config = Phi3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
    )
    return Phi3ForCausalLM(config)


def test_what_the_rotary_embedding_leaves_of_a_head_is_nothing() -> None:
    graph = trace(phi3()).kinds["Phi3DecoderLayer"].graph
    assert all(0 not in node.meta.shape for node in graph.nodes.values())
    attention = next(node for node in graph.of("op") if "attention" in node.op)
    assert [graph.nodes[name].op for name in attention.operands()[:2]] == ["autopar.rotary"] * 2


@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2}, {"tp": 2, "sp": True}, {"cp": 2}], ids=str)
def test_fused_projections_compute_the_single_device(fix: dict[str, int | bool]) -> None:
    plan = autopar.search(phi3(), JOB, CLUSTER, fix={**fix, "micro_batch": 2, "pp": 1})
    report = autopar.verify(plan, phi3())
    assert max(report.loss_error, report.worst[1]) < 1e-12


class EmptySlice(nn.Module):
    """Adds the sum of no features; joins a part without features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = torch.cat((x[..., 8:], x + x[..., 4:4].sum(-1, keepdim=True), x[..., :0]), -1)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_slices_of_nothing_are_written() -> None:
    graph = trace(EmptySlice())
    assert "x[:, :, 4:4]" in module_source(plain_plan(graph), graph).replace("embed[", "x[")
    report = autopar.verify(plain_plan(graph), EmptySlice())
    assert max(report.loss_error, report.worst[1]) < 1e-12
