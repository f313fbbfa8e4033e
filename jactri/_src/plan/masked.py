"""Ranges of tokens, where masks keep later from earlier ones: what is zero by a mask is not multiplied.

Behind attention under a causal mask, a block has all seeds by all tokens, and half of it is zero. A range of the seed's
tokens runs on a graph of its own, which has those entries of every value that the range can reach (see `narrowing`):
which these are, intervals tell (see `owners`), by masks alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from ..base.csr import Csr
from ..base.intervals import own, thin
from ..base.tracing import aside
from ..maps.contraction import MatMul
from ..maps.cut import Cut, Shape
from ..maps.layout import Layout
from ..maps.linear_map import Diagonal, LinearMap
from ..maps.low_rank import Softmax
from ..maps.selection import Take
from ..maps.unmasked import Unmasked
from ..read.graph import Graph
from .narrowing import CUT, Box, Range, cut_shape
from .owners import follow
from .sweep import Sweep, simulate

LEAST = 4
"""Tokens of a range, at least."""

WORTH = 0.8
"""Ranges are looked for along an axis where each reaches at most this part of the other end, on average."""


def masked(graph: Graph) -> list[tuple[int, int, Unmasked]]:
    """The edges (value, number) that may have a mask."""
    return [
        (v, k, e.unmasked)
        for v, value in enumerate(graph.values)
        for k, (_, e) in enumerate(value.sources)
        if isinstance(e, (Softmax, MatMul)) and e.unmasked is not None
    ]


def masks(graph: Graph) -> tuple[tuple[int, int, bytes], ...]:
    """Which edges (value, number) have a mask, and what it leaves: alike for graphs whose masks are."""
    return tuple([(v, k, m.digest) for v, k, m in masked(graph) if m() is not None])


def differ(graph: Graph) -> bool:
    """Whether masks differ between samples (or heads)."""
    return not all(m.alike for _, _, m in masked(graph))


def fixed(graph: Graph) -> bool:
    """Whether the masks and the graph's key tell what depends on what: not where there are indices."""
    kinds = {e.__class__ for v in graph.values for _, e in v.sources} - (CUT - {Take})
    return all(kind.reach is LinearMap.reach for kind in kinds)


def held(graph: Graph, found: list[Range]) -> float:
    """Bytes of the derivatives of which each range has a part, and of the parts that are copies, as they are in runs.

    All ranges have theirs of scalings at once, and a softmax makes its own anew. What a map forms, plans count.
    """
    total = 0.0
    for v, value in enumerate(graph.values):
        kinds = {e.__class__ for _, e in value.sources} & {Diagonal, Softmax}
        if not kinds:
            continue
        boxes = [r.boxes[v] for r in found if v in r.boxes]
        copies = [
            prod(cut_shape(value.shape, box))
            for box in boxes
            if any(cut.outer > 1 for cut in box.values())
        ]
        copied = sum(copies) if Diagonal in kinds else max(copies, default=0)
        whole = 0 if all(e.forms for _, e in value.sources) else prod(value.shape)
        total += (whole + copied) * value.dtype.itemsize
    return total


EXACT = 1 << 28
"""Weights by tokens of the seed up to which each token is followed by itself: intervals hide what is between."""

AT_ONCE = 1 << 22
"""The same, of tokens that are followed at once."""


def support(graph: Graph, seed: int, axis: int, value: int) -> dict[int, Csr]:
    """By axes of a value: which entries of an axis of the seed those along it see. Where they see all, it is left out.

    Masks and indices that are given tell it, and no values.
    """
    n, shape = graph.values[seed].shape[axis], graph.values[value].shape
    found: dict[int, list[np.ndarray]] = {}
    with aside():
        for start in _one_by_one(graph, seed, axis):
            near = follow(graph, {seed: start}, [value], whatever=True).get(value)
            for a, t in _by_axis(near, shape).items():
                found.setdefault(a, []).append(t > 0)
        if not found:
            index = np.arange(n)[:, None]
            near = _follow(graph, seed, [value], axis, False, whatever=True).get(value)
            for a, t in _by_axis(near, shape).items():
                found[a] = [(index < t[0]) & (n - index <= t[1])]
    seen = {a: Csr.of_dense(np.concatenate(parts).T) for a, parts in found.items()}
    return {a: s for a, s in seen.items() if s.nnz < prod(s.shape)}


def _by_axis(found: Tensor | None, shape: Shape) -> dict[int, np.ndarray]:
    """What is followed, along each axis of a value: (what, axis)."""
    made: dict[int, np.ndarray] = {}
    if found is None:
        return made
    found = thin(found)
    for a, n in enumerate(shape):
        if n > 1:
            others = [d for d in range(1, found.dim()) if d != a + 1]
            along = (found.amax(others) if others else found).cpu().numpy()
            made[a] = np.broadcast_to(along, (len(found), n))
    return made


