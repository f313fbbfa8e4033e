"""Mixed mode: partial Jacobians between cut points, multiplied where they meet. Pure: it holds no tensor.

A *cut* is a value through which every path from an input to an output goes: with it, ``dy/dx = dy/dc dc/dx``. A
bottleneck is worth cutting at: an autoencoder 784-32-784 needs 32 seeds in each half and one product, not 784 seeds
all the way. `best` is the dynamic program of matrix chain multiplication (Griewank and Walther, Evaluating
Derivatives, 2nd edition, SIAM 2008, section 10.3: vertex elimination on a chain) over the cuts: every segment
between two of them is a forward sweep, a reverse sweep, or a product of two shorter ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

from ..maps.layout import FREE, Layout
from ..maps.letters import Axes, Groups, Letter, Letters, Network, Unaligned, groups
from ..read.graph import Graph
from .factoring import swept
from .sweep import Sweep

MOST_CUTS = 8
"""Cuts that `best` considers, the narrowest: it makes two sweeps for every pair of them."""


@dataclass(frozen=True)
class Partial:
    """One partial Jacobian: the block of ``value`` in a sweep or product that was made."""

    made: Sweep
    value: int

    @property
    def layout(self) -> Layout:
        return self.made.layouts[self.value]


@dataclass(frozen=True)
class Product:
    """How two partials are multiplied: a letter for each dim of both blocks and of the result.

    Letters are those of an einsum: one that both blocks and the result have is a batch index, one that the result
    lacks is summed. ``first`` and ``second`` name the dims of the blocks after they are split to these letters.
    """

    first: Letters
    second: Letters
    out: Letters
    sizes: tuple[int, ...]
    """By letter."""
    seeds: Letters
    """The letter of each seed factor of the result."""
    free: int
    """How many letters of the result are seeds; those of the value's axes follow."""

    @property
    def groups(self) -> Groups:
        """The letters by their part in a batched product; rows are those of ``second``, columns of ``first``."""
        return groups(self.second, self.first, self.out)

    def scales(self, block: Letters) -> bool:
        """Whether entries of a block with these letters are multiplied one by one, and so may be overwritten."""
        return block == self.out and {*self.first, *self.second} == {*block}

    def copies(self, chunks: dict[int, int]) -> int:
        """Elements that are copied to bring operands and result into the order of a batched product, or out of it.

        ``chunks``: by seed factor of the result, how much of it a chunk takes. Blocks are taken to be contiguous.
        """
        batch, rows, inner, columns = self.groups
        if not inner:
            return 0
        sel = {self.seeds[f]: size for f, size in chunks.items()}
        total = 0
        for dims, parts in (
            (self.first, (batch, inner, columns)),
            (self.second, (batch, rows, inner)),
            ((*batch, *rows, *columns), (self.out[: self.free],)),
        ):
            if not all(_merge(dims, part) for part in parts):
                total += prod(sel.get(c, self.sizes[c]) for c in dims)
        return total


def _merge(dims, part) -> bool:
    """Whether dims that are contiguous in the order of ``dims`` merge to one in the order of ``part``."""
    at = [dims.index(c) for c in part]
    return all(b == a + 1 for a, b in itertools.pairwise(at))


@dataclass(frozen=True, eq=False)
class Join(Sweep):
    """Products of partial Jacobians at a cut, as the last stage of a sweep in reverse from ``seed``.

    ``first``: by target, the partial between it and the cut; ``second``: the partial between the cut and the seed.
    """

    at: int = -1
    second: Partial | None = None
    first: dict[int, Partial] = field(default_factory=dict)
    products: dict[int, Product] = field(default_factory=dict)

    @property
    def direction(self) -> str:
        return "product"

    @property
    def values(self) -> list[int]:
        return list(self.first)

    itemsizes: dict[int, int] = field(default_factory=dict)

    def of(self, ready: dict[Sweep, Sweep]) -> Join:
        """The same products, of what the partials' sweeps have become."""

        def now(partial: Partial) -> Partial:
            return Partial(ready[partial.made], partial.value)

        first = {v: now(p) for v, p in self.first.items()}
        return replace(self, first=first, second=now(self.second))

    def peak_bytes(self, chunks: dict[int, int]) -> float:
        """Bytes of the results with the largest chunk in flight, and of the copies that the last one makes."""
        sel = {f: (0, c) for f, c in chunks.items()}
        total, last = 0.0, 0.0
        for v, p in self.products.items():
            total += self.layouts[v].numel_of(sel) * self.itemsizes[v]
            last = max(last, p.copies(chunks) * self.itemsizes[v])
        return total + last


