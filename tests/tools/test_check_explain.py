"""`check` must pass right Jacobians and catch wrong ones; `explain` must print the plan that runs."""

import dataclasses
import functools
import re

import pytest
import torch
from common import Cube, unfollowed
from torch import nn

import jactri
from jactri._src import rules
from jactri._src.maps.linear_map import Diagonal


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

    monkeypatch.setitem(rules.REGISTRY, "SinBackward0", rules.Record(wrong))


def test_check_catches_a_wrong_rule(broken_sine):
    x = torch.randn(3)
    report = jactri.check(lambda x: (x.exp(), x.sin()), x)
    assert not report.ok
    assert report.worst == (1, 0)
    with pytest.raises(jactri.JacobianMismatch, match="MISMATCH"):
        jactri.check(torch.sin, x, raise_on_error=True)


@pytest.mark.parametrize("asked", [False, True])
def test_check_says_that_a_wrong_rule_of_ours_is_wrong(broken_sine, asked):
    report = jactri.check(lambda x: (x.exp(), x.sin()), torch.randn(3), finite_difference=asked)
    assert not report.ok
    assert re.match("jactri is off .* of output 1, input 0, torch is not", report.reason)


class WrongBackward(torch.autograd.Function):
    """A cube whose backward torch believes, and whose function a rule of jactri's knows."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


@pytest.fixture
def cube(monkeypatch):
    def right(g):
        (x,) = g.node.saved_tensors
        return g.single(g.src[0], Diagonal(lambda: 3 * x**2))

    monkeypatch.setitem(rules.REGISTRY, WrongBackward, rules.Record(right))
    return WrongBackward.apply


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_sample", [False, True])
def test_check_passes_where_torch_is_off_and_differences_agree_with_jactri(cube, per_sample, dtype):
    x = torch.tensor([[0.5, -1.2], [2.0, 0.3]], dtype=dtype)
    kw = {"per_sample": per_sample}
    report = jactri.check(lambda x: (x.exp(), cube(x)), x, finite_difference=True, **kw)
    assert report.ok, report
    assert re.match("torch is off .* of output 1, input 0, jactri is not", report.reason)
    assert report.finite_difference_rel_error < 1e-8
    assert str(report).startswith("ok: torch is off")
    # unasked, one entry is judged: not enough to pass by
    report = jactri.check(lambda x: (x.exp(), cube(x)), x, **kw)
    assert not report.ok and report.finite_difference_at is None
    assert re.match("torch is off .* of output 1, input 0, jactri is not", report.reason)


def test_check_does_not_pass_where_torch_is_off_but_jactri_is_too(cube, broken_sine):
    report = jactri.check(lambda x: (cube(x), x.sin()), torch.randn(3), finite_difference=True)
    assert not report.ok and "differences agree with neither" in report.reason


def test_check_does_not_pass_what_is_off_in_the_dtype_of_the_inputs(monkeypatch):
    def right_in_float64(g):
        (x,) = g.node.saved_tensors
        off = 1.01 if x.dtype == torch.float32 else 1.0
        return g.single(g.src[0], Diagonal(lambda: off * 3 * x**2))

    monkeypatch.setitem(rules.REGISTRY, WrongBackward, rules.Record(right_in_float64))
    x = torch.tensor([0.5, -1.2])
    assert jactri.check(WrongBackward.apply, x.double(), finite_difference=True).ok
    report = jactri.check(WrongBackward.apply, x, finite_difference=True)
    assert not report.ok
    assert report.reason.startswith("torch is off") and "off in torch.float32" in report.reason


def test_check_says_that_a_nan_of_ours_is_off(monkeypatch):
    def wrong(g):
        return g.single(g.src[0], Diagonal(lambda: torch.full(g.shape, torch.nan, dtype=g.dtype)))

    monkeypatch.setitem(rules.REGISTRY, "SinBackward0", rules.Record(wrong))
    for asked in (False, True):
        report = jactri.check(torch.sin, torch.randn(3), finite_difference=asked)
        assert not report.ok and report.reason.startswith("jactri is off"), report


def test_check_says_where_differences_cannot_tell(monkeypatch):
    """Another subgradient at a kink: both lie between the slopes to both sides."""

    def other(g):
        return g.single(g.src[0], Diagonal(lambda: torch.ones(g.shape, dtype=g.dtype)))

    monkeypatch.setitem(rules.REGISTRY, "ReluBackward0", rules.Record(other))
    report = jactri.check(torch.relu, torch.tensor([0.0, 1.0]), finite_difference=True)
    assert not report.ok and report.reason.endswith("differences agree with both")


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


LOOKS = {
    "check": jactri.check,
    "check with differences": functools.partial(jactri.check, finite_difference=True),
    "explain": jactri.explain,
    "explain compiled": functools.partial(jactri.explain, compiled=True, engine="fx"),
    "profile": functools.partial(jactri.profile, repeats=1),
    "sparsity": jactri.sparsity,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_statistics_are_as_they_were(look):
    """Of a module in training mode, that a function holds."""
    norm = nn.BatchNorm1d(4)
    before = {name: b.clone() for name, b in norm.named_buffers()}
    look(lambda x: norm(x).tanh(), torch.randn(5, 4))
    assert all(torch.equal(b, before[name]) for name, b in norm.named_buffers())
    assert norm.training


def test_check_where_each_run_in_training_goes_on():
    """Of the estimate of a largest singular value, which the next run starts from."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
    assert jactri.check(layer, torch.randn(5, 4)).ok


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


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_explain_names_the_node_that_falls_back_not_the_sum_beside_it(strategy):
    """In reverse mode the gradients of x meet in one step: of the sum first, of the opaque node last."""

    def func(x):
        return x.sin() + Cube.apply(x) + torch.linalg.eigvalsh(x + x.T)

    report = jactri.explain(func, torch.randn(3, 3), strategy=strategy)
    assert report.fallbacks == ("CubeBackward", "LinalgEighBackward0")
    fallen = [s for s in report.steps if s.fallback]
    assert {s.op for s in fallen} <= {"CubeBackward", "LinalgEighBackward0"}
    assert all(s.backend == "autograd" for s in fallen)


def test_explain_computes_no_jacobian(net, monkeypatch):
    from jactri._src.run import executor

    monkeypatch.setattr(executor, "_steps", lambda *a: pytest.fail("explain ran a sweep"))
    jactri.explain(net, torch.randn(2, 4))


def test_explain_with_chunks(net):
    report = jactri.explain(net, torch.randn(6, 4), chunk_size=1)
    assert report.chunks == 3
    assert dataclasses.is_dataclass(report)


def test_explain_of_empty_and_complex_functions():
    assert "empty" in str(jactri.explain(torch.sin, torch.randn(0, 3)))
    report = jactri.explain(lambda x: unfollowed(torch.fft.fft(x)).abs(), torch.randn(4))
    assert report.fallbacks == ("the whole function",)
    assert "complex" in str(report)
