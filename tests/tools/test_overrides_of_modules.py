"""`jactri.overrides` of modules, and what they leave alone: threads, other calls, the model by itself."""

import asyncio
import contextvars
import threading
import types

import pytest
import torch
from common import F64, Square, in_threads, make
from overridden import Attention, Block, Gelu, Rms, close, draw, f_soft, over, sloped
from torch import nn
from torch.autograd.functional import jacobian as truth
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import jactri


@pytest.fixture
def block():
    return make(Block)


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


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("value", [jactri.identity, jactri.ratio])
def test_modules_that_write_to_their_input(act, value):
    net, x = nn.Sequential(nn.Linear(3, 4), act(inplace=True), nn.Linear(4, 2)), draw(5, 3)
    net.to(F64)
    h0 = draw(1, 4)
    with jactri.overrides({net[1]: value}):
        got = jactri.jacobian(net, x, per_sample=True)
    part = nn.Sequential(net[1], nn.Linear(4, 4)).to(F64)
    with jactri.overrides({part: jactri.identity}):
        close(
            jactri.jacobian(lambda h: part(h * 2), h0), 2 * torch.eye(4, dtype=F64).view(1, 4, 1, 4)
        )
    h = net[0](x)
    slope = torch.ones_like(h) if value is jactri.identity else act()(h) / h
    close(got, torch.einsum("oh,nh,hi->noi", net[2].weight, slope, net[0].weight).detach())

    class Hidden(nn.Module):
        def forward(self, x):
            return x.mul_(x.detach().sin())

    net[1] = Hidden()
    with (
        jactri.overrides({Hidden: value}),
        pytest.raises(RuntimeError, match="Hidden writes to its input in place"),
    ):
        jactri.jacobian(net, x)


class Masked(nn.Module):
    def forward(self, mask=None, hidden=None):
        return hidden.tanh() * mask


def test_a_module_of_two_names():
    act, x = nn.Tanh(), draw(3)
    net = nn.Sequential(act, nn.Sequential(act))
    for name in ("0", "1.0", "1.*"):
        with jactri.overrides({name: 3.0}, model=net):
            close(jactri.diagonal(net, x), torch.full_like(x, 9.0))


def test_the_argument_that_has_a_gradient():
    x, net = draw(4), Masked()
    with jactri.overrides({net: jactri.identity}):
        close(jactri.diagonal(lambda x: net(mask=torch.ones(4), hidden=x), x), torch.ones_like(x))
        close(jactri.diagonal(lambda x: net(torch.ones(4), x), x), torch.ones_like(x))


def test_zero_of_an_output_with_hidden_tensors():
    class Hides(nn.Module):
        def forward(self, x):
            return x.sin(), types.SimpleNamespace(more=x.cos())

    net, x = Hides(), draw(3)
    with (
        jactri.overrides({net: jactri.zero}),
        pytest.raises(TypeError, match="its output holds a SimpleNamespace, in which no tensors"),
    ):
        jactri.diagonal(lambda x: net(x)[1].more + x, x)


class Interrupted(nn.Module):
    interrupt = True

    def forward(self, x):
        if self.interrupt:
            raise KeyboardInterrupt
        return x.tanh()


@pytest.mark.parametrize("whole", [False, True])
def test_after_an_interrupt(whole):
    net, x = Interrupted(), draw(3)

    def f(x):
        return net(x) + 3 * x.tanh()

    with jactri.overrides({net if whole else (net, "tanh"): jactri.identity}):
        with pytest.raises(KeyboardInterrupt):
            jactri.diagonal(f, x)
        net.interrupt = False
        close(jactri.diagonal(f, x), 1 + 3 / x.cosh() ** 2)


def test_threads_one_after_another():
    """Threads count their nodes each from the beginning, under numbers that are given out again."""
    net, x = nn.Tanh(), draw(3)

    def work(context, found, f, before):
        for _ in range(before):
            x.clone().requires_grad_() * 2
        found.append(context.run(jactri.diagonal, f, x))

    with jactri.overrides({(net, "tanh"): jactri.identity}):
        for f, before in ((lambda x: net(net(net(x))), 30), *[(net, 1)] * 3):
            found = []
            given = contextvars.copy_context(), found, f, before
            thread = threading.Thread(target=work, args=given)
            thread.start()
            thread.join()
            close(found[0], torch.ones_like(x))


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
    assert not nn.modules.module._has_any_global_hook()


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


def test_a_function_of_the_callers_by_its_class():
    x = draw(4)
    with jactri.rule(Square)(lambda node: node.elementwise(2 * node.saved_tensors[0])):
        with jactri.overrides({Square: lambda node: node.saved_tensors[0]}):
            close(jactri.diagonal(Square.apply, x), x)
        close(jactri.diagonal(Square.apply, x), 2 * x)
