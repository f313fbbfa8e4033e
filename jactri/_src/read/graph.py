"""The only reader of autograd's graph: nodes, edges and saved values become a `Graph` of linear maps.

Each value of the graph lists the values that it depends on and, for each, the `LinearMap` of that dependence. Nodes
that no input reaches are not read. Rules (see `rules`) turn an autograd node into values; a node without a rule becomes
`Opaque` maps, which call the node itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from ...kernels.support import Factor
from ..base.classes import PLAIN, plain
from ..base.elsewhere import (
    DISTRIBUTED,
    check_here,
    check_saved,
    check_value,
    is_distributed,
)
from ..base.recomputed import Recomputed
from ..maps.contraction import Expand, Sum
from ..maps.linear_map import Cast, Diagonal, Identity, Kept, LinearMap, Permute, Scale, Shape, View
from ..maps.mask import Mask
from ..rules import REGISTRY, MissingValue, Record, normal_axis, of_function, record_of
from . import complexes, overriding, ranges
from .behind import Walk
from .opaque import Opaque, OpaqueCall, refuse_or_log
from .unrecorded import ERROR, MARKED, Unrecorded
from .writes import Writes

_ACCUMULATE = torch._C._functions.AccumulateGrad
_IDENTITY = Identity()
_NUMBERS = frozenset((int, float, bool, str, type(None)))

T = TypeVar("T")

Source = tuple[int, LinearMap]
Others = dict[int, tuple[tuple[int, ...], tuple[LinearMap, ...], int]]


class UnsupportedGraph(Exception):
    """The graph holds what blocks cannot represent (complex, sparse, nested values), or hooks that change gradients.

    ``graph``: what can be read of it; ``linear``: whether gradients are linear in cotangents, ``twice``: recorded as
    depending on these; ``why``: why they must not be differentiated, or None.
    """

    graph: Graph | None = None
    linear = True
    why: str | None = None

    def __init__(self, what: str = "", twice: bool = True):
        super().__init__(what)
        self.twice = twice


class Value:
    """One tensor of the computation that depends on an input."""

    __slots__ = ("device", "dtype", "op", "shape", "sources")

    def __init__(self, op: str, shape: Shape, dtype, device, sources: tuple[Source, ...]):
        self.op, self.shape, self.sources = op, shape, sources
        self.dtype, self.device = dtype, device


class Graph:
    """Values in an order in which sources come first, and where the inputs and outputs are among them.

    ``inputs[i]`` and ``outputs[j]`` are indices into ``values``, None where an input is not used or an output depends
    on none. ``key`` is hashable and determines every plan for the graph. ``layers`` names the layers of values while
    somebody looks (see ranges.py), else None. ``recorded`` is the graph as it was read, where this one was made of it
    (see folding.py), else None. ``complex``: whether pairs of reals stand for complex numbers in it. ``others``:
    another way to a value (see joining.py): sources, their maps, entries saved.
    """

    __slots__ = ("complex", "inputs", "key", "layers", "looked", "others", "outputs", "recorded", "values")  # fmt: skip

    def __init__(self, values, inputs, outputs, key, layers: dict[int, str] | None = None):
        self.values, self.inputs, self.outputs, self.key = values, inputs, outputs, key
        self.layers = layers
        self.recorded: Graph | None = None  # itself would be a cycle
        self.complex, self.looked = False, dict[object, Any]()  # see poles.py, supports.py
        self.others: Others = {}


class Reader:
    """Builds a `Graph`. Rules see it with the node that is being read: its saved values, sources and shape."""

    record: Record | None
    """That of the current node."""
    hooks = True
    """Whether hooks on gradients are looked for."""
    constants = False
    """Whether the node has an operand without a graph, whose memory may be gone (see elsewhere.py)."""
    complex = False
    """Whether a value is complex."""
    pairs = True
    """Whether the graph then holds pairs of reals in its place (see `complexes`)."""
    joins = True
    """Whether several writes may be read as one."""
    writes: Writes

    def __init__(self):
        self.values: list[Value] = []
        self._key: list[object] = []
        self._same: dict[object, Any] = {}  # see `once`
        self.others: Others = {}
        # nodes of distances: the value, what emits its square; and products that were read as such
        self.distances: dict[object, tuple[int, Callable[[Reader], int]]] = {}
        self.smooth: set[int] = set()
        self.overrides = overriding.reading()
        self.outputs: Sequence[Tensor] = ()
        self.recomputed = Recomputed()

    def _turn_to(self, node, src: list[int | None]) -> None:
        """Make a node the current one: ``meta`` is what autograd knows of its outputs, ``shape`` etc. of the first.

        What is asked of a node is asked once: attributes of autograd's nodes are made anew at every look.
        """
        self.node, self.src = node, src
        name, once = node.name(), self._same.setdefault
        self.name = once(name, name)
        self._known: dict[str, object] = {}  # what was read of it
        self.meta = meta = node._input_metadata
        first = meta[0]
        shape, device = tuple(first.shape), first.device
        self.shape, self.dtype, self.device = once(shape, shape), first.dtype, once(device, device)
        if len(meta) > 1 or self.dtype.is_complex or first.is_nested_tensor:
            for m in meta:
                if m.is_nested_tensor:
                    raise UnsupportedGraph(f"a nested tensor from {self.name}")
                if m.dtype.is_complex:
                    if m.dtype is torch.complex32 or not self.dtype.is_complex:
                        complexes.refuse(self, m.dtype)
                    self.complex = True

    def refuse(self, what: str) -> NoReturn:
        """For rules: autograd computes a function whose graph holds this."""
        raise UnsupportedGraph(what)

    # -- the current node -------------------------------------------------------------------------

    def saved(self, name: str):
        """A value that the node saved for its backward, as it is. Raises what torch raises if it was freed.

        Each is read once: hooks may compute it anew.
        """
        if name in self._known:
            return self._known[name]
        value = getattr(self.node, "_saved_" + name)
        kind = value.__class__
        if kind in PLAIN:
            if self.constants:
                check_here(value, "a tensor")
        elif kind not in _NUMBERS:
            value = plain(value)
            if self.constants:
                check_value(value)
        self._known[name] = value
        return value

    def check_memory(self) -> None:
        """Raise if what the node saved is gone: for rules that call the node."""
        if self.constants:
            check_saved(self.node, self.saved)

    def has(self, name: str) -> bool:
        return hasattr(self.node.__class__, "_saved_" + name)

    @property
    def call(self) -> Callable:
        """The node itself, a function of cotangents, which may be called later."""
        return self.recomputed.calling(self.node)

    def tensor(self, name: str) -> Tensor:
        """A saved tensor that the rule cannot do without."""
        value = self.saved(name)
        if value is None:
            raise MissingValue(name)
        return value

    def axis(self, name: str, ndim: int) -> int:
        """A saved dimension, counted from 0."""
        return normal_axis(self.saved(name), ndim)

    def axes(self, name: str, ndim: int) -> Shape:
        """Saved dimensions counted from 0; none given means all."""
        dims = self.saved(name)
        if dims is None or len(dims) == 0:
            return tuple(range(ndim))
        return tuple(sorted(normal_axis(d, ndim) for d in dims))

    def per_axis(self, name: str, ndim: int, default: Shape = ()) -> Shape:
        """A saved list with an entry for each of ``ndim`` axes.

        Autograd saves it as the caller gave it: one entry may stand for all axes, and none for ``default``.
        """
        found = tuple(self.saved(name)) or default
        return found * ndim if len(found) == 1 else found

    def unsupported(self, what: str) -> NoReturn:
        """The node holds what blocks cannot follow, nor autograd through its backward."""
        raise UnsupportedGraph(f"{what} ({self.name})", twice=False)

    def visit(self, node, src: list[int | None]) -> tuple[int | None, ...]:
        """The values of a node's outputs, by an override of the caller's or as it is understood."""
        self._turn_to(node, src)
        found = None if self.overrides is None else self.overrides.read(self)
        return self.understand() if found is None else found

    def understand(self) -> tuple[int | None, ...]:
        """The values of the current node's outputs, by its rule or by calling it."""
        if self.complex and (found := complexes.read(self)) is not None:
            return found
        self.record = record = REGISTRY.get(self.name) or of_function(self.node)
        if record is not None and record.read is not None:
            mark = len(self.values)
            try:
                ids = record.read(self)
            except MissingValue:
                ids = None
            if ids is not None:
                return ids if ids.__class__ is tuple else (ids,)
            del self.values[mark:], self._key[mark:]
        return self.opaque()

    # -- values -----------------------------------------------------------------------------------

    def emit(
        self, sources: Sequence[Source], shape: Shape, dtype=None, op: str | None = None
    ) -> int:
        """Add a value; ``dtype`` defaults to the node's. Returns its index."""
        return self.append(op or self.name, shape, dtype or self.dtype, self.device, tuple(sources))

    def append(self, op, shape, dtype, device, sources) -> int:
        values, at = self.values, len(self._key)
        values.append(Value(op, shape, dtype, device, sources))
        self._key.append(self.once((op, shape, dtype, *[(at - s, m.key) for s, m in sources])))
        return at

    def once(self, part: T) -> T:
        """A shape or a part of the key, or what is equal and there: a long graph has the same many times."""
        return self._same.setdefault(part, part)

    def replace(self, values: Sequence[tuple]) -> None:
        """Put others, as `append` takes them, in the place of all values."""
        self.values, self._key = [], []
        for value in values:
            self.append(*value)

    def single(self, source: int, linear_map: LinearMap, shape: Shape | None = None) -> int:
        """A value with one source; shape and dtype are the source's unless given."""
        v = self.values[source]
        shape = v.shape if shape is None else shape
        return self.append(self.name, shape, v.dtype, v.device, ((source, linear_map),))

    def view(self, source: int, shape: Shape) -> int:
        old = self.values[source].shape
        return source if old == shape else self.single(source, View(old, shape), shape)

    def permute(self, source: int, dims: Shape) -> int:
        if dims == tuple(range(len(dims))):
            return source
        old = self.values[source].shape
        return self.single(source, Permute(dims), tuple(old[d] for d in dims))

    def expand(self, source: int, shape: Shape) -> int:
        """Broadcast to ``shape``."""
        old = self.values[source].shape
        if old == shape:
            return source
        aligned = (1,) * (len(shape) - len(old)) + old
        source = self.view(source, aligned)
        axes = tuple(a for a, (m, n) in enumerate(zip(aligned, shape, strict=True)) if m != n)
        return self.single(source, Expand(axes, shape), shape) if axes else source

    def sum(self, source: int, axes: Shape, keepdim: bool = False) -> int:
        shape = self.values[source].shape
        kept = tuple(1 if a in axes else n for a, n in enumerate(shape))
        if axes:
            source = self.single(source, Sum(tuple(axes), shape), kept)
        if keepdim:
            return source
        return self.view(source, tuple(n for a, n in enumerate(shape) if a not in axes))

    def diagonal(
        self,
        source: int,
        derivative: Callable[[], Tensor] | Tensor,
        fresh: bool = False,
        activation: Callable[[], Factor | None] | None = None,
    ) -> int:
        """Scaling by a derivative; ``fresh=True`` where the callable returns memory that nobody else holds."""
        return self.single(source, Diagonal(derivative, fresh, activation))

    def mask(
        self,
        source: int,
        derivative: Callable[[], Tensor] | Tensor,
        keep: Callable[[], Tensor] | None = None,
        fresh: bool = False,
        activation: Callable[[], Factor | None] | None = None,
    ) -> int:
        """`diagonal` for an op that selects in its own backward, by ``keep`` or by a derivative of 0 and 1."""
        return self.single(source, Mask(derivative, fresh, activation, keep))

    def later(self) -> Callable[[], Factor | None] | None:
        """How kernels compute the derivative of the current node, to be asked later; None where its op has no form."""
        form = self.record.form
        return None if form is None else self.recomputed.factor(self.node, form)

    def scale(self, source: int, factor: float) -> int:
        return source if factor == 1 else self.single(source, Scale(factor))

    def cast(self, source: int) -> int:
        """To the dtype and device of the node's output."""
        v = self.values[source]
        if v.dtype == self.dtype and v.device == self.device:
            return source
        if v.dtype.is_complex != self.dtype.is_complex:
            return complexes.cast(self, source)
        edge = Cast((v.dtype, v.device), (self.dtype, self.device))
        return self.append(self.name, v.shape, self.dtype, self.device, ((source, edge),))

    def match(self, source: int) -> int:
        """Broadcast and cast to the node's output, as a type-promoting elementwise op does."""
        v = self.values[source]
        if v.shape == self.shape and v.dtype == self.dtype and v.device == self.device:
            return source
        return self.cast(self.expand(source, self.shape))

    def add(self, terms: Sequence[Source], shape: Shape | None = None) -> int:
        """The sum of terms of one shape (the node's unless given), in their dtype; a lone identity adds nothing."""
        source, edge = terms[0]
        if len(terms) == 1 and isinstance(edge, Identity):
            return source
        v = self.values[source]  # the node's first output may be one that nobody asked for
        shape = self.shape if shape is None else shape
        return self.append(self.name, shape, v.dtype, v.device, tuple(terms))

    def plus(self, ids: Sequence[int | None]) -> int:
        """The sum of values, each broadcast and cast to the node's output."""
        if len(ids) == 1:
            return self.match(ids[0])
        return self.add([(self.match(s), _IDENTITY) for s in ids if s is not None])

    def opaque(self, kept: dict[tuple[int, int], Kept] | None = None) -> tuple[int, ...]:
        """Values for each output of the node that call the node itself.

        A rule that knows the axes which an edge leaves unmixed gives them in ``kept``, by (output, edge).
        """
        ids = self.called(kept)
        shapes = [self.values[s].shape for s in self.src if s is not None]
        refuse_or_log(self.name, tuple(self.meta[0].shape), shapes)
        return ids

    def called(self, kept: dict[tuple[int, int], Kept] | None = None) -> tuple[int, ...]:
        """As `opaque`, whatever the mode of the fallback."""
        if getattr(self.node, "_forward_cls", None) is Unrecorded:
            raise RuntimeError(self.node.why)
        self.check_memory()
        shapes = {e: self.values[s].shape for e, s in enumerate(self.src) if s is not None}
        call = OpaqueCall(self.node, self.meta, shapes, self.outputs, self.recomputed)
        known = record_of(self.name).kept
        ids: list[int | None] = []
        for nr, m in enumerate(self.meta):
            if not (m.dtype.is_floating_point or m.dtype.is_complex):
                ids.append(None)
                continue
            sources = []
            for edge, s in enumerate(self.src):
                if s is not None:
                    v = self.values[s]
                    if kept is None:
                        pairs = () if known is None else known(v.shape, tuple(m.shape))
                    else:
                        pairs = kept.get((nr, edge), ())
                    sources.append((s, Opaque(call, nr, edge, v, pairs)))
            ids.append(self.append(self.name, tuple(m.shape), m.dtype, m.device, tuple(sources)))
        return tuple(ids)


