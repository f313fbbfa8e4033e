"""Convolutions as the CPU runs them: every way that `packed` has, against torch in float64."""

import itertools

import pytest
import torch
from tolerances import assert_close

from jactri._src.maps import packed
from jactri._src.maps.convolution import Conv, Geometry

SHAPES = [
    # batch, coarse and fine channels, image, kernel, stride, padding, dilation, output padding
    (3, 40, 24, (2, 2), (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)),
    (3, 40, 24, (5, 4), (3, 2), (2, 1), (1, 0), (1, 1), (0, 0)),
    (2, 64, 17, (7, 5), (3, 3), (2, 2), (2, 2), (2, 2), (0, 0)),
    (2, 64, 17, (6, 6), (5, 1), (3, 2), (2, 0), (1, 3), (0, 0)),
    (40, 8, 3, (16, 16), (7, 7), (2, 2), (3, 3), (1, 1), (0, 0)),
    (40, 8, 3, (15, 14), (4, 3), (2, 2), (1, 0), (1, 1), (0, 0)),
    (40, 8, 1, (11, 13), (3, 5), (4, 3), (1, 2), (1, 1), (0, 0)),
    (40, 8, 1, (10, 9), (2, 2), (3, 3), (0, 1), (1, 1), (0, 0)),
    (40, 5, 3, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)),
    (40, 5, 20, (8, 8), (1, 1), (2, 2), (0, 0), (1, 1), (0, 0)),
]


def both(geometry, weight, size):
    return Conv(weight.float(), geometry, size), Conv(weight, geometry, size)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_push_and_pull(shape, transposed, monkeypatch):
    batch, coarse, fine, image, kernel, stride, padding, dilation, extra = shape
    torch.manual_seed(0)
    weight = torch.randn(coarse, fine, *kernel, dtype=torch.float64)
    used = []
    for name in ("by_columns", "Packed"):
        real = getattr(packed, name)
        monkeypatch.setattr(
            f"jactri._src.maps.convolution.{name}",
            lambda *a, n=name, r=real: used.append(n) or r(*a),
        )
    geometry = Geometry(stride, padding, dilation, transposed, extra, 1)
    x = torch.randn(batch, coarse if transposed else fine, *image, dtype=torch.float64)
    single, double = both(geometry, weight, image)
    with torch.no_grad():
        y = geometry.run(x, weight)
        c = torch.randn_like(y)
        for turned in (lambda t: t, lambda t: t.clone(memory_format=torch.channels_last)):
            got, _ = single.push(turned(x.float()).unsqueeze(0), False)
            assert_close(got[0], y, torch.float32, length=kernel[0] * kernel[1] * coarse)
            got, _ = single.pull(turned(c.float()).unsqueeze(0), False)
            want, _ = double.pull(c.unsqueeze(0), False)
            assert_close(got, want, torch.float32, length=kernel[0] * kernel[1] * coarse)
    assert used


def test_all_ways_are_tried():
    """The shapes above are of use for every way."""
    found = set()
    for (batch, coarse, fine, image, kernel, stride, padding, dilation, extra), transposed in itertools.product(
        SHAPES, (False, True)
    ):  # fmt: skip
        geometry = Geometry(stride, padding, dilation, transposed, extra, 1)
        weight = torch.randn(coarse, fine, *kernel)
        x = torch.randn(batch, coarse if transposed else fine, *image)
        y = geometry.run(x, weight)
        for push, t in ((True, x), (False, y)):
            if packed.small(geometry, weight.shape, t, push):
                found.add("columns of " + ("many" if push == transposed else "few"))
                continue
            way = packed.Packed(geometry, weight, push, t.shape[2:], image)
            found.add("phases" if way.phases else "block" if way.block else "plain")
    assert found == {"columns of many", "columns of few", "phases", "block", "plain"}


@pytest.mark.parametrize("shape", SHAPES)
def test_lines(shape):
    batch, coarse, fine, image, kernel, stride, padding, dilation, extra = shape
    torch.manual_seed(1)
    weight = torch.randn(coarse, fine, kernel[1], dtype=torch.float64)
    for transposed in (False, True):
        geometry = Geometry(stride[1:], padding[1:], dilation[1:], transposed, extra[1:], 1)
        single, double = both(geometry, weight, image[1:])
        x = torch.randn(1, batch, coarse if transposed else fine, image[1], dtype=torch.float64)
        with torch.no_grad():
            y, _ = double.push(x, False)
            got, _ = single.push(x.float(), False)
            assert_close(got, y, torch.float32, length=kernel[1] * coarse)
            c = torch.randn_like(y)
            want, _ = double.pull(c, False)
            got, _ = single.pull(c.float(), False)
            assert_close(got, want, torch.float32, length=kernel[1] * coarse)


@pytest.mark.parametrize(
    "stride, dilation, padding, kernel",
    list(itertools.product((1, 2, 3), (1, 2), (0, 1, 3), (1, 2, 4))),
)
def test_columns_are_summed_as_col2im_does(stride, dilation, padding, kernel):
    """Taps that reach no pixel, and pixels that no tap reaches, are among them."""
    fine = 8, 7
    coarse = tuple((n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in fine)
    assert min(coarse) > 0
    columns = torch.randn(3, *coarse, 5, kernel, kernel, dtype=torch.float64)
    g = Geometry((stride,) * 2, (padding,) * 2, (dilation,) * 2, False, (0, 0), 1)
    flat = columns.permute(0, 3, 4, 5, 1, 2).reshape(3, 5 * kernel**2, -1)
    pairs = [(n, n) for n in (kernel, dilation, padding, stride)]
    want = torch.nn.functional.fold(flat, fine, *pairs)
    torch.testing.assert_close(packed._summed(g, columns, fine), want)
