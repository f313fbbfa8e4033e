"""Mixed mode: the order of accumulation against textbook optima and brute force, and its Jacobians against float64."""

import itertools
import random

import pytest
import torch
from common import F64
from tolerances import assert_close
from torch import nn

import jactri
from jactri._src.base.rates import Rates, rough
from jactri._src.plan import mixed
from jactri._src.plan.needs import Asked
from jactri._src.plan.planner import make_plan, seconds
from jactri._src.plan.sweep import follow
from jactri._src.read.reading import read

FLOPS_ONLY = Rates(1.0, float("inf"), 0.0)
"""Rates under which the predicted seconds are the flops."""


def graph_of(func, *shapes):
    xs = [torch.randn(s, requires_grad=True) for s in shapes]
    y = func(*xs)
    return read(y if isinstance(y, tuple) else (y,), xs)


def mlp(*widths, act=nn.Tanh, bias=True):
    layers = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o, bias=bias), act()]
    return nn.Sequential(*layers[:-1])


def textbook(widths) -> int:
    """Multiply-adds of the cheapest order of a product of matrices (Cormen et al., Introduction to Algorithms)."""
    n = len(widths) - 1
    cost = {(i, i + 1): 0 for i in range(n)}
    for span in range(2, n + 1):
        for i in range(n - span + 1):
            j = i + span
            cost[i, j] = min(
                cost[i, k] + cost[k, j] + widths[i] * widths[k] * widths[j] for k in range(i + 1, j)
            )
    return cost[0, n]


def product_flops(graph, plan) -> float:
    """The flops of a plan without its scalings."""
    total = 0.0
    for sweep in (*plan.parts, *plan.sweeps):
        if isinstance(sweep, mixed.Join):
            total += sweep.flops
            continue
        for step in sweep.steps:
            t = step.terms[0]
            if graph.values[t.owner].sources[t.edge][1].name == "matmul" and t.route.axis is None:
                total += step.flops
    return total


KNOWN = [
    # widths, strategy, where the products meet
    ((784, 256, 32, 256, 784), "mixed", [32]),
    ((64, 48, 4, 48, 64), "mixed", [4]),
    ((100, 5, 100, 7, 100), "mixed", [5, 7]),
    ((50, 60, 70, 4), "reverse-mode", []),
    ((4, 70, 60, 50), "forward-mode", []),
    ((32, 256, 256, 16), "reverse-mode", []),
]


@pytest.mark.parametrize(("widths", "strategy", "meets"), KNOWN)
def test_known_chains(widths, strategy, meets):
    n = 8
    graph = graph_of(mlp(*widths), (n, widths[0]))
    plan = make_plan(graph, rates=FLOPS_ONLY)
    assert plan.strategy == strategy
    met = {
        graph.values[s.at].shape[-1]
        for s in (*plan.parts, *plan.sweeps)
        if isinstance(s, mixed.Join)
    }
    assert met <= set(meets) and bool(met) == bool(meets)
    # scalings count in the choice, so that it may be off by as much
    assert product_flops(graph, plan) <= 1.01 * 2 * n * textbook(widths)
    if plan.strategy != "mixed":
        assert product_flops(graph, plan) == 2 * n * textbook(widths)


def test_random_chains_reach_the_textbook_optimum():
    draw = random.Random(0)
    mixes = 0
    for _ in range(60):
        widths = [draw.choice([1, 2, 3, 5, 9, 20, 40, 80]) for _ in range(draw.randint(3, 6))]
        graph = graph_of(mlp(*widths, act=nn.Sigmoid), (3, widths[0]))
        plan = make_plan(graph, rates=FLOPS_ONLY)
        mixes += plan.strategy == "mixed"
        # scalings count too, so another order may win by a few of them
        least, scalings = 2 * 3 * textbook(widths), sum(s.flops for s in plan.parts + plan.sweeps)
        assert (
            product_flops(graph, plan)
            <= least + scalings - product_flops(graph, plan) + 3 * 80 * 80
        )
    assert mixes >= 10


