"""A pattern that the caller has: the Jacobian by it, against autograd's dense one in float64."""

import numpy
import pytest
import scipy.sparse
import torch
from common import F64, Square, unfollowed
from pattern_cases import arrow, autograd, dense, drawn, point, same
from torch import nn

import jactri
from jactri._src.calls import compressed as products
from jactri._src.calls import patterned
from jactri._src.plan import compressing, supports

SPARSE = [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, "banded"]
LAYOUTS = [torch.strided, *SPARSE]
MODES = ["auto", "forward-mode", "reverse-mode"]


@pytest.fixture
def made(monkeypatch):
    """The products that are made: how many at once, and whether with cotangents."""
    calls, multiply = [], products.multiply

    def counted(graph, blocks, reverse, **options):
        calls.append((len(blocks[0]), reverse))
        return multiply(graph, blocks, reverse, **options)

    monkeypatch.setattr(products, "multiply", counted)
    return calls


KINDS = {
    "a sparsity": lambda mask: jactri.Sparsity.of(mask, mask.shape[:1], mask.shape[1:]),
    "a mask": lambda mask: mask,
    "not contiguous": lambda mask: mask.t().contiguous().t(),
    "an array": lambda mask: mask.cpu().numpy(),
    "coo": lambda mask: mask.to_sparse(),
    "not coalesced": lambda mask: torch.sparse_coo_tensor(
        torch.cat([mask.nonzero().t().flip(1), mask.nonzero().t()], 1),
        torch.ones(2 * int(mask.sum())),
        mask.shape,
    ),
    "csr": lambda mask: mask.double().to_sparse_csr(),
    "csc": lambda mask: mask.double().to_sparse_csc(),
    "blocks": lambda mask: mask.double().to_sparse_bsr((1, 1)),
    "scipy csr": lambda mask: scipy.sparse.csr_matrix(mask.cpu().numpy()),
    "scipy csc": lambda mask: scipy.sparse.csc_array(mask.cpu().numpy().astype(float)),
    "scipy coo": lambda mask: scipy.sparse.coo_array(mask.cpu().numpy()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pattern(kind):
    func, mask = drawn(9, 7)
    x = point(7)
    given = KINDS[kind](mask)
    same(jactri.jacobian(func, x, pattern=given, check=True), autograd(func, x))
    J = jactri.jacobian(func, x, pattern=given, layout=torch.sparse_csr)
    assert J.values().numel() == mask.sum()


def test_what_scipy_has_is_not_modified():
    func, mask = drawn(9, 7)
    row, column = mask.nonzero().t().cpu().numpy()
    order = numpy.lexsort((-column, row))
    given = scipy.sparse.csr_array(mask.cpu().numpy())
    given.indices[:] = column[order]  # not sorted
    before = given.indices.copy()
    x = point(7)
    same(jactri.jacobian(func, x, pattern=given), autograd(func, x))
    assert (given.indices == before).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_mode(layout, mode):
    for seed, (m, n) in enumerate([(6, 11), (11, 6), (1, 5), (5, 1), (8, 8)]):
        func, mask = drawn(m, n, seed, 0.3)
        x = point(n)
        J = jactri.jacobian(func, x, pattern=mask, layout=layout, strategy=mode, check=True)
        want = autograd(func, x)
        same(J, want)
        if layout in SPARSE[:3]:
            assert J.values().numel() == mask.sum()
        if layout is torch.strided:
            assert J.shape == want.shape


@pytest.mark.parametrize("full", [True, False])
def test_axes_of_the_ends(full):
    """Inputs with axes, not contiguous; the pattern of the Jacobian's shape, or of the matrix's."""
    func, mask = drawn(6, 15)
    x = point(5, 3).t()
    assert not x.is_contiguous()

    def two(x):
        return func(x).reshape(2, 3)

    given = mask.reshape(2, 3, 3, 5) if full else mask
    for layout in LAYOUTS:
        same(jactri.jacobian(two, x, pattern=given, layout=layout), autograd(two, x))
    J = jactri.jacobian(two, x, pattern=given, layout=torch.sparse_coo)
    assert J.shape == (2, 3, 3, 5) and J.is_coalesced()


def test_numbers():
    """Ends without axes, and without entries."""

    def scalar(x):
        return (x**2).sum()

    same(jactri.jacobian(scalar, point(3), pattern=torch.ones(3).bool()), 2 * point(3))
    x = torch.tensor(3.0, dtype=F64)
    J = jactri.jacobian(lambda x: x**2, x, pattern=torch.tensor([[True]]), check=True)
    assert J.shape == () and J == 6
    none = torch.ones(0, 3, dtype=torch.bool)
    for layout in LAYOUTS:
        J = jactri.jacobian(lambda x: x[:0], point(3), pattern=none, layout=layout, check=True)
        assert dense(J).shape == (0, 3)
        turned = none.new_ones(2, 0)
        J = jactri.jacobian(
            lambda x: x.sum() + x.new_ones(2), x[None][:0], pattern=turned, layout=layout
        )
        assert dense(J).shape == (2, 0)


def test_an_empty_pattern():
    def constant(x):
        return x.detach() ** 2 + 0 * x

    for layout in LAYOUTS:
        none = torch.zeros(3, 3).bool()
        J = jactri.jacobian(constant, point(3), pattern=none, layout=layout, check=True)
        assert not dense(J).any()
    with pytest.raises(ValueError, match=r"derivative of output\[\d\] by input\[\d\] is"):
        jactri.jacobian(torch.sin, point(3), pattern=torch.zeros(3, 3).bool(), check=True)


def test_outputs_and_inputs_in_tuples():
    first, one = drawn(4, 6, 1, 0.3)
    second, other = drawn(5, 3, 2, 0.3)

    def func(x, w):
        return first(x) + w.sum(), second(w), x[::2].float()

    xs = point(6), point(3)
    masks = (
        (one, torch.ones(4, 3).bool()),
        (torch.zeros(5, 6).bool(), other),
        (torch.eye(6)[::2].bool(), torch.zeros(3, 3).bool()),
    )
    want = torch.autograd.functional.jacobian(func, xs)
    for given in (masks, jactri.sparsity(func, xs)):
        for layout in LAYOUTS:
            found = jactri.jacobian(func, xs, pattern=given, layout=layout, check=True)
            for row, want_row in zip(found, want, strict=True):
                for J, w in zip(row, want_row, strict=True):
                    torch.testing.assert_close(dense(J).reshape(w.shape), w, atol=1e-6, rtol=1e-6)
    wrong = ((one, torch.ones(4, 3).bool()), (torch.zeros(5, 6).bool(), other & False), masks[2])
    with pytest.raises(ValueError, match=r"derivative of outputs\[1\]\[\d\] by inputs\[1\]\[\d\]"):
        jactri.jacobian(func, xs, pattern=wrong, check=True)
    J = jactri.jacobian(func, xs, pattern=masks, strategy="forward-mode")
    assert J[2][0].dtype == torch.float32 and J[0][0].dtype == F64


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_end_without_entries_beside_others(layout, mode):
    func, mask = drawn(4, 6, 2, 0.3)
    x, none = point(6), torch.zeros(3, 0, dtype=F64)

    def both(x, none):
        return none.sin(), func(x) + none.sum()

    masks = (torch.zeros(0, 6).bool(), torch.zeros(0, 0).bool()), (mask, torch.zeros(4, 0).bool())
    for given in (masks, jactri.sparsity(both, (x, none))):
        asked = {"pattern": given, "layout": layout, "strategy": mode, "check": True}
        found = jactri.jacobian(both, (x, none), **asked)
        same(found[1][0], autograd(func, x))
        assert [dense(J).numel() for J in (found[0][0], found[0][1], found[1][1])] == [0, 0, 0]
    short = masks[0], (mask & False, masks[1][1])
    with pytest.raises(ValueError, match=r"derivative of outputs\[1\]\[\d\] by inputs\[0\]"):
        jactri.jacobian(both, (x, none), **asked | {"pattern": short})


def test_an_entry_that_another_input_takes():
    """Two inputs of one product: what is missing in the one is added to the other, at the same place."""
    func = lambda a, b: torch.cat([b, 2 * a + 3 * b])  # noqa: E731
    given = torch.tensor([[False], [True]]), torch.tensor([[True], [False]])
    with pytest.raises(ValueError, match=r"of output\[1\] by inputs\[1\]\[0\] is 3,"):
        jactri.jacobian(
            func, (point(1), point(1)), pattern=given, check=True, strategy="forward-mode"
        )


def test_jacobian_of_what_is_there():
    func, mask = drawn(5, 6)
    x = point(6).requires_grad_()
    hidden = x * 2
    y = func(hidden)
    of_x, of_hidden = jactri.jacobian_of(y, (x, hidden), pattern=(mask, mask), check=True)
    same(of_hidden, autograd(func, hidden.detach()))
    same(of_x, 2 * of_hidden)
    J = jactri.jacobian_of((y,), x, pattern=(mask,), layout=torch.sparse_csr)
    same(J[0], of_x)


# -- samples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples(layout, n):
    each, mask = drawn(4, 6, 0, 0.3)

    def func(x):
        return torch.stack([each(v) for v in x]) if len(x) else x[:, :4].sin()

    x = point(n, 6)
    want = torch.stack([autograd(each, v) for v in x]) if n else x.new_zeros(0, 4, 6)
    for given in (mask, mask.expand(n, 4, 6), mask.to_sparse()):
        J = jactri.jacobian(func, x, per_sample=True, pattern=given, layout=layout, check=True)
        assert dense(J).shape == want.shape
        same(J, want)
    if n:
        found = jactri.sparsity(torch.sin, x, per_sample=True)
        assert found.per_sample and found.colours.products == 1
        same(jactri.jacobian(torch.sin, x, per_sample=True, pattern=found), x.cos().diag_embed())


def test_samples_have_what_any_has():
    """A pattern of all samples, which differ."""
    scale = torch.tensor([[1.0, 0, 2], [0, 3, 4]], dtype=F64)
    x = point(2, 3)

    def func(x):
        return x**2 * scale

    given = (scale != 0).diag_embed()
    J = jactri.jacobian(
        func, x, per_sample=True, pattern=given, layout=torch.sparse_csr, check=True
    )
    assert J.shape == (2, 3, 3) and J.values().shape == (2, 3)
    same(J, (2 * x * scale).diag_embed())


def test_samples_that_mix():
    def func(x):
        return x - x.mean(0)

    with pytest.raises(RuntimeError, match="samples mix"):
        jactri.jacobian(func, point(3, 2), per_sample=True, pattern=torch.eye(2).bool())

    def whole(x):
        return unfollowed(torch.complex(x, x.flip(0))).abs()

    with pytest.raises(RuntimeError, match="samples mix"):
        jactri.jacobian(whole, point(3, 2), per_sample=True, pattern=torch.eye(2).bool())


def test_a_sample_with_an_entry_too_few():
    each, mask = drawn(4, 6, 0, 0.4)

    def func(x):
        return torch.stack([each(v) for v in x])

    i, k = mask.nonzero()[3].tolist()
    few = mask.clone()
    few[i, k] = False
    with pytest.raises(ValueError, match=rf"output\[\d, {i}\] by input\[\d, {k}\] is"):
        jactri.jacobian(func, point(3, 6), per_sample=True, pattern=few, check=True)


# -- how many products -----------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_an_arrowhead_takes_three_products(known, made):
    x = point(1000)
    given = {}
    if known:
        row = torch.arange(1000)
        at = torch.stack([torch.cat([row * 0, row, row]), torch.cat([row, row, row * 0])])
        given["pattern"] = torch.sparse_coo_tensor(at, torch.ones(3000), (1000, 1000))
    J = jactri.jacobian(arrow, x, layout=torch.sparse_csr, **given)
    assert sorted(made) == [(1, True), (2, False)]
    few = point(12)
    want = autograd(arrow, few)
    for layout in SPARSE:
        same(jactri.jacobian(arrow, few, layout=layout), want)
    if known:
        assert J.values().numel() == 1000 + 2 * 999
    v = point(1000, seed=3)
    same(J @ v, jactri.jvp(arrow, x, v)[1])


def test_arrowheads_of_samples_and_of_several_inputs(made):
    def func(x):
        return torch.cat([(x**2).sum(1, keepdim=True), x[:, 1:].sin() + x[:, :1] * x[:, 1:]], 1)

    x = point(3, 30)
    for per_sample in (True, False):
        want = jactri.jacobian(func, x, per_sample=per_sample)
        made.clear()
        same(jactri.jacobian(func, x, layout=torch.sparse_coo, per_sample=per_sample), want)
        assert sorted(made) == [(1, True), (2, False)]

    def two(x, p):
        return torch.cat([(x * p).sum()[None], x[1:] * p[0] + p[1:]]), x.cos()

    xs = point(20), point(20, seed=2)
    made.clear()
    found = jactri.jacobian(two, xs, layout=torch.sparse_csr)
    assert 0 < sum(k for k, _ in made) < 10
    for row, want in zip(found, torch.autograd.functional.jacobian(two, xs), strict=True):
        for J, w in zip(row, want, strict=True):
            same(J, w)


def test_arrowheads_of_other_calls(made):
    x = point(12)
    want = autograd(arrow, x)
    op = jactri.linearize(arrow, x)
    same(op.sparse("banded"), want)
    same(op.T.sparse(torch.sparse_csc), want.T)
    same(jactri.normal_equations(arrow, x, layout=torch.sparse_csr).matrix, want.T @ want)
    J = jactri.jacobian(arrow, x, layout=torch.sparse_csr, memory_limit="1MB", chunk_size=1)
    same(J, want)
    assert len(made) == 2 + 2 + 2 + 3


def test_an_arrowhead_with_a_pole(made):
    """Where forward mode meets an infinity behind a selection, rows are autograd's."""
    func = lambda x: torch.cat([(x**2).sum()[None], x[1:].relu().sqrt() + x[0] * x[1:]])  # noqa: E731
    for x in (point(9).abs() + 1, torch.tensor([1.0, 0, 4, -1, 0, 9, 2, 3, 0], dtype=F64)):
        made.clear()
        same(jactri.jacobian(func, x, layout=torch.sparse_csr), autograd(func, x))
    assert made[-1] == (9, True)


def test_a_direction_that_is_asked_for_is_taken(made):
    want = autograd(arrow, point(12))
    for mode in MODES[1:]:
        same(jactri.jacobian(arrow, point(12), layout=torch.sparse_csr, strategy=mode), want)
    assert not made
    pattern = jactri.sparsity(arrow, point(12))
    for mode in MODES[1:]:
        J = jactri.jacobian(arrow, point(12), pattern=pattern, strategy=mode)
        same(J, want)
        assert made.pop() == (12, mode == "reverse-mode") and not made


def test_a_band_is_left_as_it_was(made):
    torch.manual_seed(0)
    net = nn.Conv1d(1, 1, 9, padding=4).double()
    x = point(1, 1, 40)
    same(jactri.jacobian(net, x, layout=torch.sparse_csr), autograd(net, x).reshape(40, 40))
    assert not made


def test_a_loop_with_one_pattern_plans_once(monkeypatch):
    x = point(15)
    pattern = jactri.sparsity(arrow, x)
    found = []
    tables = compressing.table_of
    monkeypatch.setattr(compressing, "table_of", lambda *a: found.append(a) or tables(*a))
    monkeypatch.setattr(compressing, "_made", type(compressing._made)(8))

    def never(*args):
        raise AssertionError("nothing is to be analysed")

    for where, name in ((supports, "pattern_of"), (patterned, "pattern_of"), (patterned, "Trace")):
        monkeypatch.setattr(where, name, never)
    counts = []
    for _ in range(3):
        J = jactri.jacobian(arrow, x, pattern=pattern, layout=torch.sparse_csr)
        same(J, autograd(arrow, x))
        counts.append(len(found))
        x = x - 0.1 * J.to_dense() @ arrow(x)
    assert counts[0] > 0 and len(set(counts)) == 1


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_chunks(chunk_size, made):
    func, mask = drawn(12, 10, 3, 0.4)
    x = point(10)
    J = jactri.jacobian(func, x, pattern=mask, chunk_size=chunk_size)
    same(J, autograd(func, x))
    assert all(k <= chunk_size for k, _ in made) and len(made) > 1


# -- functions of every sort -----------------------------------------------------------------------


def hooked(change):
    def func(x):
        y = x * 2
        y.register_hook(change)
        return torch.stack([y[0] * y[1], y[2].sin(), y[2] * y[0]])

    return func


@pytest.mark.filterwarnings("ignore:a hook on gradients")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "func",
    [
        lambda x: unfollowed(torch.complex(x, x)).real.sin(),
        lambda x: Square.apply(x) * x[0],
        hooked(lambda g: 2 * g),
        hooked(lambda g: g / (1 + g.norm())),
        lambda x: torch.cat([x.detach()[:2], x[2:] ** 2]),
    ],
    ids=["by autograd", "a Function", "a hook", "a hook that is not linear", "a part"],
)
def test_what_autograd_computes(func, mode):
    x = point(3)
    want = torch.stack([
        torch.autograd.grad(func(v)[i], v, materialize_grads=True)[0]
        for i in range(3) for v in [x.clone().requires_grad_()]
    ])  # fmt: skip
    for layout in LAYOUTS:
        J = jactri.jacobian(func, x, pattern=want != 0, layout=layout, strategy=mode, check=True)
        same(J, want)


@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo, torch.sparse_csr, "banded"])
@pytest.mark.parametrize("func", [arrow, lambda x: arrow(unfollowed(torch.complex(x, x)).real)])
def test_derivatives_of_the_result(func, layout):
    x = point(7).requires_grad_()
    pattern = jactri.sparsity(arrow, x.detach())
    options = {"create_graph": True, "strict": True, "layout": layout}
    J = jactri.jacobian(func, x, pattern=pattern, check=True, **options)
    values = J.values if layout == "banded" else J if layout is torch.strided else J.values()
    want = torch.autograd.functional.jacobian(arrow, x, create_graph=True)
    (g,) = torch.autograd.grad((values**2).sum(), x)
    (t,) = torch.autograd.grad((want**2).sum(), x)
    torch.testing.assert_close(g, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Conv1d(2, 1, 3)).to(dtype)
    x = point(1, 1, 12).to(dtype)
    pattern = jactri.sparsity(net, x)
    J = jactri.jacobian(net, x, pattern=pattern, check=True)
    assert J.dtype == dtype
    torch.testing.assert_close(J, jactri.jacobian(net, x))
    few = pattern.to_dense().clone()
    k = int(J[0, 0, 2].flatten().abs().argmax())
    few[0, 0, 2, 0, 0, k] = False
    with pytest.raises(ValueError, match=rf"output\[0, 0, 2\] by input\[0, 0, {k}\]"):
        jactri.jacobian(net, x, pattern=few, check=True)


