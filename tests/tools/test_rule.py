"""`jactri.rule`, as somebody outside of the package uses it."""

import pytest
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.functional import hessian
from torch.autograd.functional import jacobian as truth

import jactri

F64 = torch.float64
MODES = ("forward-mode", "reverse-mode", "auto")


@pytest.fixture(autouse=True)
def only_rules():
    torch.manual_seed(0)
    with jactri.fallback("error"):
        yield


def draw(*shape):
    return torch.randn(shape, dtype=F64)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def laplacian(f, x, form=None):
    """By autograd's Hessian of every entry."""
    n = x.shape[1]
    form = torch.eye(n, dtype=F64) if form is None else form
    y = f(x)
    total = [
        (hessian(lambda v, k=k: f(v).reshape(-1)[k], x)[i, :, i] * form).sum()
        for k, i in enumerate(torch.arange(len(x)).repeat_interleave(y[0].numel()))
    ]
    return torch.stack(total).reshape(y.shape)


def swish_class(slope=lambda x, s: s * (1 + x * (1 - s))):
    class Swish(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * torch.sigmoid(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * slope(x, torch.sigmoid(x))

    return Swish


def swish_rule(Swish, **options):
    @jactri.rule(Swish, **options)
    def swish(node):
        (x,) = node.saved_tensors
        s = torch.sigmoid(x)
        return node.elementwise(
            lambda: s * (1 + x * (1 - s)), bend=lambda: s * (1 - s) * (2 + x * (1 - 2 * s))
        )

    return swish


@pytest.mark.parametrize("mode", MODES)
def test_elementwise(mode):
    Swish, weight = swish_class(), draw(3, 4)
    x = draw(5, 3)

    def f(x):
        return Swish.apply(x @ weight) @ weight.T

    with swish_rule(Swish):
        close(jactri.jacobian(f, x, strategy=mode), truth(f, x))
        close(jactri.laplacian(f, x), laplacian(f, x))
        assert jactri.jacobian(f, x, per_sample=True).shape == (5, 3, 3)
        narrow = jactri.jacobian(
            lambda x: Swish.apply(x @ weight.float()), x.float(), strategy=mode
        )
        assert narrow.dtype == torch.float32
    with pytest.raises(jactri.FallbackError):
        jactri.jacobian(f, x)


def test_create_graph_differentiates_the_rule():
    Swish = swish_class()
    x = draw(4).requires_grad_()

    def f(x):
        return Swish.apply(x.sin())

    (want,) = torch.autograd.grad(truth(f, x, create_graph=True).square().sum(), x)
    with swish_rule(Swish):
        j = jactri.jacobian(f, x, create_graph=True)
        close(torch.autograd.grad(j.square().sum(), x)[0], want)
    with jactri.rule(Swish)(
        lambda node: node.elementwise(swish_slope(node.saved_tensors[0].detach()))
    ):
        close(jactri.jacobian(f, x), truth(f, x))
        with pytest.raises(jactri.JacobianMismatch, match="second derivative"):
            jactri.jacobian(f, x, create_graph=True)


def swish_slope(x):
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def test_second_derivatives_where_autograd_has_none():
    class Once(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0].cos()

    with jactri.rule(Once)(
        lambda node: node.elementwise(node.saved_tensors[0].cos(), -node.saved_tensors[0].sin())
    ):
        x = draw(3, 2)
        close(jactri.laplacian(Once.apply, x), -x.sin())


class Positive(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x > 0)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        return torch.where(ctx.saved_tensors[0], grad, 0)


@pytest.mark.parametrize("mode", ("reverse-mode", "auto"))
def test_mask(mode):
    def f(x):
        return Positive.apply(x).sqrt().cos()

    x = draw(4, 3)
    with jactri.rule(Positive)(lambda node: node.mask(node.saved_tensors[0])):
        got = jactri.jacobian(f, x, strategy=mode)
        assert (x < 0).any() and got.isfinite().all()
        close(got, truth(f, x))
        close(jactri.laplacian(lambda x: Positive.apply(x) ** 3, x), 6 * x.clamp(min=0))


class Linear(Function):
    """``x @ w.T``, w a matrix for all or for each."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return (w @ x.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        return (w.mT @ grad.unsqueeze(-1)).squeeze(-1), None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("lead", "own"), [((), ()), ((5,), ()), ((5,), (5,)), ((2, 5), (2, 5))])
def test_matrix(mode, lead, own):
    x, w = draw(*lead, 3), draw(*own, 4, 3)

    def f(x):
        return Linear.apply(x.sin(), w).exp()

    with jactri.rule(Linear, linear=True)(
        lambda node: (node.matrix(node.saved_tensors[0]), None)
    ) as rule:
        close(jactri.jacobian(f, x, strategy=mode), truth(f, x))
        assert rule.check(f, x) == 1
        if len(lead) == 1:
            close(jactri.laplacian(f, x), laplacian(f, x))


class Circulant(Function):
    """A circular convolution of the last axis with a kernel, by FFT."""

    @staticmethod
    def forward(ctx, x, kernel):
        ctx.save_for_backward(kernel)
        return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(kernel), n=x.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        (kernel,) = ctx.saved_tensors
        return turned(grad, kernel, True), None


def turned(t, kernel, transposed):
    spectrum = torch.fft.rfft(kernel)
    spectrum = spectrum.conj() if transposed else spectrum
    return torch.fft.irfft(torch.fft.rfft(t) * spectrum, n=t.shape[-1])


@pytest.mark.parametrize("mode", MODES)
def test_push_and_pull(mode):
    x, kernel = draw(4, 6), draw(6)

    @jactri.rule(Circulant, linear=True)
    def circulant(node):
        (k,) = node.saved_tensors
        return node.linear(
            lambda t: turned(t, k, False), lambda c: turned(c, k, True), kept=[0]
        ), None

    def f(x):
        return Circulant.apply(x.tanh(), kernel).square()

    with circulant:
        close(jactri.jacobian(f, x, strategy=mode), truth(f, x))
        close(jactri.laplacian(f, x), laplacian(f, x))
        rows = truth(f, x)[range(4), :, range(4)]
        close(jactri.jacobian(f, x, per_sample=True, strategy=mode), rows)


class Scaled(Function):
    """``a * b * n`` that broadcasts; b may be a constant."""

    @staticmethod
    def forward(ctx, a, n, b):
        ctx.save_for_backward(a, b)
        ctx.n = n
        return a * b * n

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return (
            (grad * b * ctx.n).sum_to_size(a.shape),
            None,
            (grad * a * ctx.n).sum_to_size(b.shape),
        )


def scaled_rule():
    @jactri.rule(Scaled)
    def scaled(node):
        a, b = node.saved_tensors
        return node.elementwise(b * node.ctx.n), node.elementwise(a * node.ctx.n)

    @scaled.second
    def _(node, u, v):
        if u is None or v is None:
            t = v if u is None else u
            return t.new_zeros(len(t), *node.outputs[0].shape)
        return 2 * node.ctx.n * u * v

    return scaled


@pytest.mark.parametrize("mode", MODES)
def test_several_arguments(mode):
    a, b, form = draw(4, 3), draw(4, 1), draw(3, 3)
    functions = [
        lambda x: Scaled.apply(x.sin(), 3, x.exp()),
        lambda x: Scaled.apply(x.sin(), 0.5, x[:, :1].exp()),
        lambda x: Scaled.apply(x, 2, x),
        lambda x: Scaled.apply(x.exp(), 2, b),
        lambda x: Scaled.apply(b, 2, x.exp()),
    ]
    with scaled_rule() as rule:
        for f in functions:
            close(jactri.jacobian(f, a, strategy=mode), truth(f, a))
            close(jactri.laplacian(f, a), laplacian(f, a))
            close(jactri.laplacian(f, a, form), laplacian(f, a, form))
            assert rule.check(f, a) == 1

        def both(x, y):
            return Scaled.apply(x, 2, y)

        for got, want in zip(jactri.jacobian(both, (a, b)), truth(both, (a, b)), strict=True):
            close(got, want)


class Two(Function):
    @staticmethod
    def forward(ctx, x, i):
        ctx.save_for_backward(x)
        return x * x, i, x.sum(-1)

    @staticmethod
    def backward(ctx, g, _, h):
        (x,) = ctx.saved_tensors
        return 2 * x * g + h.unsqueeze(-1), None


@pytest.mark.parametrize("mode", MODES)
def test_several_outputs(mode):
    i = torch.arange(3)

    @jactri.rule(Two)
    def two(node):
        (x,) = node.saved_tensors
        n = x.shape[-1]

        def push(t):
            return t.sum(-1)

        def pull(c):
            return c.unsqueeze(-1).expand(*c.shape, n)

        return (node.elementwise(2 * x), None), None, (node.linear(push, pull, kept=[0]), None)

    @two.second
    def _(node, u, _):
        return 2 * u * u, None, u.new_zeros(u.shape[:-1])

    x = draw(4, 3)
    with two:
        got = jactri.jacobian(lambda x: Two.apply(x.sin(), i)[::2], x, strategy=mode)
        want = truth(lambda x: Two.apply(x.sin(), i)[::2], x)
        for a, b in zip(got, want, strict=True):
            close(a, b)

        def f(x):
            y, _, z = Two.apply(x.sin(), i)
            return y * z.unsqueeze(-1)

        close(jactri.laplacian(f, x), laplacian(f, x))


def test_an_op_of_torch_library():
    @torch.library.custom_op("jactri_tests::cube", mutates_args=())
    def cube(x: torch.Tensor) -> torch.Tensor:
        return x**3

    cube.register_autograd(
        lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    )
    x = draw(4, 3)
    for op in (cube, torch.ops.jactri_tests.cube.default):
        with pytest.raises(jactri.FallbackError):
            jactri.jacobian(cube, x)
        with jactri.rule(op)(
            lambda node: node.elementwise(3 * node.saved_tensors[0] ** 2, 6 * node.saved_tensors[0])
        ):
            close(jactri.laplacian(cube, x), 6 * x)


def test_an_op_of_torch():
    x = draw(4, 3)
    seen = []

    def f(x):
        return torch.sinc(x) @ x.T

    want = jactri.jacobian(f, x)

    def slope(node):
        x = node.ctx._saved_self
        seen.append(node.name)
        return node.elementwise(
            (torch.pi * x * (torch.pi * x).cos() - (torch.pi * x).sin()) / (torch.pi * x**2)
        )

    with pytest.raises(ValueError, match="rule for SincBackward0 already"):
        jactri.rule("SincBackward0")(slope)
    with jactri.rule("SincBackward0", replace=True)(slope):
        close(jactri.jacobian(f, x), want)
    assert seen == ["SincBackward0"]
    close(jactri.jacobian(f, x), want)
    assert len(seen) == 1


def test_rules_are_taken_back_in_any_order():
    Swish, x = swish_class(), draw(3)
    used = []

    def rule(name, **options):
        def read(node):
            used.append(name)
            return node.elementwise(swish_slope(node.saved_tensors[0]))

        return jactri.rule(Swish, **options)(read)

    first = rule("first")
    with pytest.raises(ValueError, match="replace=True"):
        rule("second")
    second, third = rule("second", replace=True), rule("third", replace=True)
    jactri.jacobian(Swish.apply, x)
    second.remove()
    jactri.jacobian(Swish.apply, x)
    third.remove()
    third.remove()
    jactri.jacobian(Swish.apply, x)
    assert used == ["third", "third", "first"]
    first.remove()
    with pytest.raises(jactri.FallbackError):
        jactri.jacobian(Swish.apply, x)
    with pytest.raises(RuntimeError, match="another rule"):
        first(lambda node: None)
    with rule("again"):
        jactri.jacobian(Swish.apply, x)


def test_a_class_is_meant_and_not_its_name():
    Swish, Other = swish_class(), swish_class(lambda x, s: 2 * s)
    assert Swish.__qualname__ == Other.__qualname__

    class Derived(Swish):
        pass

    x = draw(3)
    with swish_rule(Swish), jactri.fallback("allow"):
        for op in (Swish, Other, Derived):
            close(jactri.jacobian(op.apply, x), truth(op.apply, x))
        with jactri.fallback("error"):
            jactri.jacobian(Swish.apply, x)
            for op in (Other, Derived):
                with pytest.raises(jactri.FallbackError):
                    jactri.jacobian(op.apply, x)


def test_a_rule_may_decline():
    Swish, x = swish_class(), draw(3)
    with jactri.rule(Swish)(lambda node: None) as rule, jactri.fallback("allow"):
        close(jactri.jacobian(Swish.apply, x), truth(Swish.apply, x))
        with pytest.raises(ValueError, match="None"):
            rule.check(Swish.apply, x)
