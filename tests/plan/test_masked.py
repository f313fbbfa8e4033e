"""Masks as structure: zeros for later tokens are not computed, by ranges of tokens."""

from functools import partial

import pytest
import torch
from causal import (
    CAUSAL,
    EVERY,
    LEFT,
    LOCAL,
    MASKS,
    NO_ROW,
    ORDER,
    OUT,
    PREFIX,
    QKV,
    TOKEN,
    D,
    H,
    N,
    T,
    X,
    block,
    by_filling,
    few_keys,
    layers,
    weights,
)
from common import F64
from tolerances import assert_close as close_in
from torch import nn
from torch.autograd.functional import jacobian as truth_of
from torch.nn.functional import scaled_dot_product_attention as sdpa

import jactri
from jactri._src.base import rates
from jactri._src.base.cache import Cache
from jactri._src.base.memory import Taken
from jactri._src.plan import masked as finding
from jactri._src.plan import narrowing, planning


def assert_close(found, want):
    close_in(found, want, F64)


@pytest.fixture
def worth(monkeypatch):
    """As if products took long and steps no time: ranges of tokens pay for small inputs, too."""
    monkeypatch.setitem(rates.ROUGH, "cpu", rates.Rates(1e7, 1e12, 1e-7))
    monkeypatch.setattr(planning, "RANGE", 1e-7)
    monkeypatch.setattr(
        planning, "_vain", Cache()
    )  # what does not pay under other rates may do now


@pytest.fixture
def cuts(worth, monkeypatch):
    """The ranges whose graphs a call makes."""
    made = []

    def narrowed(graph, part, reverse):
        made.append(part)
        return narrowing.narrowed(graph, part, reverse)

    monkeypatch.setattr(planning, "narrowed", narrowed)
    return made


def ranges(f, x=X, **options):
    return "ranges of the tokens" in jactri.explain(f, x, **options).note


def both(f, x=X, split=True):
    """Both directions against autograd, the whole and sample by sample."""
    want = truth_of(f, x)
    each = torch.stack([want[i].select(-x.dim(), i) for i in range(len(x))])
    for strategy in ("reverse-mode", "forward-mode"):
        assert ranges(f, x, strategy=strategy) == split
        assert_close(jactri.jacobian(f, x, strategy=strategy), want)
        assert_close(jactri.jacobian(f, x, strategy=strategy, per_sample=True), each)


@pytest.mark.parametrize("mask", MASKS)
def test_two_layers_with_the_same_weights(worth, mask):
    both(lambda x: block(block(x, MASKS[mask]), MASKS[mask]))


def test_other_blocks(worth):
    both(lambda x: few_keys(few_keys(x)))
    layer = nn.TransformerEncoderLayer(D, H, 8, dropout=0.0, batch_first=True, dtype=F64).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=F64)
    both(lambda x: layer(layer(x, mask), mask, is_causal=True))
    other = nn.TransformerEncoderLayer(D, H, 8, dropout=0.0, dtype=F64).eval()
    x = X.transpose(0, 1).contiguous()  # tokens first
    f = lambda x: other(other(x, mask), mask)  # noqa: E731
    assert ranges(f, x, strategy="reverse-mode")
    assert_close(jactri.jacobian(f, x, strategy="reverse-mode"), truth_of(f, x))


def model(x):
    return block(block(x, MASKS["causal"]), MASKS["causal"])


SCALE = torch.linspace(0, 1, N * T, dtype=F64)[:, None]
AROUND = [
    lambda x: model(x)[:, 1:11].log_softmax(-1),
    lambda x: model(x.flip(1)),
    lambda x: model(torch.cat([x[:, :4] * 2, x[:, 4:].sin()], 1)),
    lambda x: ((model(x).flatten(0, 1).tanh() * SCALE) @ OUT).unflatten(0, (N, T)),
    lambda x: model(x.unflatten(1, (T, D))).flatten(1),
    lambda x: model(x[:, ORDER]),
    lambda x: model(x)[:, -1],
    lambda x: model(x.cumsum(1)),
]