def orders(graph, a, b, levels):
    """Every way to accumulate between two levels, by brute force: its seconds."""
    rates = rough("cpu")
    for reverse in (False, True):
        seeds, ends = (levels[b], levels[a]) if reverse else (levels[a], levels[b])
        made = [follow(graph, s, reverse, list(ends)) for s in seeds]
        yield (
            seconds(made, rates),
            {
                (s.seed, e) if reverse else (e, s.seed): mixed.Partial(s, e)
                for s in made
                for e in ends
                if e in s.targets
            },
        )
    for c in range(a + 1, b):
        for low, below in orders(graph, a, c, levels):
            for high, above in orders(graph, c, b, levels):
                table = mixed._join(
                    graph, mixed.Table(below, [], low, ""), mixed.Table(above, [], high, ""), levels[c][0],
                    lambda s: seconds([s], rates),
                )  # fmt: skip
                yield table.seconds, table.partials


@pytest.mark.parametrize("seed", range(8))
def test_the_dynamic_program_is_as_good_as_brute_force(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    widths = [draw.choice([2, 6, 30, 60]) for _ in range(4)]
    blocks = [mlp(widths[i], draw.choice([4, 20, 50]), widths[i]) for i in range(1, 4)]
    lines = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]

    def residual(x):
        for line, block in zip(lines, blocks, strict=True):
            x = line(x)
            x = x + block(x)
        return x

    graph = graph_of(residual, (4, widths[0]))
    at = sorted(draw.sample(mixed.cuts(graph), 3))
    levels = [graph.inputs, *([v] for v in at), graph.outputs]
    found = mixed.best(graph, at, lambda s: seconds([s], rough("cpu")))
    least = min(t for t, _ in orders(graph, 0, len(levels) - 1, levels))
    assert found.seconds == pytest.approx(least, rel=1e-9)


def test_cuts_are_the_values_that_no_path_avoids():
    lines = [nn.Linear(5, 5) for _ in range(3)]

    def func(x, y):
        a = lines[0](x) + y
        b = torch.tanh(a)  # a and b: every path
        c = lines[1](b)  # avoided by the residual
        d = b + c
        return d.sum(-1), lines[2](d)

    graph = graph_of(func, (2, 5), (2, 5))
    ops = [graph.values[v].op for v in mixed.cuts(graph)]
    assert ops == ["AddBackward0", "TanhBackward0", "AddBackward0"]
    assert mixed.cuts(graph_of(lambda x, y: (x.sin(), y.cos()), (3,), (3,))) == []
    # an input that enters later is not behind a cut
    late = graph_of(lambda x, y: (lines[0](x).tanh() * y).exp(), (2, 5), (2, 5))
    assert [late.values[v].op for v in mixed.cuts(late)] == ["MulBackward0"]


def test_auto_is_never_predicted_worse_than_the_better_direction():
    for widths in [(20, 3, 20), (9, 5, 30, 5, 12), (6, 6, 6), (40, 2, 2, 40)]:
        graph = graph_of(mlp(*widths), (4, widths[0]))
        plan = make_plan(graph)
        assert plan.seconds[plan.strategy] == min(plan.seconds.values())
        assert plan.seconds[plan.strategy] <= min(
            make_plan(graph, s).seconds[s] for s in ("forward-mode", "reverse-mode")
        )


def test_weights_in_a_row_are_multiplied_once_for_all_samples():
    # no activation in between: the product of the first two layers is the same for every sample
    net = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 3))
    graph = graph_of(net, (64, 30))
    plan = make_plan(graph, "forward-mode")
    assert plan.sweeps[0].steps[1].flops == 2 * 30 * 40 * 50
    x = torch.randn(64, 30)
    assert_close(
        jactri.jacobian(net, x, per_sample=True, strategy="forward-mode"),
        torch.func.vmap(torch.func.jacrev(net))(x),
        torch.float32,
        length=50,
    )


