"""Activation offload: what a block saves for backward waits in host memory, and is back before backward needs it.

Copies run on a stream of their own, each way in the order in which they are made or needed. When backward enters a
block, the block before it begins to come back, so that its copies hide behind this one's computation. On the CPU the
same steps are plain copies.

Parameters (also gathered ones, and views of them), arguments without a gradient (tables and tokens, which exist
anyway) and tensors below `SMALL` bytes stay on the device. One storage is moved once, however many of its views are
saved.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

SMALL = 1 << 20
"""Bytes below which a tensor is not worth a copy."""


def offload(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """``run(*args, **options)``; what it saves for backward waits on the host. ``run``: a block, or `checkpoint` or
    `selective`, of which the block's input and the kept results are moved."""
    if not torch.is_grad_enabled():
        return run(*args, **options)
    visit = Visit(run, args)
    with _active(visit), torch.autograd.graph.saved_tensors_hooks(visit.pack, unpack):
        result = run(*args, **options)
    visit.left(result)
    return result


class Visit:
    """One call of one block. ``before``: the call whose result it took, whose turn comes next in backward."""

    last: "Visit | None" = None
    """The call that ended last, of any block and micro-batch."""

    def __init__(self, run: Callable[..., Any], args: tuple[Any, ...]) -> None:
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        owners = (run, getattr(run, "__self__", None), *args)
        self.owners = [owner for owner in owners if isinstance(owner, nn.Module)]
        self.staying: set[int] | None = None
        self.tables = {_key(x) for x in given if not x.requires_grad and type(x) is Tensor}
        self.parcels: dict[int, Parcel] = {}
        # Once the block has returned, what it saved alone keeps the parcels, so that they go as backward goes on.
        self.sent: list[ReferenceType[Parcel]] = []
        self.results: list[ReferenceType[Tensor]] = []
        last = Visit.last
        taken = last is not None and any(x is result() for x in given for result in last.results)
        self.before = last if taken else None
        self.is_entered = False

    def pack(self, x: Tensor) -> "Tensor | Moved":
        """Send a tensor to the host, if it is one to be sent."""
        if type(x) is not Tensor or x.untyped_storage().nbytes() < SMALL or _key(x) in self._stays():
            return x
        parcel = self.parcels.get(_key(x))
        if parcel is None:
            parcel = self.parcels[_key(x)] = Parcel(x)
        return Moved(self, parcel, x)

    def _stays(self) -> set[int]:
        # Read off now, while FSDP2's gathered parameters are in their places.
        if self.staying is None:
            self.staying = {
                _key(_local(weight)) for owner in self.owners for weight in (*owner.parameters(), *owner.buffers())
            }
        return self.staying | self.tables

    def left(self, result: Any) -> None:
        """The block has returned ``result``."""
        self.results = [ref(x) for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.sent = [ref(parcel) for parcel in self.parcels.values()]
        for parcel in self.parcels.values():
            parcel.source = None
        self.owners, self.staying, self.parcels = [], None, {}
        Visit.last = self

    def fetch(self) -> None:
        """Let everything come back, what was saved last first."""
        for sent in reversed(self.sent):
            parcel = sent()
            if parcel is not None:
                parcel.fetch()

    def enter_backward(self) -> None:
        """Backward needs this visit's tensors from here on."""
        if self.is_entered:
            return
        self.is_entered = True
        self.fetch()
        if self.before is not None:
            self.before.fetch()
            self.before = None


class Parcel:
    """The bytes of one storage: on their way to the host, there, or on their way back."""

    def __init__(self, x: Tensor) -> None:
        self.device = x.device
        # Held to the block's end: a storage made meanwhile must not take its address, by which it is known.
        self.source: torch.UntypedStorage | None = x.untyped_storage()
        self.back: Tensor | None = None
        self.gone: torch.cuda.Event | None = None
        self.arrived: torch.cuda.Event | None = None
        here = torch.empty(0, dtype=torch.uint8, device=x.device).set_(self.source)
        if self.device.type != "cuda":
            self.there = here.clone()
            return
        out, _ = _streams(self.device)
        out.wait_stream(torch.cuda.current_stream(self.device))
        self.there = torch.empty(here.shape, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(out):
            self.there.copy_(here, non_blocking=True)
            self.gone = out.record_event()
        # The memory is not given to others before the copy is through.
        here.record_stream(out)

    def fetch(self) -> None:
        if self.back is not None:
            return
        self.back = torch.empty(self.there.shape, dtype=torch.uint8, device=self.device)
        if self.gone is None:
            self.back.copy_(self.there)
            return
        _, back = _streams(self.device)
        # The memory may still be in use by what was queued before.
        back.wait_stream(torch.cuda.current_stream(self.device))
        back.wait_event(self.gone)
        with torch.cuda.stream(back):
            self.back.copy_(self.there, non_blocking=True)
            self.arrived = back.record_event()
        self.back.record_stream(back)

    def open(self) -> Tensor:
        """The bytes on the device, for the current stream."""
        self.fetch()
        assert self.back is not None
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
        return self.back


class Moved:
    """A saved tensor as a view of what was moved."""

    def __init__(self, visit: Visit, parcel: Parcel, x: Tensor) -> None:
        self.visit, self.parcel, self.dtype = visit, parcel, x.dtype
        self.view = (x.storage_offset(), x.size(), x.stride())


def unpack(saved: Tensor | Moved) -> Tensor:
    """The saved tensor, back on its device."""
    if not isinstance(saved, Moved):
        return saved
    saved.visit.enter_backward()
    whole = saved.parcel.open()
    return torch.empty(0, dtype=saved.dtype, device=whole.device).set_(whole.untyped_storage(), *saved.view)


def packer() -> Callable[[Tensor], Tensor | Moved] | None:
    """Sends tensors of the block that runs now to the host; None if they stay on the device."""
    return _visits[-1].pack if _visits else None


_visits: list[Visit] = []


@contextmanager
def _active(visit: Visit) -> Iterator[None]:
    _visits.append(visit)
    try:
        yield
    finally:
        _visits.pop()


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """For copies to the host, and back."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def _local(x: Tensor) -> Tensor:
    return getattr(x, "_local_tensor", x)


def _key(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)
