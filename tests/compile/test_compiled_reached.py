"""What a compiled function reaches through modules is looked up again."""

import functools

import pytest
import torch
from common import F64
from test_compiled import agree, compile
from tolerances import assert_same_tree
from torch import nn

import jactri


class Owner:
    def __init__(self, net):
        self.net = net

    def method(self, x):
        return self.net(x).sin()

    def __call__(self, x):
        return self.net(x).cos()


NET = None


def named(x):
    return NET(x)


def reach(net):
    """Functions that reach a module, each in another way."""
    global NET
    NET = net
    owner, nets = Owner(net), {"first": [net]}
    return {
        "itself": net,
        "a closure": lambda x: net(x) * 2,
        "a bound method": owner.method,
        "a method of its own": net.forward,
        "an object": owner,
        "a partial": functools.partial(torch.func.functional_call, net, {}),
        "a keyword of a partial": functools.partial(lambda x, f: f(x), f=net),
        "a default": lambda x, f=net: f(x),
        "containers": lambda x: nets["first"][0](x),
        "a global": named,
        "a function of a function": lambda x: named(x) + 1,
        "inside": lambda x: sum(f(x) for f in [net]),
    }


@pytest.mark.parametrize("way", reach(nn.Identity()))
def test_weights_are_looked_up_again(way):
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).to(F64)
    func = reach(net)[way]
    x = torch.randn(5, 6, dtype=F64)
    compiled = compile(func, x)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    agree(compiled, func, x)
    net[0].weight = nn.Parameter(torch.randn(9, 6, dtype=F64))
    agree(compiled, func, x)
    net[0].bias.data = torch.randn(9, dtype=F64)
    agree(compiled, func, x)
    assert compiled.traces == 1
    net[2] = nn.Linear(9, 7, dtype=F64)
    agree(compiled, func, x)
    assert compiled.traces == 2
    net[2].weight.data = torch.randn(3, 9, dtype=F64)
    net[2].bias.data = torch.randn(3, dtype=F64)
    agree(compiled, func, x)
    assert compiled.traces == 3
    net.float()
    assert compiled(x.float()).dtype == torch.float32


def test_modes_and_buffers():
    net = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)).to(F64)
    net.eval()
    x = torch.randn(5, 6, dtype=F64)
    compiled = compile(net, x)
    net[1].running_mean.uniform_()
    agree(compiled, net, x)
    net[1].running_var = torch.rand(9, dtype=F64) + 0.5
    agree(compiled, net, x)
    assert compiled.traces == 1
    net.train()
    before = {k: b.clone() for k, b in net.named_buffers()}
    jactri.jacobian(net, x)
    after = {k: b.clone() for k, b in net.named_buffers()}
    net.load_state_dict({**net.state_dict(), **before})
    assert_same_tree(compiled(x), jactri.jacobian(net, x), F64, length=64)
    assert "writes to 1.num_batches_tracked" in compiled.reason
    net.load_state_dict({**net.state_dict(), **before})
    compiled(x)
    for name, b in net.named_buffers():  # each call updates them once
        torch.testing.assert_close(b, after[name])


def test_tied_weights_that_part():
    a, b = nn.Linear(4, 4, dtype=F64), nn.Linear(4, 4, dtype=F64)
    b.weight = a.weight
    net = nn.Sequential(a, nn.Tanh(), b)
    x = torch.randn(3, 4, dtype=F64)
    compiled = compile(net, x)
    agree(compiled, net, x)
    b.weight = nn.Parameter(torch.randn(4, 4, dtype=F64))
    agree(compiled, net, x)
    assert compiled.traces == 2


def test_parametrised_weights():
    net = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4, dtype=F64))
    x = torch.randn(5, 6, dtype=F64)
    compiled = compile(net, x)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    agree(compiled, net, x)
    assert compiled.traces == 1


def test_a_scale_of_no_axes_is_no_constant():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("by", torch.tensor(2.0, dtype=F64))
            self.power = nn.Parameter(torch.tensor(3.0, dtype=F64))

        def forward(self, x):
            return (x * self.by).tanh() / self.by + x.abs() ** self.power

    net, x = Scaled(), torch.rand(4, dtype=F64) + 0.5
    compiled = compile(net, x)
    for by in (2.0, 0.5, 3.0):
        net.by.fill_(by)
        net.power.data.fill_(by + 1)
        agree(compiled, net, x)
    assert compiled.traces == 1


def test_everything_else_is_as_it_was():
    """The contract's other side: Python runs while tracing only."""
    by, calls = [2.0], [0]

    def func(x):
        calls[0] += 1
        return x.sin() * by[0]

    x = torch.randn(4, dtype=F64)
    compiled = compile(func, x)
    ran = calls[0]
    by[0] = 5.0
    torch.testing.assert_close(compiled(x), torch.diag(2 * x.cos()))
    assert calls[0] == ran


def test_a_tensor_that_is_held_may_be_updated_in_place():
    w = torch.randn(4, 4, dtype=F64)
    compiled = compile(lambda x: (x @ w).sin(), torch.randn(4, dtype=F64))
    w.copy_(torch.randn(4, 4, dtype=F64))
    agree(compiled, lambda x: (x @ w).sin(), torch.randn(4, dtype=F64))
