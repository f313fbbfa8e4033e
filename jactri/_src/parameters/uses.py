"""Where a computation uses its parameters: each use as cotangents times what the layer saw, as lettered arrays.

In the reverse sweep from the output every activation keeps the samples tied (see `layout`), and every value that is
made of parameters alone loses them: the edges in between are the uses. The Jacobian of a use is a product of the block
at its activation and what the edge multiplies by, an outer product for a Linear layer. Here both get letters, one for
each factor of their axes: those of the seed, by which blocks are tied to the output, and others, which belong to the
parameter or are summed. Pure: no tensor is touched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from ..maps.contraction import Expand, MatMul
from ..maps.convolution import ConvWeight
from ..maps.layout import FREE, Layout
from ..maps.letters import Letters, spell
from ..maps.linear_map import Cast, Diagonal, Identity, Permute, Scale, View
from ..maps.selection import Take
from ..plan.fusion import fused
from ..plan.samples import mixing_steps, sample_ties
from ..plan.sweep import Sweep, follow
from ..read.graph import Graph


@dataclass(frozen=True)
class Role:
    """What an edge multiplies cotangents by: "diagonal", "matrix", "patches", "rows" or "scale"."""

    kind: str
    owner: int
    edge: int
    letters: Letters


@dataclass(frozen=True)
class Use:
    """One use: the Jacobian of the output in the value ``root``, which is a parameter or made of parameters alone.

    The block at ``value``, whose axes are ``cotangent`` (first its ``free`` seeds), times the roles, summed over all
    letters that are neither of the seed nor in ``axes`` (those of the root's axes). ``pull``: the edge (owner, number)
    that is called a sample at a time instead, where it has no such form.
    """

    value: int
    root: int
    cotangent: Letters
    roles: tuple[Role, ...]
    axes: tuple[Letters, ...]
    sizes: dict[int, int]
    free: int
    pull: tuple[int, int] | None = None

    def role(self, *kinds: str) -> Role | None:
        """The one of these kinds, if there is one."""
        return next((r for r in self.roles if r.kind in kinds), None)

    def product(self, seeds: int) -> tuple[int, ...]:
        """The letters of the Jacobian as one array: what neither the output nor the root has is summed."""
        kept = {*range(seeds), *(letter for axis in self.axes for letter in axis)}
        every = {*self.cotangent, *(letter for r in self.roles for letter in r.letters)}
        return tuple(sorted(every & kept))

    def multiplied(self, seeds: int) -> bool:
        """Whether what the layer saw is multiplied in at once, as the product is no larger than the cotangents."""
        outer = self.role("matrix", "patches")
        if outer is None:
            return False
        made = self.product(seeds)
        summed = set(self.cotangent).intersection(outer.letters).difference(made)
        return bool(summed) and self.size(made) <= self.size(self.cotangent)

    def size(self, letters: Letters) -> int:
        """The entries of an array with these letters."""
        return prod([self.sizes[s] for s in set(letters)])


@dataclass(frozen=True, eq=False)
class Structure:
    """All uses of one computation, and the sweep that gives their blocks.

    ``batch`` are the seed's letters of the samples. ``inner``: the roots that are not parameters themselves.
    """

    sweep: Sweep
    uses: list[Use]
    batch: frozenset[int]
    inner: tuple[int, ...] = ()
    formed: frozenset[int] = frozenset()
    """The parameters behind ``inner``."""
    extra: float = 0.0
    """Bytes for each seed beside the blocks: Jacobians that are formed."""
    patches: float = 0.0
    """Bytes of the patches of convolutions,"""
    seen: float = 0.0
    """of those that are kept,"""
    kept: float = 0.0
    """of the factors beside them, for all entries,"""
    slopes: float = 0.0
    """and of the derivatives in the sweep."""


class SamplesMix(Exception):
    """The algebra does not show that samples stay apart: ``value`` is where they may meet."""

    def __init__(self, value: int):
        super().__init__(value)
        self.value = value


def looked_up(graph: Graph, n: int, tensors) -> list[int]:
    """The values that integer inputs, which no graph leads to, pick from parameters: there the samples begin.

    Known by an index that is one of ``tensors``, in their memory; where none is, by a number of rows of ``n`` times
    something.
    """
    memory = {t.untyped_storage()._cdata for t in tensors}
    sure, likely, behind = [], [], set()
    for v, value in enumerate(graph.values):
        if any(s in behind for s, _ in value.sources):
            behind.add(v)
            continue
        for _, edge in value.sources:
            index = getattr(edge, "index", None)
            if edge.structure != "gather" or not hasattr(index, "untyped_storage"):
                continue
            if index.untyped_storage()._cdata in memory:
                sure.append(v)
                behind.add(v)
            elif value.shape and value.shape[0] and value.shape[0] % n == 0:
                likely.append(v)
    return sure or likely


def find(graph: Graph, seed: int, params: list[int | None], data: list[int], picked: list[int]):
    """The `Structure` of a computation.

    ``data`` are the values that stand for its inputs, ``picked`` those of `looked_up`. Raises SamplesMix.
    """
    n = graph.values[seed].shape[0]
    sweep = follow(graph, seed, True, [*params, *data, *picked])
    batch = frozenset(t for _, t in sweep.layout.axes[0] if t != FREE)
    for v in (*data, *picked):
        layout = sweep.layouts.get(v)
        if layout is None or n == 1:
            continue
        if not (sample_ties(sweep, layout, graph) if v in data else batch <= layout.tied):
            raise SamplesMix(mixing_steps(graph, sweep, v)[0])
    if n == 1:
        active = set(data) | set(picked)
        for v, value in enumerate(graph.values):
            if any(s in active for s, _ in value.sources):
                active.add(v)
        active.intersection_update(sweep.layouts)
    else:
        active = {v for v, layout in sweep.layouts.items() if batch <= layout.tied}
    return _collect(graph, seed, params, active, sweep, batch)


def unstructured(graph: Graph, seed: int, params: list[int | None]) -> Structure:
    """The whole Jacobian as one use a parameter: for samples of which only a probe knows that they do not mix."""
    sweep = follow(graph, seed, True, list(params))
    batch = frozenset(t for _, t in sweep.layout.axes[0] if t != FREE)
    return _collect(graph, seed, params, set(), sweep, batch)


def _collect(graph: Graph, seed: int, params, active, sweep: Sweep, batch) -> Structure:
    leaves = {p for p in params if p is not None}
    edges = [
        (v, e)
        for v in sweep.layouts
        if v in active
        for e, (s, _) in enumerate(graph.values[v].sources)
        if s in sweep.layouts and s not in active and _above(graph, s, leaves)
    ]
    ends = [p for p in leaves if p in sweep.layouts and (p in active or not active)]
    targets = sorted({v for v, _ in edges}.union(ends))
    # the same sweep without the steps behind the uses: they may have split the seed further
    sweep = swept(graph, seed, targets)
    batch = frozenset(t for _, t in sweep.layout.axes[0] if t != FREE)
    uses = [_use(graph, sweep, v, e, leaves) for v, e in edges]
    for p in ends:
        trace = _Trace(graph, sweep.layouts[p])
        uses.append(trace.use(p, p))
    inner = tuple(sorted({u.root for u in uses} - leaves))
    extra = 0.0
    samples = graph.values[seed].shape[0]
    behind = frozenset(_behind(graph, inner) & leaves)
    for v in behind.union(inner, (u.root for u in uses if u.pull is not None)):
        extra += samples * prod(graph.values[v].shape) * graph.values[v].dtype.itemsize
    slopes = sum(
        prod(step.layout.shape) * graph.values[step.value].dtype.itemsize
        for step in sweep.steps
        if any(graph.values[t.owner].sources[t.edge][1].structure == "diagonal" for t in step.terms)
    )
    patches, seen, kept = _sizes(graph, uses, len(sweep.layout.seed))
    kept += extra * prod(graph.values[seed].shape[1:])
    return Structure(
        sweep, uses, batch, inner, behind, extra, patches, seen, kept, slopes=float(slopes)
    )


def swept(graph: Graph, seed: int, targets: list[int | None]) -> Sweep:
    """The sweep to the values at the uses."""
    return fused(graph, replace(follow(graph, seed, True, targets), alone=True))


def _sizes(graph: Graph, uses: list[Use], seeds: int) -> tuple[float, float, float]:
    """Bytes of all patches, of those that are kept, and of the other factors: blocks that are one counted once."""
    patches, seen, made, blocks = 0.0, 0.0, 0.0, {}
    for use in uses:
        if use.pull is not None:
            continue
        size = graph.values[use.value].dtype.itemsize
        once = use.multiplied(seeds)
        window = use.role("patches")
        if window is not None:
            patches += use.size(window.letters) * size
            seen += 0.0 if once else use.size(window.letters) * size
        if once or use.role("matrix", "patches", "rows") is None:
            made += use.size(use.product(seeds)) * size
        else:
            blocks[use.value] = use.size(use.cotangent) * size
    return patches, seen, made + sum(blocks.values())


def _behind(graph: Graph, values) -> set[int]:
    """All that some values are made of."""
    found, stack = set(), list(values)
    while stack:
        v = stack.pop()
        if v not in found:
            found.add(v)
            stack.extend(s for s, _ in graph.values[v].sources)
    return found


def _above(graph: Graph, value: int, leaves) -> bool:
    return not leaves.isdisjoint(_behind(graph, [value]))


def _use(graph: Graph, sweep: Sweep, v: int, e: int, leaves) -> Use:
    """The use of the edge ``e`` of the activation ``v``, followed down to the parameter as far as letters go."""
    trace = _Trace(graph, sweep.layouts[v])
    s, edge = graph.values[v].sources[e]
    if not trace.through(v, e, s, edge):
        return _Trace(graph, sweep.layouts[v]).pulled(v, e, s)
    while s not in leaves:
        sources = graph.values[s].sources
        if len(sources) != 1 or not trace.through(s, 0, *sources[0]):
            break
        s = sources[0][0]
    return trace.use(v, s)


def kind_of(use: Use) -> str:
    """What a use is, in words."""
    if use.pull is not None:
        return "a product a sample"
    names = {
        "matrix": "cotangent x activation", "patches": "cotangent x patches", "rows": "cotangent at rows",
    }  # fmt: skip
    return next((names[r.kind] for r in use.roles if r.kind in names), "cotangent")


class _Trace:
    """Letters of a block, as its use is followed from the activation to the parameter."""

    def __init__(self, graph: Graph, layout: Layout):
        self.graph = graph
        self.sizes = dict(enumerate(layout.seed))
        self.seeds = len(layout.seed)
        self.axes: list[list[int]] = [
            [t if t != FREE else self.new(n) for n, t in axis if n != 1] for axis in layout.axes
        ]
        self.free = len(layout.free)
        self.cotangent = [*layout.free, *(letter for axis in self.axes for letter in axis)]
        self.roles: list[tuple[str, int, int, list[int]]] = []
        self.outer = False
        """Whether what the layer saw has axes of its own in the parameter."""

    def new(self, size: int) -> int:
        letter = len(self.sizes)
        self.sizes[letter] = size
        return letter

    def use(self, value: int, root: int) -> Use:
        roles = tuple(Role(k, v, e, tuple(letters)) for k, v, e, letters in self.roles)
        axes = tuple(tuple(axis) for axis in self.axes)
        return Use(value, root, tuple(self.cotangent), roles, axes, self.sizes, self.free)

    def pulled(self, value: int, edge: int, root: int) -> Use:
        axes = tuple((self.new(n),) for n in self.graph.values[root].shape)
        cotangent = tuple(self.cotangent)
        return Use(value, root, cotangent, (), axes, self.sizes, self.free, (value, edge))

    def grouped(self, flat: list[int], shape) -> list[list[int]] | None:
        """The letters of one or more axes as those of axes of ``shape``, split where that is needed and possible."""
        todo, out = list(flat), []
        for size in shape:
            axis, need = [], size
            while need > 1:
                letter = todo.pop(0)
                n = self.sizes[letter]
                if need % n == 0:
                    axis.append(letter)
                    need //= n
                elif n % need == 0 and letter >= self.seeds:
                    parts = self.split(letter, need, n // need)
                    axis.append(parts[0])
                    todo.insert(0, parts[1])
                    need = 1
                else:
                    return None
            out.append(axis)
        return out

    def split(self, letter: int, *sizes: int) -> list[int]:
        """A letter as several, everywhere."""
        parts = [self.new(n) for n in sizes]
        spell(
            [self.cotangent, *self.axes, *(letters for _, _, _, letters in self.roles)],
            letter,
            parts,
        )
        return parts

    def through(self, owner: int, e: int, source: int, edge) -> bool:
        """Go on to the source of an edge, if letters can follow it there."""
        kind, shape = type(edge), self.graph.values[source].shape
        axes = self.axes
        if kind is Identity:
            return True
        if kind is Cast:
            return edge.source[1] == edge.target[1]
        if kind is Scale:
            self.roles.append(("scale", owner, e, []))
        elif kind is Permute:
            turned: list[list[int]] = [[] for _ in axes]
            for i, d in enumerate(edge.dims):
                turned[d] = axes[i]
            self.axes = turned
        elif kind is View:
            grouped = self.grouped([letter for axis in axes for letter in axis], shape)
            if grouped is None:
                return False
            self.axes = grouped
        elif kind is Expand:
            for a in edge.axes:
                axes[a] = []
        elif self.outer:
            return False
        elif isinstance(edge, Diagonal):
            flat = [letter for axis in axes for letter in axis]
            self.roles.append(("diagonal", owner, e, flat))
        elif isinstance(edge, MatMul):
            self._matrix(owner, e, edge, shape)
        elif kind is Take:
            row = self.new(edge.size)
            self.roles.append(("rows", owner, e, [*axes[edge.axis], row]))
            axes[edge.axis] = [row]
            self.outer = True
        elif kind is ConvWeight:
            return self._patches(owner, e, edge, shape)
        else:
            return False
        return True

    def _matrix(self, owner: int, e: int, edge: MatMul, shape) -> None:
        """A parameter times an activation, or the reverse: the axis that is summed is a new one."""
        left = edge.side == "left"
        axis = len(shape) - 2 if left else len(shape) - 1
        summed = [self.new(shape[axis])] if shape[axis] != 1 else []
        kept = self.axes[axis]
        letters = kept + summed if left else summed + kept
        if edge.key[2] == 3:
            letters = self.axes[0] + letters
        self.roles.append(("matrix", owner, e, letters))
        self.axes[axis] = summed
        self.outer = True

    def _patches(self, owner: int, e: int, edge: ConvWeight, shape) -> bool:
        if edge.geometry.transposed:
            return False
        g = edge.geometry.groups
        channels = self.grouped(self.axes[1], (g, shape[0] // g))
        if channels is None:
            return False
        samples, pixels = self.axes[0], [letter for axis in self.axes[2:] for letter in axis]
        window = [[self.new(n)] if n != 1 else [] for n in shape[1:]]
        flat = [letter for axis in window for letter in axis]
        self.roles.append(("patches", owner, e, [*samples, *channels[0], *flat, *pixels]))
        self.axes = [channels[0] + channels[1], *window]
        self.outer = True
        return True
