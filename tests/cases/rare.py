"""Nodes that everyday calls do not record: other overloads, in-place forms, backward ops as functions."""

import torch
import torch.nn.functional as F

from .case import A, C, D, P, R, U, quietly, seeded
from .gradients import gradient

aten = torch.ops.aten
X = R(3, 4)
I1 = R(2, 4, 3)
CANCEL = {"factor": 16, "reason": "normalisation removes the mean: its entries cancel"}


def copied(func):
    """func writes its result over a copy of its argument."""

    def call(x):
        y = x * 1.0
        func(y)
        return y

    return call


def statistics(x):
    """Running mean and variance of 4 channels."""
    return x.new_tensor([0.1, -0.2, 0.3, 0.0]), x.new_tensor([1.0, 2.0, 0.5, 1.5])


CASES = [
    C("aten_alias", aten.alias, X, nodes="Alias", samples=True),
    C("aten_lift_fresh", lambda x: aten.lift_fresh(x * 1.0), X, nodes="LiftFresh", samples=True),
    C("copy_into_fresh", lambda x: torch.empty_like(x).copy_(x).sin(), X, samples=True,
      nodes="CopyBackwards"),
    C("copy_into_wider_dtype", lambda x: torch.empty(3, 4, dtype=torch.float64, device=x.device)
      .copy_(x).sin(), X, samples=True),
    C("copy_broadcast", lambda x: torch.empty(3, 4, dtype=x.dtype, device=x.device).copy_(x), R(4)),
    C("unsqueeze_in_place", lambda x: (x * 2).unsqueeze_(1), X, samples=True, nodes="Unsqueeze"),
    C("squeeze_in_place", lambda x: (x * 2).squeeze_(), R(3, 1, 2), nodes="Squeeze"),
    C("squeeze_dim_in_place", lambda x: (x * 2).squeeze_(1), R(3, 1, 2), nodes="Squeeze",
      samples=True),
    C("squeeze_dims_in_place", lambda x: aten.squeeze_(x * 2, [1]), R(3, 1, 2), nodes="Squeeze",
      samples=True),
    C("t_in_place", lambda x: (x * 2).t_(), X, nodes="T"),
    C("transpose_in_place", lambda x: (x * 2).transpose_(0, 1), X, nodes="Transpose"),
    C("zero_in_place", copied(torch.Tensor.zero_), X, second=False),
    C("fill", lambda x: torch.fill(x, 2.0), X, nodes="Fill", second=False),
    C("fill_tensor", lambda x, v: torch.fill(x * 2, v), X, R(), nodes="Fill", second=False),
    C("fill_in_place", copied(lambda y: y.fill_(2.0)), X, second=False),
    C("fill_tensor_in_place", lambda x, v: (x * 2).fill_(v), X, R(), nodes="Fill", second=False),
    C("fill_row_in_place", copied(lambda y: y[1].fill_(2.0)), X),
    C("uniform_in_place", seeded(copied(lambda y: y[:, 1].uniform_())), X, samples=True),
    C("bernoulli", seeded(torch.bernoulli), U(3, 4), nodes="Bernoulli", second=False,
      strided=False),
    C("poisson", seeded(torch.poisson), P(3, 4), nodes="Poisson", second=False, strided=False),
    C("native_dropout", seeded(lambda x: torch.native_dropout(x, 0.5, True)[0]), X,
      nodes="NativeDropout", strided=False),
    C("native_dropout_eval", lambda x: torch.native_dropout(x, 0.5, False)[0], X, samples=True),
    C("div_number_floor", lambda x: aten.div.Scalar_mode(x, 0.7, rounding_mode="floor"), A(3, 4), nodes="Div",
      second=False, samples=True),
    C("div_number_trunc", lambda x: torch.div(x, 0.7, rounding_mode="trunc") + x, A(3, 4),
      samples=True),
    C("ldexp", lambda x: torch.ldexp(x, torch.tensor([1, 2, -1, 0], device=x.device)), X,
      samples=True),
    C("gammainc", lambda x: torch.special.gammainc(torch.full_like(x, 1.5), x), P(3, 4),
      nodes="Igamma", samples=True, factor=8, reason="a series and its derivative by exponentials"),
    C("gammaincc", lambda x: torch.special.gammaincc(torch.full_like(x, 1.5), x), P(3, 4),
      nodes="Igammac", samples=True, factor=8, reason="a series and its derivative by exponentials"),
    C("polygamma_in_place", lambda x: (x * 1.5).polygamma_(2), P(3, 4), nodes="Polygamma",
      samples=True, factor=4, reason="the series of a high derivative"),
    C("zeta_tensors", lambda x: torch.special.zeta(torch.full_like(x, 2.5), x), P(3, 4),
      nodes="SpecialZeta", samples=True, second=False),
    C("xlog1py_number_first", lambda x: torch.special.xlog1py(2.0, x), P(3, 4),
      nodes="SpecialXlog1Py", samples=True),
    C("xlog1py_number_last", lambda x: torch.special.xlog1py(x, 2.0), P(3, 4),
      nodes="SpecialXlog1Py", samples=True),
    C("rrelu_train_in_place", seeded(lambda x: F.rrelu(x * 2, training=True, inplace=True)),
      A(3, 4), nodes="RreluWithNoise", strided=False),
    C("nanmedian_all", torch.nanmedian, D(3, 3), nodes="Nanmedian"),
    C("norm_overloads", lambda x: (aten.norm.Scalar(x, 3), aten.norm.ScalarOpt_dim(x, 3, [1]),
      aten.norm.ScalarOpt_dtype(x, 3, dtype=torch.float64),
      aten.norm.ScalarOpt_dim_dtype(x, 3, [1], True, dtype=torch.float64)), A(3, 4), nodes="Norm"),
    C("weight_norm_interface", lambda v, g: torch._weight_norm_interface(v, g, 0)[0], X, P(3, 1),
      nodes="WeightNormInterface", samples=True, empty=False, strided=False,
      twin=lambda v, g: v * (g / v.norm(dim=1, keepdim=True))),
    C("weight_norm_interface_last", lambda v, g: torch._weight_norm_interface(v, g, 1)[0], X, P(1, 4),
      nodes="WeightNormInterface", factor=4, reason="a projection cancels", strided=False,
      twin=lambda v, g: v * (g / v.norm(dim=0, keepdim=True))),
    C("unsafe_split_with_sizes", lambda x: torch.unsafe_split_with_sizes(x, (1, 3), 1), X,
      nodes="UnsafeSplitWithSizes", samples=True),
    C("max_unpool3d", lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2),
      D(1, 1, 2, 2, 4), nodes="MaxUnpool3D", samples=True, poison=False),
    C("masked_softmax", lambda x: torch._masked_softmax(x, x > 0.8, -1, 1), X,
      nodes="MaskedSoftmax", samples=True, second=False, strided=False),
    C("safe_softmax", lambda x: torch._safe_softmax(x, -1), X, samples=True),
    C("fused_rms_norm", lambda x, w: aten._fused_rms_norm(x, [4], w, 1e-3)[0], X, R(4),
      samples=(0,), second=False, **CANCEL),
    C("batch_norm_with_update", lambda x, w, b: aten._batch_norm_with_update(x, w, b, *statistics(x),
      0.1, 1e-3)[0], I1, R(4), R(4), nodes="BatchNormWithUpdate", second=False, **CANCEL),
    C("batch_norm_no_update", lambda x, w, b: aten._batch_norm_no_update(x, w, b, *statistics(x),
      0.1, 1e-3)[0], I1, R(4), R(4), nodes="BatchNormNoUpdate", second=False, **CANCEL),
    C("batch_norm_legit", lambda x, w, b: aten._native_batch_norm_legit(x, w, b, *statistics(x),
      True, 0.1, 1e-3)[0], I1, R(4), R(4), nodes="NativeBatchNormLegit", second=False, **CANCEL),
    C("batch_norm_legit_no_stats", lambda x, w, b: aten._native_batch_norm_legit.no_stats(x, w, b,
      True, 0.1, 1e-3)[0], I1, R(4), R(4), nodes="NativeBatchNormLegit", second=False, **CANCEL),
    C("batch_norm_legit_no_training", lambda x, w, b: aten._native_batch_norm_legit_no_training(
        x, w, b, *statistics(x), 0.1, 1e-3)[0], I1, R(4), R(4), samples=(0,),
      nodes="NativeBatchNormLegitNoTraining", second=False, **CANCEL),
    C("ctc_loss_lengths_as_tensors", lambda x: torch._ctc_loss(x.log_softmax(-1), torch.tensor(
        [[1, 2], [2, 1]], device=x.device), torch.tensor([4, 4]), torch.tensor([2, 2]))[0],
      R(4, 2, 3), nodes="CtcLoss", second=False, factor=16,
      reason="a dynamic programme of log-sum-exps"),
    # an LSTM of float32 is one oneDNN node on a CPU, and another graph in float64: see ranges.py
    C("gradient_of_diagonal", gradient(lambda x: x.diagonal() ** 2), R(3, 3), second=False),
    C("gradient_of_select", gradient(lambda x: x[:, 1] ** 2), A(3, 4), second=False, samples=True),
    C("gradient_of_slice", gradient(lambda x: x[:, 1:3] ** 2), A(3, 4), second=False,
      samples=True),
    C("gradient_of_unfold", gradient(lambda x: x.unfold(1, 2, 1) ** 2), A(3, 4), second=False,
      samples=True),
    C("gradient_of_hardshrink", gradient(lambda x: F.hardshrink(x * x, 0.2)), A(3, 4),
      second=False, samples=True),
    C("gradient_of_gather", gradient(lambda x: x.gather(1, torch.tensor([[0, 0], [1, 2], [3, 3]],
      device=x.device)) ** 2), A(3, 4), second=False, samples=True),
    C("gradient_of_expand", gradient(lambda x: (x[:, None] * x[:, :, None]).sum(-1)), A(3, 4),
      second=False, samples=True, factor=16, reason="second derivatives cancel"),
    C("gradient_of_cat", gradient(lambda x: torch.cat([x * x, x.sin()], 1)), A(3, 4), second=False,
      samples=True),
    C("index_reduce_amax", quietly(lambda x, y: x.index_reduce(1, torch.tensor([3, 1],
      device=x.device), y, "amax")), D(3, 4), R(3, 2), nodes="IndexReduce", samples=True,
      second=False),
]  # fmt: skip
