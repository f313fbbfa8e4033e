"""What was made for a key, for as long as others do not push it out: plans, above all, by `graph.Graph.key`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
_MISSING = object()


class Cache(dict[K, V]):
    """A dict of the last ``most`` entries: the oldest go first. What is in it is never changed.

    Threads may share one: a value that two of them make at once is made twice.
    """

    __slots__ = ("_lock", "_most")

    def __init__(self, most: int = 256):
        super().__init__()
        self._most, self._lock = most, threading.RLock()  # a plain one stops torch.compile

    def __setitem__(self, key: K, value: V) -> None:
        with self._lock:
            while len(self) >= self._most and key not in self:
                del self[next(iter(self))]
            super().__setitem__(key, value)

    def of(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key, made now if it is not there. What ``make`` raises is not remembered."""
        found: Any = self.get(key, _MISSING)
        if found is _MISSING:
            found = self[key] = make()
        return found
