"""Products with the Jacobian, for one vector and for blocks, against Jacobians of torch in float64."""

import pytest
import torch
from common import F64, Cube, make, unfollowed
from tolerances import assert_close, assert_gradients_close, assert_same_tree
from torch import nn
from torch.autograd.functional import jacobian as truth_of
from torch.nn.attention import SDPBackend, sdpa_kernel

import jactri
from jactri._src.calls.vectors import pull, push
from jactri._src.prologue.arguments import Options


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))


def several(a, b):
    """Outputs of which one depends on the others, and one is there twice."""
    h = torch.sin(a) * b[:1]
    return h, torch.softmax(h @ b.t(), -1), h, (h * h).sum()


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4)), [(3, 5)]),
    "one point": (lambda: nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 4)), [(5,)]),
    "no samples": (lambda: nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4)), [(0, 5)]),
    "one sample": (lambda: nn.Sequential(nn.Linear(5, 9), nn.SiLU(), nn.Linear(9, 4)), [(1, 5)]),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        [(2, 2, 4, 5)],
    ),
    "attention": (Attention, [(2, 3, 6)]),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), [(6, 4)]),
    "several": (None, [(3, 4), (5, 4)]),
    "elementwise": (lambda: nn.Softplus(), [(7,)]),
    "a scalar": (lambda: nn.Tanh(), [()]),
}


def case(name, dtype=F64):
    maker, shapes = NETS[name]
    func = several if maker is None else make(maker).to(dtype)
    gen = torch.Generator().manual_seed(1)
    return func, tuple(torch.randn(s, generator=gen, dtype=F64).to(dtype) for s in shapes)


def vectors(tensors, columns, dtype=None):
    gen = torch.Generator().manual_seed(2)
    lead = () if columns is None else (columns,)
    return tuple(
        torch.randn((*lead, *t.shape), generator=gen, dtype=F64).to(dtype or t.dtype)
        for t in tensors
    )


def rows_of(func, xs):
    """``J[j][i]`` of torch in float64, whatever func's dtype."""
    if isinstance(func, nn.Module):
        func = make(type(func)) if isinstance(func, Attention) else func.double()
    wide = tuple(x.double() for x in xs)
    if not all(x.numel() for x in xs):  # torch stacks nothing
        return [
            [torch.zeros(*y.shape, *x.shape, dtype=F64) for x in xs] for y in as_tuple(func(*wide))
        ]
    return truth_of(lambda *x: as_tuple(func(*x)), wide)


def as_tuple(y):
    return y if isinstance(y, tuple) else (y,)


def pushed(rows, ts):
    """``sum_i J[j][i] t_i``, for blocks."""

    def term(block, t):
        n = t.dim() - 1
        axes = list(range(1, n + 1)), list(range(block.dim() - n, block.dim()))
        return torch.tensordot(t.double(), block, axes)

    return tuple(sum(map(term, row, ts)) for row in rows)


def pulled(rows, cs):
    """``sum_j c_j J[j][i]``, for blocks."""

    def term(block, c):
        n = c.dim() - 1
        return torch.tensordot(c.double(), block, (list(range(1, n + 1)), list(range(n))))

    return tuple(sum(map(term, column, cs)) for column in zip(*rows, strict=True))


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("columns", [None, 1, 6])
@pytest.mark.parametrize("name", NETS)
def test_against_the_jacobian(name, columns, dtype):
    func, xs = case(name, dtype)
    ts = vectors(xs, columns)
    several_in = len(xs) > 1
    output, product = jactri.jvp(func, xs if several_in else xs[0], ts if several_in else ts[0])
    cs = vectors(as_tuple(output), columns)
    tupled = isinstance(output, tuple)
    again, other = jactri.vjp(func, xs if several_in else xs[0], cs if tupled else cs[0])
    for a, b in zip(as_tuple(output), as_tuple(again), strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    length = 64
    _, beside = jactri.jvp(
        func, xs if several_in else xs[0], ts if several_in else ts[0], differentiate=None
    )
    for got, vs, times in ((product, ts, pushed), (beside, ts, pushed), (other, cs, pulled)):
        if columns is None:
            vs = tuple(v.unsqueeze(0) for v in vs)
        want = times(rows_of(func, xs), vs)
        for g, w in zip(as_tuple(got), want, strict=True):
            assert g.dtype == dtype and not g.requires_grad
            assert_close(g if columns is not None else g.unsqueeze(0), w, dtype, length=length)


def test_vectors_are_not_written_to():
    """Those of one shape have layouts that are equal, and not the same object."""
    xs = torch.randn(2, 3, 4, dtype=F64).unbind()
    vs = tuple(vectors(xs, 2))
    for func in (
        lambda a, b: (a.lerp(b, 0.3), (a * 0.5).add(b.sin())),
        lambda a, b: (a * 2, b.exp()),
    ):
        for call in (jactri.jvp, jactri.vjp):
            kept = [v.clone() for v in vs]
            call(func, xs, vs)
            assert all(map(torch.equal, vs, kept))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["mlp", "images", "attention", "several"])
