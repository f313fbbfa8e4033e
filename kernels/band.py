"""A compressed Jacobian written out densely, zeros included, in one pass.

Columns of one colour share no row, so one seed carries them all. With rows ``(free, y, x)`` and columns ``(free, y,
x)``, of which y and x are windowed,

    out[s, row, column] = c[s, colour[column], row]   where support_y[row_y, column_y] and support_x[row_x, column_x],

and zero elsewhere. Every element is written once, in the order of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .support import fitting, on_device, power_of_two, wide

FAST, SLOW = 128, 16
"""The tile, along the axis of ``out`` that is contiguous and along the other: rows of one colour share cache lines."""


@triton.jit
def _dense(
    V, COLOUR, YS, XS, OUT, rows, columns, size_y, size_x, v_s, y_s, x_s, o_s,
    TURNED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    across, down = tl.cdiv(columns, BC), tl.cdiv(rows, BR)
    column = pid % across * BC + tl.arange(0, BC)
    row = pid // across % down * BR + tl.arange(0, BR)
    s = pid // across // down
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
    row_x, column_x = row % size_x[0], column % size_x[1]
    row_y, column_y = row // size_x[0] % size_y[0], column // size_x[1] % size_y[1]
    seen = tl.load(XS + row_x * x_s[0] + column_x * x_s[1], mask=inside, other=0) != 0
    seen = (
        inside
        & seen
        & (tl.load(YS + row_y * y_s[0] + column_y * y_s[1], mask=inside, other=0) != 0)
    )
    v = tl.load(V + s * v_s[0] + colour * v_s[1] + row * v_s[2], mask=seen, other=0.0)
    tl.store(OUT + s * o_s[0] + row * o_s[1] + column * o_s[2], v, mask=inside)


def dense(
    values: Tensor, colour: Tensor, supports: tuple[Tensor, ...], *, out: Tensor | None = None
) -> Tensor:
    """The dense Jacobian (S, rows, columns) of compressed ``values``.

    values: (S, colours, rows), any strides; colour: (columns,), int32, contiguous: which seed holds a column; supports:
    one table (rows, columns) for each windowed axis, one or two, slow axis first, uint8: whether there is an entry.
    Free axes are slower than windowed ones: ``row = (row_free * rows_y + row_y) * rows_x + row_x``, columns alike.

    ``out``: (S, rows, columns), of any strides; it is written along the axis that is contiguous. Where rows were
    compressed (reverse mode), give the transposes of ``out`` and of the supports. Returns ``out``. Takes every dtype.
    Raises Unfit where the device cannot run it. Reads values once for each entry (neighbouring rows share cache lines)
    and two bytes of the tables for each element, from the cache; writes out once.
    """
    S, _, rows = values.shape
    columns = colour.numel()
    if not 1 <= len(supports) <= 2:
        raise ValueError(f"one or two windowed axes, not {len(supports)}")
    if colour.dtype != torch.int32 or any(t.dtype != torch.uint8 for t in supports):
        raise ValueError("colour must be int32, and supports uint8")
    xs = supports[-1]
    ys = supports[0] if len(supports) == 2 else xs.new_ones(1, 1)
    windowed = [a * b for a, b in zip(ys.shape, xs.shape, strict=True)]
    if any(n % max(w, 1) for n, w in zip((rows, columns), windowed, strict=True)):
        raise ValueError(f"{rows} x {columns} entries are no multiple of supports of {windowed}")
    if out is None:
        out = torch.empty(S, rows, columns, dtype=values.dtype, device=values.device)
    if out.numel() == 0:
        return out
    turned = out.stride(2) != 1 and out.stride(1) == 1
    tile = (FAST, SLOW) if turned else (SLOW, FAST)
    BR, BC = (min(b, power_of_two(n)) for b, n in zip(tile, (rows, columns), strict=True))
    grid = (S * triton.cdiv(rows, BR) * triton.cdiv(columns, BC),)
    with on_device(values), fitting():
        _dense[grid](
            values, colour, ys, xs, out, rows, columns, tuple(ys.shape), tuple(xs.shape), values.stride(), ys.stride(),
            xs.stride(), out.stride(), turned, BR, BC, wide(values, out), num_warps=4,
        )  # fmt: skip
    return out
