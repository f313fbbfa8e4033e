"""`jactri.overrides`, held against the same function written with ``.detach()`` or an ``autograd.Function``."""

import asyncio
import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian as truth
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import jactri
from tests.common import F64, MODES, in_threads, make


def draw(*shape):
    return torch.randn(shape, dtype=F64)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


class Sloped(torch.autograd.Function):
    """``y``, whose derivative in ``x`` is given."""

    @staticmethod
    def forward(ctx, x, y, slope):
        ctx.save_for_backward(slope)
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None


def sloped(x, y, slope):
    return Sloped.apply(x, y.detach(), torch.as_tensor(slope, dtype=x.dtype).expand(y.shape))


def over(x, y):
    return torch.where(x == 0, 0.0, y / x).detach()


class Rms(nn.Module):
    """As language models write it."""

    def __init__(self):
        super().__init__()
        self.weight, self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, 4)), False

    def forward(self, x):
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * (x * (r.detach() if self.frozen else r))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.frozen = nn.Linear(4, 12), False

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        p = (q @ k.mT / 2).softmax(-1)
        return (p.detach() if self.frozen else p) @ v


class Gelu(nn.Module):
    """With the derivative y / x, where ``frozen``."""

    frozen = False

    def forward(self, x):
        y = F.gelu(x)
        return sloped(x, y, over(x, y)) if self.frozen else y


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.up, self.act, self.down = (
            Rms(), Attention(), nn.Linear(4, 5), Gelu(), nn.Linear(5, 4),
        )  # fmt: skip

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.down(self.act(self.up(self.norm(x))))


ALL = {"softmax": jactri.zero, "rsqrt": jactri.zero, "gelu": jactri.ratio}


@pytest.fixture
def block():
    return make(Block)


def frozen(net):
    """What ``ALL`` makes of it."""
    for m in net.modules():
        if hasattr(m, "frozen"):
            m.frozen = True
    return net


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


def written(x, weight, axes, std, detached=True):
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
        return written(x * inner, weight.view(shape), axes, None)

    with jactri.overrides({name: jactri.detached_std}):
        for mode in MODES:
            close(jactri.jacobian(f, x, strategy=mode), truth(lambda x: twin(x, norm.weight), x))
        made = (
            jactri.parameter_jacobian(norm, x, params=["weight"]) if name != "batch_norm" else None
        )
    if made is not None:
        want = truth(lambda w: written(x, w.view(shape), axes, None), norm.weight)
        close(made.dense()["weight"], want)
    plain = jactri.jacobian(f, x)
    close(plain, truth(lambda x: written(x * inner, norm.weight.view(shape), axes, None, False), x))
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
        v = draw(2, 1, 3, 4)  # a constant: nothing is left
        constant = jactri.jacobian(lambda x: F.scaled_dot_product_attention(x, x, v) + x, x)
        close(constant, truth(lambda x: x, x))
    with jactri.overrides({"softmax": 1.0}), pytest.raises(RuntimeError, match="eager"):
        jactri.jacobian(f, x)
    with jactri.overrides({"scaled_dot_product_attention": jactri.zero}):
        close(jactri.jacobian(f, x), truth(lambda x: x, x))


# -- modules ----------------------------------------------------------------------------------------


def keys_of(net):
    return {"name": "act", "pattern": "a?t", "class": Gelu, "module": net.act}


@pytest.mark.parametrize("kind", ["name", "pattern", "class", "module"])
def test_a_module_as_a_whole(block, kind):
    x, key = draw(2, 3, 4), keys_of(block)[kind]
    act = block.act
    twins = {
        jactri.zero: lambda x: F.gelu(x).detach(),
        jactri.identity: lambda x: sloped(x, F.gelu(x), 1.0),
        jactri.ratio: lambda x: sloped(x, F.gelu(x), over(x, F.gelu(x))),
        -0.5: lambda x: sloped(x, F.gelu(x), -0.5),
        (lambda call: call.input.cos() * call.output): lambda x: sloped(
            x, F.gelu(x), x.cos() * F.gelu(x)
        ),
    }
    for value, twin in twins.items():
        with jactri.overrides({key: value}, model=block):
            got = jactri.jacobian(block, x)
            told = jactri.explain(block, x).overrides
        assert len(told) == 1 and told[0].endswith("(1 node)")
        act.forward = twin
        close(got, truth(block, x))
        del act.forward


