"""Sparse Hessians: entries and their count beside autograd's dense ones, and how many products tell them."""

import random

import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from common import F64, MODES, Square, unfollowed
from tolerances import assert_close, assert_same_tree
from torch.autograd import functional
from torch.nn import functional as F

import jactri
from jactri._src.calls import symmetric

LAYOUTS = [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, "banded"]


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def chain(x):
    """Rosenbrock's: a tridiagonal Hessian."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def energy(u):
    """Of a membrane that is held by springs: a five-point star."""
    slopes = (u[1:] - u[:-1]).square().sum() + (u[:, 1:] - u[:, :-1]).square().sum()
    return slopes / 2 + (u**4).sum()


def band(n, half=1):
    i = torch.arange(n)
    return (i[:, None] - i).abs() <= half


LINKS = torch.randint(40, (2, 60), generator=torch.Generator().manual_seed(0))
START = torch.tensor([1.0, 0.0], dtype=F64)


def lagrangian(w, step=0.05):
    """Of a pendulum that a torque is to stop (trapezoidal collocation): angle, speed, torque and two multipliers."""
    state, torque, multipliers = w[:, :2], w[:, 2], w[:, 3:]
    angle, speed = state.unbind(1)
    rate = torch.stack([speed, torque - angle.sin()], 1)
    defect = state[1:] - state[:-1] - step / 2 * (rate[1:] + rate[:-1])
    cost = step * (state.square().sum() + 0.1 * torque.square().sum())
    return cost + multipliers[0] @ (state[0] - START) + (multipliers[1:] * defect).sum()


CASES = {
    "chain": (chain, (values(21),), 3),
    "short chain": (chain, (values(3),), 2),
    "grid": (energy, (values(7, 6),), 5),
    "not contiguous": (energy, (values(6, 7).t(),), 5),
    "arrowhead": (lambda x: (x[1:] ** 3 * x[0].sin()).sum() + x[0] ** 4, (values(15),), 2),
    "bilinear": (lambda x: (x[1:] * x[0]).sum(), (values(9),), 1),
    "arrowhead of two": (lambda x, t: (x**3 * t.sin()).sum(), (values(5, 3), values(seed=1)), 2),
    "random": (lambda x: (x[LINKS[0]] * x[LINKS[1]]).sin().sum(), (values(40),), None),
    "optimal control": (lagrangian, (values(9, 5),), 5),
    "by part": (lambda z, m: lagrangian(torch.cat([z, m], 1)), (values(8, 3), values(8, 2, seed=1)), 5),
    "diagonal": (lambda x: x.sin().sum(), (values(2, 3),), 1),
    "linear": (lambda x: 3 * x.sum(), (values(4),), 0),
    "constant": (lambda x: torch.tensor(1.0, dtype=F64), (values(3),), 0),
    "unused": (lambda x, y: chain(x), (values(5), values(3, seed=1)), 3),
    "one entry": (lambda x: x**3, (values(),), 1),
    "none": (lambda x: (x**2).sum(), (values(0),), 0),
}  # fmt: skip


@pytest.fixture
def products(monkeypatch):
    """How many each sparse Hessian took."""
    made, known = [], symmetric.products_of

    def counted(*given):
        made.append(known(*given))
        return made[-1]

    monkeypatch.setattr(symmetric, "products_of", counted)
    return lambda: [how.products for how in made]


def truth(func, xs):
    if not any(x.numel() for x in xs):
        return tuple(tuple(x.new_zeros(*x.shape, *y.shape) for y in xs) for x in xs)
    return functional.hessian(func, xs)


@pytest.mark.parametrize("name", CASES)
def test_entries_and_products(name, products):
    func, xs, count = CASES[name]
    want = truth(func, xs)
    for layout in LAYOUTS:
        found = jactri.hessian(func, xs if len(xs) > 1 else xs[0], layout=layout)
        found = found if len(xs) > 1 else ((found,),)
        for a, b in ((a, b) for a in range(len(xs)) for b in range(len(xs))):
            got, shape = found[a][b].to_dense(), want[a][b].shape
            if layout not in (torch.sparse_coo, "banded"):
                assert got.shape == (xs[a].numel(), xs[b].numel())
            assert_close(got.reshape(shape), want[a][b], F64, length=64)
            sizes = xs[a].numel(), xs[b].numel()
            other = found[b][a].to_dense().reshape(sizes[::-1])
            assert torch.equal(got.reshape(sizes), other.t())  # to the last bit
            if layout is torch.sparse_coo and name != "random":
                assert len(found[a][b].values()) == (want[a][b] != 0).sum()
    if count is not None:
        assert products() == [count] * len(LAYOUTS)


@pytest.mark.parametrize("mode", ["auto", "forward-mode", "reverse-mode", "mixed"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_modes_and_chunks(mode, chunk_size, products):
    x = values(4, 3)
    got = jactri.hessian(
        energy, x, layout=torch.sparse_coo, outer_jacobian_strategy=mode, chunk_size=chunk_size
    )
    assert_close(got.to_dense(), functional.hessian(energy, x), F64, length=64)
    assert products()[0] <= 6
    with pytest.raises(ValueError, match="memory_limit"):
        jactri.hessian(energy, x, layout=torch.sparse_coo, memory_limit=64)


def test_products_do_not_depend_on_the_horizon(products):
    for steps in (5, 20, 60):
        jactri.hessian(lagrangian, values(steps, 5), layout=torch.sparse_csr)
    assert products() == [5, 5, 5]
    kkt = jactri.hessian(lagrangian, values(20, 5))
    pattern = jactri.Sparsity.of(kkt.reshape(100, 100) != 0)
    assert pattern.colours.products == 7  # where the entries of a pair are not one


def test_newton_steps_for_optimal_control():
    w = torch.zeros(40, 5, dtype=F64)
    for _ in range(5):
        _, slope, kkt = jactri.hessian(lagrangian, w, return_lower=True, layout=torch.sparse_csc)
        step = scipy.sparse.linalg.spsolve(jactri.to_scipy(kkt), slope.flatten().numpy())
        w = w - torch.from_numpy(step).view_as(w)
    leaf = w.clone().requires_grad_()
    (slope,) = torch.autograd.grad(lagrangian(leaf), leaf)
    assert slope.abs().max() < 1e-12
    assert torch.equal(w[0, :2], START) and w[-1, :2].abs().max() < 0.3


def test_what_has_no_zeros_is_refused():
    with pytest.raises(ValueError, match=r"every entry of the Hessian can be non-zero.*the op Sum"):
        jactri.hessian(lambda x: x.sum().sin(), values(4), layout=torch.sparse_coo)
    with pytest.raises(ValueError, match="every entry of the Hessian"):
        jactri.hessian(
            lambda x, t: (x.sum() * t).sin(), (values(4), values()), layout=torch.sparse_csr
        )
    with pytest.raises(ValueError, match="the gradient of the function holds"):
        jactri.hessian(
            lambda x: unfollowed(torch.complex(x, x)).real.pow(3).sum(),
            values(4),
            layout=torch.sparse_coo,
        )
    with pytest.raises(
        ValueError, match=r"a sparse Hessian for each sample needs.*the op SquareBackward"
    ):
        jactri.hessian(
            lambda x: Square.apply(x).pow(2).sum(1),
            values(3, 4),
            per_sample=True,
            layout=torch.sparse_coo,
        )


class Crooked(torch.autograd.Function):
    """Its backward is not that of its forward: no gradient, and no symmetric Hessian."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * y**2, g * x


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_gradient_keeps_both_triangles(layout):
    def func(x):
        return Crooked.apply(x[1:], x[:-1]).sum()

    x = values(6)
    want = functional.hessian(func, x)
    assert not torch.allclose(want, want.t())
    for pattern in (None, band(6)):
        got = jactri.hessian(func, x, layout=layout, pattern=pattern)
        assert_close(got.to_dense(), want, F64, length=64)