def test_chunks(name, chunk_size):
    func, xs = case(name)
    ts = vectors(xs, 5)
    output, whole = jactri.jvp(func, xs, ts)
    _, product = jactri.jvp(func, xs, ts, chunk_size=chunk_size)
    assert_same_tree(product, whole, F64, length=64)
    cs = vectors(as_tuple(output), 5)
    cs = cs if isinstance(output, tuple) else cs[0]
    _, whole = jactri.vjp(func, xs, cs)
    _, product = jactri.vjp(func, xs, cs, chunk_size=chunk_size)
    assert_same_tree(product, whole, F64, length=64)


def test_memory_limit():
    net = make(lambda: nn.Sequential(nn.Linear(8, 200), nn.Tanh(), nn.Linear(200, 3)))
    x, t, c = (
        torch.randn(4, 8, dtype=F64),
        torch.randn(64, 4, 8, dtype=F64),
        torch.randn(64, 4, 3, dtype=F64),
    )
    for call, v in ((jactri.jvp, t), (jactri.vjp, c)):
        whole = call(net, x, v)[1]
        assert_close(call(net, x, v, memory_limit="60KB")[1], whole, F64, length=200)
        with pytest.raises(
            ValueError,
            match=r"one seed at a time takes .* memory_limit of \d+ bytes",
        ):
            call(net, x, v, memory_limit=1000)


