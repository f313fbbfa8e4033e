"""The forward Laplacian: tangents and the Laplacian of every value, carried through the graph in one sweep.

Li et al. 2023, "Forward Laplacian" (arXiv:2307.08214): with the Jacobian ``J = (u_1 ... u_n)`` of a value, its
Laplacian follows from those of the values behind it by the second-order chain rule (see `maps.curvature`), so that one
sweep of ``n + 1`` rows a sample gives all. It is Taylor mode of second order with the second coefficients summed over
the directions at once ("collapsed", Dangel et al. 2025, arXiv:2505.13644).

Blocks of tangents follow the layouts of `sweep`: before the first Linear layer they are the identity, which is never
written out; after it the weights, stored once for all samples. Where tangents are dense, the Laplacian lies behind them
in one tensor ``(K + 1, *value)``, and linear maps push both as one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import backends
from ..base.cache import Cache
from ..base.tracing import may_write
from ..maps.contraction import Sum
from ..maps.curvature import Curvature, Curves, Seeds, Unary
from ..maps.cut import Cut
from ..maps.layout import FREE, Layout, SplitSeed, unfolded
from ..maps.linear_map import LinearMap, Route
from ..plan.needs import peak_bytes
from ..plan.samples import sample_ties
from ..plan.sweep import Step, Sweep, follow, from_blocks, refine
from ..read.graph import Graph, Value
from ..run.executor import Blocks, add_terms
from . import fused


@dataclass(frozen=True, eq=False)
class Course:
    """The sweep of a Laplacian, and what it holds no longer than needed. It holds no tensor.

    ``frees``: by step, the values whose blocks are read for the last time; ``dense``: the values whose blocks have
    ties to the samples only.
    """

    sweep: Sweep
    frees: dict[int, tuple[int, ...]]
    dense: frozenset[int]
    samples: frozenset[int]
    """The seed's factors that are the samples."""
    tied: bool
    """Whether the samples of the result stay tied to those of the input: they do not mix."""
    peak: float
    """Predicted bytes of the blocks of tangents at their worst, for all samples and seeds."""
    runs: dict[int, tuple[Step, ...]]
    """What kernels run together (see `fused`), nothing where none run."""


_courses: Cache[tuple, Course] = Cache()


def course(graph: Graph, curves: Curves, batch: bool, seeds: int | None, samples=None) -> Course:
    """The course for a graph from one input to one output, remembered.

    ``seeds``: how many dense directions, None for the identity. ``samples``: how many of them, for a graph that is
    `narrowed`, and has no key of its own.
    """
    kernels = backends.kernels_for(graph.values[graph.inputs[0]])
    key = (graph.key, tuple((v, c.key) for v, c in curves.items()), batch, seeds, samples, kernels)
    return _courses.of(key, lambda: _course(graph, curves, batch, seeds, kernels))


def _course(graph: Graph, curves: Curves, batch: bool, seeds: int | None, kernels: bool) -> Course:
    x, y = graph.inputs[0], graph.outputs[0]
    if seeds is None:
        sweep = follow(graph, x, False, [y])
    else:
        sweep = _dense(graph, x, y, batch, seeds)
    last: dict[int, int] = {}
    for step in sweep.steps:
        reads = step.reads
        if step.value in curves:
            reads += curves[step.value].sources
        last.update(dict.fromkeys(reads, step.value))
    frees: dict[int, tuple[int, ...]] = {}
    for value, at in last.items():
        if value != y:
            frees[at] = (*frees.get(at, ()), value)
    samples = _samples(sweep, batch)
    dense = frozenset(v for v, lay in sweep.layouts.items() if lay.tied <= samples)
    tied = not batch or sample_ties(sweep, sweep.layouts[y], graph)
    runs = fused.runs(graph, curves, sweep, dense) if kernels else {}
    return Course(sweep, frees, dense, samples, tied, peak_bytes(graph, sweep, {}), runs)


def _dense(graph: Graph, x: int, y: int, batch: bool, count: int) -> Sweep:
    """The sweep of ``count`` directions that are the same or others for every sample, and not unit vectors."""
    shape = graph.values[x].shape
    splits: dict[int, tuple[int, ...]] = {}
    while True:
        own = splits.get(0, shape[:1]) if batch and shape[0] != 1 else ()
        axes = [tuple((n, i) for i, n in enumerate(own))] if own else []
        axes += [((n, FREE),) for n in shape[len(axes) :]]
        layout = Layout(tuple(axes), (*own, count))
        try:
            return from_blocks(graph, {x: layout}, layout, False, [y])
        except SplitSeed as split:
            refine(splits, shape, split)


