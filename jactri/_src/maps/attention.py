"""Attention and its derivatives, tile by tile: scores and probabilities are never there as a whole.

With scores ``S = scale * q k^T + mask``, ``P = softmax(S)`` and ``o = P v``, tangents are pushed, query i and key j, by

    dS = scale * (dq k^T + q dk^T)
    do_i = sum_j P_ij (dS_ij v_j + dv_j) - (sum_j P_ij dS_ij) o_i

and a cotangent c of o is pulled, with ``delta_i = c_i . o_i``, by

    dS_ij = P_ij (c_i . v_j - delta_i),  dq = scale * dS k,  dk = scale * dS^T q,  dv = P^T c

Both are linear in one thing each, and what remains is one form, ``f = sum_k c_k . J t_k``. Its gradients in q, k and v
(`bend`) are, with ``a_ij = c_i . v_j``, ``b_ij = c_i . dv_j`` and E_i the mean over keys under P_i, sums over k of

    f_i = E_i[(dS - E_i dS) (a - delta)] + E_i[b]
    G_ij = P_ij ((dS_ij - E_i dS) (a_ij - delta_i) + b_ij - f_i),  W_ij = P_ij (a_ij - delta_i)
    scale * (G k + W dk),  scale * (G^T q + W^T dq),  sum_i P_ij (dS_ij - E_i dS) c_i

(the derivative of a softmax's means: ``dE_i[g] / dS_ij = P_ij (g_ij - E_i[g])``).

Sums over keys are kept relative to the largest score so far, and shrink where a larger one comes (Milakov, Gimelshein
2018, arXiv:1805.02867); what needs P itself has it from what a row ended with (as Dao 2023, arXiv:2307.08691, section
3.1, but not from one logarithm, which scores of 1e38, a mask's, absorb). K tangents or cotangents share the P of a
tile. A query that may attend to nothing gives 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..base.rates import block_bytes
from ..base.tracing import may_write
from .cut import Cut
from .maps import wide

Blocks = Sequence[Tensor | None]
"""Of q, k and v: tangents or cotangents (K, *of its tensor), None for zero or for what is not wanted."""

TILE_BYTES = 1 << 21
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


def _columns(t: Tensor, rows: Rows, s: slice) -> Tensor:
    """Keys of a block (K, B, G, S, w) as (b, g, K, keys, w)."""
    return _of_keys(t, rows, s).movedim(0, 2)


class _Running:
    """Softmax over keys that come a tile at a time: sums are relative to the largest score so far."""

    def __init__(self, q: Tensor):
        self.top = q.new_full((*q.shape[:3], 1), -math.inf)
        self.total = torch.zeros_like(self.top)

    def take(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of more keys, in the memory of their scores, and by what all sums so far shrink."""
        largest = torch.maximum(self.top, scores.amax(-1, keepdim=True))
        finite = largest.masked_fill(largest == -math.inf, 0.0)
        p = scores.sub_(finite).exp_()
        shrink = self.top.sub_(finite).exp_()
        self.top = largest
        self.total.mul_(shrink).add_(p.sum(-1, keepdim=True))
        return p, shrink

    def ended(self) -> tuple[Tensor, Tensor]:
        """The largest score, and one over the sum relative to that; both are 0 where a query sees no key."""
        none = self.total == 0
        return self.top.masked_fill(none, 0.0), self.total.reciprocal().masked_fill_(none, 0.0)


class _Tangents:
    """Those of the scores, for blocks of q and k; of no scores where both are zero."""

    def __init__(self, tiles: _Tiles, rows: Rows, q: Tensor, dq: Tensor | None, dk: Tensor | None):
        """q: the rows' queries, scaled."""
        self.some = dq is not None or dk is not None
        self.dq = None if dq is None else tiles.block(dq, rows) * tiles.of.scale
        self._q, self._dk, self._rows = q, dk, rows

    def at(self, k: Tensor, s: slice) -> Tensor:
        """(b, g, K, rows, keys)."""
        made = None
        if self.dq is not None:
            made = _times(self.dq, k.mT)
        if self._dk is not None:
            by_keys = self._q.unsqueeze(2) @ _columns(self._dk, self._rows, s).mT
            made = by_keys if made is None else made.add_(by_keys)
        return made


