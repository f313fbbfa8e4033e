"""Attention and its derivatives, tile by tile: scores and probabilities are never there as a whole.

With scores ``S = scale * q k^T + mask``, ``P = softmax(S)`` and ``o = P v``, tangents are pushed, query i and key j, by

    dS = scale * (dq k^T + q dk^T)
    do_i = sum_j P_ij (dS_ij v_j + dv_j) - (sum_j P_ij dS_ij) o_i

and a cotangent c of o is pulled, with ``delta_i = c_i . o_i``, by

    dS_ij = P_ij (c_i . v_j - delta_i),  dq = scale * dS k,  dk = scale * dS^T q,  dv = P^T c

Sums over keys are kept relative to the largest score so far, and shrink where a larger one comes (Milakov, Gimelshein
2018, arXiv:1805.02867); the pull has P from what a row ended with (as Dao 2023, arXiv:2307.08691, section 3.1, but not
from one logarithm, which scores of 1e38, a mask's, absorb). K tangents or cotangents share the P of a tile. A query
that may attend to nothing gives 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..base.rates import block_bytes
from .linear_map import Cut
from .maps import wide

TILE_BYTES = 1 << 22
"""Of all tiles of scores that are there at once, on a CPU: they stay in a core's cache."""

SIDE = 64
"""The fewest rows and keys of a tile: sums of so many pay for the memory that each tile's products read and write."""

Rows = tuple[slice, slice, slice]
"""Ranges of the batch, of the heads of keys, and of the queries."""


