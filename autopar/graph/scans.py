"""Scans of state-space models, recognised by what their functions take while a model is traced.

The kernels of Mamba and Mamba-2 have an interface of their own (``selective_scan_fn`` and ``mamba_chunk_scan_combined``
of the package mamba_ssm), and models that use them call functions of the same arguments, which loop over positions or
pad to chunks where the kernels are missing: neither can be traced for any sequence length. While a model is exported
such functions are one operator, `autopar.selective_scan` or `autopar.state_space_scan`; what goes on around it (bias
and softplus of the step, skip and gate) is traced as it is written there.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_library = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "selective_scan(Tensor x, Tensor step, Tensor decay, Tensor write, Tensor read) -> Tensor"
)
_library.define(  # type: ignore[no-untyped-call]
    "state_space_scan(Tensor x, Tensor step, Tensor decay, Tensor write, Tensor read, int chunk) -> Tensor"
)
for _name in ("selective_scan", "state_space_scan"):
    torch.library.register_fake(f"autopar::{_name}", lambda x, *_: torch.empty_like(x), lib=_library)

SELECTIVE = {"dt", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus"}
CHUNKED = {"dt", "A", "B", "C", "chunk_size", "D", "dt_bias", "dt_softplus"}

STATES = ("return_last_state", "return_final_states", "initial_states", "seq_idx", "cu_seqlens")
"""Arguments about states that are handed in or out, which are those of generation, not of training."""


def _selective(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **_: Any,
) -> Tensor:
    """x, dt [b, d, s]; A [d, n]; B, C [b, n, s]."""
    step = dt if delta_bias is None else dt + delta_bias.to(dt.dtype).unsqueeze(-1)
    step = F.softplus(step) if delta_softplus else step
    wide = [value.float() for value in (x, step, A, B, C)]
    y: Tensor = torch.ops.autopar.selective_scan(*wide)
    y = y if D is None else y + wide[0] * D.unsqueeze(-1)
    y = y if z is None else y * F.silu(z)
    return y.to(x.dtype)


def _chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: Any,
) -> Tensor:
    """x [b, s, h, p]; dt [b, s, h]; A [h]; B, C [b, s, g, n]."""
    step = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    step = F.softplus(step) if dt_softplus else step
    if tuple(dt_limit) != (0.0, float("inf")) or not dt_softplus:
        step = torch.clamp(step, dt_limit[0], dt_limit[1])
    wide = [value.float() for value in (x, step, A, B, C)]
    y: Tensor = torch.ops.autopar.state_space_scan(*wide, chunk_size)
    return y if D is None else y + wide[0] * D.unsqueeze(-1)


def _recognised(function: Any) -> Callable[..., Tensor] | None:
    """The form in one operator of a function that takes what a scan takes."""
    if not inspect.isfunction(function):
        return None
    names = inspect.signature(function).parameters.keys()
    found = _selective if names >= SELECTIVE else _chunked if names >= CHUNKED else None
    if found is None:
        return None
    plain: Callable[..., Any] = function
    asked = STATES if found is _selective else (*STATES, "z")

    def call(*args: Any, **kwargs: Any) -> Any:
        """What the operator has no form for stays as it is."""
        if any(kwargs.get(name) is not None and kwargs[name] is not False for name in asked):
            return plain(*args, **kwargs)
        return found(*args, **kwargs)

    return call


@contextlib.contextmanager
def scans_whole(model: nn.Module) -> Iterator[None]:
    """While open, the modules that define ``model``'s classes call scans as one operator."""
    homes = {
        sys.modules[type(module).__module__] for module in model.modules() if type(module).__module__ in sys.modules
    }
    replaced: list[tuple[Any, str, Any]] = []
    for home in homes:
        if home.__name__.startswith("torch."):
            continue
        for name, value in list(vars(home).items()):
            if (whole := _recognised(value)) is not None:
                replaced.append((home, name, value))
                setattr(home, name, whole)
    try:
        yield
    finally:
        for home, name, value in replaced:
            setattr(home, name, value)
