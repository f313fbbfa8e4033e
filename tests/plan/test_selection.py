"""What autograd selects away is 0, whatever stands behind it; what it multiplies by 0 is NaN at infinity.

Whether an op selects is autograd's choice: each rule is compared with the node itself, given infinite and NaN
cotangents. Then selections are put before and behind poles, in every call.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from cases.case import quietly

import jactri
from jactri._src.plan.poles import suspects
from jactri._src.read import pulling
from jactri._src.read.reading import read

F64 = torch.float64
inf, nan = math.inf, math.nan
X = torch.tensor([-7, -3, -2, -1.5, -1, -0.5, 0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 7], dtype=F64)
O = torch.zeros(16, dtype=F64)
EVEN = torch.arange(16) % 2 == 0
SOME = torch.tensor([0, 3, 3, 5])


def written(write):
    """The function that writes to a copy of its argument."""

    def call(x):
        y = x.clone()
        write(y)
        return y

    return call


def assign(index, value):
    return written(lambda y: y.__setitem__(index, value))


def rows(x):
    return x.reshape(4, 4)


SELECTIONS = {
    "relu": torch.relu,
    "relu_": written(torch.relu_),
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.5, 9.0),
    "threshold_": written(lambda y: F.threshold_(y, 0.5, 1.0)),
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp_": written(lambda y: y.clamp_(0, 1)),
    "clamp min": lambda x: x.clamp(min=0),
    "clamp max": lambda x: x.clamp(max=0),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_max": lambda x: x.clamp_max(0),
    "clamp by tensors": lambda x: x.clamp(O, O + 1),
    "clamp by a tensor below": lambda x: x.clamp(min=O),
    "clamp by a tensor above": lambda x: x.clamp(max=O),
    "clamp in the bounds": lambda x: O.clamp(x, x + 1),
    "maximum": lambda x: torch.maximum(x, O),
    "minimum": lambda x: torch.minimum(O, x),
    "maximum of two": lambda x: torch.maximum(x, x.flip(0)),
    "fmax": lambda x: torch.fmax(x, O),
    "fmin": lambda x: torch.fmin(O, x),
    "where": lambda x: torch.where(EVEN, x, O),
    "where not": lambda x: torch.where(EVEN, 1.0, x),
    "where both": lambda x: torch.where(EVEN, x, x.flip(0)),
    "masked_fill": lambda x: x.masked_fill(EVEN, 1.0),
    "masked_fill tensor": lambda x: O.masked_fill(EVEN, x[7]),
    "masked_scatter": lambda x: x.masked_scatter(EVEN, O),
    "masked_scatter source": lambda x: O.masked_scatter(EVEN, x),
    "masked_select": lambda x: x.masked_select(EVEN),
    "index_fill": lambda x: x.index_fill(0, SOME, 1.0),
    "index_fill tensor": lambda x: O.index_fill(0, SOME, x[7]),
    "index_put": lambda x: x.index_put((SOME,), O[:4]),
    "index_put accumulate": lambda x: x.index_put((SOME,), O[:4], accumulate=True),
    "index_put values": lambda x: O.index_put((torch.tensor([1, 2, 4]),), x[:3]),
    "index_copy": lambda x: x.index_copy(0, torch.tensor([0, 2, 4]), O[:3]),
    "scatter": lambda x: x.scatter(0, SOME, O[:4]),
    "scatter number": lambda x: x.scatter(0, SOME, 3.0),
    "put": lambda x: x.put(SOME, O[:4]),
    "assign by mask": assign(EVEN, 0.0),
    "assign a slice": assign(slice(0, 4), 0.0),
    "masked_fill_ of a column": written(lambda y: rows(y)[:, 1].masked_fill_(EVEN[:4], 0.0)),
    "mul_ of a slice": written(lambda y: y[:4].mul_(0.0)),
    "tril": lambda x: rows(x).tril(),
    "triu": lambda x: rows(x).triu(1),
    "slice_scatter": lambda x: torch.slice_scatter(x, O[:4], 0, 0, 4),
    "select_scatter": lambda x: torch.select_scatter(rows(x), O[:4], 0, 1),
    "diagonal_scatter": lambda x: torch.diagonal_scatter(rows(x), O[:4]),
    "scatter_reduce": lambda x: x.scatter_reduce(0, SOME, O[:4], "mean", include_self=False),
    "index_reduce": quietly(lambda x: x.index_reduce(0, SOME, O[:4], "amax", include_self=False)),
    "max": lambda x: x.max(),
    "max of rows": lambda x: rows(x).max(1).values,
    "amax": lambda x: rows(x).amax(1),
    "median": lambda x: x.median(),
    "logit eps": lambda x: torch.logit(x, eps=0.3),
    "sinc": torch.sinc,
    "pow 0": lambda x: x**0,
    "pow tensor": lambda x: x**O,
    "norm 3": lambda x: (x - x.detach()).reshape(8, 2).norm(p=3, dim=1),
    "std of equals": lambda x: (x - x.detach()).std(),
    "prod of zeros": lambda x: (x - x.detach()).prod(),
    "embedding padding": lambda x: F.embedding(torch.arange(8), x.reshape(8, 2), padding_idx=3),
    "cdist": lambda x: torch.cdist(x.reshape(8, 2), x.reshape(8, 2)),
    "cdist to a set": lambda x: torch.cdist(x.reshape(8, 2), x.detach().reshape(8, 2)),
    "cdist 1.5": lambda x: torch.cdist(x.reshape(8, 2), x.reshape(8, 2), p=1.5),
    "pdist of equals": lambda x: F.pdist(x[:6].repeat(2).reshape(6, 2)),
    "zero": torch.round,
    # these multiply
    "leaky_relu": lambda x: F.leaky_relu(x, 0.0),
    "prelu": lambda x: F.prelu(x, torch.zeros(1, dtype=x.dtype)),
    "elu": F.elu,
    "abs": torch.abs,
    "copysign": lambda x: torch.copysign(x, O - 1),
    "nan_to_num": torch.nan_to_num,
    "mul by 0": lambda x: x * EVEN,
    "dropout": lambda x: F.dropout(x, 0.5),
    "tanh": lambda x: (100 * x).tanh(),
    "softmax": lambda x: (1e4 * x).softmax(0),
    "square": torch.square,
    "norm": lambda x: (x - x.detach()).reshape(8, 2).norm(dim=1),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, O, reduction="none"),
    "glu": F.glu,
}


@pytest.mark.clean_memory  # put_ has no deterministic way
@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("value", [1.0, inf, -inf, nan])
def test_rules_select_where_their_node_does(name, value):
    torch.manual_seed(1)
    x = X.clone().requires_grad_()
    y = SELECTIONS[name](x)
    graph = read([y], [x])
    some = torch.arange(y.numel()).reshape(y.shape) % 3 == 0
    for c in (torch.full_like(y, value), torch.where(some, value, torch.ones_like(y))):
        (want,) = torch.autograd.grad(y, x, c, retain_graph=True)
        with torch.no_grad():
            got = pulling.pulled(graph, [c], graph.inputs)
        torch.testing.assert_close(got[graph.inputs[0]], want, equal_nan=True, msg=name)


SELECT = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "clamp": lambda x: x.clamp(min=0),
    "clamp of both": lambda x: x.clamp(0, 3),
    "clamp by tensor": lambda x: x.clamp(min=torch.zeros_like(x)),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "fmax": lambda x: torch.fmax(x, torch.zeros_like(x)),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
    "masked_scatter": lambda x: x.masked_scatter(x < 0, torch.zeros_like(x)),
    "assign by mask": written(lambda y: y.__setitem__(y.detach() < 0, 0.0)),
    "index_put": lambda x: x.index_put(((x < 0).nonzero(as_tuple=True)), x.new_zeros(())),
    "multiplied": lambda x: x * (x > 0),  # does not select: a NaN stays one
    "leaky_relu": lambda x: F.leaky_relu(x, 0.0),  # nor does this
}
POLES = {
    "sqrt": torch.sqrt,
    "log": torch.log,
    "reciprocal": lambda x: 1 / x,
    "unit": lambda x: x / x.abs(),
    "power": lambda x: x**-0.5,
}
POINTS = torch.tensor([-2.0, -0.25, 0.0, 0.5, 2.0, 5.0], dtype=F64).reshape(6, 1)


class Shifted(torch.nn.Module):
    """A function of a parameter, at samples."""

    def __init__(self, func):
        super().__init__()
        self.func = func
        self.shift = torch.nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x):
        return self.func(x + self.shift)


def of_each(jacobian):
    return jacobian.reshape(6, 6).diagonal()


FIRST = {
    "auto": lambda f, x: of_each(jactri.jacobian(f, x)),
    "forward": lambda f, x: of_each(jactri.jacobian(f, x, strategy="forward-mode")),
    "reverse": lambda f, x: of_each(jactri.jacobian(f, x, strategy="reverse-mode")),
    "create_graph": lambda f, x: of_each(jactri.jacobian(f, x, create_graph=True)).detach(),
    "per_sample": lambda f, x: jactri.jacobian(f, x, per_sample=True).reshape(6),
    "gradient": lambda f, x: jactri.gradient(f, x).reshape(6),
    "diagonal": lambda f, x: jactri.diagonal(f, x).reshape(6),
    "divergence": lambda f, x: jactri.divergence(f, x),
    "jvp": lambda f, x: jactri.jvp(f, x, torch.ones_like(x))[1].reshape(6),
    "vjp": lambda f, x: jactri.vjp(f, x, torch.ones_like(x))[1].reshape(6),
    "jacfwd": lambda f, x: of_each(jactri.func.jacfwd(f)(x)),
    "jacrev": lambda f, x: of_each(jactri.func.jacrev(f)(x)),
    "parameter": lambda f, x: jactri.parameter_jacobian(Shifted(f), x).dense()["shift"].reshape(6),
}
SQUARED = {
    "jtj": lambda f, x: jactri.jtj(f, x, per_sample=True).reshape(6),
    "jjt": lambda f, x: jactri.jjt(f, x, per_sample=True).reshape(6),
}
SECOND = {
    "laplacian": lambda f, x: jactri.laplacian(f, x).reshape(6),
    "hessian": lambda f, x: of_each(jactri.func.hessian(lambda v: f(v).sum())(x)),
    "nested": lambda f, x: of_each(
        jactri.jacobian(lambda v: jactri.gradient(f, v, create_graph=True), x)
    ),
}


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("pole", POLES)
@pytest.mark.parametrize("select", SELECT)
def test_selections_and_poles(select, pole, order):
    """Selections before poles give autograd's zeros, those behind them its NaN, in every call."""
    s, p = SELECT[select], POLES[pole]

    def func(x):
        return p(s(x)) if order == "before" else s(p(x))

    first = of_each(torch.autograd.functional.jacobian(func, POINTS))
    second = of_each(torch.autograd.functional.hessian(lambda x: func(x).sum(), POINTS))
    for calls, want in ((FIRST, first), (SQUARED, first * first), (SECOND, second)):
        for name, call in calls.items():
            got = call(func, POINTS)
            if calls is SECOND:  # infinity minus infinity is either, by the order of sums
                got, want = finite(got), finite(want)
            torch.testing.assert_close(got, want, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def finite(t):
    return t.nan_to_num(nan=nan, posinf=nan, neginf=nan)


def attention(x):
    """By hand, with a mask that leaves nothing of the second row."""
    mask = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)
    p = (x @ x.mT).masked_fill(mask, -inf).softmax(-1)
    return p.nan_to_num(nan=0.0) @ x