@pytest.mark.filterwarnings("ignore:a hook on gradients")
def test_hooks_count():
    def func(x):
        y = x * 1
        y.register_hook(lambda g: g * torch.arange(1.0, 7.0, dtype=F64))
        return chain(y)

    x = values(6)
    want = functional.hessian(func, x)
    got = jactri.hessian(func, x, layout=torch.sparse_csr, pattern=band(6))
    assert_close(got.to_dense(), want, F64, length=64)
    with pytest.raises(ValueError, match="of which no pattern is known"):
        jactri.hessian(func, x, layout=torch.sparse_csr)


def picked(u, seed):
    return torch.randint(6, (6,), generator=torch.Generator().manual_seed(seed))


def written(u, v):
    w = u.clone()
    w[1:3] = v[2:4] * u[1:3]
    return w


OPS = [
    lambda u, v, seed: u * v,
    lambda u, v, seed: u.sin(),
    lambda u, v, seed: u.roll(seed % 5),
    lambda u, v, seed: torch.cat([u[1:], v[:1]]),
    lambda u, v, seed: u[picked(u, seed)],
    lambda u, v, seed: torch.where(u > v, u * v, u**2),
    lambda u, v, seed: torch.maximum(u.relu(), v**2),
    lambda u, v, seed: torch.zeros(6, dtype=F64).index_add(0, picked(u, seed), u * v),
    lambda u, v, seed: u / (1 + v * v),
    lambda u, v, seed: written(u, v),
    lambda u, v, seed: u.view(2, 3).sum(1).repeat_interleave(3) * v,
    lambda u, v, seed: u.detach() * v,
    lambda u, v, seed: torch.stack([u[:3], v[3:]], 1).flatten().tanh(),
    lambda u, v, seed: u.view(3, 2).t().reshape(6) * F.pad(v, (1, 1))[:-2].abs(),
]


