"""`check` must pass right Jacobians and catch wrong ones; `explain` must print the plan that runs."""

import dataclasses

import pytest
import torch
from torch import nn

import jactri
from jactri import rules
from jactri.linear_map import Diagonal


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))


def test_check_passes_and_reports(net):
    report = jactri.check(net, torch.randn(5, 4))
    assert report.ok and report.fallbacks == ()
    assert report.max_rel_error < 1e-5 and report.float64_rel_error < 1e-13
    assert report.jactri_ms > 0 and report.torch_ms > 0
    assert "ok" in str(report) and "float64" in str(report)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("tupled_in", [False, True])
@pytest.mark.parametrize("tupled_out", [False, True])
def test_check_understands_every_nesting(net, per_sample, tupled_in, tupled_out):
    x, z = torch.randn(5, 4), torch.randn(5, 4)

    def func(*args):
        y = net(sum(args))
        return (y, y.sin()) if tupled_out else y

    inputs = (x, z) if tupled_in else x
    assert jactri.check(func, inputs, per_sample=per_sample).ok


@pytest.fixture
def broken_sine(monkeypatch):
    # a rule with a sign error, as a bug in jactri would be
    def wrong(g):
        x = g.tensor("self")
        return g.single(g.src[0], Diagonal(lambda: -torch.cos(x)))

    monkeypatch.setitem(rules.REGISTRY, "SinBackward0", wrong)


def test_check_catches_a_wrong_rule(broken_sine):
    x = torch.randn(3)
    report = jactri.check(lambda x: (x.exp(), x.sin()), x)
    assert not report.ok
    assert report.worst == (1, 0)
    with pytest.raises(jactri.JacobianMismatch, match="MISMATCH"):
        jactri.check(torch.sin, x, raise_on_error=True)


def test_check_leaves_no_trace(net):
    net.append(nn.Dropout(0.5))
    before = [p.clone() for p in net.parameters()]
    state = torch.random.get_rng_state()
    x = torch.randn(5, 4)
    state = torch.random.get_rng_state()
    assert jactri.check(net, x).ok
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_check_converts_captured_tensors_for_float64():
    scale = torch.rand(4)  # float32 in a closure
    assert jactri.check(lambda x: (x * scale).exp(), torch.randn(4)).float64_rel_error < 1e-13


def test_check_names_fallbacks():
    a = torch.randn(3, 3) + 4 * torch.eye(3)
    report = jactri.check(torch.linalg.eigvalsh, a @ a.T)
    assert report.ok and len(report.fallbacks) == 1 and "Eigh" in report.fallbacks[0]


def test_check_with_nan_and_inf():
    assert jactri.check(torch.log, torch.tensor([0.0, 1.0, float("nan")])).ok


def test_explain_is_the_plan(net):
    x = torch.randn(6, 4)
    report = jactri.explain(net, x, per_sample=True)
    assert report.direction == "reverse-mode"
    assert [s.op for s in report.steps] == ["AddmmBackward0", "TanhBackward0", "AddmmBackward0"]
    assert [s.structure for s in report.steps] == [
        "shared matrix, no product", "diagonal", "shared matrix",
    ]  # fmt: skip
    assert all(s.columns == 3 and s.tied == "0" for s in report.steps)
    assert report.flops == sum(s.flops for s in report.steps)
    # one backward pass for each of 3 rows serves all samples, if one knows that they do not mix
    assert report.flops < report.naive_flops < 3 * report.flops
    assert jactri.explain(net, x).naive_flops == 6 * report.naive_flops
    text = str(report)
    for word in ("AddmmBackward0", "diagonal", "reverse-mode", "fallbacks: none", "flop"):
        assert word in text


def test_explain_shows_fallbacks_and_their_backend():
    report = jactri.explain(torch.linalg.eigvalsh, torch.eye(3) * torch.arange(1.0, 4.0))
    assert report.fallbacks and report.steps[0].fallback
    assert report.steps[0].backend == "autograd"


def test_explain_computes_no_jacobian(net, monkeypatch):
    from jactri import executor

    monkeypatch.setattr(executor, "_steps", lambda *a: pytest.fail("explain ran a sweep"))
    jactri.explain(net, torch.randn(2, 4))


def test_explain_with_chunks(net):
    report = jactri.explain(net, torch.randn(6, 4), chunk_size=1)
    assert report.chunks == 3
    assert dataclasses.is_dataclass(report)


def test_explain_of_empty_and_complex_functions():
    assert "empty" in str(jactri.explain(torch.sin, torch.randn(0, 3)))
    report = jactri.explain(lambda x: torch.fft.fft(x).abs(), torch.randn(4))
    assert report.fallbacks == ("the whole function",)
    assert "complex" in str(report)
