"""Blocks of intervals of samples: what `owners` sends through a computation, and what maps do with it.

An entry that depends on samples ``lo`` to ``hi`` of ``n`` holds ``(hi + 1, n - lo)``, one that depends on none
``(0, 0)``, so that the interval of what depends on several entries is their maximum, number by number, and the zeros
that a map writes are right as they are. The intervals of a value are integers ``(2, *value)``, expanded along axes in
which they do not vary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def own(n: int, ndim: int, device, axis: int = 0) -> Tensor:
    """The intervals of an input or output of ``n`` samples along an axis: each sample its own."""
    index = torch.arange(n, dtype=torch.int32, device=device)
    sizes = *[1] * axis, n, *[1] * (ndim - axis - 1)
    return torch.stack([index + 1, n - index]).view(2, *sizes)


def single(t: Tensor, n: int) -> bool:
    """Whether no entry depends on more than one of ``n`` samples."""
    return not bool((thin(t).sum(0) > n + 1).any())


def within(t: Tensor, n: int) -> bool:
    """Whether, entry by entry, the samples along the first axis depend on none but themselves."""
    return bool((thin(t) <= own(n, t.dim() - 1, t.device)).all())


def for_good(weight: Tensor) -> bool:
    """Whether a weight that is zero stays so: not where the result will be differentiated in what it is made of."""
    return not (weight.requires_grad and torch.is_grad_enabled())


def thin(t: Tensor) -> Tensor:
    """A block without what is repeated: with size 1 along axes in which it is expanded."""
    for a in range(1, t.dim()):
        if t.stride(a) == 0 and t.shape[a] > 1:
            t = t.narrow(a, 0, 1)
    return t


def joined(t: Tensor, kept, reverse: bool, shape) -> Tensor:
    """`LinearMap.reach` of a map of which only the kept axes are known: of ``shape``, with size 1 along others."""
    pairs = sorted((a, b) if reverse else (b, a) for a, b in kept)  # (axis after, axis before)
    passed = {before for _, before in pairs}
    others = [a for a in range(t.dim() - 1) if a not in passed]
    t = thin(t)
    if others:
        t = t.amax([a + 1 for a in others], keepdim=True)
    t = t.permute(0, *(before + 1 for _, before in pairs), *(a + 1 for a in others))
    sizes = [1] * len(shape)
    for i, (after, _) in enumerate(pairs):
        sizes[after] = t.shape[i + 1]
    return t.reshape(len(t), *sizes)


def regrouped(t: Tensor, shape) -> Tensor:
    """A block ``(2, ...)`` as ``(2, *shape)``; axes along which it is expanded stay so where they are not merged."""
    old, small = t.shape[1:], thin(t)
    wide, new, i, j = [len(t)], [len(t)], 0, 0
    while i < len(old) or j < len(shape):  # the shortest runs of axes of one number of entries
        start, at = i, j
        left = right = 1
        while (i == start and j == at) or left != right:
            if i < len(old) and (left <= right or j == len(shape)):
                left, i = left * old[i], i + 1
            else:
                right, j = right * shape[j], j + 1
        alike = all(n == 1 for n in small.shape[start + 1 : i + 1])
        wide += [1] * (i - start) if alike else old[start:i]
        new += [1] * (j - at) if alike else shape[at:j]
    return small.expand(wide).reshape(new)
