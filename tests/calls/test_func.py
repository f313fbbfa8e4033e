"""jactri.func beside torch.func, call by call: results, nesting, dtypes, errors, gradients, composition."""

import collections
import functools

import pytest
import torch
from common import F64, Cube, make, mlp, ours_and_theirs, x3, x23
from tolerances import assert_close
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import jactri

NAMES = ["jacrev", "jacfwd", "hessian"]
Pair = collections.namedtuple("Pair", "first second")


def assert_same(ours, theirs, dtype=F64, **options):
    """The same tree, and leaves of one dtype and, up to rounding, value."""
    (a, spec), (b, truth) = tree_flatten(ours), tree_flatten(theirs)
    assert spec == truth
    for k, (u, t) in enumerate(zip(a, b, strict=True)):
        assert u.dtype == t.dtype and u.device == t.device
        wide = {"length": max(t.numel(), 64), **options}
        assert_close(u.double(), t.double(), dtype, what=f"leaf {k}", **wide)


# -- results -----------------------------------------------------------------------------------------

CASES = {
    "vector": (lambda x: x.sin() * x.sum(), lambda: (x3(),), 0),
    "scalar output": (lambda x: x.prod(), lambda: (x3(),), 0),
    "one element": (lambda x: x.prod(dim=0, keepdim=True), lambda: (x3(),), 0),
    "0-d": (torch.sin, lambda: (x3()[0],), 0),
    "matrix": (lambda x: (x @ x.T).tanh(), lambda: (x23(),), 0),
    "not contiguous": (lambda x: (x * x).cumsum(0), lambda: (x23().T,), 0),
    "1-tuple of argnums": (torch.sin, lambda: (x3(),), (0,)),
    "last argument": (lambda x, y: x * y.exp(), lambda: (x3(), x3()), -1),
    "two arguments": (lambda x, y: (x * y.sum()).sin(), lambda: (x3(), x23()), (0, 1)),
    "two arguments the other way": (lambda x, y: (x * y.sum()).sin(), lambda: (x3(), x23()), (1, -2)),
    "one tensor twice": (lambda x, y: x * y * y, lambda: (x3(),) * 2, (0, 1)),
    "list in": (lambda v: v[0] * v[1] ** 2, lambda: ([x3(), x3() + 1],), 0),
    "dict in": (lambda d: d["a"] * d["b"] ** 2, lambda: ({"b": x3(), "a": x3() + 1},), (0,)),
    "nested in": (lambda d: d["a"][0].sin() * d["a"][1]["c"], lambda: ({"a": (x3(), {"c": x3()})},), 0),
    "named tuple in": (lambda p: p.first * p.second.sin(), lambda: (Pair(x3(), x3()),), 0),
    "tuple out": (lambda x: (x.sin(), x.sum()), lambda: (x3(),), 0),
    "1-tuple out": (lambda x: (x.sin(),), lambda: (x3(),), 0),
    "dict out": (lambda x: {"s": x.prod(), "v": [x.exp(), x**3]}, lambda: (x3(),), 0),
    "named tuple out": (lambda x: Pair(x.sin(), x.prod()), lambda: (x3(),), 0),
    "trees in and out": (
        lambda d, e: {"s": (d["a"] * e[0]).sum(), "t": [d["b"] ** 2 * e[1]]},
        lambda: ({"a": x3(), "b": x3()}, [x3(), x3() + 2]),
        (0, 1),
    ),
    "other arguments": (lambda x, n, s, o: x**n * s["k"] if o is None else x, lambda: (x3(), 3, {"k": 2.0}, None), 0),
    "other tensors": (lambda x, y, m: (x * y * m).sin(), lambda: (x3(), x3(), torch.tensor([1, 0, 1])), 0),
    "identity": (lambda x: x, lambda: (x3(),), 0),
    "identity of one of two": (lambda x, y: (x, y * y), lambda: (x3(), x3()), (0, 1)),
    "independent": (lambda x, y: x.sin(), lambda: (x3(), x23()), (0, 1)),
    "constant": (lambda x: torch.ones(2, dtype=F64), lambda: (x3(),), 0),
    "constant of another dtype": (lambda x: torch.ones(2), lambda: (x3(),), 0),
    "partly constant": (lambda x: (torch.ones((), dtype=F64), x.prod()), lambda: (x3(),), 0),
    "detached": (lambda x: x.detach() * x, lambda: (x3(),), 0),
    "linear": (lambda x: 2 * x, lambda: (x3(),), 0),
    "in place": (lambda x: x.clone().mul_(x).sin_(), lambda: (x3(),), 0),
    "read in Python": (lambda x: x * x * float(x.detach()[0]), lambda: (x3(),), 0),
    "complex inside": (lambda x: torch.fft.fft(x).abs(), lambda: (x3(),), 0),
    "empty input": (torch.sin, lambda: (torch.zeros(0, dtype=F64),), 0),
    "empty output": (lambda x: x[:0] ** 2, lambda: (x3(),), 0),
    "float32": (lambda x: x.exp().cumsum(0), lambda: (x3().float(),), 0),
    "float32 to float64": (lambda x: x.double() ** 3, lambda: (x3().float(),), 0),
    "float64 to float32": (lambda x: (x**3).float(), lambda: (x3(),), 0),
    "two dtypes in": (lambda x, y: (x * y).sin(), lambda: (x3().float(), x3()), (0, 1)),
    "two dtypes out": (lambda x: (x.sin().float(), x.cos()), lambda: (x3(),), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_what_torch_returns(case, name):
    func, make_args, argnums = CASES[case]
    args = make_args()
    ours, theirs = ours_and_theirs(name)
    dtypes = {v.dtype for v in tree_leaves(args) if isinstance(v, torch.Tensor)}
    if name != "jacrev":  # torch.func.jacfwd gives zeros for negative argnums
        count = len(args)
        wrapped = argnums % count if isinstance(argnums, int) else tuple(k % count for k in argnums)
    else:
        wrapped = argnums
    loose = torch.float32 in dtypes or "float32" in case or "dtypes" in case
    assert_same(
        ours(func, argnums)(*args), theirs(func, wrapped)(*args), torch.float32 if loose else F64
    )


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
@pytest.mark.parametrize("name", NAMES)
def test_chunks(name, chunk_size):
    func = lambda x: {"a": x.sin() * x.sum(), "b": x.prod()}  # noqa: E731
    ours, theirs = ours_and_theirs(name)
    assert_same(ours(func, chunk_size=chunk_size)(x23()), theirs(func)(x23()))


@pytest.mark.parametrize("name", ["jacrev", "jacfwd"])
def test_aux(name):
    def func(x):
        return x.sin(), {"y": x.exp(), "i": x.argmax(), "x": x}

    ours, theirs = (t(func, has_aux=True)(x3()) for t in ours_and_theirs(name))
    assert_same(ours, theirs)
    assert not any(t.requires_grad for t in tree_leaves(ours))


def test_aux_of_a_hessian():
    h, aux = jactri.func.hessian(lambda x: (x.prod(), (x.sin(),)), has_aux=True)(x3())
    assert_same((h, aux), (torch.func.hessian(torch.prod)(x3()), (x3().sin(),)))


@pytest.mark.parametrize("name", NAMES)
def test_keywords_reach_the_function(name):
    ours, theirs = ours_and_theirs(name)
    func = lambda x, *, power, shift: (x + shift) ** power  # noqa: E731
    given = {"power": 3, "shift": x3()}
    truth = theirs(functools.partial(func, **given))
    assert_same(ours(func)(x3(), **given), truth(x3()))
    xs = torch.stack([x3(), x3() + 1])
    assert_same(torch.vmap(lambda x: ours(func)(x, **given))(xs), torch.vmap(truth)(xs))


def test_integer_outputs_of_jacfwd():
    func = lambda x: (x.argmax(), x.exp(), x > 0)  # noqa: E731
    assert_same(jactri.func.jacfwd(func)(x3()), torch.func.jacfwd(func)(x3()))


@pytest.mark.parametrize("name", NAMES)
def test_what_vmap_refuses(name):
    def func(x):  # control flow on values, an op without a batching rule or forward derivative
        return Cube.apply(x) * x.sum().item() if x.sum() > 0 else x

    truth = {"jacrev": torch.diag(3 * x3() ** 2), "jacfwd": torch.diag(3 * x3() ** 2),
             "hessian": torch.diag_embed(torch.diag(6 * x3()))}[name]  # fmt: skip
    assert_close(getattr(jactri.func, name)(func)(x3()), truth, F64)


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_module(name):
    ours, theirs = ours_and_theirs(name)
    net = make(lambda: mlp(3, 4, 2))
    assert_same(ours(torch.compile(net, backend="eager"))(x3()), theirs(net)(x3()))


def test_the_wrapper_is_named_after_the_function():
    def curve(x):
        """Documented."""
        return x.sin()

    for name in NAMES:
        wrapper = getattr(jactri.func, name)(curve)
        assert wrapper.__name__ == "curve" and wrapper.__doc__ == "Documented."
    assert not hasattr(jactri.func.jacrev(mlp(3, 2)), "_parameters")


# -- the Hessian's cost ------------------------------------------------------------------------------


def plain(net):
    """A sequence of modules without module calls, on which FlopCounterMode's hooks and autograd.grad collide."""
    net.requires_grad_(False)

    def func(x):
        for part in net:
            x = part.forward(x)
        return x

    return func


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_hessian_of_a_sum_over_samples_costs_one_block_a_sample():
    n, net = 16, plain(make(lambda: mlp(8, 32, 32, 1)))
    x = torch.randn(n, 8, dtype=F64)
    func = lambda x: net(x).sum()  # noqa: E731
    batch = flops(lambda: jactri.func.hessian(func)(x))
    assert batch <= 1.01 * n * flops(lambda: jactri.func.hessian(func)(x[:1]))
    # torch.func's own, sample by sample
    assert batch < flops(lambda: torch.vmap(torch.func.hessian(lambda x: func(x[None])))(x))
    assert flops(lambda: torch.func.hessian(func)(x)) > 15 * batch
    assert_same(jactri.func.hessian(func)(x), torch.func.hessian(func)(x))


def test_hessian_of_a_batch_of_outputs_keeps_samples_apart():
    n, net = 6, plain(make(lambda: mlp(3, 8, 1)))
    x = torch.randn(n, 3, dtype=F64)
    ours, theirs = (lambda t=t: t(net)(x) for t in ours_and_theirs("hessian"))
    assert_same(ours(), theirs())
    # the last step of both sees n outputs in n samples
    assert flops(theirs) > 4 * n * flops(ours)


@pytest.mark.parametrize("outer", ["jacrev", "jacfwd"])
@pytest.mark.parametrize("inner", ["jacrev", "jacfwd"])
def test_nested_transforms_are_as_cheap_as_the_hessian(inner, outer):
    net = plain(make(lambda: mlp(8, 16, 16, 3)))
    x = torch.randn(8, dtype=F64)
    nested = getattr(jactri.func, outer)(getattr(jactri.func, inner)(net))
    assert_same(nested(x), torch.func.hessian(net)(x))
    assert flops(lambda: nested(x)) <= 1.5 * flops(lambda: jactri.func.hessian(net)(x))


# -- composition -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("outer", ["vmap", "grad", "jacrev", "jacfwd", "hessian"])
def test_inside_torch_transforms(outer, name):
    ours, theirs = ours_and_theirs(name)
    net = make(lambda: mlp(3, 4, 2))

    def composed(transform):
        if outer == "vmap":
            return torch.vmap(transform(net))(x23())
        if outer == "grad":
            return torch.func.grad(lambda x: transform(net)(x).square().sum())(x3())
        return getattr(torch.func, outer)(transform(net))(x3())

    assert_same(composed(ours), composed(theirs), length=1000)


@pytest.mark.parametrize("name", NAMES)
def test_inside_vmap_with_options(name):
    ours, theirs = ours_and_theirs(name)
    func = lambda x, y: ({"a": x * y.sin()}, y)  # noqa: E731
    given = {"has_aux": True} if name != "hessian" else {}
    run = func if given else (lambda x, y: func(x, y)[0])
    truth = torch.vmap(theirs(run, (0, 1), **given))(x23(), x23())
    assert_same(torch.vmap(ours(run, (0, 1), chunk_size=2, **given))(x23(), x23()), truth)
    if given:
        return
    h, aux = torch.vmap(ours(func, (0, 1), has_aux=True))(x23(), x23())
    assert_same(h, truth)
    assert_same(aux, x23())


@pytest.mark.parametrize("outer", NAMES)
@pytest.mark.parametrize("inner", NAMES)
def test_one_inside_of_another(inner, outer):
    func = lambda x: {"s": x.prod(), "v": (x.sin() * x.sum(),)}  # noqa: E731
    both = ours_and_theirs
    ours, theirs = (both(outer)[k](both(inner)[k](func)) for k in (0, 1))
    assert_same(ours(x3()), theirs(x3()), length=1000)


@pytest.mark.parametrize("outer", ["jacrev", "jacfwd"])
@pytest.mark.parametrize("inner", NAMES)
def test_mixed_derivatives_through_a_closure(inner, outer):
    def mixed(k):
        of_x = lambda y: ours_and_theirs(inner)[k](lambda x: (x * y).sin().cumsum(0))(x3())  # noqa: E731
        return ours_and_theirs(outer)[k](of_x)(x3() + 1)

    ours, theirs = mixed(0), mixed(1)
    assert_same(ours, theirs, length=100)
    assert not ours.requires_grad


def test_inside_of_other_calls_of_jactri():
    func = jactri.func.jacrev(lambda x: x.sin() * x.sum())
    truth = torch.func.hessian(lambda x: x.sin() * x.sum())(x3())
    assert_close(jactri.jacobian(func, x3()), truth, F64)
    assert_close(jactri.compile(func, x3(), engine="fx")(x3()), truth, F64)
    x = x3().requires_grad_()
    assert_close(jactri.jacobian_of(func(x), x), truth, F64)
    assert_close(torch.autograd.functional.jacobian(func, x3()), truth, F64)
    # a trainable one inside: its graph is read, not deferred
    net = make(lambda: mlp(3, 4, 2))
    nested = jactri.jacobian(jactri.func.jacrev(net), x3())
    assert_close(nested, torch.func.hessian(net)(x3()), F64, length=100)


# -- random numbers ----------------------------------------------------------------------------------


def noisy(x):
    return x * torch.rand(3, dtype=F64)


@pytest.mark.parametrize("transform", [functools.partial(jactri.func.jacfwd, randomness="same"), jactri.func.jacrev,
                                       jactri.func.hessian])  # fmt: skip
def test_one_draw_serves_all_columns(transform):
    func = lambda x: (noisy(x) ** 2).sum() * torch.ones(3, dtype=F64)  # noqa: E731
    torch.manual_seed(3)
    u = torch.rand(3, dtype=F64)
    torch.manual_seed(3)
    j = transform(func)(x3())
    truth = 2 * u * u * x3() if j.dim() == 2 else torch.diag(2 * u * u)
    assert_close(j, truth.expand(3, *truth.shape), F64)


def test_randomness_error_and_different():
    with pytest.raises(RuntimeError, match="randomness='error'"):
        jactri.func.jacfwd(noisy)(x3())
    torch.manual_seed(3)
    ours = jactri.func.jacfwd(noisy, randomness="different")(x3())
    torch.manual_seed(3)
    assert torch.equal(ours, torch.func.jacfwd(noisy, randomness="different")(x3()))
    before = torch.random.get_rng_state()
    for transform in (jactri.func.jacrev, jactri.func.jacfwd, jactri.func.hessian):
        transform(torch.sin)(x3())
    assert torch.equal(before, torch.random.get_rng_state())


# -- what is refused ---------------------------------------------------------------------------------

BAD = {
    "no argnums": (torch.sin, lambda: (x3(),), {"argnums": ()}, "non-empty"),
    "argnums twice": (torch.mul, lambda: (x3(), x3()), {"argnums": (0, 0)}, "unique"),
    "argnums twice, one negative": (
        torch.mul,
        lambda: (x3(), x3()),
        {"argnums": (1, -1)},
        "unique",
    ),
    "argnum too large": (torch.sin, lambda: (x3(),), {"argnums": 1}, "only 1 positional"),
    "argnum too small": (torch.sin, lambda: (x3(),), {"argnums": (-2,)}, "only 1 positional"),
    "argnum is text": (torch.sin, lambda: (x3(),), {"argnums": "x"}, "'x'"),
    "argnums are a list": (torch.sin, lambda: (x3(),), {"argnums": [0]}, r"\[0\]"),
    "argnum is a float": (torch.sin, lambda: (x3(),), {"argnums": (0.0,)}, "0.0"),
    "no arguments": (x3, lambda: (), {}, "only 0 positional"),
    "integers": (lambda x: x * 1.0, lambda: (torch.arange(3),), {}, "torch.int64"),
    "complex argument": (torch.real, lambda: (x3().to(torch.complex64),), {}, "complex64"),
    "complex other argument": (
        lambda x, c: x,
        lambda: (x3(), x3().to(torch.complex64)),
        {},
        "complex64",
    ),
    "complex output": (torch.fft.fft, lambda: (x3(),), {}, "complex128"),
    "nothing out": (lambda x: None, lambda: (x3(),), {}, "nothing"),
    "an empty tuple out": (lambda x: (), lambda: (x3(),), {}, "nothing"),
    "a number out": (lambda x: 2.0, lambda: (x3(),), {}, "float"),
    "a number beside a tensor": (lambda x: (x, 3), lambda: (x3(),), {}, "int"),
    "None beside a tensor": (lambda x: (x, None), lambda: (x3(),), {}, "NoneType"),
    "not callable": (3, lambda: (x3(),), {}, "not callable"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, name):
    func, make_args, options, words = BAD[case]
    args = make_args()
    ours, theirs = ours_and_theirs(name)
    with pytest.raises(Exception) as truth:
        theirs(func, **options)(*args)
    with pytest.raises(truth.type, match=words) as error:
        ours(func, **options)(*args)
    assert error.type is truth.type


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", [1.5, None, {"a": 2.0}, {}])
def test_arguments_that_are_no_tensors(name, given):
    # torch.func.jacfwd raises AttributeErrors and AssertionErrors out of its inside here, jacrev this
    with pytest.raises(ValueError, match="tensor"):
        getattr(jactri.func, name)(lambda x: x)(given)


@pytest.mark.parametrize("name", ["jacrev", "hessian"])
@pytest.mark.parametrize("func", [torch.argmax, lambda x: x > 0, lambda x: (x, x.long())])
def test_integer_outputs(func, name):
    with pytest.raises(RuntimeError, match="floating-point"):
        getattr(jactri.func, name)(func)(x3())


@pytest.mark.parametrize("name", ["jacrev", "jacfwd"])
@pytest.mark.parametrize(
    "func",
    [torch.sin, lambda x: [x, x], lambda x: (x, x, x), lambda x: (x, 3), lambda x: (x, None)],
)
def test_bad_aux(func, name):
    for transform in ours_and_theirs(name):
        with pytest.raises(RuntimeError, match=r"aux|Expected tensors"):
            transform(func, has_aux=True)(x3())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk_size", [0, -1, 2.5])
def test_bad_chunk_size_is_refused_at_once(name, chunk_size):
    with pytest.raises(ValueError, match="chunk_size"):
        getattr(jactri.func, name)(torch.sin, chunk_size=chunk_size)


def test_bad_randomness():
    with pytest.raises(RuntimeError, match="'error', 'different', 'same'"):
        jactri.func.jacfwd(torch.sin, randomness="never")


@pytest.mark.parametrize("name", NAMES)
def test_errors_of_the_function_pass(name):
    def func(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        getattr(jactri.func, name)(func)(x3())
    assert not jactri._src.prologue.running.recording()