class Bottleneck(nn.Module):
    """Conv, attention over tokens, a residual: everything before and after a narrow middle."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(1, 3, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(48, 5)
        )
        self.up = nn.Sequential(nn.Linear(5, 24), nn.Tanh())
        self.out = mlp(6, 9, 6)

    def forward(self, x):
        z = self.down(x).tanh()
        t = self.up(z).view(len(x), 4, 6)
        t = t + nn.functional.scaled_dot_product_attention(t[:, None], t[:, None], t[:, None])[:, 0]
        return t + self.out(t)


def two_ends(x, y):
    z = torch.tanh(x @ torch.full((7, 2), 0.3, dtype=x.dtype) + y.sum(-1, keepdim=True))
    return z.exp() @ torch.ones(2, 8, dtype=x.dtype), torch.sin(z).repeat(1, 6)


def split_by_a_view(x):
    z = x.view(-1, 2, 6).sum(2).tanh().exp()
    return (z.unsqueeze(-1) * torch.ones(6, dtype=x.dtype)).flatten(1)


def mixing_samples(x):
    z = x.view(4, 3, 4).sum(1).tanh()
    return (z - z.mean(0)).repeat(1, 4).sin()


CASES = {
    "autoencoder": (mlp(12, 8, 3, 8, 12), [(5, 12)]),
    "one sample": (mlp(12, 8, 3, 8, 12), [(1, 12)]),
    "no batch axis": (mlp(12, 8, 3, 8, 12), [(12,)]),
    "tokens": (mlp(9, 2, 9, 8), [(3, 4, 9)]),
    "conv and attention": (Bottleneck(), [(2, 1, 8, 8)]),
    "two inputs and outputs": (two_ends, [(4, 7), (4, 9)]),
    "split by a view": (split_by_a_view, [(4, 12)]),
    "two bottlenecks": (mlp(20, 3, 20, 4, 20), [(3, 20)]),
    "weights only": (mlp(12, 3, 15, act=nn.Identity), [(3, 12)]),
    "samples mix": (mixing_samples, [(4, 12)]),
}  # fmt: skip


def problem(name, dtype=F64):
    func, shapes = CASES[name]
    if isinstance(func, nn.Module):
        func = func.to(dtype)
    gen = torch.Generator().manual_seed(0)
    xs = tuple(torch.randn(s, generator=gen, dtype=F64).to(dtype) for s in shapes)
    return func, xs if len(xs) > 1 else xs[0]


def blocks(j):
    return [b for row in j for b in blocks(row)] if isinstance(j, tuple) else [j]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"chunk_size": 1}], ids=str)
def test_mixed_jacobians_are_right(name, options):
    func, xs = problem(name)
    truth = torch.autograd.functional.jacobian(func, xs)
    ours = jactri.jacobian(func, xs, strategy="mixed", **options)
    assert jactri.explain(func, xs, strategy="mixed", **options).direction == "mixed"
    for a, b in zip(blocks(ours), blocks(truth), strict=True):
        assert_close(a, b, F64, length=400)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("samples mix", "no batch axis")])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}], ids=str)
@pytest.mark.parametrize("into", [False, True])
def test_mixed_jacobians_of_samples_are_right(name, options, into):
    func, xs = problem(name)
    truth = jactri.jacobian(func, xs, strategy="reverse-mode", per_sample=True)
    if into:
        options = {**options, "out": _like(truth)}
    ours = jactri.jacobian(func, xs, strategy="mixed", per_sample=True, **options)
    assert jactri.explain(func, xs, strategy="mixed", per_sample=True).direction == "mixed"
    for a, b in zip(blocks(ours), blocks(truth), strict=True):
        assert_close(a, b, F64, length=400)


def _like(j):
    return tuple(_like(b) for b in j) if isinstance(j, tuple) else torch.full_like(j, float("nan"))


def test_out_of_any_strides_is_written():
    func, x = problem("autoencoder")
    truth = jactri.jacobian(func, x, strategy="reverse-mode", per_sample=True)
    for dims in itertools.permutations(range(3)):
        shape = [truth.shape[d] for d in dims]
        out = torch.full(shape, float("nan"), dtype=F64).permute([dims.index(i) for i in range(3)])
        assert jactri.jacobian(func, x, strategy="mixed", per_sample=True, out=out) is out
        assert_close(out, truth, F64, length=400)


@pytest.mark.parametrize("name", ["autoencoder", "two inputs and outputs", "no batch axis"])
def test_mixed_jacobians_can_be_differentiated(name):
    func, xs = problem(name)
    many = xs if isinstance(xs, tuple) else (xs,)

    def gradients(jacobian, **options):
        leaves = tuple(x.clone().requires_grad_() for x in many)
        given = leaves if isinstance(xs, tuple) else leaves[0]
        j = jacobian(func, given, create_graph=True, **options)
        return torch.autograd.grad(sum(b.square().sum() for b in blocks(j)), leaves)

    truth = gradients(torch.autograd.functional.jacobian)
    for a, b in zip(gradients(jactri.jacobian, strategy="mixed"), truth, strict=True):
        assert_close(a, b, F64, length=400)


def test_float32_is_as_good_as_reverse_mode():
    net, x = problem("autoencoder")
    truth = jactri.jacobian(net, x)
    net, x = problem("autoencoder", torch.float32)
    scale = truth.abs().max()
    for strategy in ("mixed", "reverse-mode"):
        error = (jactri.jacobian(net, x, strategy=strategy) - truth).abs().max() / scale
        assert error < 1e-6


@pytest.mark.parametrize(
    "options",
    [{}, {"chunk_size": 7}, {"create_graph": True}, {"per_sample": True}, {"out": True}],
    ids=lambda o: next(iter(o), "plain"),
)
@pytest.mark.parametrize("at", ["input", "net", "output"])
def test_pieces_of_two_dtypes_are_multiplied_in_the_wider(at, options):
    """A cast at one end, or at both, of a bottleneck: blocks of two dtypes meet."""
    torch.manual_seed(0)
    wide, narrow = torch.float32, torch.bfloat16
    net = mlp(48, 24, 2, 24, 48).to(narrow)
    ends = {"input": (wide, narrow), "net": (wide, wide), "output": (narrow, wide)}[at]

    def func(x):
        return net(x.to(narrow)).to(ends[1])

    x = torch.randn(6, 48).to(ends[0])
    rows = torch.autograd.functional.jacobian(net.double(), x.double())
    net.to(narrow)
    if "per_sample" in options:
        rows = rows[torch.arange(6), :, torch.arange(6)]
    if "out" in options:
        options = {"out": torch.empty_like(rows, dtype=ends[0])}
    J = jactri.jacobian(func, x, strategy="mixed", **options)
    assert J.dtype == ends[0]
    assert_close(J, rows, narrow, factor=4)


def test_a_limit_cuts_the_product_and_falls_back():
    net = mlp(40, 30, 3, 30, 40).double()
    x = torch.randn(5, 40, dtype=F64)
    truth = jactri.jacobian(net, x, per_sample=True, strategy="reverse-mode")
    out = torch.empty_like(truth)
    graph, counts = graph_of(net.float(), (5, 40)), []
    net.double()
    for limit in (26_000, 1_000_000):
        plan = make_plan(graph, "mixed", limit=limit, answer=Asked(per_sample=True, given=True))
        (join,) = plan.sweeps
        counts.append(len(join.selections()))
        assert plan.peak <= limit
        out.fill_(float("nan"))
        jactri.jacobian(net, x, per_sample=True, strategy="mixed", memory_limit=2 * limit, out=out)
        assert_close(out, truth, F64, length=400)
    assert counts[0] > 1 == counts[-1]


def test_explain_names_the_alternatives():
    net, x = problem("autoencoder")
    text = str(jactri.explain(net, x, per_sample=True, strategy="mixed"))
    assert "meets at 5x3" in text
    text = str(jactri.explain(net, x, per_sample=True))
    for name in ("mixed", "forward-mode", "reverse-mode"):
        assert name in text.splitlines()[0]
