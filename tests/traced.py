"""Small models, and the comparison of a traced graph with the model it came from."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from autopar.graph.interpret import keep_wide, run_model
from autopar.graph.ir import ModelGraph
from autopar.models import model_graph

VOCABULARY = 128


def llama(layers: int = 3, device: str = "meta", **changes: object) -> LlamaForCausalLM:
    """8 query heads on 2 key-value heads."""
    config = LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "num_hidden_layers": layers,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            **changes,
        }
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config)


def gpt2(layers: int = 3, device: str = "meta", dropout: float = 0.0) -> GPT2LMHeadModel:
    """Biases, tied embeddings, learned positions."""
    config = GPT2Config(
        n_embd=32,
        n_head=4,
        n_layer=layers,
        vocab_size=VOCABULARY,
        n_positions=64,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    torch.manual_seed(0)
    with torch.device(device):
        return GPT2LMHeadModel(config)


@cache
def llama_graph() -> ModelGraph:
    """`llama()` traced, once per session."""
    return model_graph(llama())


@cache
def gpt2_graph() -> ModelGraph:
    """`gpt2()` traced, once per session."""
    return model_graph(gpt2())


def token_batch(samples: int, positions: int, seed: int = 1) -> dict[str, Tensor]:
    """Token ids and labels, some of them -100."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (samples, positions), generator=generator)
    labels = ids.clone()
    labels[:, 2:5] = -100
    labels[0, -1] = -100
    return {"input_ids": ids, "labels": labels}


def worst_error(graph: ModelGraph, model: nn.Module, batch: dict[str, Tensor], loss: Tensor) -> float:
    """Largest error (DESIGN's measure) of loss and gradients of ``graph`` against ``loss`` of the float64 ``model``."""
    named = dict(model.named_parameters())
    reference = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    state = {name: tensor.detach().clone().requires_grad_() for name, tensor in named.items()}
    total, count = run_model(graph, state, batch, torch.float64)
    found = torch.autograd.grad(total / count, list(state.values()))
    scale = 1e-3 * sum(float(g.norm()) ** 2 for g in reference.values()) ** 0.5 / len(reference) ** 0.5
    errors = [
        float((gradient - expected).norm()) / max(float(expected.norm()), scale)
        for gradient, expected in zip(found, reference.values(), strict=True)
    ]
    return max(*errors, abs(float((total / count - loss).detach())) / abs(float(loss.detach())))


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The Hugging Face model's own loss, wholly in float64."""
    with keep_wide():
        return model(**batch, use_cache=False).loss
