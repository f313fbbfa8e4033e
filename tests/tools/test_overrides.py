"""`jactri.overrides`, held against the same function written with ``.detach()`` or an ``autograd.Function``."""

import math

import pytest
import torch
from common import F64, MODES, make
from overridden import Block, close, draw, frozen, sloped
from torch import nn
from torch.autograd.functional import jacobian as truth
from torch.nn import functional as F

import jactri

ALL = {"softmax": jactri.zero, "rsqrt": jactri.zero, "gelu": jactri.ratio}


@pytest.fixture
def block():
    return make(Block)


V, C = torch.linspace(-1, 2, 24, dtype=F64).view(2, 3, 4), torch.linspace(1, -2, 24, dtype=F64)
CALLS = {
    "jacobian": lambda f, x: jactri.jacobian(f, x),
    "forward": lambda f, x: jactri.jacobian(f, x, strategy="forward-mode"),
    "reverse": lambda f, x: jactri.jacobian(f, x, strategy="reverse-mode"),
    "per sample": lambda f, x: jactri.jacobian(f, x, per_sample=True),
    "chunks": lambda f, x: jactri.jacobian(f, x, chunk_size=5),
    "gradient": lambda f, x: jactri.gradient(lambda x: f(x).square().sum((1, 2)), x),
    "jvp": lambda f, x: jactri.jvp(f, x, V)[1],
    "jvp alone": lambda f, x: jactri.jvp(f, x, V, differentiate=None)[1],
    "vjp": lambda f, x: jactri.vjp(f, x, C.view(2, 3, 4))[1],
    "diagonal": lambda f, x: jactri.diagonal(f, x),
    "divergence": lambda f, x: jactri.divergence(f, x),
    "jtj": lambda f, x: jactri.jtj(f, x),
    "jjt": lambda f, x: jactri.jjt(f, x, per_sample=True),
    "func": lambda f, x: torch.no_grad()(jactri.func.jacrev(f))(x),
    "jacobian_of": lambda f, x: jactri.jacobian_of(f(x := x.clone().requires_grad_()), x),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_honours_them(block, call):
    x = draw(2, 3, 4)
    before = CALLS[call](block, x)
    with jactri.overrides(ALL):
        got = CALLS[call](block, x)
    after = CALLS[call](block, x)
    want = CALLS[call](frozen(block), x)  # jactri's, of an ordinary function
    close(got, want)
    close(after, before)
    assert (got - before).abs().max() > 1e-3
    if call == "jacobian":
        close(got, truth(block, x))


def test_parameters(block):
    x, out = draw(2, 3, 4), torch.ones(2, 3, 4, dtype=F64)
    plain = jactri.parameter_jacobian(block, x)
    with jactri.overrides(ALL):
        made = jactri.parameter_jacobian(block, x)
        ntk = jactri.empirical_ntk(block, x, x)
        ggn = jactri.ggn(block, x, out).diagonal()
        with pytest.raises(RuntimeError, match="made outside of the block"):
            plain.gram()
    frozen(block)
    params = dict(block.named_parameters())
    want = truth(
        lambda *p: torch.func.functional_call(block, dict(zip(params, p, strict=True)), (x,)),
        (*params.values(),),
    )
    for got, rows in zip(
        made.dense().values(), want, strict=True
    ):  # after the block, as it was made
        close(got, rows)
    close(ntk, jactri.empirical_ntk(block, x, x))
    for name, d in jactri.ggn(block, x, out).diagonal().items():
        close(ggn[name], d)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("key", "value", "twin"),
    [
        ("round", jactri.identity, lambda x: sloped(x, x.round(), 1.0)),
        ("RoundBackward0", 2, lambda x: sloped(x, x.round(), 2.0)),
        ("round", lambda node: node.ctx is not None and 0.5, lambda x: sloped(x, x.round(), 0.5)),
        ("round", lambda node: node.linear(lambda t: t.flip(-1), lambda c: c.flip(-1), kept=(0,)),
         lambda x: x.flip(-1) + (x.round() - x.flip(-1)).detach()),
    ],
)  # fmt: skip
def test_values(key, value, twin, mode):
    weight, x = draw(4, 3), 3 * draw(5, 8)[:, ::2]

    def f(x, rounded=torch.round):
        return rounded(x.sin() + x) @ weight

    with jactri.overrides({key: value}):
        close(jactri.jacobian(f, x, strategy=mode), truth(lambda x: f(x, twin), x))
        for n in (0, 1):
            assert jactri.jacobian(f, x[:n], strategy=mode, per_sample=True).shape == (n, 3, 4)


def by_the_engine(f, x, op, change):
    """The Jacobian by autograd, with hooks on the nodes of an op: ``change(gradients, active)`` is what they give."""
    leaf = x.clone().requires_grad_()
    y, active = f(leaf), {}

    def visit(node):
        if node is None or node in active:
            return active.get(node, False)
        if hasattr(node, "variable"):
            active[node] = node.variable is leaf
        else:
            found = [visit(p) for p, _ in node.next_functions]
            active[node] = any(found)
            if node.name() == op:
                node.register_hook(lambda grads, _: change(grads, sum(found)))
        return active[node]

    visit(y.grad_fn)
    rows = [torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in y.reshape(-1)]
    return torch.stack(rows).view(*y.shape, *x.shape)


def times(factor):
    return lambda grads, active: tuple(
        None if g is None else g * (factor or 1 / max(active, 1)) for g in grads
    )


