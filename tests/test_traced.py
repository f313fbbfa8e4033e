"""`jactri.compile(..., static=True)` on a CPU: func's ops are replayed as well, on what it holds now, or not at all."""

import functools
import gc
import weakref

import pytest
import torch
from cases import ALL
from common import F64, Cube, seeded
from test_compiled_operators import CALLS, OF_MODULES, agree, field, plain, residual
from tolerances import assert_close, assert_same_tree
from torch import nn

import jactri
from jactri import backends

BOTH = {**CALLS, **OF_MODULES}
STATIC = 0.95  # the part of the op table whose forward pass must be replayed, too


def static(func, *xs, of=jactri.jacobian, **options):
    return jactri.compile(func, *xs, of=of, static=True, **options)


def whole(compiled):
    """Whether no Python of func runs."""
    return "those of func among them" in repr(compiled)


def test_most_ops_are_static():
    made = []
    for case in ALL[::10]:
        func, inputs = case.build(frozen=True)
        if all(x.is_floating_point() for x in inputs):
            made.append(whole(static(func, *inputs)))
    assert len(made) > 100
    assert sum(made) > STATIC * len(made)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_every_call(name, n):
    of, options = BOTH[name]
    net = field()
    compiled = static(net, torch.randn(n, 4, dtype=F64), of=of, **options)
    for _ in range(3):
        agree(compiled, of, net, torch.randn(n, 4, dtype=F64), **options)
    with torch.no_grad():
        net[0].weight.add_(0.1)
    agree(compiled, of, net, torch.randn(n, 4, dtype=F64), **options)
    kept = of is jactri.divergence and n > 0  # a product of weights, which is made anew
    assert compiled.replans == kept and whole(compiled)
    agree(compiled, of, net, torch.randn(n, 4, 2, dtype=F64)[..., 0], **options)  # other strides


@pytest.mark.parametrize("name", CALLS)
def test_a_single_point(name):
    of, options = CALLS[name]
    if options.get("per_sample"):
        of, options = jactri.diagonal, {"return_output": True}
    compiled = static(residual, torch.randn(4, dtype=F64), of=of, **options)
    agree(compiled, of, residual, torch.randn(4, dtype=F64), **options)
    assert whole(compiled)


def test_several_inputs_and_outputs_into_memory():
    net = seeded(6, 9, 4)

    def func(x, u):
        return net(torch.cat([x, u], 1)), (x * u).sum(1)

    x = torch.randn(5, 3, dtype=F64)
    compiled = static(func, x, x, per_sample=True, return_output=True)  # one memory, this time only
    out = tuple(tuple(torch.empty(5, *shape, 3, dtype=F64) for _ in "xu") for shape in ((4,), ()))
    for shift in (1, 2):
        xs = x + shift, (x - shift).requires_grad_()
        want = jactri.jacobian(func, xs, per_sample=True, return_output=True)
        assert_same_tree(compiled(*xs), want, F64, length=64)
        y, found = compiled(*xs, out=out)
        assert found is out
        assert_same_tree((y, out), want, F64, length=64)
        assert not any(t.requires_grad for t in (*y, *out[0]))


def test_an_integer_input():
    words = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    index = torch.tensor([[0, 1], [4, 4], [2, 0]])
    compiled = static(words, index, of=jactri.parameter_jacobian)
    for other in (index.flip(0), index.roll(1), torch.zeros_like(index)):
        agree(compiled, jactri.parameter_jacobian, words, other)


def test_networks():
    conv = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip
    block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    for net, shape in ((conv, (2, 1, 8, 8)), (block, (2, 5, 8))):
        net.double().eval()
        compiled = static(net, torch.randn(shape, dtype=F64), per_sample=True)
        agree(compiled, jactri.jacobian, net, torch.randn(shape, dtype=F64), per_sample=True)
        assert whole(compiled)


# -- oneDNN's products -----------------------------------------------------------------------------


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU, nn.Sigmoid, nn.SiLU, nn.GELU])
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_the_forward_pass_by_onednn(act, bias, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(33, 65, bias=bias), act(), nn.Linear(65, 17, bias=bias), act(), nn.Linear(17, 33),
    )  # fmt: skip
    x = torch.randn(7, 33)
    monkeypatch.setattr(backends, "_SMALL", 0)
    monkeypatch.setattr(backends, "_probe", backends.Probe(1.0, 2.0, "as if oneDNN were faster"))
    truth = type(net)(*net).double()
    want = {name: plain(of, truth, x.double(), **options) for name, (of, options) in FP32.items()}
    net.float()
    for name, (of, options) in FP32.items():
        compiled = static(net, x + 1, of=of, **options)
        assert whole(compiled)
        assert_same_tree(compiled(x), want[name], torch.float32, length=64)


