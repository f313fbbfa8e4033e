"""The CPU's heap: memory that was freed and that the process still holds, in pieces.

glibc asks for more than an aligned block takes, to cut it out (``memalign``), and so cannot put a block where another
of its size was: where blocks come and go, as in a chain of ops, the heap grows to several times what is alive at one
time, unless each of them is mapped alone. That it is depends on what was freed before ("dynamic" in mallopt(3)). Given
back are the pages of the pieces; the process takes them again when it writes there. Other allocators take no notice.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache

import torch

SMALL = 1 << 21
"""Bytes below which it does not matter in how many pieces they are."""

OVER = 1.25
"""How many times what it takes a computation may let the process grow."""


class Heap:
    """What the process has grown by since a computation began that takes ``most`` bytes at one time.

    Each call looks, and gives back what is free where that is too much.
    """

    __slots__ = ("_allowed", "_before", "_most", "_written")

    def __init__(self, most: float):
        self._most, self._before, self._written = most, resident(), 0.0
        self._allowed = OVER * most

    @classmethod
    def of(cls, device: torch.device, most: float) -> Heap | None:
        """None where there is nothing to look after."""
        return cls(most) if device.type == "cpu" and most >= SMALL and _trim() else None

    def __call__(self) -> None:
        trim = _trim()
        if trim is not None and resident() - self._before > self._allowed:
            trim(0)
            # more than was thought is in use: it is not looked for at once again
            left = resident() - self._before
            self._allowed = max(OVER * self._most, left + self._most / 2)

    def writes(self, size: float) -> None:
        """So many bytes of new blocks are about to be written: a look now and then."""
        self._written += size
        if 2 * self._written > self._most:
            self._written = 0.0
            self()


def resident() -> int:
    """Bytes of the process that are in memory; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim, which gives back what is free."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another libc
        return None
