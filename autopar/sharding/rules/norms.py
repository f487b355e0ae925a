"""Layer and RMS norms: the normalised dims stay whole, weight and bias are replicated where the rest is split; norms of
weights."""

from __future__ import annotations

from autopar.sharding.rules.entry import Call, Entry


def _normalised(call: Call) -> str:
    shape = call.arg(1, "normalized_shape")
    count = len(shape) if isinstance(shape, tuple | list) else 1
    dims = "d^" if count == 1 else " ".join(f"d{index}^" for index in range(count))
    return f"{', '.join([f'... {dims}', *([dims] * (len(call.operands) - 1))])} -> ... {dims}"


def _weight_norm(call: Call) -> str:
    """Each slice of a weight along a dim divided by its own norm, times its own magnitude."""
    rank = len(call.shapes[0])
    along = int(call.arg(2, "dim", 0)) % rank
    whole = [f"{chr(ord('a') + dim)}{'' if dim == along else '^'}" for dim in range(rank)]
    scales = [name if dim == along else "1" for dim, name in enumerate(whole)]
    return f"{' '.join(whole)}, {' '.join(scales)} -> {' '.join(whole)}"


ENTRIES = [
    *(Entry(f"aten.{op}", compute=_normalised) for op in ("rms_norm", "layer_norm")),
    Entry("aten._weight_norm", compute=_weight_norm),
]