class _NamingReader(Reader):
    """A reader that notes which layer every value comes from, too."""

    def __init__(self, log: ranges.Layers):
        super().__init__()
        self.log = log
        self.layers: dict[int, str] = {}

    def visit(self, node, src):
        mark = len(self.values)
        ids = super().visit(node, src)
        self.layers.update(dict.fromkeys(range(mark, len(self.values)), self.log.of(node)))
        return ids


def follow(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], reader: Reader | None = None, walk: Walk | None = None
) -> Graph:  # fmt: skip
    """The graph between two ends, without a look at hooks. Raises UnsupportedGraph. ``walk``: through it, if known."""
    log = ranges.noted() if (watched := ranges.watching()) and reader is None else None
    if reader is None:
        reader = Reader() if log is None else _NamingReader(log)
    reader.outputs = [y for y in outputs if y.requires_grad]
    leaves: dict[int, int | None] = {}  # id of an input that is a leaf -> its value, once met
    wanted: dict[object, dict[int, int | None]] = {}  # node of one that is not -> output -> value
    for x in inputs:
        _refuse(x)
        if x.grad_fn is not None:
            wanted.setdefault(x.grad_fn, {})[x.output_nr] = None
        elif x.requires_grad:
            leaves[id(x)] = None

    def leaf(x: Tensor) -> int | None:
        value = leaves.get(id(x), -1)
        if value is None and x.numel():  # nothing depends on an empty input
            value = leaves[id(x)] = reader.append("input", tuple(x.shape), x.dtype, x.device, ())
        return None if value == -1 else value

    for y in outputs:
        _refuse(y)
    done: dict[object, tuple[int | None, ...] | None] = {}
    walk = walk or Walk(outputs, inputs)
    reader.writes = Writes(walk, outputs, wanted)
    with reader.recomputed:
        _read(walk, reader, leaves, leaf, wanted, done)
    del reader.writes  # rules may hold the reader
    if reader.overrides is not None:
        reader.overrides.check(walk.order, inputs)
    ends: list[int | None] = []
    for y in outputs:
        ids = done[y.grad_fn] if y.grad_fn is not None else None
        at = leaf(y) if y.grad_fn is None and y.requires_grad else None
        ends.append(at if ids is None else ids[y.output_nr])
    starts = [
        leaves.get(id(x)) if x.grad_fn is None else wanted[x.grad_fn][x.output_nr] for x in inputs
    ]
    if reader.complex and reader.pairs:
        reader.replace(complexes.in_pairs(reader))
    key = (tuple(reader._key), tuple(starts), tuple(ends), *overriding.names())
    names = reader.layers if isinstance(reader, _NamingReader) else {} if watched else None
    graph = Graph(reader.values, starts, ends, key, names)
    graph.complex = reader.complex and reader.pairs
    if not graph.complex:  # pairs are other values
        graph.others = reader.others
    return graph


