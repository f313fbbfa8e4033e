"""per_sample=True: right where samples are independent, refused where they are not, never a guess."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases.layers import Block
from common import F64, MODES, make
from tolerances import assert_close, assert_same_tree
from torch import nn

import jactri
from jactri._src.base.memory import Taken


def blocks(func, *inputs):
    """Each sample alone through torch: (N, *out, *in) for every pair of output and input."""
    per_sample = []
    for n in range(inputs[0].shape[0]):
        one = tuple(x[n : n + 1] for x in inputs)
        js = torch.autograd.functional.jacobian(lambda *xs: func(*xs), one)
        js = js if isinstance(js[0], tuple) else (js,)
        outputs = func(*one)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        per_sample.append(
            [
                [j.reshape(y.shape[1:] + x.shape[1:]) for j, x in zip(row, one, strict=True)]
                for row, y in zip(js, outputs, strict=True)
            ]
        )
    return tuple(
        tuple(torch.stack([s[i][k] for s in per_sample]) for k in range(len(inputs)))
        for i in range(len(per_sample[0]))
    )


class PerSample(torch.autograd.Function):
    """A custom function that keeps samples apart."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class Mixing(torch.autograd.Function):
    """A custom function in which each sample reads the next one."""

    @staticmethod
    def forward(ctx, x):
        return x + 0.5 * x.roll(1, 0)

    @staticmethod
    def backward(ctx, g):
        return g + 0.5 * g.roll(-1, 0)


class MixingOnePair(torch.autograd.Function):
    """Only the last sample reads another one, the one before it."""

    @staticmethod
    def forward(ctx, x):
        y = x.clone()
        y[-1] += 1e-3 * x[-2]
        return y

    @staticmethod
    def backward(ctx, g):
        g = g.clone()
        g[-2] += 1e-3 * g[-1]
        return g


class NumpySin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.new_tensor(np.sin(x.detach().cpu().numpy()))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return x.new_tensor(g.detach().cpu().numpy() * np.cos(x.detach().cpu().numpy()))


linear = make(lambda: nn.Linear(4, 3))
lstm = make(lambda: nn.LSTM(2, 3, batch_first=True))
time_first = make(lambda: nn.LSTM(3, 2))
gru = make(lambda: nn.GRU(2, 3, batch_first=True))
batch_norm = make(lambda: nn.BatchNorm2d(3))

