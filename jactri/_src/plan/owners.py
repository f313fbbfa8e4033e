"""Which samples every entry of every value depends on: the proof that rows picked by index keep their owner.

The ties of `layout` follow samples along axes. Indices (``x[mask]``, ``index_add``, tokens sent to experts) take rows
out of order, and then it is entries that have owners. A value's are a block of `intervals`, which maps that move
entries move as they move tangents (see `LinearMap.reach`), and others join along all axes that they do not keep.
Intervals only grow on the way: what they tell apart is apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.backends import captured
from ..base.intervals import own, single, thin, within
from ..maps.cut import Cut
from ..maps.linear_map import LinearMap
from ..read.graph import Graph
from .sweep import relevant


def follow(
    graph: Graph,
    starts: dict[int, Tensor],
    targets,
    reverse: bool = False,
    values: bool = False,
    whatever: bool = False,
) -> dict[int, Tensor]:
    """The intervals of all values between ``starts``, which have theirs, and ``targets``.

    ``reverse``: of the outputs that a value has an influence on. ``values``: zeros that maps multiply by (a mask, the
    weights of a dispatch) let nothing through; else only indices do not. ``whatever``: what a sort or a maximum chooses
    among values may be anything.
    """
    order = relevant(graph, starts, targets, reverse)
    found = {v: t.expand(len(t), *graph.values[v].shape) for v, t in starts.items() if v in order}
    present = set(order)
    for v in order:
        if reverse:
            if v in found:
                for s, edge in graph.values[v].sources:
                    if s in present:
                        _add(
                            found, s, _through(graph, edge, found[v], s, v, True, values, whatever)
                        )
        else:
            for s, edge in graph.values[v].sources:
                if s in found:
                    _add(found, v, _through(graph, edge, found[s], s, v, False, values, whatever))
    return found


def _add(found: dict[int, Tensor], v: int, t: Tensor) -> None:
    old = found.get(v)
    found[v] = t if old is None else torch.maximum(thin(old), thin(t)).expand(t.shape)


def _through(
    graph: Graph,
    edge: LinearMap,
    t: Tensor,
    s: int,
    v: int,
    reverse: bool,
    values: bool,
    whatever: bool,
) -> Tensor:
    """One edge; a map by index acts on one entry of axes that it keeps and along which nothing varies.

    Its indices must not vary either: it is its own piece there.
    """
    before, after = graph.values[s].shape, graph.values[v].shape
    to = before if reverse else after
    if whatever and edge.chosen:
        return LinearMap.reach(edge, t, before, after, reverse, values).expand(len(t), *to)
    if edge.structure == "gather":
        for a, b in edge.kept(before, after):
            at = (b if reverse else a) + 1
            if t.shape[at] == 1 or t.stride(at):
                continue
            cuts = Cut(a, 0, 1), Cut(b, 0, 1)
            if edge.narrow(*cuts, before, after) is not edge:
                continue
            before, after, t = cuts[0].shape(before), cuts[1].shape(after), t.narrow(at, 0, 1)
    return edge.reach(t, before, after, reverse, values).expand(len(t), *to)


def apart(graph: Graph) -> bool:
    """Whether the computation shows that no output of one sample depends on another's input.

    By its indices alone, or with the zeros that it multiplies by (in grad mode, the constant ones: others may be zero
    here and not beside). The values of the call decide: it is asked each time. Of an op that is called instead of
    understood they say nothing.
    """
    _check_readable(next(graph.values[v].device for v in graph.inputs if v is not None))
    for value in graph.values:
        for s, edge in value.sources:
            if edge.structure == "opaque" and not edge.kept(graph.values[s].shape, value.shape):
                return False
    return any(not _astray(graph, _from_inputs(graph, values)) for values in (False, True))


def apart_behind(graph: Graph, seed: int, data: list[int], picked: list[int]) -> bool:
    """`apart`, from the output ``seed`` to the values ``data``, whose first axis is the samples.

    Of the values ``picked``, every entry must have an influence on one sample only, whichever it is.
    """
    value = graph.values[seed]
    _check_readable(value.device)
    n = value.shape[0]
    starts = {seed: own(n, len(value.shape), value.device)}
    for values in (False, True):
        found = follow(graph, starts, [*data, *picked], True, values)
        if all(within(found[v], n) for v in data if v in found) and all(
            single(found[v], n) for v in picked if v in found
        ):
            return True
    return False


def _check_readable(device: torch.device) -> None:
    if captured(device):
        raise RuntimeError(
            "per_sample=True inside of the capture of a CUDA graph: only values tell whether these samples mix, and "
            "none can be read there. Pass per_sample='assume' if they do not"
        )


def joins(graph: Graph) -> int | None:
    """The first value in which samples meet on the way to an output that is not its own sample's, or None."""
    found = _from_inputs(graph, True)
    astray, n = _astray(graph, found), _count(graph)
    if not astray:
        return None
    at = astray[0]
    while True:
        behind = [s for s, _ in graph.values[at].sources if s in found and not single(found[s], n)]
        if not behind:
            return None if single(found[at], n) else at
        at = behind[0]


def _count(graph: Graph) -> int:
    return next(graph.values[v].shape[0] for v in graph.inputs if v is not None)


def _from_inputs(graph: Graph, values: bool) -> dict[int, Tensor]:
    starts = {}
    for v in graph.inputs:
        if v is not None:
            value = graph.values[v]
            starts[v] = own(value.shape[0], len(value.shape), value.device)
    return follow(graph, starts, graph.outputs, False, values)


def _astray(graph: Graph, found: dict[int, Tensor]) -> list[int]:
    """The outputs with an entry that depends on another sample than its own."""
    n = _count(graph)
    return [v for v in graph.outputs if v in found and not within(found[v], n)]
