"""Indexing, gathering, scattering, padding, sorting and in-place writes."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import C, D, M, R, quietly

X = R(3, 4)
B = R(2, 3, 4)


def ints(x, values):
    """An index tensor beside x."""
    return torch.tensor(values, device=x.device)


def write(func):
    """func writes into a copy of its first argument (a leaf may not be written to)."""

    def call(x, *others):
        y = x.clone()
        func(y, *others)
        return y

    return call


def rows(*starts):
    """Index columns, different in each of 3 rows."""
    return [[s % 4, (s + 2) % 4] for s in starts]


CASES = [
    C("index_rows", lambda x: x[ints(x, [2, 0, 2])], X, nodes="Index", mixes=True),
    C("index_columns", lambda x: x[:, ints(x, [3, 0, 0, 1])], X, nodes="Index", samples=True),
    C("index_pairs", lambda x: x[ints(x, [0, 1, 1]), ints(x, [3, 0, 0])], X, nodes="Index"),
    C("index_negative", lambda x: x[:, ints(x, [-1, -4])], X, nodes="Index", samples=True),
    C("index_2d", lambda x: x[:, ints(x, [[0, 1], [3, 3]])], X, nodes="Index", samples=True),
    C("index_separated", lambda x: x[ints(x, [0, 1, 0]), :, ints(x, [3, 0, 2])], B, nodes="Index"),
    C("index_broadcast", lambda x: x[ints(x, [[0], [1]]), ints(x, [0, 2])], B, nodes="Index"),
    C("index_with_none", lambda x: x[None, :, ints(x, [1, 2])], X, nodes="Index"),
    C("index_nothing", lambda x: x[:, ints(x, [0])[:0]], X, samples=True),
    C("index_list", lambda x: x[:, [2, 1]], X, nodes="Index", samples=True),
    C("index_mask", lambda x: x[x > 0], X, nodes="Index"),
    C("index_mask_rows", lambda x: x[ints(x, [True, False, True])], X, nodes="Index"),
    C("index_mask_columns", lambda x: x[:, ints(x, [True, False, True, True])], X, nodes="Index",
      samples=True),
    C("index_mask_none_true", lambda x: x[x > 1e9], X, nodes="Index"),
    C("index_select", lambda x: x.index_select(1, ints(x, [1, 1, 3])), X, nodes="IndexSelect",
      samples=True),
    C("index_select_rows", lambda x: x.index_select(0, ints(x, [1, 2, 0])), X, nodes="IndexSelect",
      mixes=True),
    C("index_select_negative_dim", lambda x: x.index_select(-2, ints(x, [1])), B,
      nodes="IndexSelect", samples=True),
    C("gather", lambda x: x.gather(1, ints(x, rows(0, 1, 1))), X, nodes="Gather", samples=True),
    C("gather_rows", lambda x: x.gather(0, ints(x, [[2, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]])), X,
      nodes="Gather", mixes=True),
    C("gather_small_index", lambda x: x.gather(-1, ints(x, [[1, 1, 0]])), X, nodes="Gather"),
    C("gather_scalar", lambda x: x.gather(0, ints(x, 0)), R(), nodes="Gather"),
    C("take", lambda x: x.take(ints(x, [[0, 5], [11, -1]])), X, nodes="Take"),
    C("take_along_dim", lambda x: x.take_along_dim(ints(x, rows(2, 0, 1)), 1), X, nodes="Gather",
      samples=True),
    C("take_along_flat", lambda x: torch.take_along_dim(x, ints(x, [7, 7, 0])), X,
      strided=False),
    C("scatter", lambda x, y: x.scatter(1, ints(x, rows(0, 1, 3)), y), X, R(3, 2), nodes="Scatter",
      samples=True),
    C("scatter_partial", lambda x: x.scatter(1, ints(x, [[3], [0]]), x.new_ones(3, 2)), X,
      nodes="Scatter"),
    C("scatter_value", lambda x: x.scatter(1, ints(x, rows(0, 1, 3)), 2.5), X, nodes="Scatter",
      samples=True),
    C("scatter_add", lambda x, y: x.scatter_add(1, ints(x, [[1, 1], [0, 1], [3, 3]]), y), X,
      R(3, 2), nodes="ScatterAdd", samples=True),
    C("scatter_add_rows", lambda x: x.new_zeros(2, 4).scatter_add(0, ints(x, [[0] * 4, [1] * 4,
      [0] * 4]), x), X, nodes="ScatterAdd"),
    C("scatter_reduce_sum", lambda x, y: x.scatter_reduce(1, ints(x, rows(0, 0, 1)), y, "sum"), X,
      R(3, 2), nodes="ScatterReduce", samples=True),
    C("scatter_reduce_mean", lambda x, y: x.scatter_reduce(1, ints(x, [[1, 1], [0, 1], [3, 3]]), y,
      "mean"), X, R(3, 2), nodes="ScatterReduce", samples=True),
    C("scatter_reduce_amax", lambda x, y: x.scatter_reduce(1, ints(x, [[1, 1], [0, 1], [3, 3]]), y,
      "amax"), D(3, 4), R(3, 2), nodes="ScatterReduce", samples=True, second=False),
    C("scatter_reduce_prod", lambda x, y: x.scatter_reduce(1, ints(x, rows(0, 1, 3)), y, "prod",
      include_self=False), X, R(3, 2), nodes="ScatterReduce", samples=True, second=False),
    C("index_add", lambda x, y: x.index_add(1, ints(x, [0, 0, 3]), y, alpha=0.5), X, R(3, 3),
      nodes="IndexAdd", samples=True),
    C("index_add_rows", lambda x, y: x.index_add(0, ints(x, [2, 0]), y), X, R(2, 4),
      nodes="IndexAdd"),
    C("index_copy", lambda x, y: x.index_copy(1, ints(x, [3, 1]), y), X, R(3, 2),
      nodes="IndexCopy", samples=True),
    C("index_fill", lambda x: x.index_fill(1, ints(x, [3, 1]), 2.0), X, nodes="IndexFill",
      samples=True),
    C("index_fill_tensor", lambda x, v: x.index_fill(1, ints(x, [3, 1]), v), X, R(),
      nodes="IndexFill"),
    C("index_reduce", quietly(lambda x, y: x.index_reduce(1, ints(x, [3, 1]), y, "mean")), X,
      R(3, 2), nodes="IndexReduce", samples=True, second=False),
    C("index_put", lambda x, y: x.index_put((ints(x, [0, 2]), ints(x, [1, 3])), y), X, R(2),
      nodes="IndexPut"),
    C("index_put_accumulate", lambda x, y: x.index_put((ints(x, [0, 0]), ints(x, [1, 1])), y,
      accumulate=True), X, R(2), nodes="IndexPut"),
    C("index_put_broadcast", lambda x, y: x.index_put((ints(x, [0, 2]),), y), X, R(4),
      nodes="IndexPut"),
    C("index_put_mask", lambda x, y: x.index_put((x > 0,), y), X, R(), nodes="IndexPut"),
    C("put", lambda x, y: x.put(ints(x, [5, 0]), y), X, R(2), nodes="Put", poison=False),
    C("masked_fill", lambda x: x.masked_fill(x > 0, 3.0), X, nodes="MaskedFill", samples=True),
    C("masked_fill_broadcast", lambda x: x.masked_fill(ints(x, [True, False, True, False]), 3.0), X,
      nodes="MaskedFill", samples=True),
    C("masked_fill_wider_mask", lambda x: x.masked_fill(x.new_ones(2, 1, 1) > 2, 3.0), X,
      nodes="MaskedFill"),
    C("masked_fill_tensor", lambda x, v: x.masked_fill(x > 0, v), X, R(), nodes="MaskedFill"),
    C("masked_fill_inf_softmax", lambda x: x.masked_fill(x.gt(0.5), -torch.inf).softmax(-1), X,
      nodes="MaskedFill", samples=True),
    C("masked_select", lambda x: x.masked_select(x < 0.2), X, nodes="MaskedSelect"),
    C("masked_scatter", lambda x, y: x.masked_scatter(x > 0, y), X, R(12), nodes="MaskedScatter",
      second=False),
    C("masked_scatter_wide_mask", lambda x, y: x.masked_scatter(torch.stack([x > 0, x < 9]), y),
      R(4), R(8), nodes="MaskedScatter", second=False),
    C("masked_scatter_scalar", lambda x, y: x.masked_scatter(y > 0, y), R(), R(3),
      nodes="MaskedScatter", second=False),
    C("nonzero_gather", lambda x: x[tuple((x > 0).nonzero().T)], X, nodes="Index"),
    C("bucketize", lambda x: x * torch.bucketize(x.detach().contiguous(),
      x.new_tensor([-1.0, 0, 1])), X,
      samples=True),
    C("one_hot_matmul", lambda w: F.one_hot(ints(w, [2, 0, 2]), 3).to(w.dtype) @ w, X),
    C("embedding", lambda w: F.embedding(ints(w, [[2, 0], [2, 1]]), w), X, nodes="Embedding"),
    C("embedding_padding", lambda w: F.embedding(ints(w, [2, 0, 2]), w, padding_idx=2), X,
      nodes="Embedding"),
    C("embedding_scaled", lambda w: F.embedding(ints(w, [2, 0, 2]), w, scale_grad_by_freq=True), X,
      nodes="Embedding"),
    C("embedding_bag_sum", lambda w: F.embedding_bag(ints(w, [2, 0, 2, 1]), w, ints(w, [0, 3]),
      mode="sum"), X, nodes="EmbeddingBag", second=False),
    C("embedding_bag_mean", lambda w: F.embedding_bag(ints(w, [[2, 0], [2, 1]]), w), X,
      nodes="EmbeddingBag", second=False),
    C("embedding_bag_max", lambda w: F.embedding_bag(ints(w, [[2, 0], [2, 1]]), w, mode="max"), X,
      nodes="EmbeddingBag", second=False),
    C("embedding_bag_weighted", lambda w, s: F.embedding_bag(ints(w, [[2, 0], [2, 1]]), w,
      mode="sum", per_sample_weights=s), X, R(2, 2), nodes="EmbeddingBag", second=False),
    M("Embedding_of_argmax", lambda: nn.Embedding(4, 2), X, samples=True,
      func=lambda m, x: m(x.argmax(-1)) * x[:, :2]),
    # in-place writes
    C("write_slice", write(lambda y: y[:, 1:3].mul_(2.0)), X, nodes="CopySlices", samples=True),
    C("write_row", write(lambda y, v: y[1].copy_(v)), X, R(4), nodes="CopySlices"),
    C("write_element", write(lambda y: y[1, 2].zero_()), X),
    C("write_by_index", write(lambda y, v: y.__setitem__((slice(None), 1), v)), X, R(3),
      samples=True),
    C("write_by_mask", write(lambda y: y.__setitem__(y > 0, 0.25)), X, samples=True),
    C("write_step", write(lambda y, v: y[:, ::2].add_(v)), X, R(3, 2), samples=True),
    C("write_transposed", write(lambda y: y.T[1].exp_()), X, samples=True),
    C("write_view_of_view", write(lambda y: y[:, 1:][:, :2].sin_()), X, samples=True),
    C("write_chain", write(lambda y: y.mul_(2).add_(1).tanh_()), X, samples=True),
    C("write_diagonal", write(lambda y: y.diagonal().mul_(3)), X, samples=True),
    C("write_diagonal_copy", write(lambda y, v: y.diagonal().copy_(v)), X, R(3),
      nodes="CopySlices"),
    C("write_by_strides", write(lambda y, v: y.as_strided((3, 2), (4, 3)).copy_(v)), X, R(3, 2),
      nodes="CopySlices", strided=False),
    C("write_by_strides_across", write(lambda y, v: y.as_strided((2, 4), (1, 3)).mul_(v)), X,
      R(2, 4), nodes="CopySlices", strided=False),
    C("write_by_strides_broadcast", write(lambda y, v: y.as_strided((2, 4), (1, 3)).sub_(v)), X,
      R(4), nodes="CopySlices", strided=False),
    C("write_diagonal_fill", write(lambda y: y.fill_diagonal_(0)), X),
    C("write_into_zeros", lambda x: x.new_zeros(3, 6).index_copy_(1, ints(x, [0, 2, 3, 5]), x), X,
      samples=True),
    C("assemble_matrix", lambda x: write(lambda m: (m[0, 1].copy_(x[0]), m[1, 0].copy_(-x[1]),
      m[1, 1].copy_(x[0] * x[1])))(x.new_zeros(2, 2)), R(2), nodes="CopySlices"),
    C("accumulate_in_place", lambda x: write(lambda y: [y.add_(0.5 * y.roll(k, -1))
      for k in (1, 2)])(x), X, samples=True),
    # orders: values pass through, positions do not depend on x
    C("sort", lambda x: x.sort(-1).values, D(3, 4), nodes="Sort", samples=True),
    C("sort_descending", lambda x: x.sort(1, descending=True)[0], D(3, 4), nodes="Sort",
      samples=True),
    C("sort_samples", lambda x: x.sort(0).values, D(3, 4), nodes="Sort", mixes=True),
    C("sort_ties_stable", lambda x: x.round().sort(stable=True, dim=-1).values * x, D(2, 4),
      nodes="Sort", samples=True),
    C("msort", torch.msort, D(3, 2), mixes=True),
    C("argsort_gather", lambda x: x.gather(1, x.argsort(1)), D(3, 4), nodes="Gather", samples=True),
    C("topk", lambda x: x.topk(2).values, D(3, 4), nodes="Topk", samples=True),
    C("topk_samples", lambda x: x.topk(3, dim=0, largest=False).values, D(3, 4), nodes="Topk",
      mixes=True),
    C("kthvalue", lambda x: x.kthvalue(2, -1).values, D(3, 4), nodes="Kthvalue", samples=True),
    C("kthvalue_keepdim", lambda x: x.kthvalue(3, 0, True).values, D(3, 4), nodes="Kthvalue"),
    C("mode", lambda x: x.mode(-1).values, D(3, 4), nodes="Mode", samples=True),
    C("median_dim", lambda x: x.median(-1).values, D(3, 5), nodes="Median", samples=True),
    C("median_all", torch.median, D(3, 3), nodes="Median"),
    C("nanmedian", lambda x: x.nanmedian(1).values, D(3, 5), nodes="Nanmedian", samples=True),
    C("quantile", lambda x: x.quantile(0.3, dim=-1), D(3, 4), samples=True),
    C("unique_sorted_gather", lambda x: x.flatten()[x.flatten().sort().indices[:5]], D(3, 4)),
]  # fmt: skip

PADS = [
    ("constant", (1, 2), (2, 3)), ("constant", (0, 1, 2, 0), (2, 3)), ("constant", (-1, 2), (2, 4)),
    ("constant", (1, -2, 0, 1), (2, 3, 4)), ("constant", (-1, -1), (2, 4)),
    ("constant", (0, 0, 1, 1), (2, 2)), ("constant", (1, 1), (2, 0)),
    ("reflect", (1, 2), (2, 2, 4)), ("reflect", (1, 2, 0, 1), (1, 2, 2, 3)),
    ("reflect", (1, 0, 1, 1, 0, 1), (1, 1, 2, 2, 2)), ("replicate", (2, 1), (2, 2, 3)),
    ("replicate", (1, 2, 3, 0), (1, 2, 2, 2)), ("replicate", (1, 0, 0, 1, 1, 1), (1, 1, 2, 1, 2)),
    ("circular", (1, 2), (2, 2, 3)), ("circular", (1, 1, 2, 0), (1, 2, 2, 2)),
    ("reflect", (1, 1), (2, 3)), ("replicate", (1, 1), (2, 3)), ("circular", (2, 1), (2, 3)),
    ("replicate", (-1, 2), (2, 2, 3)), ("circular", (1, 1, 0, 1, 1, 0), (1, 1, 2, 2, 2)),
]  # fmt: skip
for mode, pad, shape in PADS:
    label = "_".join(map(str, pad)) + "_on_" + "x".join(map(str, shape))
    inner = len(pad) // 2 < len(shape)
    spatial = len(shape) - len(pad) // 2 >= 2 or mode == "constant"
    CASES.append(
        C(f"pad_{mode}_{label}", lambda x, m=mode, p=pad: F.pad(x, p, mode=m), R(*shape),
          nodes="ConstantPadNd" if mode == "constant" else "", samples=(inner and spatial) or None)
    )  # fmt: skip
CASES += [
    C("pad_value", lambda x: F.pad(x, (1, 1), value=2.5), X, nodes="ConstantPadNd", samples=True),
    C("pad_samples", lambda x: F.pad(x, (0, 0, 1, 1)), X, nodes="ConstantPadNd"),
    M("ZeroPad2d", lambda: nn.ZeroPad2d((1, 0, 2, 1)), R(2, 1, 2, 2), samples=True),
    M("ReflectionPad1d", lambda: nn.ReflectionPad1d(1), R(2, 2, 3), nodes="ReflectionPad1D",
      samples=True),
    M("ReflectionPad2d", lambda: nn.ReflectionPad2d(1), R(2, 1, 2, 3), nodes="ReflectionPad2D",
      samples=True),
    M("ReflectionPad3d", lambda: nn.ReflectionPad3d(1), R(1, 1, 2, 2, 2), nodes="ReflectionPad3D",
      samples=True),
    M("ReplicationPad1d", lambda: nn.ReplicationPad1d(2), R(2, 1, 2), nodes="ReplicationPad1D",
      samples=True),
    M("ReplicationPad2d", lambda: nn.ReplicationPad2d(1), R(2, 1, 2, 2), nodes="ReplicationPad2D",
      samples=True),
    M("ReplicationPad3d", lambda: nn.ReplicationPad3d(1), R(1, 1, 1, 2, 2),
      nodes="ReplicationPad3D", samples=True),
    M("CircularPad2d", lambda: nn.CircularPad2d(1), R(1, 1, 2, 3), samples=True),
]  # fmt: skip
