"""`jactri.compile(freeze=True)`: what a function holds is a constant, whose updates are not seen."""

import functools

import pytest
import torch
from common import F64, seeded
from test_engines import needs_compiler
from tolerances import assert_same_tree
from torch import nn

import jactri

compile = functools.partial(jactri.compile, freeze=True, engine="fx")


def images():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)
    ).eval()  # fmt: skip


def potential():
    return nn.Sequential(seeded(4, 9, 1, dtype=torch.float32), nn.Flatten(0))


CALLS = {
    "jacobian": (jactri.jacobian, images, (3, 1, 4, 4), {"per_sample": True}),
    "laplacian": (jactri.laplacian, potential, (5, 4), {}),
    "hessian": (jactri.func.hessian, lambda: nn.Sequential(seeded(4, 9, dtype=torch.float32), nn.Softplus()), (4,), {}),
    "function": (None, lambda: seeded(4, 9, 3, dtype=torch.float32), (5, 4), {}),
    "jtj": (jactri.jtj, lambda: seeded(4, 9, 3, dtype=torch.float32), (5, 4), {"per_sample": True}),
}  # fmt: skip


def ordinary(of, func, x, options):
    if of is None:
        return func(x)
    return of(func, **options)(x) if of is jactri.func.hessian else of(func, x, **options)


def check(name, engine):
    of, make, shape, options = CALLS[name]
    net = make()
    compiled = jactri.compile(net, torch.randn(shape), of=of, engine=engine, freeze=True, **options)
    assert compiled.graph is not None and compiled.freeze
    for _ in range(2):
        x = torch.randn(shape)
        want = ordinary(of, net, x, options)
        assert_same_tree(compiled(x), want.detach(), torch.float32, length=100)
        assert not compiled(x).requires_grad
    x = torch.randn(shape)
    want = ordinary(of, net, x, options).detach()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    assert_same_tree(compiled(x), want, torch.float32, length=100)
    with pytest.raises(RuntimeError, match="is not the ordinary one"):
        compiled.verify(x)
    assert compiled.traces == 1


@pytest.mark.parametrize("name", CALLS)
def test_answers(name):
    check(name, "fx")


@needs_compiler
@pytest.mark.parametrize(("name", "engine"), [("jtj", "aot"), ("laplacian", "inductor")])
def test_answers_of_compilers(name, engine):
    check(name, engine)


def test_no_update_is_seen_until_another_trace():
    net = nn.Sequential(*seeded(4, 9, 3))
    held = torch.ones(4, dtype=F64)

    def func(x):
        return net(x * held)

    x = torch.randn(5, 4, dtype=F64)
    compiled, want = compile(func, x), jactri.jacobian(func, x)
    held.mul_(2)
    net[0].weight = nn.Parameter(torch.randn(9, 4, dtype=F64))
    net[2].bias.data = torch.randn(3, dtype=F64)
    torch.testing.assert_close(compiled(x), want)
    made = compiled.explain()
    assert made.looked_up == () and made.fixed == 0 and made.constants == 5
    assert "constants: 5 tensors, updates are not seen" in str(made)
    other = torch.randn(3, 4, dtype=F64)  # a trace of its own, of the weights as they are now
    torch.testing.assert_close(compiled(other), jactri.jacobian(func, other))
    assert compiled.verify(other) < 1e-12
    torch.testing.assert_close(compiled(x), want)
    net.eval()
    torch.testing.assert_close(compiled(x), jactri.jacobian(func, x))
    assert compiled.traces == 3


@pytest.mark.parametrize("engine", ["fx", pytest.param("inductor", marks=needs_compiler)])
def test_constant_answers_belong_to_the_caller(engine):
    """Of a linear function the Jacobian is a constant, and of a graph a constant is one tensor."""
    net = nn.Linear(4, 3)
    compiled = jactri.compile(
        lambda x: (net(x), net.weight), torch.randn(2, 4), engine=engine, freeze=True,
        return_output=True,
    )  # fmt: skip
    want = compiled(torch.randn(2, 4))[1]
    want = [J.clone() for J in want]
    weight = net.weight.detach().clone()
    for _ in range(2):
        outputs, blocks = compiled(torch.randn(2, 4))
        torch.testing.assert_close(list(blocks), want)
        torch.testing.assert_close(outputs[1], weight)
        for t in (*outputs, *blocks):
            t.zero_()
    torch.testing.assert_close(net.weight.detach(), weight)


def test_into_memory_of_the_caller():
    net = seeded(4, 9, 3)
    compiled = compile(net, torch.randn(5, 4, dtype=F64), per_sample=True)
    out = torch.empty(5, 3, 4, dtype=F64)
    for _ in range(2):
        x = torch.randn(5, 4, dtype=F64)
        assert compiled(x, out=out) is out
        torch.testing.assert_close(out, jactri.jacobian(net, x, per_sample=True))
    assert compiled.graph is not None


def test_what_runs_eagerly_sees_updates():
    """Nothing is frozen in an ordinary call."""
    w = torch.ones(4, dtype=F64)
    x = torch.randn(4, dtype=F64)
    compiled = compile(lambda x: x.sin() * w * x.sum().item(), x)
    w.mul_(2)
    assert compiled.reason is not None and compiled.verify(x) == 0


def test_refusals():
    net, x = seeded(4, 9, 3), torch.randn(5, 4, dtype=F64)
    with pytest.raises(ValueError, match=r"create_graph=True differentiates.*without freeze"):
        compile(net, x, create_graph=True)
    with pytest.raises(ValueError, match=r"jactri\.parameter_jacobian differentiates"):
        compile(net, x, of=jactri.parameter_jacobian)
    with pytest.raises(ValueError, match=r"jactri\.empirical_ntk differentiates"):
        compile(net, x, of=jactri.empirical_ntk)
    params = dict(net.named_parameters())

    def loss(p):
        return torch.func.functional_call(net, p, x).square().sum()

    for of in (jactri.func.hessian, None):
        with pytest.raises(ValueError, match=r"weights as constants, and 0\.weight is an input"):
            compile(loss, params, of=of)
    compiled = compile(net, x, of=None)
    with pytest.raises(RuntimeError, match="an input requires grad"):
        compiled(x.clone().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(compiled(x.clone().requires_grad_()), net(x))


def test_weights_that_are_inputs_of_their_own():
    """Copies of weights are inputs like others: they are no constants."""
    net, x = seeded(4, 9, 3), torch.randn(5, 4, dtype=F64)
    of_net = {name: p.detach().clone() for name, p in net.named_parameters()}

    def loss(p):
        return torch.func.functional_call(net, p, x).square().sum()

    compiled = compile(loss, of_net, of=jactri.func.hessian)
    of_net = {name: p + 1 for name, p in of_net.items()}
    assert_same_tree(compiled(of_net), jactri.func.hessian(loss)(of_net), F64, length=64)
