"""A matrix of which a pattern is known, from a few products with it: `Compression`.

Columns of one colour, of which no two have an entry in one row, are summed by one product with a tangent; rows of which
no two have one in a column by a product with a cotangent (Curtis, Powell and Reid 1974). A row that is dense gives
every column a colour of its own, a dense column every row. Then some rows are had from cotangents, and the columns are
coloured by what is left: a dense row and a dense column around a diagonal, an arrowhead, take three products (Coleman
and Verma, The efficient computation of sparse Jacobian matrices using automatic differentiation, SIAM J. Sci. Comput.
19, 1998, whose partitions are found by another order). Every entry is read from one product, as it is there: nothing is
solved for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from ..base.cache import Cache
from ..base.csr import Csr, digest
from ..maps.layout import FREE
from .colours import Table, table_of
from .pattern import Pattern

Factors = tuple[tuple[int, int], ...]
"""Of an end of a pattern: (size, tie)."""

FEW = 4
"""Products that are not worth to be looked at again."""

WORTH = 0.5
"""Products with both, which are two sweeps, are made where at most this part of those with one is left."""

_ENTRIES = 1 << 22
"""Entries up to which rows are told from columns; so many are looked at in all,"""
_LEVELS = 1 << 26
"""and counted."""


@dataclass(frozen=True, eq=False)
class Compression:
    """How the entries of a pattern are read from products with a matrix.

    ``tangents`` has the colour of each column, ``cotangents`` that of each row; -1: it is in no product. Product k with
    a tangent is the sum of the columns of colour k. An entry, in the order of the pattern, is at index ``at`` of the
    product of ``colour``: with a cotangent where ``reverse``, else with a tangent. For a symmetric matrix, that may be
    where the entry on the other side of the diagonal stands.
    """

    pattern: Csr
    tangents: Table
    cotangents: Table
    reverse: np.ndarray
    colour: np.ndarray
    at: np.ndarray

    @staticmethod
    def of(pattern: Csr, tangents: Table, cotangents: Table, reverse: np.ndarray) -> Compression:
        """Each entry from its own column and row; ``reverse``: those that are read from rows."""
        row, column = pattern.row, pattern.column
        colour = np.where(reverse, cotangents.colour[row], tangents.colour[column])
        return Compression(
            pattern, tangents, cotangents, reverse, colour, np.where(reverse, column, row)
        )

    @property
    def products(self) -> int:
        return self.tangents.count + self.cotangents.count

    @cached_property
    def key(self) -> bytes:
        """Determines it."""
        return digest(
            self.tangents.colour, self.cotangents.colour, self.reverse, self.colour, self.at
        )

    @cached_property
    def reads(self) -> dict[bool, Reads]:
        """What is read from products with tangents (False) and with cotangents (True); none where nothing is."""
        found = {}
        for reverse, table, size in (
            (False, self.tangents, self.pattern.height), (True, self.cotangents, self.pattern.width)
        ):  # fmt: skip
            entries = np.flatnonzero(self.reverse == reverse)
            if len(entries):
                entries = entries[np.argsort(self.colour[entries], kind="stable")]
                start = np.searchsorted(self.colour[entries], np.arange(table.count + 1))
                place = self.colour[entries] * size + self.at[entries]
                found[reverse] = Reads(table, size, start, place, entries)
        return found

    @cached_property
    def order(self) -> np.ndarray:
        """The place of each entry among those of all `reads`, one after the other."""
        made = np.empty(self.pattern.nnz, np.int64)
        entries = [r.entries for r in self.reads.values()]
        if entries:
            made[np.concatenate(entries)] = np.arange(len(made))
        return made


@dataclass(frozen=True, eq=False)
class Reads:
    """Entries of products of one kind, ``size`` numbers each, by the colours of a table.

    Those of colour k are ``entries[start[k]:start[k + 1]]``, which stand at ``place`` in all products, flat.
    """

    table: Table
    size: int
    start: np.ndarray
    place: np.ndarray
    entries: np.ndarray


def joined(blocks: Sequence[Sequence[Csr]]) -> tuple[Csr, list[list[np.ndarray]]]:
    """Blocks, by output and input, as one matrix, and where the entries of each are in it, in order. Remembered."""
    return _joined.of(tuple(tuple(b.key for b in row) for row in blocks), lambda: _join(blocks))


_joined: Cache[tuple, tuple[Csr, list[list[np.ndarray]]]] = Cache(8)


def _join(blocks: Sequence[Sequence[Csr]]) -> tuple[Csr, list[list[np.ndarray]]]:
    if len(blocks) == len(blocks[0]) == 1:
        return blocks[0][0], [[np.arange(blocks[0][0].nnz)]]
    top = np.cumsum([0, *(row[0].height for row in blocks)])
    left = np.cumsum([0, *(b.width for b in blocks[0])])
    parts = [
        (b.row + top[j], b.column + left[i])
        for j, row in enumerate(blocks)
        for i, b in enumerate(row)
    ]
    row, column = (np.concatenate(p) for p in zip(*parts, strict=True))
    order = np.lexsort((column, row))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    ends = np.cumsum([len(r) for r, _ in parts])[:-1]
    found = iter(np.split(place, ends))
    return Csr.of(row, column, int(top[-1]), int(left[-1])), [
        [next(found) for _ in r] for r in blocks
    ]


def compressed(
    pattern: Csr,
    strategy: str = "auto",
    out: tuple[int, ...] = (),
    into: tuple[int, ...] = (),
) -> Compression:
    """The fewest products that are found: with tangents ("forward-mode"), with cotangents, or with both.

    ``out``, ``into``: shapes of the grids that rows and columns are. Remembered.
    """
    key = pattern.key, strategy, out, into
    return _made.of(key, lambda: _compressed(pattern, strategy, out, into))


_made: Cache[tuple, Compression] = Cache(8)


def _compressed(
    pattern: Csr, strategy: str, out: tuple[int, ...], into: tuple[int, ...]
) -> Compression:
    height, width = pattern.shape
    found = []
    if strategy != "forward-mode":  # the first of those that are as good: autograd's own order
        rows = _used(table_of(pattern.T, out), pattern.counts)
        found.append(Compression.of(pattern, _none(width), rows, np.ones(pattern.nnz, bool)))
    if strategy != "reverse-mode":
        columns = _used(table_of(pattern, into), pattern.T.counts)
        found.append(Compression.of(pattern, columns, _none(height), np.zeros(pattern.nnz, bool)))
    best = min(found, key=lambda c: c.products)
    if len(found) == 2 and best.products > FEW and pattern.nnz <= _ENTRIES:
        return two_sided(pattern, int(WORTH * best.products)) or best
    return best


def each_row(pattern: Csr) -> Compression:
    """Every row by itself."""
    rows = Table(np.arange(pattern.height), pattern.height)
    return Compression.of(pattern, _none(pattern.width), rows, np.ones(pattern.nnz, bool))


def worth_both(blocks: Sequence[Sequence[Pattern]]) -> int | None:
    """As many products of both kinds as would be worth it, or None where their numbers of entries show too few.

    ``blocks``: by output and input.
    """
    counts = [
        [
            (
                _counts(p.out, p.into, {t: s.counts for t, s in p.supports.items()}),
                _counts(p.into, p.out, {t: s.in_columns for t, s in p.supports.items()}),
            )
            for p in row
        ]
        for row in blocks
    ]
    rows = np.concatenate([sum(r for r, _ in row) for row in counts])
    columns = np.concatenate([sum(c for _, c in column) for column in zip(*counts, strict=True)])
    least = int(min(rows.max(initial=0), columns.max(initial=0)))
    most = int(WORTH * least)
    if least <= FEW or not (
        _may_split(rows, len(columns), most) or _may_split(columns, len(rows), most)
    ):
        return None
    return most


def _counts(out: Factors, into: Factors, counts: dict[int, np.ndarray]) -> np.ndarray:
    """How many entries each row of a pattern has; ``counts``: of each support."""
    made = np.full(1, prod(n for n, t in into if t == FREE))
    for n, t in out:
        own = np.ones(n, np.int64) if t == FREE else counts[t]
        made = np.multiply.outer(made, own).ravel()
    return made


def _may_split(counts: np.ndarray, width: int, most: int) -> bool:
    """Whether the rows may be split for at most so many products: some column has the average of what is taken out."""
    ordered = np.sort(counts)
    beyond = np.concatenate([np.cumsum(ordered[::-1])[::-1], np.zeros(1, np.int64)])
    levels = np.unique(counts)[:-1]
    taken = beyond[np.searchsorted(ordered, levels, "right")]
    return bool((levels + taken / max(width, 1) <= most).any())


def two_sided(pattern: Csr, most: int) -> Compression | None:
    """Products of both kinds, at most so many; None where none are found."""
    best = None
    for turned in (False, True):
        found = _split(pattern.T if turned else pattern, most)
        if found is None:
            continue
        dense, first, second = found  # the rows, or the columns, that are had by themselves
        most = first.count + second.count - 1
        if turned:
            best = Compression.of(pattern, first, second, ~dense[pattern.column])
        else:
            best = Compression.of(pattern, second, first, dense[pattern.row])
    return best


def _split(pattern: Csr, most: int) -> tuple[np.ndarray, Table, Table] | None:
    """The rows with the most entries, so many that the fewest products are left; their colours, and the columns'.

    For any number of them there are at least as many products as a column has entries within these rows, and a row
    outside of them. The numbers for which this is least are tried.
    """
    counts = pattern.counts
    levels = np.unique(counts)[:-1]  # rows with more are taken out
    few = max(2, _LEVELS // max(pattern.nnz, 1))
    levels = levels[levels < most]
    if len(levels) > few:
        levels = np.unique(levels[np.geomspace(1, len(levels), few).astype(np.int64) - 1])
    bounds = []
    for level in levels.tolist():
        within = np.bincount(pattern.column[(counts > level).repeat(counts)], minlength=1)
        bounds.append((int(within.max()) + level, level))
    best, left = None, _ENTRIES
    for bound, level in sorted(bounds):
        if bound > most or left < 0:
            break
        left -= pattern.nnz
        dense = counts > level
        taken, rest = (pattern.take(np.flatnonzero(which)) for which in (dense, ~dense))
        of_rows = table_of(taken.T)
        colour = np.full(pattern.height, -1)
        colour[dense] = of_rows.colour
        columns = _used(table_of(rest), rest.T.counts)
        rows = Table(colour, of_rows.count)
        if rows.count + columns.count <= most:
            best = dense, rows, columns
            most = rows.count + columns.count - 1
    return best


def _none(size: int) -> Table:
    return Table(np.full(size, -1), 0)


def _used(table: Table, counts: np.ndarray) -> Table:
    """Colours without seeds that have no entry, and so in no product."""
    there = counts > 0
    if len(counts) and there.all():
        return table
    colour = np.full(len(counts), -1)
    names, colour[there] = np.unique(table.colour[there], return_inverse=True)
    return Table(colour, len(names))
