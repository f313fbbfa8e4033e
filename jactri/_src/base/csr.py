"""`Csr`: a boolean matrix by the columns of each row. What depends on what, where a dense one would be too large."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

BITS = 4
"""A product that would list this many times more entries than the result has bytes of bits is made of bits,"""
SMALL = 1 << 16
"""if these are more than a few."""

LISTED = 1 << 20
"""Entries of a product that are listed at once: each takes some forty bytes until it is known which are the same."""


TABLED = 4
"""Numbers are told apart by a table of all that they may be, if these are at most so many times as many."""


@dataclass(frozen=True, eq=False)
class Csr:
    """Row ``i`` has the columns ``column[start[i]:start[i + 1]]``, in order and none twice, of ``width`` ones."""

    start: np.ndarray
    column: np.ndarray
    width: int

    @staticmethod
    def identity(n: int) -> Csr:
        return Csr(np.arange(n + 1), np.arange(n), n)

    @staticmethod
    def regular(column: np.ndarray, width: int) -> Csr:
        """Each row has as many: ``column`` (rows, entries of one)."""
        height, each = column.shape
        return Csr(np.arange(height + 1) * each, column.reshape(-1), width)

    @staticmethod
    def picked(column: np.ndarray, width: int) -> Csr:
        """Each row has one column, or none where that is negative."""
        column = np.asarray(column, np.int64).reshape(-1)
        there = column >= 0
        if there.all():
            return Csr(np.arange(len(column) + 1), column, width)
        return Csr(starts(there), column[there], width)

    @staticmethod
    def of(row: np.ndarray, column: np.ndarray, height: int, width: int) -> Csr:
        """The matrix with these entries, in any order and some of them more than once."""
        keys = row.astype(np.int64) * width + column
        if not _increases(keys):
            return _of_keys(keys, height, width)
        return Csr(starts(np.bincount(row, minlength=height)), column.astype(np.int64), width)

    @staticmethod
    def windows(count: int, size: int, taps: int, stride: int, padding: int, dilation: int) -> Csr:
        """Which of ``size`` places each of ``count`` windows along an axis sees."""
        places = (stride * np.arange(count) - padding)[:, None] + dilation * np.arange(taps)
        row, tap = np.nonzero((places >= 0) & (places < size))
        return Csr.of(row, places[row, tap], count, size)

    @staticmethod
    def triangle(n: int) -> Csr:
        """Row ``i`` has the columns up to ``i``."""
        counts = np.arange(1, n + 1)
        start = starts(counts)
        column = np.arange(start[-1])
        column -= start[:-1].repeat(counts)
        return Csr(start, column, n)

    @staticmethod
    def of_dense(dense: np.ndarray) -> Csr:
        row, column = np.nonzero(dense)
        return Csr(starts(np.bincount(row, minlength=len(dense))), column, dense.shape[1])

    @property
    def height(self) -> int:
        return len(self.start) - 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def nnz(self) -> int:
        return len(self.column)

    @cached_property
    def counts(self) -> np.ndarray:
        """Entries of each row."""
        return np.diff(self.start)

    @cached_property
    def most(self) -> int:
        """Entries of the longest row."""
        return int(self.counts.max(initial=0))

    @property
    def is_regular(self) -> bool:
        """Whether all rows have as many entries."""
        return self.most * self.height == self.nnz

    @property
    def in_columns(self) -> np.ndarray:
        """Entries of each column."""
        return np.bincount(self.column, minlength=self.width)

    @property
    def most_in_column(self) -> int:
        """Entries of the longest column."""
        return int(self.in_columns.max(initial=0))

    @property
    def row(self) -> np.ndarray:
        """The row of each entry."""
        return np.arange(self.height).repeat(self.counts)

    def listed(self, most: int = LISTED) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The row and the column of each entry, so many at a time."""
        for a in range(0, self.nnz, most):
            b = min(a + most, self.nnz)
            first = int(np.searchsorted(self.start, a, "right")) - 1
            last = int(np.searchsorted(self.start, b, "left"))
            counts = np.diff(self.start[first : last + 1].clip(a, b))
            yield np.arange(first, last).repeat(counts), self.column[a:b]

    @property
    def keys(self) -> np.ndarray:
        """The flat position of each entry, in order."""
        return self.row * self.width + self.column

    @cached_property
    def key(self) -> bytes:
        """Alike for the same matrix."""
        return digest(self.start, self.column, np.array(self.width))

    @property
    def is_identity(self) -> bool:
        n = self.width
        return self.shape == (n, n) and self.most <= 1 and np.array_equal(self.column, np.arange(n))

    def dense(self) -> np.ndarray:
        made = np.zeros(self.shape, bool)
        made[self.row, self.column] = True
        return made

    def diagonal(self) -> np.ndarray:
        """Which entries (i, i) are there."""
        made = np.zeros(min(self.shape), bool)
        made[self.column[self.row == self.column]] = True
        return made

    @cached_property
    def T(self) -> Csr:
        order = np.argsort(self.column, kind="stable")
        counts = np.bincount(self.column, minlength=self.width)
        return Csr(starts(counts), self.row[order], self.height)

    def take(self, rows: np.ndarray) -> Csr:
        """Some of the rows, in another order."""
        counts = self.counts[rows]
        start = starts(counts)
        at = np.arange(start[-1]) + (self.start[rows] - start[:-1]).repeat(counts)
        return Csr(start, self.column[at], self.width)

    def holds(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Which of these entries are there."""
        if self.height * self.width <= TABLED * len(row):
            return self.dense()[row, column]
        if self.most <= 1:
            own = np.full(self.height, -1)
            own[self.row] = self.column
            return own[row] == column
        keys, wanted = self.keys, row * self.width + column
        return keys[np.searchsorted(keys, wanted).clip(max=len(keys) - 1)] == wanted

    def within(self, other: Csr) -> bool:
        """Whether the other, of the same shape, has all of the entries."""
        if self is other:
            return True
        return self.nnz <= other.nnz and bool(other.holds(self.row, self.column).all())

    def after(self, before: Csr, limit: float | None = None) -> Csr | None:
        """The product ``self @ before``: each row has those of the rows of ``before`` that it names.

        None where more than ``limit`` entries would be listed; without one, where there are many, and it has every one.
        """
        if before.is_identity and (limit is None or self.nnz <= limit):
            return self
        counts = before.counts[self.column]
        total = int(counts.sum())
        if limit is not None and total > limit:
            return None
        if self.most <= 1:
            if self.nnz == self.height:
                return before.take(self.column)
            held = np.zeros(self.height, np.int64)
            held[self.row] = counts
            return Csr(starts(held), before.take(self.column).column, before.width)
        if limit is None and total > BITS * (self.height * before.width // 8) + SMALL:
            return self._of_bits(before)
        listed = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])[self.start]
        parts: list[Csr] = []
        first = 0
        while first < self.height or not parts:
            last = int(np.searchsorted(listed, listed[first] + LISTED, "right")) - 1
            last = min(max(last, first + 1), self.height)
            parts.append(self._rows(first, last)._listed(before))
            first = last
        return stacked(parts)

    def _rows(self, first: int, last: int) -> Csr:
        """Some that follow one another."""
        start = self.start[first : last + 1]
        return Csr(start - start[0], self.column[start[0] : start[-1]], self.width)

    def _listed(self, before: Csr) -> Csr:
        """The product, by a list of all its terms."""
        counts = before.counts[self.column]
        ends = np.cumsum(counts)
        at = np.arange(int(counts.sum()))
        at += (before.start[self.column] - ends + counts).repeat(counts)
        row = self.row.repeat(counts)
        return Csr.of(row, before.column[at], self.height, before.width)

    def _of_bits(self, before: Csr) -> Csr | None:
        """The product with rows as bits, in as many passes as the longest row has entries; None for every entry."""
        width, high = before.width, max(1, LISTED // max(before.width, 1))
        bits = np.concatenate([
            np.packbits(part.dense(), axis=1) for part in before.cut(high)
        ])  # fmt: skip
        made = np.zeros((self.height, bits.shape[1]), np.uint8)
        for j in range(self.most):
            rows = np.flatnonzero(self.counts > j)
            for some in np.array_split(rows, max(1, len(rows) // high)):
                made[some] |= bits[self.column[self.start[some] + j]]
        full = np.packbits(np.ones(width, bool))
        if self.height * width > SMALL and all((row == full).all() for row in made):
            return None
        blocks = [made[i : i + high] for i in range(0, self.height, high)]
        return stacked([
            Csr.of_dense(np.unpackbits(block, axis=1, count=width).view(bool)) for block in blocks
        ])  # fmt: skip

    def cut(self, high: int) -> Iterator[Csr]:
        """All rows, so many at a time."""
        for first in range(0, max(self.height, 1), high):
            yield self._rows(first, min(first + high, self.height))

    def same(self, other: Csr) -> bool:
        return self.width == other.width and all(
            np.array_equal(*pair)
            for pair in ((self.start, other.start), (self.column, other.column))
        )

    def repeated(self, n: int) -> Csr:
        """``n`` times on a diagonal."""
        if n == 1:
            return self
        each = np.arange(n)[:, None]
        ends = np.append((self.start[:-1] + each * self.nnz).reshape(-1), n * self.nnz)
        return Csr(ends, (self.column + each * self.width).reshape(-1), n * self.width)

    def block(self, n: int) -> Csr | None:
        """The block of which it is ``n`` alike ones on a diagonal, or None."""
        high, wide = self.height // max(n, 1), self.width // max(n, 1)
        if not n or (high * n, wide * n) != self.shape or self.nnz % n:
            return None
        counts, column = self.counts.reshape(n, -1), self.column.reshape(n, -1)
        if (counts != counts[0]).any() or (
            column - column[0] != wide * np.arange(n)[:, None]
        ).any():
            return None
        return Csr(self.start[: high + 1], column[0], wide)

    def blocks(self, n: int) -> Csr | None:
        """The union of the ``n`` blocks on the diagonal; None where there are entries outside of them."""
        high, wide = self.height // n, self.width // n
        row, column = self.row, self.column
        if (high * n, wide * n) != self.shape or (
            row // max(high, 1) != column // max(wide, 1)
        ).any():
            return None
        return Csr.of(row % max(high, 1), column % max(wide, 1), high, wide)


def union(parts: Sequence[Csr]) -> Csr:
    """The entries that any of some matrices of one shape have."""
    first = parts[0]
    if all(p is first for p in parts):
        return first
    return _of_keys(np.concatenate([p.keys for p in parts]), *first.shape)


def stacked(parts: Sequence[Csr]) -> Csr:
    """Matrices of one width, one below the other."""
    if len(parts) == 1:
        return parts[0]
    counts = np.concatenate([p.counts for p in parts])
    return Csr(starts(counts), np.concatenate([p.column for p in parts]), parts[0].width)


def digest(*arrays: np.ndarray) -> bytes:
    """Alike for arrays of the same shapes, types and contents."""
    made = hashlib.blake2b(digest_size=16)
    for a in arrays:
        made.update(repr((a.dtype, a.shape)).encode())
        made.update(np.ascontiguousarray(a).reshape(-1).view(np.uint8))
    return made.digest()


def numbered(keys: np.ndarray, bound: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of some numbers below a bound that are there, in order, and the place of each number among them."""
    first = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    each = keys[first]
    if 0 < len(each) <= len(keys) // 2:  # neighbours are often the same
        kept, place = numbered(each, bound)
        run = np.cumsum(first)
        run -= 1
        return kept, place[run]
    if _increases(keys):
        return keys, np.arange(len(keys))
    if bound > TABLED * len(keys):
        return np.unique(keys, return_inverse=True)
    there = np.zeros(bound, bool)
    there[keys] = True
    kept = np.flatnonzero(there)
    number = np.empty(bound, np.int64)
    number[kept] = np.arange(len(kept))
    return kept, number[keys]


def starts(counts: np.ndarray) -> np.ndarray:
    """Where rows of these many entries start, and the end."""
    made = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=made[1:])
    return made


def _increases(keys: np.ndarray) -> bool:
    return bool((keys[1:] > keys[:-1]).all())


def _once(keys: np.ndarray) -> np.ndarray:
    """Sorted, none twice."""
    if not _increases(keys):
        keys = np.sort(keys)
        keys = keys[np.concatenate([[True], keys[1:] > keys[:-1]])]
    return keys


def _of_keys(keys: np.ndarray, height: int, width: int) -> Csr:
    keys = _once(keys)
    row, column = np.divmod(keys, max(width, 1))
    return Csr(starts(np.bincount(row, minlength=height)), column, width)