def atoms(x):
    """Pair energies, without each atom's distance to itself."""
    own = torch.eye(x.shape[0], dtype=torch.bool)
    r = torch.where(own, 1.0, torch.cdist(x, x))
    return torch.where(own, 0.0, r**-6).sum(0)


NARROW, WIDE = torch.nn.Linear(9, 1).double(), torch.nn.Linear(1, 8).double()
CONV = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
MIXING = {
    # name: function, input
    "sum of nothing": (lambda x: x.relu().sum(1).sqrt(), -torch.rand(3, 4, dtype=F64) - 0.1),
    "sums": (
        lambda x: torch.stack([x.relu().sum(1).sqrt(), x.clamp(max=0).sum(1).abs().log()], 1),
        torch.tensor([[-1.0, -2.0], [1.0, -1.0], [2.0, 3.0]], dtype=F64),
    ),
    "a bottleneck": (
        lambda x: WIDE(NARROW(x.relu()).relu()).abs().add(x[:, :1].clamp(min=0).sqrt()),
        torch.randn(4, 9, dtype=F64, generator=torch.Generator().manual_seed(1)),
    ),
    "images": (
        lambda x: CONV(CONV(x).relu().sqrt()).relu().sqrt(),
        torch.randn(2, 1, 6, 7, dtype=F64, generator=torch.Generator().manual_seed(2)),
    ),
    "attention": (attention, torch.randn(2, 3, 2, dtype=F64)),
    "atoms": (atoms, torch.randn(5, 3, dtype=F64)),
    "tril": (lambda x: (x * x).tril().sqrt(), torch.arange(1.0, 10, dtype=F64).reshape(3, 3)),
    "rows of norms": (
        lambda x: torch.linalg.vector_norm(x.clamp(min=0), dim=1) / x.relu().sum(1).clamp(min=1),
        torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(3)),
    ),
}


