"""Which curvature a node has: node name -> `curvature`. Read in the same walk as the linear maps (see `graph`).

What is not known here to be linear in what depends on the input, or to have a given second-order term, is refused
(`UnknownCurvature`): the caller then goes by the graph of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, prod

import torch
from torch import Tensor

from ..maps.contraction import Expand, MatMul, Sum
from ..maps.convolution import Conv, ConvWeight
from ..maps.layout import one
from ..maps.linear_map import Cast, Diagonal, Functional, Identity, Permute, Scale, View
from ..maps.low_rank import LogSoftmax, Project, Softmax
from ..maps.maps import Fixed, Once, Sample, Transpose
from ..maps.selection import Gather, Picked, Place, Scatter, Select, Slice, Take
from ..maps.sparse_product import SparseMatMul
from ..read.graph import Graph, Reader
from ..read.reading import read
from ..rules import REGISTRY, Record, node_names
from ..rules.elementwise import BINARY, UNARY, Zero
from ..rules.norm import BATCH_NORMS, statistics
from .curvature import (
    Curvature,
    Differentiated,
    LengthBend,
    LogSumExpBend,
    Matrices,
    NormalisationBend,
    Pairs,
    SoftmaxBend,
    Unary,
    as_they_are,
)
from .linearity import linear
from .slopes import FLAT, FORMULAS, gelu_tanh

Curves = dict[int, Curvature]


class UnknownCurvature(Exception):
    """An op whose second-order term is not known; the message names it."""


CONSTANT = {
    Cast, Expand, Fixed, Gather, Identity, Permute, Picked, Place, Sample, Scale, Scatter, Select, Slice, Sum, Take,
    View, Zero,
}  # fmt: skip
"""Maps that hold no value of the computation."""


def curve(*names: str):
    """Register what reads the curvature of nodes, named as `node_names` reads them."""

    def decorate(function: Callable[[CurveReader], Curves | None]):
        for name in names:
            for full in node_names(name):
                REGISTRY.setdefault(full, Record()).curve = function
        return function

    return decorate


class CurveReader(Reader):
    """A reader that notes the curvature of every value that has one. ``new`` are the values of the current node."""

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

    def edges(self, kind: type) -> list[tuple[int, int, object]]:
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


@curve(*FLAT)
def flat(r):
    """The derivatives in all operands are constants, but for kinks."""
    known = all(
        e.__class__ in CONSTANT or isinstance(e, Diagonal)
        for v in r.new
        for _, e in r.values[v].sources
    )
    return {} if known else None


# -- elementwise ------------------------------------------------------------------------------------


def elementwise(r: CurveReader) -> Curves | None:
    """Any elementwise op in one operand that depends on the input: autograd differentiates it twice."""
    edges, shape = r.edges(Diagonal), r.shape
    places = [e for e, s in enumerate(r.src) if s is not None]
    if len(edges) != 1 or len(places) != 1:
        return None
    v, s, _ = edges[0]
    if r.values[s].shape != shape or r.values[r.src[places[0]]].shape != shape:
        return None
    node, meta, place = r.node, r.meta, places[0]
    m = meta[0]

    def derivative() -> Tensor:
        out = node(one(m).expand(shape), *[None] * (len(meta) - 1))
        return out[place] if isinstance(out, tuple) else out

    slopes = Differentiated(derivative, node.next_functions[place], m)
    return {v: Unary(s, r.name, as_they_are, slopes)}


for _name in (*UNARY, *BINARY, "LogSigmoid", "Gelu", "PreluKernel"):
    curve(_name)(elementwise)
curve(*FLAT)(flat)  # those of them that bend nowhere


def _formula(saved, function, constants):
    def run(r: CurveReader):
        ((v, s, _),) = r.edges(Diagonal)
        formula = function
        if r.name == "GeluBackward0" and r.saved("approximate") == "tanh":
            formula = gelu_tanh
        return {v: Unary(s, r.name, formula, (r.tensor(saved),), constants(r.saved))}

    return run


for _name, _row in FORMULAS.items():
    curve(_name)(_formula(*_row))


def pairs(r: CurveReader, which, second, saved=(), constants=()) -> Curves | None:
    """The curvature of an elementwise op by its scaled operands, in the order of the node's."""
    edges = r.edges(Diagonal)
    at, sources = edges[-1][0], [s for _, s, _ in edges]
    shapes = {r.values[s].shape for s in sources}
    if len(shapes) != 1 or len(sources) <= max(max(p) for p in which):
        return None
    return {at: Pairs(sources, which, second, saved, constants)}


def _two() -> tuple[float]:
    return (2.0,)


@curve("Mul", "Dot", "Vdot", "Addr")
def mul(r):
    first = 1 if r.name == "AddrBackward0" else 0
    if not all(r.active(first, first + 1)):
        return {}
    if len(r.edges(Diagonal)) == 1:  # x * x
        return pairs(r, ((0, 0),), _two)
    return pairs(r, ((0, 1),), _two)


@curve("Mul.1", "Div.1")
def by_number(r):
    return flat(r)