def push(of: Attention, tangents: Blocks) -> Tensor:
    """The output's tangents (K, B, H, T, e), for those of q, k and v, of which some are given.

    Costs ``2 B H T S (d + e)`` flops, and a tangent as many for q or k each, and the half for v; half of it where
    causal. Allocates its result and `TILE_BYTES`, about.
    """
    dq, dk, dv = tangents
    K = columns_of(tangents)
    B, H, _, T, _, _, e = of.sizes
    tiles = _Tiles(of, K)
    do = of.q.new_empty(K, B, H, T, e)
    for rows in tiles.rows():
        q = tiles.read(of.q, rows) * of.scale
        scored, run = _Tangents(tiles, rows, q, dq, dk), _Running(q)
        out = q.new_zeros(*q.shape[:3], e)
        along = q.new_zeros(*q.shape[:2], K, q.shape[2], 1)
        made = q.new_zeros(*q.shape[:2], K, q.shape[2], e)
        for s in tiles.seen(rows):
            k, v = (_of_keys(t, rows, s) for t in (of.k, of.v))
            p, shrink = run.take(tiles.scores(q, k, rows, s))
            made.mul_(shrink.unsqueeze(2))
            if scored.some:
                out.mul_(shrink).add_(p @ v)
                d = scored.at(k, s).mul_(p.unsqueeze(2))
                along.mul_(shrink.unsqueeze(2)).add_(d.sum(-1, keepdim=True))
                made.add_(_times(d, v))
            if dv is not None:
                made.add_(_side_by_side(p, _of_keys(dv, rows, s)))
        over = run.ended()[1]
        made.addcmul_(along, out.mul_(over).unsqueeze(2), value=-1).mul_(over.unsqueeze(2))
        tiles.write(do, rows, made.movedim(2, 0))
    return do


def pull(of: Attention, c: Tensor, into: Blocks) -> None:
    """Write the cotangents of q, k and v, for those of the output (K, B, H, T, e), to ``into``.

    Costs ``2 B H T S (2 d + e)`` flops, and for a cotangent at most ``4 B H T S (d + e)``; half of it where causal.
    Allocates `TILE_BYTES`, about; in half precision the sums for keys are in float32, beside what they are written to.
    """
    K, e = c.shape[0], c.shape[-1]
    tiles = _Tiles(of, K)
    dk, dv = totals = [None if t is None else wide(t) for t in into[1:]]
    for t in totals:
        if t is not None:
            t.zero_()
    for rows in tiles.rows():
        q = tiles.read(of.q, rows) * of.scale
        run, out = _Running(q), q.new_zeros(*q.shape[:3], e)
        for s in tiles.seen(rows):
            k, v = (_of_keys(t, rows, s) for t in (of.k, of.v))
            p, shrink = run.take(tiles.scores(q, k, rows, s))
            out.mul_(shrink).add_(p @ v)
        top, over = run.ended()
        pulled = tiles.block(c, rows) * over.unsqueeze(2)  # instead of P
        delta = (pulled * out.mul_(over).unsqueeze(2)).sum(-1, keepdim=True)
        dq = None if into[0] is None else q.new_zeros(*pulled.shape[:4], q.shape[-1])
        for s in tiles.seen(rows):
            k, v = (_of_keys(t, rows, s) for t in (of.k, of.v))
            p = tiles.scores(q, k, rows, s).sub_(top).exp_()
            if dv is not None:
                at = dv[:, rows[0], rows[1], s]
                at.add_(_side_by_side(p.mT, pulled.movedim(2, 0)).movedim(2, 0))
            if dq is None and dk is None:
                continue
            d = _times(pulled, v.mT).sub_(delta).mul_(p.unsqueeze(2))
            if dq is not None:
                dq.add_(_times(d, k))
            if dk is not None:
                dk[:, rows[0], rows[1], s].add_((d.mT @ q.unsqueeze(2)).movedim(2, 0))
        if dq is not None:
            tiles.write(into[0], rows, dq.mul_(of.scale).movedim(2, 0))
    for t, total in zip(into[1:], totals, strict=True):
        if t is not None and total is not t:
            t.copy_(total)