@pytest.mark.parametrize("seed", range(20))
def test_random_functions(seed):
    gen = random.Random(seed)
    steps = [
        (gen.choice(OPS), gen.random(), gen.random(), gen.randrange(99))
        for _ in range(gen.randrange(2, 6))
    ]

    def func(x, t):
        made = [x.flatten()[:6], t.expand(6)]
        for op, a, b, s in steps:
            made.append(op(made[int(a * len(made))], made[int(b * len(made))], s))
        return sum((t**2).sum() if k % 2 else t.sum() for k, t in enumerate(made[2:]))

    xs = (values(3, 4, seed=seed), values(seed=seed + 1))
    got = jactri.hessian(
        func, xs, layout=gen.choice(LAYOUTS), outer_jacobian_strategy=gen.choice(MODES)
    )
    want = functional.hessian(func, xs)
    for a, b in ((a, b) for a in range(2) for b in range(2)):
        assert_close(got[a][b].to_dense().reshape(want[a][b].shape), want[a][b], F64, length=999)


def test_a_backward_without_a_derivative_is_refused():
    def func(w):
        return F.embedding_bag(torch.tensor([[0, 1], [2, 3]]), w, mode="sum").square().sum()

    for options in ({}, {"pattern": band(8), "layout": torch.sparse_csr}):
        with pytest.raises(NotImplementedError, match="EmbeddingBag has no further derivative"):
            jactri.hessian(func, values(4, 2), **options)


def test_kinks_are_those_of_autograd():
    x = torch.tensor([0.0, -1.0, 2.0, 0.0, 3.0], dtype=F64)
    for func in (
        lambda x: x.relu().sum(),
        lambda x: (x.relu()[1:] * x.abs()[:-1]).sum(),
        lambda x: x.clamp(0).pow(3).sum(),
    ):
        got = jactri.hessian(func, x, layout=torch.sparse_csr)
        assert torch.equal(got.to_dense(), functional.hessian(func, x))


