"""What a `torch.autograd.Function` that autopar was not told of computes: seen by running it on random tensors."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

PLAIN_APPLY = torch.autograd.Function.__dict__["apply"]

LARGEST = 10_000_000
"""Elements of the random tensors beyond which a Function is not run."""
SCALES = (1.0, 0.1, 10.0)
"""Of the random numbers, so that what happens to large and to small ones (clamps) is seen."""


class _Context:
    """Stands for ``ctx`` where a forward is run as it is written."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@contextlib.contextmanager
def _really() -> Iterator[torch.Generator]:
    """Real tensors in the middle of tracing."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with disable_proxy_modes_tracing(), unset_fake_temporarily(), torch.enable_grad():
        yield torch.Generator().manual_seed(0)


def _drawn(args: Sequence[Any], generator: torch.Generator, scale: float = 1.0) -> list[Any]:
    """``args`` with random tensors in the place of traced ones; symbolic sizes are small even numbers."""
    sizes: dict[str, int] = {}

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = [
            size if isinstance(size, int) else sizes.setdefault(str(size), 4 + 2 * len(sizes)) for size in value.shape
        ]
        if torch.Size(shape).numel() > LARGEST:
            raise ValueError("too large to be tried")
        if not value.is_floating_point():
            return torch.randint(0, 2, shape, generator=generator).to(value.dtype)
        return (scale * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()

    return [real(value) for value in args]


def backward_is_plain(cls: Any, args: Sequence[Any]) -> bool:
    """Whether a Function's backward is what autograd makes of its forward."""
    own_context = cls.setup_context is torch.autograd.Function.setup_context
    try:
        with _really() as generator:
            given = _drawn(args, generator)
            leaves = [value for value in given if isinstance(value, Tensor) and value.requires_grad]
            found = PLAIN_APPLY.__get__(None, cls)(*given)
            wanted = cls.forward(_Context(), *given) if own_context else cls.forward(*given)
            weights = torch.randn(found.shape, dtype=torch.float64, generator=generator)
            one, other = (torch.autograd.grad((y * weights).sum(), leaves) for y in (found, wanted))
    except Exception:  # what cannot be compared is not known to be equal
        return False
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(one, other, strict=True))


def annotation_of(cls: Any, args: Sequence[Any]) -> str | None:
    """How a Function may be split, as an annotation: along which dims of its result it computes parts from parts.

    Dims of the operands are matched with those of the result from the right, as in broadcasting. None where it cannot
    be run, or returns something else than one tensor.
    """
    call = PLAIN_APPLY.__get__(None, cls)
    try:
        with _really() as generator:
            given = _drawn(args, generator)
            tensors = [value for value in given if isinstance(value, Tensor)]
            output = call(*given)
            if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim > 8 or not tensors:
                return None
            apart = [dim for dim in range(output.ndim) if output.shape[dim] > 1]
            for scale in SCALES:
                given = _drawn(args, generator, scale)
                apart = [dim for dim in apart if _splits(call, given, dim, output.shape, generator)]
    except Exception:  # code that was not written to be tried may fail in any way
        return None
    names = string.ascii_lowercase
    texts = []
    for place, tensor in enumerate(tensors):
        dims = []
        for dim, size in enumerate(tensor.shape):
            matched = dim + output.ndim - tensor.ndim
            if matched >= 0 and size == output.shape[matched]:
                dims.append(names[matched] + ("" if matched in apart else "^"))
            else:
                dims.append(f"z{place}x{dim}^")
        texts.append(" ".join(dims))
    result = " ".join(names[dim] + ("" if dim in apart else "^") for dim in range(output.ndim))
    return f"{', '.join(texts)} -> {result}"


def _splits(
    call: Callable[..., Tensor], given: Sequence[Any], dim: int, shape: torch.Size, generator: torch.Generator
) -> bool:
    """Whether halves of the operands along ``dim`` of the result give halves of the result, and of the gradients."""
    tensors = [value for value in given if isinstance(value, Tensor)]
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    whole = call(*given)
    weights = torch.randn(shape, dtype=torch.float64, generator=generator)
    wanted = torch.autograd.grad((whole * weights).sum(), leaves, allow_unused=True)
    middle = shape[dim] // 2
    found: list[list[Tensor | None]] = []
    outputs = []
    for start, stop in ((0, middle), (middle, shape[dim])):
        parts = [_part(value, dim - len(shape), start, stop, shape[dim]) for value in given]
        output = call(*parts)
        outputs.append(output)
        own = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
        scaled = output * weights.narrow(dim, start, stop - start)
        found.append(list(torch.autograd.grad(scaled.sum(), own, allow_unused=True)))
    if not _close(torch.cat(outputs, dim), whole):
        return False
    for leaf, gradient, one, other in zip(leaves, wanted, *found, strict=True):
        if gradient is None or one is None or other is None:
            if not (gradient is one is other):
                return False
            continue
        split = one.shape != leaf.shape or other.shape != leaf.shape
        if not _close(torch.cat((one, other), dim - len(shape)) if split else one + other, gradient):
            return False
    return True


def _part(value: Any, dim: int, start: int, stop: int, size: int) -> Any:
    """The part of an argument along ``dim`` (negative), where it has that dim."""
    if not isinstance(value, Tensor):
        return value
    if value.ndim >= -dim and value.shape[dim] == size:
        return value.detach().narrow(dim, start, stop - start).clone().requires_grad_(value.requires_grad)
    return value.detach().clone().requires_grad_(value.requires_grad)


def _close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-9, atol=1e-11, equal_nan=True)
