"""Modules that are the experts of a mixture, recognised by what they compute and replaced by one operator.

Such a module cannot be traced as it is written: which tokens an expert sees depends on the data. `experts_form` looks
at a module that holds its experts' weights stacked (two or three tensors of three dims, with or without biases; or two
or three matrices in which the experts lie below one another) and takes hidden states, the chosen experts' indices and
their weights, the last two in either order. A small copy of it (other sizes, the same code) is run on random
numbers; if, in one reading of its weights, `autopar.experts` computes the same output and gradients, it is that
operator.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from autopar.errors import UnsupportedError
from autopar.graph.experts import ACTIVATIONS, GATES, experts
from autopar.graph.structure import structure

TOKENS, CHOSEN = 16, 2
TOLERANCE = 1e-4
MOST = 24
"""Readings of one module's weights that are tried."""


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor of the operator as the module holds it: parameters side by side along the rows of each expert.
    ``below``: experts that lie below one another in a matrix [e f, d], 0 if they have a dim; ``turned``: [e, f, d] is
    meant as [e, d, f]; ``first``: only so many of the experts, 0 for all."""

    names: tuple[str, ...]
    below: int = 0
    turned: bool = False
    first: int = 0

    def of(self, module: nn.Module) -> torch.Tensor:
        parts: list[torch.Tensor] = [module.get_parameter(name) for name in self.names]
        if self.below:
            parts = [part.view(self.below, -1, part.shape[1]) for part in parts]
        if self.first:
            parts = [part[: self.first] for part in parts]
        if self.turned:
            parts = [part.transpose(1, 2) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@dataclass(frozen=True, slots=True)
class Form:
    """How a module is `autopar.experts`: where the operator's parameters are, in its order (None: no such bias), and
    the operator's options. ``beyond``: experts after these give back what they are given."""

    parameters: tuple[Held | None, ...]
    options: Mapping[str, Any]
    beyond: bool = False

    def run(
        self, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, operator: Any
    ) -> torch.Tensor:
        """What ``module`` computes, by ``operator``."""
        held = [None if place is None else place.of(module) for place in self.parameters]
        result: torch.Tensor = operator(hidden, index, weights, *held, **self.options)
        if self.beyond:
            kept = weights * (index >= self.options["experts"])
            result = result + hidden * kept.sum(-1, keepdim=True)
        return result


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
        if len(floating) != 2 or len(index) != 1 or floating[1].shape != index[0].shape or index[0].ndim < 2:
            raise UnsupportedError(
                f"{type(self._module).__name__} is called with {len(given)} tensors; autopar takes the experts of a "
                "mixture as called with hidden states, the chosen experts' indices and their weights"
            )
        hidden = floating[0] if floating[0].ndim == index[0].ndim else floating[0].flatten(0, -2)
        result = self._form.run(self._module, hidden, index[0], floating[1], torch.ops.autopar.experts)
        return result.view_as(floating[0])


def experts_form(module: nn.Module, known: dict[str, Form | None]) -> Form | None:
    """How ``module`` (which may be on meta) is `autopar.experts`, or None. ``known``: what was found, by structure."""
    if len(inspect.signature(module.forward).parameters) < 3:
        return None
    readings = list(itertools.islice(_readings(module), MOST))
    if not readings:
        return None
    key = structure(module)
    if key not in known:
        known[key] = _find(module, readings)
    return known[key]


@dataclass(frozen=True, slots=True)
class _Reading:
    """Where the operator's parameters may be, a small size for each of their sizes, and options. ``total``: experts
    that may be chosen, those without matrices included."""

    parameters: tuple[Held | None, ...]
    experts: int
    sizes: Mapping[int, int]
    transposed: bool
    gate: str
    total: int


def _find(module: nn.Module, readings: Sequence[_Reading]) -> Form | None:
    """The first reading of the weights under which a small copy and the operator agree."""
    for reading in readings:
        small = _shrunk(module, reading.sizes)
        count, total = reading.sizes[reading.experts], reading.sizes[reading.total]
        places = tuple(
            place and replace(place, below=place.below and count, first=place.first and count)
            for place in reading.parameters
        )
        down = places[1].of(small)  # type: ignore[union-attr]
        drawn = torch.Generator().manual_seed(0)
        hidden = torch.randn(TOKENS, down.shape[2 if reading.transposed else 1], generator=drawn).requires_grad_()
        index = torch.rand(TOKENS, total, generator=drawn).argsort(-1)[:, :CHOSEN]
        weights = torch.rand(TOKENS, CHOSEN, generator=drawn).requires_grad_()
        inputs = [hidden, weights, *small.parameters()]
        orders = (index, weights), (weights, index)
        outcomes = [_outcome(inputs, partial(_called, small, hidden, *order)) for order in orders]
        given = [outcome for outcome in outcomes if outcome is not None]
        for activation in _activations(module, reading.gate) if given else ():
            options = {"experts": count, "gate": reading.gate, "transposed": reading.transposed, **activation}
            form = Form(places, options, total > count)
            found = _outcome(inputs, partial(form.run, small, hidden, index, weights, experts))
            if found is not None and any(all(map(_close, found, wanted)) for wanted in given):
                return replace(form, parameters=reading.parameters, options={**options, "experts": reading.experts})
    return None


def _called(module: nn.Module, hidden: torch.Tensor, *chosen: torch.Tensor) -> torch.Tensor:
    """What ``module`` makes of tokens [t, d], which some take as [b, s, d]; ``chosen``: indices and weights."""
    with suppress(Exception):  # the code of a module that is something else may fail in any way
        result: torch.Tensor = module(hidden, *chosen)
        if result.shape == hidden.shape:
            return result
    result = module(hidden.view(2, -1, hidden.shape[-1]), *chosen)
    return result.flatten(0, 1)


