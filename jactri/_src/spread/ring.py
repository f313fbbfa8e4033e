"""Factors of Jacobians that go round among ranks, so that each has its rows of what is as large as samples squared.

Every rank keeps its own, and sees those of the others one after another: what the last one sent is multiplied while it
goes on to the next. Descriptions are gathered first, by which a rank that fails tells the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..parameters.factored import Factors, Held
from ..parameters.factors import Piece
from ..parameters.recorded import Recorded
from .shards import Share
from .sums import gathered

ALIGNED = 16
"""Bytes at multiples of which tensors begin in a message."""


@dataclass
class Told:
    """What a rank says of its factors: of ``n`` samples, the first ``own`` of which count; or its ``error``."""

    rank: int
    n: int = 0
    own: int = 0
    out: tuple[int, ...] = ()
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
    Raises RuntimeError on all ranks where one fails before anything was sent.
    """
    before, after = shapes
    y, axis = first.run.y, len(before)
    ring = Ring(shares[1], y.device)
    told, message = ring.begin(second, shares[1])
    total = sum(t.own for t in told)
    first.budget(
        "this rank's rows of the kernel", prod((*before, total, *after)) * y.element_size()
    )
    made = y.new_zeros((*before, total, *after))
    for t, factors in ring.round(told, message, second, first):
        start = sum(other.own for other in told[: told.index(t)])
        if factors is None or first.run.structure is None or not made.numel():
            continue
        tile = multiply(first, factors)
        made.narrow(axis, start, t.own).copy_(tile.narrow(axis, 0, t.own))
    return made


class Ring:
    """The ranks that a batch is shared out among, in the order of its samples."""

    def __init__(self, share: Share, device: torch.device):
        mesh, self.share, self.device = share.mesh, share, device
        at = mesh.get_coordinate()
        spans = [range(mesh.size(d)) if d in share.dims else [at[d]] for d in range(mesh.ndim)]
        self.ranks = [int(mesh.mesh[place]) for place in product(*spans)]
        self.groups = [mesh.get_group(d) for d in share.dims]
        self.here = self.ranks.index(dist.get_rank())

    def begin(self, of: Factors[Recorded], share: Share) -> tuple[list[Told], Tensor]:
        """What all ranks say, in order, and this rank's message. Raises on all of them where one raises."""
        rank = self.ranks[self.here]
        failed: Exception | None = None
        message = torch.empty(0, dtype=torch.uint8, device=self.device)
        try:
            mine, message = _packed(rank, of, share, message)
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
        self, told: list[Told], message: Tensor, own: Factors[Recorded], first: Factors[Recorded]
    ) -> Iterator[tuple[Told, Any]]:
        """Every rank's description and factors, beginning with this one's; None for those that are zero.

        ``first``: what they will be multiplied with.
        """
        count = len(self.ranks)
        mine = told[self.here]
        theirs: Any = own if mine.pieces is not None else None
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


def _packed(rank: int, of: Factors[Recorded], share: Share, nothing: Tensor) -> tuple[Told, Tensor]:
    """A description, and the bytes of all tensors. Raises what computing the factors raises."""
    run = of.run
    if run.by_autograd:
        raise RuntimeError(
            f"the Jacobian in the parameters has no factors to go to other ranks: the module holds {run.reason}; "
            "pass x.full_tensor() for the kernel on every rank"
        )
    own = run.n if share.few is None else share.few
    told = Told(rank, run.n, own, run.out)
    if run.structure is None:
        return told, nothing
    budget = of.budget("the factors of the Jacobian", 0)
    if of.chunks(budget):
        raise ValueError(
            f"the factors of this rank's {run.n} samples do not fit the memory, in which those of another rank are, "
            "too; use more ranks, or a kernel of a part of the samples at a time"
        )
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

    found = of.pieces(None, budget)
    told.pieces = {name: [placed(p) for p in pieces] for name, pieces in found.items()}
    told.seeds, told.batch, told.size = run.seeds, run.letters()[0], start
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
    return Held(first.run, told.n, told.seeds, told.batch, made)
