"""Masks as structure: zeros for later tokens are not computed, and `sparsity` says where they are."""

import math
from functools import partial

import pytest
import torch
from common import F64
from tolerances import assert_close as close_in
from torch import nn
from torch.autograd.functional import jacobian as truth_of
from torch.nn.functional import gelu, pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

import jactri
from jactri._src.base import rates
from jactri._src.plan import planning

N, T, D, H = 2, 12, 6, 2
TOKEN = torch.arange(T)
CAUSAL = TOKEN[:, None] >= TOKEN
LOCAL = CAUSAL & (TOKEN[:, None] < TOKEN + 3)


def assert_close(found, want):
    close_in(found, want, F64)


@pytest.fixture
def worth(monkeypatch):
    """As if products took long and steps no time: ranges of tokens pay for small inputs, too."""
    monkeypatch.setitem(rates.ROUGH, "cpu", rates.Rates(1e7, 1e12, 1e-7))
    monkeypatch.setattr(planning, "RANGE", 1e-7)


def weights(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=generator) / shape[0] ** 0.5


X = weights(N, T, D, seed=1) * 1.5
QKV, OUT, UP, DOWN = weights(D, 3 * D), weights(D, D), weights(D, 2 * D), weights(2 * D, D)


def written(q, k, v, mask, fill):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (fill(scores, mask)).softmax(-1) @ v


def filled(scores, mask):
    return scores.masked_fill(~mask, -math.inf)


def chosen(scores, mask):
    return torch.where(mask, scores, -1e9)


def block(x, attend=None):
    """A layer of a causal language model."""
    parts = (x @ QKV).unflatten(-1, (3, H, D // H)).permute(2, 0, 3, 1, 4)
    x = x + attend(*parts).transpose(1, 2).flatten(2) @ OUT
    y = nn.functional.layer_norm(x, (D,))
    return x + gelu(y @ UP) @ DOWN


def turned(x):
    """Rotary positions: pairs of features are turned by an angle for each token."""
    angle = torch.arange(x.shape[-2], dtype=F64)[:, None] * 0.3
    return x * angle.cos() + torch.cat([-x[..., 1:], x[..., :1]], -1) * angle.sin()


def few_keys(x):
    """Two heads of queries share the keys and values of one."""
    q, k, v = (x @ QKV).split([D, D, D], -1)
    q, k, v = (t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in (q, k[..., :2], v[..., :2]))
    y = sdpa(turned(q), turned(k), v, is_causal=True, enable_gqa=True)
    return x + y.transpose(1, 2).flatten(2) @ OUT


LONG = torch.tensor([T, 7]).view(N, 1, 1, 1) > TOKEN
PADDED = CAUSAL & LONG | (TOKEN[:, None] == TOKEN)
HEADS = torch.stack([CAUSAL, LOCAL]).expand(N, H, T, T)
NO_ROW = CAUSAL.clone().index_fill(0, torch.tensor(3), False)
FLOAT = weights(T, T).masked_fill(~CAUSAL, -math.inf)
MASKS = {
    "causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "boolean": lambda q, k, v: sdpa(q, k, v, CAUSAL),
    "added": lambda q, k, v: sdpa(q, k, v, FLOAT),
    "filled": lambda q, k, v: written(q, k, v, CAUSAL, filled),
    "where": lambda q, k, v: written(q, k, v, CAUSAL, chosen),
    "local": lambda q, k, v: sdpa(q, k, v, LOCAL),
    "anticausal": lambda q, k, v: sdpa(q, k, v, CAUSAL.T),
    "padded": lambda q, k, v: sdpa(q, k, v, PADDED),
    "by heads": lambda q, k, v: sdpa(q, k, v, HEADS),
    "a row of none": lambda q, k, v: sdpa(q, k, v, NO_ROW),
    "more keys": lambda q, k, v: pad(sdpa(q[:, :, :9], k, v, is_causal=True), (0, 0, 0, 3)),
    "fewer keys": lambda q, k, v: sdpa(q, k[:, :, :8], v[:, :, :8], is_causal=True),
}


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


ORDER = torch.randperm(T, generator=torch.Generator().manual_seed(0))
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


@pytest.mark.parametrize("mask", ["causal", "boolean", "added", "filled", "where"])
def test_sparsity_is_lower_block_triangular(mask):
    f = lambda x: block(block(x, MASKS[mask]), MASKS[mask])  # noqa: E731
    want = CAUSAL[:, None, :, None].expand(T, D, T, D)
    found = jactri.sparsity(f, X).to_dense()
    for i in range(N):
        for j in range(N):
            assert torch.equal(found[i, :, :, j], want if i == j else torch.zeros_like(want))
    assert torch.equal(
        jactri.sparsity(f, X, per_sample=True).to_dense(), want.expand(N, *want.shape)
    )
    for layout in (torch.sparse_coo, torch.sparse_csr, "banded"):
        sparse = jactri.jacobian(f, X[:1], layout=layout)
        assert_close(sparse.to_dense().reshape(1, T, D, 1, T, D), truth_of(f, X[:1]))


def test_sparsity_of_windows_and_of_what_is_no_mask():
    f = lambda x: block(block(x, MASKS["local"]), MASKS["local"])  # noqa: E731
    near = CAUSAL & (TOKEN[:, None] < TOKEN + 5)  # twice 3
    found = jactri.sparsity(f, X[:1]).to_dense()[0, :, 0, 0, :, 0]
    assert torch.equal(found, near)
    weak = lambda q, k, v: written(q, k, v, CAUSAL, lambda s, m: s.masked_fill(~m, -1.0))  # noqa: E731
    f = lambda x: block(x, weak)  # noqa: E731
    assert jactri.sparsity(f, X[:1]).to_dense().all()
    assert_close(jactri.jacobian(f, X), truth_of(f, X))


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