@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("name", ["mlp", "images", "attention", "several"])
def test_create_graph_differentiates_in_inputs_and_vectors(name, columns):
    func, xs = case(name)
    xs = tuple(x.requires_grad_() for x in xs)
    ts = tuple(t.requires_grad_() for t in vectors(xs, columns))
    output, product = jactri.jvp(func, xs, ts, True)
    cs = tuple(c.requires_grad_() for c in vectors(as_tuple(output), columns))
    _, other = jactri.vjp(func, xs, cs if isinstance(output, tuple) else cs[0], True)
    assert as_tuple(output)[-1].requires_grad
    with sdpa_kernel(SDPBackend.MATH):  # torch cannot differentiate its fused attention twice
        rows = truth_of(lambda *x: as_tuple(func(*x)), xs, create_graph=True)
    for got, vs, times in ((as_tuple(product), ts, pushed), (other, cs, pulled)):
        want = times(rows, vs if columns else tuple(v.unsqueeze(0) for v in vs))
        weights = vectors(got, None)
        ours = sum((g * w).sum() for g, w in zip(got, weights, strict=True))
        theirs = sum(
            (g * (w if columns else w.unsqueeze(0))).sum()
            for g, w in zip(want, weights, strict=True)
        )
        wrt = (*xs, *vs)
        first = torch.autograd.grad(ours, wrt, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(theirs, wrt, create_graph=True, allow_unused=True)
        assert_gradients_close(first, second, F64, length=100)
    assert all(x.grad is None for x in xs)


def test_chunks_differentiate():
    func, (x,) = case("mlp")
    t = vectors((x,), 4)[0].requires_grad_()
    x.requires_grad_()
    grads = [
        torch.autograd.grad(jactri.jvp(func, x, t, True, chunk_size=n)[1].pow(2).sum(), (x, t))
        for n in (None, 3)
    ]
    assert_gradients_close(grads[1], grads[0], F64, length=64)


def test_a_block_without_columns():
    func, xs = case("mlp")
    assert jactri.jvp(func, xs[0], torch.zeros(0, 3, 5, dtype=F64))[1].shape == (0, 3, 4)
    assert jactri.vjp(func, xs[0], torch.zeros(0, 3, 4, dtype=F64))[1].shape == (0, 3, 5)


def test_strides_and_dtypes_of_vectors():
    func, (x,) = case("mlp")
    t = vectors((x,), 4)[0]
    want = jactri.jvp(func, x, t)[1]
    odd = t.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert_close(jactri.jvp(func, x.t().contiguous().t(), odd)[1], want, F64)
    assert_close(jactri.jvp(func, x, t[:1].expand(4, -1, -1))[1], want[:1].expand(4, -1, -1), F64)
    assert jactri.jvp(func, x, t.float())[1].dtype == F64


def test_independent_and_constant():
    x, t = torch.randn(3, dtype=F64), torch.randn(2, 3, dtype=F64)
    func = lambda a, b: (a * 2, torch.ones(4, dtype=F64), b)  # noqa: E731
    _, product = jactri.jvp(func, (x, x), (t, t))
    assert_same_tree(product, (2 * t, torch.zeros(2, 4, dtype=F64), t), F64)
    _, product = jactri.vjp(func, (x, x), (t, torch.ones(2, 4, dtype=F64), torch.zeros_like(t)))
    assert_same_tree(product, (2 * t, torch.zeros_like(t)), F64)
    assert product[1].data_ptr() != t.data_ptr()


def test_recorded_computations():
    """Inputs inside of the graph, of which one depends on the other: derivatives are total, as autograd's."""
    x = torch.randn(3, dtype=F64, requires_grad=True)
    h = x.sin()
    y = h * x
    t = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    (got,) = push((y,), (x, h), t, Options())
    want = t[0] * (h + x * x.cos()) + t[1] * x
    assert_close(got, want.detach(), F64)
    (got,) = push((y,), (x, h), (t[0], None), Options())
    assert_close(got, (t[0] * (h + x * x.cos())).detach(), F64)
    got = pull((y, h), (x, h), (t[0], t[1]), Options())
    want = t[0] * (h + x * x.cos()) + t[1] * x.cos(), t[0] * x + t[1]
    for g, w in zip(got, want, strict=True):
        assert_close(g, w.detach(), F64)


def test_custom_functions_and_graphs_that_cannot_be_read():
    x, t = torch.randn(4, dtype=F64), torch.randn(3, 4, dtype=F64)
    for func in (Cube.apply, lambda v: unfollowed(torch.fft.fft(v.exp())).abs()):
        J = truth_of(func, x)
        assert_close(jactri.jvp(func, x, t)[1], t @ J.t(), F64)
        assert_close(jactri.vjp(func, x, t)[1], t @ J, F64)
        assert_close(jactri.vjp(func, x, t[0])[1], t[0] @ J, F64)
    x, t = x.requires_grad_(), t.requires_grad_()
    J = truth_of(func, x, create_graph=True)
    for call, want in ((jactri.jvp, t @ J.t()), (jactri.vjp, t @ J)):
        ours = torch.autograd.grad(call(func, x, t, True)[1].pow(2).sum(), (x, t))
        theirs = torch.autograd.grad(want.pow(2).sum(), (x, t), retain_graph=True)
        assert_gradients_close(ours, theirs, F64, length=16)


def test_complex_outputs():
    x = torch.randn(4, dtype=F64)
    t = torch.randn(2, 4, dtype=F64)
    product = jactri.jvp(torch.fft.fft, x, t)[1]
    assert_close(product, torch.fft.fft(t), F64)
    product = jactri.vjp(torch.fft.fft, x, product)[1]
    want = torch.stack(
        [torch.autograd.functional.vjp(torch.fft.fft, x, torch.fft.fft(v))[1] for v in t]
    )
    assert_close(product, want, F64)


@pytest.mark.parametrize("columns", [None, 3])
def test_inside_of_transforms(columns):
    func, (x,) = case("mlp")
    t = vectors((x,), columns)[0]
    want = jactri.jvp(func, x, t)[1]
    place = 0 if columns is None else 1
    for call, v, to in ((jactri.jvp, t, want), (jactri.vjp, want, jactri.vjp(func, x, want)[1])):
        got = torch.func.vmap(lambda a, b, call=call: call(func, a, b)[1], (0, place), place)(x, v)
        assert_close(got, to, F64, length=64)
    grads = torch.func.grad(lambda v: jactri.vjp(func, v, want)[1].pow(2).sum())(x)
    x.requires_grad_()
    ours = torch.autograd.grad(jactri.vjp(func, x, want, True)[1].pow(2).sum(), x)
    assert_gradients_close(ours, [grads], F64, length=100)


def test_inference_mode():
    func, (x,) = case("mlp")
    t = vectors((x,), 2)[0]
    want = jactri.jvp(func, x, t)[1]
    with torch.inference_mode():
        assert torch.equal(jactri.jvp(func, x.clone(), t.clone())[1], want)
        assert jactri.vjp(func, x, want.clone())[1].shape == (2, 3, 5)


def one(x):
    return (x * torch.arange(1.0, 4, dtype=F64)).sin()


def both_calls(name, *given, **options):
    return getattr(jactri, name)(*given, **options), getattr(torch.autograd.functional, name)(
        *given, **options
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_vectors_that_are_left_out(shape):
    x = torch.full(shape, 0.3, dtype=F64)
    cases = [("jvp", one, x), ("vjp", lambda v: v.sin().reshape(shape), x)]
    cases += [("jvp", lambda v: (one(v), v), (x,)), ("vjp", lambda v: (v.sum(),), (x,))]
    for name, func, inputs in cases:
        ours, theirs = both_calls(name, func, inputs)
        for got, want in zip(ours, theirs, strict=True):
            assert isinstance(got, tuple) == isinstance(want, tuple)
            got, want = (t if isinstance(t, tuple) else (t,) for t in (got, want))
            for g, w in zip(got, want, strict=True):
                assert_close(g, w, F64)
    got = torch.func.vmap(lambda v: jactri.vjp(lambda t: t.sin().sum(), v)[1])(x.reshape(1, -1))
    assert_close(got, x.cos().reshape(1, -1), F64)
    got = torch.func.vmap(lambda v: jactri.jvp(torch.sin, v)[1])(x.reshape(1))
    assert_close(got, x.cos().reshape(1), F64)


def test_vectors_that_cannot_be_left_out():
    x = torch.rand(2, dtype=F64)
    for name, func, inputs, match in (
        ("jvp", torch.sin, x, r"tangents of jvp .* inputs .* shapes \(2,\)"),
        ("jvp", torch.add, (x[:1], x[:1]), r"tangents of jvp .* shapes \(1,\), \(1,\)"),
        ("vjp", torch.sin, x, r"cotangents of vjp .* outputs .* shapes \(2,\)"),
        ("vjp", lambda v: (v.sum(), v.prod()), x, r"cotangents of vjp .* shapes \(\), \(\)"),
    ):
        with pytest.raises(RuntimeError):
            getattr(torch.autograd.functional, name)(func, inputs)
        with pytest.raises(RuntimeError, match=match):
            getattr(jactri, name)(func, inputs)


def pair(first, second):
    """A function of two inputs and two outputs, and a vector for either end."""
    return lambda x, y: (first(x, y), second(x, y))


STRICT = {
    "all depend": (pair(torch.mul, torch.add), False),
    "each output on one input": (pair(lambda x, y: x.sin(), lambda x, y: y.sin()), False),
    "an input unused": (pair(lambda x, y: x.sin(), lambda x, y: x.cos()), False),
    "an output constant": (pair(torch.mul, lambda x, y: torch.ones(3, dtype=F64)), False),
    "an output of other tensors": (pair(torch.mul, lambda x, y: W * 2), False),
    "detached": (pair(torch.mul, lambda x, y: (x * y).detach()), False),
    "linear": (pair(torch.add, torch.sub), False),
    "linear, with a graph": (pair(torch.add, torch.sub), True),
    "cubic, with a graph": (pair(lambda x, y: x**3 * y**2, lambda x, y: y**3 * x**2), True),
    "complex inside": (pair(lambda x, y: torch.fft.fft(x * y).abs(), lambda x, y: x.sin()), False),
    "by autograd": (
        pair(lambda x, y: unfollowed(torch.fft.fft(x * y)).abs(), lambda x, y: x.sin()),
        False,
    ),
    "by autograd, unused": (
        pair(lambda x, y: unfollowed(torch.fft.fft(x)).abs(), lambda x, y: x.sin()),
        False,
    ),
}
W = torch.ones(3, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("name", ["jvp", "vjp"])
@pytest.mark.parametrize("situation", STRICT)
def test_strict_is_as_strict_as_torch(situation, name):
    func, graph = STRICT[situation]
    inputs = tuple(torch.rand(3, dtype=F64) + 0.1 for _ in range(2))
    given = func, inputs, (inputs[1], inputs[0]), graph
    try:
        _, theirs = getattr(torch.autograd.functional, name)(*given, True)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="strict"):
            getattr(jactri, name)(*given, True)
        return
    _, ours = getattr(jactri, name)(*given, True)
    for got, want in zip(ours, theirs, strict=True):
        assert_close(got.detach(), want.detach(), F64)


def test_complex_functions_of_a_number():
    x, t = torch.tensor(0.4, dtype=F64), torch.tensor(2.0, dtype=F64)
    _, product = jactri.jvp(lambda x: torch.view_as_real(torch.polar(x, x)), x, t)
    want = torch.stack([x.cos() - x * x.sin(), x.sin() + x * x.cos()])
    assert_close(product, 2 * want, F64)


def test_strict_inside_of_a_transform_is_refused():
    x = torch.rand(2, 3, dtype=F64)
    for name in ("jvp", "vjp"):
        with pytest.raises(RuntimeError, match=r"strict is not available .* torch.func transform"):
            torch.func.vmap(
                lambda v, name=name: getattr(jactri, name)(torch.sin, v, v, strict=True)[1]
            )(x)


BAD = [
    (lambda f, x, t: (f, x, t[:, :2]), r"tangents\[0\] has shape \(4, 2, 5\); expected \(3, 5\)"),
    (lambda f, x, t: (f, x, t[0, 0]), r"tangents\[0\] has shape \(5,\); expected \(3, 5\)"),
    (lambda f, x, t: (f, x, (t, t)), "nested as the inputs: got 2 for 1"),
    (lambda f, x, t: (f, x, t.long()), r"tangents\[0\] has dtype torch.int64; expected"),
    (lambda f, x, t: (f, x, t + 0j), r"tangents\[0\] is complex"),
    (lambda f, x, t: (f, x.long(), t), "floating point"),
    (
        lambda f, x, t: (torch.add, (x, x), (t, t[:2])),
        r"tangents\[0\] is a block of K = 4 and tangents\[1\] is a block of K = 2",
    ),
    (
        lambda f, x, t: (torch.add, (x, x), (t, t[0])),
        r"tangents\[0\] is a block of K = 4 and tangents\[1\] is one vector",
    ),
]


@pytest.mark.parametrize(("make_bad", "message"), BAD)
def test_bad_tangents(make_bad, message):
    func, (x,) = case("mlp")
    with pytest.raises(RuntimeError, match=message):
        jactri.jvp(*make_bad(func, x, vectors((x,), 4)[0]))


def test_bad_cotangents_and_options():
    func, (x,) = case("mlp")
    with pytest.raises(
        RuntimeError,
        match=r"cotangents\[0\] has shape \(3, 5\); expected \(3, 4\), the shape of out",
    ):
        jactri.vjp(func, x, x)
    with pytest.raises(RuntimeError, match="nested as the outputs"):
        jactri.vjp(lambda v: (v, v), x, x)
    with pytest.raises(TypeError, match="tangents"):
        jactri.jvp(func, x, [x])
    with pytest.raises(TypeError, match="outputs"):
        jactri.vjp(lambda v: [v], x, x)
    with pytest.raises(IndexError):
        jactri.jvp(func, (), ())
    with pytest.raises(ValueError, match="chunk_size"):
        jactri.jvp(func, x, x, chunk_size=0)
    with pytest.raises(ValueError, match="backend"):
        jactri.vjp(func, x, x, backend="numpy")


def test_nothing_of_the_callers_changes():
    func, (x,) = case("mlp")
    t = vectors((x,), 2)[0]
    before = x.clone(), t.clone(), torch.get_rng_state()
    jactri.jvp(func, x, t)
    jactri.vjp(func, x, jactri.jvp(func, x, t)[1])
    assert torch.equal(x, before[0]) and torch.equal(t, before[1]) and not x.requires_grad
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(p.grad is None for p in func.parameters())
