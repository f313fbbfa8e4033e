"""Second derivatives through torch's fused attention, whose backward has none of its own; and what does not fit."""

import pytest
import torch
import torch.nn.functional as F
from common import F64
from tolerances import assert_close
from torch.nn.attention import SDPBackend, sdpa_kernel

import jactri
from jactri._src.read import joining

B, HEADS, T, S, D = 2, 2, 3, 4, 2
GENERATOR = torch.Generator().manual_seed(3)
MASK = torch.rand(T, S, generator=GENERATOR) < 0.7
MASK[:, 0] = True
SPELLINGS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.7},
    "mask": {"attn_mask": MASK},
    "bias": {"attn_mask": torch.randn(B, HEADS, T, S, generator=GENERATOR).double()},
    "grouped": {"enable_gqa": True},
    "grouped_causal": {"enable_gqa": True, "is_causal": True},
}


def written_out(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ v


def problem(name):
    """A scalar function of an attention, the same with that written out, and a point."""
    options = SPELLINGS[name]
    heads = 1 if "enable_gqa" in options else HEADS
    length = T if "is_causal" in options else S
    sizes = [(B, HEADS, T, D), (B, heads, length, D), (B, heads, length, D)]

    def of(attention):
        def func(x):
            parts = x.split([torch.Size(s).numel() for s in sizes])
            q, k, v = (p.view(s) for p, s in zip(parts, sizes, strict=True))
            return attention(q.sin(), k, v.tanh(), **options).square().sum()

        return func

    x = torch.randn(sum(torch.Size(s).numel() for s in sizes), dtype=F64)
    return of(F.scaled_dot_product_attention), of(written_out), x


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("name", SPELLINGS)
def test_second_derivatives(name, backend):
    func, twin, x = problem(name)
    truth = torch.autograd.functional.hessian(twin, x)
    with sdpa_kernel(backend):
        assert_close(jactri.func.hessian(func)(x), truth, F64)
        several = jactri.func.hessian(lambda z: {"a": func(z), "b": func(z).sin()[None]})(x)
        assert_close(several["a"], truth, F64)
        assert_close(jactri.laplacian(func, x), truth.trace(), F64, scale=truth.abs().max().item())
        again = jactri.jacobian(lambda z: jactri.jacobian(func, z, create_graph=True), x)
        assert_close(again, truth, F64)


def test_third_derivatives_of_a_hessian():
    func, twin, x = problem("causal")
    leaf, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = torch.autograd.grad(jactri.func.hessian(func)(leaf).diagonal().sum(), leaf)[0]
    H = torch.autograd.functional.hessian(twin, theirs, create_graph=True)
    assert_close(ours, torch.autograd.grad(H.diagonal().sum(), theirs)[0], F64)


# -- what does not fit ------------------------------------------------------------------------------


def of(**options):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


PRODUCTS = {
    "jvp": lambda func, x: jactri.jvp(func, x, x),
    "jvp, nothing kept": lambda func, x: jactri.jvp(func, x, x, differentiate=None),
    "both": lambda func, x: jactri.jvp(func, x, x, differentiate="both"),
    "vjp": lambda func, x: jactri.vjp(func, x, torch.ones(2, 2, 3, 4)),
    "jacobian": lambda func, x: jactri.jacobian(func, x),
    "one row": lambda func, x: jactri.jacobian(lambda *x: func(*x).sum(), x),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_does_not_fit(name, large, monkeypatch):
    if large:
        monkeypatch.setattr(joining, "CACHE_BYTES", -1)
    call = PRODUCTS[name]
    q, k, v = (torch.randn(2, 2, 3, 4) for _ in range(3))
    for mask in (torch.ones(3, 3, dtype=torch.long), torch.ones(3, 3, dtype=F64)):
        with pytest.raises(RuntimeError, match="attn_mask dtype to be bool or float"):
            call(of(attn_mask=mask), (q, k, v))
    with pytest.raises(RuntimeError, match=r"same dtype.*value\.dtype: double"):
        call(of(), (q, k, v.double()))
    for keys in (2, 5):
        with pytest.raises(
            RuntimeError, match=rf"value of shape \(2, 2, {keys}, 4\).*for each key"
        ):
            call(of(), (q, k, torch.randn(2, 2, 5, 4)[:, :, :keys]))
    with pytest.raises(RuntimeError, match="must match the size"):
        call(of(), (q, k, torch.randn(2, 3, 3, 4)))
    with pytest.raises(RuntimeError, match="dropout probability"):
        call(of(dropout_p=1.5), (q, k, v))


@pytest.mark.parametrize("large", [False, True])
def test_dropout_is_that_of_the_run(large, monkeypatch):
    if large:
        monkeypatch.setattr(joining, "CACHE_BYTES", -1)
    ends = [torch.randn(1, 2, 5, 3, dtype=F64).requires_grad_() for _ in range(3)]
    t, c = [torch.randn_like(x) for x in ends], torch.randn_like(ends[0])
    func = of(dropout_p=0.4)

    def seeded(call):
        torch.manual_seed(5)
        return call()

    y = seeded(lambda: func(*ends))
    pulled = torch.autograd.grad(y, ends, c, create_graph=True)
    along = sum((p * x).sum() for p, x in zip(pulled, t, strict=True))
    output, got = seeded(lambda: jactri.vjp(func, tuple(ends), c))
    assert torch.equal(output, y)
    for ours, truth in zip(got, pulled, strict=True):
        assert_close(ours, truth, F64)
    for options in ({}, {"differentiate": None}, {"differentiate": "both"}):
        output, got = seeded(lambda o=options: jactri.jvp(func, tuple(ends), tuple(t), **o))
        assert torch.equal(output, y)
        assert_close((got * c).sum(), along, F64, length=30)
    ours = torch.autograd.grad((got * c).sum(), ends)
    for own, truth in zip(ours, torch.autograd.grad(along, ends), strict=True):
        assert_close(own, truth, F64, length=30)


class Once(torch.autograd.Function):
    """A backward that autograd does not record."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, c):
        return 2 * c * ctx.saved_tensors[0]


@pytest.mark.parametrize("where", ["before", "behind"])
def test_a_backward_without_a_derivative_is_named(where, monkeypatch):
    monkeypatch.setattr(joining, "CACHE_BYTES", -1)
    x = tuple([torch.randn(1, 2, 5, 3, dtype=F64).requires_grad_() for _ in range(3)])

    def func(q, k, v):
        if where == "before":
            return F.scaled_dot_product_attention(Once.apply(q), k, v)
        return Once.apply(F.scaled_dot_product_attention(q, k, v))

    for product in (
        lambda: jactri.jvp(func, x, x, differentiate="both")[1],
        lambda: jactri.vjp(func, x, x[0], create_graph=True)[1][0],
    ):
        made = product()
        with pytest.raises(RuntimeError, match="Once has no second derivative"):
            torch.autograd.grad(made.sum(), x)
