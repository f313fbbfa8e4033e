"""Functions that hold something, each with what changes it: ``CHANGES[name]()`` gives both."""

import functools
import sys
import types

import numpy as np
import torch
from common import F64
from test_compiled_operators import field
from torch import nn

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


PAIR = (torch.ones(4, dtype=F64), 2.0)
CONFIG = types.SimpleNamespace(rate=2.0)
NESTED = {"a": {"b": {"c": {"d": [2.0]}}}}


class Rates:
    rate = 2.0
    _hidden = 2.0

    @property
    def hidden(self):
        return self._hidden

    @classmethod
    def by_class(cls, x):
        return x * cls.rate

    @staticmethod
    def by_name(x):
        return x * Rates.rate


class Private:
    __slots__ = ("__a", "net")

    def __init__(self):
        self.set(2.0)
        self.net = Encoder()

    def set(self, a):
        self.__a = a

    def step(self, x):
        return self.net.encode(x) * self.__a


class Encoder(nn.Module):
    scale = 2.0

    def __init__(self):
        super().__init__()
        self.shift = torch.zeros(4, dtype=F64)
        self.w0, self.w1 = torch.ones(4, dtype=F64), torch.ones(4, dtype=F64)
        self.act = torch.tanh
        self.ws = nn.ParameterDict({"a": torch.ones(4, dtype=F64)})

    def encode(self, x):
        return self.act(x * self.scale + self.shift)

    def by_name(self, x):
        return sum(x.sin() * getattr(self, f"w{i}") for i in range(2))

    def of_all(self, x):
        return sum(x.sin() * w for w in self.parameters())

    def __call__(self, x):
        return super().__call__(x) * self.scale

    def forward(self, x):
        return x.tanh()


def with_pair(x):
    return (x * PAIR[0]).tanh()


def with_config(x):
    return (x * CONFIG.rate).tanh()


def with_class(x):
    return (x * Rates.rate).tanh()


def with_nested(x):
    return (x * NESTED["a"]["b"]["c"]["d"][0]).tanh()


def with_property(x, rates=Rates()):  # noqa: B008
    return (x * rates.hidden).tanh()


def deep(x, levels=7):
    return with_config(x) if levels == 0 else deep(x, levels - 1)


def put(name, value):
    return lambda: globals().__setitem__(name, value)


def of_functional_call():
    net = field()
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    cell = [params]

    def change():
        cell[0] = {n: 2 * p for n, p in params.items()}

    return lambda x: torch.func.functional_call(net, cell[0], (x,)), change


def of_module_file():
    module = types.ModuleType("helpers")
    exec("RATE = 2.0\ndef f(x):\n    return (x * RATE).tanh()", vars(module))
    return lambda x: module.f(x), lambda: setattr(module, "RATE", 3.0)


def of_stride():
    conv = nn.Conv1d(1, 2, 2, dtype=F64)
    return lambda x: conv(x.unsqueeze(1)), lambda: setattr(conv, "stride", (2,))


def another_hook():
    net = nn.Linear(4, 4, dtype=F64)
    handle = net.register_forward_hook(lambda module, args, out: out.tanh())

    def change():
        handle.remove()
        net.register_forward_hook(lambda module, args, out: out.sin())

    return net, change


def of_a_hook():
    rate = [2.0]
    net = nn.Linear(4, 4, dtype=F64)
    net.register_forward_hook(lambda module, args, out: out * rate[0])
    return net, lambda: rate.__setitem__(0, 3.0)


def of_encoder(call, change):
    net = Encoder()
    return getattr(net, call), lambda: change(net)


def of_private(change):
    thing = Private()
    return lambda x: thing.step(x), lambda: change(thing)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = 2.0

    def forward(self, w):
        return w * self.by


def of_parametrization():
    net, scale = nn.Linear(4, 4, dtype=F64), Scale()
    nn.utils.parametrize.register_parametrization(net, "weight", scale)
    return net, lambda: setattr(scale, "by", 3.0)


class Inheriting(Rates):
    pass


def with_inherited(x):
    return (x * Inheriting.rate).tanh()


def with_import(x):
    from helpers_of_held import RATE as rate

    return (x * rate).tanh()


def with_mask(x, net=Encoder()):  # noqa: B008
    return (x * getattr(net, "mask", 1.0)).tanh()