def test_what_surrounds_the_layers(worth):
    for i, f in enumerate(AROUND):
        x = X.flatten(1) if i == 4 else X
        strategy = ("reverse-mode", "forward-mode")[i % 2]
        assert ranges(f, x, strategy=strategy) == (i < 5)
        assert_close(jactri.jacobian(f, x, strategy=strategy), truth_of(f, x))
    assert_close(jactri.jacobian(model, X[:1]), truth_of(model, X[:1]))
    assert jactri.jacobian(model, X[:0]).shape == (0, T, D, 0, T, D)


def test_the_form_of_the_answer(worth):
    want = truth_of(model, X)
    each = torch.stack([want[i, :, :, i] for i in range(N)])
    for strategy in ("reverse-mode", "forward-mode"):
        for options in (
            {"memory_limit": want.nbytes + 60_000},
            {"chunk_size": 5},
            {"out": want.new_ones(want.shape)},
        ):
            assert_close(jactri.jacobian(model, X, strategy=strategy, **options), want)
        out = each.new_ones(each.shape)
        assert_close(jactri.jacobian(model, X, strategy=strategy, out=out, per_sample=True), each)
    x = X.clone().requires_grad_()
    f = lambda x: block(block(x, MASKS["filled"]), MASKS["filled"])  # noqa: E731
    found, want = jactri.jacobian(f, x, create_graph=True), truth_of(f, x, create_graph=True)
    assert_close(found, want)
    assert_close(*(torch.autograd.grad(j.square().sum(), x)[0] for j in (found, want)))


def test_half_of_the_flops():
    """By sizes alone: no rates are changed."""
    width, tokens = 32, 128
    torch.manual_seed(0)
    layers = [nn.Linear(width, n * width) for n in (3, 1)] * 4

    def f(x, causal):
        for qkv, out in zip(layers[::2], layers[1::2], strict=True):
            q, k, v = qkv(x).unflatten(-1, (3, 4, width // 4)).permute(2, 0, 3, 1, 4)
            y = sdpa(q, k, v, is_causal=causal)
            x = x + out(y.transpose(1, 2).flatten(2)).tanh()
        return x

    x = torch.randn(1, tokens, width)
    for strategy in ("reverse-mode", "forward-mode"):
        half = jactri.explain(lambda x: f(x, True), x, strategy=strategy)
        whole = jactri.explain(lambda x: f(x, False), x, strategy=strategy)
        assert "8 ranges of the tokens" in half.note
        assert half.flops < 0.6 * whole.flops
        assert half.peak_bytes < 1.2 * whole.peak_bytes


def masked(mask, q, k, v):
    return sdpa(q, k, v, mask)


def test_a_mask_that_changes_is_read_again(worth):
    for mask in (CAUSAL, CAUSAL.T, LOCAL, torch.ones(T, T, dtype=torch.bool)):
        attend = partial(masked, mask)
        f = lambda x, attend=attend: block(block(x, attend), attend)  # noqa: E731
        assert_close(jactri.jacobian(f, X), truth_of(f, X))
        if not mask.all():
            sparse = jactri.jacobian(f, X, layout=torch.sparse_coo)
            assert_close(sparse.to_dense(), truth_of(f, X))


HALF = T // 2


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_whose_a_mask_is(worth, order):
    """Of two attentions side by side one is causal; and weights that depend on nothing have a mask, too."""
    first, second = order

    def beside(x):
        a, b = x[:, None, :HALF], x[:, None, HALF:]
        return torch.cat([sdpa(a, a, a, is_causal=first), sdpa(b, b, b, is_causal=second)], 2)[:, 0]

    def constant(x):
        k = X[:, None, :HALF]
        a, b = x[:, None, :HALF], x[:, None, HALF:]
        mask = CAUSAL[:HALF, :HALF] if first else CAUSAL[:HALF, :HALF].T
        return torch.cat([sdpa(k, k, a, mask), sdpa(b, b, b, is_causal=True)], 2)[:, 0]

    for f in (beside, constant):
        want = truth_of(f, X)
        assert_close(jactri.jacobian(f, X), want)
        assert_close(jactri.jacobian(f, X, layout=torch.sparse_coo).to_dense(), want)


def test_what_is_no_mask_and_what_is_flat(worth):
    """Weights that are 0 by rounding; an output of which a range is several pieces."""
    x = torch.tensor([[[40.0, 0.0], [0.0, 60.0]]], dtype=F64)
    assert jactri.sparsity(lambda x: sdpa(x, x, x), x).to_dense().all()
    f = lambda x: model(x).flatten(0, 1)  # noqa: E731
    for strategy in ("reverse-mode", "forward-mode"):
        assert_close(jactri.jacobian(f, X, strategy=strategy), truth_of(f, X))


@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL.T, LOCAL, PREFIX, LEFT, NO_ROW])
def test_one_layer(worth, mask):
    f = layers(mask)
    both(f)
    want = truth_of(f, X)
    for strategy in ("reverse-mode", "mixed"):
        assert ranges(f, strategy=strategy)
        for options in ({}, {"chunk_size": 1}, {"memory_limit": want.nbytes + 30_000}):
            assert_close(jactri.jacobian(f, X, strategy=strategy, **options), want)


