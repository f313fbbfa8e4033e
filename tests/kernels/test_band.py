"""Dense Jacobians out of compressed ones, against a plain twin and against float64 autograd."""

import pytest
import torch
from guard import Canvas, guarded
from torch import nn

from jactri.kernels import naive
from jactri.kernels.band import dense


def support(rows, columns, reach, stride=1, device="cpu"):
    """Row r sees the columns within ``reach`` of ``r * stride``."""
    r, c = torch.arange(rows)[:, None] * stride, torch.arange(columns)[None]
    return ((r - c).abs() <= reach).to(torch.uint8).to(device)


def colours(free, sizes, periods, device):
    """Column (free, y, x) has colour (free, y % p_y, x % p_x)."""
    axes = [torch.arange(free), *(torch.arange(n) % p for n, p in zip(sizes, periods, strict=True))]
    out = axes[0]
    for a, p in zip(axes[1:], periods, strict=True):
        out = out[..., None] * p + a
    return out.flatten().to(torch.int32).to(device)


# rows and columns: free, then windowed sizes; periods
BANDS = [
    ((2, 5, 7), (3, 5, 7), (3, 3), 1, 1),
    ((1, 4, 6), (2, 8, 12), (3, 5), 1, 2),
    ((1, 1, 1), (1, 1, 1), (1, 1), 1, 1),
    ((3, 33), (2, 33), (5,), 2, 1),
    ((40, 20), (1, 20), (20,), 30, 1),
    ((1, 3, 5, 7), (1, 3, 5, 7), (1, 3, 3), 1, 1),
]


def case(band, S, device, dtype=torch.float32):
    (free_r, *size_r), (free_c, *size_c), periods, reach, stride = band
    tables = tuple(
        support(r, c, reach, stride, device) for r, c in zip(size_r, size_c, strict=True)
    )
    colour = colours(free_c, size_c, periods, device)
    rows = free_r
    for n in size_r:
        rows *= n
    values = torch.randn(S, int(colour.max()) + 1, rows, device=device).to(dtype)
    return values, colour, tables


@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("band", BANDS)
def test_every_entry_is_written_once(band, S, device):
    values, colour, tables = case(band, S, device)
    canvas = Canvas((S, values.shape[2], colour.numel()), values.dtype, device)
    assert dense(guarded(values), colour, tables, out=canvas.view) is canvas.view
    same = torch.equal(canvas.view, naive.dense(values, colour, tables))
    canvas.check()
    assert same


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype, device):
    given = case(BANDS[0], 2, device, dtype)
    assert torch.equal(dense(*given), naive.dense(*given))


@pytest.mark.parametrize("order, gap", [((0, 2, 1), 1), ((2, 1, 0), 1), ((1, 0, 2), 3)])
def test_memory_orders(order, gap, device):
    values, colour, tables = case(BANDS[1], 2, device)
    canvas = Canvas((2, values.shape[2], colour.numel()), values.dtype, device, order, gap)
    dense(guarded(values, order, gap), colour, tables, out=canvas.view)
    same = torch.equal(canvas.view, naive.dense(values, colour, tables))
    canvas.check()
    assert same


def test_samples_on_both_sides(device):
    values, colour, tables = case(BANDS[0], 3, device)
    canvas = Canvas((3, values.shape[2], 3, colour.numel()), values.dtype, device)
    dense(guarded(values), colour, tables, out=canvas.view)
    want = torch.zeros(canvas.view.shape, device=device)
    for n, block in enumerate(naive.dense(values, colour, tables)):
        want[n, :, n] = block
    same = torch.equal(canvas.view, want)
    canvas.check()
    assert same


def seeds_of(colour, count):
    out = torch.zeros(count, colour.numel(), dtype=torch.float64)
    out[colour.long(), torch.arange(colour.numel())] = 1
    return out


def test_a_convolution_forward_and_reverse(device):
    """Compressed by seeds that carry a colour each: the whole Jacobian of a 3x3 convolution of 6x7 images."""
    f = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    weight = torch.autograd.functional.jacobian(
        lambda x: f(x.view(1, 2, 6, 7)).flatten(), torch.zeros(84, dtype=torch.float64)
    )
    tables = tuple(support(n, n, 1, device=device) for n in (6, 7))
    colour = colours(2, (6, 7), (3, 3), device)
    pushed = (seeds_of(colour.cpu(), 18) @ weight.t()).to(device)
    got = dense(pushed[None], colour, tables)
    torch.testing.assert_close(got[0].cpu(), weight, rtol=0, atol=0)
    colour = colours(3, (6, 7), (3, 3), device)
    pulled = (seeds_of(colour.cpu(), 27) @ weight).to(device)
    out = torch.full((1, 126, 84), float("nan"), dtype=torch.float64, device=device)
    dense(pulled[None], colour, tuple(t.t() for t in tables), out=out.mT)
    torch.testing.assert_close(out[0].cpu(), weight, rtol=0, atol=0)


def test_nothing_to_write(device):
    values, colour, tables = case(BANDS[0], 0, device)
    assert dense(values, colour, tables).shape == (0, 70, 105)


def test_what_does_not_belong_together_is_refused(device):
    values, colour, tables = case(BANDS[0], 1, device)
    with pytest.raises(ValueError, match="int32"):
        dense(values, colour.long(), tables)
    with pytest.raises(ValueError, match="one to three"):
        dense(values, colour, ())
    with pytest.raises(ValueError, match="no multiple"):
        dense(values, colour[:-1], tables)
