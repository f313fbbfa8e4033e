"""Runs a Plan: pushes or pulls blocks step by step, chunk by chunk, into the answers (see `answers`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from ..base import backends
from ..base.heap import Heap
from ..base.progress import Watch
from ..base.tracing import may_write
from ..maps.complexes import Complex
from ..maps.joint import Joint
from ..maps.joint import given as taken
from ..maps.layout import Layout, Selection, convert, one, scatter
from ..maps.lettered import has_own_memory
from ..maps.linear_map import Diagonal
from ..maps.selection import side_by_side
from ..plan import patches, patching
from ..plan.fusion import Fused, Item
from ..plan.mixed import Join
from ..plan.planner import Plan
from ..plan.sweep import Step, Sweep, Term, part_block
from ..read.graph import Graph
from ..read.ranges import Marks
from . import launch
from .answers import Answer, Store
from .products import multiply
from .seeds import seed_block

_FORGETS = Diagonal, Complex
"""Maps that hold derivatives."""

Blocks = dict[int, tuple[Tensor | None, bool]]
"""Value -> (data, whether the executor may overwrite it)."""

Given = dict[int, Tensor]
"""Value -> the block ``(K, *value)`` that a caller gives."""

Made = dict[tuple[int, int], Tensor]
"""(id of a part of the plan, value) -> its whole block."""


def run(
    graph: Graph,
    plan: Plan,
    answers: Mapping[tuple[int, int], Store],
    watch: Watch | None = None,
    given: Given | None = None,
) -> None:
    """Execute every stage of a plan; ``answers[j, i]`` receive the blocks. ``watch`` is told of every chunk.

    ``given``: the blocks to start from, for sweeps whose seed is not an identity.
    """
    made: Made = {}
    marks = None if graph.layers is None else Marks(graph, plan)
    stage = _stage if marks is None else marks.staged(_stage)
    for part in plan.parts:
        stores = {v: Store(part.layouts[v], graph.values[v]) for v in part.targets if v is not None}
        stage(graph, part, list(stores.items()), None, made, marks)
        made.update(((id(part), v), store.block()) for v, store in stores.items())
    for sweep in plan.sweeps:
        ends = []
        for k, v in enumerate(sweep.targets):
            if v is not None:
                pair = (sweep.index, k) if plan.reverse else (k, sweep.index)
                if pair in answers:
                    ends.append((v, answers[pair]))
        stage(graph, sweep, ends, watch, made, marks, given)
    if marks is not None:
        marks.close()


def blocks_of(graph: Graph, sweep: Sweep, sel: Selection | None = None) -> dict[int, Tensor | None]:
    """The blocks of a sweep's targets themselves, for one selection of its seeds. None stands for ones."""
    items = _items(graph, sweep)
    ends = frozenset([t for t in sweep.targets if t is not None])
    blocks: Blocks = {sweep.seed: (None, False)}
    _steps(graph, sweep, items, blocks, sel, not torch.is_grad_enabled(), ends)
    return {t: blocks[t][0] for t in ends}


def _items(graph: Graph, sweep: Sweep) -> Sequence[Item]:
    """What a sweep runs, one after another."""
    planned = sweep.items is not None
    kernels = planned and backends.kernels_on(graph.values[sweep.seed].device)
    return sweep.items if kernels else sweep.steps


def _stage(
    graph: Graph, sweep: Sweep, ends, watch, made: Made, marks: Marks | None, given=None
) -> None:
    if watch and watch.ahead:
        for _, answer in ends:
            answer.begun = True
    if isinstance(sweep, Join):
        _join(sweep, ends, watch, made, marks)
    else:
        _sweep(graph, sweep, ends, watch, made, marks, given)


def _own(layout: Layout, sel: Selection) -> Selection:
    """The part of a chunk's selection that a block of this layout has as seeds."""
    return {f: r for f, r in sel.items() if f not in layout.tied}


def _parts(ends, sel: Selection) -> list[Tensor]:
    """Where a chunk goes in results on disk."""
    return [
        a.part(_own(a.layout, sel)) for _, a in ends if a.dest is not None and a.__class__ is Answer
    ]