def of_import():
    module = types.ModuleType("helpers_of_held")
    module.RATE = 2.0
    sys.modules["helpers_of_held"] = module
    return with_import, lambda: setattr(module, "RATE", 3.0)


def of_forward():
    rate = 2.0

    class Net(nn.Module):
        def forward(self, x):
            return (x * rate).tanh()

    def change():
        nonlocal rate
        rate = 3.0

    return nn.Sequential(Net()), change


def of_functions(levels=20):
    rate = [2.0]
    func = lambda x: (x * rate[0]).tanh()  # noqa: E731
    for _ in range(levels):
        func = (lambda inner: lambda x: inner(x).sin())(func)
    return func, lambda: rate.__setitem__(0, 3.0)


def of_defaults():
    def func(x, rate=2.0):
        return (x * rate).tanh()

    return func, lambda: setattr(func, "__defaults__", (3.0,))


def of_function_attribute():
    def func(x):
        return (x * func.rate).tanh()

    func.rate = 2.0
    return func, lambda: setattr(func, "rate", 3.0)


def patched(name):
    net = nn.Sequential(nn.Linear(4, 4, dtype=F64), nn.Tanh())
    thing = net if name == "net" else net[1]
    return net, lambda: setattr(thing, "forward", lambda x: x.sin())


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
    "tuple of a global": lambda: (with_pair, put("PAIR", (2 * PAIR[0], 2.0))),
    "object of a global": lambda: (with_config, put("CONFIG", types.SimpleNamespace(rate=CONFIG.rate + 1))),
    "number of an object of a global": lambda: (with_config, lambda: setattr(CONFIG, "rate", CONFIG.rate + 1)),
    "number of a global of a helper of helpers": lambda: (deep, lambda: setattr(CONFIG, "rate", CONFIG.rate + 1)),
    "number of a global class": lambda: (with_class, lambda: setattr(Rates, "rate", Rates.rate + 1)),
    "number of a static method": lambda: (Rates.by_name, lambda: setattr(Rates, "rate", Rates.rate + 1)),
    "number of a class method": lambda: (Rates().by_class, lambda: setattr(Rates, "rate", Rates.rate + 1)),
    "number behind a property": lambda: (with_property, lambda: setattr(Rates, "_hidden", Rates._hidden + 1)),
    "number in lists in dictionaries": lambda: (
        with_nested, lambda: NESTED["a"]["b"]["c"]["d"].__setitem__(0, NESTED["a"]["b"]["c"]["d"][0] + 1)
    ),
    "parameters of a functional call": of_functional_call,
    "global of another file": of_module_file,
    "stride of a layer": of_stride,
    "another hook": another_hook,
    "number of a hook": of_a_hook,
    "class's number, by the instance's": lambda: of_encoder("encode", lambda net: setattr(net, "scale", 3.0)),
    "tensor for another method": lambda: of_encoder("encode", lambda net: setattr(net, "shift", PAIR[0])),
    "function": lambda: of_encoder("encode", lambda net: setattr(net, "act", torch.sin)),
    "tensor by its name": lambda: of_encoder("by_name", lambda net: setattr(net, "w1", 3 * net.w1)),
    "one more parameter": lambda: of_encoder("of_all", lambda net: net.ws.update({"b": torch.ones(4, dtype=F64)})),
    "number of a module's own call": lambda: of_encoder("__call__", lambda net: setattr(net, "scale", 3.0)),
    "number in a private slot": lambda: of_private(lambda thing: thing.set(3.0)),
    "module in a slot": lambda: of_private(lambda thing: setattr(thing.net, "scale", 3.0)),
    "number of a parametrization": of_parametrization,
    "number of a base class": lambda: (with_inherited, lambda: setattr(Rates, "rate", Rates.rate + 1)),
    "number of a class, not its base's": lambda: (with_inherited, lambda: setattr(Inheriting, "rate", 9.0)),
    "number of an imported module": of_import,
    "attribute that was not there": lambda: (with_mask, lambda: setattr(with_mask.__defaults__[0], "mask", 3.0)),
    "closure of a forward": of_forward,
    "number of the last of many functions": of_functions,
    "defaults": of_defaults,
    "attribute of a function": of_function_attribute,
    "forward of the module": lambda: patched("net"),
    "forward of a layer": lambda: patched("layer"),
}  # fmt: skip
