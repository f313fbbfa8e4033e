"""Windows of pixels through one or two convolutions, into their places: the kernel, and calls that it runs."""

from math import prod

import pytest
import torch
from guard import Canvas, guarded
from precision import WAYS, distance, limit
from test_end_to_end import MODES, _fresh  # noqa: F401
from test_window_networks import truth
from torch import nn

import jactri
from jactri._src.plan import patches as swept
from jactri.kernels import naive
from jactri.kernels import patches as kernels
from jactri.kernels.patches import Place

# sizes of windows (lines, columns, channels); which lines the first convolution connects
WINDOWS = {
    "W6": (((3, 3, 16), (5, 5, 16), (7, 7, 1)), (2, 1)),
    "odd": (((3, 3, 5), (5, 3, 7), (7, 5, 3)), (2, 1)),
    "one product": (((3, 3, 4), (5, 5, 2)), (2, 1)),
    "strides": (((2, 3, 16), (5, 7, 3), (5, 7, 2)), (2, 2)),
    "far apart": (((3, 1, 16), (9, 1, 16), (9, 1, 4)), (2, 3)),
    "lines": (((1, 3, 16), (1, 7, 16), (1, 9, 2)), (0, 1)),
    "single pixels": (((1, 1, 3), (1, 1, 40), (1, 1, 128)), (0, 1)),
    "wide": (((3, 3, 64), (3, 3, 20), (3, 3, 1)), (0, 1)),
}
SEEDS = (2, 3, 4, 5)
"""Samples, channels, lines and columns of the seed."""


def banded(sizes, reach, device):
    """A matrix without the entries of lines that are not connected."""
    (lines, *a), (lines_out, *b) = sizes
    m = torch.randn(lines * prod(a), lines_out * prod(b), device=device) / (lines * prod(a)) ** 0.5
    first = reach[1] * torch.arange(lines, device=device)[:, None]
    at = torch.arange(lines_out, device=device) - first
    seen = (at >= 0) & (at <= reach[0])
    return m * seen.repeat_interleave(prod(a), 0).repeat_interleave(prod(b), 1)


def windows(size, step, device, dtype, shared=False):
    """Windows of an image between guard zones, channels side by side, all rows' by addresses."""
    (n, _, h, w), (y, x, c) = SEEDS, size
    image = (1 if shared else n, step * (h - 1) + y, step * (w - 1) + x, 1 if shared else c)
    z = guarded(torch.rand(image, device=device).to(dtype))
    a, b, d, e = z.stride()
    strides = (0 if shared else a, step * b, step * d, b, d, 0 if shared else e)
    return z.as_strided((n, h, w, y, x, c), strides, z.storage_offset())


def operands_of(name, device, dtype=torch.float32, which=(0, 1, 2), alike=False):
    sizes, reach = WINDOWS[name]
    lead = (1, SEEDS[1], 1, 1) if alike else SEEDS
    t = torch.randn(*lead, prod(sizes[0]), device=device).to(dtype).expand(*SEEDS, -1)
    reaches = (reach, (1 << 20, 0)) if len(sizes) == 3 else ((1 << 20, 0),)
    pairs = zip(sizes, sizes[1:], reaches, strict=False)
    matrices = [guarded(banded((a, b), r, device).to(dtype)) for a, b, r in pairs]
    factors = [
        windows(s, 1 + i % 2, device, dtype, i == 2) if i in which else None
        for i, s in enumerate(sizes)
    ]
    return guarded(t), matrices, factors, sizes, reach


IMAGE, STEP, OFFSET = (6, 7), (2, 1), (-2, -1)


def places(size, kind):
    """The shape of an answer and the place of windows in it: rows of the answer, its columns, or the windows."""
    (N, K, h, w), (y, x, c), (H, W) = SEEDS, size, IMAGE
    S, V = K * h * w, c * H * W
    if kind == "block":
        shape = (*SEEDS, *size)
        strides = tuple(prod(shape[i + 1 :]) for i in range(7))
        return shape, Place(strides, 0, (0, 0), (0, 0), (y, x))
    if kind == "both":
        shape, each, a, b = (N, S, N, V), S * N * V + V, N * V, 1
    elif kind == "rows":
        shape, each, a, b = (N, S, V), S * V, V, 1
    else:
        shape, each, a, b = (N, V, S), S * V, 1, S
    strides = (each, h * w * a, w * a + STEP[0] * W * b, a + STEP[1] * b, W * b, b, H * W * b)
    return shape, Place(strides, (OFFSET[0] * W + OFFSET[1]) * b, OFFSET, STEP, IMAGE)


