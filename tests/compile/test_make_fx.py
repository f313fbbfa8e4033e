"""What `make_fx` traces is right for other values than those at hand."""

import pytest
import torch
from common import F64
from tolerances import assert_close
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import jactri
from jactri._src.base.constants import constants


def write(t):
    y = t.clone()
    y[0] = t[1] * 2
    y.mul_(2)
    return y.sin()


def fill(t):
    y = torch.zeros(3, dtype=t.dtype)
    y[:2] = t[:2] ** 2
    y[2] = 1.0
    return y * t


def scaled_in_place(t):
    y = t.cos()
    y[1].mul_(t[0])
    y[:2].mul_(t[2].detach())
    return y


def strided(t):
    y = torch.zeros(2, 3, dtype=t.dtype)
    y.t()[1] = t[:2].exp()
    return y * t


FUNCTIONS = {
    "elementwise": lambda t: t.sin() * t,
    "matrices": lambda t: torch.tanh(torch.outer(t, t) @ t),
    "write": write,
    "fill": fill,
    "scaled_in_place": scaled_in_place,
    "strided": strided,
    "index": lambda t: (t**2)[torch.tensor([2, 0])],
    "norm": lambda t: torch.linalg.vector_norm(t, 3) * t,
    "roots": lambda t: t.abs().sqrt(),
    "spectrum": lambda t: torch.fft.rfft(t).abs(),
    "softmax": lambda t: torch.softmax(t * 2, 0),
    "cumulative": lambda t: t.cumprod(0).logcumsumexp(0),
}  # fmt: skip
TRANSFORMS = {
    "jacrev": jactri.func.jacrev,
    "jacfwd": jactri.func.jacfwd,
    "hessian": lambda f: jactri.func.hessian(lambda t: f(t).square().sum()),
    "jvp": lambda f: lambda t: jactri.jvp(f, t, torch.stack([t.cos(), t]), differentiate=None)[1],
}


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_traces(name, transform, mode):
    if name == "index" and mode == "fake":
        pytest.skip("torch.tensor of numbers is no fake tensor")
    call = TRANSFORMS[transform](FUNCTIONS[name])
    x = torch.tensor([0.3, -1.2, 0.8], dtype=F64)
    graph = make_fx(call, tracing_mode=mode)(x)
    for other in (x, torch.tensor([-0.7, 0.4, 1.9], dtype=F64)):
        assert_close(graph(other), call(other), F64)


def test_numbers_and_indices_that_are_inputs():
    """A 0-d tensor is no constant, and an index may be another one."""
    x = torch.tensor([0.3, -1.2, 0.8], dtype=F64)

    def scale(x, a, i):
        return jactri.func.jacrev(lambda x: (x.sin() * a / (1 + a) + a)[i])(x)

    graph = make_fx(scale)(x, torch.tensor(2.0, dtype=F64), torch.tensor([0, 1, 2]))
    given = x + 1, torch.tensor(-3.0, dtype=F64), torch.tensor([2, 2, 0])
    assert_close(graph(*given), scale(*given), F64)


@pytest.mark.parametrize("layer", [
    lambda: nn.Linear(3, 3), lambda: nn.Conv1d(1, 2, 2, padding=1), lambda: nn.LayerNorm(3),
])  # fmt: skip
def test_networks(layer):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), layer(), nn.SiLU()).to(F64)
    x = torch.randn(2, 1, 3, dtype=F64)
    call = jactri.func.jacrev(net)
    graph = make_fx(lambda x: call(x))(x)
    assert_close(graph(x + 0.5), call(x + 0.5), F64)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_nothing_of_a_trace_is_kept(mode):
    before = {id(t) for t in constants()}
    x = torch.randn(3, dtype=torch.float32)
    make_fx(jactri.func.jacrev(lambda t: t.abs().sum() * t), tracing_mode=mode)(x)
    assert {id(t) for t in constants()} <= before
    assert_close(jactri.jacobian(torch.abs, x), torch.diag(x.sign()), torch.float32)
