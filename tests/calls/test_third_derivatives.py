"""Third derivatives, by second ones that are differentiated: right, or refused where torch has them wrong."""

import functools

import pytest
import torch
from common import F64
from torch.nn import functional as F
from torch.testing import assert_close

import jactri

# an op that vmap loops over is right
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

WEIGHTS = torch.linspace(0.5, 2, 9, dtype=F64)
BASE = 2 * torch.eye(3, dtype=F64)


def matrix(v):
    return v.reshape(3, 3) * 0.3 + BASE


def definite(v):
    return matrix(v) @ matrix(v).mT


def normed(call):
    return lambda v: (call(v.sin().reshape(3, 3)).flatten() * WEIGHTS).sum()


WRONG = {
    "det": lambda v: torch.linalg.det(matrix(v)).exp(),
    "layer_norm": normed(lambda v: F.layer_norm(v, (3,))),
    "batch_norm": normed(lambda v: F.batch_norm(v, None, None, training=True)),
    "instance_norm": normed(lambda v: F.instance_norm(v[None])),
    "logcumsumexp": lambda v: v.logcumsumexp(0).sin().sum(),
}
"""Torch's own third derivative is wrong, or NaN, inside of its transforms."""

WRONG_FORWARD = {
    "slogdet": lambda v: torch.linalg.slogdet(matrix(v))[1],
    "solve": lambda v: torch.linalg.solve(matrix(v), v[:3]).sum(),
    "cholesky_inverse": lambda v: torch.cholesky_inverse(torch.linalg.cholesky(definite(v))).sum(),
    "householder": lambda v: torch.linalg.householder_product(matrix(v)[:, :1], v[:1].sin()).sum(),
}
"""It is wrong with forward mode in some places."""

RIGHT = {
    "layer_norm's weight": lambda v: F.layer_norm(WEIGHTS, (9,), v, v.flip(0)).sin().sum(),
    "batch_norm in eval": normed(
        lambda v: F.batch_norm(v, v.new_zeros(3), v.new_ones(3) * 2, v[0]).sin()
    ),
    "group_norm": normed(lambda v: F.group_norm(v[None], 3)),
    "inv": lambda v: torch.linalg.inv(matrix(v)).sum(),
    "conv": lambda v: F.conv1d(v.view(1, 1, 9), v[:3].view(1, 1, 3)).sin().sum(),
    "conv of weights": lambda v: F.conv1d(WEIGHTS.view(1, 1, 9), v[:3].view(1, 1, 3)).sin().sum(),
    "conv_transpose": lambda v: (
        F.conv_transpose1d(v.view(1, 1, 9), v[:3].view(1, 1, 3)).sin().sum()
    ),
    "net": lambda v: (torch.tanh(v @ matrix(v).repeat(3, 1)) ** 2).sum(),
}

OPS = {**WRONG, **WRONG_FORWARD, **RIGHT}


def point():
    return torch.randn(9, dtype=F64, generator=torch.Generator().manual_seed(0))


def laplacian(func, x):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(func(x), x, create_graph=True)
    return sum(torch.autograd.grad(g[i], x, retain_graph=True)[0][i] for i in range(9))


@functools.cache
def truth(name, h=1e-3):
    """The gradient of the Laplacian by differences of fourth order."""
    func, x, found = OPS[name], point(), []
    for e in torch.eye(9, dtype=F64) * h:
        near = laplacian(func, x + e) - laplacian(func, x - e)
        far = laplacian(func, x + 2 * e) - laplacian(func, x - 2 * e)
        found.append((8 * near - far) / (12 * h))
    return torch.stack(found)


def traced(rows):
    """The trace of the two last axes."""
    return rows.diagonal(0, -2, -1).sum(-1)


