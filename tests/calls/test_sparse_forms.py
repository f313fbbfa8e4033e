"""Blocks, columns and bands of sparse Jacobians, and what SciPy makes of them, against the dense Jacobian."""

import sys

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import torch
from tolerances import assert_close

import jactri

F64 = torch.float64


def close(found, want):
    found = torch.as_tensor(np.asarray(found)) if not isinstance(found, torch.Tensor) else found
    assert_close(found, want.reshape(found.shape), F64, length=50)


def truth(func, x):
    return torch.autograd.functional.jacobian(func, x)


EDGES = torch.tensor([[0, 3, 1, 4, 4, 2], [1, 1, 4, 0, 2, 2]])


def springs(points, rest=1.5):
    """Forces of springs, (6, 2) by (5, 3)."""
    a, b = points[EDGES[0]], points[EDGES[1]]
    d = (a - b).square().sum(1) - rest
    return torch.stack([d, (a * b).sum(1)], 1)


def heat(u):
    v = torch.nn.functional.pad(u, (1, 1))
    return v[..., :-2] - 2 * u + v[..., 2:] - u**3


@pytest.mark.parametrize("strategy", ["auto", "forward-mode", "reverse-mode"])
@pytest.mark.parametrize("turned", [False, True])
def test_blocks_hold_the_jacobian(strategy, turned):
    x = torch.randn(5, 3, dtype=F64)
    x = x.mT.contiguous().mT if turned else x
    want = truth(springs, x)
    J = jactri.jacobian(springs, x, layout=torch.sparse_bsr, strategy=strategy)
    assert J.layout is torch.sparse_bsr and J.shape == (12, 15)
    assert J.values().shape == (11, 2, 3)  # two ends of six springs, one of which is a loop
    torch.sparse_bsr_tensor(
        J.crow_indices(), J.col_indices(), J.values(), J.shape, check_invariants=True
    )
    close(J.to_dense(), want)
    for size, blocks in [((1, 1), 66), ((2, 1), 33), ((4, 5), None), ((12, 15), 1)]:
        J = jactri.jacobian(springs, x, layout=torch.sparse_bsr, blocksize=size, strategy=strategy)
        assert J.values().shape[1:] == size and blocks in (None, len(J.values()))
        close(J.to_dense(), want)
    J = jactri.jacobian(springs, x, layout=torch.sparse_csc, strategy=strategy)
    torch.sparse_csc_tensor(
        J.ccol_indices(), J.row_indices(), J.values(), J.shape, check_invariants=True
    )
    close(J.to_dense(), want)


def arrow(x):
    """Five rows, of which the first has all, and so has the first column: rows and columns meet."""
    return torch.cat([x.sum()[None], x[1:] * x[0]])


@pytest.mark.parametrize(
    "layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, "banded"]
)
@pytest.mark.parametrize("func", [springs, lambda x: arrow(x.flatten()), lambda x: x[1:] * x[:-1]])
def test_every_form_of_a_pattern_that_is_given(func, layout):
    """Blocks with holes and without, one or several in a row."""
    x = torch.randn(6, 3 if func is springs else 4, dtype=F64)
    want = truth(func, x)
    pattern = jactri.sparsity(func, x)
    sizes = [None, (1, 2), (2, 1), (2, 6)] if layout is torch.sparse_bsr else [None]
    for given in ({}, {"pattern": pattern}, {"pattern": pattern, "strategy": "reverse-mode"}):
        for size in sizes:
            found = jactri.jacobian(func, x, layout=layout, blocksize=size, **given)
            close(found.to_dense().reshape(want.shape), want)


@pytest.mark.parametrize("n", [0, 1, 4])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("layout", [torch.sparse_bsr, torch.sparse_csc, torch.sparse_csr, "banded"])
def test_samples(n, per_sample, layout):
    x = torch.randn(n, 5, 3, dtype=F64)

    def func(x):
        d = x[:, 1:] - x[:, :-1]
        return torch.stack([d.square().sum(2), d.prod(2)], 2)

    J = jactri.jacobian(func, x, layout=layout, per_sample=per_sample)
    whole = truth(func, x) if n else x.new_zeros(0, 4, 2, 0, 5, 3)
    if per_sample:
        each = (
            torch.stack([whole[i, :, :, i] for i in range(n)])
            if n
            else whole.new_zeros(0, 4, 2, 5, 3)
        )
        close(J.to_dense(), each)
    else:
        close(J.to_dense(), whole)
    S = jactri.to_scipy(J)
    assert S.shape == (8 * n, 15 * n)
    close(S.toarray(), whole)


