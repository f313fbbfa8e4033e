"""Distances where points coincide: squares of them are smooth, and what has no second derivative there says so."""

import pytest
import torch
import torch.nn.functional as F
from common import torch_before

import jactri

F64 = torch.float64
POINTS = torch.tensor([[0.3, -0.2], [1.0, 0.5], [-0.4, 0.9]], dtype=F64)
WEIGHTS = torch.tensor([0.7, -1.3, 0.4], dtype=F64)
AT = torch.stack([POINTS[0], POINTS[1], torch.tensor([0.1, 0.2], dtype=F64)])
AWAY = AT + 0.05
SCALE = torch.tensor(0.8, dtype=F64, requires_grad=True)


def twin(x, points=POINTS):
    """Squared distances without a root."""
    return ((x.unsqueeze(-2) - points) ** 2).sum(-1)


def near(x, mode="use_mm_for_euclid_dist_if_necessary"):
    return torch.cdist(x, POINTS, compute_mode=mode)


SQUARES = {
    "pow": (lambda x: near(x) ** 2, twin),
    "square": (lambda x: near(x).square(), twin),
    "product": (lambda x: (lambda d: d * d)(near(x)), twin),
    "mm": (lambda x: near(x, "use_mm_for_euclid_dist") ** 2, twin),
    "no mm": (lambda x: near(x, "donot_use_mm_for_euclid_dist") ** 2, twin),
    "scaled": (lambda x: (near(x) / SCALE).square(), lambda x: twin(x) / SCALE**2),
    "scaled by numbers": (lambda x: (-near(x) / 2 * 3) ** 2, lambda x: twin(x) * 2.25),
    "one of both scaled": (
        lambda x: (lambda d: (WEIGHTS * d) * d)(near(x)),
        lambda x: WEIGHTS * twin(x),
    ),
    "moved": (
        lambda x: (near(x).T.unsqueeze(0)[:, 1:] ** 2)[0].T @ WEIGHTS[1:].diag(),
        lambda x: twin(x)[:, 1:] @ WEIGHTS[1:].diag(),
    ),
    "to the fourth": (lambda x: (near(x) ** 2) ** 2, lambda x: twin(x) ** 2),
    "of points second": (lambda x: torch.cdist(POINTS, x).T ** 2, twin),
    "batches": (
        lambda x: torch.cdist(x.unsqueeze(1), POINTS.expand(3, 3, 2)).squeeze(1) ** 2,
        twin,
    ),
}


def rows_of(square):
    return lambda x: (torch.exp(-square(x) / 2) + 0.1 * square(x)).sum(1)


def own(full):
    n = len(AT)
    return torch.stack([full[i, :, i] for i in range(n)])


HESSIANS = {
    "hessian": lambda f, x: own(jactri.func.hessian(lambda v: f(v).sum())(x)),
    "gradients": lambda f, x: jactri.gradient(
        lambda v: jactri.gradient(f, v, create_graph=True), x
    ),
    "jacrev": lambda f, x: own(jactri.func.jacrev(jactri.func.jacrev(lambda v: f(v).sum()))(x)),
    "jacfwd": lambda f, x: own(jactri.func.jacfwd(jactri.func.jacfwd(lambda v: f(v).sum()))(x)),
}


@pytest.mark.parametrize("name", SQUARES)
@pytest.mark.parametrize("x", [AT, AWAY], ids=["at", "away"])
def test_squares_are_smooth(name, x):
    func, truth = map(rows_of, SQUARES[name])
    torch.testing.assert_close(func(x), truth(x))
    first = own_rows(torch.autograd.functional.jacobian(truth, x))
    torch.testing.assert_close(jactri.gradient(func, x), first)
    want = own(torch.autograd.functional.hessian(lambda v: truth(v).sum(), x))
    for call, hessian in HESSIANS.items():
        got = hessian(func, x)
        torch.testing.assert_close(got, want, msg=lambda m, n=call: f"{n}: {m}")
    trace = want.diagonal(0, 1, 2).sum(-1)
    torch.testing.assert_close(jactri.laplacian(func, x), trace)
    div = jactri.divergence(lambda v: jactri.gradient(func, v, create_graph=True), x)
    torch.testing.assert_close(div, trace)


def own_rows(full):
    return torch.stack([full[i, i] for i in range(len(full))])


@pytest.mark.parametrize("x", [AT, AWAY], ids=["at", "away"])
def test_squares_of_pairs(x):
    x = torch.cat([x, x[:1]])
    i, j = torch.triu_indices(4, 4, 1)

    def func(v):
        return torch.exp(-(F.pdist(v) ** 2)).sum()

    def truth(v):
        return torch.exp(-((v[i] - v[j]) ** 2).sum(1)).sum()

    want = torch.autograd.functional.hessian(truth, x)
    torch.testing.assert_close(jactri.func.hessian(func)(x), want)
    torch.testing.assert_close(
        jactri.jacobian(func, x), torch.autograd.functional.jacobian(truth, x)
    )


