"""Which entries of attention's weights a mask leaves: the others are zero, whatever the scores are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..base.tracing import tracing


class Unmasked:
    """The entries (rows, columns) that any of a batch of matrices may have other than zero, or None: all of them.

    Found when it is asked for: the mask may have to be read.
    """

    __slots__ = ("_digest", "_found", "_make")

    def __init__(self, make: Callable[[], Tensor | None]):
        self._make: Callable[[], Tensor | None] | None = make
        self._found: Tensor | None = None
        self._digest: bytes | None = None

    def __call__(self) -> Tensor | None:
        if tracing():  # it may be another one
            return None
        if self._make is not None:
            with torch.no_grad():
                found = self._make()
                self._found = None if found is None or bool(found.all()) else found
            self._make = None
        return self._found

    @property
    def digest(self) -> bytes:
        """Alike for the same entries."""
        if self._digest is None:
            found = self()
            data = b"" if found is None else found.cpu().contiguous().numpy().tobytes()
            self._digest = hashlib.blake2b(data, digest_size=16).digest()
        return self._digest


def last_two(mask: Tensor, rows: int, columns: int) -> Tensor:
    """The entries of the last two axes that a boolean mask, which broadcasts against the matrices, has anywhere."""
    mask = mask.reshape(*[1] * (2 - mask.dim()), *mask.shape)
    return (
        mask.flatten(0, -3).any(0).expand(rows, columns)
        if mask.dim() > 2
        else mask.expand(rows, columns)
    )


def of_attention(
    mask: Tensor | None, causal: bool, rows: int, columns: int, device
) -> Tensor | None:
    """Those of ``scaled_dot_product_attention``: where it adds no -inf."""
    found = torch.ones(rows, columns, dtype=torch.bool, device=device)
    if causal:
        found = found.tril()
    if mask is not None:
        kept = mask if mask.dtype == torch.bool else mask != -torch.inf
        found = found & last_two(kept, rows, columns)
    return found
