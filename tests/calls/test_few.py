"""Long graphs of small nodes: few rows are computed by autograd's engine, and all else of a call stays as it is."""

import pytest
import torch
from torch import nn

import jactri

D = torch.float64


class Passes(torch.autograd.Function):
    """An identity that counts the passes through it."""

    count = 0

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        Passes.count += 1
        return g


def steps(y, count=60, scale=1.0):
    """Elementwise steps: three nodes each."""
    for k in range(count):
        y = y + 0.05 * scale * torch.sin(y + k)
    return y


def states(x):
    """A recurrence over the second axis."""
    weight = torch.linspace(-0.6, 0.7, 16, dtype=x.dtype).reshape(4, 4)
    h = x.new_zeros(len(x), 4)
    for k in range(60):
        h = torch.tanh(x[:, k % x.shape[1]] @ weight[:3] + h @ weight)
    return h


def written(q):
    """Products of matrices that are written entry by entry."""
    pose = None
    for i in range(10):
        c, s = q[:, i].cos(), q[:, i].sin()
        link = q.new_zeros(len(q), 3, 3)
        for r, row in enumerate(((c, -s, 0.3), (s, c, 0.1), (0.0, 0.0, 1.0))):
            for k, value in enumerate(row):
                link[:, r, k] = value
        pose = link if pose is None else pose @ link
    return pose[:, :2, 2]


def of_samples(f, x):
    x = x.detach().requires_grad_()
    y = f(x).flatten(1)
    rows = [torch.autograd.grad(y[:, k].sum(), x, retain_graph=True)[0] for k in range(y.shape[1])]
    return torch.stack(rows, 1).reshape(*f(x).shape, *x.shape[1:])


def whole(f, x):
    return torch.autograd.functional.jacobian(f, x)


def engine(f, x, **options):
    return jactri.explain(f, x, **options).direction == "rows by autograd"


CASES = [(states, (5, 3)), (written, (10,))]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("f, shape", CASES)
def test_rows_of_samples(f, shape, n):
    torch.manual_seed(0)
    x = torch.randn(n, *shape, dtype=D)
    assert engine(f, x, per_sample=True)
    got, want = jactri.jacobian(f, x, per_sample=True), of_samples(f, x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert got.shape == (n, *f(x).shape[1:], *shape)
    assert not got.requires_grad
    single = jactri.jacobian(f, x.float(), per_sample=True)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("f, shape", CASES)
def test_no_samples(f, shape):
    x = torch.zeros(0, *shape, dtype=D)
    assert jactri.jacobian(f, x, per_sample=True).shape == (0, *f(x).shape[1:], *shape)
    assert jactri.jacobian(f, x).shape == (*f(x).shape, *x.shape)


@pytest.mark.parametrize("f, x", [(steps, torch.linspace(-1, 1, 3)), (states, torch.ones(1, 4, 3))])
def test_the_whole_jacobian(f, x):
    x = x.to(D)
    assert engine(f, x)
    torch.testing.assert_close(jactri.jacobian(f, x), whole(f, x), rtol=1e-12, atol=1e-14)
    y, got = jactri.jacobian(f, x, strategy="reverse-mode", return_output=True)
    assert torch.equal(y, f(x))
    torch.testing.assert_close(got, whole(f, x), rtol=1e-12, atol=1e-14)


def test_several_ends():
    x, z = torch.ones(2, dtype=D), torch.full((2,), 0.3, dtype=D)

    def f(x, z):
        y = steps(x * z)
        return y.sum(), y, z.detach() + 1, (3 * x).sum()

    assert engine(f, (x, z))
    got, want = jactri.jacobian(f, (x, z)), whole(f, (x, z))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("per_sample", [True, False, "assume"])
def test_derivatives_of_rows(per_sample):
    x = torch.linspace(-1, 1, 2, dtype=D).reshape(2, 1)

    def total(x):
        return jactri.jacobian(steps, x, per_sample=per_sample, create_graph=True).square().sum()

    def want(x):
        (g,) = torch.autograd.grad(steps(x).sum(), x, create_graph=True)
        return g.square().sum()

    a, b = (torch.autograd.functional.hessian(f, x) for f in (total, want))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "n, outputs, proven, assumed",
    [
        (2, 3, 2 + 3, 3),  # two masks, three rows
        (5, 2, 4 + 2, 2),
        (3, 5, 3 + 5, 5),
        (1, 4, 4, 4),
    ],
)
def test_passes_are_those_that_are_predicted(n, outputs, proven, assumed):
    x = torch.linspace(-1, 1, n * outputs, dtype=D).reshape(n, outputs)

    def f(x):
        return Passes.apply(steps(x))

    for per_sample, passes in ((True, proven), ("assume", assumed)):
        Passes.count = 0
        jactri.jacobian(f, x, per_sample=per_sample)
        assert Passes.count == passes
    plan = jactri.explain(f, x, per_sample="assume")
    assert (plan.chunks, plan.fallbacks, plan.steps) == (outputs, (), ())
    assert f"for {outputs} rows, against" in plan.reason
    assert "finite" in str(plan)


