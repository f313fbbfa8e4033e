"""A whole attention as one map: its blocks are those of its ends alone.

Its parts, each a map of its own (see `rules.attention`), have blocks of the size of the probabilities, but keep queries
or keys apart.
"""

from __future__ import annotations

from math import prod

from torch import Tensor

from .attention import Attention, backward, forward
from .linear_map import LinearMap
from .maps import Once


class Attend(LinearMap):
    """An attention, from those of its q, k and v that are ``wanted``, sample by sample one after another.

    Of values (B, entries) to (B, H, T, e).
    """

    __slots__ = ("_forward", "of", "wanted")
    name, structure = "attention", "function"

    def __init__(self, of: Attention, wanted: tuple[bool, bool, bool]):
        self.of, self.wanted = of, wanted
        self._forward = Once(lambda: forward(of)[:2])

    @property
    def key(self):
        return Attend, self.of.sizes, self.wanted, self.of.causal

    @property
    def lengths(self) -> list[int]:
        """Entries of a sample's q, k and v, as far as they are wanted."""
        _, H, G, T, S, d, e = self.of.sizes
        whole = H * T * d, G * S * d, G * S * e
        return [n * w for n, w in zip(whole, self.wanted, strict=True)]

    @property
    def entries(self):
        """Every chunk of seeds forms the probabilities again: what could be read in that time, about."""
        B, H, _, T, S, d, _ = self.of.sizes
        return B * H * T * S * (2 + d // 16)

    def kept(self, in_shape, out_shape):
        return ((0, 0),)

    def work(self, in_shape, out_shape, reverse):
        (B, H, _, T, S, d, e), (of_q, of_k, of_v) = self.of.sizes, self.wanted
        products = d * (of_q + of_k) + e * ((of_q or of_k) + of_v)
        return 2.0 * B * H * T * S * products / max(1, prod(in_shape if reverse else out_shape))

    def narrow(self, source, target, in_shape, out_shape):
        return Attend(self.of.of(source), self.wanted) if source.axis == 0 else None

    def push(self, t, own):
        return forward(self.of, *self._apart(t))[2], True

    def pull(self, c, own):
        out = c.new_empty(*c.shape[:2], sum(self.lengths))
        o, sums = self._forward()
        dq, dk, dv = self._apart(out)
        backward(self.of, o, sums, c, (dq, dk, dv))
        return out, True

    def _apart(self, t: Tensor) -> list[Tensor | None]:
        """A block (K, B, entries) as those of q, k and v: views."""
        ends = (self.of.q, self.of.k, self.of.v)
        parts = zip(t.split(self.lengths, -1), ends, self.wanted, strict=True)
        return [p.unflatten(-1, x.shape[1:]) if w else None for p, x, w in parts]
