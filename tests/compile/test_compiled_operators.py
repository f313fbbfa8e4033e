"""`jactri.compile(func, x, of=...)`: the same answers as the call itself, at other values too, and into ``out=``."""

import functools
import re

import pytest
import torch
from common import F64, seeded
from tolerances import assert_same_tree
from torch import nn

import jactri

compile = functools.partial(jactri.compile, engine="fx")


def field(dtype=F64):
    return seeded(4, 9, 7, 4, dtype=dtype)


def residual(x):
    return x + x.tanh() * x.square().sum(-1, keepdim=True)


METRIC = torch.randn(4, 4, dtype=F64)
CALLS = {
    "gradient": (jactri.gradient, {}),
    "gradient with output": (jactri.gradient, {"return_lower": True}),
    "divergence": (jactri.divergence, {"return_lower": True}),
    "laplacian": (jactri.laplacian, {}),
    "laplacian with lower orders": (jactri.laplacian, {"return_lower": True}),
    "weighted laplacian": (jactri.laplacian, {"weight": METRIC, "return_lower": True}),
    "diagonal": (jactri.diagonal, {"return_output": True}),
    "jtj": (jactri.jtj, {"per_sample": True, "return_output": True}),
    "jtj with a metric": (jactri.jtj, {"per_sample": True, "weight": METRIC}),
    "jjt": (jactri.jjt, {}),
    "jjt of samples": (jactri.jjt, {"per_sample": True, "weight": METRIC}),
    "jacobian": (jactri.jacobian, {"per_sample": True, "strategy": "reverse-mode"}),
}
OF_MODULES = {
    "parameter Jacobian": (jactri.parameter_jacobian, {}),
    "of some": (jactri.parameter_jacobian, {"params": ["0.weight", "2.bias"]}),
    "kernel": (jactri.empirical_ntk, {}),
    "trace of the kernel": (jactri.empirical_ntk, {"compute": "trace"}),
}


def plain(of, func, *xs, **options):
    """The call itself."""
    if of is jactri.parameter_jacobian:
        return of(func, xs if len(xs) > 1 else xs[0], **options).dense()
    if of is jactri.empirical_ntk:
        return of(func, *xs, **options)
    return of(func, xs if len(xs) > 1 else xs[0], **options)


def agree(compiled, of, func, *xs, dtype=F64, **options):
    assert_same_tree(compiled(*xs), plain(of, func, *xs, **options), dtype, length=64)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("make", [field, lambda: residual], ids=["network", "function"])
@pytest.mark.parametrize("n", [None, 0, 1, 5])
def test_calls_of_an_input(name, make, n):
    of, options = CALLS[name]
    func, shape = make(), (4,) if n is None else (n, 4)
    if n is None and options.get("per_sample"):
        with pytest.raises(ValueError, match="batch"):
            compile(lambda x: x.sum(), torch.randn(4, dtype=F64), of=of, **options)
        return
    compiled = compile(func, torch.randn(shape, dtype=F64), of=of, **options)
    for _ in range(3):
        agree(compiled, of, func, torch.randn(shape, dtype=F64), **options)
    assert compiled.traces == 1 and compiled.graph is not None
    agree(compiled, of, func, torch.randn(*shape, 2, dtype=F64)[..., 0], **options)


@pytest.mark.parametrize("name", OF_MODULES)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_calls_of_parameters(name, n):
    of, options = OF_MODULES[name]
    net = field()
    compiled = compile(net, torch.randn(n, 4, dtype=F64), of=of, **options)
    for _ in range(3):
        agree(compiled, of, net, torch.randn(n, 4, dtype=F64), **options)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    agree(compiled, of, net, torch.randn(n, 4, dtype=F64), **options)
    assert compiled.traces == 1 and compiled.graph is not None


