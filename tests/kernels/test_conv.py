"""Convolutions of blocks against float64: values, every element written, nothing else touched."""

import pytest
import torch
from guard import Canvas, guarded
from precision import WAYS, distance, limit
from test_linear import constants, diagonal
from torch.nn import functional as F

from jactri.kernels import conv, direct, naive
from jactri.kernels.activations import DERIVATIVES
from jactri.kernels.linear import Config
from jactri.kernels.support import Factor, Unfit, convolution_precision
from jactri.kernels.windows import MOST_ROWS, Window, divisor

KERNELS = ["conv", "direct"]
# channels in, out, groups; image in; taps, stride, padding, dilation; transposed, output padding
CASES = {
    "1x1": ((5, 7, 1), (4, 5), (1, 1), (1, 1), (0, 0), (1, 1), None),
    "1x1 stride 2": ((5, 7, 1), (5, 4), (1, 1), (2, 2), (0, 0), (1, 1), None),
    "3x3": ((5, 7, 1), (4, 5), (3, 3), (1, 1), (1, 1), (1, 1), None),
    "3x3, 20 channels": ((20, 17, 1), (3, 4), (3, 3), (1, 1), (1, 1), (1, 1), None),
    "3x3, 32 channels": ((32, 3, 1), (3, 3), (3, 3), (2, 1), (1, 1), (1, 1), None),
    "uneven": ((2, 3, 1), (7, 9), (3, 2), (2, 3), (1, 0), (2, 1), None),
    "one pixel": ((3, 2, 1), (1, 1), (3, 3), (1, 1), (1, 1), (1, 1), None),
    "more padding than image": ((1, 2, 1), (2, 2), (2, 2), (2, 2), (3, 3), (1, 1), None),
    "groups": ((6, 4, 2), (4, 3), (3, 3), (1, 1), (1, 1), (1, 1), None),
    "depthwise": ((5, 5, 5), (4, 5), (3, 3), (1, 2), (1, 1), (1, 1), None),
    "depthwise, two out": ((3, 6, 3), (4, 3), (3, 3), (1, 1), (1, 1), (1, 1), None),
    "1-d": ((3, 4, 1), (9,), (3,), (2,), (1,), (1,), None),
    "transposed": ((5, 7, 1), (3, 4), (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)),
    "transposed stride": ((5, 4, 1), (3, 4), (3, 4), (2, 3), (1, 1), (1, 1), (1, 2)),
    "transposed, 32 channels": ((32, 3, 1), (3, 2), (3, 3), (2, 2), (1, 1), (1, 1), (0, 1)),
    "transposed dilation": ((3, 2, 1), (3, 3), (3, 2), (2, 2), (1, 0), (2, 1), (1, 0)),
    "stride beyond taps": ((3, 2, 1), (3, 2), (1, 2), (3, 3), (0, 0), (1, 1), (2, 1)),
    "transposed groups": ((6, 4, 2), (2, 3), (3, 3), (2, 1), (1, 1), (1, 1), (1, 0)),
    "transposed depthwise": ((4, 4, 4), (3, 3), (2, 2), (2, 2), (0, 0), (1, 1), (0, 0)),
    "transposed 1-d": ((3, 4, 1), (5,), (4,), (3,), (2,), (1,), (1,)),
    "nothing is reached": ((2, 2, 1), (1, 1), (1, 1), (4, 4), (0, 0), (1, 1), (3, 3)),
}  # fmt: skip
SOME = ["3x3, 20 channels", "transposed stride"]
FEW = ["groups", "transposed depthwise"]


def torchs(t, weight, name):
    """The convolution of a block by torch, in its own dtype."""
    (_, _, groups), _, _, stride, padding, dilation, extra = CASES[name]
    flat = t.flatten(0, 1)
    if extra is None:
        call = F.conv1d if weight.dim() == 3 else F.conv2d
        out = call(flat, weight, None, stride, padding, dilation, groups)
    else:
        call = F.conv_transpose1d if weight.dim() == 3 else F.conv_transpose2d
        out = call(flat, weight, None, stride, padding, extra, groups, dilation)
    return out.unflatten(0, t.shape[:2])