@pytest.mark.parametrize(
    "bias", [torch.randn(18)[::2], torch.randn(1).expand(9)], ids=["strided", "expanded"]
)
@pytest.mark.parametrize("inner", [8, 0])
def test_products_that_onednn_does_not_take(bias, inner, monkeypatch):
    monkeypatch.setattr(backends, "_SMALL", 0)
    monkeypatch.setattr(backends, "_probe", backends.Probe(1.0, 2.0, "as if oneDNN were faster"))
    w, x = torch.randn(inner, 9), torch.randn(5, inner)

    def func(x):
        return torch.addmm(bias, x, w).tanh()

    compiled = static(func, x, per_sample=True, return_output=True)
    want = jactri.jacobian(func, x + 1, per_sample=True, return_output=True)
    assert_same_tree(compiled(x + 1), want, torch.float32, length=64)


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU, nn.Sigmoid])
def test_nan_stays_nan(act, monkeypatch):
    monkeypatch.setattr(backends, "_SMALL", 0)
    monkeypatch.setattr(backends, "_probe", backends.Probe(1.0, 2.0, "as if oneDNN were faster"))
    net, x = nn.Sequential(nn.Linear(8, 9), act()), torch.randn(3, 8)
    compiled = static(net, x, per_sample=True, return_output=True)
    x[1] = torch.nan
    y, found = compiled(x)
    want_y, want = jactri.jacobian(net, x, per_sample=True, return_output=True)
    assert_same_tree((y, found), (want_y, want), torch.float32)
    assert y[1].isnan().all()


FP32 = {
    "jacobian": (jactri.jacobian, {"per_sample": True, "return_output": True}),
    "laplacian": (jactri.laplacian, {"return_lower": True}),
    "divergence": (jactri.divergence, {}),
    "parameters": (jactri.parameter_jacobian, {}),
}


# -- what cannot be static ----------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return (x * self.calls).tanh()


def from_python(x):
    return x.tanh() * torch.from_numpy(x.detach().numpy().copy())


REFUSED = {
    "counts its calls": (Counting(), lambda x, calls: (x * calls).tanh()),
    "values by way of numpy": (from_python, lambda x, calls: from_python(x)),
    "the input itself": (lambda x: x, lambda x, calls: x),
    "samples by values": (lambda x: x[x > 0].sin(), lambda x, calls: x[x > 0].sin()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_static_runs_as_it_would_otherwise(name):
    func, truth = REFUSED[name]
    x = torch.rand(3, 4, dtype=F64)
    compiled = static(func, x, return_output=True)
    for at in (x, x + 1):
        y, found = compiled(at)
        calls = getattr(func, "calls", None)
        assert_close(y, truth(at, calls), F64, length=64)
        want = torch.autograd.functional.jacobian(functools.partial(truth, calls=calls), at)
        assert_close(found, want, F64, length=64)
    assert not whole(compiled)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return g * torch.from_numpy(2 * ctx.saved_tensors[0].detach().numpy())


def test_python_code_in_autograd():
    x = torch.rand(3, 4, dtype=F64)
    for func, truth in ((Cube.apply, lambda v: v**3), (Squared.apply, torch.square)):
        compiled = static(func, x)
        for shift in (0, 1):
            want = torch.autograd.functional.jacobian(truth, x + shift)
            assert_close(compiled(x + shift), want, F64, length=64)
        assert not whole(compiled)


def test_lengths_that_an_op_reads_off_a_tensor():
    at = torch.tensor([1])

    def split(x):
        return torch.tensor_split(x, at)[0].sin()

    x = torch.rand(3, 4, dtype=F64)
    compiled = static(split, x)
    at += 1
    agree(compiled, jactri.jacobian, split, x)
    lstm = nn.LSTM(4, 2, batch_first=True).double()
    lengths = torch.tensor([5, 2, 1])

    def last(x):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return lstm(packed)[1][0]

    x = torch.rand(3, 5, 4, dtype=F64)
    compiled = static(last, x)
    lengths.copy_(torch.tensor([4, 4, 3]))
    agree(compiled, jactri.jacobian, last, x)


def test_a_value_that_is_nan():
    def func(x):
        return x.sin() if x.detach().max().item() > 0 else x.cos()

    x = torch.rand(3, 4, dtype=F64)
    compiled = static(func, x)
    for at in (x, x * torch.nan, x * torch.nan, -x):
        torch.testing.assert_close(compiled(at), jactri.jacobian(func, at), equal_nan=True)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(around, inside):
    w = torch.randn(4, 4)

    def func(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return (x @ w).tanh()

    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        compiled = static(func, x, return_output=True)
        y, found = compiled(x + 1)
        want_y, want = jactri.jacobian(func, x + 1, return_output=True)
    assert whole(compiled) == (not (inside or around))
    assert y.dtype is want_y.dtype
    assert_same_tree((y, found), (want_y, want), torch.bfloat16 if inside else torch.float32)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_module():
    net, x = torch.jit.trace(field(), torch.randn(3, 4, dtype=F64)), torch.randn(3, 4, dtype=F64)
    compiled = static(net, x)
    assert not whole(compiled)
    agree(compiled, jactri.jacobian, net, x + 1)


def test_dropout_draws_anew():
    net = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 1)).double()
    x = torch.randn(1, 4, dtype=F64)
    compiled = static(net, x)
    assert not whole(compiled)
    torch.manual_seed(0)
    ours = compiled(x)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, jactri.jacobian(net, x))
    assert not torch.equal(compiled(x), compiled(x))


