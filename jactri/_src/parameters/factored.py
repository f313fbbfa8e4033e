"""The factors of one module's Jacobian, and the sums over all of its parameters that are made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..base.memory import OFFER, Budget, Offer
from ..maps.layout import Selection
from ..maps.lettered import Lettered
from ..maps.letters import Letters
from .factors import Piece, joined, pieces_of
from .inner import SECOND, Entries, Link, Total, accumulate, of_second, with_bias
from .used import Chunks, Used, selections

FORMED = 1 << 28
"""Bytes of Jacobians that are formed at once on the way to a product of them, at most."""

Run = TypeVar("Run", bound=Used)


class Factors(Generic[Run]):
    """The factors of ``run``'s Jacobian, computed at first use and kept while they fit."""

    def __init__(self, run: Run, chunk_size: int | None, memory_limit: int | str | None):
        self.run = run
        self.chunk_size, self.memory_limit = chunk_size, memory_limit
        self._kept: dict[str, list[Piece]] | None = None

    def budget(self, what: str, size: float, offer: Offer = OFFER) -> Budget:
        """The memory of a method beside its answer, of ``size`` bytes. Raises MemoryLimitTooSmall."""
        budget = Budget(self.memory_limit, self.run.y.device)
        budget.check(what, size, offer)
        return budget.less(size)

    def chunks(self, budget: Budget, offer: Offer = OFFER) -> Chunks:
        """See `Used.chunks`."""
        return self.run.chunks(self.chunk_size, budget, offer)

    def pieces(self, sel: Selection | None, budget: Budget) -> dict[str, list[Piece]]:
        """The factors of every parameter; none for one that the output does not use."""
        run = self.run
        if sel is None and self._kept is not None:
            return self._kept
        run.check_unchanged()
        with run.computing():
            steps = list(run.steps(sel, budget).items())
            found = self._found(sel or {}, steps, bool(steps), budget)
        pieces = {name: [] if v is None else found.get(v, []) for name, v in run.values.items()}
        if sel is None:
            self._kept = pieces
        return pieces

    def _found(
        self, sel: Selection, steps: list[tuple[int, int]], small: bool, budget: Budget
    ) -> dict[int, list[Piece]]:
        """The pieces of a selection, made in ranges of ``steps``: letters, and how many indices at once."""
        if not steps:
            budget.tidy()
            return pieces_of(self.run, sel, small)
        (letter, size), *rest = steps
        start, length = sel.get(letter, (0, self.run.seeds[letter]))
        parts = [
            self._found({**sel, letter: (start + i, min(size, length - i))}, rest, small, budget)
            for i in range(0, length, size)
        ]
        return {
            root: [
                joined(list(same), letter) for same in zip(*(p[root] for p in parts), strict=True)
            ]
            for root in parts[0]
        }


class Held(Factors[Used]):
    """Factors that are there as a whole, of the Jacobian of another batch, of ``n`` samples, in the same parameters."""

    def __init__(
        self,
        like: Used,
        n: int,
        seeds: tuple[int, ...],
        batch: Letters,
        pieces: dict[str, list[Piece]],
        memory_limit: int | str | None,
    ):
        super().__init__(_Elsewhere(like, n, seeds, batch), None, memory_limit)
        self.whole = pieces

    def chunks(self, budget: Budget, offer: Offer = OFFER) -> Chunks:
        return {}

    def pieces(self, sel: Selection | None, budget: Budget) -> dict[str, list[Piece]]:
        return self.whole


class _Elsewhere(Used):
    """An output that another process has."""

    def __init__(self, like: Used, n: int, seeds: tuple[int, ...], batch: Letters):
        super().__init__(like.y, like.params, like.values, like.graph, like.structure, False)
        self.n, self._seeds, self._batch = n, seeds, batch

    @property
    def seeds(self) -> tuple[int, ...]:
        return self._seeds

    def letters(self) -> tuple[Letters, Letters]:
        every = range(len(self._seeds))
        return self._batch, tuple(s for s in every if s not in self._batch)