def test_many_rows_are_read():
    x = torch.linspace(-1, 1, 40, dtype=D)
    assert jactri.explain(steps, x).steps
    torch.testing.assert_close(jactri.jacobian(steps, x), whole(steps, x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "forward-mode"}, {"strategy": "mixed"}, {"memory_limit": 3000},
        {"backend": "torch", "strategy": "forward-mode"},
    ],
)  # fmt: skip
def test_what_a_caller_asks_for_is_kept(options):
    x = torch.linspace(-1, 1, 3, dtype=D)
    plan = jactri.explain(steps, x, **options)
    assert plan.steps
    assert plan.peak_bytes < 3000
    got = jactri.jacobian(steps, x, **options)
    torch.testing.assert_close(got, whole(steps, x), rtol=1e-12, atol=1e-14)


def test_what_is_read():
    """Short graphs, large nodes, structure that is asked for."""
    x = torch.linspace(-1, 1, 3, dtype=D)
    assert not engine(lambda x: steps(x, 10), x)
    wide = torch.linspace(-1, 1, 4096, dtype=D).reshape(2, 2048)
    assert not engine(lambda x: steps(x).reshape(2, 2, -1).sum(2), wide, per_sample=True)
    assert jactri.jacobian(steps, x, layout=torch.sparse_coo).values().numel() == 3
    with jactri.fallback("error"):
        assert jactri.explain(steps, x).steps
        jactri.jacobian(steps, x)


def test_into_memory_of_the_caller():
    x = torch.linspace(-1, 1, 6, dtype=D).reshape(2, 3)
    for shape in ((2, 3, 3), (3, 2, 3)):
        out = torch.full(shape, 7.0, dtype=D)
        out = out if shape[0] == 2 else out.transpose(0, 1)
        assert jactri.jacobian(steps, x, per_sample=True, out=out) is out
        torch.testing.assert_close(out, of_samples(steps, x), rtol=1e-12, atol=1e-14)


def test_samples_that_mix_are_refused():
    x = torch.linspace(-1, 1, 6, dtype=D).reshape(2, 3)
    for call in (jactri.jacobian, jactri.explain):
        with pytest.raises(RuntimeError, match="samples mix: the op"):
            call(lambda x: steps(x - x.mean(0)), x, per_sample=True)


def test_zeros_of_structure_beside_infinite_derivatives():
    """Autograd's row has 0 times infinity there."""
    x = torch.tensor([0.0, 1.0], dtype=D)

    def f(x):
        for _ in range(80):
            x = x + 0.05 * torch.sin(x)
        return x.sqrt()

    rows = whole(f, x)
    assert rows.isnan().any()
    got = jactri.jacobian(f, x)
    torch.testing.assert_close(got, torch.tensor([[torch.inf, 0.0], [0.0, rows[1, 1]]], dtype=D))
    out = torch.ones(2, 2, dtype=D)
    assert torch.equal(jactri.jacobian(f, x, out=out), got)


def test_hooks_are_looked_at():
    x = torch.linspace(-1, 1, 3, dtype=D)

    def f(x):
        y = steps(x)
        if y.requires_grad:
            y.register_hook(lambda g: 2 * g)
        return 1.0 * y

    with pytest.warns(UserWarning, match="a hook on gradients"):
        got = jactri.jacobian(f, x)
    torch.testing.assert_close(got, 2 * whole(steps, x), rtol=1e-12, atol=1e-14)


def test_tensors_of_the_caller_are_left_alone():
    """The engine writes to tensors that retain gradients, and runs all of a graph where no input is asked for."""
    x = torch.linspace(-1, 1, 3, dtype=D, requires_grad=True)
    middle = steps(x, 30)
    middle.retain_grad()
    y = steps(middle, 60)
    got = jactri.jacobian_of(y, (x, middle))
    want = [
        torch.stack([torch.autograd.grad(v, t, retain_graph=True)[0] for v in y])
        for t in (x, middle)
    ]
    torch.testing.assert_close(got, tuple(want), rtol=1e-12, atol=1e-14)

    w = nn.Parameter(torch.ones(3, 3, dtype=D))
    for more in ({}, {"per_sample": True}, {"chunk_size": 2}):
        given = x.detach().expand(3, 3).clone()
        moved, fixed = jactri.jacobian(lambda x: (steps(x[:, :1]), w * 2.0), given, **more)
        assert w.grad is None and not fixed.any() and moved.any()

    def f(x):
        h = steps(x, 30)
        if h.requires_grad:
            h.retain_grad()
        return steps(h)

    torch.testing.assert_close(jactri.jacobian(f, x.detach()), whole(f, x), rtol=1e-12, atol=1e-14)


