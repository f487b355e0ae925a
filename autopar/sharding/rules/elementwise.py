"""Elementwise operators, with broadcasting. Only the linear ones pass partial sums through."""

from __future__ import annotations

from autopar.sharding.rules.entry import Call, Entry

_UNARY = """
relu gelu silu sigmoid tanh exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square abs erf erfc cos sin tan
acos asin atan cosh sinh floor ceil round trunc frac sign sgn logical_not bitwise_not isnan isinf isfinite softplus elu celu selu
leaky_relu hardtanh hardsigmoid hardswish relu6 mish log_sigmoid logit clamp clamp_min clamp_max nan_to_num threshold
zeros_like ones_like full_like
"""
_LINEAR_UNARY = "neg clone contiguous alias detach positive lift_fresh_copy"
_BINARY = """
pow maximum minimum eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor
remainder fmod floor_divide atan2 logaddexp xlogy bitwise_left_shift bitwise_right_shift isclose fmax fmin hypot
"""


def broadcast(call: Call) -> str:
    """All operands broadcast together: `...` for each."""
    return f"{', '.join('...' for _ in call.operands)} -> ..."


def _tensors(*positions: int, sets: str, otherwise: str = "") -> object:
    """Linear in ``sets`` when the arguments at ``positions`` are all tensors, else in ``otherwise``."""
    return lambda call: sets if all(call.is_tensor(position) for position in positions) else otherwise


def _mul(call: Call) -> str:
    return " ".join(str(index) for index in range(len(call.operands)))


def _div(call: Call) -> str:
    return "0" if call.is_tensor(0) and call.arg(2, "rounding_mode") is None else ""


def _cast(call: Call) -> str:
    return "0" if str(call.arg(1, "dtype")) in ("compute", "float32", "float64", "bfloat16", "float16") else ""


def _dropout(call: Call) -> str:
    """Without drawing, dropout is the identity. A mask drawn apart on each rank would not be one mask of the sum."""
    drawn = call.arg(2, "train", True) and call.arg(1, "p", 0.5) != 0
    return "" if drawn else "0"


def _where(call: Call) -> str:
    if call.is_tensor(1) and call.is_tensor(2):
        return "12"
    return "1" if (call.is_tensor(1) and call.arg(2, "other") == 0) or call.arg(1, "self") == 0 else ""


def _masked_fill(call: Call) -> str:
    return "0" if not call.is_tensor(2) and call.arg(2, "value") == 0 else ""


def _elementwise(names: str, linear: object = "") -> list[Entry]:
    return [Entry(f"aten.{name}", compute=broadcast, linear=linear) for name in names.split()]  # type: ignore[arg-type]


ENTRIES = [
    *_elementwise(_UNARY),
    *_elementwise(_LINEAR_UNARY, "0"),
    *_elementwise(_BINARY),
    *_elementwise("add sub rsub", _tensors(0, 1, sets="01")),
    *_elementwise("mul", _mul),
    *_elementwise("div", _div),
    *_elementwise("where", _where),
    *_elementwise("masked_fill", _masked_fill),
    *_elementwise("addcmul addcdiv", _tensors(0, 1, 2, sets="01")),
    *_elementwise("lerp", _tensors(0, 1, 2, sets="01", otherwise="01")),
    *_elementwise("dropout", _dropout),
    Entry("autopar.cast", compute=broadcast, linear=_cast),
]
