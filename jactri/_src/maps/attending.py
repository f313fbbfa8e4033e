"""A whole attention as one map: its blocks are those of its ends alone.

Its parts, each a map of its own (see `rules.attention`), have blocks of the size of the probabilities, but keep queries
or keys apart. By `attention` in torch's ops, or by `kernels.attention`.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..base import backends
from ..device import chooser
from ..device.attending import AttentionKind, Product
from ..device.chooser import Way
from .attention import Attention, backward, forward
from .linear_map import Cut, LinearMap
from .maps import Once

Blocks = list[Tensor | None]


class Attend(LinearMap):
    """An attention, from those of its q, k and v that are ``wanted``, sample by sample one after another.

    Of values (B, entries) to (B, H, T, e).
    """

    __slots__ = ("_forward", "_found", "of", "wanted")
    name, structure = "attention", "function"

    def __init__(self, of: Attention, wanted: tuple[bool, bool, bool]):
        self.of, self.wanted = of, wanted
        self._forward = Once(lambda: forward(of)[:2])
        self._found: dict[str, object] = {}

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
        ends = in_shape if reverse else out_shape
        whole = self._kind(1, self.of.q.dtype, reverse)
        return whole.each / max(1, prod(ends)) * self.of.sizes[0] / whole.batch

    def narrow(self, source, target, in_shape, out_shape):
        return Attend(self.of.of(source), self.wanted) if source.axis == 0 else None

    def push(self, t, own):
        made = self._by_kernels(t, False)
        return (self._pushed(self.of, t) if made is None else made), True

    def pull(self, c, own):
        made = self._by_kernels(c, True)
        return (self._pulled(self.of, c, self._forward()) if made is None else made), True

    def _apart(self, t: Tensor) -> Blocks:
        """A block (K, B, entries) as those of q, k and v: views."""
        ends = (self.of.q, self.of.k, self.of.v)
        parts = zip(t.split(self.lengths, -1), ends, self.wanted, strict=True)
        return [p.unflatten(-1, x.shape[1:]) if w else None for p, x, w in parts]

    def _room(self, c: Tensor) -> Tensor:
        return c.new_empty(*c.shape[:2], sum(self.lengths))

    def _pushed(self, of: Attention, t: Tensor) -> Tensor:
        return forward(of, *self._apart(t))[2]

    def _pulled(self, of: Attention, c: Tensor, found) -> Tensor:
        (o, sums), out = found, self._room(c)
        dq, dk, dv = self._apart(out)
        backward(of, o, sums, c, (dq, dk, dv))
        return out

    def _kind(self, columns: int, dtype: torch.dtype, reverse: bool) -> AttentionKind:
        mask = self.of.mask
        seen = "" if mask is None else "boolean" if mask.dtype == torch.bool else "added"
        return AttentionKind.of(
            reverse, columns, self.of.sizes, self.wanted, seen, self.of.causal, dtype, self.of.q.device
        )  # fmt: skip

    def _by_kernels(self, t: Tensor, reverse: bool) -> Tensor | None:
        """The result by kernels, or None where none runs, or torch is better."""
        if not backends.kernels_for(t) or t.dtype != self.of.q.dtype:
            return None
        samples = self.of.sizes[0]

        def cut(n: int, dtype: torch.dtype | None) -> tuple[Attention, Tensor]:
            some = t[:, :n] if dtype is None else t[:, :n].to(dtype)
            return self.of.of(Cut(0, 0, n), dtype), some

        def steps(n: int, dtype: torch.dtype | None) -> Tensor:
            of, some = cut(n, dtype)
            return self._pulled(of, some, forward(of)[:2]) if reverse else self._pushed(of, some)

        def kernels(n: int, way: Way) -> Tensor:
            return self._launched(*cut(n, None), way, reverse, n == samples)

        kind = self._kind(t.shape[0], t.dtype, reverse)
        return chooser.run(Product(kind, samples, steps, kernels)) if kind.offers() else None

    def _launched(self, of: Attention, t: Tensor, way: Way, reverse: bool, whole: bool) -> Tensor:
        from ...kernels import attention as kernels

        seen = kernels.Seen(of.mask, of.causal)
        given = of.q, of.k, of.v, seen, of.scale
        found = self._found.get(way.dot) if whole else None
        if found is None:
            found = kernels.forward(*given, precision=way.dot)
            if whole:
                self._found[way.dot] = found
        options = {"precision": way.dot, "config": way.config}
        if not reverse:
            return kernels.push(*given, found, self._apart(t), **options)
        out = self._room(t)
        kernels.pull(*given, found, t, self._apart(out), **options)
        return out
