"""Which entries of attention's weights a mask leaves: the others are zero, whatever the scores are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..base.tracing import aside, tracing
from .cut import Cut


class Unmasked:
    """The entries (rows, columns) that any of a batch of matrices may have other than zero, or None: all of them.

    ``make`` gives those of all, or (matrices, rows, columns). It is called when they are asked for: the mask may have
    to be read. ``fixed``: they follow from sizes, and hold in a trace, too.
    """

    __slots__ = ("_digest", "_each", "_found", "_make", "fixed")

    def __init__(self, make: Callable[[], Tensor | None], fixed: bool = False):
        self._make: Callable[[], Tensor | None] | None = make
        self.fixed = fixed
        self._each: Tensor | None = None
        self._found: Tensor | None = None
        self._digest: bytes | None = None

    def __call__(self) -> Tensor | None:
        if not self.fixed and tracing():  # it may be another one
            return None
        if self._make is not None:
            with aside(), torch.no_grad():
                each = self._make()
                found = each if each is None or each.dim() == 2 else each.any(0)
                self._found = None if found is None or bool(found.all()) else found
                if each is not None and each.dim() == 3 and not bool((each == each[:1]).all()):
                    self._each = each
            self._make = None
        return self._found

    @property
    def alike(self) -> bool:
        """Whether all matrices have the same entries."""
        self()
        return self._each is None

    def of(self, cut: Cut, size: int) -> Unmasked:
        """Of the matrices in a range of an axis of ``size``, the first of those that they are numbered by."""

        def make() -> Tensor | None:
            found = self()
            each = self._each
            if each is None or len(each) % size:
                return found
            inner = len(each) // size
            return each.narrow(0, cut.start * inner, cut.length * inner)

        return Unmasked(make, self.fixed)

    @property
    def digest(self) -> bytes:
        """Alike for the same entries."""
        if self._digest is None:
            found = self()
            with aside():
                data = b"" if found is None else found.cpu().contiguous().numpy().tobytes()
            self._digest = hashlib.blake2b(data, digest_size=16).digest()
        return self._digest


def of_matrices(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A boolean mask that broadcasts against ``shape`` (..., rows, columns), for `Unmasked`."""
    if all(n == 1 for n in mask.shape[:-2]):
        mask = mask.reshape((*[1] * (2 - mask.dim()), *mask.shape)[-2:])
        return mask.expand(shape[-2:])
    return mask.expand(shape).flatten(0, -3)


def of_attention(
    mask: Tensor | None, causal: bool, shape: tuple[int, ...], groups: int, device
) -> Tensor:
    """Those of ``scaled_dot_product_attention``: where it adds no -inf.

    Of scores of ``shape`` (samples, heads, queries, keys); heads that share keys are rows of one matrix.
    """
    *_, rows, columns = shape
    found = torch.ones(rows, columns, dtype=torch.bool, device=device)
    if causal:
        found = found.tril()
    if mask is not None:
        found = found & of_matrices(mask if mask.dtype == torch.bool else mask != -torch.inf, shape)
    if found.dim() == 2:
        return found.repeat(shape[1] // groups, 1)
    return found.reshape(shape[0] * groups, -1, columns)
