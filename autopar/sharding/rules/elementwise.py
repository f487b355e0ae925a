"""Elementwise operators, with broadcasting. Only linear ones pass partial sums through.

Of those only the ones that the `spmd_types` checker passes too: it takes operators it has not classified (casts, where,
masked_fill, F.linear) for nonlinear, and what we plan must pass its check.
"""

from __future__ import annotations

from autopar.sharding.rules.entry import Call, Entry

_UNARY = """
relu gelu silu sigmoid tanh exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square abs erf erfc cos sin
tan acos asin atan cosh sinh floor ceil round trunc frac sign sgn logical_not bitwise_not isnan isinf isfinite
softplus elu celu selu leaky_relu hardtanh hardsigmoid hardswish relu6 mish log_sigmoid logit clamp clamp_min
clamp_max nan_to_num threshold zeros_like ones_like full_like
real imag conj_physical
"""
_LINEAR_UNARY = "neg clone contiguous alias detach positive lift_fresh_copy"
_BINARY = """
pow maximum minimum eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor
remainder fmod floor_divide atan2 logaddexp xlogy bitwise_left_shift bitwise_right_shift isclose fmax fmin hypot
"""

_LOSSES = """
smooth_l1_loss huber_loss kl_div binary_cross_entropy binary_cross_entropy_with_logits
"""
"""Their elements: reductions are operators of their own (`autopar.graph.elementwise_losses`)."""


def broadcast(call: Call) -> str:
    """All operands broadcast together: `...` for each."""
    return f"{', '.join('...' for _ in call.operands)} -> ..."


def _sum(call: Call) -> str:
    """A number added to a partial sum would be added by every rank."""
    return "01" if call.is_tensor(0) and call.is_tensor(1) else ""


def _mul(call: Call) -> str:
    return " ".join(str(index) for index in range(len(call.operands)))


def _div(call: Call) -> str:
    return "0" if call.is_tensor(0) and call.arg(2, "rounding_mode") is None else ""


def _elementwise(names: str, linear: object = "") -> list[Entry]:
    return [
        Entry(f"aten.{name}", compute=broadcast, linear=linear, uneven="*")  # type: ignore[arg-type]
        for name in names.split()
    ]


ENTRIES = [
    *_elementwise(_UNARY),
    *_elementwise(_LINEAR_UNARY, "0"),
    *_elementwise(_BINARY),
    *_elementwise("add sub", _sum),
    *_elementwise("mul", _mul),
    *_elementwise("div", _div),
    *_elementwise("where masked_fill addcmul addcdiv lerp rsub dropout"),
    *_elementwise(_LOSSES),
    Entry("autopar.drawn", compute=broadcast, uneven="*"),
    Entry("autopar.cast", compute=broadcast, uneven="*"),
]