def _join(join: Join, ends, watch: Watch | None, made: Made, marks: Marks | None) -> None:
    """Multiply the partial Jacobians of a cut, chunk by chunk of the result's seeds."""
    second = made[id(join.second.made), join.second.value]
    for sel in join.selections():
        if watch and watch.skip(_parts(ends, sel)):
            continue
        for v, answer in ends:
            mine = _own(join.layouts[v], sel)
            if any(start for f, (start, _) in sel.items() if f not in mine):
                continue  # the same block for all chunks of a factor that is tied in it
            first = made[id(join.first[v].made), join.first[v].value]
            direct = answer.window(mine)
            times = multiply if marks is None else marks.product(multiply, join, v)
            block = times(join.products[v], join.layouts[v], first, second, mine, direct)
            answer.put(block, True, mine)
        if watch:
            watch.done(_parts(ends, sel))


def _start(
    graph: Graph, sweep: Sweep, sel: Selection | None, given: Given | None, items: Sequence[Item]
) -> Blocks:
    """The blocks of the seeds, for a chunk that runs ``items``."""
    if sweep.given:
        cut = (sel or {}).get(0)
        return {
            v: (given[v] if cut is None else given[v].narrow(0, *cut), False) for v in sweep.given
        }
    if sweep.coloured and _formed(sweep, items):
        return {sweep.seed: (seed_block(sweep, sel, graph.values[sweep.seed]), False)}
    return {sweep.seed: (None, False)}


def _sweep(
    graph: Graph,
    sweep: Sweep,
    ends,
    watch: Watch | None,
    made: Made,
    marks: Marks | None = None,
    given: Given | None = None,
) -> None:
    if watch and sweep.patterns:
        # entries are written when all are there: a call that goes on forms them again
        watch = Watch(watch.advance, None)
    if sweep.windows:
        _patches(graph, sweep, ends, watch, marks)
        return
    if sweep.chunks:
        for _, answer in ends:  # before the blocks: it outlives them
            answer.reserve()
    skip = None if watch is None else lambda sel: watch.skip(_parts(ends, sel))
    for sel, blocks in chunks(graph, sweep, ends, marks, given, skip, made):
        for v, answer in ends:
            mine = _own(sweep.layouts[v], sel) if sel else sel
            if sel and any(start for f, (start, _) in sel.items() if f not in mine):
                continue  # a block in which the cut factor is tied is whole: it is written once
            answer.put(*blocks[v], mine)
        del blocks
        if watch:
            watch.done(_parts(ends, sel))


def chunks(
    graph: Graph,
    sweep: Sweep,
    ends=(),
    marks: Marks | None = None,
    given: Given | None = None,
    skip: Callable[[Selection], bool] | None = None,
    made: Made | None = None,
) -> Iterator[tuple[Selection, Blocks]]:
    """Every chunk of a sweep: its selection of the seeds, and blocks, those of the sweep's targets among them.

    Blocks in which all cut factors are tied are whole, the same in every chunk. ``ends``: (value, answer), where blocks
    may be written to directly; ``skip`` tells the chunks to leave out.
    """
    writable = may_write()
    items = _items(graph, sweep)
    parts = _parts_of(sweep, made)
    steps = _steps if marks is None else _marked(marks)
    heap = Heap.of(graph.values[sweep.seed].device, sweep.peak)
    if not sweep.chunks:
        if skip and skip({}):
            return
        whole = _start(graph, sweep, None, given, items) | parts
        steps(graph, sweep, items, whole, None, writable, frozenset(), ends, heap)
        yield {}, whole
        return
    # steps in which every cut factor is still tied are the same for all chunks
    cut = frozenset(sweep.chunks)
    shared = [s for s in items if cut <= s.layout.tied]
    body = [s for s in items if not cut <= s.layout.tied]
    used = frozenset(v for s in body for v in s.reads)
    seeds = sweep.given or (sweep.seed,)
    pinned = used.intersection([*seeds, *(s.value for s in shared)])
    pinned = pinned.union(t for t in sweep.targets if t is not None)
    blocks: Blocks = {
        sweep.seed: (None, False)
    }  # what is shared starts from an identity, or from colours
    if sweep.coloured:
        blocks = _start(graph, sweep, None, None, shared)
    blocks |= parts
    steps(graph, sweep, shared, blocks, None, writable, pinned)
    for sel in sweep.selections():
        if skip and skip(sel):
            continue
        local = {**blocks, **_start(graph, sweep, sel, given, body), **parts}
        steps(graph, sweep, body, local, sel, writable, pinned, ends)
        yield sel, local
        del local
        if heap is not None:
            heap()


def _parts_of(sweep: Sweep, made: Made | None) -> Blocks:
    """The blocks of parts that its terms multiply with."""
    return {part_block(k): (made[id(part), v], False) for k, (part, v) in enumerate(sweep.parts)}


