"""per_sample="assume": samples that mix by rounding, or by a solver's step size, on the caller's word."""

import pytest
import torch
from common import F64, MODES, make
from torch import nn

import jactri

N, D = 4, 3


class Batch(nn.Module):
    """A layer whose every sample is divided by what all of them have in common."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, 2)

    def forward(self, x):
        return self.inner(x).tanh() * x.square().mean().sqrt()


class Hidden(torch.autograd.Function):
    """Mixes samples, as far as anyone can see from outside."""

    @staticmethod
    def forward(ctx, x):
        return x.cumsum(0)

    @staticmethod
    def backward(ctx, g):
        return g.flip(0).cumsum(0).flip(0)


net = make(Batch)
x0 = torch.linspace(-1, 1, N * D, dtype=F64).reshape(N, D)


def whole(func, x=x0):
    """J[n, o, m, i] by autograd."""
    return torch.autograd.functional.jacobian(func, x)


@pytest.mark.parametrize(
    "func", [net, lambda x: Hidden.apply(x)[:, :2].sin()], ids=["layer", "hidden"]
)
def test_what_is_returned_where_the_claim_is_false(func):
    j = whole(func)
    columns, rows = torch.einsum("nomi->moi", j), torch.einsum("nomi->noi", j)
    assert not torch.allclose(columns, rows)
    for mode, want in zip(MODES, (columns, rows, columns), strict=True):
        with pytest.raises(RuntimeError, match='per_sample="assume" takes your word'):
            jactri.jacobian(func, x0, per_sample=True, strategy=mode)
        got = jactri.jacobian(func, x0, per_sample="assume", strategy=mode)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    leaf = x0.clone().requires_grad_()
    got = jactri.jacobian_of(func(leaf), leaf, per_sample="assume")
    torch.testing.assert_close(got, columns, rtol=1e-12, atol=1e-12)
    got = jactri.gradient(func, x0, per_sample="assume", create_graph=True)
    torch.testing.assert_close(got, columns, rtol=1e-12, atol=1e-12)
    compiled = jactri.compile(func, x0, of=jactri.gradient, per_sample="assume", engine="fx")
    torch.testing.assert_close(compiled(x0), columns, rtol=1e-12, atol=1e-12)
    for call, letters in ((jactri.jtj, "noi,noj->nij"), (jactri.jjt, "noi,npi->nop")):
        want = torch.einsum(letters, columns, columns)
        got = call(func, x0, per_sample="assume")
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert "reverse" in jactri.explain(func, x0, per_sample="assume").direction
    got = jactri.finite_difference(func, x0, per_sample="assume")
    torch.testing.assert_close(got, rows, rtol=1e-7, atol=1e-8)
    assert jactri.check(func, x0, per_sample="assume").ok


def test_the_laplacian_and_the_divergence_of_samples_that_mix():
    def gradients(x):
        return torch.stack(
            [torch.autograd.grad(y.sum(), x, create_graph=True)[0] for y in net(x).unbind(1)], 1
        )

    leaf = x0.clone().requires_grad_()
    g = gradients(leaf)
    want = torch.zeros(N, 2, dtype=F64)
    for o in range(2):
        for i in range(D):
            want[:, o] += torch.autograd.grad(g[:, o, i].sum(), leaf, retain_graph=True)[0][:, i]
    with pytest.raises(RuntimeError, match="samples mix"):
        jactri.laplacian(net, x0)
    got = jactri.laplacian(net, x0, per_sample="assume")
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)

    def field(x):
        return x.sin() * x.square().mean()

    want = whole(field).diagonal(0, 0, 2).diagonal(0, 0, 1).sum(-1)
    with pytest.raises(RuntimeError, match="samples mix"):
        jactri.divergence(field, x0)
    torch.testing.assert_close(jactri.divergence(field, x0, per_sample="assume"), want)


def test_parameters_of_samples_that_mix():
    want = {}
    for name, p in net.named_parameters():
        y = net(x0).flatten()
        rows = [torch.autograd.grad(e, p, retain_graph=True)[0] for e in y.unbind()]
        want[name] = torch.stack(rows).reshape(N, 2, *p.shape)
    with pytest.raises(RuntimeError, match=r"samples mix.*assume"):
        jactri.parameter_jacobian(net, x0)
    got = jactri.parameter_jacobian(net, x0, per_sample="assume").dense()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    flat = torch.cat([j.reshape(N * 2, -1) for j in want.values()], 1)
    kernel = jactri.empirical_ntk(net, x0, per_sample="assume")
    want = (flat @ flat.T).reshape(N, 2, N, 2).transpose(1, 2)
    torch.testing.assert_close(kernel, want, rtol=1e-12, atol=1e-12)
    g = jactri.ggn(net, x0, torch.ones(N, 2, dtype=F64), per_sample="assume")
    got = torch.cat([d.flatten() for d in g.diagonal().values()])
    torch.testing.assert_close(got, flat.square().sum(0), rtol=1e-12, atol=1e-12)


def test_how_much_and_where():
    """The refusal names the op at which samples meet, and how large that is."""

    def nearly(x):
        return (x @ torch.ones(D, 2, dtype=F64)).sin() * (1 + 1e-9 * x.norm())

    with pytest.raises(
        RuntimeError, match=r"the op LinalgVectorNorm.* e?.*\d\.\de-(09|10|11) times as large"
    ):
        jactri.jacobian(nearly, x0, per_sample=True)
    got = jactri.jacobian(nearly, x0, per_sample="assume")
    want = torch.stack([whole(nearly)[n, :, n] for n in range(N)])
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


def test_no_probe_runs(monkeypatch):
    backwards = []

    class Counted(Hidden):
        @staticmethod
        def backward(ctx, g):
            backwards.append(1)
            return Hidden.backward(ctx, g)

    jactri.jacobian(lambda x: Counted.apply(x).sum(1), x0, per_sample="assume")
    assert len(backwards) == 1


def test_only_this_word_is_known():
    for call in (
        jactri.jacobian,
        jactri.jtj,
        jactri.jjt,
        jactri.explain,
        jactri.gradient,
        jactri.laplacian,
    ):
        with pytest.raises(ValueError, match="did you mean 'assume'"):
            call(net, x0, per_sample="assumed")
    for call in (
        jactri.gradient,
        jactri.laplacian,
        jactri.parameter_jacobian,
        jactri.empirical_ntk,
    ):
        with pytest.raises(ValueError, match="per_sample must be one of True"):
            call(net, x0, per_sample=False)
