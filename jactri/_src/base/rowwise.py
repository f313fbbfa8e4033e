"""Custom Functions that write to memory of their own, for batches of cotangents: one row after another.

``torch.autograd.grad(..., is_grads_batched=True)`` and `torch.vmap` run a backward once, on tensors that stand for a
batch of them, and that cannot be written to what is no such batch. Of those of the first, Functions are not told.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor


class Rowwise(torch.autograd.Function):
    """A Function of tensors, and of constants, that gives a tuple of tensors; `torch.vmap` runs it for every row."""

    @classmethod
    def vmap(cls, info, in_dims, *inputs):
        size = info.batch_size

        def row(x, d, i: int):
            if d is None or not isinstance(x, Tensor):
                return x
            # without any, one of zeros tells the shapes
            return x.select(d, i) if size else x.new_zeros(x.movedim(d, 0).shape[1:])

        rows = [
            cls.apply(*[row(x, d, i) for x, d in zip(inputs, in_dims, strict=True)])
            for i in range(max(size, 1))
        ]
        made = tuple([torch.stack(column)[:size] for column in zip(*rows, strict=True)])
        return made, (0,) * len(made)


def rowwise(backward: Callable) -> Callable:
    """A backward of a Function that ``is_grads_batched`` may run: once a row. Its products are not autocast's."""

    @functools.wraps(backward)
    def called(ctx, *cotangents):
        batched = [c is not None and is_legacy_batchedtensor(c) for c in cotangents]
        if not any(batched):
            with torch._C._DisableAutocast():
                return backward(ctx, *cotangents)
        level = _level()
        size = len(torch._remove_batch_dim(cotangents[batched.index(True)], level, 0, 0))
        # what is no batch is expanded to one
        given = [c if c is None else torch._remove_batch_dim(c, level, size, 0) for c in cotangents]
        rows = [called(ctx, *[c if c is None else c[i] for c in given]) for i in range(size)]
        return tuple([
            None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level)
            for column in zip(*rows, strict=True)
        ])  # fmt: skip

    return called


def _level() -> int:
    """Which of the batches that are around is the inner one."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level