@dataclass(frozen=True)
class Attention:
    """One call: q (B, H, T, d), k (B, G, S, d), v (B, G, S, e); H / G heads of queries share each head of keys.

    ``mask`` is broadcast to (B, H, T, S): boolean, true where a key takes part, or added to the scores. ``causal``:
    query i sees the keys up to i alone.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    scale: float

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """B, H, G, T, S, d, e."""
        B, H, T, d = self.q.shape
        G, S, e = self.v.shape[1:]
        return B, H, G, T, S, d, e

    def of(self, cut: Cut, dtype: torch.dtype | None = None) -> Attention:
        """That of a range of samples, in another dtype if one is given."""
        q, k, v = (cut.of(t, 4).to(dtype or t.dtype) for t in (self.q, self.k, self.v))
        mask = None if self.mask is None else cut.of(self.mask, 4)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(dtype or mask.dtype)
        return replace(self, q=q, k=k, v=v, mask=mask)


class _Tiles:
    """The ranges that an attention is cut to, for so many tangents or cotangents, and what lies in them.

    Heads that share keys are rows of one matrix: (B, G, H / G * T, .).
    """

    def __init__(self, of: Attention, columns: int):
        B, H, G, T, S, _, _ = of.sizes
        self.of, self.shared, self.columns = of, H // G, columns
        dtype, device = wide(of.q[:0]).dtype, of.q.device
        entries = block_bytes(device.type, TILE_BYTES) // dtype.itemsize // (2 * columns + 1)
        self.keys = max(1, min(S, max(math.isqrt(entries), SIDE)))
        row = self.shared * self.keys
        self.queries = max(1, min(T, max(entries // row, SIDE // self.shared)))
        self.groups = max(1, min(G, entries // (row * self.queries)))
        whole = self.groups == G and self.queries == T
        self.batch = max(1, min(B, entries // (row * self.queries * G))) if whole else 1
        self.mask = None if of.mask is None else self._grouped(of.mask.expand(B, H, T, S))

    def _grouped(self, t: Tensor) -> Tensor:
        return t.unflatten(-3, (-1, self.shared))

    def rows(self) -> Iterator[Rows]:
        B, _, G, T, _, _, _ = self.of.sizes
        for b in range(0, B, self.batch):
            for g in range(0, G, self.groups):
                for t in range(0, T, self.queries):
                    yield (
                        slice(b, min(b + self.batch, B)),
                        slice(g, min(g + self.groups, G)),
                        slice(t, min(t + self.queries, T)),
                    )

    def seen(self, rows: Rows) -> Iterator[slice]:
        """The keys of tiles that some query of the rows may see."""
        S = self.of.sizes[4]
        end = min(S, rows[2].stop) if self.of.causal else S
        for s in range(0, end, self.keys):
            yield slice(s, min(s + self.keys, end))

    def at(self, t: Tensor, rows: Rows) -> Tensor:
        """The place of rows in a tensor (..., B, H, T, w), as a view (..., b, g, H / G, t, w)."""
        return self._grouped(t)[..., rows[0], rows[1], :, rows[2], :]

    def read(self, t: Tensor, rows: Rows) -> Tensor:
        """Rows of (B, H, T, w) as (b, g, rows, w)."""
        return wide(self.at(t, rows).flatten(-3, -2))

    def block(self, t: Tensor, rows: Rows) -> Tensor:
        """Rows of a block (K, B, H, T, w) as (b, g, K, rows, w)."""
        return wide(self.at(t, rows).flatten(-3, -2).movedim(0, 2))

    def write(self, to: Tensor, rows: Rows, made: Tensor) -> None:
        at = self.at(to, rows)
        at.copy_(made.unflatten(-2, at.shape[-3:-1]))

    def scores(self, q: Tensor, k: Tensor, rows: Rows, s: slice) -> Tensor:
        """Those of scaled queries and keys, minus infinity where a mask says so."""
        made = q @ k.mT
        apart = made.unflatten(-2, (self.shared, -1))
        t = rows[2]
        if self.of.causal and s.stop > t.start + 1:
            i = torch.arange(t.start, t.stop, device=q.device)
            j = torch.arange(s.start, s.stop, device=q.device)
            apart.masked_fill_(j > i[:, None], -math.inf)
        if self.mask is not None:
            mask = self.mask[rows[0], rows[1], :, t, s]
            if mask.dtype == torch.bool:
                apart.masked_fill_(~mask, -math.inf)
            else:
                apart.add_(mask)
        return made


def _of_keys(t: Tensor, rows: Rows, s: slice) -> Tensor:
    """Keys of (..., B, G, S, w)."""
    return wide(t[..., rows[0], rows[1], s, :])


def forward(
    of: Attention,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (B, H, T, e), the rows' sums (2, B, H, T, 1), and the output's tangents (K, B, H, T, e).

    dq, dk, dv: blocks of tangents (K, *of its tensor), None for zero; without any, K is 0. Of a row's sum: its largest
    score, and one over the sum relative to that; both are 0 where it sees no key. Costs ``2 B H T S (d + e)`` flops,
    and a tangent as many for q or k each, and the half for v; half of it where causal. Allocates its results and
    `TILE_BYTES`, about.
    """
    B, H, _, T, _, _, e = of.sizes
    given = [t for t in (dq, dk, dv) if t is not None]
    K = given[0].shape[0] if given else 0
    tiles = _Tiles(of, K)
    o = of.q.new_empty(B, H, T, e)
    sums = wide(of.q[:0]).new_empty(2, B, H, T, 1)
    do = of.q.new_empty(K, B, H, T, e)
    for rows in tiles.rows():
        q = tiles.read(of.q, rows) * of.scale
        pushed = None if dq is None else (tiles.block(dq, rows) * of.scale).flatten(2, 3)
        top = q.new_full((*q.shape[:3], 1), -math.inf)
        total, out = torch.zeros_like(top), q.new_zeros(*q.shape[:3], e)
        along = q.new_zeros(*q.shape[:2], K, q.shape[2], 1)
        made = q.new_zeros(*q.shape[:2], K, q.shape[2], e)
        for s in tiles.seen(rows):
            k, v = (_of_keys(t, rows, s) for t in (of.k, of.v))
            p = tiles.scores(q, k, rows, s)
            largest = torch.maximum(top, p.amax(-1, keepdim=True))
            finite = largest.masked_fill(largest == -math.inf, 0.0)
            p.sub_(finite).exp_()
            shrink = top.sub_(finite).exp_()
            top = largest
            total.mul_(shrink).add_(p.sum(-1, keepdim=True))
            out.mul_(shrink).add_(p @ v)
            if not K:
                continue
            made.mul_(shrink.unsqueeze(2))
            d = None if pushed is None else (pushed @ k.mT).unflatten(2, (K, -1))
            if dk is not None:
                by_keys = q.unsqueeze(2) @ _of_keys(dk, rows, s).movedim(0, 2).mT
                d = by_keys if d is None else d.add_(by_keys)
            if d is not None:
                d.mul_(p.unsqueeze(2))
                along.mul_(shrink.unsqueeze(2)).add_(d.sum(-1, keepdim=True))
                made.add_((d.flatten(2, 3) @ v).unflatten(2, (K, -1)))
            if dv is not None:
                made.add_(_side_by_side(p, _of_keys(dv, rows, s)))
        over = total.reciprocal().masked_fill_(total == 0, 0.0)
        out.mul_(over)
        tiles.write(o, rows, out)
        tiles.write(sums[0], rows, top.masked_fill_(total == 0, 0.0))
        tiles.write(sums[1], rows, over)
        if K:
            made.sub_(along * out.unsqueeze(2)).mul_(over.unsqueeze(2))
            tiles.write(do, rows, made.movedim(2, 0))
    return o, sums, do


