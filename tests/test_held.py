"""What a function holds, and `jactri.compile(..., static=True)`, which must see that it was replaced."""

import functools
import logging

import numpy as np
import pytest
import torch
from common import F64
from test_compiled_operators import agree, field
from test_traced import BOTH, static, whole
from torch import nn

import jactri
from jactri.held import Held


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


RATE = 2.0
SCALES = {"by": 2.0}


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.by, self.calls = 2.0, 0
        self.shift = torch.ones(4, dtype=F64)

    @property
    def twice(self):
        return 2 * self.by

    def inner(self, x):
        return x * self.twice

    def forward(self, x):
        return self.inner(x).tanh() + self.shift * x


class Plain:
    def __init__(self):
        self.by, self.steps = 2.0, 0

    def __call__(self, x):
        return (x * self.by).tanh()

    def step(self, x):
        return self.helper(x).tanh()

    def helper(self, x):
        return x * self.by


class Slotted(Plain):
    __slots__ = ("rate",)
    bias = 1.0

    def __init__(self):
        self.rate = 2.0

    def __call__(self, x):
        return (x * self.rate).tanh() * self.bias


def hooked():
    net = nn.Linear(4, 4, dtype=F64)
    return net, lambda: net.register_forward_hook(lambda module, args, out: out.tanh())


def of_layers():
    layers = [torch.tanh]

    def func(x):
        for layer in layers:
            x = layer(x)
        return x

    return func, lambda: layers.append(torch.sin)


def of_numpy():
    table = np.arange(4.0)
    cell = [table]
    return lambda x: x.tanh() * torch.tensor(cell[0]), lambda: cell.__setitem__(0, table + 1)


def with_global(x):
    return (x * RATE).tanh()


def with_dictionary(x):
    return (x * SCALES["by"]).tanh()


def of_closure():
    by = 2.0

    def change():
        nonlocal by
        by = 3.0

    return lambda x: (lambda: (x * by).tanh())(), change


def of_list():
    w = [torch.ones(4, dtype=F64)]
    return lambda x: (x * w[0]).tanh(), lambda: w.__setitem__(0, torch.full((4,), 3.0, dtype=F64))


def of_partial():
    w = torch.ones(4, dtype=F64)
    func = functools.partial(lambda by, x, at: (x * by).tanh() * at, w, at=2.0)
    return func, lambda: func.keywords.update(at=3.0)


def of_default():
    w = torch.ones(4, dtype=F64)

    def func(x, w=w):
        return (x * w).tanh()

    return func, lambda: setattr(w, "data", torch.full((4,), 3.0, dtype=F64))


def of_attribute(thing, name, value, call=None):
    return thing if call is None else getattr(thing, call), lambda: setattr(thing, name, value)


CHANGES = {
    "number of a module, through a property": lambda: of_attribute(Scaled(), "by", 3.0),
    "tensor of a module that is no buffer": lambda: of_attribute(Scaled(), "shift", torch.zeros(4, dtype=F64)),
    "number of an object": lambda: of_attribute(Plain(), "by", 3.0),
    "number of an object, through a method": lambda: of_attribute(Plain(), "by", 3.0, "step"),
    "number in a slot": lambda: of_attribute(Slotted(), "rate", 3.0),
    "number of a class": lambda: (Slotted(), lambda: setattr(Slotted, "bias", Slotted.bias + 1)),
    "a hook": hooked,
    "length of a list": of_layers,
    "array": of_numpy,
    "function behind a transform": lambda: (lambda f, c: (torch.func.vmap(f), c))(*of_closure()),
    "number of a closure": of_closure,
    "tensor in a list": of_list,
    "number in a partial": of_partial,
    "memory of a default": of_default,
    "number of a global": lambda: (with_global, lambda: globals().__setitem__("RATE", RATE + 1)),
    "number in a dictionary": lambda: (with_dictionary, lambda: SCALES.update(by=SCALES["by"] + 1)),
}  # fmt: skip


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


def test_numbers_that_no_code_of_func_names_may_change():
    for thing, name, func in ((Scaled(), "calls", None), (Plain(), "steps", "step")):
        func = thing if func is None else getattr(thing, func)
        held = Held(func)
        setattr(thing, name, 7)
        assert held.changed() is None


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
