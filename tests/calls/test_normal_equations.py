"""`normal_equations` and `jtj` of sparse Jacobians: against products of the dense one in float64."""

import numpy as np
import pytest
import torch
from common import unfollowed
from tolerances import assert_close

import jactri
from jactri._src.meet import normal
from jactri._src.plan import planning

F64 = torch.float64
LAYOUTS = [torch.sparse_bsr, torch.sparse_csr, torch.sparse_csc]
A = torch.tensor([0, 3, 1, 4, 4, 2, 0])  # 5 of one, of which every one is seen,
B = torch.tensor([1, 1, 0, 2, 0, 2, 2])  # and 4 of another, of which the last is not


def seen(a, b):
    """Residuals (7, 2) of (5, 3) and (4, 2); some of the second entries do not depend on all of ``b``."""
    d = a[A] * a[A].sum(1, keepdim=True)
    return torch.stack([d[:, 0] * b[B, 0] - b[B, 1], d[:, 1].sin() + d[:, 2] * b[B, 1]], 1)


def chain(x):
    """Residuals (2, 5) and (6, 3) of (6, 3)."""
    return (x[1:] - x[:-1])[:, :2].square().mT, x.sin() - 1


def shared(a, focal):
    """All know ``focal``, (2,), whose Jacobian is dense."""
    return a[A] * focal[0] - focal[1] ** 2


def line(x):
    """Residuals (8,) of (8,): neighbours, around a ring."""
    return x * x.roll(1) - x


CASES = {
    "two inputs": (seen, [(5, 3), (4, 2)]),
    "two outputs": (chain, [(6, 3)]),
    "a shared input": (shared, [(5, 3), (2,)]),
    "one axis": (line, [(8,)]),
    "an arrow": (lambda x: torch.cat([x.sum()[None], (x[1:] * x[0, 0]).flatten()]), [(9, 2)]),
    "pairs": (lambda x: ((d := x[1:] * x[:-1]).sum(1, keepdim=True) * d)[:, :2], [(7, 3)]),
    "one sample": (lambda x: x[:, 1:] * x[:, :-1], [(1, 6)]),
    "samples": (lambda x: x[:, 1:, 0] * x[:, :-1, 1], [(3, 5, 2)]),
}


def given(name, seed=0):
    func, shapes = CASES[name]
    gen = torch.Generator().manual_seed(seed)
    xs = tuple(torch.randn(s, generator=gen, dtype=F64) for s in shapes)
    return func, xs if len(xs) > 1 else xs[0]


def outputs(func, xs):
    ys = func(*xs) if isinstance(xs, tuple) else func(xs)
    return ys if isinstance(ys, tuple) else (ys,)


def as_rows(J, func, xs):
    """A Jacobian with both levels of tuples."""
    ys = func(*xs) if isinstance(xs, tuple) else func(xs)
    rows = J if isinstance(ys, tuple) else (J,)
    return tuple(row if isinstance(xs, tuple) else (row,) for row in rows)


def truth(func, xs, weights=None):
    """``J^T M J`` and ``J^T M r`` of all inputs together, and J."""
    ys = outputs(func, xs)
    rows = as_rows(torch.autograd.functional.jacobian(func, xs), func, xs)
    J = torch.cat(
        [
            torch.cat([b.reshape(y.numel(), -1) for b in row], 1)
            for y, row in zip(ys, rows, strict=True)
        ]
    )
    r = torch.cat([y.flatten() for y in ys])
    parts = []
    for y, w in zip(ys, weights or [None] * len(ys), strict=True):
        if w is None:
            parts.append(torch.eye(y.numel(), dtype=F64))
        elif w.shape == y.shape:
            parts.append(w.flatten().diag())
        else:
            parts.append(torch.block_diag(*w.flatten(0, -3)))
    M = torch.block_diag(*parts)
    return J.T @ M @ J, J.T @ M @ r, J


def whole(matrix):
    if isinstance(matrix, tuple):
        return torch.cat([torch.cat([b.to_dense() for b in row], 1) for row in matrix])
    return matrix.to_dense()