def own(backward):
    """A cube whose backward is ``backward(g, x)``."""
    methods = {
        "forward": lambda ctx, x: (ctx.save_for_backward(x), x**3)[1],
        "backward": lambda ctx, g: backward(g, *ctx.saved_tensors),
    }
    return type(
        "Own", (torch.autograd.Function,), {k: staticmethod(m) for k, m in methods.items()}
    ).apply


@pytest.mark.parametrize("of", ["few", "whole"])
def test_backwards_may_do_with_their_cotangent_what_they_do(of):
    """They write to it, view it, and give nothing for zeros."""
    path = steps if of == "few" else (lambda x: torch.exp(1j * x).lerp(torch.exp(2j * x), 0.5).real)
    written, viewed, none = (
        own(lambda g, x: g.mul_(3 * x**2)),
        own(lambda g, x: (g.view(-1) * 3 * x.reshape(-1) ** 2).view(x.shape)),
        own(lambda g, x: 3 * g * x**2 if g.any() else None),
    )
    for x in (torch.linspace(-1, 1, 6, dtype=D).view(3, 2), torch.ones(2, 1, dtype=D)):
        for func in (lambda x: written(path(x)), lambda x: viewed(path(x))):
            for more in ({}, {"chunk_size": 2}, {"strategy": "reverse-mode"}):
                want = of_samples(lambda x: path(x) ** 3, x)
                got = jactri.jacobian(func, x, per_sample=True, **more)
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)

    def func(x, z):
        return torch.stack([path(x).sum(), none(path(z)).sum(), none(z).sum()])

    given = torch.linspace(-1, 1, 3, dtype=D), torch.linspace(0.5, 1, 2, dtype=D)
    want = torch.autograd.functional.jacobian(
        lambda x, z: torch.stack([path(x).sum(), (path(z) ** 3).sum(), (z**3).sum()]), given
    )
    for more in ({}, {"chunk_size": 1}, {"chunk_size": 2}):
        got = jactri.jacobian(func, given, **more)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_a_backward_that_is_not_recorded_says_so():
    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, g):
            return (2 * ctx.saved_tensors[0] * g).detach()

    x = torch.linspace(-1, 1, 3, dtype=D, requires_grad=True)
    got = jactri.jacobian(lambda x: Bare.apply(steps(x)), x, create_graph=True)
    torch.testing.assert_close(
        got.detach(), whole(lambda x: steps(x) ** 2, x.detach()), rtol=1e-12, atol=1e-14
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        got.sum().backward()


def test_weights_that_are_gone():
    net, x = nn.Linear(3, 3).double(), torch.ones(1, 3, dtype=D)

    def f(x):
        y = net(steps(x))
        net.weight.untyped_storage().resize_(0)
        return y

    with pytest.raises(RuntimeError, match="was freed after the forward pass"):
        jactri.jacobian(f, x)


@pytest.mark.parametrize("n", [1, 3])
def test_one_cotangent_is_one_backward_pass(n):
    x = torch.linspace(-1, 1, 2 * n, dtype=D).reshape(n, 2)
    c = (
        torch.randn(n, 2, dtype=D).T.contiguous().T
    )  # backwards may write to what they get, not to this
    given = c.clone()
    cube = own(lambda g, x: g.mul_(3 * x**2))

    def f(x, z):
        return cube(Passes.apply(x).sin()), z.detach()

    Passes.count = 0
    _, (of_x, of_z) = jactri.vjp(f, (x, torch.ones(3)), (c, torch.ones(3)))
    assert Passes.count == 1
    assert torch.equal(c, given)
    torch.testing.assert_close(of_x, c * 3 * x.sin() ** 2 * x.cos(), rtol=1e-12, atol=1e-14)
    assert torch.equal(of_z, torch.zeros(3))
    block = jactri.vjp(f, (x, torch.ones(3)), (c[None], torch.ones(1, 3)))[1]
    torch.testing.assert_close(block, (of_x[None], of_z[None]), rtol=0, atol=0)


def test_a_scalar_function_is_one_backward_pass():
    x = torch.linspace(-1, 1, 3, dtype=D)

    def f(x):
        return Passes.apply(x).sin().prod()

    want = torch.autograd.functional.jacobian(f, x)
    for call in (jactri.jacobian, jactri.gradient):
        Passes.count = 0
        torch.testing.assert_close(call(f, x), want, rtol=1e-12, atol=1e-14)
        assert Passes.count == 1
    Passes.count, out = 0, torch.full((3,), torch.nan, dtype=D)
    assert jactri.jacobian(f, x, out=out) is out and Passes.count == 1
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-14)
    assert jactri.explain(f, x).reason == "one row is one backward pass"
    alone = jactri.jacobian(lambda x: f(x[0])[None], x[None], per_sample=True)
    torch.testing.assert_close(alone, want[None], rtol=1e-12, atol=1e-14)
    z = x.clone().requires_grad_()  # a derivative of a derivative is that of the rules
    torch.autograd.gradcheck(lambda z: jactri.gradient(f, z, create_graph=True), z)
