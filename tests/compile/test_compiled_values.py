"""`jactri.compile`: values of what func holds, which no graph may keep, since they change in place."""

import collections
import functools

import pytest
import torch
from common import F64, seeded
from tolerances import assert_same_tree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import jactri

compile = functools.partial(jactri.compile, engine="fx")

X = torch.tensor([0.3, -1.2, 0.8], dtype=F64)


def agree(compiled, func, x=X):
    assert_same_tree(compiled(x), jactri.jacobian(func, x), F64, length=64)


READ = {
    "item": lambda x, p: x.sin() * p.item(),
    "a number": lambda x, p: x.sin() * float(p.detach()),
    "a list": lambda x, p: x.sin() * p.tolist(),
    "an array": lambda x, p: x.sin() * float(p.detach().numpy()),
    "text": lambda x, p: x.sin() * float(str(p.item())),
    "an option": lambda x, p: torch.add(x.sin(), x.exp(), alpha=p.item()),
    "what follows": lambda x, p: x.abs() ** int(p + 1),
    "a range": lambda x, p: sum(x**k for k in range(1, 1 + int(p * 2))),
    "an index": lambda x, p: x.sin()[p.long() - 1 :],
    "a branch": lambda x, p: x.sin() if torch.equal(p, torch.full_like(p, 2)) else x.cos(),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", ["parameter", "buffer", "closure"])
def test_values_of_held_tensors_that_python_reads(name, kind):
    p, m = torch.tensor(2.0, dtype=F64), nn.Module()
    if kind == "parameter":
        m.p = p = nn.Parameter(p)
    elif kind == "buffer":
        m.register_buffer("p", p)

    def func(x):
        return READ[name](x, p if kind == "closure" else m.p)

    compiled = compile(func, X)
    for value in (2.0, 1.0, 3.0):
        with torch.no_grad():
            p.fill_(value)
        agree(compiled, func)
    assert compiled.graph is None


@pytest.mark.parametrize("name", ["integer", "scalar of an integer tensor"])
def test_integers_as_indices(name):
    i = torch.tensor(1)
    func = {
        "integer": lambda x: x.sin()[i],
        "scalar of an integer tensor": lambda x: x.sin().roll(int(i)) * x,
    }[name]
    compiled = compile(func, X)
    i.fill_(2)
    agree(compiled, func)


@pytest.mark.parametrize("options", [{}, {"create_graph": True}, {"freeze": True}], ids=str)
@pytest.mark.parametrize(
    "func",
    [lambda x: x**3 * x.item(), lambda x: x.sin() * int(x + 1), lambda x: x.sin() * int(x.long())],
    ids=["itself", "what follows", "as an integer"],
)
def test_values_of_an_input_of_no_axes(func, options):
    """Fakes may keep such numbers: what was read while tracing must not stay."""
    x = torch.tensor(2.0, dtype=F64)
    compiled = compile(func, x, **options)
    agree(compiled, func, x)
    agree(compiled, func, x + 1)


def test_constants_may_be_read():
    p = torch.tensor(2.0, dtype=F64)
    compiled = compile(lambda x: x.sin() * p.item(), X, freeze=True)
    assert compiled.graph is not None
    agree(compiled, lambda x: x.sin() * 2)


@pytest.mark.parametrize(
    "func",
    [
        lambda x, p: x * x * p,
        lambda x, p: x.square() / p,
        lambda x, p: p * x.sin() * p,
        lambda x, p: x.sin().mul(p + 1),
    ],
    ids=["factor", "divisor", "twice", "sum"],
)
def test_scalar_tensors_that_are_written_in_place(func):
    """What no module holds is as it was, but for writes in place: also where a derivative is scaled by it."""
    p = torch.tensor(2.0, dtype=F64)
    of_x = functools.partial(func, p=p)
    compiled = compile(of_x, X, return_output=True)
    p.fill_(3.0)
    out, jac = compiled(X)
    assert compiled.graph is not None
    torch.testing.assert_close(out, of_x(X))
    torch.testing.assert_close(jac, torch.autograd.functional.jacobian(of_x, X))


@pytest.mark.parametrize("engine", ["fx", "inductor"])
def test_tensors_that_are_laid_out_anew_in_place(engine):
    w, q = torch.randn(2, 3, 3, dtype=F64).unbind()
    net = seeded(3, 3)
    wide = torch.randn(4, 3, dtype=F64)

    def func(x):
        return wide @ (net(x) @ w @ q).tanh()

    compiled = jactri.compile(func, X, engine=engine)
    q.t_()
    agree(compiled, func)
    net[0].weight.data = net[0].weight.data.t()
    agree(compiled, func)
    wide.resize_(2, 3)
    agree(compiled, func)
    assert compiled.graph is not None


# -- what func writes --------------------------------------------------------------------------------


def test_gradients_and_memory_that_func_sets():
    w = nn.Parameter(torch.ones(3, dtype=F64))

    def accumulates(x):
        torch.autograd.backward((w * x.detach()).sum())
        return x.sin() * w

    def clears(x):
        w.grad = None
        return accumulates(x)

    def halves(x):
        w.data = w.data * 0.5
        return x.sin() * w

    for func in (accumulates, clears, halves):
        w.grad = None
        compiled = compile(func, X)
        assert "writes to" in compiled.reason
        assert not isinstance(w.grad, FakeTensor) and w.device.type == "cpu"
    w.grad = None
    compile(accumulates, X)(X)
    torch.testing.assert_close(w.grad, 2 * X)  # of two ordinary calls
    torch.testing.assert_close(w.detach(), torch.full((3,), 0.5, dtype=F64))


def test_a_gradient_that_only_the_trace_would_make():
    w, calls = nn.Parameter(torch.ones(3, dtype=F64)), []

    def func(x):
        calls.append(1)
        if len(calls) == 2:  # the trace
            torch.autograd.backward((w * x.detach()).sum())
        return x.sin()

    compiled = compile(func, X)
    assert "the .grad of" in compiled.reason and w.grad is None


def test_statistics_of_what_nothing_uses():
    mean, var = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)

    def func(x):
        nn.functional.batch_norm(x, mean, var, training=True)
        return x.sin()

    x = torch.randn(5, 3, dtype=F64)
    compiled = compile(func, x)
    assert "running statistics" in compiled.reason
    before = mean.clone()
    compiled(x)
    assert not torch.equal(mean, before)