def test_a_pole_of_one_input_is_none_of_another():
    a, b = values(5).abs(), values(5, seed=1)
    a[2] = 0
    func = lambda a, b: (a**1.5).sum() + (a.roll(1) * b**2).sum() + (a * b.roll(2)).sum() * b[0]  # noqa: E731
    want = functional.hessian(func, (a, b))
    assert want[0][0][2, 2].isinf()
    for layout in LAYOUTS:
        got = jactri.hessian(func, (a, b), layout=layout)
        found = tuple(tuple(h.to_dense() for h in row) for row in got)
        for i, j in [(0, 1), (1, 0), (1, 1)]:
            torch.testing.assert_close(found[i][j], want[i][j])


def test_two_dtypes():
    x, t = values(5), values(2, seed=1).float()
    for func in (
        lambda x, t: chain(x) * t[0] + (t**3).sum(),
        lambda x, t: chain(x) + (t**3).sum(),  # blocks without an entry
    ):
        want = functional.hessian(func, (x, t))
        for layout in LAYOUTS:
            got = jactri.hessian(func, (x, t), layout=layout)
            found = tuple(tuple(h.to_dense() for h in row) for row in got)
            assert_same_tree(found, want, torch.float32, length=64)
            assert [[h.dtype for h in row] for row in found] == [[x.dtype] * 2, [t.dtype] * 2]


def test_gradients_of_entries():
    x, b = values(6).requires_grad_(), values(6, seed=1).requires_grad_()
    found = jactri.hessian(lambda x: chain(x * b), x, create_graph=True, layout=torch.sparse_csr)
    theirs = functional.hessian(lambda x: chain(x * b), x, create_graph=True)
    got = torch.autograd.grad(found.to_dense().pow(2).sum(), (x, b))
    want = torch.autograd.grad(theirs.pow(2).sum(), (x, b))
    assert_same_tree(got, want, F64, length=500)


@pytest.mark.parametrize("layout", [torch.strided, *LAYOUTS])
def test_a_pattern_of_the_callers(layout, products):
    x = values(9)
    want = functional.hessian(chain, x)
    given = {
        "of both triangles": band(9),
        "of one": band(9).tril(),
        "more than there is": band(9, 2),
        "a Sparsity": jactri.Sparsity.of(band(9), (9,), (9,)),
        "of SciPy": scipy.sparse.csr_array(band(9).numpy()),
    }
    for name, pattern in given.items():
        got = jactri.hessian(chain, x, layout=layout, pattern=pattern, check=True)
        got = got if layout is torch.strided else got.to_dense()
        assert_close(got, want, F64, length=64, what=name)
    assert products() == [3, 3, 5, 3, 3]
    for missing in (band(9, 0), band(9) & (torch.arange(9) != 4)[:, None] & (torch.arange(9) != 4)):
        with pytest.raises(
            ValueError,
            match=r"leaves out an entry that is not zero: the derivative of gradient\[\d\]",
        ):
            jactri.hessian(chain, x, layout=layout, pattern=missing, check=True)
    with pytest.raises(RuntimeError, match="pattern"):
        jactri.hessian(chain, x, layout=layout, pattern=band(8))
    with pytest.raises(ValueError, match="check=True tests a pattern"):
        jactri.hessian(chain, x, layout=layout, check=True)
    with pytest.raises(RuntimeError, match=r"is not available inside|not possible inside"):
        torch.vmap(lambda v: jactri.hessian(chain, v, layout=layout, pattern=band(9)))(x[None])