def _read(walk: Walk, reader: Reader, leaves, leaf, wanted, done) -> None:
    """Read all nodes of a walk; ``done`` gets their values."""
    opened = walk.edges
    for node in walk.order:
        if node.__class__ is _ACCUMULATE:
            x = node.variable
            check_here(x)
            done[node] = (leaf(x),) if id(x) in leaves else None
            continue
        src: list[int | None] = []
        active = constants = False
        for p, nr in opened[node]:
            ids = done[p] if p is not None else None
            if ids is None:
                constants = constants or p is None
                src.append(None)
            else:
                src.append(ids[nr])
                active = active or ids[nr] is not None
        if not active and node.__class__ is ERROR:
            raise RuntimeError(MARKED)
        reader.constants = constants
        ids = reader.visit(node, src) if active else None
        if active and (0 in reader.shape or len(ids) > 1):  # what is empty carries no derivative
            values = reader.values
            ids = tuple([i if i is not None and 0 not in values[i].shape else None for i in ids])
        if node in wanted:
            meta = node._input_metadata
            made = [None] * len(meta) if ids is None else list(ids)
            for nr in wanted[node]:
                m = meta[nr]
                if made[nr] is None and 0 not in m.shape:
                    made[nr] = reader.append("input", tuple(m.shape), m.dtype, m.device, ())
                wanted[node][nr] = made[nr]
            ids = tuple(made)
        done[node] = ids


def _refuse(x: Tensor) -> None:
    if x.__class__ is not Tensor and is_distributed(x):
        raise UnsupportedGraph(DISTRIBUTED)
    if x.layout is not torch.strided:
        raise UnsupportedGraph(f"a tensor with layout {x.layout}")
    if x.dtype.is_complex:
        raise UnsupportedGraph(f"a complex tensor ({x.dtype})")