def _samples(sweep: Sweep, batch: bool) -> frozenset[int]:
    """The seed's factors that are the samples."""
    return frozenset(t for _, t in sweep.layout.axes[0] if t != FREE) if batch else frozenset()


def narrowed(graph: Graph, curves: Curves, where, start: int, length: int):
    """The graph and the curvatures of a range of samples, or None where they cannot be cut.

    ``where`` is that of `samples.places`. Maps of elementwise steps stay whole: their curvature computes both slopes.
    """
    cuts = {v: Cut(a, start * n, length * n) for v, (a, n) in where.items()}
    values, own = [], {}
    for v, value in enumerate(graph.values):
        cut = cuts.get(v)
        if cut is None:
            values.append(value)
            continue
        sources, curve = value.sources, curves.get(v)
        if curve is not None:
            curve = own[v] = curve.narrow(cut, len(value.shape))
            if curve is None:
                return None
        if curve.__class__ is not Unary:
            parts = []
            for s, edge in sources:
                if s in cuts:
                    edge = edge.narrow(cuts[s], cut, graph.values[s].shape, value.shape)
                    if edge is None:
                        return None
                    parts.append((s, edge))
            sources = tuple(parts)
        values.append(Value(value.op, cut.shape(value.shape), value.dtype, value.device, sources))
    return Graph(values, graph.inputs, graph.outputs, graph.key), own


