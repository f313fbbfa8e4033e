"""jactri's calls inside of torch.func transforms, for ops whose forward mode or vmap is wrong there in some torch."""

import warnings

import pytest
import torch
from common import F64, torch_before
from torch.nn import functional
from torch.testing import assert_close

import jactri

# an op that vmap loops over is right
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

EYE = torch.eye(3, dtype=F64)
WEIGHT = torch.linspace(-1, 1, 45, dtype=F64).reshape(9, 5)


def well(v):
    return v.reshape(3, 3) * 0.3 + 2 * EYE


def definite(v):
    a = v.reshape(3, 3)
    return a @ a.mT + EYE * torch.tensor([1.0, 2.0, 3.0], dtype=F64)


def points(v):
    return v.reshape(3, 3), v.reshape(3, 3).flip(0) * 1.5 + 0.3


OPS = {
    "solve": lambda v: torch.linalg.solve(well(v), v[:3]).sin(),
    "solve, matrix": lambda v: torch.linalg.solve(well(v), v.reshape(3, 3)),
    "det": lambda v: torch.linalg.det(well(v)).exp(),
    "slogdet": lambda v: torch.linalg.slogdet(well(v))[1],
    "slogdet, batch": lambda v: torch.linalg.slogdet(well(v)[None])[1],
    "logdet": lambda v: torch.logdet(well(v)),
    "inv": lambda v: torch.linalg.inv(well(v))[0],
    "cholesky": lambda v: torch.linalg.cholesky(definite(v))[1:],
    "eigh": lambda v: torch.linalg.eigh(definite(v))[0],
    "cdist": lambda v: torch.cdist(*points(v)),
    "cdist, batch": lambda v: torch.cdist(*(p[None] for p in points(v))),
    "layer_norm": lambda v: functional.layer_norm(v.sin(), (9,)),
    "grid_sample": lambda v: functional.grid_sample(
        v.reshape(1, 1, 3, 3), (v[:8].reshape(1, 2, 2, 2) * 0.3).tanh(), align_corners=False
    ),
    "net": lambda v: torch.tanh(v @ WEIGHT).softmax(-1),
}
FIRST_ONLY = ["cdist", "cdist, batch"]  # torch has no second derivative
if torch_before((2, 13)):
    FIRST_ONLY.append("grid_sample")


def x49():
    return torch.randn(4, 9, dtype=F64, generator=torch.Generator().manual_seed(0))


def rows(func, x):
    x = x.clone().requires_grad_()
    y = func(x)
    made = [torch.autograd.grad(v, x, retain_graph=True)[0] for v in y.flatten()]
    return torch.stack(made).reshape(*y.shape, *x.shape)


def rows_twice(func, x):
    jac = torch.autograd.functional.jacobian
    return jac(lambda v: jac(func, v, create_graph=True), x)


def stacked(call, x, *more):
    return torch.stack([call(*row) for row in zip(x, *more, strict=True)])


