"""Ops that take or give complex numbers, inside of a real function: what of the other rules holds for them, and more.

They emit maps between complex values, of which `read.complexes` makes maps between pairs. Of an elementwise op the node
tells the derivatives. It is linear in the parts of a cotangent, and gives ``g`` with ``dL = Re(conj(g) dz)``.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log2, prod

import torch
from torch import Tensor

from ..maps.complexes import Part
from ..maps.functional import Functional
from ..maps.linear_map import keep_all_but
from . import REGISTRY, Record, inplace, node_names, normal_axis

AS_THEY_ARE = """
    Add.0-1 Sub.0-1 Rsub.0-1 Neg Mul.0-1 Div Where MaskedFill.0-1 Clone Alias ToCopy Fill.0-3 Zero
    Sum.0-1 Mean.0-1 Cumsum Mm Bmm Addmm Baddbmm Addbmm Mv Addmv Addr Dot
    View UnsafeView ReshapeAlias Squeeze.0-5 Unsqueeze.0-1 Permute T.0-1 Transpose.0-1 Expand Repeat
    Select Slice Split UnsafeSplit SplitWithSizes UnsafeSplitWithSizes Unbind Cat Stack ConstantPadNd
    Flip Roll Rot90 Tril Triu Diagonal DiagEmbed Unfold
    SelectBackward SliceBackward DiagonalBackward
    Index IndexSelect Gather Take MaskedSelect IndexPut IndexPutImpl IndexAdd ScatterAdd
    torch::autograd::CopySlices torch::autograd::CopyBackwards
"""
"""Whose rules hold for complex numbers: they select, add, multiply, and ask no node for a derivative."""

HOLOMORPHIC = """
    Acos Acosh Addcdiv Addcmul Asin Asinh Atan Atanh Cos Cosh Exp Exp2 Expm1 Log Log10 Log1P Log2 Pow.0-2 Reciprocal
    Rsqrt Sigmoid Sin Sinh Sqrt Tan Tanh
"""
"""Elementwise ops that have one derivative, a complex number."""

OTHERS = "Abs Angle Polar Sgn"
"""Elementwise ops that have two."""


# -- elementwise ------------------------------------------------------------------------------------


def _elementwise(holomorphic: bool) -> Callable:
    def read(g):
        g.check_memory()
        call, m, shape = g.call, g.meta[0], g.shape

        def pulled(edge: int, unit: complex) -> Tensor:
            ones = torch.full((), unit, dtype=m.dtype, device=m.device).expand(shape)
            out = call(ones)
            return out[edge] if isinstance(out, tuple) else out

        def one(edge: int) -> Tensor:
            return _in(m, pulled(edge, 1).conj())

        def of_real(edge: int) -> Tensor:
            parts = [pulled(edge, unit) for unit in (1, 1j)]
            return torch.complex(*(p.real if p.is_complex() else p for p in parts))

        def two(edge: int, sign: int) -> Tensor:
            """Of the tangent the conjugated factor (1), or that of its conjugate (-1)."""
            return (pulled(edge, 1) - sign * 1j * pulled(edge, 1j)) / 2

        terms = []
        for edge, s in enumerate(g.src):
            if s is None:
                continue
            if not g.values[s].dtype.is_complex:
                terms.append(g.diagonal(g.match(s), lambda e=edge: of_real(e)))
            elif not m.dtype.is_complex:
                terms.append(g.cast(g.diagonal(g.expand(s, shape), lambda e=edge: one(e))))
            elif holomorphic:
                terms.append(g.diagonal(g.match(s), lambda e=edge: one(e)))
            else:
                s = g.match(s)
                terms.append(g.diagonal(s, lambda e=edge: two(e, 1).conj().resolve_conj()))
                terms.append(g.diagonal(_conjugate(g, s), lambda e=edge: two(e, -1)))
        return g.plus(terms)

    return read


def _in(m, d: Tensor) -> Tensor:
    """A derivative in memory of its own, in the dtype of a value's complex numbers."""
    d = d.resolve_conj()
    return d.to(m.dtype) if m.dtype.is_complex else d