def _one_by_one(graph: Graph, seed: int, axis: int) -> Iterator[Tensor]:
    """Some tokens of the seed after others, each to be followed by itself; none where that takes too long."""
    shape, device = graph.values[seed].shape, graph.values[seed].device
    n = shape[axis]
    weights = [v for v in graph.values if any(isinstance(e, Softmax) for _, e in v.sources)]
    most = max((prod(v.shape[-2:]) for v in weights), default=1)
    if n * most <= EXACT:
        each = max(1, AT_ONCE // most)
        for at in range(0, n, each):
            one = torch.eye(n, dtype=torch.int8, device=device)[at : at + each]
            yield one.view(-1, *[n if a == axis else 1 for a in range(len(shape))])


def whole(graph: Graph, reverse: bool, seed: int) -> Range:
    """All of an output or input as one range."""
    return Range(seed, {v: {} for v in simulate(graph, seed, reverse, False).layouts})


def ranges(graph: Graph, reverse: bool, count: int, number: int) -> list[Range] | None:
    """About ``count`` ranges of one axis of an output (or input), where masks let each reach a part only."""
    if graph.complex:
        return None
    seed = (graph.outputs if reverse else graph.inputs)[number]
    sweep = simulate(graph, number, reverse, False)
    targets = [t for t in dict.fromkeys(sweep.targets) if t is not None]
    shape = graph.values[seed].shape
    best, found = WORTH, None
    needed = needed_by(graph, sweep)
    for axis, n in enumerate(shape):
        ties = {t for _, t in sweep.layout.axes[axis]}
        free = [t for t in targets if not ties & sweep.layouts[t].tied]
        parts = min(count, n // LEAST)
        if parts < 2 or not free:
            continue
        size = -(-n // parts)
        spans = [(start, min(size, n - start)) for start in range(0, n, size)]
        seen = seen_along(graph, sweep, axis, needed)
        if seen is None:
            return None
        made = along(sweep, number, axis, spans, seen)
        share = sum(_share(graph, r, free) for r in made) / len(made)
        ends = {seed, *targets}
        runs = any(c.outer > 1 for r in made for e in ends for c in r.boxes.get(e, {}).values())
        if share < best and not runs:  # an answer is written in one piece a range
            best, found = share, made
    return found


def needed_by(graph: Graph, sweep: Sweep) -> dict[int, Tensor]:
    """The entries of all values that a sweep's targets need."""
    targets = [t for t in dict.fromkeys(sweep.targets) if t is not None]
    return follow(graph, {t: _ones(graph, t) for t in targets}, [sweep.seed], not sweep.reverse)


Seen = dict[int, tuple[np.ndarray, np.ndarray]]
"""By value: the intervals of the seed's tokens that its entries see, and those that targets need."""


def seen_along(graph: Graph, sweep: Sweep, axis: int, needed: dict[int, Tensor]) -> Seen | None:
    """What the entries of all values see of an axis of a sweep's seed; None where a target sees nothing.

    ``needed``: by `needed_by`.
    """
    reached = _follow(
        graph, sweep.seed, [t for t in sweep.targets if t is not None], axis, sweep.reverse
    )
    if any(t not in reached for t in sweep.targets if t is not None):
        return None
    there = [v for v in sweep.layouts if v in reached and v in needed]
    return {v: tuple([thin(t[v]).cpu().numpy() for t in (reached, needed)]) for v in there}


def along(
    sweep: Sweep, number: int, axis: int, spans: Sequence[tuple[int, int]], seen: Seen
) -> list[Range]:
    """Ranges, (start, length), of an axis of a sweep's seed, which is output or input ``number``: what each reaches.

    ``seen``: by `seen_along`.
    """
    n = sweep.layout.shape[axis]
    ties = {t for _, t in sweep.layout.axes[axis]}
    tied = frozenset([v for v, lay in sweep.layouts.items() if sweep.reverse and ties & lay.tied])
    made = [Range(number, {}, tied) for _ in spans]
    for v, (near, far) in seen.items():
        for (start, length), part in zip(spans, made, strict=True):
            box = _box(near, far, start, length, n, sweep.layouts[v])
            if box is not None:
                part.boxes[v] = box
    for (start, length), part in zip(spans, made, strict=True):
        part.boxes[sweep.seed] = {axis: Cut(axis, start, length)}
    return made


def _ones(graph: Graph, value: int) -> Tensor:
    v = graph.values[value]
    return torch.ones([2] + [1] * len(v.shape), dtype=torch.int32, device=v.device)


def _follow(
    graph: Graph, start: int, ends: list[int], axis: int, reverse: bool, whatever: bool = False
) -> dict[int, Tensor]:
    value = graph.values[start]
    n = value.shape[axis] if value.shape else 1
    at = own(n, max(1, len(value.shape)), value.device, axis)
    at = at.reshape(2, *at.shape[1 : 1 + len(value.shape)])
    return follow(graph, {start: at}, ends, reverse, whatever=whatever)


def _share(graph: Graph, found: Range, targets: list[int]) -> float:
    """Which part of the entries of the other ends a range reaches."""
    sizes = [prod(graph.values[t].shape) for t in targets]
    there = [t for t in targets if t in found.boxes]
    reached = sum(prod(cut_shape(graph.values[t].shape, found.boxes[t])) for t in there)
    return reached / max(1, sum(sizes))


def _box(
    reached: np.ndarray, needed: np.ndarray, start: int, length: int, n: int, layout: Layout
) -> Box | None:
    """Where entries meet a range of ``n`` and are needed; None where none do."""
    there = (reached[0] > start) & (reached[1] > n - start - length) & (needed[0] > 0)
    if not there.any():
        return None
    box: Box = {}
    for a, factors in enumerate(layout.axes):
        size = layout.shape[a]
        if there.shape[a] != size or size == 1:
            continue
        line = there.any(tuple([d for d in range(there.ndim) if d != a]))
        outer, inner = 1, size
        for f, _ in factors:
            inner //= f
            at = line.reshape(outer, f, inner).any((0, 2)).nonzero()[0]
            first, count = int(at[0]), int(at[-1] - at[0]) + 1
            if count < f and (a not in box or outer * inner * count < prod(_sizes(box[a]))):
                box[a] = Cut(a, first * inner, count * inner, outer)
            outer *= f
    return box


def _sizes(cut: Cut) -> tuple[int, int]:
    return cut.outer, cut.length
