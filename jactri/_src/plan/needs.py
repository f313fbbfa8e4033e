"""What a sweep takes of the memory, and how many of its seeds run at once. Pure: no tensor is held."""

from __future__ import annotations

from math import ceil, prod
from typing import NamedTuple

from ..base.memory import MemoryLimitTooSmall
from ..maps.layout import FREE
from ..read.graph import Graph
from . import mixed, patches
from .sweep import Step, Sweep

CACHE_BYTES = 1 << 22
"""On a CPU, chunks of seeds are chosen so that the largest block has about this size (it stays in cache)."""

INDEX_BYTES = 48
"""What the place of an entry takes while it is looked up."""

SLACK = 0.15
"""The part of the predicted peak of blocks that stays free beside it, for what is not predicted (scratch, padding)."""

_SCALING = "diagonal", "scalar", "complex diagonal"

_PRODUCTS = "shared matrix", "batched matrix", "sparse matrix"
"""Structures whose result lies beside the block that they are given."""


def choose_chunks(
    graph: Graph,
    sweep: Sweep,
    limit: float,
    *,
    chunk_size: int | None,
    device: str,
    answer: Asked | None = None,
) -> tuple[dict[int, int], float]:
    """How many indices of each free seed factor to run at once, and the bytes that the sweep then takes (see `needs`).

    The last factors stay whole as long as possible. The seeds at once are at most ``chunk_size``; else as many
    as keep what it needs under ``limit`` bytes and, on a CPU, the largest block near `CACHE_BYTES`.
    Raises MemoryLimitTooSmall if one seed alone needs more than ``limit``.
    """
    freed: set[int] = set()
    for lay in sweep.layouts.values():
        freed.update(lay.free)
    factors = sorted(freed)
    sizes = [sweep.layout.seed[f] for f in factors]
    total = prod(sizes)

    def cut(count: int) -> dict[int, int]:
        return cut_seeds(factors, sizes, count)

    count = total
    if total > 1 and not sweep.windows:
        if chunk_size is not None:
            chunks = cut(chunk_size) if chunk_size < total else {}
            return chunks, needs(graph, sweep, chunks, answer)[0]
        largest = sweep.largest(graph)
        # a block that is written once and not read again gains nothing from a cache
        cached = device == "cpu" and largest > 1.5 * CACHE_BYTES
        if cached and sweep.bytes > 1.5 * sweep.ends(graph):
            some = max(1, int(CACHE_BYTES // max(largest / total, 1)))
            if ceil(total / some) * _weights(graph, sweep) < sweep.bytes:
                count = some
    chunks = cut(count) if count < total else {}
    while True:
        taken, need = needs(graph, sweep, chunks, answer)
        if need <= limit:
            return chunks, taken
        if count <= 1 or sweep.windows:
            raise too_small(need, limit)
        count = max(1, count // 2)
        chunks = cut(count)


def cut_seeds(factors: list[int], sizes: list[int], count: int) -> dict[int, int]:
    """At most ``count`` indices at once of seed factors, in equal chunks; the last factors stay whole if they can."""
    chunks, room = {}, max(1, count)
    for f, n in reversed(list(zip(factors, sizes, strict=True))):
        take = min(n, room)
        take = ceil(n / ceil(n / take))
        room = max(1, room // n)
        if take < n:
            chunks[f] = take
    return chunks


def _weights(graph: Graph, sweep: Sweep) -> float:
    """Bytes of the weights that every chunk reads."""
    return float(
        sum(
            t.map_in(graph).entries * graph.values[s.value].dtype.itemsize
            for s in sweep.steps
            for t in s.terms
        )
    )


def too_small(need: float, limit: float) -> MemoryLimitTooSmall:
    return MemoryLimitTooSmall(f"one seed at a time takes {need:.0f} bytes of {limit:.0f}", need)


class Asked(NamedTuple):
    """The form of the answer: one block a sample or the whole, and whether the caller gives the memory for it."""

    per_sample: bool | str
    given: bool
    sparse: bool = False
    kernels: str = ""
    """The backend by which kernels run the seed's blocks: "auto", "triton" where they are asked for, or none."""
    fused: bool = False
    """Whether kernels run blocks of other dtypes than the seed's, if not these."""


def peak_bytes(graph: Graph, sweep: Sweep, chunks: dict[int, int]) -> float:
    """Predicted bytes of live blocks at the worst moment of a sweep or product."""
    if isinstance(sweep, mixed.Join):
        return sweep.peak_bytes(chunks)
    if sweep.windows:
        return patches.peak_bytes(graph, sweep)
    return _of_blocks(graph, sweep, chunks)


def _of_blocks(graph: Graph, sweep: Sweep, chunks: dict[int, int]) -> float:
    """`peak_bytes` of a sweep from step to step, with the largest chunk of ``chunks`` in flight."""
    sel = {f: (0, c) for f, c in chunks.items()}

    # a view shares its source's memory: blocks are counted by the value that owns the memory
    nobody = -1
    root: dict[int, int] = dict.fromkeys(sweep.given or (sweep.seed,), nobody)
    users: dict[int, int] = {}
    size: dict[int, float] = {}

    def scales(step: Step) -> bool:
        first = step.terms[0]
        return len(step.terms) == 1 and first.map_in(graph).structure in _SCALING

    def between(step: Step) -> float:
        largest = max((t.spelled.most(sel) for t in step.terms if t.spelled is not None), default=0)
        return float(largest * graph.values[step.value].dtype.itemsize)

    def untied(step: Step) -> float:
        """The largest copy of a block that is made to drop ties, and read by a product."""
        return max(
            (
                t.route.mid.numel_of(sel) * float(graph.values[t.other].dtype.itemsize)
                for t in step.terms
                if t.map_in(graph).structure in _PRODUCTS
                and t.spelled is None
                and t.meeting is None
                and root[t.other] != nobody
                and t.route.mid.tied != sweep.layouts[t.other].tied
            ),
            default=0.0,
        )

    def derivative(step: Step) -> float:
        return prod(step.layout.shape) * graph.values[step.value].dtype.itemsize

    def repeated(step: Step) -> bool:
        """Whether every chunk runs the step, and so needs its derivative."""
        return bool(chunks) and not step.layout.tied.issuperset(chunks)

    # derivatives are kept for later chunks, which find all of them there from the start
    live = sum(derivative(s) for s in sweep.steps if scales(s) and repeated(s)) + _formed(
        graph, sweep
    )
    worst = 0.0
    turned: set[int] = set()  # blocks in channels-last memory, which a CPU's convolutions run in
    targets = {t for t in sweep.targets if t is not None}
    for step in sweep.steps:
        first = step.terms[0]
        edge = first.map_in(graph)
        behind = root[first.other]
        scaling = scales(step)
        stored = sweep.stored(graph, step.value, sel)
        # a block that is used for the last time, and by nobody else, is scaled in place, if it is not expanded
        meets = first.meeting is not None and first.meeting.scales(sweep.reverse)
        last = (scaling or meets) and first.other in step.frees and users.get(behind) == 1
        reused = last and size[behind] >= stored
        extra = 0.0
        if step.shares or reused:
            root[step.value] = behind if reused or not first.route.moves else nobody
        else:
            root[step.value] = step.value
            size[step.value] = stored
            live += stored
            if len(step.terms) > 1 or edge.structure == "opaque":
                extra = size[step.value]
        if edge.structure == "half complex function":  # copies of half a spectrum
            read = first.route.mid.numel_of(sel) * graph.values[first.other].dtype.itemsize
            extra += 3 * max(stored, read)
        extra += between(step) + untied(step)
        if first.meeting is not None:
            copied = first.meeting.product.copies(chunks)
            extra += copied * graph.values[step.value].dtype.itemsize
        if edge.structure == "convolution" and graph.values[step.value].device.type == "cpu":
            if first.other not in turned:
                read = graph.values[first.other].dtype.itemsize
                extra += first.route.mid.numel_of(sel) * read
            if step.layout.shape[1] > 1 and (sweep.reverse or first.route.mid.shape[1] > 1):
                turned.add(step.value)
        elif scaling and first.other in turned:
            turned.add(step.value)
        if scaling and step.flops and not repeated(step):  # with no flops, it is the block itself
            extra += derivative(step)
            if not sweep.alone:
                live += derivative(step)
                extra -= derivative(step)
        here = root[step.value]
        if here != nobody:
            users[here] = users.get(here, 0) + 1
        worst = max(worst, live + extra)
        for f in step.frees:
            r = root.get(f, nobody)
            if r == nobody or f in targets:
                continue
            users[r] -= 1
            if users[r] == 0:
                live -= size[r]
    return worst


def _formed(graph: Graph, sweep: Sweep) -> float:
    """Bytes of what the maps of a sweep form, and keep."""
    found: dict[int, int] = {}
    for step in sweep.steps:
        for t in step.terms:
            for v, e in t.path or ((t.owner, t.edge),) if t.meeting is None else ():
                for formed in graph.values[v].sources[e][1].forms:
                    found[id(formed)] = formed.nbytes
    return float(sum(found.values()))


def answer_bytes(graph: Graph, sweep: Sweep, target: int, per_sample: bool | str) -> float:
    """Bytes of the Jacobian between the seed of a sweep and a target."""
    seed, value = graph.values[sweep.seed].shape, graph.values[target].shape
    numel = prod(seed) * prod(value)
    if per_sample:
        numel //= seed[0]
    return float(numel * graph.values[target].dtype.itemsize)


def needs(
    graph: Graph, sweep: Sweep, chunks: dict[int, int], answer: Asked | None
) -> tuple[float, float]:
    """Predicted bytes that a sweep takes at its worst, and that must be free for it (with `SLACK`).

    Its part of the answer is included (None: blocks are the answer).
    """
    peak = peak_bytes(graph, sweep, chunks)
    taken = _with_answer(graph, sweep, chunks, answer, peak)
    return taken, taken + SLACK * peak


def _with_answer(graph: Graph, sweep: Sweep, chunks, answer: Asked | None, peak: float) -> float:
    """The bytes of blocks, ``peak``, and of the answer.

    Chunks are written to an answer that is there from the start; a block that comes whole becomes the answer if it
    has its form, and is copied to it at the end if not.
    """
    targets = {t for t in sweep.targets if t is not None}
    if sweep.patterns:
        return max(peak + _stored(graph, sweep, targets), _gathered(graph, sweep, targets, answer))
    if sweep.given and chunks:
        return peak + sweep.ends(graph)
    if answer is None or answer.given:
        return peak
    whole = sum(answer_bytes(graph, sweep, t, answer.per_sample) for t in targets)
    if chunks:
        return peak + whole
    shares = {s.value: s.shares for s in sweep.steps}
    keep: frozenset[int] = frozenset()
    if answer.per_sample and not sweep.summed and sweep.layout.axes:
        keep = frozenset(t for _, t in sweep.layout.axes[0] if t != FREE)
    end = 0.0
    for t in targets:
        layout = sweep.layouts[t]
        if not shares.get(t, False):
            end += sweep.stored(graph, t)
        if shares.get(t, False) or layout.tied != keep:
            end += answer_bytes(graph, sweep, t, answer.per_sample)
    return max(peak, end)


def _stored(graph: Graph, sweep: Sweep, targets) -> float:
    """Bytes of the whole blocks from which entries are read."""
    if sweep.windows:
        return sum(patches.block_bytes(graph, sweep, t) for t in targets)
    return sweep.ends(graph)


def _gathered(graph: Graph, sweep: Sweep, targets, answer: Asked | None) -> float:
    """Bytes while the entries of blocks are put in their places."""
    total = _stored(graph, sweep, targets)
    for t in targets:
        size, pattern = graph.values[t].dtype.itemsize, sweep.patterns[t]
        nnz = pattern.nnz
        shape = graph.values[t].shape
        each = pattern.sample(shape[0]) if shape else None  # the places are those of one sample
        total += nnz * size + (each or pattern).nnz * INDEX_BYTES
        if answer is not None and answer.kernels and not answer.sparse and pattern.bands:
            total -= (each or pattern).nnz * INDEX_BYTES + nnz * size  # written out from the block
        if answer is not None and answer.sparse:
            axes = len(graph.values[t].shape) + len(graph.values[sweep.seed].shape)
            total += nnz * (size + 8 * axes)
        elif answer is None or not answer.given:
            total += answer_bytes(graph, sweep, t, answer is not None and answer.per_sample)
    return total
