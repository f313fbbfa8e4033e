"""Tiles of the scores of an attention, and which of them a program has: what the kernels of `attention` share."""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import product


@triton.jit
def span(start, N: tl.constexpr, WIDE: tl.constexpr):
    """N indices from start on."""
    i = tl.arange(0, N)
    if WIDE:
        i = i.to(tl.int64)
    return start + i


@triton.jit
def dots(
    A, a_i, a_there, B, b_i, b_there, WIDTH: tl.constexpr, acc,
    BI: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``acc + a @ b^T`` for rows of two tensors: A are addresses of rows, B of rows that become columns."""
    for start in range(0, WIDTH, BI):
        i = span(start, BI, WIDE)
        a = tl.load(A + i[None, :] * a_i, mask=a_there & (i < WIDTH)[None, :], other=0.0)
        b = tl.load(B + i[:, None] * b_i, mask=b_there & (i < WIDTH)[:, None], other=0.0)
        acc = product(a, b, acc, PRECISION)
    return acc


@triton.jit
def masked(x, MASK, at, i, j, T, S, m_s, CAUSAL: tl.constexpr, BOOL: tl.constexpr):
    """Scores of queries i and keys j, one of them a column and one a row, with minus infinity where none is seen."""
    there = (i < T) & (j < S)
    if MASK is not None:
        m = tl.load(MASK + at + i * m_s[2] + j * m_s[3], mask=there, other=0)
        if BOOL:
            there = there & (m != 0)
        else:
            x += m.to(tl.float32)
    if CAUSAL:
        there = there & (j <= i)
    return tl.where(there, x, float("-inf"))


@triton.jit
def of_queries(
    q_at, q_i, i, k_at, k_s, j, MASK, at, m_s, T, S, scale, D: tl.constexpr, CAUSAL: tl.constexpr,
    BOOL: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Scores of queries i, the rows, and keys j, masked."""
    x = tl.zeros((BM, BN), tl.float32)
    keys, known = k_at + j[None, :] * k_s[2], (j < S)[None, :]
    x = dots(q_at, q_i, (i < T)[:, None], keys, k_s[3], known, D, x, BI, PRECISION, WIDE)
    return masked(x * scale, MASK, at, i[:, None], j[None, :], T, S, m_s, CAUSAL, BOOL)


@triton.jit
def ended(SUMS, row, there):
    """The largest scores of rows, and one over the sums relative to these."""
    top = tl.load(SUMS + row * 2, mask=there, other=0.0)
    return top, tl.load(SUMS + row * 2 + 1, mask=there, other=0.0)


@triton.jit
def place(pid, tiles, chunks, H, WIDE: tl.constexpr):
    """The tile, the chunk of tangents, the sample and the head of a program."""
    if WIDE:
        pid = pid.to(tl.int64)
    tile, rest = pid % tiles, pid // tiles
    return tile, rest % chunks, rest // chunks // H, rest // chunks % H


@triton.jit
def heads(Q, K, V, b, h, g, q_s, k_s, v_s, m_s):
    """Where a head of queries, and the one of keys and values that it has, begin; and its scores in a mask."""
    q = Q + b * q_s[0] + h * q_s[1]
    return q, K + b * k_s[0] + g * k_s[1], V + b * v_s[0] + g * v_s[1], b * m_s[0] + h * m_s[1]


@triton.jit
def seen_by(tile, S, BM: tl.constexpr, CAUSAL: tl.constexpr):
    """Where the keys end that a tile of queries may see."""
    end = S
    if CAUSAL:
        end = tl.minimum(S, (tile + 1) * BM)
    return end


@triton.jit
def put(OUT, made, column, COLUMNS, b, h, i, w, there, o_s):
    """Store rows i, features w, of a tangent or cotangent; what is none is left out."""
    to = OUT + column * o_s[0] + b * o_s[1] + h * o_s[2] + i[:, None] * o_s[3] + w[None, :] * o_s[4]
    if column < COLUMNS:
        tl.store(to, made.to(OUT.dtype.element_ty), mask=there)


@triton.jit
def zeros(COUNT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Sums of so many tangents or cotangents, empty yet."""
    made = ()
    for _ in tl.static_range(COUNT):
        made = made + (tl.zeros((BM, BN), tl.float32),)
    return made
