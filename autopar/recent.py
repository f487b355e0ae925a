"""What a process has made lately, so that it is not made again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """The ``room`` values that were asked for last, by key; the one not asked for longest goes first."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._held: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value under ``key``, from ``make`` if it is not held."""
        value = self._held.pop(key) if key in self._held else make()
        self._held[key] = value
        if len(self._held) > self._room:
            self._held.popitem(last=False)
        return value

    def clear(self) -> None:
        """Let go of all."""
        self._held.clear()
