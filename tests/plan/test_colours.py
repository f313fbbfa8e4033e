"""Colours: seeds of one never meet in one entry."""

import networkx
import numpy as np
import pytest

from jactri._src.base.cache import Cache
from jactri._src.base.csr import Csr
from jactri._src.plan import colours, greedy
from jactri._src.plan.colours import flat_table, table_of
from jactri._src.plan.pattern import Pattern


def valid(dense, table):
    assert table.colour.shape == (dense.shape[1],) and table.colour.max(initial=0) < table.count
    for row in dense:
        mine = table.colour[row]
        assert len(set(mine.tolist())) == len(mine)


@pytest.mark.parametrize("orders", [1 << 19, 0])
def test_no_two_meet(orders, monkeypatch):
    monkeypatch.setattr(greedy, "_ORDERS", orders)
    monkeypatch.setattr(colours, "_tables", Cache())
    gen = np.random.default_rng(0)
    for _ in range(200):
        dense = gen.random(gen.integers(1, 30, 2)) < 0.4 * gen.random()
        table = table_of(Csr.of_dense(dense))
        valid(dense, table)
        assert max(1, dense.sum(1).max()) <= table.count <= dense.shape[1]


def star(n, axes):
    """A cell and its neighbours on a grid."""
    ids = np.arange(n**axes).reshape((n,) * axes)
    pairs = [(ids.ravel(), ids.ravel())]
    for a in range(axes):
        low, high = (np.moveaxis(ids, a, 0)[s].ravel() for s in (slice(-1), slice(1, None)))
        pairs += [(low, high), (high, low)]
    row, column = (np.concatenate(t) for t in zip(*pairs, strict=True))
    return Csr.of(row, column, ids.size, ids.size)


@pytest.mark.parametrize(("n", "axes", "most"), [(9, 1, 3), (8, 2, 6), (8, 3, 10), (6, 3, 10)])
def test_grids_need_about_as_many_as_a_cell_has_neighbours(n, axes, most):
    support = star(n, axes)
    for shape, least in (((n,) * axes, 2 * axes + 1), ((), most)):
        table = table_of(support, shape)
        valid(support.dense(), table)
        assert table.count <= least


def test_what_is_not_regular_needs_no_more_than_the_best_order_gives():
    """Neighbours of points in a square, neighbours of these, and no structure at all."""
    gen = np.random.default_rng(0)
    points = gen.random((200, 2))
    far = ((points[:, None] - points) ** 2).sum(-1)
    near = far <= np.partition(far, 6, axis=1)[:, 6:7]
    near |= near.T
    gained = []
    for dense in (near, near.astype(int) @ near > 0, gen.random((200, 200)) < 0.03):
        table = table_of(Csr.of_dense(dense))
        valid(dense, table)
        meet = (dense.T.astype(int) @ dense > 0) & ~np.eye(200, dtype=bool)
        largest, smallest = (
            max(networkx.greedy_color(networkx.from_numpy_array(meet), order).values()) + 1
            for order in ("largest_first", "smallest_last")
        )
        assert table.count <= min(largest, smallest)
        gained.append(largest - table.count)
    assert sum(gained) > 0


def test_an_arrow_has_few_colours_one_way():
    """The first row of an arrowhead without its first column is full; by rows it takes two colours."""
    dense = np.eye(12, dtype=bool)
    dense[:, 0] = True
    support = Csr.of_dense(dense)
    assert table_of(support).count == 2 and table_of(support.T).count == 12
    pattern = Pattern.of(support)
    assert flat_table([pattern], False, 0, 0.75).count == 2
    assert flat_table([pattern], True, 0, 0.75) is None


def test_samples_have_the_same_colours():
    dense = np.kron(np.eye(3, dtype=bool), np.tri(4, dtype=bool) & ~np.tri(4, k=-2, dtype=bool))
    table = flat_table([Pattern.of(Csr.of_dense(dense))], False, 3, 0.75)
    assert (table.count, table.samples) == (2, 3)
    assert np.array_equal(table.colour, np.tile(table.colour[:4], 3))
    valid(dense, table)


def test_several_targets_share_their_colours():
    one, other = np.eye(6, dtype=bool), np.eye(6, k=2, dtype=bool)
    patterns = [Pattern.of(Csr.of_dense(np.eye(6, dtype=bool) | p)) for p in (one, other)]
    table = flat_table(patterns, False, 0, 0.75)
    valid(np.concatenate([p.flat.dense() for p in patterns]), table)
    assert table.count == 2


@pytest.mark.parametrize("pair", [0, 1 << 30])
def test_periods_by_pairs_and_by_rows(pair, monkeypatch):
    monkeypatch.setattr(colours, "PAIR", pair)
    monkeypatch.setattr(colours, "LISTED", 20)  # a row or two at a time
    gen = np.random.default_rng(0)
    for _ in range(60):
        dense = gen.random(gen.integers(1, 11, 2)) < gen.random() / 2
        seeds = dense.shape[1]
        apart = [
            p for p in range(1, seeds + 1) if all(dense[:, c::p].sum(1).max() <= 1 for c in range(p))
        ]  # fmt: skip
        assert colours.period(Csr.of_dense(dense)) == apart[0]