def test_blocks_across_samples():
    """Blocks that are no divisors of a sample's matrix, but of that of all."""
    x = torch.randn(4, 3, dtype=F64)
    want = truth(torch.sin, x)
    J = jactri.jacobian(torch.sin, x, layout=torch.sparse_bsr, blocksize=(2, 4))
    close(J.to_dense(), want)
    with pytest.raises(ValueError, match=r"output 0 has 3 entries .*of each sample"):
        jactri.jacobian(torch.sin, x, layout=torch.sparse_bsr, blocksize=(2, 4), per_sample=True)


def several(a, b):
    return torch.stack([a[EDGES[0]] * b[EDGES[1]], b[EDGES[1]] - 1], 1), (b**2)[:4], a[1:2].sin()


@pytest.mark.parametrize(
    "layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, "banded"]
)
def test_several_ends_are_one_matrix(layout):
    a, b = torch.randn(2, 5, dtype=F64)
    want = torch.autograd.functional.jacobian(several, (a, b))
    J = jactri.jacobian(several, (a, b), layout=layout)
    whole = np.block([[w.reshape(-1, 5).numpy() for w in row] for row in want])
    S = jactri.to_scipy(J, rows=(2, 1, 1) if layout is torch.sparse_coo else None)
    assert S.format == "csr" and S.shape == (17, 10)
    np.testing.assert_allclose(S.toarray(), whole, atol=1e-14)
    for row, want_row in zip(J, want, strict=True):
        for block, w in zip(row, want_row, strict=True):
            close(block.to_dense(), w)
    if layout is torch.sparse_bsr:
        assert J[0][0].values().shape[1:] == (2, 1) and not len(J[1][0].values())


@pytest.mark.parametrize("layout", [torch.sparse_bsr, torch.sparse_csc, torch.sparse_csr])
def test_it_can_be_differentiated(layout):
    x = torch.randn(5, 3, dtype=F64)

    def gradient(call, **kw):
        a = x.clone().requires_grad_()
        J = call(springs, a, create_graph=True, **kw)
        return torch.autograd.grad((J.to_dense() ** 2).sum(), a)[0]

    close(gradient(jactri.jacobian, layout=layout), gradient(torch.autograd.functional.jacobian))


def test_scipy_shares_the_memory():
    x = torch.randn(5, 3, dtype=F64)
    J = jactri.jacobian(springs, x, layout=torch.sparse_bsr)
    S = jactri.to_scipy(J)
    assert S.format == "bsr" and S.blocksize == (2, 3)
    assert np.shares_memory(S.data, J.values().numpy())
    half = jactri.jacobian(springs, x.half(), layout=torch.sparse_csr)
    assert jactri.to_scipy(half).dtype == np.float32
    mask = jactri.sparsity(springs, x)
    np.testing.assert_array_equal(jactri.to_scipy(mask).toarray(), mask.to_dense().view(12, 15))
    graph = jactri.jacobian(springs, x, layout=torch.sparse_csr, create_graph=True)
    np.testing.assert_array_equal(jactri.to_scipy(graph).toarray(), S.toarray())


@pytest.mark.parametrize("lead", [(), (1,), (3,)])
def test_lapack_solves_the_band(lead):
    u, b = torch.randn(2, *lead, 7, dtype=F64)
    J = jactri.jacobian(heat, u, layout="banded")
    (low, up), ab = J.to_lapack()
    assert (low, up) == (1, 1)
    dense = J.to_dense().reshape(b.numel(), b.numel())
    found = scipy.linalg.solve_banded((low, up), ab, b.flatten().numpy())
    close(found, torch.linalg.solve(dense, b.flatten()))
    if lead:
        samples = jactri.jacobian(heat, u, layout="banded", per_sample=True)
        np.testing.assert_array_equal(samples.to_lapack()[1], ab)


def test_a_band_to_one_side():
    x = torch.randn(6, dtype=F64)

    def func(x):
        return x * torch.nn.functional.pad(x[2:], (0, 2))

    J = jactri.jacobian(func, x, layout="banded")
    (low, up), ab = J.to_lapack()
    assert (low, up) == (0, 2) and ab.shape == (3, 6)
    dense = truth(func, x)
    for i in range(6):
        for j in range(max(0, i - low), min(6, i + up + 1)):
            assert ab[up + i - j, j] == dense[i, j]


