"""Complex values inside of a function: read as they are, and then put as pairs of reals (see `maps.complexes`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ..maps.complexes import Complex, Part
from ..maps.contraction import Expand, MatMul, Sum
from ..maps.functional import Functional
from ..maps.linear_map import (
    Cast,
    Diagonal,
    Identity,
    LinearMap,
    Permute,
    Scale,
    View,
)
from ..maps.maps import Transpose
from ..maps.mask import Mask
from ..maps.selection import Gather, Place, Select, Slice, Take
from ..rules import MissingValue, record_of
from ..rules.elementwise import Zero
from ..rules.index import Pick, Put

if TYPE_CHECKING:
    from .graph import Reader, Value

_ALONG = Identity, Place, Select, Slice, Take, Zero
"""Maps that do to both parts what they do to numbers, and know axes by their number."""

_NUMBERS = Diagonal, Functional, Gather, MatMul, Pick, Put, Scale
"""Maps that take blocks of complex numbers."""


def real(dtype: torch.dtype) -> torch.dtype:
    """That of the parts of a complex number."""
    return dtype.to_real() if dtype.is_complex else dtype


def refuse(g: Reader, dtype: torch.dtype) -> NoReturn:
    g.refuse(f"a complex intermediate ({dtype}) from {g.name}")


def read(g: Reader) -> tuple[int | None, ...] | None:
    """The values of a node that takes or gives complex numbers; None of another."""
    dtypes = [g.dtype, *[g.values[s].dtype for s in g.src if s is not None]]
    found = next((d for d in dtypes if d.is_complex), None)
    if found is None:
        return None
    g.record, rule = None, record_of(g.name).complex
    try:
        ids = None if rule is None else rule(g)
    except MissingValue:
        ids = None
    if ids is None:
        refuse(g, found)
    return ids if ids.__class__ is tuple else (ids,)


def cast(g: Reader, source: int) -> int:
    """`Reader.cast` to or from complex numbers."""
    v, device = g.values[source], g.device
    part = real(g.dtype if g.dtype.is_complex else v.dtype)
    if v.dtype.is_complex:
        taken = g.append(g.name, v.shape, part, v.device, ((source, Part("real")),))
        return g.cast(taken)
    if (v.dtype, v.device) != (part, device):
        edge = Cast((v.dtype, v.device), (part, device))
        source = g.append(g.name, v.shape, part, device, ((source, edge),))
    return g.append(g.name, v.shape, g.dtype, device, ((source, Part("embed")),))


def in_pairs(g: Reader) -> list[tuple]:
    """All values that were read, as `Reader.append` takes them, with pairs of reals in the place of complex numbers."""
    found = []
    for v in g.values:
        shape = (*v.shape, 2) if v.dtype.is_complex else v.shape
        sources = tuple([(s, _on_pairs(g, edge, g.values[s], v)) for s, edge in v.sources])
        found.append((v.op, shape, real(v.dtype), v.device, sources))
    return found


def _on_pairs(g: Reader, edge: Any, source: Value, value: Value) -> LinearMap:
    """The map that an edge between two values is in pairs of reals."""
    before, after = source.dtype.is_complex, value.dtype.is_complex
    if not (before or after):
        return edge
    kind, n = edge.__class__, len(source.shape)
    if kind is Part:
        if edge.kind == "conj":
            dtype, device = real(value.dtype), value.device
            return Diagonal(lambda: torch.tensor([1, -1], dtype=dtype, device=device), along=n)
        if edge.kind == "same":
            return Identity()
        part = Select(n, 0, 2)
        return part if edge.kind == "real" else Transpose(part)
    if before and after:
        if kind in _ALONG or (kind is Transpose and edge.base.__class__ in _ALONG):
            return edge
        if kind is Scale and not isinstance(edge.factor, complex):
            return edge
        if kind is View:
            return View((*edge.in_shape, 2), (*edge.out_shape, 2))
        if kind is Permute:
            return Permute((*edge.dims, n))
        if kind in (Sum, Expand):
            return kind(edge.axes, (*edge.in_shape, 2))
        if kind is Cast:
            ends = edge.source, edge.target
            return Cast(*((real(dtype), device) for dtype, device in ends))
        if kind is Mask:
            keep = None if edge.unit else lambda: _of_both(edge.keep)
            return Mask(lambda: _of_both(edge.d), keep=keep)
    if not isinstance(edge, _NUMBERS) or kind is Mask:
        g.refuse(f"a complex intermediate ({source.dtype}, {value.dtype}) at {value.op}")
    return Complex(edge, before, after)


def _of_both(mask: Tensor) -> Tensor:
    """A mask of complex numbers, whose values are real, as one of pairs."""
    return (mask.real if mask.is_complex() else mask).unsqueeze(-1)
