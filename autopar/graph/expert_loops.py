"""Mixtures whose experts are a list of modules, each called with the tokens that chose it.

Such a loop cannot be traced as it is written. `follow_loops` looks for modules that hold a list of equal modules, and
runs a copy of each on random numbers, with cheap stand-ins for the experts, as it is written and with every expert
given every token (`autopar.graph.chosen_rows`). Where output and gradients agree, the module is traced the second way,
which costs more: each expert computes for all tokens, not so with weights stacked in one module
(`autopar.graph.find_experts`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autopar.graph.chosen_rows import ChosenRows
from autopar.graph.structure import structure

BATCH, POSITIONS = 13, 17
"""Of the random input: sizes that are no number of experts or choices."""
ROWS = frozenset({BATCH, POSITIONS, BATCH * POSITIONS})
MOST = 1 << 24
"""Elements of the weights, other than experts, of a module that is looked at."""
TOLERANCE = 1e-6

NOTE = (
    "experts in a list of modules compute all tokens, and what was not chosen is masked: stack their weights in one "
    "module to compute what was chosen only"
)


def follow_loops(model: nn.Module) -> tuple[str, ...]:
    """Let the modules of ``model`` (a copy made for tracing) that call a list of experts call each with every token;
    what to tell of it."""
    known: dict[str, bool] = {}
    found = False
    for module in list(model.modules()):
        lists = [name for name, child in module.named_children() if _is_list(child)]
        if len(lists) != 1:
            continue
        key = structure(module)
        if key not in known:
            known[key] = _follows(module, lists[0])
        if known[key]:
            module.forward = _Followed(module.forward)
            found = True
    return (NOTE,) if found else ()


class _Followed:
    """A forward that gives every expert every token."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward
        functools.update_wrapper(self, forward)  # what it takes is asked by name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with ChosenRows():
            return self._forward(*args, **kwargs)


def _is_list(module: nn.Module) -> bool:
    """Whether it holds several equal modules, each with matrices that take and give vectors of one size."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or len(held := _held(module)) < 2:
        return False
    first, *others = held.values()
    if not _width(first):
        return False
    wanted = structure(first)
    return all(structure(other) == wanted for other in others)


def _held(module: nn.Module) -> dict[str, nn.Module]:
    """The experts in a list: a list with a forward of its own may also hold what has no weights (a dropout)."""
    return {name: child for name, child in module.named_children() if next(child.parameters(), None) is not None}


def _width(expert: nn.Module) -> int:
    """The size of the vectors an expert takes and gives; 0 if it is not seen from its matrices."""
    linear = [child for child in expert.modules() if isinstance(child, nn.Linear)]
    taken, given = {child.in_features for child in linear}, {child.out_features for child in linear}
    both = sorted(taken & given)
    return linear[0].in_features if linear and linear[0].in_features in both else 0


class _Expert(nn.Module):
    """Stands in for expert ``number``: acts on each row alone, unlike the others."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * (1 + self.number)) + self.number


def _follows(module: nn.Module, name: str) -> bool:
    """Whether the module chooses tokens, and gives what it should if every expert gets every token."""
    width = _width(next(iter(_held(getattr(module, name)).values())))
    try:
        small = _small(module, name)
        for shape in ((BATCH, POSITIONS, width), (BATCH * POSITIONS, width)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
            wanted = _outcome(small, x, None)
            every = ChosenRows(ROWS)
            found = _outcome(small, x, every) if wanted else []
            if found and every.used:
                return len(found) == len(wanted) and all(_close(a, b) for a, b in zip(found, wanted, strict=True))
    except Exception:  # the code of a module that is something else may fail in any way
        return False
    return False


def _small(module: nn.Module, name: str) -> nn.Module:
    """A copy of ``module`` with random weights and stand-ins for its experts. Raises ValueError if it is too large."""
    experts = getattr(module, name)
    memo: dict[int, Any] = {id(expert): _Expert(number) for number, expert in enumerate(_held(experts).values())}
    drawn = torch.Generator().manual_seed(1)
    inside = {id(tensor) for tensor in (*experts.parameters(), *experts.buffers())}
    outside = [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in inside]
    if sum(tensor.numel() for tensor in outside) > MOST:
        raise ValueError("too large to look at")
    for tensor in outside:
        value = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
        if tensor.is_floating_point():
            value = torch.randn(tensor.shape, generator=drawn, dtype=torch.float64, device="cpu")
        memo[id(tensor)] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
    return copy.deepcopy(module, memo).eval()


def _outcome(module: nn.Module, x: Tensor, mode: ChosenRows | None) -> list[Tensor]:
    """The output and the gradients of the input and the weights; nothing if no tensor of its shape comes out."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        if mode is None:
            output = module(x)
        else:
            with mode:
                output = module(x)
        output = output[0] if isinstance(output, tuple) else output
        if not isinstance(output, Tensor) or output.shape != x.shape or not output.requires_grad:
            return []
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)
        wanted = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
        gradients = torch.autograd.grad(output, wanted, probe, allow_unused=True)
    return [output, *(gradient for gradient in _given(gradients))]


def _given(gradients: tuple[Tensor | None, ...]) -> Iterator[Tensor]:
    return (torch.zeros(()) if gradient is None else gradient for gradient in gradients)


def _close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).norm() <= TOLERANCE * wanted.norm() + 1e-12)
