"""Scans of state-space models: what they compute, and that models that use them are traced for any length."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import zoo
from zoo_inputs import example_of

from autopar.codegen.runtime.scans import gated_delta_rule, selective_scan, state_space_scan
from autopar.graph.ir import Node, Ref, TensorMeta
from autopar.graph.trace import trace
from autopar.solver.work import flops

ZOO = zoo.load_zoo(Path(zoo.__file__).parent / "zoo_models.py")


def drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def gradients(y: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad((y * torch.linspace(0.0, 1.0, y.numel()).view(y.shape)).sum(), inputs))


@pytest.mark.parametrize("length", [1, 2, 5, 8, 13])
def test_selective_scan_is_the_recurrence(length):
    inputs = drawn((2, 3, length), (2, 3, length), (3, 4), (2, 4, length), (2, 4, length))
    x, step, decay, write, read = inputs
    state, wanted = torch.zeros(2, 3, 4, dtype=torch.float64), []
    for t in range(length):
        kept = torch.exp(step[:, :, t, None] * decay)
        state = kept * state + (step * x)[:, :, t, None] * write[:, None, :, t]
        wanted.append((state * read[:, None, :, t]).sum(-1))
    found = selective_scan(*inputs)
    torch.testing.assert_close(found, torch.stack(wanted, -1))
    for one, other in zip(gradients(found, inputs), gradients(torch.stack(wanted, -1), inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("length", [1, 4, 6, 13])
def test_state_space_scan_is_the_recurrence(length):
    inputs = drawn((2, length, 4, 3), (2, length, 4), (4,), (2, length, 2, 5), (2, length, 2, 5))
    x, step, decay, write, read = inputs
    state, wanted = torch.zeros(2, 4, 3, 5, dtype=torch.float64), []
    for t in range(length):
        kept = torch.exp(step[:, t] * decay)[..., None, None]
        wide = [value[:, t].repeat_interleave(2, 1).unsqueeze(2) for value in (write, read)]
        state = kept * state + (step[:, t, :, None] * x[:, t]).unsqueeze(-1) * wide[0]
        wanted.append((state * wide[1]).sum(-1))
    found = state_space_scan(*inputs, chunk=4)
    torch.testing.assert_close(found, torch.stack(wanted, 1))
    for one, other in zip(gradients(found, inputs), gradients(torch.stack(wanted, 1), inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("length", [1, 4, 6, 13])
@pytest.mark.parametrize("channels", [(), (5,)])
def test_gated_delta_rule_is_the_recurrence(length, channels):
    shapes = ((2, length, 2, 5), (2, length, 2, 5), (2, length, 4, 3), (2, length, 4, *channels), (2, length, 4))
    inputs = drawn(*shapes)
    query, key, value, decay, beta = inputs
    state, wanted = torch.zeros(2, 4, 5, 3, dtype=torch.float64), []
    for t in range(length):
        read, write = (x[:, t].repeat_interleave(2, 1).unsqueeze(-1) for x in (query, key))
        state = decay[:, t].reshape(2, 4, -1, 1).exp() * state
        missed = value[:, t].unsqueeze(2) - (state * write).sum(2, keepdim=True)
        state = state + write * beta[:, t].reshape(2, 4, 1, 1) * missed
        wanted.append((state * read).sum(2))
    found = gated_delta_rule(*inputs, chunk=4)
    torch.testing.assert_close(found, torch.stack(wanted, 1))
    for one, other in zip(gradients(found, inputs), gradients(torch.stack(wanted, 1), inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_scans_are_counted_as_torch_counts_them():
    shapes = [(2, 12, 4, 3), (2, 12, 4), (4,), (2, 12, 2, 5), (2, 12, 2, 5)]
    node = Node("y", "op", TensorMeta(()), op="autopar.state_space_scan", args=(*map(Ref, "abcde"), 4))
    assert flops(node, shapes, shapes[0]) == counted(state_space_scan, shapes, 4)
    shapes = [(2, 6, 8), (2, 6, 8), (6, 5), (2, 5, 8), (2, 5, 8)]
    node = Node("y", "op", TensorMeta(()), op="autopar.selective_scan", args=tuple(map(Ref, "abcde")))
    assert flops(node, shapes, shapes[0]) == counted(selective_scan, shapes)
    shapes = [(2, 12, 2, 5), (2, 12, 2, 5), (2, 12, 4, 3), (2, 12, 4), (2, 12, 4)]
    node = Node("y", "op", TensorMeta(()), op="autopar.gated_delta_rule", args=(*map(Ref, "abcde"), 4))
    system = 2 * 2 * 3 * 4 * (4 * 4 // 2) * (5 + 3)  # triangular systems, which torch does not count
    assert flops(node, shapes, shapes[2]) == counted(gated_delta_rule, shapes, 4) + system
    wide = [*shapes[:3], (2, 12, 4, 5), shapes[4]]
    assert flops(node, wide, shapes[2]) == counted(gated_delta_rule, wide, 4) + system


def counted(function, shapes, *rest):
    with FlopCounterMode(display=False) as counter:
        function(*(torch.empty(shape, device="meta") for shape in shapes), *rest)
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "op"), [("mamba", "autopar.selective_scan"), ("mamba2", "autopar.state_space_scan")])
def test_state_space_models_are_traced_for_any_length(name, op):
    model = zoo.build(ZOO[name])
    graph = trace(model, example_of(model).inputs)
    assert [str(size) for size in graph.batch["input_ids"].shape] == ["b", "s"]
    assert sum(node.op == op for kind in graph.kinds.values() for node in kind.graph.of("op")) == len(graph.kinds) - 2
