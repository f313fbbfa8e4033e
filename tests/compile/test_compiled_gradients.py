"""Compiled calls that are differentiated: ``create_graph=True``, and losses that contain jactri's calls."""

import functools

import pytest
import torch
from common import F64, seeded
from tolerances import assert_close
from torch import nn

import jactri
import jactri._src.compile.joint

compile = functools.partial(jactri.compile, engine="fx")


def block():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=F64)


def stopped(x):
    """Autograd's own stop: its value is used, its gradient is not."""
    return x.detach() * x.sin() + x**3


class Scaled(nn.Module):
    """With a tensor that is made anew whenever it runs, also in each trace."""

    def __init__(self):
        super().__init__()
        self.net = seeded(4, 9, 2)

    def forward(self, x):
        return self.net(x) * torch.tensor([2.0, 3.0], dtype=F64)


def image():
    torch.manual_seed(0)
    convs = nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv1d(2, 1, 3, padding=1)
    return nn.Sequential(nn.Unflatten(1, (1, 4)), *convs).to(F64)


CALLS = {
    "jacobian": (jactri.jacobian, lambda: seeded(4, 9, 4), {"per_sample": True}),
    "reverse": (jactri.jacobian, lambda: seeded(4, 9, 2), {"strategy": "reverse-mode"}),
    "a constant": (jactri.jacobian, Scaled, {"per_sample": True}),
    "indices": (jactri.jacobian, image, {"per_sample": True}),
    "forward": (jactri.jacobian, lambda: seeded(4, 9, 7), {"strategy": "forward-mode"}),
    "stopped": (jactri.jacobian, lambda: stopped, {"per_sample": True}),
    "gradient": (jactri.gradient, lambda: nn.Sequential(seeded(4, 9, 1), nn.Flatten(0)), {}),
    "divergence": (jactri.divergence, lambda: seeded(4, 9, 4), {}),
    "laplacian": (jactri.laplacian, lambda: nn.Sequential(seeded(4, 9, 1), nn.Flatten(0)), {}),
    "diagonal": (jactri.diagonal, lambda: seeded(4, 9, 4), {}),
    "jtj": (jactri.jtj, lambda: seeded(4, 9, 4), {"per_sample": True}),
    "kernel": (jactri.empirical_ntk, lambda: seeded(4, 9, 4), {}),
    "parameters": (jactri.parameter_jacobian, lambda: seeded(4, 9, 4), {}),
}


def tensors(answer):
    return torch.utils._pytree.tree_leaves(answer)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_those_of_the_ordinary_call(name, monkeypatch):
    of, make, options = CALLS[name]
    if name == "indices":
        monkeypatch.setattr(jactri._src.base.constants, "KEPT", 0)  # each trace makes its own
    func, options = make(), {**options, "create_graph": True}
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    compiled = compile(func, x, of=of, **options)
    assert compiled.graph is not None
    weights = list(func.parameters()) if isinstance(func, nn.Module) else []
    for _ in range(2):
        x = torch.randn(3, 4, dtype=F64, requires_grad=True)
        want = of(func, x, **options)
        want = want.dense() if of is jactri.parameter_jacobian else want
        got = compiled(x)
        live = [k for k, t in enumerate(tensors(want)) if t.requires_grad]
        assert live == [k for k, t in enumerate(tensors(got)) if t.requires_grad]
        want, got = ([tensors(t)[k] for k in live] for t in (want, got))
        cotangents = [torch.randn_like(t) for t in want]
        ends = [x, *weights]
        theirs = torch.autograd.grad(want, ends, cotangents, allow_unused=True)
        ours = torch.autograd.grad(got, ends, cotangents, allow_unused=True)
        assert [g is None for g in ours] == [g is None for g in theirs]
        for a, b in zip(ours, theirs, strict=True):
            if b is not None:
                assert_close(a, b, F64)
        with torch.no_grad():
            for w in weights:
                w.mul_(1.1)
    assert compiled.traces == 1