def into(write, *shape):
    """Zeros of this shape, with the argument written among them."""

    def call(x):
        y = x.new_zeros(shape)
        write(y, x)
        return y

    return call


COLUMNS = torch.tensor([0, 2, 3])
PLACED = {
    # name: function of a (2, 3) matrix that puts it among zeros
    "pad": lambda x: F.pad(x, (1, 1)),
    "cat": lambda x: torch.cat([x, O[:4].reshape(2, 2)], 1),
    "stack": lambda x: torch.stack([x, O[:6].reshape(2, 3)]),
    "write to a slice": into(lambda y, x: y[:, 1:4].copy_(x), 2, 5),
    "write by index": into(lambda y, x: y.__setitem__((slice(None), COLUMNS), x), 2, 5),
    "scatter": lambda x: x.new_zeros(2, 5).scatter(1, COLUMNS.expand(2, 3), x),
    "scatter_add": lambda x: x.new_zeros(2, 5).scatter_add(1, COLUMNS.expand(2, 3), x),
    "index_add": lambda x: x.new_zeros(2, 5).index_add(1, COLUMNS, x),
    "index_copy": lambda x: x.new_zeros(2, 5).index_copy(1, COLUMNS, x),
    "select_scatter": lambda x: x.new_zeros(2, 3, 2).select_scatter(x, 2, 1),
    "diag_embed": torch.diag_embed,
    "block_diag": lambda x: torch.block_diag(x[:1], x[1:]),
    "masked_scatter": lambda x: x.new_zeros(4, 2).masked_scatter(torch.arange(8).view(4, 2) > 1, x),
    "unfold": lambda x: F.unfold(x[None, None], (2, 2), padding=1),
    "strides of a transposed convolution": lambda x: F.conv_transpose1d(x[:, None], ONE, stride=2),
    "max with a constant": lambda x: torch.stack([x - 0.5, x.new_zeros(2, 3)]).max(0).values,
}
ONE = torch.ones(1, 1, 1, dtype=F64)
MIXING |= {
    f"{name}, {pole}": (
        lambda x, p=POLES[pole], f=f: p(f(x)),
        torch.arange(1.0, 7, dtype=F64).view(2, 3) / 7,
    )
    for name, f in PLACED.items()
    for pole in ("sqrt", "log")
}
WHOLE = {
    "auto": jactri.jacobian,
    "mixed": lambda f, x: jactri.jacobian(f, x, strategy="mixed"),
    "forward": lambda f, x: jactri.jacobian(f, x, strategy="forward-mode"),
    "reverse": lambda f, x: jactri.jacobian(f, x, strategy="reverse-mode"),
    "create_graph": lambda f, x: jactri.jacobian(f, x, create_graph=True).detach(),
    "jvp": lambda f, x: jactri.jvp(f, x, basis(x))[1].movedim(0, -1).reshape(-1, *x.shape),
    "vjp": lambda f, x: jactri.vjp(f, x, basis(f(x)))[1],
    "compile": lambda f, x: compiled(f, x),
}


