"""Selection: what an op's own backward sets to zero is zero, whatever stands behind it."""

from __future__ import annotations

import numpy
from torch import Tensor

from ..base.csr import Csr
from .entrywise import aligned, selected
from .linear_map import Diagonal
from .links import digest_of


class Mask(Diagonal):
    """A scaling whose op selects in its own backward (relu, where, a write over entries): 0 where ``keep`` is 0.

    Zero times infinity is NaN, and a gradient that autograd selects away is 0 whatever it was: so cotangents are
    selected. Tangents are multiplied: autograd's gradient of a selection behind a pole is that NaN, and a tangent that
    is finite is the same either way. ``keep`` is 1 where gradients pass and 0 elsewhere; None where the derivative is
    that itself. ``written``: whether it is indices that say where (a write over entries), and not values.
    """

    __slots__ = ("_keep", "_kept", "written")

    def __init__(self, derivative, fresh=False, activation=None, keep=None, written=False):
        super().__init__(derivative, fresh, activation)
        self._keep, self._kept, self.key = keep, None, (Mask, keep is None)
        self.written = written

    @property
    def unit(self) -> bool:
        """Whether the derivative is 0 or 1 everywhere."""
        return self._keep is None

    @property
    def keep(self) -> Tensor:
        if self._keep is None:
            return self.d
        if self._kept is None:
            self._kept = self._keep()
        return self._kept

    def _aligned(self, c: Tensor) -> Tensor:
        """`keep` in the memory format of a block."""
        keep = self.keep
        if keep.dim() > 2:
            keep = aligned(keep, c)
            if self._keep is None:
                self._value = keep
            else:
                self._kept = keep
        return keep

    def links(self, in_shape, out_shape):
        if not self.written:
            return None
        kept = (self.keep != 0).expand(out_shape).reshape(-1).cpu().numpy()
        return Csr.picked(numpy.where(kept, numpy.arange(len(kept)), -1), len(kept))

    @property
    def digest(self):
        return digest_of(self.keep != 0) if self.written else None

    def forget(self):
        super().forget()
        self._kept = None

    def narrow(self, source, target, in_shape, out_shape):
        keep = None if self._keep is None else lambda: target.of(self.keep, len(out_shape))
        return Mask(target.of(self.d, len(out_shape)), keep=keep, written=self.written)

    def factors(self, reverse):
        if not reverse:
            return super().factors(reverse)
        select = selected, self.keep
        return (select,) if self._keep is None else (*super().factors(reverse), select)

    def pull(self, c, own):
        if self._keep is not None:
            c, own = self.push(c, own)
        return selected(c, self._aligned(c), own), True
