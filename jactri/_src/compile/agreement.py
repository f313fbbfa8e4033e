"""How far two answers to one call are apart, and whether that is more than rounding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx
from torch._C import _DisableAutocast
from torch.utils._pytree import tree_leaves

from ..base.constants import arbitrary

_TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 1e-3,
    torch.complex128: 1e-8,
    torch.complex64: 1e-3,
}
"""Of the largest entry: what a graph may be off by, which sums in another order."""
_LOW = 5e-2
"""The same, of types of less precision."""
_CANCELS = 64
"""Roundings of the largest entry of all tensors together, by which one whose entries cancel may be off."""


def dtypes(graph: fx.GraphModule) -> set[torch.dtype]:
    """Those that the ops of a graph compute in."""
    made = [n.meta.get("val") for n in graph.graph.nodes if n.op == "call_function"]
    found = {t.dtype for t in tree_leaves(made) if isinstance(t, Tensor)}
    return {d for d in found if d.is_floating_point or d.is_complex}


def _allowed(t: Tensor, inside: Iterable[torch.dtype]) -> float:
    """What a result may be off by, which was computed in these dtypes, too."""
    if not (t.is_floating_point() or t.is_complex()):
        return 0.0
    return max(_TOLERANCE.get(d, _LOW) for d in (t.dtype, *inside))


def apart(
    got: Sequence[Tensor], want: Sequence[Tensor], inside: Iterable[torch.dtype] = ()
) -> str | None:
    """What of ``got`` differs from ``want`` by more than rounding, that of the dtypes ``inside``, too."""
    if len(got) != len(want):
        return f"{len(got)} tensors for {len(want)}"
    beside, largest = [], 0.0
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return f"tensor {k} is {tuple(a.shape)}, {a.dtype}, not {tuple(b.shape)}, {b.dtype}"
        away, size = _distance(a, b)
        if not away <= _allowed(b, inside) * size:
            beside.append((k, away, size, b.dtype))
        largest = max(largest, size)
    for k, away, size, dtype in beside:
        # what cancels, as the gradient of a key's bias in attention, is off by the rounding of its terms
        if not (dtype.is_floating_point and away <= _CANCELS * torch.finfo(dtype).eps * largest):
            off = away / size if size else float("inf")
            return f"tensor {k} is off by {off:.1e} of its largest entry"
    return None


def apart_in_gradients(
    got: Sequence[Tensor],
    want: Sequence[Tensor],
    ends: Sequence[Tensor],
    inside: Iterable[torch.dtype],
) -> str | None:
    """What of the gradients of ``got`` in ``ends`` differs from those of ``want`` by more than rounding."""
    both: list[list[Tensor]] = []
    for ys in (got, want):
        live = [y for y in ys if y.requires_grad]
        cotangents = [arbitrary(y.shape, y) for y in live]
        if len(live) != sum(y.requires_grad for y in want):
            return "other tensors have gradients"
        with _DisableAutocast():
            grads = torch.autograd.grad(
                live, ends, cotangents, retain_graph=True, allow_unused=True
            )
        both.append(
            [torch.zeros_like(x) if g is None else g for x, g in zip(ends, grads, strict=True)]
        )
    off = apart(both[0], both[1], inside)
    return None if off is None else f"of the gradients, {off}"


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors relative to the largest finite entry of ``b``."""
    away, size = _distance(a, b)
    return 0.0 if away == 0 else away / size if size else float("inf")


def _distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The largest difference of two tensors, and the largest finite entry of ``b``."""
    a, b = a.detach(), b.detach()
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf"), 1.0
    if a.numel() == 0:
        return 0.0, 0.0
    away = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0).max().item()
    return away, b.abs().masked_fill(~b.isfinite(), 0).max().item()
