"""Attention with tangents and cotangents against float64."""

import pytest
import torch
import torch.nn.functional as F
from guard import Canvas, guarded
from precision import distance, limit

import jactri
from jactri._src.base import backends
from jactri._src.device import chooser
from jactri._src.read import joining
from jactri.kernels import attention, naive
from jactri.kernels.attention import Seen, Tiles

SHAPE = (1, 2, 1, 19, 20, 5, 7)
"""Batch, heads, heads of keys, queries, keys, width of keys, width of values."""

MASKS = ["none", "causal", "bool", "padding", "additive", "causal bool"]
SMALL = Tiles(16, 16, 16, 2, 4, 1)
PRODUCTS = 8
"""Rounding of the scores is that of the probabilities too, times their size."""


def mask_of(name, B, H, T, S, device, dtype):
    if "bool" in name:
        mask = torch.rand(T, S) < 0.6
        mask[T // 2] = False  # a row that is masked as a whole
        return mask.to(device).expand(B, H, T, S)
    if name == "padding":
        length = torch.arange(B).view(B, 1, 1, 1) * S // 2  # the first sample sees nothing
        return (torch.arange(S) < length).to(device)
    if name == "additive":
        mask = torch.randn(H, T, S)
        mask[:, 0] = (
            -1e38 if dtype.itemsize > 2 else 0.0
        )  # all keys alike: it absorbs scores, and logarithms
        mask.masked_fill_(torch.rand(T, S) < 0.2, -torch.inf)
        return guarded(mask.to(device, dtype))
    return None


def problem(shape, name, device, dtype=torch.float32, order=None, gap=1):
    B, H, G, T, S, d, e = shape
    q, k, v = (
        guarded(torch.randn(s, device=device).to(dtype), order, gap)
        for s in ((B, H, T, d), (B, G, S, d), (B, G, S, e))
    )
    return (q, k, v), Seen(mask_of(name, B, H, T, S, device, dtype), "causal" in name)


def doubled(seen):
    mask = seen.mask
    return Seen(mask if mask is None or mask.dtype == torch.bool else mask.double(), seen.causal)


def check(
    name, way, device, shape=SHAPE, dtype=torch.float32, K=2, config=SMALL, which="qkv", **layout
):
    ends, seen = problem(shape, name, device, dtype, **layout)
    exact, wide = [t.double() for t in ends], doubled(seen)
    how = {"precision": way, "config": config}

    def close(got, truth, plain, what):
        assert distance(got, truth) <= limit(way, dtype, PRODUCTS, distance(plain, truth)), what

    plain = [t.float() for t in ends]
    single = Seen(
        seen.mask if seen.mask is None or seen.mask.dtype == torch.bool else seen.mask.float(),
        seen.causal,
    )
    found = attention.forward(*ends, seen, 0.3, **how)
    o = naive.attention_push(*exact, wide, 0.3, (None, None, exact[2][None]))[0]
    close(
        found.output,
        o,
        naive.attention_push(*plain, single, 0.3, (None, None, plain[2][None]))[0],
        "o",
    )
    blocks = [
        guarded(torch.randn(K, *t.shape, device=device).to(dtype)) if n in which else None
        for n, t in zip("qkv", ends, strict=True)
    ]
    truth, less = (
        naive.attention_push(*x, m, 0.3, [None if b is None else b.to(x[0].dtype) for b in blocks])
        for x, m in ((exact, wide), (plain, single))
    )
    canvas = Canvas((K, *o.shape), dtype, device)
    assert attention.push(*ends, seen, 0.3, found, blocks, out=canvas.view, **how) is canvas.view
    close(canvas.view, truth, less, "push")
    canvas.check()
    c = guarded(torch.randn(K, *o.shape, device=device).to(dtype))
    canvases = [None if b is None else Canvas(b.shape, dtype, device) for b in blocks]
    into = [None if b is None else b.view for b in canvases]
    attention.pull(*ends, seen, 0.3, found, c, into, **how)
    truths = naive.attention_pull(*exact, wide, 0.3, c.double())
    lesses = naive.attention_pull(*plain, single, 0.3, c.float())
    for n, b in enumerate(canvases):
        if b is not None:
            close(b.view, truths[n], lesses[n], "qkv"[n])
            b.check()


CASES = {
    "plain": ("none", "ieee", {"order": (0, 2, 1, 3), "K": 3}),
    "causal": ("causal", "bf16x6", {}),
    "boolean": ("bool", "half", {"dtype": torch.float16}),
    "padded": ("padding", "tf32x3", {"which": "qv", "K": 1}),
    "added": ("additive", "half", {"dtype": torch.bfloat16}),
    "both": ("causal bool", "tf32", {"which": "k"}),
    "a query": ("padding", "ieee", {"shape": (2, 1, 1, 1, 9, 16, 9), "K": 16}),
    "a key": ("causal", "ieee", {"shape": (1, 2, 2, 17, 1, 3, 17), "which": "v"}),
    "strided": ("additive", "ieee", {"order": (3, 2, 1, 0), "gap": 2, "which": "q"}),
}


@pytest.mark.parametrize("name", CASES)
def test_masks_precisions_and_columns(name, device):
    mask, way, options = CASES[name]
    check(mask, way, device, **options)


@pytest.mark.parametrize("widths", [(64, 64), (65, 128), (256, 130)])
def test_every_configuration(widths, device):
    for config in attention.configs(*widths, 2):
        check("causal", "ieee", device, (1, 1, 1, 66, 33, *widths), config=config)


def test_heads_that_are_too_wide():
    assert attention.configs(257, 64, 1) == () == attention.configs(64, 257, 1)


@pytest.mark.parametrize("name", MASKS)
def test_the_formulas_are_the_derivatives(name):
    """The naive twin against autograd."""
    ends, seen = problem(SHAPE, name, torch.device("cpu"), torch.float64)
    ends = [t.clone().requires_grad_() for t in ends]
    o = naive.attention(*ends[:2], seen, 0.3) @ ends[2].repeat_interleave(2, 1)
    c = torch.randn(o.shape, dtype=torch.float64)
    pulled = naive.attention_pull(*ends, seen, 0.3, c[None])
    tangents = [torch.randn_like(t) for t in ends]
    pushed = naive.attention_push(*ends, seen, 0.3, [t[None] for t in tangents])
    assert (
        distance(
            (pushed[0] * c).sum(),
            sum((p[0] * t).sum() for p, t in zip(pulled, tangents, strict=True)),
        )
        < 1e-12
    )
    if name in ("none", "causal"):  # nothing is masked as a whole: autograd has no NaN
        for got, want in zip(pulled, torch.autograd.grad(o, ends, c), strict=True):
            assert distance(got[0], want) < 1e-12


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(joining, "CACHE_BYTES", 0)
    monkeypatch.setattr(joining, "block_bytes", lambda device, size: size)
    chooser.forget()
    yield
    chooser.forget()


@pytest.mark.parametrize("dtype, causal", [(torch.float32, True), (torch.bfloat16, False)])
def test_products_with_jacobians(causal, dtype, device, fresh, monkeypatch):
    """The kernels run where a whole attention is one map."""
    torch.manual_seed(0)
    ran = []
    for name in ("push", "pull"):
        real = getattr(attention, name)
        monkeypatch.setattr(
            attention, name, lambda *a, _real=real, _n=name, **k: ran.append(_n) or _real(*a, **k)
        )
    x = torch.randn(2, 1, 18, 8, device=device).to(dtype)
    t = torch.randn(2, *x.shape, device=device).to(dtype)

    def func(x):
        return F.scaled_dot_product_attention(x, x.sin(), x.cos(), is_causal=causal)

    got = jactri.jvp(func, x, t, backend="triton")[1], jactri.vjp(func, x, t, backend="triton")[1]
    exact, seeds = x.double(), t.double()
    truth = jactri.jvp(func, exact, seeds)[1], jactri.vjp(func, exact, seeds)[1]
    assert ran == ["push", "pull"]
    for ours, theirs in zip(got, truth, strict=True):
        assert distance(ours, theirs) < (1e-5 if dtype is torch.float32 else 2.0**-5)


def test_products_that_are_differentiated(device, fresh, monkeypatch):
    """What kernels gave has the derivatives of the formula."""
    torch.manual_seed(0)
    ran = []
    for name in ("push", "pull"):
        real = getattr(attention, name)
        monkeypatch.setattr(
            attention, name, lambda *a, _real=real, _n=name, **k: ran.append(_n) or _real(*a, **k)
        )
    monkeypatch.setattr(backends, "kernels_for", lambda t: t.dtype is torch.float32)
    x = torch.randn(1, 1, 18, 8, device=device)
    t = torch.randn(2, *x.shape, device=device)

    def func(x):
        return F.scaled_dot_product_attention(x, x.sin(), x.cos(), is_causal=True)

    def derivatives(x, t):
        leaf = x.clone().requires_grad_()
        pushed = jactri.jvp(func, leaf, t, differentiate="both")[1]
        pulled = jactri.vjp(func, leaf, t, create_graph=True)[1]
        return [torch.autograd.grad(p, leaf, t.sin())[0] for p in (pushed, pulled)]

    truth = derivatives(x.double(), t.double())
    for ours, theirs in zip(derivatives(x, t), truth, strict=True):
        assert distance(ours, theirs) < 1e-5
    assert ran == ["push", "pull", "pull"]  # the last for the tangents of keys and values