FAR = torch.randperm(400, generator=torch.Generator().manual_seed(0))
BAD = {
    "blocks that do not divide": (
        lambda: jactri.jacobian(springs, torch.ones(5, 3), layout=torch.sparse_bsr, blocksize=(5, 3)),
        ValueError, r"blocksize=\(5, 3\) does not divide .*output 0 has 12 entries .* blocks of 5 rows",
    ),
    "columns that do not divide": (
        lambda: jactri.jacobian(springs, torch.ones(5, 3), layout=torch.sparse_bsr, blocksize=(2, 4)),
        ValueError, "input 0 has 15 entries .* blocks of 4 columns",
    ),
    "blocks of another layout": (
        lambda: jactri.jacobian(springs, torch.ones(5, 3), layout=torch.sparse_csr, blocksize=(2, 3)),
        ValueError, "blocksize is for layout=torch.sparse_bsr",
    ),
    "one number": (
        lambda: jactri.jacobian(springs, torch.ones(5, 3), layout=torch.sparse_bsr, blocksize=3),
        TypeError, "tuple of two integers.*got 3",
    ),
    "no blocks": (
        lambda: jactri.jacobian(springs, torch.ones(5, 3), layout=torch.sparse_bsr, blocksize=(0, 3)),
        ValueError, "positive integers",
    ),
    "a Jacobian that is dense": (
        lambda: jactri.jacobian(lambda x: x.cumsum(0) ** 2 + x.sum(), torch.ones(4), layout=torch.sparse_bsr),
        ValueError, "every entry",
    ),
    "a band that is not square": (
        lambda: jactri.jacobian(lambda x: x[1:] - x[:-1], torch.ones(4), layout="banded").to_lapack(),
        ValueError, "3 by 4; for least squares",
    ),
    "a band as large as the matrix": (
        lambda: jactri.jacobian(lambda x: x - x[FAR], torch.ones(400), layout="banded").to_lapack(),
        ValueError, r"up to \d+ rows below and \d+ above the diagonal of a matrix of 400 rows",
    ),
    "a dense one": (lambda: jactri.to_scipy(torch.ones(2, 2)), TypeError, r"layout=torch.sparse_csr.*J.numpy\(\)"),
    "no tensor": (lambda: jactri.to_scipy(np.ones(2)), TypeError, "sparse tensor, a Banded"),
    "COO of more axes": (
        lambda: jactri.to_scipy(jactri.jacobian(springs, torch.ones(5, 3), layout=torch.sparse_coo)),
        ValueError, "pass rows=",
    ),
    "one level": (
        lambda: jactri.to_scipy((torch.eye(2).to_sparse(), torch.eye(2).to_sparse())), ValueError,
        r"pass \(J,\) for one",
    ),
    "no blocks at all": (lambda: jactri.to_scipy(()), ValueError, "tuple of 0"),
    "blocks that do not fit": (
        lambda: jactri.to_scipy(((torch.eye(2).to_sparse(), torch.eye(3).to_sparse()),)), ValueError, "do not fit",
    ),
    "rows of another number": (
        lambda: jactri.to_scipy(((torch.eye(2).to_sparse(),),), rows=(1, 1)), ValueError, r"rows=\(1, 1\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_a_solver_cannot_take_is_named(name):
    call, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call()


def test_scipy_that_is_not_there(monkeypatch):
    J = jactri.jacobian(heat, torch.ones(4), layout="banded")
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    for call in (lambda: jactri.to_scipy(J), J.to_scipy):
        with pytest.raises(ModuleNotFoundError, match="pip install scipy"):
            call()
    assert J.to_lapack()[1].shape == (3, 4)  # which takes none


def test_blocks_without_an_entry_have_the_dtype_of_the_others():
    func = lambda x: (x * 2, torch.ones(3).double())  # noqa: E731
    x, layouts = torch.randn(4), (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)
    for mode, dtype in [("forward-mode", F64), ("reverse-mode", torch.float32)]:
        for layout in (*layouts, torch.sparse_bsr, "banded"):
            found = jactri.jacobian(func, x, layout=layout, strategy=mode)
            first, second = (J.to_dense() for J in found)
            assert (first.dtype, second.dtype) == (torch.float32, dtype) and not second.any()
