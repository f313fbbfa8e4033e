"""One step of a chain: a block of tangents or cotangents through one matrix and the diagonals on either side.

    out[k, r, o] = after[r, o] * sum_i matrix[i, o] * before[r, i] * t[k, r, i] + plus[k, r, o]

for K seeds, R rows (samples), I features in and O out. Reverse mode is the same step with the matrix transposed. Where
the block is a weight that all rows share (the first step under an identity seed), its stride along the rows is 0, and
the scaled block ``before * t`` exists in registers only.

A program computes BM of the ``R * K`` rows (the seeds of one sample lie side by side, so that they share the loads of
its diagonals) and BO features: ``2 BM BO I`` flops for ``BM I + I BO`` loads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import launch
from .operands import multiply, prepare
from .support import Factor, Ready, factor, power_of_two, wide


@dataclass(frozen=True)
class Config:
    """Rows, features out and features in of one tile; warps a program; loads in flight."""

    rows: int
    out: int
    inner: int
    warps: int
    stages: int


CONFIGS = (
    # large and square: the most flops for a load
    Config(128, 128, 32, 8, 3),
    # half the accumulator: two programs on a multiprocessor hide each other's latency
    Config(128, 64, 32, 4, 3),
    # few rows or narrow layers
    Config(64, 64, 32, 4, 3),
)


@triton.jit
def scaled(value, Z, D: tl.constexpr, P: tl.constexpr, offsets, mask):
    """``value`` times the derivative at the saved values; as it is where there is no derivative."""
    if D is None:
        return value
    else:
        z = tl.load(Z + offsets, mask=mask, other=0.0).to(tl.float32)
        return value.to(tl.float32) * D(z, P)


@triton.jit
def added(value, PLUS, offsets, mask):
    """``value`` plus a block."""
    return value + tl.load(PLUS + offsets, mask=mask, other=0.0).to(tl.float32)


def strides_of(plus: Tensor | None) -> tuple[int | None, ...]:
    """For a kernel that adds a block (K, R, features): arguments that are not used would cost it registers."""
    return (None, None, None) if plus is None else plus.stride()


@triton.jit
def _step(
    T, ZB, M, ZA, PLUS, OUT, K, R, I, O, padded,
    t_k, t_r, t_i, b_r, b_i, m_p, m_i, m_o, a_r, a_o, q_k, q_r, q_o, o_k, o_r, o_o,
    BEFORE: tl.constexpr, PB: tl.constexpr, AFTER: tl.constexpr, PA: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = tl.cdiv(O, BO)
    row, o = pid // tiles, (pid % tiles) * BO + tl.arange(0, BO)
    i0 = tl.arange(0, BI)
    if WIDE:
        row, o, i0 = row.to(tl.int64), o.to(tl.int64), i0.to(tl.int64)
    row = row * BM + tl.arange(0, BM)
    r, k = row // K, row % K
    inside, outside = r < R, o < O
    acc = tl.zeros((BM, BO), tl.float32)
    for start in range(0, I, BI):
        i = start + i0
        mask = inside[:, None] & (i < I)[None, :]
        t = tl.load(
            T + k[:, None] * t_k + r[:, None] * t_r + i[None, :] * t_i, mask=mask, other=0.0
        )
        t = scaled(t, ZB, BEFORE, PB, r[:, None] * b_r + i[None, :] * b_i, mask)
        m_at = M + i[:, None] * m_i + o[None, :] * m_o
        within = (i < padded)[:, None] & outside[None, :]
        acc = multiply(t, m_at, m_p, within, acc, PRECISION, BEFORE is not None)
    mask = inside[:, None] & outside[None, :]
    acc = scaled(acc, ZA, AFTER, PA, r[:, None] * a_r + o[None, :] * a_o, mask)
    if PLUS is not None:
        acc = added(acc, PLUS, k[:, None] * q_k + r[:, None] * q_r + o[None, :] * q_o, mask)
    at = OUT + k[:, None] * o_k + r[:, None] * o_r + o[None, :] * o_o
    tl.store(at, acc.to(OUT.dtype.element_ty), mask=mask)


def step(
    t: Tensor,
    matrix: Tensor,
    before: Factor | None = None,
    after: Factor | None = None,
    *,
    precision: str,
    ready: Ready | None = None,
    plus: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """``out[k, r, o] = after[r, o] * sum_i matrix[i, o] * before[r, i] * t[k, r, i] + plus[k, r, o]``.

    t: (K, R, I); matrix: (I, O); factors: (R, I) and (R, O); all of one dtype, any strides. ``precision`` is "ieee",
    "tf32", "tf32x3" or "bf16x6" for float32, "half" for float16 and bfloat16, which accumulate in float32 (see
    `operands`). ``ready``: see `support.Ready`. ``plus``, ``out``: (K, R, O) of any strides. Returns ``out``. Raises
    Unfit where the device cannot run the kernel. Costs ``2 K R I O`` flops; reads t once for each ``config.out``
    features, writes out once.
    """
    K, R, I = t.shape
    O = matrix.shape[1]
    if out is None:
        out = torch.empty(K, R, O, dtype=t.dtype, device=t.device)
    if out.numel() == 0:
        return out
    c = config or (CONFIGS[1] if K * R > 64 else CONFIGS[2])
    zb, sb, db, pb = factor(before)
    za, sa, da, pa = factor(after)
    grid = (triton.cdiv(K * R, c.rows) * triton.cdiv(O, c.out),)
    (m,) = prepare((matrix,), precision, ready)
    far = wide(t, zb, matrix, za, plus, out) or K * R >= 1 << 31
    launch(
        _step, grid, out,
        t, zb, m.values, za, plus, out, K, R, I, O, m.padded, *t.stride(), *sb, *m.strides, *sa,
        *strides_of(plus), *out.stride(),
        db, pb, da, pa, precision, c.rows, min(c.out, power_of_two(O, 16)),
        min(c.inner, power_of_two(I, 16)), far,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out
