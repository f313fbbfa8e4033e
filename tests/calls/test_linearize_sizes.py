"""Singular values of the operator, SciPy's solvers, and what it says of wrong arguments."""

import copy
import pickle

import numpy as np
import pytest
import torch
from common import F64, seeded, unfollowed
from linear_cases import close, randn
from torch.autograd.functional import jacobian as truth_of

import jactri
from jactri._src.base.memory import Taken

# -- singular values --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (30, 30), (4, 3)])
def test_singular_values(shape):
    A = randn(*shape)
    op = jactri.linearize(lambda x: A @ x, randn(shape[1]))
    for k in (1, 3):
        u, s, v = op.svd(k)
        want = torch.linalg.svdvals(A)
        assert u.shape == (shape[0], k) and v.shape == (shape[1], k)
        close(s, want[:k], 4096)
        eps = 2e-8 * want[0]  # the root of eps, as documented
        assert (A @ v - u * s).norm() < eps and (A.T @ u - v * s).norm() < eps * k
        close(u.T @ u, torch.eye(k, dtype=F64), 4096)
        close(v.T @ v, torch.eye(k, dtype=F64), 4096)
    close(op.norm(2), want[0], 4096)
    close(op.T.svd(2)[1], want[:2], 4096)


def test_singular_values_that_are_hard():
    """Many that are equal or nearly so, none, and a rank below the block."""
    n = 120
    equal, _ = torch.linalg.qr(randn(n, n))
    close(jactri.linearize(lambda x: equal @ x, randn(n)).svd(3)[1], torch.ones(3, dtype=F64))
    near = torch.linspace(1, 2, n, dtype=F64)
    op = jactri.linearize(lambda x: near * x, randn(n))
    close(op.svd(2)[1], near.flip(0)[:2], 4096)
    low = randn(n, 2) @ randn(2, n)
    op = jactri.linearize(lambda x: low @ x, randn(n))
    close(op.svd(5)[1], torch.linalg.svdvals(low)[:5])
    constant = jactri.linearize(lambda x: x.new_ones(2, 3), randn(3))
    assert constant.norm() == constant.norm(2) == 0


def test_singular_values_that_do_not_converge(monkeypatch):
    monkeypatch.setattr("jactri._src.calls.singular.PASSES", 2)
    near = torch.linspace(1, 2, 200, dtype=F64)
    op = jactri.linearize(lambda x: near * x, randn(200))
    with pytest.raises(
        torch.linalg.LinAlgError, match="did not converge in 2 passes: residuals are"
    ):
        op.svd(2)
    nan = jactri.linearize(lambda x: x.sqrt(), -torch.ones(20, dtype=F64))
    with pytest.raises(torch.linalg.LinAlgError):
        nan.norm(2)


@pytest.mark.parametrize("at", ["input", "output", "inside", "autocast", "a whole"])
def test_singular_values_of_what_a_narrow_dtype_rounds(at):
    """Products with it and its transpose differ by that rounding, which bounds how far residuals can go."""
    A, narrow = randn(200, 180), torch.float32
    x = randn(180)
    if at == "input":
        x, func = x.to(narrow), lambda x: A @ x.double()
    elif at == "output":
        func = lambda x: A.to(narrow) @ x.to(narrow)  # noqa: E731
    elif at == "inside":
        func = lambda x: (A.to(narrow) @ x.to(narrow)).double()  # noqa: E731
    elif at == "autocast":
        narrow, x = torch.bfloat16, x.float()

        def func(x):
            with torch.autocast(x.device.type, narrow):
                return torch.nn.functional.linear(x, A.float()).float()

    else:
        B = randn(180).to(narrow)
        func = lambda x: torch.view_as_real(unfollowed(torch.fft.fft(B * x.to(narrow)))).double()  # noqa: E731
    op = jactri.linearize(func, x)
    values = torch.linalg.svdvals(op.dense().double().reshape(op.shape))
    found = op.svd(2)[1].double()
    assert (found - values[:2]).abs().max() < torch.finfo(narrow).eps * 8 * values[0]


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_norms_of_large_and_small_entries(size):
    """Whose squares, of what is left of them, or of half ones, are out of range."""
    entries = size * torch.linspace(0.5, 1, 300, dtype=F64)
    op = jactri.linearize(lambda x: entries * x, randn(300))
    close(op.norm(2) / size, torch.ones((), dtype=F64), 4096)
    half = jactri.linearize(lambda x: 300 * x, torch.zeros(100, dtype=torch.float16))
    assert half.norm() == 3000
    assert (half.norm(2) - 300).abs() < 1


