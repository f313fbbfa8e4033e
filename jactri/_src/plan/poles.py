"""Where only reverse mode is autograd's: at a derivative that is not finite.

Autograd's rows go from the output to the input, and what an op selects away there is 0, whatever it was: ``relu(x)``
makes 0 of the infinity that ``sqrt`` of its zeros gives. Forward mode meets both the other way round, and 0 times
infinity is NaN; so does a product of partial Jacobians. Entries that are put among constants (a pad, a ``cat``, a write
into zeros) are such a selection, too: the gradient of the constants is left out, whatever it was. A given tangent meets
nothing else; seeds of several colours at once, and identity seeds that have been mixed, hold zeros of their own: with
them any derivative counts (``seeds``). Everything that is finite is the same in any order. So what may be infinite is
known from the graph (`suspects`), and looked at where another order than reverse is wanted (`met`).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..base import backends
from ..base.cache import Cache
from ..maps.attending import Attend
from ..maps.complexes import Complex
from ..maps.contraction import MatMul, Sum
from ..maps.convolution import Conv, ConvWeight
from ..maps.functional import Functional
from ..maps.linear_map import Cast, Diagonal, Identity, Permute, Scale, View
from ..maps.maps import Fixed, Sample, Transpose
from ..maps.mask import Mask
from ..maps.selection import Gather, Picked, Place, Scatter, Select, Slice, Take
from ..read.graph import Graph
from ..rules import record_of
from ..rules.elementwise import Zero
from ..rules.index import Pick, Put

Edge = tuple[int, int]
"""A value, and which of its edges."""

FINITE = (
    Attend, Cast, Conv, ConvWeight, Fixed, Functional, Gather, Identity, MatMul, Permute, Pick, Picked, Place, Sample,
    Scale, Scatter, Select, Slice, Sum, Take, Transpose, View, Zero,
)  # fmt: skip
"""Maps that hold weights, indices or values of the computation, none of which a derivative makes infinite."""

PLACING = Fixed, Functional, Place, Put, Scatter, Transpose
"""Maps that may leave places of their result to other operands or to constants."""

_known: Cache[tuple, tuple[Edge, ...]] = Cache()


def suspects(
    graph: Graph, bent: Collection[int] = (), masks: bool = False, seeds: bool = False
) -> tuple[Edge, ...]:
    """The edges behind a selection that may not be finite, remembered.

    ``bent``: values that have a curvature. ``masks``: only those that are behind a `Mask`. ``seeds``: also those behind
    none, for blocks of identity seeds.
    """
    key = graph.key, masks, seeds, *bent
    return _known.of(key, lambda: _suspects(graph, frozenset(bent), masks, seeds))


def _suspects(graph: Graph, bent: frozenset[int], masks: bool, seeds: bool) -> tuple[Edge, ...]:
    behind: set[int] = set()
    found: list[Edge] = []
    regular: list[Edge] = []
    for v, value in enumerate(graph.values):
        for e, (s, edge) in enumerate(value.sources):
            if v in bent or not _finite(value.op, edge):
                if s in behind or (seeds and not record_of(value.op).regular):
                    found.append((v, e))
                elif seeds:
                    regular.append((v, e))
            if s in behind or isinstance(edge, Mask) or (not masks and _places(edge)):
                behind.add(v)
    return tuple(found + regular) if found else ()


def _places(edge) -> bool:
    edge = edge.base if isinstance(edge, Complex) else edge
    if isinstance(edge, Conv) and edge.geometry.transposed:
        return True  # by strides longer than its kernel
    return isinstance(edge.base if isinstance(edge, Picked) else edge, PLACING)


def _finite(op: str, edge) -> bool:
    if isinstance(
        edge, Complex
    ):  # among complex numbers an op has poles that it has not among reals
        return isinstance(edge.base, FINITE)
    if isinstance(edge, Mask) and edge.unit:
        return True
    if isinstance(edge, Diagonal) and edge.along is not None:
        return True
    return isinstance(edge, FINITE) or record_of(op).bounded


def finite(t: Tensor) -> bool:
    """Whether a block is known to be finite; not inside of a CUDA graph's capture or a trace, where nothing is."""
    if backends.capturing(t.device):
        return False
    if not t.numel():
        return True
    # the ends tell, and take no memory of the block's size; both at once, for to look is to wait for a GPU
    low, high = (torch.view_as_real(t) if t.is_complex() else t).aminmax()
    return bool(low * 0 + high * 0 == 0)


def met(graph: Graph, edges: tuple[Edge, ...]) -> bool:
    """Whether one of these edges has a derivative that is not finite at this point."""
    if not edges:
        return False
    if backends.capturing(graph.values[edges[0][0]].device):
        return True  # nothing can be looked at
    if edges in graph.looked:  # a call may plan twice, and to look is to wait for a GPU
        return graph.looked[edges]
    flags = []
    for v, e in edges:
        _, edge = graph.values[v].sources[e]
        if isinstance(edge, Diagonal):
            d = edge.d
        else:
            like = graph.values[v]
            ones = torch.ones((1, *like.shape), dtype=like.dtype, device=like.device)
            d, _ = edge.pull(ones, False)
        flags.append(d.detach().isfinite().all())
    graph.looked[edges] = not bool(torch.stack(flags).all())
    return graph.looked[edges]
