"""`jvp` with tangents that go with the function's run, and what keeps a graph: against torch's double backward."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from common import F64, in_threads, make, mlp, x3, x23
from tolerances import assert_close, assert_gradients_close, assert_same_tree
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import jactri

D = 8


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotated(x):
    """RoPE as rotate_half does it."""
    t, d = x.shape[-2:]
    angle = torch.outer(torch.arange(t, dtype=F64), 10.0 ** -torch.arange(0, d, 2, dtype=F64))
    cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rotated_by_complex_numbers(x):
    """RoPE as LLaMA's first code does it."""
    t, d = x.shape[-2:]
    angle = torch.outer(torch.arange(t, dtype=F64), 10.0 ** -torch.arange(0, d, 2, dtype=F64))
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


class Grouped(nn.Module):
    """Queries of four heads, keys and values of two, rotated; a SwiGLU behind it."""

    def __init__(self, rotate=rotated, **options):
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(D, 16, False), nn.Linear(D, 16, False), nn.Linear(16, D)
        self.up, self.gate, self.down = nn.Linear(D, 12), nn.Linear(D, 12), nn.Linear(12, D)
        self.norms = nn.ModuleList([RMSNorm(), RMSNorm()])
        self.rotate, self.options = rotate, options

    def forward(self, x):
        n, t, _ = x.shape
        h = self.norms[0](x)
        q = self.q(h).view(n, t, 4, 4).transpose(1, 2)
        k, v = self.kv(h).view(n, t, 2, 2, 4).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            self.rotate(q), self.rotate(k), v, enable_gqa=True, **self.options
        )
        x = x + self.o(out.transpose(1, 2).reshape(n, t, 16))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class AdaLN(nn.Module):
    """A block of a DiT: shifts, scales and gates from the time; attends to itself and to a text."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D, elementwise_affine=False)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(D, 3 * D))
        self.own = nn.MultiheadAttention(D, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(D, 2, batch_first=True, kdim=3, vdim=3)
        self.mlp = nn.Sequential(nn.Linear(D, 16), nn.GELU("tanh"), nn.Linear(16, D))
        self.text = nn.Parameter(torch.randn(1, 4, 3))

    def forward(self, x, t):
        waves = torch.cat(
            [(t * k).cos() for k in range(1, 5)] + [(t * k).sin() for k in range(1, 5)], -1
        )
        shift, scale, gate = self.time(waves)[:, None].chunk(3, -1)
        h = self.norm(x) * (1 + scale) + shift
        padding = torch.tensor([[False] * 4 + [True]]).expand(len(x), 5)
        x = x + gate * self.own(h, h, h, key_padding_mask=padding, need_weights=False)[0]
        text = self.text.expand(len(x), -1, -1)
        x = x + self.cross(x, text, text)[0]
        return x + gate * self.mlp(self.norm(x))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(inplace=True)
        )
        self.deep = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.up = nn.ConvTranspose2d(8, 4, 4, 2, 1)
        self.out = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x):
        h = self.down(x)
        y = F.interpolate(self.up(self.deep(h)), scale_factor=1.0, mode="nearest")
        return self.out(torch.cat([h, y], 1))


def encoder(**options):
    layer = nn.TransformerEncoderLayer(D, 2, 16, 0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([encoder(), encoder(norm_first=True)])

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def written(x):
    """Writes into a result, to views of it, to what was read before, and through lists."""
    y = torch.zeros_like(x)
    y[1] = x[0]
    part = y[:, 1:]
    for k in range(40):
        y[k % 2] = x[0].sin() * k
        part.mul_(0.9).add_(x[:, 1:])
    y.clamp_(min=0.1)
    z = y.view(-1)
    z[1] *= x[0, 0]
    torch._foreach_mul_([y, part], 1.5)
    return y, part * 2, z.max(0).values, torch.sort(x * y, 1)[0]


SHAPE = (2, 5, D)
BLOCKS = {
    "MLP": (lambda: mlp(D, 16, 3), [SHAPE]),
    "encoder": (encoder, [SHAPE]),
    "encoder, norm first": (lambda: encoder(norm_first=True, activation="gelu"), [SHAPE]),
    "GQA, RoPE, RMSNorm, SwiGLU": (Grouped, [SHAPE]),
    "causal": (lambda: Grouped(is_causal=True), [SHAPE]),
    "boolean mask": (lambda: Grouped(attn_mask=torch.rand(5, 5) < 0.7), [SHAPE]),
    "RoPE by complex numbers": (lambda: Grouped(rotated_by_complex_numbers), [SHAPE]),
    "AdaLN, cross-attention, padding": (AdaLN, [SHAPE, (2, 1)]),
    "UNet": (lambda: UNet().eval(), [(2, 1, 4, 4)]),
    "checkpoints": (Checkpointed, [SHAPE]),
    "GRU": (lambda: nn.GRU(D, 4, batch_first=True), [SHAPE]),
    "batch norm in training": (lambda: nn.Sequential(nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4), nn.ELU(inplace=True)),
                               [SHAPE]),
}  # fmt: skip


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def given(shapes, columns):
    torch.manual_seed(1)
    xs = tuple(torch.randn(s, dtype=F64) for s in shapes)
    return xs, tuple(torch.randn(*columns, *s, dtype=F64) for s in shapes)


def truth(func, xs, ts):
    """Row by row by torch's double backward, which its fused attention does not have."""
    with sdpa_kernel(SDPBackend.MATH):
        rows = [
            torch.autograd.functional.jvp(lambda *v: as_tuple(func(*v)), xs, t)[1]
            for t in zip(*ts, strict=True)
        ]
    return tuple(map(torch.stack, zip(*rows, strict=True)))


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    module, shapes = BLOCKS[name]
    net = make(module)
    xs, ts = given(shapes, (3,))
    want = truth(net, xs, ts)
    y = net(*xs)
    for how in (None, "output", "both"):
        output, product = jactri.jvp(net, xs, ts, differentiate=how)
        assert_same_tree(as_tuple(output), as_tuple(y), F64, length=64)
        assert_same_tree(as_tuple(product), want, F64, length=256)
        for out, p in zip(as_tuple(output), as_tuple(product), strict=True):
            assert out.requires_grad == (how is not None) and p.requires_grad == (how == "both")
    single = jactri.jvp(net, xs, tuple(t[1] for t in ts), differentiate=None)[1]
    assert_same_tree(as_tuple(single), tuple(w[1] for w in want), F64, length=256)
    assert all(p.grad is None for p in net.parameters())


