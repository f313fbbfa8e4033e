"""Complex parameters against a twin whose parameters are pairs of real numbers, in float64."""

import pytest
import torch
from common import F64
from tolerances import assert_close, assert_gradients_close
from torch import nn

import jactri

C128 = torch.complex128
N, M = 4, 3


class Layer(nn.Module):
    """A complex layer, a complex and a real bias; a part of the first is conjugated, one number has no axis."""

    def forward(self, x):
        h = x.to(C128) @ self.get("w").mT + self.get("w").conj()[:, 0]
        h = (h * self.get("scale")).tanh() + self.get("unit") * self.get("scale").conj()
        return torch.cat([h.abs(), (h * h).imag], 1)[:, :M] * self.get("real")


class Complex(Layer):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(5, 2, dtype=C128))
        self.scale = nn.Parameter(torch.randn((), dtype=C128))
        self.unit = nn.Parameter(torch.randn(5, dtype=C128))
        self.real = nn.Parameter(torch.randn(M, dtype=F64))

    def get(self, name):
        return getattr(self, name)


class Pairs(Layer):
    """The same function of real parameters."""

    def __init__(self, like):
        super().__init__()
        for name, p in like.named_parameters():
            real = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
            self.register_parameter(name, nn.Parameter(real.clone()))

    def get(self, name):
        p = getattr(self, name)
        return p if name == "real" else torch.view_as_complex(p)


def built(n=N):
    module = Complex()
    return module, Pairs(module), torch.randn(n, 2, dtype=F64)


def truth_of(twin, x):
    """The Jacobian of the twin by a backward pass a row, ``(N * M, parameters)``."""
    rows = [
        torch.autograd.grad(y, list(twin.parameters()), retain_graph=True)
        for y in twin(x).flatten()
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def flat(values):
    """``{name: tensor}`` as one vector of real numbers."""
    parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in values.values()]
    return torch.cat([t.flatten() for t in parts])


def like(module):
    return {name: torch.randn_like(p) for name, p in module.named_parameters()}


def close(actual, truth, what):
    assert_close(actual, truth, F64, length=truth.numel(), factor=4, what=what)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_products(chunk_size):
    module, twin, x = built()
    truth = truth_of(twin, x)
    jac = jactri.parameter_jacobian(module, x, chunk_size=chunk_size)
    v, u = like(module), torch.randn(N, M, dtype=F64)
    close((jac @ v).flatten(), truth @ flat(v), "J v")
    block = {
        k: torch.stack([t, -2 * t.conj(), 1j * t]) if t.is_complex() else torch.stack([t] * 3)
        for k, t in v.items()
    }
    for k, made in enumerate(jac @ block):
        close(made.flatten(), truth @ flat({n: t[k] for n, t in block.items()}), "J block")
    assert (jac @ {k: t[:0] for k, t in block.items()}).shape == (0, N, M)
    made = jac.T @ u
    assert all(made[name].dtype == p.dtype for name, p in module.named_parameters())
    close(flat(made), u.flatten() @ truth, "J^T u")
    # real tangents move the real parts
    real = {k: t.real if t.is_complex() else t for k, t in v.items()}
    want = flat({k: t.to(v[k].dtype) for k, t in real.items()})
    close((jac @ real).flatten(), truth @ want, "J v of real tangents")


def test_products_are_those_of_autograd():
    module, _, x = built()
    jac, v = jactri.parameter_jacobian(module, x), like(module)
    params = {name: p.detach() for name, p in module.named_parameters()}
    _, want = torch.func.jvp(lambda p: torch.func.functional_call(module, p, x), (params,), (v,))
    close(jac @ v, want, "J v")
    u = torch.randn(N, M, dtype=F64)
    want = torch.autograd.grad(module(x), list(module.parameters()), u)
    for got, g in zip((jac.T @ u).values(), want, strict=True):
        close(got, g, "J^T u")


