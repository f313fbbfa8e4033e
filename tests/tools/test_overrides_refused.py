"""What does not honour `jactri.overrides`, and mappings that are none: each by its error."""

import pytest
import torch
from common import F64
from overridden import close, f_soft
from torch import nn
from torch.autograd.functional import jacobian as truth

import jactri

# -- refusals ---------------------------------------------------------------------------------------

X = torch.linspace(-1, 1, 3, dtype=F64)
REFUSED = {
    "create_graph=True": lambda f: jactri.jacobian(f, X, create_graph=True),
    "strict=True": lambda f: jactri.jacobian(f, X, strict=True),
    "strict=True ": lambda f: jactri.vjp(f, X, X, strict=True),
    "a second derivative": lambda f: jactri.laplacian(f, X),
    "a second derivative ": lambda f: jactri.func.hessian(f)(X),
    "a second derivative  ": lambda f: jactri.bilaplacian(f, X),
    "torch.func transform": lambda f: torch.func.vmap(lambda x: jactri.jacobian(f, x))(X[None]),
    "finite_difference": lambda f: jactri.finite_difference(f, X),
    "jactri.check": lambda f: jactri.check(f, X),
    "jactri.compile": lambda f: jactri.compile(f, X, engine="fx"),
    "jactri.export": lambda f: jactri.export(f, X, path="a.pt2"),
    "jacfwd by torch.func": lambda f: jactri.func.jacfwd(f, randomness="different")(X),
    "a result that can be differentiated": lambda f: jactri.func.jacrev(
        lambda x: f(x * nn.Parameter(X))
    )(X),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_honour_them_refuses(what):
    with (
        jactri.overrides({"softmax": jactri.zero}),
        pytest.raises(RuntimeError, match=what.strip()),
    ):
        REFUSED[what](f_soft)


def test_compiled_calls_refuse():
    call = jactri.compile(f_soft, X, engine="fx")
    with jactri.overrides({"softmax": jactri.zero}), pytest.raises(RuntimeError, match="compiled"):
        call(X)
    close(call(X), truth(f_soft, X))


def test_inside_of_the_function_it_comes_too_late():
    def f(x):
        with jactri.overrides({"softmax": jactri.zero}):
            return f_soft(x)

    with pytest.raises(RuntimeError, match="around the call"):
        jactri.jacobian(f, X)


def net_of_names():
    net = nn.Module()
    net.tanh, net.first = nn.Tanh(), nn.Linear(2, 2)
    return net


WRONG = [
    ({}, None, TypeError, "mapping must be"),
    ({"softmax": "zero"}, None, TypeError, "number or a function"),
    ({"softmax": True}, None, TypeError, "number or a function"),
    ({"sofmax": jactri.zero}, None, ValueError, "there are 'softmax'"),
    ({"layers.*": jactri.zero}, None, ValueError, "of a module, pass model"),
    ({("layers.*", "softmax"): jactri.zero}, None, ValueError, "pass overrides\\(mapping, model=model\\)"),
    ({("softmax",): jactri.zero}, None, TypeError, "a pair is"),
    ({(3, "softmax"): jactri.zero}, None, TypeError, "3 is no module"),
    ({3: jactri.zero}, None, TypeError, "3 is no key"),
    ({"softmax": jactri.zero}, "model", TypeError, "model must be a Module"),
    ({"firts": jactri.zero}, net_of_names(), ValueError, "there are 'first'"),
    ({("firts", "addmm"): jactri.zero}, net_of_names(), ValueError, "there are 'first'"),
    ({"tanh": jactri.zero}, net_of_names(), ValueError, "an op and a module.*'TanhBackward0'"),
]  # fmt: skip


@pytest.mark.parametrize(("mapping", "model", "kind", "match"), WRONG)
def test_what_is_no_override(mapping, model, kind, match):
    with pytest.raises(kind, match="(?i)" + match), jactri.overrides(mapping, model=model):
        pass


NOT_HERE = [
    ({"tanh": jactri.zero}, ValueError, "'tanh' is no op of this call.*SoftmaxBackward0 \\(1\\)"),
    ({nn.Tanh: jactri.zero}, ValueError, "Tanh is no module of this call"),
    ({"sum": 2.0}, ValueError, "keep the shape.*jactri.uniform"),
    ({"sum": jactri.identity}, ValueError, "needs one shape"),
    ({"softmax": jactri.ratio}, TypeError, "does not save its input"),
    ({"softmax": jactri.detached_std}, TypeError, "no normalisation.*rsqrt"),
    ({"softmax": lambda node: None}, TypeError, "returned None"),
    ({"softmax": lambda node: "a"}, TypeError, "methods of node"),
    ({nn.Linear: jactri.identity}, ValueError, "needs one shape"),
    ({nn.Softmax: jactri.uniform}, TypeError, "name the op inside"),
    ({nn.Softmax: lambda call: "a"}, TypeError, "a tensor or a number"),
]


@pytest.mark.parametrize(("mapping", "kind", "match"), NOT_HERE)
def test_what_a_call_has_no_use_for(mapping, kind, match):
    net = nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)).double()
    with jactri.overrides(mapping), pytest.raises(kind, match=match):
        jactri.jacobian(lambda x: net(x).sum(-1), X)


def test_a_function_that_autograd_computes_as_a_whole_is_refused():
    def f(x):
        return (
            torch.view_as_real(torch.complex(x, x).sigmoid().lerp(torch.complex(x, x), 0.5))
            + x.tanh()[:, None]
        )

    with jactri.overrides({"tanh": jactri.zero}), pytest.raises(RuntimeError, match="as a whole"):
        jactri.jacobian(f, X)


def test_an_op_behind_a_zero_or_a_constant_counts():
    def f(x):
        return x.sigmoid().tanh() + x

    with jactri.overrides({"sigmoid": jactri.zero, "tanh": jactri.identity}):
        close(jactri.jacobian(f, X), torch.eye(3, dtype=F64))
    net = nn.Sequential(nn.Sigmoid(), nn.Tanh())
    with jactri.overrides({"0": jactri.zero, "1": jactri.ratio, (nn.Tanh, "tanh"): 1.0}, model=net):
        close(jactri.jacobian(lambda x: net(x) + x, X), torch.eye(3, dtype=F64))
