"""What laplacian takes and refuses: chunks, weights, shapes, transforms, bad input; and what it computes."""

import contextlib

import pytest
import torch
from common import F64, make
from second import FUNCTIONS, NETWORKS, Attention, Residual, first, mlp, scale_of, second, truth
from test_memory import live_peak
from tolerances import assert_close
from torch import nn
from torch.func import hessian, vmap
from torch.utils.flop_counter import FlopCounterMode

import jactri
from jactri._src.calls import laplacian as calls
from jactri._src.prologue.arguments import Options
from jactri._src.second import forward

pytestmark = pytest.mark.usefixtures("one_thread")

F32 = torch.float32


@pytest.mark.parametrize("options", [
    {"chunk_size": 1}, {"chunk_size": 2}, {"memory_limit": 4000}, {"memory_limit": "1MB"}, {"backend": "torch"},
])  # fmt: skip
@pytest.mark.parametrize("shape", [(9, 4), (1, 4), (4,)])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks(options, shape, weighted):
    torch.manual_seed(0)
    net, x = make(Residual), torch.randn(shape, dtype=F64)
    weight = torch.randn(4, 4, dtype=F64) if weighted else None
    h = second(net, x if len(shape) == 2 else x.unsqueeze(0))
    a = torch.eye(4, dtype=F64) if weight is None else weight
    want = (h * a).sum((-2, -1))
    y, jacobian, lap = jactri.laplacian(net, x, weight, return_lower=True, **options)
    assert_close(lap, want.reshape(lap.shape), F64, length=100)
    assert_close(jacobian, jactri.gradient(net, x), F64, length=100)
    assert_close(y, net(x), F64)


def test_chunks_of_samples_are_taken(monkeypatch):
    """Samples in ranges, of which the last is shorter."""
    torch.manual_seed(0)
    lengths = []
    narrowed = forward.narrowed

    def noted(graph, curves, where, start, length):
        lengths.append(length)
        return narrowed(graph, curves, where, start, length)

    monkeypatch.setattr(calls, "narrowed", noted)
    monkeypatch.setattr(calls, "CACHE_BYTES", 1)
    monkeypatch.setattr(calls, "ROWS", 20)
    for name in ("residual", "norms", "groups", "attention", "conv"):
        build, shape = NETWORKS[name]
        net, x = make(build), torch.randn(11, *shape[1:], dtype=F64)
        lengths.clear()
        _y, jacobian, lap = jactri.laplacian(net, x, return_lower=True)
        assert len(set(lengths[1:])) == 2 or len(lengths) > 11, lengths
        assert_close(lap, truth(net, x), F64, length=1000)
        assert_close(jacobian, first(net, x), F64, length=100)


def test_chunks_of_seeds_are_taken(monkeypatch):
    """Where one sample is more than the cache holds; but not where ties would be lost."""
    torch.manual_seed(0)
    seen = []
    run = forward.LaplacianRun.__call__

    def noted(self, directions):
        seen.append(None if directions is None else directions.shape[0])
        return run(self, directions)

    monkeypatch.setattr(forward.LaplacianRun, "__call__", noted)
    for name, size in {"CACHE_BYTES": 1, "ROWS": 1, "FEWEST": 2}.items():
        monkeypatch.setattr(calls, name, size)
    for name in ("residual", "norms", "groups", "conv"):
        build, shape = NETWORKS[name]
        net, x = make(build), torch.randn(3, *shape[1:], dtype=F64)
        seen.clear()
        _y, jacobian, lap = jactri.laplacian(net, x, return_lower=True)
        assert set(seen) <= {1, 2} and len(seen) > 3, seen
        assert_close(lap, truth(net, x), F64, length=1000)
        assert_close(jacobian, first(net, x), F64, length=100)
    seen.clear()
    x = torch.randn(3, 5, dtype=F64)
    assert_close(jactri.laplacian(torch.sin, x), -x.sin(), F64)
    assert set(seen) == {None}


@pytest.mark.clean_memory
def test_many_coordinates_keep_to_the_cache():
    """Blocks of all 200 directions would take 32 MB each."""
    x = 0.2 * torch.randn(2, 100, 2, dtype=F64)

    def f(x):
        return (torch.exp(x @ x.mT) @ x).mean((-1, -2))

    kept = []
    assert live_peak(lambda: kept.append(jactri.laplacian(f, x))) < 12_000_000
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)
    want = sum(
        torch.autograd.grad(g[:, i, j].sum(), leaf, retain_graph=True)[0][:, i, j]
        for i in range(100)
        for j in range(2)
    )
    assert_close(kept[0], want, F64, length=40_000)


def test_a_limit_that_is_too_small():
    with pytest.raises(ValueError, match="one direction of one sample takes"):
        jactri.laplacian(mlp(nn.Tanh, 4, 50, 50, 1), torch.randn(3, 4, dtype=F64), memory_limit=500)


# -- weights ----------------------------------------------------------------------------------------


def low_rank(n, r, batch=()):
    b = torch.randn(*batch, n, r, dtype=F64)
    return b @ b.mT


