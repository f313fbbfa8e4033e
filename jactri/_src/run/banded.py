"""`Banded`: a Jacobian of which the entries of a pattern are kept, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..base.memory import si
from ..base.tables import Picture, Shown, spy


@dataclass(frozen=True, repr=False)
class Banded(Shown):
    """A Jacobian whose rows hold the entries of a pattern only: what ``layout="banded"`` of `jacobian` returns.

    Attributes:
        values: ``(*out, W)`` with the most entries of a row on the last axis, for ``per_sample`` Jacobians with the
            samples first, as in ``out``; 0 where a row has fewer.
        columns: of the shape of one sample's values, the flat index in the input (of one sample) of each; -1 where a
            row has fewer.
        shape: of the Jacobian.

    Examples:
        >>> conv = nn.Conv1d(1, 1, kernel_size=3, padding=1)
        >>> x = torch.randn(1, 1, 6)
        >>> band = jactri.jacobian(conv, x, layout="banded")
        >>> band.values.shape, band.columns[0, 0, 0].tolist()
        (torch.Size([1, 1, 6, 3]), [0, 1, -1])
        >>> torch.allclose(band.to_dense(), jactri.jacobian(conv, x))
        True
    """

    values: Tensor
    columns: Tensor
    shape: tuple[int, ...]

    def _sizes(self) -> tuple[int, int, int]:
        """How many samples there are, and the rows and columns of one."""
        rows = prod(self.columns.shape[:-1])
        samples = prod(self.values.shape[:-1]) // max(rows, 1)
        return samples, rows, prod(self.shape) // max(samples * rows, 1)

    def _parts(self) -> list[str | Picture]:
        there, width = self.columns >= 0, self.columns.shape[-1]
        _, rows, n = self._sizes()
        size, whole = self.values.nbytes, prod(self.shape) * self.values.element_size()
        text = (
            f"Banded(shape {tuple(self.shape)}, {self.values.dtype} on {self.values.device}: up to {width} entries a "
            f"row, values {tuple(self.values.shape)} of {si(size)}B, dense {si(whole)}B)"
        )
        row = torch.arange(rows, device=there.device).repeat_interleave(width)[there.flatten()]
        return [text, spy(row, self.columns[there], (rows, n))]

    def to_dense(self) -> Tensor:
        """The Jacobian itself, of ``shape``."""
        width = self.columns.shape[-1]
        samples, rows, n = self._sizes()
        columns = self.columns.reshape(1, rows, width).expand(samples, -1, -1)
        values = self.values.reshape(samples, rows, width)
        dense = values.new_zeros(
            samples, rows, n + 1
        )  # what is nowhere goes to a column of its own
        dense = dense.scatter(2, columns.remainder(n + 1), values)
        return dense[..., :n].reshape(self.shape)
