"""Messages about natural mistakes say what to write instead, and what they say works."""

import collections
import copy
import dataclasses
import inspect
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from common import unfollowed
from tolerances import assert_close
from torch import nn

import jactri
from jactri._src.base import memory

F64 = torch.float64
X = torch.linspace(-1, 1, 20, dtype=F64).view(5, 4)
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
BATCHED = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh()).double()
CONV, IMAGE = nn.Conv2d(3, 2, 3).double(), torch.linspace(-1, 1, 108, dtype=F64).view(3, 6, 6)
LSTM = nn.LSTM(4, 3, batch_first=True).double()


def solved(v):
    return torch.linalg.solve(torch.eye(20, dtype=F64) * 2, v.flatten()).view_as(v)


def turned(v):
    return unfollowed(v * 1j).abs()


class Output(collections.OrderedDict):
    """As model libraries return: a dict whose keys are attributes, too."""

    logits = property(lambda self: self["logits"])


def model(v):
    return Output(logits=NET(v), hidden=v)


@dataclasses.dataclass(slots=True)
class Slots:
    mean: torch.Tensor


class OfParameters(nn.Module):
    """A module that returns what ``of`` makes of its output."""

    def __init__(self, of):
        super().__init__()
        self.net, self.of = NET, of

    def forward(self, v):
        return self.of(self.net(v))


def picked(of, key):
    """The module with the hook that the message names."""
    module = OfParameters(of)
    module.register_forward_hook(lambda module, args, output: output[key])
    return module


def under_no_grad():
    x = X.clone().requires_grad_()
    with torch.no_grad():
        return NET(x), x


def of_a_frozen_layer(x):
    net, kept = copy.deepcopy(NET).requires_grad_(False), []
    net[0].register_forward_hook(lambda module, args, output: kept.append(output))
    return jactri.jacobian_of(net(x), kept[0])


def two(p):
    return p["a"] * p["b"].sin()


