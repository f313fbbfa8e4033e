"""Products of weights alone, formed once: against float64 autograd, with weights that change, and what is planned."""

import copy

import pytest
import torch
from tolerances import assert_close
from torch import nn

import jactri
from jactri._src.plan import folding
from jactri._src.read.reading import read

F64 = torch.float64
MODES = ["forward-mode", "reverse-mode"]


def _net(*parts):
    torch.manual_seed(0)
    f = nn.Sequential(*parts).eval()
    for m in f.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_var.uniform_(0.5, 2)
            m.running_mean.normal_()
            if m.affine:
                nn.init.normal_(m.weight)
    return f


# network, shape of the input, pairs that are folded
CASES = {
    "conv, norm": (_net(nn.Conv2d(2, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 3)), (3, 2, 9, 8), 1),
    "norm without weights": (_net(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5, affine=False)), (2, 2, 5, 6), 1),
    "two norms": (_net(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(5), nn.Tanh()), (2, 2, 5, 6), 2),
    "groups": (_net(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Tanh()), (2, 4, 5, 6), 1),
    "transposed groups": (
        _net(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 2, 3)),
        (2, 4, 4, 3), 1,
    ),
    "lines": (_net(nn.Conv1d(2, 6, 3), nn.Conv1d(6, 2, 3, 2), nn.BatchNorm1d(2)), (2, 2, 12), 2),
    "volumes": (_net(nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4), nn.Conv3d(4, 1, 1)), (2, 1, 3, 4, 3), 2),
    "two convolutions": (_net(nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, (2, 1))), (2, 2, 9, 8), 1),
    "pixels first": (_net(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 3, 2, 2, 2), nn.Tanh()), (2, 2, 9, 8), 1),
    "pixels last": (_net(nn.Conv2d(2, 8, 3, 2, 1, 2), nn.Conv2d(8, 2, 1, 2), nn.Tanh()), (2, 2, 9, 11), 1),
    "padding between": (_net(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 2, 3, padding=1)), (2, 2, 6, 6), 0),
    "dilation": (_net(nn.Conv2d(2, 8, 3, dilation=2), nn.Conv2d(8, 2, 3)), (2, 2, 9, 9), 0),
    "a bottleneck": (_net(nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 3)), (2, 8, 5, 5), 0),
    "matrices": (_net(nn.Linear(4, 20), nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 9), nn.Linear(9, 3)), (5, 4), 2),
    "narrow matrices": (_net(nn.Linear(20, 2), nn.Linear(2, 20)), (5, 20), 0),
    "large weights, few seeds": (
        _net(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.Flatten(), nn.Linear(96, 2)), (1, 24, 2, 2), 0,
    ),
    "norm in training": (_net(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).train(), (3, 2, 5, 5), 0),
}  # fmt: skip


def graph_of(f, x):
    xs = x.clone().requires_grad_()
    ys = f(xs)
    with torch.no_grad():
        return read((ys,), (xs,))


def data(name, dtype=torch.float32):
    f, shape, pairs = CASES[name]
    gen = torch.Generator().manual_seed(0)
    return copy.deepcopy(f).to(dtype), torch.randn(shape, generator=gen, dtype=dtype), pairs


def truth(f, x):
    return torch.autograd.functional.jacobian(copy.deepcopy(f).double(), x.double())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", CASES)
def test_values_also_when_weights_change(name, dtype):
    f, x, _ = data(name, dtype)
    for how in ("as it is", "behind autograd's back", "in place"):
        with torch.no_grad():
            for p in (*f.parameters(), *f.buffers()):
                if p.dtype.is_floating_point and how != "as it is":
                    (p.data if "back" in how else p).mul_(1.25)
        want = truth(f, x)
        for mode in MODES:
            for chunk_size in (None, None, 2):
                got = jactri.jacobian(f, x, strategy=mode, chunk_size=chunk_size)
                assert_close(got, want, x.dtype, length=200)


@pytest.mark.parametrize("name", CASES)
def test_what_is_folded(name):
    f, x, pairs = data(name)
    graph = graph_of(f, x)
    with torch.no_grad():
        found = folding.fold(graph)
    assert (
        (found.recorded or found) is graph
        and graph.recorded is None
        and folding.fold(graph) is graph
    )  # grad mode: not folded
    assert (found is graph) == (pairs == 0)
    assert sum(" + " in v.op for v in found.values) > 0 or not pairs
    assert sum(not v.sources for v in found.values) == 1 + pairs
    assert (found.key == graph.key) == (pairs == 0)
    plain = jactri.jacobian(f, x, create_graph=True)
    assert plain.requires_grad
    assert_close(jactri.jacobian(f, x), plain.detach(), x.dtype, length=200)


def test_flops_and_names():
    f = _net(nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3), nn.Flatten(), nn.Linear(72, 2))
    x = torch.randn(2, 2, 8, 8)
    report = jactri.explain(f, x, per_sample=True)
    (step,) = [s for s in report.steps if s.flops]
    assert step.op == "ConvolutionBackward0 + ConvolutionBackward0"
    assert step.flops == 2 * 2 * 2 * 36 * 2 * 2 * 25  # two samples, two rows, a kernel of 5x5
    # as recorded, for one sample: 64 pixels of 8 channels, 36 of 2, and the matrix
    assert report.naive_flops == 2 * 2 * 2 * (64 * 8 * 18 + 36 * 2 * 72 + 2 * 72)
    found = jactri.profile(f, x, per_sample=True, repeats=1)
    assert any("0 Conv2d + 1 Conv2d" in s.step.layer for s in found.steps)


def test_what_is_read_twice_is_not_folded():
    a, b = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3).eval()

    def f(x):
        h = a(x)
        return b(h) * h, h

    x = torch.randn(2, 2, 3, 3)
    with torch.no_grad():
        y = f(x.requires_grad_())
    xs = x.detach().requires_grad_()
    ys = f(xs)
    with torch.no_grad():
        graph = read(ys, (xs,))
        assert folding.fold(graph) is graph
    want = torch.autograd.functional.jacobian(f, xs.detach())
    for got, w, value in zip(jactri.jacobian(f, xs.detach()), want, y, strict=True):
        assert got.shape[: value.dim()] == value.shape
        assert_close(got, w, x.dtype)


def test_compiled_calls_see_weights_change():
    f, x, _ = data("conv, norm")
    call = jactri.compile(f, x, per_sample=True, engine="fx")
    assert call.graph is not None
    for factor in (1.0, 1.25, 0.5):
        with torch.no_grad():
            for p in f.parameters():
                p.mul_(factor)
            f[1].running_var.mul_(factor)
        J = truth(f, x)
        want = torch.stack([J[n].select(3, n) for n in range(len(x))])
        assert_close(call(x), want, x.dtype, length=200)