@pytest.mark.parametrize("n", [N, 1])
def test_kernels(n):
    module, twin, x = built(n)
    other = torch.randn(2, 2, dtype=F64)
    a, b = truth_of(twin, x), truth_of(twin, other)
    jac = jactri.parameter_jacobian(module, x)
    close(jac.gram(), (a @ a.t()).reshape(n, M, n, M), "gram")
    full = (a @ b.t()).reshape(n, M, 2, M).transpose(1, 2)
    diagonal = full.diagonal(0, 2, 3)
    for compute, want in {"full": full, "diagonal": diagonal, "trace": diagonal.sum(-1)}.items():
        close(jactri.empirical_ntk(module, x, other, compute=compute), want, compute)
    run = jactri.compile(module, x, other, of=jactri.empirical_ntk)
    close(run(x, other), full, "compiled")
    only = jactri.empirical_ntk(module, x, params="scale")
    close(
        only.diagonal(0, 0, 1).diagonal(0, 0, 1),
        a[:, 20:22].square().sum(1).reshape(n, M),
        "scale",
    )


def test_a_kernel_of_one_parameter():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, dtype=C128))

        def forward(self, x):
            return (torch.view_as_complex(x) * self.w).real[:, None]

    x = torch.tensor([[3.0, 4.0]], dtype=F64)
    assert jactri.empirical_ntk(Net(), x).item() == 25
    y = torch.view_as_complex(x)
    assert jactri.jjt(lambda w: (y * w).real, torch.ones(1, dtype=C128)).item() == 25


def test_variance_and_ggn():
    module, twin, x = built()
    truth = truth_of(twin, x).reshape(N, M, -1)
    jac = jactri.parameter_jacobian(module, x)
    v = {name: torch.rand(p.shape, dtype=F64) for name, p in module.named_parameters()}
    both = {k: torch.complex(t, t) if k != "real" else t for k, t in v.items()}
    want = (truth * flat(both)) @ truth.mT
    close(jac.variance(v), want, "variance")
    close(jac.variance({**v, "w": v["w"].to(C128)}), want, "variance of a complex dtype")
    h = torch.randn(N, M, M, dtype=F64)
    h = h + h.mT
    for given, dense in ((h, h), (h.diagonal(0, 1, 2), torch.diag_embed(h.diagonal(0, 1, 2)))):
        g = jactri.ggn(module, x, given)
        matrix = (truth.mT @ dense @ truth).sum(0)
        t = like(module)
        close(flat(g @ t), matrix @ flat(t), "ggn product")
        made, at = g.diagonal(), 0
        for name, p in module.named_parameters():
            size = p.numel() * (1 + p.is_complex())
            own = matrix.diagonal()[at : at + size].reshape(*p.shape, -1).sum(-1)
            assert made[name].dtype == F64
            close(made[name], own, name)
            at += size


def test_results_are_differentiable():
    module, twin, x = built()
    params, pairs = list(module.parameters()), list(twin.parameters())
    y = twin(x).flatten()
    rows = [torch.autograd.grad(e, pairs, create_graph=True) for e in y]
    columns = [torch.stack(column).flatten(1) for column in zip(*rows, strict=True)]
    truth = sum(c @ c.t() for c in columns)
    jac = jactri.parameter_jacobian(module, x, create_graph=True)
    with torch.no_grad():  # create_graph rules
        made = jac.gram()
    got = torch.autograd.grad(made.square().sum(), params)
    want = torch.autograd.grad(truth.square().sum(), pairs)
    real = [torch.view_as_real(g) if g.is_complex() else g for g in got]
    assert_gradients_close(real, want, F64, length=truth.numel())


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("form", ["identity", "diagonal", "dense"])
def test_jjt_of_complex_inputs(form, per_sample):
    torch.manual_seed(0)
    z, x = torch.randn(N, 2, dtype=C128), torch.randn(N, 3, dtype=F64)
    w = torch.randn(2, 3, dtype=C128)

    def func(z, x):
        h = (z @ w + x).tanh() * z[:, :1].conj()
        return h.real, h.abs().sum(1, keepdim=True)

    pairs = torch.view_as_real(z)
    rows = torch.autograd.functional.jacobian(
        lambda p, x: func(torch.view_as_complex(p), x), (pairs, x)
    )
    size = (2, 3) if per_sample else (2 * N, 3 * N)
    middle = [torch.rand(s, dtype=F64) + 0.1 for s in size]
    if form != "diagonal":
        middle = (
            [torch.eye(s, dtype=F64) for s in size]
            if form == "identity"
            else [m.outer(m) + m.diag() for m in middle]
        )
    whole = [m if m.dim() == 2 else m.diag() for m in middle]
    if per_sample:
        whole = [torch.block_diag(*[m] * N) for m in whole]
    whole[0] = torch.kron(whole[0], torch.eye(2, dtype=F64))  # each part with the same
    weight = None
    if form != "identity":
        shapes = [(2,), (3,)] if per_sample else [z.shape, x.shape]
        weight = tuple(
            m.reshape(*s, *(() if form == "diagonal" else s))
            for m, s in zip(middle, shapes, strict=True)
        )
    made = jactri.jjt(func, (z, x), weight, per_sample=per_sample)
    for j in range(2):
        for k in range(2):
            n, m = rows[j][0].shape[1], rows[k][0].shape[1]
            want = sum(
                rows[j][i].reshape(N * n, -1) @ whole[i] @ rows[k][i].reshape(N * m, -1).t()
                for i in range(2)
            ).reshape(N, n, N, m)
            if per_sample:
                want = want.diagonal(0, 0, 2).movedim(-1, 0)
            close(made[j][k], want, f"jjt {j} {k}")


