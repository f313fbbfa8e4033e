"""Normalisation layers and softmax: low-rank corrections of a diagonal.

A normalisation ``y = w * (x - mean) / std + b`` is, in its input, a `Project` and then a diagonal ``w / std``. Where
a graph is built (create_graph) the statistics are computed again from the input: the saved ones carry no graph.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..maps.curvature import Curves, NormalisationBend, SoftmaxBend
from ..maps.linear_map import Diagonal, Identity
from ..maps.low_rank import LogSoftmax, Project, ProjectSlope, RankOne, Softmax
from ..maps.maps import Transpose, wide
from ..maps.mask import Mask
from ..maps.once import Once
from ..maps.unmasked import Unmasked, of_matrices
from . import rule
from .elementwise import Zero, flat


def statistics(
    x: Tensor, axes: tuple[int, ...], mean: Tensor, rstd: Tensor, eps: float | None, centred=True
):
    """``(unit, rstd)``: the normalised input and one over its standard deviation, in at least float32.

    ``mean`` and ``rstd`` are what autograd saved, shaped to broadcast against ``x``. Without ``eps`` (the node did not
    save it) the one that they imply is used. ``centred`` is false for an RMS norm, which has no mean.
    """
    x = wide(x)
    if torch.is_grad_enabled() and x.requires_grad and x.numel():
        if centred:
            x = x - x.mean(axes, keepdim=True)
        var = x.square().mean(axes, keepdim=True)
        if eps is None:
            eps = wide(rstd).detach().pow(-2) - var.detach()
        rstd = (var + eps).rsqrt()
        return x * rstd, rstd
    rstd = wide(rstd).detach()
    return (x - wide(mean)).mul_(rstd) if centred else x * rstd, rstd


def normalise(g, x, w, b, stats: Once, axes, count, weight, lift, inner=None, centred=True) -> int:
    """The edges of a normalisation.

    ``stats`` gives `statistics` of the input as ``inner`` shapes it (the node's shape by default), over ``axes`` of
    that; ``lift`` is the shape in which weight and bias broadcast against the output.
    """
    shape = g.shape
    inner = inner or shape
    dtype = g.meta[0].dtype
    terms = []

    def scale() -> Tensor:
        d = stats()[1]
        if inner != shape:  # groups of channels
            d = d.expand(-1, -1, lift[0] // inner[1]).reshape(shape[0], *lift)
        return (d if weight is None else d * wide(weight).reshape(lift)).to(dtype)

    if x is not None:
        v = g.view(x, inner)
        if g.overrides is not None and g.overrides.fixed:
            g.overrides.fixed = 2
            v = centre(g, v, axes, count) if centred else v
        else:
            v = g.single(v, Project(lambda: stats()[0], axes, count, centred))
        terms.append(g.diagonal(g.view(v, shape), scale))
    if w is not None:
        spread = g.match(g.view(w, lift))
        terms.append(g.diagonal(spread, lambda: stats()[0].reshape(shape).to(dtype)))
    if b is not None:
        terms.append(g.view(b, lift))
    return g.plus(terms)


def centre(g, v: int, axes, count: int) -> int:
    """``t - mean(t)``: what is left of `Project` where the deviation is held constant."""
    mean = g.expand(g.scale(g.sum(v, axes, keepdim=True), -1.0 / count), g.values[v].shape)
    return g.add([(v, Identity()), (mean, Identity())], g.values[v].shape)


def layer_norm_bend(r) -> Curves | None:
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


@rule("NativeLayerNorm", curve=layer_norm_bend, bounded=True)
def layer_norm(g):
    x, w, b = g.src
    saved, mean, rstd = g.tensor("input"), g.tensor("result1"), g.tensor("result2")
    shape, inner = g.shape, tuple(g.saved("normalized_shape"))
    if len(g.meta) != 1:
        return None
    axes = tuple(range(len(shape) - len(inner), len(shape)))
    stats = Once(lambda: statistics(saved, axes, mean, rstd, None))
    return normalise(g, x, w, b, stats, axes, prod(inner), g.saved("weight"), inner)


@rule("FusedRmsNorm", curve=layer_norm_bend)
def rms_norm(g):
    x, w = g.src
    saved, rstd = g.tensor("input"), g.tensor("result1")
    shape, inner = g.shape, tuple(g.saved("normalized_shape"))
    count = prod(inner)
    axes = tuple(range(len(shape) - len(inner), len(shape)))
    stats = Once(lambda: statistics(saved, axes, None, rstd, None, centred=False))
    out = normalise(g, x, w, None, stats, axes, count, g.saved("weight"), inner, centred=False)
    return out, *spread_outputs(g, x, stats, axes, shape, count, mean=False)


def group_norm_bend(r) -> Curves | None:
    if r.src[0] is None or r.active(1)[0] or not r.edges(Project):
        return {} if r.src[0] is None else None
    x, shape = r.tensor("input"), r.shape
    n, c, groups = r.saved("N"), r.saved("C"), r.saved("group")
    inner = (n, groups, prod(shape) // (n * groups))
    mean, rstd = (r.tensor(k).reshape(n, groups, 1) for k in ("result1", "result2"))
    stats = Once(lambda: statistics(x.reshape(inner), (2,), mean, rstd, None))
    lift = (c, *(1,) * (len(shape) - 2))
    r.first_only()
    return {r.ids[0]: NormalisationBend(r.src[0], stats, (2,), inner, r.saved("weight"), lift)}


@rule("NativeGroupNorm", curve=group_norm_bend, bounded=True)
def group_norm(g):
    x, w, b = g.src
    n, c, groups = g.saved("N"), g.saved("C"), g.saved("group")
    if 0 in g.shape:
        return None
    saved, inner = g.tensor("input"), (n, groups, prod(g.shape) // (n * groups))
    mean, rstd = (g.tensor(k).reshape(n, groups, 1) for k in ("result1", "result2"))
    stats = Once(lambda: statistics(saved.reshape(inner), (2,), mean, rstd, None))
    lift = (c, *(1,) * (len(g.shape) - 2))
    out = normalise(g, x, w, b, stats, (2,), inner[2], g.saved("weight"), lift, inner)
    return out, *spread_outputs(g, x, stats, (2,), inner, inner[2])


def spread_outputs(g, x, stats: Once, axes, inner, count, mean=True) -> list[int | None]:
    """The mean and one over the standard deviation, which are outputs of the node as well."""
    if x is None:
        return [None] * (len(g.meta) - 1)
    v = g.view(x, inner)
    ids: list[int | None] = []
    if mean:
        ids.append(g.scale(g.sum(v, axes, keepdim=True), 1.0 / count))
    if g.overrides is not None and g.overrides.fixed:
        ids.append(None)
    else:  # d rstd / dx = - unit * rstd^2 / n
        slope = g.diagonal(v, lambda: stats()[0] * stats()[1].square() / -count)
        ids.append(g.sum(slope, axes, keepdim=True))
    shapes = [tuple(m.shape) for m in g.meta[1:]]
    return [i if i is None else g.view(i, shape) for i, shape in zip(ids, shapes, strict=True)]


# node: (name of eps, whether a batch's own statistics are used: a saved flag, or known)
BATCH_NORMS = {
    "NativeBatchNormBackward0": ("eps", "training"),
    "NativeBatchNormLegitBackward0": ("eps", "training"),
    "NativeBatchNormLegitBackward1": ("eps", "training"),
    "NativeBatchNormLegitNoTrainingBackward0": ("eps", False),
    "BatchNormWithUpdateBackward0": ("eps", True),
    "BatchNormNoUpdateBackward0": ("eps", False),
    "CudnnBatchNormBackward0": ("epsilon", "training"),
    "MiopenBatchNormBackward0": ("epsilon", "training"),
}


def batch_norm_bend(r) -> Curves | None:
    """Under fixed statistics a scaling."""
    training = BATCH_NORMS[r.name][1]
    training = r.saved(training) if isinstance(training, str) else training
    if training or any(r.active(1, 2)):
        return None
    return flat(r)


@rule("NativeBatchNorm", curve=batch_norm_bend, bounded=True)
@rule(
    "NativeBatchNormLegit.0-1", "NativeBatchNormLegitNoTraining", "BatchNormWithUpdate",
    "BatchNormNoUpdate", "CudnnBatchNorm", "MiopenBatchNorm", curve=batch_norm_bend,
)  # fmt: skip
def batch_norm(g):
    x, w, b = g.src
    eps_name, training = BATCH_NORMS[g.name]
    if isinstance(training, str):
        training = g.saved(training)
    saved, eps, weight = g.tensor("input"), g.saved(eps_name), g.saved("weight")
    shape = g.shape
    lift = (1, shape[1], *(1,) * (len(shape) - 2))
    axes = (0, *range(2, len(shape)))
    if training:
        mean, rstd = (g.tensor(k).reshape(lift) for k in ("result1", "result2"))
        stats = Once(lambda: statistics(saved, axes, mean, rstd, eps))
        count = prod(shape) // max(1, shape[1])
        return normalise(g, x, w, b, stats, axes, count, weight, lift)
    if not g.has("running_mean"):
        return None
    mean, var = g.tensor("running_mean"), g.tensor("running_var")
    rstd = Once(lambda: (wide(var) + eps).rsqrt().reshape(lift))
    dtype = g.meta[0].dtype
    terms = []
    if x is not None:

        def scale() -> Tensor:
            return (rstd() if weight is None else rstd() * wide(weight).reshape(lift)).to(dtype)

        terms.append(g.single(x, Diagonal(scale, along=1)))
    if w is not None:
        spread = g.match(g.view(w, lift))
        terms.append(
            g.diagonal(
                spread, lambda: ((wide(saved) - wide(mean).reshape(lift)) * rstd()).to(dtype)
            )
        )
    if b is not None:
        terms.append(g.view(b, lift))
    return g.plus(terms)


def normalise_backward(g, c, x, w, saved_c, weight, stats: Once, axes, outer, lift):
    """The gradients of a normalisation, from the graph of a gradient: with u the normalised input and h = w c,

    P(h) / std for the input, and sum(c u), sum(c) over the axes ``outer`` for weight and bias. An empty ``axes`` stands
    for a normalisation by fixed statistics, in which P is the identity and u follows x.
    """
    shape, dtype = tuple(saved_c.shape), saved_c.dtype
    count = prod(shape[a] for a in axes)
    asked = [tuple(m.shape) for m in g.meta]  # a gradient that nobody asked for has shape ()

    def unit() -> Tensor:
        return stats()[0]

    def rstd() -> Tensor:
        return stats()[1].to(dtype)

    def slopes() -> tuple[Tensor, ...]:
        u, r = stats()
        h = wide(saved_c)
        return r, u, h if weight is None else h * wide(weight).reshape(lift)

    def projected(v: int) -> int:
        return g.single(v, Project(unit, axes, count)) if axes else v

    def total(terms: list[int], out: tuple[int, ...]) -> int | None:
        return g.add([(i, Identity()) for i in terms], out) if terms else None

    ids: list[int | None] = [None, None, None]
    if asked[0] == shape:
        heads, terms = [], []
        if c is not None:
            heads.append(
                c if weight is None else g.diagonal(c, lambda: weight.reshape(lift).to(dtype))
            )
        if w is not None:
            heads.append(g.diagonal(g.expand(g.view(w, lift), shape), saved_c))
        if heads:
            terms.append(g.diagonal(projected(total(heads, shape)), rstd))
        if x is not None and axes:
            terms.append(g.single(x, ProjectSlope(slopes, axes, count)))
        elif x is not None and not terms:
            terms.append(g.single(x, Zero()))
        ids[0] = total(terms, shape)
    features = tuple(n for a, n in enumerate(shape) if a not in outer)
    if asked[1] == features:
        terms = []
        if c is not None:
            terms.append(g.sum(g.diagonal(c, lambda: unit().to(dtype)), outer))
        if x is not None:
            terms.append(g.sum(g.diagonal(projected(x), lambda: rstd() * saved_c), outer))
        ids[1] = total(terms, features)
    if asked[2] == features and c is not None:
        ids[2] = g.sum(c, outer)
    return tuple(ids)


@rule("NativeLayerNormBackward")
def layer_norm_backward(g):
    c, x, *statistics_edges, w, _ = g.src
    saved_c, saved = g.tensor("grad_out"), g.tensor("input")
    if any(e is not None for e in statistics_edges) or not saved_c.numel():
        return None
    mean, rstd = g.tensor("mean"), g.tensor("rstd")
    n, lift = saved_c.dim(), tuple(g.saved("normalized_shape"))
    axes, outer = tuple(range(n - len(lift), n)), tuple(range(n - len(lift)))
    stats = Once(lambda: statistics(saved, axes, mean, rstd, None))
    return normalise_backward(g, c, x, w, saved_c, g.saved("weight"), stats, axes, outer, lift)


@rule("NativeBatchNormBackward")
def batch_norm_backward(g):
    c, x, w, *rest = g.src
    saved_c, saved, eps = g.tensor("grad_out"), g.tensor("input"), g.saved("eps")
    if any(e is not None for e in rest) or not saved_c.numel():
        return None
    lift = (1, saved_c.shape[1], *(1,) * (saved_c.dim() - 2))
    outer = (0, *range(2, saved_c.dim()))
    if g.saved("train"):
        axes = outer
        mean, rstd = (g.tensor(k).reshape(lift) for k in ("save_mean", "save_invstd"))
        stats = Once(lambda: statistics(saved, axes, mean, rstd, eps))
    else:
        axes = ()
        mean, var = g.tensor("running_mean").reshape(lift), g.tensor("running_var").reshape(lift)

        def fixed() -> tuple[Tensor, Tensor]:
            rstd = (wide(var) + eps).rsqrt()
            return (wide(saved) - wide(mean)) * rstd, rstd

        stats = Once(fixed)
    return normalise_backward(g, c, x, w, saved_c, g.saved("weight"), stats, axes, outer, lift)


def softmax_bend(r) -> Curves | None:
    found = r.edges(Softmax)
    if len(found) != 1:
        return None
    v, s, edge = found[0]
    return {v: SoftmaxBend(s, edge.p, edge.axis, isinstance(edge, LogSoftmax))}


@rule("Softmax", "SafeSoftmax", curve=softmax_bend, regular=True)
def softmax(g):
    # a row that is masked as a whole has p = 0 under the "safe" softmax, and so no derivative
    return along(g, Softmax, lambda p: p)


@rule("LogSoftmax", curve=softmax_bend, regular=True)
def log_softmax(g):
    return along(g, LogSoftmax, torch.exp)


def along(g, kind, probabilities):
    """A softmax of the kind given, over its saved axis."""
    x = g.cast(g.src[0])  # a dtype argument converts first
    p, shape = g.tensor("result"), g.shape
    axis = g.axis("dim", len(shape))
    p = Once(lambda p=p: probabilities(wide(p)))
    if shape:
        masked = kind is Softmax and axis == len(shape) - 1 > 0
        return g.single(x, kind(p, axis, _unmasked(g, x, p) if masked else None))
    line = g.view(x, (1,))
    return g.view(g.single(line, kind(lambda: p().reshape(1), 0)), ())


def _unmasked(g, scores: int, p) -> Unmasked | None:
    """What a mask leaves that was written over the scores just before, if its entries have no weight."""
    value = g.values[scores]
    edge = value.sources[0][1] if len(value.sources) == 1 else None
    if edge.__class__ is not Mask or not edge.unit:
        return None

    def kept():
        kept = of_matrices(edge.keep != 0, value.shape)
        each = kept if kept.dim() == 2 else kept.view(value.shape)
        return None if bool(p().masked_fill(each, 0).any()) else kept

    return Unmasked(kept)


@rule("SoftmaxBackwardData")
def softmax_backward(g):
    """``p * (c - sum(p c))`` in the cotangent c and in p, from the graph of a gradient."""
    c, y = g.src
    p, saved, shape = g.tensor("output"), g.tensor("grad_output"), g.shape
    if not shape:
        return None
    axis = g.axis("dim", len(shape))
    terms = []
    if c is not None:
        terms.append(g.single(c, Softmax(lambda: wide(p), axis)))
    if y is not None:
        # dp (c - sum(p c)) - p sum(c dp)
        terms.append(
            g.single(
                y,
                RankOne(
                    lambda: (
                        wide(saved) - (wide(p) * wide(saved)).sum(axis, keepdim=True),
                        wide(p),
                        wide(saved),
                    ),
                    axis,
                ),
            )
        )
    return g.plus(terms)


@rule("LogSoftmaxBackwardData")
def log_softmax_backward(g):
    """``c - exp(y) * sum(c)`` in the cotangent c and in y, from the graph of a gradient."""
    c, y = g.src
    out, saved, shape = g.tensor("output"), g.tensor("grad_output"), g.shape
    if not shape:
        return None
    axis = g.axis("dim", len(shape))
    terms = []
    if c is not None:
        terms.append(g.single(c, Transpose(LogSoftmax(lambda: wide(out).exp(), axis))))
    if y is not None:
        terms.append(
            g.diagonal(
                y, lambda: (-wide(out).exp() * wide(saved).sum(axis, keepdim=True)).to(saved.dtype)
            )
        )
    return g.plus(terms)


@rule("MaskedSoftmax", curve=softmax_bend)
def masked_softmax(g):
    mask, p, shape = g.tensor("mask"), g.tensor("result"), g.shape
    if tuple(mask.shape) != shape or not shape or g.saved("dim") is None:
        return None
    p = Once(lambda p=p: wide(p).masked_fill(mask, 0))
    return g.single(g.src[0], Softmax(p, g.axis("dim", len(shape))))


@rule("WeightNormInterface")
def weight_norm(g):
    """``w = v * (scale / norm(v))``, the norm over all axes but one."""
    v, scale = g.src
    saved, size, norm = g.tensor("v"), g.tensor("g"), g.tensor("result1")
    shape = g.shape
    dim = g.axis("dim", len(shape))
    axes = tuple(a for a in range(len(shape)) if a != dim)

    def unit() -> tuple[Tensor, Tensor]:
        """v / norm(v), and 1 / norm(v)."""
        x = wide(saved)
        if torch.is_grad_enabled() and x.requires_grad:
            r = x.square().sum(axes, keepdim=True).rsqrt()
        else:
            r = wide(norm).detach().reciprocal()
        return x * r, r

    stats = Once(unit)
    dtype = g.meta[0].dtype
    terms = []
    if v is not None:
        turned = g.single(v, Project(lambda: stats()[0], axes, 1, centred=False))
        terms.append(g.diagonal(turned, lambda: (wide(size) * stats()[1]).to(dtype)))
    if scale is not None:
        terms.append(g.diagonal(g.match(scale), lambda: stats()[0].to(dtype)))
    return g.plus(terms)
