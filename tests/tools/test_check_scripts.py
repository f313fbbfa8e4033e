"""`jactri.check` of functions that are, or call, scripts and compiled or exported modules, in float32."""

import math
import re

import pytest
import torch

import jactri

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x):
        return torch.tanh(self.linear(x) + self.shift + torch.ones(2))


def scripted(net):
    return torch.jit.script(net)


def traced(net):
    return torch.jit.trace(net, torch.randn(4, 3))


def exported(net):
    return torch.export.export(net, (torch.randn(4, 3),)).module()


def compiled(net):
    return torch.compile(net, backend="eager")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("make", [scripted, traced, exported, compiled])
def test_modules_are_compared_in_float64(make, inside):
    made = make(Net())
    net = torch.nn.Sequential(made, torch.nn.Tanh()) if inside else made
    report = jactri.check(net, torch.randn(4, 3), finite_difference=True)
    assert report.ok, report
    assert report.float64_rel_error < 1e-12
    assert report.finite_difference_rel_error < 1e-5
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(p.grad is None for p in net.parameters())


def test_a_script_that_cannot_be_reached_is_compared_in_the_dtype_of_the_inputs():
    net = torch.jit.script(Net())
    report = jactri.check(lambda x: net(x) * 2, torch.randn(4, 3), finite_difference=True)
    assert report.ok
    assert math.isnan(report.float64_rel_error)
    assert report.finite_difference_rel_error is None
    assert "pass the ScriptModule itself" in report.reason
    assert "against torch's autograd" in str(report)
    assert re.search("both in float64 +not known", str(report))


def test_a_scripts_own_error_is_raised():
    @torch.jit.script
    def func(x):
        return torch.matmul(x, torch.ones(7))

    with pytest.raises(RuntimeError, match="TorchScript"):
        jactri.check(func, torch.randn(4, 3, dtype=torch.float64))
