"""The models of the proof: tiny ones of four families, with what makes plans hard (tied, frozen, uneven) as options."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import transformers
from torch import Tensor, nn

from autopar.graph.interpret import keep_wide
from autopar.graph.ir import ModelGraph
from autopar.models import model_graph

SEQ = 16
"""Tokens of a sequence: eight chunks for four context ranks in balanced order."""

WIDTH, HEADS, KV_HEADS, FEED = 32, 8, 2, 48


@dataclass(frozen=True, slots=True)
class Variant:
    """One model: ``family`` of `FAMILIES`; ``tied`` input and output embeddings; ``vocab`` rows of them (a prime number
    divides by no axis); ``frozen``: "none", "embedding", or "half": the parameters of the first layers; ``layers``."""

    family: str = "llama"
    tied: bool = False
    vocab: int = 64
    frozen: str = "none"
    layers: int = 4

    @property
    def blocks(self) -> int:
        """Blocks of the traced model: its layers and its two ends, of T5 also what is between encoder and decoder."""
        return self.layers + (3 if self.family == "t5" else 2)


def _llama(variant: Variant) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=FEED,
            num_hidden_layers=variant.layers,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            vocab_size=variant.vocab,
            max_position_embeddings=SEQ,
            tie_word_embeddings=variant.tied,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _gpt2(variant: Variant) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=WIDTH,
            n_inner=FEED,
            n_layer=variant.layers,
            n_head=HEADS,
            vocab_size=variant.vocab,
            n_positions=SEQ,
            tie_word_embeddings=variant.tied,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _bert(variant: Variant) -> nn.Module:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            hidden_size=WIDTH,
            intermediate_size=FEED,
            num_hidden_layers=variant.layers,
            num_attention_heads=HEADS,
            vocab_size=variant.vocab,
            max_position_embeddings=2 * SEQ,
            tie_word_embeddings=variant.tied,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _t5(variant: Variant) -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=WIDTH,
            d_kv=WIDTH // HEADS,
            d_ff=FEED,
            num_layers=variant.layers // 2,
            num_decoder_layers=variant.layers - variant.layers // 2,
            num_heads=HEADS,
            vocab_size=variant.vocab,
            tie_word_embeddings=variant.tied,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


FAMILIES = {"llama": _llama, "gpt2": _gpt2, "bert": _bert, "t5": _t5}
"""Llama with grouped heads, GPT-2 and BERT with biases, T5 with an encoder, a decoder and shared position biases."""


def build(variant: Variant) -> nn.Module:
    """The model in float32, seeded; biases and norms are not at their initial zeros and ones."""
    torch.manual_seed(0)
    model = FAMILIES[variant.family](variant)
    model.config.use_cache = False
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0.0, 0.02)
            elif weight.ndim == 1:
                weight.add_(torch.randn(weight.shape) * 0.1)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not _frozen(variant, name))
    return model


def _frozen(variant: Variant, name: str) -> bool:
    if variant.frozen == "embedding":
        return any(part in name for part in ("embed", "wte", "wpe", "shared"))
    parts = [part for part in name.split(".") if part.isdigit()]
    return variant.frozen == "half" and bool(parts) and int(parts[0]) < 2


@cache
def graph_of(variant: Variant) -> ModelGraph:
    """The traced model."""
    return model_graph(build(variant))


def batches(variant: Variant, samples: int, steps: int = 3) -> list[dict[str, Tensor]]:
    """Token ids and labels [samples, SEQ] for each step; some targets do not count, unevenly over samples."""
    ids = torch.randint(0, variant.vocab, (steps, samples, SEQ), generator=torch.Generator().manual_seed(1))
    labels = ids.clone() if variant.family != "t5" else ids.flip(2).clone()
    labels[:, 0, 3:9] = -100
    labels[:, samples // 2, 5:] = -100
    return [{"input_ids": i, "labels": l} for i, l in zip(ids, labels, strict=True)]


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's own loss; nothing of a float64 model runs in float32."""
    double = next(model.parameters()).dtype == torch.float64
    with keep_wide() if double else nullcontext():
        return model(**batch).loss  # type: ignore[no-any-return]
