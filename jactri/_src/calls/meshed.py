"""`jacobian` with ``mesh=``: each rank computes its own rows, columns or samples, and nothing is sent.

All ranks have the same inputs and the same function. They read the same graph, so that all know the whole plan and how
the answer is cut (see `plan.parts`); one small all_gather shows that it is the same (see `spread.agreement`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.elsewhere import DISTRIBUTED, check_here, is_distributed
from ..base.fingerprint import of_weights
from ..base.journal import identity, on_disk
from ..base.memory import Budget, MemoryLimitTooSmall
from ..base.progress import Watch, bar
from ..plan.folding import fold
from ..plan.owners import apart
from ..plan.parts import Cutting, Parts, cutting
from ..plan.planner import Plan
from ..plan.planning import Ends, Wanted, plan_for, proof, prove_by_probe
from ..prologue.arguments import Options, block_shape
from ..read import overriding
from ..read.behind import leaves_behind
from ..read.graph import Graph, UnsupportedGraph
from ..read.opaque import refuse_or_log
from ..read.reading import read
from ..spread.agreement import share
from ..spread.dealt import Dealt, Span
from .pieces import run_piece

Blocks = list[list[Any]]
"""``[j][i]``: of an output and an input, None where a part has none."""

Ordinary = Callable[..., Blocks]
"""What `api` computes of outputs, inputs, options and destinations, for this process alone."""


def _check(asked: Options, xs) -> None:
    """Raise for what a call with ``mesh=`` cannot give."""
    kind = asked.ranks.mesh.device_type
    if asked.create_graph:
        raise RuntimeError(
            "mesh= and create_graph=True exclude each other: no rank has the graph of what the others compute; leave "
            "mesh= out, or differentiate products (jvp and vjp)"
        )
    if asked.form != "dense":
        raise RuntimeError(f"mesh= cuts dense Jacobians; leave it out for layout={asked.layout}")
    if asked.pattern is not None:
        raise RuntimeError(
            "mesh= and pattern= exclude each other: with a pattern, products are few; leave mesh= out"
        )
    for i, x in enumerate(xs):
        if asked.out is None and not asked.whole and x.device.type != kind:
            raise RuntimeError(
                f"inputs[{i}] is on {x.device}, and mesh is of {kind!r}: the answer could not be a DTensor "
                f"on it; pass a mesh of {x.device.type!r}"
            )


def _files(out) -> list[np.memmap]:
    """The memmaps of ``out``. Raises RuntimeError for what is none."""
    given = [a for row in out for a in row]
    maps = on_disk(given)
    if len(maps) != len(given):
        kind = next(type(a) for a in given if not any(a is m for m in maps))
        raise RuntimeError(
            f"with mesh=, out has to be a numpy.memmap of a file that all ranks opened, got {kind}; leave it out for a "
            "DTensor"
        )
    return maps


def rows(ys, xs, asked: Options, dests: Blocks | None, ordinary: Ordinary) -> Blocks:
    """``J[j][i]``: DTensors, plain where each rank is to have all, or ``dests`` when all have written to them."""
    _check(asked, xs)
    job = _Job(ys, xs, asked, ordinary)
    if dests is None:
        return job.in_memory()
    job.on_disk(dests)
    return dests


class _Job:
    """One call on one rank."""

    def __init__(self, ys, xs, asked: Options, ordinary: Ordinary):
        self.ys, self.xs, self.ranks, self._ordinary = ys, xs, asked.ranks, ordinary
        self.asked = replace(asked, ranks=None, out=None, progress=False, strict=False)
        self._progress, self._in_memory = asked.progress and self.ranks.rank == 0, asked.out is None
        self.per_sample, self.summed = asked.per_sample, False
        self._maps = [] if asked.out is None else _files(asked.out)
        self.budget = Budget(asked.memory_limit, xs[0].device)
        self.weights = [p for y in ys for p in leaves_behind(y, xs)]
        for p in self.weights:
            check_here(p)
        self.graph: Graph | None = None
        plan, key = None, None
        if all(t.numel() for t in (*ys, *xs)):
            try:
                self.graph = fold(read(ys, xs, handles=asked.handles))
            except UnsupportedGraph as reason:
                if DISTRIBUTED in str(reason):
                    self._check_apart()
                refuse_or_log("the function", ys[0].shape, [x.shape for x in xs], f"holds {reason}")
                key = str(reason)
        if self.graph is not None:
            key, plan = self.graph.key, self._plan()
        self.key = key
        self.cut: Cutting = cutting(self.graph, plan, ys, xs, self.per_sample, self.summed)
        self.parts = None if plan is None else Parts(self.graph, plan, self.cut, self.per_sample)
        self.facts = {
            "call": (
                asked.strategy,
                asked.per_sample,
                asked.resume,
                asked.out is None,
                asked.whole,
            ),
            "shapes": [(tuple(t.shape), t.dtype) for t in (*ys, *xs)],
            "plan": (repr(key), plan and plan.signature, self.cut),
            "inputs": list(xs),
            "weights": of_weights(self.weights),  # at the origin outputs may be alike
        }
        for name, more in (asked.told or {}).items():
            self.facts[name] = self.facts.get(name), more

    def _check_apart(self) -> None:
        """Raise where ranks with other seeds take part in the function: its collectives would add up their products."""
        mesh: Any = self.ranks.mesh
        spread: list[Any] = [p for p in self.weights if is_distributed(p)]
        ours = set(mesh.mesh.flatten().tolist())
        if not spread or any(
            len(ours.intersection(p.device_mesh.mesh.flatten().tolist())) > 1 for p in spread
        ):
            raise RuntimeError(
                f"the function holds {DISTRIBUTED}, which ranks of mesh= compute together, and with mesh= each has "
                "seeds of its own; leave mesh= out, or pass the dimension of a mesh along which the weights are whole, "
                "as mesh['dp']"
            )

    def _plan(self) -> Plan:
        """The plan of the whole, by sizes alone: it tells how to cut it."""
        graph, ys, xs = self.graph, self.ys, self.xs
        wanted = Wanted(
            Budget.unbounded(xs[0].device), self.asked.strategy, self.per_sample, given=True, steady=True
        )  # fmt: skip
        if self.per_sample:
            alone = proof(graph, self.asked.strategy, ys, xs, given=True, limited=True)
            if alone.tied:
                return alone
            if self.asked.assume:
                if self.asked.strategy == "auto":
                    self.asked.strategy = "reverse-mode"
            elif not apart(graph):
                prove_by_probe(graph, alone, ys, xs, self.budget)
            self.summed = True
            wanted = wanted._replace(strategy=self.asked.strategy, summed=True)
        return plan_for(graph, ys, xs, wanted)

    def _agree(self) -> None:
        kinds = {y.dtype for y in self.ys if y.is_floating_point() or y.is_complex()}
        coarsest = max([torch.finfo(kind).eps for kind in kinds], default=0.0)
        self.ranks.agree(self.facts, self.ys, coarsest ** (2 / 3))

    # -- the answer -------------------------------------------------------------------------------

    def in_memory(self) -> Blocks:
        ranks, cut = self.ranks, self.cut
        mine: list[Span] = []
        for k, n in enumerate(cut.sizes):
            start, length = share(n, ranks.rank, ranks.size)
            # of what has no axis to cut, every rank has all
            mine.append((k, 0, 1) if cut.axes[k] is None else (k, start, length))
        shapes = [self._shape(j, i, mine) for j, i in self._pairs()]
        size = sum(
            prod(s) * self._like(j, i).element_size()
            for s, (j, i) in zip(shapes, self._pairs(), strict=True)
        )
        self.budget.check(f"the part of the Jacobian that rank {ranks.rank} has", size)
        self.budget = self.budget.less(size)
        self._agree()
        blocks: Blocks = [[None] * len(self.xs) for _ in self.ys]
        for shape, (j, i) in zip(shapes, self._pairs(), strict=True):
            like = self._like(j, i)
            blocks[j][i] = torch.empty(shape, dtype=like.dtype, device=like.device)
        # whoever gets all of it waits for the others, and is told of one that fails
        with ranks.together() if self.asked.whole else nullcontext():
            for span in mine:
                if span[2]:
                    self._span(span, self._of(blocks, span, span[1]))
            if self.asked.whole:
                ranks.agree({})
        return [[self._dealt(j, i, b) for i, b in enumerate(row)] for j, row in enumerate(blocks)]

    def on_disk(self, dests: Blocks) -> None:
        ranks, cut, asked = self.ranks, self.cut, self.asked
        maps = self._maps
        what = identity(self.key, self.ys, self.xs, self.weights, self.per_sample)
        resume = asked.resume and not overriding.now.get()
        spans = cut.spans
        dealt = Dealt(maps, what, cut, ranks, resume)
        self.facts |= {
            "weights": what["weights"],
            "progress": sorted(dealt.known.items()),
            "file": [(os.stat(m.filename).st_ino, str(m.dtype), m.shape, m.offset) for m in maps],
        }
        self._agree()
        numbers = {s: n for n, s in enumerate(spans)}
        with ranks.together():
            if dealt.known:  # not before all have opened the file: one may have made it anew
                for span, number in numbers.items():
                    if number % ranks.size == ranks.rank:
                        dealt.check(span, number, _flat(self._of(dests, span)))
                ranks.agree({})
        with ranks.together(), ExitStack() as stack:
            dealt.begin()
            mine = dealt.mine(spans)
            advance = stack.enter_context(bar(len(mine))) if self._progress else None
            try:
                for span in mine:
                    to = self._of(dests, span)
                    self._span(span, to)
                    dealt.done(span, numbers[span], _flat(to))
                    if advance is not None:
                        advance()
            except BaseException:
                dealt.save()
                raise
            dealt.finish()

    # -- where things are -------------------------------------------------------------------------

    def _pairs(self) -> Iterator[tuple[int, int]]:
        return ((j, i) for j in range(len(self.ys)) for i in range(len(self.xs)))

    def _like(self, j: int, i: int) -> Tensor:
        x = self.xs[i]
        return self.ys[j] if self.asked.strategy == "forward-mode" and not x.is_complex() else x

    def _dim(self, j: int, i: int) -> int | None:
        """The axis of a block along which it is cut."""
        if self.cut.by == "samples":
            return 0
        if self.cut.by == "rows":
            return self.cut.axes[j]
        axis = self.cut.axes[i]
        return None if axis is None else self.ys[j].dim() + axis - bool(self.per_sample)

    def _number(self, j: int, i: int) -> int:
        return {"samples": 0, "rows": j, "columns": i}[self.cut.by]

    def _shape(self, j: int, i: int, mine: list[Span]) -> tuple[int, ...]:
        shape, dim = list(block_shape(self.ys[j], self.xs[i], self.per_sample)), self._dim(j, i)
        if dim is not None:
            shape[dim] = mine[self._number(j, i)][2]
        return tuple(shape)

    def _of(self, blocks: Blocks, span: Span, base: int = 0) -> Blocks:
        """The part of blocks, which begin at ``base``, that a span is of."""
        number, start, length = span
        found: Blocks = [[None] * len(self.xs) for _ in self.ys]
        for j, i in self._pairs():
            if self._number(j, i) == number:
                dim = self._dim(j, i)
                block = blocks[j][i]
                found[j][i] = block if dim is None else block.narrow(dim, start - base, length)
        return found

    def _dealt(self, j: int, i: int, block: Tensor) -> Tensor:
        """A block, placed; where every rank is to have all of it, that, by an all_gather."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        dim = self._dim(j, i)
        shape = torch.Size(block_shape(self.ys[j], self.xs[i], self.per_sample))
        placed = Replicate() if dim is None else Shard(dim)
        stride = torch.empty(shape, device="meta").stride()
        whole, device = self.asked.whole, block.device
        if whole:  # a mesh of CPUs will do for any device
            block = block.to(self.ranks.mesh.device_type)
        made = DTensor.from_local(
            block, self.ranks.mesh, [placed], run_check=False, shape=shape, stride=stride
        )
        return made.full_tensor().to(device) if whole else made

    # -- one part ---------------------------------------------------------------------------------

    def _span(self, span: Span, to: Blocks) -> None:
        """Compute a part of the answer; in halves where the memory does not hold it at once."""
        if (lined := self._lines(span)) is not None:
            self._run(lined[0], self.graph, lined[1], to)
            return
        part = None if self.parts is None else self.parts.of(*span)
        if part is None:
            self._by_itself(span, to)
            return
        ends, graph = part
        if graph is None:
            for block in _flat(to):
                block.zero_()
            return
        try:
            plan = plan_for(graph, self.ys, self.xs, self._wanted)
        except MemoryLimitTooSmall:
            number, start, length = span
            if length == 1:
                raise
            half = length // 2
            for s in ((number, start, half), (number, start + half, length - half)):
                self._span(s, self._of(to, s, start))
            return
        if self.per_sample and not self.summed and not plan.tied:
            self._by_itself(span, to)
            return
        self._run(ends, graph, plan, to)

    @property
    def _wanted(self) -> Wanted:
        return Wanted(
            self.budget, self.asked.strategy, self.per_sample, self.summed, self.asked.chunk_size, True, of=""
        )  # fmt: skip

    def _lines(self, span: Span) -> tuple[Ends, Plan] | None:
        """A part that is some lines of images, by the plan of the whole, where that goes by patches."""
        if self.parts is None or not self.parts.lined:
            return None
        try:
            plan = plan_for(self.graph, self.ys, self.xs, self._wanted)
        except MemoryLimitTooSmall:
            return None
        return self.parts.lines(plan, *span)

    def _run(self, ends: Ends, graph: Graph, plan: Plan, to: Blocks) -> None:
        for j, i in self._pairs():
            cut = ends.out[j] if self.cut.by == "columns" else ends.into[i]
            if to[j][i] is not None and cut and not (self.per_sample and self.cut.by == "samples"):
                to[j][i].zero_()  # what the part does not reach
        with ExitStack() as stack:
            watch = None
            if self._progress and self._in_memory:
                chunks = sum(len(s.selections()) for s in plan.sweeps)
                watch = Watch(stack.enter_context(bar(chunks)), None)
            answers = run_piece(graph, plan, ends, self.ys, self.xs, self.asked, to, watch)
        for j, i in self._pairs():
            if (j, i) in answers:
                answers[j, i].finish()
            elif to[j][i] is not None:
                to[j][i].zero_()

    def _by_itself(self, span: Span, to: Blocks) -> None:
        """A part as the Jacobian of a part of the outputs; of what cannot be cut so, the whole is computed."""
        number, start, length = span
        axis = self.cut.axes[number]
        if self.cut.by == "rows":
            y = self.ys[number]
            if axis is not None:
                with torch.enable_grad():
                    y = y.narrow(axis, start, length)
            found: Blocks = [[None] * len(self.xs) for _ in self.ys]
            (found[number],) = self._ordinary([y], self.xs, self.asked, [to[number]])
        else:
            found = self._of(self._ordinary(self.ys, self.xs, self.asked, None), span)
        for block, part in zip(_flat(to), _flat(found), strict=True):
            if block is not part:
                block.copy_(part)


def _flat(blocks: Blocks) -> list[Tensor]:
    return [b for row in blocks for b in row if b is not None]
