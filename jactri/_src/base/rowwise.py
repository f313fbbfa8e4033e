"""Custom Functions that write to memory of their own, for batches of cotangents: one row after another.

``torch.autograd.grad(..., is_grads_batched=True)`` and `torch.vmap` run a backward once, on tensors that stand for a
batch of them. These cannot be written to what is no such batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


class Rowwise(torch.autograd.Function):
    """A Function of tensors, and of constants, that gives a tuple of tensors; `torch.vmap` runs it for every row."""

    @classmethod
    def vmap(cls, info, in_dims, *inputs):
        rows = [
            cls.apply(*[
                x.select(d, i) if isinstance(x, Tensor) and d is not None else x
                for x, d in zip(inputs, in_dims, strict=True)
            ])
            for i in range(info.batch_size)
        ]  # fmt: skip
        made = tuple([torch.stack(column) for column in zip(*rows, strict=True)])
        return made, (0,) * len(made)


def rowwise(backward: Callable) -> Callable:
    """A backward of a Function that ``is_grads_batched`` may run: once a row."""

    @functools.wraps(backward)
    def called(ctx, *cotangents):
        level = _level()
        if not level or not any(c is not None and _batched(c) for c in cotangents):
            return backward(ctx, *cotangents)
        # what is no batch is expanded to one, of as many rows as the others
        size = next(
            torch._remove_batch_dim(c, level, 0, 0).shape[0]
            for c in cotangents
            if c is not None and _batched(c)
        )
        given = [
            None if c is None else torch._remove_batch_dim(c, level, size, 0) for c in cotangents
        ]
        rows = [backward(ctx, *[None if c is None else c[i] for c in given]) for i in range(size)]
        return tuple([
            None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level)
            for column in zip(*rows, strict=True)
        ])  # fmt: skip

    return called


def _level() -> int:
    """How many of autograd's own batches are around: those of ``is_grads_batched``."""
    inner = torch._C._vmapmode_increment_nesting()
    torch._C._vmapmode_decrement_nesting()
    return inner - 1


def _batched(t: Tensor) -> bool:
    return torch._C._dispatch_keys(t).has(torch._C.DispatchKey.Batched)
