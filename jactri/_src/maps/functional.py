"""A linear map given by functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..base.csr import Csr
from .linear_map import Kept, LinearMap
from .links import moved


class Functional(LinearMap):
    """A map given by its push and its pull on blocks ``(K, *shape)``.

    ``anywhere`` says that both take any length of the kept axes, so that a range of samples needs no other map.
    ``supports`` gives those of the `windows` by axis, which is the same before and after; ``detail`` is what, beside
    the name and the shapes, they depend on. ``moves``: of push and pull, which add no entries: each of the
    result's is one that is given, or zero. Where they do, name, shapes and detail say which.
    """

    __slots__ = (
        "_anywhere", "_detail", "_kept", "_moves", "_pull", "_push", "_supports", "_work", "name",
    )  # fmt: skip
    structure = "function"

    def __init__(
        self,
        name: str,
        push: Callable[[Tensor], Tensor],
        pull: Callable[[Tensor], Tensor],
        kept: Kept,
        work: tuple[float, float] = (4.0, 4.0),
        anywhere: bool = False,
        supports: dict[int, Callable[[], Csr]] | None = None,
        detail: object = None,
        moves: tuple[bool, bool] = (False, False),
    ):
        self.name, self._push, self._pull, self._kept = name, push, pull, kept
        self._work, self._anywhere = work, anywhere
        self._supports, self._detail, self._moves = supports or {}, detail, moves

    @property
    def key(self):
        return Functional, self.name, self._kept, self._work, self._detail

    def windows(self, in_shape, out_shape):
        return tuple((a, a) for a in self._supports)

    def support(self, axis, in_shape, out_shape):
        return self._supports[axis]()

    def links(self, in_shape, out_shape):
        if self._moves[0]:
            return moved(self._push, in_shape, torch.device("cpu"))
        return moved(self._pull, out_shape, torch.device("cpu")).T if self._moves[1] else None

    def reach(self, t, in_shape, out_shape, reverse, values):
        if self._moves[reverse]:
            return (self._pull if reverse else self._push)(t)
        return super().reach(t, in_shape, out_shape, reverse, values)

    def narrow(self, source, target, in_shape, out_shape):
        return self if self._anywhere else None

    def kept(self, in_shape, out_shape):
        return self._kept

    def work(self, in_shape, out_shape, reverse):
        return self._work[reverse]

    def push(self, t, own):
        return self._push(t), False

    def pull(self, c, own):
        return self._pull(c), False
