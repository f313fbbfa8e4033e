"""Masks as structure: `sparsity` says where the zeros are, of each sample its own."""

import pytest
import torch
from causal import (
    CAUSAL,
    HEADS,
    HOLES,
    KEYS,
    LEFT,
    MASKS,
    ORDER,
    PADDED,
    RANDOM,
    TOKEN,
    D,
    N,
    T,
    X,
    block,
    by_filling,
    layers,
    written,
)
from common import F64
from tolerances import assert_close as close_in
from torch.autograd.functional import jacobian as truth_of
from torch.nn.functional import scaled_dot_product_attention as sdpa

import jactri


def assert_close(found, want):
    close_in(found, want, F64)


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


@pytest.mark.parametrize(
    "masks", [(KEYS,), (KEYS, PADDED), (HOLES, HOLES), (RANDOM,), (LEFT, LEFT), (HEADS,), (PADDED,)]
)
def test_sparsity_of_each_sample(masks):
    """Right, and tight: what is left out is zero, and what is there is not."""
    for attend in (sdpa, by_filling):
        if attend is by_filling and masks[0] is LEFT:
            continue  # NaN, as written
        f = layers(*masks, attend=attend)
        want = truth_of(f, X) != 0
        assert torch.equal(jactri.sparsity(f, X).to_dense(), want)
        each = torch.stack([want[i, :, :, i] for i in range(N)])
        found = jactri.sparsity(f, X, per_sample=True)
        assert torch.equal(found.to_dense(), each)
        assert torch.equal(found.indices(), each.nonzero().T)
        rows = jactri.sparsity(lambda x, f=f: f(x).flatten(0, 1), X)  # samples one after another
        assert torch.equal(rows.to_dense(), want.flatten(0, 1))


def test_sparsity_behind_indices():
    """What depends on what changes with the indices, in one and the same graph."""
    for order in (ORDER, ORDER.flip(0)):
        f = lambda x, order=order: layers(CAUSAL)(x[:, order]).roll(2, 1)  # noqa: E731
        want = truth_of(f, X)
        assert torch.equal(jactri.sparsity(f, X).to_dense(), want != 0)
        sparse = jactri.jacobian(f, X, layout=torch.sparse_coo)
        assert sparse._nnz() == int((want != 0).sum())
        assert_close(sparse.to_dense(), want)


def test_sparsity_of_what_values_choose():
    """A maximum may be anywhere, a sort of features leaves tokens where they are; one plan holds for all values."""
    most = lambda x: layers(CAUSAL)(x).max(1).values  # noqa: E731
    ordered = lambda x: layers(CAUSAL)(x).sort(-1).values  # noqa: E731
    for x in (X, 3 * X.flip(1)):
        found = jactri.sparsity(most, x, per_sample=True)
        assert found._nnz() == N * D * T * D
        assert torch.equal(jactri.sparsity(ordered, x).to_dense(), truth_of(ordered, x) != 0)
        for f in (most, ordered):
            sparse = jactri.jacobian(f, x, layout=torch.sparse_coo)
            assert_close(sparse.to_dense(), truth_of(f, x))


@pytest.mark.parametrize("steps", [(0, 5), (7, 2)])
def test_masks_and_indices_of_each_sample(steps):
    """By axis exactly; in flat order no less than what is there, and samples stay apart."""
    own = torch.stack([ORDER.roll(k)[:5] for k in steps])
    index = own[..., None].expand(N, 5, D)
    flat = (torch.arange(N)[:, None] * T + own).flatten()
    by_axis = lambda x: layers(PADDED)(x).gather(1, index)  # noqa: E731
    in_order = lambda x: layers(PADDED)(x).flatten(0, 1)[flat].unflatten(0, (N, 5))  # noqa: E731
    want = truth_of(by_axis, X)
    there = want != 0
    each = torch.stack([there[i, :, :, i] for i in range(N)])
    assert torch.equal(jactri.sparsity(by_axis, X).to_dense(), there)
    assert torch.equal(jactri.sparsity(by_axis, X, per_sample=True).to_dense(), each)
    found = jactri.sparsity(in_order, X).to_dense()
    assert not (there & ~found).any()
    assert not found[0, :, :, 1].any() and not found[1, :, :, 0].any()
    assert not (each & ~jactri.sparsity(in_order, X, per_sample=True).to_dense()).any()
    for f in (by_axis, in_order):
        sparse = jactri.jacobian(f, X, layout=torch.sparse_coo)
        assert_close(sparse.to_dense(), want)
