"""Boolean sparse matrices, against dense ones."""

import tracemalloc

import numpy as np
import pytest

from jactri._src.base import csr
from jactri._src.base.csr import Csr, stacked, union


def some(gen, height, width):
    return gen.random((height, width)) < gen.random()


@pytest.mark.parametrize("bits", [4, 0])
def test_products_unions_and_parts(bits, monkeypatch):
    monkeypatch.setattr(csr, "BITS", bits)
    monkeypatch.setattr(csr, "LISTED", 7)  # some rows at a time
    monkeypatch.setattr(csr, "SMALL", 1 if bits else -1)
    gen = np.random.default_rng(0)
    for _ in range(150):
        m, k, n = gen.integers(0, 9, 3)
        a, b, c = some(gen, m, k), some(gen, k, n), some(gen, m, k)
        A, B, C = map(Csr.of_dense, (a, b, c))
        assert np.array_equal(A.dense(), a) and A.nnz == a.sum() and A.shape == a.shape
        product = (a.astype(int) @ b) > 0
        made = A.after(B)
        assert product.all() if made is None else np.array_equal(made.dense(), product)
        listed = int((a.sum(0) * b.sum(1)).sum())
        assert A.after(B, listed - 1) is None
        assert np.array_equal(A.after(B, listed).dense(), product)
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


def peak(call):
    """What comes of a call, and the bytes of arrays that it took at once."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def arrow(n):
    made = np.eye(n, dtype=bool)
    made[0] = made[:, 0] = True
    return Csr.of_dense(made)


def test_a_product_with_every_entry_is_not_listed():
    n = 1200
    made, taken = peak(lambda: arrow(n).after(arrow(n)))
    assert made is None
    assert taken < 3 * n * n  # bytes, where a list of its entries takes 16 each


def test_a_product_is_listed_some_rows_at_a_time(monkeypatch):
    n = 2000
    band = Csr.windows(n, n, 41, 1, 20, 1)
    monkeypatch.setattr(csr, "LISTED", 1 << 14)
    made, taken = peak(lambda: band.after(band))
    assert made.key == Csr.windows(n, n, 81, 1, 40, 1).key
    assert taken < 8 * made.column.nbytes


def test_a_triangle_takes_what_it_is():
    made, taken = peak(lambda: Csr.triangle(1500))
    assert np.array_equal(made.dense(), np.tri(1500, dtype=bool))
    assert taken < 2.2 * made.column.nbytes


def test_alike_blocks():
    gen = np.random.default_rng(0)
    for n, high, wide in [(1, 3, 2), (3, 2, 4), (4, 1, 1), (0, 2, 3), (3, 0, 2), (2, 3, 0)]:
        each = gen.random((high, wide)) < 0.5
        many = Csr.of_dense(each).repeated(n)
        assert np.array_equal(many.dense(), np.kron(np.eye(n, dtype=bool), each))
        if n:
            assert np.array_equal(many.block(n).dense(), each)
    assert Csr.identity(6).block(3).same(Csr.identity(2)) and Csr.identity(6).block(4) is None
    assert Csr.picked(np.array([1, 0, 2, 3]), 4).block(2) is None  # not alike
    assert Csr.picked(np.array([2, 3, 0, 1]), 4).block(2) is None  # off the diagonal
    assert Csr.picked(np.array([0, -1, 2, 3]), 4).block(2) is None  # not as many
    assert not Csr.identity(2).same(Csr(np.arange(3), np.arange(2), 3))


@pytest.mark.parametrize("tabled", [0, 4, 100])
def test_numbers_in_order(tabled, monkeypatch):
    monkeypatch.setattr(csr, "TABLED", tabled)
    gen = np.random.default_rng(0)
    for keys in (
        gen.integers(0, 50, 40), gen.integers(0, 9, 40).repeat(3), np.arange(7), np.zeros(0, int),
        np.array([49]), np.zeros(5, int),
    ):  # fmt: skip
        kept, place = csr.numbered(keys, 50)
        assert (kept[1:] > kept[:-1]).all() and set(kept) == set(keys)
        assert np.array_equal(kept[place], keys)


@pytest.mark.parametrize("tabled", [0, 4])
def test_which_entries_are_there(tabled, monkeypatch):
    monkeypatch.setattr(csr, "TABLED", tabled)
    gen = np.random.default_rng(0)
    row, column = gen.integers(0, 5, 30), gen.integers(0, 7, 30)
    none, one = np.zeros((5, 7), bool), np.eye(5, 7, dtype=bool)[[1, 0, 2, 4, 3]]
    one[2] = False
    for dense in (none, one, gen.random((5, 7)) < 0.5):
        assert np.array_equal(Csr.of_dense(dense).holds(row, column), dense[row, column])


def test_entries_some_at_a_time():
    gen = np.random.default_rng(0)
    for shape in ((5, 7), (1, 9), (4, 0)):
        made = Csr.of_dense(some(gen, *shape))
        for most in (1, 3, 100):
            parts = list(made.listed(most))
            assert all(0 < len(row) == len(column) <= most for row, column in parts)
            none = np.zeros(0, int), np.zeros(0, int)
            rows, columns = (np.concatenate(end) for end in zip(none, *parts, strict=True))
            assert np.array_equal(rows, made.row) and np.array_equal(columns, made.column)