def product(
    first: Partial, second: Partial, reverse: bool = True
) -> tuple[Product, Layout, Layout] | None:
    """How ``second`` (cut to target) times ``first`` (source to cut) is computed.

    Returns it with the layout of the result as the block of the source in a reverse sweep from the target (of the
    target, in a forward sweep), and the identity layout of that sweep; None where the two factor the cut's axes in ways
    that have nothing in common.
    """
    network = Network()
    (a, to_source, to_cut), (b, from_cut, to_target) = (_ends(network, p) for p in (first, second))
    try:
        network.identify(to_cut, from_cut)
    except Unaligned:
        return None
    sizes = network.sizes
    if not reverse:
        to_source, to_target = to_target, to_source
    seeds = [c for axis in to_target for c in axis]
    index = {c: s for s, c in enumerate(seeds)}
    identity = Layout(
        tuple(tuple((sizes[c], index[c]) for c in axis) or ((1, FREE),) for axis in to_target),
        tuple(sizes[c] for c in seeds),
    )
    layout = Layout(
        tuple(
            tuple((sizes[c], index.get(c, FREE)) for c in axis) or ((1, FREE),)
            for axis in to_source
        ),
        identity.seed,
    )
    values = [c for axis in to_source for c in axis]
    out = [c for c in seeds if c not in values] + values
    used = {c: i for i, c in enumerate(dict.fromkeys((*a, *b)))}

    def short(letters):
        return tuple(used[c] for c in letters)

    found = Product(
        short(a), short(b), short(out), tuple(sizes[c] for c in used), short(seeds),
        len(out) - len(values),
    )  # fmt: skip
    return found, layout, identity


def _ends(network: Network, partial: Partial) -> tuple[list[Letter], Axes, Axes]:
    """The letters of a partial's dims, of its source and of its target."""
    block = network.block(partial.made.layout, partial.layout)
    seed, value = block.ends
    return (block.dims, value, seed) if partial.made.reverse else (block.dims, seed, value)


def cuts(graph: Graph) -> list[int]:
    """The values, other than inputs and outputs, through which every path from an input to an output goes."""
    values = graph.values
    ins = {v for v in graph.inputs if v is not None}
    outs = {v for v in graph.outputs if v is not None}
    up, down = set(), set(ins)
    for v in range(len(values)):
        if any(s in down for s, _ in values[v].sources):
            down.add(v)
    for v in range(len(values) - 1, -1, -1):
        if v in outs or v in up:
            up.add(v)
            up.update(s for s, _ in values[v].sources)
    on = [v for v in range(len(values)) if v in up and v in down]
    if not on:
        return []
    first, last = max(i for i in ins if i in up), min(o for o in outs if o in down)
    reach = [0] * (len(values) + 1)  # the furthest end of an edge that starts before a value
    for v in on:
        for s, _ in values[v].sources:
            if s in down:
                reach[s] = max(reach[s], v)
    found, furthest = [], 0
    for v in on:
        if first < v < last and furthest <= v:
            found.append(v)
        furthest = max(furthest, reach[v])
    return found


def narrow_cuts(graph: Graph) -> list[int]:
    """The cuts at which meeting can pay: those that are narrower than both ends."""
    ends = [
        sum(prod(graph.values[v].shape) for v in side if v is not None)
        for side in (graph.inputs, graph.outputs)
    ]
    return [v for v in cuts(graph) if prod(graph.values[v].shape) < min(ends)]


def may_pay(ways: Iterable[list[Sweep]], seconds: Callable[..., float], step: float) -> bool:
    """Whether a cut can save what it is worth to look for: it saves seeds, and no steps, of ``step`` seconds each."""
    best = min(ways, key=lambda sweeps: seconds(*sweeps))
    python = step * sum(len(s.items or s.steps) for s in best)
    return seconds(*best) - python > max(step, python / 10)


LONG = 512
"""Values from which one direction will do where no other can cost less."""


def settled(graph: Graph, sweeps: list[Sweep], seconds: Callable[..., float], step: float) -> bool:
    """Whether one direction of a long graph will do: steps are what it costs, of which any other has as many."""
    return len(graph.values) >= LONG and not may_pay([sweeps], partial(seconds, graph), step)


