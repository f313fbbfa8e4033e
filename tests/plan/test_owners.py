"""The proof that samples stay apart where rows are picked by index: sound for every op, and complete for routing."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import ALL
from common import MODES, Square
from routing import ORDER, ROUTED, W6, D, N, inverse, write
from test_ops import F64, ids, truth

import jactri
from jactri._src.calls import api, divergence, gram
from jactri._src.parameters import recorded
from jactri._src.plan import owners
from jactri._src.read.graph import UnsupportedGraph
from jactri._src.read.reading import read
from jactri._src.tools import report

MAIN = [case for case in ALL if not case.variant]


def graph_of(func, inputs):
    xs = tuple(x.detach().requires_grad_() for x in inputs)
    ys = func(*xs)
    return read(ys if isinstance(ys, tuple) else (ys,), xs)


def entries(shape, start, total):
    """The intervals of a value every entry of which is a sample of its own: of ``total``, from number ``start``."""
    n = torch.Size(shape).numel()
    index = torch.arange(start, start + n, dtype=torch.int32)
    return torch.stack([index + 1, total - index]).view(2, *shape)


def bounds(t, total):
    """The first and the last entry that each may depend on."""
    return (total - t[1]).flatten(), (t[0] - 1).flatten()


@pytest.mark.parametrize("case", MAIN, ids=ids(MAIN))
def test_no_dependence_lies_outside(case):
    func, inputs = case.build(F64)
    with torch.random.fork_rng():
        try:
            graph = graph_of(func, inputs)
        except UnsupportedGraph:
            return
    want = truth(case)
    sides = graph.inputs, graph.outputs
    for reverse, values in itertools.product((False, True), repeat=2):
        ends, targets = sides[::-1] if reverse else sides
        starts, first, total = {}, {}, 0
        for v in ends:
            if v is not None and v not in starts:
                first[v] = total
                total += torch.Size(graph.values[v].shape).numel()
        for v in first:
            starts[v] = entries(graph.values[v].shape, first[v], total)
        if not starts:
            continue
        found = owners.follow(graph, starts, targets, reverse, values)
        for k, end in enumerate(ends):
            for i, target in enumerate(targets):
                if end is None or target is None:
                    continue
                j = want[k][i] if reverse else want[i][k]
                rows = torch.Size(graph.values[target].shape).numel()
                j = j.reshape(-1, rows).T if reverse else j.reshape(rows, -1)
                if target not in found:
                    assert not j.any()
                    continue
                low, high = bounds(found[target], total)
                place = first[end] + torch.arange(j.shape[1])
                outside = (place < low[:, None]) | (place > high[:, None])
                assert not ((j != 0) & outside).any()


def inputs():
    g = torch.Generator().manual_seed(3)
    return torch.randn(N, D, generator=g, dtype=F64)


def own_blocks(func, x):
    """The blocks of each sample of the whole Jacobian by autograd, the others of which are zero."""
    full = torch.autograd.functional.jacobian(func, x)
    full = full.movedim(full.dim() - x.dim(), 1)
    for k in range(len(x)):
        assert not full[k, torch.arange(len(x)) != k].any()
    return torch.stack([full[k, k] for k in range(len(x))])


@pytest.fixture
def no_probe(monkeypatch):
    def called(*_, **__):
        raise AssertionError("samples were probed")

    for module in (api, gram, divergence, report, recorded):
        for name in ("prove_by_probe", "probe_mixing"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, called)


@pytest.mark.parametrize("name", ROUTED)
def test_rows_keep_their_owner(name, no_probe):
    x = inputs()

    def func(x):
        return ROUTED[name](x, ORDER)

    want = own_blocks(func, x)
    for mode in MODES:
        got = jactri.jacobian(func, x, per_sample=True, strategy=mode)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jactri.gradient(func, x), want, rtol=1e-12, atol=1e-12)


OTHERS = {
    "rows by inverse": lambda x, i, j: (x[i] @ W6).sin()[inverse(j)],
    "added back": lambda x, i, j: torch.zeros_like(x).index_add(0, j, x[i].sin()),
    "added to all": lambda x, i, j: x.index_add(0, j, x[i].sin()),
    "copied back": lambda x, i, j: torch.zeros_like(x).index_copy(0, j, x[i].sin()),
    "scattered back": lambda x, i, j: x.scatter_add(0, j[:, None].expand(N, D), x[i].tanh()),
    "put back": lambda x, i, j: write(x.cos(), j, x[i].sin()),
    "where": lambda x, i, j: torch.where((i == j)[:, None], x.sin(), x.flip(0)),
    "dispatched by products": lambda x, i, j: (
        F.one_hot(j, N).to(F64).T @ (F.one_hot(i, N).to(F64) @ x)
    ).sin(),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_every_call_proves_anew(name):
    """The graphs of both calls are alike, and so are their plans."""
    x, func, other = inputs(), OTHERS[name], ORDER[[1, 0, 2, 3]]
    want = own_blocks(lambda x: func(x, ORDER, ORDER), x)
    for _ in range(2):
        got = jactri.jacobian(lambda x: func(x, ORDER, ORDER), x, per_sample=True)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        for call in (jactri.jacobian, jactri.jtj, jactri.jjt, jactri.explain):
            with pytest.raises(RuntimeError, match="samples mix"):
                call(lambda x: func(x, ORDER, other), x, per_sample=True)
        for call in (jactri.gradient, jactri.laplacian, jactri.divergence):
            with pytest.raises(RuntimeError, match="samples mix"):
                call(lambda x: func(x, ORDER, other), x)


AWAY = torch.tensor([[0, 2, 1], [1, 1, 2], [2, 0, 0]])
"""Rows that the first column leaves in place, and the others do not."""


@pytest.mark.parametrize(
    "func",
    [
        lambda x: x.gather(0, AWAY),
        lambda x: torch.zeros_like(x).scatter_add(0, AWAY, x.sin()),
        lambda x: x.square().take(3 * AWAY + torch.arange(3)),
        lambda x: x.flatten()[3 * AWAY + torch.arange(3)],
        lambda x: x.scatter(0, AWAY, x.square()),
        lambda x: torch.zeros_like(x).index_put((AWAY, torch.arange(3)), x, accumulate=True),
    ],
    ids=["gather", "scatter_add", "take", "index", "scatter", "index_put"],
)
def test_rows_that_move_in_some_columns_only(func):
    x = torch.randn(3, 3, dtype=F64)
    for call in (
        lambda: jactri.jacobian(func, x, per_sample=True),
        lambda: jactri.laplacian(func, x),
        lambda: jactri.divergence(func, x),
    ):
        with pytest.raises(RuntimeError, match="samples mix"):
            call()


def test_zero_here_and_not_beside():
    """Apart to first order where the second is not: what differentiates once more refuses."""
    x = torch.zeros(N, 2, dtype=F64)

    for square in (torch.square, Square.apply):

        def func(x, square=square):
            return x.sin() + square(x.flip(0))

        want = torch.eye(2, dtype=F64).expand(N, 2, 2)
        torch.testing.assert_close(jactri.jacobian(func, x, per_sample=True), want)
        with pytest.raises(RuntimeError, match="samples mix"):
            jactri.jacobian(func, x, create_graph=True, per_sample=True)
        with pytest.raises(RuntimeError, match="samples mix"):
            jactri.laplacian(func, x)


def second_order(func, x):
    """The Laplacian of each sample and, of outputs like x, the divergence, by rows of gradients of gradients."""
    leaf = x.clone().requires_grad_()
    y = func(leaf).flatten(1)
    lap = torch.zeros_like(y)
    for o in range(y.shape[1]):
        (g,) = torch.autograd.grad(y[:, o].sum(), leaf, create_graph=True)
        for i in range(D):
            if g.requires_grad:
                row = torch.autograd.grad(g[:, i].sum(), leaf, retain_graph=True, allow_unused=True)
                lap[:, o] += 0 if row[0] is None else row[0][:, i]
    return lap.detach()


OPAQUE = {"attention in blocks", "packed attention", "packed attention, added", "index_reduce"}
"""Whose second derivatives are shown to be apart by a probe only."""


@pytest.mark.parametrize("name", [n for n in ROUTED if n not in OPAQUE])
def test_second_order_of_routed_rows(name, no_probe):
    x = inputs()

    def func(x):
        return ROUTED[name](x, ORDER)

    want = second_order(func, x)
    for options in ({}, {"chunk_size": 2}, {"create_graph": True}):
        got = jactri.laplacian(func, x, **options).reshape(want.shape)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    first = own_blocks(func, x).flatten(1, -2)
    for call, sizes in ((jactri.jtj, "nai,naj->nij"), (jactri.jjt, "nai,nbi->nab")):
        got = call(func, x, per_sample=True)
        want = torch.einsum(sizes, first, first)
        torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-11, atol=1e-11)
    if first.shape[1] == D:
        want = first.diagonal(0, 1, 2).sum(1)
        torch.testing.assert_close(jactri.divergence(func, x), want, rtol=1e-11, atol=1e-11)


class Experts(torch.nn.Module):
    """A mixture of experts over the tokens of all samples, which may be numbers of words."""

    def __init__(self, words=None):
        super().__init__()
        self.words = None if words is None else torch.nn.Embedding(words, 3)
        self.gate = torch.nn.Linear(3, 2)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))
        self.read = torch.nn.Linear(3, 2)

    def forward(self, x, leak=0):
        tokens = (x if self.words is None else self.words(x)).reshape(-1, 3)
        share, which = self.gate(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            rows = (which == e).nonzero().squeeze(1)
            out = out.index_add(0, rows, expert(tokens[(rows + leak) % len(tokens)]).tanh())
        return self.read(out * share[:, None]).reshape(len(x), -1, 2).sum(1)


@pytest.mark.parametrize("words", [None, 7])
def test_parameters_of_experts(words, no_probe):
    torch.manual_seed(0)
    net = Experts(words).double()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, 2, 3, generator=g, dtype=F64)
    if words is not None:
        x = torch.randint(0, words, (N, 2), generator=g)
    y = net(x).flatten()
    want = {}
    for name, p in net.named_parameters():
        rows = [torch.autograd.grad(e, p, retain_graph=True)[0] for e in y.unbind()]
        want[name] = torch.stack(rows).reshape(N, 2, *p.shape)
    flat = torch.cat([j.reshape(N * 2, -1) for j in want.values()], 1)
    kernel = (flat @ flat.T).reshape(N, 2, N, 2).transpose(1, 2)
    for _ in range(2):
        jac = jactri.parameter_jacobian(net, x)
        torch.testing.assert_close(jac.dense(), want, rtol=1e-12, atol=1e-12)
        got = jactri.empirical_ntk(net, x)
        torch.testing.assert_close(got, kernel, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("words", [None, 7])
def test_experts_that_mix_are_refused(words):
    torch.manual_seed(0)
    net = Experts(words).double()
    x = torch.randn(N, 2, 3, dtype=F64) if words is None else torch.arange(8).reshape(N, 2) % words
    whole = net.forward
    for _ in range(2):
        jactri.parameter_jacobian(net, x)
        net.forward = lambda x: whole(x, leak=3)
        with pytest.raises(RuntimeError, match="samples mix"):
            jactri.parameter_jacobian(net, x)
        net.forward = whole


def test_experts_by_grouped_products(no_probe):
    """Tokens in the order of their experts, whose numbers change from call to call."""
    w = torch.stack([W6[:4, :4], W6[2:, 2:], W6[1:5, 1:5]])
    g = torch.Generator().manual_seed(5)

    def product(rows, ends):
        if rows.dtype == torch.float32:
            return torch._grouped_mm(rows, w.float(), offs=ends)
        ends = [0, *ends.tolist()]
        return torch.cat([rows[i:j] @ w[e] for e, (i, j) in enumerate(itertools.pairwise(ends))])

    for _ in range(3):
        gate = torch.randn(4, 3, generator=g, dtype=F64)

        def func(x, gate=gate):
            tokens = x.reshape(-1, 4)
            share, expert = (tokens @ gate.to(x.dtype)).softmax(-1).max(-1)
            order = expert.argsort(stable=True)
            ends = expert.bincount(minlength=3).cumsum(0).int()
            made = product(tokens[order], ends).tanh() * share[order, None]
            return torch.zeros_like(tokens).index_copy(0, order, made).reshape(x.shape)

        x = torch.randn(3, 8, generator=g, dtype=F64)
        with jactri.fallback("error"):
            got = jactri.jacobian(func, x.float(), per_sample=True)
            lap = jactri.laplacian(func, x.float())
        torch.testing.assert_close(got.double(), own_blocks(func, x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lap.double(), jactri.laplacian(func, x), rtol=1e-4, atol=1e-4)


def test_a_compiled_call_proves_anew():
    def func(x):
        i, j = x[:, 0].argsort(), x[:, 1].argsort()
        return torch.zeros_like(x).index_add(0, j, (x[i] @ W6).sin())

    x = torch.arange(N * D).reshape(N, D).flip(0).to(F64) / 10
    compiled = jactri.compile(func, x, per_sample=True, engine="fx")
    moved = x.roll(1, 0)
    torch.testing.assert_close(compiled(moved), own_blocks(func, moved))
    assert compiled.graph is None  # who owns a row is a value
    mixing = x.clone()
    mixing[-1, 1] = 100
    for _ in range(2):
        with pytest.raises(RuntimeError, match="samples mix"):
            compiled(mixing)
    torch.testing.assert_close(compiled(x), own_blocks(func, x))
