"""Several steps of a chain in one launch: between its first and its last step no tangent leaves the chip.

    out = D_L M_L ... D_1 M_1 D_0 t + plus

row by row, for blocks (K, R, width) as in `linear`. Two kernels, for two shapes of network:

- `chain`: any depth, widths up to 128. A program holds its rows of the block in registers and streams every matrix
  through once: ``sum(w_l w_(l+1))`` loads for each tile of rows.
- `pair`: two matrices, any inner widths, up to 128 features out. The inner features are taken BO at a time: as soon
  as a tile of them is complete it is multiplied by its part of the second matrix and forgotten. The first product
  reads the block once for each tile; where the block is a weight that all rows share, that is a weight. Where it fits,
  in one part, the block is formed once and stays in registers (``inner`` of a `Config` is 0).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import SOURCE
from .launches import launch
from .linear import Config, added, scaled, strides_of
from .operands import multiply, prepare
from .support import Factor, Ready, factor, power_of_two, wide

WIDEST, WIDEST_BEFORE_HOPPER = 128, 64
"""The widest layer of a `chain`. Wider, its tile, the next one's and their parts overflow the registers: at 256 on
sm_90, 3 to 8 KB a thread are spilled, with the layer in one piece or in several; at 128 on sm_80, where the matrix
passes through registers too, 60 KB."""

WIDEST_OUT = 128
"""The widest result of a `pair`: it is held in registers beside the tile of inner features."""

CHAIN_CONFIGS = (
    # the tiles of features are the layers: only rows and warps vary
    Config(128, 0, 0, 8, 1),
    Config(64, 0, 0, 4, 1),  # up to 64 features: at 128 it spills five times as much as the first
)

PAIR_CONFIGS = (
    Config(128, 64, 32, 8, 3),
    Config(64, 64, 32, 4, 3),
    # forms the first block half as often; from Hopper on, to 64 features: it spills 1 KB on sm_80, and to 128
    Config(128, 128, 32, 8, 2),
)

RESIDENT_CONFIGS = {"tf32": Config(128, 32, 0, 8, 2), "half": Config(128, 64, 0, 8, 2)}
"""For blocks that stay in registers. Against the last of `PAIR_CONFIGS` these issue a sixth to a third fewer
instructions, and read the block once; fp32-grade products, whose parts do not fit, are bound by the tensor cores."""

RESIDENT, RESIDENT_OUT = (128, 256), {"tf32": 64, "half": 128}
"""Features in for which that pays: at 64 both are equal, between powers of two registers spill. And the most out: with
more, the matrices' tiles overflow shared memory. On Hopper: Blackwell's tensor cores keep the block elsewhere, and 500
bytes a thread spill."""


@triton.jit
def zero_tile(BM: tl.constexpr, BO: tl.constexpr):
    return tl.zeros((BM, BO), tl.float32)


@triton.jit
def _chain(
    T, MS, ZS, PLUS, OUT, K, R, t_k, t_r, t_i, q_k, q_r, q_o, o_k, o_r, o_o, m_s, z_s, padded,
    WIDTHS: tl.constexpr, TILES: tl.constexpr, DS: tl.constexpr, PS: tl.constexpr, SOURCE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, i = tl.program_id(0), tl.arange(0, TILES[0])
    if WIDE:
        row, i = row.to(tl.int64), i.to(tl.int64)
    row = row * BM + tl.arange(0, BM)
    r, k = row // K, row % K
    inside = r < R
    mask = inside[:, None] & (i < WIDTHS[0])[None, :]
    t = tl.load(T + k[:, None] * t_k + r[:, None] * t_r + i[None, :] * t_i, mask=mask, other=0.0)
    t = scaled(t, ZS[0], DS[0], PS[0], r[:, None] * z_s[0][0] + i[None, :] * z_s[0][1], mask)
    for l in tl.static_range(len(MS)):
        i, o = tl.arange(0, TILES[l]), tl.arange(0, TILES[l + 1])
        if WIDE:
            o = o.to(tl.int64)
        at = MS[l] + i[:, None] * m_s[l][1] + o[None, :] * m_s[l][2]
        mask = (i < padded[l])[:, None] & (o < WIDTHS[l + 1])[None, :]
        acc = zero_tile(BM, TILES[l + 1])
        acc = multiply(t, at, m_s[l][0], mask, acc, PRECISION)
        mask = inside[:, None] & (o < WIDTHS[l + 1])[None, :]
        at = r[:, None] * z_s[l + 1][0] + o[None, :] * z_s[l + 1][1]
        t = scaled(acc, ZS[l + 1], DS[l + 1], PS[l + 1], at, mask)
    o = tl.arange(0, TILES[len(MS)])
    if WIDE:
        o = o.to(tl.int64)
    to = OUT + k[:, None] * o_k + r[:, None] * o_r + o[None, :] * o_o
    mask = inside[:, None] & (o < WIDTHS[len(MS)])[None, :]
    if PLUS is not None:
        t = added(t, PLUS, k[:, None] * q_k + r[:, None] * q_r + o[None, :] * q_o, mask)
    tl.store(to, t.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _formed(T, Z, D: tl.constexpr, P: tl.constexpr, inside, r, i, I, t_i, z_r, z_i):
    """Features i of the block whose rows are at T, times their factor."""
    mask = inside[:, None] & (i < I)[None, :]
    t = tl.load(T + i[None, :] * t_i, mask=mask, other=0.0)
    return scaled(t, Z, D, P, r[:, None] * z_r + i[None, :] * z_i, mask)


@triton.jit
def _pair(
    T, M1, M2, Z0, Z1, Z2, PLUS, OUT, K, R, I, H, O, padded1, padded2,
    t_k, t_r, t_i, m1_p, m1_i, m1_o, m2_p, m2_i, m2_o, z0_r, z0_i, z1_r, z1_i, z2_r, z2_i,
    q_k, q_r, q_o, o_k, o_r, o_o,
    D0: tl.constexpr, P0: tl.constexpr, D1: tl.constexpr, P1: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
    WHOLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    i0, h0, o = tl.arange(0, BI), tl.arange(0, BH), tl.arange(0, BO)
    if WIDE:
        row, i0, h0, o = row.to(tl.int64), i0.to(tl.int64), h0.to(tl.int64), o.to(tl.int64)
    row = row * BM + tl.arange(0, BM)
    r, k = row // K, row % K
    inside, outside = r < R, o < O
    t_at = T + k[:, None] * t_k + r[:, None] * t_r
    out = tl.zeros((BM, BO), tl.float32)
    if WHOLE:
        t = _formed(t_at, Z0, D0, P0, inside, r, i0, I, t_i, z0_r, z0_i).to(T.dtype.element_ty)
    for h_start in range(0, H, BH):
        h = h_start + h0
        acc = tl.zeros((BM, BH), tl.float32)
        if WHOLE:
            at = M1 + i0[:, None] * m1_i + h[None, :] * m1_o
            acc = multiply(t, at, m1_p, (i0 < padded1)[:, None] & (h < H)[None, :], acc, PRECISION)
        else:
            for i_start in range(0, I, BI):
                i = i_start + i0
                part = _formed(t_at, Z0, D0, P0, inside, r, i, I, t_i, z0_r, z0_i)
                at = M1 + i[:, None] * m1_i + h[None, :] * m1_o
                within = (i < padded1)[:, None] & (h < H)[None, :]
                acc = multiply(part, at, m1_p, within, acc, PRECISION)
        mask = inside[:, None] & (h < H)[None, :]
        acc = scaled(acc, Z1, D1, P1, r[:, None] * z1_r + h[None, :] * z1_i, mask)
        at = M2 + h[:, None] * m2_i + o[None, :] * m2_o
        within = (h < padded2)[:, None] & outside[None, :]
        out = multiply(acc, at, m2_p, within, out, PRECISION, WHOLE)
    mask = inside[:, None] & outside[None, :]
    out = scaled(out, Z2, D2, P2, r[:, None] * z2_r + o[None, :] * z2_i, mask)
    if PLUS is not None:
        out = added(out, PLUS, k[:, None] * q_k + r[:, None] * q_r + o[None, :] * q_o, mask)
    to = OUT + k[:, None] * o_k + r[:, None] * o_r + o[None, :] * o_o
    tl.store(to, out.to(OUT.dtype.element_ty), mask=mask)


def generation(device: torch.device) -> int:
    """The major number of a card's capability: from 9 on tensor cores read matrices from shared memory.

    AMD's cards count as ones before; anything that is no GPU counts as Hopper's.
    """
    if device.type != "cuda":
        return 9
    return 8 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


def chain_configs(widths: Sequence[int], device: torch.device) -> tuple[Config, ...]:
    """How `chain` can run layers of these widths, the block's first; empty where it cannot."""
    widest = max(widths)
    if min(widths) < 1 or widest > (WIDEST if generation(device) >= 9 else WIDEST_BEFORE_HOPPER):
        return ()
    return CHAIN_CONFIGS if widest <= 64 else CHAIN_CONFIGS[:1]


