"""Compiled sparse Jacobians of a pattern that is given: against autograd's rows in float64."""

import pytest
import torch
from tolerances import assert_close
from torch import nn

import jactri
from jactri._src.calls import compressed
from jactri._src.compile import traced

F64 = torch.float64
LAYOUTS = [
    torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, "banded", torch.strided,
]  # fmt: skip
I, J = torch.tensor([0, 3, 3, 1, 6, 2]), torch.tensor([2, 2, 5, 1, 0, 4])


def fluxes(u):
    q = (u[I] - u[J]) ** 3
    return u.index_add(0, I, q).index_add(0, J, q, alpha=-1.0)


def arrowhead(u):
    return torch.cat([(u * u).sum()[None], u[1:] ** 3 + u[0] * u[1:]])


def star(u):
    return u**2 * (u.roll(1, 0) + u.roll(-1, 0) - u.roll(1, 1) * u.roll(-1, 1))


def columns(u):
    """Few colours of columns, many of rows."""
    return torch.cat([u[:1] * u[1:], u[:1].sqrt() * u[1:] ** 3])


CASES = {
    "fluxes": (fluxes, (7,)),
    "arrowhead": (arrowhead, (9,)),
    "star": (star, (5, 4)),
    "columns": (columns, (6,)),
}


def data(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) + 0.2


def rows(func, x):
    return torch.autograd.functional.jacobian(func, x)


@pytest.fixture
def products(monkeypatch):
    """How many products each call made by a pattern."""
    made, real = [], compressed.values
    monkeypatch.setattr(
        compressed, "values", lambda how, *a, **k: made.append(how.products) or real(how, *a, **k)
    )
    return made


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_entries_are_those_of_the_ordinary_call(name, layout):
    func, shape = CASES[name]
    pattern = jactri.sparsity(func, data(shape))
    found = jactri.compile(func, data(shape), layout=layout, pattern=pattern, engine="fx")
    assert found.reason is None and found.traces == 1
    for seed in range(3):
        x = data(shape, seed)
        answer, want = found(x), rows(func, x)
        assert_close(answer.to_dense().reshape(want.shape), want, F64, length=50)
        ordinary = jactri.jacobian(func, x, layout=layout, pattern=pattern)
        assert type(answer) is type(ordinary) and answer.shape == ordinary.shape
        if layout == torch.sparse_csr:
            assert torch.equal(answer.col_indices(), ordinary.col_indices())
        assert found.verify(x) < 1e-12
    assert found.traces == 1


def test_as_many_products_as_the_pattern_takes(products):
    for name, count in (("arrowhead", 3), ("columns", 2)):
        func, shape = CASES[name]
        x = data(shape)
        products.clear()
        found = jactri.compile(
            func, x, layout=torch.sparse_csr, pattern=jactri.sparsity(func, x), engine="fx"
        )
        assert found.reason is None and products == [
            count,
            count,
        ]  # an ordinary call, and the trace
        found(x)
        assert products == [count, count]


def test_where_values_are_not_finite_the_ordinary_call_is_asked(products):
    """Columns make a NaN of 0 times infinity, where autograd's rows have none."""

    def func(u):
        return u[:1].relu().sqrt() * u[1:]

    x = data((5,))
    found = jactri.compile(
        func, x, layout=torch.sparse_csr, pattern=jactri.sparsity(func, x), engine="fx"
    )
    assert found.reason is None
    x[0] = -1.0
    products.clear()
    answer, want = found(x), jactri.jacobian(func, x, layout=torch.sparse_csr)
    assert products and torch.equal(answer.to_dense(), rows(func, x))
    assert torch.equal(answer.to_dense(), want.to_dense()) and answer.to_dense().isfinite().all()


def test_the_index_is_the_callers_own():
    x = data((7,))
    pattern = jactri.sparsity(fluxes, x)
    found = jactri.compile(fluxes, x, layout=torch.sparse_csr, pattern=pattern, engine="fx")
    for call in (found, lambda x: jactri.jacobian(fluxes, x, layout=torch.sparse_csr)):
        for part in ("col_indices", "crow_indices"):
            getattr(call(x), part)().zero_()
        assert_close(call(x).to_dense(), rows(fluxes, x), F64, length=50)


