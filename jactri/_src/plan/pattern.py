"""The entries of a Jacobian that can be non-zero: a product of supports, one for each tie of an axis to the seed's.

A support says which indices of an axis of a value see which of an axis of the seed. Where nothing is tied, everything
can be non-zero. A pattern that is no such product (a star of neighbours, a list of connections) is one support between
all entries of the value and all of the seed, in flat order (see `supports`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from ..base.csr import Csr, starts
from ..maps.layout import FREE


@dataclass(frozen=True)
class Pattern:
    """Which entries of the Jacobian of ``out`` (a value's factors) by ``into`` (a seed's) can be non-zero.

    Both list (size, tie) in the order of the axes; an entry can be non-zero where the ``supports`` (out index, in
    index) of all ties hold.
    """

    out: tuple[tuple[int, int], ...]
    into: tuple[tuple[int, int], ...]
    supports: dict[int, Csr]
    whole: bool = False
    """Whether it is one support in flat order, as it is less than a product by axes."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return prod(n for n, _ in self.out), prod(n for n, _ in self.into)

    @staticmethod
    def of(support: Csr) -> Pattern:
        """A pattern in flat order."""
        return Pattern(((support.height, 0),), ((support.width, 0),), {0: support}, True)

    @cached_property
    def key(self) -> tuple:
        """Hashable: determines the pattern."""
        return self.out, self.into, tuple((t, s.key) for t, s in sorted(self.supports.items()))

    @property
    def nnz(self) -> int:
        """Entries that can be non-zero."""
        free = prod(n for n, t in (*self.out, *self.into) if t == FREE)
        return free * prod(s.nnz for s in self.supports.values())

    @property
    def bands(self) -> tuple[int, ...] | None:
        """The ties, slow axis first, if both ends have them last and in one order, as `kernels.band` writes them."""
        ties = tuple(t for _, t in self.out if t != FREE)
        ends = self.out[len(self.out) - len(ties) :], self.into[len(self.into) - len(ties) :]
        if not 1 <= len(ties) <= 3 or any(tuple(t for _, t in end) != ties for end in ends):
            return None
        return ties

    def sample(self, n: int, joined: bool = False) -> Pattern | None:
        """The pattern of one sample, if the first axes of both are a batch of ``n`` samples that do not mix.

        All have the same, or ``joined``, it is the union of theirs.
        """
        if n == 1:
            return self
        if not self.out or not self.into or self.into[0][1] != self.out[0][1] or n == 0:
            return None
        (size, tie), (wide, _) = self.out[0], self.into[0]
        if tie == FREE:
            return None
        support = self.supports[tie]
        if size == wide == n:
            rest = {t: s for t, s in self.supports.items() if t != tie}
            return Pattern(self.out[1:], self.into[1:], rest) if support.is_identity else None
        if not self.single or size % n or wide % n:
            return None
        each = support.blocks(n)
        if each is None or (not joined and n * each.nnz != support.nnz):
            return None
        return Pattern.of(each)

    def cut(self, rows: bool, axis: int, start: int, length: int) -> Pattern | None:
        """The entries of a range of an axis of its rows, or columns; None where that axis shares its tie."""
        side, supports = self.out if rows else self.into, dict(self.supports)
        tie = side[axis][1]
        if tie != FREE:
            if [t for _, t in side].count(tie) > 1:
                return None
            at, support = np.arange(start, start + length), supports[tie]
            supports[tie] = support.take(at) if rows else support.T.take(at).T
        side = (*side[:axis], (length, tie), *side[axis + 1 :])
        ends = (side, self.into) if rows else (self.out, side)
        return Pattern(*ends, supports)

    def within(self, other: Pattern) -> Pattern:
        """A pattern in flat order without the entries that another, of the same matrix, does not have."""
        (mine,) = self.supports.values()
        if self.nnz == other.nnz and mine.same(other.entries()):
            return self
        row, column = mine.row, mine.column
        places = [
            {t: (n, s) for (n, t), s in zip(end, _strides([n for n, _ in end]), strict=True)}
            for end in (other.out, other.into)
        ]
        there = np.ones(len(row), bool)
        for t, support in other.supports.items():
            (n, s), (m, u) = places[0][t], places[1][t]
            there &= support.holds(row // s % n, column // u % m)
        if there.all():
            return self
        return Pattern.of(Csr.of(row[there], column[there], *mine.shape))

    @property
    def single(self) -> bool:
        """Whether it is one support between all entries."""
        return len(self.out) == len(self.into) == len(self.supports) == 1

    @cached_property
    def flat(self) -> Csr:
        """The same as one support in flat order."""
        return self.entries()

    def entries(self) -> Csr:
        """All entries, in the order of rows, and of columns within a row."""
        if self.single:
            return self.supports[self.out[0][1]]
        rows, columns = self.shape
        if all(s.is_regular for s in self.supports.values()):
            return self._regular()
        place = {t: i for i, (_, t) in enumerate(self.out) if t != FREE}
        strides = _strides([n for n, _ in self.out])
        # the columns that a factor of `into` has for each index of the factor of `out` that it is tied to
        count = np.ones((), np.int64)
        for i, (n, t) in enumerate(self.out):
            own = self.supports[t].counts if t != FREE else np.ones(n, np.int64)
            count = np.multiply.outer(count, own) if i else own.astype(np.int64)
        count = np.ravel(count) * prod(n for n, t in self.into if t == FREE)
        start = starts(count)
        row = np.repeat(np.arange(rows), count)
        left = np.arange(start[-1]) - np.repeat(start[:-1], count)
        column, unit = np.zeros(len(row), np.int64), 1
        for n, t in reversed(self.into):
            if t == FREE:
                left, digit = np.divmod(left, n)
            else:
                support, of = self.supports[t], self.out[place[t]][0]
                at = row // strides[place[t]] % of
                left, digit = np.divmod(left, support.counts[at])
                digit = support.column[support.start[at] + digit]
            column += digit * unit
            unit *= n
        return Csr(start, column, columns)

    def _regular(self) -> Csr:
        """All entries, of supports whose rows have as many each: a sum over a grid of what factors add to a column."""
        place = {t: i for i, (_, t) in enumerate(self.out) if t != FREE}
        rows, axes = [n for n, _ in self.out], len(self.out) + len(self.into)
        column = np.zeros((*rows, *[1] * len(self.into)), np.int64)
        units = _strides([n for n, _ in self.into])
        for k, ((n, t), unit) in enumerate(zip(self.into, units, strict=True)):
            shape, digits = [1] * axes, np.arange(n)
            if t != FREE:
                support = self.supports[t]
                n, digits = support.most, support.column
                shape[place[t]] = support.height
            shape[len(rows) + k] = n
            column = column + (digits * unit).reshape(shape)
        each = prod(column.shape[len(rows) :])
        return Csr.regular(column.reshape(prod(rows), each), self.shape[1])


def _strides(sizes: list[int]) -> list[int]:
    return [prod(sizes[i + 1 :]) for i in range(len(sizes))]
