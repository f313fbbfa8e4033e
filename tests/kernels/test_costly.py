"""Costly derivatives are formed once where products use them often, and by the kernel where not."""

import copy

import pytest
import torch
from precision import distance
from torch import nn

import jactri
from jactri._src.device import chooser
from jactri.kernels import support
from jactri.kernels.activations import DERIVATIVES

COSTLY = {
    "elu": nn.ELU, "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh"), "silu": nn.SiLU, "mish": nn.Mish,
    "softplus": nn.Softplus, "logsigmoid": nn.LogSigmoid,
}  # fmt: skip
CHEAP = {"tanh": nn.Tanh, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "hardswish": nn.Hardswish}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    chooser.forget()
    monkeypatch.setattr(support, "FORMED_WORK", 0)
    yield
    chooser.forget()


def _used(f, x, mode):
    """The derivatives that products were given; the result is compared with float64, and with what `explain` says."""
    got = jactri.jacobian(f, x, per_sample=True, backend="triton", strategy=mode)
    truth = jactri.jacobian(copy.deepcopy(f).double(), x.double(), per_sample=True)
    assert distance(got, truth) < 1e-5
    names = {n for c in chooser.chosen() for n in c["factors"] if n}
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        plain = chooser.described
        patch.setattr(chooser, "described", lambda kind: asked.append(kind) or plain(kind))
        jactri.explain(f, x, per_sample=True, backend="triton", strategy=mode)
    assert asked and {n for kind in asked for n in kind.factors if n} == names
    return names


def _mlp(act, ins, outs):
    return nn.Sequential(nn.Linear(ins, 20), act(), nn.Linear(20, 9), act(), nn.Linear(9, outs))


@pytest.mark.parametrize("seeds", [support.FORMED_FROM - 1, support.FORMED_FROM, 13])
@pytest.mark.parametrize("name", COSTLY | CHEAP)
@pytest.mark.parametrize("mode", ["forward-mode", "reverse-mode"])
def test_by_the_number_of_seeds(mode, name, seeds, device):
    f = _mlp((COSTLY | CHEAP)[name], *((seeds, 5) if mode == "forward-mode" else (5, seeds)))
    once = name in COSTLY and seeds >= support.FORMED_FROM
    used = _used(f.to(device), torch.randn(6, f[0].in_features, device=device), mode)
    assert used == {"ready" if once else name}


@pytest.mark.parametrize("mode", ["forward-mode", "reverse-mode"])
def test_a_convolution_uses_what_is_before_it_once_a_tap(mode, device):
    f = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 3, 3), nn.Flatten()).to(device)
    x = torch.randn(2, 1, 5, 6, device=device)
    used = _used(f, x, mode)
    # in reverse 6 seeds come to the activation behind the second convolution's pull, 9 taps each to what is before
    assert used == {"ready"} if mode == "forward-mode" else used <= {"silu", "ready"}


def test_what_a_launch_costs_more_than_stays_in_the_kernel(device, monkeypatch):
    f, x = _mlp(nn.SiLU, 8, 5).to(device), torch.randn(6, 8, device=device)
    assert _used(f, x, "forward-mode") == {"ready"}
    chooser.forget()
    monkeypatch.setattr(support, "FORMED_WORK", 8 * 6 * 20 + 1)
    assert _used(f, x, "forward-mode") == {"silu"}


def test_what_is_held_to_be_costly():
    assert {n for n, d in DERIVATIVES.items() if d.costly} == {*COSTLY, "sin", "softsign"}
    assert not any(DERIVATIVES[n].costly for n in CHEAP)
