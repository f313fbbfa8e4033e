"""What acts on each token by itself, as one matrix for each: made once, before a sweep, where many seeds meet it.

Between two values through which everything goes (see `mixed.cuts`), a block may keep more ties than the sweep that
comes to it: behind attention every seed is of all tokens, and a feed-forward network has a small matrix for each. The
product with these, in place of one with each of its weights, is one step. Sizes alone decide, and memory: what scaled a
block in place may have become a product, which needs another. Pure: no tensor is held.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from math import prod

from ..maps.layout import FREE
from ..maps.linear_map import Route
from ..read.graph import Graph
from .mixed import Partial, cuts, product
from .needs import peak_bytes
from .sweep import Meeting, Step, Sweep, Term, cost, follow, part_block, with_steps

MANY = 2
"""How many times the seeds of a part the sweep must have, at least."""

MORE, WORTH = 1 / 16, 1 / 2
"""How much more memory the sweep may take with its parts: in any case, and by the share of its cost that they save."""

LOOK = 6e-6
"""About how many seconds it takes to follow one step."""


def condensed(graph: Graph, sweep: Sweep, seconds: float) -> Sweep:
    """The sweep that multiplies with parts that are worth making first, if any are.

    ``seconds``: what it takes; where that is less than to look for parts, there are none.
    """
    if sweep.summed or sweep.coloured or sweep.windows or sweep.columns() < MANY:
        return sweep
    on = [sweep.seed, *(s.value for s in sweep.steps)]
    through = set(cuts(graph))
    at = [v for v in on if v in through]
    if seconds < LOOK * len(at) * len(on):
        return sweep
    best, saved = sweep, 0.0
    whole, least = cost(sweep.steps), peak_bytes(graph, sweep, {})
    for near, far in _apart(graph, sweep, at):
        inner = on[on.index(near) + 1 : on.index(far) + 1]
        steps = [s for s in sweep.steps if s.value in set(inner)]
        made = min(
            follow(graph, far, not sweep.reverse, [near]),
            follow(graph, near, sweep.reverse, [far]),
            key=lambda s: cost(s.steps),
        )
        found = _step(graph, sweep, made, near, far, len(best.parts))
        if found is None:
            continue
        less = cost(steps) - cost([found]) - cost(made.steps)
        if less <= 0:
            continue
        parts = *best.parts, (made, far if made.reverse == sweep.reverse else near)
        more = replace(with_steps(best, {far: found}, set(inner)), parts=parts)
        taken = peak_bytes(graph, more, {}) + sum(p.ends(graph) for p, _ in parts)
        if taken <= least * (1 + MORE + WORTH * (saved + less) / whole):
            best, saved = more, saved + less
    return best


def _apart(graph: Graph, sweep: Sweep, at: list[int]) -> Iterator[tuple[int, int]]:
    """The pairs of cuts, as far from each other as can be, between which more stays apart than in the sweep."""
    run: tuple[int, int] | None = None
    for near, far in itertools.pairwise(at):
        start = near if run is None else run[0]
        columns, apart = sweep.layouts[near].columns, False
        if columns >= MANY:
            block = follow(graph, start, sweep.reverse, [far]).layouts[far]
            apart = any(t != FREE for axis in block.axes[1:] for _, t in axis)
            apart = apart and columns >= MANY * block.columns
        if apart:
            run = start, far
        elif run is not None:
            yield run
            run = None
    if run is not None:
        yield run


def _step(graph: Graph, sweep: Sweep, made: Sweep, near: int, far: int, number: int) -> Step | None:
    """The step from the block of ``near`` to that of ``far``, by the part ``made``."""
    own = Partial(made, far if made.reverse == sweep.reverse else near)
    main = Partial(sweep, near)
    first, second = (own, main) if sweep.reverse else (main, own)
    found = product(first, second, sweep.reverse)
    if found is None:
        return None
    how, layout, identity = found
    at = sweep.layouts[far]
    if identity != sweep.layout or layout != at or layout.numel == 0:
        return None
    flops = 2.0 * prod(how.sizes)
    route = Route(sweep.layouts[near], layout, None, flops / layout.numel)
    owner = near if sweep.reverse else far
    term = Term(near, owner, 0, route, meeting=Meeting(part_block(number), how))
    written = (layout.numel + how.copies({})) * graph.values[far].dtype.itemsize
    return Step(far, (term,), layout, (), flops, float(written))
