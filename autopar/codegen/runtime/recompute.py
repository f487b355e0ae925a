"""Selective recomputation: backward runs a block again, except for the operators whose results were kept.

Of the operators named to be kept (`KEEPABLE`), those results are kept that the second run reads: what only enters a
kept collective, or leaves the block unread, is left out (the partial sums before a kept reduce-scatter, the last
projection). PyTorch's own contexts keep every result, which can take more memory than no recomputation at all; for
compiled blocks they are used all the same, because the compiler leaves out what nothing reads.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from . import offload

_NAMES = {
    "matmul": ("aten", "mm addmm bmm baddbmm addbmm mv addmv dot _scaled_mm"),
    "attention": (
        "aten",
        "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_fused_attention_overrideable _flash_attention_forward _efficient_attention_forward "
        "_cudnn_attention_forward",
    ),
    # The collective's own result: waiting for it a second time does nothing and makes nothing.
    "all_gather": ("_c10d_functional", "all_gather_into_tensor"),
    "all_reduce": ("_c10d_functional", "all_reduce"),
    "reduce_scatter": ("_c10d_functional", "reduce_scatter_tensor"),
    "all_to_all": ("_c10d_functional", "all_to_all_single"),
}


def _packets(library: str, names: str) -> Iterable[Any]:
    namespace = getattr(torch.ops, library)
    # Not every PyTorch has every kernel.
    return (getattr(namespace, name) for name in names.split() if hasattr(namespace, name))


KEEPABLE: dict[str, frozenset[Any]] = {name: frozenset(_packets(*where)) for name, where in _NAMES.items()}
"""What may be kept, and the operators that each name stands for."""

_RING = f"{__name__.rpartition('.')[0]}_ring".replace(".", "_")
"""Where `runtime.ring` registers its operators, if it is used."""


def operators_of(name: str) -> frozenset[Any]:
    """The operators that a name of `KEEPABLE` stands for; attention in a ring is one of them."""
    return KEEPABLE[name] | frozenset(_packets(_RING, "ring_attention") if name == "attention" else ())


_ALWAYS_AGAIN = ("experts", "lstm", "gru", "rnn_tanh", "rnn_relu")
"""What runs again as a whole. Recurrent layers change the results of their matmuls in place, which would be kept so."""

_PASSING = frozenset(
    (
        *(packet for name in KEEPABLE if name not in ("matmul", "attention") for packet in KEEPABLE[name]),
        *_packets("_c10d_functional", "wait_tensor"),
        *_packets(
            "aten",
            "add sub neg view _unsafe_view reshape transpose t permute slice select narrow split split_with_sizes "
            "chunk unbind cat stack clone expand unsqueeze squeeze flatten unflatten alias detach contiguous _to_copy "
            "as_strided",
        ),
    )
)
"""Operators whose gradient needs none of their values: they hand on whether a result is read."""


def selective(block: Callable[..., Any], *args: Any, keep: Sequence[str]) -> Any:
    """``block(*args)``; backward runs it again, except for the operators named in ``keep`` (of `KEEPABLE`)."""
    names = tuple(keep)
    if hasattr(block, "eager_forward"):
        _compile_with_policy(block, names)
        return block(*args)
    return checkpoint(block, *args, use_reentrant=False, context_fn=partial(_contexts, names))


def _compile_with_policy(block: Any, names: tuple[str, ...]) -> None:
    """Compile a block (once) together with its recomputation: what is kept inside a compiled block, only the compiler
    can decide."""
    if getattr(block, "compiled_to_keep", None) == names:
        return
    # Looked up by name in the compiled function, which the compiler would otherwise take for that of other names.
    contexts = {names: partial(create_selective_checkpoint_contexts, policy(names))}
    eager = block.eager_forward

    def forward(*args: Tensor) -> Any:
        return checkpoint(eager, *args, use_reentrant=False, context_fn=contexts[names])

    block.forward = torch.compile(forward, fullgraph=True)
    block.compiled_to_keep = names


def policy(keep: Sequence[str]) -> Callable[..., CheckpointPolicy]:
    """The policy for PyTorch's own contexts."""
    wanted = frozenset().union(*(operators_of(name) for name in keep))

    def choose(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_kept = getattr(op, "overloadpacket", None) in wanted
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return choose


class _Result:
    """What one kept operator returned. ``is_read``: the second run needs its value. ``drawn``: how many random numbers
    it took on ``device``, which the second run has to skip for the operators after it to draw the same ones again."""

    def __init__(self, value: Any, is_read: bool, device: torch.device | None = None, drawn: int = 0) -> None:
        self.value, self.is_read = tree_map(_detached, value), is_read
        self.device, self.drawn = device, drawn
        self.shapes: Any = None

    def settle(self) -> None:
        """At the block's end: let go of a value that is not read, hand one that is to the host if it waits there."""
        if not self.is_read:
            self.shapes = tree_map(lambda x: _Like(x) if isinstance(x, Tensor) else x, self.value)
            self.value = None
            return
        pack = offload.packer()
        if pack is not None:
            self.value = tree_map(lambda x: pack(x) if isinstance(x, Tensor) else x, self.value)

    def recall(self) -> Any:
        if self.drawn:
            generator = _generator(self.device)
            generator.set_offset(generator.get_offset() + self.drawn)
        if not self.is_read:
            return tree_map(lambda x: x.unread() if isinstance(x, _Like) else x, self.shapes)
        return tree_map(lambda x: offload.unpack(x) if isinstance(x, offload.Moved) else x, self.value)


class _Like:
    """The form of a tensor without its memory."""

    def __init__(self, x: Tensor) -> None:
        self.make = partial(torch.empty_strided, x.size(), x.stride(), dtype=x.dtype, device=x.device)

    def unread(self) -> Tensor:
        # Not numbers: were it read after all, the gradients would show it.
        made = self.make()
        return made.fill_(float("nan")) if made.is_floating_point() else made.zero_()


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


class _Kept:
    """The results of one call of a block, by operator and in order."""

    def __init__(self, names: Sequence[str]) -> None:
        self.wanted = frozenset().union(*(operators_of(name) for name in names))
        self.attention = operators_of("attention")
        self.results: dict[Any, deque[_Result]] = defaultdict(deque)
        self.inside = dict.fromkeys(("attention", *_ALWAYS_AGAIN), 0)

    def includes(self, op: Any) -> bool:
        # Attention that runs as plain matmuls has scores of its own, which nobody asked to keep.
        plain = self.inside["attention"] and op in KEEPABLE["matmul"]
        return op in self.wanted and not plain and not any(self.inside[name] for name in _ALWAYS_AGAIN)


class _WithinComposite(TorchFunctionMode):
    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = {F.scaled_dot_product_attention: "attention"}.get(func, getattr(func, "__name__", ""))
        if place not in self.kept.inside:
            return func(*args, **(kwargs or {}))
        self.kept.inside[place] += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.kept.inside[place] -= 1


class _First(TorchDispatchMode):
    """The first run: keeps results, and follows them to see which are read."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self.kept = kept
        self.made_of: dict[int, frozenset[_Result]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = getattr(func, "overloadpacket", None)
        is_kept = self.kept.includes(op)
        # Attention may drop elements; on the CPU, attention that does is made of plain operators.
        device = args[0].device if is_kept and op in self.kept.attention and args[0].is_cuda else None
        before = _generator(device).get_offset() if device else 0
        out = func(*args, **kwargs)
        if not is_kept and not self.made_of:
            return out
        held = [self.made_of[key] for key in map(_key, _tensors((args, kwargs))) if key in self.made_of]
        sources = frozenset().union(*held)
        after: frozenset[_Result] = frozenset()
        if is_kept:
            drawn = _generator(device).get_offset() - before if device else 0
            result = _Result(out, op in self.kept.attention, device, drawn)  # attention's own gradient reads it
            self.kept.results[op].append(result)
            after = frozenset((result,))
        elif op in _PASSING:
            after = sources
        if op not in _PASSING:
            for source in sources:
                source.is_read = True
        for made in _tensors(out):
            if after:
                self.made_of[_key(made)] = after
            else:
                self.made_of.pop(_key(made), None)
        return out

    def __exit__(self, *error: Any) -> Any:
        self.made_of.clear()
        for results in self.kept.results.values():
            for result in results:
                result.settle()
        return super().__exit__(*error)


class _Again(TorchDispatchMode):
    """The run in backward: returns what was kept."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = getattr(func, "overloadpacket", None)
        if not self.kept.includes(op):
            return func(*args, **(kwargs or {}))
        if not self.kept.results[op]:
            raise RuntimeError(
                f"selective recomputation: backward calls {op} more often than forward did, or runs a second time "
                "through the same block; call backward once for each forward"
            )
        return self.kept.results[op].popleft().recall()


class _Both:
    """A dispatch mode, and the function mode that tells it about attention and experts."""

    def __init__(self, mode: TorchDispatchMode, kept: _Kept) -> None:
        self.mode, self.kept, self.stack = mode, kept, ExitStack()

    def __enter__(self) -> None:
        self.stack.enter_context(_WithinComposite(self.kept))
        self.stack.enter_context(self.mode)

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)


def _contexts(names: Sequence[str]) -> tuple[_Both, _Both]:
    kept = _Kept(names)
    return _Both(_First(kept), kept), _Both(_Again(kept), kept)


def _generator(device: torch.device | None) -> torch.Generator:
    assert device is not None
    assert device.index is not None
    return torch.cuda.default_generators[device.index]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _key(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)
