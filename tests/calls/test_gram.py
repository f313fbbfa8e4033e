"""J^T M J and J M J^T against whole Jacobians of torch in float64, and the flops that they cost."""

import itertools

import pytest
import torch
from common import F64, Cube, unfollowed
from tolerances import assert_close, assert_gradients_close
from torch import nn
from torch.autograd.functional import jacobian as truth_of
from torch.utils.flop_counter import FlopCounterMode

import jactri
from jactri._src.base.cache import Cache
from jactri._src.meet import gram as module

N = 3


def mlp(*widths, act=nn.Tanh, last=False):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[: len(layers) if last else -1])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp(6, 9, 6)

    def forward(self, x):
        return x + self.inner(x)


def alone(x):
    """Samples one by one, in a loop that no rule can look through."""
    return torch.stack([Cube.apply(row) * row.sum() for row in x])


def across(a, b):
    """Both inputs are tied to the output, by factors that have nothing in common."""
    n = a.numel() // 6
    return a.view(n, 2, 3).sin().reshape(a.shape) + b.view(n, 3, 2).cos().reshape(a.shape)


def several(a, b):
    h = torch.sin(a) @ torch.linspace(-1, 1, 20, dtype=a.dtype).view(4, 5)
    return h * b.exp(), b * 2, (h * h).sum(1)


NETS = {
    "narrow": (lambda: mlp(7, 9, 4), [(N, 7)]),
    "wide": (lambda: mlp(4, 6, 30), [(N, 4)]),
    "wide, activation": (lambda: mlp(4, 6, 30, last=True), [(N, 4)]),
    "bottleneck": (lambda: mlp(20, 9, 3, 9, 20), [(N, 20)]),
    "linear": (lambda: nn.Linear(5, 4), [(N, 5)]),
    "two linear": (
        lambda: nn.Sequential(mlp(5, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 12)),
        [(N, 5)],
    ),
    "elementwise": (nn.Tanh, [(N, 5)]),
    "residual": (Residual, [(N, 6)]),
    "images": (
        lambda: nn.Sequential(
            nn.Linear(3, 8),
            nn.Unflatten(1, (2, 2, 2)),
            nn.ConvTranspose2d(2, 1, 3, 2),
            nn.Sigmoid(),
        ),
        [(N, 3)],
    ),
    "one sample": (lambda: mlp(4, 6, 3), [(1, 4)]),
    "a loop": (lambda: alone, [(N, 4)]),
    "several": (lambda: several, [(N, 4), (N, 5)]),
    "views across, in samples": (lambda: across, [(N, 6), (N, 6)]),
    "square": (lambda: nn.Softmax(-1), [(4, 4)]),
}
WHOLE = {
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)),
        [(6, 4)],
    ),
    "one point": (lambda: mlp(5, 7, 9), [(5,)]),
    "views across": (lambda: across, [(6,), (6,)]),
    "a scalar": (lambda: lambda x: (x**3).sum(), [(2, 3)]),
    "of a scalar": (lambda: lambda x: x * torch.arange(1.0, 4.0, dtype=x.dtype), [()]),
    "parameters": (
        lambda: lambda x: torch.sin(torch.linspace(0, 1, 40, dtype=x.dtype)[:, None] * x),
        [(3,)],
    ),
}


def case(name, dtype=F64):
    maker, shapes = {**NETS, **WHOLE}[name]
    torch.manual_seed(0)
    func = maker()
    if isinstance(func, nn.Module):
        func = func.to(dtype)
    gen = torch.Generator().manual_seed(1)
    return func, tuple(torch.randn(s, generator=gen, dtype=F64).to(dtype) for s in shapes)


def as_tuple(y):
    return y if isinstance(y, tuple) else (y,)


def weight_for(form, tensors, per_sample, symmetric=True):
    """One weight for each tensor, and it as dense matrices (N, o, o) or (o, o) of float64."""
    gen = torch.Generator().manual_seed(3)
    given, dense = [], []
    for t in tensors:
        shape = t.shape[1:] if per_sample else t.shape
        n = shape.numel()
        lead = t.shape[:1] if form.endswith("sample") else ()
        if form == "identity":
            given.append(None)
            whole = torch.eye(n, dtype=F64)
        elif form.startswith("diagonal"):
            w = torch.rand((*lead, *shape), generator=gen, dtype=F64)
            given.append(w.to(t.dtype))
            whole = torch.diag_embed(w.reshape(*lead, n))
        else:
            whole = torch.randn((*lead, n, n), generator=gen, dtype=F64)
            whole = whole + whole.mT if symmetric else whole
            given.append(whole.reshape((*lead, *shape, *shape)).to(t.dtype))
        dense.append(whole)
    return tuple(given), dense


