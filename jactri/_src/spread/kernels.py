"""Kernels of two batches of which either may be shared out: rows or columns on their rank, or tiles that go round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..parameters.factored import Factors
from ..parameters.recorded import Recorded
from . import ring, weights
from .shards import Share


def check_proven(run: Recorded, share: Share) -> None:
    """Raise RuntimeError where nothing shows that samples do not mix, as other ranks have to have it.

    On one device the Jacobian of what autograd computes as a whole is right either way. Also for a batch that is shared
    out among the ranks that share the weights.
    """
    if run.sharded:
        weights.check(run, share)
    reason = run.reason
    shown = run.assume or reason is None or reason.graph is not None
    if share.dims and not shown and not any(t.requires_grad for t in run.leaves):
        raise RuntimeError(
            f"nothing shows that samples do not mix: x is of integers, and the module holds {reason}; pass "
            "per_sample='assume' if they do not, or x.full_tensor()"
        )


def of_ranks(
    multiply: Callable[[Any, Any], Tensor],
    factors: tuple[Factors[Recorded], Factors[Recorded]],
    shares: tuple[Share, Share],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> Tensor:
    """The kernel that ``multiply`` gives of two factors: its rows by the ranks of the first, or columns of the second.

    ``shapes``: what is before the samples of the second, those of the first among it, and after. Raises RuntimeError
    where both batches are shared out, but not among the same ranks.
    """
    (first, second), (mine, its) = factors, shares
    axis = len(shapes[0])
    if not (mine.dims and its.dims):
        made = multiply(first, second)
        if its.dims:
            return its.rows(made, axis)
        return mine.rows(made)
    if (mine.mesh, mine.dims) != (its.mesh, its.dims):
        raise RuntimeError(
            f"the two batches are shared out among other ranks: {mine.placements} on {mine.mesh}, and "
            f"{its.placements} on {its.mesh}; redistribute one of them, or make it whole by full_tensor()"
        )
    if first.run.create_graph:
        raise RuntimeError(
            "create_graph=True: the kernel is made of other ranks' factors, to which no gradient flows back; pass one "
            "batch whole, by full_tensor()"
        )
    left = _whole(first)
    right = left if second is first else _whole(second)
    return mine.rows(ring.rows(left, right, shares, multiply, shapes))


def _whole(of: Factors[Recorded]) -> Factors[Recorded]:
    """Factors that are not made in chunks: what goes round is whole."""
    return of if of.chunk_size is None else Factors(of.run, None, of.memory_limit)
