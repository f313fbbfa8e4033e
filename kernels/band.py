"""A compressed Jacobian written out densely, zeros included, in one pass.

Columns of one colour share no row, so one seed carries them all. With rows ``(free, z, y, x)`` and columns ``(free, z,
y, x)``, of which z (say, the groups of channels), y and x are windowed,

    out[s, row, column] = c[s, colour[column], row]   where support[row_a, column_a] for each windowed axis a,

and zero elsewhere, also between samples if the answer has them on both sides. Every element is written once, in the
order of memory.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import launch
from .support import power_of_two, wide

FAST, SLOW = 128, 16
"""The tile, along the axis of ``out`` that is contiguous and along the other: rows of one colour share cache lines."""


@triton.jit
def _seen(TABLE, row, column, size, strides, mask):
    """Whether the support of one axis holds at (row, column), and the indices that are left for slower axes."""
    if TABLE is None:
        return mask, row, column
    else:
        at = row % size[0] * strides[0] + column % size[1] * strides[1]
        there = tl.load(TABLE + at, mask=mask, other=0) != 0
        return mask & there, row // size[0], column // size[1]


@triton.jit
def _dense(
    V, COLOUR, ZS, YS, XS, OUT, samples, rows, columns, size_z, size_y, size_x, v_s, z_s, y_s, x_s, o_s,
    TURNED: tl.constexpr, BLOCKS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    across, down = tl.cdiv(columns, BC), tl.cdiv(rows, BR)
    column = pid % across * BC + tl.arange(0, BC)
    row = pid // across % down * BR + tl.arange(0, BR)
    s = pid // across // down
    other, last = 0, rows
    if BLOCKS:
        s, other = s // samples, s % samples
        last = tl.where(s == other, rows, 0)  # between samples, no row has an entry
    colour = tl.load(COLOUR + column, mask=column < columns, other=0)
    # tiles lie as memory does, their last axis the fast one
    R: tl.constexpr = 0 if TURNED else 1
    row, column, colour = (
        tl.expand_dims(row, R),
        tl.expand_dims(column, 1 - R),
        tl.expand_dims(colour, 1 - R),
    )
    if WIDE:
        colour = colour.to(tl.int64)
    inside = (row < rows) & (column < columns)
    seen, up_row, up_column = _seen(XS, row, column, size_x, x_s, inside & (row < last))
    seen, up_row, up_column = _seen(YS, up_row, up_column, size_y, y_s, seen)
    seen, _, _ = _seen(ZS, up_row, up_column, size_z, z_s, seen)
    v = tl.load(V + s * v_s[0] + colour * v_s[1] + row * v_s[2], mask=seen, other=0.0)
    at = s * o_s[0] + row * o_s[1] + other * o_s[2] + column * o_s[3]
    tl.store(OUT + at, v, mask=inside)


def dense(
    values: Tensor, colour: Tensor, supports: tuple[Tensor, ...], *, out: Tensor | None = None
) -> Tensor:
    """The dense Jacobian (S, rows, columns) of compressed ``values``.

    values: (S, colours, rows), any strides; colour: (columns,), int32, contiguous: which seed holds a column; supports:
    one table (rows, columns) for each windowed axis, one to three, slow axis first, uint8: whether there is an entry.
    Free axes are slower than windowed ones: ``row = (row_free * rows_y + row_y) * rows_x + row_x``, columns alike.

    ``out``: (S, rows, columns), or (S, rows, S, columns) with zeros between different samples, of any strides; it is
    written along the axis that is contiguous. Where rows were compressed (reverse mode), give the transposes of ``out``
    and of the supports. Returns ``out``. Takes every dtype. Raises Unfit where the device cannot run it. Reads values
    once for each entry (neighbouring rows share cache lines) and a byte of each table for each element, from the cache;
    writes out once.
    """
    S, _, rows = values.shape
    columns = colour.numel()
    if not 1 <= len(supports) <= 3:
        raise ValueError(f"one to three windowed axes, not {len(supports)}")
    if colour.dtype != torch.int32 or any(t.dtype != torch.uint8 for t in supports):
        raise ValueError("colour must be int32, and supports uint8")
    windowed = [prod(t.shape[a] for t in supports) for a in range(2)]
    if any(n % max(w, 1) for n, w in zip((rows, columns), windowed, strict=True)):
        raise ValueError(f"{rows} x {columns} entries are no multiple of supports of {windowed}")
    if out is None:
        out = torch.empty(S, rows, columns, dtype=values.dtype, device=values.device)
    if out.numel() == 0:
        return out
    blocks = out.dim() == 4
    target = out if blocks else out.unsqueeze(2)
    turned = target.stride(3) != 1 and target.stride(1) == 1
    tile = (FAST, SLOW) if turned else (SLOW, FAST)
    BR, BC = (min(b, power_of_two(n)) for b, n in zip(tile, (rows, columns), strict=True))
    grid = (S * (S if blocks else 1) * triton.cdiv(rows, BR) * triton.cdiv(columns, BC),)
    tables = (*[None] * (3 - len(supports)), *supports)
    sizes = [(1, 1) if t is None else tuple(t.shape) for t in tables]
    strides = [(0, 0) if t is None else t.stride() for t in tables]
    launch(
        _dense, grid, target,
        values, colour, *tables, target, S, rows, columns, *sizes, values.stride(), *strides, target.stride(),
        turned, blocks, BR, BC, wide(values, target), num_warps=4,
    )  # fmt: skip
    return out
