"""The curvature of a graph's values, by the records of their ops, read in the same walk as the maps (see `graph`).

What is not known to be linear in what depends on the input, or to have a given second-order term, is refused
(`UnknownCurvature`): the caller then goes by the graph of the gradient.
"""

from __future__ import annotations

from torch import Tensor

from ..maps.curvature import Curves
from ..maps.linear_map import LinearMap
from ..maps.maps import Transpose
from ..read.graph import Graph, Reader
from ..read.reading import read
from ..rules.elementwise import CONSTANT
from .linearity import linear


class UnknownCurvature(Exception):
    """An op whose second-order term is not known; the message names it."""


class CurveReader(Reader):
    """A reader that notes the curvature of every value that has one. ``new`` are the values of the current node."""

    joins = False

    def __init__(self):
        super().__init__()
        self.curves: Curves = {}
        self.new: range = range(0)
        self.ids: tuple[int | None, ...] = ()
        self._partial: dict[int, str] = {}

    def visit(self, node, src):
        mark = len(self.values)
        self.ids = ids = super().visit(node, src)
        self.new = range(mark, len(self.values))
        if not self.smooth.isdisjoint(self.new):
            raise UnknownCurvature(node.name())
        record = self.record
        found = (default if record is None or record.curve is None else record.curve)(self)
        if found is None:
            raise UnknownCurvature(node.name())
        self.curves.update(found)
        return ids

    def first_only(self) -> None:
        """The curvature of the current node's other outputs is not known."""
        self._partial.update((i, self.name) for i in self.ids[1:] if i is not None)

    def check(self, outputs) -> None:
        """Raise if a value whose curvature is not known is used."""
        used = {s for value in self.values for s, _ in value.sources}.union(outputs)
        for i, name in self._partial.items():
            if i in used:
                raise UnknownCurvature(name)

    def edges(self, kind: type) -> list[tuple[int, int, LinearMap]]:
        """(value, source, map) of the current node's values that have one source, through a map of this kind."""
        found = []
        for v in self.new:
            sources = self.values[v].sources
            if len(sources) == 1 and isinstance(sources[0][1], kind):
                found.append((v, *sources[0]))
        return found

    def active(self, *edges: int) -> list[bool]:
        """Which of the node's operands depend on the input."""
        return [e < len(self.src) and self.src[e] is not None for e in edges]


def read_curves(y: Tensor, x: Tensor) -> tuple[Graph, Curves]:
    """The graph between ``x`` and ``y``, and the curvature of its values. Raises UnknownCurvature."""
    reader = CurveReader()
    graph = read([y], [x], reader)
    reader.check(graph.outputs)
    return graph, reader.curves


def default(r: CurveReader) -> Curves | None:
    """Linear, if every map is one that holds no value of the computation, or if autograd has it so."""
    for v in r.new:
        for _, edge in r.values[v].sources:
            if isinstance(edge, Transpose):
                edge = edge.base
            if edge.__class__ not in CONSTANT:
                return {} if linear(r, r.ids) else None
    return {}
