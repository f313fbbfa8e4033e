"""Inner products of Jacobians over their parameters, from pieces: J J^T, the NTK, variances, the diagonal of a GGN.

For two Linear layers' pieces the sum over the weight is ``(C C'^T) * (a a'^T)`` (Novak et al. 2022, arXiv:2206.08720,
section 3). Every such product is a contraction of at most five lettered tensors; where tokens or pixels make that
longer than a product of formed Jacobians, those are formed, for a range of the parameter at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ..maps.lettered import Lettered, diagonals, flops, multiply, spread
from ..maps.letters import Letters
from .factors import Piece, formed

SECOND = 1000
"""Added to the letters of the second factor."""


def of_second(letters) -> Letters:
    """Letters of an output as those of the second factor's."""
    return tuple(s + SECOND for s in letters)


def each_with_itself(letters) -> tuple[tuple[int, int], ...]:
    """Letters that are one in both outputs (see `Link`)."""
    return tuple((s, s) for s in letters)


@dataclass(frozen=True)
class Link:
    """Which sum is meant: letters of the two outputs that are one, in pairs, and the letters of the result, in order.

    In ``out``, letters of the second factor's output have `SECOND` added. ``own``: the result has the parameter's axes.
    """

    shared: tuple[tuple[int, int], ...]
    out: Letters
    own: bool = False


class Total:
    """The sum of what has letters of the result; those that have diagonals come last, into what is there."""

    def __init__(self, sizes: dict[int, int], out: Letters, dtype, device):
        self.sizes, self.out, self.dtype, self.device = sizes, out, dtype, device
        self.value: Tensor | None = None
        self.later: list[tuple[Tensor, Letters]] = []

    def add(self, t: Tensor, letters: Letters) -> None:
        """``letters``: one for each axis of the result; where two are one, ``t`` is its diagonal there."""
        if len(set(letters)) < len(letters):
            self.later.append((t, letters))
            return
        shape = [self.sizes[s] for s in self.out]
        if self.value is None:
            self.value = t if list(t.shape) == shape else t.expand(shape).contiguous()
        elif torch.is_grad_enabled():
            self.value = self.value + t
        else:
            self.value.add_(t)

    def result(self) -> Tensor:
        if self.value is None:
            shape = [self.sizes[s] for s in self.out]
            self.value = torch.zeros(shape, dtype=self.dtype, device=self.device)
        elif self.later and torch.is_grad_enabled():
            self.value = self.value.clone()
        for t, letters in self.later:
            view, names = diagonals(self.value, letters)
            view.add_(spread(t, tuple(dict.fromkeys(letters)), names))
        self.later.clear()
        return self.value