def eager(call):
    def made(func, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(call(func, x), x)[0]

    return made


def rows_of_rows(strategy):
    def call(func, x):
        def first(v):
            return jactri.jacobian(func, v, create_graph=True)

        return jactri.jacobian(first, x, create_graph=True, strategy=strategy).trace()

    return eager(call)


OUTSIDE = {
    "laplacian": eager(lambda f, x: jactri.laplacian(f, x, create_graph=True)),
    "hessian": eager(lambda f, x: jactri.func.hessian(f)(x).trace()),
    "jacobian of jacobian": rows_of_rows("reverse-mode"),
    "jacobian of jacobian, forward": rows_of_rows("forward-mode"),
    "laplacian of gradient": lambda f, x: jactri.laplacian(
        lambda v: jactri.gradient(f, v, create_graph=True), x
    ),
}

REVERSE = {
    "laplacian": lambda f, x: torch.func.grad(lambda v: jactri.laplacian(f, v))(x),
    "hessian": lambda f, x: torch.func.grad(lambda v: jactri.func.hessian(f)(v).trace())(x),
    "jacrev of jacrev": lambda f, x: torch.func.grad(
        lambda v: jactri.func.jacrev(jactri.func.jacrev(f))(v).trace()
    )(x),
    "jacobian": lambda f, x: torch.func.grad(
        lambda v: torch.func.jacrev(lambda w: jactri.jacobian(f, w))(v).trace()
    )(x),
    "vmap": lambda f, x: torch.vmap(torch.func.grad(lambda v: jactri.laplacian(f, v)))(x[None])[0],
    "backward": eager(lambda f, x: torch.vmap(lambda v: jactri.laplacian(f, v))(x[None])[0]),
    "backward, hessian": eager(lambda f, x: torch.vmap(jactri.func.hessian(f))(x[None])[0].trace()),
}

FORWARD = {
    "laplacian": lambda f, x: torch.func.jacfwd(lambda v: jactri.laplacian(f, v))(x),
    "jacfwd of jacfwd": lambda f, x: traced(
        torch.func.jacfwd(torch.func.jacfwd(lambda v: jactri.gradient(f, v)))(x)
    ),
    "jacrev of jacfwd": lambda f, x: traced(
        torch.func.jacrev(torch.func.jacfwd(lambda v: jactri.gradient(f, v)))(x)
    ),
}


@pytest.mark.parametrize("name", [*WRONG, *WRONG_FORWARD, *RIGHT])
@pytest.mark.parametrize("call", OUTSIDE)
def test_outside_of_transforms(call, name):
    assert_close(OUTSIDE[call](OPS[name], point()), truth(name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*WRONG_FORWARD, *RIGHT])
@pytest.mark.parametrize("call", REVERSE)
def test_inside_of_transforms(call, name):
    assert_close(REVERSE[call](OPS[name], point()), truth(name), rtol=1e-6, atol=1e-6)


FORWARD_IS_RIGHT = [(c, n) for c in FORWARD for n in RIGHT] + [
    ("laplacian", n) for n in ("slogdet", "solve")
]


@pytest.mark.parametrize(("call", "name"), FORWARD_IS_RIGHT)
def test_inside_of_forward_mode(call, name):
    assert_close(FORWARD[call](OPS[name], point()), truth(name), rtol=1e-6, atol=1e-6)


REFUSED = [
    *((c, n) for c in (*REVERSE.values(), *FORWARD.values()) for n in WRONG),
    *((FORWARD[c], n) for c in ("jacfwd of jacfwd", "jacrev of jacfwd") for n in WRONG_FORWARD),
    (FORWARD["laplacian"], "cholesky_inverse"),
]


@pytest.mark.parametrize(("made", "name"), REFUSED)
def test_what_torch_has_wrong_is_refused(made, name):
    # under vmap, torch 2.14 has no second derivatives of batch norms: it refuses them itself
    own = "|accessing `data` under vmap" if name in ("batch_norm", "instance_norm") else ""
    with pytest.raises(RuntimeError, match=f"third derivatives of .*create_graph=True{own}"):
        made(OPS[name], point())


def test_second_derivatives_of_a_module_are_as_ever():
    net = torch.nn.Sequential(
        torch.nn.Linear(5, 6), torch.nn.LayerNorm(6), torch.nn.Tanh(), torch.nn.Linear(6, 1)
    ).to(F64)
    x = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    got = torch.vmap(lambda v: jactri.laplacian(net, v, return_lower=True))(x)
    assert_close(got, jactri.laplacian(net, x, return_lower=True))
    got[1].sum().backward()  # second derivatives: right
    with pytest.raises(RuntimeError, match="third derivatives of NativeLayerNormBackward0"):
        got[2].sum().backward()
    with pytest.raises(RuntimeError, match="third derivatives of NativeLayerNormBackward0"):
        torch.vmap(lambda v: jactri.bilaplacian(net, v))(x)
