"""Products of two batches of matrices, both of them blocks: two partial Jacobians of every sample that meet.

    out[b, m, n] = sum_k left[b, m, k] * right[b, k, n]

Few features meet (a bottleneck), so the result is the largest tensor and is written once. Both operands are split for
the tensor cores in registers, tile by tile (see `operands`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import launch
from .linear import Config
from .operands import product
from .support import power_of_two, wide

CONFIGS = (
    # four programs on a multiprocessor: while some store, others compute
    Config(64, 64, 32, 4, 2),
    # splits each operand half as often: where many features meet
    Config(128, 128, 32, 8, 2),
)

FEW = 64
"""Features that meet up to which storing is what takes the time, and the first tile is the only one offered."""


@triton.jit
def _batched(
    A, B, OUT, M, N, K, a_b, a_m, a_k, b_b, b_k, b_n, o_b, o_m, o_n,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    across, down = tl.cdiv(N, BN), tl.cdiv(M, BM)
    batch, tile = pid // (across * down), pid % (across * down)
    m, n = tile // across * BM + tl.arange(0, BM), tile % across * BN + tl.arange(0, BN)
    k0 = tl.arange(0, BK)
    if WIDE:
        batch, m, n, k0 = batch.to(tl.int64), m.to(tl.int64), n.to(tl.int64), k0.to(tl.int64)
    a_at = A + batch * a_b + m[:, None] * a_m
    b_at = B + batch * b_b + n[None, :] * b_n
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + k0
        a = tl.load(a_at + k[None, :] * a_k, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(b_at + k[:, None] * b_k, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = product(a, b, acc, PRECISION)
    to = OUT + batch * o_b + m[:, None] * o_m + n[None, :] * o_n
    tl.store(to, acc.to(OUT.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def configs(inner: int) -> tuple[Config, ...]:
    """How `batched` can run where so many features meet."""
    return CONFIGS[:1] if inner <= FEW else CONFIGS


def batched(
    left: Tensor,
    right: Tensor,
    *,
    precision: str,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """``left @ right``: (B, M, K), (B, K, N) -> (B, M, N), of one dtype and any strides.

    ``precision``: as in `linear.step`. ``out``: (B, M, N) of any strides. Returns ``out``. Raises Unfit where the
    device cannot run the kernel. Costs ``2 B M N K`` flops; reads left once for each ``config.out`` columns and right
    once for each ``config.rows`` rows, mostly from the cache; writes out once.
    """
    count, M, K = left.shape
    N = right.shape[2]
    if out is None:
        out = torch.empty(count, M, N, dtype=left.dtype, device=left.device)
    if out.numel() == 0:
        return out
    c = config or CONFIGS[0]
    rows, columns = min(c.rows, power_of_two(M, 64)), min(c.out, power_of_two(N, 16))
    grid = (count * triton.cdiv(M, rows) * triton.cdiv(N, columns),)
    launch(
        _batched, grid, out,
        left, right, out, M, N, K, *left.stride(), *right.stride(), *out.stride(), precision,
        rows, columns, min(c.inner, power_of_two(K, 16)), wide(left, right, out),
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out