def test_writes():
    (x,), (t,) = given([(2, 4)], (3,))
    assert_same_tree(
        jactri.jvp(written, x, t, differentiate=None)[1], truth(written, (x,), (t,)), F64, length=64
    )


def test_runs_once():
    """A checkpointed part too, whose values are read as they are made."""
    calls = []

    def part(y):
        calls.append(y)
        return y.sin() * y

    jactri.jvp(lambda x: checkpoint(part, x, use_reentrant=False), x3(), x3(), differentiate=None)
    assert len(calls) == 1


class Sine(torch.autograd.Function):
    """Which a mode of functions does not see."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


def in_a_checkpoint(x):
    """What it saves is counted as in the first run, in which other ops were read at once."""

    def inner(y):
        return Sine.apply(y.cos()) * y

    def outer(y):
        z = checkpoint(inner, F.dropout(y, 0.3).sin(), use_reentrant=False)
        return Sine.apply(z * 2).exp() * y

    torch.manual_seed(3)
    return Sine.apply(checkpoint(outer, x, use_reentrant=False).cos())


def handed_through(x):
    """An op that returns what it got is no write to it."""
    y = Sine.apply(x)
    z = Sine.apply(y)
    v = y.view(-1)
    for _ in range(20):
        v = v.contiguous()
    return y.contiguous() * z * v.view(x.shape)


def beside_complex_values(x):
    """Which autograd computes, and for which nothing but a leaf is behind the other output."""
    return x.sin(), torch.view_as_real(torch.linalg.eigvals(x[:, :3]))


@pytest.mark.parametrize("func", [in_a_checkpoint, handed_through, beside_complex_values])
def test_functions_that_escape_the_mode(func):
    (x,), (t,) = given([(3, 4)], (2,))
    rows = as_tuple(torch.autograd.functional.jacobian(func, x))
    products = as_tuple(jactri.jvp(func, x, t, differentiate=None)[1])
    for product, row in zip(products, rows, strict=True):
        assert_close(product, torch.einsum("abij,kij->kab", row, t), F64, length=16)


def test_output_is_trained_by_a_target_of_the_product():
    """One step of MeanFlow: du/dt along (v, 0, 1) is detached, u is not."""
    net = make(lambda: mlp(4, 16, 2))

    def u(z, r, t):
        return net(torch.cat([z, r, t], 1))

    (z, r, t), _ = given([(3, 2), (3, 1), (3, 1)], ())
    v = torch.randn_like(z)
    along = v, torch.zeros_like(r), torch.ones_like(t)
    out, dudt = jactri.jvp(u, (z, r, t), along, differentiate="output")
    loss = (out - (v - (t - r) * dudt)).square().sum()
    ours = torch.autograd.grad(loss, net.parameters())
    (want,) = truth(u, (z, r, t), tuple(a.unsqueeze(0) for a in along))
    loss = (u(z, r, t) - (v - (t - r) * want[0])).square().sum()
    assert_gradients_close(ours, torch.autograd.grad(loss, net.parameters()), F64, length=64)


@pytest.mark.parametrize("how", [None, "output"])
def test_dropout_keeps_its_mask(how):
    torch.manual_seed(0)
    x, t = torch.rand(4, 50, dtype=F64) + 1, torch.ones(4, 50, dtype=F64)
    y, product = jactri.jvp(lambda v: F.dropout(v, 0.4).square(), x, t, differentiate=how)
    assert 20 < (y == 0).sum() < 150
    assert_close(product, 2 * y.detach() / x, F64)


def test_autocast():
    net = make(lambda: mlp(D, 16, 3)).float()
    (x,), (t,) = given([(6, D)], (2,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, product = jactri.jvp(net, x.float(), t.float(), differentiate=None)
    assert y.dtype == product.dtype == torch.bfloat16
    assert_close(product, truth(net.double(), (x,), (t,))[0], torch.bfloat16, length=16)


def test_nothing_is_kept():
    """Neither graphs nor tangents of what the function let go, without a garbage collection."""
    gc.collect()
    gc.disable()
    try:
        alive = []

        def func(x):
            refs = []
            for _ in range(20):
                x = F.layer_norm(torch.tanh(x @ x.mT), (3,)) @ x.new_ones(3, 3)
                refs.append(weakref.ref(x))
                alive.append(sum(r() is not None for r in refs))
            return x

        jactri.jvp(func, torch.rand(3, 3), torch.rand(2, 3, 3), differentiate=None)
        assert max(alive) == 1
    finally:
        gc.enable()


def test_memory_is_its_own():
    x, t = x23(), torch.ones(2, 2, 3, dtype=F64)
    _, (a, b, c) = jactri.jvp(lambda v: (v, v + 1, v.sum().expand(4)), x, t, differentiate=None)
    memory = {m.untyped_storage().data_ptr() for m in (t, a, b, c)}
    assert len(memory) == 4
    c.zero_()  # each entry has memory


def test_a_buffer_that_outlives_the_call():
    """What an earlier call wrote to it is a constant in the next."""
    kept = torch.zeros(3, dtype=F64)

    def func(x):
        y = kept * x
        kept[:2] = x[:2]
        return y + kept

    x = x3()
    first = jactri.jvp(func, x, torch.ones(3, dtype=F64), differentiate=None)[1]
    assert_close(first, torch.tensor([1.0, 1, 0], dtype=F64), F64)
    second = jactri.jvp(func, x, torch.ones(2, 3, dtype=F64), differentiate=None)[1]
    want = torch.cat([x[:2] + 1, torch.zeros(1, dtype=F64)]).expand(2, 3)
    assert_close(second, want, F64)


def test_calls_within():
    """Another call within the function sees its own graph, whole; and one that does not differentiate is a constant."""
    (x,), (t,) = given([(3,)], (2,))

    def func(v):
        inner = jactri.jacobian(lambda w: w.sin() * w.sum(), v * 2, create_graph=True)
        with_tangents = jactri.jvp(torch.exp, v.detach(), v.detach(), differentiate=None)[1]
        return inner.sum(1) + torch.func.grad(lambda w: (w**3).sum())(v) + with_tangents

    def plain(v):
        inner = torch.autograd.functional.jacobian(
            lambda w: w.sin() * w.sum(), v * 2, create_graph=True
        )
        return inner.sum(1) + 3 * v**2

    got = jactri.jvp(func, x, t, differentiate=None)[1]
    assert_close(got, truth(plain, (x,), (t,))[0], F64, length=16)


def test_threads():
    net, ((x,), (t,)) = make(lambda: mlp(D, 16, 3)), given([(6, D)], (2,))
    found = {}
    in_threads(4, lambda k: found.update({k: jactri.jvp(net, x * k, t, differentiate=None)[1]}))
    for k, product in found.items():
        assert_close(product, truth(net, (x * k,), (t,))[0], F64, length=64)


def inner_gradient(x):
    y = x * 2
    return torch.autograd.grad((y**3).sum(), y, create_graph=True)[0]


def hooked(x):
    y = x.sin()
    y.register_hook(lambda g: 2 * g)
    return y


def module_with_a_hook(x):
    net = nn.Linear(3, 3).double()
    net.register_full_backward_hook(lambda module, into, out: (2 * into[0],))
    return net(x)


@pytest.mark.parametrize(
    ("func", "match"),
    [
        (module_with_a_hook, "a module with backward hooks"),
        (inner_gradient, r"torch\.autograd\.grad, .*Leave differentiate out"),
        (lambda x: (x.sin().sum().backward(), x)[1], r"backward\(\), .*differentiate='output'"),
        (hooked, r"Tensor\.register_hook"),
    ],
)
def test_functions_that_need_their_graph(func, match):
    with pytest.raises(RuntimeError, match=match):
        jactri.jvp(func, x3(), x3(), differentiate=None)
    if func is not hooked:
        return
    jactri.jvp(
        lambda x: inner_gradient(x.detach().requires_grad_()), x3(), x3(), differentiate=None
    )


def test_arguments():
    x = x3()
    bad = [
        ({"differentiate": "outputs"}, ValueError, "did you mean 'output'"),
        ({"differentiate": "output", "create_graph": True}, ValueError, "differentiate='both'"),
        ({"differentiate": None, "chunk_size": 2}, ValueError, "chunk_size=2"),
        ({"differentiate": None, "memory_limit": "1GB"}, ValueError, "memory_limit='1GB'"),
        ({"differentiate": None, "strict": True}, ValueError, "strict=True"),
    ]
    for options, kind, match in bad:
        with pytest.raises(kind, match=match):
            jactri.jvp(torch.sin, x, x, **options)
    for how in (None, "output", "both"):
        with pytest.raises(RuntimeError, match=r"tangents\[0\] has shape \(2,\); expected \(3,\)"):
            jactri.jvp(torch.sin, x, x[:2], differentiate=how)
        with pytest.raises(RuntimeError, match=r"tangents\[0\] has dtype torch.int64"):
            jactri.jvp(torch.sin, x, x.long(), differentiate=how)
        assert jactri.jvp(torch.sin, x, x.new_zeros(0, 3), differentiate=how)[1].shape == (0, 3)


def test_backwards_that_cannot_be_differentiated():
    """ "both" says so where it is differentiated; the others do not ask."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cos()

    x = x3().requires_grad_()
    for how in (None, "output", "both"):
        _, product = jactri.jvp(Own.apply, x, x.detach(), differentiate=how)
        assert_close(product, (x * x.cos()).detach(), F64)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        product.sum().backward()


def test_transforms():
    xs = torch.stack([x3(), x3() + 1])
    for how in (None, "output", "both"):
        got = torch.func.vmap(lambda x, h=how: jactri.jvp(torch.sin, x, x, differentiate=h)[1])(xs)
        assert_close(got, xs * xs.cos(), F64)
    grad = torch.func.grad(
        lambda x: (lambda y, p: (y * p).sum())(*jactri.jvp(torch.sin, x, x, differentiate="output"))
    )(x3())
    assert_close(grad, x3().cos() * x3() * x3().cos(), F64)