FIRST = {
    "func.jacfwd": lambda f: jactri.func.jacfwd(f),
    "func.jacrev": lambda f: jactri.func.jacrev(f),
    "func.jacrev, in chunks": lambda f: jactri.func.jacrev(f, chunk_size=2),
    "jacobian": lambda f: lambda x: jactri.jacobian(f, x),
    "forward mode": lambda f: lambda x: jactri.jacobian(f, x, strategy="forward-mode"),
    "gradient": lambda f: lambda x: jactri.gradient(f, x),
    "per_sample": lambda f: (
        lambda x: jactri.jacobian(
            lambda v: torch.stack([f(r) for r in v]), x[None], per_sample=True
        )[0]
    ),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("call", FIRST)
def test_first_derivatives_inside_of_vmap(call, name):
    x, made = x49(), FIRST[call](OPS[name])
    want = stacked(lambda v: rows(OPS[name], v), x)
    assert_close(torch.vmap(made)(x), want)
    assert_close(torch.vmap(torch.vmap(made))(x[None]), want[None])


@pytest.mark.parametrize("name", OPS)
def test_products_inside_of_vmap(name):
    func, x = OPS[name], x49()
    J = stacked(lambda v: rows(func, v), x)
    gen = torch.Generator().manual_seed(1)
    t = torch.randn(4, 9, dtype=F64, generator=gen)
    got = torch.vmap(lambda v, t: jactri.jvp(func, v, t)[1])(x, t)
    assert_close(got, torch.einsum("n...i,ni->n...", J, t))
    t = torch.randn(4, 5, 9, dtype=F64, generator=gen)
    y, got = torch.vmap(lambda v, t: jactri.jvp(func, v, t))(x, t)
    assert_close(got, torch.einsum("n...i,nki->nk...", J, t))
    assert_close(y, stacked(func, x))
    c = torch.randn(4, 5, *J.shape[1:-1], dtype=F64, generator=gen)
    got = torch.vmap(lambda v, c: jactri.vjp(func, v, c)[1])(x, c)
    assert_close(got, torch.einsum("nko,noi->nki", c.reshape(4, 5, -1), J.reshape(4, -1, 9)))
    if J.shape[1:] == (9, 9):
        got = torch.vmap(lambda v: jactri.diagonal(func, v))(x)
        assert_close(got, J.diagonal(0, -2, -1))


SECOND = {
    "func.hessian": lambda f: jactri.func.hessian(f),
    "func.jacfwd of jacrev": lambda f: jactri.func.jacfwd(jactri.func.jacrev(f)),
    "func.jacrev of jacfwd": lambda f: jactri.func.jacrev(jactri.func.jacfwd(f)),
    "torch's jacrev of jacfwd": lambda f: torch.func.jacrev(jactri.func.jacfwd(f)),
    "torch's jacrev of jvp": lambda f: (
        lambda x: torch.vmap(torch.func.jacrev(lambda v, t: jactri.jvp(f, v, t)[1]), (None, 0), -2)(
            x, torch.eye(9, dtype=F64)
        )
    ),
}


@pytest.mark.parametrize("name", [n for n in OPS if n not in FIRST_ONLY])
@pytest.mark.parametrize("call", SECOND)
def test_second_derivatives(call, name):
    if name == "grid_sample" and "torch" in call:
        pytest.skip("torch's own jacrev refuses it under vmap")
    func, x = OPS[name], x49()
    want = stacked(lambda v: rows_twice(func, v), x)
    assert_close(stacked(SECOND[call](func), x), want)
    assert_close(torch.vmap(SECOND[call](func))(x), want)


@pytest.mark.parametrize("name", [n for n in OPS if n not in FIRST_ONLY])
def test_laplacian_inside_of_transforms(name):
    func, x = OPS[name], x49()
    hessian = stacked(lambda v: rows_twice(func, v), x)
    want = hessian.diagonal(0, -2, -1).sum(-1)
    assert_close(torch.vmap(lambda v: jactri.laplacian(func, v))(x), want)
    weight = torch.eye(9, dtype=F64) + 0.1
    got = torch.vmap(lambda v: jactri.laplacian(func, v, weight, return_lower=True))(x)
    assert_close(got[2], (hessian * weight).sum((-2, -1)))
    assert_close(got[1], stacked(lambda v: rows(func, v), x))

    def batch(v):
        return torch.stack([func(r) for r in v])

    if name in (
        "det",
        "layer_norm",
    ):  # torch has the third derivative wrong (test_third_derivatives.py)
        return
    _, value = torch.func.grad_and_value(lambda v: jactri.laplacian(batch, v).sum())(x)
    assert_close(value, want.sum())


def test_the_gradient_of_a_laplacian():
    x = x49()
    func = OPS["logdet"]

    def laplacian(v):
        v = v if v.requires_grad else v.requires_grad_()
        (g,) = torch.autograd.grad(func(v), v, create_graph=True)
        return sum(torch.autograd.grad(g[i], v, create_graph=True)[0][i] for i in range(9))

    want = stacked(lambda v: torch.autograd.grad(laplacian(v), v)[0], x.clone())
    got = torch.vmap(torch.func.grad(lambda v: jactri.laplacian(func, v)))(x)
    assert_close(got, want)


class Sin(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        with torch.no_grad():
            return g * ctx.saved_tensors[0].cos()


def test_functions_of_other_people():
    x = x49()
    t = torch.ones_like(x)
    assert_close(torch.vmap(lambda v, t: jactri.jvp(Sin.apply, v, t)[1])(x, t), x.cos())
    assert_close(torch.vmap(jactri.func.jacfwd(Sin.apply))(x), torch.diag_embed(x.cos()))
    for call in (
        lambda v: jactri.laplacian(Sin.apply, v),
        lambda v: jactri.bilaplacian(Sin.apply, v),
        jactri.func.hessian(Sin.apply),
    ):
        with pytest.raises(RuntimeError, match="second derivatives do not go through Sin"):
            torch.vmap(call)(x)


def test_outputs_of_several_dtypes():
    def func(v):
        return {"half": v.sin().half(), "whole": v.long(), "same": (v * v,)}

    x = x49()
    got = torch.vmap(jactri.func.jacfwd(func))(x)
    assert got["half"].dtype == torch.float16 and got["whole"].dtype == torch.int64
    assert_close(got["half"], torch.diag_embed(x.cos()).half(), rtol=1e-2, atol=1e-3)
    assert not got["whole"].any() and got["whole"].shape == (4, 9, 9)
    assert_close(got["same"][0], torch.diag_embed(2 * x))


def test_draws_for_every_column_are_refused():
    func = jactri.func.jacfwd(lambda v: v * torch.rand_like(v), randomness="different")
    with pytest.raises(RuntimeError, match="randomness='different'"):
        torch.vmap(func, randomness="different")(x49())
    func = jactri.func.jacfwd(lambda v: v * torch.rand_like(v))
    with pytest.raises(RuntimeError, match="randomness='error'"):
        torch.vmap(func, randomness="different")(x49())


NOISY = {
    "laplacian": lambda f, x: torch.vmap(lambda v: jactri.laplacian(f, v))(x[None]),
    "bilaplacian": lambda f, x: torch.vmap(lambda v: jactri.bilaplacian(f, v))(x[None]),
    "hessian": lambda f, x: torch.vmap(jactri.func.hessian(lambda v: f(v[None])[0]))(x),
    "jacobian": lambda f, x: torch.vmap(lambda v: jactri.jacobian(f, v, per_sample=True))(x[None]),
    "divergence": lambda f, x: torch.vmap(
        lambda v: jactri.divergence(lambda w: w * f(w)[:, None], v)
    )(x[None]),
}


@pytest.mark.parametrize("call", NOISY)
def test_what_vmap_says_of_ops_is_kept(call):
    """That it loops over some in backward passes is no news; warnings of func are."""
    x = 0.1 + torch.rand(3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))

    def func(v):
        warnings.warn("of func", stacklevel=1)
        return v.prod(1)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        NOISY[call](func, x)
    assert seen and {str(w.message) for w in seen} == {"of func"}