# name: the mistake, its exception, what the message must hold, and the call that it leads to
MISTAKES = {
    "numpy input": (lambda: jactri.jacobian(NET, X.numpy()), TypeError, r"torch\.from_numpy\(inputs\)",
                    lambda: jactri.jacobian(NET, torch.from_numpy(X.numpy()))),
    "a number as input": (lambda: jactri.jacobian(torch.sin, 2.0), TypeError, r"torch\.as_tensor\(2\.0\)",
                          lambda: jactri.jacobian(torch.sin, torch.as_tensor(2.0))),
    "integers": (lambda: jactri.jacobian(lambda v: v * 2.0, torch.arange(3)), RuntimeError, r"x\.float\(\)",
                 lambda: jactri.jacobian(lambda v: v * 2.0, torch.arange(3).float())),
    "an integer beside floats": (lambda: jactri.jacobian(lambda v, i: v[i], (X, torch.tensor([0, 2]))),
                                 RuntimeError, r"lambda x: func\(x, index\)",
                                 lambda: jactri.jacobian(lambda v: v[torch.tensor([0, 2])], X)),
    "list of inputs": (lambda: jactri.jacobian(torch.mul, [X, X]), TypeError, r"tuple\(inputs\)",
                       lambda: jactri.jacobian(torch.mul, (X, X))),
    "dict of inputs": (lambda: jactri.jacobian(two, {"a": X, "b": X}), TypeError, r"jactri\.func\.jacrev",
                       lambda: jactri.func.jacrev(two)({"a": X, "b": X})),
    "nested tuple": (lambda: jactri.jacobian(lambda a: a[0] * a[1], ((X, X),)), TypeError, r"pytrees.*jacrev",
                     lambda: jactri.func.jacrev(lambda a: a[0] * a[1])((X, X))),
    "None among inputs": (lambda: jactri.jacobian(NET, (X, None)), TypeError, "leave it out",
                          lambda: jactri.jacobian(NET, (X,))),
    "a model's output": (lambda: jactri.jacobian(model, X), TypeError,
                         r"lambda \*inputs: func\(\*inputs\)\.logits \(it has logits, hidden\)",
                         lambda: jactri.jacobian(lambda *inputs: model(*inputs).logits, X)),
    "a dict as output": (lambda: jactri.jacobian(lambda v: {"y": v}, X), TypeError, r"func\(\*inputs\)\['y'\]",
                         lambda: jactri.jacobian(lambda *inputs: {"y": inputs[0]}["y"], X)),
    "an object as output": (lambda: jactri.jacobian(lambda v: SimpleNamespace(mean=v), X), TypeError,
                            r"func\(\*inputs\)\.mean",
                            lambda: jactri.jacobian(lambda v: SimpleNamespace(mean=v).mean, X)),
    "list as output": (lambda: jactri.jacobian(lambda v: [NET(v)], X), TypeError, r"tuple\(func\(\*inputs\)\)",
                       lambda: jactri.jacobian(lambda *inputs: (NET(*inputs),), X)),
    "an LSTM's output": (lambda: jactri.jacobian(LSTM, X[None]), TypeError, r"func\(\*inputs\)\[0\]",
                         lambda: jactri.jacobian(lambda *inputs: LSTM(*inputs)[0], X[None])),
    "no return": (lambda: jactri.jacobian(lambda v: None, X), TypeError, "no return statement", None),
    "an array as output": (lambda: jactri.jacobian(lambda v: v.detach().numpy(), X), TypeError, "compute it in torch",
                           None),
    "argnums": (lambda: jactri.jacobian(torch.mul, (X, X), argnums=0), TypeError, r"close over.*jactri\.func\.jacrev",
                lambda: jactri.func.jacrev(torch.mul, 0)(X, X)),
    "has_aux": (lambda: jactri.jvp(NET, X, X, has_aux=True), TypeError, r"jactri\.func", None),
    "a keyword misspelt": (lambda: jactri.laplacian(lambda v: v.sum(1), X, memory="1GB"), TypeError,
                           "did you mean 'memory_limit'", None),
    "strategy": (lambda: jactri.jacobian(NET, X, strategy="reverse"), AssertionError, "did you mean 'reverse-mode'",
                 lambda: jactri.jacobian(NET, X, strategy="reverse-mode")),
    "layout": (lambda: jactri.jacobian(torch.sin, X, layout="csr"), ValueError,
               r"did you mean torch\.sparse_csr", None),
    "out for samples": (lambda: jactri.jacobian(NET, X, out=torch.empty(5, 3, 4, dtype=F64)), RuntimeError,
                        "per_sample=True", lambda: jactri.jacobian(NET, X, out=torch.empty(5, 3, 4, dtype=F64),
                                                                   per_sample=True)),
    "out for all": (lambda: jactri.jacobian(NET, X, out=torch.empty(5, 3, 5, 4, dtype=F64), per_sample=True),
                    RuntimeError, "without per_sample",
                    lambda: jactri.jacobian(NET, X, out=torch.empty(5, 3, 5, 4, dtype=F64))),
    "coordinates apart": (lambda: jactri.laplacian(lambda a, b: a * b, (X, X)), TypeError,
                          r"torch\.cat\(x, -1\).*close over",
                          lambda: jactri.laplacian(lambda p: torch.mul(*p.split(4, -1)), torch.cat((X, X), -1))),
    "a list of numbers": (lambda: jactri.jacobian(torch.sin, [1.0, 2.0]), TypeError, r"torch\.tensor\(inputs\)",
                          lambda: jactri.jacobian(torch.sin, torch.tensor([1.0, 2.0]))),
    "a text beside tensors": (lambda: jactri.jacobian(lambda v, how: v, (X, "x")), TypeError,
                              r"lambda x: func\(x, other\)", lambda: jactri.jacobian(lambda x: torch.mul(x, X), X)),
    "func behind inputs": (lambda: jactri.jacobian(X, NET), TypeError, r"first: \(func, inputs\)", None),
    "a dataclass as output": (lambda: jactri.jacobian(lambda v: Slots(v), X), TypeError, r"func\(\*inputs\)\.mean",
                              lambda: jactri.jacobian(lambda *inputs: Slots(*inputs).mean, X)),
    "what func returned": (lambda: jactri.jacobian(NET(X), X), TypeError, r"callable.*jacobian\(net, x\)",
                           lambda: jactri.jacobian(NET, X)),
    "as torch.func is called": (lambda: jactri.jacobian(NET)(X), TypeError,
                                r"jacobian\(func, inputs\).*jactri\.func\.jacrev\(func\)",
                                lambda: jactri.func.jacrev(NET)(X)),
    "as torch.func is not called": (lambda: jactri.func.jacrev(NET, X), RuntimeError, r"jacrev\(func\)\(x\)",
                                    lambda: jactri.func.jacrev(NET)(X)),
    "the order as third argument": (lambda: jactri.jacobian(NET, X, "forward-mode"), TypeError,
                                    "create_graph must be a bool, got 'forward-mode'; write strategy='forward-mode'",
                                    lambda: jactri.jacobian(NET, X, strategy="forward-mode")),
    "the gradient of an energy": (lambda: jactri.gradient(lambda v: v.square().sum(), X), ValueError,
                                  r"one number in all of x is jactri\.vjp\(func, x\)\[1\]",
                                  lambda: jactri.vjp(lambda v: v.square().sum(), X)[1]),
    "the product of two operators": (lambda: jactri.linearize(NET, X).T @ jactri.linearize(NET, X), TypeError,
                                     r"op\.gram\(\) is op\.T @ op", lambda: jactri.linearize(NET, X).gram()),
    "a solver of neighbours": (lambda: jactri.jacobian(solved, X, layout=torch.sparse_csr), ValueError,
                               "LinalgSolve.*name the entries by pattern=",
                               lambda: jactri.jacobian(solved, X, layout=torch.sparse_csr, check=True,
                                                       pattern=torch.eye(20).bool())),
    "complex inside": (lambda: jactri.jacobian(turned, X, layout=torch.sparse_csr), ValueError,
                       "no pattern is known.*name the entries by pattern=",
                       lambda: jactri.jacobian(turned, X, layout=torch.sparse_csr, check=True,
                                               pattern=torch.eye(20).bool())),
    "two inputs for one": (lambda: jactri.jacobian(torch.mul, X, X), TypeError, r"create_graph.*tuple: \(x, y\)",
                           lambda: jactri.jacobian(torch.mul, (X, X))),
    "two inputs and a name": (lambda: jactri.explain(torch.mul, X, X), TypeError, "several inputs as one tuple",
                              lambda: jactri.explain(torch.mul, (X, X))),
    "an array in func.jacrev": (lambda: jactri.func.jacrev(NET)(X.numpy()), ValueError, r"torch\.from_numpy\(x\)",
                                lambda: jactri.func.jacrev(NET)(torch.from_numpy(X.numpy()))),
    "a choice": (lambda: jactri.gradient(lambda v: NET(v).argmax(1), X), RuntimeError, "int64.*before an argmax",
                 lambda: jactri.gradient(NET, X)),
    "one sample": (lambda: jactri.jacobian(NET, X[0], per_sample=True), ValueError, r"x\.unsqueeze\(0\)",
                   lambda: jactri.jacobian(NET, X[0].unsqueeze(0), per_sample=True)),
    "one image": (lambda: jactri.laplacian(CONV, IMAGE), ValueError, r"x\.unsqueeze\(0\)",
                  lambda: jactri.laplacian(CONV, IMAGE.unsqueeze(0))),
    "what samples share": (lambda: jactri.jacobian(torch.matmul, (X, X.T), per_sample=True), ValueError,
                           r"lambda x: func\(x, shared\)",
                           lambda: jactri.jacobian(lambda x: x @ X.T, X, per_sample=True)),
    "samples that mix": (lambda: jactri.jacobian(BATCHED, X, per_sample=True), RuntimeError, r"net\.eval\(\)",
                         lambda: jactri.jacobian(copy.deepcopy(BATCHED).eval(), X, per_sample=True)),
    "out of another dtype": (lambda: jactri.jacobian(NET, X, out=torch.empty(5, 3, 5, 4)), RuntimeError,
                             r"torch\.empty\(\(5, 3, 5, 4\), dtype=torch\.float64, device='cpu'\)",
                             lambda: jactri.jacobian(NET, X, out=torch.empty((5, 3, 5, 4), dtype=F64, device="cpu"))),
    "out elsewhere": (lambda: jactri.jacobian(NET, X, out=torch.empty(5, 3, 5, 4, dtype=F64, device="meta")),
                      RuntimeError, r"meta; pass torch\.empty", None),
    "tangents elsewhere": (lambda: jactri.jvp(NET, X, X.to("meta")), RuntimeError, r"v\.to\('cpu'\)",
                           lambda: jactri.jvp(NET, X, X.to("cpu"))),
    "backend": (lambda: jactri.jacobian(NET, X, backend="Torch"), ValueError, "did you mean 'torch'",
                lambda: jactri.jacobian(NET, X, backend="torch")),
    "another layout": (lambda: jactri.jacobian(torch.sin, X, layout="sparse_coo"), ValueError,
                       r"did you mean torch\.sparse_coo",
                       lambda: jactri.jacobian(torch.sin, X, layout=torch.sparse_coo)),
    "engine": (lambda: jactri.compile(NET, X, engine="Fx"), ValueError, "did you mean 'fx'",
               lambda: jactri.compile(NET, X, engine="fx")),
    "an option of compile": (lambda: jactri.compile(NET, X, engine="fx", persample=True), TypeError,
                             "did you mean 'per_sample'", lambda: jactri.compile(NET, X, engine="fx", per_sample=True)),
    "mode": (lambda: jactri.fallback("errors").__enter__(), ValueError, "did you mean 'error'", None),
    "compute": (lambda: jactri.empirical_ntk(NET, X, compute="diag"), ValueError, "did you mean 'diagonal'",
                lambda: jactri.empirical_ntk(NET, X, compute="diagonal")),
    "randomness in func": (lambda: jactri.func.hessian(NET, randomness="same"), TypeError, r"func\.jacfwd takes",
                           lambda: jactri.func.jacfwd(NET, randomness="same")(X)),
    "computed without a graph": (lambda: jactri.jacobian_of(*under_no_grad()), RuntimeError, r"torch\.enable_grad\(\)",
                                 lambda: jactri.jacobian_of(NET(x := X.clone().requires_grad_()), x)),
    "a layer of a frozen model": (lambda: of_a_frozen_layer(X), RuntimeError, "hook, on the input of the model",
                                  lambda: of_a_frozen_layer(X.clone().requires_grad_())),
    "a module's output": (lambda: jactri.parameter_jacobian(OfParameters(lambda y: {"y": y}), X), TypeError,
                          r"register_forward_hook\(lambda module, args, output: output\['y'\]\)",
                          lambda: jactri.parameter_jacobian(picked(lambda y: {"y": y}, "y"), X)),
    "a module's state": (lambda: jactri.parameter_jacobian(OfParameters(lambda y: (y, y)), X), TypeError,
                         r"output: output\[0\]\)",
                         lambda: jactri.parameter_jacobian(picked(lambda y: (y, y), 0), X)),
    "a function's parameters": (lambda: jactri.parameter_jacobian(lambda v: NET(v), X), TypeError, "functional_call",
                                lambda: jactri.func.jacrev(lambda p: torch.func.functional_call(NET, p, X))(
                                    dict(NET.named_parameters()))),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_leads_to_the_right_call(name):
    mistake, exception, message, right = MISTAKES[name]
    with pytest.raises(exception, match=f"(?s){message}"):
        mistake()
    if right is not None:
        right()


CALLS = {
    **{name: lambda v, name=name: getattr(jactri, name)(NET, v) for name in (
        "jacobian jtj jjt jvp vjp explain check profile sparsity finite_difference gradient divergence diagonal "
        "laplacian bilaplacian parameter_jacobian empirical_ntk compile").split()},
    "ggn": lambda v: jactri.ggn(NET, v, torch.ones(5, 3, dtype=F64)),
    "jacrev": lambda v: jactri.func.jacrev(NET)(v),
    "jacfwd": lambda v: jactri.func.jacfwd(NET)(v),
    "hessian": lambda v: jactri.func.hessian(NET)(v),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "value, remedy",
    [
        (X.numpy(), "from_numpy"),
        ([1.0, 2.0], r"torch\.(as_)?tensor\("),
        ("x", "other"),
        (None, "pass"),
    ],
    ids=["an array", "numbers", "a text", "None"],
)
def test_what_is_no_tensor_is_told_what_to_be_by_every_call(name, value, remedy):
    with pytest.raises(
        ValueError if name in ("jacrev", "jacfwd", "hessian") else TypeError, match=remedy
    ):
        CALLS[name](value)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from Python 3.11 on")
@pytest.mark.parametrize(
    "call, exception, told",
    [
        (
            lambda: jactri.jacobian(NET, X.to("meta")),
            RuntimeError,
            r"func are on cpu.*x\.to\('cpu'\)",
        ),
        (
            lambda: jactri.check(lambda v: NET(v), X.float()),
            RuntimeError,
            r"of NET are.*x\.to\(torch\.float64\)",
        ),
        (
            lambda: jactri.parameter_jacobian(NET, X.long()),
            RuntimeError,
            r"int64; pass x\.to\(torch\.float64\)",
        ),
        (lambda: jactri.func.jacrev(NET)(X.float()), RuntimeError, r"x\.to\(torch\.float64\)"),
        (
            lambda: jactri.jacobian(lambda a, b: a * b, X),
            TypeError,
            r"1 input; .*func\(\*inputs, other\)",
        ),
        (
            lambda: jactri.jacobian(lambda pair: pair[0], (X, X)),
            TypeError,
            r"lambda \*inputs: func\(inputs\)",
        ),
    ],
    ids=["device", "dtype of a variable", "integers", "func.jacrev", "too few", "a tuple"],
)
def test_an_error_of_the_function_has_a_note(call, exception, told):
    with pytest.raises(exception) as raised:
        call()
    (note,) = raised.value.__notes__
    assert re.search(told, note), note


def test_other_errors_of_the_function_are_left_alone():
    def fails(v):
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$") as raised:
        jactri.jacobian(fails, X)
    assert not hasattr(raised.value, "__notes__")


def test_public_calls_keep_their_signatures():
    for name in jactri.__all__:
        call = getattr(jactri, name)
        if inspect.isfunction(call):
            assert not any(
                p.kind is p.VAR_KEYWORD for p in inspect.signature(call).parameters.values()
            ) or name in ("compile", "export")
            assert call.__doc__


@pytest.mark.parametrize("given", [None, "20KB"])
@pytest.mark.parametrize(
    "func",
    [NET, lambda v: torch.ones(len(v), 3, dtype=F64), lambda v: unfollowed(v[:, :3] + 1j).abs()],
    ids=["a network", "no dependence", "complex inside"],
)
def test_an_answer_that_does_not_fit_is_refused_before_it_is_taken(monkeypatch, func, given):
    monkeypatch.setattr(memory, "LARGE", 1 << 10)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 32 << 10)
    with pytest.raises(ValueError, match=r"the Jacobian takes 38\.4 kB.*per_sample=True.*out="):
        jactri.jacobian(func, X.repeat(4, 1), memory_limit=given)


def test_the_default_limit_counts_the_answer_of_samples(monkeypatch):
    """Forgetting per_sample on a large batch asked the allocator for all of it."""
    monkeypatch.setattr(memory, "LARGE", 1 << 10)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 << 10)
    with pytest.raises(
        ValueError, match=r"2\.4 kB, and half of the free memory is 2\.05 kB.*480 B"
    ):
        jactri.jacobian(NET, X)
    J = jactri.jacobian(NET, X, per_sample=True)
    monkeypatch.undo()
    assert_close(J, jactri.jacobian(NET, X)[range(5), :, range(5)], F64)
