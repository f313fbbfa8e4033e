"""Hooks on gradients are a part of the function, as for autograd. Truth is rows of ``torch.autograd.grad``."""

import pytest
import torch
from common import F64, MODES, Square, make, seeded
from tolerances import assert_close
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import jactri

SAYS = "changes them"


def points(n=3):
    return torch.randn(n, 4, dtype=F64, generator=torch.Generator().manual_seed(0))


def hooked(hook):
    """Samples do not mix. Its Hessian is not diagonal."""

    def func(x):
        y = (x * 2).sin()
        y.register_hook(hook)
        return y * x.sum(-1, keepdim=True).exp()

    return func


def on_the_node(x):
    y = x.sin()
    y.grad_fn.register_hook(lambda into, out: (into[0] * 3,))
    return y * x


def before_the_node(x):
    y = x.sin()
    y.grad_fn.register_prehook(lambda out: (out[0] * 3,))
    return y * x


def layers():
    return make(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)))


def of_a_module(register, hook):
    net = layers()
    getattr(net[0], register)(hook)
    return net


CHANGING = {
    "scaled": hooked(lambda g: 3 * g),
    "in place": hooked(lambda g: g.mul_(0.5)),
    "negative": hooked(torch.neg),
    "zero": hooked(torch.zeros_like),
    "a mask": hooked(lambda g: g * torch.tensor([1.0, 0, 1, 0], dtype=F64)),
    "a solve": hooked(lambda g: torch.linalg.solve(torch.eye(4).double() * 2 + 0.1, g.mT).mT),
    "detached": hooked(lambda g: 3 * g.detach()),
    "positive ones": hooked(lambda g: g.clamp(min=0)),
    "clipped": hooked(lambda g: g.clamp(-0.1, 0.1)),
    "on the node": on_the_node,
    "before the node": before_the_node,
    "a module's": of_a_module("register_full_backward_hook", lambda m, into, out: (into[0] * 3,)),
    "a module's, before": of_a_module(
        "register_full_backward_pre_hook", lambda m, out: (out[0] * 3,)
    ),
}
NOT_LINEAR = ("positive ones", "clipped")
NOT_RECORDED = "detached"


