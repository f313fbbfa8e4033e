"""The first convolution of coloured seeds, formed from its weight, against the plain convolution of the seeds."""

import pytest
import torch
from guard import Canvas, guarded
from test_conv import CASES as SHAPES
from test_linear import diagonal

from jactri.kernels import naive
from jactri.kernels.first import first
from jactri.kernels.support import Factor, Unfit
from jactri.kernels.windows import Window

# the shapes of test_conv, each with the periods along its image
CASES = {
    "1x1": (3, 2), "3x3": (3, 5), "uneven": (4, 4), "one pixel": (1, 1), "more padding than image": (2, 2),
    "groups": (3, 3), "depthwise, two out": (2, 3), "1-d": (4,), "transposed": (3, 3), "transposed stride": (2, 3),
    "transposed dilation": (2, 3), "stride beyond taps": (2, 1), "transposed groups": (2, 3), "transposed 1-d": (2,),
    "nothing is reached": (1, 1),
}  # fmt: skip


def seeds(channels, size, colours, dtype=torch.float32):
    """(K, 1, C, *size)."""
    block = torch.ones((), dtype=dtype)
    for n, (period, start, count) in zip((channels, *size), colours, strict=True):
        here = torch.arange(n) % period == torch.arange(start, start + count)[:, None]
        block = block[..., None, None] * here.to(dtype)
    axes = len(colours)
    block = block.permute(*range(0, 2 * axes, 2), *range(1, 2 * axes, 2))
    return block.reshape(-1, 1, channels, *size)


def case(name, device, dtype=torch.float32):
    (I, O, groups), size, taps, stride, padding, dilation, extra = SHAPES[name]
    weight = torch.randn(I if extra else O, (O if extra else I) // groups, *taps, dtype=dtype)
    if extra is None:
        out = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(size, padding, dilation, taps, stride, strict=True)
        ]
    else:
        out = [
            (n - 1) * s - 2 * p + d * (k - 1) + e + 1
            for n, s, p, d, k, e in zip(size, stride, padding, dilation, taps, extra, strict=True)
        ]
    window = Window(tuple(out), stride, padding, dilation, groups, extra is not None)
    colours = ((I, 0, I), *((p, 0, p) for p in CASES[name]))
    return weight.to(device), window, size, colours


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_values(name, samples, device):
    weight, window, size, colours = case(name, device)
    block = seeds(colours[0][0], size, colours).to(device)
    channels = SHAPES[name][0][1]
    z = guarded(torch.randn(samples, channels, *window.size, device=device))
    after = Factor(z, "tanh") if samples > 1 else None
    want = naive.convolve(block.double(), weight.double(), window)
    if after is not None:
        want = want.cpu() * diagonal(after).cpu()
    canvas = Canvas((len(block), samples, channels, *window.size), torch.float32, device)
    got = first(guarded(weight), window, size, colours, samples, after, out=canvas.view)
    assert got is canvas.view
    torch.testing.assert_close(
        got.cpu().double(), want.cpu().expand(got.shape), rtol=1e-5, atol=1e-6
    )
    canvas.check()


@pytest.mark.parametrize("name", ["3x3", "transposed stride", "groups"])
def test_chunks_of_colours(name, device):
    weight, window, size, (channels, y, x) = case(name, device)
    colours = ((channels[0], 1, 2), y, (x[0], 1, x[0] - 1))
    block = seeds(channels[0], size, colours).to(device)
    got = first(weight, window, size, colours)
    want = naive.convolve(block.double(), weight.double(), window)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 3, 4, 2), (4, 3, 2, 1, 0)])
def test_memory_orders_and_half(order, device):
    weight, window, size, colours = case("3x3", device, torch.float16)
    want = first(weight, window, size, colours)
    canvas = Canvas(want.shape, torch.float16, device, order, 2)
    first(guarded(weight, (1, 3, 0, 2)), window, size, colours, out=canvas.view)
    same = torch.equal(canvas.view, want)
    canvas.check()
    assert same


def test_what_it_does_not_cover(device):
    weight, window, size, (channels, *rest) = case("3x3", device)
    with pytest.raises(ValueError, match="each must have its own"):
        first(weight, window, size, ((channels[0] - 1, 0, channels[0] - 1), *rest))
    cube = Window((2,) * 3, (1,) * 3, (0,) * 3, (1,) * 3)
    with pytest.raises(Unfit, match="3 axes"):
        first(torch.ones(1, 1, 1, 1, 1, device=device), cube, (2,) * 3, ((1, 0, 1),) * 4)
