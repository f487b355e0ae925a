"""A mixture of experts of ten trillion parameters, for the search alone: no such model has been published."""

from __future__ import annotations

import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM


def ten_trillion() -> nn.Module:
    """DeepSeek-V3's architecture at twice its width and layers, with as many experts, twice as wide; on meta."""
    config = DeepseekV3Config(
        hidden_size=14336,
        intermediate_size=36864,
        moe_intermediate_size=7424,
        num_hidden_layers=125,
        num_attention_heads=256,
        num_key_value_heads=256,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        first_k_dense_replace=3,
        vocab_size=131072,
        max_position_embeddings=8192,
        use_cache=False,
    )
    with torch.device("meta"):
        return DeepseekV3ForCausalLM(config)
