"""Sparse Jacobians of functions that pick entries by index, and of stars: against autograd's rows in float64."""

import pytest
import torch
from tolerances import assert_close
from torch.nn import functional as F

import jactri
from jactri._src.base.csr import Csr
from jactri._src.plan import colours, planning, supports

F64 = torch.float64
LAYOUTS = [torch.sparse_coo, torch.sparse_csr, "banded"]
MODES = ["auto", "forward-mode", "reverse-mode"]
I, J = torch.tensor([0, 3, 3, 1, 6, 2]), torch.tensor([2, 2, 5, 1, 0, 4])
BACK = torch.tensor([-1, 0, -7, 2, 2])
MASK = torch.tensor([True, False, True, True, False, False, True])
ROWS = torch.tensor([[0, 2, 2], [1, 1, 4]])
A = torch.zeros(7, 7, dtype=F64).index_put((I, J), torch.arange(6.0, dtype=F64))


def fluxes(u):
    q = (u[I] - u[J]) ** 3
    return u.index_add(0, I, q).index_add(0, J, q, alpha=-1.0)


def boundary(u):
    r = u * u.roll(1) - u.roll(-1)
    r[0], r[-1] = u[0], u[-1] ** 2
    return r


def star(u):
    return u**2 * (u.roll(1, 0) + u.roll(-1, 0) - u.roll(1, 1) * u.roll(-1, 1))


def slices(u):
    out = u**2
    for a in (0, 1):
        n = u.shape[a]
        q = u.narrow(a, 0, n - 1) * u.narrow(a, 1, n - 1)
        pad = [0, 0] * (1 - a)
        out = out + F.pad(q, [*pad, 0, 1]) - F.pad(q, [*pad, 1, 0])
    return out


def repeats(u):
    """A term is tied by a factor of an axis, another by the whole axis."""
    v = u.repeat(1, 2).unsqueeze(0).expand(2, 5, 8)
    return v.roll(1, 2) ** 2 + v


def zeros(u, *shape):
    return torch.zeros(*shape, dtype=u.dtype)


