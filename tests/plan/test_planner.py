"""The planner by tables: known networks with known structure, direction and cost; plans hold no tensor."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

import jactri
from jactri._src.base.cache import Cache
from jactri._src.base.rates import Rates, measured
from jactri._src.meet import diagonal, gram
from jactri._src.parameters import recorded
from jactri._src.plan import planning
from jactri._src.plan.needs import peak_bytes
from jactri._src.plan.planner import make_plan
from jactri._src.read.reading import read
from jactri._src.second import forward


def graph_of(func, *shapes):
    xs = [torch.randn(s, requires_grad=True) for s in shapes]
    y = func(*xs)
    ys = y if isinstance(y, tuple) else (y,)
    return read(ys, xs)


def mlp(*widths, act=nn.Tanh):
    layers = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), act()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(
    ("widths", "direction"),
    [
        ((64, 32, 32, 2), "reverse-mode"),
        ((2, 32, 32, 64), "forward-mode"),
        ((128, 64, 1), "reverse-mode"),
        ((1, 64, 128), "forward-mode"),
    ],
)
def test_auto_takes_the_side_with_fewer_seeds(widths, direction):
    plan = make_plan(graph_of(mlp(*widths), (16, widths[0])))
    assert plan.reverse == (direction == "reverse-mode")
    assert plan.seconds[direction] == min(plan.seconds.values())


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_auto_is_never_predicted_worse(strategy):
    for widths in [(5, 9, 3), (3, 30, 30, 4), (7, 7, 7)]:
        graph = graph_of(mlp(*widths), (4, widths[0]))
        asked = make_plan(graph, strategy)
        auto = make_plan(graph)
        assert min(auto.seconds.values()) <= asked.seconds[strategy]


def test_one_direction_of_a_long_graph_will_do():
    """Its steps are what it costs, and any other has as many; not so where the first is dear, or does not fit."""

    def steps(count):
        def func(x):
            for k in range(count):
                x = torch.sin(x) * (k + 1)
            return x

        return func

    assert list(make_plan(graph_of(steps(300), (2, 3))).seconds) == ["reverse-mode"]
    assert len(make_plan(graph_of(steps(20), (2, 3))).seconds) == 2
    graph = graph_of(lambda x: steps(300)(x).sum(0) @ torch.randn(3, 2000), (2, 3))
    assert make_plan(graph).strategy == "forward-mode"
    needed = make_plan(graph, "forward-mode").peak
    assert make_plan(graph, limit=2 * needed).strategy == "forward-mode"
    assert make_plan(graph_of(steps(300), (2, 3)), "forward-mode").strategy == "forward-mode"


def test_flops_are_those_of_the_structured_chain():
    # 32-256-256-32 by rows: the last layer is free, two products of (N * 32) rows, two scalings
    n, k, h = 16, 32, 256
    plan = make_plan(graph_of(mlp(k, h, h, k), (n, k)), "reverse-mode")
    products = 2 * n * k * h * h + 2 * n * k * h * k
    assert products <= plan.flops <= 1.02 * products


def test_samples_cost_n_blocks_and_not_n_squared():
    net = mlp(8, 16, 16, 8)
    one = make_plan(graph_of(net, (1, 8)), "reverse-mode")
    many = make_plan(graph_of(net, (64, 8)), "reverse-mode")
    assert many.flops == 64 * one.flops


def test_elementwise_functions_stay_diagonal():
    plan = make_plan(graph_of(lambda x: torch.tanh(x).exp().sin(), (50, 40)))
    assert all(step.layout.columns == 1 for step in plan.sweeps[0].steps)
    assert plan.bytes <= 3 * 50 * 40 * 4


def test_tokens_stay_apart_through_a_token_wise_mlp():
    net = mlp(8, 32, 8)
    (sweep,) = make_plan(graph_of(lambda x: x + net(x), (2, 5, 8))).sweeps
    (target,) = [t for t in sweep.targets if t is not None]
    assert sweep.layouts[target].columns == 8


def test_a_plan_holds_no_tensor():
    def walk(thing, seen):
        if id(thing) in seen:
            return
        seen.add(id(thing))
        assert not isinstance(thing, torch.Tensor)
        if isinstance(thing, dict):
            items = [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set, frozenset)):
            items = list(thing)
        elif dataclasses.is_dataclass(thing):
            items = [getattr(thing, f.name) for f in dataclasses.fields(thing)]
        else:
            assert isinstance(thing, (int, float, str, bool, type(None))), type(thing)
            return
        for item in items:
            walk(item, seen)

    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    walk(make_plan(graph_of(net, (3, 1, 8, 8)), chunk_size=2), set())


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_chunks_cover_every_seed_once(chunk):
    graph = graph_of(mlp(6, 9, 10), (3, 6))
    for strategy, seeds in (("reverse-mode", 10), ("forward-mode", 6)):
        (sweep,) = make_plan(graph, strategy, chunk_size=chunk).sweeps
        if not sweep.chunks:
            assert chunk >= seeds
            continue
        (factor,) = sweep.chunks
        ranges = [sel[factor] for sel in sweep.selections()]
        covered = [i for start, length in ranges for i in range(start, start + length)]
        assert covered == list(range(seeds))
        assert max(length for _, length in ranges) <= chunk


def test_a_smaller_limit_gives_more_chunks_and_a_smaller_peak():
    graph = graph_of(mlp(64, 128, 128, 100), (32, 64))
    (free,) = make_plan(graph, "reverse-mode", device="cuda").sweeps
    whole = peak_bytes(graph, free, {})
    for share in (2, 4, 16):
        (sweep,) = make_plan(graph, "reverse-mode", limit=whole / share, device="cuda").sweeps
        assert sweep.peak <= whole / share
        assert len(sweep.selections()) >= share


def test_an_impossible_limit_says_what_is_needed():
    graph = graph_of(mlp(64, 128, 100), (32, 64))
    with pytest.raises(ValueError, match=r"takes \d+ bytes of 100"):
        make_plan(graph, limit=100)


def test_equal_graphs_have_equal_keys_and_others_do_not():
    net = mlp(5, 6, 7)
    key = graph_of(net, (3, 5)).key
    assert key == graph_of(net, (3, 5)).key
    assert key != graph_of(net, (4, 5)).key
    assert key != graph_of(mlp(5, 6, 7, act=nn.ReLU), (3, 5)).key
    turned = [graph_of(lambda x, d=d: x.sum(d).exp(), (4, 4)).key for d in (0, 1)]
    assert turned[0] != turned[1]


def test_replanning_after_a_change_of_the_function_is_never_stale():
    # control flow, not a cached trace: the same shapes, another computation
    def f(x):
        return x.exp() if x.sum() > 0 else x.sin()

    for x in (torch.ones(3), -torch.ones(3), torch.ones(3)):
        want = torch.diag(x.exp() if x.sum() > 0 else x.cos())
        torch.testing.assert_close(jactri.jacobian(f, x), want)


def test_rates_of_the_device_decide():
    # few flops and many bytes one way, the reverse the other
    graph = graph_of(mlp(300, 100, 30), (64, 300))
    slow_memory = make_plan(graph, rates=Rates(1e15, 1e6, 0.0))
    slow_products = make_plan(graph, rates=Rates(1e6, 1e15, 0.0))
    for plan, of in ((slow_memory, "bytes"), (slow_products, "flops")):
        least = min(
            getattr(make_plan(graph, s), of) for s in ("forward-mode", "reverse-mode", "mixed")
        )
        assert getattr(plan, of) <= 1.001 * least


def test_rates_are_measured_once_and_plausible():
    found = measured(torch.device("cpu"))
    assert found is measured(torch.device("cpu"))
    assert 1e8 < found.flops < 1e14 and 1e7 < found.bandwidth < 1e13 and 0 < found.step < 1e-2


def test_nothing_of_a_plan_changes_by_running_it(monkeypatch):
    """What is remembered is a value: a call that finds it runs what the first one ran."""
    conv = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 3)).double()
    net, x = mlp(6, 8, 2, 8, 6).double(), torch.randn(5, 6, dtype=torch.float64)
    calls = [
        lambda: jactri.jacobian(net, x, chunk_size=2),
        lambda: jactri.jacobian(net, x, per_sample=True, strategy="mixed"),
        lambda: jactri.jacobian(conv, torch.ones(2, 2, 40, dtype=torch.float64)),
        lambda: jactri.jvp(net, x, x),
        lambda: jactri.diagonal(net, x),
        lambda: jactri.jtj(net, x, per_sample=True),
        lambda: jactri.laplacian(net, x),
        lambda: jactri.empirical_ntk(net, x),
    ]
    caches = [
        (planning, "_plans"), (diagonal, "_known"), (diagonal, "_cut_orders"), (gram, "_known"), (gram, "_cut_orders"),
        (forward, "_courses"), (recorded, "_structures"),
    ]  # fmt: skip
    for module, name in caches:
        monkeypatch.setattr(module, name, Cache())
    for call in calls:
        call()
    found = {name: repr(getattr(*name)) for name in caches}
    assert all(len(getattr(*name)) for name in caches)
    for call in calls:
        call()
    assert found == {name: repr(getattr(*name)) for name in caches}


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_steps_that_differ_by_an_index_share_what_is_equal(strategy):
    """A plan of a long graph is kept: it holds every route and every layout once."""
    cell = nn.RNNCell(2, 3)

    def last(x):
        h = x.new_zeros(len(x), 3)
        for k in range(x.shape[1]):
            h = cell(x[:, k], h)
        return h

    (sweep,) = make_plan(graph_of(last, (2, 12, 2)), strategy).sweeps
    routes = [t.route for s in sweep.steps for t in s.terms]
    layouts = [*sweep.layouts.values(), *(at for r in routes for at in (r.mid, r.out))]
    assert len(routes) > 48
    for parts in (routes, layouts):
        assert len({id(p) for p in parts}) == len(set(parts))
