"""The architectures of `make zoo`, small and with random weights.

Each is (transformers config class, its arguments, auto head or None for the bare model). Sizes are small, but what is
hard about an architecture is there: grouped heads, windows shorter than the sequence, layers that differ, odd norms.
"""

from __future__ import annotations

from typing import Any

_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    **_TOKENS,
}

_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}

_TEXT: dict[str, Any] = {**_ENCODER, "vocab_size": 64, "max_position_embeddings": 66, **_TOKENS}
_VISION: dict[str, Any] = {**_ENCODER, "image_size": 16, "patch_size": 4}
_SEQ2SEQ: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    **_TOKENS,
    "decoder_start_token_id": 1,
}

ZOO: dict[str, tuple[str, dict[str, Any], str | None]] = {
    # Dense decoders.
    "llama": ("LlamaConfig", _DECODER, "AutoModelForCausalLM"),
    "mistral": ("MistralConfig", {**_DECODER, "sliding_window": 12}, "AutoModelForCausalLM"),
    "qwen2": ("Qwen2Config", {**_DECODER, "tie_word_embeddings": True}, "AutoModelForCausalLM"),
    "qwen3": ("Qwen3Config", {**_DECODER, "head_dim": 8}, "AutoModelForCausalLM"),
    "gemma2": (
        "Gemma2Config",
        {**_DECODER, "head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 8},
        "AutoModelForCausalLM",
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_DECODER,
            "head_dim": 8,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
        "AutoModelForCausalLM",
    ),
    "phi3": ("Phi3Config", _DECODER, "AutoModelForCausalLM"),
    "olmo2": ("Olmo2Config", _DECODER, "AutoModelForCausalLM"),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 4, "n_head": 8, "vocab_size": 64, "n_positions": 64, **_TOKENS},
        "AutoModelForCausalLM",
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_TEXT, "rotary_pct": 0.5}, "AutoModelForCausalLM"),
    "falcon": (
        "FalconConfig",
        {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 64, **_TOKENS},
        "AutoModelForCausalLM",
    ),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "vocab_size": 64,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
            **_TOKENS,
        },
        "AutoModelForCausalLM",
    ),
    "bloom": (
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 4, "n_head": 8, "vocab_size": 64, **_TOKENS},
        "AutoModelForCausalLM",
    ),
    "gptj": (  # rotary positions by pairs, of a part of each head, from a long table in each layer
        "GPTJConfig",
        {"n_embd": 64, "n_layer": 2, "n_head": 8, "rotary_dim": 4, "vocab_size": 64, "n_positions": 2048, **_TOKENS},
        "AutoModelForCausalLM",
    ),
    "stablelm": ("StableLmConfig", _DECODER, "AutoModelForCausalLM"),
    "bitnet": ("BitNetConfig", _DECODER, "AutoModelForCausalLM"),
    # Experts.
    "mixtral": (
        "MixtralConfig",
        {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
        "AutoModelForCausalLM",
    ),
    "mixtral_balanced": (  # with the router's auxiliary loss
        "MixtralConfig",
        {
            **_DECODER,
            "num_hidden_layers": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.1,
        },
        "AutoModelForCausalLM",
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_DECODER, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "AutoModelForCausalLM",
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_DECODER,
            "num_key_value_heads": 8,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
        "AutoModelForCausalLM",
    ),
    "deepseek_v2": (  # rotary positions in complex numbers
        "DeepseekV2Config",
        {
            **_DECODER,
            "num_hidden_layers": 3,
            "num_key_value_heads": 8,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
        "AutoModelForCausalLM",
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**_DECODER, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12},
        "AutoModelForCausalLM",
    ),
    "phimoe": (  # chooses experts by random numbers as it trains, with a gradient of its own
        "PhimoeConfig",
        {**_DECODER, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        "AutoModelForCausalLM",
    ),
    "dbrx": (  # experts below one another in matrices
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 8,
            "n_layers": 2,
            "max_seq_len": 64,
            "vocab_size": 64,
            "attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
            **_TOKENS,
        },
        "AutoModelForCausalLM",
    ),
    "longcat_flash": (  # experts that give back what they are given, two attentions in a layer
        "LongcatFlashConfig",
        {
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": 64,
            "max_position_embeddings": 64,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "head_dim": 4,
            "v_head_dim": 8,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "expert_ffn_hidden_size": 16,
            **_TOKENS,
        },
        "AutoModelForCausalLM",
    ),
    # State space.
    "mamba": (
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 4, "time_step_rank": 4, "vocab_size": 64, **_TOKENS},
        "AutoModelForCausalLM",
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "vocab_size": 64,
            **_TOKENS,
        },
        "AutoModelForCausalLM",
    ),
    "jamba": (
        "JambaConfig",
        {
            **_DECODER,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        "AutoModelForCausalLM",
    ),
    "qwen3_next": (  # linear attention by the gated delta rule, experts with a gated shared one
        "Qwen3NextConfig",
        {
            **_DECODER,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
        },
        "AutoModelForCausalLM",
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **_DECODER,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "mamba_n_groups": 1,
        },
        "AutoModelForCausalLM",
    ),
    "gemma3n": (  # parallel streams, embeddings for each layer, weights clamped in forward
        "Gemma3nTextConfig",
        {
            **_DECODER,
            "intermediate_size": [48] * 4,
            "head_dim": 8,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "sliding_window": 12,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0] * 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "AutoModelForCausalLM",
    ),
    "falcon_h1": (  # attention and a state space side by side in each layer
        "FalconH1Config",
        {
            **_DECODER,
            "num_hidden_layers": 2,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 2,
            "mamba_chunk_size": 8,
        },
        "AutoModelForCausalLM",
    ),
    # Encoders.
    "bert": ("BertConfig", {**_TEXT, "max_position_embeddings": 1024}, "AutoModelForMaskedLM"),  # long buffers
    "roberta": ("RobertaConfig", _TEXT, "AutoModelForMaskedLM"),
    "modernbert": (
        "ModernBertConfig",
        {
            **_TEXT,
            "local_attention": 8,
            "global_attn_every_n_layers": 3,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        "AutoModelForMaskedLM",
    ),
    "roformer": ("RoFormerConfig", _TEXT, "AutoModelForMaskedLM"),
    # Encoder and decoder.
    "t5": (
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 4,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 8,
            "vocab_size": 64,
            **_TOKENS,
            "decoder_start_token_id": 0,
        },
        "AutoModelForSeq2SeqLM",
    ),
    "bart": ("BartConfig", {**_SEQ2SEQ, "max_position_embeddings": 64}, "AutoModelForSeq2SeqLM"),
    "whisper": (
        "WhisperConfig",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 64},
        "AutoModelForSpeechSeq2Seq",
    ),
    # Vision.
    "vit": ("ViTConfig", {**_VISION, "num_labels": 8}, "AutoModelForImageClassification"),
    "resnet": (  # batch norms
        "ResNetConfig",
        {
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 2],
            "layer_type": "basic",
            "num_labels": 8,
        },
        "AutoModelForImageClassification",
    ),
    "convnext": (
        "ConvNextConfig",
        {"patch_size": 2, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [2, 2], "image_size": 16},
        "AutoModelForImageClassification",
    ),
    "pvt": (  # lists of layers that take turns
        "PvtConfig",
        {
            "image_size": 32,
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "sequence_reduction_ratios": [2, 1],
            "num_labels": 8,
        },
        "AutoModelForImageClassification",
    ),
    "swin": (
        "SwinConfig",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": 8,
        },
        "AutoModelForImageClassification",
    ),
    # Sound.
    "wav2vec2": (  # norms of weights, a first layer unlike the others of its list, SpecAugment, a CTC loss
        "Wav2Vec2Config",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 32,
            "conv_dim": [16, 16, 16],
            "conv_stride": [5, 2, 2],
            "conv_kernel": [10, 3, 3],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        },
        "AutoModelForCTC",
    ),
    # Text with vision.
    "siglip": (
        "SiglipConfig",
        {"text_config": {**_TEXT, "max_position_embeddings": 64}, "vision_config": _VISION},
        None,
    ),
    "clip": (
        "CLIPConfig",
        {"text_config": {**_TEXT, "max_position_embeddings": 64}, "vision_config": _VISION, "projection_dim": 16},
        None,
    ),
    "llava": (
        "LlavaConfig",
        {
            "text_config": {**_DECODER, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_index": 63,
            "image_seq_length": 16,
        },
        "AutoModelForImageTextToText",
    ),
    # Of other kinds.
    "deberta": (  # a table of relative positions that every layer reads
        "DebertaConfig",
        {
            **_TEXT,
            "num_hidden_layers": 2,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "max_relative_positions": 16,
        },
        "AutoModelForMaskedLM",
    ),
    "bert_answers": ("BertConfig", {**_TEXT, "num_hidden_layers": 2}, "AutoModelForQuestionAnswering"),
    "switch_transformers": (  # experts in a list with a forward of its own, noise before the router
        "SwitchTransformersConfig",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "vocab_size": 64,
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
        "AutoModelForSeq2SeqLM",
    ),
    "dinov3_vit": ("DINOv3ViTConfig", {**_VISION, "num_hidden_layers": 2}, None),  # positions scaled at random
    "vit_mae": (  # patches masked at random
        "ViTMAEConfig",
        {
            **_VISION,
            "num_hidden_layers": 2,
            "decoder_num_attention_heads": 4,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_intermediate_size": 24,
        },
        "AutoModelForPreTraining",
    ),
    "decision_transformer": (  # three tokens for each position
        "DecisionTransformerConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "state_dim": 5, "act_dim": 3, "max_ep_len": 64},
        None,
    ),
}
