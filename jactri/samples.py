"""Whether samples of a batch influence one another, decided by derivatives where the algebra cannot."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def halves(n: int, device) -> Iterator[Tensor]:
    """Masks over ``n`` samples such that every two samples are told apart by one of them, both ways round."""
    index = torch.arange(n, device=device)
    for bit in range(max(n - 1, 0).bit_length()):
        mask = (index >> bit) & 1 == 1
        yield mask
        yield ~mask


def probe_mixing(outputs, inputs) -> bool:
    """Whether some output of one sample has a derivative in the input of another.

    A random cotangent on half of the samples must leave exactly zero gradient on the other half. The halves are
    the bits of the sample's number, so any two samples are separated: ``2 log2(N)`` backward passes an output. A
    NaN counts as mixing. The caller's random state is not used.
    """
    n = outputs[0].shape[0]
    for y in outputs:
        if not y.requires_grad:
            continue
        gen = torch.Generator(device=y.device).manual_seed(0)
        noise = torch.rand(y.shape, generator=gen, device=y.device, dtype=torch.float32).add_(0.5)
        for mask in halves(n, y.device):
            weight = (noise * mask.view(-1, *([1] * (y.dim() - 1)))).to(y.dtype)
            grads = torch.autograd.grad(y, inputs, weight, retain_graph=True, allow_unused=True)
            for g in grads:
                if g is not None and bool((g[~mask.to(g.device)] != 0).any()):
                    return True
    return False
