"""Boolean sparse matrices, against dense ones."""

import numpy as np
import pytest

from jactri._src.base import csr
from jactri._src.base.csr import Csr, stacked, union


def some(gen, height, width):
    return gen.random((height, width)) < gen.random()


@pytest.mark.parametrize("bits", [4, 0])
def test_products_unions_and_parts(bits, monkeypatch):
    monkeypatch.setattr(csr, "BITS", bits)
    monkeypatch.setattr(csr, "SMALL", 1 if bits else -1)
    gen = np.random.default_rng(0)
    for _ in range(150):
        m, k, n = gen.integers(0, 9, 3)
        a, b, c = some(gen, m, k), some(gen, k, n), some(gen, m, k)
        A, B, C = map(Csr.of_dense, (a, b, c))
        assert np.array_equal(A.dense(), a) and A.nnz == a.sum() and A.shape == a.shape
        product = (a.astype(int) @ b) > 0
        assert np.array_equal(A.after(B).dense(), product)
        listed = int((a.sum(0) * b.sum(1)).sum())
        assert A.after(B, listed - 1) is None and A.after(B, listed).key == A.after(B).key
        assert np.array_equal(union([A, C]).dense(), a | c)
        assert np.array_equal(stacked([A, C]).dense(), np.concatenate([a, c]))
        assert np.array_equal(A.T.dense(), a.T)
        assert A.within(C) == bool((c | ~a).all())
        assert np.array_equal(A.diagonal(), a.diagonal())
        rows = gen.integers(0, m, 5) if m else np.zeros(0, int)
        assert np.array_equal(A.take(rows).dense(), a[rows])
        order = gen.permutation(A.nnz)
        twice = np.concatenate([order, order])
        assert Csr.of(A.row[twice], A.column[twice], m, k).key == A.key
        assert (A.key == C.key) == np.array_equal(a, c)


def test_blocks_of_samples():
    one, other = np.eye(2, 3, dtype=bool), np.ones((2, 3), bool)
    both = np.zeros((4, 6), bool)
    both[:2, :3], both[2:, 3:] = one, other
    assert np.array_equal(Csr.of_dense(both).blocks(2).dense(), one | other)
    both[0, 4] = True
    assert Csr.of_dense(both).blocks(2) is None
    assert Csr.identity(5).blocks(2) is None and Csr.identity(6).is_identity


def test_windows_and_picks():
    seen = Csr.windows(4, 6, taps=3, stride=2, padding=2, dilation=1).dense()
    want = [[max(0, 2 * i - 2) <= j <= 2 * i for j in range(6)] for i in range(4)]
    assert np.array_equal(seen, want)
    assert np.array_equal(Csr.picked([2, -1, 2], 3).dense(), [[0, 0, 1], [0, 0, 0], [0, 0, 1]])