def truth(kind, func, xs, dense, per_sample, create_graph=False):
    """``G[i][k]``, flat: (e, e), or (N, e, e)."""
    if isinstance(func, nn.Module):
        func = func.double()
    wide = xs if create_graph else tuple(x.double() for x in xs)
    rows = truth_of(lambda *a: as_tuple(func(*a)), wide, create_graph=create_graph)
    ys = as_tuple(func(*wide))
    flat = []
    for row, y in zip(rows, ys, strict=True):
        flat.append([])
        for block, x in zip(row, wide, strict=True):
            if per_sample:
                n = y.shape[0]
                block = block.reshape(n, y[0].numel(), n, x[0].numel())
                block = block[torch.arange(n), :, torch.arange(n)]
            else:
                block = block.reshape(y.numel(), x.numel())
            flat[-1].append(block)
    if kind == "jjt":
        flat = [[b.mT for b in column] for column in zip(*flat, strict=True)]
    kept = len(flat[0])
    return [
        [
            sum(row[i].mT @ m @ row[k] for row, m in zip(flat, dense, strict=True))
            for k in range(kept)
        ]
        for i in range(kept)
    ]


def compare(got, want, kept, tupled, per_sample, dtype):
    got = got if tupled else ((got,),)
    for i, a in enumerate(kept):
        for k, b in enumerate(kept):
            shape = (*a.shape, *b.shape[per_sample:])
            assert got[i][k].shape == shape and got[i][k].dtype == dtype
            assert_close(got[i][k], want[i][k].reshape(shape), dtype, length=200)


FORMS = ["identity", "diagonal", "dense"]


def check(kind, name, form, per_sample, dtype=F64, symmetric=True, **options):
    func, xs = case(name, dtype)
    ys = as_tuple(func(*xs))
    contracted, kept = (ys, xs) if kind == "jtj" else (xs, ys)
    given, dense = weight_for(form, contracted, per_sample, symmetric)
    single = len(contracted) == 1
    call = getattr(jactri, kind)
    several_in = len(xs) > 1
    got = call(
        func,
        xs if several_in else xs[0],
        given[0] if single else given,
        per_sample=per_sample,
        **options,
    )
    tupled = several_in if kind == "jtj" else isinstance(func(*xs), tuple)
    want = truth(kind, func, xs, dense, per_sample)
    compare(got, want, kept, tupled, per_sample, dtype)
    if symmetric:
        for i, a in enumerate(kept):
            block = got[i][i] if tupled else got
            n = a[0].numel() if per_sample else a.numel()
            flat = block.reshape(-1, n, n)
            assert torch.equal(flat, flat.mT)
    return got


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["jtj", "jjt"])
@pytest.mark.parametrize("name", [*NETS, *WHOLE])
def test_whole(name, kind, form):
    check(kind, name, form, False)


@pytest.mark.parametrize("form", [*FORMS, "dense a sample"])
@pytest.mark.parametrize("kind", ["jtj", "jjt"])
@pytest.mark.parametrize("name", NETS)
def test_per_sample(name, kind, form):
    check(kind, name, form, True)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", ["jtj", "jjt"])
@pytest.mark.parametrize("name", ["wide", "bottleneck", "several", "images"])
def test_float32_and_weights_that_are_not_symmetric(name, kind, per_sample):
    check(kind, name, "identity", per_sample, torch.float32)
    check(kind, name, "dense", per_sample, F64, symmetric=False)


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", ["jtj", "jjt"])
@pytest.mark.parametrize(
    "name", ["wide, activation", "narrow", "bottleneck", "several", "elementwise", "residual"]
)
def test_chunks(name, kind, per_sample, chunk_size):
    for form in FORMS:
        check(kind, name, form, per_sample, chunk_size=chunk_size)


@pytest.mark.parametrize("name", [*NETS, *WHOLE])
def test_every_order(name, monkeypatch):
    """Whatever order is taken, also those that are not the cheapest, the result is the same."""
    found = module._found
    for kind in ("jtj", "jjt"):
        for per_sample in (False, True) if name in NETS else (False,):
            count = 1
            k = 0
            while k < count:

                def only(*args, k=k):
                    nonlocal count
                    every = found(*args)
                    count = len(every)
                    return every[k : k + 1]

                with monkeypatch.context() as patch:
                    patch.setattr(module, "_found", only)
                    patch.setattr(module, "_known", Cache())
                    check(kind, name, "diagonal", per_sample)
                    patch.setattr(module, "_known", Cache())
                    check(kind, name, "identity", per_sample, chunk_size=2)
                k += 1
            assert count > 1 or "across" in name