def compiled(func, x):
    """Traced where all is finite."""
    call = jactri.compile(func, torch.rand_like(x) + 1, engine="fx")
    assert call.graph is not None or "masked_select" in call.reason
    assert call(torch.rand_like(x) + 1).isfinite().any()
    return call(x)


def basis(like):
    return torch.eye(like.numel(), dtype=like.dtype).reshape(-1, *like.shape)


@pytest.mark.parametrize("name", MIXING)
def test_selections_that_are_mixed(name):
    """Wherever autograd's rows are finite, so is every call."""
    func, x = MIXING[name]
    want = torch.autograd.functional.jacobian(func, x)
    assert want.isfinite().any()
    for call, run in WHOLE.items():
        got = run(func, x).reshape(want.shape)
        clear = want.isfinite()
        torch.testing.assert_close(got[clear], want[clear], msg=lambda m, n=call: f"{n}: {m}")


def test_each_output_has_the_row_that_it_has_alone():
    """Where autograd multiplies the zeros of other outputs by infinity, reverse mode gives each its own row."""
    x = torch.tensor([-1.0, 0.25, 0.5], dtype=F64)

    def func(x):
        return (x.cumsum(0)[[0, 2, 1]] + 1).sqrt()

    got = jactri.jacobian(func, x)
    assert torch.autograd.functional.jacobian(func, x).isnan().any()
    for i in range(3):
        own = torch.autograd.functional.jacobian(
            lambda x, i=i: (x[: (1, 3, 2)[i]].sum() + 1).sqrt(), x
        )
        torch.testing.assert_close(got[i], own)


