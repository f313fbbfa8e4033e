"""`jactri.hessian`, dense, beside torch.autograd.functional.hessian; and what both forms are asked for."""

import pytest
import torch
from common import F64, Square, seeded
from tolerances import assert_close, assert_gradients_close, assert_same_tree
from torch.autograd import functional

import jactri

NET = seeded(4, 5, 1)


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mixed(x, y):
    return (x.sin().sum(0) * y[:, :3].exp()).sum() * y.sum()


DENSE = {
    "network": (lambda x: NET(x).sum(), values(3, 4)),
    "one number": (lambda x: x**3, values()),
    "of one element": (lambda x: (x.prod() * x[0]).view(1, 1), values(3)),
    "tuple": (mixed, (values(4, 3), values(2, 5, seed=1))),
    "tuple of one": (lambda x: (x**3).sum(), (values(3),)),
    "unused": (lambda x, y: (x**3).sum(), (values(2), values(3, seed=1))),
    "linear": (lambda x: 3 * x.sum(), values(4)),
    "constant": (lambda x: torch.tensor(2.0, dtype=F64), values(3)),
    "piecewise linear": (lambda x: x.relu().sum() + x.abs().sum(), values(5)),
    "not contiguous": (lambda x: (x.cumsum(1) ** 3).sum(), values(3, 2).t()),
    "two dtypes": (lambda x, y: (x * y).sin().sum(), (values(3), values(3, seed=1).float())),
    "a Function": (lambda x: Square.apply(x.sin()).sum(), values(3)),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_is_what_torch_returns(name):
    func, inputs = DENSE[name]
    dtype = F64 if name != "two dtypes" else torch.float32
    want = functional.hessian(func, inputs)
    got = jactri.hessian(func, inputs)
    assert_same_tree(got, want, dtype, length=64)
    xs = inputs if isinstance(inputs, tuple) else (inputs,)
    kinds = [[h.dtype for h in row] for row in (got if isinstance(inputs, tuple) else ((got,),))]
    assert kinds == [[x.dtype] * len(xs) for x in xs]
    output, gradient, again = jactri.hessian(func, inputs, return_lower=True)
    assert torch.equal(output, func(*xs))
    slope = functional.jacobian(lambda *v: func(*v).sum(), inputs)
    assert_same_tree(gradient, slope, dtype, length=64)
    assert_same_tree(again, got, dtype, length=1)
    leaves = [output, *(gradient if isinstance(gradient, tuple) else (gradient,))]
    assert not any(t.requires_grad for t in leaves)


def test_it_runs_once_and_takes_arguments_as_torch_does():
    calls = []

    def func(x):
        calls.append(x)
        return (x**3).sum()

    x = values(3).requires_grad_()
    for options in (
        (False, False, True),
        (False, True, True, "reverse-mode"),
        (False, False, False, "forward-mode"),
    ):
        assert_close(jactri.hessian(func, x, *options), torch.diag(6 * x.detach()), F64)
    assert len(calls) == 3 and x.grad is None
    with pytest.raises(AssertionError, match="outer_jacobian_strategy must be"):
        jactri.hessian(func, x, outer_jacobian_strategy="reverse")


def test_third_derivatives():
    x = values(4)
    got = jactri.jacobian(lambda v: jactri.hessian(chain, v, create_graph=True), x)
    want = functional.jacobian(lambda v: functional.hessian(chain, v, create_graph=True), x)
    assert_close(got, want, F64, length=64)
    with pytest.warns(UserWarning, match="jactri.hessian inside of a function"):
        jactri.jacobian(lambda v: jactri.hessian(chain, v) @ v, x)


LAYOUTS = [torch.strided, torch.sparse_coo, torch.sparse_csr]


def dense(h):
    return h if h.layout is torch.strided else h.to_dense()


def chain(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_can_be_differentiated(layout):
    x, b = values(5).requires_grad_(), values(5, seed=1).requires_grad_()

    def func(v):
        return chain(v * b)

    weight = values(5, 5, seed=2)
    ours = jactri.hessian(func, x, create_graph=True, layout=layout)
    y, gradient, _ = jactri.hessian(func, x, True, return_lower=True, layout=layout)
    assert torch.autograd.grad(y, x)[0].allclose(gradient)
    theirs = functional.hessian(func, x, create_graph=True)
    got = torch.autograd.grad((dense(ours) * weight).sum(), (x, b))
    assert_gradients_close(
        got, torch.autograd.grad((theirs * weight).sum(), (x, b)), F64, length=50
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strict_raises_where_torch_does(layout):
    x, y = values(3), values(3, seed=1)
    cases = {
        "linear": (lambda x, y: (x + y).sum(), False),
        "of one input": (lambda x, y: (x**3).sum(), False),
        "apart": (lambda x, y: (x**3).sum() + (y**3).sum(), False),
        "constant": (lambda x, y: torch.tensor(1.0, dtype=F64), False),
        "all": (lambda x, y: (x * y * y).sin().sum(), False),
        "quadratic": (lambda x, y: x @ x + x @ y + y @ y, True),
    }
    for name, (func, graph) in cases.items():
        runs = []
        for call in (functional.hessian, jactri.hessian):
            more = {"layout": layout} if call is jactri.hessian else {}
            try:
                call(func, (x, y), create_graph=graph, strict=True, **more)
                runs.append(None)
            except RuntimeError as error:
                runs.append("strict mode" in str(error))
        assert runs[0] == runs[1] == (None if name == "all" else True), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_refused(layout):
    x = values(3)

    def hessian(func, inputs=x, **options):
        return jactri.hessian(func, inputs, layout=layout, **options)

    with pytest.raises(RuntimeError, match=r"a single element, but it has shape \(3,\)"):
        hessian(lambda x: x**2)
    with pytest.raises(RuntimeError, match="single Tensor, but it returned a tuple of 2"):
        hessian(lambda x: (x.sum(), x.prod()))
    with pytest.raises(TypeError, match="outputs of the user-provided function of hessian"):
        hessian(lambda x: 3.0)
    with pytest.raises(RuntimeError, match=r"real tensor, got one of torch.int64"):
        hessian(lambda x: x.argmax())
    with pytest.raises(RuntimeError, match=r"real tensor, got one of torch.complex128"):
        hessian(lambda x: torch.complex(x, x).sum())
    with pytest.raises(RuntimeError, match=r"dtype torch.int64: convert it"):
        hessian(lambda x: x.sum(), torch.arange(3))
    with pytest.raises(
        RuntimeError, match=r"real inputs, but inputs\[0\] \(3,\) is of torch.complex128"
    ):
        hessian(lambda x: x.abs().sum(), torch.complex(x, x))
    with pytest.raises(IndexError, match="empty tuple"):
        hessian(lambda: 0, ())
    with pytest.raises(TypeError, match="inputs of hessian must be"):
        hessian(lambda x: x.sum(), [x])
    with pytest.raises(
        RuntimeError, match=r"one number of each sample, \(3,\), but it returned shape \(3, 2\)"
    ):
        hessian(lambda x: x[:, :2], values(3, 4), per_sample=True)
    with pytest.raises(ValueError, match="needs a batch axis"):
        hessian(lambda x: x.sum(), per_sample=True)
    with pytest.raises(ValueError, match="per_sample must be"):
        hessian(lambda x: x.sum(), per_sample="yes")
    with pytest.raises(ValueError, match="layout must be"):
        jactri.hessian(lambda x: x.sum(), x, layout="sparse")

    class Once(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x * 2)
        backward = staticmethod(torch.autograd.function.once_differentiable(lambda ctx, g: g * 2))

    with pytest.raises(RuntimeError, match="once_differentiable"):
        hessian(lambda x: (Once.apply(x) ** 2).sum())
    with jactri.overrides({"tanh": jactri.zero}), pytest.raises(RuntimeError, match="second deriv"):
        hessian(lambda x: x.tanh().sum())


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hessians_of_samples(layout, n):
    x = values(n, 6)
    scale = values(n, 1, seed=1).exp()

    def func(x, s):
        return 100 * s * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2

    output, gradient, found = jactri.hessian(
        lambda x, s: func(x, s).sum(1, keepdim=True), (x, scale), per_sample=True, layout=layout, return_lower=True
    )  # fmt: skip
    ends = (x, scale)
    for a, b in ((a, b) for a in range(2) for b in range(2)):
        assert found[a][b].layout is layout
        assert found[a][b].shape == (n, ends[a].shape[1], ends[b].shape[1])
    assert (
        output.shape == (n, 1) and gradient[0].shape == x.shape and gradient[1].shape == scale.shape
    )
    for k in range(n):
        one = (x[k], scale[k])
        want = functional.hessian(lambda x, s: func(x[None], s[None]).sum(), one)
        got = tuple(tuple(dense(h)[k] for h in row) for row in found)
        assert_same_tree(got, want, F64, length=64)


def test_samples_that_mix_are_refused():
    x = values(4, 3)
    for layout in LAYOUTS:
        with pytest.raises(RuntimeError, match="samples mix"):
            jactri.hessian(lambda x: (x * x.sum(0)).sum(1), x, per_sample=True, layout=layout)
        # each number is of another sample
        with pytest.raises(RuntimeError, match="samples mix"):
            jactri.hessian(lambda x: (x.flip(0) ** 3).sum(1), x, per_sample=True, layout=layout)
    got = jactri.hessian(lambda x: NET(x[:, [0, 1, 2, 0]]), x, per_sample="assume")
    want = functional.hessian(lambda x: NET(x[[0, 1, 2, 0]]).sum(), x[1])
    assert_close(got[1], want, F64, length=64)


def test_inside_of_transforms():
    x = values(3, 4)
    for name in ("vmap", "grad"):
        if name == "vmap":
            y, slope, found = torch.vmap(
                lambda v: jactri.hessian(lambda v: (v**4).sum(), v, return_lower=True)
            )(x)
            assert_close(y, (x**4).sum(1), F64) or assert_close(slope, 4 * x**3, F64)
        else:

            def third(x):
                found = jactri.hessian(lambda v: (v**4).sum(1), x, per_sample=True)
                return found.diagonal(0, 1, 2).pow(2).sum() / 2

            got = torch.func.grad(third)(x)
            assert_close(got, 12 * x**2 * 24 * x, F64)
    assert_close(found, torch.diag_embed(12 * x**2), F64)
    with pytest.raises(RuntimeError, match=r"layout=torch.sparse_coo is not possible inside"):
        torch.vmap(lambda v: jactri.hessian(chain, v, layout=torch.sparse_coo))(x)
    with pytest.raises(RuntimeError, match="strict is not available inside"):
        torch.vmap(lambda v: jactri.hessian(chain, v, strict=True))(x)
    with pytest.raises(RuntimeError, match="single element"):
        torch.vmap(lambda v: jactri.hessian(lambda v: v, v))(x)
    with pytest.raises(RuntimeError, match="single Tensor, but it returned"):
        torch.vmap(lambda v: jactri.hessian(lambda v: (v,), v))(x)


def test_inside_of_a_backward_pass():
    found = {}
    x = values(4).requires_grad_()
    y = x * 1
    y.register_hook(
        lambda g: (
            found.update({k: jactri.hessian(chain, x.detach(), layout=k) for k in LAYOUTS}) or g
        )
    )
    torch.autograd.grad(y.sum(), x)
    want = functional.hessian(chain, x.detach())
    for layout in LAYOUTS:
        assert_close(dense(found[layout]), want, F64, length=64)


def test_it_can_be_compiled():
    net = seeded(4, 5, 1)
    options = {"per_sample": True, "return_lower": True}
    compiled = jactri.compile(net, values(3, 4), of=jactri.hessian, engine="fx", **options)
    with torch.no_grad():
        net[0].weight.mul_(2)
    for seed in range(2):
        x = values(3, 4, seed=seed)
        assert_same_tree(compiled(x), jactri.hessian(net, x, **options), F64, length=64)
    assert compiled.traces == 1
    inputs = values(4, 3), values(2, 5, seed=1)
    compiled = jactri.compile(mixed, *inputs, of=jactri.hessian, engine="fx")
    assert_same_tree(compiled(*inputs), functional.hessian(mixed, inputs), F64, length=64)
    with pytest.raises(TypeError, match="compile of hessian takes no 'layout'"):
        jactri.compile(mixed, *inputs, of=jactri.hessian, layout=torch.sparse_coo)
    with pytest.raises(TypeError, match="compile of hessian takes no 'layout'"):
        jactri.compile(chain, values(4), of=jactri.func.hessian, layout=torch.sparse_coo)
    with pytest.raises(TypeError, match="export of hessian takes no 'check'"):
        jactri.export(chain, values(4), of=jactri.hessian, path="never.pt2", check=True)