N = 5
ANSWERED = {
    "MLP": (make(lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))), [(N, 3)]),
    "MLP, frozen": (
        make(lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)))
        .requires_grad_(False), [(N, 3)]),
    "convolutions": (make(lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(),
        nn.Conv2d(2, 2, 3, stride=2), nn.Flatten(), nn.Linear(2, 3))), [(N, 1, 4, 4)]),
    "image to image": (make(lambda: nn.Conv2d(1, 1, 3, padding=1)), [(N, 1, 3, 3)]),
    "transformer block": (make(Block), [(N, 3, 4)]),
    "two transformer blocks": (make(lambda: nn.Sequential(Block(), Block())), [(2, 2, 4)]),
    "GroupNorm": (make(lambda: nn.GroupNorm(2, 8)), [(N, 8)]),
    "LayerNorm": (make(lambda: nn.LayerNorm(3)), [(N, 3)]),
    "BatchNorm in eval": (make(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()),
        [(N, 3)]),
    "flatten and view": (lambda x: x.flatten(1).sin().view(-1, 2, 3).flatten(1), [(N, 3, 2)]),
    "batch in a merged axis": (
        lambda x: linear(x.reshape(-1, 4)).tanh().reshape(N, 3, 3),
        [(N, 3, 4)]),
    "batch inside, then back": (lambda x: x.movedim(0, 2).cumsum(0).movedim(2, 0), [(N, 2, 3)]),
    "batch and tokens swapped": (lambda x: x.transpose(0, 1).softmax(-1).transpose(0, 1),
        [(N, 2, 3)]),
    "heads folded into the batch": (
        lambda x: torch.bmm(*(lambda y: (y, y.mT))(
            x.view(-1, 3, 2, 2).transpose(1, 2).reshape(-1, 3, 2))).view(-1, 2, 3, 3),
        [(N, 3, 4)]),
    "softmax over features": (lambda x: x.softmax(1), [(N, 4)]),
    "outer product of features": (lambda x: x[:, :, None] * x[:, None], [(N, 3)]),
    "scaled by a constant of its own": (lambda x: x * torch.arange(N, dtype=F64)[:, None], [(N, 3)]),
    "two inputs": (lambda x, y: torch.einsum("bi,bij->bj", x, y), [(N, 3), (N, 3, 2)]),
    "two outputs": (lambda x: (x.sin(), x.sum(1)), [(N, 3)]),
    "two of both": (lambda x, y: (x * y[:, :1], y.exp()), [(N, 3), (N, 2)]),
    "output without features": (lambda x: (x**2).sum(1), [(N, 3)]),
    "input without features": (lambda x: torch.stack([x, x**2], 1), [(N,)]),
    "no features at all": (torch.sin, [(N,)]),
    "wide to narrow": (lambda x: x.sum(1, keepdim=True).sin(), [(N, 12)]),
    "narrow to wide": (lambda x: x.sin().expand(-1, 12), [(N, 1)]),
    "residual": (make(lambda: nn.Linear(3, 3)).__call__, [(N, 3)]),
    "in-place on features": (
        lambda x: (lambda y: (y[:, 1].mul_(2.0), y)[1])(x.clone()), [(N, 3)]),
    "LSTM": (
        lambda x: lstm(x)[0], [(N, 3, 2)]),
    "GRU over the last step": (
        lambda x: gru(x)[0][:, -1], [(N, 3, 2)]),
    "custom function": (PerSample.apply, [(N, 3)]),
    "custom function inside": (lambda x: PerSample.apply(x * 2).sum(1), [(N, 3)]),
    "custom function along another axis": (lambda x: Mixing.apply(x.T).T, [(N, 3)]),
    "custom function along another of three axes": (
        lambda x: Mixing.apply(x.transpose(0, 1)).transpose(0, 1), [(N, 3, 2)]),
    "custom function in numpy": (NumpySin.apply, [(N, 3)]),
    "inverse": (lambda x: torch.linalg.inv(x + 3 * torch.eye(2, dtype=F64)), [(N, 2, 2)]),
    "log-determinant": (
        lambda x: torch.linalg.slogdet(x + 3 * torch.eye(2, dtype=F64)).logabsdet, [(N, 2, 2)]),
    "fft": (lambda x: torch.fft.rfft(x).abs(), [(N, 4)]),
    "one sample": (make(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))),
        [(1, 3)]),
    "one sample, opaque": (PerSample.apply, [(1, 3)]),
    "more samples than a chunk": (make(lambda: nn.Sequential(nn.Linear(2, 3), nn.SiLU())),
        [(150, 2)]),
    "loop over samples": (lambda x: torch.stack([linear(row).tanh() for row in x]), [(N, 4)]),
    "micro-batches": (
        lambda x: torch.cat([linear(part).tanh() for part in x.split(2)]), [(N, 4)]),
    "permuted and permuted back": (
        lambda x: linear(x[[3, 1, 0, 4, 2]]).tanh()[[2, 1, 4, 0, 3]], [(N, 4)]),
    "written sample by sample": (
        lambda x: (lambda y: ([y[n].copy_(linear(x[n])) for n in range(len(x))], y)[1])(
            x.new_zeros(len(x), 3)), [(N, 4)]),
    "max over features": (lambda x: x.max(1).values, [(N, 4)]),
    "sorted features": (lambda x: x.sort(1).values, [(N, 4)]),
    "constant": (lambda x: x.new_ones(N, 2), [(N, 3)]),
    "detached scale of the batch": (lambda x: x / x.detach().abs().max(), None),
}  # fmt: skip


# a batch size is written into these: one sample alone is another function
WRITTEN_SIZE = {
    "constant", "detached scale of the batch", "scaled by a constant of its own",
    "batch in a merged axis", "permuted and permuted back",
}  # fmt: skip