def truth(func, x):
    return torch.autograd.functional.jacobian(func, x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_gradients_counts(name, mode):
    func, x = CHANGING[name], points()
    with pytest.warns(UserWarning, match=SAYS):
        got = jactri.jacobian(func, x, strategy=mode)
    assert_close(got, truth(func, x), F64)


@pytest.mark.filterwarnings("ignore:a hook on gradients")
@pytest.mark.parametrize("name", CHANGING)
def test_calls_of_first_order(name):
    func, x = CHANGING[name], points()
    want = truth(func, x)
    own = torch.stack([want[n, :, n] for n in range(len(x))])
    if name in NOT_LINEAR:
        with pytest.raises(RuntimeError, match=r"per_sample=True.*hook"):
            jactri.jacobian(func, x, per_sample=True)
    else:
        assert_close(jactri.jacobian(func, x, per_sample=True), own, F64)
        assert_close(jactri.gradient(func, x), own, F64)
        assert_close(jactri.divergence(func, x), own.diagonal(0, -2, -1).sum(-1), F64)
        v = points().flip(0)
        assert_close(jactri.vjp(func, x, v)[1], torch.einsum("no,nomi->mi", v, want), F64)
        assert_close(jactri.jtj(func, x, per_sample=True), own.mT @ own, F64)
        assert_close(jactri.diagonal(func, x), torch.einsum("noo->no", own), F64)
    v = points().flip(0)
    assert_close(jactri.jvp(func, x, v)[1], torch.einsum("nomi,mi->no", want, v), F64)
    assert_close(jactri.func.jacrev(func)(x), want, F64)
    assert_close(jactri.func.jacfwd(func)(x), want, F64)
    assert jactri.explain(func, x).fallbacks == ("the whole function",)
    with pytest.raises(ValueError, match="hook"):
        jactri.sparsity(func, x)
    with jactri.fallback("error"), pytest.raises(jactri.FallbackError, match="hook"):
        jactri.jacobian(func, x)


def second(func, x):
    """The Hessian of every output, by rows of autograd."""
    x = x.detach().requires_grad_()
    y = func(x)
    made = []
    for v in y.flatten():
        (g,) = torch.autograd.grad(v, x, create_graph=True)
        made.append(
            torch.stack([torch.autograd.grad(w, x, retain_graph=True)[0] for w in g.flatten()])
        )
    return torch.stack(made).reshape(*y.shape, *x.shape, *x.shape)


@pytest.mark.filterwarnings("ignore:a hook on gradients")
@pytest.mark.parametrize(
    "name", [n for n in CHANGING if n not in (*NOT_LINEAR, NOT_RECORDED, "zero", "in place")]
)
def test_second_order(name):
    func, x = CHANGING[name], points(2)
    want = second(func, x)
    assert_close(jactri.func.hessian(func)(x), want, F64)
    laplacian = torch.stack(
        [want[n, :, n, :, n].diagonal(0, -2, -1).sum(-1) for n in range(len(x))]
    )
    assert_close(jactri.laplacian(func, x), laplacian, F64)
    z = x.clone().requires_grad_()
    got = jactri.jacobian(func, z, create_graph=True)
    (grad,) = torch.autograd.grad(got.square().sum(), z)
    first = truth(func, x)
    assert_close(grad, 2 * torch.einsum("nomi,nomikj->kj", first, want), F64)


@pytest.mark.filterwarnings("ignore:a hook on gradients")
def test_second_order_of_what_is_not_recorded_is_refused():
    """Autograd's double backward would take what the hook gives for a constant."""
    func, x, z = CHANGING[NOT_RECORDED], points(2), points(2).requires_grad_()
    for call in (
        lambda: jactri.laplacian(func, x),
        lambda: jactri.func.hessian(func)(x),
        lambda: jactri.func.hessian(lambda v: func(v).sum())(x),
        lambda: jactri.jacobian(func, z, create_graph=True).sum().backward(),
        lambda: jactri.vjp(func, z, x, create_graph=True)[1].sum().backward(),
        lambda: jactri.jvp(func, z, x, create_graph=True)[1].sum().backward(),
    ):
        with pytest.raises(RuntimeError, match=r"hook.*does not record"):
            call()


def looking(seen):
    def func(x):
        y = x.sin()
        y.register_hook(lambda g: seen.append(g.shape))
        return y * x

    return func


@pytest.mark.parametrize("mode", MODES)
def test_what_only_looks_costs_a_comparison(mode):
    seen = []
    with jactri.fallback("error"):
        got = jactri.jacobian(looking(seen), points(), strategy=mode)
    assert_close(got, truth(lambda x: x.sin() * x, points()), F64)
    assert len(seen) == 2


def test_what_cuts_only_second_derivatives_cuts_none():
    """The function is what it is; only what changes gradients changes it."""

    def cuts(x):
        y = x.sin()
        y.register_hook(lambda g: g.detach())
        return y**3

    x, want = points(2), second(lambda x: x.sin() ** 3, points(2))
    assert_close(jactri.func.hessian(cuts)(x), want, F64)
    assert_close(jactri.func.hessian(lambda v: cuts(v).sum())(x), want.sum((0, 1)), F64)
    assert_close(jactri.laplacian(cuts, x), torch.einsum("nonono->no", want), F64)


def test_hooks_of_modules_that_only_look_cost_a_comparison():
    called = []
    net = layers()
    want, kernel = jactri.jacobian(net, points()), jactri.empirical_ntk(net, points())
    for part in net.modules():
        part.register_full_backward_hook(lambda module, into, out: called.append(module))
        part.register_full_backward_pre_hook(lambda module, out: called.append(module))
    with jactri.fallback("error"):
        assert_close(jactri.jacobian(net, points()), want, F64)
        assert len(called) == 2 * 2 * len(list(net.modules()))
        assert_close(jactri.empirical_ntk(net, points()), kernel, F64)


def test_a_hook_that_removes_itself():
    """As implicit layers had it: one row would be the truth, and others not."""

    def func(x):
        y = x.sin()
        handle = y.register_hook(lambda g: (handle.remove(), 3 * g)[1])
        return y * 2

    for call in (jactri.jacobian, jactri.laplacian):
        with pytest.raises(RuntimeError, match="removes itself"):
            call(func, points())


def test_random_hooks():
    with pytest.raises(RuntimeError, match="another result each time"):
        jactri.jacobian(hooked(lambda g: g + torch.rand_like(g)), points())


def test_nan_that_a_hook_takes_out():
    def func(x):
        y = x * 1.0
        y.register_hook(lambda g: g.nan_to_num(0.0, 0.0, 0.0))
        return (y / y.abs().sum(-1, keepdim=True)).nan_to_num()

    x = points()
    x[1] = 0
    for options in ({}, {"strategy": "forward-mode"}):
        with pytest.warns(UserWarning, match=SAYS):
            got = jactri.jacobian(func, x, **options)
        assert not got.isnan().any()
        torch.testing.assert_close(got, truth(func, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    func = hooked(lambda g: 1.5 * g)
    x = points().to(dtype)
    with pytest.warns(UserWarning, match=SAYS):
        got = jactri.jacobian(func, x)
    torch.testing.assert_close(got, truth(func, x))
    with jactri.fallback("error"):
        jactri.jacobian(hooked(lambda g: None), x)


def test_several_outputs_and_inputs():
    def func(a, b):
        h = a * b.sum()
        h.register_hook(lambda g: 3 * g)
        return h.sin(), h.sum() * b, b.cos()

    inputs = points(2), points(2)
    with pytest.warns(UserWarning, match=SAYS):
        got = jactri.jacobian(func, inputs)
    for ours, theirs in zip(got, truth(func, inputs), strict=True):
        for j, t in zip(ours, theirs, strict=True):
            assert_close(j, t, F64)


@pytest.mark.filterwarnings("ignore:a hook on gradients")
def test_jacobian_of():
    x = points().requires_grad_()
    h = x.sin()
    h.register_hook(lambda g: 3 * g)
    y = h * x
    want = torch.stack(
        [torch.autograd.grad(v, x, retain_graph=True)[0] for v in y.flatten()]
    ).reshape(*y.shape, *x.shape)
    assert_close(jactri.jacobian_of(y, x), want, F64)
    # of the input itself too, as autograd.grad has it
    z = points().requires_grad_()
    z.register_hook(lambda g: 2 * g)
    assert_close(jactri.jacobian_of(z.sin(), z), 2 * truth(torch.sin, points()), F64)
    # but the inputs of a call are not the caller's tensors
    assert_close(jactri.jacobian(torch.sin, z), truth(torch.sin, z.detach()), F64)


@pytest.mark.filterwarnings("ignore:a hook on gradients")
def test_hooks_of_parameters():
    net = make(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    want = jactri.parameter_jacobian(net, points()).dense()
    handle = net[0].weight.register_hook(lambda g: 3 * g)
    got = jactri.parameter_jacobian(net, points())
    dense = got.dense()
    for name, block in want.items():
        assert_close(dense[name], block * (3 if name == "0.weight" else 1), F64)
    flat = torch.cat([b.flatten(2) for b in dense.values()], 2).flatten(0, 1)
    assert_close(got.gram().reshape(6, 6), flat @ flat.t(), F64)
    handle.remove()
    handle = net[0].weight.register_hook(lambda g: None)
    with jactri.fallback("error"):
        assert jactri.parameter_jacobian(net, points())._run.structure is not None
    handle.remove()
    net[0].register_full_backward_hook(lambda m, into, out: (into[0] * 3,))
    x = points().requires_grad_()
    rows = [torch.autograd.grad(v, net[0].weight, retain_graph=True)[0] for v in net(x).flatten()]
    got = jactri.parameter_jacobian(net, points()).dense()["0.weight"]
    assert_close(got, torch.stack(rows).reshape(got.shape), F64)


class Neighbour(torch.autograd.Function):
    """``y_n = x_n x_(n-1)``: samples mix, which only a probe can tell."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.roll(1, 0)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.roll(1, 0) + (g * x).roll(-1, 0)


@pytest.mark.filterwarnings("ignore:a hook on gradients")
def test_a_probe_is_not_fooled_by_hooks():
    def mixes(x, hook):
        y = Neighbour.apply(x.sin())
        y.register_hook(hook)
        return y.cos()

    for hook in (torch.zeros_like, lambda g: None):
        for call in (
            lambda f, x: jactri.jacobian(f, x, per_sample=True),
            jactri.laplacian,
            jactri.gradient,
        ):
            with pytest.raises(RuntimeError, match="samples mix"):
                call(lambda x, h=hook: mixes(x, h), points())


@pytest.mark.filterwarnings("ignore:a hook on gradients")
def test_a_hook_that_mixes_samples():
    with pytest.raises(RuntimeError, match="samples mix"):
        jactri.jacobian(hooked(lambda g: g + g.roll(1, 0)), points(), per_sample=True)


def test_a_probe_does_not_call_hooks():
    seen = []

    def func(x):
        y = Square.apply(x)
        y.register_hook(lambda g: seen.append(bool((g != 0).all())))
        return y.sin()

    jactri.jacobian(func, points(), per_sample=True)
    assert seen == [True, True]  # the comparison, in which no sample is left out


class Apart(torch.autograd.Function):
    """``y_n = x_n^2``, by a sum over all samples: only a probe tells that they do not mix."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.flip(0).square().flip(0)

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Squared(nn.Module):
    def __init__(self, square):
        super().__init__()
        self.layers, self.square = layers(), square

    def forward(self, x):
        return self.square(self.layers(x).tanh().t()).t().tanh()


def test_what_a_probe_computes_can_be_differentiated():
    """Maps keep what they compute, which is not to be cut from the graph."""
    x = points().requires_grad_()
    found = []
    for square in (Apart.apply, torch.square):
        net = make(lambda s=square: Squared(s))
        for p in net.parameters():
            p.grad = None
        jac = jactri.parameter_jacobian(net, x, create_graph=True).gram()
        laplacian = jactri.laplacian(net, x, create_graph=True)
        total = jac.square().sum() + laplacian.square().sum()
        total = total + jactri.jacobian(net, x, per_sample=True, create_graph=True).square().sum()
        found.append(torch.autograd.grad(total, [x, *net.parameters()]))
    for ours, want in zip(*found, strict=True):
        torch.testing.assert_close(ours, want)


@pytest.mark.filterwarnings("ignore:a hook on gradients")
def test_compiled():
    """What a hook does to gradients may be something else each time."""
    factor = [3.0]

    def func(x):
        y = x.sin()
        y.register_hook(lambda g: factor[0] * g)
        return y * x

    compiled = jactri.compile(func, points(), engine="fx")
    for factor[0] in (3.0, 2.0, 1.0):
        assert_close(compiled(points()), truth(func, points()), F64)
    assert compiled.graph is None


@pytest.mark.filterwarnings("ignore:a hook on gradients")
def test_compiled_modules():
    net = layers()
    net[0].register_full_backward_hook(lambda module, into, out: None)
    compiled = jactri.compile(net, points(), engine="fx")
    assert_close(compiled(points()), truth(net, points()), F64)
    net[0].register_full_backward_hook(lambda module, into, out: (3 * into[0],))
    compiled = jactri.compile(net, points(), engine="fx")
    assert_close(compiled(points()), truth(net, points()), F64)
    kernel = jactri.compile(net, points(), of=jactri.empirical_ntk, engine="fx")
    assert_close(kernel(points()), jactri.empirical_ntk(net, points()), F64)


def test_nothing_is_left_behind():
    net = make(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh()))
    net[0].register_full_backward_hook(lambda module, into, out: None)
    x = points().requires_grad_()
    y = net(x)
    jactri.jacobian_of(y, x)
    assert x.grad is None
    assert all(p.grad is None for p in net.parameters())
    handle = y.grad_fn.register_hook(lambda *_: None)
    assert len(handle.hooks_dict_ref()) == 1


def test_torchs_tracker_of_modules_only_looks():
    """Its hooks stand in every graph under FlopCounterMode, where torch.autograd.grad raises."""
    net, x = seeded(3, 4, 2), torch.randn(2, 3, dtype=F64)
    truth = jactri.jacobian(net, x)
    with FlopCounterMode(display=False):
        J = jactri.jacobian(net, x)
        a = x.clone().requires_grad_()
        assert_close(jactri.jacobian_of(net(a), a), truth, F64)
    assert_close(J, truth, F64)


def test_what_cancels_to_rounding_is_no_hook():
    """Second derivatives of a normalisation's sum are noise, which no two orders of sums give alike."""
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    y = nn.functional.group_norm(x, 1)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    x.register_hook(lambda grad: None)
    jactri.jacobian_of(g, x)
