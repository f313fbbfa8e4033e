"""`finite_difference` beside exact Jacobians, and as a part of `check`."""

import dataclasses

import pytest
import torch
from common import F64, make, x3, x23
from tolerances import assert_same_tree
from torch import nn

import jactri

# Errors of the formulas relative to the largest entry: eps^(2/3) = 4e-11 for the plain one,
# eps^(4/5) = 3e-13 by Richardson, each with a factor of 30 for the derivatives of these functions.
PLAIN = {t: 30 * torch.finfo(t).eps ** (2 / 3) for t in (F64, torch.float32)}
RICHARDSON = {t: 30 * torch.finfo(t).eps ** (4 / 5) for t in (F64, torch.float32)}


def net():
    return make(lambda: nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 2)))


def assert_near(ours, truth, error):
    """The same nesting, dtypes and devices; entries as near as the formula allows."""
    if isinstance(truth, tuple):
        assert isinstance(ours, tuple) and len(ours) == len(truth)
        for a, b in zip(ours, truth, strict=True):
            assert_near(a, b, error)
        return
    assert ours.shape == truth.shape and ours.dtype == truth.dtype and not ours.requires_grad
    if truth.numel():
        assert (ours - truth).abs().max() <= error * max(1.0, truth.abs().max().item())


CASES = {
    "module": (lambda: net(), x23),
    "vector to scalar": (lambda: torch.prod, x3),
    "0-d": (lambda: torch.sin, lambda: x3()[0]),
    "0-d to vector": (lambda: lambda x: x * x3(), lambda: x3()[0]),
    "two in, two out": (lambda: lambda x, y: (x * y.sum(), y.exp()), lambda: (x3(), x23())),
    "1-tuples": (lambda: lambda x: (x.sin(),), lambda: (x3(),)),
    "identity": (lambda: lambda x: x, x3),
    "independent input": (lambda: lambda x, y: x.sin(), lambda: (x3(), x23())),
    "constant": (lambda: lambda x: torch.ones(2, dtype=F64), x3),
    "integer output": (lambda: lambda x: (x.argmax(), x.exp()), x3),
    "not contiguous": (lambda: lambda x: x.cumsum(0) ** 2, lambda: x23().T),
    "empty input": (lambda: torch.sin, lambda: torch.zeros(0, dtype=F64)),
    "empty output": (lambda: lambda x: x[:0], x3),
    "large and small entries": (
        lambda: lambda x: (1 + x**2).log(),
        lambda: torch.tensor([0.0, 1e-9, 1e3, -1e2], dtype=F64),
    ),
    "in place": (lambda: lambda x: x.clone().mul_(2).exp_(), x3),
    "differentiates inside": (
        lambda: lambda x: torch.autograd.grad((x**3).sum(), x, create_graph=True)[0],
        x3,
    ),
    "no derivative rule": (lambda: lambda x: torch.func.grad(torch.prod)(x), x3),
}


@pytest.mark.parametrize("richardson", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_like_the_jacobian(case, richardson):
    make_func, make_inputs = CASES[case]
    func, inputs = make_func(), make_inputs()
    ours = jactri.finite_difference(func, inputs, richardson=richardson)
    error = RICHARDSON if richardson else PLAIN
    assert_near(ours, jactri.jacobian(func, inputs), error[F64])


@pytest.mark.parametrize("richardson", [False, True])
def test_float32(richardson):
    func, x = net().float(), x23().float()
    ours = jactri.finite_difference(func, x, richardson=richardson)
    error = RICHARDSON if richardson else PLAIN
    assert_near(ours, jactri.jacobian(func, x), error[torch.float32])
    # the output's rounding decides about the step
    ours = jactri.finite_difference(lambda x: func(x.float()), x.double())
    assert_near(ours, jactri.jacobian(func, x).double(), PLAIN[torch.float32])


def test_richardson_is_of_fourth_order():
    x, truth = x3(), torch.diag(x3().exp())
    errors = [
        (jactri.finite_difference(torch.exp, x, step=h, richardson=r) - truth).abs().max().item()
        for r in (False, True)
        for h in (0.2, 0.1)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[2] / errors[3] == pytest.approx(16, rel=0.05)


@pytest.mark.parametrize("richardson", [False, True])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_per_sample(n, richardson):
    def func(x, y):
        return (x * y.sum((1, 2))[:, None]).sin(), y[:, 0, 0].exp()

    inputs = torch.randn(n, 3, dtype=F64), torch.randn(n, 2, 2, dtype=F64)
    ours = jactri.finite_difference(func, inputs, per_sample=True, richardson=richardson)
    truth = jactri.jacobian(func, inputs, per_sample=True)
    assert_near(ours, truth, 10 * (RICHARDSON if richardson else PLAIN)[F64])


def test_evaluations_are_counted():
    calls = []

    def func(x):
        calls.append(x)
        return x.sin()

    x = torch.randn(8, 3, dtype=F64)
    jactri.finite_difference(func, x)
    assert len(calls) == 1 + 2 * 24
    calls.clear()
    jactri.finite_difference(func, x, per_sample=True)
    assert len(calls) == 1 + 2 * 3 + 5  # log2(8) = 3 bits, and two for how many are zero


def test_random_functions_and_what_is_left_behind():
    module = nn.Sequential(net(), nn.Dropout(0.5))
    x = x23().requires_grad_()
    before = torch.random.get_rng_state()
    ours = jactri.finite_difference(module, x)
    assert torch.equal(before, torch.random.get_rng_state())
    assert x.grad is None and x.requires_grad
    assert all(p.grad is None for p in module.parameters())
    assert_near(ours, jactri.jacobian(module, x), PLAIN[F64])
    for context in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with context():
            ours = jactri.finite_difference(module, x23())
        assert_near(ours, jactri.jacobian(module, x), PLAIN[F64])


def test_kinks_give_the_mean_slope():
    ours = jactri.finite_difference(torch.relu, torch.tensor([0.0, 1.0], dtype=F64))
    assert_same_tree(ours, torch.diag(torch.tensor([0.5, 1.0], dtype=F64)), F64, factor=1e6)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.complex64]
)
def test_inputs_without_differences(dtype):  # fmt: skip
    with pytest.raises(RuntimeError, match=r"inputs\[1\] is torch"):
        jactri.finite_difference(lambda x, y: x, (x3(), torch.ones(3).to(dtype)))


