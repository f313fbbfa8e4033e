"""Attention tile by tile: its tangents and cotangents against the formula written out in float64."""

import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common import F64
from tolerances import assert_close

import jactri
from jactri._src.base.memory import MemoryLimitTooSmall, Taken
from jactri._src.maps import attending, attention
from jactri._src.maps.attention import Attention
from jactri._src.maps.layout import FREE, Layout
from jactri._src.read import joining
from jactri._src.rules import attention as rule

SHAPES = [
    # batch, heads, heads of keys, queries, keys, width of keys, width of values
    (2, 4, 2, 37, 53, 5, 7),
    (1, 3, 1, 129, 17, 8, 3),
    (3, 2, 2, 1, 600, 16, 16),
    (1, 2, 2, 33, 600, 3, 2),
    (1, 1, 1, 5, 1, 256, 1),
]
MASKS = ["none", "causal", "bool", "padding", "additive", "causal bool"]


def mask_of(name, B, H, T, S):
    if "bool" in name:
        mask = torch.rand(T, S) < 0.6
        mask[T // 2] = False  # a row that is masked as a whole
        return mask
    if name == "padding":
        length = torch.randint(1, S + 1, (B, 1, 1, 1))
        length[-1] = 0  # a sample that is masked as a whole
        return torch.arange(S) < length
    if name == "additive":
        mask = torch.randn(H, T, S, dtype=F64)
        mask[:, 0] = torch.finfo(
            torch.float32
        ).min  # all keys alike: it absorbs scores, and logarithms
        return mask.masked_fill_(torch.rand(T, S) < 0.2, -torch.inf)
    return None


def problem(shape, name, dtype=F64):
    B, H, G, T, S, d, e = shape
    torch.manual_seed(0)
    # heads beside one another, as a projection leaves them
    q, k, v = (
        torch.randn(B, n, h, w, dtype=F64).to(dtype).transpose(1, 2)
        for n, h, w in ((T, H, d), (S, G, d), (S, G, e))
    )
    mask = mask_of(name, B, H, T, S)
    if mask is not None and mask.dtype == F64:
        mask = mask.to(dtype)
    return Attention(q, k, v, mask, "causal" in name, 0.4)


def written_out(of, q, k, v):
    B, H, G, T, S, _, _ = of.sizes
    k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
    scores = q @ k.mT * of.scale
    seen = torch.ones(B, H, T, S, dtype=torch.bool)
    if of.causal:
        seen = seen.tril()
    if of.mask is not None and of.mask.dtype == torch.bool:
        seen = seen & of.mask
    elif of.mask is not None:
        seen = seen & of.mask.isfinite()
        scores = scores + of.mask.double().nan_to_num(neginf=0.0)
    p = scores.masked_fill(~seen, -1e200).softmax(-1)
    return (p * seen) @ v


def double(of):
    return [t.double() for t in (of.q, of.k, of.v)]


def tangents_of(of, K, which):
    ends = zip("qkv", (of.q, of.k, of.v), strict=True)
    return [
        torch.randn(K, *t.shape, dtype=F64).to(t.dtype) if n in which else None for n, t in ends
    ]


def pushed(of, blocks):
    """The truth of `attention.push`."""
    ends = double(of)
    full = [None if b is None else b.double() for b in blocks]
    K = next(len(b) for b in full if b is not None)
    rows = []
    for i in range(K):
        given = tuple(
            torch.zeros_like(x) if b is None else b[i] for b, x in zip(full, ends, strict=True)
        )
        rows.append(torch.func.jvp(lambda *x: written_out(of, *x), tuple(ends), given)[1])
    return torch.stack(rows)


@pytest.fixture(params=[None, 1 << 12], ids=["tiles", "small tiles"])
def tiles(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(attention, "TILE_BYTES", request.param)
        monkeypatch.setattr(attention, "SIDE", 3)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_push_and_pull(shape, name, tiles):
    of = problem(shape, name)
    blocks = tangents_of(of, 3, "qkv")
    made = attention.push(of, blocks)
    assert_close(made, pushed(of, blocks), F64, length=shape[4], scale=1.0)
    c = torch.randn(made.shape, dtype=F64)
    into = [torch.full_like(b, torch.nan) for b in blocks]
    attention.pull(of, c, into)
    ends = [t.requires_grad_() for t in double(of)]
    y = written_out(of, *ends)
    for i, row in enumerate(c):
        wanted = torch.autograd.grad(y, ends, row, retain_graph=True)
        for got, want in zip(into, wanted, strict=True):
            assert_close(got[i], want, F64, length=max(shape[3:5]), scale=1.0)


@pytest.mark.parametrize("which", ["q", "k", "v", "qk", "kv"])
def test_some_of_the_three(which, tiles):
    of = problem(SHAPES[0], "causal")
    blocks = tangents_of(of, 2, which)
    made = attention.push(of, blocks)
    assert_close(made, pushed(of, blocks), F64, length=53)
    c = torch.randn(made.shape, dtype=F64)
    some, whole = (
        tuple(None if b is None else torch.empty_like(b) for b in given)
        for given in (blocks, tangents_of(of, 2, "qkv"))
    )
    attention.pull(of, c, some)
    attention.pull(of, c, whole)
    for got, want in zip(some, whole, strict=True):
        assert got is None or torch.equal(got, want)


@pytest.mark.parametrize("K", [1, 16])
def test_any_number_of_columns(K):
    of = problem(SHAPES[0], "bool")
    blocks = tangents_of(of, K, "qkv")
    assert_close(attention.push(of, blocks), pushed(of, blocks), F64, length=53)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    of = problem(SHAPES[0], "additive", dtype)
    blocks = tangents_of(of, 2, "qkv")
    do = attention.push(of, blocks)
    assert do.dtype == dtype
    assert_close(do, pushed(of, blocks), dtype, length=53)
    c = torch.randn(do.shape).to(dtype)
    into = tuple(torch.empty_like(b) for b in blocks)
    attention.pull(of, c, into)
    ends = [t.requires_grad_() for t in double(of)]
    wanted = torch.autograd.grad(written_out(of, *ends), ends, c[0].double())
    for got, want in zip(into, wanted, strict=True):
        assert_close(got[0], want, dtype, length=53)


@pytest.mark.parametrize("K", [1, 3])
def test_a_long_sequence_takes_the_memory_of_its_ends(K, monkeypatch):
    monkeypatch.setattr(attention, "TILE_BYTES", attention.TILE_BYTES // 4)  # as for 4096
    monkeypatch.setattr(joining, "CACHE_BYTES", 0)
    torch.manual_seed(0)
    x = tuple([torch.randn(1, 4, 1024, 64) for _ in range(3)])
    t = tuple([torch.randn(K, *of.shape) for of in x])
    func = partial(F.scaled_dot_product_attention, is_causal=True)
    allowed = 1.2 * 4 * x[0].nbytes * (1 + K)
    for product, given, count in (
        (jactri.jvp, t, 3),
        (partial(jactri.jvp, differentiate=None), t, 3),
        (jactri.vjp, t[0], 1),
    ):
        with Taken() as taken:
            made = product(func, x, given)
        assert taken.peak + (3 + count * K) * x[0].nbytes < allowed
        del made


def test_what_is_pulled_at_once_is_of_one_block(monkeypatch):
    """Results wait for the maps that they are of, not for other blocks; and nothing is kept behind the last."""
    of = problem(SHAPES[0], "causal")
    whole = attending.Whole(of, attending.ALL)
    maps = [attending.Attend(whole, n) for n in range(3)]
    shapes = [tuple(t.shape) for t in (of.q, of.k, of.v)]
    out = (*of.q.shape[:3], of.v.shape[-1])
    layout = Layout(tuple([((n, FREE),) for n in out]), (2,))
    ran = []
    real = attending.pull
    monkeypatch.setattr(attending, "pull", lambda *given: ran.append(0) or real(*given))

    def pulled(n, c):
        route = maps[n].route(layout, shapes[n], out, True)
        with torch.no_grad():
            return maps[n].apply(c, False, layout, route, True, None, of.q)[0]

    def truths(c):
        into = [of.q.new_empty(2, *shape) for shape in shapes]
        attention.pull(of, c, into)
        return into

    first, second = (torch.randn(2, *out, dtype=F64) for _ in range(2))
    assert torch.equal(pulled(2, first), truths(first)[2])
    for n in (1, 2, 0):
        assert torch.equal(pulled(n, second), truths(second)[n])
    assert len(ran) == 2
    gone = weakref.ref(second)
    del second
    assert gone() is None
    assert torch.equal(pulled(2, first), truths(first)[2])
    assert torch.equal(pulled(2, first), truths(first)[2])  # once more
    assert len(ran) == 4


MASK = torch.arange(12).view(12, 1) % 5 > torch.arange(12) % 4  # some rows are masked as a whole
CALLS = {
    "all": lambda x, y: F.scaled_dot_product_attention(x, x.sin(), x.cos()),
    "causal": lambda x, y: F.scaled_dot_product_attention(x, x.sin(), x.cos(), is_causal=True),
    "queries": lambda x, y: F.scaled_dot_product_attention(x, y, y),
    "keys": lambda x, y: F.scaled_dot_product_attention(y, x, y),
    "values": lambda x, y: F.scaled_dot_product_attention(y, y, x),
    "grouped": lambda x, y: F.scaled_dot_product_attention(y, x[:, :1], x[:, 1:], enable_gqa=True),
    "masked": lambda x, y: F.scaled_dot_product_attention(x, x.sin(), x.cos(), MASK),
    "bias": lambda x, y: F.scaled_dot_product_attention(
        x, x[:, :, 1:], y[:, :, 1:], y[:1, :, :, :1]
    ),
    "twice": lambda x, y: F.scaled_dot_product_attention(
        F.scaled_dot_product_attention(x, y, x).tanh(), x, y
    ),
}


@pytest.fixture
def apart(monkeypatch):
    """No probabilities are formed."""

    def formed(*given):
        raise AssertionError("probabilities were formed")

    monkeypatch.setattr(rule, "probabilities", formed)


def ends_of(T=30):
    torch.manual_seed(0)
    return torch.randn(2, 2, T, 4, dtype=F64), torch.randn(2, 2, T, 4, dtype=F64)


def truth_of(func, x):
    """The Jacobian by torch's attention in parts."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.jacobian(func, x)


@pytest.mark.parametrize("name", CALLS)
def test_products_do_not_form_the_probabilities(name, apart, monkeypatch):
    monkeypatch.setattr(joining, "CACHE_BYTES", 0)
    x, y = ends_of(12)
    func = partial(CALLS[name], y=y)
    J = truth_of(func, x)
    t = torch.randn(3, *x.shape, dtype=F64)
    output, got = jactri.jvp(func, x, t)
    assert_close(output, func(x), F64)
    assert_close(got, torch.tensordot(t, J, dims=([1, 2, 3, 4], [4, 5, 6, 7])), F64, length=96)
    got = jactri.vjp(func, x, t)[1]
    assert_close(got, torch.tensordot(t, J, dims=4), F64, length=96)


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4), (2, 2, 5, 0), (1, 1, 1, 1)])
def test_empty_ends(shape, apart, monkeypatch):
    monkeypatch.setattr(joining, "CACHE_BYTES", -1)
    x, y = torch.randn(shape, dtype=F64), torch.randn(*shape[:2], 3, shape[3], dtype=F64)
    for name in ("queries", "all"):
        func = partial(CALLS[name], y=y)
        output, got = jactri.jvp(func, x, torch.ones(3, *shape, dtype=F64))
        assert got.shape == (3, *output.shape)
        if x.numel():
            assert_close(got[1], truth_of(func, x).sum((4, 5, 6, 7)), F64)
        assert jactri.vjp(func, x, got)[1].shape == (3, *shape)


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
@pytest.mark.parametrize("name", CALLS)
def test_jacobians_whose_parts_no_memory_holds(name, strategy, apart, monkeypatch):
    monkeypatch.setattr(joining, "HELD", 1 << 40)
    x, y = ends_of(12)
    func = partial(CALLS[name], y=y)
    J = truth_of(func, x)
    assert_close(jactri.jacobian(func, x, strategy=strategy), J, F64, length=96)
    blocks = jactri.jacobian(func, x, strategy=strategy, per_sample=True)
    assert_close(blocks, torch.stack([J[i, ..., i, :, :, :] for i in range(2)]), F64, length=96)


def test_short_sequences_keep_their_parts(monkeypatch):
    called = []
    monkeypatch.setattr(attending, "push", lambda *given: called.append(given))
    x, y = ends_of()
    jactri.jvp(lambda x: CALLS["all"](x, y), x, torch.ones_like(x))
    assert not called


def test_tangents_share_the_probabilities(monkeypatch):
    """Blocks beyond the cache are not cut: each chunk would form them anew."""
    called = []
    real = attending.push
    monkeypatch.setattr(attending, "push", lambda *given: called.append(0) or real(*given))
    x = torch.randn(1, 2, 1100, 32)
    tangents = torch.randn(24, *x.shape)
    jactri.jvp(partial(CALLS["all"], y=None), x, tangents)
    assert len(called) == 1


def frozen(x, written):
    """Two samples, two heads: a pattern that depends on nothing, then a layer whose features are tied to the rows."""
    q, k, v = (x @ PROJECT).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    if written:
        return ((q @ k.mT).detach().softmax(-1) @ v).transpose(1, 2).flatten(2)[:, -1]
    y = F.scaled_dot_product_attention(q.detach(), k.detach(), v, is_causal=True)
    return y.transpose(1, 2).flatten(2)[:, -1]


def causal(x, _):
    q, k, v = (x @ PROJECT).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)[:, -1]


PROJECT = torch.randn(16, 48, dtype=F64, generator=torch.Generator().manual_seed(0)) / 4


@pytest.mark.parametrize(("f", "written"), [(frozen, False), (frozen, True), (causal, False)])
@pytest.mark.parametrize("per_sample", [True, False])
def test_a_limit_of_a_jacobian_is_kept(f, written, per_sample):
    """Probabilities that are formed count, and so do copies of blocks whose ties are dropped before a product."""
    x = torch.randn(2, 64, 16, dtype=F64, requires_grad=True)
    options = {"strategy": "reverse-mode", "per_sample": per_sample}
    limit = 1000
    while True:
        y = f(x, written)
        try:
            with Taken() as taken:
                found = jactri.jacobian_of(y, x, memory_limit=limit, **options)
            break
        except MemoryLimitTooSmall as error:
            limit = int(error.need) + 1
    assert 0.6 * limit < taken.peak < 1.02 * limit
    want = torch.autograd.functional.jacobian(lambda x: f(x, written), x)
    if per_sample:
        want = torch.stack([want[i, :, i] for i in range(2)])
    assert_close(found, want, F64)
