"""A function that ran at a point, and its graph, read once: what `linearize.Linearization` and its transpose share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..base.elsewhere import check_here
from ..base.memory import LARGE, Budget
from ..plan.planning import answer_bytes, proof, samples_of
from ..prologue.arguments import Options, taken
from ..prologue.running import Ran, computing
from ..read import handover, overriding
from ..read.behind import leaves_behind
from ..read.graph import Graph, UnsupportedGraph
from ..read.reading import read
from ..read.watching import Watching
from . import reentrant
from .api import compute
from .vectors import pull, push

T = TypeVar("T")


class Recording:
    def __init__(self, ran: Ran, xs: tuple[Tensor, ...], tupled: bool, asked: Options):
        self.ran, self.given, self.tupled, self.asked = ran, xs, tupled, asked
        self.ys, self.xs = ran.ys, ran.leaves
        self.overrides = overriding.now.get()
        self.output = ran.output(False)
        reader = Watching()
        self.seen = reader.seen
        self.seen.add_all("inputs", self.xs)
        self.seen.add_all("outputs", self.ys)
        for y in self.ys:
            for leaf in leaves_behind(y, self.xs) if y.requires_grad else ():
                self.seen.add(f"a leaf of shape {tuple(leaf.shape)}, as a weight is,", leaf)
        self.graph: Graph | UnsupportedGraph
        """The latter where autograd computes the function as a whole."""
        with computing(False, asked.backend):
            try:
                self.graph = read(self.ys, self.xs, reader)
            except UnsupportedGraph as reason:
                self.graph = reason.with_traceback(None)  # which holds what surrounds it

    def ends(self, reverse: bool) -> tuple[str, tuple[Tensor, ...]]:
        return ("outputs", self.ys) if reverse else ("inputs", self.xs)

    def run(self, call: Callable[[], T]) -> T:
        """The result of a call, in the place where this was made."""
        for name, ends in (("inputs", self.xs), ("outputs", self.ys)):
            for i, t in enumerate(ends):
                check_here(t, f"{name}[{i}]")
        if (name := self.seen.written()) is not None:
            raise RuntimeError(
                f"{name} was modified in place after linearize ran the function (an optimizer's step?), so products "
                "with its Jacobian there cannot be computed any more; call linearize again, or .dense() before"
            )
        if overriding.now.get() not in ((), self.overrides):
            overriding.refuse("an operator that was made outside of the block", "make it inside")
        with overriding.using(self.overrides), computing(False, self.asked.backend):
            return reentrant.aside(call) if reentrant.in_backward() else call()

    def times(self, blocks: Sequence[Tensor], reverse: bool) -> list[Tensor]:
        """The product with blocks ``(K, *end)``."""
        if handover.transforming(blocks):
            raise RuntimeError(
                "products with an operator are not available inside of a torch.func transform; pass all vectors as "
                "one block"
            )
        multiply = pull if reverse else push
        return self.run(lambda: multiply(self.ys, self.xs, blocks, self.asked, self.graph, True))

    def flat(self, block: Tensor, reverse: bool) -> Tensor:
        """The same of all ends side by side, ``(K, n)`` to ``(K, m)``."""
        (_, ends), (_, to) = self.ends(reverse), self.ends(not reverse)
        parts = block.split([t.numel() for t in ends], 1)
        k, device = len(block), self.xs[0].device
        blocks = [p.reshape(k, *t.shape).to(t.device) for p, t in zip(parts, ends, strict=True)]
        made = zip(self.times(blocks, reverse), to, strict=True)
        return torch.cat([m.reshape(k, t.numel()).to(device) for m, t in made], 1)

    def options(self, **more: Any) -> Options:
        asked = replace(self.asked, **more)
        taken("linearize", self.xs, asked)
        return asked

    def rows(self, **more: Any) -> list[list[Tensor]]:
        """The Jacobian, ``J[output][input]``."""
        asked = self.options(**more)
        return self.run(lambda: compute(self.ys, self.xs, asked))

    def frobenius(self) -> Tensor:
        """The root of the sum of all squares, in float64."""
        total = torch.zeros((), dtype=torch.float64, device=self.xs[0].device)
        for part in self._parts():
            size = torch.linalg.vector_norm(part, dtype=torch.float64)
            total = torch.hypot(total, size.to(total.device))
        return total

    def _parts(self) -> Iterator[Tensor]:
        """All of the Jacobian that is not known to be zero, in parts."""
        m, n = (sum(t.numel() for t in ends) for ends in (self.ys, self.xs))
        if not (m and n):
            return
        budget = Budget(self.asked.memory_limit, self.xs[0].device)
        if self._apart() and budget.fits(2 * answer_bytes(self.ys, self.xs, True)):
            for row in self.rows(per_sample=True):
                yield from row
            return
        _, seeds = self.ends(m < n)
        dtype, total = seeds[0].dtype, min(m, n)
        for t in seeds:
            dtype = torch.promote_types(dtype, t.dtype)
        each = (m + n) * dtype.itemsize
        count = self.asked.chunk_size or min(budget.count(4 * each, total), max(1, LARGE // each))
        for start in range(0, total, count):
            k = min(count, total - start)
            units = torch.zeros(k, total, dtype=dtype, device=self.xs[0].device)
            units.diagonal(start).fill_(1)
            yield self.flat(units, m < n)

    def _apart(self) -> bool:
        """Whether samples are proven not to mix, by the algebra of axes."""
        graph = self.graph
        if isinstance(graph, UnsupportedGraph) or samples_of(self.ys, self.xs) < 2:
            return False
        limited = self.asked.memory_limit is not None
        return self.run(lambda: proof(graph, "auto", self.ys, self.xs, limited=limited).tied)


def turned(block: Tensor, out: int, into: int, layout: torch.layout | str) -> Tensor:
    """A block whose last axes are ``out`` of an output and ``into`` of an input, with the input's before them."""
    if layout is torch.sparse_bsr:
        r, c = block.values().shape[-2:]
        return block.t().to_sparse_bsr((c, r))
    if layout in (torch.sparse_csr, torch.sparse_csc):
        return block.t().to_sparse(layout=layout)
    lead = block.dim() - out - into
    first = range(lead + out, lead + out + into)
    made = block.permute([*range(lead), *first, *range(lead, lead + out)])
    return made.coalesce() if made.layout is torch.sparse_coo else made
