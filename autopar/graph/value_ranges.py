"""Between which numbers the values of a tensor lie, as far as the code that made it says so, while a model is traced.

``if mask.any():`` and ``int(stride)`` ask for values, which a traced tensor has not. Often the answer is the same for
all data: a mask made of ones masks nothing, a stride is kept in a buffer of one number. Ranges are followed through
what makes, moves, compares and adds up tensors; what is asked for is answered where a range is one number, and what is
picked or assigned by a mask that is known to be of one value everywhere is all or nothing of it.

A range belongs to the memory of a tensor, so that its views have the same one; what writes to that memory in a way not
known here ends it (torch counts such changes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.overrides import TorchFunctionMode

from autopar.graph.intervals import EITHER, FALSE, KEPT, OF_ONE, OF_TWO, TRUE, Range, union

MOST = 64
"""Elements of a buffer whose values are looked at."""


@dataclass(frozen=True, slots=True)
class _Known:
    """``tensor`` is kept so that its memory is not another's; ``version`` as it was when this was known; ``assumed``:
    the inputs whose values were taken to be as in the example."""

    tensor: Tensor
    version: int
    range: Range
    assumed: frozenset[str]


def small_numbers(model: nn.Module) -> dict[str, Range]:
    """The ranges of those buffers of ``model`` that hold few whole numbers, where their values are known."""
    return {
        name: (float(buffer.min()), float(buffer.max()))
        for name, buffer in model.named_buffers()
        if not (buffer.is_floating_point() or buffer.is_complex() or buffer.is_meta or is_fake(buffer))
        and 0 < buffer.numel() <= MOST
    }


def masks_told(names: Collection[str]) -> tuple[str, ...]:
    """What to tell of the inputs that were taken to hold what they hold in the example."""
    told = ", ".join(sorted(names))
    return (f"{told} of zeros and ones only, as in the example inputs: for others the model runs other code",) * bool(
        told
    )


class ValueRanges(TorchFunctionMode):
    """While open, answers what values of tensors are where it is known; see the module.

    ``buffers``: ranges of those of ``copied``, by full name. ``masks``: inputs that hold zeros and ones in the example.
    ``relied``: those of them on which an answer relied.
    """

    def __init__(self, copied: nn.Module, buffers: Mapping[str, Range], masks: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self._copied, self._buffers, self._masks = copied, buffers, masks
        self._known: dict[int, _Known] = {}
        self._truths: dict[int, tuple[Tensor, Tensor, int]] = {}
        """Masks of what is not zero in a tensor, the tensor, and its version then."""
        self._assumed: frozenset[str] = frozenset()
        self.relied: set[str] = set()

    def batch(self, batch: Mapping[str, Tensor]) -> None:
        """The tensors that are traced in place of the inputs."""
        for name in self._masks & batch.keys():
            self._record(batch[name], EITHER, frozenset({name}))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ASKS and len(args) == 1 and isinstance(args[0], Tensor):
            number = self._number(args[0])
            return func(*args, **options) if number is None else _ASKS[name](number)
        if name in ("div", "floor_divide") and not any(isinstance(arg, Tensor) for arg in args):
            whole = name == "floor_divide" or options.get("rounding_mode") in ("trunc", "floor")
            return args[0] // args[1] if whole else func(*args, **options)  # of sizes: torch would make a tensor
        if name == "__getitem__" and (picked := self._picked(*args)) is not None:
            return picked
        if name == "__setitem__":
            return self._assign(func, *args)
        if name in _OF_SIZES:
            args, options = self._sized(args), {key: self._size(value) for key, value in options.items()}
        changed = _changes(name)
        self._assumed = frozenset()
        found = self._range(_CHANGING.get(name, name.strip("_")) if changed else _PLAIN.get(name, name), args, options)
        if changed and found is not None and args[0]._base is not None:  # a part of what its memory holds
            before = self.of(args[0])
            found = None if before is None else union(before, found)
        result = func(*args, **options)
        if (
            isinstance(result, Tensor)
            and result.dtype == torch.bool
            and name in ("bool", "to")
            and (memory := _memory(result))
        ):
            self._truths[memory] = (result, args[0], args[0]._version)
        if isinstance(result, Tensor) and found is not None and not any(map(math.isnan, found)):
            self._record(result, found, self._assumed)
        return result

    def of(self, value: Any) -> Range | None:
        """The range of a tensor or a number; what it was assumed of counts for what is made of it."""
        if isinstance(value, bool | int | float):
            return float(value), float(value)
        if not isinstance(value, Tensor) or value.is_complex() or value.layout != torch.strided:
            return None
        if isinstance(value.numel(), int) and not value.numel():
            return None
        known = self._known.get(_memory(value)) or self._buffer(value)
        if known is None or known.version != value._version:
            return None
        self._assumed |= known.assumed
        return known.range

    def _record(self, x: Tensor, found: Range, assumed: frozenset[str]) -> None:
        if x.layout == torch.strided and not x.is_complex() and (memory := _memory(x)):
            self._known[memory] = _Known(x, x._version, found, assumed)

    def _buffer(self, x: Tensor) -> _Known | None:
        if x.is_floating_point() or not isinstance(count := x.numel(), int) or count > MOST:
            return None
        for name, buffer in self._copied.named_buffers():
            if buffer is x and (value := self._buffers.get(name)) is not None:
                self._record(x, value, frozenset())
                return self._known.get(_memory(x))
        return None

    def _number(self, x: Any) -> float | None:
        """The one value of a tensor of one element, where it is known."""
        self._assumed = frozenset()
        found = self.of(x)
        if found is None or found[0] != found[1] or not isinstance(x.numel(), int) or x.numel() != 1:
            return None
        self.relied |= self._assumed
        return found[0] if x.is_floating_point() else int(found[0])

    def _size(self, value: Any) -> Any:
        """``value`` as a number, where it is a tensor of one that is known."""
        if isinstance(value, tuple | list):
            return type(value)(self._size(item) for item in value) if type(value) in (tuple, list) else value
        if isinstance(value, Tensor) and not value.ndim and not value.is_floating_point():
            number = self._number(value)
            return value if number is None else number
        return value

    def _sized(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0], *(self._size(arg) for arg in args[1:])) if args else args

    def _everywhere(self, index: Any) -> bool | None:
        """What a mask is in all places; None if it is no mask, or not known."""
        if not isinstance(index, Tensor) or index.dtype != torch.bool or not index.ndim:
            return None
        self._assumed = frozenset()
        found = self.of(index)
        if found is None or found[0] != found[1]:
            return None
        self.relied |= self._assumed
        return bool(found[0])

    def _picked(self, x: Tensor, index: Any) -> Tensor | None:
        every = self._everywhere(index)
        if every is None:
            return None
        flat = x.flatten(0, index.ndim - 1)
        return flat.clone() if every else flat[:0]

    def _assign(self, func: Any, x: Tensor, index: Any, value: Any) -> None:
        every = self._everywhere(index)
        if every is False:
            return
        self._assumed = frozenset()
        before, given = self.of(x), self.of(value)
        if every and (not isinstance(value, Tensor) or not value.ndim):
            x.fill_(value)
        elif every:
            x.copy_(value if index.ndim == 1 else value.reshape(x.shape))
        else:
            func(x, index, value)
        if before is not None and given is not None:
            self._record(x, union(before, given), self._assumed)

    def _range(self, name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> Range | None:
        """The range of what a function gives."""
        if name in _MADE:
            return _MADE[name]
        if name in ("full", "full_like", "new_full", "fill", "copy"):
            place = 2 if name == "new_full" else 1
            return self.of(options.get("fill_value", args[place] if len(args) > place else None))
        if name in ("scalar_tensor", "tensor"):
            return self.of(args[0]) if isinstance(args[0], bool | int | float) else None
        if name in ("cat", "stack", "concat", "concatenate"):
            return self._hull(args[0]) if isinstance(args[0], tuple | list) else None
        if not args or not isinstance(args[0], Tensor):
            return None
        if name == "where" and len(args) == 3:
            return self._chosen(*args)
        if name == "masked_fill":
            filled = self._truths.get(_memory(args[1])) if isinstance(args[1], Tensor) else None
            zeros_left = filled is not None and filled[1] is args[0] and filled[2] == args[0]._version
            return self._chosen(args[1], args[2], 0 if zeros_left else args[0])
        if name == "pad" and options.get("mode", args[2] if len(args) > 2 else "constant") == "constant":
            return self._hull((args[0], options.get("value", args[3] if len(args) > 3 else None) or 0))
        if name in ("triu", "tril"):
            return self._hull((args[0], 0))
        if name == "interpolate":
            return self.of(args[0]) if options.get("mode", "nearest") == "nearest" else None
        if name in ("clamp", "clip"):
            lowest, highest = ((*args[1:], None, None)[place] for place in (0, 1))
            return self._clamped(args[0], options.get("min", lowest), options.get("max", highest))
        if name in ("invert", "logical_not") and args[0].dtype != torch.bool:
            return None
        if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
            return None
        if name == "sum":
            return self._total(args[0], options.get("dim", args[1] if len(args) > 1 else None))
        if name in OF_ONE and (len(args) == 1 or name in KEPT) and (x := self.of(args[0])) is not None:
            return OF_ONE[name](x, _cast(args, options) if name in ("to", "type") else None)
        if name in OF_TWO and len(args) == 2 and not options:
            both = self.of(args[0]), self.of(args[1])
            return None if both[0] is None or both[1] is None else OF_TWO[name](both[0], both[1])
        return None

    def _hull(self, parts: Any) -> Range | None:
        found = [self.of(part) for part in parts]
        known = [each for each in found if each is not None]
        return None if len(known) < len(found) or not known else (min(k[0] for k in known), max(k[1] for k in known))

    def _chosen(self, mask: Any, yes: Any, no: Any) -> Range | None:
        found = self.of(mask)
        if found in (TRUE, FALSE):
            return self.of(yes if found == TRUE else no)
        return self._hull((yes, no))

    def _clamped(self, x: Tensor, lowest: Any, highest: Any) -> Range | None:
        low, high = (value if isinstance(value, int | float) else None for value in (lowest, highest))
        if (lowest is not None and low is None) or (highest is not None and high is None):
            return None
        before = self.of(x) or (-math.inf, math.inf)

        def held(number: float) -> float:
            number = number if low is None else max(number, low)
            return number if high is None else min(number, high)

        return held(before[0]), held(before[1])

    def _total(self, x: Tensor, dim: Any) -> Range | None:
        found = self.of(x)
        dims = range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
        count = math.prod(x.shape[each] for each in dims)
        if found is None:
            return None
        if found == FALSE:
            return FALSE
        return (count * found[0], count * found[1]) if isinstance(count, int) else None


def _memory(x: Tensor) -> int:
    """What tells memories apart; 0 for tensors that have none of their own (under `torch.vmap`)."""
    try:
        return int(x.untyped_storage()._cdata)
    except NotImplementedError:
        return 0


def _changes(name: str) -> bool:
    """Whether a function changes its first argument."""
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


def _cast(args: tuple[Any, ...], options: Mapping[str, Any]) -> torch.dtype | None:
    given = (*args[1:], *options.values())
    tensors = [value.dtype for value in given if isinstance(value, Tensor)]
    return next((value for value in given if isinstance(value, torch.dtype)), tensors[0] if tensors else None)


_MADE = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero"), FALSE),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), TRUE),
}
_ASKS: dict[str, Callable[[float], Any]] = {
    "__bool__": bool,
    "__int__": int,
    "__float__": float,
    "__index__": int,
    "item": lambda number: number,
}
_OF_SIZES = frozenset(
    ("pad", "view", "reshape", "expand", "repeat", "narrow", "split", "new_zeros", "new_ones", "new_full", "as_strided")
)
_IN_PLACE = frozenset(("__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__", "__setitem__"))
_PLAIN = {
    **{f"__{name}__": name for name in ("add", "sub", "mul", "neg", "abs", "lt", "le", "gt", "ge", "eq", "ne")},
    "__invert__": "invert",
    "bitwise_not": "invert",
    "__radd__": "add",
    "__rmul__": "mul",
    "__rsub__": "rsub",
    "__truediv__": "div",
    "__rtruediv__": "rdiv",
    "__and__": "and",
    "__rand__": "and",
    "bitwise_and": "and",
    "logical_and": "and",
    "__or__": "or",
    "__ror__": "or",
    "bitwise_or": "or",
    "logical_or": "or",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "true_divide": "div",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "negative": "neg",
}
"""The names of methods and functions that compute the same."""
_CHANGING = {
    "__iadd__": "add",
    "__isub__": "sub",
    "__imul__": "mul",
    "__itruediv__": "div",
    "__iand__": "and",
    "__ior__": "or",
}
