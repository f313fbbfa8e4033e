"""Products that a sweep leaves unformed until they are cheaper to form: see `maps.spelled`.

A batched product that releases a tied axis (in attention a cotangent of each token meets every other) gives more seeds
than went in, and all that follows acts on all of them. Where views, sums of pieces and a matrix follow, that is one
step instead, from the blocks before the products: each way between them and the step is one product of all its factors.
Sizes alone decide. Pure: no tensor is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..maps.contraction import Expand, MatMul, Sum
from ..maps.layout import Layout, SplitSeed
from ..maps.linear_map import Diagonal, Identity, LinearMap, Permute, Route, Scale, View
from ..maps.selection import Place, Select, Slice
from ..maps.spelled import spell
from ..read.graph import Graph
from .sweep import Step, Sweep, Term, cost, follow, with_steps

_PLAIN = frozenset((View, Permute, Identity, Scale, Sum, Expand, Slice, Place, Select))

Path = tuple[tuple[int, int], ...]


def factored(graph: Graph, sweep: Sweep) -> Sweep:
    """The sweep with such steps, where they take less."""
    if not any(_releases(graph, sweep, s) for s in sweep.steps):
        return sweep
    return _Factoring(graph, sweep).made()


def swept(graph: Graph, seed: int, reverse: bool, targets: list[int | None], **more: Any) -> Sweep:
    """`follow`, with such steps."""
    return factored(graph, follow(graph, seed, reverse, targets, **more))


def _releases(graph: Graph, sweep: Sweep, step: Step) -> bool:
    """Whether a step multiplies each seed of a tied axis with many partners."""
    term = step.terms[0]
    if len(step.terms) > 1 or term.route.axis is None:
        return False
    edge = graph.values[term.owner].sources[term.edge][1]
    grown = term.route.out.numel > sweep.layouts[term.other].numel
    return isinstance(edge, MatMul) and edge.structure == "batched matrix" and grown


@dataclass(frozen=True)
class _Way:
    """From a block to a step: the maps between."""

    other: int
    path: Path


class _Factoring:
    """One sweep, while it is looked through."""

    def __init__(self, graph: Graph, sweep: Sweep):
        self.graph, self.sweep = graph, sweep
        self.steps = {s.value: s for s in sweep.steps}
        self.readers: dict[int, list[Step]] = {}
        for s in sweep.steps:
            for v in dict.fromkeys(s.reads):
                self.readers.setdefault(v, []).append(s)
        self.uses = Counter(t.other for s in sweep.steps for t in s.terms)
        self.ends = {t for t in sweep.targets if t is not None}

    def made(self) -> Sweep:
        sweep = self.sweep
        taken: set[int] = set()
        new: dict[int, Step] = {}
        for step in sweep.steps:
            if step.value in taken or not _releases(self.graph, sweep, step):
                continue
            options = [
                found
                for line in self._behind(step)
                if (found := self._joined(line)) and self._apart(found, taken, new)
            ]
            if not options:
                continue
            best, gone = min(options, key=self._saved)
            if self._saved((best, gone)) < 0:
                new[best.value] = best
                taken |= gone
        return with_steps(sweep, new, taken) if new else sweep

    @staticmethod
    def _apart(option: tuple[Step, set[int]], taken: set[int], new: dict[int, Step]) -> bool:
        """Whether a step has nothing to do with those that are gone by now."""
        step, gone = option
        return not gone & taken and not any(v in taken and v not in new for v in step.reads)

    def _saved(self, option: tuple[Step, set[int]]) -> float:
        step, gone = option
        return cost([step]) - cost([self.steps[v] for v in gone])

    def _inner(self, value: int) -> bool:
        """Whether a block is read once and is not asked for."""
        return self.uses[value] == 1 and value not in self.ends and value in self.steps

    def _edges(self, step: Step) -> list[LinearMap]:
        values = self.graph.values
        return [values[t.owner].sources[t.edge][1] for t in step.terms]

    def _behind(self, step: Step) -> Iterator[list[Step]]:
        """The steps from one on up to each at which its product may be formed, a matrix between them."""
        line, crossed = [step], False
        while self._inner(line[-1].value):
            (step,) = self.readers[line[-1].value]
            edges = self._edges(step)
            if len(edges) == 1 and isinstance(edges[0], MatMul):
                if step.terms[0].route.axis is not None:
                    return
                crossed = True
            elif any(e.__class__ not in _PLAIN for e in edges) and not (
                crossed and len(edges) == 1 and edges[0].__class__ is Diagonal
            ):
                return
            line.append(step)
            if crossed:
                yield list(line)

    def _joined(self, line: list[Step]) -> tuple[Step, set[int]] | None:
        """One step in place of those that end where a line does, and their values."""
        end = line[-1]
        ways: list[_Way] = []
        gone: set[int] = set()
        self._collect(end, (), {s.value for s in line}, ways, gone)
        terms: list[Term] = []
        flops = written = 0.0
        size = self.graph.values[end.value].dtype.itemsize
        for way in ways:
            term = self._term(way, end.layout)
            if term is None:
                return None
            terms.append(term)
            spelled = term.spelled
            flops += spelled.flops
            written += spelled.made() * size
            if len(terms) > 1:
                flops += spelled.after.numel
        return Step(end.value, tuple(terms), end.layout, (), flops, written), gone

    def _collect(self, step: Step, path: Path, line: set[int], ways, gone: set[int]) -> None:
        """The ways that end with ``path``, which begins behind a step: along a line, and through what is plain."""
        gone.add(step.value)
        released = _releases(self.graph, self.sweep, step)
        for term in step.terms:
            longer = ((term.owner, term.edge), *path)
            before = self.steps.get(term.other)
            if not released and before is not None and self._goes_on(before, line):
                self._collect(before, longer, line, ways, gone)
            else:
                ways.append(_Way(term.other, longer))

    def _goes_on(self, step: Step, line: set[int]) -> bool:
        """Whether ways go through a step."""
        if step.value in line:
            return True
        if not self._inner(step.value):
            return False
        plain = all(e.__class__ in _PLAIN for e in self._edges(step))
        return plain or self._has_released(step)

    def _has_released(self, step: Step) -> bool:
        """Whether there is such a product behind a step, and nothing but matrices and scalings on the way."""
        while not _releases(self.graph, self.sweep, step):
            (edge, *more), (term, *_) = self._edges(step), step.terms
            matrix = isinstance(edge, MatMul) and term.route.axis is None
            if more or not (matrix or edge.__class__ in (Diagonal, *_PLAIN)):
                return False
            if not self._inner(term.other):
                return False
            step = self.steps[term.other]
        return True

    def _term(self, way: _Way, at: Layout) -> Term | None:
        """A way as one product, to be added to a block of the layout ``at``."""
        values, reverse = self.graph.values, self.sweep.reverse
        before = layout = self.sweep.layouts[way.other]
        maps, shapes = [], [values[way.other].shape]
        kinds = {values[way.other].dtype}
        for owner, e in way.path:
            source, edge = values[owner].sources[e]
            near, far = values[source], values[owner]
            try:
                layout = edge.route(layout, near.shape, far.shape, reverse).out
            except SplitSeed:
                return None
            maps.append(edge)
            shapes.append((near if reverse else far).shape)
            kinds |= {near.dtype, far.dtype}
        if (
            len(kinds) > 1
            or not layout.tied >= at.tied
            or not any(isinstance(m, MatMul | Diagonal) for m in maps)
        ):
            return None
        spelled = spell(maps, shapes, before, layout, reverse)
        if spelled is None:
            return None
        owner, edge = way.path[-1]
        work = spelled.flops / max(1, layout.numel)
        return Term(way.other, owner, edge, Route(before, layout, None, work), way.path, spelled)
