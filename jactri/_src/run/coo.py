"""Sparse tensors of coalesced indices, which can be differentiated whatever their axes."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Coo(torch.autograd.Function):
    """``torch.sparse_coo_tensor`` of coalesced indices; torch 2.13 cannot differentiate its own from eight axes on."""

    @staticmethod
    def forward(ctx, values, index, shape):
        ctx.save_for_backward(index)
        return torch.sparse_coo_tensor(
            index, values, shape, device=values.device, is_coalesced=True, check_invariants=False
        )

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        if g.layout is torch.strided:
            return g[tuple(index)], None, None
        g = g.coalesce()
        if torch.equal(g.indices(), index):
            return g.values(), None, None
        strides = torch.tensor([prod(g.shape[a + 1 :]) for a in range(g.dim())], device=g.device)
        given, wanted = strides @ g.indices(), strides @ index
        at = torch.searchsorted(given, wanted).clamp(max=max(len(given) - 1, 0))
        found = given[at] == wanted if len(given) else torch.zeros_like(wanted, dtype=torch.bool)
        values = g.values()[at] if len(given) else g.values().new_zeros(len(wanted))
        return torch.where(found, values, 0.0), None, None


def unravel(flat: Tensor, shape) -> Tensor:
    """The index on every axis: ``(axes, entries)``."""
    if len(shape) == 1:
        return flat.unsqueeze(0)
    found = flat.new_empty(len(shape), len(flat))
    for a in reversed(range(len(shape))):
        n = max(shape[a], 1)  # an empty axis has no entries
        found[a] = flat % n
        flat = flat // n
    return found