class LaplacianRun:
    """One run of a course: blocks of tangents and Laplacians by value (see `maps.curvature.Tangents`)."""

    def __init__(self, graph: Graph, curves: Curves, plan: Course, seeds: Seeds):
        self.values, self.graph, self.curves, self.plan = graph.values, graph, curves, plan
        self.sweep, self.seeds = plan.sweep, seeds
        self.layouts = plan.sweep.layouts
        self.blocks: Blocks = {}
        self.laplacians: dict[int, Tensor] = {}
        self.joined: dict[int, Tensor] = {}  # value -> both; its block is then a part of it
        self.writable = may_write()

    def layout(self, value: int) -> Layout:
        return self.layouts[value]

    def like(self, value: int) -> Value:
        return self.values[value]

    def block(self, value: int, ties: frozenset[int] | None = None) -> Tensor | None:
        data, _ = self.blocks[value]
        layout = self.layouts[value]
        if ties is None or layout.tied <= ties:
            return data
        return unfolded(data, layout, layout.drop(layout.tied - ties), None, self.values[value])[0]

    def __call__(self, directions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tangents ``(K, *out)`` of the output, samples tied, and its Laplacian (None: zero).

        ``directions``: ``(K, *in)``, or None for the identity.
        """
        self.blocks[self.sweep.seed] = directions, False
        runs, done = self.plan.runs, set[int]()
        for step in self.sweep.steps:
            run = runs.get(step.value, ()) if step.value not in done else ()
            both = fused.launch(self, run) if run else None
            curve = self.curves.get(step.value)
            if both is not None:
                self._put(run[-1].value, both, True)
                done.update(s.value for s in run)
            elif step.value in done:
                pass
            elif curve.__class__ is Unary:
                self._unary(step, curve)
            else:
                self._step(step, curve)
            for v in self.plan.frees.get(step.value, ()):
                self.blocks.pop(v, None)  # inside a run there is none
                self.laplacians.pop(v, None)
                self.joined.pop(v, None)
        y = self.graph.outputs[0]
        layout = self.layouts[y]
        block = self.block(y, layout.tied & self.plan.samples)
        if block is None:
            like = self.values[y]
            block = torch.ones((), dtype=like.dtype, device=like.device).expand(1, *like.shape)
        return block, self.laplacian(y)

    def laplacian(self, value: int) -> Tensor | None:
        both = self.joined.get(value)
        return self.laplacians.get(value) if both is None else both[-1]

    def _put(self, value: int, both: Tensor, own: bool) -> None:
        self.joined[value] = both
        self.blocks[value] = both[:-1], own

    def _dying(self, value: int, step: Step) -> bool:
        """Whether a step may overwrite the block of a value."""
        _, own = self.blocks[value]
        return own and self.writable and value in self.plan.frees.get(step.value, ())

    def _unary(self, step: Step, curve: Unary) -> None:
        """``f' u_k`` and ``f' lap + f'' sum_k u_k^2``."""
        v, s = step.value, step.terms[0].other
        first, second = curve.slopes()
        both = self.joined.get(s)
        data, _ = self.blocks[s]
        squares = None if data is None else self.seeds.squares(data)
        if both is not None:
            if self._dying(s, step):
                both.mul_(first)
            else:
                both = both * first
            both[-1].addcmul_(second, squares)
            self._put(v, both, True)
            return
        lap = self.laplacians.get(s)
        shape = self.values[v].shape
        if self.writable and data is not None and v in self.plan.dense:
            both = data.new_empty(data.shape[0] + 1, *shape)
            torch.mul(data, first, out=both[:-1])
            if lap is None:
                torch.mul(second, squares, out=both[-1])
            else:
                torch.mul(lap, first, out=both[-1]).addcmul_(second, squares)
            self._put(v, both, True)
            return
        block = first.expand(shape).unsqueeze(0) if data is None else data * first
        bend = second if data is None else second * squares
        self.blocks[v] = block, data is not None
        self.laplacians[v] = (bend if lap is None else lap * first + bend).expand(shape)

    def _step(self, step: Step, curve: Curvature | None) -> None:
        v = step.value
        bend = None if curve is None else curve.term(self)
        if all(self._together(t.other, t.owner, t.edge, t.route) for t in step.terms):
            both, own = self._pushed(step)
            if bend is None:
                self._put(v, both, own)
            elif own and self.writable:
                both[-1].add_(bend)
                self._put(v, both, True)
            else:
                self.blocks[v] = both[:-1], False
                self.laplacians[v] = both[-1] + bend
            return
        lap = self._pushed_laplacian(step)
        if bend is not None:
            lap = bend.expand(self.values[v].shape) if lap is None else lap + bend
        if len(step.terms) > 1:
            self.blocks[v] = add_terms(
                self.graph, self.sweep, step, self.blocks, None, self.writable
            )
        else:
            term = step.terms[0]
            s = term.other
            edge = self.values[term.owner].sources[term.edge][1]
            self.blocks[v] = edge.apply(
                self.blocks[s][0], self._dying(s, step), self.layouts[s], term.route, False, None,
                self.values[s],
            )  # fmt: skip
            self.blocks[s] = self.blocks[s][0], False  # the new block may share its memory
        if lap is not None:
            self.laplacians[v] = lap

    def _together(self, source: int, owner: int, edge: int, route: Route) -> bool:
        """Whether an edge pushes tangents and Laplacian as one block."""
        if source not in self.joined:
            return False
        if route.axis is None:
            return route.mid is self.layouts[source]
        edge = self.values[owner].sources[edge][1]
        at = self.layouts[source]
        return isinstance(edge, Sum) and at.untie(edge.axes) is at

    def _pushed(self, step: Step) -> tuple[Tensor, bool]:
        """The sum of terms that all come as one block each, and whether it may be overwritten."""
        total, own = None, False
        for term in step.terms:
            edge = self.values[term.owner].sources[term.edge][1]
            both = self.joined[term.other]
            if own and self.writable and edge.places(False):
                edge.window(total).add_(both)
                continue
            alone = len(step.terms) == 1 and self._dying(term.other, step)
            part, fresh = edge.push(both, alone)
            self.blocks[term.other] = both[:-1], False  # the part may share its memory
            if total is None:
                total, own = part, fresh
            elif own and self.writable:
                total.add_(part)
            elif fresh and self.writable:
                total, own = part.add_(total), True
            else:
                total, own = total + part, True
        return total, own

    def _pushed_laplacian(self, step: Step) -> Tensor | None:
        total = None
        for term in step.terms:
            lap = self.laplacian(term.other)
            if lap is not None:
                edge: LinearMap = self.values[term.owner].sources[term.edge][1]
                part = edge.push(lap.unsqueeze(0), False)[0].squeeze(0)
                total = part if total is None else total + part
        return total