def test_batch_statistics_are_written_at_every_call():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    other = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    other.load_state_dict(net.state_dict())
    x = torch.randn(5, 4, dtype=F64)
    compiled = static(net, x)
    seen = int(net[1].num_batches_tracked)
    compiled(x)
    assert int(net[1].num_batches_tracked) == seen + 1


# -- the calls themselves ------------------------------------------------------------------------------


def test_results_belong_to_the_caller():
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    compiled = static(net, x, return_output=True)
    y, J = compiled(x)
    kept = y.clone(), J.clone()
    for t in compiled(x + 1):
        t.zero_()
    assert_same_tree((y, J), kept, F64)
    before = [p.clone() for p in net.parameters()]
    for t in compiled(x):
        t.fill_(7.0)
    for p, b in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p, b, rtol=0, atol=0)
    linear = nn.Linear(6, 4, dtype=F64)
    weight = linear.weight.detach().clone()
    static(linear, x[:1], per_sample=True)(x[:1]).zero_()
    torch.testing.assert_close(linear.weight.detach(), weight, rtol=0, atol=0)


def test_nothing_of_a_call_is_kept():
    for of in (jactri.jacobian, jactri.parameter_jacobian):
        net = seeded(6, 9, 4)
        x = torch.randn(5, 6, dtype=F64)
        compiled = static(net, x, of=of)
        found = compiled(x)
        found = next(iter(found.values())) if isinstance(found, dict) else found
        alive = [weakref.ref(x), weakref.ref(found)]
        plan = next(iter(compiled._plans.values()))
        assert not any(isinstance(t, torch.Tensor) for t in (*plan.ends.ys, *plan.ends.leaves))
        del x, found
        gc.collect()
        assert all(ref() is None for ref in alive)


def test_who_watches_the_ops_sees_an_ordinary_call():
    from torch.utils.flop_counter import FlopCounterMode

    net, x = field(), torch.randn(3, 4, dtype=F64)
    compiled = static(net, x, per_sample=True)
    with FlopCounterMode(display=False) as ours:
        compiled(x)
    with FlopCounterMode(display=False) as plainly:
        jactri.jacobian(net, x, per_sample=True)
    assert ours.get_total_flops() == plainly.get_total_flops() > 0


def test_bad_input():
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    with pytest.raises(RuntimeError, match="samples mix"):
        static(lambda x: x - x.mean(0), x, per_sample=True)
    compiled = static(net, x)
    with pytest.raises(TypeError, match="inputs"):
        compiled([1.0])
    with pytest.raises(RuntimeError):
        compiled(torch.randn(5, 7, dtype=F64))
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(compiled)(x[None])
    agree(compiled, jactri.jacobian, net, x)
