"""`jactri.compile`: the same answers as `jacobian`, at other values too, and never a stale one."""

import gc
import logging
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from cases import ALL
from common import F64, Cube, seeded
from tolerances import assert_same_tree
from torch import nn

import jactri
from jactri.tape import Recorder, Tape, function

REPLAYED = 0.97  # the part of the op table that must be replayed, not run call by call


def agree(compiled, func, *xs, **options):
    """The compiled Jacobian at ``xs`` is the ordinary one."""
    given = xs if len(xs) > 1 else xs[0]
    assert_same_tree(compiled(*xs), jactri.jacobian(func, given, **options), F64, length=64)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("case", ALL, ids=repr)
def test_every_op_replays_at_other_values(case, static):
    func, inputs = case.build(frozen=True)
    if any(not x.is_floating_point() for x in inputs):
        with pytest.raises(RuntimeError):
            jactri.compile(func, *inputs, static=static)
        return
    compiled = jactri.compile(func, *inputs, static=static)
    gen = torch.Generator().manual_seed(1)
    others = tuple(
        x * (1 + 0.01 * torch.rand(x.shape, generator=gen, dtype=torch.float64).to(x.dtype)) for x in inputs
    )  # fmt: skip
    for xs in (inputs, others):
        want = jactri.jacobian(func, xs if len(xs) > 1 else xs[0])
        assert_same_tree(compiled(*xs), want, inputs[0].dtype, length=64)


def test_most_ops_are_replayed():
    hows = []
    for case in ALL[::10]:
        func, inputs = case.build(frozen=True)
        if all(x.is_floating_point() for x in inputs):
            hows.append(repr(jactri.compile(func, *inputs)))
    assert len(hows) > 100
    assert sum("replays" in how for how in hows) > REPLAYED * len(hows)


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize(
    "options", [{}, {"per_sample": True}, {"strategy": "mixed"}, {"chunk_size": 2}], ids=str
)
def test_options_and_batches(n, options):
    net = seeded(6, 9, 3, 9, 4)
    compiled = jactri.compile(net, torch.randn(n, 6, dtype=F64), **options)
    for _ in range(3):
        agree(compiled, net, torch.randn(n, 6, dtype=F64), **options)
    assert compiled.replans == 0


def test_several_inputs_and_outputs():
    net = seeded(6, 9, 4)

    def func(x, u):
        y = net(torch.cat([x, u], 1))
        return y, (x * u).sum(1)

    def draw():
        return torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)

    compiled = jactri.compile(func, *draw(), per_sample=True, return_output=True)
    x, u = draw()
    value, J = compiled(x, u)
    want_value, want = jactri.jacobian(func, (x, u), per_sample=True, return_output=True)
    assert_same_tree(J, want, F64, length=64)
    assert_same_tree(value, want_value, F64, length=64)
    assert not any(v.requires_grad for v in value)


def test_non_contiguous_inputs():
    net = seeded(6, 9, 4)
    compiled = jactri.compile(net, torch.randn(5, 6, dtype=F64))
    agree(compiled, net, torch.randn(6, 5, dtype=F64).t())
    agree(compiled, net, torch.randn(5, 12, dtype=F64)[:, ::2])


def test_results_belong_to_the_caller():
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    compiled = jactri.compile(net, x)
    first = compiled(x)
    kept = first.clone()
    compiled(x + 1).zero_()
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
    agree(compiled, net, x)
    before = [p.clone() for p in net.parameters()]
    compiled(x).fill_(7.0)
    for p, b in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p, b, rtol=0, atol=0)


def test_the_answer_is_not_a_view_of_weights():
    net = nn.Linear(6, 4, dtype=F64)
    x = torch.randn(1, 6, dtype=F64)
    weight = net.weight.clone()
    jactri.compile(net, x, per_sample=True)(x).zero_()
    torch.testing.assert_close(net.weight.detach(), weight.detach(), rtol=0, atol=0)


# -- what changes between calls --------------------------------------------------------------------


def test_parameters_updated_in_place_are_seen():
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    compiled = jactri.compile(net, x)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    agree(compiled, net, x)
    assert compiled.replans == 0


def test_replaced_parameters_are_seen():
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    compiled = jactri.compile(net, x)
    net[0].weight = nn.Parameter(torch.randn(9, 6, dtype=F64))
    agree(compiled, net, x)
    net[2] = nn.Linear(9, 7, dtype=F64)  # another shape of the output
    agree(compiled, net, x)


