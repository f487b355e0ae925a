"""The operators that are measured: their sizes, and the FLOP and bytes of each direction at a point.

No torch here, so that prices are read without it; `autopar.profiler.operators` runs them. FLOP and bytes serve
interpolation alone (`autopar.profiler.surface`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

Point = tuple[int, ...]
WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
WIDE = ("fp32", "bf16", "fp16")
MATMUL = ("forward", "input_grad", "weight_grad")
TRAINED = ("forward", "backward")


@dataclass(frozen=True, slots=True)
class Family:
    """One family of operators.

    ``dims``: names of the sizes; ``low``, ``high``: their range; ``fixed``: the sizes a dim takes where they are not
    powers of two. ``cost(point, direction, width)``: FLOP and bytes. ``resident(point, width)``: bytes of one set of
    buffers. ``valid``: whether a point makes sense. ``weight``: share of the time it deserves against the others.
    """

    name: str
    dims: tuple[str, ...]
    low: Point
    high: Point
    directions: tuple[str, ...]
    cost: Callable[[Point, str, int], tuple[float, float]]
    resident: Callable[[Point, int], float]
    dtypes: tuple[str, ...] = WIDE
    weight: float = 1.0
    valid: Callable[[Point], bool] = lambda point: True
    fixed: Mapping[int, tuple[int, ...]] | None = None


def _product_cost(batch: int, m: int, n: int, k: int, width: int) -> tuple[float, float]:
    return 2.0 * batch * m * n * k, float(width * batch * (m * k + k * n + m * n))


def _grouped_cost(point: Point, direction: str, width: int) -> tuple[float, float]:
    groups, rows, n, k = point
    once = width * (rows * k + groups * n * k + rows * n)
    return (2.0 * rows * n * k, float(once)) if direction == "forward" else (4.0 * rows * n * k, 2.0 * once)


def _attention_cost(share: float) -> Callable[[Point, str, int], tuple[float, float]]:
    def cost(point: Point, direction: str, width: int) -> tuple[float, float]:
        problems, group, length, head_dim = point
        matmuls = 2 if direction == "forward" else 5
        moved = problems * length * head_dim * width * (2 + 2 / group) * (1 if direction == "forward" else 2)
        return 2.0 * matmuls * problems * length * length * head_dim * share, float(moved)

    return cost


def _streamed(forward: float, backward: float) -> Callable[[Point, str, int], tuple[float, float]]:
    """Passes over a tensor of the point's elements."""
    return lambda point, direction, width: (
        0.0,
        float(prod(point) * width * (forward if direction == "forward" else backward)),
    )


FAMILIES: tuple[Family, ...] = (
    Family(
        "matmul",
        ("m", "n", "k"),
        (32, 32, 32),
        (65536, 65536, 65536),
        MATMUL,
        lambda p, d, w: _product_cost(1, p[0], p[1], p[2], w),
        lambda p, w: w * (p[0] * p[2] + p[1] * p[2] + p[0] * p[1]),
        ("fp32", "bf16", "fp16", "fp8"),
        weight=4.0,
    ),
    Family(
        "batched_matmul",
        ("batch", "m", "n", "k"),
        (2, 32, 32, 32),
        (512, 8192, 8192, 8192),
        MATMUL,
        lambda p, d, w: _product_cost(p[0], p[1], p[2], p[3], w),
        lambda p, w: w * p[0] * (p[1] * p[3] + p[2] * p[3] + p[1] * p[2]),
    ),
    Family(
        "grouped_matmul",
        ("groups", "rows", "n", "k"),
        (2, 64, 64, 64),
        (128, 65536, 16384, 16384),
        TRAINED,
        _grouped_cost,
        lambda p, w: 3 * w * (p[1] * p[3] + p[0] * p[2] * p[3] + p[1] * p[2]),
        valid=lambda p: p[1] >= 8 * p[0],
    ),
    *(
        Family(
            name,
            ("problems", "group", "length", "head_dim"),
            (1, 1, 64, 32),
            (512, 8, 131072, 256),
            TRAINED,
            _attention_cost(share),
            lambda p, w: w * p[0] * p[2] * p[3] * (4 + 4 / p[1]),
            weight=2.0,
            valid=lambda p: p[0] % p[1] == 0 and p[0] >= p[1],
            fixed={1: (1, 4, 8), 3: (32, 64, 96, 128, 192, 256)},
        )
        for name, share in (("attention", 1.0), ("causal_attention", 0.5))
    ),
    *(
        Family(
            name,
            ("rows", "width"),
            (16, 64),
            (65536, 32768),
            TRAINED,
            _streamed(2, 5),
            lambda p, w: 5 * w * prod(p),
        )
        for name in ("layer_norm", "rms_norm", "softmax")
    ),
    *(
        Family(
            name,
            ("elements",),
            (1024,),
            (1 << 30,),
            TRAINED,
            _streamed(forward, 3),
            lambda p, w: 5 * w * prod(p),
            weight=0.5,
        )
        for name, forward in (("silu", 2), ("gelu", 2), ("multiply", 3))
    ),
    *(
        Family(
            name,
            ("elements",),
            (1024,),
            (1 << 30,),
            ("forward",),
            _streamed(forward, 0),
            lambda p, w: 4 * w * prod(p),
            weight=0.5,
        )
        for name, forward in (("add", 3), ("copy", 2))
    ),
    Family(
        "cross_entropy",
        ("rows", "vocabulary"),
        (16, 512),
        (32768, 262144),
        TRAINED,
        lambda p, d, w: (0.0, float(prod(p) * ((w + 12) if d == "forward" else (w + 16)))),
        lambda p, w: (2 * w + 16) * prod(p),
    ),
    Family(
        "embedding",
        ("rows", "vocabulary", "width"),
        (16, 512, 64),
        (65536, 262144, 16384),
        TRAINED,
        lambda p, d, w: (0.0, float(w * (2 * p[0] * p[2] if d == "forward" else (p[1] + 3 * p[0]) * p[2]))),
        lambda p, w: w * (2 * p[1] + 2 * p[0]) * p[2],
    ),
    *(
        Family(
            name,
            ("elements",),
            (4096,),
            (1 << 30,),
            ("step",),
            lambda p, d, w: (0.0, 7.0 * w * p[0]),
            lambda p, w: 8 * w * p[0],
            ("fp32",),
        )
        for name in ("adamw_fused", "adamw_foreach")
    ),
    *(
        Family(
            name,
            ("bytes",),
            (4096,),
            (1 << 30,),
            ("copy",),
            lambda p, d, w: (0.0, float(p[0])),
            lambda p, w: 2 * p[0],
            ("bytes",),
            weight=0.5,
        )
        for name in ("copy_to_device", "copy_to_host")
    ),
)


def family(name: str) -> Family:
    """The family called ``name``. Raises KeyError."""
    return _BY_NAME[name]


_BY_NAME: dict[str, Family] = {each.name: each for each in FAMILIES}
