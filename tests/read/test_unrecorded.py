"""Backward code that autograd does not record: first derivatives are right, second ones are refused by name."""

import warnings

import pytest
import torch
from common import F64, MODES, unfollowed
from torch.autograd.function import once_differentiable

import jactri


def function(name, backward, forward=torch.sin, save=lambda x, y: (x,)):
    """An elementwise autograd.Function; ``backward`` takes the cotangent and what was saved."""

    def run(ctx, x):
        y = forward(x)
        ctx.save_for_backward(*save(x, y))
        ctx.x = x
        return y

    def pull(ctx, g):
        return backward(g, *ctx.saved_tensors)

    methods = {"forward": staticmethod(run), "backward": staticmethod(pull)}
    return type(name, (torch.autograd.Function,), methods).apply


def marked():
    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cos()

    return Marked.apply


def by_attribute():
    class Attribute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = x
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.kept.detach().cos()

    return Attribute.apply


def without_grad(g, x):
    with torch.no_grad():
        return g * x.cos()


def numpy(g, x):
    return torch.from_numpy(g.detach().numpy() * x.detach().cos().numpy())


def undetached_numpy(g, x):
    return torch.from_numpy(g.numpy()) * x.detach().cos()


def inner(g, x):
    """As an implicit layer: the derivative of another computation, without its graph."""
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        return torch.autograd.grad(z.sin(), z, g)[0]


def doubled(g, x):
    return 0.5 * g * x.cos() + 0.5 * g.detach() * x.cos()


UNRECORDED = {
    "once_differentiable": marked(),
    "no_grad": function("NoGrad", without_grad),
    "numpy": function("Numpy", numpy),
    "numpy of what requires grad": function("Plain", undetached_numpy),
    "cotangent detached": function("Detached", lambda g, x: g.detach() * x.cos()),
    "a part of the cotangent detached": function("Partly", doubled),
    "input detached": function("Frozen", lambda g, x: g * x.detach().cos()),
    "input by .data": function("Data", lambda g, x: g * x.data.cos()),
    "a factor detached": function(
        "Factor", lambda g, x: g * (2 * x.detach()), lambda x: x.square()
    ),
    "one of two factors detached": function(
        "Product", lambda g, x: g * 3 * x * x.detach(), lambda x: x**3
    ),
    "output detached": function(
        "Output", lambda g, y: g * y.detach(), torch.exp, lambda x, y: (y,)
    ),
    "an attribute detached": by_attribute(),
    "another derivative": function("Inner", inner),
}


def x43():
    return torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))


W = torch.linspace(-1, 1, 6, dtype=F64).reshape(3, 2)


def net(own):
    return lambda v: torch.tanh(own(torch.tanh(v) + 0.3) @ W)


def column(own):
    return lambda v: own(v).sum(1)