def test_the_index_of_one_sample_is_the_callers_own():
    def each(u):
        return u * u.roll(1, 1)

    x = data((1, 5))
    for _ in range(2):
        answer = jactri.jacobian(each, x, layout=torch.sparse_csr, per_sample=True)
        want = rows(each, x).reshape(1, 5, 5)
        assert_close(answer.to_dense(), want, F64, length=5)
        answer.col_indices().zero_()


def test_weights_are_looked_up_and_samples_stay_apart():
    net = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv1d(2, 1, 3)).double()
    x = data((3, 1, 8))
    pattern = jactri.sparsity(net, x, per_sample=True)
    found = jactri.compile(
        net,
        x,
        per_sample=True,
        return_output=True,
        layout=torch.sparse_csr,
        pattern=pattern,
        engine="fx",
    )
    with torch.no_grad():
        net[2].weight.mul_(2.0)
    y, answer = found(x)
    want = jactri.jacobian(net, x, per_sample=True)
    assert found.reason is None and torch.equal(y, net(x))
    assert answer.shape == (3, 6, 8)
    assert_close(answer.to_dense(), want.reshape(3, 6, 8), F64, length=20)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_samples(layout):
    pattern = jactri.sparsity(arrowhead, data((5,)))
    each = lambda u: torch.cat([u.square().sum(1, True), u[:, 1:] ** 3 + u[:, :1] * u[:, 1:]], 1)  # noqa: E731
    for n in (0, 1):
        x = data((n, 5))
        asked = {"per_sample": True, "layout": layout, "pattern": pattern}
        found, want = jactri.compile(each, x, **asked, engine="fx")(x), jactri.jacobian(each, x, **asked)  # fmt: skip
        assert type(found) is type(want)
        found, want = (J if layout is torch.strided else J.to_dense() for J in (found, want))
        torch.testing.assert_close(found, want)


def test_several_inputs_and_outputs():
    def both(u, v):
        return u * v.roll(1), v[1:] ** 2

    xs = data((5,)), data((5,), 1)
    pattern = jactri.sparsity(both, xs)
    found = jactri.compile(both, *xs, layout=torch.sparse_coo, pattern=pattern, engine="fx")
    assert found.reason is None
    for row, want in zip(found(*xs), rows(both, xs), strict=True):
        for block, dense in zip(row, want, strict=True):
            assert_close(block.to_dense(), dense, F64, length=5)


def test_the_values_can_be_differentiated():
    weight = torch.tensor(1.5, dtype=F64, requires_grad=True)

    def func(u):
        return weight * u * u.roll(1)

    x = data((6,))
    pattern = jactri.sparsity(func, x)
    found = jactri.compile(
        func, x, create_graph=True, layout=torch.sparse_csr, pattern=pattern, engine="fx"
    )
    assert found.reason is None
    got, want = (
        torch.autograd.grad(J.values().square().sum(), weight)[0]
        for J in (found(x), jactri.jacobian(func, x, create_graph=True, layout=torch.sparse_csr))
    )
    assert_close(got, want, F64, length=50)


def test_what_cannot_be_compiled_is_refused():
    x = data((7,))
    pattern = jactri.sparsity(fluxes, x)
    with pytest.raises(ValueError, match="needs pattern="):
        jactri.compile(fluxes, x, layout=torch.sparse_csr)
    with pytest.raises(TypeError, match="Sparsity"):
        jactri.compile(fluxes, x, layout=torch.sparse_csr, pattern=pattern.to_dense())
    with pytest.raises(TypeError, match="takes no 'layout'"):
        jactri.compile(fluxes, x, x, of=jactri.jvp, layout=torch.sparse_csr)
    with pytest.raises(TypeError, match="takes no 'layout'"):
        jactri.export(fluxes, x, path="never.pt2", layout=torch.sparse_csr, pattern=pattern)
    with pytest.raises(TypeError, match="takes no 'check'"):
        jactri.compile(fluxes, x, layout=torch.sparse_csr, pattern=pattern, check=True)
    found = jactri.compile(fluxes, x, layout=torch.sparse_csr, pattern=pattern, engine="fx")
    with pytest.raises(RuntimeError, match="out"):
        found(x, out=torch.zeros(7, 7, dtype=F64))


def reads_of(found):
    """What the graph is given beside its inputs, and the ops that it has."""
    nodes = list(found.graph.graph.nodes)
    given = [n.target for n in nodes if n.op == "placeholder"]
    return given[1:], [str(n.target) for n in nodes if n.op == "call_function"]


