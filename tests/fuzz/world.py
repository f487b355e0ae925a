"""Ranks as threads of one process: real collectives on plain tensors, a fraction of the cost of `LocalTensorMode`.

A mesh and its process groups stay from case to case (`ranks_of`); making them costs more than a case does.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from math import prod
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

T = TypeVar("T")
PATIENCE = 120.0
"""Seconds after which ranks that are not done count as stuck."""


class Ranks:
    """A thread for each rank of a mesh with these axes (outermost first)."""

    def __init__(self, axes: Mapping[str, int]) -> None:
        self.axes, self.size = dict(axes), prod(axes.values())
        self._tasks: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(self.size)]
        self._done: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()
        self._store = dist.HashStore()
        self._threads: list[threading.Thread] = []
        hook = sys.excepthook
        for rank in range(self.size):
            self._threads.append(threading.Thread(target=self._serve, args=(rank,), daemon=True))
            self._threads[-1].start()
        self.run(lambda rank, mesh: None)
        sys.excepthook = hook  # every init_process_group has put its rank's name in front of messages

    def run(self, work: Callable[[int, DeviceMesh], T]) -> list[T]:
        """``work(rank, mesh)`` on every rank at once; what each returned. The first error is raised."""
        for tasks in self._tasks:
            tasks.put(work)
        results: dict[int, Any] = {}
        errors: list[BaseException] = []
        for _ in range(self.size):
            try:
                rank, value, error = self._done.get(timeout=PATIENCE)
            except Empty:
                ProcessLocalGroup.exception_handle(None)  # ranks wait for others that have nothing more to say
                rank, value, error = self._done.get()
            results[rank] = value
            if error is not None:
                errors.append(error)
        if errors:
            ProcessLocalGroup.reset()
            raise next((error for error in errors if not isinstance(error, SystemExit)), errors[0])
        return [results[rank] for rank in range(self.size)]

    def end(self) -> None:
        for tasks in self._tasks:
            tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self, rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("threaded", rank=rank, world_size=self.size, store=self._store)
        mesh = init_device_mesh("cpu", tuple(self.axes.values()), mesh_dim_names=tuple(self.axes))
        while True:
            work = self._tasks[rank].get()
            if work is None:
                return
            try:
                self._done.put((rank, work(rank, mesh), None))
            except BaseException as error:
                ProcessLocalGroup.exception_handle(None)  # wakes the ranks that wait for this one
                self._done.put((rank, None, error))


def close() -> None:
    """End all ranks; torch.distributed is as before."""
    for ranks in _KEPT.values():
        ranks.end()
    if _KEPT:
        _KEPT.clear()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        _uninstall_threaded_pg()


_KEPT: dict[tuple[tuple[str, int], ...], Ranks] = {}


def ranks_of(axes: tuple[tuple[str, int], ...]) -> Ranks:
    """The ranks of a mesh, kept."""
    if not _KEPT:
        _install_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(True)
    if axes not in _KEPT:
        _KEPT[axes] = Ranks(dict(axes))
    return _KEPT[axes]