def _conjugate(g, s: int) -> int:
    return g.single(s, Part("conj"))


def conj(g):
    return _conjugate(g, g.src[0])


def vdot(g):
    """``sum conj(self) * other``."""
    a, b = g.src
    terms = []
    if a is not None:
        terms.append(g.sum(g.diagonal(_conjugate(g, a), g.tensor("other")), (0,)))
    if b is not None:
        terms.append(g.sum(g.diagonal(b, g.tensor("self").conj().resolve_conj()), (0,)))
    return g.plus(terms)


def as_strided(g):
    """A view by strides that is one of complex numbers, too."""
    (s,) = g.src
    return inplace.as_strided(g) if g.values[s].dtype == g.dtype else None


# -- parts ------------------------------------------------------------------------------------------


def same(g):
    """A pair as a complex number, or the reverse."""
    return g.emit([(g.src[0], Part("same"))], g.shape)


def of_parts(g):
    """``real + i imag``."""
    factors = (1, 1j)
    terms = [g.scale(g.match(s), f) for s, f in zip(g.src, factors, strict=True) if s is not None]
    return g.plus(terms)


# -- Fourier transforms: linear maps that are the same everywhere -------------------------------------


def fourier(g):
    """Between complex numbers, from real to complex ones, or back: adjoints are the transforms the other way."""
    (s,), aten = g.src, torch.ops.aten
    before, shape = g.values[s].shape, g.shape
    dims = [normal_axis(d, len(shape)) + 1 for d in g.saved("dim")]
    if not dims:
        return None
    mode, last, kind = g.saved("normalization"), dims[-1] - 1, g.name
    size = shape[last]
    if kind == "FftC2CBackward0":
        ahead = g.saved("forward")

        def push(t):
            return aten._fft_c2c(t, dims, mode, ahead)

        def pull(c):
            return aten._fft_c2c(c, dims, mode, not ahead)

        detail = ahead
    elif kind == "FftC2RBackward0":

        def push(t):
            return aten._fft_c2r(t, dims, mode, size)

        def pull(c):
            return _weighted(aten._fft_r2c(c, dims, mode, True), last, size, 2.0)

        detail = size
    else:
        size, detail = before[last], g.saved("onesided")

        def push(t):
            return aten._fft_r2c(t, dims, mode, detail)

        def pull(c):
            if not detail:
                return aten._fft_c2c(c, dims, mode, False).real
            return aten._fft_c2r(_weighted(c, last, size, 0.5), dims, mode, size)

    work = 2.5 * log2(max(2, prod(max(before[d - 1], shape[d - 1]) for d in dims)))
    edge = Functional(
        "fft", push, pull, keep_all_but([d - 1 for d in dims], len(shape)), (work, work),
        anywhere=True, detail=(kind, *dims, mode, detail),
    )  # fmt: skip
    return g.emit([(s, edge)], shape)


def _weighted(t: Tensor, axis: int, size: int, weight: float) -> Tensor:
    """Half a spectrum of ``size`` real numbers, with a weight on the entries that stand for two."""
    n = t.shape[axis + 1]
    k = torch.arange(n, device=t.device)
    w = torch.where((k > 0) & (k <= size - n), weight, 1.0).to(t.dtype.to_real())
    return t * w.view(-1, *[1] * (t.dim() - axis - 2))


# -- the table --------------------------------------------------------------------------------------


TABLE = {
    AS_THEY_ARE: None,
    HOLOMORPHIC: _elementwise(True),
    OTHERS: _elementwise(False),
    "Conj ConjPhysical.0-1": conj,
    "Vdot": vdot,
    "AsStrided": as_strided,
    "ViewAsReal ViewAsComplex": same,
    "Complex": of_parts,
    "FftC2C FftC2R FftR2C": fourier,
}
"""What reads them; None: the op's own rule."""


def register() -> None:
    """Note in the registry, which has all other rules, what is known of ops on complex numbers."""
    for names, read in TABLE.items():
        for name in (full for n in names.split() for full in node_names(n)):
            record = REGISTRY.setdefault(name, Record())
            record.complex = read or record.read
