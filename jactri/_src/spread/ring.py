"""Factors of Jacobians that go round among ranks, so that each has its rows of what is as large as samples squared.

Every rank keeps its own, and sees those of the others one after another: what the last one sent is multiplied while it
goes on to the next. Descriptions are gathered first, by which a rank that fails tells the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, inf, prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..base.memory import MemoryLimitTooSmall, si
from ..parameters.factored import Factors, Held
from ..parameters.factors import Piece
from ..parameters.recorded import Recorded
from .shards import Share
from .sums import gathered

ALIGNED = 16
"""Bytes at multiples of which tensors begin in a message."""


@dataclass
class Told:
    """What a rank says of its factors, those of a part of its samples; or the ``error`` that it has.

    ``own``: how many samples count, of all that it has; ``start``: of those, the first in this part, one of ``parts``.
    ``each``, ``room``: bytes that its rows of the kernel take for a column, and what it has for them.
    """

    rank: int
    own: int = 0
    out: tuple[int, ...] = ()
    each: float = 0.0
    room: float = inf
    parts: int = 1
    start: int = 0
    n: int = 0
    seeds: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    pieces: dict[str, list[Piece]] | None = None
    """With the places of tensors in the message in place of tensors; None where all of the Jacobian is zero."""
    size: int = 0
    error: str = ""


def rows(
    first: Factors[Recorded],
    second: Factors[Recorded],
    shares: tuple[Share, Share],
    multiply: Callable[[Any, Any], Tensor],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> Tensor:
    """This rank's rows of a kernel ``(*before, N2, *after)``, the samples of ``second`` on an axis of their own.

    ``multiply`` gives a tile of two factors; ``shapes``: what is before that axis, the rows themselves, and after it.
    Where a rank's factors do not fit its memory, those of a part of its samples go round at a time. Raises on all ranks
    where one fails before they do.
    """
    before, after = shapes
    y, axis = first.run.y, len(before)
    ring, mine, its = Ring(shares[1], y.device), Parts(first, shares[0]), Parts(second, shares[1])
    its = mine if second is first else its
    each, room = prod((*before, *after)) * y.element_size(), first.budget("the rows", 0).left
    made, part, parts = None, 0, 1
    with first.run.computing():
        while part < parts:
            told, message = ring.begin(its, part, each, room)
            if made is None:
                total, parts = sum(t.own for t in told), max(t.parts for t in told)
                for t in told:
                    if t.each * total > t.room:
                        need = ceil(t.each * total)
                        raise MemoryLimitTooSmall(
                            f"the rows of the kernel on rank {t.rank} take {si(need)}B, and it has {si(t.room)}B for "
                            "them; use more ranks, or a larger memory_limit",
                            need,
                        )
                made = y.new_zeros((*before, total, *after))
            for t, held in ring.round(told, message, its.held(part), first):
                n = min(t.n, t.own - t.start)
                if held is None or first.run.structure is None or n <= 0 or not made.numel():
                    continue
                column = sum(other.own for other in told[: told.index(t)]) + t.start
                for number in range(len(mine.spans)):
                    left = mine.held(number)
                    tile = multiply(left, held).narrow(axis, 0, n)
                    of_them = made.narrow(0, mine.spans[number][0], left.run.n)
                    of_them.narrow(axis, column, n).copy_(tile)
            part += 1
    assert made is not None
    return made


class Parts:
    """Factors of ranges of samples, ``spans``, of which a few fit the memory beside one another."""

    def __init__(self, of: Factors[Recorded], share: Share):
        self.of, self.share = of, share
        self._spans: list[tuple[int, int]] | None = None
        self._last: tuple[int, Held] | None = None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First samples, and how many. Raises ValueError where not even the factors of one sample fit."""
        if self._spans is None:
            self._spans = self._found()
        return self._spans

    def _found(self) -> list[tuple[int, int]]:
        run = self.of.run
        if run.by_autograd:
            raise RuntimeError(
                f"the Jacobian in the parameters has no factors to go to other ranks: the module holds {run.reason}; "
                "pass x.full_tensor() for the kernel on every rank"
            )
        if run.structure is None:
            return [(0, run.n)]
        budget = self.of.budget("the factors of the Jacobian", 0)
        chunks = self.of.chunks(budget.less(budget.left / 2))  # what goes round is there twice
        if not chunks:
            return [(0, run.n)]
        batch, _ = run.letters()
        if len(batch) > 1 or any(s not in batch for s in chunks):
            raise ValueError(
                "the factors of a sample's Jacobian do not fit the memory, where those of another rank are, too; "
                "pass a larger memory_limit, or compute the kernel of some outputs at a time"
            )
        (size,) = chunks.values()
        return [(i, min(size, run.n - i)) for i in range(0, run.n, size)]

    def held(self, number: int) -> Held | None:
        """The factors of a range; None where all of the Jacobian is zero, and behind the last range."""
        run = self.of.run
        if run.structure is None or number >= len(self.spans):
            return None
        if self._last is None or self._last[0] != number:
            self._last = None
            start, n = self.spans[number]
            batch, _ = run.letters()
            whole = n == run.n
            budget = self.of.budget("the factors of the Jacobian", 0)
            pieces = self.of.pieces(None if whole else {batch[0]: (start, n)}, budget)
            seeds = run.seeds
            if not whole:
                seeds = tuple(n if s in batch else size for s, size in enumerate(seeds))
            self._last = number, Held(run, n, seeds, batch, pieces, self.of.memory_limit)
        return self._last[1]


