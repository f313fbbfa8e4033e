"""Row maps and scaled sums against float64."""

import pytest
import torch
from guard import Canvas, guarded
from precision import distance

from jactri.kernels.elementwise import AXES, merged, scaled_sum
from jactri.kernels.rows import MAPS, WHOLE, rows
from jactri.kernels.support import Factor

LIMIT = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Sums are in float32; what is left is the rounding of the result (and of float32 sums over thousands of features)."""

FORMULAS = {
    "softmax": lambda t, p: p * (t - (p * t).sum(-1, keepdim=True)),
    "log_push": lambda t, p: t - (p * t).sum(-1, keepdim=True),
    "log_pull": lambda t, p: t - p * t.sum(-1, keepdim=True),
    "centred": lambda t, p: t - t.mean(-1, keepdim=True) - p * (p * t).mean(-1, keepdim=True),
    "uncentred": lambda t, p: t - p * (p * t).mean(-1, keepdim=True),
}


def case(K, R, n, device, dtype=torch.float32, order=None, gap=1):
    t = guarded(torch.randn(K, R, n, device=device).to(dtype), order, gap)
    p = guarded(torch.rand(R, n, device=device).to(dtype) / max(n, 1) ** 0.5, gap=gap)
    return t, p


@pytest.mark.parametrize("n", [1, 3, 16, 17, 100, 1000, WHOLE, WHOLE + 1, 2 * WHOLE + 77])
@pytest.mark.parametrize("name", MAPS)
def test_rows(name, n, device):
    t, p = case(3, 5, n, device)
    canvas = Canvas(t.shape, t.dtype, device)
    rows(t, p, name, out=canvas.view)
    truth = FORMULAS[name](t.double(), p.double())
    off = (canvas.view.double() - truth).abs().max() / t.abs().max()
    canvas.check()
    assert off < 2e-6


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("order, gap", [(None, 1), ((2, 0, 1), 1), ((1, 0, 2), 2)])
@pytest.mark.parametrize("name", MAPS)
def test_rows_between_diagonals(name, order, gap, dtype, device):
    """Such as 1 / std (one number a row) before and a weight (one a feature) after; in any memory order."""
    t, p = case(4, 7, 33, device, dtype, order, gap)
    std = guarded((torch.rand(7, 1, device=device) + 0.5).to(dtype)).expand(7, 33)
    y = guarded(torch.randn(33, device=device).tanh().to(dtype)).expand(7, 33)
    truth = FORMULAS[name](t.double() * std.double(), p.double()) * (1 - y.double().square())
    around = guarded(torch.randn(1, 7, 33, device=device).to(dtype), gap=gap).expand(4, 7, 33)
    for plus in (None, around):
        canvas = Canvas(t.shape, dtype, device, order, gap)
        rows(t, p, name, Factor(std), Factor(y, "tanh"), plus=plus, out=canvas.view)
        off = distance(canvas.view, truth if plus is None else truth + plus.double())
        canvas.check()
        assert off < LIMIT[dtype]


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_no_rows(shape, device):
    t, p = torch.empty(shape, device=device), torch.empty(shape[1:], device=device)
    assert rows(t, p, "softmax").shape == shape


def test_a_block_that_all_rows_share(device):
    t = torch.randn(3, 1, 20, device=device).expand(3, 6, 20)
    p = torch.rand(6, 20, device=device)
    assert distance(rows(t, p, "softmax"), FORMULAS["softmax"](t.double(), p.double())) < 1e-6


@pytest.mark.clean_memory
def test_offsets_beyond_32_bits(device):
    t = torch.empty((1 << 31) + 4096, device=device).as_strided((2, 3, 20), (64, 1 << 30, 1))
    t.copy_(torch.randn(2, 3, 20))
    p = torch.rand(3, 20, device=device)
    got = rows(t, p, "softmax")
    assert distance(got, FORMULAS["softmax"](t.double(), p.double())) < 1e-6
    got = scaled_sum([(t, Factor(p))], t.shape)
    assert distance(got, t.double() * p.double()) < 1e-6


SHAPES = [((5,), 3), ((1,), 1), ((4, 33), 7), ((2, 3, 65), 4), ((2, 1, 5, 3), 2), ((1025,), 2)]


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("shape, K", SHAPES)
def test_scaled_sums(shape, K, terms, dtype, device):
    given, truth = [], 0
    for i in range(terms):
        t = guarded(torch.randn(K if i == 0 else 1, *shape, device=device).to(dtype))
        y = guarded(torch.randn(shape, device=device).tanh().to(dtype))
        given.append((t, Factor(y, "tanh") if i == 0 else Factor(y)))
        d = y.double()
        truth = truth + t.double() * (1 - d.square() if i == 0 else d)
    canvas = Canvas((K, *shape), dtype, device)
    scaled_sum(given, (K, *shape), out=canvas.view)
    off = distance(canvas.view, truth)
    canvas.check()
    assert off < LIMIT[dtype]


@pytest.mark.parametrize("place", [(3, 1, 5), (1, 4, 5), (1, 1, 1), (3, 4, 1)])
@pytest.mark.parametrize("order, gap", [(None, 1), ((3, 1, 0, 2), 1), ((0, 1, 2, 3), 2)])
def test_values_broadcast_in_any_way(place, order, gap, device):
    shape = (3, 4, 5)
    t = guarded(torch.randn(2, *shape, device=device), order, gap)
    d = guarded(torch.randn(place, device=device)).expand(shape)
    canvas = Canvas((2, *shape), t.dtype, device, order, gap)
    scaled_sum([(t, Factor(d)), (t, None)], (2, *shape), out=canvas.view)
    off = distance(canvas.view, t.double() * d.double() + t.double())
    canvas.check()
    assert off < 1e-6


def test_too_many_axes_are_left_to_torch(device):
    t = torch.randn(2, 3, 2, 3, 2, device=device).permute(4, 2, 0, 3, 1)
    d = torch.randn(3, 2, device=device).permute(1, 0).reshape(2, 1, 3, 1).expand(t.shape[1:])
    assert scaled_sum([(t, Factor(d))], t.shape) is None


def test_axes_are_merged():
    assert merged((2, 3, 4), [(12, 4, 1)]) == ([24], [(1,)])
    assert merged((2, 3, 4), [(12, 4, 1), (0, 4, 1)]) == ([2, 12], [(12, 1), (0, 1)])
    assert merged((2, 1, 4), [(4, 9, 1)]) == ([8], [(1,)])
    assert merged((1, 1), [(5, 5)]) == ([], [()])
    assert AXES >= 3


def test_nothing_to_add(device):
    assert scaled_sum([(torch.empty(0, 3, device=device), None)], (0, 3)).shape == (0, 3)