def loss(jac):
    """A value and its derivative in one loss, as a penalty: its gradient has a path around the second derivative."""

    def call(f, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad((1.0 * f(x)).sum() + jac(f, x).square().sum(), x)[0]

    return call


def twice(f, x):
    return jactri.jacobian(lambda u: jactri.jacobian(lambda v: f(v).sum(), u, create_graph=True), x)


def by_jvp(f, x):
    return jactri.jvp(f, x, torch.ones_like(x), create_graph=True)[1]


def by_vjp(f, x):
    return jactri.vjp(f, x, torch.ones_like(f(x)), create_graph=True)[1]


SECOND = {
    "laplacian": jactri.laplacian,
    "laplacian, create_graph": lambda f, x: jactri.laplacian(f, x, create_graph=True),
    "bilaplacian": jactri.bilaplacian,
    "func.hessian": lambda f, x: jactri.func.hessian(lambda v: f(v).sum())(x),
    "func.jacrev of func.jacrev": lambda f, x: jactri.func.jacrev(
        jactri.func.jacrev(lambda v: f(v).sum())
    )(x),
    "func.jacfwd of func.jacrev": lambda f, x: jactri.func.jacfwd(
        jactri.func.jacrev(lambda v: f(v).sum())
    )(x),
    "jacobian of jacobian": twice,
    "divergence of gradient": lambda f, x: jactri.divergence(
        lambda v: jactri.gradient(lambda u: f(u).sum(-1), v, create_graph=True), x
    ),
    "gradient of gradient": lambda f, x: jactri.gradient(
        lambda v: jactri.gradient(f, v, create_graph=True), x
    ),
    **{
        f"penalty, {mode}": loss(
            lambda f, x, mode=mode: jactri.jacobian(f, x, create_graph=True, strategy=mode)
        )
        for mode in MODES
    },
    "penalty, per_sample": loss(
        lambda f, x: jactri.jacobian(f, x, create_graph=True, per_sample=True)
    ),
    "penalty, func.jacrev": loss(lambda f, x: jactri.func.jacrev(f)(x)),
    "penalty, jvp": loss(by_jvp),
    "penalty, vjp": loss(by_vjp),
    "penalty, jtj": loss(lambda f, x: jactri.jtj(f, x, create_graph=True)),
}


@pytest.mark.parametrize("call", SECOND)
@pytest.mark.parametrize("kind", UNRECORDED)
def test_second_derivatives_are_refused_by_name(kind, call):
    own = UNRECORDED[kind]
    name = own.__self__.__qualname__.split(".")[-1]
    # a penalty on a function of the Function's own output has no other path to the Function
    for func in (net(own), own) if call != "divergence of gradient" else (net(own),):
        with pytest.raises(RuntimeError, match=rf"{name}\b.* has no second derivative"):
            SECOND[call](func, x43())


@pytest.mark.parametrize("kind", UNRECORDED)
def test_first_derivatives_are_right(kind):
    plain = {
        "one of two factors detached": lambda x: x**3,
        "a factor detached": torch.square,
        "output detached": torch.exp,
    }
    x, t = x43(), torch.randn(5, 4, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    f, g = net(UNRECORDED[kind]), net(plain.get(kind, torch.sin))
    want = torch.autograd.functional.jacobian(g, x)
    for mode in MODES:
        for graph in (False, True):
            found = jactri.jacobian(f, x, create_graph=graph, strategy=mode)
            torch.testing.assert_close(found.detach(), want)
    torch.testing.assert_close(jactri.func.jacfwd(f)(x), want)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(jactri.func.jacrev(f)(leaf).detach(), want)
    torch.testing.assert_close(jactri.jvp(f, x, t)[1], torch.einsum("abcd,kcd->kab", want, t))
    c = t[..., :2]
    torch.testing.assert_close(jactri.vjp(f, x, c)[1], torch.einsum("abcd,kab->kcd", want, c))
    found = jactri.jvp(f, x, t, create_graph=True)[1]
    torch.testing.assert_close(found.detach(), torch.einsum("abcd,kcd->kab", want, t))


class Mask(torch.autograd.Function):
    """Linear where it is: its backward depends on nothing that autograd follows."""

    @staticmethod
    def forward(ctx, x, keep, weight):
        ctx.save_for_backward(keep, weight)
        return x * keep @ weight

    @staticmethod
    def backward(ctx, g):
        keep, weight = ctx.saved_tensors
        return g @ weight.mT * keep, None, None


class Saved(torch.autograd.Function):
    """Its input is saved, and not used."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Both(torch.autograd.Function):
    """The gradient of what nobody asks for is not recorded."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.square() * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2 * g * x * w, (g * x.square()).detach()


class Layer(torch.autograd.Function):
    """A parameter that is no argument."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight[0]
        return x @ ctx.weight

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.weight.mT, None


PARAMETER = torch.nn.Parameter(torch.eye(3, dtype=F64) + 0.1, requires_grad=False)
KEEP = torch.tensor([True, False, True])

RECORDED = {
    "product": (function("Sin", lambda g, x: g * x.cos()), torch.sin),
    "in place": (function("Sin", lambda g, x: g.mul_(x.cos())), torch.sin),
    "output": (function("Exp", lambda g, y: g * y, torch.exp, lambda x, y: (y,)), torch.exp),
    "kink": (function("Relu", lambda g, x: g * (x > 0), torch.relu), torch.relu),
    "step": (function("Round", lambda g, x: torch.zeros_like(x), torch.round), torch.round),
    "linear": (Saved.apply, lambda x: 2 * x),
    "frozen weight": (
        lambda x: Mask.apply(x, KEEP, PARAMETER),
        lambda x: x * KEEP @ PARAMETER,
    ),
    "frozen weight, not an argument": (
        lambda x: Layer.apply(x, [PARAMETER]),
        lambda x: x @ PARAMETER,
    ),
    "constant": (
        lambda x: Mask.apply(x, KEEP, PARAMETER.detach().clone()),
        lambda x: x * KEEP @ PARAMETER,
    ),
    "another argument": (
        lambda x: Both.apply(x, torch.ones(3, dtype=F64).requires_grad_()),
        torch.square,
    ),
    "powers": (function("Cube", lambda g, x: 3 * g * x**2, lambda x: x**3), lambda x: x**3),
}


@pytest.mark.parametrize("call", SECOND)
@pytest.mark.parametrize("kind", RECORDED)
def test_what_is_recorded_stays_right(kind, call):
    own, plain = RECORDED[kind]
    x = x43()
    x[0, 0] = x[2, 1] = 0.0  # at kinks, and where a proportional change is none
    for f, g in ((net(own), net(plain)), (own, plain)):
        if f is own and call == "divergence of gradient":
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = SECOND[call](f, x)
        torch.testing.assert_close(found.detach(), SECOND[call](g, x).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    x = (x43() + 2).to(dtype)
    for own, plain in (RECORDED["powers"], RECORDED["output"]):
        found = jactri.laplacian(own, x)
        want = jactri.laplacian(plain, x)
        torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-2)
    for kind in ("once_differentiable", "input detached", "cotangent detached"):
        with pytest.raises(RuntimeError, match="has no second derivative"):
            jactri.laplacian(UNRECORDED[kind], x)


def test_at_zero_the_loss_of_a_factor_shows_as_well():
    with pytest.raises(RuntimeError, match="Factor has no second derivative"):
        jactri.laplacian(UNRECORDED["a factor detached"], torch.zeros(2, 3, dtype=F64))


def test_what_was_computed_in_forward_is_warned_of_once():
    own = function("Saves", lambda g, d: g * d, torch.sin, lambda x, y: (x.cos(),))
    with pytest.warns(UserWarning, match=r"Saves.*neither its input nor its output"):
        jactri.laplacian(own, x43())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jactri.laplacian(own, x43())
        jactri.jacobian(own, x43())


def test_a_tensor_that_only_the_function_depends_on_cannot_be_passed_by():
    """The penalty reaches ``h`` by the output alone, but the Jacobian depends on it through the Function."""
    w = torch.ones(3, dtype=F64, requires_grad=True)
    h = w * 2
    own = UNRECORDED["no_grad"]
    x = x43()
    J = jactri.jacobian(lambda v: own(v + h), x, create_graph=True)
    for end in (w, h):
        with pytest.raises(RuntimeError, match="NoGrad has no second derivative"):
            torch.autograd.grad(h.sum() + J.sum(), end, retain_graph=True)


def test_a_gradient_that_the_caller_took_is_refused():
    own = UNRECORDED["once_differentiable"]

    def slope(x):
        return torch.autograd.grad(own(x).sin().sum(), x, create_graph=True)[0]

    for call in (jactri.jacobian, jactri.gradient, jactri.laplacian):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            call(slope, x43())


def through(own):
    """With complex numbers inside, which go through the whole function by autograd."""

    def f(x):
        z = unfollowed(own(x) * torch.exp(1j * x))
        return (z * z).real + z.imag

    return f


@pytest.mark.parametrize("kind", ["once_differentiable", "no_grad", "numpy", "input detached"])
def test_of_complex_functions_too(kind):
    f, g, x = through(UNRECORDED[kind]), through(torch.sin), x43()
    want = torch.autograd.functional.jacobian(g, x)
    t = torch.randn(2, 4, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(jactri.jacobian(f, x, strategy="forward-mode"), want)
    torch.testing.assert_close(jactri.jvp(f, x, t)[1], torch.einsum("abcd,kcd->kab", want, t))
    torch.testing.assert_close(jactri.vjp(f, x, t)[1], torch.einsum("abcd,kab->kcd", want, t))
    for call in SECOND.values():
        with pytest.raises(RuntimeError, match="has no second derivative"):
            call(f, x)


@pytest.mark.parametrize("kind", ["no_grad", "numpy"])
def test_jvp_to_complex_outputs_and_of_complex_inputs(kind):
    own = UNRECORDED[kind]
    z = torch.complex(x43(), x43().flip(0))
    t = torch.complex(x43().flip(1), x43())

    def turned(own):
        return lambda z: z * own(z.real) + z.conj() ** 2

    f, g = turned(own), turned(torch.sin)
    torch.testing.assert_close(jactri.jvp(f, z, t)[1], torch.func.jvp(g, (z,), (t,))[1])
    f, g = (lambda x: own(x) * torch.exp(1j * x)), (lambda x: x.sin() * torch.exp(1j * x))
    x, t = z.real.clone(), t.real.clone()
    torch.testing.assert_close(jactri.jvp(f, x, t)[1], torch.func.jvp(g, (x,), (t,))[1])
