"""Every op of the table with seeds coloured wherever fewer will do, and in the sparse forms."""

import pytest
import torch
from cases import ALL, indexing, layers, rare, views
from test_ops import F64, compare, ids, jacobian_rows, truth

import jactri
from jactri._src.base.cache import Cache
from jactri._src.plan import colours, planner, planning, supports
from jactri._src.read.graph import UnsupportedGraph
from jactri._src.read.reading import read

MAIN = [case for case in ALL if not case.variant]


@pytest.fixture(autouse=True)
def _always_coloured(monkeypatch):
    for module in (colours, planner):
        monkeypatch.setattr(module, "WORTH", 1.0)
    monkeypatch.setattr(planning, "_plans", Cache())
    monkeypatch.setattr(planning, "_sparse", Cache())


@pytest.mark.parametrize("case", MAIN, ids=ids(MAIN))
def test_coloured(case):
    for mode in ("forward-mode", "reverse-mode"):
        func, inputs = case.build(F64)
        compare(case, jacobian_rows(case, func, inputs, strategy=mode), F64, what=mode)


def blocks(rows):
    return [block for row in rows for block in row]


def check_the_pattern(func, inputs, want):
    """It holds all that is not zero, where one is known."""
    try:
        masks = jactri.sparsity(func, inputs)
    except ValueError as error:
        if "of which no pattern is known" not in str(error):
            raise
        return
    masks = masks if isinstance(masks[0], tuple) else (masks,)
    for mask, block in zip(blocks(masks), blocks(want), strict=True):
        assert mask.shape == block.shape
        if mask.numel():
            assert not ((block != 0) & ~mask.to_dense()).any()


def by_index(graph):
    """Whether an op picks, moves or writes over entries."""
    shapes = [v.shape for v in graph.values]
    return all(0 not in shape for shape in shapes) and any(
        edge.links(shapes[s], v.shape) is not None for v in graph.values for s, edge in v.sources
    )


MOVING = [
    case for case in MAIN if case in (*indexing.CASES, *views.CASES, *layers.CASES, *rare.CASES)
]


@pytest.mark.parametrize("case", MOVING, ids=ids(MOVING))
def test_entries_in_flat_order_hold_the_support(case):
    """Of functions that move entries, whatever the product by axes is."""
    func, inputs = case.build(F64)
    xs = [x.requires_grad_() for x in (inputs if isinstance(inputs, tuple) else (inputs,))]
    ys = func(*xs)
    ys = ys if isinstance(ys, tuple) else (ys,)
    if any(y.is_complex() for y in ys):
        return
    try:
        graph = read(ys, xs)
    except UnsupportedGraph:
        return
    if not by_index(graph):
        return
    for row, end in zip(truth(case), graph.outputs, strict=True):
        for want, v in zip(row, graph.inputs, strict=True):
            trace = None if v is None else supports.Trace(graph, v, True)
            if trace is not None and end in trace.values:
                found = trace.flat(end).dense()
                assert not ((want.reshape(found.shape) != 0).numpy() & ~found).any()


@pytest.mark.parametrize("case", MAIN, ids=ids(MAIN))
def test_sparse_or_refused(case):
    """The pattern, and what is computed by it."""
    want = truth(case)
    check_the_pattern(*case.build(F64), want)
    for layout in (torch.sparse_coo, "banded"):  # test_sparse.py: rows are those of coordinates
        func, inputs = case.build(F64)
        try:
            rows = jacobian_rows(case, func, inputs, layout=layout)
        except ValueError as error:
            if "layout=torch.strided" not in str(error):
                raise
            continue
        dense = tuple(
            tuple(b.to_dense().reshape(t.shape) for b, t in zip(row, true, strict=True))
            for row, true in zip(rows, want, strict=True)
        )
        compare(case, dense, F64, what=str(layout))