class _Pair:
    """Two pieces with common letters for their parameter, as the operands of one contraction."""

    def __init__(self, p: Piece, q: Piece, link: Link, extra: Lettered | None):
        self.names: dict[int, int] = {}
        for a, b in link.shared:
            self._join(a, b + SECOND)
        for mine, theirs in zip(p.axes, q.axes, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                self._join(a, b + SECOND)
        self.operands = [
            *((t, tuple([self._of(s) for s in letters])) for t, letters in p.operands),
            *((t, tuple([self._of(s + SECOND) for s in letters])) for t, letters in q.operands),
        ]
        own = [letter for axis in p.axes for letter in axis]
        if extra is not None:
            letters = own if extra[1] is None else extra[1]
            t = extra[0].reshape([p.sizes[s] for s in own]) if extra[1] is None else extra[0]
            self.operands.append((t, tuple([self._of(s) for s in letters])))
        self.letters = tuple([self._of(s) for s in (own if link.own else link.out)])
        self.out = tuple(dict.fromkeys(self.letters))
        # what is the same for all entries of a letter that nobody has is counted as often
        self.full = [p.sizes[s] for s in own] if link.own else None
        known = set(self.out).union(*(letters for _, letters in self.operands))
        summed = {self._of(s): p.sizes[s] for s in (*(a for a, _ in link.shared), *own)}
        self.times = prod([n for s, n in summed.items() if s not in known])

    def _of(self, letter: int) -> int:
        while letter in self.names:
            letter = self.names[letter]
        return letter

    def _join(self, a: int, b: int) -> None:
        a, b = self._of(a), self._of(b)
        if a != b:
            self.names[max(a, b)] = min(a, b)

    @property
    def flops(self) -> float:
        return flops(self.operands, self.out)

    def product(self) -> Tensor:
        made = multiply(self.operands, self.out)
        if self.times != 1:
            made = made * self.times
        return made if self.full is None else made.expand(self.full)


def _alike(p: Piece, q: Piece) -> bool:
    """Whether two pieces can be multiplied letter by letter."""
    if p.index is not None or q.index is not None:
        return False
    return all(
        [p.sizes[s] for s in a] == [q.sizes[s] for s in b]
        for a, b in zip(p.axes, q.axes, strict=True)
    )


def accumulate(
    total: Total | Entries,
    firsts: list[Piece],
    seconds: list[Piece],
    shape,
    link: Link,
    *,
    seeds: tuple[int, int],
    budget: float,
    extra: Lettered | None = None,
) -> None:
    """Add the sum over one parameter of ``shape`` of the products of two Jacobians.

    ``seeds``: how many letters their outputs have. ``extra``: a third operand and its letters, None for those of the
    parameter. ``budget``: bytes for Jacobians that are formed.
    """
    if not firsts or not seconds:
        return
    rows = _used_rows(firsts, seconds)
    if rows is not None:
        firsts, seconds, axis, used = rows
        shape = (*shape[:axis], len(used), *shape[axis + 1 :])
        if extra is not None and extra[1] is None:
            extra = extra[0].index_select(axis, used), None
        if isinstance(total, Entries):
            total = total.at(axis, used)
    if all(_alike(p, q) for p in firsts for q in seconds):
        pairs = [_Pair(p, q, link, extra) for p in firsts for q in seconds]
        if sum(p.flops for p in pairs) <= _formed_flops(firsts, seconds, shape, link, seeds):
            for pair in pairs:
                total.add(pair.product(), pair.letters)
            return
    for axis, span in _ranges(firsts, seconds, shape, seeds, budget):
        mine = _form(firsts, shape, seeds[0], axis, span)
        theirs = mine if seconds is firsts else _form(seconds, shape, seeds[1], axis, span)
        third, into = extra, total
        if span is not None:
            if extra is not None and extra[1] is None:
                third = extra[0].narrow(axis, *span), None
            if isinstance(total, Entries):
                into = total.narrow(axis, *span)
        pair = _Pair(mine, theirs, link, third)
        into.add(pair.product(), pair.letters)


class Entries:
    """A result that has an entry for each of the parameter, or for some rows of it."""

    def __init__(self, value: Tensor, rows: tuple[int, Tensor] | None = None):
        self.value, self.rows = value, rows

    def at(self, axis: int, rows: Tensor) -> Entries:
        return Entries(self.value, (axis, rows))

    def narrow(self, axis: int, start: int, length: int) -> Entries:
        if self.rows is not None and self.rows[0] == axis:
            return Entries(self.value, (axis, self.rows[1].narrow(0, start, length)))
        return Entries(self.value.narrow(axis, start, length), self.rows)

    def add(self, t: Tensor, letters: Letters) -> None:
        shape = list(self.value.shape)
        if self.rows is None:
            self.value.add_(t.reshape(shape))
        else:
            axis, rows = self.rows
            shape[axis] = len(rows)
            self.value.index_add_(axis, rows, t.reshape(shape))


def _used_rows(firsts: list[Piece], seconds: list[Piece]):
    """The same pieces over the rows that an index names, if all of them have one: others are zero."""
    both = firsts if seconds is firsts else [*firsts, *seconds]
    if any(p.index is None for p in both):
        return None
    axes = {next(a for a, letters in enumerate(p.axes) if p.row in letters) for p in both}
    used = torch.cat([p.index.reshape(-1) for p in both]).unique()

    def of(p: Piece) -> Piece:
        index = torch.searchsorted(used, p.index)
        return replace(p, index=index, sizes={**p.sizes, p.row: len(used)})

    few = [of(p) for p in firsts]
    return few, few if seconds is firsts else [of(p) for p in seconds], axes.pop(), used


def _rows_of(pieces: list[Piece], seeds: int) -> int:
    return prod([pieces[0].sizes[s] for s in range(seeds)])


def _formed_flops(firsts, seconds, shape, link: Link, seeds: tuple[int, int]) -> float:
    """The flops of forming Jacobians and multiplying them."""
    n, total = prod(shape), 0.0
    for pieces, count in ((firsts, seeds[0]), (seconds, seeds[1])):
        if pieces is firsts and total:
            continue
        letters = tuple(range(count))
        for p in pieces:
            own = tuple(letter for axis in p.axes for letter in axis)
            total += flops(p.operands, tuple(dict.fromkeys((*letters, *own))))
        total += n * _rows_of(pieces, count)
    shared = prod([firsts[0].sizes[s] for s, _ in link.shared])
    pairs = _rows_of(firsts, seeds[0]) * _rows_of(seconds, seeds[1]) / max(shared, 1)
    return total + 2.0 * n * pairs


def _ranges(firsts, seconds, shape, seeds: tuple[int, int], budget: float) -> Iterable:
    """(axis, (start, length)) of the ranges of a parameter whose Jacobians fit a budget; (0, None) for all at once."""
    rows = _rows_of(firsts, seeds[0])
    if seconds is not firsts:
        rows += _rows_of(seconds, seeds[1])
    need = float(rows * prod(shape) * firsts[0].c.element_size())
    best = None
    if need > budget:
        for axis, size in enumerate(shape):
            able = all(p.narrow(axis, 0, 1) is not None for p in (*firsts, *seconds))
            if able and (best is None or size > shape[best]):
                best = axis
    if best is None:
        return [(0, None)]
    step = max(1, int(shape[best] * budget / need))
    return [(best, (i, min(step, shape[best] - i))) for i in range(0, shape[best], step)]


def _form(pieces: list[Piece], shape, seeds: int, axis: int, span) -> Piece:
    """The Jacobian in (a range of) a parameter as one piece."""
    if span is not None:
        pieces = [p.narrow(axis, *span) for p in pieces]
        shape = (*shape[:axis], span[1], *shape[axis + 1 :])
    sizes = [pieces[0].sizes[s] for s in range(seeds)]
    c = pieces[0].c
    made = formed(pieces, sizes, shape, c.dtype, c.device)
    letters = tuple(range(seeds + len(shape)))
    axes = tuple((seeds + a,) for a in range(len(shape)))
    return Piece(made, letters, axes, dict(enumerate(made.shape)))


def with_bias(pieces: dict[str, list[Piece]]) -> dict[str, tuple[str, Piece]]:
    """Weights that share their cotangents with a bias: weight -> (bias, one piece of both).

    For the bias the layer saw a one: it is one more column of the weight.
    """
    found: dict[str, tuple[str, Piece]] = {}
    blocks = {
        ps[0].origin: (name, ps[0])
        for name, ps in pieces.items()
        if len(ps) == 1 and ps[0].a is None and ps[0].index is None and ps[0].origin is not None
    }
    for name, ps in pieces.items():
        if len(ps) != 1 or ps[0].a is None or ps[0].origin not in blocks:
            continue
        p = ps[0]
        bias, b = blocks[p.origin]
        own, its = {s for axis in p.axes for s in axis}, {s for axis in b.axes for s in axis}
        column = own - its
        if len(column) != 1 or not its < own or any(b.sizes[s] != p.sizes[s] for s in its):
            continue
        (k,) = column
        same = isinstance(p.origin, str) or its.issubset(p.cl)
        if k not in p.al or k in p.cl or its.intersection(p.al) or not same:
            continue
        i = p.al.index(k)
        ones = p.a.new_ones([1 if j == i else n for j, n in enumerate(p.a.shape)])
        a = torch.cat([p.a, ones], i)
        found[name] = bias, replace(p, a=a, sizes={**p.sizes, k: p.sizes[k] + 1})
        del blocks[p.origin]
    return found
