"""Bytes of tensors alive in this process, operator by operator: what an allocator would have handed out.

Kernels' own workspaces, and what a communication library copies for itself, are not tensors of the program and are not
counted: they differ between devices and libraries, and a plan keeps a reserve for them.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tracker(TorchDispatchMode):
    """While it is on, ``live`` is the bytes of all storages made under it, ``peak`` the most since `reset_peak`.

    ``at_peak``: how many bytes each operator's results held then, for explaining a peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live = self.peak = 0
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        # Any thread may let go of the last reference (gloo's do), at any moment: it leaves a note, in one step.
        self._freed: deque[tuple[int, weakref.ref[Any]]] = deque()
        self.at_peak: dict[str, int] = {}
        self._resize: Callable[..., Any] = torch.UntypedStorage.resize_
        self._reduce: Callable[..., Any] = dist.reduce_scatter_single
        self._within_library = False

    def __enter__(self) -> Tracker:
        tracker, resize = self, self._resize

        def tracked(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            tracker._count(storage, "resize_")
            return result

        def reduced(*args: Any, **kwargs: Any) -> Any:
            tracker._within_library = True  # gloo copies the input, NCCL does not
            try:
                return tracker._reduce(*args, **kwargs)
            finally:
                tracker._within_library = False

        torch.UntypedStorage.resize_ = tracked  # type: ignore[method-assign]  # FSDP2 frees what it gathered so
        dist.reduce_scatter_single = reduced
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        dist.reduce_scatter_single = self._reduce
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it runs on its local tensors, which come by here
        result = func(*args, **(kwargs or {}))
        if self._within_library:
            return result
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type != "meta":
                self._count(value.untyped_storage(), str(func))
        return result

    @property
    def live(self) -> int:
        """Bytes of the storages alive now."""
        while self._freed:
            key, reference = self._freed.popleft()
            if key in self._storages and self._storages[key][0] is reference:
                self._live -= self._storages.pop(key)[1]
        return self._live

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live
        self.at_peak = {}

    def _count(self, storage: torch.UntypedStorage, source: str) -> None:
        key, size, live = storage._cdata, storage.nbytes(), self.live
        known = self._storages.get(key)
        if known is not None and known[0]() is not None:
            reference, source = known[0], known[2]
        else:  # new, or an address used again before its note was written
            reference = weakref.ref(storage, lambda dead: self._freed.append((key, dead)))
        self._live = live + size - (known[1] if known is not None else 0)
        self._storages[key] = (reference, size, source)
        if self._live > self.peak:
            self.peak = self._live
            if size:
                self._explain()

    def _explain(self) -> None:
        held: dict[str, int] = {}
        for _, size, source in self._storages.values():
            held[source] = held.get(source, 0) + size
        self.at_peak = held
