"""Tensors that are the same in every call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from math import comb, prod

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from .backends import capturing
from .tracing import making, own, tracing

KEPT = 1 << 28
"""Bytes of `fixed` tensors that are kept; of what is larger, nothing. Most are places of entries of sparse Jacobians: a
loop over one pattern has to find them again."""

_fixed: dict[Hashable, tuple[Tensor, ...]] = {}
_ONES: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def one(like: Tensor) -> Tensor:
    """A cached 0-d tensor holding 1, of the dtype and device of ``like``."""
    key = (like.dtype, like.device)
    traced = _len_torch_dispatch_stack() and tracing()
    found = None if traced else _ONES.get(key)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = torch.ones((), dtype=like.dtype, device=like.device)
        if not traced:
            _ONES[key] = found
    return found


def arbitrary(shape, like, step: float = 2.399963) -> Tensor:
    """Numbers that have no structure, the same each time; others for another ``step``."""
    row = torch.arange(1, prod(shape) + 1, dtype=torch.float64, device=like.device)
    return row.mul(step).sin().to(like.dtype).reshape(shape)


def firm(shape, like) -> Tensor:
    """`arbitrary` numbers of which none is small: what one of them weighs shows."""
    t = arbitrary(shape, like)
    return t + t.sign() / 2


def halves(n: int, device) -> Tensor:
    """Masks ``(K, n)`` over ``n`` entries such that every two are told apart by one of them, both ways round.

    Each entry is in half of the masks, and no two in the same: ``K choose K/2`` entries, the most that ``K`` masks can
    tell apart (Sperner 1928). ``K`` is about ``log2(n)``.
    """

    def make() -> tuple[Tensor]:
        k = halvings(n)
        # the choices in lexicographic order: how many places are left to fill, and how many choices to skip
        left, skip = torch.full((n,), k // 2), torch.arange(n)
        masks = []
        for rest in reversed(range(k)):
            first = torch.tensor([comb(rest, c - 1) if c else 0 for c in range(k // 2 + 1)])[left]
            masks.append(skip < first)
            skip = skip - first * ~masks[-1]
            left = left - masks[-1].long()
        return (torch.stack(masks).to(device),)

    if n < 2:
        return torch.empty(0, n, dtype=torch.bool, device=device)
    return fixed(("halves", n, str(device)), make)[0]


def halvings(n: int) -> int:
    """How many masks `halves` takes."""
    return 0 if n < 2 else next(k for k in itertools.count(1) if comb(k, k // 2) >= n)


def fixed(key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Tensors that ``key`` determines: those of the last time, or made now."""
    if own():
        with making():
            return fixed(key, make)
    if tracing():
        return make()
    found = _fixed.pop(key, None)
    if found is not None:
        _fixed[key] = found  # the last used is the last
        return found
    with torch.inference_mode(False), torch.no_grad():
        found = make()
    if found and capturing(found[0].device):
        return found  # there are no values before the first replay
    if _bytes(found) <= KEPT:
        _fixed[key] = found
        while sum(map(_bytes, _fixed.values())) > KEPT:
            del _fixed[next(iter(_fixed))]
    return found


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def constants() -> list[Tensor]:
    """All that are kept."""
    return [*_ONES.values(), *(t for group in _fixed.values() for t in group)]
