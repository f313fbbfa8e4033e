"""Blocks scaled and added up in one pass: the scaling of one block, and the product rule of a multiplication.

    out[k, ...] = t_1[k, ...] * d_1[...] + t_2[k, ...] * d_2[...]

Each d is a derivative of `activations` at saved values, or ready, and broadcasts in any way; so does each t along the
seeds. Torch would need three passes over blocks for two terms, and one over the values for each derivative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import launch
from .linear import scaled
from .support import Factor, factor, wide

AXES = 4
"""Axes that the kernel tells apart, after those have been merged that lie in a row in every operand."""

_TILE = 1024


@triton.jit
def _scaled_sum(
    A, ZA, B, ZB, OUT, total, n1, n2, n3, a_s, za_s, b_s, zb_s, o_s,
    DA: tl.constexpr, PA: tl.constexpr, DB: tl.constexpr, PB: tl.constexpr,
    TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0)
    if WIDE:
        at = at.to(tl.int64)
    at = at * TILE + tl.arange(0, TILE)
    mask = at < total
    i3, rest = at % n3, at // n3
    i2, rest = rest % n2, rest // n2
    i1, i0 = rest % n1, rest // n1
    a = tl.load(A + _offset(i0, i1, i2, i3, a_s), mask=mask, other=0.0)
    out = scaled(a, ZA, DA, PA, _offset(i0, i1, i2, i3, za_s), mask).to(tl.float32)
    if B is not None:
        b = tl.load(B + _offset(i0, i1, i2, i3, b_s), mask=mask, other=0.0)
        out += scaled(b, ZB, DB, PB, _offset(i0, i1, i2, i3, zb_s), mask).to(tl.float32)
    tl.store(OUT + _offset(i0, i1, i2, i3, o_s), out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _offset(i0, i1, i2, i3, s):
    return i0 * s[0] + i1 * s[1] + i2 * s[2] + i3 * s[3]


def merged(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[list[int], list[tuple[int, ...]]]:
    """The fewest axes that address operands of one shape: sizes, and the strides of each operand.

    Axes of size 1 vanish; neighbours become one where they lie in a row in every operand.
    """
    sizes: list[int] = []
    steps: list[list[int]] = []  # an axis: its stride in each operand
    for n, *s in zip(shape, *strides, strict=True):
        if n == 1:
            continue
        if sizes and all(a == b * n for a, b in zip(steps[-1], s, strict=True)):
            sizes[-1] *= n
            steps[-1] = s
        else:
            sizes.append(n)
            steps.append(s)
    return sizes, [tuple(axis[j] for axis in steps) for j in range(len(strides))]


def scaled_sum(
    terms: Sequence[tuple[Tensor, Factor | None]],
    shape: Sequence[int],
    *,
    out: Tensor | None = None,
) -> Tensor | None:
    """One or two blocks, each times its factor, added up.

    terms: (block (K or 1, *value), factor with values of the value's shape or None), any strides, one dtype. shape:
    (K, *value). Returns ``out`` (a new tensor unless given, any strides), or None where the operands need more than
    `AXES` axes. Raises Unfit where the device cannot run it. Reads each block once, writes out once.
    """
    first = terms[0][0]
    if out is None:
        out = torch.empty(tuple(shape), dtype=first.dtype, device=first.device)
    if out.numel() == 0:
        return out
    operands: list[Tensor | None] = []
    strides = [out.stride()]
    parts = []
    for t, f in terms:
        values, _, d, constants = factor(f)
        operands += [t, values]
        strides.append(t.expand(tuple(shape)).stride())
        strides.append((0,) * len(shape) if values is None else (0, *values.stride()))
        parts.append((d, constants))
    sizes, steps = merged(shape, strides)
    if len(sizes) > AXES:
        return None
    pad = AXES - len(sizes)
    _, n1, n2, n3 = (1,) * pad + tuple(sizes)
    o, *steps = [(0,) * pad + s for s in steps]
    if len(terms) == 1:
        operands += [None, None]
        steps += [(0,) * AXES] * 2
        parts.append((None, ()))
    far = wide(out, *operands) or out.numel() >= 1 << 31
    (a, za, b, zb), (sa, sza, sb, szb) = operands, steps
    (da, pa), (db, pb) = parts
    launch(
        _scaled_sum, (triton.cdiv(out.numel(), _TILE),), out,
        a, za, b, zb, out, out.numel(), n1, n2, n3, sa, sza, sb, szb, o, da, pa, db, pb, _TILE, far,
        num_warps=4,
    )  # fmt: skip
    return out
