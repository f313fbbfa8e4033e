"""Where the blocks of a sweep go: the answer of a call, in the caller's form, or a store of partial Jacobians."""

from __future__ import annotations

import torch
from torch import Tensor

from ..maps.cut import Shape
from ..maps.layout import Layout, Selection, one, scatter
from ..plan.sweep import Sweep


class Store:
    """The block of one value, whole, as chunks fill it: ``(free seed factors..., value axes...)``."""

    begun = False
    """Whether an interrupted call has written a part of ``dest``, zeros included."""

    def __init__(self, layout: Layout, like):
        self.layout = self.final = layout
        self.like = like
        self.dest: Tensor | None = None
        self.store: Tensor | None = None
        self.written: Tensor | None = None

    def allocate(self) -> Tensor:
        """The memory that chunks are written to."""
        shape = (*self.final.seeds, *self.final.shape)
        return torch.empty(shape, dtype=self.like.dtype, device=self.like.device)

    def reserve(self) -> None:
        """Take the memory of the answer."""
        if self.store is None:
            self.store = self.allocate()

    def window(self, sel: Selection) -> Tensor | None:
        """Where the block ``(K, *value)`` of a chunk belongs, if a kernel can write it there itself."""
        if self.final.tied != self.layout.tied or (self.dest is None and not sel):
            return None
        part = self.part(sel)
        try:
            self.written = part.view(-1, *part.shape[len(self.final.free) :])
        except RuntimeError:  # the seed's axes do not merge into one
            return None
        return self.written

    def part(self, sel: Selection) -> Tensor:
        """Where the block of a chunk belongs."""
        self.reserve()
        part = self.store
        for i, s in enumerate(self.final.free):
            if s in sel:
                part = part.narrow(i, *sel[s])
        return part

    def put(self, data: Tensor | None, own: bool, sel: Selection) -> None:
        """Write the block of one chunk. A block that nobody else holds becomes the answer without a copy."""
        if data is not None and data is self.written:
            return
        if own and self.dest is None and not sel and self.final.tied == self.layout.tied:
            self.store = data.to(device=self.like.device, dtype=self.like.dtype)
            return
        part = self.part(sel)
        if self.begun and self.final.tied != self.layout.tied:
            part.zero_()
        scatter(part, self.final, data, self.layout, sel)

    def block(self) -> Tensor:
        """The whole block, ``(K, *value)``."""
        shape = self.layout.shape
        if self.store is None:  # an identity seed
            return one(self.like).expand(1, *shape)
        return self.store.reshape(-1, *shape)


class Answer(Store):
    """One Jacobian being assembled: of output ``j`` with respect to input ``i``.

    ``per_sample`` answers have shape ``(N, *out, *in)``, others ``(*out, *in)``. Memory is taken at the first
    block; a block that already is the whole answer is returned as it is, through a view.
    """

    def __init__(
        self,
        sweep: Sweep,
        layout: Layout,
        out: Shape,
        into: Shape,
        per_sample: bool | str,
        like,
        dest,
    ):
        super().__init__(layout, like)
        self.sweep, self.out, self.into, self.per_sample = sweep, out, into, per_sample
        self.dest = dest
        tied = per_sample and not sweep.summed and out[0] != 1
        keep = frozenset(t for _, t in sweep.layout.axes[0]) if tied else frozenset()
        self.final = layout.drop(layout.tied - keep) if layout.tied != keep else layout

    def _seed_and_value(self) -> tuple[Shape, Shape]:
        """The shapes of the two ends; the seed's without the samples where they are not seeds."""
        seed, value = (self.out, self.into) if self.sweep.reverse else (self.into, self.out)
        return (seed[1:] if self.per_sample else seed), value

    def allocate(self) -> Tensor:
        """A tensor ``(free seed factors..., value axes...)`` for chunks to be written to."""
        seed, value = self._seed_and_value()
        make = torch.empty if self.final.tied == self.layout.tied else torch.zeros
        if self.dest is None:
            return make((*self.final.seeds, *value), dtype=self.like.dtype, device=self.like.device)
        if make is torch.zeros and not self.begun:
            self.dest.zero_()
        # undo `finish`: bring the seed's axes to the front; splitting them into factors stays a view
        n, m = len(seed), self.dest.dim()
        if not self.sweep.reverse:
            dims = [*range(m - n, m), *range(m - n)]
        elif self.per_sample:
            dims = [*range(1, 1 + n), 0, *range(1 + n, m)]
        else:
            dims = list(range(m))
        return self.dest.permute(dims).view((*self.final.seeds, *value))

    def finish(self) -> Tensor:
        """The Jacobian, in the caller's shape."""
        if self.dest is not None:
            return self.dest
        seed, value = self._seed_and_value()
        full = self.store.reshape((*seed, *value))
        n, m = len(seed), full.dim()
        if not self.sweep.reverse:
            return full.permute(*range(n, m), *range(n)) if n else full
        if self.per_sample:
            return full.permute(n, *range(n), *range(n + 1, m))
        return full
