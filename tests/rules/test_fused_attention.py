"""Second derivatives through torch's fused attention, whose backward has none of its own, against it written out."""

import pytest
import torch
import torch.nn.functional as F
from common import F64
from tolerances import assert_close
from torch.nn.attention import SDPBackend, sdpa_kernel

import jactri

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