@curve("Addcmul")
def addcmul(r):
    if not all(r.active(1, 2)):
        return {}
    return pairs(r, ((0, 1),), lambda value: (2.0 * value,), constants=(r.saved("value"),))


def _quotient(a: Tensor, b: Tensor, value: float = 1.0) -> tuple[Tensor, Tensor]:
    square = b * b
    return -2 * value / square, 2 * value * a / (square * b)


def _divisor(a: Tensor, b: Tensor, value: float = 1.0) -> tuple[Tensor]:
    return (2 * value * a / (b * b * b),)


@curve("Div", "Addcdiv")
def div(r):
    first, names, constants = 0, ("self", "other"), ()
    if r.name == "AddcdivBackward0":
        first, names, constants = 1, ("tensor1", "tensor2"), (r.saved("value"),)
    above, below = r.active(first, first + 1)
    if not below:
        return {}
    saved = [r.tensor(n) for n in names]
    if above:
        return pairs(r, ((0, 1), (1, 1)), _quotient, saved, constants)
    return pairs(r, ((0, 0),), _divisor, saved, constants)


@curve("Pow.1")
def pow_tensors(r):
    if not all(r.active(0, 1)):
        return elementwise(r)

    def second(x, e):
        log, y = torch.log(x), x**e
        return e * (e - 1) * x ** (e - 2), 2 * x ** (e - 1) * (1 + e * log), log * log * y

    saved = r.tensor("self"), r.tensor("exponent")
    return pairs(r, ((0, 0), (0, 1), (1, 1)), second, saved)


@curve("Atan2")
def atan2(r):
    if not all(r.active(0, 1)):
        return elementwise(r)

    def second(y, x):
        square = 1 / (x * x + y * y)
        mixed = 2 * x * y * square * square
        return -mixed, 2 * (y * y - x * x) * square * square, mixed

    return pairs(r, ((0, 0), (0, 1), (1, 1)), second, (r.tensor("self"), r.tensor("other")))


@curve("Hypot")
def hypot(r):
    if not all(r.active(0, 1)):
        return elementwise(r)

    def second(x, y):
        cube = torch.hypot(x, y) ** -3
        return y * y * cube, -2 * x * y * cube, x * x * cube

    return pairs(r, ((0, 0), (0, 1), (1, 1)), second, (r.tensor("self"), r.tensor("other")))


@curve("Logaddexp", "Logaddexp2")
def logaddexp(r):
    if not all(r.active(0, 1)):
        return elementwise(r)
    base = 1.0 if r.name == "LogaddexpBackward0" else 0.6931471805599453

    def second(x, y):
        p = torch.sigmoid((x - y) * base)
        spread = p * (1 - p) * base
        return spread, -2 * spread, spread

    return pairs(r, ((0, 0), (0, 1), (1, 1)), second, (r.tensor("self"), r.tensor("other")))


@curve("Xlogy.0")
def xlogy(r):
    if not all(r.active(0, 1)):
        return elementwise(r) if r.active(1)[0] else {}
    saved = r.tensor("self"), r.tensor("other")
    return pairs(r, ((0, 1), (1, 1)), lambda x, y: (2 / y, -x / (y * y)), saved)


@curve("Lerp.1")
def lerp(r):
    """``start + weight * (end - start)``."""
    start, end, weight = r.active(0, 1, 2)
    if not weight or not (start or end):
        return {}
    if start and end:
        return pairs(r, ((0, 2), (1, 2)), lambda: (-2.0, 2.0))
    return pairs(r, ((0, 1),), lambda c: (c,), constants=(2.0 if end else -2.0,))


@curve("PreluKernel")
def prelu(r):
    if not all(r.active(0, 1)):
        return {}
    second = pairs(r, ((0, 1),), lambda x: (2.0 * (x <= 0),), (r.tensor("self"),))
    return second


@curve("SigmoidBackward", "TanhBackward")
def activation_slope(r):
    """``c y (1 - y)`` and ``c (1 - y^2)`` in the cotangent c and the result y, from the graph of a gradient."""
    if not all(r.active(0, 1)):
        return elementwise(r) if r.active(1)[0] else {}
    tanh = r.name == "TanhBackwardBackward0"

    def second(c, y):
        return (-4 * y, -2 * c) if tanh else (2 - 4 * y, -2 * c)

    saved = r.tensor("grad_output"), r.tensor("result" if r.has("result") else "output")
    return pairs(r, ((0, 1), (1, 1)), second, saved)


# -- products ---------------------------------------------------------------------------------------


def _matrices(edges, factor: float) -> Curves | None:
    """The curvature of products of two matrices that both depend on the input."""
    right = [(v, s) for v, s, e in edges if e.side == "right"]
    left = [(v, s) for v, s, e in edges if e.side == "left"]
    if not right or not left:
        return {}
    ((v, a),), ((w, b),) = right, left
    return {max(v, w): Matrices(a, b, factor)}


@curve("Mm", "Bmm", "Addmm", "Baddbmm", "Addbmm", "SparseAddmm")
def matrices(r):
    return _matrices(r.edges(MatMul), 1.0)