def pair_configs(widths: Sequence[int], precision: str, device: torch.device) -> tuple[Config, ...]:
    """How `pair` can run (features in, between, out) at "fp32", "tf32" or "half"; empty where it cannot."""
    if len(widths) != 3 or min(widths) < 1 or widths[2] > WIDEST_OUT:
        return ()
    number, most = generation(device), RESIDENT_OUT.get(precision, 0)
    if number == 9 and widths[0] in RESIDENT and widths[2] <= most:
        return RESIDENT_CONFIGS[precision], PAIR_CONFIGS[1]
    return PAIR_CONFIGS if number >= 9 and widths[2] <= 64 else PAIR_CONFIGS[:2]


def chain(
    t: Tensor,
    matrices: Sequence[Tensor],
    factors: Sequence[Factor | None],
    *,
    precision: str,
    ready: Ready | None = None,
    plus: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """``D_L M_L ... D_1 M_1 D_0 t + plus`` for each row, tangents held on chip.

    t: (K, R, w_0); matrices[l]: (w_l, w_(l+1)); factors: one more than matrices, (R, w_l) each or None; ``precision``,
    ``ready``, ``plus`` and ``out`` as in `linear.step`. See `chain_configs` for widths. Raises Unfit where the
    device cannot run it. Costs ``2 K R sum(w_l w_(l+1))`` flops; reads t once, writes out once.
    """
    K, R, _ = t.shape
    widths = (t.shape[2], *(m.shape[1] for m in matrices))
    if out is None:
        out = torch.empty(K, R, widths[-1], dtype=t.dtype, device=t.device)
    if out.numel() == 0:
        return out
    c = config or CHAIN_CONFIGS[0]
    parts = [factor(f) for f in factors]
    values = tuple(p[0] for p in parts)
    operands = prepare(matrices, precision, ready)
    far = wide(t, plus, out, *values, *matrices) or K * R >= 1 << 31
    launch(
        _chain, (triton.cdiv(K * R, c.rows),), out,
        t, tuple(m.values for m in operands), values, plus, out, K, R, *t.stride(),
        *strides_of(plus), *out.stride(),
        tuple(m.strides for m in operands), tuple(tuple(p[1]) for p in parts), tuple(m.padded for m in operands),
        widths, tuple(power_of_two(w, 16) for w in widths), tuple(p[2] for p in parts), tuple(p[3] for p in parts),
        SOURCE, precision, c.rows, far,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out


def pair(
    t: Tensor,
    matrices: Sequence[Tensor],
    factors: Sequence[Factor | None],
    *,
    precision: str,
    ready: Ready | None = None,
    plus: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """`chain` for two matrices of any inner widths and at most `WIDEST_OUT` features out."""
    K, R, I = t.shape
    first, second = matrices
    H, O = second.shape
    if out is None:
        out = torch.empty(K, R, O, dtype=t.dtype, device=t.device)
    if out.numel() == 0:
        return out
    c, features = config or PAIR_CONFIGS[0], power_of_two(I, 16)
    (z0, s0, d0, p0), (z1, s1, d1, p1), (z2, s2, d2, p2) = map(factor, factors)
    a, b = prepare(matrices, precision, ready)
    far = wide(t, plus, out, z0, z1, z2, first, second) or K * R >= 1 << 31
    launch(
        _pair, (triton.cdiv(K * R, c.rows),), out,
        t, a.values, b.values, z0, z1, z2, plus, out, K, R, I, H, O, a.padded, b.padded, *t.stride(),
        *a.strides, *b.strides,
        *s0, *s1, *s2, *strides_of(plus), *out.stride(),
        d0, p0, d1, p1, d2, p2, precision, c.rows,
        min(c.out, power_of_two(H, 16)), min(c.inner or features, features), power_of_two(O, 16), not c.inner, far,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out
