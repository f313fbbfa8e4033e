"""Complex values inside of real functions, carried as pairs of reals: structure, and what is left to autograd."""

import warnings

import pytest
import torch
from cases.others import CASES, fourier_block
from common import F64, MODES, unfollowed, x3, x23
from test_memory import live_peak
from tolerances import assert_close
from torch.autograd.functional import jacobian as truth_of

import jactri
from jactri._src.base.constants import arbitrary
from jactri._src.maps.complexes import Complex
from jactri._src.read import complexes
from jactri._src.read.graph import UnsupportedGraph
from jactri._src.read.reading import read
from jactri._src.rules import REGISTRY

LEFT = "complex_solve", "complex_eigenvalues", "complex_written_mixed", "complex_written_part"
"""Cases that autograd computes as a whole."""

W = torch.linspace(0.1, 2, 60, dtype=F64)


def transfer(p):
    z = (p[0] + 2j * W * p[1]) / (p[2] - W * W + 2j * p[1] * p[2] * W)
    return torch.stack([z.abs().log(), z.angle()])


def exact(func, *inputs, **options):
    """Held against autograd, without a fallback."""
    with jactri.fallback("error"):
        return [jactri.jacobian(func, *inputs, strategy=mode, **options) for mode in MODES]


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_transfer_function(chunk_size):
    want = truth_of(transfer, x3().abs())
    for J in exact(transfer, x3().abs(), chunk_size=chunk_size):
        assert_close(J, want, F64, length=60)
    plan = jactri.explain(transfer, x3().abs())
    assert plan.fallbacks == ()
    assert max(s.columns for s in plan.steps if s.shape == (60, 2)) <= 3


def test_elementwise_ops_keep_all_axes():
    def func(x):
        return (torch.exp(1j * x).tanh() * (x + 2j)).sgn().imag

    x = torch.rand(3, 5, dtype=F64) + 0.1
    assert all(s.columns == 1 for s in jactri.explain(func, x).steps)
    with jactri.fallback("error"):
        got = jactri.diagonal(func, x), jactri.divergence(func, x)
    want = truth_of(func, x).reshape(15, 15).diag().view(3, 5)
    assert_close(got[0], want, F64, length=4)
    assert_close(got[1], want.sum(1), F64, length=20)


def test_samples_are_proven_to_be_apart():
    x = torch.randn(3, 2, 5, 4, dtype=F64)
    w = torch.randn(2, 2, 2, 2, 2, dtype=F64)
    want = truth_of(lambda v: fourier_block(v, w), x).diagonal(0, 0, 4).movedim(-1, 0)
    for J in exact(lambda v: fourier_block(v, w), x, per_sample=True):
        assert_close(J, want, F64, length=60)
    turn = torch.tensor([2, 0, 1])

    def moved(x):
        return torch.fft.fft(x)[turn].exp()[turn.argsort()].real

    x = x[:, 0, 0]
    for J in exact(moved, x, per_sample=True):
        assert_close(J, truth_of(moved, x).diagonal(0, 0, 2).movedim(-1, 0), F64, length=20)
    with pytest.raises(RuntimeError, match="FftR2C"):
        jactri.jacobian(lambda x: torch.fft.fft(x, dim=0).abs(), x, per_sample=True)


@pytest.mark.parametrize("name", ["jvp", "vjp"])
def test_products(name):
    x, t = torch.randn(4, 6, dtype=F64), torch.randn(4, 6, dtype=F64)

    def func(x):
        return torch.fft.irfft(torch.fft.rfft(x.exp(), norm="ortho") * 1j ** torch.arange(4), n=6)

    _, want = getattr(torch.autograd.functional, name)(func, x, t)
    with jactri.fallback("error"):
        assert_close(getattr(jactri, name)(func, x, t)[1], want, F64, length=40)


def test_hooks_on_complex_tensors():
    def func(factor):
        def run(x):
            z = torch.fft.rfft(x.exp())
            if z.requires_grad:
                z.register_hook(lambda g: g * factor)
            return z.abs()

        return run

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for J in exact(func(1), x23()):
            assert_close(J, truth_of(func(1), x23()), F64, length=12)
    with pytest.warns(UserWarning, match="a hook on gradients"):
        J = jactri.jacobian(func(2), x23())
    assert_close(J, truth_of(func(2), x23()), F64, length=12)


def test_where_derivatives_are_infinite():
    """Among complex numbers an op has poles that it has not among reals; what is selected away there is 0."""

    def func(x):
        z = torch.complex(torch.zeros_like(x), x)  # tanh has a pole at i pi / 2
        return torch.where(x < 1, z.tanh().imag, 0.0) + torch.relu(z.sqrt().real - 1)

    for point in (0.4, torch.pi / 2, 0.0):
        x = torch.tensor([point], dtype=F64)
        for mode in MODES:
            got = jactri.jacobian(func, x, strategy=mode)
            torch.testing.assert_close(got, truth_of(func, x), equal_nan=True)


def test_a_rule_of_the_caller_is_for_real_numbers():
    with jactri.rule("SinhBackward0", replace=True)(lambda node: node.elementwise(2.0)):
        J = jactri.jacobian(lambda x: (1j * x).sinh().imag, x3())
    assert_close(J, x3().cos().diag(), F64)


def images(x):
    return torch.fft.irfft2(torch.fft.rfft2(x.repeat(8, 1, 1) ** 2) * 1j, s=x.shape).sum(0)


@pytest.mark.parametrize("strategy", MODES[1:])
def test_limits_are_kept(strategy):
    x = torch.randn(24, 24, dtype=F64)
    y = images(leaf := x.clone().requires_grad_())
    want = jactri.jacobian(images, x)
    for beside in (1 << 20, 4 << 20):
        limit = want.nbytes + beside
        options = {"strategy": strategy, "memory_limit": limit}
        peak = live_peak(lambda o=options: jactri.jacobian_of(y, leaf, **o))
        assert peak <= 1.05 * limit
        assert_close(jactri.jacobian(images, x, **options), want, F64, length=600)


