"""``J^T M J``, its block diagonal and ``J^T M v`` of a sparse J, by its blocks: none of it is ever dense.

A row of ``k`` blocks is a matrix ``(r, k c)``, whose Gram matrix has ``k^2`` blocks; rows of as many blocks
are multiplied together, and their products added where they belong. Which those are is found once for a pattern.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..base.constants import fixed
from ..base.csr import numbered, starts
from ..base.memory import Budget
from ..run.blocks import Blocks

CHUNK = 1 << 22
"""Bytes of products that are there at once: what a processor has near it."""

PAIR = 40
"""Bytes that a pair of blocks in one row takes while the pattern of the product is found."""

FEW = 8
"""Rows of a block up to which products are sums of that many outer ones: libraries are slow for tiny matrices."""

Rows = Sequence[Sequence[Blocks]]
"""A Jacobian by output and input; blocks of one output have as many rows, of one input as many columns."""


def weighted(weight: Tensor | None, block: Blocks) -> Blocks:
    """``M J``; ``weight``: ``(rows of blocks, r)`` for a diagonal, ``(rows of blocks, r, r)`` for a matrix each."""
    if weight is None:
        return block
    own = weight.to(block.values.dtype).index_select(0, block.row)
    if own.dim() == 2:
        return block.with_values(own.unsqueeze(2) * block.values)
    return block.with_values(own @ block.values)


def gram(rows: Rows, weights: Sequence[Tensor | None], budget: Budget) -> list[list[Blocks]]:
    """``H[i][k]``, blocks of the inputs; exactly symmetric where the weights are. Raises MemoryLimitTooSmall."""
    half = all(w is None or w.dim() == 2 or torch.equal(w, w.mT) for w in weights)
    n = len(rows[0])
    made: dict[tuple[int, int], Blocks] = {}
    right = [[weighted(w, b) for b in row] for w, row in zip(weights, rows, strict=True)]
    for i in range(n):
        for k in range(n):
            if half and k < i:
                made[i, k] = made[k, i].T
                continue
            found = _product([row[i] for row in rows], [row[k] for row in right], budget)
            if half and i == k:  # its pattern is that of its transpose
                found = found.with_values((found.values + found.T.values) / 2)
            made[i, k] = found
    return [[made[i, k] for k in range(n)] for i in range(n)]


def _product(left: list[Blocks], right: list[Blocks], budget: Budget) -> Blocks:
    """The sum of ``A^T B`` over pairs of matrices."""
    first, second = left[0], right[0]
    device, (dtype, wide) = first.values.device, _dtypes([*left, *right])
    shape, size = (first.shape[1], second.shape[1]), (first.size[1], second.size[1])
    key = "blocks of J^T J", tuple((a.key, b.key) for a, b in zip(left, right, strict=True))

    def make() -> tuple[Tensor, ...]:
        of, *found = _symbolic(left, right, shape[1] // size[1], budget)
        return of, *(t.to(device) for t in found)

    of, start, column, *groups = fixed((key, device), make)
    budget.check("the matrix J^T J", len(column) * size[0] * size[1] * wide.itemsize)
    total = torch.zeros(len(column), *size, dtype=wide, device=device)
    for number, p in enumerate(of.tolist()):
        a, b, target = groups[3 * number : 3 * number + 3]
        (ka, kb), r = (a.shape[1], b.shape[1]), left[p].size[0]
        each = ka * kb * size[0] * size[1] * wide.itemsize
        many = min(max(1, CHUNK // each), budget.count(4 * each, len(a)))
        for at in range(0, len(a), many):
            mine, theirs, to = a[at : at + many], b[at : at + many], target[at : at + many]
            m = len(mine)
            above = left[p].values.index_select(0, mine.reshape(-1)).to(wide)
            beside = right[p].values.index_select(0, theirs.reshape(-1)).to(wide)
            above = above.view(m, ka, r, size[0]).transpose(1, 2).reshape(m, r, ka * size[0])
            beside = beside.view(m, kb, r, size[1]).transpose(1, 2).reshape(m, r, kb * size[1])
            made = _times(above, beside).view(m, ka, size[0], kb, size[1]).transpose(2, 3)
            total = _added(total, to.reshape(-1), made.reshape(-1, *size))
    return Blocks(start, column, total.to(dtype), shape, key)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b`` of matrices ``(m, r, ...)``."""
    if a.shape[1] > FEW:
        return a.mT @ b
    made = a[:, 0, :, None] * b[:, 0, None]
    for k in range(1, a.shape[1]):
        made.addcmul_(a[:, k, :, None], b[:, k, None])
    return made