@pytest.mark.parametrize(
    "branches",
    [
        (torch.sin, torch.cos),
        (lambda x: x * 2.0, lambda x: x * 3.0),
        (lambda x: x**2, lambda x: x**3),
        (lambda x: x.sum(0), lambda x: x.sum(1)),
        (lambda x: x.cumsum(0), lambda x: x.cumsum(1)),
        (lambda x: F.elu(x, 1.0), lambda x: F.elu(x, 0.5)),
        (lambda x: x[0], lambda x: x[1]),
        (lambda x: x.tanh() + x, lambda x: x.tanh() + x.detach()),
        (lambda x: x * x.sin(), lambda x: x.sin() * x.sin()),
        (lambda x: x.sin() - x, lambda x: x - x.sin()),
        (lambda x: x.sin() * 1, lambda x: torch.ones(4, 4, dtype=F64)),
        (lambda x: x, lambda x: x * 1.0),
        (lambda x: torch.stack(x.unbind(0)[::-1]), lambda x: torch.stack(x.unbind(0))),
        (lambda x: x[torch.tensor([0, 1])], lambda x: x[torch.tensor([1, 0])]),
        (lambda x: (x.sin(), x.cos()), lambda x: (x.cos(), x.sin())),
        (lambda x: x.sin(), lambda x: (x.sin(),)),
        (lambda x: x.sin(), lambda x: (x.sin(), x.cos())),
        (lambda x: F.leaky_relu(x, 0.1), lambda x: F.leaky_relu(x, 0.2)),
        (lambda x: x.clamp(-1, 1), lambda x: x.clamp(-0.5, 0.5)),
        (lambda x: torch.where(x > 0, x, 2 * x), lambda x: torch.where(x > 0, 2 * x, x)),
        (lambda x: x.softmax(0), lambda x: x.softmax(1)),
        (lambda x: x[x > 0], lambda x: x[x < 0]),
    ],
    ids=range(22),
)  # fmt: skip
def test_another_branch_is_never_answered_with_the_old_one(branches):
    chosen = [0]

    def func(x):
        return branches[chosen[0]](x)

    x = torch.randn(4, 4, dtype=F64)
    compiled = jactri.compile(func, x)
    for k in (0, 1, 0, 1):
        chosen[0] = k
        agree(compiled, func, torch.randn(4, 4, dtype=F64))


def test_an_input_in_the_place_of_a_parameter():
    w = torch.randn(4, 4, dtype=F64, requires_grad=True)
    swap = [False]

    def func(x):
        return x.sin() * (x if swap[0] else w)

    x = torch.randn(4, 4, dtype=F64)
    compiled = jactri.compile(func, x)
    swap[0] = True
    agree(compiled, func, x)


@pytest.mark.parametrize("first", [True, False])
def test_two_saved_tensors_that_are_one_at_times(first):
    """A target that is the input itself, or another tensor: no edge of the graph tells."""
    w = torch.randn(4, 4, dtype=F64)
    own = [first]

    def func(x):
        return x.sin() * (x.detach() if own[0] else w)

    x = torch.randn(4, 4, dtype=F64)
    compiled = jactri.compile(func, x)
    for own[0] in (True, False, True, False):
        agree(compiled, func, x)
        agree(compiled, func, x + 1)


@pytest.mark.parametrize(
    "index", [torch.tensor([0, 1, 1, 3]), torch.tensor([True, False, True, False])]
)
def test_an_index_may_hold_other_values(index):
    picked = [index]

    def func(x):
        return x.tanh()[:, picked[0]] * x[picked[0]][0, 0]

    x = torch.randn(4, 4, dtype=F64)
    compiled = jactri.compile(func, x)
    assert ("replays" in repr(compiled)) == (index.dtype is torch.int64)
    for picked[0] in (index, index.flip(0), index.roll(1)):
        agree(compiled, func, x)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    "rows, columns", [([[0, 1, 2], [1, 0, 2]], [3, 2, 1]), ([2], [1])], ids=["wider", "one"]
)
def test_a_list_of_indices_is_not_taken_for_its_first(rows, columns, static):
    i, j = torch.tensor(rows), torch.tensor(columns)

    def func(x):
        return x[i, j] ** 2

    compiled = jactri.compile(func, torch.randn(3, 4, dtype=F64), static=static)
    assert "replays" in repr(compiled)
    for _ in range(2):
        x = torch.randn(3, 4, dtype=F64)
        truth = torch.autograd.functional.jacobian(func, x)
        assert_same_tree(compiled(x), truth, F64, length=64)


def test_python_numbers_of_the_function_may_change():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = 2.0

        def forward(self, x):
            return (x * self.by).tanh() / self.by + x**self.by

    net, x = Scaled(), torch.rand(4, dtype=F64) + 0.5
    compiled = jactri.compile(net, x)
    for by in (2.0, 0.5, 3.0):
        net.by = by
        agree(compiled, net, x)


def test_other_shapes_dtypes_and_modes_are_planned_and_counted(caplog):
    net = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 4))
    net.eval()
    compiled = jactri.compile(net, torch.randn(5, 6))
    caplog.set_level(logging.INFO, "jactri")
    for n, k in ((5, 0), (3, 1), (5, 1), (3, 1), (1, 2)):
        x = torch.randn(n, 6)
        torch.testing.assert_close(compiled(x), jactri.jacobian(net, x))
        assert compiled.replans == k
    assert "planned again, the shapes, dtypes or devices changed" in caplog.text
    net.double()
    x = torch.randn(5, 6, dtype=F64)
    agree(compiled, net, x)
    assert compiled.replans == 3
    net.train()
    torch.manual_seed(0)
    ours = compiled(x)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, jactri.jacobian(net, x))
    assert compiled.replans == 4


