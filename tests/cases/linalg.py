"""Matrix products of every rank, linear layers, einsum, and decompositions."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import SPD, A, C, D, M, P, R, W, quietly

mm, bmm = torch.mm, torch.bmm


def grouped(x, w, shared):
    """A grouped product, which torch has in float32; the second of three groups along ``shared`` is empty."""
    n = x.shape[-1] if shared == "inner" else x.shape[0] if shared == "rows" else w.shape[-1]
    ends = torch.tensor([n // 3, n // 3, n], dtype=torch.int32, device=x.device)
    return torch._grouped_mm(x.float(), w.float(), offs=ends).to(x.dtype)


def in_groups(x, w, shared):
    if shared == "inner":
        n = x.shape[-1]
        return torch.stack([x[:, i:j] @ w[i:j] for i, j in ((0, n // 3), (0, 0), (n // 3, n))])
    if shared == "rows":
        return torch.cat([x[: len(x) // 3] @ w[0], x[len(x) // 3 :] @ w[2]])
    n = w.shape[-1] // 3
    return torch.cat([x[0] @ w[:, :n], x[2] @ w[:, n:]], 1)


CASES = [
    *(C(f"grouped_mm_{k}", lambda x, w, k=k: grouped(x, w, k), *shapes, nodes="GroupedMm",
      twin=lambda x, w, k=k: in_groups(x, w, k), inner=torch.float32, strided=False, empty=False,
      samples=(0,) if k == "rows" else None, since=(2, 13)) for k, shapes in [
        ("rows", (R(5, 4), R(3, 4, 8))), ("inner", (R(4, 8), R(8, 4))),
        ("columns", (R(3, 4, 4), R(4, 8)))]),
    C("grouped_mm_batched", lambda x, w: torch._grouped_mm(x.float(), w.float()).to(x.dtype),
      R(2, 4, 4), R(2, 4, 8), nodes="GroupedMm", samples=True, inner=torch.float32, strided=False,
      empty=False, twin=bmm, since=(2, 13)),
    C("mm", mm, R(3, 4), R(4, 2), nodes="Mm", samples=(0,)),
    C("mm_row", mm, R(1, 4), R(4, 2), nodes="Mm", samples=(0,)),
    C("mm_inner_1", mm, R(3, 1), R(1, 2), nodes="Mm", samples=(0,)),
    C("mm_no_rows", mm, R(0, 4), R(4, 2), samples=(0,)),
    C("mm_no_columns", mm, R(3, 4), R(4, 0), samples=(0,)),
    C("mm_no_inner", mm, R(3, 0), R(0, 2), samples=(0,)),
    C("mm_self", lambda x: x @ x, R(3, 3), nodes="Mm"),
    C("mm_gram", lambda x: x.T @ x, R(3, 4), nodes="Mm"),
    C("mm_gram_samples", lambda x: x @ x.T, R(3, 4), nodes="Mm", mixes=True),
    C("mm_transposed_operands", lambda x, y: mm(x.T, y.T), R(4, 3), R(2, 4), nodes="Mm"),
    C("mm_left_constant", lambda x: x.new_tensor([[1.0, 2.0, 3.0]]) @ x, R(3, 2), nodes="Mm"),
    C("mm_mixing_samples", lambda x: x.new_ones(3, 3).triu() @ x, R(3, 2), mixes=True),
    C("bmm", bmm, R(2, 3, 4), R(2, 4, 5), nodes="Bmm", samples=True),
    C("bmm_one", bmm, R(1, 1, 4), R(1, 4, 1), nodes="Bmm", samples=True),
    C("bmm_no_batch", bmm, R(0, 3, 4), R(0, 4, 2), samples=True),
    C("bmm_no_inner", bmm, R(2, 3, 0), R(2, 0, 2), samples=True),
    C("bmm_self", lambda x: bmm(x, x.mT), R(2, 3, 4), nodes="Bmm", samples=True),
    C("bmm_transposed", lambda x, y: bmm(x.mT, y.mT), R(2, 4, 3), R(2, 2, 4), samples=True),
    C("baddbmm", torch.baddbmm, R(2, 3, 5), R(2, 3, 4), R(2, 4, 5), nodes="Baddbmm", samples=True),
    C("baddbmm_factors", lambda b, x, y: torch.baddbmm(b, x, y, beta=0.5, alpha=-2),
      R(2, 3, 5), R(2, 3, 4), R(2, 4, 5), nodes="Baddbmm", samples=True),
    C("baddbmm_broadcast", torch.baddbmm, R(5), R(2, 3, 4), R(2, 4, 5), nodes="Baddbmm"),
    C("addmm", torch.addmm, R(3, 2), R(3, 4), R(4, 2), nodes="Addmm", samples=(0, 1)),
    C("addmm_bias", torch.addmm, R(2), R(3, 4), R(4, 2), nodes="Addmm", samples=(1,)),
    C("addmm_bias_row", torch.addmm, R(1, 2), R(3, 4), R(4, 2), nodes="Addmm", samples=(1,)),
    C("addmm_bias_column", torch.addmm, R(3, 1), R(3, 4), R(4, 2), nodes="Addmm", samples=(0, 1)),
    C("addmm_bias_scalar", torch.addmm, R(), R(3, 4), R(4, 2), nodes="Addmm"),
    C("addmm_factors", lambda b, x, y: torch.addmm(b, x, y, beta=0.5, alpha=-2),
      R(2), R(3, 4), R(4, 2), nodes="Addmm", samples=(1,)),
    C("addmm_beta_0", lambda b, x, y: torch.addmm(b, x, y, beta=0), R(2), R(3, 4), R(4, 2)),
    C("addmm_empty", torch.addmm, R(2), R(0, 4), R(4, 2), samples=(1,)),
    C("addmm_same", lambda x: torch.addmm(x, x, x), R(3, 3), nodes="Addmm"),
    C("addbmm", torch.addbmm, R(3, 5), R(2, 3, 4), R(2, 4, 5), nodes="Addbmm"),
    C("addbmm_factors", lambda b, x, y: torch.addbmm(b, x, y, beta=2, alpha=0.5),
      R(5), R(2, 3, 4), R(2, 4, 5), nodes="Addbmm"),
    C("mv", torch.mv, R(3, 4), R(4), nodes="Mv", samples=(0,)),
    C("mv_one", torch.mv, R(1, 1), R(1), nodes="Mv"),
    C("addmv", lambda b, a, v: torch.addmv(b, a, v, beta=2, alpha=-1), R(3), R(3, 4), R(4),
      nodes="Addmv", samples=(0, 1)),
    C("addmv_scalar", torch.addmv, R(1), R(3, 4), R(4), nodes="Addmv"),
    C("dot", torch.dot, R(4), R(4), nodes="Dot"),
    C("dot_self", lambda x: torch.dot(x, x), R(4), nodes="Dot"),
    C("dot_empty", torch.dot, R(0), R(0)),
    C("vdot", torch.vdot, R(4), R(4)),
    C("inner", torch.inner, R(2, 3), R(4, 3), samples=(0,)),
    C("outer", torch.outer, R(3), R(4), nodes="Mul", samples=(0,)),
    C("outer_self", lambda x: torch.outer(x, x), R(3), mixes=True),
    C("addr", lambda m, x, y: torch.addr(m, x, y, beta=2, alpha=3), R(3, 4), R(3), R(4),
      nodes="Addr", samples=(0, 1)),
    C("ger", torch.ger, R(3), R(2)),
    C("chain_matmul", lambda a, b, c: torch.linalg.multi_dot((a, b, c)), R(2, 3), R(3, 4), R(4, 2)),
    C("tensordot", lambda x, y: torch.tensordot(x, y, dims=([1, 2], [1, 0])), R(2, 3, 4),
      R(4, 3, 2), samples=(0,)),
    C("tensordot_0", lambda x, y: torch.tensordot(x, y, dims=0), R(2), R(3)),
    C("kron", torch.kron, R(2, 3), R(3, 2)),
    C("kron_samples", lambda x: torch.kron(x, x.new_ones(1, 2)), R(3, 2), samples=True, strided=False),
    C("cross", lambda x, y: torch.linalg.cross(x, y), R(2, 3), R(2, 3), nodes="LinalgCross",
      samples=True),
    C("cross_dim0", lambda x, y: torch.linalg.cross(x, y, dim=0), R(3, 2), R(3, 2), mixes=True),
    C("cdist", torch.cdist, R(3, 2), R(4, 2), samples=(0,), second=False),
    C("cdist_batched", torch.cdist, R(2, 3, 2), R(2, 4, 2), samples=True, second=False),
    C("cdist_1", lambda x, y: torch.cdist(x, y, p=1.0), R(3, 2), R(2, 2), nodes="Cdist",
      second=False),
    C("cdist_half", lambda x, y: torch.cdist(x, y, p=0.5), R(3, 2), R(2, 2), nodes="Cdist",
      samples=(0,), second=False, factor=4, reason="a power of a sum of powers"),
    C("cdist_3", lambda x, y: torch.cdist(x, y, p=3.0), R(2, 3, 2), R(2, 2, 2), samples=True,
      second=False, factor=4, reason="a power of a sum of powers"),
    C("cdist_inf", lambda x, y: torch.cdist(x, y, p=float("inf")), D(3, 2), R(2, 2), second=False),
    C("cdist_0", lambda x, y: torch.cdist(x, y, p=0.0), R(3, 2), R(2, 2), second=False),
    C("cdist_at_zero_distance", lambda x: torch.cdist(x, x.detach()), R(3, 2), second=False),
    C("cdist_3_at_zero_distance", lambda x: torch.cdist(x, x.detach(), p=3.0), R(3, 2),
      second=False, factor=4, reason="a power of a sum of powers"),
    C("cdist_1_at_zero_distance", lambda x: torch.cdist(x, x.detach(), p=1.0), R(3, 2),
      second=False),
    C("cdist_by_mm", lambda x, y: torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist"), R(3, 2),
      A(2, 2), factor=64, reason="differences of squares cancel"),
    C("pdist", torch.pdist, D(4, 3), nodes="Pdist", second=False),
    C("matrix_power", lambda x: torch.linalg.matrix_power(x, 3), W(3, 3)),
    C("matrix_exp", torch.matrix_exp, R(3, 3), nodes="LinalgMatrixExp", factor=8,
      reason="scaling and squaring"),
    C("trace", torch.trace, R(3, 4), nodes="Trace"),
    C("cosine_similarity", lambda x, y: F.cosine_similarity(x, y, dim=-1), A(3, 4), A(3, 4),
      samples=True),
    C("pairwise_distance", F.pairwise_distance, R(3, 4), R(3, 4), samples=True),
    C("bilinear", F.bilinear, R(3, 2), R(3, 4), R(5, 2, 4), R(5), samples=(0, 1)),
    M("Bilinear", lambda: nn.Bilinear(2, 3, 4), R(5, 2), R(5, 3), samples=True),
    M("Linear_1d", lambda: nn.Linear(4, 3), R(4)),
    M("Linear_2d", lambda: nn.Linear(4, 3), R(5, 4), nodes="Addmm", samples=True),
    M("Linear_3d", lambda: nn.Linear(4, 3), R(2, 5, 4), nodes="Addmm", samples=True),
    M("Linear_4d", lambda: nn.Linear(4, 3), R(2, 1, 5, 4), nodes="Addmm", samples=True),
    M("Linear_no_bias_1d", lambda: nn.Linear(4, 3, bias=False), R(4)),
    M("Linear_no_bias_2d", lambda: nn.Linear(4, 3, bias=False), R(5, 4), nodes="Mm", samples=True),
    M("Linear_no_bias_3d", lambda: nn.Linear(4, 3, bias=False), R(2, 5, 4), samples=True),
    M("Linear_one", lambda: nn.Linear(1, 1), R(1, 1), samples=True),
    M("Linear_no_samples", lambda: nn.Linear(4, 3), R(0, 4), samples=True),
    M("Linear_no_tokens", lambda: nn.Linear(4, 3), R(2, 0, 4), samples=True),
    M("Linear_of_a_transpose", lambda: nn.Linear(4, 3), R(4, 5), func=lambda m, x: m(x.T)),
    M("Linear_of_swapped", lambda: nn.Linear(4, 3), R(5, 2, 4),
      func=lambda m, x: m(x.transpose(0, 1))),
    C("linear_weights", F.linear, R(3, 4), R(2, 4), R(2), samples=(0,)),
    C("linear_weights_3d", F.linear, R(2, 3, 4), R(2, 4), R(2), samples=(0,)),
    C("linear_weights_no_bias", F.linear, R(2, 3, 4), R(2, 4), samples=(0,)),
    C("linear_no_features", F.linear, R(3, 0), R(2, 0), R(2), samples=(0,)),
    C("linear_no_outputs", F.linear, R(3, 2), R(0, 2), R(0), samples=(0,)),
    C("linear_low_rank", lambda x, u, v: F.linear(x, u @ v), R(3, 4), R(2, 1), R(1, 4)),
    M("MLP", lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.SiLU(),
      nn.Linear(5, 2)), R(3, 4), nodes="Addmm Tanh Silu", samples=True),
    M("MLP_relu_wide_output", lambda: nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 9)),
      R(3, 2), samples=True),
    M("MLP_linear_only", lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), R(3, 3),
      samples=True),
    M("autoencoder", lambda: nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2), nn.Tanh(),
      nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 8)), R(2, 8), samples=True),
    C("weight_norm_by_hand", lambda x, v, g: F.linear(x, g * v / v.norm(dim=1, keepdim=True)),
      R(3, 4), R(2, 4), R(2, 1), samples=(0,)),
    M("weight_norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), R(2, 4),
      samples=True),
    M("spectral_norm", lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval(),
      R(2, 4), samples=True),
]

# matmul of every mix of ranks: 1-D to 4-D, broadcast batches, both operands.
RANKS = [
    ((4,), (4,)), ((4,), (4, 2)), ((3, 4), (4,)), ((3, 4), (4, 2)), ((4,), (2, 4, 3)),
    ((2, 3, 4), (4,)), ((2, 3, 4), (4, 2)), ((3, 4), (2, 4, 2)), ((2, 3, 4), (2, 4, 2)),
    ((1, 3, 4), (2, 4, 2)), ((2, 3, 4), (1, 4, 2)), ((2, 1, 3, 4), (3, 4, 2)),
    ((2, 3, 1, 4), (2, 1, 4, 2)), ((2, 2, 3, 4), (4, 2)), ((2, 2, 3, 4), (4,)), ((4,), (2, 2, 4, 3)),
    ((1, 1), (1, 1)), ((0, 4), (4, 2)), ((2, 0, 4), (4, 2)), ((2, 3, 0), (0, 2)), ((0,), (0,)),
]  # fmt: skip
for a, b in RANKS:
    label = "x".join(map(str, a)) + "_by_" + "x".join(map(str, b))
    batch = (0,) if len(a) >= 2 and len(a) >= len(b) and a[0] != 1 else None
    if len(a) == len(b) and len(a) > 2:
        batch = None if a[0] == 1 or b[0] == 1 else (0, 1)
    CASES.append(C(f"matmul_{label}", torch.matmul, R(*a), R(*b), samples=batch))

EINSUMS = [
    ("ij,jk->ik", (2, 3), (3, 4)), ("bij,bjk->bik", (2, 3, 2), (2, 2, 3)), ("i,j->ij", (2,), (3,)),
    ("ij->ji", (2, 3)), ("ij->i", (2, 3)), ("ii->i", (3, 3)), ("ii", (3, 3)), ("bi,oi->bo", (2, 3), (4, 3)),
    ("bhqd,bhkd->bhqk", (2, 2, 3, 2), (2, 2, 3, 2)), ("bqhd,bkhd->bhqk", (2, 3, 2, 2), (2, 3, 2, 2)),
    ("i,ij,j->", (3,), (3, 2), (2,)), ("...i,ij->...j", (2, 2, 3), (3, 2)), ("ij,ij->ij", (2, 3), (2, 3)),
    ("bi,bj->bij", (2, 3), (2, 2)), ("ijk,ljm->iklm", (2, 3, 2), (2, 3, 2)),
]  # fmt: skip
for equation, *shapes in EINSUMS:
    batched = equation.startswith("b") and tuple(
        k for k, part in enumerate(equation.split("->")[0].split(",")) if part.startswith("b")
    )
    CASES.append(
        C(
            f"einsum[{equation}]",
            lambda *xs, e=equation: torch.einsum(e, *xs),
            *shapes,
            samples=batched or None,
        )
    )

WHY = "a solve loses digits with the condition of its matrix"


def L(name, func, *inputs, nodes="", samples=(0,), factor=16, **options):
    """A decomposition or a solve: one matrix a sample."""
    return C(name, func, *inputs, nodes=nodes, samples=samples, factor=factor, reason=WHY, **options)


def symmetric(x):
    return (x + x.mT) / 2 + torch.diag(torch.arange(x.shape[-1], dtype=x.dtype, device=x.device))


CASES += [
    L("det", torch.linalg.det, W(2, 3, 3), nodes="LinalgDet"),
    L("det_one", torch.linalg.det, P(2, 1, 1), nodes="LinalgDet"),
    L("slogdet", lambda x: torch.linalg.slogdet(x).logabsdet, W(2, 3, 3), nodes="LinalgSlogdet"),
    L("slogdet_both", lambda x: tuple(torch.linalg.slogdet(x)), W(2, 3, 3), nodes="LinalgSlogdet"),
    L("logdet", torch.logdet, SPD(2, 3, 3), nodes="LinalgSlogdet"),
    L("inv", torch.linalg.inv, W(2, 3, 3), nodes="LinalgInvEx"),
    L("inv_one", torch.linalg.inv, P(1, 1, 1), nodes="LinalgInvEx"),
    L("pinv", torch.linalg.pinv, W(2, 3, 2)),
    L("solve", torch.linalg.solve, W(2, 3, 3), R(2, 3, 2), nodes="LinalgSolveEx", samples=(0, 1)),
    L("solve_vector", torch.linalg.solve, W(3, 3), R(3), nodes="LinalgSolveEx", samples=None),
    L("solve_right", lambda a, b: torch.linalg.solve(a, b, left=False), W(2, 3, 3), R(2, 2, 3),
      samples=(0, 1)),
    L("solve_triangular", lambda a, b: torch.linalg.solve_triangular(a.triu(), b, upper=True),
      W(2, 3, 3), R(2, 3, 2), nodes="LinalgSolveTriangular", samples=(0, 1)),
    L("triangular_solve", quietly(lambda a, b: torch.triangular_solve(b, a, upper=False)[0]),
      W(2, 3, 3), R(2, 3, 2), nodes="TriangularSolve", samples=(0, 1)),
    L("lu_solve", lambda b: torch.linalg.lu_solve(*torch.linalg.lu_factor(
      torch.ones_like(b[0, :, :1]) + 2 * torch.eye(3).to(b)), b), R(2, 3, 2), nodes="LinalgLuSolve"),
    L("lu_factor_solve", lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b), W(2, 3, 3),
      R(2, 3, 2), nodes="LinalgLuFactorEx LinalgLuSolve", samples=(0, 1)),
    L("lstsq", lambda a, b: torch.linalg.lstsq(a, b).solution, W(2, 3, 2), R(2, 3, 1),
      samples=(0, 1)),
    L("cholesky", torch.linalg.cholesky, SPD(2, 3, 3), nodes="LinalgCholeskyEx"),
    L("cholesky_solve", lambda b, a: torch.cholesky_solve(b, torch.linalg.cholesky(a)), R(3, 2),
      SPD(3, 3), nodes="CholeskySolve", samples=None),
    L("cholesky_inverse", lambda a: torch.cholesky_inverse(torch.linalg.cholesky(a)), SPD(3, 3),
      samples=None),
    L("eigh_values", lambda a: torch.linalg.eigh(symmetric(a)).eigenvalues, W(2, 3, 3),
      nodes="LinalgEigh"),
    L("eigvalsh", lambda a: torch.linalg.eigvalsh(symmetric(a)), W(2, 3, 3)),
    L("eigh_vectors_squared", lambda a: torch.linalg.eigh(symmetric(a)).eigenvectors ** 2,
      W(2, 3, 3), nodes="LinalgEigh", factor=64),
    L("svd_values", lambda a: torch.linalg.svd(a).S, D(2, 3, 2), nodes="LinalgSvd", second=False),
    L("svdvals", torch.linalg.svdvals, D(2, 3, 2), second=False),
    L("svd_rebuilt", lambda a: (lambda u, s, v: u * s.sqrt().unsqueeze(-2) @ v)(
        *torch.linalg.svd(a, full_matrices=False)), D(2, 3, 2), factor=64, second=False),
    L("qr", lambda a: torch.linalg.qr(a).R, W(2, 3, 3), nodes="LinalgQr"),
    L("qr_both", lambda a: tuple(torch.linalg.qr(a)), W(2, 3, 2), nodes="LinalgQr", factor=64),
    L("lu", lambda a: torch.linalg.lu(a)[1:], W(2, 3, 3)),
    L("matrix_norm", lambda a: torch.linalg.matrix_norm(a), R(2, 3, 3)),
    L("matrix_norm_nuclear", lambda a: torch.linalg.matrix_norm(a, "nuc"), W(2, 3, 3),
      second=False),
    L("gaussian_log_density", lambda x, c: -0.5 * (x * torch.linalg.solve(c, x)).sum(-1)
      - 0.5 * torch.logdet(c), R(2, 3), SPD(2, 3, 3), samples=(0, 1)),
    L("implicit_fixed_point", lambda a, b: torch.linalg.solve(
        torch.eye(3, dtype=a.dtype, device=a.device) - 0.1 * torch.tanh(a), b), R(3, 3), R(3),
      samples=None),
]  # fmt: skip