def test_patterns_of_several_inputs_and_of_samples():
    x, t = values(5), values(2, seed=1)

    def func(x, t):
        return chain(x) * t[0] + (t**3).sum()

    want = functional.hessian(func, (x, t))
    pattern = tuple(tuple(h != 0 for h in row) for row in want)
    upper = (
        (pattern[0][0].triu(), pattern[0][1]),
        (torch.zeros(2, 5, dtype=torch.bool), pattern[1][1]),
    )
    for given in (pattern, upper):
        got = jactri.hessian(func, (x, t), pattern=given, check=True)
        assert_same_tree(got, want, F64, length=64)
    with pytest.raises(TypeError, match="pattern must be a tuple of 2"):
        jactri.hessian(func, (x, t), pattern=pattern[0][0])
    many = values(4, 6)
    got = jactri.hessian(
        lambda v: torch.stack([chain(r) for r in v]), many, per_sample=True, pattern=band(6), check=True,
        layout=torch.sparse_csr,
    )  # fmt: skip
    assert_close(
        got.to_dense(), torch.stack([functional.hessian(chain, r) for r in many]), F64, length=64
    )


def test_what_autograd_computes_as_a_whole_has_the_pattern_that_is_given():
    def func(x):
        return chain(unfollowed(torch.complex(x, x)).real)

    x = values(7)
    got = jactri.hessian(func, x, pattern=band(7), check=True, layout=torch.sparse_csr)
    assert_close(got.to_dense(), functional.hessian(func, x), F64, length=64)


TREE = {"x": values(7), "s": values(2, seed=1)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_torch_func(layout):
    def func(tree, more):
        return {"y": chain(tree["x"]) * tree["s"].sum() * more}, tree["x"] * 2

    ours, aux = jactri.func.hessian(func, has_aux=True, layout=layout)(TREE, 0.5)
    theirs, want = torch.func.hessian(lambda *v: func(*v)[0])(TREE, 0.5), TREE["x"] * 2
    assert torch.equal(aux, want)
    for a in TREE:
        for b in TREE:
            wanted = theirs["y"][a][b]
            assert_close(ours["y"][a][b].to_dense().reshape(wanted.shape), wanted, F64, length=64)
    with pytest.raises(
        RuntimeError, match=r"outputs of one element, but func returned one of shape \(7,\)"
    ):
        jactri.func.hessian(lambda x: x**2, layout=layout)(TREE["x"])
    with pytest.raises(RuntimeError, match="not possible inside"):
        torch.vmap(jactri.func.hessian(chain, layout=layout))(TREE["x"][None])


def test_as_torch_func_a_result_requires_grad_where_its_entries_vary():
    b = values(7, seed=1).requires_grad_()
    x = TREE["x"]
    made = jactri.func.hessian(lambda x: chain(x * b), layout=torch.sparse_coo)(x)
    assert made.requires_grad
    (got,) = torch.autograd.grad(made.to_dense().sum(), b)
    theirs = torch.func.hessian(lambda x: chain(x * b))(x)
    assert_close(got, torch.autograd.grad(theirs.sum(), b)[0], F64, length=500)
    assert not jactri.func.hessian(chain, layout=torch.sparse_coo)(x).requires_grad
    with torch.no_grad():
        assert not jactri.func.hessian(lambda x: chain(x * b), layout=torch.sparse_coo)(
            x
        ).requires_grad
    with pytest.raises(ValueError, match="layout must be"):
        jactri.func.hessian(chain, layout="csr!")


def test_as_torch_func_with_a_pattern():
    x = TREE["x"]
    want = functional.hessian(chain, x)
    assert_close(jactri.func.hessian(chain, pattern=band(7))(x), want, F64, length=64)
    nest = {"a": {"x": {"x": band(7)}}, "b": {"x": {"x": band(7)}}}
    made = jactri.func.hessian(
        lambda v: {"a": chain(v["x"]), "b": 2 * chain(v["x"])},
        layout=torch.sparse_csr,
        pattern=nest,
    )({"x": x})
    assert_close(made["b"]["x"]["x"].to_dense(), 2 * want, F64, length=64)
    with pytest.raises(RuntimeError, match="nested as the result is, a tree of 1 patterns, got 2"):
        jactri.func.hessian(chain, pattern=(band(7), band(7)))(x)
    with pytest.raises(RuntimeError, match="pattern= is for outputs of one element"):
        jactri.func.hessian(lambda x: x**2, pattern=band(7))(x)
