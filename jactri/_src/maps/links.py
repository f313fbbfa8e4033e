"""Which entry of a value each entry of a result is, of maps that move entries; and what tells indices apart."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..base.csr import Csr, digest


def moved(push: Callable[[Tensor], Tensor], shape: tuple[int, ...], device: torch.device) -> Csr:
    """Which entry of a value of ``shape`` each entry of the result is: of a push that adds none, each one or zero."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        n = prod(shape)
        found = push(torch.arange(1, n + 1, device=device).view(1, *shape))
        return Csr.picked(found.reshape(-1).cpu().numpy() - 1, n)


def digest_of(*tensors: Tensor) -> bytes:
    """Alike for tensors of the same contents."""
    return digest(*[t.detach().cpu().numpy() for t in tensors])
