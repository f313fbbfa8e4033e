"""Entries of a pattern of a recorded computation's Jacobian, by few products with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..base.backends import capturing
from ..base.memory import Budget
from ..plan.compressing import Compression, compressed, each_row
from ..plan.poles import finite, suspects
from ..read.graph import Graph, UnsupportedGraph
from ..read.joining import for_given
from ..read.opaque import refuse_or_log
from ..run.compressed import values
from ..run.given import multiply
from .by_autograd import pulled, pushed


def has_poles(how: Compression, graph: Graph) -> bool:
    """Whether products are those of autograd's rows, each of one output, only where all values are finite."""
    together = sum(v is not None for v in graph.outputs) > 1
    return bool((how.tangents.count or together) and suspects(graph, seeds=True))


def entries(
    ys: Sequence[Tensor],
    xs: Sequence[Tensor],
    how: Compression,
    graph: Graph | UnsupportedGraph,
    *,
    budget: Budget,
    chunk_size: int | None = None,
    samples: int = 1,
    progress: Callable[[], None] | None = None,
    later: bool = False,
) -> Tensor:
    """The entries of ``how.pattern``, in its order (CSR), of the matrix of all ``ys`` by all ``xs``.

    To be called within `running.computing`: where that records, the values can be differentiated. What colours the
    columns, the rows or both makes ``how``: `compressing.compressed`, or who knows more of the matrix, as that it is
    symmetric. It is taken at its word: of entries outside of the pattern, those that are read are wrong.

    Args:
        ys, xs: the ends of the computation. Rows are the entries of all outputs, one output after the other, each in
            flat order; columns those of the inputs.
        how: which products are made, and where in them each entry stands.
        graph: what `reading.read` gave, or why it did not: then autograd makes the products.
        budget: what may be taken; a quarter of it for the blocks of seeds at once.
        chunk_size: how many seeds run at once, instead.
        samples: of so many samples on the first axes of all ends, which do not mix: the matrix and the pattern are
            those of each.
        progress: called for each product.
        later: whether it is the caller who looks, where there are `has_poles`, at whether all values are finite.

    Returns:
        ``(samples, entries)`` on the device of the first input, in the widest dtype of the products.

    Cost:
        As many pushes and pulls as ``how.products``, in blocks. What of ``how`` is a tensor is kept by its key.
    """

    def product(blocks: Sequence[Tensor | None], reverse: bool) -> list[Tensor]:
        made = multiplied(ys, xs, blocks, reverse, graph, budget, chunk_size)
        for _ in made[0] if progress else ():
            progress()
        return made

    if isinstance(graph, UnsupportedGraph):
        refuse_or_log("the function", ys[0].shape, [x.shape for x in xs], f"holds {graph}")
        poles = len(ys) > 1
    else:
        poles = not later and has_poles(how, graph)
    made = None
    if not (poles and capturing(xs[0].device)):
        made = values(how, ys, xs, product, budget, chunk_size, samples)
    if made is None or (poles and not finite(made)):
        # where forward mode meets an infinity, only rows are autograd's: of one output, as 0 times infinity is NaN
        parts, start = [], 0
        each = isinstance(graph, UnsupportedGraph) and not graph.linear
        for j, y in enumerate(ys):
            stop = start + y.numel() // samples
            part = how.pattern.take(np.arange(start, stop))
            how_part = each_row(part) if each else compressed(part, "reverse-mode")
            alone = partial(_of_output, product, j, len(ys))
            parts.append(values(how_part, [y], xs, alone, budget, chunk_size, samples))
            start = stop
        made = torch.cat(parts, 1)
    return made


def _of_output(product, j: int, count: int, blocks: list[Tensor], reverse: bool) -> list[Tensor]:
    """A product with cotangents of one of several outputs."""
    return product([blocks[0] if k == j else None for k in range(count)], reverse)


def multiplied(
    ys: Sequence[Tensor],
    xs: Sequence[Tensor],
    blocks: Sequence[Tensor | None],
    reverse: bool,
    graph: Graph | UnsupportedGraph,
    budget: Budget,
    chunk_size: int | None = None,
) -> list[Tensor]:
    """Products with blocks ``(K, *x)`` of tangents, one an input, or of cotangents, one an output (``reverse``).

    None among the blocks stands for zeros.
    """
    k, ends = next(len(b) for b in blocks if b is not None), xs if reverse else ys
    if isinstance(graph, UnsupportedGraph):
        return (pulled if reverse else pushed)(ys, xs, blocks, k, graph)
    graph = for_given(graph, k)
    found = multiply(graph, blocks, reverse, budget=budget, chunk_size=chunk_size, keep=True)
    return [e.new_zeros(k, *e.shape) if f is None else f for f, e in zip(found, ends, strict=True)]
