"""Max pooling by saved indices against float64."""

import pytest
import torch
from guard import Canvas, guarded
from precision import distance
from torch.nn import functional as F

from jactri.kernels import naive, pool
from jactri.kernels.support import Factor, Unfit
from jactri.kernels.windows import Window

LIMIT = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
POOLS = [
    # taps, stride, padding, dilation, image
    ((2, 2), (2, 2), (0, 0), (1, 1), (6, 8)),
    ((3, 3), (2, 2), (1, 1), (1, 1), (7, 9)),
    ((3, 2), (1, 3), (1, 0), (2, 1), (9, 7)),
    ((2, 2), (3, 3), (0, 0), (1, 1), (7, 7)),  # pixels that no window holds
    ((1, 1), (1, 1), (0, 0), (1, 1), (1, 1)),
    ((3,), (2,), (1,), (1,), (9,)),
]


def indices(x, taps, stride, padding, dilation):
    call = F.max_pool1d if len(taps) == 1 else F.max_pool2d
    return call(x, taps, stride, padding, dilation, return_indices=True)[1]


def case(K, N, C, p, device, dtype=torch.float32, order=None, gap=1):
    taps, stride, padding, dilation, size = p
    x = torch.randn(N, C, *size, device=device)
    index = indices(x, taps, stride, padding, dilation)
    order = None if order is None else [a for a in order if a < 3 + len(size)]

    def draw(*shape):
        return torch.randn(shape, device=device).to(dtype)

    ends = [guarded(draw(K, N, C, *s), order, gap) for s in (size, index.shape[2:])]
    d = [guarded(draw(N, C, *s).tanh(), gap=gap) for s in (size, index.shape[2:])]
    return ends, d, index, Window(size, stride, padding, dilation), taps, order


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("p", POOLS)
def test_push_and_pull_between_diagonals(p, dtype, device):
    (t, c), (fine, coarse), index, window, taps, _ = case(3, 2, 3, p, device, dtype)
    canvas = Canvas(c.shape, dtype, device)
    got = pool.gather(t, index, Factor(fine, "tanh"), Factor(coarse), out=canvas.view)
    want = naive.gather(t.double(), index, 1 - fine.double().square(), coarse.double())
    off = distance(got, want)
    canvas.check()
    assert off < LIMIT[dtype]
    canvas = Canvas(t.shape, dtype, device)
    got = pool.scatter(
        c, index, window, taps, Factor(coarse), Factor(fine, "tanh"), out=canvas.view
    )
    want = naive.scatter(c.double(), index, p[4], coarse.double(), 1 - fine.double().square())
    off = distance(got, want)
    canvas.check()
    assert off < LIMIT[dtype]


@pytest.mark.parametrize("p", POOLS)
def test_is_what_autograd_does(p, device):
    """The pull of float64 autograd, and its transpose."""
    taps, stride, padding, dilation, size = p
    x = torch.randn(2, 3, *size, device=device, dtype=torch.float64, requires_grad=True)
    call = F.max_pool1d if len(taps) == 1 else F.max_pool2d
    y, index = call(x, taps, stride, padding, dilation, return_indices=True)
    c = torch.randn(4, *y.shape, device=device)
    want = torch.stack([torch.autograd.grad(y, x, v.double(), retain_graph=True)[0] for v in c])
    got = pool.scatter(c, index, Window(size, stride, padding, dilation), taps)
    assert distance(got, want) < 1e-6
    t = torch.randn(4, *x.shape, device=device)
    pushed = pool.gather(t, index)
    pairs = (pushed.double() * c.double()).sum(), (t.double() * want).sum()
    torch.testing.assert_close(*pairs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order, gap", [((0, 1, 3, 4, 2), 1), ((4, 3, 2, 1, 0), 2), (None, 2)])
def test_memory_orders(order, gap, device):
    """Channels-last blocks and worse."""
    (t, c), _, index, window, taps, order = case(9, 2, 5, POOLS[1], device, order=order, gap=gap)
    canvas = Canvas(c.shape, c.dtype, device, order, gap)
    assert distance(pool.gather(t, index, out=canvas.view), naive.gather(t.double(), index)) < 1e-6
    canvas.check()
    canvas = Canvas(t.shape, t.dtype, device, order, gap)
    got = pool.scatter(c, index, window, taps, out=canvas.view)
    assert distance(got, naive.scatter(c.double(), index, POOLS[1][4])) < 1e-6
    canvas.check()


def test_a_block_that_all_samples_share(device):
    (t, c), (fine, coarse), index, window, taps, _ = case(2, 3, 2, POOLS[1], device)
    t, c = t[:, :1].expand_as(t), c[:, :1].expand_as(c)
    got = pool.gather(t, index, Factor(fine))
    assert distance(got, naive.gather(t.double(), index, fine.double())) < 1e-6
    got = pool.scatter(c, index, window, taps, Factor(coarse))
    want = naive.scatter(c.double(), index, POOLS[1][4], coarse.double())
    assert distance(got, want) < 1e-6


def test_what_is_not_finite_goes_where_it_is_chosen(device):
    x = torch.arange(16.0, device=device).view(1, 1, 4, 4)
    index = indices(x, (2, 2), (2, 2), 0, 1)
    c = torch.ones(1, 1, 1, 2, 2, device=device)
    c[..., 0, 0] = float("nan")
    got = pool.scatter(c, index, Window((4, 4), (2, 2), (0, 0), (1, 1)), (2, 2))
    assert got.isnan().sum() == 1 and got[..., 1, 1].isnan().all()


def test_nothing_and_too_much(device):
    index = torch.zeros(0, 3, 2, 2, dtype=torch.int64, device=device)
    assert pool.gather(torch.empty(2, 0, 3, 4, 4, device=device), index).shape == (2, 0, 3, 2, 2)
    index = torch.zeros(1, 3, 2, 2, 2, dtype=torch.int64, device=device)
    with pytest.raises(Unfit, match="3 axes"):
        pool.gather(torch.empty(2, 1, 3, 4, 4, 4, device=device), index)