def _readings(module: nn.Module) -> Iterator[_Reading]:
    """What fits the shapes of the module's parameters."""
    own = dict(module.named_parameters())
    dims = [tensor.ndim for tensor in own.values()]
    if dims.count(3) in (2, 3) and not set(dims) - {2, 3} and not any("." in name for name in own):
        one_count = len({tensor.shape[0] for tensor in own.values()}) == 1
        if dims.count(3) == 2 and (one_count or len(own) == 2):
            yield from _stacked(own)
        elif one_count:
            yield from _apart(own)
    elif dims in ([2, 2], [2, 2, 2]) and len({tensor.shape for tensor in own.values()}) == 1:
        yield from _below(module, own)


def _stacked(own: Mapping[str, nn.Parameter]) -> Iterator[_Reading]:
    """Weights of three dims, and their biases."""
    stacked = [name for name, tensor in own.items() if tensor.ndim == 3]
    flat = [name for name, tensor in own.items() if tensor.ndim == 2]
    for (up, down), transposed, gate in itertools.product(itertools.permutations(stacked), (False, True), GATES):
        total, *rest = own[up].shape
        count = own[down].shape[0]
        rows, width = reversed(rest) if transposed else rest
        out, inner = (own[down].shape[2], own[down].shape[1]) if transposed else own[down].shape[1:]
        if total < count or out != width or rows != (inner if gate == "none" else 2 * inner):
            continue
        biases: list[str | None] = [None, None]
        for name in flat:
            place = [rows, width].index(own[name].shape[1]) if own[name].shape[1] in (rows, width) else None
            if place is None or biases[place] is not None:
                break
            biases[place] = name
        else:
            first = count if total > count else 0
            places = (Held((up,), first=first), *(None if name is None else Held((name,)) for name in (down, *biases)))
            sizes = _small_sizes(count, rows, inner, width)
            sizes.setdefault(total, sizes[count] + 2)
            yield _Reading(places, count, sizes, transposed, gate, total)


def _apart(own: Mapping[str, nn.Parameter]) -> Iterator[_Reading]:
    """Three weights of three dims, gate and values apart, and their biases."""
    stacked = [name for name, tensor in own.items() if tensor.ndim == 3]
    flat = [name for name, tensor in own.items() if tensor.ndim == 2]
    for (gate, values, down), transposed in itertools.product(itertools.permutations(stacked), (False, True)):
        count, *rest = own[gate].shape
        rows, width = reversed(rest) if transposed else rest
        shape = torch.Size((count, rows, width) if transposed else (count, width, rows))
        if own[values].shape != own[gate].shape or own[down].shape != shape:
            continue
        widths = torch.Size((count, rows)), torch.Size((count, width)), torch.Size((count, rows))
        for biases in itertools.permutations(flat) if flat else [()]:
            if flat and tuple(own[name].shape for name in biases) != widths:
                continue
            held = [Held((name,)) for name in biases]
            up_bias, down_bias, values_bias = held if flat else (None, None, None)
            places = (Held((gate,)), Held((down,)), up_bias, down_bias, Held((values,)), values_bias)
            yield _Reading(places, count, _small_sizes(count, rows, rows, width), transposed, "apart", count)


def _below(module: nn.Module, own: Mapping[str, nn.Parameter]) -> Iterator[_Reading]:
    """Equal matrices [e f, d]: up (gate, then values) and down, turned. What e and f are, attributes say."""
    rows, width = next(iter(own.values())).shape
    numbers = {value for value in module.__dict__.values() if type(value) is int and value > 1}
    for count in sorted(value for value in numbers if rows % value == 0 and rows // value in numbers):
        inner, gate = rows // count, "none" if len(own) == 2 else "halves"
        sizes = _small_sizes(count, inner if gate == "none" else 2 * inner, inner, width)
        sizes[rows] = sizes[count] * sizes[inner]
        for *up, down in itertools.permutations(own):
            places = (Held(tuple(up), count), Held((down,), count, turned=True), None, None)
            yield _Reading(places, count, sizes, False, gate, count)


def _small_sizes(count: int, rows: int, inner: int, width: int) -> dict[int, int]:
    """A small size for each size, equal where they are equal; what computes one from another still does.

    Multiples of four, which torch's grouped product asks for."""
    small = {inner: 8, rows: 8 * (rows // inner)}
    small.setdefault(width, 12)
    small.setdefault(count, 5)
    return small


def _shrunk(module: nn.Module, sizes: Mapping[int, int]) -> nn.Module:
    """A copy of ``module`` with parameters (and integer attributes) of the small sizes, with random values."""
    drawn = torch.Generator().manual_seed(1)

    def made(old: nn.Module) -> nn.Module:
        small = copy.copy(old)
        held = {
            name: tensor
            if tensor is None
            else nn.Parameter(torch.randn([sizes[size] for size in tensor.shape], generator=drawn))
            for name, tensor in old._parameters.items()
        }
        attributes = {
            name: sizes.get(value, value)
            for name, value in old.__dict__.items()
            if isinstance(value, int) and not isinstance(value, bool)
        }
        children = {name: child and made(child) for name, child in old._modules.items()}
        small.__dict__ = {**old.__dict__, **attributes, "_parameters": held, "_modules": children}
        small.__dict__.pop("forward", None)
        return small

    return made(module)


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
