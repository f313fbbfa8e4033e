"""What runs at once: ranges of samples and of outputs, what is kept of them, and the memory that it takes."""

import pytest
import torch
from parameter_cases import CASES, F64, build, flat, like, truth_of, whole
from test_memory import live_peak
from tolerances import assert_close
from torch import nn

import jactri
from jactri._src.parameters.used import Used


def cut(monkeypatch, held=None, at_once=None):
    """Have samples cut in ranges of so many, where they can be; returns the lengths that ran."""
    lengths, blocks = [], Used.blocks

    def of(size):
        return lambda self, *_: {0: size} if size and self.where and self.seeds[0] > size else {}

    def noted(self, sel):
        lengths.append(sel[0][1] if self.where and 0 in sel else None)
        return blocks(self, sel)

    monkeypatch.setattr(Used, "chunks", of(held))
    monkeypatch.setattr(Used, "steps", of(at_once))
    monkeypatch.setattr(Used, "blocks", noted)
    return lengths


@pytest.mark.parametrize("sizes", [(None, 3), (None, 1), (2, None), (3, 1)])
@pytest.mark.parametrize("name", CASES)
def test_ranges_of_samples(name, sizes, monkeypatch):
    module, x = build(name)
    truth, by_name = truth_of(name)
    n, m, p = truth.shape
    jac = jactri.parameter_jacobian(module, x)
    if name in ("mlp", "tokens", "cnn", "shared", "odd", "norms"):
        assert jac._run.where is not None
    lengths = cut(monkeypatch, *sizes)
    for key, j in jac.dense().items():
        want = by_name[key]
        assert_close(j, want, F64, what=key, scale=max(1.0, float(truth.abs().max())))
    if jac._run.structure is not None and jac._run.where is not None:
        size = min(s for s in sizes if s)
        assert set(lengths) == ({size, n % size} - {0} if n % size else {size})
    rows = truth.reshape(n * m, p)
    gram = (rows @ rows.t()).reshape(*jac.output.shape, *jac.output.shape)
    assert_close(jac.gram(), gram, F64, length=p)
    v = like(module, positive=True)
    want = (truth * flat(v)) @ truth.mT
    assert_close(jac.variance(v), want.reshape(n, *[*jac.output.shape[1:]] * 2), F64, length=p)
    h = torch.ones(*jac.output.shape, dtype=F64)
    made = jactri.ggn(module, x, h).diagonal()
    assert_close(flat(made), truth.square().sum((0, 1)), F64, length=n * m)


@pytest.mark.parametrize("form", ["diagonal", "trace"])
def test_batches_that_are_cut_differently(form, monkeypatch):
    """Outputs that both have in common are cut alike, though only the larger batch asks for it."""
    module, x = build("mlp")
    want = jactri.empirical_ntk(module, x, x[:2], compute=form)
    assert want.any()
    monkeypatch.setattr(Used, "chunks", lambda self, *_: {1: 2} if self.seeds[0] == 4 else {})
    assert_close(jactri.empirical_ntk(module, x, x[:2], compute=form), want, F64, length=100)
    assert_close(jactri.empirical_ntk(module, x[:2], x, compute=form), want.transpose(0, 1), F64)


def pooled(samples=24, channels=32):
    net = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(channels, 10),
    )  # fmt: skip
    return net, torch.randn(samples, 1, 28, 28)


CALLS = {
    "kernel": lambda net, x, **kw: jactri.empirical_ntk(net, x, **kw),
    "diagonal": lambda net, x, **kw: jactri.ggn(net, x, torch.ones(len(x), 10), **kw).diagonal(),
    "variance": lambda net, x, **kw: jactri.parameter_jacobian(net, x, **kw).variance(
        {name: torch.ones_like(p) for name, p in net.named_parameters()}, diagonal=True
    ),
    "matrix": lambda net, x, **kw: jactri.parameter_jacobian(net, x, **kw).matrix(),
}


@pytest.mark.clean_memory
@pytest.mark.parametrize("name", CALLS)
def test_blocks_of_an_average_are_not_there_at_once(name):
    """All cotangents of the convolution take 24 MB, its Jacobian 0.3."""
    net, x = pooled()
    call = CALLS[name]
    want = call(net.double(), x.double())
    net.float()
    forward = live_peak(lambda: net(x))
    for limit in (None, 8_000_000):
        kept = []
        found = live_peak(lambda limit=limit: kept.append(call(net, x, memory_limit=limit)))  # noqa: B023
        assert found - forward < 8_000_000, (found, forward, limit)
        (got,) = kept
        ends = (
            zip(got.values(), want.values(), strict=True) if name == "diagonal" else [(got, want)]
        )
        for a, b in ends:
            assert_close(a, b, torch.float32, length=1000)


def test_a_variance_of_many_outputs_is_no_matrix():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2000)), torch.randn(3, 4)
    v = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    jac = jactri.parameter_jacobian(net, x)
    assert live_peak(lambda: jac.variance(v, diagonal=True)) < 4_000_000  # the matrix: 48 MB
    some = net[2].weight[:7].detach(), net[2].bias[:7].detach()
    few = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 7))
    few.load_state_dict({**net.state_dict(), "2.weight": some[0], "2.bias": some[1]})
    truth, _ = whole(few.double(), x.double())
    got = jac.variance(v, diagonal=True)[:, :7]
    assert_close(got, truth.square().sum(-1), torch.float32, length=100)


def test_a_limit_that_is_too_small():
    net, x = pooled(4, 8)
    with pytest.raises(ValueError, match="one output entry of one sample at a time takes"):
        jactri.parameter_jacobian(net, x, memory_limit=20_000).gram()
