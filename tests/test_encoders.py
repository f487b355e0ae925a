"""BERT and T5: traced, as chains of blocks; their emitted modules against the single device, on stages and on axes."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from plain_plans import plain_plan, small_bert, small_t5
from torch import Tensor, nn
from traced import own_loss, worst_error

import autopar
from autopar.codegen.emit_module import module_source
from autopar.graph.ir import ModelGraph, Source
from autopar.job import Job
from autopar.models import model_graph

IDS = torch.zeros(24, dtype=torch.int64)
JOB = Job(global_batch=6, seq_len=16, dtype="fp64")


@cache
def bert_graph() -> ModelGraph:
    return model_graph(small_bert())


@cache
def t5_graph() -> ModelGraph:
    return model_graph(small_t5())


def kinds_of(graph: ModelGraph) -> list[str]:
    return [block.kind for block in graph.blocks]


def ops(graph: ModelGraph, kind: str) -> list[str]:
    return [node.op for node in graph.kinds[kind].graph.of("op")]


def tokens(keys: str = "input_ids labels") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch = {key: torch.randint(256, (3, 16), generator=generator) for key in keys.split()}
    batch["labels"][:, 2:9] = -100
    if "attention_mask" in batch:
        batch["attention_mask"] = (torch.arange(16) < torch.tensor([[16], [11], [5]])).long()
    if "token_type_ids" in batch:
        batch["token_type_ids"] %= 2
    return batch


def error(graph: ModelGraph, model: nn.Module, batch: dict[str, Tensor]) -> float:
    model = model.double()
    unused = [parameter for name, parameter in model.named_parameters() if name not in graph.parameters]
    assert not unused
    return worst_error(graph, model, batch, own_loss(model, batch))


def test_bert_is_a_chain_of_unmasked_layers():
    graph = bert_graph()
    assert kinds_of(graph) == ["Prologue", *["BertLayer"] * 4, "Epilogue"]
    attention = next(node for node in graph.kinds["BertLayer"].graph.of("op") if "attention" in node.op)
    assert attention.kwargs == {}, "no mask, not causal"
    assert ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight") in graph.tied
    assert ("cls.predictions.bias", "cls.predictions.decoder.bias") in graph.tied
    # Absent token types and positions are tables without a batch dim.
    assert all(str(node.meta.shape[0]) != "b" for node in graph.constants.of("op"))
    assert error(graph, small_bert(), tokens()) < 1e-10


def test_bert_reads_its_mask_in_every_layer():
    keys = "input_ids attention_mask token_type_ids labels"
    graph = model_graph(small_bert(), inputs=dict.fromkeys(keys.split(), IDS))
    assert kinds_of(graph) == ["Prologue", *["BertLayer"] * 4, "Epilogue"]
    assert all(Source("batch", key="attention_mask") in block.inputs.values() for block in graph.blocks[1:5])
    mask = next(node for node in graph.kinds["BertLayer"].graph.of("op") if "attention" in node.op).kwargs["attn_mask"]
    assert str(graph.kinds["BertLayer"].graph.nodes[mask.name].meta.shape) == "(b, 1, 1, s)"
    assert error(graph, small_bert(), tokens(keys)) < 1e-10


def test_t5_is_two_stacks_with_a_bridge():
    graph = t5_graph()
    assert kinds_of(graph) == [
        *("Prologue", "T5Block", "T5Block2", "T5Block2", "Middle", "T5Block3", "T5Block4", "T5Block4", "Epilogue")
    ]
    for place, block in enumerate(graph.blocks):
        assert all(source.block == place - 1 for source in block.inputs.values() if source.origin == "block")
    # The position bias and the encoder's output are handed on from layer to layer.
    assert [len(graph.kinds[kind].graph.outputs) for kind in kinds_of(graph)] == [1, 2, 2, 2, 2, 3, 3, 3, 1]
    assert ops(graph, "T5Block2").count("aten.rms_norm") == 2
    assert ops(graph, "Middle") == [
        *("aten.rms_norm", "aten.slice", "aten.pad", "aten.eq", "aten.masked_fill", "aten.embedding")
    ]
    assert graph.max_seq is None, "distances are counted in buckets: no length is too long"
    assert error(graph, small_t5(), tokens()) < 1e-10


@pytest.mark.parametrize("gated", [False, True])
def test_t5_variants_compute_the_same(gated):
    model = small_t5(gated=gated, tied=False)
    assert error(model_graph(model), model, tokens()) < 1e-10


@pytest.mark.parametrize("pp", [1, 2, 3])
@pytest.mark.parametrize("model", [small_bert, small_t5])
def test_stages_compute_the_single_device(model, pp):
    graph = bert_graph() if model is small_bert else t5_graph()
    report = autopar.verify(plain_plan(graph, pp=pp, dp=2, job=Job(8, 16, "fp64")), model())
    assert max(report.loss_error, report.worst[1]) < 1e-12


def test_t5_forward_reads_as_two_loops():
    text = module_source(plain_plan(t5_graph(), pp=2, job=JOB), t5_graph())
    assert "for i, block in self.encoder.block.items():" in text
    assert "for i, block in self.decoder.block.items():" in text
    assert "def forward(self, *flow: Tensor, input_ids: Tensor, labels: Tensor)" in text


@pytest.mark.parametrize("model", [small_bert, small_t5])
def test_tensor_parallel_computes_the_single_device(model):
    cluster = autopar.Cluster.parse("1x2:h100")
    fix = {"tp": 2, "pp": 1, "dp": 1, "micro_batch": 4, "zero": 0, "recompute": "none"}
    plan = autopar.search(model(), Job(4, 16, "bf16"), cluster, fix=fix)
    used = {
        strategy
        for candidate in plan.candidates.values()
        for strategies in candidate.decision.strategies.values()
        for strategy in strategies.values()
    }
    assert {str(strategy) for strategy in used} - {"R", "I"}, "something is split"
    report = autopar.verify(plan, model())
    assert max(report.loss_error, report.worst[1]) < 1e-12
