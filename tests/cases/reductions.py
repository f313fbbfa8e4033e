"""Sums, norms, extremes, cumulative functions and softmaxes."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import A, C, D, In, M, P, R, V

X = R(3, 4)
B = R(2, 3, 4)
NAN = V(1.0, math.nan, -2.0, 0.5)

# How each reduction is asked: over everything, one axis, the last, several, kept, the samples' own.
WAYS = {
    "all": ({}, None),
    "dim1": ({"dim": 1}, True),
    "last_kept": ({"dim": -1, "keepdim": True}, True),
    "samples": ({"dim": 0}, None),
    "samples_kept": ({"dim": 0, "keepdim": True}, None),
}
SEVERAL = {
    "two": ({"dim": (1, 2)}, True),
    "two_negative": ({"dim": (-1, 0)}, None),
    "two_kept": ({"dim": (-2, 2), "keepdim": True}, True),
    "three": ({"dim": (0, 1, 2)}, None),
}
# name, function, domain, node, takes no dim at all, takes several dims
REDUCTIONS = [
    ("sum", torch.sum, R, "Sum", True, True),
    ("mean", torch.mean, R, "Mean", True, True),
    ("nansum", torch.nansum, R, "Nansum", True, True),
    ("nanmean", torch.nanmean, R, "", True, True),
    ("var", torch.var, R, "Var", True, True),
    ("std", torch.std, R, "Std", True, True),
    ("logsumexp", torch.logsumexp, R, "Logsumexp", False, True),
    ("prod", torch.prod, A, "Prod", True, False),
    ("amax", torch.amax, D, "Amax", True, True),
    ("amin", torch.amin, D, "Amin", True, True),
    ("norm", torch.norm, R, "LinalgVectorNorm", True, False),
    ("vector_norm", torch.linalg.vector_norm, R, "LinalgVectorNorm", True, True),
    ("count_times", lambda x, **k: torch.count_nonzero(x, k.get("dim")).to(x.dtype) * x.sum(), R,
     "", True, False),
]  # fmt: skip
CASES = []
for name, func, domain, node, whole, several in REDUCTIONS:
    ways = WAYS | (SEVERAL if several else {})
    for way, (options, samples) in ways.items():
        if way == "all" and not whole:
            continue
        if name == "count_times":
            if way.endswith("kept"):
                continue
            samples = None
        CASES.append(
            C(f"{name}_{way}", lambda x, f=func, o=options: f(x, **o), domain(2, 3, 4), nodes=node,
              samples=samples)
        )  # fmt: skip
    if whole:
        CASES.append(C(f"{name}_1d", func, domain(4), nodes=node))
        CASES.append(C(f"{name}_one_each", lambda x, f=func: f(x * x), domain(2)))
for name in ("sum", "mean", "nansum", "prod", "amax", "norm"):
    CASES.append(C(f"{name}_scalar", getattr(torch, name), A()))
    if name != "norm":
        CASES.append(C(f"{name}_scalar_dim", lambda x, n=name: getattr(torch, n)(x, dim=-1), A()))
    CASES.append(
        C(f"{name}_axis_of_one", lambda x, n=name: getattr(torch, n)(x, dim=1), A(3, 1),
          samples=True)
    )  # fmt: skip
CASES += [
    C("sum_of_nothing", torch.sum, R(0)),
    C("sum_no_samples", lambda x: x.sum(1), R(0, 3), samples=True),
    C("sum_empty_axis", lambda x: x.sum(1), R(3, 0), samples=True),
    C("mean_no_samples", lambda x: x.mean(1), R(0, 3), samples=True),
    C("prod_empty_axis", lambda x: x.prod(1), R(3, 0), samples=True),
    C("sum_keepdim_no_dim", lambda x: x.sum((), keepdim=True), X),
    C("sum_to_size", lambda x: x.sum_to_size(3, 1), X, samples=True),
    C("sum_dtype", lambda x: x.sum(1, dtype=torch.float64), X, samples=True),
    C("mean_samples_subtracted", lambda x: x - x.mean(0), X, mixes=True),
    C("mean_samples_subtracted_kept", lambda x: x - x.mean(0, keepdim=True), X, mixes=True),
    C("features_centred", lambda x: x - x.mean(1, keepdim=True), X, samples=True),
    C("standardised", lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True), X,
      samples=True, factor=8, reason="the projection's entries cancel"),
    C("var_unbiased_off", lambda x: x.var(1, unbiased=False), X, nodes="Var", samples=True),
    C("var_correction_0", lambda x: x.var(-1, correction=0, keepdim=True), B, nodes="Var",
      samples=True),
    C("var_correction_3", lambda x: x.var((0, 2), correction=3), B, nodes="Var"),
    C("std_correction_0", lambda x: x.std(1, correction=0), X, nodes="Std", samples=True),
    C("var_mean", lambda x: torch.var_mean(x, 1), X, nodes="VarMean", samples=True),
    C("std_mean", lambda x: torch.std_mean(x, (1, 2), keepdim=True), B, nodes="StdMean",
      samples=True),
    C("std_constant", lambda x: x.std(1), In((1, 3), "values", (1.0, 1.0, 1.0)),
      second=False),
    C("nansum_with_nan", torch.nansum, NAN, second=False),
    C("nanmean_with_nan", torch.nanmean, NAN, second=False),
    C("prod_with_a_zero", torch.prod, V(2.0, 0.0, 3.0)),
    C("prod_with_two_zeros", torch.prod, V(2.0, 0.0, 0.0)),
    C("prod_dim_with_zeros", lambda x: x.view(2, 2).prod(1), V(2.0, 0.0, 0.0, 0.0)),
    C("square_sum", lambda x: (x**2).sum(-1), X, nodes="Pow Sum", samples=True),
    C("mean_square", lambda x: x.square().mean(), X),
    C("norm_1", lambda x: x.norm(1, dim=1), A(3, 4), samples=True, second=False),
    C("norm_3", lambda x: x.norm(3, dim=1), A(3, 4), samples=True),
    C("norm_inf", lambda x: x.norm(math.inf, dim=1), D(3, 4), samples=True, second=False),
    C("norm_minus_inf", lambda x: x.norm(-math.inf, dim=1), D(3, 4), samples=True, second=False),
    C("norm_0", lambda x: x.norm(0, dim=1), A(3, 4), samples=True, second=False),
    C("norm_half", lambda x: torch.linalg.vector_norm(x, 0.5, dim=1), A(3, 4), samples=True,
      factor=4, reason="a power of a sum of powers"),
    C("norm_at_zero", lambda x: x.norm(), V(0.0, 0.0), second=False),
    C("norm_fro", lambda x: torch.linalg.norm(x), X),
    C("normalize", lambda x: F.normalize(x, dim=-1), X, samples=True),
    C("normalize_1", lambda x: F.normalize(x, p=1.0, dim=1), A(3, 4), samples=True, second=False),
    C("renorm", lambda x: x.renorm(2, 0, 1.0), X, nodes="Renorm", second=False),
    C("dist", torch.dist, X, X),
    C("logsumexp_minus_inf", lambda x: x.masked_fill(x > 0, -math.inf).logsumexp(0), V(1.0, 0.0, -1),
      second=False),
    C("logcumsumexp", lambda x: x.logcumsumexp(1), X, nodes="Logcumsumexp", samples=True),
    C("logcumsumexp_samples", lambda x: x.logcumsumexp(0), X, nodes="Logcumsumexp", mixes=True),
    C("max_all", torch.max, D(3, 4), nodes="Max"),
    C("min_all", torch.min, D(3, 4), nodes="Min"),
    C("max_dim", lambda x: x.max(1).values, D(3, 4), nodes="Max", samples=True),
    C("max_dim_both", lambda x: tuple(x.max(1)), D(3, 4), nodes="Max", samples=True),
    C("min_dim_kept", lambda x: x.min(-1, keepdim=True)[0], D(3, 4), nodes="Min", samples=True),
    C("max_samples", lambda x: x.max(0).values, D(3, 4), nodes="Max"),
    C("max_tie", lambda x: x.view(2, 2).max(1).values, V(1.0, 1.0, 0.0, 0.0)),
    C("max_all_tie", torch.max, V(1.0, 2.0, 2.0), second=False),
    C("amax_tie", torch.amax, V(1.0, 2.0, 2.0), second=False),
    C("amin_tie_dim", lambda x: x.view(2, 2).amin(1), V(1.0, 1.0, 0.0, 0.0), second=False),
    C("aminmax", lambda x: tuple(torch.aminmax(x, dim=1)), D(3, 4), nodes="Aminmax", samples=True,
      since=(2, 13)),
    C("amin_scalar_kept", lambda x: x.amin(0, keepdim=True), R(), nodes="Amin"),
    C("aminmax_scalar", lambda x: tuple(torch.aminmax(x, dim=0)), R(), nodes="Aminmax",
      since=(2, 13)),
    C("cumsum", lambda x: x.cumsum(1), X, nodes="Cumsum", samples=True),
    C("cumsum_negative", lambda x: x.cumsum(-2), B, nodes="Cumsum", samples=True),
    C("cumsum_samples", lambda x: x.cumsum(0), X, nodes="Cumsum", mixes=True),
    C("cumsum_one", lambda x: x.cumsum(-1), R(3, 1), samples=True),
    C("cumsum_scalar", lambda x: x.cumsum(0), R()),
    C("cumprod", lambda x: x.cumprod(-1), A(3, 4), nodes="Cumprod", samples=True, factor=4,
      reason="products over partial products"),
    C("cumprod_with_zero", lambda x: x.cumprod(0), V(2.0, 0.0, 3.0, 4.0)),
    C("cumprod_samples", lambda x: x.cumprod(0), A(3, 2), nodes="Cumprod", mixes=True),
    C("cummax", lambda x: x.cummax(1).values, D(3, 4), nodes="Cummax", samples=True),
    C("cummin", lambda x: x.cummin(-1).values, D(3, 4), nodes="Cummin", samples=True),
    C("cumulative_trapezoid", lambda x: torch.cumulative_trapezoid(x, dim=1), X, samples=True),
    C("trapezoid", lambda x, y: torch.trapezoid(y, x, dim=-1), D(4), X),
    C("diff", lambda x: x.diff(n=2, dim=-1), X, samples=True),
    C("diff_samples", lambda x: x.diff(dim=0, prepend=x[:1]), X, mixes=True),
    C("gradient", lambda x: torch.gradient(x, dim=1)[0], X, samples=True),
    C("softmax", lambda x: x.softmax(-1), X, nodes="Softmax", samples=True),
    C("softmax_middle", lambda x: x.softmax(1), B, nodes="Softmax", samples=True),
    C("softmax_samples", lambda x: x.softmax(0), X, nodes="Softmax", mixes=True),
    C("softmax_one", lambda x: x.softmax(-1), R(3, 1), nodes="Softmax", samples=True),
    C("softmax_scalar", lambda x: x.softmax(0), R()),
    C("softmax_empty", lambda x: x.softmax(-1), R(0, 3), samples=True),
    C("softmax_dtype", lambda x: x.softmax(-1, dtype=torch.float64), X, samples=True),
    C("softmax_large", lambda x: (x * 5).softmax(-1), D(2, 3), samples=True),
    C("log_softmax", lambda x: x.log_softmax(-1), X, nodes="LogSoftmax", samples=True),
    C("log_softmax_middle", lambda x: x.log_softmax(-2), B, nodes="LogSoftmax", samples=True),
    C("log_softmax_samples", lambda x: x.log_softmax(0), X, nodes="LogSoftmax", mixes=True),
    C("log_softmax_dtype", lambda x: x.log_softmax(-1, dtype=torch.float64), X, samples=True),
    M("Softmin", lambda: nn.Softmin(-1), X, nodes="Softmax", samples=True),
    M("Softmax2d", nn.Softmax2d, R(2, 3, 1, 2), nodes="Softmax", samples=True),
    M("LogSoftmax", lambda: nn.LogSoftmax(1), X, nodes="LogSoftmax", samples=True),
    C("softmax_temperature", lambda x, t: (x / t).softmax(-1), X, P(), samples=(0,)),
    C("entropy", lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1), X, samples=True, factor=8,
      reason="terms of both signs cancel"),
    C("expectation", lambda x, v: x.softmax(-1) @ v, X, R(4, 2), samples=(0,)),
    C("logit_difference", lambda x: x[:, 0] - x[:, 1:].logsumexp(-1), X, samples=True),
    C("corrcoef", torch.corrcoef, R(2, 5), factor=16, reason="a normalised covariance cancels"),
    C("cov", torch.cov, R(2, 4)),
    C("histogram_free_mean", lambda x: x[x > x.mean()].mean(), X),
]  # fmt: skip
