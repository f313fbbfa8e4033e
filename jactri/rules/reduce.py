"""Reductions, running reductions and losses.

Where each entry of the input feeds exactly one entry of the output, the node applied to ones is the weight of every
entry: a diagonal, followed by a sum over the reduced axes. So all other axes are kept.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..layout import one
from ..linear_map import Functional, keep_all_but
from . import rule
from .elementwise import fit


def weigh(g, s: int, output: int = 0, edge: int = 0) -> int:
    """Scale an operand by what the node makes of ones: the derivative of the entry that each of its entries feeds."""
    node, meta, shape = g.node, g.meta, g.values[s].shape
    m = meta[output]

    def weights() -> Tensor:
        ones = one(m).expand(tuple(m.shape))
        out = node(*[ones if i == output else None for i in range(len(meta))])
        out = out[edge] if isinstance(out, tuple) else out
        if out is None:
            return torch.zeros(shape, dtype=m.dtype, device=m.device)
        if out.shape != shape:
            raise AssertionError(f"{node.name()}: weights of shape {tuple(out.shape)} for {shape}")
        return fit(out, m)

    return g.diagonal(s, weights, fresh=False)


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


@rule(
    "Amax", "Amin", "LinalgVectorNorm", "Logsumexp", "Max.1", "Median.0", "Min.1", "Nanmedian.0", "Nansum",
    "Norm.0-3", "Prod.0-1", "Std", "Trace", "Var",
)  # fmt: skip
def weighted(g):
    return g.sum(weigh(g, g.cast(g.src[0])), _reduced(g), _keepdim(g))


@rule("Aminmax", "StdMean", "VarMean")
def two_results(g):
    (s,), axes, keepdim = g.src, _reduced(g), _keepdim(g)
    return tuple([g.sum(weigh(g, s, i), axes, keepdim) for i in range(len(g.meta))])


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

    edge = Functional("cumsum", lambda t: t.cumsum(axis + 1), pull, keep_all_but((axis,), n))
    return g.single(g.cast(g.src[0]), edge)


@rule("Logcumsumexp")
def logcumsumexp(g):
    """``exp(x_j - y_i)`` for ``j <= i``: a triangular matrix along the axis."""
    n = len(g.shape)
    if n == 0:
        return g.src[0]
    axis, x, y = g.axis("dim", n), g.tensor("self"), g.tensor("result")
    cached: list[Tensor] = []

    def matrix() -> Tensor:
        if not cached:
            power = x.movedim(axis, -1).unsqueeze(-2) - y.movedim(axis, -1).unsqueeze(-1)
            low = torch.ones(power.shape[-2:], dtype=torch.bool, device=x.device).tril()
            cached.append(power.masked_fill(~low, -torch.inf).exp())
        return cached[0]

    def times(t: Tensor, m: Tensor) -> Tensor:
        return (m @ t.movedim(axis + 1, -1).unsqueeze(-1)).squeeze(-1).movedim(-1, axis + 1)

    edge = Functional(
        "logcumsumexp",
        lambda t: times(t, matrix()),
        lambda c: times(c, matrix().mT),
        keep_all_but((axis,), n),
        work=(2.0 * g.shape[axis],) * 2,
    )
    return g.single(g.src[0], edge)


# -- losses -----------------------------------------------------------------------------------------


@rule(
    "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "HuberLoss", "MseLoss", "SmoothL1Loss", "SoftMarginLoss"
)  # fmt: skip
def elementwise_loss(g):
    """A function of each pair of entries, then nothing, a mean or a sum."""
    shape, terms = tuple(g.tensor("self").shape), []
    if tuple(g.tensor("target").shape) != shape:
        return None
    for edge, s in enumerate(g.src):
        if s is None:
            continue
        if edge > 1 or g.values[s].shape != shape:
            return None
        s = weigh(g, g.cast(s), 0, edge)
        terms.append(s if g.saved("reduction") == 0 else g.sum(s, tuple(range(len(shape)))))
    return g.plus(terms)


@rule("NllLoss", "NllLoss2D", "MultiMarginLoss", "MultilabelMarginLoss")
def class_loss(g):
    """A loss for each sample (and pixel) over the classes, then nothing, a mean or a sum."""
    s = g.src[0]
    shape = g.values[s].shape
    n = len(shape)
    one_each = (0, *range(2, n)) if n > 1 else ()
    alone = g.saved("reduction") == 0 and g.shape == tuple(shape[a] for a in one_each)
    axes = tuple(a for a in range(n) if not (alone and a in one_each))
    return (g.sum(weigh(g, s), axes), *[None] * (len(g.meta) - 1))


@rule("CtcLoss.0-1")
def ctc(g):
    """A loss for each sequence of ``log_probs`` (time, batch, class)."""
    s = g.src[0]
    shape = g.values[s].shape
    if len(shape) != 3 or g.shape != shape[1:2]:
        return None
    return (g.sum(weigh(g, s), (0, 2)), *[None] * (len(g.meta) - 1))