@pytest.mark.parametrize("name", [*CALLS, *OF_MODULES])
def test_in_single_precision(name):
    of, options = {**CALLS, **OF_MODULES}[name]
    options = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    net, x = field(torch.float32), torch.randn(3, 4)
    compiled = compile(net, x, of=of, **options)
    agree(compiled, of, net, x, dtype=torch.float32, **options)
    agree(compiled, of, net, x + 1, dtype=torch.float32, **options)


def test_the_answers_are_those_of_autograd():
    """Not only those of the call that was compiled."""
    net, x = field(), torch.randn(3, 4, dtype=F64)
    rows = torch.autograd.functional.jacobian(lambda v: net(v).sum(0), x).movedim(1, 0)
    found = compile(net, x + 1, of=jactri.divergence)(x)
    torch.testing.assert_close(found, rows.diagonal(0, 1, 2).sum(1))
    scalar = lambda v: net(v).square().sum(-1)  # noqa: E731
    hessians = torch.stack([torch.autograd.functional.hessian(scalar, v) for v in x])
    found = compile(scalar, x + 1, of=jactri.laplacian)(x)
    torch.testing.assert_close(found, hessians.diagonal(0, 1, 2).sum(1))
    found = compile(net, x + 1, of=jactri.jtj, per_sample=True)(x)
    torch.testing.assert_close(found, rows.mT @ rows)
    flat = [
        torch.cat([g.flatten() for g in torch.autograd.grad(o, list(net.parameters()), retain_graph=True)])
        for y in net(x) for o in y
    ]  # fmt: skip
    jac = torch.stack(flat).reshape(3, 4, -1)
    found = compile(net, x + 1, of=jactri.empirical_ntk)(x)
    torch.testing.assert_close(found, torch.einsum("nap,mbp->nmab", jac, jac))
    found = compile(net, x + 1, of=jactri.parameter_jacobian)(x)
    torch.testing.assert_close(torch.cat([t.flatten(2) for t in found.values()], 2), jac)


# -- what changes between calls --------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CALLS, *OF_MODULES])
def test_replaced_parameters_layers_and_modes_are_seen(name):
    of, options = {**CALLS, **OF_MODULES}[name]
    net = nn.Sequential(*field(), nn.Dropout(0.0))
    x = torch.randn(3, 4, dtype=F64)
    compiled = compile(net, x, of=of, **options)
    net[0].weight = nn.Parameter(torch.randn(9, 4, dtype=F64))
    agree(compiled, of, net, x, **options)
    net[1] = nn.Sigmoid()
    agree(compiled, of, net, x, **options)
    net[2].weight.data = torch.randn(7, 9, dtype=F64)
    agree(compiled, of, net, x, **options)
    net.eval()
    agree(compiled, of, net, x, **options)


def test_a_weight_may_be_updated_in_place():
    metric, x = torch.eye(4, dtype=F64), torch.randn(3, 4, dtype=F64)
    net = field()
    for of in (jactri.jjt, jactri.laplacian):
        options = {"per_sample": True} if of is jactri.jjt else {}
        compiled = compile(net, x, of=of, weight=metric, **options)
        metric.copy_(METRIC @ METRIC.T)
        agree(compiled, of, net, x, weight=metric, **options)


def test_frozen_parameters_are_left_out():
    net, x = field(), torch.randn(3, 4, dtype=F64)
    compiled = compile(net, x, of=jactri.parameter_jacobian)
    net[0].weight.requires_grad_(False)
    found = compiled(x)
    assert "0.weight" not in found
    agree(compiled, jactri.parameter_jacobian, net, x)


def test_two_batches_of_a_kernel():
    net = field()
    xs = torch.randn(3, 4, dtype=F64), torch.randn(5, 4, dtype=F64)
    compiled = compile(net, *xs, of=jactri.empirical_ntk)
    agree(compiled, jactri.empirical_ntk, net, xs[0] - 1, xs[1] + 1)
    assert compiled.graph is not None


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 3, dtype=F64)
        self.norm = nn.LayerNorm(6, dtype=F64)
        self.out = nn.Linear(6, 2, dtype=F64)

    def forward(self, x, u):
        h = self.conv(x.unsqueeze(1)).tanh().mean(1)
        return self.out(self.norm(torch.cat([h, u], 1)))


