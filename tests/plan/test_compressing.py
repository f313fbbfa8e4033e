"""Compressed products: every entry of a pattern stands in one of them as it is."""

import numpy as np
import pytest

from jactri._src.base.csr import Csr
from jactri._src.plan import compressing
from jactri._src.plan.compressing import compressed, two_sided

MODES = ["auto", "forward-mode", "reverse-mode"]


def products(matrix, table, reverse):
    made = np.zeros((table.count, matrix.shape[reverse]))
    for k, colour in enumerate(table.colour):
        if colour >= 0:
            made[colour] += matrix[k] if reverse else matrix[:, k]
    return made


def recovered(how, matrix):
    """The entries by the products themselves, two ways: each by itself, and as they are read in order."""
    sides = {
        True: products(matrix, how.cotangents, True),
        False: products(matrix, how.tangents, False),
    }
    each = [sides[r][c, a] for r, c, a in zip(how.reverse, how.colour, how.at, strict=True)]
    parts = [sides[r].reshape(-1)[reads.place] for r, reads in how.reads.items()]
    for reads in how.reads.values():
        assert (np.diff(reads.place // reads.size) >= 0).all()
        assert reads.start[-1] == len(reads.entries)
    ordered = np.concatenate(parts)[how.order] if parts else np.zeros(0)
    assert np.array_equal(np.array(each), ordered)
    return ordered


def check(how, dense, gen):
    matrix = gen.integers(1, 1000, dense.shape) * dense
    assert np.array_equal(recovered(how, matrix), matrix[dense])


@pytest.mark.parametrize("strategy", MODES)
def test_random_patterns(strategy):
    gen = np.random.default_rng(0)
    for _ in range(60):
        dense = gen.random(gen.integers(0, 25, 2)) < 0.4 * gen.random()
        for axis in range(2):
            if dense.shape[axis]:
                np.moveaxis(dense, axis, 0)[: gen.integers(0, 3)] = True
        pattern = Csr.of_dense(dense)
        how = compressed(pattern, strategy)
        check(how, dense, gen)
        least = {"forward-mode": dense.sum(1), "reverse-mode": dense.sum(0)}
        if strategy == "auto":
            assert how.products <= min(compressed(pattern, s).products for s in least)
        else:
            assert how.products >= least[strategy].max(initial=0)


def arrow(n, rows=1, columns=1):
    dense = np.eye(n, dtype=bool)
    dense[:rows] = dense[:, n - columns :] = True
    return dense


@pytest.mark.parametrize(("rows", "columns", "most"), [(1, 1, 3), (2, 3, 6), (0, 2, 3), (3, 0, 4)])
def test_arrowheads(rows, columns, most):
    dense = arrow(40, rows, columns)
    how = compressed(Csr.of_dense(dense))
    assert how.products == most
    check(how, dense, np.random.default_rng(1))


def test_both_sides_are_found_for_the_transposed_matrix_too():
    """A band with a dense row, and one whose columns are worse: what is taken out may be rows or columns."""
    gen = np.random.default_rng(2)
    dense = np.abs(np.subtract.outer(np.arange(60), np.arange(60))) <= 1
    dense[7] = True
    dense[:, [3, 20, 31]] = True
    for d in (dense, dense.T):
        how = compressed(Csr.of_dense(d))
        assert how.products <= 8 and how.tangents.count and how.cotangents.count
        check(how, d, gen)


def test_both_sides_are_left_where_they_do_not_pay(monkeypatch):
    full = Csr.of_dense(np.ones((9, 9), bool))
    assert compressed(full).products == 9 and two_sided(full, 8) is None
    monkeypatch.setattr(compressing, "_ENTRIES", 50)
    how = compressed(Csr.of_dense(arrow(31)))  # too many entries to look
    assert how.products == 31 and not how.tangents.count


def test_what_has_no_entry_runs_in_no_product():
    dense = np.zeros((6, 5), bool)
    assert compressed(Csr.of_dense(dense)).products == 0
    dense[1, 3] = dense[2, 4] = True
    for strategy in MODES:
        how = compressed(Csr.of_dense(dense), strategy)
        assert how.products == 1
        used = how.tangents.colour if how.tangents.count else how.cotangents.colour
        assert (used >= 0).sum() == 2


def test_many_levels_of_counts():
    """Each row has another number of entries: some of the numbers are looked at."""
    n = 80
    dense = np.tri(n, dtype=bool)
    dense[:, 0] = True
    dense[: n // 2] &= np.eye(n, dtype=bool)[: n // 2]
    pattern = Csr.of_dense(dense)
    check(compressed(pattern), dense, np.random.default_rng(3))


def test_it_is_remembered():
    pattern = Csr.of_dense(arrow(12))
    again = Csr.of_dense(arrow(12))
    assert compressed(pattern) is compressed(again) is not compressed(again, "forward-mode")