LINE, GRID = (7,), (5, 4)
CASES = {
    "an index": (lambda u: u[J] ** 2, LINE),
    "negative indices": (lambda u: u[BACK].sin(), LINE),
    "int32, repeated": (lambda u: u[I.int()] * u[J.int()], LINE),
    "index_select": (lambda u: u.index_select(0, J) ** 2, LINE),
    "gather": (lambda u: u.gather(0, J) ** 2, LINE),
    "gather that stops short": (lambda u: u.gather(1, ROWS[:, :2]) ** 2, GRID),
    "take": (lambda u: u.take(BACK) ** 2, GRID),
    "take_along_dim": (lambda u: u.take_along_dim(torch.tensor([[1], [0], [3], [3], [2]]), 1), GRID),
    "a permutation": (lambda u: u[torch.tensor([3, 1, 5, 0, 2, 4, 6])] * u, LINE),
    "rows": (lambda u: (u[torch.tensor([4, 0, 0])] ** 2).cumsum(1), GRID),
    "two index tensors": (lambda u: u[ROWS, torch.tensor([[0, 3, -1]])] ** 2, GRID),
    "two index tensors, not adjacent": (
        lambda u: u.reshape(5, 2, 2)[torch.tensor([[1], [4]]), :, torch.tensor([0, 1, 1])] ** 2, GRID,
    ),
    "a mask": (lambda u: u[MASK] ** 2, LINE),
    "a mask of some axes": (lambda u: u[MASK[:5]] ** 2, GRID),
    "masked_select": (lambda u: u.masked_select(MASK) ** 2, LINE),
    "index_add": (fluxes, LINE),
    "index_add of a slice": (lambda u: zeros(u, 9).index_add(0, I, u[:-1] ** 2), LINE),
    "scatter_add": (lambda u: zeros(u, 4, 4).scatter_add(0, ROWS % 4, u[:2, :3] ** 2), GRID),
    "scatter": (lambda u: (u * u.roll(1)).scatter(0, J[:2], u[:2] ** 2), LINE),
    "scatter of a value": (lambda u: (u * u.roll(1)).scatter(0, J[:2], 3.0), LINE),
    "scatter_reduce sum": (lambda u: u.scatter_reduce(0, I, u[:-1] ** 2, "sum"), LINE),
    "scatter_reduce mean": (lambda u: u.scatter_reduce(0, I, u[:-1] ** 2, "mean"), LINE),
    "index_reduce": (lambda u: u.index_reduce(0, I, u[:-1] ** 2, "mean"), LINE),
    "index_put": (lambda u: (u * u.roll(1)).index_put((J[:3],), u[:3] ** 2), LINE),
    "index_put, accumulated": (lambda u: u.index_put((I,), u[:-1] ** 2, accumulate=True), LINE),
    "index_put of one for many": (lambda u: u.index_put((ROWS, ROWS % 4), u[0, :1] ** 2), GRID),
    "index_copy": (lambda u: u.index_copy(0, torch.tensor([5, 0]), u[:2] ** 2), LINE),
    "index_fill": (lambda u: (u * u.roll(1)).index_fill(0, I, 2.0), LINE),
    "masked_scatter": (lambda u: u.masked_scatter(MASK, u[1:5] ** 2), LINE),
    "embedding": (lambda u: F.embedding(ROWS, u) ** 2, GRID),
    "unfold": (lambda u: u.unfold(0, 3, 2).prod(1), LINE),
    "unfold of an axis": (lambda u: u.unfold(1, 2, 1).prod(2), GRID),
    "stack of selects": (lambda u: torch.stack([u[k] * u[k - 1] for k in range(1, 7)]), LINE),
    "unbind": (lambda u: u.unbind(1)[2] * u.unbind(0)[1][:1], GRID),
    "diff": (lambda u: u.diff() ** 2, LINE),
    "diagonals": (lambda u: u.diagonal(1) * u.diagonal(-1)[:3], GRID),
    "a triangle": (lambda u: (u * u.roll(1, 0)).tril(-1), GRID),
    "rot90": (lambda u: u.rot90(1, (0, 1)) ** 2, GRID),
    "a transpose": (lambda u: u[:4] + u[:4].T ** 2, GRID),
    "roll over all": (lambda u: u * u.roll(3), GRID),
    "sparse @ vector": (lambda u: A.to_sparse() @ u**2, LINE),
    "sparse @ matrix": (lambda u: torch.sparse.mm(A[:3, :5].to_sparse_csr(), u**2), GRID),
    "a window of repeats, and repeats": (repeats, GRID),
    "repeats of repeats": (lambda u: u.repeat(1, 2).repeat(1, 3) ** 2, GRID),
    "repeats of windows": (lambda u: F.pad(u, (1, 1)).repeat(2, 1).repeat(2, 2) ** 2, GRID),
    "written rows": (boundary, LINE),
    "a star by rolls": (star, GRID),
    "a star by slices": (slices, GRID),
}  # fmt: skip


def data(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=F64) + 0.2
    return x.t().contiguous().t() if len(shape) > 1 else x  # strides of any order


def dense(found, want):
    return found.to_dense().reshape(want.shape)


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", CASES)
def test_entries_are_the_support(name):
    func, shape = CASES[name]
    x = data(shape)
    want = torch.autograd.functional.jacobian(func, x)
    mask = jactri.sparsity(func, x)
    assert torch.equal(mask.to_dense(), want != 0) or name in {"sparse @ vector"}
    assert not ((want != 0) & ~mask.to_dense()).any()
    for mode in MODES:
        for layout in LAYOUTS:
            found = jactri.jacobian(func, x, layout=layout, strategy=mode)
            assert_close(dense(found, want), want, F64, length=50)
            if layout is torch.sparse_coo:
                assert torch.equal(found.indices(), mask._indices())


@pytest.mark.parametrize(
    "name", ["index_add", "two index tensors", "a star by slices", "index_put"]
)
def test_values_that_are_zero_keep_their_places(name):
    func, shape = CASES[name]
    x = torch.zeros(shape, dtype=F64)
    want = torch.autograd.functional.jacobian(func, x)
    found = jactri.jacobian(func, x, layout=torch.sparse_coo)
    assert torch.equal(dense(found, want), want)
    assert found._nnz() == jactri.sparsity(func, data(shape))._nnz() > (want != 0).sum()


