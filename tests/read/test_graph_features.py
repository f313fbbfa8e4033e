"""Whatever autograd records, jactri reads: control flow, views, custom functions, checkpoints, transforms."""

import gc
import threading
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import F64, MODES, Cube, make, x3, x23
from tolerances import assert_close, assert_same_tree
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import jactri


class StraightThrough(torch.autograd.Function):
    """Its derivative is not that of its forward: jactri must take its word, as autograd does."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g * 2


class NumpyExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.new_tensor(np.exp(x.detach().cpu().numpy()))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g.new_tensor(g.cpu().numpy() * y.cpu().numpy())


class TwoInTwoOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n, y):
        ctx.save_for_backward(x, y)
        ctx.n = n
        return x * y * n, x.sum() + y

    @staticmethod
    def backward(ctx, g, h):
        x, y = ctx.saved_tensors
        return g * y * ctx.n + h.sum(), None, g * x * ctx.n + h


class NoGradientForOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable()
        return x * 2 + y

    @staticmethod
    def backward(ctx, g):
        return None if g is None else g * 2, None


class InPlaceCustom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(3)

    @staticmethod
    def backward(ctx, g):
        return g * 3


class NewStyle(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


def branch(x):
    return x.sin() if x.sum() > 0 else x.exp()


def loop(x):
    while x.norm() < 20:
        x = x * 1.7 + 0.1
    return x


def by_item(x):
    return x ** int(x.max().item() + 1)


def numpy_inside(x):
    return x * float(np.tanh(x.detach().cpu().numpy()).sum())


def under_no_grad(x):
    with torch.no_grad():
        scale = x.exp()
    return x * scale


def grad_reenabled(x):
    with torch.no_grad():
        a = x * 2
        with torch.enable_grad():
            b = x * 3
    return a + b


weight = torch.tensor([1.0, 2.0, 3.0], dtype=F64, requires_grad=True)
grown_weight = weight.exp()


def closure_over_a_leaf(x):
    return (x * weight).sin() + weight


def closure_over_a_graph(x):
    return x * grown_weight


def view_chain(x):
    y = x.clone()
    y.view(6)[::2].mul_(3)
    y[0].add_(y[1])
    y.t()[1].copy_(x[:, 0] * x[:, 2])
    return y * y


def write_then_overwrite(x):
    y = x * 2
    y[0] = x[1] ** 2
    y[0] = x[0] * x[1]
    return y


def write_into_base_after_view(x):
    y = x.clone()
    v = y[1]
    y.mul_(2)
    return v * y[0]


def inner_grad(x):
    y = x.clone() if x.requires_grad is False else x
    with torch.enable_grad():
        (g,) = torch.autograd.grad((y**3).sum(), y, create_graph=True)
    return g


def hidden_state(x):
    h = torch.zeros(2, 3, dtype=F64)
    for t in range(3):
        h = torch.tanh(h @ torch.ones(3, 3, dtype=F64) * 0.3 + x * (t + 1))
    return h


def fan_out(x):
    return sum(torch.sin(x * k) for k in range(1, 60))


def reused(x):
    y = x.sin()
    return y * y + y.exp() * x + y


def input_in_every_layer(x):
    y = x
    for _ in range(5):
        y = torch.tanh(y + x) * x
    return y


def dropped_outputs(x):
    a, b, c = x.unbind(1)
    values, _ = torch.stack([a, c], 1).max(1)
    return values + 0 * b.detach()


shared = make(lambda: nn.Linear(3, 3))
tied = make(lambda: nn.Linear(3, 3))
two_layers = make(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
lstm = make(lambda: nn.LSTM(3, 2, batch_first=True))
gru = make(lambda: nn.GRU(3, 2, batch_first=True))

FEATURES = {
    "branch taken": (branch, x3),
    "branch not taken": (branch, lambda: -x3()),
    "loop": (loop, x3),
    "item": (by_item, x3),
    "numpy inside": (numpy_inside, x3),
    "no_grad": (under_no_grad, x3),
    "grad re-enabled": (grad_reenabled, x3),
    "detach": (lambda x: x * x.detach() + x.data, x3),
    "stop-gradient trick": (lambda x: (x.round() - x).detach() + x, x3),
    "closure over a leaf": (closure_over_a_leaf, x3),
    "closure over a graph": (closure_over_a_graph, x3),
    "view chain with writes": (view_chain, x23),
    "write, then overwrite": (write_then_overwrite, x23),
    "view read after a write to its base": (write_into_base_after_view, x23),
    "setitem with a mask": (lambda x: (lambda y: (y.__setitem__(y > 0, 0.5), y)[1])(x * 2), x23),
    "setitem with a broadcast": (
        lambda x: (lambda y: (y.__setitem__((slice(None), 1), x[0, 0]), y)[1])(x * 2), x23),
    "custom function": (Cube.apply, x3),
    "custom function inside": (lambda x: Cube.apply(x.sin()).cos(), x23),
    "custom function twice": (lambda x: Cube.apply(Cube.apply(x)), x3),
    "straight-through": (lambda x: StraightThrough.apply(x) * x, x3),
    "numpy, once differentiable": (lambda x: NumpyExp.apply(x * 0.5).sum(-1), x23),
    "custom, two in two out": (lambda x: TwoInTwoOut.apply(x, 3, x.cos()), x3),
    "custom, one output used": (lambda x: TwoInTwoOut.apply(x, 3, x.cos())[1], x3),
    "custom, None gradient": (lambda x: NoGradientForOne.apply(x, x.sin()), x3),
    "custom, in place": (lambda x: InPlaceCustom.apply(x * 2) * x, x3),
    "custom, new style": (lambda x: NewStyle.apply(x) * x, x3),
    "checkpoint": (lambda x: checkpoint(two_layers, x, use_reentrant=False), x23),
    "checkpoint between layers": (
        lambda x: checkpoint(lambda y: y.sin() * y, x * 2, use_reentrant=False).sum(-1), x23),
    "inner torch.func.vmap": (lambda x: torch.func.vmap(lambda r: r.sin() * r.sum())(x), x23),
    "inner torch.func.grad": (lambda x: torch.func.grad(lambda y: (y**3).sum())(x), x3),
    "inner vmap of grad": (
        lambda x: torch.func.vmap(torch.func.grad(lambda y: (y**3).prod()))(x), x23),
    "inner torch.func.jacrev": (lambda x: torch.func.jacrev(lambda y: y.sin() * y.sum())(x), x3),
    "inner functional_call": (
        lambda x: torch.func.functional_call(shared, dict(shared.named_parameters()), (x,)), x23),
    "inner autograd.grad": (inner_grad, x3),
    "inner jactri.jacobian": (
        lambda x: jactri.jacobian(lambda y: y**3, x, create_graph=True).sum(0), x3),
    "recurrence by hand": (hidden_state, x23),
    "LSTM": (lambda x: lstm(x[None])[0], x23),
    "GRU": (lambda x: gru(x[None])[0], x23),
    "weight sharing": (lambda x: shared(torch.tanh(shared(x))), x23),
    "tied weights": (lambda x: F.linear(torch.tanh(tied(x)), tied.weight.t()), x23),
    "fan-out": (fan_out, x3),
    "intermediate used several times": (reused, x3),
    "input used in every layer": (input_in_every_layer, x23),
    "dropped outputs of a node": (dropped_outputs, x23),
    "returns the input": (lambda x: x, x3),
    "returns a view of the input": (lambda x: x[0], x23),
    "returns it twice": (lambda x: (x, x), x3),
    "returns an intermediate and what follows": (lambda x: (lambda y: (y, y * y))(x.sin()), x3),
    "outputs alias one another": (lambda x: (lambda y: (y, y[0], y.T))(x.exp()), x23),
    "split and chunk": (lambda x: torch.cat([p * k for k, p in enumerate(x.split(1, 1))], 1), x23),
    "slogdet": (lambda x: torch.linalg.slogdet(x @ x.T).logabsdet, x23),
    "fft": (lambda x: torch.fft.rfft(x).abs(), x23),
    "parametrisation": (
        nn.utils.parametrizations.weight_norm(make(lambda: nn.Linear(3, 2))), x23),
    "forward hook": (make(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh())), x23),
    "buffer": (make(lambda: nn.BatchNorm1d(3)).eval(), x23),
    "pickled module path": (torch.nn.Identity(), x23),
    "no dependence at all": (lambda x: torch.ones(2, 2, dtype=F64, requires_grad=True) * 2, x3),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FEATURES)
def test_feature(name, mode):
    func, inputs = FEATURES[name]
    truth = torch.autograd.functional.jacobian(func, inputs())
    ours = jactri.jacobian(func, inputs(), strategy=mode)
    assert_same_tree(ours, truth, F64, length=256)


@pytest.mark.parametrize("name", FEATURES)
def test_feature_with_its_tangents(name):
    """Pushed while the function runs, op by op."""
    func, inputs = FEATURES[name]
    x = inputs()
    t = torch.stack([x.cos(), x, x - 1])
    if name == "inner autograd.grad":
        with pytest.raises(RuntimeError, match=r"calls torch\.autograd\.grad"):
            jactri.jvp(func, x, t, differentiate=None)
        return
    rows = torch.autograd.functional.jacobian(func, inputs())
    _, product = jactri.jvp(func, x, t, differentiate=None)
    pairs = zip(rows, product, strict=True) if isinstance(rows, tuple) else [(rows, product)]
    for j, p in pairs:
        axes = list(range(1, t.dim())), list(range(j.dim() - x.dim(), j.dim()))
        assert_close(p, torch.tensordot(t, j, axes), F64, length=256)


def test_forward_hooks():
    net = make(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh()))
    handle = net[0].register_forward_hook(lambda m, args, out: out * 3)
    truth = torch.autograd.functional.jacobian(net, x23())
    assert_close(jactri.jacobian(net, x23()), truth, F64, length=64)
    handle.remove()


@pytest.mark.parametrize("mode", MODES)
def test_retain_grad_inside_stays_silent(mode):
    kept = []

    def func(x):
        y = x.sin()
        y.retain_grad()
        kept.append(y)
        return y * 2

    truth = torch.autograd.functional.jacobian(func, x3())
    kept.clear()
    assert_close(jactri.jacobian(func, x3(), strategy=mode), truth, F64)


@pytest.mark.parametrize("mode", MODES)
def test_a_chain_of_2000_ops(mode):
    def func(x):
        for k in range(1000):
            x = torch.sin(x) + 1e-3 * (k % 3)
        return x

    truth = torch.autograd.functional.jacobian(func, x3())
    assert_close(jactri.jacobian(func, x3(), strategy=mode), truth, F64, length=2000)
    j = jactri.jacobian(func, x3(), per_sample=True, strategy=mode)
    assert_close(j, truth.diagonal(), F64, length=2000)


def test_a_chain_of_2000_writes():
    def func(x):
        y = x.clone()
        for k in range(1000):
            y[k % 3].mul_(1.001)
        return y

    truth = torch.autograd.functional.jacobian(func, x3())
    assert_close(jactri.jacobian(func, x3()), truth, F64, length=2000)


@pytest.mark.parametrize("mode", MODES)
def test_large_fan_out_and_fan_in(mode):
    def func(x):
        return torch.stack([(x * k).sin().sum() for k in range(400)])

    truth = torch.func.jacrev(func)(x3())
    assert_close(jactri.jacobian(func, x3(), strategy=mode), truth, F64, length=1200)


@pytest.mark.parametrize("mode", MODES)
def test_diamonds_do_not_take_exponential_time(mode):
    """2^60 paths lead from the output to the input; every node is visited once."""

    def func(x):
        for _ in range(60):
            x = torch.sin(x) * 0.5 + x * 0.5
        return x

    truth = torch.autograd.functional.jacobian(func, x3())
    assert_close(jactri.jacobian(func, x3(), strategy=mode), truth, F64, length=60)


def test_many_outputs_and_inputs():
    xs = tuple(x3() + k for k in range(20))

    def func(*xs):
        return tuple((a * b).sum() for a, b in pairwise(xs))

    truth = torch.autograd.functional.jacobian(func, xs)
    for mode in MODES:
        assert_same_tree(jactri.jacobian(func, xs, strategy=mode), truth, F64)


def test_nothing_is_kept_alive():
    """The graph, the leaves and the outputs are gone after the call, without a garbage collection."""
    gc.collect()
    gc.disable()
    try:
        refs = []

        def func(x):
            refs.append(weakref.ref(x))
            y = torch.tanh(x @ x.T)
            refs.append(weakref.ref(y))
            return y

        for options in ({}, {"strategy": "forward-mode"}, {"strategy": "reverse-mode"}):
            jactri.jacobian(func, x23(), **options)
        alive = [r for r in refs if r() is not None]
        assert not alive
    finally:
        gc.enable()


def test_a_thread_without_a_main_loop():
    results = []

    def work():
        results.append(jactri.jacobian(make(lambda: nn.Linear(3, 2)), x23()))

    t = threading.Thread(target=work)
    t.start()
    t.join()
    truth = torch.autograd.functional.jacobian(make(lambda: nn.Linear(3, 2)), x23())
    assert_close(results[0], truth, F64, length=32)


@pytest.mark.parametrize("mode", MODES)
def test_module_backward_hooks_are_identities(mode):
    """Full backward hooks wrap a module's tensors in nodes of their own: no layer becomes opaque."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Bilinear(4, 4, 2)).double()
    two = nn.ModuleList([net[:2], net[2]])

    def f(x, z):
        h = two[0](x)
        return two[1](h, z) + z.sum(-1, keepdim=True)

    xs = torch.randn(5, 3).double(), torch.randn(5, 4).double()
    want = torch.autograd.functional.jacobian(f, xs)
    handles = [m.register_full_backward_hook(lambda *_: None) for m in two.modules()]
    handles += [m.register_full_backward_pre_hook(lambda *_: None) for m in two.modules()]
    with jactri.fallback("error"):
        assert_same_tree(jactri.jacobian(f, xs, strategy=mode), want, F64)
        lap = jactri.laplacian(lambda x: f(x, xs[1]), xs[0])
    for handle in handles:
        handle.remove()
    assert_close(lap, jactri.laplacian(lambda x: f(x, xs[1]), xs[0]), F64)


