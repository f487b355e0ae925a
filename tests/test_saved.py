"""What is saved for backward, against a count by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from traced import llama_graph

from autopar.graph.interpret import run_graph
from autopar.graph.saved import saved_bytes, saved_for_backward

B, S, H, W = 2, 16, 8, 32


def bf16(*shape: int, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=grad)


def test_mlp():
    def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return x + F.linear(F.relu(F.linear(x, up)), down)

    records = saved_for_backward(mlp, (bf16(B, S, H), bf16(W, H), bf16(H, W)))
    hidden = [record for record in records if not record.is_input]
    assert [record.bytes for record in hidden] == [B * S * W * 2]  # relu keeps its result, which is linear's input
    assert {record.argument for record in records} == {0, 1, 2, None}
    assert saved_bytes(records) == B * S * W * 2


def test_views_count_their_storage_once():
    def fn(x: Tensor) -> Tensor:
        wide = x * 2
        left, right = wide.chunk(2, dim=-1)
        return (left * right).exp()

    records = saved_for_backward(fn, (bf16(B, S, H),))
    made = [record for record in records if not record.is_input]
    assert [(record.bytes, record.shape, record.output) for record in made] == [
        (B * S * H * 2, (B, S, H // 2), None),
        (B * S * H, (B, S, H // 2), 0),  # exp keeps its result, which is also what is returned
    ]
    assert saved_bytes(records) == B * S * H * 2


def test_nothing_is_saved_for_inputs_without_gradient():
    assert saved_for_backward(lambda x, w: F.linear(x, w), (bf16(B, S, H, grad=False), bf16(W, H, grad=False))) == []
    (record,) = saved_for_backward(lambda x, w: F.linear(x, w), (bf16(B, S, H, grad=False), bf16(W, H)))
    assert record.argument == 0


def test_arguments_that_share_storage():
    base = torch.empty(4, 6, requires_grad=True)
    records = saved_for_backward(lambda x, y: x * y, (base, base.detach()[1:3].repeat(2, 1)))
    assert [record.argument for record in records] == [1]
    (record,) = saved_for_backward(lambda x, y: (x[1:3] * y).sum(), (base, base.detach()[1:3]))
    assert (record.argument, record.bytes) == (0, 4 * 6 * 4)


def test_attention_keeps_what_flash_attention_keeps():
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)

    arguments = (bf16(B, 4, S, 8), bf16(B, 2, S, 8), bf16(B, 2, S, 8))
    records = saved_for_backward(attend, arguments)
    assert sorted(record.bytes for record in records if not record.is_input) == [B * 4 * S * 4, B * 4 * S * 8 * 2]
    assert {record.argument for record in records} == {0, 1, 2, None}


def test_norm_and_dropout_keep_statistics_and_mask():
    arguments = (bf16(B, S, H), bf16(H))
    assert saved_bytes(saved_for_backward(lambda x, w: F.rms_norm(x, (H,), w), arguments)) == B * S * 4
    assert saved_bytes(saved_for_backward(lambda x, w: F.rms_norm(x, (H,), w), arguments, fused=False)) > B * S * 4
    assert saved_bytes(saved_for_backward(lambda x: F.dropout(x, 0.1), (bf16(B, S, H),))) == B * S * H
    assert saved_for_backward(lambda x: F.dropout(x, 0.0), (bf16(B, S, H),)) == []


class Gather(torch.autograd.Function):
    """Stands for a collective written as an autograd function."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.cat((x, x), dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad[:, : grad.shape[1] // 2]


def test_gathered_input_is_what_a_linear_layer_keeps():
    records = saved_for_backward(lambda x, w: F.linear(Gather.apply(x), w), (bf16(B, S, H), bf16(W, H)))
    assert saved_bytes(records) == B * 2 * S * H * 2


def test_a_llama_layer_by_hand():
    graph = llama_graph().kinds["LlamaDecoderLayer"].graph
    values = {
        node.name: torch.empty(node.meta.at(B, S), dtype=torch.bfloat16, device="meta").requires_grad_(
            node.meta.requires_grad
        )
        for node in graph.nodes.values()
        if node.kind != "op"
    }
    names = list(values)
    records = saved_for_backward(lambda given: run_graph(given and graph, given, torch.bfloat16), (values,))
    tokens, width, inner, heads, groups, head = B * S, 32, 80, 8, 2, 4
    norms = 2 * tokens * width * 2 + 2 * tokens * 4  # their results (inputs of linear layers) and statistics
    middle = tokens * width * 2  # the residual between attention and mlp
    attention = tokens * (2 * heads + 2 * groups) * head * 2 + tokens * heads * 4  # q, output, k, v; log-sum-exp
    mlp = 4 * tokens * inner * 2  # gate, its silu, up, their product
    assert saved_bytes(records) == norms + middle + attention + mlp
    inputs = {names[record.argument] for record in records if record.argument is not None}
    assert inputs == set(values)
