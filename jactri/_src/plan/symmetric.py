"""Products that tell a symmetric matrix: star colouring, and in which product each entry is read.

Columns of one colour are summed. An entry ``H[i, j]`` is read where it is alone: in row i of the sum that has column j,
or, as the matrix is symmetric, in row j of the sum that has column i. That all entries can be read so is what a star
colouring is (Coleman and More, Mathematical Programming 28, 1984): neighbours differ in colour, and so does one vertex
of any path of four. A column that is full, which takes all colours where rows are told apart, takes one here.

Colours are given one column after another, each the least that is allowed (Gebremedhin, Tarafdar, Manne and Pothen,
SIAM J. Sci. Comput. 29, 2007, whose stars are kept here as bits of each vertex).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..base.cache import Cache
from ..base.csr import Csr, union
from .colours import Table, table_of
from .compressing import Compression

GREEDY = 1 << 22
"""Entries up to which columns are coloured one by one,"""
ORDERS = 1 << 19
"""in several orders,"""
SMALL = 1 << 17
"""and also as if rows were told apart, whatever that takes before what is not needed is left out."""

LARGEST = 1 << 24
"""Entries up to which the same is done in one order, where a period or a grid leaves"""
FEW = 4
"""more colours than so many times the entries of a row."""


def closed(blocks: Sequence[Sequence[Csr]]) -> list[list[Csr]]:
    """Blocks of a square matrix with the entries of its transpose, too."""
    return [[_with(b, blocks[j][i].T) for j, b in enumerate(row)] for i, row in enumerate(blocks)]


def _with(one: Csr, other: Csr) -> Csr:
    if np.array_equal(one.start, other.start) and np.array_equal(one.column, other.column):
        return one
    return union([one, other])


def halved(pattern: Csr, forward: bool = False, shape: tuple[int, ...] = ()) -> Compression:
    """The fewest products that are found for a symmetric matrix, of whose entries each pair is read once.

    ``pattern`` is symmetric; ``forward``: the products are with tangents; ``shape``: of the grid that its rows are.
    Remembered.
    """
    return _made.of((pattern.key, forward, shape), lambda: _halved(pattern, forward, shape))


_made: Cache[tuple, Compression] = Cache(8)


def _halved(pattern: Csr, forward: bool, shape: tuple[int, ...]) -> Compression:
    mirror = np.argsort(pattern.column, kind="stable")  # where (j, i) is
    found = (_read(pattern, mirror, colour) for colour in _colourings(pattern, shape))
    table, colour, at = min(found, key=lambda f: f[0].count)
    none = Table(np.full(pattern.height, -1), 0)
    ends = (table, none) if forward else (none, table)
    return Compression(pattern, *ends, np.full(pattern.nnz, not forward), colour, at)


def _colourings(pattern: Csr, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    least, large = pattern.height, pattern.nnz > GREEDY
    if large:
        table = table_of(pattern, shape)
        yield table.colour
        if table.count * pattern.height <= FEW * pattern.nnz or pattern.nnz > LARGEST:
            return
    orders = [np.arange(pattern.height)]
    if pattern.nnz <= ORDERS:
        orders += [orders[0][::-1], np.argsort(-pattern.counts, kind="stable")]
    for order in orders:
        made = star(pattern, order)
        least = min(least, int(made.max(initial=-1)) + 1)
        yield made
    if not large and (pattern.most < least or pattern.nnz <= SMALL):  # then rows are told apart
        yield table_of(pattern, shape).colour


def star(pattern: Csr, order: np.ndarray) -> np.ndarray:
    """A star colouring of the graph of a symmetric pattern, greedily in an order of its columns.

    Colours are bits. A vertex may not have one of its neighbours'. With a neighbour w alone of its colour, it may not
    have that of the hub of a star in which w is a leaf; with several of one colour it is their hub itself, and may
    have no colour that any of their neighbours has.
    """
    n = pattern.height
    start, column = pattern.start.tolist(), pattern.column.tolist()
    bit = [0] * n  # the vertex's own colour, 0 before it has one;
    near = [0] * n  # the colours of its neighbours,
    many = [0] * n  # those that more than one of them has,
    hubs = [0] * n  # and those of neighbours that are a hub, of whose star it is a leaf
    for v in order.tolist():
        around = column[start[v] : start[v + 1]]
        taken, twice = near[v], many[v]
        for w in around:
            taken |= near[w] if bit[w] & twice else hubs[w]
        bit[v] = own = ~taken & (taken + 1)
        for w in around:
            if w == v:
                continue
            if not near[w] & own:
                near[w] |= own
            elif many[w] & own:
                hubs[v] |= bit[w]
            else:  # w has become a hub
                many[w] |= own
                for x in column[start[w] : start[w + 1]] if bit[w] else ():
                    if bit[x] == own and x != w:
                        hubs[x] |= bit[w]
            if bit[w] & twice:
                hubs[w] |= own
    return np.array([b.bit_length() - 1 for b in bit], np.int64)


def _read(
    pattern: Csr, mirror: np.ndarray, colour: np.ndarray
) -> tuple[Table, np.ndarray, np.ndarray]:
    """The sums that are needed of a colouring, and of each entry, the sum and the row in it where it is read.

    Raises ValueError for a colouring by which an entry is nowhere alone.
    """
    row, of = pattern.row, colour[pattern.column]
    count = int(colour.max(initial=-1)) + 1
    _, at, met = np.unique(row * max(count, 1) + of, return_inverse=True, return_counts=True)
    alone = met[at.reshape(-1)] == 1
    upper = np.flatnonzero(row <= pattern.column)
    lower = mirror[upper]
    one, other = alone[upper], alone[lower]
    if not (one | other).all():
        raise ValueError("an entry is alone in no row of the sums of columns")
    first, second = of[upper], of[lower]
    used = np.zeros(count, bool)
    used[first[~other]] = used[second[~one]] = True
    free = ~used[first] & ~used[second]  # either would do: that which most can be read from
    while free.any():
        votes = np.bincount(np.concatenate([first[free], second[free]]), minlength=count)
        used[votes.argmax()] = True
        free &= ~used[first] & ~used[second]
    source = np.empty_like(mirror)
    source[upper] = source[lower] = np.where(one & used[first], upper, lower)
    number = np.where(used, np.cumsum(used) - 1, -1)
    return Table(number[colour], int(used.sum())), number[of[source]], row[source]
