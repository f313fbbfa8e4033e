"""Products by a constant sparse matrix, as a graph network's adjacency: one matrix that all seeds share.

Of what a sparse matrix can be laid out as, torch multiplies and differentiates coordinates everywhere (blocks have no
product by their transpose on a CPU), so any other layout is brought to these at the first use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.csr import Csr
from .linear_map import LinearMap
from .links import digest_of
from .once import Once


class SparseMatMul(LinearMap):
    """``x @ partner`` (side "right") or ``partner @ x`` (side "left") for a sparse ``partner``: ``2 nnz`` flops a line.

    ``partner`` is 2-D for ``x`` of two axes, or 3-D for ``x`` of three: then it is one matrix with a block a sample.
    """

    __slots__ = ("_matrix", "_transposed", "batch", "nnz", "side")
    name, structure = "sparse matmul", "sparse matrix"

    def __init__(self, partner: Tensor, side: str):
        self.side, self.nnz = side, partner._nnz()
        self.batch = partner.shape[0] if partner.dim() == 3 else None
        self._matrix = Once(lambda: flat(partner))
        self._transposed = Once(lambda: self._matrix().t().coalesce())

    @property
    def key(self):
        return SparseMatMul, self.side, self.batch, self.nnz

    @property
    def entries(self):
        return self.nnz

    def kept(self, in_shape, out_shape):
        n = len(in_shape)
        axis = n - 1 if self.side == "right" else n - 2
        return tuple((a, a) for a in range(n) if a != axis)

    def picks(self, in_shape, out_shape):
        axis = len(in_shape) - (1 if self.side == "right" else 2)
        return ((axis, axis),)

    def support(self, axis, in_shape, out_shape):
        p = self._matrix()
        row, column = p.indices().cpu().numpy()
        found = Csr.of(row, column, *p.shape)
        if self.batch is not None:  # any of the batch
            found = found.blocks(self.batch)
        return found.T if self.side == "right" else found

    @property
    def digest(self):
        return digest_of(self._matrix().indices())

    def work(self, in_shape, out_shape, reverse):
        shape = in_shape if reverse else out_shape
        rows = shape[-1 if self.side == "right" else -2] * (self.batch or 1)
        return 2.0 * self.nnz / max(rows, 1)

    def narrow(self, source, target, in_shape, out_shape):
        return None if self.batch is not None and source.axis == 0 else self

    def push(self, t, own):
        return self._multiply(t, False)

    def pull(self, c, own):
        return self._multiply(c, True)

    def _multiply(self, t: Tensor, back: bool) -> tuple[Tensor, bool]:
        right = self.side == "right"
        free = -2 if right else -1  # the axis that every line of a product goes along
        shared = t.shape[free] if t.stride(free) == 0 and t.shape[free] > 1 else 0
        if shared:
            t = t.narrow(free, 0, 1)
        p = self._matrix() if right == back else self._transposed()
        t = t if right else t.mT
        # (K, batch?, free, n) to (batch n, K free) and back
        k, m, n = t.shape[0], t.shape[-2], t.shape[-1]
        columns = t.reshape(k, -1, m, n).permute(1, 3, 0, 2).reshape(-1, k * m)
        b = self.batch or 1
        out = (p @ columns).view(b, -1, k, m).permute(2, 0, 3, 1)
        out = out.reshape(k, b, m, -1) if self.batch else out.squeeze(1)
        out = out if right else out.mT
        if shared:
            return out.expand(
                *out.shape[:free], shared, *([] if free == -1 else out.shape[-1:])
            ), False
        return out, True


def flat(partner: Tensor) -> Tensor:
    """A sparse matrix in coordinates; of a batch of them, the one with these as blocks on its diagonal."""
    p = partner if partner.layout is torch.sparse_coo else partner.to_sparse_coo()
    p = p.coalesce()
    if p.dim() == 2:
        return p
    b, m, n = p.shape
    block, row, column = p.indices()
    index = torch.stack([block * m + row, block * n + column])
    return torch.sparse_coo_tensor(
        index, p.values(), (b * m, b * n), device=p.device, check_invariants=False
    ).coalesce()