def _symbolic(left: list[Blocks], right: list[Blocks], wide: int, budget: Budget) -> list[Tensor]:
    """The pattern of a product; and by number of blocks in a row their pair, their blocks ``(rows, k)``, and places."""
    of, groups, keys = [], [], []
    for p, (a, b) in enumerate(zip(left, right, strict=True)):
        ends = [(t.start.cpu().numpy(), t.column.cpu().numpy()) for t in (a, b)]
        counts = np.stack([np.diff(start) for start, _ in ends])
        budget.check("the pattern of J^T J", PAIR * int(counts.prod(0).sum()))
        above, beside = counts
        bound = int(beside.max(initial=0)) + 1
        kinds, kind = numbered(above * bound + beside, (int(above.max(initial=0)) + 1) * bound)
        for number, (ka, kb) in enumerate(zip(*np.divmod(kinds, bound), strict=True)):
            if not ka * kb:
                continue
            rows = np.flatnonzero(kind == number)
            mine, theirs = (
                start[rows][:, None] + np.arange(k)
                for (start, _), k in zip(ends, (ka, kb), strict=True)
            )
            above, beside = ends[0][1][mine], ends[1][1][theirs]
            of.append(p)
            groups.append((mine, theirs))
            keys.append(above[:, :, None] * wide + beside[:, None, :])
    flat = np.concatenate([np.empty(0, np.int64), *(k.reshape(-1) for k in keys)])
    height = left[0].shape[1] // left[0].size[1]
    kept, place = numbered(flat, height * wide)
    above, beside = np.divmod(kept, max(wide, 1))
    made = [np.array(of, np.int64), starts(np.bincount(above, minlength=height)), beside]
    begin, small = 0, max(flat.size, *(len(t.column) for t in (*left, *right))) < 1 << 31
    for (mine, theirs), key in zip(groups, keys, strict=True):
        found = mine, theirs, place[begin : begin + key.size].reshape(key.shape)
        made += [t.astype(np.int32) for t in found] if small else found
        begin += key.size
    return [torch.from_numpy(np.ascontiguousarray(t)) for t in made]


def _dtypes(blocks: list[Blocks]) -> tuple[torch.dtype, torch.dtype]:
    """Of a result, and of its sums: half types add up in single precision."""
    found = blocks[0].values.dtype
    for block in blocks:
        found = torch.promote_types(found, block.values.dtype)
    return found, torch.promote_types(found, torch.float32)


def _added(total: Tensor, target: Tensor, made: Tensor) -> Tensor:
    """``total`` with blocks added at their places."""
    if made.requires_grad:
        return total.index_add(0, target, made)
    return total.index_add_(0, target, made)


def block_diagonal(rows: Rows, weights: Sequence[Tensor | None], i: int) -> Tensor:
    """The blocks ``(count, c, c)`` on the diagonal of ``H[i][i]``."""
    first, size = rows[0][i], rows[0][i].size[1]
    dtype, wide = _dtypes([row[i] for row in rows])
    total = torch.zeros(first.shape[1] // size, size, size, dtype=wide, device=first.values.device)
    for weight, row in zip(weights, rows, strict=True):
        block = row[i]
        other, many = weighted(weight, block), max(1, CHUNK // (size**2 * wide.itemsize))
        parts = (t.split(many) for t in (block.column, block.values, other.values))
        for column, mine, theirs in zip(*parts, strict=True):
            total = _added(total, column, _times(mine.to(wide), theirs.to(wide)))
    return total.to(dtype)


def gradient(rows: Rows, weights: Sequence[Tensor | None], vs: Sequence[Tensor], i: int) -> Tensor:
    """``J[:, i]^T M v``, flat; ``vs``: ``(rows of blocks, r)`` of every output."""
    first, c = rows[0][i], rows[0][i].size[1]
    dtype, wide = _dtypes([row[i] for row in rows])
    total = torch.zeros(first.shape[1] // c, c, dtype=wide, device=first.values.device)
    for weight, v, row in zip(weights, vs, rows, strict=True):
        block = row[i]
        if weight is not None:
            v = weight * v if weight.dim() == 2 else (weight @ v.unsqueeze(2)).squeeze(2)
        own = v.to(wide).index_select(0, block.row).unsqueeze(1)
        total = _added(total, block.column, (own @ block.values.to(wide)).squeeze(1))
    return total.reshape(-1).to(dtype)