@curve("Mv", "Addmv", "LinalgCross", "Trilinear", "Convolution")
def in_one_factor(r):
    """Products of several factors, where only one depends on the input."""
    factors = {"AddmvBackward0": (1, 2), "TrilinearBackward0": (0, 1, 2)}.get(r.name, (0, 1))
    known = all(
        e.__class__ in CONSTANT
        or isinstance(e, MatMul | SparseMatMul | Conv | ConvWeight | Functional)
        for v in r.new
        for _, e in r.values[v].sources
    )
    return {} if known and sum(r.active(*factors)) <= 1 else None


@curve(
    "ScaledDotProductFlashAttentionForCpu", "ScaledDotProductFlashAttention",
    "ScaledDotProductEfficientAttention", "ScaledDotProductCudnnAttention",
    "ScaledDotProductFusedAttentionOverrideable",
)  # fmt: skip
def attention(r):
    """Scores, softmax and the weighted sum are values of their own (see `rules.attention`)."""
    allowed = (MatMul, Softmax)
    if any(
        e.__class__ not in CONSTANT and not isinstance(e, allowed)
        for v in r.new
        for _, e in r.values[v].sources
    ):
        return None
    products, found = r.edges(MatMul), {}
    after = r.new.stop
    for v, s, edge in r.edges(Softmax):
        after = v
        found[v] = SoftmaxBend(s, edge.p, edge.axis, False)
    scale = r.saved("scale")
    scale = r.tensor("query").shape[-1] ** -0.5 if scale is None else scale
    scores = [p for p in products if p[0] < after] if found else []
    for part, factor in ((scores, scale), ([p for p in products if p not in scores], 1.0)):
        found.update(_matrices(part, factor))
    return found


# -- softmax, norms, reductions ---------------------------------------------------------------------


@curve("Softmax", "SafeSoftmax", "MaskedSoftmax", "LogSoftmax")
def softmax(r):
    found = r.edges(Softmax)
    if len(found) != 1:
        return None
    v, s, edge = found[0]
    return {v: SoftmaxBend(s, edge.p, edge.axis, isinstance(edge, LogSoftmax))}


def _axes(r: CurveReader, name: str, ndim: int) -> tuple[int, ...]:
    return r.axes(name, ndim) if ndim else ()


@curve("Logsumexp")
def logsumexp(r):
    x, y = r.tensor("self"), r.tensor("result")
    axes = _axes(r, "dim", x.dim())
    if len(r.new) == 0 or x.dtype != r.dtype or not axes:
        return None
    return {r.new[-1]: LogSumExpBend(r.src[0], (x, y), axes, r.saved("keepdim"))}


@curve("LinalgVectorNorm")
def length(r):
    x, y = r.tensor("self"), r.tensor("result")
    axes = _axes(r, "dim", x.dim())
    if r.saved("ord") in (-inf, 0, 1, inf):
        return flat(r)
    if r.saved("ord") != 2 or len(r.new) == 0 or x.dtype != r.dtype or not axes:
        return None
    return {r.new[-1]: LengthBend(r.src[0], (x, y), axes, r.saved("keepdim"))}


@curve("NativeLayerNorm", "FusedRmsNorm")
def layer_norm(r):
    centred = r.name == "NativeLayerNormBackward0"
    if r.src[0] is None or r.active(1)[0] or not r.edges(Project):
        return {} if r.src[0] is None else None
    x, shape, lift = r.tensor("input"), r.shape, tuple(r.saved("normalized_shape"))
    axes = tuple(range(len(shape) - len(lift), len(shape)))
    mean, rstd = (
        (r.tensor("result1"), r.tensor("result2")) if centred else (None, r.tensor("result1"))
    )
    stats = Once(lambda: statistics(x, axes, mean, rstd, None, centred))
    weight = r.saved("weight")
    r.first_only()
    bend = NormalisationBend(r.src[0], stats, axes, shape, weight, lift, centred)
    return {r.ids[0]: bend}


@curve("NativeGroupNorm")
def group_norm(r):
    if r.src[0] is None or r.active(1)[0] or not r.edges(Project):
        return {} if r.src[0] is None else None
    x, shape = r.tensor("input"), r.shape
    n, c, groups, eps = r.saved("N"), r.saved("C"), r.saved("group"), r.saved("eps")
    inner = (n, groups, prod(shape) // (n * groups))
    mean, rstd = (r.tensor(k).reshape(n, groups, 1) for k in ("result1", "result2"))
    stats = Once(lambda: statistics(x.reshape(inner), (2,), mean, rstd, eps))
    lift = (c, *(1,) * (len(shape) - 2))
    r.first_only()
    return {r.ids[0]: NormalisationBend(r.src[0], stats, (2,), inner, r.saved("weight"), lift)}


@curve(*(name.removesuffix("Backward0").replace("Backward1", ".1") for name in BATCH_NORMS))
def batch_norm(r):
    """Under fixed statistics a scaling."""
    training = BATCH_NORMS[r.name][1]
    training = r.saved(training) if isinstance(training, str) else training
    if training or any(r.active(1, 2)):
        return None
    return flat(r)
