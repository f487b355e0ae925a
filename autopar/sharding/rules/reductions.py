"""Reductions, softmaxes and scans: dims named by argument."""

from __future__ import annotations

from autopar.sharding.factors import Names
from autopar.sharding.rules.entry import Call, Entry


def dims_of(value: object, rank: int) -> tuple[int, ...]:
    """A dim argument as non-negative dims; None means all."""
    if value is None or value == ():
        return tuple(range(rank))
    dims = value if isinstance(value, tuple | list) else (value,)
    return tuple(dim % rank if rank else 0 for dim in dims)


def letters(call: Call) -> list[str]:
    """A factor name for each dim of the first operand."""
    names = Names()
    return [names.take(size) for size in reversed(call.shapes[0])][::-1]


def _reduce(mark: str, dim_at: int = 1, keep_at: int = 2):  # type: ignore[no-untyped-def]
    def compute(call: Call) -> str:
        names = letters(call)
        reduced = dims_of(call.arg(dim_at, "dim"), len(names))
        keep = bool(call.arg(keep_at, "keepdim", False))
        source = [name + mark if index in reduced else name for index, name in enumerate(names)]
        target = ["1" if index in reduced else name for index, name in enumerate(names) if keep or index not in reduced]
        return f"{' '.join(source) or '()'} -> {' '.join(target) or '()'}"

    return compute


def _along(dim_at: int = 1):  # type: ignore[no-untyped-def]
    def compute(call: Call) -> str:
        names = letters(call)
        along = dims_of(call.arg(dim_at, "dim", -1), len(names))
        marked = [name + "^" if index in along else name for index, name in enumerate(names)]
        return f"{' '.join(marked) or '()'} -> {' '.join(marked) or '()'}"

    return compute


def _topk(call: Call) -> str:
    """The dim that is searched stays whole; the chosen ones are a dim of their own."""
    names = letters(call)
    along = int(call.node.args[2])
    used = Names(names)
    source = [name + "^" if index == along else name for index, name in enumerate(names)]
    target = [used.take(0) + "^" if index == along else name for index, name in enumerate(names)]
    return f"{' '.join(source)} -> {' '.join(target)}"


def _histogram(call: Call) -> str:
    """Counts in given bins, which add up; bins between the least and the largest element do not."""
    names = letters(call)
    bounds = (call.arg(2, "min", 0), call.arg(3, "max", 0))
    mark = "^" if bounds[0] == bounds[1] else "+"
    source = " ".join(name + mark for name in names) or "()"
    return f"{source} -> {Names(names).take(call.arg(1, 'bins', 100))}^"


def _transformed(call: Call) -> str:
    """A Fourier transform along dims, which stay whole and may become longer or shorter."""
    names = letters(call)
    dims = call.arg(2, "dim", -1 if call.node.op in _ALONG_ONE else (-2, -1) if call.node.op.endswith("2") else None)
    chosen = range(len(names)) if dims is None else (dims,) if isinstance(dims, int) else dims
    along = {int(dim) % len(names) for dim in chosen}
    used = Names(names)
    source = [name + "^" if index in along else name for index, name in enumerate(names)]
    target = [used.take(call.output[index]) + "^" if index in along else name for index, name in enumerate(names)]
    return f"{' '.join(source)} -> {' '.join(target)}"


_ALONG_ONE = tuple(f"aten.fft_{op}" for op in ("fft", "ifft", "rfft", "irfft"))
_ALONG_MANY = tuple(f"{op}{dims}" for op in _ALONG_ONE for dims in ("2", "n"))


def _last_two(call: Call) -> str:
    return "... i^ j^ -> ... i^ j^"


ENTRIES = [
    Entry("aten.sum", compute=_reduce("+"), linear="0"),
    # A mean over part of a dim would have to be scaled by the number of ranks; its dims stay whole.
    Entry("aten.mean", compute=_reduce("^"), linear="0"),
    *(
        Entry(f"aten.{op}", compute=_reduce("^"))
        for op in ["amax", "amin", "logsumexp", "prod", "any", "all", "argmax", "argmin"]
    ),
    *(Entry(f"aten.{op}", compute=_reduce("^", keep_at=3)) for op in ("var", "std")),
    Entry("aten.linalg_vector_norm", compute=_reduce("^", dim_at=2, keep_at=3)),
    *(
        Entry(f"aten.{op}", compute=_along())
        for op in ["softmax", "_softmax", "log_softmax", "_log_softmax", "cumprod", "argsort"]
    ),
    Entry("autopar.topk", compute=_topk),
    Entry("aten.histc", compute=_histogram),
    Entry("aten.cumsum", compute=_along(), linear="0"),
    Entry("aten.flip", compute=_along(), linear="0"),
    Entry("aten.roll", compute=_along(2), linear="0"),
    *(Entry(op, compute=_transformed, linear="0") for op in (*_ALONG_ONE, *_ALONG_MANY)),
    *(Entry(f"aten.{op}", compute=_last_two) for op in ("tril", "triu")),
]