def compiled(func, x, **options):
    pattern = jactri.sparsity(func, x)
    return jactri.compile(func, x, layout=torch.sparse_csr, pattern=pattern, engine="fx", **options)


def test_a_constant_jacobian_is_made_once_and_is_the_callers_own():
    def func(u):
        return torch.cat([u[1:] - 2 * u[:-1], u[:1] * 3])

    x = data((7,))
    found = compiled(func, x)
    assert found.reason is None and reads_of(found) == ([], [])
    assert "constants: 1 tensor" in str(found.explain())
    for _ in range(2):
        answer = found(x)
        assert_close(answer.to_dense(), rows(func, x), F64, length=5)
        answer.values().zero_()


def test_seeds_and_what_is_linear_behind_them_are_constants():
    def func(u):
        return (u.roll(1) - 2 * u).sin()

    x = data((7,))
    found = compiled(func, x, strategy="forward-mode")
    given, ops = reads_of(found)
    assert found.reason is None and given == []
    assert not any("roll" in op for op in ops[ops.index("aten.cos.default") :])
    for seed in range(2):
        assert_close(
            found(data((7,), seed)).to_dense(), rows(func, data((7,), seed)), F64, length=9
        )


def test_what_func_holds_is_no_constant():
    scale = torch.full((7,), 2.0, dtype=F64)

    def func(u):
        return scale * u - scale.flip(0) * u.roll(1)

    x = data((7,))
    found = compiled(func, x)
    assert found.reason is None and len(reads_of(found)[0]) == 1
    with torch.no_grad():
        scale[2] = 5.0
    assert_close(found(x).to_dense(), rows(func, x), F64, length=9)


def test_what_is_written_to_is_no_constant():
    """A sum by index is written into zeros, and from the second call on into what the first left."""

    def func(u):
        y = u.clone()
        y[1:].mul_(u[:-1])
        return y.new_zeros(4).index_add(0, torch.arange(7) % 4, y) + 1

    x = data((7,))
    found = compiled(func, x)
    for seed in range(3):
        assert_close(
            found(data((7,), seed)).to_dense(), rows(func, data((7,), seed)), F64, length=9
        )
    assert found.reason is None


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 5, 7), (2, 1, 5, 7), (1, 1, 11)], ids=str)
def test_convolutions_run_by_windows_where_those_are_cheaper(size, per_sample, products):
    torch.manual_seed(0)
    conv = nn.Conv2d if len(size) == 4 else nn.Conv1d
    net = nn.Sequential(conv(1, 4, 3, padding=1), nn.ReLU(), conv(4, 1, 3, padding=1)).double()
    x = data(size) - 0.7
    pattern = jactri.sparsity(net, x, per_sample=per_sample)
    want = jactri.jacobian(net, x, per_sample=per_sample)
    samples = size[0] if per_sample else 1
    want = want.reshape(samples, -1, x.numel() // samples)
    options = {"per_sample": per_sample, "pattern": pattern}
    for layout in LAYOUTS:
        answer = jactri.jacobian(net, x, layout=layout, **options)
        assert_close(answer.to_dense().reshape(want.shape), want, F64, length=50)
    assert not products
    jactri.jacobian(net, x, layout=torch.sparse_csr, chunk_size=3, **options)
    assert products  # a limit on seeds at once is one on products
    products.clear()
    found = jactri.compile(net, x, layout=torch.sparse_csr, engine="fx", **options)
    assert found.reason is None and not products
    assert_close(found(x).to_dense().reshape(want.shape), want, F64, length=50)


def test_a_pattern_that_is_not_the_networks_own_is_taken_at_its_word(products):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv1d(2, 1, 1)).double()
    x = data((1, 1, 9)) - 0.7
    J = rows(net, x).reshape(9, 9)
    wider = torch.ones(9, 9).bool().triu(-2).tril(2)
    answer = jactri.jacobian(net, x, layout=torch.sparse_csr, pattern=wider)
    assert products and answer.values().numel() == int(wider.sum())
    assert_close(answer.to_dense(), J, F64, length=9)


def test_constants_that_no_cache_holds_are_computed(monkeypatch):
    monkeypatch.setattr(traced, "FOLDED", 100)
    x = data((7,))
    found = compiled(fluxes, x)
    assert found.reason is None and reads_of(found)[0] and not list(found.graph.buffers())
    assert_close(found(x).to_dense(), rows(fluxes, x), F64, length=9)