def bend(of: Attention, tangents: Blocks, c: Tensor, into: Blocks) -> None:
    """Write the gradients of ``sum_k c_k . J t_k`` in q, k and v, each of its tensor's shape, to ``into``.

    ``tangents``: of q, k and v, of which some are given; c: (K, B, H, T, e). Costs ``4 B H T S d`` flops, and for each
    of the K at most ``12 B H T S (d + e)``; half of it where causal. Allocates as `pull`.
    """
    dq, dk, dv = tangents
    K = c.shape[0]
    tiles = _Tiles(of, 2 * K)
    to_k, to_v = totals = [None if t is None else wide(t) for t in into[1:]]
    for t in totals:
        if t is not None:
            t.zero_()
    for rows in tiles.rows():
        q, given = tiles.read(of.q, rows) * of.scale, tiles.block(c, rows)
        scored, run = _Tangents(tiles, rows, q, dq, dk), _Running(q)
        sums = q.new_zeros(4, *given.shape[:4], 1)  # of dS, a, dS a and b
        for s in tiles.seen(rows):
            k, v = (_of_keys(t, rows, s) for t in (of.k, of.v))
            p, shrink = run.take(tiles.scores(q, k, rows, s))
            sums.mul_(shrink.unsqueeze(2))
            p = p.unsqueeze(2)
            if scored.some:
                d, a = scored.at(k, s).mul_(p), _times(given, v.mT)
                sums[0].add_(d.sum(-1, keepdim=True))
                sums[2].add_(d.mul_(a).sum(-1, keepdim=True))
                sums[1].add_(a.mul_(p).sum(-1, keepdim=True))
            if dv is not None:
                b = given @ _columns(dv, rows, s).mT
                sums[3].add_(b.mul_(p).sum(-1, keepdim=True))
        top, over = run.ended()
        mean, delta, both, beside = sums.mul_(over.unsqueeze(2))
        both = both - mean * delta + beside  # f
        made = q.new_zeros(q.shape)
        for s in tiles.seen(rows):
            k, v = (_of_keys(t, rows, s) for t in (of.k, of.v))
            p = tiles.scores(q, k, rows, s).sub_(top).exp_().mul_(over).unsqueeze(2)
            g = -both if dv is None else (given @ _columns(dv, rows, s).mT).sub_(both)
            if scored.some:
                d, a = scored.at(k, s).sub_(mean), _times(given, v.mT).sub_(delta)
                g = torch.addcmul(g, d, a)
                if to_v is not None:
                    at = to_v[rows[0], rows[1], s]
                    at.add_(d.mul_(p).flatten(2, 3).mT @ given.flatten(2, 3))
                a.mul_(p)
                if dk is not None and into[0] is not None:
                    made.add_((a @ _columns(dk, rows, s)).sum(2))
                if dq is not None and to_k is not None:
                    at = to_k[rows[0], rows[1], s]
                    at.add_(a.flatten(2, 3).mT @ scored.dq.flatten(2, 3))
            g = g.mul_(p).sum(2)
            if into[0] is not None:
                made.add_(g @ k)
            if to_k is not None:
                to_k[rows[0], rows[1], s].add_(g.mT @ q)
        if into[0] is not None:
            tiles.write(into[0], rows, made.mul_(of.scale))
    for t, total in zip(into[1:], totals, strict=True):
        if t is not None and total is not t:
            t.copy_(total)


def columns_of(blocks: Blocks) -> int:
    """K, of blocks of which some are given."""
    return next(t.shape[0] for t in blocks if t is not None)


def _times(blocks: Tensor, right: Tensor) -> Tensor:
    """``blocks[k] @ right`` for all k, (b, g, K, m, n) by (b, g, n, w), in one product."""
    return (blocks.flatten(2, 3) @ right).unflatten(2, blocks.shape[2:4])


def _side_by_side(left: Tensor, blocks: Tensor) -> Tensor:
    """``left @ blocks[k]`` for all k, (b, g, m, n) by (K, b, g, n, w), in one product: (b, g, K, m, w)."""
    K, w = blocks.shape[0], blocks.shape[-1]
    columns = blocks.movedim(0, -2).flatten(-2)
    return (left @ columns).unflatten(-1, (K, w)).movedim(-2, 2)


# -- as a whole, in ops that autograd records -------------------------------------------------------


def probabilities(of: Attention) -> Tensor:
    """``softmax(scale * q k^T + mask)`` of shape (B, H, T, S), in at least float32."""
    B, H, G, T, S, _, _ = of.sizes
    left = wide(of.q).reshape(B, G, -1, of.q.shape[-1]) * of.scale
    scores = (left @ wide(of.k).transpose(-1, -2)).reshape(B, H, T, S)
    write = may_write()
    fill, add = (Tensor.masked_fill_, Tensor.add_) if write else (Tensor.masked_fill, Tensor.add)
    if of.causal:
        above = torch.ones(T, S, dtype=torch.bool, device=of.q.device).triu(1)
        scores = fill(scores, above, -math.inf)
    if of.mask is not None:
        if of.mask.dtype == torch.bool:
            scores = fill(scores, ~of.mask, -math.inf)
        else:
            scores = add(scores, wide(of.mask))
    # rows that are masked as a whole attend to nothing (0, not NaN)
    if not write or not S:
        return torch.ops.aten._safe_softmax(scores, -1)
    top = scores.amax(-1, keepdim=True)
    none = top == -math.inf
    scores.sub_(top.masked_fill_(none, 0.0)).exp_()
    return scores.div_(scores.sum(-1, keepdim=True).masked_fill_(none, 1.0))


def pushed_as_a_whole(of: Attention, tangents: Blocks) -> Tensor:
    """`push` with scores and probabilities of all queries and keys in memory, at least in float32."""
    B, _, G, T, S, _, _ = of.sizes
    p = probabilities(of).reshape(B, G, -1, S)

    def rows(t: Tensor) -> Tensor:
        return wide(t).reshape(*t.shape[:-3], G, -1, t.shape[-1])

    dq, dk, dv = tangents
    q, k, v = rows(of.q), wide(of.k), wide(of.v)
    scored = [rows(dq) @ k.mT] if dq is not None else []
    scored += [q @ wide(dk).mT] if dk is not None else []
    made = [p @ wide(dv)] if dv is not None else []
    if scored:
        d = of.scale * sum(scored)
        made.append((p * (d - (p * d).sum(-1, keepdim=True))) @ v)
    whole = sum(made)
    return whole.reshape(-1, B, of.q.shape[1], T, v.shape[-1])
