"""Compiled calls with kernels: each launch of an ordinary call is an op of the graph, and the answers are float64's."""

import copy
from collections import Counter
from itertools import pairwise

import pytest
import torch
from precision import distance
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import jactri
from jactri import chooser
from jactri.kernels import launches

F64 = torch.float64


@pytest.fixture(autouse=True)
def _fresh():
    chooser.forget()
    yield
    chooser.forget()


def launched(call):
    """Kernels that a call launches, by name: where ops are watched, launches are ops."""
    names = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.update([args[0]] if func is launches.OP else [])
            return func(*args, **(kwargs or {}))

    with Watch():
        call()
    return names


def in_graph(step):
    return Counter(n.args[0] for n in step.graph.graph.nodes if n.target is launches.OP)


class Times(nn.Module):
    """Two values that depend on the input, multiplied."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 9)

    def forward(self, x):
        return self.c(self.a(x).tanh() * self.b(x).sigmoid())


def wide(*widths):
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.SiLU())]  # fmt: skip
    return nn.Sequential(*layers[:-1])


def flat(layer, features):
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), layer, nn.Flatten(), nn.Linear(features, 3))


def images(layer):
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), layer, nn.Conv2d(4, 2, 3, padding=1))


SAMPLES = {"per_sample": True}
CASES = {
    "chain": (lambda: wide(5, 16, 12, 3), (7, 5), SAMPLES, {"chain._chain"}),
    "pair": (lambda: wide(4, 20, 150, 20), (5, 4), SAMPLES, {"chain._pair"}),
    "steps": (lambda: wide(4, 20, 140, 150), (5, 4), SAMPLES, {"linear._step"}),
    "one sample": (lambda: wide(5, 16, 12, 3), (1, 5), {}, {"chain._chain"}),
    "chunks": (lambda: wide(9, 32, 8), (6, 9), SAMPLES | {"chunk_size": 3}, {"linear._step"}),
    "softmax": (
        lambda: nn.Sequential(nn.Linear(6, 12), nn.Softmax(1), nn.Linear(12, 8)),
        (4, 6),
        SAMPLES,
        {"rows._rows", "linear._step"},
    ),
    "sum": (Times, (5, 6), SAMPLES | {"strategy": "forward-mode"}, {"elementwise._scaled_sum"}),
    "convolution": (lambda: flat(nn.Tanh(), 4 * 9), (1, 2, 3, 3), SAMPLES, {"direct._direct"}),
    "pool": (lambda: flat(nn.MaxPool2d(2), 4), (1, 2, 3, 3), SAMPLES, {"pool._scatter"}),
    "image to image": (lambda: images(nn.Tanh()), (1, 2, 9, 1), SAMPLES, {"first._first", "band._dense"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_launches_are_ops_of_the_graph(name, device):
    make, shape, options, kernels = CASES[name]
    torch.manual_seed(0)
    net = make().to(device)
    options = options | {"backend": "triton"}
    x, y = torch.randn(2, *shape, device=device)
    step = jactri.compile(net, x, engine="fx", **options)
    ordinary = launched(lambda: jactri.jacobian(net, x, **options))
    assert in_graph(step) == ordinary and kernels <= set(ordinary), ordinary
    assert f"{ordinary.total()} of them kernels of jactri" in repr(step)
    assert launched(lambda: step._last.run([y, *step._last.held()])) == ordinary
    for scale in (1.0, 1.3):
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(scale)
        plain = {k: v for k, v in options.items() if k != "backend"}
        want = jactri.jacobian(copy.deepcopy(net).to(F64), y.to(F64), **plain)
        assert distance(step(y), want) < 1e-5
    out = torch.full_like(want, torch.nan, dtype=torch.float32)
    assert step(y, out=out) is out
    assert distance(out, want) < 1e-5


OTHERS = {
    "laplacian": (jactri.laplacian, lambda net: lambda x: net(x).sum(1), {}, "laplacian."),
    "jtj": (jactri.jtj, lambda net: net, SAMPLES, "chain."),
    "diagonal": (jactri.diagonal, lambda net: net, {}, "chain."),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls(name, device):
    of, make, options, kernel = OTHERS[name]
    torch.manual_seed(0)
    net = wide(6, 16, 16, 6).to(device)
    x, y = torch.randn(2, 5, 6, device=device)
    step = jactri.compile(make(net), x, of=of, engine="fx", backend="triton", **options)
    assert any(n.startswith(kernel) for n in in_graph(step))
    want = of(make(copy.deepcopy(net).to(F64)), y.to(F64), **options)
    assert distance(step(y), want) < 1e-5
