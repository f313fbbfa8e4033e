"""Complex ends of a Jacobian as pairs of real numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def flat(t: Tensor, rows: int) -> Tensor:
    """``(rows, entries)``: sums go over the real and the imaginary part of a complex entry, as two."""
    t = t.reshape(rows, t.numel() // max(rows, 1))
    return torch.view_as_real(t.resolve_conj()).flatten(1) if t.is_complex() else t


def check_real(name: str, t: Tensor, of: str, like: Tensor) -> None:
    """Raise for a complex operand where the Jacobian has a real end."""
    if t.is_complex() and not like.is_complex():
        raise RuntimeError(f"{name} is complex ({t.dtype}), but {of} is {like.dtype}")