def _side_by_side(left: Tensor, blocks: Tensor) -> Tensor:
    """``left @ blocks[k]`` for all k, (b, g, m, n) by (K, b, g, n, w), in one product: (b, g, K, m, w)."""
    K, w = blocks.shape[0], blocks.shape[-1]
    columns = blocks.movedim(0, -2).flatten(-2)
    return (left @ columns).unflatten(-1, (K, w)).movedim(-2, 2)


def backward(
    of: Attention,
    o: Tensor,
    sums: Tensor,
    c: Tensor,
    into: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Write the cotangents of q, k and v, blocks (K, *of its tensor), to ``into``, whose None are not wanted.

    o, sums: as `forward` has them; c: (K, B, H, T, e). Costs ``2 B H T S d`` flops, and for a cotangent at most
    ``4 B H T S (d + e)``; half of it where causal. Allocates `TILE_BYTES`, about; in half precision the sums for keys
    are in float32, beside what they are written to.
    """
    K = c.shape[0]
    tiles = _Tiles(of, K)
    dk, dv = totals = [None if t is None else wide(t) for t in into[1:]]
    for t in totals:
        if t is not None:
            t.zero_()
    for rows in tiles.rows():
        q = tiles.read(of.q, rows) * of.scale
        top, over = (tiles.read(t, rows) for t in sums)
        pulled = tiles.block(c, rows) * over.unsqueeze(2)  # instead of P
        delta = (pulled * tiles.read(o, rows).unsqueeze(2)).sum(-1, keepdim=True)
        flat = pulled.flatten(2, 3)
        dq = None if into[0] is None else q.new_zeros(*flat.shape[:3], q.shape[-1])
        for s in tiles.seen(rows):
            k, v = (_of_keys(t, rows, s) for t in (of.k, of.v))
            p = tiles.scores(q, k, rows, s).sub_(top).exp_()
            if dv is not None:
                at = dv[:, rows[0], rows[1], s]
                at.add_(_side_by_side(p.mT, pulled.movedim(2, 0)).movedim(2, 0))
            if dq is None and dk is None:
                continue
            d = (flat @ v.mT).unflatten(2, (K, -1)).sub_(delta).mul_(p.unsqueeze(2))
            if dq is not None:
                dq.add_(d.flatten(2, 3) @ k)
            if dk is not None:
                dk[:, rows[0], rows[1], s].add_((d.mT @ q.unsqueeze(2)).movedim(2, 0))
        if dq is not None:
            made = dq.mul_(of.scale).unflatten(2, (K, -1))
            tiles.write(into[0], rows, made.movedim(2, 0))
    for t, total in zip(into[1:], totals, strict=True):
        if t is not None and total is not t:
            t.copy_(total)