def inner(
    first: Factors,
    second: Factors,
    link: Link,
    weights: dict[str, Tensor] | None = None,
    what: str = "the kernel",
) -> Tensor:
    """The sum over all parameters that ``link`` describes, its axes those letters.

    ``weights``: a weight for every entry of a parameter, 1 where there is none. ``what`` it is, for a refusal.
    """
    a, b = first.run, second.run
    if len(link.out) > 1:
        wanted, link = link.out, replace(link, out=_batch_last(a, b, link.out))
        if wanted != link.out:
            made = inner(first, second, link, weights, what)
            return made.permute([link.out.index(s) for s in wanted])
    full = {**dict(enumerate(a.seeds)), **{s + SECOND: n for s, n in enumerate(b.seeds)}}
    size = prod([full[s] for s in link.out]) * a.y.element_size()
    budget = first.budget(what, size)
    chunks = first.chunks(budget), second.chunks(budget)
    for s, t in link.shared:  # cut alike
        least = min(chunks[0].get(s, full[s]), chunks[1].get(t, full[s]))
        if least < full[s]:
            chunks[0][s] = chunks[1][t] = least
    seeds = len(a.seeds), len(b.seeds)
    with a.computing():
        answer = None
        if any(chunks):
            answer = a.y.new_zeros([full[s] for s in link.out])
        for left in selections(a.seeds, chunks[0]):
            mine = first.pieces(left, budget)
            for right in selections(b.seeds, chunks[1]):
                if not _meet(left, right, link):
                    continue
                theirs = mine
                if first is not second or left != right:
                    theirs = second.pieces(right, budget)
                cut = {**(left or {}), **{s + SECOND: span for s, span in (right or {}).items()}}
                sizes = {s: cut[s][1] if s in cut else n for s, n in full.items()}
                total = Total(sizes, link.out, a.y.dtype, a.y.device)
                for ps, qs, shape, extra in _terms(a.params, mine, theirs, weights):
                    accumulate(
                        total, ps, qs, shape, link, seeds=seeds, budget=_formed(budget), extra=extra
                    )
                part = total.result()
                if answer is None:
                    return part
                view = answer
                for i, s in enumerate(link.out):
                    if s in cut:
                        view = view.narrow(i, *cut[s])
                view.add_(part)
        return answer


def _meet(left: Selection | None, right: Selection | None, link: Link) -> bool:
    """Whether two selections have the same of what is one in both outputs."""
    return all((left or {}).get(s) == (right or {}).get(t) for s, t in link.shared)


def _batch_last(a: Used, b: Used, out: Letters) -> Letters:
    """The letters of a result with the samples of each factor behind the rest of its output.

    A kernel of inputs varies by samples only: along them a product with it runs through memory.
    """
    if min(a.n, b.n) < 16:
        return out
    batch = {*a.letters()[0], *of_second(b.letters()[0])}
    return tuple(sorted(out, key=lambda s: (s >= SECOND, s in batch)))


def _terms(
    params: dict[str, Tensor], mine, theirs, weights: dict[str, Tensor] | None
) -> Iterator[tuple[list[Piece], list[Piece], tuple[int, ...], Lettered | None]]:
    """The pieces of both factors in every parameter, a bias with its weight, its shape and the third operand."""
    joined: dict[str, tuple[str, Piece, Piece]] = {}
    if weights is None:
        own = with_bias(mine)
        other = own if theirs is mine else with_bias(theirs)
        joined = {
            name: (bias, p, other[name][1])
            for name, (bias, p) in own.items()
            if name in other and other[name][0] == bias
        }
    done = {bias for bias, _, _ in joined.values()}
    for name, p in params.items():
        if name in done:
            continue
        shape, ps, qs = tuple(p.shape), mine[name], theirs[name]
        if name in joined:
            _, one, two = joined[name]
            ps, qs = [one], [two]
            shape = tuple(prod([one.sizes[s] for s in axis]) for axis in one.axes)
        weight = None if weights is None else weights.get(name)
        extra = None if weight is None else (weight.to(p.dtype), None)
        yield ps, ps if theirs is mine else qs, shape, extra


def _formed(budget: Budget) -> float:
    """The bytes for Jacobians that are formed on the way."""
    return float(FORMED if budget.bound is None else min(budget.bound / 4, FORMED))


def entries(of: Factors, link: Link, third) -> dict[str, Tensor]:
    """For every parameter the sum over pairs of output entries of two Jacobians and a third operand.

    ``third(left, right)`` gives that operand with its letters, for selections.
    """
    run = of.run
    budget = of.budget(
        "the diagonal", sum(p.numel() * p.element_size() for p in run.params.values())
    )
    sels, seeds = selections(run.seeds, of.chunks(budget)), (len(run.seeds),) * 2
    made = {name: torch.zeros_like(p, requires_grad=False) for name, p in run.params.items()}
    for left, right in [(a, b) for a in sels for b in sels if _meet(a, b, link)]:
        mine = of.pieces(left, budget)
        theirs = mine if left == right else of.pieces(right, budget)
        extra = third(left, right)
        for name, p in run.params.items():
            accumulate(
                Entries(made[name]), mine[name], theirs[name], tuple(p.shape), link,
                seeds=seeds, budget=_formed(budget), extra=extra,
            )  # fmt: skip
    return made