def check(given, way, kind="rows", dtype=torch.float32, **options):
    t, matrices, factors, sizes, reach = given
    shape, place = places(sizes[-1], kind)
    canvas = Canvas(shape, dtype, t.device)
    zeros = sizes[-1][2] * prod(IMAGE) if kind == "rows" else 0
    if not zeros:
        canvas.view.zero_()
    flat = canvas.view.view(-1)
    got = kernels.patches(
        t, matrices, factors, sizes, reach, flat, place, zeros=zeros, precision=way, **options
    )
    assert got.data_ptr() == flat.data_ptr()

    def plain(dtype):
        out = torch.zeros(prod(shape), dtype=dtype)
        to = [[None if f is None else f.cpu().to(dtype) for f in fs] for fs in (matrices, factors)]
        return naive.patches(t.cpu().to(dtype), *to, sizes[-1], out, place)

    want = plain(torch.float64)
    torchs = distance(plain(torch.float32), want) if way not in ("half", "tf32") else 0
    off, made = distance(flat.cpu(), want), flat.cpu() != 0
    canvas.check()
    assert off <= limit(way, dtype, len(matrices), torchs), off
    torch.testing.assert_close(made & (want == 0), torch.zeros_like(made))  # nothing beside


@pytest.mark.parametrize("way", WAYS[:-1])
@pytest.mark.parametrize("name", WINDOWS)
def test_shapes_and_precisions(name, way, device):
    check(operands_of(name, device), way)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["W6", "odd", "one product"])
def test_half(name, dtype, device):
    check(operands_of(name, device, dtype), "half", dtype=dtype)


@pytest.mark.parametrize("way, dtype", [("bf16x6", torch.float32), ("half", torch.float16)])
@pytest.mark.parametrize("config", [kernels.RESIDENT_CONFIG, *kernels.CONFIGS])
@pytest.mark.parametrize("name", ["W6", "strides", "far apart", "odd"])
def test_every_configuration(name, config, way, dtype, device):
    check(operands_of(name, device, dtype), way, dtype=dtype, config=config)


@pytest.mark.parametrize("kind", ["rows", "columns", "both", "block"])
@pytest.mark.parametrize("name", ["odd", "one product"])
def test_places(name, kind, device):
    check(operands_of(name, device), "tf32x3", kind)


@pytest.mark.parametrize("which", [(), (0,), (1,), (2,)])
@pytest.mark.parametrize("config", [kernels.RESIDENT_CONFIG, kernels.CONFIGS[0]])
def test_some_scalings_and_a_block_that_all_pixels_share(which, config, device):
    for way in ("ieee", "tf32"):
        check(operands_of("odd", device, which=which, alike=True), way, config=config)


def test_zeros_of_more_tiles_than_one(device, monkeypatch):
    monkeypatch.setattr(kernels, "ZEROS", 256)
    check(operands_of("odd", device), "ieee")
    check(operands_of("one product", device), "ieee", config=kernels.RESIDENT_CONFIG)


def test_nothing_to_compute(device):
    t, matrices, factors, sizes, reach = operands_of("odd", device, which=())
    _, place = places(sizes[-1], "rows")
    out = torch.empty(0, device=device)
    options = {"zeros": 3 * prod(IMAGE), "precision": "ieee"}
    got = kernels.patches(t[:0], matrices, factors, sizes, reach, out, place, **options)
    assert got is out


@pytest.mark.clean_memory
def test_offsets_beyond_32_bits(device):
    """Samples 2^30 elements apart: the memory in between is reserved, and never touched."""
    t, matrices, factors, sizes, reach = operands_of("one product", device, which=())
    shape, place = places(sizes[-1], "block")
    each = prod(shape[1:])
    t = t[:1].expand(3, *t.shape[1:])
    out = torch.empty((1 << 31) + 4096, device=device)
    far = Place((1 << 30, *place.strides[1:]), *list(vars(place).values())[1:])
    kernels.patches(t, matrices, factors, sizes, reach, out, far, precision="ieee")
    near = torch.empty(each, device=device)
    kernels.patches(t[:1], matrices, factors, sizes, reach, near, place, precision="ieee")
    for n in range(3):
        torch.testing.assert_close(out[n << 30 :][:each], near)