def test_derivatives_that_stay_finite_are_not_looked_at():
    """Networks of the common activations, and what is regular where its operands are."""

    def func(x):
        y = (torch.linspace(-1, 1, 8, dtype=F64)[:, None] * x).tanh()
        return (F.gelu(y) * F.silu(y) + F.softplus(y).sigmoid()).log_softmax(0)

    x = torch.ones(1, dtype=F64).requires_grad_()
    graph = read([func(x)], [x])
    assert not suspects(graph, seeds=True)
    assert suspects(read([func(x).exp().log()], [x]), seeds=True)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 3).double()

    def forward(self, x):
        return self.linear(x).relu().sqrt()


def test_parameters_behind_a_selection():
    net = Layer()
    x = torch.randn(5, 2, dtype=F64)
    params = dict(net.named_parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(y, params.values(), retain_graph=True)])
        for y in net(x).flatten()
    ]
    want = torch.stack(rows)
    assert want.isfinite().all()
    assert (want == 0).all(1).any()  # some outputs are selected away
    jac = jactri.parameter_jacobian(net, x)
    got = torch.cat([j.reshape(15, -1) for j in jac.dense().values()], 1)
    torch.testing.assert_close(got, want)
    v = {name: torch.randn_like(p) for name, p in params.items()}
    flat = torch.cat([t.flatten() for t in v.values()])
    torch.testing.assert_close((jac @ v).flatten(), want @ flat)
    u = torch.randn(5, 3, dtype=F64)
    got = torch.cat([t.flatten() for t in (jac.T @ u).values()])
    torch.testing.assert_close(got, u.flatten() @ want)
    kernel = jactri.empirical_ntk(net, x, x)
    want = (want @ want.T).reshape(5, 3, 5, 3).transpose(1, 2)
    torch.testing.assert_close(kernel, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_narrow_dtypes_and_few_samples(dtype, n):
    def func(x):
        return x.relu().sqrt().mT

    x = torch.tensor([[-1.0, 4.0], [-2.0, -3.0], [1.0, 2.0]], dtype=dtype)[:n].mT.contiguous().mT
    for strategy in ("auto", "forward-mode", "reverse-mode"):
        got = jactri.jacobian(func, x, strategy=strategy)
        assert got.dtype == dtype
        assert got.shape == (2, n, n, 2)
        slope = torch.where(x > 0, 0.5 / x.clamp(min=1).sqrt(), 0)
        torch.testing.assert_close(got.sum((2, 3)).mT, slope)
