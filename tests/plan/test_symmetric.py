"""Star colourings of symmetric patterns, and the products that tell such a matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jactri._src.base.csr import Csr
from jactri._src.plan import symmetric
from jactri._src.plan.compressing import compressed
from jactri._src.plan.symmetric import closed, halved, star


def of_dense(dense):
    return Csr.of_dense(np.asarray(dense, bool))


def banded(n, half):
    i = np.arange(n)
    return of_dense(abs(i[:, None] - i) <= half)


def arrow(n, diagonal=True):
    dense = np.eye(n, dtype=bool) & diagonal
    dense[0] = dense[:, 0] = True
    dense[0, 0] = diagonal
    return of_dense(dense)


def grid(*shape):
    """A cell of a grid and its neighbours along the axes."""
    places = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape))
    return of_dense(abs(places[:, :, None] - places[:, None]).sum(0) <= 1)


def random(n, each, seed, diagonal=True):
    gen = np.random.default_rng(seed)
    dense = gen.random((n, n)) < each / n
    dense |= dense.T
    np.fill_diagonal(dense, diagonal)
    return of_dense(dense)


def kkt(steps, states=3, controls=1):
    """Stages of an optimal control problem: their own Hessians, and dynamics that lead from each to the next."""
    n = states + controls
    each = n + states
    dense = np.zeros((steps * each,) * 2, bool)
    for k in range(steps):
        z, later = k * each + np.arange(n), (k + 1) * each + np.arange(n)
        dense[np.ix_(z, z)] = True
        if k < steps - 1:
            multipliers = k * each + n + np.arange(states)
            for row, column in ((multipliers, z), (multipliers, later)):
                dense[np.ix_(row, column)] = True
    return of_dense(dense | dense.T)


def read(how, matrix):
    """The entries that products with a matrix tell."""
    made = np.zeros(how.pattern.nnz)
    for reverse, table in ((False, how.tangents), (True, how.cotangents)):
        seeds = (table.colour == np.arange(table.count)[:, None]).astype(float)
        here = how.reverse == reverse
        products = seeds @ (matrix if reverse else matrix.T)
        made[here] = products[how.colour[here], how.at[here]]
    return made


def check(pattern, forward=False, shape=()):
    how = halved(pattern, forward, shape)
    assert how.cotangents.count * how.tangents.count == 0
    assert how.pattern.key == pattern.key
    matrix = np.random.default_rng(0).random(pattern.shape) + 1
    matrix = (matrix + matrix.T) * pattern.dense()
    row, column = pattern.row, pattern.column
    assert (read(how, matrix) == matrix[row, column]).all()
    places = {}
    for r, c, place in zip(row, column, zip(how.colour, how.at, strict=True), strict=True):
        assert places.setdefault((min(r, c), max(r, c)), place) == place
    return how.products


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_star_colourings(seed, diagonal):
    pattern = random(14, 4, seed, diagonal)
    dense = pattern.dense()
    np.fill_diagonal(dense, False)
    order = np.random.default_rng(seed).permutation(14)
    colour = star(pattern, order)
    assert (colour >= 0).all()
    near = [np.flatnonzero(row).tolist() for row in dense]
    assert all(colour[v] != colour[w] for v in range(14) for w in near[v])
    for a in range(14):  # no path of four has two colours
        for b in near[a]:
            for c in near[b]:
                for d in near[c]:
                    if len({a, b, c, d}) == 4:
                        assert len({colour[v] for v in (a, b, c, d)}) > 2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(0, 2**20), st.sampled_from([0.5, 2, 6]), st.booleans())
def test_any_symmetric_matrix_is_read(n, seed, each, forward):
    gen = np.random.default_rng(seed)
    dense = gen.random((n, n)) < each / max(n, 1)
    check(closed([[of_dense(dense)]])[0][0], forward)


COUNTS = {
    "empty": (of_dense(np.zeros((5, 5))), 0),
    "of no rows": (of_dense(np.zeros((0, 0))), 0),
    "diagonal": (banded(9, 0), 1),
    "tridiagonal": (banded(50, 1), 3),
    "five diagonals": (banded(50, 2), 5),
    "arrowhead": (arrow(40), 2),
    "arrowhead, no diagonal": (arrow(40, False), 1),
    "dense": (of_dense(np.ones((6, 6))), 6),
    "five points": (grid(9, 11), 5),
    "seven points": (grid(4, 5, 6), 7),
    "one pair": (of_dense([[0, 1], [1, 0]]), 1),
}


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("name", COUNTS)
def test_counts(name, forward):
    pattern, want = COUNTS[name]
    shapes = {"five points": (9, 11), "seven points": (4, 5, 6)}
    assert check(pattern, forward, shapes.get(name, ())) == want


def test_dense_rows_and_random_matrices_need_fewer_than_columns_told_apart():
    assert check(arrow(40)) < compressed(arrow(40), "forward-mode").products == 40
    for seed in range(3):
        pattern = random(120, 6, seed)
        assert check(pattern) < compressed(pattern).products


def test_optimal_control_needs_as_many_for_any_horizon():
    counts = [check(kkt(steps)) for steps in (6, 12, 24)]
    assert len(set(counts)) == 1 and counts[0] < compressed(kkt(12), "forward-mode").products


def test_large_patterns_are_coloured_by_columns(monkeypatch):
    monkeypatch.setattr(symmetric, "GREEDY", 0)
    taken = []
    monkeypatch.setattr(symmetric, "star", lambda *given: taken.append(1) or star(*given))
    assert check(banded(51, 1)) == 3
    assert check(grid(9, 12), shape=(9, 12)) == 5
    assert not taken
    assert check(arrow(41)) == 2  # which would take 41
    monkeypatch.setattr(symmetric, "LARGEST", 0)
    assert check(arrow(42)) == 42 and len(taken) == 3


def test_a_triangle_is_taken_for_both():
    pattern = banded(7, 2)
    lower = of_dense(np.tril(pattern.dense()))
    ((made,),) = closed([[lower]])
    assert np.array_equal(made.dense(), pattern.dense())
    assert closed([[pattern]])[0][0] is pattern


def test_blocks_have_the_entries_of_their_mirror_images():
    none = of_dense(np.zeros((3, 2)))
    a, b, c = of_dense([[1, 1], [0, 0]]), of_dense([[1, 0, 1], [0, 0, 0]]), of_dense(np.eye(3))
    made = closed([[a, b], [none, c]])
    whole = np.block([[m.dense() for m in row] for row in made])
    want = np.block([[m.dense() for m in row] for row in ([a, b], [none, c])])
    assert np.array_equal(whole, want | want.T)


def test_what_is_no_star_colouring_is_refused():
    pattern = banded(5, 1)
    mirror = np.argsort(pattern.column, kind="stable")
    with pytest.raises(ValueError, match="alone in no row"):
        symmetric._read(pattern, mirror, np.arange(5) % 2)