@pytest.mark.parametrize("name", ["jacobian", "laplacian"])
def test_gradcheck(name):
    of, make, options = CALLS[name]
    compiled = compile(
        make(),
        torch.randn(2, 4, dtype=F64, requires_grad=True),
        of=of,
        create_graph=True,
        **options,
    )
    x = torch.randn(2, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(compiled, x)


def test_a_loss_that_contains_a_call_is_a_training_step():
    net = block()
    inputs = torch.randn(2, 3, 8, dtype=F64)

    def penalty(x):
        J = jactri.jacobian(net, x, per_sample=True, create_graph=True)
        return net(x).square().mean() + J.square().mean()

    compiled = compile(penalty, inputs, of=None)
    twin, steps = torch.optim.SGD(net.parameters(), 0.1), []
    for _ in range(3):
        x = torch.randn(2, 3, 8, dtype=F64)
        want = penalty(x)
        grads = torch.autograd.grad(want, list(net.parameters()))
        twin.zero_grad()
        loss = compiled(x)
        loss.backward()
        assert_close(loss, want, F64)
        for p, g in zip(net.parameters(), grads, strict=True):
            assert_close(p.grad, g, F64)
        twin.step()
        steps.append(loss.item())
    assert compiled.traces == 1


class Keys(nn.Module):
    """Attention with keys of their own, in whose bias nothing has a derivative."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return ((self.q(x) @ self.k(x).mT).softmax(2) @ self.v(x)).tanh()


def test_gradients_that_cancel():
    """The compiler sums in another order, and what is left of zero is another rounding."""
    torch.manual_seed(0)
    net, x = Keys(), torch.randn(3, 4, 6)

    def loss(x):
        return jactri.jacobian(net, x, per_sample=True, create_graph=True).square().sum()

    compiled = jactri.compile(loss, x, of=None, engine="inductor")
    assert compiled.reason is None
    ours, theirs = (torch.autograd.grad(f(x), net.q.weight) for f in (compiled, loss))
    assert_close(ours[0], theirs[0], torch.float32)


def test_a_whole_step_in_one_graph():
    net = seeded(4, 9, 4)
    weights = list(net.parameters())

    def step(x):
        J = jactri.jacobian(net, x, per_sample=True, create_graph=True)
        loss = J.square().mean()
        return loss.detach(), *torch.autograd.grad(
            loss, weights, allow_unused=True, materialize_grads=True
        )

    x = torch.randn(3, 4, dtype=F64)
    compiled = compile(step, x, of=None)
    for got, want in zip(compiled(x + 1), step(x + 1), strict=True):
        assert_close(got, want, F64)
    assert not any(t.requires_grad for t in compiled(x))


def test_frozen_weights_have_no_gradient():
    net = seeded(4, 9, 4)
    net[0].weight.requires_grad_(False)
    x = torch.randn(3, 4, dtype=F64)
    compiled = compile(net, x, per_sample=True, create_graph=True)
    compiled(x).square().sum().backward()
    assert net[0].weight.grad is None and net[2].weight.grad is not None
    net[0].weight.requires_grad_(True)
    compiled(x).square().sum().backward()
    assert net[0].weight.grad is not None and compiled.traces == 2


def test_grad_modes_and_inputs_that_require_grad():
    net = seeded(4, 9, 4)
    x = torch.randn(3, 4, dtype=F64)
    compiled = compile(net, x, per_sample=True, create_graph=True)
    with torch.no_grad():  # as the ordinary call
        assert compiled(x).requires_grad
    loss = compile(lambda x: compiled.func(x).sum(), x, of=None)
    with torch.no_grad():
        assert not loss(x).requires_grad
    assert loss(x).requires_grad and loss.traces == 2
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(compiled(leaf.sin()).sum(), leaf)
    (want,) = torch.autograd.grad(
        jactri.jacobian(net, leaf.sin(), per_sample=True, create_graph=True).sum(), leaf
    )
    assert_close(got, want, F64)


def test_twice_is_refused():
    net = seeded(4, 9, 4)
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    compiled = compile(net, x, per_sample=True, create_graph=True)
    (g,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_what_func_has_not_its_gradient_through():
    """Results that need no gradient among those that do."""
    net = seeded(4, 9, 4)

    def func(x):
        y = net(x)
        return y, (y.detach() > 0), y.detach().sum()

    x = torch.randn(3, 4, dtype=F64)
    compiled = compile(func, x, of=None)
    y, positive, total = compiled(x)
    assert y.requires_grad and not positive.requires_grad and not total.requires_grad
    y.sum().backward()
    assert net[0].weight.grad is not None


def test_one_tensor_as_several_results():
    net = seeded(4, 9, 4)
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)

    def func(x):
        y = net(x)
        return x.detach(), x, y.detach(), y, y, net[0].weight.detach(), net[0].weight

    compiled = compile(func, x, of=None)
    assert compiled.graph is not None
    found, want = compiled(x), func(x)
    live = [k for k, t in enumerate(want) if t.requires_grad]
    assert live == [k for k, t in enumerate(found) if t.requires_grad]
    ends = [x, *net.parameters()]
    cotangents = [torch.randn_like(want[k]) for k in live]
    ours, theirs = (
        torch.autograd.grad([t[k] for k in live], ends, cotangents) for t in (found, want)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, F64)


def test_hooks_of_weights_run_once():
    net = seeded(4, 9, 4)
    handle = net[0].weight.register_hook(lambda g: g * 2)
    x = torch.randn(3, 4, dtype=F64)
    compiled = compile(lambda x: net(x).sin().sum(), x, of=None)
    for _ in range(2):
        (got,) = torch.autograd.grad(compiled(x), net[0].weight)
        (want,) = torch.autograd.grad(net(x).sin().sum(), net[0].weight)
        assert_close(got, want, F64)
    handle.remove()
    compiled = compile(lambda x: net(x).sin().sum(), x, of=None)
    net[0].weight.register_hook(lambda g: g * 3)
    (got,) = torch.autograd.grad(compiled(x), net[0].weight)
    (want,) = torch.autograd.grad(net(x).sin().sum(), net[0].weight)
    assert_close(got, want, F64)


def test_a_loss_of_autograd_s_own_derivatives():
    """func itself differentiates in an input that requires grad."""
    net = seeded(4, 9, 1)

    def residual(x):
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return (g.square().sum(1) - 1).square().mean()

    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    compiled = compile(residual, x, of=None)
    assert compiled.graph is not None
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    ends = [x, net[0].weight]
    ours, theirs = (torch.autograd.grad(f(x), ends) for f in (compiled, residual))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, F64)


def test_a_wrong_gradient_is_not_used(monkeypatch):
    """The values are right, the graph of the backward is not."""
    net, x = seeded(4, 9, 4), torch.randn(3, 4, dtype=F64)
    build = jactri._src.compile.joint.build
    built = []

    def wrong(engine, graph, like):
        built.append(made := build(engine, graph, like))
        if len(built) == 1:
            return made
        return made._replace(run=lambda ts: [2 * t for t in made.run(ts)])

    monkeypatch.setattr(jactri._src.compile.joint, "build", wrong)
    compiled = compile(lambda x: net(x).sin().sum(), x, of=None)
    assert len(built) == 2 and "of the gradients, tensor 0 is off by" in compiled.reason
    (got,) = torch.autograd.grad(compiled(x), net[0].weight)
    (want,) = torch.autograd.grad(net(x).sin().sum(), net[0].weight)
    assert_close(got, want, F64)
