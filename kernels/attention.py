"""Attention with tangents and with cotangents: scores and probabilities stay on chip, tile by tile.

With scores ``S = scale * q k^T + mask``, ``P = softmax(S)`` and ``o = P v``, query i and key j:

    forward  o, and of a row its largest score and one over the sum relative to that: ``P = exp(S - top) over``
    push     do_i = sum_j P_ij (dS_ij v_j + dv_j) - (sum_j P_ij dS_ij) o_i,  dS = scale * (dq k^T + q dk^T)
    pull     dv = P^T c,  dq = scale * dS k,  dk = scale * dS^T q,  dS_ij = P_ij (c_i . v_j - c_i . o_i)

for K tangents dq, dk, dv or cotangents c. A program has a tile of queries, or of keys for dk and dv, and a few of the
K, which share the P of every tile; sums are in registers, and nothing is added in memory (Dao 2023, arXiv:2307.08691,
sections 3.1 and 3.2, has the loops; Milakov, Gimelshein 2018, arXiv:1805.02867, the running sums). Not one logarithm
for both: scores of 1e38, a mask's, absorb it. A query that may attend to no key has 0 for both, so its P is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import launch
from .operands import product
from .scores import dots, ended, heads, masked, of_queries, place, put, seen_by, span, zeros
from .support import power_of_two, wide

WIDEST = 256
"""The widest head: a tile of results is held in registers as a whole."""


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of a tile of scores: queries and keys, or keys and queries for dk and dv; features of a head
    that are multiplied at once; tangents or cotangents of a program; warps; loads in flight."""

    rows: int
    out: int
    inner: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Seen:
    """Which keys a query sees: ``mask``, broadcast to (B, H, T, S), boolean or added to scores; those up to it if
    ``causal``."""

    mask: Tensor | None = None
    causal: bool = False


@triton.jit
def _attention_forward(
    Q, K, V, MASK, OUT, H, SHARED, T, S, scale, q_s, k_s, v_s, m_s, sums,
    D: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, BOOL: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, BE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tile, _, b, h = place(tl.program_id(0), tl.cdiv(T, BM), 1, H, WIDE)
    i, e = span(tile * BM, BM, WIDE), span(0, BE, WIDE)
    q_at, k_at, v_at, m_at = heads(Q, K, V, b, h, h // SHARED, q_s, k_s, v_s, m_s)
    q_at += i[:, None] * q_s[2]
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, BE), tl.float32)
    for start in range(0, seen_by(tile, S, BM, CAUSAL), BN):
        j = span(start, BN, WIDE)
        x = of_queries(
            q_at, q_s[3], i, k_at, k_s, j, MASK, m_at, m_s, T, S, scale, D, CAUSAL, BOOL, PRECISION,
            BM, BN, BI, WIDE,
        )  # fmt: skip
        largest = tl.maximum(top, tl.max(x, 1))
        finite = tl.where(largest == float("-inf"), 0.0, largest)
        p = tl.exp(x - finite[:, None])
        shrink = tl.exp(top - finite)
        total = total * shrink + tl.sum(p, 1)
        there = (j < S)[:, None] & (e < E)[None, :]
        v = tl.load(v_at + j[:, None] * v_s[2] + e[None, :] * v_s[3], mask=there, other=0.0)
        out = product(p, v, out * shrink[:, None], PRECISION, True)
        top = largest
    some = total > 0
    over = tl.where(some, 1 / tl.where(some, total, 1.0), 0.0)
    row = (b * H + h) * T + i
    there = (i < T)[:, None] & (e < E)[None, :]
    tl.store(OUT + row[:, None] * E + e[None, :], out * over[:, None], mask=there)
    tl.store(OUT + sums + row * 2, tl.where(some, top, 0.0), mask=i < T)
    tl.store(OUT + sums + row * 2 + 1, over, mask=i < T)


