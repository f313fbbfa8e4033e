"""Equations, factorisations and determinants of matrices: first derivatives by rules, second by curvature.

Truth: rows of autograd, in every spelling and with batches that broadcast; and closed forms.
"""

from itertools import product

import pytest
import torch
from common import F64, MODES
from second import known
from tolerances import assert_close, assert_same_tree
from torch import linalg as la
from torch.autograd.functional import hessian, jacobian

import jactri

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning"),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def draw(*shape):
    return torch.randn(shape, dtype=F64)


def regular(*shape):
    return 0.3 * draw(*shape) + 2 * torch.eye(shape[-1], dtype=F64)


def definite(*shape):
    a = draw(*shape)
    return a @ a.mT + shape[-1] * torch.eye(shape[-1], dtype=F64)


def equations():
    """Name -> a function of a matrix and a right-hand side."""
    made = {
        "solve": la.solve,
        "solve_right": lambda a, b: la.solve(a, b.mT, left=False),
        "solve_own": lambda a, b: la.solve(a, a.sin() @ b),
        "cholesky_solve": lambda a, b: torch.cholesky_solve(b, a),
        "cholesky_solve_upper": lambda a, b: torch.cholesky_solve(b, a, upper=True),
    }
    for upper, unit, left in product((False, True), repeat=3):

        def new(a, b, u=upper, o=unit, left=left):
            b = b if left else b.mT
            return la.solve_triangular(a, b, upper=u, unitriangular=o, left=left)

        def old(a, b, u=upper, o=unit, t=left):
            return tuple(torch.triangular_solve(b, a, upper=u, unitriangular=o, transpose=t))

        words = f"{'upper' if upper else 'lower'}_{'unit' if unit else 'any'}"
        made[f"triangular_{words}_{'left' if left else 'right'}"] = new
        made[f"old_triangular_{words}_{'transposed' if left else 'plain'}"] = old
    for left, adjoint in product((False, True), repeat=2):

        def lu(a, b, left=left, adjoint=adjoint):
            factors = la.lu_factor(a.detach())
            return la.lu_solve(*factors, b if left else b.mT, left=left, adjoint=adjoint)

        def factored(a, b, left=left, adjoint=adjoint):
            return la.lu_solve(*la.lu_factor(a), b if left else b.mT, left=left, adjoint=adjoint)

        words = f"{'left' if left else 'right'}_{'adjoint' if adjoint else 'plain'}"
        made[f"lu_solve_{words}"] = lu
        made[f"lu_factor_solve_{words}"] = factored
    return made


EQUATIONS = equations()
SHAPES = [
    ((3, 3), (3, 2)),
    ((4, 3, 3), (4, 3, 2)),
    ((4, 3, 3), (3, 2)),
    ((3, 3), (4, 3, 1)),
    ((2, 1, 3, 3), (4, 3, 2)),
    ((1, 1), (1, 1)),
]


@pytest.mark.parametrize("name", EQUATIONS)
def test_equations(name):
    f = EQUATIONS[name]
    for shape_a, shape_b in SHAPES:
        inputs = regular(*shape_a), draw(*shape_b)
        want = jacobian(f, inputs)
        for mode in MODES:
            with jactri.fallback("error"):
                got = jactri.jacobian(f, inputs, strategy=mode)
            assert_same_tree(got, want, F64, length=64)


@pytest.mark.parametrize("shapes", [((3, 3), (3,)), ((4, 3, 3), (3,)), ((4, 3, 3), (4, 3))])
def test_solve_of_a_vector(shapes):
    inputs = regular(*shapes[0]), draw(*shapes[1])
    with jactri.fallback("error"):
        got = jactri.jacobian(la.solve, inputs)
    assert_same_tree(got, jacobian(la.solve, inputs), F64, length=64)