# -- the parameters of what differentiates in them ----------------------------------------------------


def tie(net):
    net[2].weight = net[0].weight


CHANGES = {
    "tied": tie,
    "one more": lambda net: net.register_parameter("gain", nn.Parameter(torch.ones(2, dtype=F64))),
    "unused, frozen": lambda net: net.unused.requires_grad_(False),
    "unused, larger": lambda net: setattr(net, "unused", nn.Parameter(torch.ones(5, dtype=F64))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_change(change):
    net, x = seeded(3, 3, 3), torch.randn(2, 3, dtype=F64)
    net.unused = nn.Parameter(torch.ones(2, dtype=F64))
    columns = compile(net, x, of=jactri.parameter_jacobian)
    kernel = compile(net, x, of=jactri.empirical_ntk)
    CHANGES[change](net)
    assert_same_tree(columns(x), jactri.parameter_jacobian(net, x).dense(), F64, length=64)
    rows = [
        torch.cat([
            g.flatten()
            for g in torch.autograd.grad(
                y, [p for p in net.parameters() if p.requires_grad], allow_unused=True,
                retain_graph=True,
            )
            if g is not None
        ])
        for y in net(x).flatten()
    ]  # fmt: skip
    jac = torch.stack(rows).reshape(2, 3, -1)
    torch.testing.assert_close(kernel(x), torch.einsum("aip,bjp->abij", jac, jac))
    assert columns.graph is not None and kernel.graph is not None


# -- inference mode ----------------------------------------------------------------------------------


def test_tensors_of_inference_mode():
    """jacobian has a graph there, too, if one is asked for; func itself has none."""
    net = seeded(3, 4, 2)
    weights = list(net.parameters())
    step = compile(net, X, create_graph=True)
    with torch.inference_mode():
        x = X + 1
        found = step(x)
    for jac in (found, step(x)):
        grads = torch.autograd.grad(jac.square().sum(), weights, allow_unused=True)
        want = jactri.jacobian(net, X + 1, create_graph=True).square().sum()
        want = torch.autograd.grad(want, weights, allow_unused=True)
        for a, b, w in zip(grads, want, weights, strict=True):
            zero = torch.zeros_like(w)
            torch.testing.assert_close(zero if a is None else a, zero if b is None else b)

    def loss(x):
        return net(x).square().sum()

    step = compile(loss, X, of=None)
    with torch.inference_mode():
        for x in (X, X.clone()):
            found = step(x)
            assert not found.requires_grad
            torch.testing.assert_close(found, loss(x))


# -- what a trace leaves -----------------------------------------------------------------------------


def test_no_tensor_of_a_trace_stays_in_other_containers():
    queue, found = collections.deque(maxlen=3), set()

    def func(x):
        queue.append(x * 2)
        found.add(x * 3)
        func.last = x * 4
        return x.sin()

    compiled = compile(func, X)
    assert compiled.graph is not None and len(queue) == len(found) == 1
    for t in (*queue, *found, func.last):
        assert not isinstance(t, FakeTensor)
    agree(compiled, func, X + 1)


def test_modules_that_functions_hold():
    def func(x):
        return func.net(x)

    func.net = seeded(3, 4, 2)
    compiled = compile(func, X)
    func.net[0].weight = nn.Parameter(torch.ones(4, 3, dtype=F64))
    agree(compiled, func)


class Shared:
    """Modules where a search by name does not come: of a class, in slots, deep inside."""

    __slots__ = ("inner",)
    net = seeded(3, 3)

    def __init__(self):
        self.inner = [{"net": [seeded(3, 3).eval()]}]

    def __call__(self, x):
        return self.inner[0]["net"][0](self.net(x))


class Listing(nn.Module):
    """A module that holds another in a list."""

    def __init__(self):
        super().__init__()
        self.of = Shared()

    def forward(self, x):
        return self.of(x)


@pytest.mark.parametrize("kind", [Shared, Listing])
def test_modules_that_are_only_called(kind):
    func = kind()
    shared = func if kind is Shared else func.of
    deep = shared.inner[0]["net"][0]
    deep.append(nn.Dropout(0.5).eval())
    compiled = compile(func, X)
    deep[0].weight = nn.Parameter(torch.ones(3, 3, dtype=F64))
    agree(compiled, func)
    Shared.net[0].bias = nn.Parameter(torch.ones(3, dtype=F64))
    agree(compiled, func)
    assert compiled.graph is not None
    deep.train()
    compiled(X)
    assert "random" in compiled.reason