class Ring:
    """The ranks that a batch is shared out among, in the order of its samples."""

    def __init__(self, share: Share, device: torch.device):
        mesh, self.share, self.device = share.mesh, share, device
        at = mesh.get_coordinate()
        spans = [range(mesh.size(d)) if d in share.dims else [at[d]] for d in range(mesh.ndim)]
        self.ranks = [int(mesh.mesh[place]) for place in product(*spans)]
        self.groups = [mesh.get_group(d) for d in share.dims]
        self.here = self.ranks.index(dist.get_rank())

    def begin(self, of: Parts, part: int, each: float, room: float) -> tuple[list[Told], Tensor]:
        """What all ranks say, in order, and this rank's message. Raises on all of them where one raises."""
        rank = self.ranks[self.here]
        failed: Exception | None = None
        message = torch.empty(0, dtype=torch.uint8, device=self.device)
        try:
            mine, message = _packed(rank, of, part, message)
            mine.each, mine.room = each, room
        except Exception as error:  # raised again below, when the others know
            failed, mine = error, Told(rank, error=f"{type(error).__name__}: {error}")
        told = gathered(mine, self.share)
        if failed is not None:
            raise failed
        for t in told:
            if t.error:
                raise RuntimeError(f"rank {t.rank} raised {t.error}")
        outs = {t.out: t.rank for t in told}
        if len(outs) > 1:
            raise RuntimeError(f"the outputs of a sample have other shapes on other ranks: {outs}")
        return told, message

    def round(
        self, told: list[Told], message: Tensor, own: Held | None, first: Factors[Recorded]
    ) -> Iterator[tuple[Told, Any]]:
        """Every rank's description and factors, beginning with this one's; None for those that are zero.

        ``first``: what they will be multiplied with.
        """
        count = len(self.ranks)
        theirs = own
        group = self.groups[0] if len(self.groups) == 1 else None
        after, before = self.ranks[(self.here + 1) % count], self.ranks[(self.here - 1) % count]
        for step in range(count):
            t = told[(self.here - step) % count]
            works: list[dist.Work] = []
            arriving = message
            if step < count - 1:
                size = told[(self.here - step - 1) % count].size
                arriving = message.new_empty(size)
                ops = [dist.P2POp(dist.isend, message, after, group)] if message.numel() else []
                ops += [dist.P2POp(dist.irecv, arriving, before, group)] if size else []
                works = dist.batch_isend_irecv(ops) if ops else []
            yield t, theirs
            for work in works:
                work.wait()
            message = arriving
            if step < count - 1:
                t = told[(self.here - step - 1) % count]
                theirs = None
                if t.pieces is not None and first.run.structure is not None:
                    theirs = _unpacked(t, message, first)


def _packed(rank: int, of: Parts, part: int, nothing: Tensor) -> tuple[Told, Tensor]:
    """A description, and the bytes of all tensors. Raises what computing the factors raises."""
    run, spans = of.of.run, of.spans
    own = run.n if of.share.few is None else of.share.few
    told = Told(rank, own, run.out, parts=len(spans))
    held = of.held(part)
    if held is None:
        return told, nothing
    told.start, told.n = spans[part]
    tensors: list[Tensor] = []
    places: dict[int, tuple] = {}
    origins: dict[Any, int] = {}
    start = 0

    def place(t: Tensor | None) -> Any:
        nonlocal start
        if t is None:
            return None
        if id(t) not in places:
            expanded = tuple(t.shape)
            for d, step in enumerate(t.stride()):
                if step == 0 and t.shape[d] > 1:  # one row serves all
                    t = t.narrow(d, 0, 1)
            tensors.append(t)
            places[id(t)] = (start, tuple(t.shape), expanded, t.dtype)
            start += -(-t.numel() * t.element_size() // ALIGNED) * ALIGNED
            return places[id(t)]
        return places[id(t)]

    def placed(p: Piece) -> Piece:
        origin = p.origin
        if isinstance(origin, int):
            origin = origins.setdefault(origin, len(origins))
        return replace(p, c=place(p.c), a=place(p.a), index=place(p.index), origin=origin)

    told.pieces = {name: [placed(p) for p in pieces] for name, pieces in held.whole.items()}
    told.seeds, told.batch, told.size = held.run.seeds, held.run.letters()[0], start
    message = nothing.new_empty(start)
    for t, (at, shape, _, dtype) in zip(tensors, places.values(), strict=True):
        _part(message, at, shape, dtype).copy_(t)
    return told, message


def _part(message: Tensor, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a message, as a view."""
    return message.narrow(0, at, prod(shape) * dtype.itemsize).view(dtype).view(shape)


def _unpacked(told: Told, message: Tensor, first: Factors[Recorded]) -> Held:
    """The factors that arrived."""

    def tensor(place: Any) -> Any:
        if place is None:
            return None
        at, shape, expanded, dtype = place
        return _part(message, at, shape, dtype).expand(expanded)

    assert told.pieces is not None
    made = {
        name: [replace(p, c=tensor(p.c), a=tensor(p.a), index=tensor(p.index)) for p in pieces]
        for name, pieces in told.pieces.items()
    }
    return Held(first.run, told.n, told.seeds, told.batch, made, first.memory_limit)