def test_several_inputs_convolutions_and_norms():
    net = Conditioned()
    xs = torch.randn(3, 6, dtype=F64), torch.randn(3, 2, dtype=F64)
    compiled = compile(net, *xs, of=jactri.parameter_jacobian)
    agree(compiled, jactri.parameter_jacobian, net, *(x + 1 for x in xs))
    compiled = compile(net, *xs, of=jactri.jtj, per_sample=True)
    agree(compiled, jactri.jtj, net, *(x + 1 for x in xs), per_sample=True)


def test_a_module_of_torch_compile():
    net, x = field(), torch.randn(3, 4, dtype=F64)
    wrapped = torch.compile(net)
    for of in (jactri.divergence, jactri.parameter_jacobian):
        compiled = compile(wrapped, x, of=of)
        agree(compiled, of, wrapped, x + 1)
        assert compiled.graph is not None


def test_integer_inputs():
    words = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    index = torch.tensor([[0, 1], [4, 4], [2, 0]])
    compiled = compile(words, index, of=jactri.parameter_jacobian)
    assert compiled.graph is not None
    for at in (index.flip(0), index.roll(1, 1), 4 - index):
        agree(compiled, jactri.parameter_jacobian, words, at)


def test_buffers_are_put_back():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    with pytest.raises(RuntimeError, match="samples mix"):
        compile(net, torch.randn(5, 4, dtype=F64), of=jactri.parameter_jacobian)
    assert not net[1].num_batches_tracked and not net[1].running_mean.any()
    net.eval()
    compiled = compile(net, torch.randn(5, 4, dtype=F64), of=jactri.parameter_jacobian)
    agree(compiled, jactri.parameter_jacobian, net, torch.randn(5, 4, dtype=F64))


# -- out= ------------------------------------------------------------------------------------------


def test_into_memory_of_the_caller():
    net = seeded(6, 9, 4)
    compiled = compile(net, torch.randn(5, 6, dtype=F64), per_sample=True)
    for out in (torch.empty(5, 4, 6, dtype=F64), torch.empty(6, 4, 5, dtype=F64).permute(2, 1, 0)):
        for _ in range(3):
            x = torch.randn(5, 6, dtype=F64)
            assert compiled(x, out=out) is out
            assert_same_tree(out, jactri.jacobian(net, x, per_sample=True), F64, length=64)
    assert compiled.graph is not None


def test_into_nested_memory():
    net = seeded(6, 9, 4)

    def func(x, u):
        return net(torch.cat([x, u], 1)), (x * u).sum(1)

    xs = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    compiled = compile(func, *xs, per_sample=True, return_output=True)
    out = tuple(tuple(torch.empty(5, *shape, 3, dtype=F64) for _ in xs) for shape in ((4,), ()))
    for _ in range(2):
        y, found = compiled(*xs, out=out)
        assert found is out
        want = jactri.jacobian(func, xs, per_sample=True, return_output=True)
        assert_same_tree((y, out), want, F64, length=64)
        xs = tuple(x + 1 for x in xs)


def test_parameter_jacobian_into_memory():
    net, x = field(), torch.randn(3, 4, dtype=F64)
    compiled = compile(net, x, of=jactri.parameter_jacobian)
    out = {name: torch.full_like(t, torch.nan) for name, t in compiled(x).items()}
    for _ in range(3):
        x = x + 1
        assert compiled(x, out=out) is out
        assert_same_tree(out, jactri.parameter_jacobian(net, x).dense(), F64, length=64)
    assert compiled.graph is not None and compiled.traces == 2