WEIGHTS = {
    "random": lambda: torch.randn(4, 4, dtype=F64),
    "identity": lambda: torch.eye(4, dtype=F64),
    "rank_1": lambda: low_rank(4, 1),
    "rank_2": lambda: low_rank(4, 2),
    "zero": lambda: torch.zeros(4, 4, dtype=F64),
    "negative": lambda: -low_rank(4, 3),
    "indefinite": lambda: low_rank(4, 1) - low_rank(4, 1),
    "per_sample": lambda: torch.randn(5, 4, 4, dtype=F64),
    "per_sample_rank_1": lambda: low_rank(4, 1, (5,)),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_weights(name, create_graph):
    torch.manual_seed(0)
    net, x, weight = make(Residual), torch.randn(5, 4, dtype=F64), WEIGHTS[name]()
    form = weight if weight.dim() == 2 else weight.unsqueeze(1)
    want = (second(net, x) * form).sum((-2, -1))
    _y, jacobian, lap = jactri.laplacian(net, x, weight, create_graph, return_lower=True)
    assert_close(lap, want, F64, length=400, scale=scale_of(want))
    assert_close(jacobian, first(net, x), F64, length=100)


def test_a_low_rank_pushes_fewer_columns(monkeypatch):
    torch.manual_seed(0)
    seen = []
    run = forward.LaplacianRun.__call__

    def noted(self, directions):
        seen.append(None if directions is None else directions.shape[0])
        return run(self, directions)

    monkeypatch.setattr(forward.LaplacianRun, "__call__", noted)
    net, x = mlp(nn.Tanh, 6, 8, 1), torch.randn(3, 6, dtype=F64)
    jactri.laplacian(net, x, low_rank(6, 2))
    jactri.laplacian(net, x)
    jactri.laplacian(net, x, torch.zeros(6, 6, dtype=F64))
    assert seen == [2, None]


def test_weight_of_an_image_and_of_a_point():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 2, dtype=F64)
    net = nn.Sequential(nn.Flatten(), mlp(nn.Tanh, 4, 5, 2))
    a = torch.randn(2, 2, 2, 2, dtype=F64)
    want = (second(net, x) * a.reshape(4, 4)).sum((-2, -1))
    assert_close(jactri.laplacian(net, x, a), want, F64, length=100)
    point = torch.randn(4, dtype=F64)
    inner = mlp(nn.Tanh, 4, 5, 2)
    want = (hessian(inner)(point) * a.reshape(4, 4)).sum((-2, -1))
    assert_close(jactri.laplacian(inner, point, a.reshape(4, 4)), want, F64, length=100)


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradient_in_the_weight(per_sample):
    """Also where eigenvalues are alike, as an identity's are."""
    torch.manual_seed(0)
    net, x = mlp(nn.Tanh, 3, 6, 1), torch.randn(4, 3, dtype=F64)
    a = torch.eye(3, dtype=F64).expand(4, 3, 3).clone() if per_sample else torch.eye(3, dtype=F64)
    a.requires_grad_()
    lap = jactri.laplacian(net, x, a, create_graph=True)
    (got,) = torch.autograd.grad(lap.sum(), a)
    want = second(net, x).squeeze(1)
    assert_close(got, want if per_sample else want.sum(0), F64, length=100)


# -- shapes and bystanders --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1])
def test_no_samples_and_one(n):
    net, x = make(Residual), torch.randn(n, 4, dtype=F64)
    for create_graph in (False, True):
        y, jacobian, lap = jactri.laplacian(net, x, None, create_graph, return_lower=True)
        assert y.shape == lap.shape == (n, 2) and jacobian.shape == (n, 2, 4)
        if n:
            assert_close(lap, truth(net, x), F64)
    assert jactri.laplacian(net, x, torch.eye(4, dtype=F64)).shape == (n, 2)
    assert jactri.gradient(net, x).shape == (n, 2, 4)
    assert jactri.bilaplacian(net, x).shape == (n, 2)


@pytest.mark.parametrize("size", [(), (1,), (5,)])
def test_points(size):
    x = torch.randn(size, dtype=F64)

    def f(v):
        return torch.stack([(v**3).sum(), torch.sin(v).sum() ** 2])

    _y, jacobian, lap = jactri.laplacian(f, x, return_lower=True)
    assert jacobian.shape == (2, *size)
    n = max(x.numel(), 1)
    want = hessian(f)(x).reshape(2, n, n).diagonal(0, -2, -1).sum(-1)
    assert_close(lap, want, F64, scale=scale_of(want))


def test_strided_inputs_and_bystanders():
    net = mlp(nn.Tanh, 4, 5, 2)
    base = torch.randn(4, 12, dtype=F64)
    x = base.t()[::2]
    x_before, state = base.clone(), torch.get_rng_state()
    lap = jactri.laplacian(net, x)
    assert_close(lap, truth(net, x.contiguous()), F64, length=50)
    assert torch.equal(base, x_before) and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    leaf = torch.randn(3, 4, dtype=F64, requires_grad=True)
    jactri.laplacian(net, leaf, create_graph=True)
    assert leaf.grad is None


