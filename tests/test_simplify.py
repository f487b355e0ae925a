"""Canonical operators: what people write, in one form each; the graph is checked as text and by running it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced import gpt2_graph, llama_graph

from autopar.graph.interpret import run_model
from autopar.graph.ir import Node, Ref
from autopar.graph.trace import trace

LLAMA_LAYER = """\
input_layernorm = rms_norm(hidden, (32,), input_layernorm_weight, 1e-06)
q_proj = linear(input_layernorm, q_proj_weight)
q_split = unflatten(q_proj, 2, (-1, 4))
q_heads = transpose(q_split, 1, 2)
k_proj = linear(input_layernorm, k_proj_weight)
k_split = unflatten(k_proj, 2, (-1, 4))
k_heads = transpose(k_split, 1, 2)
v_proj = linear(input_layernorm, v_proj_weight)
v_split = unflatten(v_proj, 2, (-1, 4))
v_heads = transpose(v_split, 1, 2)
q_rotary = rotary(q_heads, cos_wide, sin_wide)
k_rotary = rotary(k_heads, cos_wide, sin_wide)
attention = scaled_dot_product_attention(q_rotary, k_rotary, v_heads, enable_gqa=True, is_causal=True)
attention_transposed = transpose(attention, 1, 2)
attention_merged = flatten(attention_transposed, 2, 3)
o_proj = linear(attention_merged, o_proj_weight)
residual = add(hidden, o_proj)
post_attention_layernorm = rms_norm(residual, (32,), post_attention_layernorm_weight, 1e-06)
gate_proj = linear(post_attention_layernorm, gate_proj_weight)
act_fn = silu(gate_proj)
up_proj = linear(post_attention_layernorm, up_proj_weight)
mlp = mul(act_fn, up_proj)
down_proj = linear(mlp, down_proj_weight)
residual_2 = add(residual, down_proj)"""

GPT2_ATTENTION = """\
ln_1 = layer_norm(hidden, (32,), ln_1_weight, ln_1_bias, 1e-05)
c_attn_weight_t = t(c_attn_weight)
c_attn = linear(ln_1, c_attn_weight_t, c_attn_bias)
c_attn_split = unflatten(c_attn, 2, (3, -1))
c_attn_0 = select(c_attn_split, 2, 0)
c_attn_1 = select(c_attn_split, 2, 1)
c_attn_2 = select(c_attn_split, 2, 2)"""

EPILOGUE = """\
norm = rms_norm(hidden, (32,), norm_weight, 1e-06)
lm_head = linear(norm, lm_head_weight)
labels_padded = pad(labels, (0, 1), 'constant', -100.0)
labels_slice = slice(labels_padded, 1, 1, s + 1)
loss = cross_entropy(lm_head, labels_slice, -100)"""


def text(nodes: list[Node]) -> str:
    """The operators, one per line, without their namespaces."""
    return "\n".join(f"{node.name} = {call(node)}" for node in nodes)


def call(node: Node) -> str:
    arguments = [show(arg) for arg in node.args]
    arguments += [f"{key}={show(value)}" for key, value in sorted(node.kwargs.items())]
    return f"{node.op.partition('.')[2]}({', '.join(arguments)})"


def show(value: object) -> str:
    if isinstance(value, Ref):
        return value.name
    if isinstance(value, tuple):
        return f"({', '.join(map(show, value))}{',' * (len(value) == 1)})"
    return repr(value)


def test_llama_layer_reads_as_written_by_hand():
    graph = llama_graph()
    assert text(list(graph.kinds["LlamaDecoderLayer"].graph.of("op"))) == LLAMA_LAYER
    assert text(list(graph.kinds["Epilogue"].graph.of("op"))) == EPILOGUE


def test_gpt2_products_are_linear_layers():
    nodes = list(gpt2_graph().kinds["GPT2Block"].graph.of("op"))
    assert text(nodes).startswith(GPT2_ATTENTION)
    assert "act = gelu(c_fc, 'tanh')" in text(nodes)
    assert "enable_gqa" not in text(nodes)


class Of(nn.Module):
    """A function of x [b, ...] and of a weight, as a module."""

    def __init__(self, function: Callable[..., Tensor], shape: tuple[int, ...] = (8,)) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def raised(function: Callable[..., Tensor], sample: Tensor, weight: tuple[int, ...] = (8,)) -> list[str]:
    """The operators that ``function(x, weight)`` becomes; the graph is run against the function itself."""
    model = Of(function, weight)

    def loss(y: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (y * torch.arange(y[0].numel(), dtype=y.dtype).reshape(y.shape[1:]).sin()).sum()

    graph = trace(model, inputs={"x": sample}, loss=loss)
    values = torch.randn(3, *sample.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = {"weight": model.weight.detach().double()}
    assert graph.count.outputs == ()  # a plain sum is divided by nothing
    total, _ = run_model(graph, state, {"x": values}, torch.float64)
    expected = loss(function(values, state["weight"]), {})
    assert float((total - expected).abs() / expected.abs()) < 1e-12
    (kind,) = graph.kinds.values()
    *calls, _, _ = (call(node).replace("x_mul", "y") for node in kind.graph.of("op"))
    return calls


def repeated_heads(x: Tensor, w: Tensor) -> Tensor:
    k = x[:, :2] * w
    k = k[:, :, None].expand(k.shape[0], 2, 2, *k.shape[2:]).reshape(k.shape[0], 4, *k.shape[2:])
    return F.scaled_dot_product_attention(x, k, k)


def rotary_by_chunks(x: Tensor, w: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1) * w.sin() + w.cos() * x


SHAPES = {
    "(4, 6) to (24,)": (lambda x, w: (x * w).reshape(x.shape[0], 24), (4, 6), (6,), ["flatten(y, 1, 2)"]),
    "(24,) to (4, 6)": (lambda x, w: (x * w).view(x.shape[0], 4, 6), (24,), (24,), ["unflatten(y, 1, (-1, 6))"]),
    "(24,) to (2, 3, 4)": (lambda x, w: (x * w).view(-1, 2, 3, 4), (24,), (24,), ["unflatten(y, 1, (-1, 3, 4))"]),
    "(2, 3, 4) to (6, 4)": (lambda x, w: (x * w).view(-1, 6, 4), (2, 3, 4), (4,), ["flatten(y, 1, 2)"]),
    "(2, 12) to (6, 4)": (
        lambda x, w: (x * w).view(-1, 6, 4),
        (2, 12),
        (12,),
        ["flatten(y, 1, 2)", "unflatten(x_merged, 1, (-1, 4))"],
    ),
    "(8,) to (1, 8)": (lambda x, w: (x * w).view(-1, 1, 8), (8,), (8,), ["unsqueeze(y, 1)"]),
    "(1, 8) to (8,)": (lambda x, w: (x * w).view(-1, 8), (1, 8), (8,), ["squeeze(y, 1)"]),
    "there and back": (lambda x, w: (x * w).view(-1, 24).view(-1, 4, 6), (4, 6), (6,), []),
    "transposed twice": (lambda x, w: (x * w).transpose(1, 2).mT, (4, 6), (6,), []),
    "permute of two": (lambda x, w: (x * w).permute(0, 2, 1), (4, 6), (6,), ["transpose(y, 1, 2)"]),
    "every second": (
        lambda x, w: (x * w)[:, 1::2],
        (8,),
        (8,),
        ["unflatten(y, 1, (-1, 2))", "select(x_split, 2, 1)"],
    ),
    "last three": (lambda x, w: (x * w)[:, -3:], (8,), (8,), ["slice(y, 1, 5, 8)"]),
    "everything": (lambda x, w: (x * w)[:, :, 0:99].contiguous().clone(), (2, 8), (8,), []),
    "chunks": (
        lambda x, w: (x * w).chunk(2, -1)[1],
        (8,),
        (8,),
        ["unflatten(y, 1, (2, -1))", "select(x_split, 1, 1)"],
    ),
    "uneven split": (lambda x, w: (x * w).split([2, 6], -1)[1], (8,), (8,), ["slice(y, 1, 2, 8)"]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    function, sample, weight, expected = SHAPES[name]
    mul, *rest = raised(function, torch.zeros(sample), weight)
    assert mul == "mul(x, weight)"
    assert rest == expected


COMPOSITES = {
    "rms norm": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
        "rms_norm(x, (8,), weight, 1e-05)",
    ),
    "rms norm in float32": (
        lambda x, w: (
            w * (x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
            if x.dtype == torch.float64
            else w * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
        ),
        "rms_norm(x, (8,), weight, 1e-05)",
    ),
    "nn.functional": (lambda x, w: F.rms_norm(x, (8,), w, 1e-5), "rms_norm(x, (8,), weight, 1e-05)"),
    "nn.functional, weight apart": (lambda x, w: w * F.rms_norm(x, (8,)), "rms_norm(x, (8,), weight, None)"),
    "gelu tanh": (
        lambda x, w: 0.5 * (x * w) * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x * w + 0.044715 * (x * w) ** 3))),
        "gelu(y, 'tanh')",
    ),
    "gelu erf": (lambda x, w: (x * w) * 0.5 * (1.0 + torch.erf((x * w) / math.sqrt(2.0))), "gelu(y)"),
    "silu": (lambda x, w: (x * w) * torch.sigmoid(x * w), "silu(y)"),
    "rotary": (rotary_by_chunks, "rotary(x, cos, sin_2)"),
    "matmul with a weight": (lambda x, w: x @ w, "linear(x, weight_t)"),
    "matmul with a transposed weight": (lambda x, w: x @ w.T, "linear(x, weight)"),
    "addmm of a flattened batch": (
        lambda x, w: torch.addmm(w[0], x.reshape(-1, 8), w).view(x.shape),
        "linear(x, weight_t, weight_0)",
    ),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites(name):
    function, expected = COMPOSITES[name]
    matrix = "matmul" in name or "addmm" in name
    sample = torch.zeros(3, 8) if matrix else torch.zeros(8)
    assert raised(function, sample, (8, 8) if matrix else (8,))[-1] == expected


def test_near_misses_stay_in_pieces():
    norm = raised(lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w.abs())), torch.zeros(8))
    assert not any("rms_norm" in line for line in norm)
    gelu = raised(lambda x, w: 0.5 * (x * w) * (1 + torch.tanh(0.8 * (x * w + 0.05 * (x * w) ** 3))), torch.zeros(8))
    assert not any("gelu" in line for line in gelu)
    turned = raised(lambda x, w: x * w.cos() + torch.cat((x[:, 4:], x[:, :4]), -1) * w.sin(), torch.zeros(8))
    assert not any("rotary" in line for line in turned)


def test_repeated_heads_are_grouped_queries():
    *_, attention = raised(repeated_heads, torch.zeros(4, 5, 8), (8,))
    assert attention.endswith("enable_gqa=True)")


def attention_with(mask: Callable[[int], Tensor]) -> list[str]:
    """How attention under ``mask(positions)`` is written, for x [b, 2 heads, s, 8]; s taken from an id per position."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ids = nn.Embedding(5, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.ids(ids).unsqueeze(1)
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask(ids.shape[1]))

    graph = trace(Masked(), inputs={"ids": torch.zeros(6, dtype=torch.int64)}, loss=lambda y, batch: y.mean())
    return [call(node) for node in graph.kinds["Model"].graph.of("op") if "attention" in node.op]