def test_ops_within_modules(block):
    x = draw(2, 3, 4)
    with jactri.overrides(
        {("norm", "rsqrt"): jactri.zero, (Attention, "softmax"): jactri.zero}, model=block
    ):
        assert jactri.explain(block, x).overrides == (
            "'softmax' in Attention: zero (1 node)", "'rsqrt' in 'norm': zero (2 nodes)",
        )  # fmt: skip
        got = jactri.jacobian(block, x)
        h = x.clone().requires_grad_()  # a computation of the caller's
        close(jactri.jacobian_of(block(h), h), got)
    block.norm.frozen = block.attn.frozen = True
    close(got, truth(block, x))
    with (
        jactri.overrides({(Rms, "softmax"): jactri.zero}),
        pytest.raises(ValueError, match="'softmax' in Rms is no op of"),
    ):
        jactri.jacobian(block, x)


class Nested(nn.Module):
    """Gives more than a tensor, takes it by name; may fail and go on."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Tanh()

    def forward(self, scale, *, hidden):
        if scale is None:
            raise ValueError("no scale")
        return {"out": self.inner(hidden) * scale, "also": (hidden.exp(), 3)}


def test_modules_that_return_more_take_names_or_raise():
    net, x = Nested(), draw(2, 3)

    def f(x):
        try:
            net(None, hidden=x)
        except ValueError:
            x = x.sigmoid()
        out = net(2.0, hidden=x)
        return out["out"] + out["also"][0] + x.tanh()

    with jactri.overrides({net: jactri.zero}):
        close(jactri.jacobian(f, x), truth(lambda x: x.sigmoid().tanh(), x))
    with jactri.overrides({(Nested, "tanh"): jactri.zero}):
        close(jactri.jacobian(f, x), truth(lambda x: x.sigmoid().exp() + x.sigmoid().tanh(), x))
    with jactri.overrides({net: jactri.identity}), pytest.raises(TypeError, match="returns dict"):
        jactri.jacobian(f, x)


def test_a_quantiser_without_a_derivative():
    class Quantise(nn.Module):
        def forward(self, x):
            return (x * 4).int().to(x.dtype) / 4

    net, x = nn.Sequential(nn.Linear(3, 3), Quantise(), nn.Linear(3, 2)).double(), draw(4, 3)
    with jactri.overrides({Quantise: jactri.identity}):
        close(
            jactri.jacobian(net, x, per_sample=True),
            (net[2].weight @ net[0].weight).expand(4, 2, 3),
        )


# -- what is left alone -----------------------------------------------------------------------------


def f_soft(x):
    return x.softmax(-1) * x


def test_blocks_nest_and_end():
    x = draw(3)
    plain, eye = truth(f_soft, x), torch.eye(3, dtype=F64)
    with jactri.overrides({"softmax": jactri.zero}):
        with jactri.overrides({"softmax": jactri.identity, "mul": jactri.zero}):
            close(jactri.jacobian(f_soft, x), 0 * eye)
        with jactri.overrides({"softmax": jactri.identity}):
            close(jactri.jacobian(f_soft, x), (x.softmax(-1) + x).diag())
        with pytest.raises(KeyError), jactri.overrides({nn.Tanh: jactri.zero}):
            raise KeyError
        close(jactri.jacobian(f_soft, x), x.softmax(-1).diag())
        close(truth(f_soft, x), plain)  # torch's own
    close(jactri.jacobian(f_soft, x), plain)
    hooks = nn.modules.module
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks


def test_threads_and_tasks_have_their_own():
    x, found = draw(3), {}
    inside = x.softmax(-1).diag()

    def work(k):
        found[k] = jactri.jacobian(f_soft, x)

    with jactri.overrides({"softmax": jactri.zero}):
        in_threads(2, work)
        close(jactri.jacobian(f_soft, x), inside)
    close(found[0], truth(f_soft, x))

    async def task(value):
        with jactri.overrides({"softmax": value}):
            await asyncio.sleep(0)
            return jactri.jacobian(f_soft, x)

    async def both():
        return await asyncio.gather(task(jactri.zero), task(jactri.identity))

    one, two = asyncio.run(both())
    close(one, inside)
    close(two, (x.softmax(-1) + x).diag())


def test_the_model_by_itself_is_untouched(block):
    x = draw(1, 3, 4).requires_grad_()
    want = torch.autograd.grad(block(x).square().sum(), x)[0]
    with jactri.overrides({Gelu: jactri.zero, "softmax": jactri.zero}):
        close(torch.autograd.grad(block(x).square().sum(), x)[0], want)


@pytest.mark.parametrize("key", ["gelu", Gelu])
def test_checkpoints(block, key):
    x, act = draw(2, 3, 4), block.act

    def f(x, reentrant=False):
        return checkpoint(block, x * 2, use_reentrant=reentrant)

    with jactri.overrides({key: jactri.ratio}):
        got = jactri.jacobian(f, x)
        if key == "gelu":
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                jactri.jacobian(lambda x: F.gelu(f(x, True)), x)
    act.frozen = True
    close(got, truth(lambda x: block(x * 2), x))


def test_writes_in_place():
    x = draw(3, 4)

    def assigned(x, relu=torch.relu):
        h = x * 2
        h[:, :2] = h[:, :2].exp()
        h[:, 3:] += x[:, 1:2]
        return relu(h)

    with jactri.overrides({"relu": jactri.identity}):
        close(jactri.jacobian(assigned, x), truth(lambda x: assigned(x, lambda h: h), x))

    def hidden(x):
        h = x * 2
        h[:, :2].relu_()
        return h.relu()

    def added(x):
        h = x * 2
        h[:, :2] += x[:, 2:]
        return h + x

    def constant(x):
        h = x * 2
        h[:, 0] = 0.0
        return h.rsqrt()

    with jactri.overrides({"rsqrt": jactri.identity}):
        close(
            jactri.jacobian(constant, x),
            2 * torch.eye(12, dtype=F64).view(3, 4, 3, 4) * (torch.arange(4) > 0),
        )

    for f, key in ((hidden, "relu"), (added, "add"), (constant, "mul")):
        with (
            jactri.overrides({key: 1.0}),
            pytest.raises(RuntimeError, match=f"'{key}' may be inside"),
        ):
            jactri.jacobian(f, x)


def test_a_scaled_distance_is_squared_as_it_is_overridden():
    """The square of a distance is read at once, behind the ops between, but not behind overrides."""
    a, b = draw(3, 2), draw(3, 2)

    def f(a):
        return (torch.cdist(a, b) * 3.0).square()

    def twin(a):
        d = torch.cdist(a, b)
        return (sloped(d, d * 3.0, 0.25)).square()

    with jactri.overrides({"mul": 0.25}):
        close(jactri.jacobian(f, a), truth(twin, a))


def test_hooks_that_only_look_are_let_be():
    x = draw(3)

    def f(x, factor=None):
        y = x.softmax(-1)
        y.register_hook(lambda g: None if factor is None else factor * g)
        return y * x

    with jactri.overrides({"softmax": jactri.identity}):
        close(jactri.jacobian(f, x), (x.softmax(-1) + x).diag())
        with (
            pytest.raises(RuntimeError, match="a hook that changes"),
            pytest.warns(UserWarning, match="hook"),
        ):
            jactri.jacobian(lambda x: f(x, 2.0), x)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_a_function_of_the_callers_by_its_class():
    x = draw(4)
    with jactri.rule(Square)(lambda node: node.elementwise(2 * node.saved_tensors[0])):
        with jactri.overrides({Square: lambda node: node.saved_tensors[0]}):
            close(jactri.diagonal(Square.apply, x), x)
        close(jactri.diagonal(Square.apply, x), 2 * x)


# -- refusals ---------------------------------------------------------------------------------------

X = torch.linspace(-1, 1, 3, dtype=F64)
REFUSED = {
    "create_graph=True": lambda f: jactri.jacobian(f, X, create_graph=True),
    "strict=True": lambda f: jactri.jacobian(f, X, strict=True),
    "strict=True ": lambda f: jactri.vjp(f, X, X, strict=True),
    "a second derivative": lambda f: jactri.laplacian(f, X),
    "a second derivative ": lambda f: jactri.func.hessian(f)(X),
    "a second derivative  ": lambda f: jactri.bilaplacian(f, X),
    "torch.func transform": lambda f: torch.func.vmap(lambda x: jactri.jacobian(f, x))(X[None]),
    "finite_difference": lambda f: jactri.finite_difference(f, X),
    "jactri.check": lambda f: jactri.check(f, X),
    "jactri.compile": lambda f: jactri.compile(f, X, engine="fx"),
    "jactri.export": lambda f: jactri.export(f, X, path="a.pt2"),
    "jacfwd by torch.func": lambda f: jactri.func.jacfwd(f, randomness="different")(X),
    "a result that can be differentiated": lambda f: jactri.func.jacrev(
        lambda x: f(x * nn.Parameter(X))
    )(X),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_honour_them_refuses(what):
    with (
        jactri.overrides({"softmax": jactri.zero}),
        pytest.raises(RuntimeError, match=what.strip()),
    ):
        REFUSED[what](f_soft)


def test_compiled_calls_refuse():
    call = jactri.compile(f_soft, X, engine="fx")
    with jactri.overrides({"softmax": jactri.zero}), pytest.raises(RuntimeError, match="compiled"):
        call(X)
    close(call(X), truth(f_soft, X))


def net_of_names():
    net = nn.Module()
    net.tanh, net.first = nn.Tanh(), nn.Linear(2, 2)
    return net


WRONG = [
    ({}, None, TypeError, "mapping must be"),
    ({"softmax": "zero"}, None, TypeError, "number or a function"),
    ({"softmax": True}, None, TypeError, "number or a function"),
    ({"sofmax": jactri.zero}, None, ValueError, "there are 'softmax'"),
    ({"layers.*": jactri.zero}, None, ValueError, "of a module, pass model"),
    ({("layers.*", "softmax"): jactri.zero}, None, ValueError, "pass overrides\\(mapping, model=model\\)"),
    ({("softmax",): jactri.zero}, None, TypeError, "a pair is"),
    ({(3, "softmax"): jactri.zero}, None, TypeError, "3 is no module"),
    ({3: jactri.zero}, None, TypeError, "3"),
    ({"softmax": jactri.zero}, "model", TypeError, "model must be a Module"),
    ({"firts": jactri.zero}, net_of_names(), ValueError, "there are 'first'"),
    ({("firts", "addmm"): jactri.zero}, net_of_names(), ValueError, "there are 'first'"),
    ({"tanh": jactri.zero}, net_of_names(), ValueError, "an op and a module.*'TanhBackward0'"),
]  # fmt: skip


@pytest.mark.parametrize(("mapping", "model", "kind", "match"), WRONG)
def test_what_is_no_override(mapping, model, kind, match):
    with pytest.raises(kind, match="(?i)" + match), jactri.overrides(mapping, model=model):
        pass


NOT_HERE = [
    ({"tanh": jactri.zero}, ValueError, "'tanh' is no op of this call.*SoftmaxBackward0 \\(1\\)"),
    ({nn.Tanh: jactri.zero}, ValueError, "Tanh is no module of this call"),
    ({"sum": 2.0}, ValueError, "keep the shape.*jactri.uniform"),
    ({"sum": jactri.identity}, ValueError, "needs one shape"),
    ({"softmax": jactri.ratio}, TypeError, "does not save its input"),
    ({"softmax": jactri.detached_std}, TypeError, "no normalisation.*rsqrt"),
    ({"softmax": lambda node: None}, TypeError, "returned None"),
    ({"softmax": lambda node: "a"}, TypeError, "methods of node"),
    ({nn.Linear: jactri.identity}, ValueError, "needs one shape"),
    ({nn.Softmax: jactri.uniform}, TypeError, "name the op inside"),
    ({nn.Softmax: lambda call: "a"}, TypeError, "a tensor or a number"),
]


@pytest.mark.parametrize(("mapping", "kind", "match"), NOT_HERE)
def test_what_a_call_has_no_use_for(mapping, kind, match):
    net = nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)).double()
    with jactri.overrides(mapping), pytest.raises(kind, match=match):
        jactri.jacobian(lambda x: net(x).sum(-1), X)


def test_a_function_that_autograd_computes_as_a_whole_is_refused():
    def f(x):
        return (
            torch.view_as_real(torch.complex(x, x).sigmoid().lerp(torch.complex(x, x), 0.5))
            + x.tanh()[:, None]
        )

    with jactri.overrides({"tanh": jactri.zero}), pytest.raises(RuntimeError, match="as a whole"):
        jactri.jacobian(f, X)


def test_an_op_behind_a_zero_or_a_constant_counts():
    def f(x):
        return x.sigmoid().tanh() + x

    with jactri.overrides({"sigmoid": jactri.zero, "tanh": jactri.identity}):
        close(jactri.jacobian(f, X), torch.eye(3, dtype=F64))