FUNCTIONS = {
    "det": (la.det, regular),
    "slogdet": (lambda a: tuple(la.slogdet(a)), regular),
    "logdet": (torch.logdet, definite),
    "inv": (la.inv, regular),
    "inv_ex": (lambda a: la.inv_ex(a).inverse, regular),
    "cholesky": (la.cholesky, definite),
    "cholesky_upper": (lambda a: la.cholesky(a, upper=True), definite),
    "cholesky_ex": (lambda a: la.cholesky_ex(a).L, definite),
    "cholesky_inverse": (torch.cholesky_inverse, regular),
    "cholesky_inverse_upper": (lambda a: torch.cholesky_inverse(a, upper=True), regular),
    "lu_factor": (lambda a: la.lu_factor(a).LU, draw),
    "matrix_exp": (torch.matrix_exp, draw),
    "matrix_power": (lambda a: la.matrix_power(a, -2), regular),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_a_matrix(name):
    f, make = FUNCTIONS[name]
    for shape in ((3, 3), (4, 3, 3), (2, 1, 3, 3), (1, 1)):
        a = make(*shape)
        want = jacobian(f, a)
        for mode in MODES:
            with jactri.fallback("error"):
                assert_same_tree(jactri.jacobian(f, a, strategy=mode), want, F64, length=256)
    y = f(make(0, 3, 3))
    got = jactri.jacobian(f, make(0, 3, 3))
    for row, out in zip(
        got if isinstance(y, tuple) else [got], y if isinstance(y, tuple) else [y], strict=True
    ):
        assert row.shape == (*out.shape, 0, 3, 3)


@pytest.mark.parametrize("rank", [2, 1])
def test_det_of_a_singular_matrix_is_as_autograd_has_it(rank):
    """Recorded, torch's gradient of it is the adjugate; not recorded, zero."""
    a = torch.diag(torch.tensor([1.0, 2.0, 0.0] if rank == 2 else [1.0, 0.0, 0.0], dtype=F64))
    stack = torch.stack([a, regular(3, 3)])
    for x in (a, stack):
        assert_close(jactri.jacobian(la.det, x), jacobian(la.det, x), F64)
        recorded = jactri.jacobian(la.det, x, create_graph=True)
        assert_close(recorded, jacobian(la.det, x, create_graph=True), F64)
    if rank == 2:  # d2 det / da00 da22 and so on have no diagonal entry; a quadratic of a has one
        got = jactri.laplacian(lambda v: la.det(a + torch.outer(v, v)), torch.zeros(3, dtype=F64))
        want = hessian(lambda v: la.det(a + torch.outer(v, v)), torch.zeros(3, dtype=F64)).trace()
        assert_close(got, want, F64)


# -- second derivatives -------------------------------------------------------------------------------

P, Q = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
P = 0.4 * torch.randn(5, 9, generator=P, dtype=F64)
Q = torch.randn(5, 6, generator=Q, dtype=F64)
EYE = torch.eye(3, dtype=F64)


def matrix(x):
    return (torch.tanh(x) @ P).reshape(-1, 3, 3) + 2 * EYE


def right(x):
    return (torch.sin(x) @ Q).reshape(-1, 3, 2)


def symmetric(x):
    a = matrix(x)
    return a @ a.mT + EYE


def gaussian(x):
    """A log density whose mean and covariance depend on x."""
    factor = la.cholesky(symmetric(x))
    z = la.solve_triangular(factor, right(x), upper=False)
    return -0.5 * z.square().sum((1, 2)) - factor.diagonal(0, 1, 2).log().sum(1)


CURVED = {
    "slogdet": lambda x: la.slogdet(matrix(x)).logabsdet,
    "logdet": lambda x: torch.logdet(symmetric(x)),
    "det": lambda x: la.det(matrix(x)),
    "inv": lambda x: la.inv(matrix(x)),
    "cholesky": lambda x: la.cholesky(symmetric(x)),
    "cholesky_upper": lambda x: la.cholesky(symmetric(x), upper=True),
    "cholesky_inverse": lambda x: torch.cholesky_inverse(matrix(x)),
    "cholesky_inverse_upper": lambda x: torch.cholesky_inverse(matrix(x), upper=True),
    "cholesky_solve_factor": lambda x: torch.cholesky_solve(EYE.expand(len(x), 3, 3), matrix(x)),
    "matrix_exp": lambda x: torch.matrix_exp(matrix(x) / 2),
    "solve_matrix": lambda x: la.solve(matrix(x), EYE[:, :2]),
    "solve_right_side": lambda x: la.solve(P[:3, :3] + 2 * EYE, right(x)),
    "solve_vector": lambda x: la.solve(matrix(x), right(x)[..., 0]),
    "lu_solve": lambda x: la.lu_solve(*la.lu_factor(P[:3, :3] + 2 * EYE), right(x)),
    "lu_factor": lambda x: la.lu_factor(matrix(x)).LU,
    "gaussian": gaussian,
}
CURVED |= {
    name: lambda x, f=f: f(matrix(x), right(x))
    for name, f in EQUATIONS.items()
    if not name.startswith(("lu_solve", "old"))
}


def second_truth(f, x, form):
    rows = []
    for i in range(len(x)):
        y = f(x[i : i + 1])[0]
        rows += [
            (hessian(lambda v, k=k: f(v.unsqueeze(0))[0].reshape(-1)[k], x[i]) * form).sum()
            for k in range(y.numel())
        ]
    return torch.stack(rows).reshape(f(x).shape)


@pytest.mark.parametrize("name", CURVED)
def test_second_derivatives(name):
    f, x, eye = CURVED[name], draw(2, 5), torch.eye(5, dtype=F64)
    assert known(f, x)
    for a in (eye, draw(5, 5)):
        want = second_truth(f, x, a)
        scale = max(1.0, want.abs().max().item())
        with jactri.fallback("error"):
            for options in ({}, {"chunk_size": 2}):
                got = jactri.laplacian(f, x, a, **options)
                assert_close(got, want, F64, length=512, scale=scale)
    got, want = jactri.laplacian(f, x, create_graph=True), second_truth(f, x, eye)
    assert got.requires_grad
    assert_close(got, want, F64, length=512, scale=max(1.0, want.abs().max().item()))


def test_det_near_a_singular_matrix():
    """A multiple of another determinant: digits are not lost to the inverse of a small pivot."""
    small = torch.tensor([1.0, 1.0, 1e-9], dtype=F64)
    x, eye = draw(3, 5), torch.eye(5, dtype=F64)
    want = second_truth(lambda x: 1e-9 * la.det(matrix(x)), x, eye)
    got = jactri.laplacian(lambda x: la.det(matrix(x) * small), x)
    assert_close(got, want, F64, length=512)


def test_bilaplacian_of_log_det():
    x = 0.3 * draw(1, 5)

    def trace(v):
        return hessian(lambda u: CURVED["slogdet"](u.unsqueeze(0))[0], v, create_graph=True).trace()

    with jactri.fallback("error"):
        got = jactri.bilaplacian(CURVED["slogdet"], x)
    assert_close(got, hessian(trace, x[0]).trace().reshape(1), F64, length=4096)


# -- Slater determinants -------------------------------------------------------------------------------


def orbitals(x):
    """(walkers, electrons, orbitals): each row is of one electron."""
    places = 2.0 * torch.arange(x.shape[1], dtype=x.dtype)
    return torch.exp(-((x[:, :, None] - places) ** 2) / 4)


def electrons(walkers, n):
    return 2.0 * torch.arange(n, dtype=F64) + 0.3 * draw(walkers, n)


@pytest.mark.parametrize("by", ["rows", "columns"])
def test_slater_determinants_in_closed_form(by):
    """``-tr(A^-1 dA A^-1 dA) + tr(A^-1 d2A)`` for each electron."""
    x = electrons(7, 5)

    def f(x):
        a = orbitals(x)
        return la.slogdet(a if by == "rows" else a.mT).logabsdet

    a = orbitals(x)
    gap = x[:, :, None] - 2.0 * torch.arange(5, dtype=F64)
    first, second = -gap / 2 * a, (gap * gap / 4 - 0.5) * a
    inverse = la.inv(a).mT
    want = (inverse * second).sum((1, 2)) - (inverse * first).sum(2).square().sum(1)
    with jactri.fallback("error"):
        for options in ({}, {"chunk_size": 2}, {"memory_limit": "40KB"}):
            assert_close(jactri.laplacian(f, x, **options), want, F64, length=256, scale=100.0)
    assert_close(
        jactri.laplacian(lambda x: la.det(orbitals(x)), x),
        _det_laplacian(a, inverse, second),
        F64,
        length=256,
    )


def _det_laplacian(a, inverse, second):
    return la.det(a) * (inverse * second).sum((1, 2))  # linear in every row


def test_a_matrix_that_is_the_input():
    a = regular(4, 3, 3)
    with jactri.fallback("error"):
        got = jactri.laplacian(lambda a: la.slogdet(a).logabsdet, a)
        assert_close(got, -la.inv(a).square().sum((1, 2)), F64, length=64)
        assert_close(jactri.laplacian(la.det, a), torch.zeros(4, dtype=F64), F64, scale=1.0)
    want = torch.stack([hessian(lambda v: la.slogdet(v).logabsdet, p).reshape(9, 9) for p in a])
    one = jactri.func.hessian(lambda v: la.slogdet(v).logabsdet)(a[0])
    assert_close(one.reshape(9, 9), want[0], F64, length=64)


def test_walkers_stay_apart():
    """2,048 walkers: what one of them has to do with another is nowhere formed."""
    x = draw(2048, 12)
    w, v = 0.3 * draw(12, 8), 0.3 * draw(8, 16)

    def f(x):
        return la.slogdet(
            (torch.tanh(x @ w) @ v).reshape(-1, 4, 4) + 2 * torch.eye(4, dtype=F64)
        ).logabsdet

    limit = 3 * 2048 * 12 * 16 * 8
    with jactri.fallback("error"):
        lap = jactri.laplacian(f, x, memory_limit=limit)
        rows = jactri.jacobian(f, x, per_sample=True, memory_limit=limit)
    assert_close(
        rows[:2], torch.stack([jacobian(lambda v: f(v[None])[0], p) for p in x[:2]]), F64, length=64
    )
    want = torch.stack([hessian(lambda v: f(v[None])[0], p).trace() for p in x[:2]])
    assert_close(lap[:2], want, F64, length=256)