def test_bad_input():
    call = jactri.finite_difference
    for step in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="step must be a positive"):
            call(torch.sin, x3(), step=step)
    with pytest.raises(ValueError, match="so small"):
        call(torch.sin, x3(), step=1e-30)
    with pytest.raises(TypeError, match="inputs"):
        call(torch.sin, [x3()])
    with pytest.raises(TypeError, match="outputs"):
        call(lambda x: None, x3())
    with pytest.raises(IndexError, match="inputs is an empty tuple"):
        call(lambda: x3(), ())
    with pytest.raises(IndexError, match="outputs is an empty tuple"):
        call(lambda x: (), x3())
    with pytest.raises(RuntimeError, match=r"outputs\[0\] is complex"):
        call(torch.fft.fft, x3())
    with pytest.raises(ValueError, match="batch"):
        call(torch.sin, x3()[0], per_sample=True)
    with pytest.raises(RuntimeError, match="transform"):
        torch.vmap(lambda x: call(torch.sin, x))(x23())


@pytest.mark.parametrize("func", [lambda x: x - x.mean(0), lambda x: x.flip(0), lambda x: x @ x.T])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_samples_that_mix(func, dtype):
    x = torch.randn(6, 3, dtype=dtype)
    with pytest.raises(RuntimeError, match="samples mix"):
        jactri.finite_difference(func, x, per_sample=True)


# -- check -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("tupled_in", [False, True])
@pytest.mark.parametrize("tupled_out", [False, True])
def test_check_understands_every_nesting(tupled_in, tupled_out, per_sample):
    module = net().float()

    def func(*args):
        y = module(sum(args))
        return (y, y.sin()) if tupled_out else y

    inputs = (x23().float(), x23().float()) if tupled_in else x23().float()
    report = jactri.check(func, inputs, per_sample=per_sample, finite_difference=True)
    assert report.ok and report.finite_difference_rel_error < 1e-8
    assert "finite differences in float64" in str(report)


def test_check_without_it():
    report = jactri.check(torch.sin, x3())
    assert report.finite_difference_at is report.finite_difference_rel_error is None
    assert "finite" not in str(report)


class Wrong(torch.autograd.Function):
    """x^2 whose backward is off by one percent in the last entry: torch and jactri agree on it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        factor = torch.full_like(x, 2.0)
        factor[..., -1] *= 1.01
        return g * factor * x


def test_check_finds_what_torch_believes():
    assert jactri.check(Wrong.apply, x3()).ok

    def func(x, y):
        return x * y, Wrong.apply(y) + x

    report = jactri.check(func, (x3(), x3()), finite_difference=True)
    assert not report.ok and report.finite_difference_at == (1, 1, (2, 2))
    assert "output 1, input 1 is off from finite differences at entry (2, 2)" in str(report)
    with pytest.raises(jactri.JacobianMismatch, match="finite differences"):
        jactri.check(func, (x3(), x3()), finite_difference=True, raise_on_error=True)


def test_check_tells_kinks_from_mistakes():
    x = torch.tensor([-1.0, 0.0, 2.0])
    report = jactri.check(torch.relu, x, finite_difference=True)
    assert report.ok and report.finite_difference_rel_error == pytest.approx(0.5)
    assert report.finite_difference_at == (0, 0, (1, 1))
    assert report.finite_difference_gap == pytest.approx(1.0)
    assert "entry (1, 1)" in str(report) and "1 apart" in str(report)
    wide = nn.Sequential(nn.Linear(3, 400), nn.ReLU(), nn.Linear(400, 2))
    assert jactri.check(wide, torch.randn(20, 3), per_sample=True, finite_difference=True).ok


def test_check_of_half_precision_and_of_dropout():
    x = torch.randn(3, dtype=torch.bfloat16)
    assert jactri.check(lambda x: x * x, x, finite_difference=True).ok
    module = nn.Sequential(net().float(), nn.Dropout(0.5))
    state = torch.random.get_rng_state()
    assert jactri.check(module, x23().float(), finite_difference=True).ok
    assert torch.equal(state, torch.random.get_rng_state())


def test_check_with_nan_and_inf():
    report = jactri.check(torch.log, torch.tensor([0.0, 1.0, float("nan")]), finite_difference=True)
    assert report.ok and report.finite_difference_at is not None
    report = jactri.check(torch.log, torch.tensor([-1.0]), finite_difference=True)
    assert report.ok and report.finite_difference_at is None
    assert "none to compare with" in str(report)
    assert dataclasses.is_dataclass(report)


def test_check_names_the_input_of_the_worst_entry():
    """Blocks of a tuple of inputs are not those of a tuple of outputs."""
    report = jactri.check(lambda x, y: x + Wrong.apply(y), (x3(), x3()), finite_difference=True)
    assert report.finite_difference_at == (0, 1, (2, 2))