@pytest.mark.parametrize(
    ("masks", "split"),
    [
        ((CAUSAL, EVERY), False),
        ((EVERY, CAUSAL), False),
        ((CAUSAL, CAUSAL.T), False),
        ((LOCAL, PREFIX), True),
    ],
)
def test_layers_of_several_kinds(worth, masks, split):
    both(layers(*masks, attend=by_filling), split=split)


def test_a_part_of_a_matrix_and_a_whole_one(worth):
    """Queries have the seed's tokens, keys all of them; a permutation of whole axes comes before."""

    def f(x):
        y = x.transpose(0, 1) @ QKV
        q, k, v = (t.transpose(0, 1).unflatten(-1, (H, -1)).transpose(1, 2) for t in y.chunk(3, -1))
        return sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    both(f)
    both(lambda x: f(x.flatten(0, 1).unflatten(0, (N, T))))


def test_fewer_flops_of_one_layer():
    """By sizes alone: no rates are changed."""
    width, tokens = 32, 128
    torch.manual_seed(0)
    qkv, out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def f(x, causal):
        q, k, v = qkv(x).unflatten(-1, (3, 4, width // 4)).permute(2, 0, 3, 1, 4)
        return x + out(sdpa(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))

    x = torch.randn(1, tokens, width)
    for strategy, least in (("reverse-mode", 0.8), ("mixed", 0.8), ("forward-mode", 0.65)):
        part = jactri.explain(lambda x: f(x, True), x, strategy=strategy)
        whole = jactri.explain(lambda x: f(x, False), x, strategy=strategy)
        assert "ranges of the tokens" in part.note
        assert part.flops < least * whole.flops
        assert part.peak_bytes < 1.1 * whole.peak_bytes


OTHER = weights(N, 9, D, seed=7)
SEEN = (torch.tensor([9, 4])[:, None] > torch.arange(9))[:, None, None]


def across(x, other, attend=sdpa):
    """A decoder's layer: causal, then to the tokens of another sequence, of which some are padding."""
    x = layers(CAUSAL, attend=attend)(x)
    q = (x @ OUT).unflatten(-1, (H, -1)).transpose(1, 2)
    k, v = (other @ QKV[:, : 2 * D]).unflatten(-1, (2, H, D // H)).permute(2, 0, 3, 1, 4)
    return x + attend(q, k, v, SEEN).transpose(1, 2).flatten(2), layers(
        CAUSAL.T[:9, :9], attend=attend
    )(other)


def inside(x, other):
    """Outputs that are on the way to another, an input among them; and one twice."""
    y = layers(CAUSAL)(x)
    return x, y, layers(LOCAL)(y + other[:, :1].sin()), y


def flat(rows):
    return [block for row in rows for block in row]


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode", "auto"])
@pytest.mark.parametrize("f", [across, inside])
def test_several_inputs_and_outputs(worth, f, strategy):
    xs = X, OTHER
    want = flat(truth_of(f, xs))
    assert ranges(f, xs, strategy=strategy)
    size = sum(w.nbytes for w in want)
    for options in ({}, {"chunk_size": 5}, {"memory_limit": size + 60_000}):
        for found, w in zip(
            flat(jactri.jacobian(f, xs, strategy=strategy, **options)), want, strict=True
        ):
            assert_close(found, w)
    alone = flat(jactri.jacobian(f, xs, strategy=strategy, per_sample=True))
    for found, w in zip(alone, want, strict=True):
        assert_close(found, torch.stack([w[i, :, :, i] for i in range(N)]))
    sparse = flat(jactri.sparsity(f, xs))
    for found, w in zip(sparse, want, strict=True):
        assert torch.equal(found.to_dense(), w != 0)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_second_derivatives(cuts, strategy):
    x, other = (t.clone().requires_grad_() for t in (X, OTHER))
    by_hand = partial(across, attend=by_filling)  # torch's kernels have one derivative only
    want = flat(truth_of(by_hand, (x, other), create_graph=True))
    weight = [weights(*w.shape, seed=i) for i, w in enumerate(want)]
    truth = torch.autograd.grad(
        sum((w * v).square().sum() for w, v in zip(want, weight, strict=True)), (x, other)
    )
    found = flat(jactri.jacobian(across, (x, other), create_graph=True, strategy=strategy))
    assert cuts
    total = sum((w * v).square().sum() for w, v in zip(found, weight, strict=True))
    again = torch.autograd.grad(total, (x, other), create_graph=True)
    for got, t in zip(again, truth, strict=True):
        assert_close(got, t)


def test_compiled(cuts):
    f = layers(None)
    causal = lambda x: block(x, MASKS["causal"])  # noqa: E731
    step = jactri.compile(causal, X, engine="fx", strategy="reverse-mode")
    assert len(cuts) == 6  # of the ordinary call, and of the trace
    x = X.flip(0) + 0.1
    assert_close(step(x), truth_of(causal, x))
    cuts.clear()
    step = jactri.compile(f, X, engine="fx", strategy="reverse-mode")
    assert not cuts
    assert_close(step(x), truth_of(f, x))


def test_what_was_not_worth_it_is_not_looked_for_again(worth, monkeypatch):
    looked = []
    real = finding.ranges
    monkeypatch.setattr(finding, "ranges", lambda *given: looked.append(given) or real(*given))
    f = lambda x: layers(EVERY, CAUSAL)(x.roll(1, 1).gather(1, TOKEN[:, None].expand(N, T, D)))  # noqa: E731
    for count in (1, 1, 1):
        assert_close(jactri.jacobian(f, X, strategy="reverse-mode"), truth_of(f, X))
        assert len(looked) == count


def test_a_verdict_holds_for_what_was_asked(worth):
    f = layers(LOCAL, CAUSAL)
    want = truth_of(f, X)
    tight = want.nbytes + 24_000  # not enough for the derivatives of all tokens beside
    assert not ranges(f, strategy="reverse-mode", memory_limit=tight)
    assert ranges(f, strategy="reverse-mode")
    assert ranges(f, strategy="reverse-mode", chunk_size=1)
    assert_close(jactri.jacobian(f, X, strategy="reverse-mode", memory_limit=tight), want)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_memory_of_copies(worth, strategy):
    """Samples one after another along one axis: a range of tokens is a run in each, and its derivatives a copy."""
    f = lambda x: (model(x).flatten(0, 1).tanh() * SCALE).unflatten(0, (N, T))  # noqa: E731
    x = X.clone().requires_grad_()
    y, plan = f(x), jactri.explain(f, X, strategy=strategy)
    assert "ranges" in plan.note
    with Taken() as taken:
        jactri.jacobian_of(y, x, strategy=strategy)
    assert 0.6 * plan.peak_bytes < taken.peak < 1.1 * plan.peak_bytes