def _met(
    term: Term, data: Tensor, own: bool, reverse: bool, blocks: Blocks, sel
) -> tuple[Tensor, bool]:
    """The product of a block, which may be overwritten if it is ``own``, with that of a part."""
    part, _ = blocks[term.meeting.block]
    pair = (part, data) if reverse else (data, part)
    mine = _own(term.route.out, sel) if sel else {}
    here = _own(term.route.mid, mine)
    owned = (False, own) if reverse else (own, False)
    new = multiply(term.meeting.product, term.route.out, *pair, mine, here=here, own=owned)
    return new, has_own_memory(new)


def _formed(sweep: Sweep, items: Sequence[Item]) -> bool:
    """Whether the block of coloured seeds is needed: by anything but a kernel that knows them."""
    return sweep.seed in sweep.targets or any(
        sweep.seed in i.reads and not (i.__class__ is Fused and i.kind == "first") for i in items
    )


def _patches(graph: Graph, sweep: Sweep, ends, watch: Watch | None, marks: Marks | None) -> None:
    if len(ends) == 1 and patching.tail_of(sweep) is not None:
        with nullcontext() if marks is None else marks.step(sweep, patching.tail_of(sweep)):
            made = patching.run(graph, sweep, ends[0][1])
        if made:
            if watch:
                watch.done([])
            return
    run = patches.PatchRun(graph, sweep)
    pinned = frozenset(v for v, _ in ends)
    for chunk in run.chunks():
        blocks = {sweep.seed: run.seed()}
        for step in sweep.steps:
            with nullcontext() if marks is None else marks.step(sweep, step):
                run.step(step, blocks, chunk, pinned)
        for v, answer in ends:
            answer.put_patches(blocks[v].data, chunk)
    if watch:
        watch.done([])


def _steps(
    graph: Graph,
    sweep: Sweep,
    items: Sequence[Item],
    blocks: Blocks,
    sel: Selection | None,
    writable: bool,
    pinned: frozenset[int],
    ends=(),
    heap: Heap | None = None,
) -> None:
    values, layouts, reverse = graph.values, sweep.layouts, sweep.reverse
    once = sweep.alone and sel is None
    for step in items:
        if heap is not None:
            heap.writes(step.bytes)
        if isinstance(step, Fused):
            _fused(graph, sweep, step, blocks, sel, writable, pinned, ends)
            continue
        terms, frees = step.terms, step.frees
        if len(terms) == 1:
            term = terms[0]
            other = term.other
            data, own = blocks[other]
            dying = other in frees and other not in pinned
            if term.meeting is not None:
                free = own and dying and writable
                blocks[step.value] = _met(term, data, free, sweep.reverse, blocks, sel)
            else:
                edge = term.map_in(graph)
                blocks[step.value] = edge.apply(
                    data,
                    own and dying and (writable or edge.structure == "view"),
                    layouts[other],
                    term.route,
                    reverse,
                    sel,
                    values[other],
                )
                if once and isinstance(edge, _FORGETS):
                    edge.forget()
            if dying:
                del blocks[other]
                continue
            blocks[other] = (data, False)  # the new block may share its memory
        else:
            blocks[step.value] = add_terms(graph, sweep, step, blocks, sel, writable, pinned=pinned)
            for f in frees:
                if f not in pinned:
                    del blocks[f]


def _marked(marks: Marks):
    """`_steps`, with a range around every item, and around the steps of one that no kernel covers."""

    def steps(graph, sweep, items, blocks, sel, writable, pinned, ends=(), heap=None):
        for item in items:
            if heap is not None:
                heap.writes(item.bytes)
            with marks.step(sweep, item):
                if item.__class__ is Fused:
                    _fused(graph, sweep, item, blocks, sel, writable, pinned, ends, steps)
                else:
                    _steps(graph, sweep, [item], blocks, sel, writable, pinned, ends)

    return steps


def _fused(
    graph, sweep, item: Fused, blocks: Blocks, sel, writable: bool, pinned, ends, steps=_steps
) -> None:
    """Run an item by kernels; where none covers these blocks, its steps one after another."""
    data = [blocks[v][0] for v in item.reads]
    if item.adds and data[1] is None:  # an identity: it is added where it is one
        item = replace(item, adds=False)
    direct = None
    for v, answer in ends:
        if v == item.value and direct is None and not item.partial:
            direct = answer.window(sel or {})
    made = launch.run(graph, sweep, item, data, sel, direct)
    if made is not None and item.partial:
        last, given = item.steps[-1], {item.term: made}
        blocks[item.value] = add_terms(graph, sweep, last, blocks, sel, writable, given)
    elif made is not None:
        blocks[item.value] = (made, made is not direct and has_own_memory(made))
    else:
        if item.kind == "first" and data[0] is None:
            blocks[sweep.seed] = seed_block(sweep, sel, graph.values[sweep.seed]), False
        kept = pinned.union(item.reads)
        steps(graph, sweep, list(item.steps), blocks, sel, writable, kept)
    for f in item.frees:
        if f not in pinned:
            del blocks[f]


