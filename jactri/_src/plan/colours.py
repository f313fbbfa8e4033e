"""Seeds that run as one: those that never meet in one entry of the result (Curtis, Powell and Reid 1974).

Along an axis of the seed, or over all of its entries in flat order, seeds have one colour if no entry of the result
sees two of them. A period is looked for first, then one that goes by the axes of a grid, else one colour after another
(see `greedy`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np

from ..base.cache import Cache
from ..base.csr import LISTED, Csr, digest, stacked
from ..maps.layout import FREE, Colours, Layout
from ..read.graph import Graph
from . import greedy
from . import sweep as sweeping
from .pattern import Pattern
from .supports import Trace

Splits = dict[int, tuple[int, ...]]

WORTH = 0.75
"""Seeds are coloured where at most this part of them remains."""

_PAIRS = 1 << 28
"""Pairs of entries of one row that are compared to find a period."""

PAIR = 8
"""A pair of entries takes as long as so many of a dense row that are compared with others."""

_LONG = 4
"""Periods are looked for up to so many times the most seeds of an entry, where colours may also be given one by one."""

_GRID = 1 << 22
"""As many, or so many sums, to find the colours of a grid."""

_STEPS = 1 << 10
"""More differences of seeds of one entry than this are those of no stencil."""

_LARGEST = 1 << 24
"""Entries up to which patterns are brought to flat order."""


@dataclass(frozen=True, eq=False)
class Table:
    """The colour of each seed. ``samples``: of how many alike parts of the seed each has the same colours, or 0."""

    colour: np.ndarray
    count: int
    samples: int = 0

    @cached_property
    def key(self) -> bytes:
        return digest(self.colour)

    @property
    def by_rest(self) -> bool:
        """Whether each seed's colour is the rest of its index by their number."""
        return np.array_equal(self.colour, np.arange(len(self.colour)) % self.count)


class Colouring(NamedTuple):
    """By factor of the seed: how many colours, and which each index has where that is not its rest by their number."""

    splits: Splits
    colours: Colours
    tables: dict[tuple[int, int], Table]


def period(support: Csr, most: int | None = None) -> int:
    """The least p such that seeds whose indices differ by a multiple of p never meet: (entries, seeds).

    The number of seeds where there is none, or none up to ``most``.
    """
    seeds, least = support.width, max(1, support.most)
    if least >= seeds:
        return max(seeds, 1)
    apart = _differences(support)
    if apart is None:
        return seeds
    tried = range(least, seeds if most is None else min(most + 1, seeds))
    return next((p for p in tried if not apart[p::p].any()), seeds)


