"""Padded heads: the padded model computes the same loss and gradients, to the last digits of float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from autopar.codegen.compare import gradient_errors
from autopar.graph.interpret import run_model
from autopar.graph.ir import ModelGraph
from autopar.graph.padding import can_pad, padded
from autopar.models import model_graph
from tests.traced import VOCABULARY, llama, token_batch


def gpt2(heads: int = 5, device: str = "meta", longest: int = 64) -> GPT2LMHeadModel:
    """Fused q, k, v with biases."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=8 * heads,
        n_head=heads,
        n_layer=2,
        vocab_size=VOCABULARY,
        n_positions=longest,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    with torch.device(device):
        return GPT2LMHeadModel(config)


def grouped(heads: int = 6, kv: int = 3, longest: int = 64) -> nn.Module:
    """Separate q, k, v, all with biases, rotary positions, grouped queries."""
    return llama(
        2,
        hidden_size=8 * heads,
        head_dim=8,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        attention_bias=True,
        max_position_embeddings=longest,
    )


def phi3() -> nn.Module:
    """One projection for q, k and v, cut into slices."""
    torch.manual_seed(0)
    config = Phi3Config(
        hidden_size=40,
        num_attention_heads=5,
        num_key_value_heads=5,
        num_hidden_layers=2,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        pad_token_id=0,
    )
    with torch.device("meta"):
        return Phi3ForCausalLM(config)


def qwen3() -> nn.Module:
    """Queries and keys normalised head by head."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=48,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=8,
        num_hidden_layers=2,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    with torch.device("meta"):
        return Qwen3ForCausalLM(config)


class Plain(nn.Module):
    """One attention layer of five heads on one projection; ``norm`` mixes heads before they are split."""

    def __init__(self, norm: bool = False, mask: bool = False, reads: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 40)
        self.q, self.k, self.v, self.o = (nn.Linear(40, 40) for _ in range(4))
        self.norm = nn.RMSNorm(40, eps=1e-6) if norm else nn.Identity()
        self.bias = nn.Parameter(torch.zeros(1, 5, 1, 1)) if mask else None
        self.head = nn.Linear(40, VOCABULARY)
        self.reads = reads

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = (y.unflatten(-1, (5, 8)).transpose(1, 2) for y in (self.norm(self.q(x)), self.k(x), self.v(x)))
        mask = None if self.bias is None else self.bias.expand(1, 5, x.shape[1], x.shape[1])
        heads = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o(heads.transpose(1, 2).flatten(2))
        if self.reads:
            x = x + v.transpose(1, 2).flatten(2)
        logits = self.head(x)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@cache
def graph_of(name: str) -> ModelGraph:
    makers = {
        "gpt2": gpt2,
        "6 heads on 3": grouped,
        "6 heads on 2": lambda: grouped(6, 2),
        "6 heads on 1": lambda: grouped(6, 1),
        "9 heads on 3": lambda: grouped(9, 3),
        "phi3": phi3,
        "qwen3": qwen3,
        "plain": Plain,
    }
    with torch.device("meta"):
        return model_graph(makers[name]())


def heads_of(graph: ModelGraph) -> set[tuple[int, int]]:
    """(query heads, key/value heads) of all attentions."""
    found = set()
    for kind in graph.kinds.values():
        for node in kind.graph.of("op"):
            if node.op == "aten.scaled_dot_product_attention":
                query, key = (kind.graph.nodes[name].meta.shape[1] for name in node.operands()[:2])
                found.add((query, key))
    return found


@pytest.mark.parametrize(
    ("name", "ranks", "heads"),
    [
        ("gpt2", 2, (6, 6)),
        ("gpt2", 4, (8, 8)),
        ("6 heads on 3", 4, (8, 4)),
        ("6 heads on 2", 4, (8, 2)),
        ("6 heads on 1", 4, (8, 8)),
        ("9 heads on 3", 2, (12, 4)),
        ("phi3", 2, (6, 6)),
        ("qwen3", 2, (12, 4)),
        ("plain", 4, (8, 8)),
    ],
)
def test_padded_heads_change_neither_loss_nor_gradients(name: str, ranks: int, heads: tuple[int, int]) -> None:
    graph = graph_of(name)
    more = padded(graph, ranks)
    assert heads_of(more) == {heads}
    assert more.parameters == graph.parameters
    assert padded(more, ranks) is more
    state = values(graph)
    loss, gradients = run(graph, state)
    padded_loss, padded_gradients = run(more, state)
    assert abs(padded_loss - loss) <= 1e-15 * abs(loss)
    # The gradient of a bias of keys is zero; what rounding leaves of it, either way, depends on the processor.
    whole = sum(float(gradient.norm()) ** 2 for gradient in gradients.values()) ** 0.5
    zero = {key for key, gradient in gradients.items() if float(gradient.norm()) < 1e-12 * whole}
    assert all(float(padded_gradients[key].norm()) < 1e-15 * whole for key in zero)
    errors = gradient_errors(padded_gradients, gradients, floor=1e-2)
    assert max(error for key, error in errors.items() if key not in zero) <= 1e-15


@pytest.mark.parametrize(("name", "ranks"), [("gpt2", 5), ("6 heads on 3", 2), ("6 heads on 3", 3), ("gpt2", 1)])
def test_heads_that_divide_stay(name: str, ranks: int) -> None:
    """Query groups are heads too: six heads on three are three groups of two."""
    graph = graph_of(name)
    assert padded(graph, ranks) is graph
    assert not can_pad(graph, ranks)


@pytest.mark.parametrize("odd", ["norm", "mask", "reads"])
def test_heads_that_cannot_be_followed_stay(odd: str) -> None:
    """A norm over all heads, a mask for each head, values read elsewhere."""
    graph = model_graph(Plain(**{odd: True}))
    assert padded(graph, 2) is graph


def values(graph: ModelGraph) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {
        name: (torch.randn(meta.at(1, 1), generator=generator, dtype=torch.float64) * 0.3).requires_grad_()
        for name, meta in graph.parameters.items()
    }
    return {**state, **{name: state[group[0]] for group in graph.tied for name in group}}


def run(graph: ModelGraph, state: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    total, _ = run_model(graph, state, token_batch(2, 8), torch.float64)
    gradients = torch.autograd.grad(total, [state[name] for name in graph.parameters])
    return float(total.detach()), dict(zip(graph.parameters, gradients, strict=True))
