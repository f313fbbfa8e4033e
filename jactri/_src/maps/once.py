"""Values that are made at their first use, and kept."""

from __future__ import annotations

from collections.abc import Callable


class Once:
    """A value computed at its first use: rules stay cheap for steps that no sweep takes."""

    __slots__ = ("_make", "_value")

    def __init__(self, make: Callable[[], object]):
        self._make, self._value = make, None

    def __call__(self):
        if self._make is not None:
            self._value = self._make()
            self._make = None
        return self._value


class Formed(Once):
    """Such a value of ``nbytes``, which a limit of the memory counts."""

    __slots__ = ("nbytes",)

    def __init__(self, make: Callable[[], object], nbytes: int):
        super().__init__(make)
        self.nbytes = nbytes