def test_multi_axis_in_and_out():
    torch.manual_seed(0)
    net, x = make(Attention), torch.randn(2, 3, 4, dtype=F64)
    _y, jacobian, lap = jactri.laplacian(net, x, return_lower=True)
    assert jacobian.shape == (2, 3, 4, 3, 4) and lap.shape == (2, 3, 4)


def test_inference_mode_and_transforms():
    net, x = mlp(nn.Tanh, 3, 5, 2), torch.randn(4, 3, dtype=F64)
    want = truth(net, x)
    with torch.inference_mode():
        assert_close(jactri.laplacian(net, x), want, F64, length=50)
        assert jactri.bilaplacian(net, x).shape == jactri.gradient(net, x).shape[:2]
    stacked = torch.stack([x, 2 * x])
    got = vmap(lambda v: jactri.laplacian(net, v))(stacked)
    assert_close(got[1], truth(net, 2 * x), F64, length=50)
    points = vmap(lambda v: jactri.laplacian(net, v))(x)
    assert_close(points, want, F64, length=50)
    a = torch.randn(3, 3, dtype=F64)
    got = vmap(lambda v: jactri.laplacian(net, v, a, return_lower=True)[2])(x)
    assert_close(got, (second(net, x) * a).sum((-2, -1)), F64, length=50)
    assert vmap(lambda v: jactri.bilaplacian(net, v))(x).shape == (4, 2)
    assert_close(vmap(lambda v: jactri.gradient(net, v))(x), first(net, x), F64, length=50)


def test_samples_by_a_loop_are_proven_by_a_probe():
    net, x = mlp(nn.Tanh, 3, 5, 2), torch.randn(4, 3, dtype=F64)
    got = jactri.laplacian(lambda v: torch.stack([net(r) for r in v]), x)
    assert_close(got, truth(net, x), F64, length=50)


# -- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [jactri.gradient, jactri.laplacian, jactri.bilaplacian])
def test_bad_input(call):
    net, x = mlp(nn.Tanh, 3, 5, 2), torch.randn(4, 3, dtype=F64)
    with pytest.raises(RuntimeError, match=r"int64.*x\.float\(\)"):
        call(net, torch.ones(4, 3, dtype=torch.long))
    with pytest.raises(TypeError, match="must be a tensor, got <class 'list'>"):
        call(net, [1.0])
    with pytest.raises(TypeError, match="one tensor, got a tuple of 2"):
        call(lambda v: (v, v), x)
    with pytest.raises(TypeError, match="must be a Tensor"):
        call(lambda v: 1.0, x)
    with pytest.raises(
        RuntimeError, match=r"must return a floating-point tensor, got torch\.int64"
    ):
        call(lambda v: v.long(), x)
    with pytest.raises(ValueError, match=r"\(4, 3\).*returned shape \(\)"):
        call(lambda v: net(v).sum(), x)
    with pytest.raises(RuntimeError, match=r"samples mix: the op (Mean|Sub|Sum|Expand)"):
        call(lambda v: torch.tanh(v - v.mean(0)), x)
    with pytest.raises(ValueError, match="chunk_size"):
        call(net, x, chunk_size=0)
    with pytest.raises(ValueError, match="memory_limit"):
        call(net, x, memory_limit="much")
    with pytest.raises(ValueError, match="backend"):
        call(net, x, backend="cublas")


def test_bad_weights():
    net, x = mlp(nn.Tanh, 3, 5, 2), torch.randn(4, 3, dtype=F64)
    with pytest.raises(ValueError, match=r"\(3, 3\) or \(4, 3, 3\).*got \(2, 2\)"):
        jactri.laplacian(net, x, torch.eye(2, dtype=F64))
    with pytest.raises(ValueError, match=r"\(3, 3\) for x of shape \(3,\)"):
        jactri.laplacian(net, x[0], torch.eye(3, dtype=F64).expand(4, 3, 3))
    with pytest.raises(RuntimeError, match=r"float64.*got torch\.float32"):
        jactri.laplacian(net, x, torch.eye(3))
    with pytest.raises(TypeError, match="weight must be a tensor"):
        jactri.laplacian(net, x, 2.0)


def test_a_fallback_is_refused_where_that_is_asked():
    x = torch.randn(3, 4, dtype=F64)
    with jactri.fallback("error"), pytest.raises(jactri.FallbackError, match="ProdBackward1"):
        jactri.laplacian(FUNCTIONS["prod"], x)
    with jactri.fallback("error"), contextlib.nullcontext():
        jactri.laplacian(FUNCTIONS["softmax"], x)


# -- what is computed -------------------------------------------------------------------------------


def test_rows_of_the_products():
    """n + 1 rows a sample through every Linear layer but the first, which has none."""
    n, samples, width = 3, 8, 16
    net, x = mlp(nn.Tanh, n, width, width, width, 1), torch.randn(samples, n, dtype=F64)
    leaf = x.clone().requires_grad_()
    y = net(leaf)
    jactri.laplacian(net, x)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        calls.of_output(y, leaf, None, Options(False, None, None, "torch"), True)
    rows = (n + 1) * samples
    assert counter.get_total_flops() == 2 * rows * (2 * width * width + width)