def test_bad_memory():
    net, x = field(), torch.randn(3, 4, dtype=F64)
    compiled = compile(net, x, per_sample=True)
    for _ in range(2):  # a refused one leaves no plan
        with pytest.raises(RuntimeError, match=r"must have shape \(3, 4, 4\)"):
            compiled(x, out=torch.empty(3, 4, 5, dtype=F64))
        with pytest.raises(RuntimeError, match="dtype"):
            compiled(x, out=torch.empty(3, 4, 4))
        with pytest.raises(RuntimeError, match="requires grad"):
            compiled(x, out=torch.empty(3, 4, 4, dtype=F64, requires_grad=True))
        with pytest.raises(TypeError, match="must hold tensors"):
            compiled(x, out=(torch.empty(3, 4, 4, dtype=F64),) * 2)
        with pytest.raises(TypeError, match="from_numpy"):
            compiled(x, out=torch.empty(3, 4, 4, dtype=F64).numpy())
    agree(compiled, jactri.jacobian, net, x, per_sample=True)
    compiled = compile(net, x, of=jactri.parameter_jacobian)
    with pytest.raises(TypeError, match="dict of tensors"):
        compiled(x, out=torch.empty(3))
    with pytest.raises(ValueError, match=r"missing: \['0\.bias'"):
        compiled(x, out={"0.weight": torch.empty(3, 4, 9, 4, dtype=F64)})
    compiled = compile(net, x, of=jactri.divergence)
    with pytest.raises(TypeError, match="divergence takes no out="):
        compiled(x, out=torch.empty(3, dtype=F64))


# -- calls that make no sense ------------------------------------------------------------------------


def test_bad_calls():
    net, x = field(), torch.randn(3, 4, dtype=F64)
    with pytest.raises(TypeError, match=r"of must be one of jactri\.jacobian, .*got <function ggn"):
        compile(net, x, of=jactri.ggn)
    with pytest.raises(TypeError, match="jvp takes inputs and a vector, got 1"):
        compile(net, x, of=jactri.jvp)
    with pytest.raises(
        TypeError, match=r"divergence takes no 'estimate'; its options are create_graph"
    ):
        compile(net, x, of=jactri.divergence, estimate=3)
    with pytest.raises(TypeError, match="jacobian takes no 'progress'"):
        compile(net, x, progress=True)
    with pytest.raises(TypeError, match=re.escape("laplacian takes one tensor, got 2")):
        compile(net, x, x, of=jactri.laplacian)
    with pytest.raises(TypeError, match="diagonal takes one tensor"):
        compile(net, x, x, of=jactri.diagonal)
    with pytest.raises(TypeError, match="takes x1 and x2"):
        compile(net, x, x, x, of=jactri.empirical_ntk)
    with pytest.raises(ValueError, match="compute must be one of"):
        compile(net, x, of=jactri.empirical_ntk, compute="all")
    with pytest.raises(RuntimeError, match="floating-point"):
        compile(net, torch.arange(4), of=jactri.gradient)
    with pytest.raises(RuntimeError, match="output has the shape of x"):
        compile(seeded(4, 3), x, of=jactri.divergence)
    with pytest.raises(RuntimeError, match="shape of x"):
        compile(seeded(4, 3), x, of=jactri.diagonal)
    with pytest.raises(TypeError, match="module must be"):
        compile(lambda v: v, x, of=jactri.parameter_jacobian)
    with pytest.raises(RuntimeError, match="weight"):
        compile(net, x, of=jactri.jtj, weight=torch.ones(2, 2, dtype=F64), per_sample=True)
    with pytest.raises(TypeError, match="weight"):
        compile(net, x, of=jactri.jtj, weight=[1.0], per_sample=True)
    compiled = compile(net, x, of=jactri.divergence)
    with pytest.raises(TypeError, match="divergence takes one tensor, got 2"):
        compiled(x, x)
    with pytest.raises(RuntimeError, match=r"call jactri\.divergence there"):
        torch.func.vmap(compiled)(x[None])