def test_jjt_inside_of_vmap():
    z = torch.randn(5, 2, dtype=C128)

    def func(z):
        return (z * z.conj().flip(0)).imag + z.real

    want = torch.stack([jactri.jjt(func, row) for row in z])
    close(torch.func.vmap(lambda row: jactri.jjt(func, row))(z), want, "vmap")


def test_what_is_refused():
    module, _, x = built()
    jac, v = jactri.parameter_jacobian(module, x), like(module)
    with pytest.raises(
        RuntimeError, match=r"v\['real'\] is complex .* the parameter is torch.float64"
    ):
        jac @ {**v, "real": torch.zeros(M, dtype=C128)}
    with pytest.raises(RuntimeError, match=r"u is complex \(torch.complex128\), but the output"):
        jac.T @ torch.zeros(N, M, dtype=C128)
    with pytest.raises(RuntimeError, match=r"v\['w'\] must hold variances"):
        jac.variance(v)
    with pytest.raises(RuntimeError, match="loss_hessian is complex"):
        jactri.ggn(module, x, torch.ones(N, M, dtype=C128))
    with pytest.raises(RuntimeError, match="what loss_hessian returned is complex"):
        jactri.ggn(module, x, lambda block: block * 1j) @ v
    z = torch.ones(2, dtype=C128)
    with pytest.raises(RuntimeError, match=r"jtj takes real inputs, .* pass torch.view_as_real"):
        jactri.jtj(torch.abs, z)
    for call in (jactri.jtj, jactri.jjt):
        with pytest.raises(RuntimeError, match=r"outputs\[0\] is torch.complex128"):
            call(lambda x: x * 1j, torch.ones(2, dtype=F64))
    with pytest.raises(RuntimeError, match="jtj takes real inputs"):
        torch.func.vmap(lambda row: jactri.jtj(torch.abs, row))(z.unsqueeze(0))
    with pytest.raises(RuntimeError, match="the output of diagonal is complex"):
        jactri.diagonal(torch.square, z)
    assert torch.equal(jactri.diagonal(lambda z: z.abs().square(), z + 1j), 2 * (z + 1j))


def test_a_module_that_is_complex_for_some_inputs_only():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, dtype=F64))

        def forward(self, x):
            h = self.w * x
            return torch.complex(h, h).abs() if bool(x.sum() > 0) else h

    module, x = Branch(), torch.rand(3, 2, dtype=F64)
    for a, b in ((x, -x), (-x, x)):
        first, second = truth_of(module, a), truth_of(module, b)
        want = (first @ second.t()).reshape(3, 2, 3, 2).transpose(1, 2)
        close(jactri.empirical_ntk(module, a, b), want, "kernel")
