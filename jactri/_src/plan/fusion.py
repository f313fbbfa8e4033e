"""Which steps of a sweep kernels can run together. Pure: it reads structures and layouts, and holds no tensor.

Five patterns are found: a *chain* of products with shared matrices and scalings (Linear layers and activations), whose
blocks in between nobody else reads, and what goes around it in a residual connection; a map over *rows* (softmax,
normalisation), with that too, a convolution (*conv*) or a max *pool* with the scalings around it; the *first*
convolution of coloured seeds with the scalings after it; and a scaled *sum* of two blocks (a product of two values that
both depend on the input). A map with a kernel may also be one term of a larger sum (reverse mode of a residual
connection). The executor runs the result where kernels run (see `backends`), and the steps themselves elsewhere.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from ..base import backends
from ..maps.layout import Layout
from ..maps.mask import Mask
from ..maps.selection import Picked
from ..read.graph import Graph
from .convolving import Shape
from .poles import suspects
from .sweep import Step, Sweep, factors_of


@dataclass(frozen=True)
class Fused:
    """Steps run as one: the block of the last one's value out of the blocks of ``reads``.

    ``kind`` is "chain", "rows", "conv", "pool" or "first" (each step reads the one before) or "sum" (the last step adds
    up the two blocks of ``reads``, each scaled by the step among the others that reads it, if any). Where the last step
    of another kind has several terms, its ``term`` reads the step before, and ``reads`` goes on with the others.
    ``adds``: the kernel of rows, or of a chain, adds the only other one.
    ``last``: its block lies best with the channels side by side, as those read it that do.
    """

    kind: str
    steps: tuple[Step, ...]
    reads: tuple[int, ...]
    frees: tuple[int, ...] = ()
    term: int = 0
    adds: bool = False
    last: bool = False

    @property
    def partial(self) -> bool:
        """Whether kernels run one term of a sum only."""
        return self.kind != "sum" and len(self.steps[-1].terms) > 1 and not self.adds

    @property
    def value(self) -> int:
        return self.steps[-1].value

    @property
    def layout(self) -> Layout:
        return self.steps[-1].layout

    @property
    def flops(self) -> float:
        return sum(s.flops for s in self.steps)

    @property
    def bytes(self) -> float:
        """Of the last block: those in between are never written."""
        return self.steps[-1].bytes


Item = Step | Fused


def edge_of(graph: Graph, step: Step, term: int = 0) -> Any:
    """The map of one term of a step. Its name tells its class."""
    t = step.terms[term]
    return t.map_in(graph)


def fused(graph: Graph, sweep: Sweep) -> Sweep:
    """A sweep with its items where kernels run now, which is to be in the key of what is remembered of it."""
    if sweep.windows or not backends.kernels_on(graph.values[sweep.seed].device):
        return sweep
    return replace(sweep, items=fuse(graph, sweep))


def fuse(graph: Graph, sweep: Sweep) -> list[Item]:
    """The steps of a sweep, in an order that can be run, with what kernels can run together in one item."""
    uses = Counter(t.other for s in sweep.steps for t in s.terms)
    uses.update(t for t in sweep.targets if t is not None)
    reader = {t.other: s for s in sweep.steps for t in s.terms}
    maker = {s.value: s for s in sweep.steps}
    links = {s.value for s in sweep.steps if len(s.terms) == 1 and _links(graph, sweep, s)}
    absorbed: set[int] = set()
    groups: dict[int, Fused] = {}
    for step in sweep.steps:
        if step.value in absorbed or step.value in groups:
            continue
        if step.value in links:
            run = [step]
            while uses[run[-1].value] == 1:
                after = reader.get(run[-1].value)
                if after is None or after.value not in links:
                    break
                run.append(after)
            end = reader.get(run[-1].value) if uses[run[-1].value] == 1 else None
            if end is not None and end.value not in groups:
                i = [t.other for t in end.terms].index(run[-1].value)
                if _ends(graph, sweep, end, i) and (found := _trim(graph, [*run, end], i)):
                    absorbed.update(s.value for s in found[:-1])
                    both = found[0].terms[0].other, end.terms[1 - i].other
                    groups[end.value] = Fused("chain", tuple(found), both, term=i, adds=True)
                    continue
            run = _trim(graph, run)
            if run:
                absorbed.update(s.value for s in run)
                groups[run[0].value] = Fused("chain", tuple(run), (run[0].terms[0].other,))
        elif around := _around(graph, sweep, step):
            kind, i = around
            run, source = [step], step.terms[i].other
            while (
                uses[source] == 1
                and (before := maker.get(source)) is not None
                and before.value not in absorbed
                and _scales(graph, sweep, before)
            ):
                run.insert(0, before)
                source = before.terms[0].other
            if len(step.terms) > 1:
                rest = tuple(t.other for j, t in enumerate(step.terms) if j != i)
                absorbed.update(s.value for s in run[:-1])
                adds = kind == "rows" and len(rest) == 1 and _same(graph, sweep, step, 1 - i)
                groups[step.value] = Fused(kind, tuple(run), (source, *rest), term=i, adds=adds)
                continue
            while uses[run[-1].value] == 1:
                after = reader.get(run[-1].value)
                if after is None or not _scales(graph, sweep, after):
                    break
                run.append(after)
            absorbed.update(s.value for s in run)
            groups[run[0].value] = Fused(kind, tuple(run), (source,))
        elif len(step.terms) == 2 and all(_same(graph, sweep, step, i) for i in range(2)):
            scalings = [
                maker[t.other]
                for t in step.terms
                if uses[t.other] == 1
                and t.other in maker
                and t.other not in absorbed
                and _scales(graph, sweep, maker[t.other])
            ]
            if scalings:
                inner = {s.value: s.terms[0].other for s in scalings}
                absorbed.update(inner)
                reads = tuple(inner.get(t.other, t.other) for t in step.terms)
                groups[step.value] = Fused("sum", (*scalings, step), reads)
    return _schedule(graph, sweep, groups, absorbed)


def _schedule(
    graph: Graph, sweep: Sweep, groups: dict[int, Fused], absorbed: set[int]
) -> list[Item]:
    """Items in the order of the steps; a chain runs where its first step was. What is freed where is found anew."""
    items: list[Item] = []
    for step in sweep.steps:
        if step.value in groups:
            items.append(groups[step.value])
        elif step.value not in absorbed:
            items.append(step)
    keep = {t for t in sweep.targets if t is not None}
    seen, rows = set(keep), set(keep)
    out: list[Item] = []
    for item in reversed(items):
        frees = tuple(dict.fromkeys(v for v in item.reads if v not in seen))
        seen.update(frees)
        if item.__class__ is Fused and item.kind == "conv":
            last = item.value not in rows and not item.partial
            out.append(replace(item, frees=frees, last=last))
            images = _reads_last(graph, sweep, item)
            rows.update(item.reads[1:])
        else:
            out.append(replace(item, frees=frees))
            pools = item.__class__ is Fused and item.kind == "pool" and not item.partial
            images = pools and item.value not in rows  # written as the block lies that is read
        if not images:
            rows.update(item.reads)
    return out[::-1]


def _reads_last(graph: Graph, sweep: Sweep, item: Fused) -> bool:
    """Whether a convolution is one that reads channels side by side with fewer loads."""
    terms = ((s, item.term if s is item.steps[-1] else 0) for s in item.steps)
    edge = next(e for s, t in terms if (e := edge_of(graph, s, t)).name == "convolution")
    return Shape.of(edge, not sweep.reverse, (), ()).reads_last


def _plain(sweep: Sweep, step: Step, term: int = 0) -> bool:
    """Whether a term takes its block as it is stored, and gives a whole block of the step."""
    t = step.terms[term]
    return t.route.mid is sweep.layouts[t.other] and t.route.out.tied == step.layout.tied


def _same(graph: Graph, sweep: Sweep, step: Step, term: int) -> bool:
    """Whether a term is the block that it reads."""
    return edge_of(graph, step, term).name == "identity" and _plain(sweep, step, term)


def _scales(graph: Graph, sweep: Sweep, step: Step, term: int | None = None) -> bool:
    """Whether a step, or this term of it, is a scaling by a derivative."""
    edge = edge_of(graph, step, term or 0)
    return (
        (len(step.terms) == 1 or term is not None)
        and edge.structure == "diagonal"
        and edge.name == "diagonal"
        and _plain(sweep, step, term or 0)
        and not selects(graph, sweep, step, term or 0)
    )


def selects(graph: Graph, sweep: Sweep, step: Step, term: int = 0) -> bool:
    """Whether a step must select, where kernels multiply: what comes to it may be infinite."""
    selects = sweep.reverse and isinstance(edge_of(graph, step, term), Mask)
    return selects and bool(suspects(graph, masks=True))


def _around(graph: Graph, sweep: Sweep, step: Step) -> tuple[str, int] | None:
    """ "rows", "conv", "pool" or "first", and the term, for a step that a kernel runs with the scalings around it."""
    if _first(graph, sweep, step):
        return "first", 0
    for i in range(len(step.terms)):
        if _plain(sweep, step, i) and (kind := _mixes(graph, sweep, step, i)):
            return kind, i
    return None


def _mixes(graph: Graph, sweep: Sweep, step: Step, term: int) -> str:
    edge, shape = edge_of(graph, step, term), step.layout.shape
    if edge.name == "convolution":
        return "conv"
    if edge.__class__ is Picked and edge.pool_map(shape, sweep.reverse):
        return "pool"
    return "rows" if edge.row_map(shape, sweep.reverse) is not None else ""


def _first(graph: Graph, sweep: Sweep, step: Step) -> bool:
    """Whether a step convolves coloured seeds, all of which a kernel forms from the weight alone."""
    term, edge = step.terms[0], edge_of(graph, step)
    if (
        len(step.terms) != 1
        or term.other != sweep.seed
        or not sweep.colours
        or sweep.tables
        or edge.name != "convolution"
        or len(sweep.layout.axes) > 4
        or any(len(axis) > 1 for axis in sweep.layout.axes)
        or term.route.out.tied != step.layout.tied
    ):
        return False
    samples, (channels, f), *image = factors_of(sweep)
    free = term.route.mid.free
    own = f is None or sweep.layout.seed[f] == channels
    return (
        own
        and samples[1] not in free
        and all(s in free for _, s in ((channels, f), *image) if s is not None)
    )


def _links(graph: Graph, sweep: Sweep, step: Step, term: int = 0) -> bool:
    """Whether a term of a step can be a link of a chain."""
    if not _plain(sweep, step, term):
        return False
    edge, t = edge_of(graph, step, term), step.terms[term]
    if edge.name == "matmul":
        return edge.structure == "shared matrix" and edge.side == "right" and t.route.axis is None
    if edge.structure == "view" and edge.name == "view":
        shape, other = step.layout.shape, sweep.layouts[t.other].shape
        return not t.route.moves and shape[-1:] == other[-1:] != ()
    return _scales(graph, sweep, step, term)


def _ends(graph: Graph, sweep: Sweep, step: Step, term: int) -> bool:
    """Whether a chain can end in a term of a sum of two, and add the other one."""
    return (
        len(step.terms) == 2
        and _same(graph, sweep, step, 1 - term)
        and (_same(graph, sweep, step, term) or _links(graph, sweep, step, term))
    )


def _trim(graph: Graph, run: list[Step], term: int | None = None) -> list[Step]:
    """Without views at the ends (they cost nothing), and nothing at all unless a product is in it.

    ``term``: of the last step, a sum, which stays.
    """
    names = [edge_of(graph, s).name for s in run[:-1]] + [edge_of(graph, run[-1], term or 0).name]
    if "matmul" not in names:
        return []
    while names[0] == "view":
        del names[0], run[0]
    while term is None and names[-1] == "view":
        del names[-1], run[-1]
    return run
