"""Products of two batches of matrices: two blocks of every sample that meet, by torch or a kernel.

On a GPU torch multiplies float32 without tensor cores, unless tf32 is allowed; `kernels.batched` has its accuracy, with
them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels import support
from ..base import backends
from . import chooser
from .chooser import TIMED_ENTRIES, Offer, Way, dots

CHECKED_ENTRIES = 1 << 22
"""Entries of a result that are computed in float64, to check the kernel's."""


@dataclass(frozen=True)
class BatchKind:
    """What a choice depends on; ``batch`` is the power of two at or above the number of matrices."""

    batch: int
    rows: int
    inner: int
    columns: int
    dtype: torch.dtype
    precision: str
    device: torch.device

    @classmethod
    def of(cls, batch, rows, inner, columns, dtype, device) -> BatchKind:
        size = support.power_of_two(batch)
        return cls(size, rows, inner, columns, dtype, support.precision(dtype), device)

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.rows * self.inner * self.columns

    @property
    def bytes(self) -> float:
        entries = self.rows * self.columns + self.inner * (self.rows + self.columns)
        return float(self.batch * entries * self.dtype.itemsize)

    def offers(self) -> list[Offer]:
        """The kernel, its tiles and ways to multiply."""
        from ...kernels import batched

        return [((("batched", 1),), batched.configs(self.inner), dots(self.precision))]

    def plain(self) -> dict[str, object]:
        """As plain data, for reports."""
        return {
            "batch": self.batch, "rows": self.rows, "inner": self.inner, "columns": self.columns,
            "precision": self.precision, "dtype": str(self.dtype),
        }  # fmt: skip


@dataclass
class Batched:
    """One to run: ``left @ right``, (B, M, K) and (B, K, N)."""

    left: Tensor
    right: Tensor

    def kind(self) -> BatchKind:
        batch, rows, inner = self.left.shape
        columns = self.right.shape[2]
        return BatchKind.of(batch, rows, inner, columns, self.left.dtype, self.left.device)

    def _within(self, entries: int) -> Batched:
        (_, m, k), n = self.left.shape, self.right.shape[2]
        count = max(1, entries // max(m * n, m * k, k * n, 1))
        return replace(self, left=self.left[:count], right=self.right[:count])

    def timed(self) -> Batched:
        return self._within(TIMED_ENTRIES)

    def few(self) -> Batched:
        return self._within(CHECKED_ENTRIES)

    def torch(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.left.dtype
        return torch.bmm(self.left.to(dtype), self.right.to(dtype))

    def launch(self, way: Way, out: Tensor | None = None) -> Tensor:
        from ...kernels.batched import batched

        return batched(self.left, self.right, precision=way.dot, out=out, config=way.config)


def bmm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.bmm``, by a kernel where one is faster.

    ``out`` is for calls without grad mode, of the operands' dtype and device. Costs ``2 B M K N`` flops.
    """
    same = left.dtype == right.dtype and left.device == right.device
    if same and backends.kernels_for(left):
        problem = Batched(left, right)
        made = chooser.run(problem, out) if _tried(problem.kind()) else None
        if made is not None:
            return made
    return torch.bmm(left, right) if out is None else torch.bmm(left, right, out=out)


def _tried(kind: BatchKind) -> bool:
    """Whether the kernel is timed first, or asked for by name: torch takes one launch, too."""
    return chooser.worth(kind) or backends.forced()


def described(batch, rows, inner, columns, dtype, device) -> tuple[str, str]:
    """What runs a product of these sizes, and why, for `explain`."""
    kind = BatchKind.of(batch, rows, inner, columns, dtype, device)
    if not (backends.kernels_on(device) and support.computes(dtype) and _tried(kind)):
        return "torch.bmm", "two partial Jacobians"
    return chooser.described(kind)