@dataclass
class Table:
    """All partial Jacobians between two levels, by (target, source), and what has to be made for them, in order."""

    partials: dict[tuple[int, int], Partial]
    makes: list[Sweep]
    seconds: float
    name: str


def best(
    graph: Graph, at: list[int], seconds: Callable[[Sweep], float], joined: bool = False
) -> Table | None:
    """The cheapest way to the Jacobians of all outputs, by a dynamic program over the cuts ``at``.

    ``seconds`` predicts the time of a sweep or product. ``joined``: a product is the last stage in any case; None if
    it must be and cannot.
    """
    if len(at) > MOST_CUTS:
        at = sorted(sorted(at, key=lambda v: prod(graph.values[v].shape))[:MOST_CUTS])
    levels = [
        [v for v in dict.fromkeys(graph.inputs) if v is not None],
        *([v] for v in at),
        [v for v in dict.fromkeys(graph.outputs) if v is not None],
    ]
    n = len(levels)
    tables: dict[tuple[int, int], Table | None] = {}
    for span in range(1, n):
        for a in range(n - span):
            b = a + span
            options = (
                [] if joined and span == n - 1 else _sweeps(graph, levels[a], levels[b], seconds)
            )
            for c in range(a + 1, b):
                table = _join(graph, tables[a, c], tables[c, b], levels[c][0], seconds)
                if table is not None:
                    options.append(table)
            tables[a, b] = min(options, key=lambda t: t.seconds, default=None)
    return tables[0, n - 1]


def _sweeps(graph: Graph, sources, targets, seconds) -> list[Table]:
    """Forward and reverse from one level to another."""
    out = []
    for reverse, name in ((False, "forward"), (True, "reverse")):
        seeds, ends = (targets, sources) if reverse else (sources, targets)
        made = [swept(graph, seed, reverse, list(ends), index=i) for i, seed in enumerate(seeds)]
        partials = {}
        for sweep in made:
            for end in sweep.targets:
                if end is not None:
                    pair = (sweep.seed, end) if reverse else (end, sweep.seed)
                    partials[pair] = Partial(sweep, end)
        out.append(Table(partials, made, sum(seconds(s) for s in made), name))
    return out


def _join(graph: Graph, below: Table | None, above: Table | None, at: int, seconds) -> Table | None:
    """The products of two tables at a cut, or None where their blocks cannot be multiplied."""
    if below is None or above is None:
        return None
    partials: dict[tuple[int, int], Partial] = {}
    joins: list[Sweep] = []
    for i, (target, _) in enumerate(above.partials):
        second = above.partials[target, at]
        first = {source: partial for (_, source), partial in below.partials.items()}
        found = {source: product(partial, second) for source, partial in first.items()}
        if None in found.values():
            return None
        products = {source: how for source, (how, _, _) in found.items()}
        layouts = {source: layout for source, (_, layout, _) in found.items()}
        identities = {identity for _, _, identity in found.values()}
        if len(identities) > 1:  # one refinement of the target's axes serves all sources
            return None
        sizes = {source: graph.values[source].dtype.itemsize for source in found}
        join = Join(
            True, target, identities.pop(), [], layouts, list(found), index=i,
            flops=sum(2.0 * prod(p.sizes) for p in products.values()),
            bytes=float(sum(layouts[s].numel * sizes[s] for s in found)),
            at=at, second=second, first=first, products=products, itemsizes=sizes,
        )  # fmt: skip
        joins.append(join)
        partials.update({(target, source): Partial(join, source) for source in found})
    total = below.seconds + above.seconds + sum(seconds(j) for j in joins)
    shape = "x".join(map(str, graph.values[at].shape))
    name = f"({below.name} to {shape}, {above.name} from there)"
    return Table(partials, [*below.makes, *above.makes, *joins], total, name)


def stages(graph: Graph, table: Table) -> tuple[list[Sweep], list[Sweep]]:
    """The parts of a mixed plan, and the products that are the answers: one for each output."""
    last = {target: p.made for (target, _), p in table.partials.items()}
    ends = {id(m) for m in last.values()}
    parts = [m for m in table.makes if id(m) not in ends]
    sweeps: list[Sweep] = []
    for j, v in enumerate(graph.outputs):
        join = last.get(v)
        if isinstance(join, Join):
            targets = [i if i in join.first else None for i in graph.inputs]
            sweeps.append(replace(join, index=j, targets=targets))
    return parts, sweeps
