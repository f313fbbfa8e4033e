"""Matrices are made ready for kernels once a call, whatever its chunks and sweeps, and anew in the next call."""

import copy
from itertools import chain as joined
from itertools import pairwise

import pytest
import torch
from precision import distance
from torch import nn

import jactri
from jactri._src.device import chooser
from jactri.kernels import operands, support
from jactri.kernels.support import Ready


@pytest.fixture
def made(monkeypatch):
    """The shapes of the matrices that were prepared, launch by launch."""
    found, plain = [], operands._prepared

    def spy(matrices, precision):
        found.append([tuple(m.shape) for m in matrices])
        return plain(matrices, precision)

    monkeypatch.setattr(operands, "_prepared", spy)
    chooser.forget()
    yield found
    chooser.forget()


def mlp(*widths):
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Two(nn.Module):
    """Two outputs: in reverse two sweeps, which share all but the last layers."""

    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = mlp(20, 24, 18), nn.Linear(18, 17), nn.Linear(18, 19)

    def forward(self, x):
        y = self.body(x).tanh()
        return self.a(y), self.b(y)


class Field(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).sin().sum(1)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 16, 2), nn.Tanh(), nn.Conv2d(16, 17, 2), nn.Tanh(), nn.Flatten(), nn.Linear(17, 3)
    )  # fmt: skip


def jacobian(f, x, **options):
    rows = jactri.jacobian(f, x, per_sample=True, **options)
    return torch.cat([r.flatten(1) for r in rows], 1) if isinstance(rows, tuple) else rows


def laplacian(f, x, **options):
    return jactri.laplacian(f, x, **options)


CALLS = {
    # (a call, the module, the input, what makes it run in parts)
    "chunks, narrow": (jacobian, lambda: mlp(20, 40, 33, 21), (5, 20), {"chunk_size": 6}),
    "chunks, wide": (jacobian, lambda: mlp(17, 129, 130, 18), (2, 17), {"chunk_size": 9}),
    "two outputs": (jacobian, Two, (5, 20), {"strategy": "reverse-mode"}),
    "convolutions": (jacobian, convolutions, (2, 2, 3, 3), {"chunk_size": 2, "strategy": "reverse-mode"}),
    "Laplacian": (laplacian, lambda: Field(mlp(6, 33, 40, 21)), (5, 6), {"chunk_size": 2}),
    "Laplacian, wide": (laplacian, lambda: Field(mlp(4, 129, 130, 17)), (2, 4), {"chunk_size": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_once_a_call(name, made, device):
    call, module, size, options = CALLS[name]
    torch.manual_seed(0)
    f, x = module().to(device), torch.randn(size, device=device)
    truth = copy.deepcopy(f).double()
    for _ in range(2):
        made.clear()
        got = call(f, x, backend="triton", **options)
        assert distance(got, call(truth, x.double(), backend="torch")) <= 3e-6
        first = list(joined(*made))
        assert first and len(first) == len(set(first)), first
        with torch.no_grad():  # behind the back of every version
            for p, q in zip(f.parameters(), truth.parameters(), strict=True):
                p.data.mul_(0.75)
                q.data.copy_(p)


def test_several_kernels_have_their_matrices_from_one_launch(made, device):
    f = mlp(20, 129, 17, 130, 129).to(device)
    jactri.jacobian(f, torch.randn(3, 20, device=device), per_sample=True, backend="triton")
    assert len(made) == 1 and len(made[0]) > 1


def test_the_last_matrices_stay_whatever_their_size(monkeypatch, device):
    monkeypatch.setattr(support, "MOST_READY", 4 * 16 * 16 * 3)
    ready = Ready()
    given = [torch.randn(16, n, device=device).t() for n in (17, 18, 19)]
    for m in given:
        (p,) = operands.prepare([m], "bf16x6", ready)
        assert len(ready) == 1 and ready.find(m, "bf16x6") is p
    both = operands.prepare(given[:2], "bf16x6", ready)
    assert [ready.find(m, "bf16x6") for m in given] == [*both, None]
    # another look at the same memory, and another way, are others
    assert ready.find(given[0].t(), "bf16x6") is None and ready.find(given[0], "tf32x3") is None


def test_an_address_is_not_used_again_while_it_is_known(device):
    ready = Ready()
    for n in range(20):
        m = torch.full((20, 17), float(n), device=device)
        (p,) = operands.prepare([m], "tf32", ready)
        assert p.values[0] == n
        del m
    assert len(ready) == 20


def test_a_choice_is_timed_with_what_it_makes_of_matrices(made, device):
    """As the first chunk of a call, which finds nothing ready."""
    t, ready = torch.randn(3, 5, 20, device=device), Ready()
    chain = chooser.Chain(
        t, (torch.randn(20, 24, device=device),), (None, None), lambda: [None, None], ready
    )
    way = chooser.Way((("step", 1),), "bf16x6")
    for _ in range(2):
        chain.launch(way)
    assert len(made) == 1
    for _ in range(2):
        chain.timed().launch(way)
    assert len(made) == 3
