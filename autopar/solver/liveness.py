"""Bytes of a block's tensors through its forward and backward, read off a run without memory, and not guessed.

One rank of the block runs as its decision says (no memory, no arithmetic), forward and then backward, with autograd's
own order of gradients and of frees. Every storage counts from the operator that makes it until nothing refers to it:

* values live until their last reader in the forward, and after it if autograd saves them;
* conversions make the buffers of `codegen/runtime/collectives.py`: what is gathered, and its copy in order;
* attention, RMS norm and dropout are those of `graph.saved`; the cross-entropy of a split vocabulary is that of
  `codegen/runtime/operators.py`, float32 copies included, and attention in a ring that of `codegen/runtime/ring.py`.
  Kernels' own workspaces are not tensors, and not counted;
* gradients of parameters stay to the end of the backward, in the compute dtype.

Parameters, constants and batch tensors exist anyway and are not counted; the input handed on by the block before counts
here, as does the gradient of the output.

Bytes are laws in the number of samples: a storage grows with the batch if its size divides by a large prime when the
batch is a multiple of that prime.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autopar.graph.ir import BlockKind, Node
from autopar.graph.saved import fused_kernels, storage_key
from autopar.job import Job
from autopar.sharding.check import chosen
from autopar.sharding.conversions import Step, path, same
from autopar.sharding.decision import BlockDecision
from autopar.sharding.execute import local_shape, run_op
from autopar.sharding.layout import CONTEXT, Layout
from autopar.sharding.local import blocks_at, produced_layouts
from autopar.sharding.rules import ring_axis
from autopar.sharding.simulate import LocalWorld
from autopar.solver.stand_ins import LOSSES, Conversion, RingAttention, VocabCrossEntropy, all_reduced
from autopar.solver.work import ATTENTION
from autopar.stack import stack_of

PRIME = 10007
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}

Law = tuple[int, int]
"""Bytes that are there whatever the batch, and those of all samples of a batch of `Footprint.batch`."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """``saved``: each storage kept for backward, the input included; ``peaks``: what is alive at the times that are
    the peak for some batch; ``views``: of each storage kept, the smallest tensor in it that is; all of them laws for
    ``batch`` samples."""

    batch: int
    saved: tuple[Law, ...]
    peaks: tuple[Law, ...]
    views: tuple[Law, ...]

    def saved_bytes(self, batch: int) -> int:
        """Bytes kept for backward with ``batch`` samples, the input included."""
        return sum(self.saved_sizes(batch))

    def saved_sizes(self, batch: int) -> list[int]:
        """`saved_bytes`, storage by storage."""
        return self._at(self.saved, batch)

    def view_sizes(self, batch: int) -> list[int]:
        """Of each of these storages, the bytes of the smallest tensor in it that is kept."""
        return self._at(self.views, batch)

    def _at(self, laws: tuple[Law, ...], batch: int) -> list[int]:
        return [fixed + grows * batch // self.batch for fixed, grows in laws]

    def peak_bytes(self, batch: int) -> int:
        """The most bytes alive at once with ``batch`` samples."""
        return max(self._at(self.peaks, batch), default=0)


def footprint(kind: BlockKind, decision: BlockDecision, job: Job, lean: bool = False) -> Footprint:
    """Run one rank of a block forward and backward and follow its bytes. ``lean``: with the cross-entropy of a split
    vocabulary, which keeps less, also where it is not split."""
    try:
        return _measured(torch.device("meta"), kind, decision, job, lean)
    except RuntimeError:  # an operator that torch knows on fake tensors alone
        return _measured(FakeTensorMode(), kind, decision, job, lean)


def _measured(
    place: AbstractContextManager[Any], kind: BlockKind, decision: BlockDecision, job: Job, lean: bool
) -> Footprint:
    """``place``: where tensors without memory are made. Fake tensors of a CPU take five times as long as those of the
    meta device, and show the same but for the statistics of layer norms, which a GPU keeps in float32."""
    batch = PRIME * prod(decision.axes.values())
    live = _Live()
    stack = stack_of(job.stack)
    with place, torch.enable_grad(), fused_kernels(stack.attention == "fused" or stack.again), live:
        run = _Run(kind, decision, batch, job, lean)
        live.reset(run.outside)
        kept: dict[int, Tensor] = {}
        least: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            key = storage_key(tensor)
            kept.setdefault(key, tensor)
            least[key] = min(least.get(key, tensor.nbytes), tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            end = run.forward()
        made = [key for key in kept if live.knows(key) and key not in run.returned and not run.is_handed(key)]
        handed = list(run.handed.values())
        sizes = handed + [live.size(key) // run.gathered_by(key) for key in made]
        views = handed + [least[key] for key in made]
        kept.clear()
        if end is not None and end.requires_grad:
            end.backward()  # type: ignore[no-untyped-call]
    return Footprint(batch, tuple(map(_law, sizes)), _highest(live.times), tuple(map(_law, views)))


def _law(nbytes: int) -> Law:
    return (0, nbytes) if nbytes % PRIME == 0 else (nbytes, 0)


def _highest(times: Iterable[Law]) -> tuple[Law, ...]:
    """Those laws that no other one exceeds for every batch."""
    kept: list[Law] = []
    for law in sorted(set(times), reverse=True):
        if not kept or law[1] > kept[-1][1]:
            kept.append(law)
    return tuple(kept)


class _Live(TorchDispatchMode):
    """Follows storages from the operator that makes them to their end; ``times``: the bytes alive after each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fixed = self.grows = 0
        self.known: dict[int, tuple[Any, int]] = {}
        self.times: list[Law] = []

    def reset(self, outside: Iterable[Tensor]) -> None:
        """Forget what is there, and never count these."""
        self.known.clear()
        self.fixed = self.grows = 0
        self.times.clear()
        for tensor in outside:
            storage = tensor.untyped_storage()
            self.known[storage._cdata] = (weakref.ref(storage), -1)

    def knows(self, key: int) -> bool:
        return key in self.known and self.known[key][1] >= 0

    def size(self, key: int) -> int:
        return self.known[key][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = (result,) if isinstance(result, Tensor) else tree_leaves(result)
        for value in made:
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        found = self.known.get(key)
        if found is not None and found[0]() is not None:
            return
        nbytes = storage.nbytes()
        self.known[key] = (weakref.ref(storage, partial(self._free, key)), nbytes)
        self._add(nbytes, 1)
        self.times.append((self.fixed, self.grows))

    def _free(self, key: int, _: Any) -> None:
        found = self.known.pop(key, None)
        if found is not None:
            self._add(found[1], -1)

    def _add(self, nbytes: int, sign: int) -> None:
        if nbytes % PRIME:
            self.fixed += sign * nbytes
        else:
            self.grows += sign * nbytes


class _Run:
    """One rank of a block on tensors without memory. ``outside``: what exists anyway; ``handed``: bytes of what the
    block before hands in, by storage; ``returned``: storages of the outputs. ``lean``: as in `footprint`."""

    def __init__(self, kind: BlockKind, decision: BlockDecision, batch: int, job: Job, lean: bool) -> None:
        self.graph, self.decision, self.batch, self.job, self.lean = kind.graph, decision, batch, job, lean
        self.compute = DTYPES[job.dtype]
        # As `codegen.positions` has it: causal attention split by position.
        attentions = (node for node in self.graph.of("op") if node.op == ATTENTION and CONTEXT in decision.axes)
        self.balanced = any(chosen(node, self.graph, decision)[CONTEXT].by_position for node in attentions)
        self.world = LocalWorld(
            decision.axes,
            convert=self._convert,
            all_reduce=all_reduced,
        )
        self.held: dict[str, list[tuple[Layout, Tensor]]] = {}
        self.outside: list[Tensor] = []
        self.handed: dict[int, int] = {}
        self.arrived: dict[int, Any] = {}
        self.gathered: dict[int, tuple[Any, int]] = {}
        self.returned: set[int] = set()
        self.arriving: list[Node] = []
        for node in self.graph.nodes.values():
            if node.kind == "op":
                continue
            dtype = dtype_of(node.meta.dtype, self.compute)
            grad = node.meta.requires_grad and dtype.is_floating_point
            if node.kind == "input" and grad:
                self.arriving.append(node)
                continue
            value = torch.empty(self._shape(node), dtype=dtype).requires_grad_(grad)
            self.outside.append(value)
            self.held[node.name] = [(decision.inputs[node.name], value)]
        self.left = {name: len(users) for name, users in self.graph.users().items()}
        for name in self.graph.outputs:
            self.left[name] += 1

    def _shape(self, node: Node) -> tuple[int, ...]:
        return local_shape(
            node.meta.at(self.batch, self.job.seq_len), self.decision.inputs[node.name], self.decision.axes
        )

    def _convert(self, x: Tensor, step: Step, axis: str) -> Tensor:
        balanced = self.balanced and axis == CONTEXT
        made: Tensor = Conversion.apply(x, step, self.decision.axes[axis], balanced)  # type: ignore[no-untyped-call]
        if step.forward == "all_gather" and stack_of(self.job.stack).buffers:
            storage = made.untyped_storage()
            self.gathered[storage_key(made)] = (
                weakref.ref(storage),
                self.decision.axes[axis] * self.gathered_by(storage_key(x)),
            )
        return made

    def gathered_by(self, key: int) -> int:
        """Ranks of which a kept tensor is gathered, where the stack keeps each rank's own part and gathers it again:
        Megatron's linear layers under sequence parallelism, and rings of keys and values."""
        storage, ranks = self.gathered.get(key, (None, 1))
        return ranks if storage is not None and storage() is not None else 1

    def forward(self) -> Tensor | None:
        """What to call backward on."""
        if self.arriving:
            parts = [(self._shape(node), dtype_of(node.meta.dtype, self.compute)) for node in self.arriving]
            values = _Handed.apply(torch.empty((), requires_grad=True), parts)  # type: ignore[no-untyped-call]
            self.handed = {storage_key(value): value.untyped_storage().nbytes() for value in values}
            self.arrived = {storage_key(value): weakref.ref(value.untyped_storage()) for value in values}
            for node, value in zip(self.arriving, values, strict=True):
                self.held[node.name] = [(self.decision.inputs[node.name], value)]
            del values, value
        for node in self.graph.of("op"):
            choice = chosen(node, self.graph, self.decision)
            needs, layout = produced_layouts(node, choice)
            operands = [[self._find(name, need)] for name, need in zip(node.operands(), needs, strict=True)]
            split = self.lean or any(strategy.variant for strategy in choice.values())
            loss = LOSSES.get(stack_of(self.job.stack).loss)
            if node.op == "autopar.cross_entropy" and loss:
                made = loss.apply(operands[0][0], operands[1][0])  # type: ignore[no-untyped-call]
            elif node.op == "autopar.cross_entropy" and split:
                made = VocabCrossEntropy.apply(operands[0][0], operands[1][0])  # type: ignore[no-untyped-call]
            elif ring := ring_axis(choice):
                values = [x for (x,) in operands]
                halves = choice[ring].by_position and values[0].size(-2) % 2 == 0
                made = RingAttention.apply(*values, self.decision.axes[ring], halves)  # type: ignore[no-untyped-call]
                del values
            else:
                (made,) = run_op(node, choice, operands, self.world, self.batch, self.job.seq_len, self.compute)
            del operands
            self.held[node.name] = [(layout, made)]
            del made
            for name in dict.fromkeys(node.operands()):
                self._read(name)
            if not self.left[node.name]:
                del self.held[node.name]
        outputs = [self._find(name, self.decision.outputs[name]) for name in self.graph.outputs]
        self.held.clear()
        self.returned = {storage_key(x) for x in outputs}
        differentiable = [x for x in outputs if x.requires_grad]
        return _End.apply(*differentiable) if differentiable else None  # type: ignore[no-untyped-call]

    def is_handed(self, key: int) -> bool:
        """Whether a storage is of what the block before hands in, and not a later one in the same place."""
        return key in self.arrived and self.arrived[key]() is not None

    def _read(self, name: str) -> None:
        self.left[name] -= 1
        if not self.left[name] and self.graph.nodes[name].kind in ("op", "input"):
            self.held.pop(name, None)

    def _find(self, name: str, layout: Layout) -> Tensor:
        """The value in a layout, converted if it is not there yet: the emitted code converts where it first reads."""
        grad = self.graph.nodes[name].meta.requires_grad
        for there, value in self.held[name]:
            if same(there, layout, grad):
                return value
        found = next(c for c in self.decision.conversions if c.tensor == name and same(c.target, layout, grad))
        value, here = self._find(name, found.source), found.source
        for axis, step in path(found.source, found.target, grad):
            after = here.with_type(axis, step.target)
            old, new = (
                blocks_at(where, axis, self.decision.axes, self.batch, self.job.seq_len) for where in (here, after)
            )
            (value,) = self.world.convert([value], Step(old, new, step.forward, step.backward), axis)
            here = after
        self.held[name].append((found.target, value))
        return value


def dtype_of(name: str, compute: torch.dtype) -> torch.dtype:
    """The dtype that a `TensorMeta.dtype` stands for."""
    if name == "compute":
        return compute
    if name == "float32" and compute == torch.float64:
        return torch.float64
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


class _Handed(torch.autograd.Function):
    """What the block before hands in: made here, so that nothing but the block holds it."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, parts: list[tuple[tuple[int, ...], torch.dtype]]) -> tuple[Tensor, ...]:
        return tuple(root.new_empty(shape, dtype=dtype) for shape, dtype in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None


class _End(torch.autograd.Function):
    """Gives up the outputs, as the next block has by the time of this one's backward, and makes their gradients."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.made = [(x.shape, x.dtype) for x in outputs]
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return tuple(grad.new_empty(shape, dtype=dtype) for shape, dtype in ctx.made)
