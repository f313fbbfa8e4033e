"""What a map gets, and several maps that get what is theirs at once."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .layout import Layout, Selection, one, unfolded


class Joint(Protocol):
    """Several maps to one value, each at a ``place`` of its own, that are cheaper together."""

    def join(self, blocks: dict[int, Tensor]) -> Tensor:
        """The sum of what the maps give for blocks, by their places. Nobody else holds it."""


def given(
    data: Tensor | None, own: bool, layout: Layout, mid: Layout, sel: Selection | None, like: Tensor
) -> tuple[Tensor, bool]:
    """The block that a map gets whose route leads by ``mid``, and whether it may be overwritten."""
    if mid is not layout:
        block, fresh = unfolded(data, layout, mid, sel, like)
        return block, fresh or (own and block is data)
    if data is None:
        return one(like).expand(1, *mid.shape), False
    return data, own
