"""A function that ran at a point, and its graph, read once: what `linearize.Linearization` and its transpose share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..base.elsewhere import check_here
from ..base.memory import LARGE, Budget
from ..base.tracing import tracing
from ..plan.planning import proof, samples_of
from ..prologue.arguments import Options, taken
from ..prologue.running import Ran, computing, recording
from ..read import handover, overriding
from ..read.behind import dtypes_behind, leaves_behind
from ..read.graph import Graph, UnsupportedGraph
from ..read.reading import read
from ..read.watching import Watching
from . import reentrant
from .api import compute
from .vectors import pull, push

T = TypeVar("T")

_CONSTANT = (
    "a product with an operator of jactri.linearize, inside of a function that jactri differentiates, is a constant, "
    "whose derivative is zero; use jactri.jvp or jactri.vjp with create_graph=True, or v.detach() where a constant is "
    "meant"
)

WIDENED = 1 << 18
"""Entries that are there in float64 at once."""


class Recording:
    def __init__(self, ran: Ran, xs: tuple[Tensor, ...], tupled: bool, asked: Options):
        self.ran, self.given, self.tupled, self.asked = ran, xs, tupled, asked
        self.ys, self.xs = ran.ys, ran.leaves
        self.overrides, self.traced = overriding.now.get(), tracing()
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
        if self.traced != tracing():
            # it would hold derivatives at this point beside weights that are written to later
            raise RuntimeError(
                "an operator that was made outside of a function that is compiled, or traced, cannot be used in it, "
                "nor the reverse; call linearize and use what it returns in one place, or compile jvp and vjp"
            )
        if overriding.now.get() not in ((), self.overrides):
            overriding.refuse("an operator that was made outside of the block", "make it inside")
        with overriding.using(self.overrides), computing(False, self.asked.backend):
            return reentrant.aside(call) if reentrant.in_backward() else call()

    @cached_property
    def coarsest(self) -> float:
        """The largest eps of what lies between the ends, which no product is more exact than."""
        if isinstance(self.graph, UnsupportedGraph):
            found = dtypes_behind(self.ys, self.xs)
        else:
            found = {value.dtype for value in self.graph.values}
        found |= {t.dtype for t in (*self.ys, *self.xs)}
        return max(
            torch.finfo(dtype).eps for dtype in found if dtype.is_floating_point or dtype.is_complex
        )

    def times(self, blocks: Sequence[Tensor], reverse: bool, spent: float = 0.0) -> list[Tensor]:
        """The product with blocks ``(K, *end)``, where so many bytes of the limit are spent."""
        if handover.transforming(blocks):
            raise RuntimeError(
                "products with an operator are not available inside of a torch.func transform; pass all vectors as "
                "one block"
            )
        grad = torch.is_grad_enabled()
        if grad and recording() and any(b.requires_grad for b in blocks):
            warnings.warn(_CONSTANT, stacklevel=2)
        multiply = pull if reverse else push
        return self.run(
            lambda: multiply(self.ys, self.xs, blocks, self.asked, self.graph, True, spent)
        )

    def flat(self, block: Tensor, reverse: bool, spent: float = 0.0) -> Tensor:
        """The same of all ends side by side, ``(K, n)`` to ``(K, m)``."""
        (_, ends), (_, to) = self.ends(reverse), self.ends(not reverse)
        parts = block.split([t.numel() for t in ends], 1)
        k, device = len(block), self.xs[0].device
        blocks = [p.reshape(k, *t.shape).to(t.device) for p, t in zip(parts, ends, strict=True)]
        if len(to) > 1:  # they are put side by side in the end
            spent += k * sum(t.numel() * t.dtype.itemsize for t in to)
        made = zip(self.times(blocks, reverse, spent), to, strict=True)
        sides = [m.reshape(k, t.numel()).to(device) for m, t in made]
        return sides[0] if len(sides) == 1 else torch.cat(sides, 1)

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
            for some in part.reshape(-1).split(WIDENED):
                size = torch.linalg.vector_norm(some, dtype=torch.float64)
                total = torch.hypot(total, size.to(total.device))
        return total

    def _parts(self) -> Iterator[Tensor]:
        """All of the Jacobian that is not known to be zero, in parts: seeds of all samples at once where these do not
        mix.
        """
        m, n = (sum(t.numel() for t in ends) for ends in (self.ys, self.xs))
        if not (m and n):
            return
        budget = Budget(self.asked.memory_limit, self.xs[0].device)
        samples = samples_of(self.ys, self.xs) if self._apart() else 1
        _, seeds = self.ends(m < n)
        sizes = [t.numel() // samples for t in seeds]
        total, dtype = sum(sizes), seeds[0].dtype
        for t in seeds:
            dtype = torch.promote_types(dtype, t.dtype)
        each = (m + n) * dtype.itemsize
        count = self.asked.chunk_size or min(budget.count(4 * each, total), max(1, LARGE // each))
        for start in range(0, total, count):
            k = min(count, total - start)
            units = torch.zeros(k, total, dtype=dtype, device=self.xs[0].device)
            units.diagonal(start).fill_(1)
            yield from self.times(
                [
                    part.unsqueeze(1).expand(k, samples, -1).reshape(k, *t.shape).to(t.device)
                    for part, t in zip(units.split(sizes, 1), seeds, strict=True)
                ],
                m < n,
                2 * k * each,
            )

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
