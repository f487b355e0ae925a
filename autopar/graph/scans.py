"""Scans of state-space models and gated delta rules, recognised by what their functions take while a model is traced.

The kernels of Mamba and Mamba-2 have an interface of their own (``selective_scan_fn`` and ``mamba_chunk_scan_combined``
of the package mamba_ssm), and models that use them call functions of the same arguments, which loop over positions or
pad to chunks where the kernels are missing: neither can be traced for any sequence length. While a model is exported
such functions are one operator, `autopar.selective_scan` or `autopar.state_space_scan`; what goes on around it (bias
and softplus of the step, skip and gate) is traced as it is written there. So are those of linear attention by the gated
delta rule (``chunk_gated_delta_rule`` and ``chunk_kda`` of the package fla): `autopar.gated_delta_rule`.
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
_library.define(  # type: ignore[no-untyped-call]
    "gated_delta_rule(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, int chunk) -> Tensor"
)
torch.library.register_fake(
    "autopar::gated_delta_rule", lambda query, key, value, *_: torch.empty_like(value), lib=_library
)
for _name in ("selective_scan", "state_space_scan"):
    torch.library.register_fake(f"autopar::{_name}", lambda x, *_: torch.empty_like(x), lib=_library)

SELECTIVE = {"dt", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus"}
CHUNKED = {"dt", "A", "B", "C", "chunk_size", "D", "dt_bias", "dt_softplus"}
DELTA = {"g", "beta", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel"}
CHANNELS_CHUNK = 16
"""Positions in a chunk where every channel decays by itself: products within it are made for each channel."""

SHORT = {"q": "query", "k": "key", "v": "value"}
"""Arguments by the names that fla itself has for them."""

STATES = (
    "return_last_state",
    "return_final_states",
    "initial_states",
    "seq_idx",
    "cu_seqlens",
    "initial_state",
    "output_final_state",
)
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


def _delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """query, key [b, s, g, n]; value [b, s, h, p]; g [b, s, h] or [b, s, h, n]; beta [b, s, h]."""
    wide = [value.float() for value in (query, key, value, g, beta)]
    if use_qk_l2norm_in_kernel:
        wide[:2] = [x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in wide[:2]]
    wide[0] = wide[0] * (query.shape[-1] ** -0.5 if scale is None else scale)
    chunk = min(chunk_size, CHANNELS_CHUNK) if g.ndim == 4 else chunk_size
    return torch.ops.autopar.gated_delta_rule(*wide, chunk).to(query.dtype), None


def _recognised(function: Any) -> Callable[..., Tensor] | None:
    """The form in one operator of a function that takes what a scan takes."""
    if not inspect.isfunction(function):
        return None
    names = inspect.signature(function).parameters.keys()
    forms = ((SELECTIVE, _selective), (CHUNKED, _chunked), (DELTA, _delta))
    found: Callable[..., Any] | None = next((form for asked, form in forms if names >= asked), None)
    if found is None:
        return None
    plain: Callable[..., Any] = function
    asked = STATES if found is _selective else (*STATES, "z")

    def call(*args: Any, **kwargs: Any) -> Any:
        """What the operator has no form for stays as it is."""
        if any(kwargs.get(name) is not None and kwargs[name] is not False for name in asked):
            return plain(*args, **kwargs)
        return found(*args, **{SHORT.get(name, name): value for name, value in kwargs.items()})

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