def test_few_signatures_are_kept():
    net = seeded(3, 3)
    compiled = jactri.compile(net, torch.randn(1, 3, dtype=F64))
    for n in (*range(2, 20), 1):
        agree(compiled, net, torch.randn(n, 3, dtype=F64))
    assert len(compiled._plans) <= 8
    assert compiled.replans == 19


def test_it_runs_call_by_call_where_it_cannot_be_recorded():
    x = torch.randn(4, dtype=F64)
    for func, why in (
        (lambda x: Cube.apply(x), "Python code"),
        (lambda x: torch.fft.fft(x).abs(), ""),
    ):
        compiled = jactri.compile(func, x)
        agree(compiled, func, x + 1)
        if why:
            assert "call by call" in repr(compiled) and why in repr(compiled)


def test_a_recording_keeps_the_limit_of_memory():
    net = seeded(*[64] * 7)
    x = torch.randn(64, 64, dtype=F64)
    compiled = jactri.compile(net, x, per_sample=True, memory_limit="9MB")
    assert "call by call" in repr(compiled) and "memory_limit" in repr(compiled)
    agree(compiled, net, x + 1, per_sample=True)
    assert "replays" in repr(jactri.compile(net, x, per_sample=True, memory_limit="50MB"))


def test_samples_that_only_a_probe_tells_apart():
    lstm = nn.LSTM(3, 4, batch_first=True).double()

    def func(x):
        return torch.stack([lstm(row[None])[0][0] for row in x])

    x = torch.randn(3, 2, 3, dtype=F64)
    compiled = jactri.compile(func, x, per_sample=True)
    agree(compiled, func, torch.randn(3, 2, 3, dtype=F64), per_sample=True)
    mixing = [0.0]

    def sometimes(x):
        y = func(x)
        return y + mixing[0] * y.flip(0)

    compiled = jactri.compile(sometimes, x, per_sample=True)
    mixing[0] = 1.0
    with pytest.raises(RuntimeError, match="samples mix"):
        compiled(x)


@pytest.mark.parametrize("static", [False, True])
def test_inference_and_no_grad_modes(static):
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    compiled = jactri.compile(net, x, static=static)
    want = jactri.jacobian(net, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), want)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), want)
        torch.testing.assert_close(compiled(x.clone()), want)


def test_bad_input():
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    compiled = jactri.compile(net, x)
    with pytest.raises(TypeError, match="inputs"):
        compiled([1.0])
    with pytest.raises(TypeError):
        compiled(x, x)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(compiled)(x[None])
    with pytest.raises(IndexError, match="example_inputs"):
        jactri.compile(net)
    with pytest.raises(AssertionError, match="strategy"):
        jactri.compile(net, x, strategy="sideways")
    with pytest.raises(RuntimeError, match="samples mix"):
        jactri.compile(lambda x: x - x.mean(0), x, per_sample=True)
    with pytest.raises(RuntimeError):
        compiled(torch.randn(5, 7, dtype=F64))
    agree(compiled, net, x)


@pytest.mark.parametrize("static", [False, True])
def test_threads(static):
    net = seeded(6, 9, 4)
    compiled = jactri.compile(net, torch.randn(5, 6, dtype=F64), static=static)
    wrong = []

    def work(seed):
        gen = torch.Generator().manual_seed(seed)
        for n in (5, 5, 3, 5, 4) * 5:
            x = torch.randn(n, 6, dtype=F64, generator=gen)
            if not torch.allclose(compiled(x), jactri.jacobian(net, x)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_nothing_of_a_call_is_kept():
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    compiled = jactri.compile(net, x)
    J = compiled(x)
    alive = [weakref.ref(x), weakref.ref(J)]
    del x, J
    gc.collect()
    assert all(ref() is None for ref in alive)


def test_chains_of_views_are_one():
    x = torch.randn(3, 4, dtype=F64)
    with Recorder(1e9) as recorder:
        start = x + 1
        a = start.t().unsqueeze(0).expand(2, 4, 3).transpose(1, 2)
        b = start.view(3, 4)[:, :].mul_(2)  # the same look: writes are seen through all
        c = (a * b).unsqueeze(0).squeeze(0)
        d = start.t().unsqueeze(0).expand(2, 4, 3).transpose(1, 2) + c
    tape = Tape(recorder, [d], [])
    assert len(recorder.lines) == 16 and tape.ops == 5  # +, one look, mul_, *, +
    run = function("run", ["x0"], [*tape.code, f"return {tape.results[0]}"], tape.constants)
    other = torch.randn(3, 4, dtype=F64)
    torch.testing.assert_close(run(x), d)
    twice = 2 * (other + 1)
    torch.testing.assert_close(run(other), (twice * twice + twice).expand(2, 3, 4))
