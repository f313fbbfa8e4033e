"""Matrices made ready for the tensor cores, and the product of a tile of a block with them.

Tensor cores multiply tf32 or bf16 and add in float32. A float32 product of float32's own accuracy is a sum of such
products, of parts that add up to the operand (Henry, Tang, Heinecke 2019, arXiv:1904.06376):

- "tf32x3": two parts each (11 + 11 bits), three products; low * low is left out.
- "bf16x6": three parts each (8 + 8 + 8 bits), six products; those below 2^-22 are left out.

The parts of a block's tile are made in registers. Those of a matrix are the same for every tile, and tensor cores
of the Hopper kind read them from shared memory: `prepare` writes them once, so that a tile's parts are copied
there without passing through registers, with the contracted axis contiguous, as these cores want tf32, and padded to
aligned rows: once a call (see `support.Ready`). An infinite entry becomes NaN, for inf - inf is.

Tensor cores round their sums towards zero, which over a long contraction costs more than the parts win (Ootomo, Yokota
2022, arXiv:2203.03341): `multiply` adds the parts of one tile, small ones first, and the sums of tiles are added by the
ordinary units, rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import launch
from .support import HALF, Ready, address, wide

PARTS = {"ieee": 1, "tf32": 1, "half": 1, "tf32x3": 2, "bf16x6": 3}
"""Precisions of a product, and the parts that a matrix is split into."""

ALIGNED = 16
"""Entries that a row of a prepared matrix is padded to a multiple of: the widest loads are aligned in every dtype."""

_TILE = 1024


@dataclass(frozen=True)
class Operand:
    """A matrix (I, O) for a kernel: part p of entry (i, o) is at ``p * parts + i * rows + o * columns``.

    Rows from I to ``padded`` are there and zero.
    """

    values: Tensor
    parts: int
    rows: int
    columns: int
    padded: int

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.parts, self.rows, self.columns


@triton.jit
def _prepare(
    WS,
    OUT,
    SIZES,
    STRIDES,
    STARTS,
    PITCHES,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    at = tl.program_id(0)
    if WIDE:
        at = at.to(tl.int64)
    at = at * TILE + tl.arange(0, TILE)
    for l in tl.static_range(len(WS)):
        if tl.program_id(1) == l:
            i, o = at % PITCHES[l], at // PITCHES[l]
            inside = o < SIZES[l][1]
            w = tl.load(
                WS[l] + i * STRIDES[l][0] + o * STRIDES[l][1],
                mask=inside & (i < SIZES[l][0]),
                other=0.0,
            )
            to = OUT + STARTS[l] + at
            if PARTS == 1:
                tl.store(to, w, mask=inside)
            else:
                size = PITCHES[l] * SIZES[l][1]
                for p in tl.static_range(PARTS):
                    part = high(w, PARTS)
                    tl.store(to + p * size, part, mask=inside)
                    w -= part.to(tl.float32)


@triton.jit
def high(x, PARTS: tl.constexpr):
    """The part of float32 values that one operand of a tensor core holds: tf32 of two parts, bf16 of three."""
    if PARTS == 2:
        # rounded, not cut: low * low, which is left out, is then below 2^-24. What this does to a NaN's bits is
        # of no account: the low part is x - high, a NaN again
        bits = x.to(tl.uint32, bitcast=True) + 0x1000
        return (bits & 0xFFFFE000).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def _cut(x):
    """float32 values with the 8 leading bits of their significands, and zeros behind."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def three(t):
    """float32 values as a sum of three bf16 parts, 8 bits of the 24 each: exactly, above bfloat16's least, 2^-133.

    Cut, not rounded: one logical instruction, where a conversion takes the unit of the special functions, and nothing
    overflows. The parts are up to twice as large as rounded ones, and then have the sign of t, while those of a matrix,
    which `prepare` rounds, have either: what is left out stays below 2^-22, and has no bias. A NaN whose bits are cut
    to infinity leaves a NaN behind.
    """
    t0 = _cut(t)
    rest = t - t0
    t1 = _cut(rest)
    return t0.to(tl.bfloat16), t1.to(tl.bfloat16), (rest - t1).to(tl.bfloat16)


@triton.jit
def multiply(t, M, size, mask, acc, PRECISION: tl.constexpr, FORMED: tl.constexpr = False):
    """``acc + t @ m`` for a tile of a block and the tile at ``M`` of a prepared matrix, its parts ``size`` apart.

    FORMED: t is computed, not loaded. Then, and with some versions of Triton for tf32, ptxas waits after every
    instruction that adds to ``acc`` in a loop; it does not for a sum of the tile's own.
    """
    m = tl.load(M, mask=mask, other=0.0)
    if PRECISION == "bf16x6":
        m1 = tl.load(M + size, mask=mask, other=0.0)
        m2 = tl.load(M + 2 * size, mask=mask, other=0.0)
        return _summed(t, m, m1, m2, acc, PRECISION, FORMED)
    elif PRECISION == "tf32x3":
        m1 = tl.load(M + size, mask=mask, other=0.0)
        return _summed(t, m, m1, m1, acc, PRECISION, FORMED)
    else:
        return _summed(t, m, m, m, acc, PRECISION, FORMED)