def test_samples_that_do_not_mix_leave_exact_zeros():
    func, (x,) = case("narrow")
    for kind in ("jtj", "jjt"):
        whole = getattr(jactri, kind)(func, x)
        for a in range(N):
            for b in range(N):
                if a != b:
                    assert not whole[a, :, b].any()
        each = getattr(jactri, kind)(func, x, per_sample=True)
        assert_close(whole[torch.arange(N), :, torch.arange(N)], each, F64, length=30)


def flops_of(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_a_last_linear_layer_is_contracted_first():
    """A decoder n-h-m: W^T W once for all samples, and nothing of m entries a sample."""
    n, h, m, samples = 4, 32, 900, 64
    func, x = mlp(n, h, m).double(), torch.randn(samples, n, dtype=F64)
    flops = flops_of(lambda: jactri.jtj(func, x, per_sample=True))
    forward = 2 * samples * (n * h + h * m)
    assert flops - forward <= 2 * m * h * h + 2 * samples * (h * h * n + h * n * n)
    weight = torch.rand(m, dtype=F64)
    with_weight = flops_of(lambda: jactri.jtj(func, x, weight, per_sample=True))
    assert with_weight == flops
    each = torch.rand(samples, m, m, dtype=F64)
    J = jactri.jacobian(func, x, per_sample=True)
    got = jactri.jtj(func, x, each, per_sample=True)
    assert_close(got, J.mT @ each @ J, F64, length=m)


def test_a_first_linear_layer_is_contracted_first():
    n, h, m, samples = 900, 32, 4, 64
    func, x = mlp(n, h, m).double(), torch.randn(samples, n, dtype=F64)
    flops = flops_of(lambda: jactri.jjt(func, x, per_sample=True))
    forward = 2 * samples * (n * h + h * m)
    assert flops - forward <= 2 * n * h * h + 2 * samples * (h * h * m + h * m * m)


def test_a_bottleneck_is_met():
    func, x = mlp(200, 60, 3, 60, 200).double(), torch.randn(8, 200, dtype=F64)
    formed = flops_of(lambda: jactri.jacobian(func, x, per_sample=True)) + 8 * 2 * 200**3
    for call in (jactri.jtj, jactri.jjt):
        assert flops_of(lambda call=call: call(func, x, per_sample=True)) < formed / 10


def test_memory_limit(monkeypatch):
    """J alone takes 4 MB; samples run in halves, or rows in chunks, where it does not fit."""
    func, x = mlp(8, 20, 1000, last=True).double(), torch.randn(64, 8, dtype=F64)
    want = jactri.jtj(func, x, per_sample=True)
    for limit in ("2MB", "300KB"):
        assert_close(
            jactri.jtj(func, x, per_sample=True, memory_limit=limit), want, F64, length=1000
        )
    weight = torch.rand(64, 1000, dtype=F64)
    J = jactri.jacobian(func, x, per_sample=True)
    whole = jactri.jtj(func, x, weight, memory_limit="6MB")
    got = whole[torch.arange(64), :, torch.arange(64)]
    assert_close(got, J.mT @ (weight.unsqueeze(2) * J), F64, length=1000)
    with pytest.raises(ValueError, match=r"takes .* and memory_limit is 1 kB"):
        jactri.jtj(func, x, per_sample=True, memory_limit=1000)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", ["jtj", "jjt"])
@pytest.mark.parametrize("name", ["wide", "bottleneck", "several", "residual"])
def test_create_graph(name, kind, per_sample, form):
    func, xs = case(name)
    xs = tuple(x.requires_grad_() for x in xs)
    ys = as_tuple(func(*xs))
    contracted = ys if kind == "jtj" else xs
    given, dense = weight_for(form, contracted, per_sample, symmetric=name != "wide")
    leaves = [w.detach().requires_grad_() for w in given if w is not None]
    if form == "identity":
        weights, dense_of = given, dense
    else:
        weights = tuple(leaves)
        dense_of = []
        for w, d in zip(leaves, dense, strict=True):
            flat = w.reshape(d.shape) if form == "dense" else torch.diag_embed(w.reshape(-1))
            dense_of.append(flat)
    got = getattr(jactri, kind)(
        func,
        xs if len(xs) > 1 else xs[0],
        weights if len(weights) > 1 else weights[0],
        True,
        per_sample=per_sample,
    )
    want = truth(kind, func, xs, dense_of, per_sample, create_graph=True)
    got = got if isinstance(got, tuple) else ((got,),)
    gen = torch.Generator().manual_seed(5)
    ours = theirs = 0
    for row, other in zip(got, want, strict=True):
        for g, w in zip(row, other, strict=True):
            c = torch.randn(w.shape, generator=gen, dtype=F64)
            ours = ours + (g.reshape(w.shape) * c).sum()
            theirs = theirs + (w * c).sum()
    wrt = (*xs, *leaves)
    first = torch.autograd.grad(ours, wrt, allow_unused=True)
    second = torch.autograd.grad(theirs, wrt, allow_unused=True)
    assert_gradients_close(first, second, F64, length=200)


def test_graphs_that_cannot_be_read():
    func = lambda x: unfollowed(torch.fft.fft(x.exp())).abs()  # noqa: E731
    x = torch.randn(N, 5, dtype=F64)
    J = truth_of(func, x)
    assert_close(jactri.jtj(func, x), torch.einsum("abij,abkl->ijkl", J, J), F64, length=15)
    P = torch.randn(5, 5, dtype=F64)
    J = jactri.jacobian(func, x, per_sample=True)
    assert_close(jactri.jjt(func, x, P, per_sample=True), J @ P @ J.mT, F64, length=25)


@pytest.mark.parametrize("form", FORMS)
def test_inside_of_transforms(form):
    func, (x,) = case("wide")
    y = func(x)
    (weight,), _ = weight_for(form, (y,), True)
    want = jactri.jtj(func, x, weight, per_sample=True)
    got = torch.func.vmap(lambda row: jactri.jtj(func, row, weight))(x)
    assert_close(got, want, F64, length=30)
    got = torch.func.grad(lambda a: jactri.jtj(func, a, weight, per_sample=True).pow(2).sum())(x)
    x.requires_grad_()
    ours = torch.autograd.grad(jactri.jtj(func, x, weight, True, per_sample=True).pow(2).sum(), x)
    assert_gradients_close(ours, [got], F64, length=100)


def test_outputs_and_unused():
    x = torch.randn(N, 4, dtype=F64)
    output, g = jactri.jtj(lambda a, b: a * 2, (x, x), return_output=True)
    assert torch.equal(output, 2 * x) and not output.requires_grad
    assert torch.equal(g[0][0].reshape(12, 12), 4 * torch.eye(12, dtype=F64))
    assert not g[0][1].any() and not g[1][0].any() and not g[1][1].any()
    assert g[0][1].shape == (N, 4, N, 4)
    assert not jactri.jjt(lambda a: torch.ones(2, dtype=F64), x).any()
    assert jactri.jtj(lambda a: a @ a.t(), torch.zeros(0, 4, dtype=F64)).shape == (0, 4, 0, 4)
    empty = jactri.jtj(nn.Linear(4, 2).double(), torch.zeros(0, 4, dtype=F64), per_sample=True)
    assert empty.shape == (0, 4, 4)


def test_inference_mode():
    func, (x,) = case("wide")
    want = jactri.jjt(func, x)
    with torch.inference_mode():
        assert torch.equal(jactri.jjt(func, x), want)


def test_errors():
    func, (x,) = case("wide")
    w = torch.rand(4, dtype=F64)
    with pytest.raises(
        RuntimeError, match=r"weight for outputs\[0\] has shape \(4,\).*\(30,\) \(diagonal\)"
    ):
        jactri.jtj(func, x, w, per_sample=True)
    with pytest.raises(
        RuntimeError, match=r"expected .* \(3, 4, 3, 4\) \(dense\), \(3, 4\) \(diagonal\)"
    ):
        jactri.jjt(func, x, w)
    with pytest.raises(RuntimeError, match=r"torch\.diag_embed"):
        jactri.jjt(func, x, torch.rand(N, 4, dtype=F64), per_sample=True)
    with pytest.raises(RuntimeError, match="nested as the outputs: got 2 for 1"):
        jactri.jtj(func, x, (None, None))
    with pytest.raises(RuntimeError, match=r"torch\.int64"):
        jactri.jtj(func, x, torch.ones(30, dtype=torch.int64), per_sample=True)
    with pytest.raises(TypeError, match="weight"):
        jactri.jtj(func, x, 2.0)
    with pytest.raises(RuntimeError, match="floating point"):
        jactri.jtj(func, x.long())
    with pytest.raises(RuntimeError, match="samples mix"):
        jactri.jtj(lambda a: a - a.mean(0), x, per_sample=True)
    with pytest.raises(ValueError, match="chunk_size"):
        jactri.jtj(func, x, chunk_size=-1)
    with pytest.raises(IndexError):
        jactri.jtj(func, ())