def test_an_explicit_zero_of_a_sparse_matrix_is_an_entry():
    """Its index says so, and not its value: A holds a 0."""
    matrix = torch.sparse_coo_tensor(torch.stack([I, J]), torch.arange(6.0, dtype=F64), (7, 7))
    assert jactri.sparsity(lambda u: matrix @ u, data(LINE))._nnz() == 6


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("per_sample", [False, True])
def test_samples(n, per_sample):
    """Indices that all samples have, and each its own."""
    picks = torch.arange(n * 4).reshape(n, 4) * 7 % 5
    flat = (torch.arange(n)[:, None] * 5 + picks).reshape(-1)

    def apart(x):
        own = x.gather(1, picks) * x[:, J[:4] % 5]
        return torch.cat([own, x.reshape(-1)[flat].reshape(n, 4), x[:, 1:] - x[:, :-1]], 1)

    x = data((n, 5))
    want = torch.autograd.functional.jacobian(apart, x)
    if per_sample:
        want = torch.stack([want[k].select(1, k) for k in range(n)])
    mask = jactri.sparsity(apart, x, per_sample=per_sample)
    for mode in MODES:
        for layout in LAYOUTS:
            found = jactri.jacobian(apart, x, layout=layout, strategy=mode, per_sample=per_sample)
            assert_close(dense(found, want), want, F64, length=50)
            if layout is torch.sparse_coo:
                assert torch.equal(found.indices(), mask._indices())


def test_samples_that_indices_mix_are_refused():
    x = data((3, 4))
    with pytest.raises(ValueError, match="samples that are known not to mix"):
        jactri.jacobian(
            lambda x: x[torch.tensor([1, 0, 2])] ** 2, x, layout=torch.sparse_csr, per_sample=True
        )


def test_samples_of_too_many_entries_are_refused(monkeypatch):
    monkeypatch.setattr(colours, "_LARGEST", -1)
    monkeypatch.setattr(planning, "_sparse", planning.Cache())
    x, flat = data((3, 4)), torch.tensor([1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10])
    with pytest.raises(ValueError, match="too many entries to tell which samples mix"):
        jactri.jacobian(
            lambda x: x.reshape(-1)[flat].view(3, 4), x, layout=torch.sparse_coo, per_sample=True
        )


def test_each_index_has_its_own_plan():
    """Alike in all but the contents of an index, a mask, a sparse matrix, or an offset."""
    x, line = data((6, 6)), data((6,))
    made = [lambda u, k=k: u[torch.arange(6) // k] ** 2 for k in (1, 2, 3)]
    made += [lambda u, k=k: u.scatter(0, torch.tensor([k]), u[:1] ** 2) for k in (0, 3)]
    made += [lambda u, k=k: u.index_add(0, torch.tensor([k]), u[:1] ** 2) for k in (1, 4)]
    made += [lambda u, k=k: torch.eye(6, dtype=F64).roll(k, 0).to_sparse() @ u for k in (1, 2)]
    grids = [lambda u, k=k: u.diagonal(k)[:3] ** 2 for k in (-2, 0, 1)]
    grids += [lambda u, k=k: u.unfold(0, 2, k)[:2] ** 2 for k in (1, 2)]
    grids += [lambda u, k=k: u.roll(k) ** 2 for k in (1, 8)]
    grids += [lambda u, k=k: u.rot90(k, (0, 1)) ** 2 for k in (1, 2, 3)]
    grids += [lambda u, k=k: (u * u.roll(1, 0)).tril(k) for k in (-1, 1)]
    for func, at in (*((f, line) for f in made), *((f, x) for f in grids)):
        want = torch.autograd.functional.jacobian(func, at)
        found = jactri.jacobian(func, at, layout=torch.sparse_coo)
        assert_close(found.to_dense(), want, F64)
        assert found._nnz() == (want != 0).sum()


def test_a_plan_is_kept_with_what_its_indices_are(monkeypatch):
    formed = []
    form = supports._formed
    monkeypatch.setattr(supports, "_patterns", planning.Cache())
    monkeypatch.setattr(planning, "_sparse", planning.Cache())
    monkeypatch.setattr(supports, "_formed", lambda *a: formed.append(1) or form(*a))
    x = data((11,))

    def func(u, i):
        return u.index_add(0, i, u[i] ** 2)

    for i in (I, I.clone(), J, I):
        found = jactri.jacobian(lambda u, i=i: func(u, i), x, layout=torch.sparse_csr)
        assert_close(
            found.to_dense(), torch.autograd.functional.jacobian(lambda u, i=i: func(u, i), x), F64
        )
    assert len(formed) == 2


@pytest.mark.parametrize("periodic", [False, True])
def test_finite_volumes(periodic):
    """The matrix assembled by hand from the faces of 5 x 6 x 4 cells."""
    shape = (5, 6, 4)
    ids = torch.arange(120).reshape(shape)
    low, high = [], []
    for a in range(3):
        whole = ids if periodic else ids.narrow(a, 0, shape[a] - 1)
        low.append(whole.reshape(-1))
        high.append((ids.roll(-1, a) if periodic else ids.narrow(a, 1, shape[a] - 1)).reshape(-1))
    i, j = torch.cat(low), torch.cat(high)

    def residual(u):
        v = u.reshape(-1)
        mean, jump = (v[i] + v[j]) / 2, v[i] - v[j]
        q = (1 + mean**2) * jump
        return v.index_add(0, i, q).index_add(0, j, -q).reshape(u.shape)

    u = data(shape[:1] + (24,)).reshape(shape)
    v = u.reshape(-1)
    mean, jump = (v[i] + v[j]) / 2, v[i] - v[j]
    left, right = mean * jump + 1 + mean**2, mean * jump - 1 - mean**2
    cells = torch.arange(120)
    index = torch.stack([torch.cat([i, i, j, j, cells]), torch.cat([i, j, i, j, cells])])
    values = torch.cat([left, right, -left, -right, torch.ones(120, dtype=F64)])
    want = torch.sparse_coo_tensor(index, values, (120, 120)).coalesce().to_sparse_csr()
    found = jactri.jacobian(residual, u, layout=torch.sparse_csr)
    assert torch.equal(found.crow_indices(), want.crow_indices())
    assert torch.equal(found.col_indices(), want.col_indices())
    assert_close(found.values(), want.values(), F64)
    (sweep,) = list(planning._sparse.values())[-1].sweeps
    assert sweep.table.count <= (13 if periodic else 7)


def test_a_graph_network():
    """Features are mixed, and nodes see those along edges: blocks of a sparse matrix."""
    torch.manual_seed(0)
    first, second = torch.nn.Linear(3, 4).double(), torch.nn.Linear(8, 2).double()
    source, target = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0]), torch.tensor([1, 2, 0, 4, 5, 5, 3, 6])
    adjacency = torch.zeros(7, 7, dtype=F64)
    adjacency[target, source] = 0.5

    def layers(x):
        h = adjacency.to_sparse() @ first(x).tanh()
        message = second(torch.cat([h[source], h[target]], 1)).tanh()
        wide = target[:, None].expand(-1, 2)
        summed = zeros(x, 7, 2).index_add(0, target, message)
        return summed + zeros(x, 7, 2).scatter_reduce(0, wide, message, "sum")

    x = data((7, 3))
    want = torch.autograd.functional.jacobian(layers, x)
    one = torch.eye(7, dtype=F64)
    hops = one[target].T @ (one[source] + one[target]) @ adjacency != 0
    mask = jactri.sparsity(layers, x)
    assert torch.equal(mask.to_dense(), hops[:, None, :, None].expand(want.shape))
    for mode in MODES:
        for layout in LAYOUTS:
            found = jactri.jacobian(layers, x, layout=layout, strategy=mode)
            assert_close(dense(found, want), want, F64, length=50)


