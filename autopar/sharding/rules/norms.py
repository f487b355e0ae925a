"""Layer and RMS norms: the normalised dims stay whole, weight and bias are replicated where the rest is split."""

from __future__ import annotations

from autopar.sharding.rules.entry import Call, Entry


def _normalised(call: Call) -> str:
    shape = call.arg(1, "normalized_shape")
    count = len(shape) if isinstance(shape, tuple | list) else 1
    dims = "d^" if count == 1 else " ".join(f"d{index}^" for index in range(count))
    return f"{', '.join([f'... {dims}', *([dims] * (len(call.operands) - 1))])} -> ... {dims}"


ENTRIES = [Entry(f"aten.{op}", compute=_normalised) for op in ("rms_norm", "layer_norm")]
