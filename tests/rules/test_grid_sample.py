"""grid_sample by ops that can be differentiated twice: values, borders and second derivatives, in all modes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from common import F64

import jactri
from jactri._src.maps.grids import sampled

MODES, PADDINGS = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")
ALL = [
    (mode, padding, corners, k)
    for mode, padding, corners, k in itertools.product(MODES, PADDINGS, (False, True), (2, 3))
    if mode != "bicubic" or k == 2
]


def drawn(k, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 2, *size[:k], generator=g, dtype=F64)
    return image, torch.rand(2, *(3, 2, 2)[:k], k, generator=g, dtype=F64) * 4 - 2


@pytest.mark.parametrize("size", [(4, 5, 3), (1, 6, 2)])
@pytest.mark.parametrize(("mode", "padding", "corners", "k"), ALL)
def test_the_same_function(mode, padding, corners, k, size):
    image, grid = drawn(k, size)
    grid[0].view(-1, k)[:2] = torch.tensor([[-1.0], [1.0]])  # at the border itself
    image.requires_grad_(), grid.requires_grad_()
    want = F.grid_sample(image, grid, mode, padding, corners)
    got = sampled(image, grid, (MODES.index(mode), PADDINGS.index(padding), corners))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    c = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(want, (image, grid), c),
        torch.autograd.grad(got, (image, grid), c, materialize_grads=True, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("mode", "padding", "corners", "k"), ALL)
def test_twice(mode, padding, corners, k):
    """Against differences of first derivatives; torch's own backward has no derivative."""
    image, grid = drawn(k, (3, 4, 2), 1)

    def func(image, grid):
        return F.grid_sample(image.sin(), grid.sin() * 1.2, mode, padding, corners)

    def first(image, grid):
        return jactri.jacobian(func, (image, grid), create_graph=True)

    leaves = image.clone().requires_grad_(), grid.clone().requires_grad_()
    g = torch.Generator().manual_seed(2)
    blocks = first(*leaves)
    weights = [torch.randn(b.shape, generator=g, dtype=F64) for b in blocks]
    total = sum((b * w).sum() for b, w in zip(blocks, weights, strict=True))
    found = torch.autograd.grad(total, leaves)
    along = [torch.randn(x.shape, generator=g, dtype=F64) for x in leaves]

    def value(h):
        moved = [x + h * d for x, d in zip((image, grid), along, strict=True)]
        made = torch.autograd.functional.jacobian(func, tuple(moved))
        return sum((b * w).sum() for b, w in zip(made, weights, strict=True))

    h = 1e-6
    want = (value(h) - value(-h)) / (2 * h)
    got = sum((a * d).sum() for a, d in zip(found, along, strict=True))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_laplacian_in_the_places(mode):
    image, grid = drawn(2, (4, 5))
    grid = grid / 2

    def func(grid):
        return F.grid_sample(image, grid.sin(), mode, "border", False).tanh()

    h, want = 1e-4, 0
    for e in torch.eye(12, dtype=F64).mul(h).view(12, 1, *grid.shape[1:]):
        want = want + (func(grid + e) - 2 * func(grid) + func(grid - e)) / h**2
    torch.testing.assert_close(jactri.laplacian(func, grid), want, rtol=1e-4, atol=1e-4)


def test_a_pixel_depends_on_its_own_place():
    image, _ = drawn(2, (6, 6))
    flow = torch.randn(2, 6, 6, 2, dtype=F64) * 0.2

    def warp(flow):
        base = F.affine_grid(torch.eye(2, 3, dtype=F64).expand(2, 2, 3), (2, 2, 6, 6), False)
        return F.grid_sample(image, base + flow, align_corners=False)

    want = torch.autograd.functional.jacobian(warp, flow)
    for layout in (torch.sparse_coo, torch.sparse_csr, "banded"):
        got = jactri.jacobian(warp, flow, layout=layout)
        stored = got.values.numel() if layout == "banded" else got.values().numel()
        assert stored == 2 * want[..., 0, 0, 0, 0].numel()
        torch.testing.assert_close(got.to_dense().reshape(want.shape), want)
    assert not jactri.explain(warp, flow).fallbacks
