"""Plans without a model axis, written by hand: for tests of emitted folders that need no search."""

from __future__ import annotations

from typing import TypeVar

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from autopar.cluster import Cluster
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.plan import Candidate, Mesh, Plan, Predicted, Run, Stage
from autopar.sharding.decision import BlockDecision
from autopar.sharding.layout import Layout

Model = TypeVar("Model", bound=torch.nn.Module)


def small_llama(tied: bool = False) -> LlamaForCausalLM:
    """Four layers, 8 heads on 4 key-value heads; seeded float32 weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=256,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def small_gpt2() -> GPT2LMHeadModel:
    """Four layers with biases and tied embeddings; seeded float32 weights, biases too."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64,
        n_layer=4,
        n_head=4,
        vocab_size=256,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _with_biases(GPT2LMHeadModel(config))


def _with_biases(model: Model) -> Model:
    """Biases start as zeros, which hides a bias added twice: draw them."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0.0, 0.02)
    return model


def small_bert() -> BertForMaskedLM:
    """Four encoder layers, masked-LM head tied to the embedding; seeded float32 weights, biases too."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=256,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _with_biases(BertForMaskedLM(config))


def small_t5(gated: bool = False, tied: bool = True) -> T5ForConditionalGeneration:
    """Three encoder and three decoder layers; seeded float32 weights. ``gated``: as in T5 v1.1."""
    torch.manual_seed(0)
    config = T5Config(
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=3,
        num_heads=4,
        vocab_size=256,
        dropout_rate=0.0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def plain_plan(
    graph: ModelGraph,
    pp: int = 1,
    dp: int = 1,
    zero: int = 0,
    recompute: str = "none",
    micro_batches: int = 1,
    job: Job | None = None,
    cluster: str | None = None,
) -> Plan:
    """Blocks dealt out evenly to ``pp`` stages; every operator runs whole."""
    job = job or Job(global_batch=8, seq_len=16, dtype="fp64")
    candidates = {}
    for kind in graph.kinds.values():
        nodes = kind.graph.nodes.values()
        decision = BlockDecision(
            kind=kind.name,
            axes={},
            inputs={node.name: Layout() for node in nodes if node.kind != "op"},
            strategies={node.name: {} for node in nodes if node.kind == "op"},
            conversions=(),
            outputs={name: Layout() for name in kind.graph.outputs},
        )
        recomputed = recompute if kind.name not in ("Prologue", "Epilogue") else "none"
        candidates[kind.name] = Candidate(kind.name, decision, recomputed, 0.01, 0.02, 0.0, 0, 0, 0, 0)
    layers, stages = len(graph.blocks) - 2, []
    for stage in range(pp):
        start = 0 if stage == 0 else 1 + layers * stage // pp
        stop = len(graph.blocks) if stage == pp - 1 else 1 + layers * (stage + 1) // pp
        runs = tuple(Run(block, block + 1, graph.blocks[block].kind) for block in range(start, stop))
        stages.append(Stage(runs, 0.01, 0.02, 0.0, {}))
    return Plan(
        model=graph.name,
        fingerprint=graph.fingerprint(),
        cluster=Cluster.parse(cluster or f"1x{pp * dp}:h100"),
        job=job,
        mesh=Mesh(pp, dp, 1),
        micro_batch=job.global_batch // dp // micro_batches,
        micro_batches=micro_batches,
        schedule="1f1b" if pp > 1 else "none",
        zero=zero,
        candidates=candidates,
        stages=tuple(stages),
        predicted=Predicted(0.1, 1000.0, 0.1, (0.09, 0.11), {"compute": 0.1}),
        bound=0.1,
        gap=0.0,
        status="optimal",
    )
