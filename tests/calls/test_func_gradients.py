"""Gradients through jactri.func's results beside torch.func's: where they flow, and what makes them."""

import functools
import weakref

import pytest
import torch
from common import F64, make, mlp, ours_and_theirs, torch_before, x3, x23
from tolerances import assert_close, assert_gradients_close
from torch.utils._pytree import tree_leaves

import jactri
from jactri._src.calls import deferred

NAMES = ["jacrev", "jacfwd", "hessian"]


@pytest.fixture(params=["at once", "deferred"])
def cheap(request, monkeypatch):
    """Both ways to a graph, whatever the Jacobian costs."""
    monkeypatch.setattr(deferred, "_CHEAP", float("inf") if request.param == "at once" else 0.0)
    return request.param == "at once"


@pytest.fixture
def dear(monkeypatch):
    monkeypatch.setattr(deferred, "_CHEAP", 0.0)


CAPTURED = {
    "module": lambda w, b: lambda x: (w @ x + b).tanh(),
    "only the input": lambda w, b: lambda x: x.sin() * x.prod(),
    "only frozen": lambda w, b: lambda x: (w.detach() @ x).tanh(),
    "linear": lambda w, b: lambda x: w @ x + b,
    "one of two outputs": lambda w, b: lambda x: (x.sin(), (w @ x).sin()),
}


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CAPTURED)
def test_it_requires_grad_where_torch_says_so(case, name, wanted, mode, cheap):
    w = torch.randn(3, 3, dtype=F64, requires_grad=True)
    b = torch.randn(3, dtype=F64, requires_grad=True)
    func, x = CAPTURED[case](w, b), x3().requires_grad_(wanted)
    context = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }[mode]
    if mode == "inference_mode" and name != "jacrev" and torch_before((2, 13)):
        pytest.skip("torch.func's forward mode fails in inference mode")
    with context():
        ours, theirs = (tree_leaves(t(func)(x)) for t in ours_and_theirs(name))
    if mode == "grad" and case == "linear" and not cheap and not wanted:
        assert all(
            j.requires_grad for j in ours
        )  # constant in b, and the Hessian in w, but not known to be
    elif mode == "grad" and case == "one of two outputs":  # torch takes both outputs for one
        assert [j.requires_grad for j in ours] == [wanted, True]
    else:
        assert [j.requires_grad for j in ours] == [j.requires_grad for j in theirs]
    assert not w.grad and x.grad is None and x.requires_grad is wanted


def weigh(tree):
    """A scalar of all leaves that is not linear in them."""
    leaves = tree_leaves(tree)
    return sum((t * torch.arange(1.0, t.numel() + 1, dtype=F64).view(t.shape)).sin().sum() for t in leaves)  # fmt: skip


def gradients(transform, func, args, wanted, **options):
    """The gradient of a function of the result, and that of a function of the gradient."""
    first = torch.autograd.grad(
        weigh(transform(func, **options)(*args)), wanted, create_graph=True, allow_unused=True
    )
    second = torch.autograd.grad(
        sum(g.square().sum() for g in first if g is not None), wanted, allow_unused=True
    )
    return list(first), list(second)


