"""Each task in a process of its own, several at a time: none can stop the others, nor lose what it had told.

A task is a function of one argument, ``tell``, that it calls with a copy of its result whenever there is more to say.
What it told last is kept when it is ended at its limit or dies.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

Task = Callable[[Callable[[Any], None]], None]

BYTES = 3 << 30
"""Memory that one task may be thought to need."""


@dataclass(frozen=True, slots=True)
class Ended:
    """``last``: what the task told last, or None; ``why``: empty where it came to its own end."""

    last: Any
    why: str
    seconds: float


@dataclass(slots=True)
class _Running:
    process: Any
    began: float
    last: Any = None


def default_jobs() -> int:
    """As many as there are cores that this process may use, and memory for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores, memory // BYTES))


def run_pool(tasks: Mapping[str, Task], jobs: int, limit: float) -> Iterator[tuple[str, Ended]]:
    """What became of each task, as they end: ``jobs`` at a time, each ended after ``limit`` seconds."""
    waiting = list(tasks)
    running: dict[Connection, tuple[str, _Running]] = {}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no task outlives this
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                receiver, task = _start(tasks[name])
                running[receiver] = (name, task)
            soonest = min(task.began for _, task in running.values()) + limit
            ready = wait(list(running), timeout=max(soonest - time.monotonic(), 0.0))
            for receiver in list(running):
                name, task = running[receiver]
                why = _hear(receiver, task) if receiver in ready else None
                seconds = time.monotonic() - task.began
                if why is None and seconds >= limit:
                    why = f"ended after {limit:.0f} s"
                if why is not None:
                    del running[receiver]
                    _stop(receiver, task)
                    yield name, Ended(task.last, why, seconds)
    finally:
        for receiver, (_, task) in running.items():
            _stop(receiver, task)
        signal.signal(signal.SIGTERM, before)


def _hear(receiver: Connection, task: _Running) -> str | None:
    """Take one message: why the task is over (empty: by itself), or None where it goes on."""
    try:
        over, told = receiver.recv()
    except EOFError:
        task.process.join()
        return f"its process died (exit status {task.process.exitcode})"
    if over:
        return ""
    task.last = told
    return None


def _start(task: Task) -> tuple[Connection, _Running]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, sender))
    process.start()
    sender.close()
    return receiver, _Running(process, time.monotonic())


def _stop(receiver: Connection, task: _Running) -> None:
    task.process.kill()
    task.process.join()
    receiver.close()


def _child(task: Task, sender: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # advice of the libraries
    torch.set_num_threads(1)
    task(lambda told: sender.send((False, told)))
    sender.send((True, None))
    sender.close()
