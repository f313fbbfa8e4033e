"""The product of two partial Jacobians that meet at a cut (see `mixed`)."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..maps.layout import Layout, Selection
from ..maps.lettered import Lettered, contract, cut, once
from ..plan.mixed import Product


def multiply(
    how: Product,
    layout: Layout,
    first: Tensor,
    second: Tensor,
    sel: Selection,
    out: Tensor | None = None,
    here: Selection | None = None,
    own: tuple[bool, bool] = (False, False),
) -> Tensor:
    """The block ``(K, *value)`` of the result: ``second`` times ``first``, both as blocks ``(K, *value)``.

    Blocks of two dtypes are multiplied in the wider one, those of two devices on that of ``second``.

    ``sel`` restricts the result's seed factors; one of the blocks may be of the chunk ``here`` already. ``out``: where
    to write it if autograd does not watch; returned if it was written. ``own``: whether ``first`` and ``second`` may be
    overwritten. Costs ``2 * prod(sizes)`` flops.
    """
    spans = {how.seeds[factor]: span for factor, span in sel.items()}
    cuts = {how.seeds[factor]: span for factor, span in (here or {}).items()}
    parts: list[Lettered] = []
    for t, letters in ((second, how.second), (first.to(second.device), how.first)):
        sizes = [how.sizes[c] for c in letters]
        if t.numel() != prod(sizes):  # of this chunk
            sizes = [cuts[c][1] if c in cuts else n for c, n in zip(letters, sizes, strict=True)]
        t = cut(t.reshape(sizes), letters, spans)
        # a block of weights that all samples share is taken once
        parts.append(once(t, letters, how.out))
    one, other = parts
    shape = [spans[c][1] if c in spans else how.sizes[c] for c in how.out]
    if out is not None and not torch.is_grad_enabled() and _fits(out, first, second):
        contract(*one, *other, how.out, out.view(shape))
        return out
    made = contract(*one, *other, how.out, own=own[::-1])
    return made.expand(shape).reshape(layout.columns_of(sel), *layout.shape)


def _fits(out: Tensor, first: Tensor, second: Tensor) -> bool:
    return out.device == second.device and out.dtype == torch.promote_types(
        first.dtype, second.dtype
    )
