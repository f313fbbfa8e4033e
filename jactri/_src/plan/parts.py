"""Parts of one Jacobian that are computed each by itself: a range of samples, of rows or of columns.

A range is of one axis of an output (rows) or input (columns), and runs on a graph of its own, of the entries that it
reaches (see `masked` and `narrowing`). Where samples do not mix, it is one of all of them.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import NamedTuple

from ..base.tracing import aside
from ..maps.cut import Cut
from ..read.graph import Graph
from .masked import Seen, along, needed_by, seen_along
from .narrowing import Box, narrowed
from .patches import from_lines
from .planner import Plan, make_plan
from .planning import Ends, samples_of
from .samples import narrow, places
from .sweep import Sweep, simulate

MANY, MOST = 64, 1024
"""Into how many parts a Jacobian on disk is cut, about, and at most."""


class Cutting(NamedTuple):
    """How a Jacobian is cut: the same on all ranks, and for any number of them."""

    by: str
    """"samples", "rows" or "columns"."""
    axes: tuple[int | None, ...]
    """Of each output, or input for columns: the axis; None where there is none to cut."""
    sizes: tuple[int, ...]
    """Entries along it,"""
    units: tuple[int, ...]
    """and how many a file notes as one."""

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """All parts of a Jacobian on disk: (number of the output or input, start, length)."""
        return [
            (k, start, min(unit, size - start))
            for k, (size, unit) in enumerate(zip(self.sizes, self.units, strict=True))
            for start in range(0, size, unit)
        ]


def cutting(graph: Graph | None, plan: Plan | None, ys, xs, per_sample, summed: bool) -> Cutting:
    """How to cut the Jacobian of a graph with this plan; of what has none, by rows.

    Along the longest axis, which ranks share most evenly; images that go by patches along their lines.
    """
    forward = plan is not None and not plan.reverse and not graph.complex
    by, ends = ("columns", xs) if forward else ("rows", ys)
    axes = tuple([_longest(t.shape) for t in ends])
    both = plan is not None and not summed and set(axes) == {0} and samples_of(ys, xs)
    if both and _where(graph, plan) is not None:
        by, ends = "samples", ys[:1]
        axes = axes[:1]
    elif plan is not None and not per_sample:
        patched = {s.index for s in plan.sweeps if s.windows}
        axes = tuple(
            [
                _lines(a, t.shape) if k in patched else a
                for k, (a, t) in enumerate(zip(axes, ends, strict=True))
            ]
        )
    if per_sample and by != "samples":  # a sample's rows are those of one
        axes = tuple([_longest(t.shape, 1) for t in ends])
    sizes = tuple(1 if a is None else t.shape[a] for t, a in zip(ends, axes, strict=True))
    units = tuple([_unit(size, k, plan) for k, size in enumerate(sizes)])
    return Cutting(by, axes, sizes, units)


def _longest(shape, first: int = 0) -> int | None:
    if len(shape) <= first:
        return None
    return max(range(first, len(shape)), key=lambda a: (shape[a], -a))


def _lines(longest: int | None, shape) -> int | None:
    """The lines of images, of which patches run some as cheaply as all, where they are not much fewer."""
    if longest in (1, 3) and len(shape) == 4 and 2 * shape[2] >= shape[longest]:
        return 2
    return longest


def _unit(size: int, number: int, plan: Plan | None) -> int:
    """How many entries of an axis are about one chunk of seeds."""
    at_once = 1.0
    sweeps = [] if plan is None else [s for s in plan.sweeps if s.index == number]
    for sweep in sweeps:
        for factor, some in sweep.chunks.items():
            at_once = min(at_once, at_once * some / sweep.layout.seed[factor])
    unit = min(int(size * at_once), ceil(size / MANY))
    return max(1, unit, ceil(size / MOST))


def _where(graph: Graph, plan: Plan) -> dict[int, tuple[int, int]] | None:
    """Where samples are in every value, if all maps can be cut to some of them."""
    direction = "reverse-mode" if plan.reverse else "forward-mode"
    where = places(graph, make_plan(graph, direction).sweeps)
    ends = [v for v in (*graph.inputs, *graph.outputs) if v is not None]
    if where is None or any(where.get(v) != (0, 1) for v in ends):
        return None
    return None if narrow(graph, where, 0, 1) is None else where


Part = tuple[Ends, Graph | None]
"""What is computed, in ranges that begin where the part does, and its graph: None where all of it is zero."""


class Parts:
    """The parts of one graph."""

    def __init__(self, graph: Graph, plan: Plan, cut: Cutting, per_sample: bool | str):
        self._graph, self._cut, self._per_sample = graph, cut, per_sample
        self._where = _where(graph, plan) if cut.by == "samples" else None
        self._reverse = cut.by == "rows"
        self._seen: dict[int, tuple[Sweep, Seen | None]] = {}
        self.lined = any(s.windows for s in plan.sweeps)
        """Whether parts may be `lines`."""

    def of(self, number: int, start: int, length: int) -> Part | None:
        """One of them; None where the maps cannot be cut there."""
        if self._where is not None:
            part = narrow(self._graph, self._where, start, length)
            if part is None:
                return None
            into = {i: {0: Cut(0, start, length)} for i in range(len(part.inputs))}
            return Ends({j: {0: Cut(0, 0, length)} for j in range(len(part.outputs))}, into), part
        return self._along(number, start, length)

    def lines(self, plan: Plan, number: int, start: int, length: int) -> tuple[Ends, Plan] | None:
        """A part as some lines of images, from which the whole's sweep by patches runs; None where it is no such."""
        graph = self._graph
        if (
            self._cut.by == "samples"
            or self._cut.axes[number] != 2
            or self._per_sample
            or graph.complex
        ):
            return None
        found = [s for s in plan.sweeps if s.index == number]
        if plan.parts or plan.reverse != self._reverse or len(found) != 1:
            return None
        sweep = from_lines(graph, found[0], start, length)
        if sweep is None:
            return None
        return self._ends(number, length, {}), replace(plan, sweeps=[sweep])

    def _along(self, number: int, start: int, length: int) -> Part | None:
        graph, axis = self._graph, self._cut.axes[number]
        seeds, targets = graph.outputs, graph.inputs
        if not self._reverse:
            seeds, targets = targets, seeds
        if graph.complex:
            return None
        made: Part
        if seeds[number] is None:
            made = self._ends(number, length, {}), None
            return made
        if axis is None:
            return None
        with aside():
            if number not in self._seen:
                sweep = simulate(graph, number, self._reverse, False)
                seen = seen_along(graph, sweep, axis, needed_by(graph, sweep))
                self._seen[number] = sweep, seen
        sweep, seen = self._seen[number]
        if seen is None:
            return None
        (part,) = along(sweep, number, axis, [(start, length)], seen)
        for t in {*targets} - {None}:
            box = part.boxes.get(t)
            # an answer is written in one piece; that of a sample is a whole one
            if box and t != seeds[number]:
                whole = [a for a, c in box.items() if c.outer > 1 or (self._per_sample and a == 0)]
                part.boxes[t] = {a: c for a, c in box.items() if a not in whole}
        boxes = {k: part.boxes.get(v, {}) for k, v in enumerate(targets) if v is not None}
        return self._ends(number, length, boxes), narrowed(graph, part, self._reverse)

    def _ends(self, number: int, length: int, boxes: dict[int, Box]) -> Ends:
        graph, axis = self._graph, self._cut.axes[number]
        seeds, targets = graph.outputs, graph.inputs
        if not self._reverse:
            seeds, targets = targets, seeds
        here: dict[int, Box] = {k: {} for k in range(len(seeds))}
        here[number] = {axis: Cut(axis, 0, length)}
        there = {k: boxes.get(k, {}) for k in range(len(targets))}
        return Ends(here, there) if self._reverse else Ends(there, here)
