"""Patterns of what is picked by index and worked on row by row: exact, and followed once for all rows."""

import pytest
import torch

import jactri
from jactri._src.plan import alike, supports
from jactri._src.plan.supports import Trace
from jactri._src.read.reading import read

I = torch.tensor([2, 0, 3, 3, 1, 4])
J = torch.tensor([1, 2, 0, 4, 4, 2])


def crossed(a, b):
    return torch.linalg.cross(a, b) * a[..., :1] + b[..., 1:2].square()


FUNCTIONS = {
    "one pick": lambda x: crossed(x[I, :3], x[I, 1:].flip(1))[:, :2].sin(),
    "two picks": lambda x: crossed(x[I, :3], x[J, :3])[:, 1],
    "a pick of what was picked": lambda x: (x[I] * x[I, :1])[J][:, [3, 0]],
    "added to others": lambda x: torch.zeros(5, 2, dtype=x.dtype).index_add(
        0, J, x[I][:, 1:3] * x[J][:, :1]
    ),
    "rows last": lambda x: torch.stack([x[I, 0] * x[J, 1], x[I, 2].exp()]),
    "pairs of rows": lambda x: (x[I].view(3, 8)[:, 1:6:2] * x[I].view(3, 8)[:, :1]).cumsum(1),
    "one row": lambda x: x[I[:1]][:, 1:].prod(1),
    "no row among others": lambda x: torch.cat([x[I[:0], 1:].exp(), x[J, 1:]]).square(),
    "masked": lambda x: torch.where(torch.tensor([True, False, True, True]), x[I], x[J])[
        :, 1:
    ].sin(),
}


def at(*shape):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1


def followed(func, x):
    """What each entry sees, in flat order."""
    x = x.clone().requires_grad_()
    graph = read((func(x),), (x,))
    return Trace(graph, graph.inputs[0], True).flat(graph.outputs[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_patterns_are_those_of_each_row(name, monkeypatch):
    func, x = FUNCTIONS[name], at(5, 4)
    found = followed(func, x)
    truth = torch.autograd.functional.jacobian(func, x)
    assert not (truth.reshape(found.shape).numpy() != 0)[~found.dense()].any()
    sparse = jactri.jacobian(func, x, layout=torch.sparse_coo)
    assert torch.allclose(sparse.to_dense(), truth, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(supports, "leading", lambda *ends: (1, frozenset()))
    assert found.same(followed(func, x))  # which follows every row by itself


def test_rows_are_followed_once(monkeypatch):
    """After the pick, no union lists more than one row has."""
    unions, union = [], alike.union
    monkeypatch.setattr(alike, "union", lambda parts: unions.append(parts) or union(parts))
    index = torch.arange(150).remainder(7)

    def func(x):
        rows = x[index]
        a, b = rows[:, :3], rows[:, 3:6]
        return crossed(torch.linalg.cross(a, b), b)[:, :2] * rows[:, 6:]

    found = followed(func, at(7, 7))
    assert found.nnz == 150 * 2 * 7
    assert len(unions) > 4 and max(p.nnz for parts in unions for p in parts) <= 49