def operands(
    name, K, N, device, dtype=torch.float32, order=None, gap=1, acts=("tanh", "tanh"), shared=False
):
    """A block, weight, window and factors between guard zones; the order of axes holds for images of two axes."""
    (I, O, G), image, taps, stride, padding, dilation, extra = CASES[name]
    if extra is None:
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(image, taps, stride, padding, dilation, strict=True)
        ]
    else:
        size = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1 + e
            for n, k, s, p, d, e in zip(image, taps, stride, padding, dilation, extra, strict=True)
        ]
    shape = (O, I // G) if extra is None else (I, O // G)
    weight = guarded(torch.randn(*shape, *taps, device=device).to(dtype) / I**0.5, gap=gap)
    t = torch.randn(K, 1 if shared else N, I, *image, device=device).to(dtype)
    t = guarded(t.expand(K, N, *t.shape[2:]), order, gap)
    factors = [
        act and Factor(guarded(torch.randn(N, c, *s, device=device).tanh().to(dtype), gap=gap), act, constants(act))
        for act, c, s in zip(acts, (I, O), (image, size), strict=True)
    ]  # fmt: skip
    return t, weight, Window(tuple(size), stride, padding, dilation, G, extra is not None), *factors


def launch(kernel, given, way="ieee", **options):
    if kernel == "direct":
        return direct.direct(*given, **options)
    return conv.convolve(*given, precision=way, **options)


def expected(given, name, dtype=torch.float64):
    t, weight, _, before, after = given
    t = t.to(dtype) if before is None else t.to(dtype) * diagonal(before).to(dtype)
    out = torchs(t, weight.to(dtype), name)
    return out if after is None else out * diagonal(after).to(dtype)


def check(kernel, name, given, way="ieee", order=None, gap=1, **options):
    t, weight, window = given[:3]
    O = CASES[name][0][1]
    canvas = Canvas((*t.shape[:2], O, *window.size), t.dtype, t.device, order, gap)
    kept = [x.clone() for x in (t, weight)]
    assert launch(kernel, given, way, out=canvas.view, **options) is canvas.view
    truth = expected(given, name)
    plain = (
        distance(expected(given, name, torch.float32), truth) if way not in ("half", "tf32") else 0
    )
    off = distance(canvas.view, truth)
    canvas.check()
    assert off <= limit(way, t.dtype, 1, plain), off
    assert all(torch.equal(a, b) for a, b in zip(kept, (t, weight), strict=True))


@pytest.mark.parametrize(
    "kernel, name", [(k, n) for k in KERNELS for n in CASES if k == "conv" or "channels" not in n]
)
def test_arguments(kernel, name, device):
    check(kernel, name, operands(name, 2, 3, device))


@pytest.mark.parametrize("name", CASES)
def test_the_twin(name, device):
    """`naive` is torch's convolution."""
    t, weight, window, before, after = operands(name, 2, 3, device)
    d = [diagonal(f) for f in (before, after)]
    got = naive.convolve(t.double(), weight.double(), window, *d)
    assert distance(got, expected((t, weight, window, before, after), name)) < 1e-12


@pytest.mark.parametrize("way", WAYS[1:-1])
@pytest.mark.parametrize("name", SOME)
def test_precisions(name, way, device):
    check("conv", name, operands(name, 2, 3, device), way)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel, name", [("conv", n) for n in SOME] + [("direct", n) for n in FEW])
def test_half(name, kernel, dtype, device):
    check(kernel, name, operands(name, 2, 2, device, dtype), "half")


@pytest.mark.parametrize("act", DERIVATIVES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_derivative_on_both_sides(kernel, act, device):
    for acts in ((act, None), (None, act)):
        check(kernel, "1x1", operands("1x1", 1, 2, device, acts=acts))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["1x1", "transposed depthwise"])
def test_scalings_that_broadcast(name, kernel, device):
    """One number a channel, as of a normalisation in eval mode; one a pixel; one for all."""
    t, weight, window, before, after = operands(name, 2, 2, device)
    for cut in ((0, slice(None), 0, 0), (slice(None), 0, slice(None), slice(None)), (0, 0, 0, 0)):
        factors = []
        for f in (before, after):
            at = tuple(slice(i, i + 1) if i == 0 else i for i in cut)
            factors.append(Factor(f.values[at].expand(f.values.shape)))
        check(kernel, name, (t, weight, window, *factors))


@pytest.mark.parametrize(
    "order, gap", [((0, 1, 3, 4, 2), 1), ((4, 3, 2, 1, 0), 1), ((1, 0, 2, 3, 4), 2)]
)
@pytest.mark.parametrize("kernel, name", [("conv", n) for n in SOME] + [("direct", "depthwise")])
def test_memory_orders(kernel, name, order, gap, device):
    """Channels-last blocks, and worse, on both ends."""
    check(kernel, name, operands(name, 2, 2, device, order=order, gap=gap), order=order, gap=gap)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("kernel, name", [("conv", n) for n in SOME] + [("direct", "groups")])
def test_a_result_in_another_memory_order(kernel, name, last, device):
    """Channels-last blocks to images in rows, and back."""
    orders = (0, 1, 3, 4, 2), None
    given = operands(name, 2, 2, device, order=orders[last])
    check(kernel, name, given, order=orders[not last])
    got = launch(kernel, given, last=last)
    assert (got.stride(2) == 1) == last and distance(got, expected(given, name)) < 1e-6


@pytest.mark.parametrize("d", [1, 2, 3, 5, 7, 8, 9, 10, 31, 224, 1000, 65535, 65537, 2**30 - 1])
def test_division_by_a_product(d):
    """`windows.divided`, in whole numbers: around multiples of the divisor, up to the most rows."""
    _, m, s = divisor(d)
    m += (m < 0) << 32
    assert 0 < m < 1 << 32
    for near in (0, d, 5 * d, MOST_ROWS // d * d, MOST_ROWS):
        for x in range(max(near - 2, 0), min(near + 3, 1 << 31)):
            assert (2 * x * m >> 32) >> s == x // d


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_new_result_has_the_memory_format_of_the_block(kernel, device):
    given = operands("groups", 2, 1, device, order=(0, 1, 3, 4, 2))
    got = launch(kernel, given)
    assert got.stride(2) == 1 and distance(got, expected(given, "groups")) < 1e-6
    given = operands("groups", 2, 1, device)
    assert launch(kernel, given).is_contiguous()


def test_a_weight_in_channels_last_memory(device):
    t, weight, *rest = operands("groups", 2, 3, device)
    weight = weight.contiguous(memory_format=torch.channels_last)
    for kernel in KERNELS:
        check(kernel, "groups", (t, weight, *rest))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["3x3", "transposed", "depthwise"])
def test_a_block_that_all_samples_share(name, kernel, device):
    given = operands(name, 2, 3, device, shared=True)
    assert given[0].stride(1) == 0
    check(kernel, name, given)


@pytest.mark.parametrize("K, N", [(1, 1), (1, 5), (5, 1), (0, 2), (2, 0)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_seeds_and_samples(kernel, K, N, device):
    given = operands("3x3", K, N, device)
    if K and N:
        check(kernel, "3x3", given)
    else:
        assert launch(kernel, given).shape == (K, N, 7, 4, 5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_configuration(kernel, device):
    module = conv if kernel == "conv" else direct
    for config in (*module.CONFIGS, Config(16, 16, 16, 4, 1)):
        check(kernel, "groups", operands("groups", 1, 2, device), config=config)


@pytest.mark.clean_memory
@pytest.mark.parametrize("kernel", KERNELS)
def test_offsets_beyond_32_bits(kernel, device):
    """Samples 2^30 elements apart: the memory in between is reserved, and never touched."""
    given = operands("1x1", 2, 3, device)
    near = given[0]
    far = torch.empty((1 << 31) + 4096, device=device)
    far = far.as_strided(near.shape, (128, 1 << 30, *near.stride()[2:]))
    far.copy_(near)
    got = launch(kernel, (far, *given[1:]))
    assert distance(got, expected(given, "1x1")) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_finite_stays_visible(kernel, bad, device):
    given = operands("3x3", 2, 3, device, acts=(None, None))
    given[0][1, 2, 4, 3, 4] = bad
    for way in WAYS[:-1] if kernel == "conv" else ("ieee",):
        got = launch(kernel, given, way)
        hit = torch.zeros_like(got, dtype=torch.bool)
        hit[1, 2, :, 2:, 3:] = True
        assert torch.equal(~got.isfinite(), hit)


def test_images_of_three_axes_are_refused(device):
    t, w = torch.randn(1, 1, 2, 3, 3, 3, device=device), torch.randn(4, 2, 1, 1, 1, device=device)
    window = Window((3, 3, 3), *((1, 1, 1), (0, 0, 0), (1, 1, 1)))
    for kernel in KERNELS:
        with pytest.raises(Unfit, match="3 axes"):
            launch(kernel, (t, w, window))


def test_precision_follows_cudnn():
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    try:
        switch.fp32_precision = "tf32"
        assert convolution_precision(torch.float32) == "tf32"
        switch.fp32_precision = "ieee"
        assert convolution_precision(torch.float32) == "fp32"
        torch.backends.cudnn.allow_tf32 = True
        assert convolution_precision(torch.float32) == "tf32"
        torch.backends.cudnn.allow_tf32 = False
        assert convolution_precision(torch.float32) == "fp32"
        assert convolution_precision(torch.bfloat16) == "half"
    finally:
        switch.fp32_precision = before