@triton.jit
def product(t, m, acc, PRECISION: tl.constexpr, FORMED: tl.constexpr = False):
    """``acc + t @ m`` for tiles of two blocks, neither of them prepared. FORMED: as in `multiply`."""
    if PRECISION == "bf16x6":
        m0 = high(m, 3)
        rest = m - m0.to(tl.float32)
        m1 = high(rest, 3)
        return _summed(t, m0, m1, high(rest - m1.to(tl.float32), 3), acc, PRECISION, FORMED)
    elif PRECISION == "tf32x3":
        m0 = high(m, 2)
        return _summed(t, m0, m - m0, m0, acc, PRECISION, FORMED)
    else:
        return _summed(t, m, m, m, acc, PRECISION, FORMED)


@triton.jit
def cut(t, DTYPE: tl.constexpr, PRECISION: tl.constexpr, FORMED: tl.constexpr):
    """A tile of a block as the parts that are multiplied, by matrices of DTYPE where it is one part."""
    if PRECISION == "bf16x6":
        return three(t)
    elif PRECISION == "tf32x3":
        t0 = high(t, 2)
        return t0, t - t0
    elif PRECISION == "tf32" or FORMED:
        return ((-t).to(DTYPE),)
    else:
        return (t.to(DTYPE),)


@triton.jit
def times(parts, M, size, mask, acc, PRECISION: tl.constexpr):
    """`multiply` for a computed tile that was `cut` before: a product for each of several tiles of a matrix."""
    m = tl.load(M, mask=mask, other=0.0)
    if PRECISION == "bf16x6":
        m1 = tl.load(M + size, mask=mask, other=0.0)
        m2 = tl.load(M + 2 * size, mask=mask, other=0.0)
        return _added(parts, m, m1, m2, acc, PRECISION, True)
    elif PRECISION == "tf32x3":
        m1 = tl.load(M + size, mask=mask, other=0.0)
        return _added(parts, m, m1, m1, acc, PRECISION, True)
    else:
        return _added(parts, m, m, m, acc, PRECISION, True)


@triton.jit
def _summed(t, m, m1, m2, acc, PRECISION: tl.constexpr, FORMED: tl.constexpr):
    """``acc + t @ (m + m1 + m2)``, as many parts as the precision has."""
    return _added(cut(t, m.dtype, PRECISION, FORMED), m, m1, m2, acc, PRECISION, FORMED)


@triton.jit
def _added(t, m, m1, m2, acc, PRECISION: tl.constexpr, FORMED: tl.constexpr):
    """The same of parts of t."""
    if PRECISION == "bf16x6":
        s = tl.dot(t[2], m, input_precision="ieee")
        s = tl.dot(t[1], m1, s, input_precision="ieee")
        s = tl.dot(t[0], m2, s, input_precision="ieee")
        s = tl.dot(t[1], m, s, input_precision="ieee")
        s = tl.dot(t[0], m1, s, input_precision="ieee")
        return acc + tl.dot(t[0], m, s, input_precision="ieee")
    elif PRECISION == "tf32x3":
        s = tl.dot(t[1], m, input_precision="tf32")
        s = tl.dot(t[0], m1, s, input_precision="tf32")
        return acc + tl.dot(t[0], m, s, input_precision="tf32")
    elif PRECISION == "tf32" or FORMED:
        # subtracted, not added: Triton would make one running sum of it again
        how: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
        return acc - tl.dot(t[0], m, input_precision=how)
    else:
        return tl.dot(t[0], m, acc, input_precision="ieee")


def prepare(
    matrices: Sequence[Tensor], precision: str, ready: Ready | None = None
) -> list[Operand]:
    """The matrices (I, O) as `multiply` wants them for ``precision``: by one launch for all, or as they are.

    Writes ``PARTS[precision]`` times their size, but for those that are in ``ready``; the others are put there.
    """
    if PARTS[precision] == 1 and all(_as_it_is(m) for m in matrices):
        return [Operand(m, 0, *m.stride(), m.shape[0]) for m in matrices]
    if ready is None:
        return _prepared(matrices, precision)
    found = [ready.find(m, precision) for m in matrices]
    new = [m for m, operand in zip(matrices, found, strict=True) if operand is None]
    if new:
        made = _prepared(new, precision)
        ready.keep(
            list(zip(new, made, strict=True)), precision, made[0].values.untyped_storage().nbytes()
        )
        rest = iter(made)
        found = [next(rest) if operand is None else operand for operand in found]
    return found


def _prepared(matrices: Sequence[Tensor], precision: str) -> list[Operand]:
    parts = PARTS[precision]
    pitches = [triton.cdiv(m.shape[0], ALIGNED) * ALIGNED for m in matrices]
    sizes = [p * m.shape[1] for p, m in zip(pitches, matrices, strict=True)]
    starts = [parts * sum(sizes[:l]) for l in range(len(sizes))]
    first = matrices[0]
    dtype = torch.bfloat16 if precision == "bf16x6" else first.dtype
    out = torch.empty(parts * sum(sizes), dtype=dtype, device=first.device)
    launch(
        _prepare, (triton.cdiv(max(sizes), _TILE), len(matrices)), out,
        tuple(matrices), out, tuple(tuple(m.shape) for m in matrices),
        tuple(tuple(m.stride()) for m in matrices), tuple(starts), tuple(pitches),
        parts, _TILE, wide(out, *matrices), num_warps=4,
    )  # fmt: skip
    return [Operand(out[s:], n, 1, p, p) for s, n, p in zip(starts, sizes, pitches, strict=True)]


def _as_it_is(m: Tensor) -> bool:
    """Whether a kernel may read a matrix of one part where it lies."""
    rows, columns = m.stride()
    if address(m) % 16:
        return False
    if m.dtype in HALF and columns == 1:  # tensor cores take 16-bit operands in either order
        return rows % ALIGNED == 0
    return rows == 1 and columns % ALIGNED == 0