def inputs_of(shapes):
    g = torch.Generator().manual_seed(7)
    return tuple(torch.randn(s, generator=g, dtype=F64) for s in shapes or [(N, 3)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ANSWERED)
def test_independent_samples(name, mode):
    func, shapes = ANSWERED[name]
    inputs = inputs_of(shapes)
    before = torch.get_rng_state()
    ours = jactri.jacobian(func, inputs, per_sample=True, strategy=mode)
    assert torch.equal(before, torch.get_rng_state()), "the probe drew from the caller's generator"
    ours = ours if isinstance(ours[0], tuple) else (ours,)
    if name in WRITTEN_SIZE:
        full = torch.autograd.functional.jacobian(func, inputs)[0]
        features = full.shape[1 : full.ndim - inputs[0].ndim]
        truth = ((torch.stack([full[n].select(len(features), n) for n in range(N)]),),)
    else:
        truth = blocks(func, *inputs)
    assert_same_tree(ours, truth, F64, length=64, factor=16)


def test_structure():
    """The nesting is that of the whole Jacobian: 1-tuples count."""
    x = inputs_of([(N, 3)])[0]
    for func in (torch.sin, lambda x: (x.sin(),), lambda x: (x.sin(), x.sum(1))):
        for inputs in (x, (x,)):
            whole = jactri.jacobian(func, inputs)
            ours = jactri.jacobian(func, inputs, per_sample=True)

            def nesting(j):
                return tuple(map(nesting, j)) if isinstance(j, tuple) else None

            assert nesting(ours) == nesting(whole)


REFUSED = {
    "BatchNorm in training": (make(lambda: nn.BatchNorm1d(3)), "BatchNorm"),
    "BatchNorm between layers": (
        make(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))),
        "BatchNorm"),
    "BatchNorm2d in training": (
        lambda x: batch_norm(x[..., None, None]), "BatchNorm"),
    "mean over the batch, given back": (lambda x: x.mean(0).expand(N, 3), "Mean"),
    "centred": (lambda x: x - x.mean(0), "Mean"),
    "standardised": (lambda x: (x - x.mean(0)) / x.std(0), "Mean|Std"),
    "sum of everything": (lambda x: x * x.sum(), "Sum"),
    "cumsum over the batch": (lambda x: x.cumsum(0), "Cumsum"),
    "roll over the batch": (lambda x: x.roll(1, 0), "Roll"),
    "flip of the batch": (lambda x: x.flip(0), "Flip"),
    "permuted batch": (lambda x: x[torch.tensor([1, 0, 3, 2, 4])], "Index"),
    "index_select on the batch": (
        lambda x: x.index_select(0, torch.tensor([4, 3, 2, 1, 0])), "IndexSelect"),
    "sorted batch": (lambda x: x.sort(0).values, "Sort"),
    "Gram matrix": (lambda x: x @ x.T, "Mm"),
    "attention over the batch": (lambda x: (x @ x.T).softmax(-1) @ x, "Mm"),
    "softmax over the batch": (lambda x: x.softmax(0), "Softmax"),
    "mixed by a matrix": (lambda x: torch.ones(N, N, dtype=F64).tril() @ x, "Mm"),
    "transposed square": (lambda x: x[:, :1].expand(N, N).T * 2, "Permute|Transpose|T|Expand"),
    "neighbours": (lambda x: torch.cat([x[1:], x[:1]]), "Cat|Slice"),
    "first sample to all": (lambda x: x * x[0], "Mul|Select|Expand"),
    "regrouped": (lambda x: x.reshape(3, N).T.reshape(N, 3), "View|Reshape|Permute|T"),
    "normalised by the batch": (lambda x: F.normalize(x, dim=0), "Norm|Div|Expand"),
    "max of the batch": (lambda x: x.max(0).values.expand(N, 3) * 1, "Max"),
    "convolution along the batch": (
        lambda x: F.conv1d(x.T[:, None], torch.ones(1, 1, 3, dtype=F64), padding=1)[:, 0].T,
        "Convolution"),
    "written by the neighbour": (
        lambda x: (lambda y: (y[1:].copy_(x[:-1]), y)[1])(x.clone()), "CopySlices|Slice"),
    "custom function": (Mixing.apply, "Mixing"),
    "custom function, one weak pair": (MixingOnePair.apply, "MixingOnePair"),
    "custom function inside": (lambda x: Mixing.apply(x.sin()).sum(1), "Mixing"),
    "custom function on three axes": (
        lambda x: Mixing.apply(x[:, :, None].expand(N, 3, 2) * 1.0).sum(-1), "Mixing"),
    "custom function over features, batch last": (
        lambda x: Mixing.apply(x[:, None, :] * 1.0).squeeze(1), "Mixing"),
    "LSTM over the batch": (
        lambda x: time_first(x[:, None])[0][:, 0], "."),
    "solve with all samples": (
        lambda x: torch.linalg.solve(x @ x.T + torch.eye(N, dtype=F64), x), "."),
    "fft over the batch": (lambda x: torch.fft.fft(x, dim=0).real, "Fft"),
    "one of two outputs": (lambda x: (x.sin(), x - x.mean(0)), "Mean"),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_mixing_samples_are_refused_by_name(name, mode):
    func, op = REFUSED[name]
    (x,) = inputs_of([(N, 3)])
    with pytest.raises(RuntimeError, match=op) as caught:
        jactri.jacobian(func, x, per_sample=True, strategy=mode)
    message = str(caught.value)
    assert "per_sample" in message
    assert "sample" in message.replace("per_sample", "")
    assert type(caught.value) is RuntimeError or not isinstance(caught.value, NotImplementedError)


