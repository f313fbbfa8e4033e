"""`Blocks`: a matrix by those of its blocks in which an entry can be non-zero; with blocks of one entry, CSR."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..base.constants import fixed
from ..base.csr import Csr, numbered, starts


@dataclass(frozen=True, eq=False)
class Blocks:
    """Row ``i`` of blocks has the columns ``column[start[i]:start[i + 1]]``, in order.

    ``values``: ``(blocks, r, c)``, or ``(N, blocks, r, c)`` of ``N`` samples with one pattern. ``shape``: of the matrix
    (of a sample). ``key`` is alike for the same pattern.
    """

    start: Tensor
    column: Tensor
    values: Tensor
    shape: tuple[int, int]
    key: tuple

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.values.shape[-2], self.values.shape[-1]

    def fixed(self, what: str, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Tensors that the pattern determines."""
        return fixed((what, self.key, self.start.device), make)

    @property
    def row(self) -> Tensor:
        """The row of every block."""

        def make() -> tuple[Tensor]:
            count = self.start.diff()
            return (torch.arange(len(count), device=count.device).repeat_interleave(count),)

        return self.fixed("rows of blocks", make)[0]

    @property
    def T(self) -> Blocks:
        """The transpose, of one matrix."""

        def make() -> tuple[Tensor, ...]:
            order = torch.argsort(self.column, stable=True)
            count = torch.bincount(self.column, minlength=self.shape[1] // self.size[1])
            return order, torch.cat([count.new_zeros(1), count.cumsum(0)]), self.row[order]

        order, start, column = self.fixed("transpose of blocks", make)
        values = self.values.index_select(0, order).mT
        return Blocks(start, column, values, self.shape[::-1], ("T", self.key))

    def with_values(self, values: Tensor) -> Blocks:
        return replace(self, values=values)

    def to(self, form: str) -> Tensor:
        """As a sparse tensor of torch: "bsr", or of blocks of one entry "csr" or "csc"."""
        if form == "csc":
            turned, make = self.T, torch.sparse_csc_tensor
            return make(
                turned.start,
                turned.column,
                turned.values.reshape(-1),
                self.shape,
                device=self.values.device,
                check_invariants=False,
            )
        values, shape, lead = self.values, self.shape, self.values.shape[:-3]
        start, column = (
            t.expand(*lead, -1).contiguous() if lead else t for t in (self.start, self.column)
        )
        make = torch.sparse_bsr_tensor
        if form == "csr":
            make, values = torch.sparse_csr_tensor, values.flatten(-3)
        device = values.device
        return make(start, column, values, (*lead, *shape), device=device, check_invariants=False)


def indexed(
    entries: Csr, copies: int, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of entries, so many times on a diagonal: ``start`` and ``column`` of their blocks, and places in their values."""
    (r, c), row, column = size, entries.row, entries.column
    height, width = (n * copies for n in entries.shape)
    if copies > 1:
        each = np.arange(copies)[:, None]
        row = (row + each * entries.height).reshape(-1)
        column = (column + each * entries.width).reshape(-1)
    above, beside = row // r, column // c  # much faster than with their rests
    down, right = row - above * r, column - beside * c
    wide = width // c
    kept, slot = numbered(above * wide + beside, height // r * wide)
    above, beside = np.divmod(kept, max(wide, 1))
    start = starts(np.bincount(above, minlength=height // r))
    slot *= r
    slot += down
    slot *= c
    slot += right
    return start, beside, slot


class Sizes(NamedTuple):
    """Rows of a block by output, and columns by input."""

    out: tuple[int, ...]
    into: tuple[int, ...]

    def of(self, j: int, i: int) -> tuple[int, int]:
        return self.out[j], self.into[i]

    @staticmethod
    def asked(given: tuple[int, int] | None, ys, xs, per_sample: bool | str) -> Sizes:
        """Those that a caller asks for; by default last axes. Raises ValueError where a matrix has no such blocks."""
        ends = [[t.shape[1:] if per_sample else t.shape for t in end] for end in (ys, xs)]
        if given is None:
            return Sizes(*(tuple(map(variable, end)) for end in ends))
        found = Sizes(*((n,) * len(end) for n, end in zip(given, ends, strict=True)))
        for what, name, n, end in zip(
            ("rows", "columns"), ("output", "input"), given, ends, strict=True
        ):
            for k, shape in enumerate(end):
                if shape.numel() % n:
                    each = ", of each sample" if per_sample else ""
                    raise ValueError(
                        f"blocksize={tuple(given)} does not divide the matrix: {name} {k} has {shape.numel()} entries "
                        f"(shape {tuple(shape)}{each}), which are no blocks of {n} {what}; without blocksize, blocks "
                        "are as large as the last axes of output and input"
                    )
        return found


def variable(shape: torch.Size) -> int:
    """How many entries of a tensor are one block: its last axis, where there are others that count these."""
    return max(shape[-1], 1) if len(shape) > 1 else 1


def empty(
    shape: tuple[int, int], size: tuple[int, int], lead: tuple[int, ...], like: Tensor
) -> Blocks:
    """A matrix (one a sample, of a ``lead``) without a block."""
    start = torch.zeros(shape[0] // size[0] + 1, dtype=torch.int64, device=like.device)
    return Blocks(
        start, start[:0], like.new_empty((*lead, 0, *size)), shape, ("empty", shape, size)
    )