@triton.jit
def _attention_push(
    Q, K, V, MASK, DQ, DK, DV, O, OUT, COLUMNS, H, SHARED, T, S, scale,
    q_s, k_s, v_s, m_s, dq_s, dk_s, dv_s, o_s, sums, SCORED: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, BOOL: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, BE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(COLUMNS, BK)
    tile, chunk, b, h = place(tl.program_id(0), tl.cdiv(T, BM), chunks, H, WIDE)
    i, e = span(tile * BM, BM, WIDE), span(0, BE, WIDE)
    inside = (i < T)[:, None]
    g = h // SHARED
    q_at, k_at, v_at, m_at = heads(Q, K, V, b, h, g, q_s, k_s, v_s, m_s)
    q_at += i[:, None] * q_s[2]
    row = (b * H + h) * T + i
    top, over = ended(O + sums, row, i < T)
    made = zeros(BK, BM, BE)
    along = zeros(BK, BM, 1)
    for start in range(0, seen_by(tile, S, BM, CAUSAL), BN):
        j = span(start, BN, WIDE)
        keys, known = k_at + j[None, :] * k_s[2], (j < S)[None, :]
        x = of_queries(
            q_at, q_s[3], i, k_at, k_s, j, MASK, m_at, m_s, T, S, scale, D, CAUSAL, BOOL, PRECISION,
            BM, BN, BI, WIDE,
        )  # fmt: skip
        p = tl.exp(x - top[:, None]) * over[:, None]
        there = (j < S)[:, None] & (e < E)[None, :]
        later = ()
        summed = ()
        for c in tl.static_range(BK):
            # what is too much is not stored
            column = tl.minimum(chunk * BK + c, COLUMNS - 1)
            acc = made[c]
            if SCORED:
                d = tl.zeros((BM, BN), tl.float32)
                if DQ is not None:
                    at = DQ + column * dq_s[0] + b * dq_s[1] + h * dq_s[2] + i[:, None] * dq_s[3]
                    d = dots(at, dq_s[4], inside, keys, k_s[3], known, D, d, BI, PRECISION, WIDE)
                if DK is not None:
                    at = DK + column * dk_s[0] + b * dk_s[1] + g * dk_s[2] + j[None, :] * dk_s[3]
                    d = dots(q_at, q_s[3], inside, at, dk_s[4], known, D, d, BI, PRECISION, WIDE)
                d = p * (d * scale)
                summed = summed + (along[c] + tl.sum(d, 1)[:, None],)
                v = tl.load(v_at + j[:, None] * v_s[2] + e[None, :] * v_s[3], mask=there, other=0.0)
                acc = product(d, v, acc, PRECISION, True)
            else:
                summed = summed + (along[c],)
            if DV is not None:
                at = DV + column * dv_s[0] + b * dv_s[1] + g * dv_s[2]
                at += j[:, None] * dv_s[3] + e[None, :] * dv_s[4]
                acc = product(p, tl.load(at, mask=there, other=0.0), acc, PRECISION, True)
            later = later + (acc,)
        made = later
        along = summed
    there = inside & (e < E)[None, :]
    o = tl.load(O + row[:, None] * E + e[None, :], mask=there, other=0.0)
    for c in tl.static_range(BK):
        d = made[c] - along[c] * o
        put(OUT, d, chunk * BK + c, COLUMNS, b, h, i, e, there, o_s)


@triton.jit
def _attention_pull_queries(
    Q, K, V, MASK, C, DELTA, O, OUT, COLUMNS, B, H, SHARED, T, S, scale,
    q_s, k_s, v_s, m_s, c_s, o_s, sums,
    D: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, BOOL: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(COLUMNS, BK)
    tile, chunk, b, h = place(tl.program_id(0), tl.cdiv(T, BM), chunks, H, WIDE)
    i, w = span(tile * BM, BM, WIDE), span(0, BD, WIDE)
    inside = (i < T)[:, None]
    q_at, k_at, v_at, m_at = heads(Q, K, V, b, h, h // SHARED, q_s, k_s, v_s, m_s)
    q_at += i[:, None] * q_s[2]
    row = (b * H + h) * T + i
    top, over = ended(O + sums, row, i < T)
    made = zeros(BK, BM, BD)
    for start in range(0, seen_by(tile, S, BM, CAUSAL), BN):
        j = span(start, BN, WIDE)
        known = (j < S)[None, :]
        x = of_queries(
            q_at, q_s[3], i, k_at, k_s, j, MASK, m_at, m_s, T, S, scale, D, CAUSAL, BOOL, PRECISION,
            BM, BN, BI, WIDE,
        )  # fmt: skip
        p = tl.exp(x - top[:, None]) * over[:, None]
        there = (j < S)[:, None] & (w < D)[None, :]
        later = ()
        for c in tl.static_range(BK):
            column = tl.minimum(chunk * BK + c, COLUMNS - 1)
            at = C + column * c_s[0] + b * c_s[1] + h * c_s[2] + i[:, None] * c_s[3]
            delta = tl.load(DELTA + column * B * H * T + row, mask=i < T, other=0.0)
            d = dots(
                at, c_s[4], inside, v_at + j[None, :] * v_s[2], v_s[3], known, E,
                tl.zeros((BM, BN), tl.float32), BI, PRECISION, WIDE,
            )  # fmt: skip
            d = p * (d - delta[:, None])
            k = tl.load(k_at + j[:, None] * k_s[2] + w[None, :] * k_s[3], mask=there, other=0.0)
            later = later + (product(d, k, made[c], PRECISION, True),)
        made = later
    there = inside & (w < D)[None, :]
    for c in tl.static_range(BK):
        put(OUT, made[c] * scale, chunk * BK + c, COLUMNS, b, h, i, w, there, o_s)


@triton.jit
def _attention_pull_keys(
    Q, K, V, MASK, C, DELTA, O, OUT, COLUMNS, B, G, SHARED, T, S, scale,
    q_s, k_s, v_s, m_s, c_s, o_s, sums,
    OF_KEYS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, BOOL: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
    BW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dk if OF_KEYS, else dv: keys are the rows of tiles."""
    chunks = tl.cdiv(COLUMNS, BK)
    tile, chunk, b, g = place(tl.program_id(0), tl.cdiv(S, BN), chunks, G, WIDE)
    j, w = span(tile * BN, BN, WIDE), span(0, BW, WIDE)
    inside = (j < S)[:, None]
    k_at = K + b * k_s[0] + g * k_s[1] + j[:, None] * k_s[2]
    v_at = V + b * v_s[0] + g * v_s[1] + j[:, None] * v_s[2]
    made = zeros(BK, BN, BW)
    first = 0
    if CAUSAL:
        first = tile * BN // BM * BM
    for r in range(SHARED):
        h = g * SHARED + r
        q_at = Q + b * q_s[0] + h * q_s[1]
        m_at = b * m_s[0] + h * m_s[1]
        for start in range(first, T, BM):
            i = span(start, BM, WIDE)
            known = (i < T)[None, :]
            row = (b * G * SHARED + h) * T + i
            x = dots(
                k_at, k_s[3], inside, q_at + i[None, :] * q_s[2], q_s[3], known, D,
                tl.zeros((BN, BM), tl.float32), BI, PRECISION, WIDE,
            )  # fmt: skip
            x = masked(x * scale, MASK, m_at, i[None, :], j[:, None], T, S, m_s, CAUSAL, BOOL)
            top, over = ended(O + sums, row, i < T)
            p = tl.exp(x - top[None, :]) * over[None, :]
            later = ()
            for c in tl.static_range(BK):
                column = tl.minimum(chunk * BK + c, COLUMNS - 1)
                at = C + column * c_s[0] + b * c_s[1] + h * c_s[2]
                if OF_KEYS:
                    delta = tl.load(
                        DELTA + column * B * G * SHARED * T + row, mask=i < T, other=0.0
                    )
                    d = dots(
                        v_at, v_s[3], inside, at + i[None, :] * c_s[3], c_s[4], known, E,
                        tl.zeros((BN, BM), tl.float32), BI, PRECISION, WIDE,
                    )  # fmt: skip
                    d = p * (d - delta[None, :])
                    there = (i < T)[:, None] & (w < D)[None, :]
                    at = q_at + i[:, None] * q_s[2] + w[None, :] * q_s[3]
                else:
                    d = p
                    there = (i < T)[:, None] & (w < E)[None, :]
                    at = at + i[:, None] * c_s[3] + w[None, :] * c_s[4]
                m = tl.load(at, mask=there, other=0.0)
                later = later + (product(d, m, made[c], PRECISION, True),)
            made = later
    for c in tl.static_range(BK):
        d = made[c]
        if OF_KEYS:
            d = d * scale
            there = inside & (w < D)[None, :]
        else:
            there = inside & (w < E)[None, :]
        put(OUT, d, chunk * BK + c, COLUMNS, b, g, j, w, there, o_s)


def configs(d: int, e: int, columns: int) -> tuple[Tiles, ...]:
    """How heads of these widths can run with so many tangents or cotangents; empty where they cannot."""
    widest = max(d, e)
    if min(d, e, columns) < 1 or widest > WIDEST:
        return ()
    if widest > 128:
        return (Tiles(64, 32, 32, 1, 8, 1),)
    if widest > 64:
        return (Tiles(64, 32, 32, 1, 4, 1), Tiles(64, 64, 32, 1, 8, 1))
    some = min(columns, 2)
    return (Tiles(64, 32, 32, some, 4, 1), Tiles(128, 32, 32, some, 8, 1))


@dataclass(frozen=True)
class Forward:
    """What `forward` leaves: o (B, H, T, e) and what rows ended with (B, H, T, 2), in one float32 tensor."""

    values: Tensor
    shape: tuple[int, ...]

    @property
    def sums(self) -> int:
        """Where what rows ended with begins."""
        B, H, T, e = self.shape
        return B * H * T * e

    @property
    def output(self) -> Tensor:
        return self.values[: self.sums].view(self.shape)


class _Given:
    """What all kernels take of one attention."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float, precision: str):
        (B, H, T, d), (_, G, S, e) = q.shape, v.shape
        self.sizes, self._numbers = (B, H, G, T, S, d, e), (H // G, T, S, scale)
        mask = seen.mask
        known = mask is not None and mask.dtype == torch.bool
        if mask is not None:
            mask = mask.expand(B, H, T, S)
            mask = mask.view(torch.uint8) if known else mask
        strides = (0,) * 4 if mask is None else mask.stride()
        self._tensors, self._strides = (
            (q, k, v, mask),
            (q.stride(), k.stride(), v.stride(), strides),
        )
        self._how = d, e, seen.causal, known, precision

    def launch(
        self, kernel, programs: int, out: Tensor, before: tuple, after: tuple, c: Tiles, *tile: int
    ) -> None:
        """``before``: tensors, and numbers, ahead of the sizes; ``after``: what comes behind the strides."""
        tensors = [t for t in before if t is None or isinstance(t, Tensor)]
        launch(
            kernel, (programs,), out, *self._tensors, *before, *self._numbers, *self._strides, *after, *self._how,
            *tile, wide(*self._tensors, *tensors), num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    scale: float,
    *,
    precision: str,
    config: Tiles | None = None,
) -> Forward:
    """The output, and what rows ended with.

    q: (B, H, T, d), k: (B, G, S, d), v: (B, G, S, e), any strides, H a multiple of G; d and e up to `WIDEST`.
    ``precision``: as in `batched.batched`. Raises Unfit where the device cannot run it. Costs ``2 B H T S (d + e)``
    flops, half of them where causal.
    """
    given = _Given(q, k, v, seen, scale, precision)
    B, H, _, T, _, d, e = given.sizes
    c = config or configs(d, e, 1)[0]
    made = Forward(q.new_empty(B * H * T * (e + 2), dtype=torch.float32), (B, H, T, e))
    if B * H * T:
        given.launch(
            _attention_forward, B * H * triton.cdiv(T, c.rows), made.values, (made.values, H), (made.sums,),
            c, c.rows, c.out, min(c.inner, power_of_two(d, 16)), power_of_two(e, 16),
        )  # fmt: skip
    return made


def push(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    scale: float,
    found: Forward,
    tangents: Sequence[Tensor | None],
    *,
    precision: str,
    out: Tensor | None = None,
    config: Tiles | None = None,
) -> Tensor:
    """Tangents (K, B, H, T, e) of the output, for (K, *of its tensor) of q, k and v, None for zero; some is given.

    ``found``: what `forward` left. ``out``: of any strides. The rest as there. Costs ``2 B H T S d`` flops for every
    ``config.columns`` tangents, and for each ``2 B H T S (d + e)`` for q or k, ``2 B H T S d`` more for both, and
    ``2 B H T S e`` for v; reads k, v and their tangents once for each ``config.rows`` queries.
    """
    given = _Given(q, k, v, seen, scale, precision)
    B, H, _, T, _, d, e = given.sizes
    K = next(t.shape[0] for t in tangents if t is not None)
    c = config or configs(d, e, K)[0]
    if out is None:
        out = q.new_empty(K, B, H, T, e)
    if out.numel():
        strides = [(0,) * 5 if t is None else t.stride() for t in tangents]
        scored = any(t is not None for t in tangents[:2])
        given.launch(
            _attention_push, B * H * triton.cdiv(K, c.columns) * triton.cdiv(T, c.rows), out,
            (*tangents, found.values, out, K, H), (*strides, out.stride(), found.sums, scored),
            c, c.columns, c.rows, c.out, min(c.inner, power_of_two(d, 16)), power_of_two(e, 16),
        )  # fmt: skip
    return out


def pull(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    scale: float,
    found: Forward,
    cotangents: Tensor,
    into: Sequence[Tensor | None],
    *,
    precision: str,
    config: Tiles | None = None,
) -> None:
    """Write cotangents (K, *of its tensor) of q, k and v to ``into``, None where they are not wanted; of any strides.

    cotangents: (K, B, H, T, e), any strides. The rest as in `push`. One launch for each of the three; scores are formed
    in each, once for every ``config.columns`` cotangents: ``2 B H T S d`` flops, and for a cotangent
    ``2 B H T S (d + e)`` for q and for k, ``2 B H T S e`` for v.
    """
    given = _Given(q, k, v, seen, scale, precision)
    B, H, G, T, S, d, e = given.sizes
    K = cotangents.shape[0]
    c = config or configs(d, e, K)[0]
    if not K * B * H * T:
        for t in into:
            if t is not None:
                t.zero_()
        return
    delta = (cotangents.float() * found.output).sum(-1)
    inner = min(c.inner, power_of_two(max(d, e), 16))
    by_queries = _attention_pull_queries, H, T, (c.rows, c.out), ()
    by_keys = _attention_pull_keys, G, S, (c.out, c.rows)
    three = (*by_queries, d), (*by_keys, (True,), d), (*by_keys, (False,), e)
    for out, (kernel, shared, length, sides, which, width) in zip(into, three, strict=True):
        if out is not None and out.numel():
            given.launch(
                kernel, B * shared * triton.cdiv(K, c.columns) * triton.cdiv(length, c.rows), out,
                (cotangents, delta, found.values, out, K, B, shared),
                (cotangents.stride(), out.stride(), found.sums, *which),
                c, c.columns, *sides, inner, power_of_two(width, 16),
            )  # fmt: skip
