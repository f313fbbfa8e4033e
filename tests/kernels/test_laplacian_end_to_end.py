"""jactri.laplacian(..., backend="triton") against float64, and that kernels really ran."""

import copy

import pytest
import torch
from precision import distance
from test_end_to_end import mlp
from torch import nn

import jactri
from jactri._src.base import backends
from jactri._src.device import chooser
from jactri.kernels import laplacian
from jactri.kernels.support import Unfit


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that ran, in order."""
    names = []
    for name in ("step", "chain"):
        plain = getattr(laplacian, name)

        def spy(*args, _plain=plain, _name=name, **options):
            names.append(_name)
            return _plain(*args, **options)

        monkeypatch.setattr(laplacian, name, spy)
    return names


def check(f, x, weight=None, most=2e-6, **options):
    got = jactri.laplacian(f, x, weight, return_lower=True, backend="triton", **options)
    exact = copy.deepcopy(f).double() if isinstance(f, nn.Module) else f
    own = None if weight is None else weight.double()
    want = jactri.laplacian(exact, x.double(), own, return_lower=True, backend="torch")
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == x.dtype
        assert distance(a, b) <= most


@pytest.mark.parametrize(
    "widths, kernels",
    [
        ((3, 20, 20, 1), ["chain"]),
        ((3, 20, 20, 5), ["chain"]),
        ((2, 30), []),
        ((4, 200, 150, 1), ["step"]),
        ((4, 200, 150, 40, 6), ["step", "step", "step"]),
        ((70, 40, 30, 2), ["step"]),
        ((70, 40, 3), ["step"]),
    ],
)
def test_widths_and_depths(widths, kernels, device, launched):
    f = mlp(widths, nn.SiLU).to(device)
    check(f, torch.randn(5, widths[0], device=device))
    assert launched == kernels


@pytest.mark.parametrize(
    "act", [nn.Tanh, nn.GELU, lambda: nn.GELU("tanh"), nn.ReLU, nn.Hardswish, nn.CELU, nn.Softplus, nn.Softsign]
)  # fmt: skip
def test_activations(act, device, launched):
    """Formed inside kernels from what autograd saved, or ready, or flat; more than one after a layer goes to torch."""
    check(mlp((3, 20, 20, 1), act).to(device), torch.randn(4, 3, device=device))
    assert launched or act is nn.Softsign


@pytest.mark.parametrize("samples", [False, True], ids=["one weight", "a weight a sample"])
@pytest.mark.parametrize("widths", [(3, 20, 20, 1), (4, 150, 20, 2)])
def test_weights(widths, samples, device, launched):
    """Symmetric, not definite: directions count positively or negatively."""
    n = widths[0]
    a = torch.randn((5, n, n) if samples else (n, n), device=device)
    check(mlp(widths).to(device), torch.randn(5, n, device=device), a + a.mT)
    assert launched


@pytest.mark.parametrize("shape", [(3,), (1, 3), (4, 2, 3)])
def test_shapes_of_the_input(shape, device, launched):
    """A single point; samples of several rows, whose tangents are tied to their row until the end."""
    check(mlp((3, 20, 20, 1)).to(device), torch.randn(shape, device=device))
    assert bool(launched) == (shape != (4, 2, 3))


def test_what_lies_around_a_run(device, launched):
    """Fourier features ahead of it and a sum behind it; the first layer of what is not dense yet goes to torch."""
    net, w = mlp((20, 24, 20, 2)).to(device), torch.randn(3, 20, device=device)
    x = torch.randn(4, 3, device=device)
    check(lambda x: net.to(x.dtype)(torch.sin(x @ w.to(x.dtype))).square().sum(-1), x)
    assert launched == ["chain"]
    launched.clear()
    narrow = mlp((3, 24, 20, 2)).to(device)
    check(lambda x: narrow.to(x.dtype)(x.sin()), x)
    assert launched == ["chain"]
    launched.clear()
    check(lambda x: narrow.to(x.dtype)(x), x, chunk_size=2)
    assert launched == ["chain", "chain"]


def test_a_value_that_something_else_reads_ends_a_run(device, launched):
    first, second = mlp((3, 20, 20)).to(device), mlp((20, 20, 20)).to(device)

    def residual(x):
        h = torch.tanh(first.to(x.dtype)(x))
        return h + second.to(x.dtype)(h)

    check(residual, torch.randn(4, 3, device=device))
    assert launched == ["chain", "chain"]


def test_what_stays_in_torch(device, launched):
    f = mlp((3, 20, 1)).to(device)
    x = torch.randn(4, 3, device=device)
    jactri.laplacian(f, x, backend="torch")
    jactri.laplacian(f.double(), x.double(), backend="triton")
    assert not launched
    jactri.laplacian(f.float(), x, create_graph=True)
    assert not launched


def test_a_kernel_that_does_not_fit_is_not_tried_again(device, launched, monkeypatch):
    monkeypatch.setattr(backends, "_warned", False)
    chooser.forget()

    def unfit(*args, **options):
        launched.append("unfit")
        raise Unfit("too small a device")

    monkeypatch.setattr(laplacian, "chain", unfit)
    f, x = mlp((3, 20, 20, 1)).to(device), torch.randn(4, 3, device=device)
    with pytest.warns(RuntimeWarning, match=r"laplacian\.chain .* does not run here"):
        check(f, x)
    assert set(launched) == {"unfit", "step"}
    launched.clear()
    check(f, x)
    assert launched == ["step"]
    chooser.forget()