def _differences(support: Csr) -> np.ndarray | None:
    """By how much two seeds of one entry may differ: boolean. None where that is too much to look for."""
    seeds, counts = support.width, support.counts
    made = np.zeros(seeds, bool)
    pairs = int((counts * (counts - 1) // 2).sum())
    dense = support.height * seeds * seeds // 2
    if min(pairs, dense) > _PAIRS:
        return None
    if PAIR * pairs <= dense:
        for one, other in _pairs_of(support):
            made[other - one] = True
        return made
    for part in support.cut(max(1, LISTED // seeds)):
        seen = part.dense()
        for d in np.flatnonzero(~made[1:]) + 1:
            made[d] = (seen[:, d:] & seen[:, :-d]).any()
    return made


def table_of(support: Csr, shape: tuple[int, ...] = ()) -> Table:
    """Colours of the seeds of (entries, seeds), as few as are found. ``shape``: of the grid that the seeds are."""
    return _tables.of((support.key, shape), lambda: _found(support, shape))


_tables: Cache[tuple, Table] = Cache(8)
"""Both ways of a plan, which may be made twice, often ask for the same."""


def _found(support: Csr, shape: tuple[int, ...]) -> Table:
    seeds, least = np.arange(support.width), max(1, support.most)
    count = period(support, _LONG * least if support.nnz <= greedy.ENTRIES else None)
    best = Table(seeds % count, count)
    if count > least and (found := _of_grid(support, shape, min(count, _LONG * least))) is not None:
        best = found
    if best.count > least and support.nnz <= greedy.ENTRIES:
        colour = greedy.fewest(support, best.count)
        if colour is not None:
            best = Table(colour, int(colour.max(initial=0)) + 1)
    return best


def _pairs_of(support: Csr) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of columns of one row, the smaller first, those that are neighbours in their rows first."""
    counts = support.counts
    for j in range(1, support.most):
        at = support.start[:-1][counts > j]
        left = counts[counts > j] - j
        first = np.arange(left.sum()) + (at - np.cumsum(left) + left).repeat(left)
        yield support.column[first], support.column[first + j]


def _of_grid(support: Csr, shape: tuple[int, ...], most: int) -> Table | None:
    """The fewest colours, below ``most``, that are the rest of a sum of multiples of the indices by their number.

    So a cell and its neighbours along d axes take 2 d + 1 colours, the index along axis k times k in the sum.
    """
    axes = [n for n in shape if n > 1]
    counts = support.counts
    if len(axes) < 2 or int((counts * (counts - 1) // 2).sum()) > _GRID:
        return None
    place = np.stack(np.unravel_index(np.arange(support.width), axes))
    code = np.array([prod(2 * n for n in axes[k + 1 :]) for k in range(len(axes))]) @ place
    # how two seeds of one entry differ, each way once, as a number that tells the differences along all axes
    seen = [code[b] - code[a] for a, b in _pairs_of(support)]
    codes = np.unique(np.concatenate(seen)) if seen else code[:0]
    _, first = np.unique(np.abs(codes), return_index=True)
    steps, rest = [], codes[first]
    if len(rest) > _STEPS:
        return None
    for n in reversed(axes):
        step = (rest + n) % (2 * n) - n
        steps.append(step)
        rest = (rest - step) // (2 * n)
    apart = np.stack(steps[::-1])
    left = _GRID
    for p in range(max(1, support.most), most):
        left -= p ** len(axes) * apart.shape[1]
        if left < 0:
            return None
        by = np.stack([g.reshape(-1) for g in np.meshgrid(*[np.arange(p)] * len(axes))], 1)
        good = np.flatnonzero(((by @ apart) % p != 0).all(1))
        if len(good):
            return Table(by[good[0]] @ place % p, p)
    return None


def flat_table(
    patterns: Sequence[Pattern],
    reverse: bool,
    samples: int,
    worth: float,
    shape: tuple[int, ...] = (),
) -> Table | None:
    """Colours of all entries of a seed, by the patterns of the targets; None where more than a part ``worth`` remains.

    ``samples``: so many, which all patterns keep apart, are coloured alike; 0: they are not told apart. ``shape``: of
    the seed.
    """
    if samples:
        patterns, shape = [p.sample(samples, joined=True) for p in patterns], shape[1:]
    size = patterns[0].shape[not reverse]
    if sum(p.nnz for p in patterns) > _LARGEST:
        return None
    found = table_of(stacked([p.flat.T if reverse else p.flat for p in patterns]), shape)
    if found.count > worth * size:
        return None
    if samples > 1:
        return Table(np.tile(found.colour, samples), found.count, samples)
    return Table(found.colour, found.count, samples)


def colours_of(
    traces: list[Trace | None],
    sweep: sweeping.Sweep,
    per_sample: bool | str,
    tables: bool = False,
) -> Colouring:
    """Splits and colours of the seed with which a sweep needs fewer seeds; no colours where none do.

    ``traces`` are those of the inputs. Samples that are asked for one by one (``per_sample``) are never one colour.
    ``tables``: whether colours may be any.
    """
    ends = [(k, v) for k, v in enumerate(sweep.targets) if v is not None]
    none = Colouring({}, {}, {})
    if sweep.summed or not ends:
        return none
    if sweep.reverse:
        found = [(traces[k], traces[k].values[sweep.seed]) for k, _ in ends]
        axes = [at.layout.axes for _, at in found]
    else:
        trace = traces[sweep.index]
        found = [(trace, trace.values[v]) for _, v in ends]
        axes = [trace.start.axes for _ in ends]
    sizes = [[tuple(n for n, _ in axis) for axis in a] for a in axes]
    if any(s != sizes[0] for s in sizes):
        return none
    kept = frozenset.intersection(*(sweep.layouts[v].tied for _, v in ends))
    colours: Colours = {}
    chosen = {}
    for a, axis in enumerate(sizes[0]):
        for i, n in enumerate(axis):
            own = sweep.layout.axes[a]
            if n == 1 or (per_sample and a == 0) or (len(own) == len(axis) and own[i][1] in kept):
                continue  # a tie needs no colours
            ties = [other[a][i][1] for other in axes]
            if any(t not in at.layout.tied for t, (_, at) in zip(ties, found, strict=True)):
                continue
            formed = [trace.support_of(at, t) for t, (trace, at) in zip(ties, found, strict=True)]
            supports = [s for s in formed if s is not None]
            least = max(
                (s.most_in_column if sweep.reverse else s.most for s in supports), default=0
            )
            if len(supports) < len(formed) or least > WORTH * n:
                continue
            seen = stacked([s.T if sweep.reverse else s for s in supports])
            table = table_of(seen) if tables else None
            least = period(seen) if table is None else table.count
            if least <= WORTH * n:
                colours[a, i] = least
                if table is not None and not table.by_rest:
                    chosen[a, i] = table
    splits = {a: axis for a, axis in enumerate(sizes[0]) if len(axis) > 1}
    return Colouring(splits, colours, chosen)


def tabled(graph: Graph, sweep: sweeping.Sweep, table: Table) -> sweeping.Sweep:
    """The sweep from the sums of all seeds of one colour, as a table says."""
    axes = tuple([((n, FREE),) for n in graph.values[sweep.seed].shape])
    at, layout = (
        Layout(axes, (table.count,)) for _ in range(2)
    )  # two: no block is alike for all samples
    return sweeping.from_blocks(
        graph, {sweep.seed: at}, layout, sweep.reverse, sweep.targets, index=sweep.index, table=table,
    )  # fmt: skip
