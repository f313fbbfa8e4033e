"""Reductions and running reductions.

Where each entry of the input feeds exactly one entry of the output, the node applied to ones is the weight of every
entry: a diagonal, followed by a sum over the reduced axes. So all other axes are kept.
"""

from __future__ import annotations

from math import inf, prod

import torch
from torch import Tensor

from ..base.csr import Csr
from ..maps.curvature import Curves, LengthBend, LogSumExpBend
from ..maps.functional import Functional
from ..maps.layout import one
from ..maps.linear_map import keep_all_but
from ..maps.once import Once
from . import rule
from .elementwise import fit, flat, passing


def weigh(g, s: int, output: int = 0, edge: int = 0, selects: bool = False) -> int:
    """Scale an operand by what the node makes of ones: the derivative of the entry that each of its entries feeds.

    ``selects``: the node's backward may set entries to zero whatever the gradient is.
    """
    g.check_memory()
    call, meta, shape = g.call, g.meta, g.values[s].shape
    m = meta[output]

    def pull(c: Tensor) -> Tensor:
        c = c.expand(tuple(m.shape))
        out = call(*[c if i == output else None for i in range(len(meta))])
        out = out[edge] if isinstance(out, tuple) else out
        if out is None:
            return torch.zeros(shape, dtype=m.dtype, device=m.device)
        return fit(out.sum_to_size(shape), m)  # of a tensor without axes, some have one

    if selects:
        return g.mask(s, lambda: pull(one(m)), lambda: passing(pull, m))
    return g.diagonal(s, lambda: pull(one(m)))


def _reduced(g, name: str = "dim", ndim: int | None = None) -> tuple[int, ...]:
    """The axes that a reduction sums over; none saved means all."""
    ndim = len(g.values[g.src[0]].shape) if ndim is None else ndim
    if ndim == 0:
        return ()
    if not g.has(name):
        return tuple(range(ndim))
    dims = g.saved(name)
    return (g.axis(name, ndim),) if isinstance(dims, int) else g.axes(name, ndim)


def _keepdim(g) -> bool:
    return bool(g.has("keepdim") and g.saved("keepdim"))


@rule("Sum.0-1")
def sum_(g):
    return g.sum(g.cast(g.src[0]), _reduced(g), _keepdim(g))


@rule("Mean.0-1")
def mean(g):
    s, axes = g.cast(g.src[0]), _reduced(g)
    shape = g.values[s].shape
    return g.scale(g.sum(s, axes, _keepdim(g)), 1 / max(prod([shape[a] for a in axes]), 1))


def logsumexp_bend(r) -> Curves | None:
    x, y = r.tensor("self"), r.tensor("result")
    axes = _reduced(r)
    if len(r.new) == 0 or x.dtype != r.dtype or not axes:
        return None
    return {r.new[-1]: LogSumExpBend(r.src[0], (x, y), axes, r.saved("keepdim"))}


@rule("Amax", "Amin", "Trace", curve=flat)
@rule("Logsumexp", curve=logsumexp_bend, regular=True)
@rule("Nansum", curve=flat, regular=True)
@rule("Var", regular=True)
def weighted(g, selects: bool = False):
    return g.sum(weigh(g, g.cast(g.src[0]), selects=selects), _reduced(g), _keepdim(g))


@rule("Max.1", "Median.0", "Min.1", "Nanmedian.0", curve=flat)
@rule("Prod.0-1", "Std")
def chosen(g):
    """One entry of all, and what is taken for 0 where it has no derivative."""
    return weighted(g, True)


def length_bend(r) -> Curves | None:
    x, y = r.tensor("self"), r.tensor("result")
    axes = _reduced(r)
    if r.saved("ord") in (-inf, 0, 1, inf):
        return flat(r)
    if r.saved("ord") != 2 or len(r.new) == 0 or x.dtype != r.dtype or not axes:
        return None
    return {r.new[-1]: LengthBend(r.src[0], (x, y), axes, r.saved("keepdim"))}


@rule("LinalgVectorNorm", curve=length_bend)
@rule("Norm.0-3")
def norm(g):
    name = "ord" if g.has("ord") else "p"
    p = g.saved(name) if g.has(name) else None
    return weighted(g, p not in (None, 1, 2, inf, -inf))


@rule("Aminmax", curve=flat)
@rule("StdMean", "VarMean")
def two_results(g):
    (s,), axes, keepdim = g.src, _reduced(g), _keepdim(g)
    selects = g.name == "StdMeanBackward0"
    return tuple([g.sum(weigh(g, s, i, 0, selects), axes, keepdim) for i in range(len(g.meta))])


@rule("Dist")
def dist(g):
    shape = torch.broadcast_shapes(g.tensor("self").shape, g.tensor("other").shape)
    terms = []
    for edge, s in enumerate(g.src):
        if s is not None:
            s = weigh(g, g.cast(g.expand(s, tuple(shape))), 0, edge)
            terms.append(g.sum(s, tuple(range(len(shape)))))
    return g.plus(terms)


# -- running reductions -----------------------------------------------------------------------------


@rule("Cumsum")
def cumsum(g):
    n = len(g.shape)
    if n == 0:
        return g.cast(g.src[0])
    axis = g.axis("dim", n)

    def pull(c):
        return c.flip(axis + 1).cumsum(axis + 1).flip(axis + 1)

    kept = keep_all_but((axis,), n)
    size = g.shape[axis]
    before = {axis: lambda: Csr.triangle(size)}
    edge = Functional(
        "cumsum", lambda t: t.cumsum(axis + 1), pull, kept, anywhere=True, supports=before
    )
    return g.single(g.cast(g.src[0]), edge)


def _triangular(g, make) -> int:
    """A running reduction: ``make(x)`` is the lower triangular matrix ``d y_i / d x_j`` of each line, its axis last."""
    n = len(g.shape)
    s = g.cast(g.src[0])
    if n == 0:
        return s
    axis = g.axis("dim", n)
    matrix = Once(make)

    def times(t: Tensor, m: Tensor) -> Tensor:
        return (m @ t.movedim(axis + 1, -1).unsqueeze(-1)).squeeze(-1).movedim(-1, axis + 1)

    edge = Functional(
        g.name,
        lambda t: times(t, matrix()),
        lambda c: times(c, matrix().mT),
        keep_all_but((axis,), n),
        work=(2.0 * g.shape[axis],) * 2,
    )
    return g.single(s, edge)


@rule("Logcumsumexp")
def logcumsumexp(g):
    """``exp(x_j - y_i)`` for ``j <= i``."""
    x, y, axis = g.tensor("self"), g.tensor("result"), g.axis("dim", len(g.shape))

    def matrix() -> Tensor:
        power = x.movedim(axis, -1).unsqueeze(-2) - y.movedim(axis, -1).unsqueeze(-1)
        above = torch.ones(power.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return power.masked_fill(above, -torch.inf).exp()

    return _triangular(g, matrix)


@rule("Cumprod")
def cumprod(g):
    """The product of all but ``x_j`` up to ``i``, which zeros do not disturb."""
    x, m, axis = g.tensor("self"), g.meta[0], g.axis("dim", len(g.shape))

    def matrix() -> Tensor:
        rows = fit(x, m).movedim(axis, -1).unsqueeze(-2)  # (..., j, k): x_k, but 1 where k == j
        eye = torch.eye(rows.shape[-1], dtype=torch.bool, device=x.device)
        return torch.where(eye, one(m), rows).cumprod(-1).triu().mT

    return _triangular(g, matrix)
