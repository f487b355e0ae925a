"""Convolutions and what goes with them on images and sound: pooling, resizing, group and batch norms.

Batch and channels split; positions stay whole (a window reaches over its neighbours). A convolution in groups splits by
group: each of them is a convolution of its own.
"""

from __future__ import annotations

from autopar.graph.ir import CONVOLUTIONS
from autopar.sharding.factors import Mismatch, Names
from autopar.sharding.local import GROUPS
from autopar.sharding.rules.entry import Call, Entry

_AXES = "xyz"


def _convolution(call: Call) -> str:
    """Input ``b (g c) x``, weight ``(g n) c k``, bias ``(g n)``; transposed convolutions have weight ``(g c) n k``."""
    transposed = "transpose" in call.node.op
    rank = len(call.shapes[1]) - 2
    groups = call.arg(GROUPS, "groups", 1)
    batch = "b " if len(call.shapes[0]) == rank + 2 else ""
    before, kernel, after = (" ".join(f"{prefix}{axis}^" for axis in _AXES[:rank]) for prefix in ("", "k", "o"))
    if groups == 1:
        x, n, weight = "c+", "n", "c+ n" if transposed else "n c+"
    else:
        x, n, weight = "(g c^)", "(g n^)", "(g c^) n^" if transposed else "(g n^) c^"
    bias = f", {n}" if len(call.operands) == 3 else ""
    return f"{batch}{x} {before}, {weight} {kernel}{bias} -> {batch}{n} {after}"


def _windows(call: Call) -> str:
    """Batch and channels stay, positions become others."""
    names = Names()
    rank = len(call.shapes[0]) - 2
    if rank < 1 or len(call.output) != rank + 2:
        raise Mismatch("not a batch of channels of positions")
    lead = [names.take(size) for size in call.shapes[0][:2]]
    before = [names.take(size) + "^" for size in call.shapes[0][2:]]
    after = [names.take(size) + "^" for size in call.output[2:]]
    return f"{' '.join([*lead, *before])} -> {' '.join([*lead, *after])}"


def _group_norm(call: Call) -> str:
    """Samples are normed apart. (Groups are counted in an argument, which would have to be cut: channels stay.)"""
    rank = len(call.shapes[0]) - 2
    rest = " ".join(["c^", *(f"x{index}^" for index in range(rank))])
    return f"{', '.join([f'b {rest}', *['c^'] * (len(call.operands) - 1)])} -> b {rest}"


def _batch_norm(call: Call) -> str:
    """Channels are normed apart, each over all samples and positions."""
    names = Names()
    dims = [names.take(size) + ("" if dim == 1 else "^") for dim, size in enumerate(call.shapes[0])]
    whole = " ".join(dims)
    return f"{', '.join([whole, *[dims[1]] * (len(call.operands) - 1)])} -> {whole}"


_POOLS = [f"{kind}_pool{rank}d" for kind in ("max", "avg", "adaptive_avg") for rank in (1, 2, 3)]
_RESIZES = [f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "linear1d", "bilinear2d", "bicubic2d")]
_RESIZES += ["upsample_nearest3d", "upsample_trilinear3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d"]
_RESIZES += ["_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]

ENTRIES = [
    *(Entry(op, compute=_convolution, once="2") for op in CONVOLUTIONS),
    *(Entry(f"aten.{op}", compute=_windows) for op in (*_POOLS, *_RESIZES)),
    Entry("aten.group_norm", compute=_group_norm),
    Entry("aten.batch_norm", compute=_batch_norm),
]