def test_what_is_refused_per_sample_is_still_answered_whole():
    (x,) = inputs_of([(N, 3)])
    for func, _ in REFUSED.values():
        ours = jactri.jacobian(func, x)
        assert_same_tree(
            ours, torch.autograd.functional.jacobian(func, x), F64, length=64, factor=64
        )


def test_mixing_at_one_point_only():
    """The analysis is about the graph of this evaluation, as autograd's derivative is."""

    def func(x):
        return x - x.mean(0) if x.sum() > 0 else x.sin()

    (x,) = inputs_of([(N, 3)])
    x = x.abs()
    with pytest.raises(RuntimeError, match="Mean"):
        jactri.jacobian(func, x, per_sample=True)
    assert_close(jactri.jacobian(func, -x, per_sample=True), torch.diag_embed(x.cos()), F64)


NO_BATCH = {
    "0-d input": (torch.sin, lambda: torch.tensor(1.0), "inputs"),
    "0-d output": (torch.sum, lambda: torch.ones(3, 2), "output"),
    "output of another length": (lambda x: x[1:], lambda: torch.ones(3, 2), "output"),
    "inputs of different lengths": (lambda x, y: x * y.sum(), lambda: (torch.ones(3, 2),
                                    torch.ones(4, 2)), "inputs"),
    "one 0-d input of two": (lambda x, y: x * y, lambda: (torch.ones(3, 2), torch.tensor(1.0)),
                             "inputs"),
    "one output of another length": (lambda x: (x, x.sum(0)), lambda: torch.ones(3, 2), "output"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_BATCH)
def test_no_common_batch_axis(name):
    func, inputs, word = NO_BATCH[name]
    with pytest.raises(ValueError, match=word):
        jactri.jacobian(func, inputs(), per_sample=True)


EMPTY = {
    "MLP": (make(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), (0, 3), (0, 2, 3)),
    "convolution": (make(lambda: nn.Conv1d(1, 2, 2)), (0, 1, 3), (0, 2, 2, 1, 3)),
    "custom function": (PerSample.apply, (0, 3), (0, 3, 3)),
    "no features": (lambda x: x * 2, (4, 0), (4, 0, 0)),
    "no outputs": (lambda x: x[:, :0], (4, 3), (4, 0, 3)),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EMPTY)
def test_empty_batches_and_features(name, mode):
    func, shape, expected = EMPTY[name]
    j = jactri.jacobian(func, torch.ones(shape, dtype=F64), per_sample=True, strategy=mode)
    assert j.shape == expected
    assert j.dtype == F64


@pytest.mark.parametrize("strategy", MODES)
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 1000])
def test_chunks_change_nothing(chunk_size, strategy):
    net = make(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)))
    (x,) = inputs_of([(N, 4)])
    truth = blocks(net, x)[0][0]
    j = jactri.jacobian(net, x, per_sample=True, strategy=strategy, chunk_size=chunk_size)
    assert_close(j, truth, F64, length=32)
    whole = jactri.jacobian(net, x, strategy=strategy, chunk_size=chunk_size)
    assert_close(whole, torch.autograd.functional.jacobian(net, x), F64, length=32)