# name: function, the same of squared distances without distances
OTHERS = {
    "itself": (lambda x: near(x), lambda x: twin(x).sqrt()),
    "exp": (lambda x: torch.exp(-near(x)), lambda x: torch.exp(-twin(x).sqrt())),
    "Matern": (
        lambda x: (lambda d: (1 + d + d**2 / 3) * torch.exp(-d))(near(x)),
        lambda x: (lambda d: (1 + d + d * d / 3) * torch.exp(-d))(twin(x).sqrt()),
    ),
    "shifted": (lambda x: (near(x) + 1) ** 2, lambda x: (twin(x).sqrt() + 1) ** 2),
    "bent": (lambda x: near(x).tanh() ** 2, lambda x: twin(x).sqrt().tanh() ** 2),
    "from one": (lambda x: (1 - near(x)).square(), lambda x: (1 - twin(x).sqrt()).square()),
    "shifted and not": (
        lambda x: (lambda d: d * (d + 1))(near(x)),
        lambda x: (lambda d: d * (d + 1))(twin(x).sqrt()),
    ),
    "two sets": (
        lambda x: near(x) * torch.cdist(x, POINTS.flip(0)),
        lambda x: (twin(x) * twin(x, POINTS.flip(0))).sqrt(),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_smooth_has_no_second_derivative(name):
    """Autograd's convention for the first, a slope of 0; for the second the truth, or NaN where there is none."""
    pair = OTHERS[name]
    func, truth = (lambda x, f=f: f(x).sum(1) for f in pair)
    for x in (AT, AWAY):
        want = torch.autograd.functional.jacobian(func, x)
        for strategy in ("auto", "forward-mode", "reverse-mode"):
            torch.testing.assert_close(jactri.jacobian(func, x, strategy=strategy), want)
        torch.testing.assert_close(jactri.jacobian(func, x, create_graph=True).detach(), want)
    want = own(torch.autograd.functional.hessian(lambda v: truth(v).sum(), AWAY))
    for call, hessian in HESSIANS.items():
        torch.testing.assert_close(hessian(func, AWAY), want, msg=lambda m, n=call: f"{n}: {m}")
        got = hessian(func, AT)
        assert got[:2].isnan().any(-1).any(-1).all(), call  # both at a point of the set
        torch.testing.assert_close(got[2], own_hessian(truth, AT)[2])
    assert jactri.laplacian(func, AT)[:2].isnan().all()


def own_hessian(func, x):
    return own(torch.autograd.functional.hessian(lambda v: func(v).sum(), x))


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("p", [1.0, 1.5, 3.0, float("inf")])
def test_other_norms(p, square):
    def func(x):
        d = torch.cdist(x, POINTS, p=p)
        return torch.exp(-(d**2 if square else d)).sum(1)

    torch.testing.assert_close(
        jactri.jacobian(func, AT), torch.autograd.functional.jacobian(func, AT)
    )
    for create_graph in (False, True):
        got = jactri.laplacian(func, AT, create_graph=create_graph)
        assert got[:2].isnan().all()
        assert got[2].isfinite()


@pytest.mark.parametrize("n", [5, 30])  # torch's own way, and by a product of matrices
def test_a_point_is_always_where_it_is(n):
    """The distance of each point to itself is a constant, whatever follows."""
    x = torch.randn(n, 3, dtype=F64)
    i, j = (~torch.eye(n, dtype=torch.bool)).nonzero(as_tuple=True)
    own_place = torch.eye(n, dtype=torch.bool)

    def masked(v):
        r = torch.where(own_place, 1.0, torch.cdist(v, v))
        return torch.where(own_place, 0.0, r**-2).sum()

    def bare(v):
        return torch.exp(-torch.cdist(v, v)).sum()

    for func, truth in (
        (masked, lambda v: (((v[i] - v[j]) ** 2).sum(1) ** -1).sum()),
        (bare, lambda v: torch.exp(-((v[i] - v[j]) ** 2).sum(1).sqrt()).sum()),
    ):
        want = torch.autograd.functional.hessian(truth, x)
        torch.testing.assert_close(jactri.func.hessian(func)(x), want)


def test_poles_of_squares_are_autograds():
    for func in (
        lambda x: (near(x) ** 2).sqrt(),
        lambda x: (near(x) ** 2 + 1e-6).sqrt(),
        lambda x: torch.where(near(x) > 0, near(x) ** -2, 1.0),
    ):
        want = torch.autograd.functional.jacobian(func, AT)
        torch.testing.assert_close(jactri.jacobian(func, AT), want, equal_nan=True)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_gradients_of_pdist(p):
    """Torch 2.14 differentiates them, but what it has for tangents is NaN; earlier it refuses."""
    i, j = torch.triu_indices(3, 3, 1)

    def func(x):
        return F.pdist(x, p=p).sin().sum()

    def gradient(x):
        return torch.autograd.grad(func(x), x, create_graph=True)[0]

    def truth(x):
        return ((x[i] - x[j]).abs() ** p).sum(1).pow(1 / p).sin().sum()

    want = torch.autograd.functional.hessian(truth, AWAY)
    for call in (
        lambda: jactri.jacobian(gradient, AWAY, strategy="forward-mode"),
        lambda: jactri.jacobian(gradient, AWAY, strategy="reverse-mode"),
        lambda: jactri.func.hessian(func)(AWAY),
        lambda: jactri.laplacian(lambda v: func(v[0])[None], AWAY[None]).reshape(()),
    ):
        try:
            found = call()
        except RuntimeError as error:
            assert "is not implemented" in str(error)  # noqa: PT017
            assert torch_before((2, 14))
            continue
        expected = want if found.dim() else want.reshape(6, 6).trace()
        torch.testing.assert_close(found, expected)
