"""The axis algebra against dense arithmetic: a block is only a way to store a dense Jacobian."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jactri._src.maps.layout import (
    FREE,
    Layout,
    SplitSeed,
    convert,
    matrix_view,
    release,
    released,
    scatter,
)


def dense(data, layout, sel=None):
    """(K of all seeds, *shape): the block with nothing tied."""
    loose = layout.drop(layout.tied)
    target = torch.zeros(loose.columns_of(sel), *loose.shape, dtype=torch.float64)
    return scatter(target, loose, data, layout, sel)


def random_block(layout, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(layout.columns, *layout.shape, generator=gen, dtype=torch.float64)


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@given(shapes)
def test_identity_is_the_identity_matrix(shape):
    layout = Layout.identity(shape)
    n = prod(shape)
    assert layout.numel == n
    assert torch.equal(dense(None, layout).reshape(n, n), torch.eye(n, dtype=torch.float64))


def test_axes_of_size_one_are_never_tied():
    assert Layout.identity((1, 3, 1)).tied == {0}
    assert Layout.identity((1, 3, 1)).seed == (3,)


def test_summed_axis_is_not_a_seed():
    layout = Layout.identity((5, 3), summed=0)
    assert layout.seed == (3,)
    block = dense(None, layout)
    assert block.shape == (3, 5, 3)
    assert torch.equal(block.sum(1), 5 * torch.eye(3, dtype=torch.float64))


@given(shapes, st.data())
def test_converting_to_fewer_ties_changes_nothing_but_storage(shape, data):
    layout = Layout.identity(shape)
    ties = data.draw(st.sets(st.sampled_from(sorted(layout.tied)))) if layout.tied else set()
    fewer = layout.drop(frozenset(ties))
    block = random_block(layout)
    stored = convert(block, layout, fewer, None, block)
    assert stored.shape == (fewer.columns, *shape)
    assert torch.equal(dense(stored, fewer), dense(block, layout))


@given(shapes, st.data())
def test_release_reads_the_diagonal(shape, data):
    layout = Layout.identity(shape)
    axes = [a for a in range(len(shape)) if layout.is_tied(a)]
    if not axes:
        return
    axis = data.draw(st.sampled_from(axes))
    factor = layout.axes[axis][0][1]
    start = data.draw(st.integers(0, shape[axis] - 1))
    length = data.draw(st.integers(1, shape[axis] - start))
    sel = {factor: (start, length)}
    block = random_block(layout)
    out = released(layout, axis)
    got = release(block, layout, axis, sel).reshape(out.columns_of(sel), *out.shape)
    # summing the dense block over the axis picks the one entry that is not zero
    want = dense(block, layout, {}).sum(axis + 1, keepdim=True)
    want = want.reshape(*layout.seed, *out.shape).narrow(factor, start, length)
    assert torch.equal(dense(got, out, sel).reshape(want.shape), want)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("axis", [1, 2])
def test_matrix_view_contracts_a_tied_axis(axis, batched):
    layout = Layout.identity((3, 4, 5))
    block = random_block(layout)
    n, m = layout.shape[axis], 6
    matrix = torch.randn(*([3] if batched else []), n, m, dtype=torch.float64)
    out = released(layout, axis, m)
    got = release(block, layout, axis, None) * matrix_view(
        matrix, layout, axis, 0 if batched else None, None
    )
    got = got.reshape(out.columns, *out.shape)
    moved = dense(block, layout).movedim(axis + 1, -1)
    want = (moved @ matrix).movedim(-1, axis + 1)  # one matrix, or one a sample
    torch.testing.assert_close(dense(got, out), want)


def test_views_merge_and_split_tied_axes():
    layout = Layout.identity((4, 6, 5)).untie((2,))
    merged = layout.viewed((24, 5))
    assert merged.axes[0] == ((4, 0), (6, 1))
    assert merged.viewed((4, 6, 5)) == layout
    finer = Layout.identity((4, 6, 5), {1: (2, 3)}).untie((2,)).viewed((24, 5))
    # an axis of 15 is a tied factor of 3 times a free one of 5
    assert finer.viewed((4, 2, 15)).axes == (((4, 0),), ((2, 1),), ((3, 2), (5, FREE)))


def test_a_view_that_splits_a_tied_factor_asks_for_a_finer_seed():
    layout = Layout.identity((12, 5))
    with pytest.raises(SplitSeed) as split:
        layout.viewed((4, 3, 5))
    assert (split.value.factor, split.value.sizes) == (0, (4, 3))
    fine = Layout.identity((12, 5), {0: (4, 3)})
    assert fine.viewed((4, 3, 5)).axes == (((4, 0),), ((3, 1),), ((5, 2),))


def test_a_view_across_a_factor_drops_the_tie():
    # (4, 6) -> (8, 3): 8 is not a product of whole factors of 4 and divisors of 6 in order
    layout = Layout.identity((4, 6)).drop(frozenset({1}))
    out = layout.viewed((8, 3))
    assert out.tied == {0}
    assert Layout.identity((4, 6)).drop(frozenset({0})).viewed((3, 8)).tied == frozenset()


@given(st.permutations([2, 3, 4]), st.data())
def test_viewed_blocks_are_reshaped_blocks(sizes, data):
    shape = tuple(sizes)
    targets = [
        (24,),
        (sizes[0], -1),
        (-1, sizes[2]),
        (6, 4),
        (4, 6),
        (2, 12),
        (3, 8),
        (8, 3),
        (1, 24),
    ]
    target = data.draw(st.sampled_from(targets))
    target = torch.empty(24).reshape(target).shape
    splits = {}
    for _ in range(4):
        layout = Layout.identity(shape, splits)
        try:
            out = layout.viewed(tuple(target))
            break
        except SplitSeed as split:
            at = 0
            for a in range(3):
                factors = splits.get(a, (shape[a],))
                if at + len(factors) > split.factor:
                    i = split.factor - at
                    splits[a] = factors[:i] + split.sizes + factors[i + 1 :]
                    break
                at += len(factors)
    mid = layout.drop(layout.tied - out.tied)
    block = random_block(layout)
    stored = convert(block, layout, mid, None, block).reshape(out.columns, *target)
    assert torch.equal(dense(stored, out).reshape(24, *shape), dense(block, layout))


def test_meet_keeps_common_ties_only():
    a = Layout.identity((3, 4))
    b = Layout((((3, 0),), ((4, FREE),)), (3, 4))
    assert a.meet(b).tied == {0}
    # the same factors tied to other places have nothing in common
    square = Layout.identity((3, 3))
    swapped = Layout((((3, 1),), ((3, 0),)), (3, 3))
    assert square.meet(swapped).tied == frozenset()