def test_several_ends_chunks_and_derivatives():
    def func(u, w):
        v, z = u.reshape(-1), w.reshape(-1)
        q = (v[I] - v[J]) ** 3 * z[I]
        return v.index_add(0, I, q).reshape(u.shape), z.index_add(0, J, q).sin()

    u, w = data(GRID), data((2, 10))
    want = torch.autograd.functional.jacobian(func, (u, w))
    for kw in ({}, {"chunk_size": 2}, {"memory_limit": "40kB"}, {"create_graph": True}):
        for mode in MODES:
            found = jactri.jacobian(func, (u, w), layout=torch.sparse_csr, strategy=mode, **kw)
            for row, true in zip(found, want, strict=True):
                for block, t in zip(row, true, strict=True):
                    assert_close(dense(block, t).detach(), t, F64)
    x = data(LINE).requires_grad_()
    made = jactri.jacobian(fluxes, x, layout=torch.sparse_coo, create_graph=True)
    (got,) = torch.autograd.grad((made.values() ** 3).sum(), x)
    true = torch.autograd.functional.jacobian(fluxes, x, create_graph=True)
    assert_close(got, torch.autograd.grad((true**3).sum(), x)[0], F64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_axes_take_no_dense_support(layout, monkeypatch):
    """A rod and a signal of 3000: three, and five, entries a row."""

    def refuse(self):
        raise AssertionError(f"{self.shape} written out")

    monkeypatch.setattr(Csr, "dense", refuse)
    rod = data((3000,))
    signal = torch.nn.Sequential(
        torch.nn.Conv1d(1, 3, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv1d(3, 1, 3, padding=1)
    ).double()

    def heat(u):
        q = u[1:] ** 2 - u[:-1]
        return u + F.pad(q, [0, 1]) - F.pad(q, [1, 0])

    for func, x, width in ((heat, rod, 3), (signal, rod.view(1, 1, -1), 5)):
        found = jactri.jacobian(func, x, layout=layout)
        at = torch.tensor([0, 1499, 2999])
        y = func(v := x.clone().requires_grad_()).reshape(-1)
        rows = torch.stack([torch.autograd.grad(y[k], v, retain_graph=True)[0] for k in at])
        if layout == "banded":
            columns, values = found.columns.reshape(3000, -1), found.values.reshape(3000, -1)
            assert columns.shape[1] == width
            got = zeros(x, 3, 3001).scatter(1, columns[at] % 3001, values[at])[:, :3000]
        else:
            nnz = 3000 * width - (width // 2) * (width // 2 + 1)
            assert found._nnz() == nnz
            flat = (
                found
                if layout is torch.sparse_csr
                else jactri.jacobian(func, x, layout=torch.sparse_csr)
            )
            got = torch.stack([flat[int(k)].to_dense() for k in at])
        assert_close(got.detach(), rows.reshape(3, -1), F64, length=20)


def test_where_entries_are_too_many_axes_tell(monkeypatch):
    """A star is then held in its box; what only indices tell is refused by name."""
    monkeypatch.setattr(supports, "MOST", 0)
    monkeypatch.setattr(supports, "EACH", 0)
    monkeypatch.setattr(supports, "_patterns", planning.Cache())
    monkeypatch.setattr(planning, "_sparse", planning.Cache())
    x = data((6, 7))
    want = torch.autograd.functional.jacobian(star, x)
    found = jactri.jacobian(star, x, layout=torch.sparse_coo)
    assert_close(found.to_dense(), want, F64)
    assert found._nnz() == 9 * 42 > (want != 0).sum()
    with pytest.raises(ValueError, match=r"the op IndexBackward0 \(output \(2, 3\)\) mixes"):
        jactri.jacobian(lambda u: u[ROWS, ROWS % 4] ** 2, data(GRID), layout=torch.sparse_csr)


def test_what_values_choose_has_no_pattern():
    x = data(LINE)
    for func in (
        lambda u: u.sort().values,
        lambda u: u.topk(3).values,
        lambda u: u.cummax(0).values,
    ):
        with pytest.raises(ValueError, match="every entry of the Jacobian"):
            jactri.jacobian(func, x, layout=torch.sparse_coo)


def test_indices_out_of_range_are_torchs_to_refuse():
    x = data(LINE)
    for func in (
        lambda u: u[torch.tensor([7])],
        lambda u: u.index_add(0, torch.tensor([-1]), u[:1]),
    ):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            jactri.jacobian(func, x, layout=torch.sparse_coo)


def test_a_refusal_names_the_op_that_mixes():
    """And none before it whose pattern is no product: a roll moves entries."""
    u = data(LINE)
    for func in (lambda u: u * u.sum() + u.roll(1) ** 2, lambda u: u.roll(1) ** 2 + u * u.sum()):
        with pytest.raises(ValueError, match=r"the op SumBackward0 .* mixes all"):
            jactri.jacobian(func, u, layout=torch.sparse_coo)
    x = u.expand(3, -1).clone()
    with pytest.raises(ValueError, match=r"of a sample's .* the op SumBackward1 .* mixes all"):
        jactri.jacobian(
            lambda x: x * x.sum(1, keepdim=True) + x.roll(1, 1) ** 2,
            x, layout=torch.sparse_coo, per_sample=True,
        )  # fmt: skip


@pytest.mark.parametrize("n", [5, 400])
def test_a_product_of_arrows_is_full(n):
    """Each sees all by way of the first: that is known before the entries are listed."""
    i, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    index = torch.cat([torch.stack(pair) for pair in ((i, i), (i, zero), (zero, i))], 1)
    arrow = torch.sparse_coo_tensor(index, torch.ones(3 * n, dtype=F64), (n, n)).coalesce()
    x = torch.linspace(0, 1, n, dtype=F64)[:, None]
    once = jactri.jacobian(lambda x: (arrow @ x).sin(), x, layout=torch.sparse_csr)
    assert once._nnz() == 3 * n - 2
    with pytest.raises(ValueError, match=r"every entry .* the op MmBackward0"):
        jactri.jacobian(lambda x: (arrow @ (arrow @ x)).sin(), x, layout=torch.sparse_csr)
    assert jactri.sparsity(lambda x: arrow @ (arrow @ x), x)._nnz() == n * n
