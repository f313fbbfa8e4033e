"""The entries of a matrix out of its compressed products (see `plan.compressing`): seeds, chunks, and where to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..base.constants import fixed
from ..base.memory import LARGE, Budget
from ..base.tracing import tracing
from ..plan.compressing import Compression

Product = Callable[[list[Tensor], bool], Sequence[Tensor]]
"""Blocks ``(K, *x)`` of tangents, one an input, to ``(K, *y)``, one an output; from outputs to inputs if True."""


def values(
    how: Compression,
    ys: Sequence[Tensor],
    xs: Sequence[Tensor],
    product: Product,
    budget: Budget,
    chunk_size: int | None = None,
    samples: int = 1,
) -> Tensor:
    """The entries of ``how.pattern``, in its order, of the matrix of all ``ys`` by all ``xs``: ``(samples, entries)``.

    Its rows are the entries of the outputs one after the other, its columns those of the inputs. ``samples``: on the
    first axes of all, which do not mix; the matrix is then that of each. The values are on the device of the first
    input, in the widest dtype of the products, and have a graph if these do. How many seeds run at once:
    ``chunk_size``, or as many as fit a quarter of the budget.
    """
    device = xs[0].device
    each = sum(t.numel() * t.element_size() for t in (*ys, *xs))
    parts = []
    for reverse, reads in how.reads.items():
        seeds = ys if reverse else xs
        count, start = reads.table.count, reads.start.tolist()
        step = chunk_size or min(budget.count(4 * each, count), max(1, LARGE // max(each, 1)))
        place = kept(("compressed", how.key, reverse), reads.place, device)
        for first in range(0, count, step):
            colours = range(first, min(first + step, count))
            made = [
                _whole(m).reshape(len(colours), samples, m[:1].numel() // samples).to(device)
                for m in product(_seeds(how, reverse, colours, seeds, samples), reverse)
            ]
            flat = (made[0] if len(made) == 1 else torch.cat(made, 2)).transpose(0, 1)
            if len(colours) == count and len(how.reads) == 1:
                whole = kept(("compressed in order", how.key), reads.place[how.order], device)
                return flat.reshape(samples, -1).index_select(1, whole)
            here = place[start[first] : start[colours.stop]] - first * reads.size
            parts.append(flat.reshape(samples, -1).index_select(1, here))
    if not parts:
        return torch.zeros(samples, 0, dtype=xs[0].dtype, device=device)
    order = kept(("compressed", how.key), how.order, device)
    return torch.cat(parts, 1).index_select(1, order)


def _seeds(
    how: Compression, reverse: bool, colours: range, ends: Sequence[Tensor], samples: int
) -> list[Tensor]:
    """The sums of the unit vectors of some colours, one block an end, alike for all samples."""
    blocks, start = [], 0
    table = how.reads[reverse].table
    for t in ends:
        size = t.numel() // samples
        own = table.colour[start : start + size].astype(np.int32)
        key = "compressed seeds", how.key, reverse, start, size
        if tracing():  # the smaller constant: whether the larger is worth it is the graph's to say
            colour = kept(key, own, t.device)
            wanted = torch.arange(colours.start, colours.stop, dtype=torch.int32, device=t.device)
            block = (colour == wanted[:, None, None]).to(t.dtype)
        else:

            def make(own=own, t=t) -> tuple[Tensor, ...]:
                wanted = np.arange(colours.start, colours.stop)[:, None, None]
                return (torch.from_numpy(own == wanted).to(t.device, t.dtype),)

            (block,) = fixed((*key, colours, t.dtype, t.device), make)
        blocks.append(block.expand(-1, samples, -1).reshape(len(colours), *t.shape))
        start += size
    return blocks


def _whole(product: Tensor) -> Tensor:
    """A product of which entries are picked, in memory: a compiler would compute each of them by itself, by divisions.

    It does not look behind a view by strides.
    """
    if torch.is_grad_enabled() or not tracing():
        return product
    product = product.contiguous()
    return product.as_strided(product.shape, product.stride())


def kept(key: tuple, array: np.ndarray, device: torch.device) -> Tensor:
    """An array on the device, which ``key`` determines."""
    return fixed((*key, device), lambda: (torch.from_numpy(array).to(device),))[0]