def test_which_windows_the_kernel_is_for(device):
    cpu = torch.device("cpu")
    assert kernels.RESIDENT_CONFIG in kernels.configs((144, 400, 49), "fp32", cpu)
    assert kernels.RESIDENT_CONFIG not in kernels.configs((288, 800, 49), "fp32", cpu)
    assert kernels.RESIDENT_CONFIG not in kernels.configs((144, 49), "fp32", cpu)
    assert kernels.configs((288, 800, 49), "fp32", cpu) == kernels.CONFIGS
    assert kernels.configs((144, 400, kernels.WIDEST_OUT + 1), "fp32", cpu) == ()


# ---- calls


def conv(i, o, k=3, padding=1, **options):
    return nn.Conv2d(i, o, k, padding=padding, **options)


def normalised(f):
    for m in f.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    return f.eval()


NETWORKS = {
    "W6": (lambda: (conv(1, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), conv(4, 1)), (10, 11), (2, 2)),
    "two layers": (lambda: (conv(2, 3), nn.Tanh(), conv(3, 2)), (8, 9), (1, 1)),
    "four layers": (
        lambda: (conv(1, 3), nn.SiLU(), conv(3, 4), nn.Tanh(), conv(4, 3), nn.ReLU(), conv(3, 1)), (12, 13), (2, 2),
    ),
    "valid": (
        lambda: (conv(1, 4, padding=0), nn.Tanh(), conv(4, 3, padding=0), nn.Tanh(), conv(3, 2, padding=0)), (16, 17),
        (2, 2),
    ),
    "odd kernels": (lambda: (conv(1, 3, (5, 3), (2, 0)), nn.GELU(), conv(3, 2, (1, 5), (0, 2))), (7, 13), (1, 1)),
    "a scaling at the end": (lambda: (conv(1, 3), nn.Tanh(), conv(3, 1), nn.Sigmoid()), (8, 9), (1, 2)),
    "two scalings": (lambda: (conv(1, 3), nn.Tanh(), nn.SiLU(), conv(3, 1)), (8, 9), (1, 1)),
    "nothing between": (lambda: (conv(1, 3), nn.Tanh(), conv(3, 2), conv(2, 1)), (10, 11), (2, 1)),
    "dilation": (lambda: (conv(1, 3), nn.Tanh(), conv(3, 1, padding=2, dilation=2)), (11, 12), (1, 1)),
    "lines": (
        lambda: (
            nn.Conv1d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 5, padding=2),
        ), (19,), (2, 2),
    ),
    "normalised": (lambda: (conv(1, 3), nn.BatchNorm2d(3), nn.Tanh(), conv(3, 1)), (8, 9), (1, 1)),
}  # fmt: skip
"""A network, its image, and how many convolutions the kernel takes forward and in reverse."""


@pytest.fixture
def launched(monkeypatch):
    """How many matrices every launch had."""
    ran, plain = [], kernels.patches

    def spy(t, matrices, *given, **options):
        ran.append(len(matrices))
        return plain(t, matrices, *given, **options)

    monkeypatch.setattr(kernels, "patches", spy)
    return ran


def made(name, n, device):
    layers, size, products = NETWORKS[name]
    torch.manual_seed(0)
    f = normalised(nn.Sequential(*layers())).to(device)
    return f, torch.randn(n, f[0].in_channels, *size, device=device), products


