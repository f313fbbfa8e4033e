"""Kernels that take one pass over memory, as problems for `chooser`.

They run a map over rows, a max pool, a scaled sum of two blocks, the first convolution of coloured seeds, or write a
dense answer out of a compressed one; torch takes a pass for each scaling and each term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels import support
from .chooser import TIMED_ENTRIES, Offer, Way

CHECKED_ENTRIES = 1 << 22
"""Entries of a result that are computed in float64, to check a kernel's."""


@dataclass(frozen=True)
class PassKind:
    """What a choice depends on; ``rows`` is the power of two at or above the number of rows (samples).

    ``read`` and ``written``: entries of blocks a seed and row. ``how``: all else, such as the map and its factors.
    """

    kernel: str
    seeds: int
    rows: int
    read: int
    written: int
    how: tuple
    dtype: torch.dtype
    device: torch.device
    precision = ""
    flops = 0.0

    @classmethod
    def of(cls, kernel, seeds, rows, read, written, how, dtype, device) -> PassKind:
        return cls(kernel, seeds, support.power_of_two(rows), read, written, how, dtype, device)

    @property
    def bytes(self) -> float:
        return float(self.seeds * self.rows * (self.read + self.written) * self.dtype.itemsize)

    def offers(self) -> list[Offer]:
        """The one kernel, which has no tiles to choose from."""
        return [(((self.kernel, 1),), (None,), ("",))]

    def plain(self) -> dict[str, object]:
        """As plain data, for reports."""
        return {
            "kernel": self.kernel, "seeds": self.seeds, "rows": self.rows, "read": self.read,
            "written": self.written, "how": self.how, "dtype": str(self.dtype),
        }  # fmt: skip


@dataclass
class Pass:
    """One to run. ``kernel(n, out)`` and ``steps(n, dtype)`` give the result for the first ``n`` indices of an axis.

    ``whole``: how many there are; ``entries``: of the result, or of what is read if that is more, at each.
    """

    what: PassKind
    whole: int
    entries: int
    kernel: Callable[[int, Tensor | None], Tensor]
    steps: Callable[[int, torch.dtype | None], Tensor]

    def kind(self) -> PassKind:
        return self.what

    def _within(self, entries: int) -> Pass:
        return replace(self, whole=min(self.whole, max(1, entries // max(self.entries, 1))))

    def timed(self) -> Pass:
        return self._within(TIMED_ENTRIES)

    def few(self) -> Pass:
        return self._within(CHECKED_ENTRIES)

    def torch(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.steps(self.whole, dtype)

    def launch(self, way: Way, out: Tensor | None = None) -> Tensor:
        return self.kernel(self.whole, out)


def over(
    what: PassKind,
    blocks: list[Tensor],
    entries: int,
    kernel: Callable[[list[Tensor], Tensor | None], Tensor],
    steps: Callable[[list[Tensor]], Tensor],
) -> Pass:
    """A pass over blocks ``(seeds, *value)``: any number of their seeds can be taken alone."""

    def exactly(n: int, dtype: torch.dtype | None) -> Tensor:
        return steps([b[:n] if dtype is None else b[:n].to(dtype) for b in blocks])

    whole = max(len(b) for b in blocks)
    return Pass(what, whole, entries, lambda n, out: kernel([b[:n] for b in blocks], out), exactly)
