"""Colours given to one seed after another, each the least that is free.

That is a distance-2 colouring of the bipartite graph of entries and seeds (Gebremedhin, Manne and Pothen, What color is
your Jacobian?, SIAM Review 47, 2005). How many it takes depends on the order: seeds as they come suit what is regular;
those that meet the most others first, or the least of those that are left last (Matula and Beck, Smallest-last ordering
and clustering, 1983), what is not. Given anew class by class, colours never become more (Culberson, Iterated greedy
graph coloring and the difficulty landscape, 1992).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..base.csr import Csr

ENTRIES = 1 << 22
"""Of a support: so many, and no more, are coloured one by one,"""
_ORDERS = 1 << 19
"""in more than one order,"""
_MEETING = 1 << 21
"""of which some need as many pairs of seeds that meet."""

_AGAIN = 2
"""How often colours are given anew."""


def fewest(support: Csr, most: int) -> np.ndarray | None:
    """The colour of each seed of (entries, seeds), if less than ``most`` colours are found."""
    rows, best, last = support.T, None, None
    least = max(1, support.most)
    for order in _orders(support, rows):
        made = _given(rows, order, support.height)
        count = _count(made)
        if last is None or count < _count(last):
            last = made
        if count < most:
            best, most = made, count
        if most <= least:
            return best
    for _ in range(_AGAIN if support.nnz <= _ORDERS else 0):
        last = _given(rows, np.argsort(-last, kind="stable"), support.height)
        if _count(last) < most:
            best, most = last, _count(last)
    return best


def _count(colour: np.ndarray) -> int:
    return int(colour.max(initial=0)) + 1


def _orders(support: Csr, rows: Csr) -> Iterator[np.ndarray]:
    yield np.arange(support.width)
    if support.nnz > _ORDERS:
        return
    meet = rows.after(support, _MEETING)
    if meet is None:
        yield np.argsort(-rows.counts, kind="stable")
        return
    yield np.argsort(-meet.counts, kind="stable")
    yield _smallest_last(meet)


def _smallest_last(meet: Csr) -> np.ndarray:
    """From the end: the seed that meets the fewest of those that are left."""
    start, column = meet.start.tolist(), meet.column.tolist()
    left = meet.counts.tolist()
    waiting: list[list[int]] = [[] for _ in range(meet.most + 1)]
    for k, n in enumerate(left):
        waiting[n].append(k)
    order: list[int] = []
    at = 0
    while len(order) < len(left):
        while not waiting[at]:
            at += 1
        k = waiting[at].pop()
        if left[k] != at:
            continue  # it meets fewer by now, and waits there; or is gone
        order.append(k)
        left[k] = -1
        for other in column[start[k] : start[k + 1]]:
            if (n := left[other]) > 0:
                left[other] = n - 1
                waiting[n - 1].append(other)
        at = max(0, at - 1)
    return np.array(order[::-1], np.int64)


def _given(rows: Csr, order: np.ndarray, entries: int) -> np.ndarray:
    """Each seed, in an order, gets the least colour that no seed has with which it shares an entry."""
    colour = [0] * rows.height
    taken = [0] * entries  # by entry of the result: the colours that it sees, as bits
    start, column = rows.start.tolist(), rows.column.tolist()
    for k in order.tolist():
        mine = column[start[k] : start[k + 1]]
        bits = 0
        for i in mine:
            bits |= taken[i]
        bit = ~bits & (bits + 1)
        colour[k] = bit.bit_length() - 1
        for i in mine:
            taken[i] |= bit
    return np.array(colour, np.int64)
