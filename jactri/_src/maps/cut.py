"""A part of a value, along one axis."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """A range of samples of one value: ``length`` entries of ``axis`` from ``start``.

    Or of tokens, of which an axis has several runs: such a range in each of its ``outer`` parts.
    """

    axis: int
    start: int
    length: int
    outer: int = 1

    def of(self, t: Tensor, ndim: int) -> Tensor:
        """The part of a tensor that broadcasts against a value of ``ndim`` axes."""
        axis = self.axis - (ndim - t.dim())
        if axis < 0 or t.shape[axis] == 1:
            return t
        if self.outer == 1:
            return t.narrow(axis, self.start, self.length)
        parts = t.unflatten(axis, (self.outer, -1))
        return parts.narrow(axis + 1, self.start, self.length).flatten(axis, axis + 1)

    def shape(self, shape: Shape) -> Shape:
        return (*shape[: self.axis], self.outer * self.length, *shape[self.axis + 1 :])