@pytest.mark.parametrize("of", ["parameters", "input", "both", "argument"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_as_in_torch(name, of, cheap):
    net, x = make(lambda: mlp(3, 4, 2)), x3().requires_grad_(of in ("input", "both"))
    func, args, options = net, (x,), {}
    wanted = [p for p in net.parameters() if of in ("parameters", "both")]
    wanted += [x] if x.requires_grad else []
    if of == "argument":
        parameters = dict(net.named_parameters())
        func = functools.partial(torch.func.functional_call, net)
        args, options = (parameters, x), {"argnums": 1}
        wanted = list(parameters.values())
    ours, theirs = (gradients(t, func, args, wanted, **options) for t in ours_and_theirs(name))
    for a, b, order in zip(ours, theirs, ("first", "second"), strict=True):
        assert_gradients_close(a, b, F64, length=2000, what=f"{order} gradient")
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_to_what_was_computed_before(name):
    """A captured tensor that is no leaf: it can be asked for, as can the leaf behind it."""
    ours, theirs = ours_and_theirs(name)
    found = []
    for transform in (ours, theirs):
        z = x3().requires_grad_()
        h = z.exp()
        func = lambda x, h=h: (x * h).sin() * x.sum()  # noqa: E731
        found.append(gradients(transform, func, (x3(),), [h, z]))
    for a, b in zip(*found, strict=True):
        assert_gradients_close(a, b, F64, length=200)


def test_the_graph_is_made_for_who_asks():
    small, large = mlp(3, 4, 2), mlp(64, 512, 512, 64)
    assert jactri.func.jacrev(small)(torch.randn(3)).grad_fn.name() != "_DeferredBackward"
    x = torch.randn(32, 64)
    j = jactri.func.jacrev(large)(x)
    assert j.grad_fn.name() == "_DeferredBackward"
    with torch.no_grad():
        assert torch.equal(j, jactri.func.jacrev(large)(x))


def test_backward_twice_as_in_torch(cheap):
    net = make(lambda: mlp(3, 4, 2))
    wanted = list(net.parameters())
    ours, theirs = (t(net)(x3()) for t in ours_and_theirs("jacrev"))
    rows = [[torch.autograd.grad(v.sin(), wanted, retain_graph=True, allow_unused=True) for v in j.flatten()]
            for j in (ours, theirs)]  # fmt: skip
    for a, b in zip(*rows, strict=True):
        assert_gradients_close(a, b, F64, length=50)
    # all rows at once, under vmap
    basis = torch.eye(6, dtype=F64).view(6, 2, 3)
    options = {"is_grads_batched": True, "retain_graph": True, "allow_unused": True}
    batched = [torch.autograd.grad(j, wanted, basis, **options) for j in (ours, theirs)]
    assert_gradients_close(*batched, F64, length=50)
    ours.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        ours.sum().backward()


def test_jacobian_inside_of_a_backward_pass():
    """autograd.grad tells nodes which gradients it wants; a Jacobian that is taken meanwhile wants its own."""

    class Implicit(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.exp() * x.sum()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g @ jactri.jacobian(lambda x: x.exp() * x.sum(), x)

    x = x3().requires_grad_()
    truth = torch.func.grad(lambda x: (x.exp() * x.sum()).prod())(x3())
    (g,) = torch.autograd.grad(Implicit.apply(x).prod(), x)
    assert_close(g, truth, F64, length=9)
    with pytest.raises(ZeroDivisionError):  # an error on the way is the caller's to see
        jactri._src.calls.reentrant.aside(lambda: 1 / 0)


def test_backward_through_aux_and_jacobian_at_once(cheap):
    net = make(lambda: mlp(3, 4, 2))
    grads = []
    for transform in ours_and_theirs("jacrev"):
        net.zero_grad()
        j, aux = transform(lambda x: (net(x), net[0](x)), has_aux=True)(x3())
        assert aux.requires_grad
        (weigh(j) + weigh(aux)).backward()
        grads.append([p.grad for p in net.parameters()])
    assert_gradients_close(*grads, F64, length=50)


def test_parameters_that_changed_before_the_backward_pass(cheap):
    net = make(lambda: mlp(3, 4, 2))
    j = jactri.func.jacrev(net)(x3())
    with torch.no_grad():
        net[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        j.sum().backward()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise RuntimeError("Once is differentiated twice")
        return 2 * g * ctx.saved_tensors[0]


def test_an_op_without_second_derivative_in_a_trainable_module(dear):
    w = x3().requires_grad_()
    j = jactri.func.jacrev(lambda x: Once.apply(w * x))(x3())
    assert_close(j, torch.diag(2 * w**2 * x3()), F64)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        j.sum().backward()


def test_training_through_it(cheap):
    net = make(lambda: mlp(3, 8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = jactri.func.jacrev(net)(x23()).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_it_is_freed_with_the_result(dear):
    net = make(lambda: mlp(3, 4, 2))
    x = x3()
    j = jactri.func.jacrev(net)(x)
    saved = weakref.ref(j.grad_fn)
    j.square().sum().backward()
    del j
    assert saved() is None
