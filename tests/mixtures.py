"""Small mixtures of experts, for tests: four of transformers' and one written by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "use_cache": False,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**_GROUPED, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_GROUPED,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {
        **_GROUPED,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "max_position_embeddings": 4096,
    },
}


def mixture(kind: str, **changes: Any) -> nn.Module:
    """A seeded model of transformers; routers are not at their initial zeros."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **{**_COMMON, **CONFIGS[kind], **changes})
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.1)
            elif not name.endswith("norm.weight"):
                weight.normal_(0.0, 0.02)
    return model


class Stacked(nn.Module):
    """Experts as a user may write them: one loop over all, weights [experts, in, out]."""

    def __init__(self, experts: int = 4, width: int = 16, inner: int = 24, twice: bool = False) -> None:
        super().__init__()
        self.rise = nn.Parameter(torch.randn(experts, width, inner))
        self.fall = nn.Parameter(torch.randn(experts, inner, width))
        self.count, self.twice = experts, twice

    def forward(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for expert in range(self.count):
            rows, slot = torch.where(chosen == expert)
            if rows.numel():
                y = F.relu(x[rows] @ self.rise[expert]).square() @ self.fall[expert]
                result[rows] += (2 if self.twice else 1) * y * share[rows, slot].unsqueeze(-1)
        return result


class Below(nn.Module):
    """Experts below one another in three matrices of a child: [experts * inner, width] each; tokens come as [b, s, d]
    with one choice for each of b * s."""

    def __init__(self, experts: int = 4, width: int = 16, inner: int = 24) -> None:
        super().__init__()
        self.held = nn.Module()
        for name in ("down", "gate", "up"):
            setattr(self.held, name, nn.Parameter(torch.randn(experts * inner, width)))
        self.count, self.inner, self.width = experts, inner, width

    def forward(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        rows = x.reshape(-1, self.width)
        result = torch.zeros_like(rows)
        gate, up, down = (
            getattr(self.held, name).view(self.count, self.inner, self.width) for name in ("gate", "up", "down")
        )
        for expert in range(self.count):
            token, slot = torch.where(chosen == expert)
            y = F.gelu(rows[token] @ gate[expert].T) * (rows[token] @ up[expert].T)
            result.index_add_(0, token, y @ down[expert] * share[token, slot].unsqueeze(-1))
        return result.view(x.shape[0], -1, self.width)


class Apart(nn.Module):
    """Gate, values and the way back each in a tensor of its own; the weights come before the choice."""

    def __init__(self, experts: int = 4, width: int = 16, inner: int = 24) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(experts, inner, width))
        self.w2 = nn.Parameter(torch.randn(experts, width, inner))
        self.w3 = nn.Parameter(torch.randn(experts, inner, width))
        self.bias = nn.Parameter(torch.randn(experts, inner))
        self.last, self.other = nn.Parameter(torch.randn(experts, width)), nn.Parameter(torch.randn(experts, inner))

    def forward(self, x: Tensor, share: Tensor, chosen: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for expert in range(len(self.w1)):
            rows, slot = torch.where(chosen == expert)
            gate = F.silu(F.linear(x[rows], self.w1[expert], self.bias[expert]))
            values = F.linear(x[rows], self.w3[expert], self.other[expert])
            y = F.linear(gate * values, self.w2[expert], self.last[expert])
            result.index_add_(0, rows, y * share[rows, slot, None])
        return result


class Beyond(Stacked):
    """Two experts more can be chosen than have matrices, and give back what they are given; one of the two weights is
    there for all the same."""

    def __init__(self, experts: int = 4, width: int = 16, inner: int = 24) -> None:
        super().__init__(experts, width, inner)
        self.fall = nn.Parameter(torch.randn(experts - 2, inner, width))

    def forward(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for expert in range(self.count):
            rows, slot = torch.where(chosen == expert)
            y = x[rows]
            if expert < len(self.fall):
                y = F.relu(y @ self.rise[expert]).square() @ self.fall[expert]
            result.index_add_(0, rows, y * share[rows, slot].unsqueeze(-1))
        return result


class StackedModel(nn.Module):
    """Embedding, blocks of a router and experts, projection and loss."""

    def __init__(self, layers: int = 2, width: int = 16, made: type[nn.Module] = Stacked) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.layers = nn.ModuleList(StackedLayer(width, made) for _ in range(layers))
        self.head = nn.Linear(width, 64, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class StackedLayer(nn.Module):
    def __init__(self, width: int, made: type[nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.router = nn.Linear(width, 4)
        self.experts = made(4, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).reshape(-1, x.shape[-1])
        share, chosen = self.router(tokens).softmax(-1).topk(2)
        given = self.norm(x) if isinstance(self.experts, Below) else tokens
        choice = (share, chosen) if isinstance(self.experts, Apart) else (chosen, share)
        return x + self.experts(given, *choice).view_as(x)
