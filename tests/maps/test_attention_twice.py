"""Derivatives of attention's products, tile by tile: against the formula written out in float64."""

import pytest
import torch
import torch.nn.functional as F
from common import F64
from maps.test_attention import MASKS, SHAPES, double, problem, tangents_of, written_out
from tolerances import assert_close

import jactri
from jactri._src.base.memory import Taken
from jactri._src.maps import attending, attention
from jactri._src.read import joining

K = 2


@pytest.fixture
def small(monkeypatch):
    """Several tiles along all axes."""
    monkeypatch.setattr(attention, "TILE_BYTES", 1 << 12)
    monkeypatch.setattr(attention, "SIDE", 3)


@pytest.fixture(autouse=True)
def joined(monkeypatch):
    """All attentions are one map."""
    monkeypatch.setattr(joining, "CACHE_BYTES", -1)


def bent(of, blocks, c):
    """The gradients of ``sum_k c_k . J t_k``, by torch's double backward."""
    ends = [x.requires_grad_() for x in double(of)]
    y, total = written_out(of, *ends), 0.0
    for k, row in enumerate(c):
        pulled = torch.autograd.grad(y, ends, row.double(), create_graph=True)
        for p, b in zip(pulled, blocks, strict=True):
            total = total if b is None else total + (p * b[k].double()).sum()
    return torch.autograd.grad(total, ends, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_products(shape, name, small):
    of = problem(shape, name)
    blocks = tangents_of(of, K, "qkv")
    c = torch.randn(K, *written_out(of, *double(of)).shape, dtype=F64)
    into = [torch.full_like(b[0], torch.nan) for b in blocks]
    attention.bend(of, blocks, c, into)
    for got, want in zip(into, bent(of, blocks, c), strict=True):
        assert_close(
            got, want, F64, length=max(shape[3:5]), scale=max(1.0, want.abs().max().item())
        )


@pytest.mark.parametrize("which", ["q", "k", "v", "qk", "kv"])
def test_of_some_of_the_three(which, small):
    of = problem(SHAPES[0], "causal")
    c = torch.randn(K, *written_out(of, *double(of)).shape, dtype=F64)
    blocks = tangents_of(of, K, which)
    whole = [torch.empty_like(x) for x in (of.q, of.k, of.v)]
    attention.bend(of, blocks, c, whole)
    for got, want in zip(whole, bent(of, blocks, c), strict=True):
        assert_close(got, want, F64, length=53)
    some = [x.clone() if n in which else None for n, x in zip("qkv", whole, strict=True)]
    attention.bend(of, blocks, c, some)
    assert all(x is None or torch.equal(x, y) for x, y in zip(some, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_precisions(dtype):
    of = problem(SHAPES[0], "additive", dtype)
    blocks, c = tangents_of(of, K, "qkv"), torch.randn(K, 2, 4, 37, 7).to(dtype)
    into = [torch.empty_like(b[0]) for b in blocks]
    attention.bend(of, blocks, c, into)
    for got, want in zip(into, bent(of, blocks, c), strict=True):
        assert got.dtype == dtype
        assert_close(got, want, dtype, length=53, scale=want.abs().max().item())


# -- the public calls -------------------------------------------------------------------------------

MASK = torch.arange(9).view(9, 1) % 5 > torch.arange(11) % 4  # some rows are masked as a whole
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "grouped": {"enable_gqa": True, "is_causal": True},
    "masked": {"attn_mask": MASK},
    "bias": {
        "attn_mask": torch.randn(2, 1, 9, 11, dtype=F64, generator=torch.Generator().manual_seed(0))
    },
    "scaled": {"scale": 0.3},
}


def called(name):
    options = CALLS[name]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def by_hand(name):
    """The same in ops that autograd follows any number of times."""
    options = CALLS[name]

    def func(q, k, v):
        of = attention.Attention(
            q,
            k,
            v,
            options.get("attn_mask"),
            options.get("is_causal", False),
            options.get("scale", 0.5),
        )
        return written_out(of, q, k, v)

    return func


def ends_of(name):
    torch.manual_seed(0)
    heads = 1 if name == "grouped" else 2
    keys = 9 if CALLS[name].get("is_causal") else 11
    sizes = (2, 2, 9, 4), (2, heads, keys, 4), (2, heads, keys, 4)
    return tuple([torch.randn(s, dtype=F64).requires_grad_() for s in sizes])


def block(like, columns):
    return torch.randn((*columns, *like.shape), dtype=F64).requires_grad_()


@pytest.fixture
def apart(monkeypatch):
    """No probabilities are formed, nor the whole written out."""

    def formed(*given):
        raise AssertionError("probabilities were formed")

    monkeypatch.setattr(attending, "pushed_as_a_whole", formed)
    monkeypatch.setattr(attention, "probabilities", formed)


def rows(block, columns):
    return block if columns else block[None]


@pytest.mark.parametrize("columns", [(), (3,)], ids=["one", "three"])
@pytest.mark.parametrize("name", CALLS)
def test_a_jvp_is_differentiated_in_inputs_and_tangents(name, columns, apart):
    ends = ends_of(name)
    given = tuple([block(x, columns) for x in ends])
    output, got = jactri.jvp(called(name), ends, given, differentiate="both")
    y = by_hand(name)(*ends)
    c = torch.randn(got.shape, dtype=F64)
    total = 0.0
    for k, row in enumerate(rows(c, columns)):
        pulled = torch.autograd.grad(y, ends, row, create_graph=True)
        total = total + sum(
            (p * rows(t, columns)[k]).sum() for p, t in zip(pulled, given, strict=True)
        )
    assert_close((got * c).sum(), total.detach(), F64, length=200)
    wrt = (*ends, *given)
    for ours, truth in zip(
        torch.autograd.grad(got, wrt, c), torch.autograd.grad(total, wrt), strict=True
    ):
        assert_close(ours, truth, F64, length=40)
    # the output keeps a graph of its own
    weights = torch.randn(y.shape, dtype=F64)
    truths = torch.autograd.grad(by_hand(name)(*ends), ends, weights)
    for ours, truth in zip(torch.autograd.grad(output, ends, weights), truths, strict=True):
        assert_close(ours, truth, F64, length=40)


@pytest.mark.parametrize("columns", [(), (3,)], ids=["one", "three"])
@pytest.mark.parametrize("name", CALLS)
def test_a_vjp_is_differentiated_in_inputs_and_cotangents(name, columns, apart):
    ends = ends_of(name)
    y = by_hand(name)(*ends)
    given = block(y, columns)
    got = jactri.vjp(called(name), ends, given, create_graph=True)[1]
    weights = [torch.randn(p.shape, dtype=F64) for p in got]
    total = 0.0
    for k, row in enumerate(rows(given, columns)):
        pulled = torch.autograd.grad(y, ends, row, create_graph=True)
        total = total + sum(
            (p * rows(w, columns)[k]).sum() for p, w in zip(pulled, weights, strict=True)
        )
    wrt = (*ends, given)
    for ours, truth in zip(
        torch.autograd.grad(got, wrt, weights), torch.autograd.grad(total, wrt), strict=True
    ):
        assert_close(ours, truth, F64, length=40)


@pytest.mark.parametrize("product", [jactri.jvp, jactri.vjp])
def test_of_one_input(product, apart):
    """q, k and v of one tensor; some of them constant; a part of the results."""
    torch.manual_seed(0)
    x, y = (torch.randn(2, 2, 7, 4, dtype=F64).requires_grad_() for _ in range(2))
    t = torch.randn(3, *x.shape, dtype=F64)
    pairs = {
        "all": (F.scaled_dot_product_attention, (x, x.sin(), x.cos())),
        "keys": (F.scaled_dot_product_attention, (y.detach(), x, y)),
    }
    for name in pairs:

        def func(x, name=name, attend=F.scaled_dot_product_attention):
            q, k, v = (x, x.sin(), x.cos()) if name == "all" else (y.detach(), x, y)
            return attend(q, k, v)

        def twin(x, func=func):
            return func(x, attend=by_hand("plain"))

        made = product(func, x, t, create_graph=True)[1]
        if product is jactri.vjp:
            want = torch.stack(
                [torch.autograd.grad(twin(x), x, c, create_graph=True)[0] for c in t]
            )
        else:
            # J t, from the products of cotangents u, in which they are linear
            u = torch.zeros_like(x, requires_grad=True)
            pulled = torch.autograd.grad(twin(x), x, u, create_graph=True)[0]
            want = torch.stack([torch.autograd.grad(pulled, u, c, create_graph=True)[0] for c in t])
        assert_close(made.detach(), want.detach(), F64, length=40)
        c = torch.randn(made.shape, dtype=F64)
        wrt = (x,) if name == "all" else (x, y)
        ours, truths = (torch.autograd.grad(m, wrt, c, retain_graph=True) for m in (made, want))
        for got, truth in zip(ours, truths, strict=True):
            assert_close(got, truth, F64, length=40)


@pytest.mark.parametrize("name", ["causal", "masked"])
def test_against_finite_differences(name):
    ends = [x.detach()[:1, :, :3].clone().requires_grad_() for x in ends_of("plain")]
    options = {"is_causal": True} if name == "causal" else {"attn_mask": MASK[4:7, :3]}

    def func(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **options)

    t = tuple([block(x, (2,)) for x in ends])
    c = block(ends[0], (2,))

    def pushed(*a):
        return jactri.jvp(func, a[:3], a[3:], create_graph=True)[1]

    def pulled(*a):
        return jactri.vjp(func, a[:3], a[3], create_graph=True)[1]

    for product, given in ((pushed, (*ends, *t)), (pulled, (*ends, c))):
        assert torch.autograd.gradcheck(product, given, fast_mode=True)
        assert torch.autograd.gradgradcheck(product, given, fast_mode=True)


def scalar(product, func, ends, given):
    made = product(func, ends, given, create_graph=True)[1]
    made = made if isinstance(made, tuple) else (made,)
    return sum((m.sin() * (i + 1)).sum() for i, m in enumerate(made))


@pytest.mark.parametrize("name", ["causal", "grouped", "masked"])
@pytest.mark.parametrize("product", [jactri.jvp, jactri.vjp])
def test_third_derivatives(product, name, monkeypatch):
    """Of the products once more, and once more."""
    ends = ends_of(name)
    given = tuple([block(x, (2,)) for x in ends]) if product is jactri.jvp else block(ends[0], (2,))
    wrt = (*ends, *given) if product is jactri.jvp else (*ends, given)
    results = []
    for func in (called(name), by_hand(name)):
        total = scalar(product, func, ends, given)
        for _ in range(2):
            made = torch.autograd.grad(total, wrt, create_graph=True)
            total = sum((m.cos() * (i + 2)).sum() for i, m in enumerate(made))
        results.append(torch.autograd.grad(total, wrt))
    for got, truth in zip(*results, strict=True):
        assert_close(got, truth, F64, length=100, scale=max(1.0, truth.abs().max().item()))


@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("product", [jactri.jvp, jactri.vjp])
def test_batches_of_cotangents(product, way):
    """Of the product, and of its derivative."""
    ends = ends_of("causal")
    given = tuple([block(x, ()) for x in ends]) if product is jactri.jvp else block(ends[0], ())
    wrt = (*ends, *given) if product is jactri.jvp else (*ends, given)
    made = product(called("causal"), ends, given, create_graph=True)[1]
    made = made if isinstance(made, tuple) else (made,)
    first = torch.autograd.grad(made, ends, [m.detach().sin() for m in made], create_graph=True)
    for of in (made, first):
        c = tuple([torch.randn(3, *m.shape, dtype=F64) for m in of])

        def pulled(*row, of=of):
            return torch.autograd.grad(of, wrt, row, retain_graph=True)

        if way == "vmap":
            got = torch.vmap(pulled)(*c)
            none = torch.vmap(pulled)(*[r[:0] for r in c])
            assert [n.shape for n in none] == [(0, *g.shape[1:]) for g in got]
        else:
            got = torch.autograd.grad(of, wrt, c, retain_graph=True, is_grads_batched=True)
        for k in range(3):
            for ours, truth in zip(got, pulled(*[r[k] for r in c]), strict=True):
                assert_close(ours[k], truth, F64, length=40)


@pytest.mark.parametrize("product", [jactri.jvp, jactri.vjp])
def test_autocast_around_a_backward(product):
    ends = [x.detach().float().requires_grad_() for x in ends_of("plain")]
    given = tuple(ends) if product is jactri.jvp else torch.ones(ends[0].shape)
    made = product(called("plain"), tuple(ends), given, create_graph=True)[1]
    c = [torch.ones_like(m) for m in made] if isinstance(made, tuple) else torch.ones_like(made)
    truths = torch.autograd.grad(made, ends, c, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(made, ends, c)
    assert all(torch.equal(g, t) for g, t in zip(got, truths, strict=True))


def test_some_cotangents_of_a_batch_are_missing():
    """What is differentiated is a part of the products."""
    ends = ends_of("plain")
    given = block(ends[0], ())
    made = jactri.vjp(called("plain"), ends, given, create_graph=True)[1]
    c = torch.randn(2, *made[1].shape, dtype=F64)
    got = torch.autograd.grad(made[1], (*ends, given), c, is_grads_batched=True, retain_graph=True)
    for k, row in enumerate(c):
        truths = torch.autograd.grad(made[1], (*ends, given), row, retain_graph=True)
        assert all(torch.equal(g[k], t) for g, t in zip(got, truths, strict=True))


def test_a_jacobian_of_a_product():
    """Jactri reads what it left."""
    ends = [x.detach() for x in ends_of("plain")]
    ends = [x[:1, :1, :3] for x in ends]
    t = tuple([torch.ones_like(x) for x in ends])

    def pushed(func):
        return lambda *x: jactri.jvp(func, x, t, create_graph=True)[1]

    got = jactri.jacobian(pushed(called("plain")), tuple(ends))
    want = torch.autograd.functional.jacobian(pushed(by_hand("plain")), tuple(ends))
    for ours, truth in zip(got, want, strict=True):
        assert_close(ours, truth, F64, length=20)


def test_a_jacobian_is_differentiated(monkeypatch, apart):
    monkeypatch.setattr(joining, "HELD", 1 << 50)
    ends = [x.detach()[:1, :1, :3].requires_grad_() for x in ends_of("plain")]
    for strategy in ("forward-mode", "reverse-mode"):
        results = []
        for func in (called("plain"), by_hand("plain")):
            J = jactri.jacobian(func, tuple(ends), create_graph=True, strategy=strategy)
            results.append(torch.autograd.grad(sum(j.sin().sum() for j in J), ends))
        for ours, truth in zip(*results, strict=True):
            assert_close(ours, truth, F64, length=20)


def test_the_gradient_of_a_mask_is_none_of_the_whole(monkeypatch):
    """Where a mask needs one, what is differentiated has the parts, and else the whole."""
    ends = ends_of("bias")
    given = attention.Attention(
        *ends, CALLS["bias"]["attn_mask"].clone().requires_grad_(), False, 1.0
    )
    whole = attending.Whole(given, attending.ALL)
    assert not attending.Attend(whole, 0).twice
    ran = []
    real = attending.push
    monkeypatch.setattr(attending, "push", lambda *a: ran.append(0) or real(*a))
    jactri.jvp(called("bias"), ends, ends, differentiate="both")
    assert ran
    monkeypatch.setattr(attending.Attend, "twice", False)
    jactri.jvp(called("bias"), ends, ends, differentiate="both")
    assert len(ran) == 1
    jactri.jvp(called("bias"), tuple([x.detach() for x in ends]), ends)
    assert len(ran) == 2


def test_the_backward_takes_the_memory_of_its_ends(monkeypatch):
    monkeypatch.setattr(attention, "TILE_BYTES", attention.TILE_BYTES // 4)  # as for 4096
    monkeypatch.setattr(joining, "CACHE_BYTES", 0)
    x = tuple([torch.randn(1, 4, 1024, 64).requires_grad_() for _ in range(3)])
    unit = x[0].nbytes
    func = called("causal")
    for product, given in (
        (jactri.jvp, tuple([torch.randn(of.shape) for of in x])),
        (jactri.vjp, torch.randn(x[0].shape)),
    ):
        made = product(func, x, given, create_graph=True)[1]
        made = made if isinstance(made, tuple) else (made,)
        c = [torch.ones_like(m) for m in made]
        with Taken() as taken:
            torch.autograd.grad(made, x, c)
        assert taken.peak < 3 * unit + 2 * attention.TILE_BYTES
