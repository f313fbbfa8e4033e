"""Means and sums of squared deviations of named tensors, which are added to in place."""

from __future__ import annotations

import torch
from torch import Tensor

Named = dict[str, Tensor]


def add(mean: Named, squares: Named | None, n: int, found: Named) -> None:
    """Add an answer, the ``n``-th (Welford 1962)."""
    with torch.no_grad():
        for name, t in found.items():
            t = t.to(torch.float64 if t.dtype == torch.float64 else torch.float32)
            for kept in (mean,) if squares is None else (mean, squares):
                if name not in kept:
                    kept[name] = torch.zeros_like(t)
                elif kept[name].device != t.device:  # what was loaded lies on the CPU
                    kept[name] = kept[name].to(t.device)
            delta = t - mean[name]
            mean[name] += delta / n
            if squares is not None:
                squares[name] += delta * (t - mean[name])


def merge(
    mean: Named, squares: Named | None, n: int, other: Named, their_squares: Named, m: int
) -> None:
    """Add the mean of ``m`` others to that of ``n`` (Chan, Golub and LeVeque 1983)."""
    with torch.no_grad():
        for name, theirs in other.items():
            if not n:
                mean[name] = theirs.clone()
                if squares is not None:
                    squares[name] = their_squares[name].clone()
                continue
            mine = mean[name]
            delta = theirs.to(mine) - mine
            if squares is not None:
                more = their_squares[name].to(mine)
                squares[name] += more + delta**2 * (n * m / (n + m))
            mine += delta * (m / (n + m))
