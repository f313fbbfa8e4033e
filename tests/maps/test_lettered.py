"""Products of lettered tensors against torch.einsum in float64."""

import random

import pytest
import torch
from tolerances import assert_close

from jactri._src.maps.lettered import contract, flops, multiply, once
from jactri._src.maps.letters import Network, Unaligned, order

F64 = torch.float64
SIZES = {0: 2, 1: 3, 2: 4, 3: 1, 4: 5}


def drawn(draw, most=3, twice=True):
    """A tensor and its letters; some dims are expanded, some letters come twice."""
    letters = draw.sample(list(SIZES), draw.randint(0, most))
    if twice and letters and draw.random() < 0.3:
        letters.append(draw.choice(letters))
    shape = [SIZES[c] for c in letters]
    thin = [1 if draw.random() < 0.2 else n for n in shape]
    return torch.randn(thin, dtype=F64).expand(shape), tuple(letters)


def truth(operands, out):
    arguments = [a for t, letters in operands for a in (t, list(letters))]
    has = {c for _, letters in operands for c in letters}
    made = torch.einsum(*arguments, [c for c in out if c in has])
    for i, c in enumerate(out):
        made = made if c in has else made.unsqueeze(i)
    return made


@pytest.mark.parametrize("seed", range(60))
def test_products_are_those_of_einsum(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    operands = [drawn(draw) for _ in range(draw.randint(1, 4))]
    out = tuple(draw.sample(list(SIZES), draw.randint(0, 4)))
    want = truth(operands, out)
    given = [t.clone() for t, _ in operands]
    with torch.set_grad_enabled(draw.random() < 0.5):
        assert_close(multiply(operands, out), want, F64, length=200)
        # the memory of a result may lie in any order of its dims
        dims = draw.sample(range(len(out)), len(out))
        whole = [SIZES[c] for c in out]
        dest = torch.full([whole[d] for d in dims], float("nan"), dtype=F64)
        dest = dest.permute([dims.index(d) for d in range(len(dims))])
        assert multiply(operands, out, dest) is dest
    assert_close(dest, want.expand(whole), F64, length=200)
    assert all(torch.equal(t, mine) for (t, _), mine in zip(operands, given, strict=True))


def test_what_may_be_overwritten_is():
    x, y = torch.randn(3, 4, dtype=F64), torch.randn(4, dtype=F64)
    want = x * y
    with torch.no_grad():
        assert contract(x, (0, 1), y, (1,), (0, 1), own=(True, False)) is x
    assert torch.equal(x, want)


def test_dtypes_meet_in_the_wider():
    x, y = torch.randn(3, 4, dtype=torch.bfloat16), torch.randn(4, 2)
    assert multiply([(x, (0, 1)), (y, (1, 2))], (0, 2)).dtype == torch.float32


def test_the_smallest_result_comes_first():
    a, b, c = (torch.ones(s) for s in ((2, 50), (50, 60), (60, 3)))
    operands = [(a, (0, 1)), (b, (1, 2)), (c, (2, 3))]
    assert flops(operands, (0, 3)) == 2 * (2 * 50 * 60 + 2 * 60 * 3)


def test_entries_that_are_alike_are_taken_once():
    t = torch.randn(1, 3, 1).expand(4, 3, 5)
    assert once(t, (0, 1, 2))[1] == (1,)
    assert once(t, (0, 1, 2), {2})[1] == (0, 1)


def test_ends_are_split_until_they_agree():
    net = Network()
    one, two = net.axes((12, 4)), net.axes((12, 4))
    two[0] = [net.letter(3), net.letter(4)]
    t = torch.arange(48.0)
    mine, theirs = (net.add([c for axis in end for c in axis], (end,), t) for end in (one, two))
    net.identify(one, two)
    assert mine.dims == theirs.dims and mine.data.shape == theirs.data.shape == (3, 4, 4)
    other = [[net.letter(8), net.letter(6)]]
    with pytest.raises(Unaligned):
        net.identify(net.axes((48,)), [[net.letter(5)]])
    with pytest.raises(Unaligned):
        net.identify([[net.letter(6), net.letter(8)]], other)


def test_the_smallest_result_is_not_made_at_twice_the_flops():
    """Products of two operands may all be as large, and what follows not: then flops decide, by all orders."""
    k, s, t, e, d = 0, 1, 2, 3, 4
    sizes = {k: 40, s: 5, t: 5, e: 6, d: 8}
    operands = ((k, t, e), (t, s), (e, d))
    steps, found = order(operands, tuple(sizes.items()), (k, s, d))
    first = 2 * 40 * 5 * 6 * 5
    assert found == first + 2 * 40 * 5 * 6 * 8 and steps[0][:2] == (0, 1)
    many = ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5))
    wide = {0: 3, 1: 50, 2: 3, 3: 50, 4: 3, 5: 50}
    best = order(many, tuple(wide.items()), (0, 5))[1]
    assert best == 2 * (3 * 50 * 3 + 3 * 50 * 3 + 3 * 3 * 3 + 3 * 3 * 50)