# -- where it goes ---------------------------------------------------------------------------------


def test_into_a_tensor_of_the_callers(tmp_path):
    func, mask = drawn(6, 5)
    x = point(5)
    want = autograd(func, x)
    out = torch.full((6, 5), torch.nan, dtype=F64)
    assert jactri.jacobian(func, x, pattern=mask, out=out) is out
    same(out, want)
    turned = torch.full((5, 6), torch.nan, dtype=F64).t()
    jactri.jacobian(func, x, pattern=mask, out=turned)
    same(turned, want)
    file = numpy.lib.format.open_memmap(tmp_path / "J.npy", "w+", "float64", (6, 5))
    jactri.jacobian(func, x, pattern=mask, out=file)
    same(torch.from_numpy(numpy.array(file)).to(want), want)


def test_output_progress_and_memory(capsys):
    func, mask = drawn(6, 5)
    x = point(5)
    y, J = jactri.jacobian(func, x, pattern=mask, return_output=True, progress=True)
    torch.testing.assert_close(y, func(x))
    same(J, autograd(func, x))
    assert "jacobian" in capsys.readouterr().err
    with pytest.raises(ValueError, match="memory_limit"):
        jactri.jacobian(func, x, pattern=mask, memory_limit=100)


def test_results_are_where_the_inputs_are():
    """Whatever device torch takes by default."""
    func, mask = drawn(6, 5)
    x, given = point(5), mask.cpu().numpy()
    with torch.device("meta"):
        found = [jactri.jacobian(func, x, pattern=given, layout=k, check=True) for k in LAYOUTS]
        found += [jactri.jacobian(arrow, x, layout=k) for k in SPARSE]
        pattern = jactri.sparsity(arrow, x)
        own = jactri.Sparsity.of(given, (6,), (5,))
    for J in (*found, pattern):
        assert (J.values if isinstance(J, jactri.Banded) else J).device == x.device
    assert own.nnz == mask.sum() and "⡇" in jactri.sparsity(arrow, point(40)).spy()
