"""Ranges of samples: what is computed for a part of the batch is that part of what is computed for all."""

import pytest
import torch
from cases import ALL

import jactri
from jactri._src.base.constants import halves, halvings
from jactri._src.calls import api
from jactri._src.plan import planning
from jactri._src.plan.planner import make_plan
from jactri._src.plan.samples import narrow, places, probe_mixing
from jactri._src.read.reading import read

SAMPLED = [
    c
    for c in ALL
    if c.samples == tuple(range(len(c.inputs)))
    and c.inputs[0].shape[0] > 1
    and c.poison
    and not c.variant
]


def prepared(case):
    func, inputs = case.build(frozen=True)
    xs = tuple(x.detach().requires_grad_() for x in inputs)
    ys = func(*xs)
    return (ys if isinstance(ys, tuple) else (ys,)), xs


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
@pytest.mark.parametrize("case", SAMPLED, ids=repr)
def test_cut_graphs_give_the_blocks_of_their_samples(case, strategy, monkeypatch):
    ys, xs = prepared(case)
    with torch.no_grad():
        try:
            graph = read(ys, xs)
        except api.UnsupportedGraph:
            return  # computed as a whole
        if not any(v is not None for v in graph.inputs) or not any(
            v is not None for v in graph.outputs
        ):
            return  # nothing depends on anything: zeros
        where = places(graph, make_plan(graph, strategy).sweeps)
        n = xs[0].shape[0]
        part = None if where is None else narrow(graph, where, 0, 1)
        if part is None:
            return  # some op is opaque: a memory limit must be refused, not answered wrongly
        # jacobian_of refuses what no output depends on
        xs = tuple(x for x, v in zip(xs, graph.inputs, strict=True) if v is not None)
        whole = jactri.jacobian_of(ys, xs, per_sample=True, strategy=strategy)
        cuts = []

        def too_small_for_all(graph, ys, xs, wanted, real=api.plan_for):
            if wanted.budget.given is None:  # the proof that samples do not mix
                return real(graph, ys, xs, wanted)
            size = graph.values[next(v for v in graph.inputs if v is not None)].shape[0]
            if size > max(1, n // 2):
                raise api.MemoryLimitTooSmall("forced by a test", 0.0)
            cuts.append(size)
            return real(graph, ys, xs, wanted)

        for module in (api, planning):
            monkeypatch.setattr(module, "plan_for", too_small_for_all)
        pieces = jactri.jacobian_of(ys, xs, per_sample=True, strategy=strategy, memory_limit="1GB")
    assert sum(cuts) == n and len(cuts) > 1
    for row, want_row in zip(pieces, whole, strict=True):
        for got, want in zip(row, want_row, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11, equal_nan=True)


def test_most_cases_can_be_cut():
    cut = 0
    for case in SAMPLED:
        ys, xs = prepared(case)
        try:
            graph = read(ys, xs)
        except api.UnsupportedGraph:
            continue
        where = places(graph, make_plan(graph).sweeps)
        cut += where is not None and narrow(graph, where, 0, 1) is not None
    assert cut > 0.8 * len(SAMPLED)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 33, 128, 129])
def test_every_two_samples_are_told_apart(n):
    masks = halves(n, "cpu").tolist()
    assert len(masks) == halvings(n)
    assert len(masks) <= {1: 0, 2: 2, 8: 5, 128: 10, 129: 12}.get(n, 12)
    for i in range(n):
        for j in range(n):
            if i != j:
                assert any(m[i] and not m[j] for m in masks)


@pytest.mark.parametrize("n", [2, 5, 16])
def test_the_probe_finds_a_single_leak(n):
    for a, b in [(0, 1), (1, 0), (n - 1, 0), (n // 2, n - 1)]:
        x = torch.randn(n, 3, requires_grad=True)
        leak = torch.zeros(n, 3).index_put((torch.tensor([a]), torch.tensor([1])), x[b, 2])
        y = x.sin() + (a != b) * 1e-9 * leak
        graph = read((y,), (x,))  # several masks at once, in place of autograd's pass for each
        found = probe_mixing((y,), (x,))
        assert probe_mixing((y,), (x,), graph) == found
        assert (found is not None) == (a != b)
        if found is not None:
            assert found.sample == b
            assert 1e-10 < found.size < 1e-8
