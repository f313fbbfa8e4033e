"""Dims named by letters, as in an einsum: what is multiplied with what, and what that takes. No tensor is touched.

Every dim of an operand has a letter, and both ends of what it relates are axes that are products of letters. A tie (see
`layout`) is a letter that both ends have. Where two operands meet, the axes of their ends are split until they agree,
and get the same letters; letters that a result lacks are summed. The products themselves are those of `products`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from torch import Tensor

from .layout import FREE, Layout, Selection

Letter = int
Letters = tuple[Letter, ...]
Axes = list[list[Letter]]
"""The letters of every axis of one end."""


class Unaligned(Exception):
    """Two ends factor their axes in ways that have nothing in common."""


@dataclass
class Operand:
    """An array: ``dims`` are the letters of its dims, ``ends`` those of the axes of what it relates.

    ``data`` is None while a cost is looked for. Letters of the ends that ``dims`` lacks are alike along them.
    """

    dims: list[Letter]
    ends: tuple[Axes, ...]
    data: Tensor | None = None


class Network:
    """Operands with common letters."""

    def __init__(self):
        self.sizes: list[int] = []
        self.operands: list[Operand] = []
        self.chunk: dict[Letter, tuple[int, int]] = {}
        """Letters of which a range (start, length) is computed."""
        self.flops = 0.0
        """What its products take."""

    def letter(self, size: int) -> Letter:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def axes(self, shape) -> Axes:
        """Letters for an end that nothing is known of."""
        return [[self.letter(n)] if n != 1 else [] for n in shape]

    def size(self, letter: Letter) -> int:
        """Of a chunk."""
        return self.chunk[letter][1] if letter in self.chunk else self.sizes[letter]

    def add(self, dims: list[Letter], ends: tuple[Axes, ...], data: Tensor | None) -> Operand:
        """An operand; ``data`` of any shape that has the sizes of ``dims``."""
        if data is not None:
            data = data.reshape([self.sizes[c] for c in dims])
        self.operands.append(Operand(list(dims), ends, data))
        return self.operands[-1]

    def block(
        self,
        seed: Layout,
        layout: Layout,
        data: Tensor | None = None,
        sel: Selection | None = None,
        summed: bool = False,
        alike: bool = False,
    ) -> Operand:
        """A block in a sweep whose seed has the layout ``seed``; its ends are (the seed, the value).

        ``sel``: the chunk that ``data`` is of. ``summed``: the seeds are summed over the samples, which are known not
        to mix. ``alike``: the block is the same along all that is tied.
        """
        of_seed = [self.letter(n) for n in seed.seed]
        of_value = [
            [of_seed[t] if t != FREE else self.letter(n) for n, t in axis if n != 1]
            for axis in layout.axes
        ]
        of_axes = [[of_seed[t] for _, t in axis if t != FREE] for axis in seed.axes]
        if summed:
            of_axes[0] = list(of_value[0])
        values = [c for axis in of_value for c in axis]
        dims = [of_seed[s] for s in layout.free] + values
        if alike:
            dims = [c for c in dims if c not in of_seed or of_seed.index(c) not in layout.tied]
        made = self.add(dims, (of_axes, of_value), None)
        for s, span in (sel or {}).items():
            self.chunk[of_seed[s]] = span
        if data is not None:
            made.data = data.reshape([*layout.seeds_of(sel), *(self.sizes[c] for c in values)])
        return made

    def identify(self, mine: Axes, theirs: Axes) -> None:
        """Give two ends the same letters. Raises Unaligned where that cannot be."""
        sizes = self.sizes
        for a, b in zip(mine, theirs, strict=True):
            i = 0
            while i < len(a):
                if i == len(b):
                    raise Unaligned
                m, n = sizes[a[i]], sizes[b[i]]
                if m > n and m % n == 0:
                    self.split(a[i], n)
                elif n > m and n % m == 0:
                    self.split(b[i], m)
                elif m != n:
                    raise Unaligned
                i += 1
            for p, q in zip(list(a), list(b), strict=True):
                self._rename(q, p)

    def copy(self, other: Network, operand: Operand) -> Operand:
        """An operand of another network, with letters of this one."""
        new: dict[Letter, Letter] = {}

        def renamed(letters: list[Letter]) -> list[Letter]:
            for c in letters:
                if c not in new:
                    new[c] = self.letter(other.sizes[c])
            return [new[c] for c in letters]

        ends = tuple([renamed(axis) for axis in end] for end in operand.ends)
        return self.add(renamed(operand.dims), ends, operand.data)

    def _spelled(self) -> list[list[Letter]]:
        """All lists of letters but those of dims; operands may have some in common, which come once."""
        ends = (axis for operand in self.operands for end in operand.ends for axis in end)
        return list({id(axis): axis for axis in ends}.values())

    def split(self, letter: Letter, first: int) -> None:
        """Split a letter so that its leading part has the size ``first``."""
        if letter in self.chunk:
            raise Unaligned
        new = [self.letter(first), self.letter(self.sizes[letter] // first)]
        spell(self._spelled(), letter, new)
        for operand in self.operands:
            while letter in operand.dims:
                at = operand.dims.index(letter)
                operand.dims[at : at + 1] = new
                if operand.data is not None:
                    operand.data = operand.data.unflatten(at, [self.sizes[c] for c in new])

    def _rename(self, old: Letter, new: Letter) -> None:
        if old == new:
            return
        if old in self.chunk:
            if self.chunk.setdefault(new, self.chunk[old]) != self.chunk[old]:
                raise Unaligned
            del self.chunk[old]
        spell([*self._spelled(), *(o.dims for o in self.operands)], old, [new])


def spell(lists: Iterable[list[Letter]], old: Letter, new: list[Letter]) -> None:
    """Write ``new`` for a letter wherever it stands."""
    for letters in lists:
        if old in letters:
            letters[:] = [c for mine in letters for c in (new if mine == old else (mine,))]


class Groups(NamedTuple):
    """The letters of a product of two as a batch of matrices ``(rows, inner) (inner, columns)``."""

    batch: Letters
    rows: Letters
    inner: Letters
    columns: Letters


@lru_cache(maxsize=1024)
@lru_cache(maxsize=1024)
def groups(first: Letters, second: Letters, out: Letters) -> Groups:
    """The letters of ``first`` times ``second`` by their part in it: those that ``out`` lacks are summed."""
    return Groups(
        tuple([c for c in out if c in first and c in second]),
        tuple([c for c in out if c in first and c not in second]),
        tuple([c for c in first if c in second and c not in out]),
        tuple([c for c in out if c in second and c not in first]),
    )


def side_by_side(letters: Letters, parts: Sequence[Letters]) -> bool:
    """Whether the letters of each part follow one another, so that their dims can be joined without a copy."""
    return all(
        letters.index(b) == letters.index(a) + 1
        for part in parts
        for a, b in itertools.pairwise(part)
    )


FEW = 6
"""So many operands at most are looked at in all orders."""

DEARER = 2.0
"""How many times the least flops the order that makes small results may take."""


@lru_cache(maxsize=1024)
def order(operands: tuple[Letters, ...], sizes: tuple[tuple[Letter, int], ...], out: Letters):
    """Which operands to multiply, pair by pair: ((i, j, letters), ...), and the flops.

    The smallest result first; of few operands what takes the least flops, where that makes a difference.
    """
    size = dict(sizes)
    present = [frozenset(letters) for letters in operands]
    if len(present) == 1:
        return (), float(prod([size[s] for s in present[0]]))
    found = _ordered(present, size, out, lambda left: _smallest(left, size, out))
    if 2 < len(present) <= FEW:
        pairs = _least(present, size, out)
        least = _ordered(present, size, out, lambda _: next(pairs))
        if found[1] > DEARER * least[1]:
            return least
    return found


def _ordered(present: list[frozenset[Letter]], size: dict[Letter, int], out: Letters, choose):
    place = {letter: i for i, letter in enumerate(out)}
    steps, flops = [], 0.0
    while len(present) > 1:
        i, j = choose(present)
        left = _left(present, (i, j), out)
        flops += 2.0 * prod([size[s] for s in present[i] | present[j]])
        # in the order of the result: its memory is then gone through in order
        steps.append((i, j, tuple(sorted(left, key=lambda s: (place.get(s, len(out)), s)))))
        present = [p for k, p in enumerate(present) if k not in (i, j)] + [left]
    return tuple(steps), flops


def _left(present: list[frozenset[Letter]], some: tuple[int, ...], out: Letters):
    """The letters of the product of some operands: those that the others have, or the result."""
    others = set(out).union(*(p for k, p in enumerate(present) if k not in some))
    return frozenset().union(*(present[k] for k in some)) & others


def _smallest(present: list[frozenset[Letter]], size: dict[Letter, int], out: Letters):
    """The pair of operands whose product is the smallest."""

    def taken(pair):
        left = _left(present, pair, out)
        both = present[pair[0]] | present[pair[1]]
        return prod([size[s] for s in left]), prod([size[s] for s in both])

    return min(itertools.combinations(range(len(present)), 2), key=taken)


def _least(present: list[frozenset[Letter]], size: dict[Letter, int], out: Letters):
    """The pairs of operands in the order that takes the least flops: of each subset the best is found once."""
    everything = tuple(range(len(present)))
    letters: dict[tuple[int, ...], frozenset[Letter]] = {(k,): present[k] for k in everything}
    best: dict[tuple[int, ...], tuple[float, tuple]] = {(k,): (0.0, ()) for k in everything}

    def ways(some):
        for count in range(1, len(some) // 2 + 1):
            for one in itertools.combinations(some, count):
                other = tuple([k for k in some if k not in one])
                work = 2.0 * prod([size[s] for s in letters[one] | letters[other]])
                (first, pairs), (second, more) = best[one], best[other]
                yield first + second + work, (*pairs, *more, (one, other))

    for count in range(2, len(present) + 1):
        for some in itertools.combinations(everything, count):
            letters[some] = _left(present, some, out)
            best[some] = min(ways(some))
    at = [(k,) for k in everything]
    for one, other in best[everything][1]:
        i, j = sorted((at.index(one), at.index(other)))
        yield i, j
        at = [o for k, o in enumerate(at) if k not in (i, j)] + [tuple(sorted(one + other))]