def add_terms(
    graph,
    sweep,
    step: Step,
    blocks: Blocks,
    sel,
    writable: bool,
    made: Mapping[int, Tensor] = MappingProxyType({}),
    pinned: frozenset[int] | None = None,
):
    """The terms of a step added up; terms with more ties than the sum touch its diagonals only.

    ``made``: terms that a kernel has run. ``pinned``: blocks that stay; None: all do.
    """
    like = graph.values[step.value]
    if not sweep.reverse and (joint := _joint(graph, step)) is not None:
        return joint.join(_by_place(graph, sweep, step, blocks, sel)), True
    if not made and (whole := _filled(graph, sweep, step, blocks, sel)) is not None:
        return whole, True
    total, own = None, False
    sparse: list[tuple[Tensor | None, Layout]] = []
    for i, term in enumerate(step.terms):
        edge = term.map_in(graph)
        plain = term.route.out.tied == step.layout.tied
        if i in made:
            data, fresh = made[i], has_own_memory(made[i])
        else:
            data, theirs = blocks[term.other]
            if own and writable and plain and data is not None and edge.places(sweep.reverse):
                at = sweep.layouts[term.other]
                edge.window(total).add_(convert(data, at, term.route.mid, sel, total))
                continue
            mine = theirs and writable and pinned is not None and term.other not in pinned
            mine = mine and term.other in step.frees and step.reads.count(term.other) == 1
            data, fresh = edge.apply(
                data, mine, sweep.layouts[term.other], term.route, sweep.reverse, sel, graph.values[term.other],
            )  # fmt: skip
        if not plain:
            sparse.append((data, term.route.out))
            continue
        if data is None:
            data, fresh = one(like).expand(1, *like.shape), False
        if total is None:
            total, own = data, fresh
        elif own and writable and total.dtype == data.dtype:
            total.add_(data)
        elif fresh and writable and (data.dtype, data.shape) == (total.dtype, total.shape):
            total, own = data.add_(total), True
        else:
            total, own = total + data, True
    if sparse:
        if total is None:
            total = torch.zeros(
                step.layout.columns_of(sel), *like.shape, dtype=like.dtype, device=like.device
            )
        elif not (own and writable):
            total = total.clone(memory_format=torch.contiguous_format)
        for data, layout in sparse:
            scatter(total, step.layout, data, layout, sel, add=True)
        own = True
    return total, own


def _joint(graph: Graph, step: Step) -> Joint | None:
    """What takes all blocks of a step at once, if they have the same ties."""
    joint = step.terms[0].map_in(graph).whole
    if joint is None or any(t.route.out != step.layout for t in step.terms):
        return None
    return joint


def _by_place(graph: Graph, sweep: Sweep, step: Step, blocks: Blocks, sel) -> dict[int, Tensor]:
    """Blocks for a `Joint`."""
    found: dict[int, Tensor] = {}
    for term in step.terms:
        at, like = sweep.layouts[term.other], graph.values[term.other]
        block, _ = taken(blocks[term.other][0], False, at, term.route.mid, sel, like)
        found[term.map_in(graph).place] = block
    return found


def _filled(graph: Graph, sweep: Sweep, step: Step, blocks: Blocks, sel) -> Tensor | None:
    """The sum of terms that fill an axis side by side, where each is a block of as many ties as the sum."""
    if not step.terms[0].map_in(graph).places(sweep.reverse):
        return None
    edges = [term.map_in(graph) for term in step.terms]
    order = side_by_side(edges, sweep.reverse)
    if order is None:
        return None
    data = [blocks[term.other][0] for term in step.terms]
    plain = all(term.route.out.tied == step.layout.tied for term in step.terms)
    if not plain or any(d is None for d in data) or len({d.dtype for d in data}) > 1:
        return None
    parts = [
        convert(d, sweep.layouts[term.other], term.route.mid, sel, d)
        for term, d in zip(step.terms, data, strict=True)
    ]
    return torch.cat([parts[i] for i in order], edges[0].axis + 1)