def flat(parts):
    return torch.cat([p.flatten() for p in (parts if isinstance(parts, tuple) else (parts,))])


def check(found, want, gradient, shapes):
    H = whole(found.matrix)
    assert_close(H, want, F64, length=50)
    assert_close(flat(found.gradient), gradient, F64, length=50)
    blocks = found.block_diagonal()
    start = 0
    for block, shape in zip(
        blocks if isinstance(blocks, tuple) else (blocks,), shapes, strict=True
    ):
        count, c, _ = block.shape
        assert count * c == torch.Size(shape).numel()
        for k in range(count):
            at = slice(start + k * c, start + (k + 1) * c)
            assert_close(block[k], want[at, at], F64, length=50, scale=want.abs().max().item())
        start += count * c


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_the_dense_jacobian(name, layout):
    func, xs = given(name)
    want, gradient, J = truth(func, xs)
    found = jactri.normal_equations(func, xs, layout=layout)
    check(found, want, gradient, CASES[name][1])
    H = whole(found.matrix)
    assert torch.equal(H, H.T)
    S = jactri.to_scipy(as_rows(found.jacobian, func, xs))
    np.testing.assert_allclose(S.toarray(), J, atol=1e-12)
    S, g = found.to_scipy()
    np.testing.assert_array_equal(S.toarray(), H)
    np.testing.assert_array_equal(g, flat(found.gradient))
    again, matrix = jactri.jtj(func, xs, layout=layout, return_output=True)
    assert torch.equal(whole(matrix), H) and torch.equal(flat(again), flat(found.residual))
    assert torch.equal(flat(found.residual), flat(outputs(func, xs)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["two inputs", "two outputs", "one axis"])
def test_weights(name, layout):
    func, xs = given(name)
    ys = outputs(func, xs)
    kinds = [lambda y: torch.rand(y.shape, dtype=F64) - 0.2]
    if layout is torch.sparse_bsr and name != "one axis":
        kinds += [lambda y: (w := torch.randn(*y.shape, y.shape[-1], dtype=F64)) @ w.mT]
        kinds += [lambda y: torch.randn(*y.shape, y.shape[-1], dtype=F64)]
    for number, kind in enumerate(kinds):
        weights = tuple(kind(y) for y in ys)
        if len(ys) > 1:
            weights = (None, weights[1])
        want, gradient, _ = truth(func, xs, weights)
        passed = weights if len(ys) > 1 else weights[0]
        found = jactri.normal_equations(func, xs, passed, layout=layout)
        check(found, want, gradient, CASES[name][1])
        H = whole(found.matrix)
        assert torch.equal(H, H.T) == (number < 2)
        assert torch.equal(whole(jactri.jtj(func, xs, passed, layout=layout)), H)


def test_the_pattern_is_that_of_the_product():
    a, b = given("two inputs")[1]
    (_, ab), (ba, bb) = jactri.normal_equations(seen, (a, b)).matrix
    pairs = {(int(i), int(k)) for i, k in zip(A, B, strict=True)}
    at = [
        (i, int(k))
        for i in range(5)
        for k in ab.col_indices()[ab.crow_indices()[i] : ab.crow_indices()[i + 1]]
    ]
    assert at == sorted(pairs) and ab.values().shape == (len(pairs), 3, 2)
    torch.sparse_bsr_tensor(
        ba.crow_indices(), ba.col_indices(), ba.values(), ba.shape, check_invariants=True
    )
    assert bb.values().shape == (3, 2, 2)  # block diagonal, and what nobody sees is not there
    (aa, _), _ = jactri.normal_equations(seen, (a, b), layout=torch.sparse_csr).matrix
    assert aa._nnz() == 5 * 9
    sizes = jactri.normal_equations(seen, (a, b), blocksize=(5, 1))
    assert sizes.matrix[0][1].values().shape[1:] == (5, 1)
    assert_close(whole(sizes.matrix), truth(seen, (a, b))[0], F64, length=50)
    one = jactri.jtj(line, torch.randn(8, dtype=F64), layout=torch.sparse_bsr, blocksize=4)
    assert one.values().shape[1:] == (4, 4)


def test_a_loop_plans_once(monkeypatch):
    func, xs = given("two inputs")
    runs = 0

    def counted(a, b):
        nonlocal runs
        runs += 1
        return func(a, b)

    def solve(xs):
        found = jactri.normal_equations(counted, xs)
        assert found.block_diagonal() and found.gradient and found.jacobian
        return whole(found.matrix)

    solve(xs)

    def never(*_, **__):
        pytest.fail("it was planned again")

    monkeypatch.setattr(planning, "make_plan", never)
    monkeypatch.setattr(normal, "_symbolic", never)
    moved = given("two inputs", 1)[1]
    assert_close(solve(moved), truth(func, moved)[0], F64, length=50)
    assert runs == 2


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_how_many_residuals(n, layout):
    def func(x):  # of one, all entries of J are there
        return (x[1:] - x[:-1]).norm(dim=1) - 1

    x = torch.randn(n + 1, 3, dtype=F64)
    want, gradient, _ = (
        truth(func, x) if n else (torch.zeros(3, 3, dtype=F64), torch.zeros(3, dtype=F64), None)
    )
    check(jactri.normal_equations(func, x, layout=layout), want, gradient, [(n + 1, 3)])


def test_memory_that_is_not_contiguous_and_dtypes():
    a, b = given("two inputs")[1]
    want, gradient, _ = truth(seen, (a, b))
    turned = a.mT.contiguous().mT, torch.stack([b, b], 2)[:, :, 0]
    check(jactri.normal_equations(seen, turned), want, gradient, [(5, 3), (4, 2)])
    half = jactri.normal_equations(seen, (a.half(), b.half()))
    assert half.matrix[0][0].dtype == half.gradient[1].dtype == torch.float16
    assert_close(whole(half.matrix), want, torch.float16, length=50)
    mixed = jactri.normal_equations(seen, (a.float(), b), torch.ones(7, 2))
    assert mixed.matrix[0][0].dtype is torch.float32 and mixed.matrix[0][1].dtype is F64
    assert_close(whole(mixed.matrix), want, torch.float32, length=50)


def test_chunks_and_limits(monkeypatch):
    func, xs = given("two inputs")
    want, gradient, _ = truth(func, xs)
    monkeypatch.setattr(normal, "CHUNK", 100)
    check(jactri.normal_equations(func, xs, chunk_size=2), want, gradient, CASES["two inputs"][1])
    for strategy in ("forward-mode", "reverse-mode"):
        check(
            jactri.normal_equations(func, xs, strategy=strategy),
            want,
            gradient,
            CASES["two inputs"][1],
        )
    x = torch.randn(400, 6, dtype=F64)
    found = jactri.normal_equations(lambda x: (x * x).sum(1), x, memory_limit=10_000_000)
    assert found.matrix.values().shape == (400, 6, 6)
    with pytest.raises(ValueError, match="memory_limit"):
        whole(jactri.normal_equations(lambda x: (x * x).sum(1), x, memory_limit=50_000).matrix)

    def with_a_sum(x):  # all pairs of 3000 unknowns
        return x, x.sum(0, keepdim=True)

    found = jactri.normal_equations(with_a_sum, torch.ones(3000, dtype=F64), memory_limit="100MB")
    assert_close(found.gradient, torch.full((3000,), 3001.0, dtype=F64), F64)
    with pytest.raises(ValueError, match=r"the pattern of J\^T J takes 360 ?MB"):
        whole(found.matrix)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_matrix_can_be_differentiated(layout):
    func, xs = given("two inputs")
    w = torch.rand(7, 2, dtype=F64, requires_grad=True)
    ends = [x.clone().requires_grad_() for x in xs]
    H = whole(jactri.jtj(func, tuple(ends), w, create_graph=True, layout=layout))
    got = torch.autograd.grad((H**2).sum(), [*ends, w])
    rows = torch.autograd.functional.jacobian(func, tuple(ends), create_graph=True)
    J = torch.cat([b.reshape(14, -1) for b in rows], 1)
    want = torch.autograd.grad(((J.T @ (w.reshape(-1, 1) * J)) ** 2).sum(), [*ends, w])
    for g, t in zip(got, want, strict=True):
        assert_close(g, t, F64, length=500)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["two inputs", "an arrow", "pairs"])
