"""What a function holds, and `jactri.compile(..., static=True)`, which must see that it was replaced."""

import cProfile
import dataclasses
import logging
import sys

import pytest
import torch
from common import F64
from held_cases import CHANGES, Scaled
from test_compiled_operators import agree, field
from test_traced import BOTH, static, whole
from torch import nn

import jactri


@pytest.mark.parametrize("name", BOTH)
def test_replaced_parameters_layers_and_modes_are_seen(name):
    of, options = BOTH[name]
    net = nn.Sequential(*field(), nn.Dropout(0.0))
    x = torch.randn(3, 4, dtype=F64)
    compiled = static(net, x, of=of, **options)

    def change(what):
        what()
        agree(compiled, of, net, x, **options)
        agree(compiled, of, net, x + 1, **options)

    change(lambda: setattr(net[0], "weight", nn.Parameter(torch.randn(9, 4, dtype=F64))))
    change(lambda: net.__setitem__(1, nn.Sigmoid()))
    change(lambda: setattr(net[2].weight, "data", torch.randn(7, 9, dtype=F64)))
    change(net.eval)
    change(lambda: net.append(nn.Linear(4, 4, dtype=F64)))
    change(lambda: setattr(net[-1].weight, "data", net[-1].weight.data.t()))  # the same memory
    assert compiled.replans == 6 and whole(compiled)


def test_frozen_parameters_are_left_out():
    net, x = field(), torch.randn(3, 4, dtype=F64)
    compiled = static(net, x, of=jactri.parameter_jacobian)
    net[0].weight.requires_grad_(False)
    assert "0.weight" not in compiled(x)
    agree(compiled, jactri.parameter_jacobian, net, x)


@pytest.mark.parametrize("name", CHANGES)
def test_what_func_holds_is_watched(name):
    func, change = CHANGES[name]()
    x = torch.randn(3, 4, dtype=F64)
    compiled = static(func, x, per_sample=True)
    agree(compiled, jactri.jacobian, func, x + 1, per_sample=True)
    assert compiled.replans == 0 and whole(compiled)
    before = func(x)
    change()
    assert not torch.equal(func(x), before), "the change must matter"
    agree(compiled, jactri.jacobian, func, x, per_sample=True)
    assert compiled.replans == 1


def test_what_changes_before_every_call_is_not_planned_anew_for_ever(caplog):
    caplog.set_level(logging.INFO, "jactri")
    net, x = Scaled(), torch.randn(3, 4, dtype=F64)
    compiled = static(net, x, per_sample=True)
    for by in range(12):
        net.by = float(by)
        agree(compiled, jactri.jacobian, net, x, per_sample=True)
    assert not whole(compiled)
    assert "'by' changed before each of 4 calls" in caplog.text
    compiled = static(net, x, per_sample=True)
    for by in range(12):  # now and then is another matter
        net.by = float(by // 2)
        agree(compiled, jactri.jacobian, net, x, per_sample=True)
    assert whole(compiled)


def test_under_profilers_and_debuggers():
    lines = []

    def debugger(frame, event, arg):
        lines.append(event)
        return debugger

    net, x = Scaled(), torch.randn(3, 4, dtype=F64)
    before = sys.gettrace()
    with cProfile.Profile() as profile:
        sys.settrace(debugger)
        try:
            compiled = static(net, x)
            assert sys.gettrace() is debugger
        finally:
            sys.settrace(before)
        net.by = 3.0
        agree(compiled, jactri.jacobian, net, x)
    assert whole(compiled) and compiled.replans == 1
    assert lines and profile.getstats()


class Lying(list):
    def __len__(self):
        return super().__len__() + 1


def test_what_cannot_be_looked_at_is_not_static(caplog):
    caplog.set_level(logging.INFO, "jactri")
    rates, x = Lying([2.0]), torch.randn(3, 4, dtype=F64)

    def func(x):
        return (x * rates[0]).tanh()

    compiled = static(func, x)
    assert not whole(compiled) and "cannot be watched" in caplog.text
    rates[0] = 3.0
    agree(compiled, jactri.jacobian, func, x)


def test_hooks_of_all_modules():
    net, register = nn.Linear(4, 4, dtype=F64), nn.modules.module.register_module_forward_hook
    x = torch.randn(3, 4, dtype=F64)
    compiled = static(net, x)
    handle = register(lambda module, args, out: out.tanh())
    try:
        agree(compiled, jactri.jacobian, net, x)
    finally:
        handle.remove()
    agree(compiled, jactri.jacobian, net, x)
    assert compiled.replans == 2


@dataclasses.dataclass(slots=True)
class Steps:
    rate: float = 2.0
    steps: int = 0


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_is_held_and_not_used_is_let_be():
    steps, unused = Steps(), [torch.eye(3).to_sparse(), nn.LazyLinear(3)]

    def func(x):
        return (x * steps.rate).tanh() if unused else x

    x = torch.randn(3, 4, dtype=F64)
    compiled = static(func, x)
    for _ in range(6):
        steps.steps += 1
        agree(compiled, jactri.jacobian, func, x)
    assert compiled.replans == 0 and whole(compiled)


class Trainer:
    def __init__(self):
        self.net, self.losses, self.steps, self.log = field(), [], 0, {}
        self.items = list(range(100_000))

    def rates(self, x):
        return self.net(x)

    def train(self, x):
        global LOSS
        LOSS = self.rates(x).square().sum().item()
        self.losses.append(LOSS)
        self.steps += 1
        self.log[self.steps] = LOSS
        self.items.append(self.steps)


LOSS = 0.0


def test_what_func_does_not_name_may_change():
    trainer, x = Trainer(), torch.randn(3, 4, dtype=F64)
    for func in (trainer.rates, lambda x: trainer.rates(x), Scaled()):
        compiled = static(func, x)
        for k in range(3):
            trainer.train(x)
            if isinstance(func, Scaled):
                func.calls = k + 7
            agree(compiled, jactri.jacobian, func, x + k)
        assert compiled.replans == 0 and whole(compiled)


def test_settings_of_torch_are_watched():
    net, x = field(torch.float32), torch.randn(3, 4)
    compiled = static(net, x, per_sample=True, return_output=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = compiled(x)
        assert y.dtype is torch.bfloat16
    y, _ = compiled(x)
    assert y.dtype is torch.float32


def test_a_value_that_func_reads_is_compared():
    def func(x):
        return x.sin() if x.sum() > 0 else x.cos()

    x = torch.rand(3, 4, dtype=F64)
    compiled = static(func, x)
    for sign in (1, -1, 1):
        agree(compiled, jactri.jacobian, func, sign * x)
