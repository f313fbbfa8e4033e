"""An output and the graph to its parameters, and which of its entries run at once: ranges of samples and of outputs."""

from __future__ import annotations

from functools import cached_property
from math import prod

from torch import Tensor

from ..base import backends
from ..base.cache import Cache
from ..base.memory import OFFER, Budget, Offer
from ..maps.layout import Selection
from ..plan.needs import CACHE_BYTES, cut_seeds, peak_bytes
from ..plan.samples import narrow, places
from ..plan.sweep import Sweep
from ..prologue.running import computing
from ..read.graph import Graph
from ..run.executor import blocks_of
from .uses import Structure, swept

KEPT = 0.25
"""Of the memory, what the factors of one Jacobian may take,"""

RUNNING = 0.4
"""and what runs while they are made."""

Chunks = dict[int, int]
"""Letter of the output -> how many of its indices are computed at once; of a letter that is not there, all."""

_ranges: Cache[tuple, Sweep] = Cache(64)
_running: Cache[tuple, float] = Cache()


class Used:
    """The output ``y`` ``(N, *out)``, the parameters by name, and the structure of their uses.

    ``values``: what they are in the graph, None for one that is not used. ``graph`` and ``structure`` are None where
    blocks cannot follow (complex values), and where the output is empty or depends on no parameter.
    """

    y: Tensor
    n: int
    params: dict[str, Tensor]
    values: dict[str, int | None]
    graph: Graph | None
    structure: Structure | None
    create_graph: bool
    _part: tuple | None = None
    """The samples that `blocks` was last asked for, their graph and its sweep."""

    def __init__(self, y, params, values, graph, structure, create_graph: bool):
        self.y, self.n, self.params, self.values = y, y.shape[0], params, values
        self.graph, self.structure, self.create_graph = graph, structure, create_graph

    @property
    def out(self) -> tuple[int, ...]:
        """The shape of the output of one sample."""
        return tuple(self.y.shape[1:])

    @property
    def seeds(self) -> tuple[int, ...]:
        """The sizes of the output's letters, those of its samples first."""
        return self.structure.sweep.layout.seed

    def letters(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The letters of the samples, and of the rest of the output."""
        batch = self.structure.batch
        every = range(len(self.seeds))
        return tuple(s for s in every if s in batch), tuple(s for s in every if s not in batch)

    def computing(self):
        """With a graph if one is asked for."""
        return computing(self.create_graph)

    def check_unchanged(self) -> None:
        """Raise if something was written to since the forward pass, or freed."""

    # -- what runs at once ------------------------------------------------------------------------

    @cached_property
    def where(self) -> dict[int, tuple[int, int]] | None:
        """Where the samples are in every value (see `samples.places`); None where they cannot be cut."""
        structure = self.structure
        if any(u.pull is not None for u in structure.uses):
            return None
        where = places(self.graph, [structure.sweep])
        return None if where is None or narrow(self.graph, where, 0, 1) is None else where

    def chunks(self, chunk_size: int | None, budget: Budget, offer: Offer = OFFER) -> Chunks:
        """The output's entries of which factors are held at once. Raises MemoryLimitTooSmall."""
        _, out = self.letters()
        now = {s: self.seeds[s] for s in out}
        if chunk_size is not None:
            now.update(cut_seeds(list(now), list(now.values()), chunk_size))

        def held(now: Chunks) -> float:
            return self._kept(now) / KEPT

        if not budget.fits(max(held(now), self._running(now) / RUNNING)):
            now = self._halved(now, lambda now: budget.fits(held(now)))
            least = self._halved(now, lambda now: False)
            need = max(held(now), self._running(least) / RUNNING)
            if not budget.fits(need):
                what = "output entry" if self.where is None else "output entry of one sample"
                raise budget.refusal(f"one {what} at a time", need, offer=offer)
        return {s: n for s, n in now.items() if n < self.seeds[s]}

    def steps(self, sel: Selection | None, budget: Budget) -> Chunks:
        """How much of a selection is swept at once.

        All of it if it fits the memory. But where factors are smaller than the blocks that they are made of, on a CPU
        about as many rows as there are samples, which is what one backward pass takes.
        """
        _, out = self.letters()
        length = {s: n for s, (_, n) in (sel or {}).items()}
        now = {**length, **{s: length.get(s, self.seeds[s]) for s in out}}
        took = self._running(now)
        if self.y.device.type == "cpu" and took > max(2 * self._kept(now), CACHE_BYTES):
            share = max(CACHE_BYTES / took, 1 / prod([now[s] for s in out]))
            now = self._cut(now, share)
        now = self._halved(now, lambda now: budget.fits(self._running(now) / RUNNING))
        return {s: n for s, n in now.items() if n < length.get(s, self.seeds[s])}

    def _halved(self, now: Chunks, fits) -> Chunks:
        """Fewer and fewer entries until they fit, or one is left."""
        while not fits(now):
            less = self._cut(now, 0.5)
            if less == now:
                break
            now = less
        return now

    def _cut(self, now: Chunks, share: float) -> Chunks:
        """A share of the entries: samples are cut first, if they can be."""
        batch = () if self.where is None else self.letters()[0]
        now = {**{s: now.get(s, self.seeds[s]) for s in batch}, **now}
        sizes = list(now.values())
        return {**now, **cut_seeds(list(now), sizes, int(prod(sizes) * share))}

    def _share(self, now: Chunks) -> float:
        """Which part of the samples runs."""
        batch, _ = self.letters()
        return prod([now.get(s, self.seeds[s]) / self.seeds[s] for s in batch])

    def _kept(self, now: Chunks) -> float:
        """Bytes of the factors of so many entries."""
        _, out = self.letters()
        structure, rows = self.structure, prod([now[s] / self.seeds[s] for s in out])
        return (structure.kept * rows + structure.seen) * self._share(now)

    def _running(self, now: Chunks) -> float:
        """Bytes that are live while the factors of so many entries are made, remembered."""
        return _running.of((self.structure, *sorted(now.items())), lambda: self._predicted(now))

    def _predicted(self, now: Chunks) -> float:
        structure, share = self.structure, self._share(now)
        _, out = self.letters()
        cut = {s: now[s] for s in out if now[s] < self.seeds[s]}
        blocks = peak_bytes(self.graph, structure.sweep, cut)
        rows = prod([now[s] for s in out])
        # derivatives are those of all samples
        rest = structure.slopes if share < 1 else 0.0
        return (blocks + structure.extra * rows + structure.patches) * share + rest

    # -- what runs --------------------------------------------------------------------------------

    def blocks(self, sel: Selection) -> dict[int, Tensor | None]:
        """The blocks at all uses, of the entries of a selection."""
        graph, sweep, batch = self.graph, self.structure.sweep, self.structure.batch
        cut = [s for s in sel if s in batch]
        if not cut:
            return blocks_of(graph, sweep, sel or None)
        (letter,) = cut
        span = sel[letter]
        if self._part is None or self._part[0] != span:
            part = narrow(graph, self.where, *span)
            key = self.structure, span[1], backends.kernels_on(self.y.device)
            own = _ranges.of(key, lambda: swept(part, sweep.seed, sweep.targets))
            self._part = span, part, own
        _, part, own = self._part
        # one sample has no letter
        less = len(sweep.layout.seed) - len(own.layout.seed)
        return blocks_of(part, own, {s - less: r for s, r in sel.items() if s != letter} or None)


def selections(seeds: tuple[int, ...], chunks: Chunks) -> list[Selection | None]:
    """The ranges of all chunks; None for everything."""
    sels: list[Selection] = [{}]
    for s, size in chunks.items():
        sels = [
            {**sel, s: (start, min(size, seeds[s] - start))}
            for sel in sels
            for start in range(0, seeds[s], size)
        ]
    return [sel or None for sel in sels]