def test_every_op_of_a_network_against_the_engine(block):
    x = draw(1, 2, 4)
    leaf, names = x.clone().requires_grad_(), set()
    nodes = [block(leaf).grad_fn]
    while nodes:
        node = nodes.pop()
        names |= {node.name()} if "Backward" in node.name() else set()
        nodes += [p for p, _ in node.next_functions if p is not None]
    assert len(names) > 10
    for op in sorted(names):
        for value, change in ((jactri.zero, times(1e-300)), (jactri.uniform, times(None))):
            with jactri.overrides({op: value}):
                got = jactri.jacobian(block, x)
            close(got, by_the_engine(block, x, op, change))


ACTIVATIONS = (
    F.relu,
    F.gelu,
    F.silu,
    F.mish,
    F.hardswish,
    F.leaky_relu,
    lambda x: F.gelu(x, approximate="tanh"),
)


@pytest.mark.parametrize("f", ACTIVATIONS)
def test_ratio_keeps_gradient_times_input(f):
    x = torch.tensor([-4.0, -0.3, 0.0, 1e-12, 2.0], dtype=F64)
    (key,) = [type(f(x.clone().requires_grad_()).grad_fn).__name__]
    with jactri.overrides({key: jactri.ratio}):
        d = jactri.diagonal(f, x)
    close(d * x, f(x))
    assert d[2] == 0


def test_zero_selects():
    """Nothing is multiplied: what stands behind may be infinite."""

    def f(x):
        return x + x.sqrt().sigmoid()

    with jactri.overrides({"sigmoid": jactri.zero}):
        for mode in MODES:
            close(
                jactri.jacobian(f, torch.zeros(2, dtype=F64), strategy=mode),
                torch.eye(2, dtype=F64),
            )


def test_uniform_keeps_what_a_network_without_biases_gives():
    a, b, x = draw(3, 3), draw(3, 3), draw(2, 3, 3)

    def f(x):
        return (x @ a) @ (x @ b * F.relu(x)).mT * 2 + x * x

    with jactri.overrides({"bmm": jactri.uniform, "mul": jactri.uniform}):
        j = jactri.jacobian(f, x, per_sample=True)
    close((j * x[:, None, None]).sum((-2, -1)), f(x))
    weights = a.requires_grad_()
    with jactri.overrides(
        {"mm": jactri.uniform}
    ):  # one argument depends on x: the derivative itself
        close(jactri.jacobian(lambda x: x @ weights, x[0]), truth(lambda x: x @ a, x[0]))


def written(x, weight, axes, detached=True):
    """A norm over axes."""
    mean = x.mean(axes, keepdim=True)
    s = (x.var(axes, keepdim=True, correction=0) + 1e-5).sqrt()
    return (x - mean) / (s.detach() if detached else s) * weight


NORMS = {
    "layer_norm": lambda: (nn.LayerNorm((3, 4)), (1, 2), (3, 4)),
    "group_norm": lambda: (nn.GroupNorm(1, 3), (1, 2), (3, 1)),
    "batch_norm": lambda: (nn.BatchNorm1d(3), (0, 2), (3, 1)),
}


@pytest.mark.parametrize("name", NORMS)
def test_detached_std(name):
    norm, axes, shape = NORMS[name]()
    norm.double()
    nn.init.uniform_(norm.weight)
    x, inner = draw(5, 3, 4), draw(3, 4)

    def f(x, weight=norm.weight, norm=norm):
        return norm(x * inner)

    def twin(x, weight):
        return written(x * inner, weight.view(shape), axes)

    with jactri.overrides({name: jactri.detached_std}):
        for mode in MODES:
            close(jactri.jacobian(f, x, strategy=mode), truth(lambda x: twin(x, norm.weight), x))
        made = (
            jactri.parameter_jacobian(norm, x, params=["weight"]) if name != "batch_norm" else None
        )
    if made is not None:
        want = truth(lambda w: written(x, w.view(shape), axes), norm.weight)
        close(made.dense()["weight"], want)
    plain = jactri.jacobian(f, x)
    close(plain, truth(lambda x: written(x * inner, norm.weight.view(shape), axes, False), x))
    norm.eval()
    if name == "batch_norm":  # its deviation is constant
        with jactri.overrides({name: jactri.detached_std}):
            close(jactri.jacobian(f, x), truth(f, x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [False, True])
def test_softmax_inside_of_fused_attention(mode, causal):
    w, x = draw(3, 4, 4), draw(2, 1, 3, 4)

    def f(x):
        return F.scaled_dot_product_attention(*(x @ m for m in w), is_causal=causal) + x

    def twin(x):
        q, k, v = (x @ m for m in w)
        s = q @ k.mT / 2
        s = s.masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -math.inf) if causal else s
        return s.softmax(-1).detach() @ v + x

    with jactri.overrides({"softmax": jactri.zero}):
        close(jactri.jacobian(f, x, strategy=mode), truth(twin, x))
        t = draw(2, *x.shape)
        want = torch.autograd.functional.jvp(twin, x, t[0])[1]
        close(jactri.jvp(f, x, t[0])[1], want)
        close(jactri.vjp(f, x, t)[1][0], torch.autograd.functional.vjp(twin, x, t[0])[1])
        v = draw(2, 1, 3, 4)  # a constant: nothing is left
        constant = jactri.jacobian(lambda x: F.scaled_dot_product_attention(x, x, v) + x, x)
        close(constant, truth(lambda x: x, x))
    for key, value in (("softmax", 1.0), ("bmm", jactri.zero)):
        with jactri.overrides({key: value}), pytest.raises(RuntimeError, match="eager"):
            jactri.jacobian(f, x)
    with jactri.overrides({"scaled_dot_product_attention": jactri.zero}):
        close(jactri.jacobian(f, x), truth(lambda x: x, x))
