"""Grid sampling by ops that autograd differentiates any number of times, as it does not torch's own.

The formulas are those of ATen/native/GridSampler.h: along every axis a coordinate has taps, an index and a weight each,
and a place takes the sum over all products of taps. Derivatives at the borders, where they jump, are torch's.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

BILINEAR, NEAREST, BICUBIC = range(3)
ZEROS, BORDER, REFLECTION = range(3)

Options = tuple[int, int, bool]
"""Mode and padding, as torch numbers them, and align_corners."""


def sampled(x: Tensor, grid: Tensor, options: Options) -> Tensor:
    """Images ``(N, C, *size)`` at the places of a grid ``(N, *out, axes)``, whose last axis counts from the last."""
    size = x.shape[2:]
    axes = [_taps(grid[..., -1 - a], n, options) for a, n in enumerate(size)]
    flat: Tensor = x.flatten(2)
    total: Any = 0
    for taps in product(*axes):
        index: Any = 0
        weight: Any = 1
        for (i, w), n in zip(taps, size, strict=True):
            if options[1] == ZEROS:
                w = torch.where((i >= 0) & (i < n), w, 0)
            index, weight = index * n + i.clamp(0, n - 1).nan_to_num(0).long(), weight * w
        index = index.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
        total = total + flat.gather(2, index) * weight.flatten(1).unsqueeze(1)
    return total.unflatten(2, grid.shape[1:-1])


def slopes(x: Tensor, grid: Tensor, options: Options) -> Tensor:
    """The derivatives ``(N * places, axes, C)`` of what is sampled in the place's own coordinates."""
    n, c, *size = x.shape
    *out, k = grid.shape[1:]
    # one channel an image, so that a place of the output has a place of the grid to itself
    images = x.reshape(n * c, 1, *size)
    places = grid.unsqueeze(1).expand(n, c, *out, k).reshape(n * c, *out, k)
    if options[0] == NEAREST:
        found = torch.zeros_like(places)
    elif torch.is_grad_enabled():
        places = places.requires_grad_() if not places.requires_grad else places
        values = sampled(images, places, options).sum()
        (found,) = torch.autograd.grad(values, places, create_graph=True)
    else:
        op = (
            torch.ops.aten.grid_sampler_2d_backward
            if k == 2
            else torch.ops.aten.grid_sampler_3d_backward
        )
        ones = images.new_ones(n * c, 1, *out)
        found = op(ones, images, places, *options, (False, True))[1]
    return found.reshape(n, c, -1, k).permute(0, 2, 3, 1).reshape(-1, k, c)


def _taps(at: Tensor, n: int, options: Options) -> list[tuple[Tensor, Tensor]]:
    """(index, weight) along an axis of ``n`` entries, of coordinates from -1 to 1; indices may lie outside."""
    mode, padding, aligned = options
    at = (at + 1) / 2 * (n - 1) if aligned else ((at + 1) * n - 1) / 2
    if mode == BICUBIC:
        low = at.detach().floor()
        t, a = at - low, -0.75
        near = [((a + 2) * s - (a + 3)) * s * s + 1 for s in (t, 1 - t)]
        far = [((a * s - 5 * a) * s + 8 * a) * s - 4 * a for s in (t + 1, 2 - t)]
        weights = far[0], *near, far[1]
        return [(_padded(low + d, n, padding, aligned), w) for d, w in enumerate(weights, -1)]
    at = _padded(at, n, padding, aligned)
    low = at.detach().round() if mode == NEAREST else at.detach().floor()
    if mode == NEAREST:
        return [(low, torch.ones_like(low))]
    return [(low, low + 1 - at), (low + 1, at - low)]


def _padded(at: Tensor, n: int, padding: int, aligned: bool) -> Tensor:
    """Coordinates in entries, brought inside."""
    if padding == ZEROS:
        return at
    if padding == REFLECTION:
        first, span = (0.0, n - 1) if aligned else (-0.5, n)
        if span == 0:
            return torch.zeros_like(at)
        at = torch.where(at < first, first - at, at - first)
        turns = (at.detach() / span).floor()
        rest = at - turns * span
        at = torch.where(turns % 2 == 0, rest, span - rest) + first
    edge = at.detach().clamp(0, n - 1)
    return torch.where((at > 0) & (at < n - 1), at, edge)