def run(f, x, per_sample=True, most=2e-6, **options):
    got = jactri.jacobian(f, x, per_sample=per_sample, backend="triton", **options)
    want = truth(f, x, per_sample)
    assert got.shape == want.shape and distance(got, want) <= most
    return got


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, mode, device, launched):
    f, x, products = made(name, 2, device)
    run(f, x, strategy=mode)
    assert launched == [products[mode == "reverse-mode"]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n, per_sample", [(1, True), (1, False), (3, False)])
def test_samples(n, per_sample, mode, device, launched):
    f, x, _ = made("W6", n, device)
    shape = (n, 1, 10, 11, *([] if per_sample else [n]), 1, 10, 11)
    out = torch.full(shape, float("nan"), device=device)
    assert run(f, x, per_sample, strategy=mode, out=out) is out
    assert launched == [2]


@pytest.mark.parametrize("mode", MODES)
def test_no_samples(mode, device, launched):
    f, x, _ = made("W6", 0, device)
    got = jactri.jacobian(f, x, per_sample=True, strategy=mode, backend="triton")
    assert got.shape == (0, 1, 10, 11, 1, 10, 11) and launched == []


def test_strides_widen_windows(device, launched):
    """Pulls spread a pixel over the window of a kernel, with its stride; pushes with a stride are not patches."""
    f = nn.Sequential(conv(1, 3, 3, 1, stride=2), nn.Tanh(), conv(3, 1)).to(device)
    x = torch.randn(2, 1, 17, 18, device=device)
    run(f, x, strategy="reverse-mode")
    assert launched == [1]
    up = nn.Sequential(conv(1, 3), nn.Tanh(), nn.ConvTranspose2d(3, 1, 4, 2, 1)).to(device)
    run(up, x, strategy="forward-mode")
    assert launched == [1, 1]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = conv(1, 1), conv(1, 1)

    def forward(self, x):
        h = self.first(x).tanh()
        return h + self.last(h)


NOT = {
    "groups": lambda: nn.Sequential(conv(2, 4), nn.Tanh(), conv(4, 2, groups=2)),
    "a residual": Residual,
    "too wide": lambda: nn.Sequential(conv(1, 3), nn.Tanh(), conv(3, 9)),
}


@pytest.mark.parametrize("name", NOT)
def test_what_it_does_not_cover(name, device, launched):
    f = NOT[name]().to(device)
    x = torch.randn(1, next(f.parameters()).shape[1], 7, 8, device=device)
    run(f, x, strategy="forward-mode")
    assert launched == []


@pytest.mark.parametrize("mode", MODES)
def test_chunks(mode, device, launched, monkeypatch):
    """Lines of one sample, or whole samples, at a time."""
    for name, most, launches in (("four layers", 1 << 16, 4), ("two layers", 1 << 13, 4)):
        f, x, _ = made(name, 2, device)
        monkeypatch.setattr(swept, "CHUNK_BYTES", most)
        monkeypatch.setattr("jactri._src.base.rates.BLOCK_BYTES", most)
        for per_sample in (True, False):
            launched.clear()
            run(f, x, per_sample, strategy=mode)
            assert len(launched) >= launches


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("mode", MODES)
def test_sparse_answers(layout, mode, device, launched):
    f, x, _ = made("W6", 2, device)
    got = jactri.jacobian(f, x, per_sample=True, layout=layout, strategy=mode, backend="triton")
    want = truth(f, x, True)
    assert distance(got.to_dense().view(want.shape), want) <= 2e-6
    assert launched == [2]


def test_dtypes(device, launched):
    f, x, _ = made("W6", 2, device)
    run(f.half(), x.half(), most=4e-3)
    run(f.bfloat16(), x.bfloat16(), most=4e-2)
    assert launched == [2, 2]
    run(f.double(), x.double())
    assert launched == [2, 2]


def test_explain_says_so(device):
    f, x, _ = made("W6", 2, device)
    text = str(jactri.explain(f, x, per_sample=True, backend="triton"))
    assert "triton (patches (" in text and "): 1 launch)" in text and "in the step below" in text
    assert "by patches (predicted" in text


def test_answers_of_other_forms_find_their_memory(device, launched):
    f, x, _ = made("W6", 2, device)
    out = torch.empty(2, 1, 10, 11, 1, 11, 10, device=device).transpose(-1, -2)
    assert run(f, x, out=out) is out
    assert launched == [2]


def test_what_does_not_fit_goes_to_torch(device, launched, monkeypatch):
    from jactri.kernels.support import Unfit

    def refuse(*given, **options):
        raise Unfit("no registers left")

    f, x, _ = made("W6", 2, device)
    monkeypatch.setattr(kernels, "patches", refuse)
    with pytest.warns(RuntimeWarning, match="patches .* does not run here .*no registers left"):
        run(f, x)


def test_a_pole_is_selected_away_by_torch(device, launched):
    """relu(sqrt(z)) at z = 0: autograd's relu selects 0, a product with infinity is none."""
    f = nn.Sequential(conv(1, 2), nn.ReLU(), conv(2, 1)).to(device)

    def g(x):
        return f[2](torch.relu(torch.sqrt(torch.relu(f[0](x)))))

    x = torch.randn(1, 1, 8, 9, device=device)
    got = jactri.jacobian(g, x, per_sample=True, backend="triton")
    want = jactri.jacobian(g, x, per_sample=True, backend="torch")
    torch.testing.assert_close(got, want, equal_nan=True)
