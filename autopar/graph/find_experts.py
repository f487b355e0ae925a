"""Modules that are the experts of a mixture, recognised by what they compute and replaced by one operator.

Such a module cannot be traced as it is written: which tokens an expert sees depends on the data. `experts_form` looks
at a module that holds its experts' weights stacked (two tensors of three dims, with or without biases) and takes hidden
states, the chosen experts' indices and their weights. A small copy of it (other sizes, the same code) is run on random
numbers; if, in one reading of its weights, `autopar.experts` computes the same output and gradients, it is that
operator.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from autopar.errors import UnsupportedError
from autopar.graph.experts import ACTIVATIONS, GATES, experts
from autopar.graph.structure import structure

TOKENS, CHOSEN = 16, 2
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Form:
    """How a module is `autopar.experts`: the names of its parameters in the operator's order (None: no such bias), and
    the operator's options."""

    parameters: tuple[str | None, ...]
    options: Mapping[str, Any]


def replace_experts(model: nn.Module) -> None:
    """Give every module of ``model`` (a copy made for tracing) that is the experts of a mixture the one operator as its
    forward. Modules that look like one but compute something else are left alone."""
    known: dict[str, Form | None] = {}
    for module in model.modules():
        form = experts_form(module, known)
        if form is not None:
            module.forward = _Forward(module, form)


class _Forward:
    """The operator on the tensors that a module is called with."""

    def __init__(self, module: nn.Module, form: Form) -> None:
        self._module, self._form = module, form

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        floating = [value for value in given if value.is_floating_point()]
        index = [value for value in given if not value.is_floating_point()]
        if len(floating) != 2 or len(index) != 1 or floating[1].shape != index[0].shape:
            raise UnsupportedError(
                f"{type(self._module).__name__} is called with {len(given)} tensors; autopar takes the experts of a "
                "mixture as called with hidden states, the chosen experts' indices and their weights"
            )
        held = [None if name is None else getattr(self._module, name) for name in self._form.parameters]
        operator: Any = torch.ops.autopar.experts
        result: torch.Tensor = operator(floating[0], index[0], floating[1], *held, **self._form.options)
        return result


def experts_form(module: nn.Module, known: dict[str, Form | None]) -> Form | None:
    """How ``module`` (which may be on meta) is `autopar.experts`, or None. ``known``: what was found, by structure."""
    own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    dims = [tensor.ndim for tensor in own.values()]
    if dims.count(3) != 2 or set(dims) - {2, 3}:
        return None
    if len({tensor.shape[0] for tensor in own.values()}) != 1 or len(inspect.signature(module.forward).parameters) < 3:
        return None
    key = structure(module)
    if key not in known:
        known[key] = _find(module, own)
    return known[key]


def _find(module: nn.Module, own: Mapping[str, nn.Parameter]) -> Form | None:
    """The first reading of the weights under which a small copy and the operator agree."""
    for names, sizes, transposed, gate in _readings(own):
        small, held = _shrunk(module, own, sizes)
        drawn = torch.Generator().manual_seed(0)
        count, width = held[names[0] or ""].shape[0], held[names[1] or ""].shape[2 if transposed else 1]
        hidden = torch.randn(TOKENS, width, generator=drawn).requires_grad_()
        index = torch.rand(TOKENS, count, generator=drawn).argsort(-1)[:, :CHOSEN]
        weights = torch.rand(TOKENS, CHOSEN, generator=drawn).requires_grad_()
        inputs = [hidden, weights, *held.values()]
        wanted = _outcome(inputs, partial(small, hidden, index, weights))
        if wanted is None:
            continue
        tensors: list[Any] = [None if name is None else held[name] for name in names]
        for activation in _activations(module, gate):
            options = {"experts": count, "gate": gate, "transposed": transposed, **activation}
            found = _outcome(inputs, partial(experts, hidden, index, weights, *tensors, **options))
            if found is not None and all(_close(a, b) for a, b in zip(found, wanted, strict=True)):
                return Form(names, {**options, "experts": own[names[0] or ""].shape[0]})
    return None


def _readings(
    own: Mapping[str, nn.Parameter],
) -> Iterator[tuple[tuple[str | None, ...], dict[int, int], bool, str]]:
    """(names of up, down and their biases; small size of each size; whether transposed; gate) that fit the shapes."""
    stacked = [name for name, tensor in own.items() if tensor.ndim == 3]
    flat = [name for name, tensor in own.items() if tensor.ndim == 2]
    for (up, down), transposed, gate in itertools.product(itertools.permutations(stacked), (False, True), GATES):
        count, *rest = own[up].shape
        rows, width = reversed(rest) if transposed else rest
        out, inner = (own[down].shape[2], own[down].shape[1]) if transposed else own[down].shape[1:]
        if out != width or rows != (inner if gate == "none" else 2 * inner):
            continue
        biases: list[str | None] = [None, None]
        for name in flat:
            place = [rows, width].index(own[name].shape[1]) if own[name].shape[1] in (rows, width) else None
            if place is None or biases[place] is not None:
                break
            biases[place] = name
        else:
            yield (up, down, *biases), _small_sizes(count, rows, inner, width), transposed, gate


def _small_sizes(count: int, rows: int, inner: int, width: int) -> dict[int, int]:
    """A small size for each size, equal where they are equal; what computes one from another still does.

    Multiples of four, which torch's grouped product asks for."""
    small = {inner: 8, rows: 8 * (rows // inner)}
    small.setdefault(width, 12)
    small.setdefault(count, 5)
    return small


def _shrunk(
    module: nn.Module, own: Mapping[str, nn.Parameter], sizes: Mapping[int, int]
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of ``module`` with parameters (and integer attributes) of the small sizes, with random values."""
    small = copy.copy(module)
    drawn = torch.Generator().manual_seed(1)
    held = {
        name: nn.Parameter(torch.randn([sizes[size] for size in tensor.shape], generator=drawn))
        for name, tensor in own.items()
    }
    attributes = {
        name: sizes.get(value, value)
        for name, value in module.__dict__.items()
        if isinstance(value, int) and not isinstance(value, bool)
    }
    small.__dict__ = {**module.__dict__, **attributes, "_parameters": dict(held)}
    small.__dict__.pop("forward", None)
    return small, held


def _activations(module: nn.Module, gate: str) -> Iterator[dict[str, Any]]:
    for name in ACTIVATIONS:
        yield {"activation": name}
    if gate != "none":
        numbers = sorted({value for value in module.__dict__.values() if isinstance(value, float)})
        for limit in numbers:
            yield {"activation": "clamped_silu", "limit": limit}
        for alpha, limit in itertools.permutations(numbers, 2):
            yield {"activation": "clamped_swish", "alpha": alpha, "limit": limit}


def _outcome(inputs: list[torch.Tensor], run: Any) -> list[torch.Tensor] | None:
    """The output and the gradients of ``inputs``; None if it cannot be run."""
    try:
        with torch.enable_grad(), torch.device("cpu"):
            output = run()
            if not isinstance(output, torch.Tensor) or not output.requires_grad:
                return None
            probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
            return [output, *torch.autograd.grad(output, inputs, probe)]
    except Exception:  # the code of a module that is something else may fail in any way
        return None


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    return bool((found - wanted).norm() <= TOLERANCE * wanted.norm() + 1e-12)
