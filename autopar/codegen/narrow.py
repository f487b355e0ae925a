"""A model built again from its Hugging Face configuration, with fewer layers and everything in them narrower.

Sizes keep their ratios, so that what one of them says of others stays true (heads times head size is the width, or
twice the width): heads become few, of `HEAD` each; what is a part of a head (rotary and other parts, ranks of latent
projections, states) shrinks as heads do, widths as heads times their size do. Of experts at most `EXPERTS` are left.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import prod
from typing import Any

from torch import nn

from autopar.errors import UnsupportedError
from autopar.graph.padding import growth
from autopar.plan import Plan

HEAD = 8
"""Size of a narrow head."""

EXPERTS = 64
"""Experts that are as good as any number of them."""

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_OF_TWO = {"encoder": ("encoder_layers", "num_encoder_layers"), "decoder": ("decoder_layers", "num_decoder_layers")}
"""Where there are two lists of layers: how many each has, by a word of its path; `_LAYERS` for what is not said so."""

_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "n_kv_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
_VOCABULARY = ("vocab_size",)
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "n_experts")

_PARTS = re.compile(r"(head_dim|head_size|state_size|d_state|d_kv|lora_rank|kv_channels)$")
"""Names of what is a part of a head, or shrinks with it."""

_WIDE = re.compile(r"(intermediate_size|n_inner|ffn_dim|ffn_hidden_size|d_ff|time_step_rank)$")
"""Names of what is as wide as the model, or some times as wide."""


def narrow_model(plan: Plan, model: nn.Module, layers: Mapping[str, Sequence[int]]) -> nn.Module:
    """``layers``: of each of the model's lists of layers (module path) those that the new one's stand for, in order.

    Raises UnsupportedError when there is no configuration, or the narrow one builds no model.
    """
    config: Any = copy.deepcopy(getattr(model, "config", None))
    if config is None or _first(config, _LAYERS) is None:
        raise UnsupportedError(
            f"{plan.model} is too large to verify in one process, and has no Hugging Face config from which autopar "
            "could build a smaller twin: verify a smaller instance of the same class"
        )
    try:
        for path, kept in layers.items():
            _shorten(config, _number_of_layers(config, path, len(layers)), kept)
        _narrow(config, plan)
        if (experts := _get(config, _EXPERTS)) is not None and experts > EXPERTS:
            _set(config, _EXPERTS, max(few for few in range(1, EXPERTS + 1) if experts % few == 0))
        # A vocabulary that does not divide stays one.
        uneven = (_get(config, _VOCABULARY) or 0) % plan.mesh.tp != 0
        _set(config, _VOCABULARY, 255 if uneven else 256)
        for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if isinstance(getattr(config, token, None), int):
                setattr(config, token, 0)
        return type(model)(config)
    except Exception as error:  # the model's own code, on a configuration that nobody wrote
        raise UnsupportedError(
            f"{plan.model} is too large to verify in one process, and a narrow twin of it cannot be built "
            f"({type(error).__name__}: {error}): verify a smaller configuration of the same architecture"
        ) from error


def _number_of_layers(config: Any, path: str, lists: int) -> str:
    """What the configuration calls the number of layers of the list at ``path``."""
    said = next((names for word, names in _OF_TWO.items() if lists > 1 and word in path.split(".")), ())
    return str(_first(config, (*said, *_LAYERS)))


def _shorten(config: Any, name: str, layers: Sequence[int]) -> None:
    """As many layers as ``layers``; what the configuration says of each layer follows them."""
    all_of_them = int(getattr(config, name))
    for key, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == all_of_them:
            setattr(config, key, type(value)(value[layer] for layer in layers))
    for key in ("first_k_dense_replace", "num_dense_layers"):
        if isinstance(first := getattr(config, key, None), int):
            setattr(config, key, sum(layer < first for layer in layers))
    if isinstance(some := getattr(config, "mlp_only_layers", None), list):
        config.mlp_only_layers = [place for place, layer in enumerate(layers) if layer in some]
    setattr(config, name, len(layers))


def _narrow(config: Any, plan: Plan) -> None:
    heads, kv, width = _get(config, _HEADS), _get(config, _KV_HEADS), _get(config, _WIDTH)
    if heads is None and width is None:
        return
    if heads is None or width is None:
        wide = Fraction(4 * HEAD, width or 4 * HEAD)
        part = Fraction(1)
    else:
        few_kv, few = _few_heads(plan, heads, kv)
        size = next((found for key in ("head_dim", "d_kv") if (found := getattr(config, key, None))), width // heads)
        part = Fraction(HEAD, size)
        wide = Fraction(few, heads) * part
        _set(config, _HEADS, few)
        if few_kv:
            _set(config, _KV_HEADS, few_kv)
        groups = getattr(config, "n_groups", None)
        if isinstance(groups, int):
            config.n_groups = math.gcd(groups, few)
    for key, value in list(vars(config).items()):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if key in _WIDTH:
            setattr(config, key, _scaled(value, wide))
        elif _PARTS.search(key):
            setattr(config, key, _scaled(value, part))
        elif _WIDE.search(key):
            setattr(config, key, max(HEAD, math.ceil(value * wide / HEAD) * HEAD))


def _scaled(size: int, share: Fraction) -> int:
    """Exactly if it divides, so that ratios stay; else a multiple of `HEAD`."""
    exact = size * share
    return int(exact) if exact.denominator == 1 else max(HEAD, round(exact / HEAD) * HEAD)


def _few_heads(plan: Plan, heads: int, kv: int | None) -> tuple[int | None, int]:
    """(Key/value heads, heads): few in the same ratio, as many as all model axes of the twin may split."""
    group = heads // kv if kv else 1
    if plan.pad_heads > 1:
        return _odd_heads(kv or heads, group, plan.pad_heads)
    few = 4 if kv is None else max(4 // math.gcd(4, group), 1) if group > 4 else 4 // math.gcd(4, group) * 2
    ranks = prod(min(size, 2) for size in plan.mesh.model_axes().values())
    if kv is None:
        return None, math.ceil(few / ranks) * ranks
    few_kv = math.ceil(max(2, few // group) / ranks) * ranks
    return few_kv, few_kv * group


def _odd_heads(kv: int, group: int, ranks: int) -> tuple[int, int]:
    """(Key/value heads, heads): few that two ranks do not divide, and that are padded as these are."""
    grown = growth(kv, group, ranks)
    if kv == 1 or group == 1 or grown is None:
        return (1 if kv == 1 else 3), 3
    return 3, 15 if grown[0] else 9


def _first(config: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if getattr(config, name, None) is not None), None)


def _get(config: Any, names: tuple[str, ...]) -> int | None:
    name = _first(config, names)
    return None if name is None else int(getattr(config, name))


def _set(config: Any, names: tuple[str, ...], value: int) -> None:
    name = _first(config, names)
    if name is not None:
        setattr(config, name, value)
