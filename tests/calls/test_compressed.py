"""Entries out of compressed products of a recorded computation: those of autograd's dense rows."""

import numpy as np
import pytest
import torch
from common import F64, unfollowed

import jactri
from jactri._src.base.csr import Csr
from jactri._src.base.memory import Budget
from jactri._src.calls.compressed import entries
from jactri._src.plan.compressing import compressed
from jactri._src.prologue.running import computing
from jactri._src.read.graph import UnsupportedGraph
from jactri._src.read.reading import read

N = 11


def arrow(x):
    rest = x.sin() + x[0] * x.cos()
    return torch.cat([(x[:-1] * x[1:]).sum()[None], rest[1:]])


def by_autograd(x):
    """What no blocks follow."""
    return arrow(unfollowed(torch.complex(x, x)).real)


def shifted(x, w):
    """Two outputs, of two dtypes."""
    return x[1:] * x[:-1] * w[1:], (w**2).sum().float()[None] + (x * w).float()


FUNCTIONS = {
    "arrow": (arrow, (N,)),
    "by autograd": (by_autograd, (N,)),
    "several": (shifted, (N, N)),
    "a matrix": (lambda x: x.flatten().roll(1).view(x.shape) * x, ((3, 5),)),
}


def recorded(name):
    func, shapes = FUNCTIONS[name]
    gen = torch.Generator().manual_seed(0)
    xs = [torch.rand(s, generator=gen, dtype=F64).requires_grad_() for s in shapes]
    ys = func(*xs)
    return (ys if isinstance(ys, tuple) else (ys,)), xs


def dense(ys, xs):
    rows = []
    for y in ys:
        for v in y.flatten():
            found = torch.autograd.grad(v, xs, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def graph_of(ys, xs):
    try:
        return read(ys, xs)
    except UnsupportedGraph as reason:
        return reason


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("strategy", ["auto", "forward-mode", "reverse-mode"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_entries_are_those_of_rows(name, strategy, chunk_size):
    ys, xs = recorded(name)
    want = dense(ys, xs)
    more = np.random.default_rng(0).random(want.shape) < 0.02  # entries that happen to be zero
    pattern = Csr.of_dense((want != 0).cpu().numpy() | more)
    how = compressed(pattern, strategy)
    if strategy == "auto" and name in ("arrow", "by autograd"):
        assert how.tangents.count and how.cotangents.count
    with computing(False):
        graph = graph_of(ys, xs)
        assert isinstance(graph, UnsupportedGraph) == (name == "by autograd")
        found = entries(
            ys, xs, how, graph, budget=Budget(None, xs[0].device), chunk_size=chunk_size
        )
    tolerance = 1e-6 if name == "several" else 1e-13
    assert found.dtype == F64 and found.shape == (1, pattern.nnz)
    torch.testing.assert_close(
        found[0], want[pattern.row, pattern.column], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("samples", [1, 4])
def test_samples(samples):
    x = torch.rand(samples, N, dtype=F64, requires_grad=True)
    y = torch.stack([arrow(v) for v in x])
    want = torch.stack([dense([y[s]], [x])[:, s * N : s * N + N] for s in range(samples)])
    pattern = Csr.of_dense((want != 0).any(0).cpu().numpy())
    with computing(False):
        how = compressed(pattern)
        found = entries(
            [y], [x], how, read([y], [x]), budget=Budget(None, x.device), samples=samples
        )
    assert how.products < N
    torch.testing.assert_close(found, want[:, pattern.row, pattern.column])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_entries_can_be_differentiated(name):
    ys, xs = recorded(name)
    with torch.enable_grad():
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(v, xs, create_graph=True, materialize_grads=True)])
            for y in ys for v in y.flatten()
        ]  # fmt: skip
    want = torch.stack(rows)
    pattern = Csr.of_dense((want != 0).cpu().numpy())
    with computing(True):
        graph = graph_of(ys, xs)
        found = entries(ys, xs, compressed(pattern), graph, budget=Budget(None, xs[0].device))
    weight = torch.rand(pattern.nnz, dtype=F64)
    got = torch.autograd.grad(found[0] @ weight, xs, retain_graph=True)
    truth = torch.autograd.grad(want[pattern.row, pattern.column] @ weight, xs)
    for g, t in zip(got, truth, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-6, atol=1e-6)


def test_where_forward_mode_meets_an_infinity_rows_are_taken():
    x = torch.tensor([0.0, 4.0, 9.0, 0.0, 1.0], dtype=F64, requires_grad=True)
    y = x.relu().sqrt() + x[0] ** 2
    want = dense([y], [x])
    pattern = Csr.of_dense(np.eye(5, dtype=bool) | (np.arange(5) == 0))
    with computing(False):
        how = compressed(pattern, "forward-mode")
        found = entries([y], [x], how, read([y], [x]), budget=Budget(None, x.device))
    assert want.isfinite().all()
    torch.testing.assert_close(found[0], want[pattern.row, pattern.column])


def hooked(x):
    v = x * 1
    v.register_hook(lambda g: g * 2)
    return v * 3, v.sqrt()


@pytest.mark.filterwarnings("ignore:a hook on gradients")
@pytest.mark.parametrize("mode", ["auto", "forward-mode", "reverse-mode"])
@pytest.mark.parametrize(
    "func",
    [
        lambda x: (x * 3, 1 / x),
        lambda x: (x.sqrt().sum(), x**3 + x[0] * x.roll(1), 1 / x),
        lambda x: (x * 3, torch.complex(x, x * 0).sqrt().real),
        hooked,
    ],
)
def test_a_pole_of_one_output_is_none_of_another(func, mode):
    """The rows of one output are autograd's without the others, where a cotangent of zeros makes NaN of infinity."""
    x = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[2] = 0
    want = torch.autograd.functional.jacobian(func, x)
    pattern = tuple(w != 0 for w in want)
    for layout in (torch.strided, torch.sparse_csr):
        found = jactri.jacobian(func, x, strategy=mode, layout=layout, pattern=pattern)
        found = [J if layout is torch.strided else J.to_dense() for J in found]
        assert not found[-1].reshape(-1, 6)[:, 2].isfinite().all()
        for J, w in zip(found, want, strict=True):
            J, w = (t.reshape(-1, 6).nan_to_num(0, 0, 0) for t in (J, w))
            torch.testing.assert_close(J, w)
        assert found[0].isfinite().sum() == want[0].isfinite().sum()