def test_a_pattern_of_the_callers(layout, name):
    func, xs = given(name)

    def unknown(*xs):
        y = func(*xs)
        return unfollowed(torch.complex(y, y)).real

    with pytest.raises(ValueError, match="no pattern is known"):
        jactri.normal_equations(unknown, xs, layout=layout)
    want, gradient, _ = truth(func, xs)
    pattern = jactri.sparsity(func, xs)
    found = jactri.normal_equations(unknown, xs, layout=layout, pattern=pattern, check=True)
    check(found, want, gradient, CASES[name][1])
    ends = xs if isinstance(xs, tuple) else (xs,)
    wrong = tuple(
        torch.zeros(outputs(func, xs)[0].numel(), x.numel(), dtype=torch.bool) for x in ends
    )
    wrong = wrong if isinstance(xs, tuple) else wrong[0]
    with pytest.raises(ValueError, match="leaves out an entry"):
        jactri.normal_equations(func, xs, layout=layout, pattern=wrong, check=True)


def test_what_it_says():
    func, xs = given("two inputs")
    found = jactri.normal_equations(func, xs)
    text = str(found)
    assert "14 residuals, 23 unknowns" in text and "14 x 15" in text and "7 of 2 x 3" in text
    assert not found.residual.requires_grad and "<table" in found._repr_html_()