def test_out_and_output():
    net = make(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)))
    (x,) = inputs_of([(N, 4)])
    out = torch.full((N, 5, 4), torch.nan, dtype=F64)
    y, j = jactri.jacobian(net, x, per_sample=True, out=out, return_output=True)
    assert j is out or j.data_ptr() == out.data_ptr()
    assert_close(out, blocks(net, x)[0][0], F64, length=32)
    assert_close(y, net(x), F64, what="output")


def test_create_graph():
    net = make(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    for mode in MODES:
        (x,) = inputs_of([(N, 3)])
        x.requires_grad_()
        j = jactri.jacobian(net, x, per_sample=True, create_graph=True, strategy=mode)
        ours = torch.autograd.grad((j**2).sum(), [x, *net.parameters()], materialize_grads=True)
        full = torch.autograd.functional.jacobian(net, x, create_graph=True)
        theirs = torch.autograd.grad(
            (full**2).sum(), [x, *net.parameters()], materialize_grads=True
        )
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, F64, length=64)


@pytest.mark.parametrize("power", [2, 3])
def test_a_probe_holds_for_what_it_looks_at(power):
    """Of what vanishes at a point with its second derivatives: the Jacobian and its gradients, as documented."""
    x = torch.tensor([[1.0, 2], [-3, 0.5], [2, -2.5]], dtype=F64, requires_grad=True)

    def func(x):
        return x.sin() + x.mean(0) ** power

    whole = torch.autograd.functional.jacobian(func, x, create_graph=True)
    theirs = whole.diagonal(0, 0, 2).movedim(-1, 0)
    assert_close(jactri.jacobian(func, x, per_sample=True), theirs.detach(), F64)
    if power == 2:
        with pytest.raises(RuntimeError, match="a probe found derivatives across samples"):
            jactri.jacobian(func, x, per_sample=True, create_graph=True)
        return
    ours = jactri.jacobian(func, x, per_sample=True, create_graph=True)
    weights = torch.linspace(1, 2, ours.numel(), dtype=F64).view_as(ours)
    found, want = (torch.autograd.grad((j * weights).sum(), x)[0] for j in (ours, theirs))
    assert_close(found, want, F64)


def test_jacobian_of_per_sample():
    net = make(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    (x,) = inputs_of([(N, 3)])
    truth = blocks(net, x)[0][0]
    x.requires_grad_()
    y = net(x)
    for _ in range(2):
        assert_close(jactri.jacobian_of(y, x, per_sample=True), truth, F64, length=32)
    with pytest.raises(RuntimeError, match="Mean"):
        jactri.jacobian_of(y - y.mean(0), x, per_sample=True)
    with pytest.raises(ValueError, match="output"):
        jactri.jacobian_of(y.sum(), x, per_sample=True)


def test_a_nan_in_one_sample_stays_in_its_block():
    net = make(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    (x,) = inputs_of([(N, 3)])
    truth = blocks(net, x)[0][0]
    x[2, 1] = torch.nan
    for mode in MODES:
        j = jactri.jacobian(net, x, per_sample=True, strategy=mode)
        assert j[2].isnan().any()
        others = torch.arange(N) != 2
        assert_close(j[others], truth[others], F64, length=32)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.parametrize("call", ["jacobian", "diagonal"])
def test_a_probe_keeps_the_limit(call):
    """It pulls several masks through nodes that are called: as many as the limit has room for."""
    wide = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0), dtype=F64)

    def func(x):
        return Doubled.apply(x @ wide) @ wide.mT / 100

    x, row = torch.ones(16, 4, dtype=F64), 16 * 2048 * F64.itemsize
    options = {} if call == "diagonal" else {"per_sample": True}
    with Taken() as forward:
        y = func(x.clone().requires_grad_())
    with Taken() as taken:
        getattr(jactri, call)(func, x, memory_limit=6 * row, **options)
    del y
    assert taken.peak - forward.now < 1.2 * 6 * row