def test_module_backward_hooks_with_several_tensors_and_none():
    """Inputs without gradients, integers among them, and several outputs pass the hooks as they are."""

    class Pair(nn.Module):
        def forward(self, x, i, c):
            return x[i] * c, x.sum(0), i

    pair = Pair()
    pair.register_full_backward_hook(lambda *_: None)
    pair.register_full_backward_pre_hook(lambda *_: None)
    i, c = torch.tensor([2, 0]), torch.randn(2, 3).double()

    def f(x):
        y, z, _ = pair(x.sin(), i, c)
        return y, z

    x = torch.randn(4, 3).double()
    with jactri.fallback("error"):
        got = jactri.jacobian(f, x)
    assert_same_tree(got, torch.autograd.functional.jacobian(f, x), F64)


@pytest.mark.parametrize(
    "view", [((2, 3), (3, 1)), ((2, 3), (1, 4), 2), ((2, 2), (6, 2), 1), ((2, 3), (2, 1))]
)
def test_writes_to_views_by_strides(view):
    """Against the same write by index: torch's own backward of as_strided_scatter (2.13) is not its derivative."""
    x, s = torch.randn(12, dtype=F64), torch.randn(view[0], dtype=F64)
    at = torch.arange(12).as_strided(*view)

    def func(x, s):
        return x.sin().as_strided_scatter(s.square(), *view).exp()

    def twin(x, s):
        y = x.sin()
        for place, entry in zip(at.flatten().tolist(), s.square().flatten(), strict=True):
            y = torch.cat([y[:place], entry[None], y[place + 1 :]])
        return y.exp()

    assert torch.equal(func(x, s), twin(x, s))
    truth = torch.autograd.functional.jacobian(twin, (x, s))
    for mode in MODES:
        for ours, theirs in zip(jactri.jacobian(func, (x, s), strategy=mode), truth, strict=True):
            assert_close(ours, theirs, F64, what=mode)
    second = torch.autograd.functional.hessian(lambda x: twin(x, s).sum(), x)
    lap = jactri.laplacian(lambda x: func(x, s).sum(), x)
    assert_close(lap, second.trace(), F64, scale=second.abs().max().item())