def normal_of(**kw):
    func, xs = given("two inputs")
    return jactri.normal_equations(func, kw.pop("xs", xs), **kw)


BAD = {
    "COO": (lambda: normal_of(layout=torch.sparse_coo), ValueError, r"normal_equations must be torch\.sparse_bsr"),
    "banded": (lambda: normal_of(layout="banded"), ValueError, "got 'banded'"),
    "dense": (lambda: normal_of(layout=torch.strided), ValueError, "jtj gives a dense matrix"),
    "blocks of a dense jtj": (lambda: jactri.jtj(line, torch.ones(8), blocksize=2), ValueError, "without blocksize"),
    "blocks of CSR": (lambda: normal_of(layout=torch.sparse_csr, blocksize=1), ValueError, "is for layout"),
    "a dense Jacobian": (
        lambda: jactri.normal_equations(lambda x: x.softmax(0), torch.ones(99)), ValueError, "every entry of",
    ),
    "samples": (
        lambda: jactri.jtj(torch.sin, torch.ones(4, 2), per_sample=True, layout=torch.sparse_bsr), ValueError,
        "per_sample and a sparse layout exclude",
    ),
    "blocks that do not divide": (lambda: normal_of(blocksize=(3, 3)), ValueError, r"inputs\[1\] has 8 entries"),
    "too few blocks": (lambda: normal_of(blocksize=(3,)), ValueError, "1 sizes for 2 inputs"),
    "no integer": (lambda: normal_of(blocksize=2.0), TypeError, "must be an integer"),
    "a weight that mixes all": (
        lambda: normal_of(weight=torch.ones(7, 2, 7, 2)), RuntimeError, r"\(7, 2\) for a diagonal, or \(7, 2, 2\)",
    ),
    "a weight of integers": (lambda: normal_of(weight=torch.ones(7, 2, dtype=torch.int64)), RuntimeError, "int64"),
    "a weight that is none": (lambda: normal_of(weight=3.0), TypeError, "weight"),
    "weights of another number": (
        lambda: normal_of(weight=(None, None)), RuntimeError, "nested as the outputs: got 2 for 1",
    ),
    "matrices for CSR": (
        lambda: normal_of(weight=torch.ones(7, 2, 2), layout=torch.sparse_csr), ValueError, "takes layout",
    ),
    "complex": (
        lambda: jactri.normal_equations(lambda x: torch.complex(x, x), torch.ones(3)), RuntimeError, "view_as_real",
    ),
    "a transform": (
        lambda: torch.func.vmap(lambda x: jactri.normal_equations(torch.sin, x).gradient)(torch.ones(2, 3)),
        RuntimeError, "inside of a torch.func transform",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call()