def window(size: int) -> Callable[[int], Tensor]:
    def mask(positions: int) -> Tensor:
        q, k = torch.arange(positions)[:, None], torch.arange(positions)[None]
        return (k <= q) & (k > q - size)

    return mask


@pytest.mark.parametrize(
    ("mask", "written"),
    [
        (lambda s: torch.ones(s, s, dtype=torch.bool).tril(), ", is_causal=True)"),
        (lambda s: torch.full((s, s), float("-inf")).triu(1), ", is_causal=True)"),
        (lambda s: torch.ones(s, s, dtype=torch.bool), "_wide)"),
        (window(3), "attn_mask="),
        (window(300), "attn_mask="),
        (lambda s: torch.ones(s, s, dtype=torch.bool).tril(1), "attn_mask="),
        (lambda s: -torch.arange(s * s).view(s, s).float(), "attn_mask="),
    ],
)
def test_masks_are_recognised_by_value(mask, written):
    (attention,) = attention_with(mask)
    assert written in attention
    assert ("attn_mask" in attention) == ("attn_mask" in written)


def test_window_longer_than_any_sequence_is_causal():
    from transformers import MistralConfig, MistralForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 2, "vocab_size": 32}
    for limit, causal in ((64, True), (128, False)):
        with torch.device("meta"):
            model = MistralForCausalLM(MistralConfig(**small, sliding_window=100, max_position_embeddings=limit))
        graph = trace(model)
        (attention,) = (node for node in graph.kinds["MistralDecoderLayer"].graph.of("op") if "attention" in node.op)
        assert attention.kwargs.get("is_causal", False) is causal
        assert graph.max_seq == (100 if causal else None), "causal as long as the window is not seen"


def test_a_new_name_is_never_that_of_a_node_to_come():
    """Dropouts that go and some that stay shift the numbers of nodes between passes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=40, n_head=5, n_layer=3, vocab_size=128, embd_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    assert trace(model).kinds["GPT2Block"].graph.nodes["attention"].kwargs["dropout_p"] == 0.1