def test_maps_are_adjoint():
    """<c, push(t)> = <pull(c), t>, whatever the memory of a block is."""
    x = torch.randn(2, 3, 4, dtype=F64, requires_grad=True)
    w = torch.randn(4, 4, dtype=torch.complex128)

    def func(x):
        z = torch.fft.fftn(x.exp(), dim=(2, 1), norm="ortho") @ w
        z = torch.fft.ihfft(torch.fft.hfft(z.sin()), n=5)[:, torch.tensor([2, 0, 2])]
        return torch.fft.irfft2(z.flip(1) * 2j, s=(3, 5)) + z.cumsum(1).abs().sum(2, True)

    graph, seen = read([func(x)], [x]), set()
    for value in graph.values:
        for s, edge in value.sources:
            if not isinstance(edge, Complex):
                continue
            t, c = (
                arbitrary((2, *graph.values[v].shape), x, step)
                for v, step in ((s, 1.3), (graph.values.index(value), 2.4))
            )
            pushed, pulled = edge.push(t, False)[0], edge.pull(c, False)[0]
            assert_close((c * pushed).sum(), (pulled * t).sum(), F64, length=400)
            turned = t.mT.contiguous().mT if t.dim() > 2 else t
            assert_close(edge.push(turned, False)[0], pushed, F64, length=40)
            seen.add((edge.name, edge.before, edge.after))
    assert {("fft", *ends) for ends in ((False, True), (True, True), (True, False))} <= seen
    assert ("matmul", True, True) in seen and ("diagonal", True, True) in seen


def test_all_ops_with_rules_are_in_the_table(monkeypatch):
    seen, base = set(), complexes.read

    def noted(g):
        found = base(g)
        if found is not None:
            seen.add(g.name)
        return found

    monkeypatch.setattr(complexes, "read", noted)
    for case in CASES:
        func, inputs = case.build()
        leaves = [x.requires_grad_() for x in inputs]
        out = func(*leaves)
        try:
            read(
                [y for y in (out if isinstance(out, tuple) else (out,)) if y.requires_grad], leaves
            )
        except UnsupportedGraph:
            assert case.name in LEFT
    assert seen == {name for name, record in REGISTRY.items() if record.complex is not None}


REFUSED = {
    "an op without a rule": lambda x: unfollowed(torch.fft.fft(x)).abs(),
    "several outputs": lambda x: torch.linalg.eigvals(torch.diag(x) + 1j).real,
    "into one with a rule": lambda x: torch.fft.fft(x).prod().real,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_to_autograd(name):
    func = REFUSED[name]
    with pytest.raises(jactri.FallbackError, match="complex"):
        exact(func, x3())
    assert_close(jactri.jacobian(func, x3()), truth_of(func, x3()), F64, length=20)


def test_complex_ends_are_as_they_were():
    with pytest.raises(RuntimeError, match=r"outputs\[0\] is complex .*view_as_real"):
        jactri.jacobian(torch.fft.fft, x3())
    z = torch.complex(x3(), x3().flip(0))
    func = lambda z: (z * z.conj().exp()).imag  # noqa: E731
    assert_close(jactri.jacobian(func, z), truth_of(func, z), F64)


def pairs(z):
    return torch.view_as_real(z * 1)


def of_view(x):
    r = torch.zeros(2, 3, 2, dtype=F64)
    torch.view_as_complex(r)[:, 1:] = torch.exp(1j * x[:, 1:])
    return r * 1


def into_constant(x):
    q = torch.exp(1j * torch.arange(6, dtype=F64).view(2, 3))
    q[:, 0].mul_(x[:, 0])
    q[:, 1:].add_(x[:, 1:], alpha=1 + 1j)
    return pairs(q)


AMISS = {
    "a complex view of a real tensor": of_view,
    "real numbers into complex ones": into_constant,
    "alpha of index_add": lambda x: pairs(
        torch.exp(1j * x).index_add(1, torch.tensor([1, 1, 0]), torch.exp(2j * x), alpha=1j)
    ),
    "infinite": lambda x: (
        (2 * torch.complex(x - x[0, 0], x).sqrt()).real
        + (2 * torch.complex(x - x[0, 0].detach(), x * 0).sqrt()).real
    ),
}


@pytest.mark.parametrize("name", AMISS)
def test_what_pairs_would_have_otherwise_is_left_to_autograd(name):
    """The gradients of a graph of pairs are held against those of autograd."""
    func, x = AMISS[name], x23()
    want = truth_of(func, x)
    for strategy in MODES:
        got = jactri.jacobian(func, x, strategy=strategy)
        assert_close(got.nan_to_num(), want.nan_to_num(), F64, length=60)
        assert torch.equal(got.isnan(), want.isnan())
    with pytest.raises(jactri.FallbackError, match="complex"):
        exact(func, x)


def test_complex_alpha_of_real_numbers():
    def func(x):
        z = torch.exp(1j * x)
        return pairs(
            torch.add(z, x.exp(), alpha=1j) * torch.sub(z, x, alpha=1 + 2j)
            + torch.rsub(x, z, alpha=1 - 2j)
        )

    x = x23().requires_grad_()
    want = truth_of(func, x, create_graph=True)
    for J in exact(func, x, create_graph=True):
        assert_close(J, want, F64, length=60)
        ours, theirs = (
            torch.autograd.grad(j.square().sum(), x, retain_graph=True)[0] for j in (J, want)
        )
        assert_close(ours, theirs, F64, length=200)
