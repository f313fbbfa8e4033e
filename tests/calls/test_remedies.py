"""Messages about natural mistakes say what to write instead, and what they say works."""

import collections
import inspect
from types import SimpleNamespace

import pytest
import torch
from tolerances import assert_close
from torch import nn

import jactri
from jactri._src.base import memory

F64 = torch.float64
X = torch.linspace(-1, 1, 20, dtype=F64).view(5, 4)
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
LSTM = nn.LSTM(4, 3, batch_first=True).double()


class Output(collections.OrderedDict):
    """As model libraries return: a dict whose keys are attributes, too."""

    logits = property(lambda self: self["logits"])


def model(v):
    return Output(logits=NET(v), hidden=v)


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
    [NET, lambda v: torch.ones(len(v), 3, dtype=F64), lambda v: (v[:, :3] + 1j).abs()],
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