def test_memory_limits():
    decay, n = 0.9 ** torch.arange(4000, dtype=F64), 4000
    for limit in (7_000_000, 12_000_000):
        op = jactri.linearize(lambda x: decay * x, randn(n), memory_limit=limit)
        op.matvec(randn(n))
        with Taken() as taken:
            values = op.svd(1)[1]
        assert taken.peak < limit
        close(values, decay[:1], 4096)
    with pytest.raises(ValueError, match=r"svd takes .* a memory_limit of 6720000 bytes or more"):
        jactri.linearize(lambda x: decay * x, randn(n), memory_limit=4_000_000).svd(1)
    wide = jactri.linearize(lambda x: x.sin(), randn(20000, 8).float(), memory_limit=8_000_000)
    with Taken() as taken:
        wide.norm()
    assert taken.peak < 8_000_000


def test_products_take_no_memory_beside_their_result():
    """Whether they are finite is asked where a selection may lie before a pole; one end's columns are the result."""
    x = randn(3000)
    op = jactri.linearize(lambda x: (x.roll(1) * x).sin(), x)
    v = randn(3000, 100)
    op @ v
    with Taken() as taken:
        made = op.matmat(v)
    assert taken.peak < 2.1 * made.nbytes


def test_the_generators_of_torch_are_left_alone():
    op = jactri.linearize(seeded(8, 9), randn(3, 8))
    before = torch.random.get_rng_state()
    first = op.svd(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(map(torch.equal, first, op.svd(2)))


# -- SciPy ------------------------------------------------------------------------------------------


def test_scipy_solvers():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    net = seeded(6, 9, 9)
    x = randn(2, 6)
    op = jactri.linearize(net, x)
    J, A = truth_of(net, x).reshape(18, 12).cpu().numpy(), op.to_scipy()
    assert A.shape == J.shape and A.dtype == np.float64
    b, V, U = (randn(*n).cpu().numpy() for n in ((18,), (12, 3), (18, 2)))
    pairs = [(A @ V, J @ V), (A.rmatmat(U), J.T @ U), (A.T @ b, J.T @ b)]
    for made, want in (*pairs, (A.matvec(V[:, :1]), J @ V[:, :1])):
        np.testing.assert_allclose(made, want, atol=1e-12)
    want = np.linalg.lstsq(J, b, rcond=None)[0]
    for solve in (linalg.lsqr, linalg.lsmr):
        found = solve(A, b, atol=1e-13, btol=1e-13, conlim=0)[0]
        np.testing.assert_allclose(found, want, atol=1e-6)
    np.testing.assert_allclose(
        linalg.svds(A, k=3)[1][::-1], np.linalg.svd(J, compute_uv=False)[:3], atol=1e-8
    )
    square = jactri.linearize(lambda x: 3 * x + x.roll(1).sin(), randn(7))
    found, failed = linalg.gmres(square.to_scipy(), b[:7], rtol=1e-12)
    assert failed == 0
    dense = square.dense().cpu().numpy()
    np.testing.assert_allclose(dense @ found, b[:7], atol=1e-8)
    np.testing.assert_allclose(square.T.to_scipy() @ b[:7], dense.T @ b[:7])
    half = jactri.linearize(net.bfloat16(), x.bfloat16())
    assert half.to_scipy().dtype == np.float32
    assert (half.to_scipy() @ np.ones(12)).dtype == np.float32
    with pytest.raises(
        RuntimeError, match=r"a vector is complex .* its real and its imaginary part"
    ):
        A @ (b[:12] + 1j)


# -- saved ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["dense", "csr", "samples"])
def test_an_operator_of_a_matrix_that_was_saved(kept):
    x = randn(4, 6)
    op = jactri.linearize(lambda x: (x.roll(1, 1) * x).sin(), x)
    J, v, u = op.dense().reshape(24, 24), randn(24, 3), randn(24, 2)
    made = {
        "dense": lambda: op.dense().reshape(24, 24),
        "csr": lambda: op.sparse(torch.sparse_csr),
        "samples": lambda: op.dense(per_sample=True),
    }[kept]()
    A = pickle.loads(pickle.dumps(made))
    product = {
        "dense": lambda v: (A @ v.reshape(24)).reshape(4, 6),
        "csr": lambda v: (A @ v.reshape(24, 1)).reshape(4, 6),
        "samples": lambda v: torch.einsum("noi,ni->no", A, v),
    }[kept]
    saved = jactri.linearize(product, torch.zeros_like(x))
    close(saved.matmat(v), J @ v)
    close(saved.T.matmat(u), J.T @ u)
    close(saved.dense().reshape(24, 24), J)
    close(saved.gram().reshape(24, 24), J.T @ J)
    close(saved.diagonal(), op.diagonal())
    close(saved.svd(2)[1], torch.linalg.svdvals(J)[:2], 4096)
    if kept == "csr":
        assert saved.sparse(torch.sparse_csr)._nnz() == made._nnz()
    if kept == "samples":
        close(saved.dense(per_sample=True), made)


# -- what is told -----------------------------------------------------------------------------------


def test_what_it_says():
    op = jactri.linearize(seeded(3, 2), randn(5, 3))
    assert repr(op).splitlines() == [
        f"Linearization(10 x 15, torch.float64 on {op.device}: a Jacobian, formed 1.2 kB)",
        "          shape   dtype          device",
        f"input 0   (5, 3)  torch.float64  {op.device}",
        f"output 0  (5, 2)  torch.float64  {op.device}",
    ]
    assert "Linearization(15 x 10" in str(op.T) and "the transpose of" in str(op.T)
    assert "<td" in op._repr_html_() and op.T.T.shape == op.shape


def linear(x):
    return x * 2


def inside(x):
    return jactri.linearize(linear, x) @ x


def x23():
    return randn(2, 3)


WRONG = {
    "shape": (lambda op: op @ randn(3, 2), RuntimeError, r"shape \(3, 2\); expected \(2, 3\), .* or \(2, 3, K\)"),
    "rows": (lambda op: randn(2, 3, 4) @ op, RuntimeError, r"expected \(2, 3\), .* or \(K, 2, 3\)"),
    "axes": (lambda op: op @ randn(2, 3, 4, 1), RuntimeError, r"or \(2, 3, K\)"),
    "count": (lambda op: op @ (x23(), x23()), RuntimeError, "got 2 for 1 inputs"),
    "integers": (lambda op: op @ torch.ones(2, 3, dtype=int), RuntimeError, "has dtype torch.int64"),
    "array": (lambda op: op @ np.ones((2, 3)), TypeError, "torch.from_numpy"),
    "array at the left": (lambda op: np.ones((2, 3)) @ op, TypeError, "torch.from_numpy"),
    "complex": (lambda op: op @ (x23() + 1j), RuntimeError, "is complex"),
    "flat": (lambda op: op.matvec(x23()), RuntimeError, r"expected a real floating-point tensor \(6,\)"),
    "columns": (lambda op: op.matmat(x23()), RuntimeError, r"tensor \(6, K\)"),
    "no tensor": (lambda op: op.matvec(np.ones(6)), TypeError, r"op\.to_scipy\(\) arrays"),
    "k": (lambda op: op.svd(7), ValueError, "k must be an integer from 1 to 6"),
    "a bool": (lambda op: op.svd(True), ValueError, "k must be an integer"),
    "tol": (lambda op: op.svd(1, 0), ValueError, "tol must be a number above 0"),
    "norm": (lambda op: op.norm("nuc"), ValueError, "ord must be one of 'fro', 2"),
    "weight": (lambda op: op.gram(randn(4)), RuntimeError, "weight for outputs"),
    "pickle": (pickle.dumps, TypeError, r"save A = op\.dense\(\)"),
    "copy": (copy.deepcopy, TypeError, r"save A = op\.dense\(\)"),
    "vmap": (lambda op: torch.func.vmap(lambda v: op @ v)(randn(4, 2, 3)), RuntimeError, "as one block"),
    "jacrev": (lambda op: torch.func.jacrev(inside)(x23()), RuntimeError, "torch.func.linearize there"),
    "create_graph": (lambda op: jactri.linearize(linear, x23(), create_graph=True), TypeError, "jvp and vjp take"),
    "limit": (lambda op: jactri.linearize(linear, x23(), memory_limit="much"), ValueError, "memory_limit"),
    "chunk": (lambda op: jactri.linearize(linear, x23(), chunk_size=0), ValueError, "chunk_size"),
    "backend": (lambda op: jactri.linearize(linear, x23(), backend="gpu"), ValueError, "backend"),
    "integer inputs": (lambda op: jactri.linearize(linear, x23().int()), RuntimeError, "int32"),
    "complex inputs": (lambda op: jactri.linearize(linear, x23() + 1j), RuntimeError, "view_as_real"),
    "complex outputs": (lambda op: jactri.linearize(lambda x: x + 1j, x23()), RuntimeError, "view_as_real"),
    "nothing": (lambda op: jactri.linearize(lambda x: (), x23()), IndexError, "outputs is an empty tuple"),
    "of nothing": (lambda op: jactri.linearize(linear, ()), IndexError, "inputs is an empty tuple"),
    "no function": (lambda op: jactri.linearize(x23(), x23()), TypeError, "not callable"),
    "compile": (lambda op: jactri.compile(linear, x23(), of=jactri.linearize), TypeError, "of must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call(jactri.linearize(linear, x23()))
