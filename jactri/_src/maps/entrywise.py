"""What happens to blocks entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor


def times(t: Tensor, d: Tensor, own: bool) -> Tensor:
    """The product with a derivative, in the block's memory if it is ``own``."""
    return t.mul_(d) if own and t.dtype == d.dtype else t * d


def aligned(d: Tensor, t: Tensor) -> Tensor:
    """``d`` in the memory format of a block: a product of two formats is ten times slower.

    Blocks of convolutions may be in channels-last memory.
    """
    if t.dim() == d.dim() + 1 and t.stride(2) == 1 and d.stride(1) > 1 < d.shape[1]:
        return d.movedim(1, -1).contiguous().movedim(-1, 1)
    return d


def selected(c: Tensor, keep: Tensor, own: bool) -> Tensor:
    """``c`` where ``keep`` is 1, and 0 where it is 0: in one pass, as fast as a product (a boolean mask is not)."""
    keep = keep.to(c.dtype)
    if own and not torch.is_grad_enabled():
        return torch.ops.aten.threshold_backward.grad_input(c, keep, 0, grad_input=c)
    return torch.ops.aten.threshold_backward(c, keep, 0)
