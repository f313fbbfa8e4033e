"""`jactri.compile`: the answers of the ordinary call, at other values too, and what it sees of changes."""

import functools
import gc
import logging
import warnings
import weakref

import pytest
import torch
from cases import ALL, graph_steps
from common import F64, Cube, in_threads, seeded, torch_before
from tolerances import assert_same_tree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import jactri

compile = functools.partial(jactri.compile, engine="fx")

EAGERLY = {
    "draws random": """
        RReLU rrelu_train gumbel_softmax gumbel_softmax_hard dropout_train
        dropout2d_train alpha_dropout_train feature_alpha_dropout fractional_max_pool2d fractional_max_pool3d
        sdpa_dropout_train gamma_sample gradient_of_fractional_max_pool2d gradient_of_fractional_max_pool3d
        uniform_in_place bernoulli poisson native_dropout native_dropout_eval rrelu_train_in_place""",
    "mat_a": """
        grouped_mm_rows grouped_mm_inner grouped_mm_columns grouped_mm_batched""",
    "depends on values": """
        lstsq repeat_interleave_counts index_mask index_mask_rows index_mask_columns index_mask_none_true
        index_fill_tensor index_put_mask complex_mixed masked_select masked_scatter masked_scatter_wide_mask
        masked_scatter_scalar nonzero_gather embedding_scaled histogram_free_mean LSTM_packed
        GRU_packed_sorted ctc_loss ctc_loss_lengths_as_tensors""",
    "a value is read": """
        corrcoef cov module_backward_hooks gaussian_nll reparameterised beta_log_prob""",
    "writes to": """
        BatchNorm1d_train BatchNorm1d_train_sequence BatchNorm2d_train""",
}
"""Which cases of the table run eagerly, by words of the reason."""


def one_for_each_step():
    """All cases that run eagerly, and those, the largest first, that hold a node, or a node after another, that none
    before has: a graph of the same steps asks the same rules for blocks of the same makes."""
    named = {name for names in EAGERLY.values() for name in names.split()}
    steps = {}
    for case in ALL:
        if case.variant:
            continue
        func, inputs = case.build(frozen=True)
        leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps[case] = graph_steps(func(*leaves), leaves)
    found, seen = [], set()
    for case in sorted(steps, key=lambda c: (repr(c) not in named, -len(steps[c]))):
        if repr(case) in named or steps[case] - seen or not steps[case]:
            found.append(case)
        seen |= steps[case]
    return found


MAIN = one_for_each_step()


def agree(compiled, func, *xs, **options):
    """The compiled Jacobian at ``xs`` is the ordinary one."""
    given = xs if len(xs) > 1 else xs[0]
    assert_same_tree(compiled(*xs), jactri.jacobian(func, given, **options), F64, length=64)


@pytest.mark.parametrize("case", MAIN, ids=repr)
def test_every_op_at_other_values(case, monkeypatch):
    # torch.compile, once used, switches the checks of values off for the process
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    func, inputs = case.build(frozen=True)
    if any(not x.is_floating_point() for x in inputs):
        with pytest.raises(RuntimeError):
            compile(func, *inputs)
        return
    compiled = compile(func, *inputs)
    gen = torch.Generator().manual_seed(1)
    others = tuple(
        x * (1 + 0.01 * torch.rand(x.shape, generator=gen, dtype=torch.float64).to(x.dtype)) for x in inputs
    )  # fmt: skip
    for xs in (inputs, others):
        want = jactri.jacobian(func, xs if len(xs) > 1 else xs[0])
        assert_same_tree(compiled(*xs), want, inputs[0].dtype, length=64)
    assert compiled.traces == 1
    why = [words for words, names in EAGERLY.items() if repr(case) in names.split()]
    if torch_before((2, 13)):  # whose fakes read other values
        return
    assert (compiled.reason is None) == (not why)
    assert all(words in compiled.reason for words in why)


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize(
    "options", [{}, {"per_sample": True}, {"strategy": "mixed"}, {"chunk_size": 2}], ids=str
)
def test_options_and_batches(n, options):
    net = seeded(6, 9, 3, 9, 4)
    compiled = compile(net, torch.randn(n, 6, dtype=F64), **options)
    for _ in range(3):
        agree(compiled, net, torch.randn(n, 6, dtype=F64), **options)
    assert compiled.traces == 1 and compiled.graph is not None


def test_several_inputs_and_outputs():
    net = seeded(6, 9, 4)

    def func(x, u):
        y = net(torch.cat([x, u], 1))
        return y, (x * u).sum(1)

    def draw():
        return torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)

    compiled = compile(func, *draw(), per_sample=True, return_output=True)
    x, u = draw()
    value, J = compiled(x, u)
    want_value, want = jactri.jacobian(func, (x, u), per_sample=True, return_output=True)
    assert_same_tree(J, want, F64, length=64)
    assert_same_tree(value, want_value, F64, length=64)
    assert not any(v.requires_grad for v in value)


def test_non_contiguous_inputs():
    net = seeded(6, 9, 4)
    compiled = compile(net, torch.randn(5, 6, dtype=F64))
    for traces in (3, 3):
        agree(compiled, net, torch.randn(6, 5, dtype=F64).t())
        agree(compiled, net, torch.randn(5, 12, dtype=F64)[:, ::2])
        assert compiled.traces == traces


def test_one_tensor_twice():
    """Two inputs that are one tensor now may be two at the next call."""
    x, y = torch.randn(2, 4, dtype=F64)
    compiled = compile(lambda a, b: a.sin() * b, x, x)
    agree(compiled, lambda a, b: a.sin() * b, x, y)


def test_results_belong_to_the_caller():
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    compiled = compile(net, x)
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
    compile(net, x, per_sample=True)(x).zero_()
    torch.testing.assert_close(net.weight.detach(), weight.detach(), rtol=0, atol=0)


# -- signatures --------------------------------------------------------------------------------------


def test_other_shapes_and_dtypes_are_traced_and_counted(caplog):
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    compiled = compile(net, torch.randn(5, 6))
    caplog.set_level(logging.INFO, "jactri")
    for n, k in ((5, 1), (3, 2), (5, 2), (3, 2), (1, 3)):
        x = torch.randn(n, 6)
        torch.testing.assert_close(compiled(x), jactri.jacobian(net, x))
        assert compiled.traces == k
    assert "traced again: the shapes, strides, dtypes, devices or modes changed" in caplog.text
    net.double()
    agree(compiled, net, torch.randn(5, 6, dtype=F64))
    assert compiled.traces == 4


def test_few_signatures_are_kept():
    net = seeded(3, 3)
    compiled = compile(net, torch.randn(1, 3, dtype=F64))
    for n in (*range(2, 12), 1):
        agree(compiled, net, torch.randn(n, 3, dtype=F64))
    assert len(compiled._plans) <= 8
    assert compiled.traces == 12


def test_autocast_is_a_part_of_the_signature():
    net, x = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)), torch.randn(5, 6)
    compiled = compile(net, x)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            got, want = compiled(x), jactri.jacobian(net, x)
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(compiled(x), jactri.jacobian(net, x))
    assert compiled.traces == 2


@pytest.mark.parametrize("of", [None, jactri.jacobian])
def test_a_part_outside_of_autocast_keeps_its_precision(of):
    """A graph that runs, or is differentiated, where autocast is on converts nothing by itself."""
    first, last = nn.Linear(6, 9), nn.Linear(9, 4)

    def func(x):
        with torch.autocast("cpu", enabled=False):
            return last(first(x.float()).tanh())

    x = torch.randn(5, 6)
    options = {} if of is None else {"create_graph": True}
    with torch.autocast("cpu", torch.bfloat16):
        compiled = compile(func, x, of=of, **options)
        assert compiled.graph is not None
        got, want = (
            compiled(x),
            func(x) if of is None else jactri.jacobian(func, x, create_graph=True),
        )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    weights = [first.weight, last.weight]
    grads = torch.autograd.grad(got.square().sum(), weights)
    torch.testing.assert_close(
        grads, torch.autograd.grad(want.square().sum(), weights), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("engine", ["fx"])
def test_inference_and_no_grad_modes(engine):
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    compiled = jactri.compile(net, x, engine=engine)
    want = jactri.jacobian(net, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), want)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), want)
        torch.testing.assert_close(compiled(x.clone()), want)


# -- what cannot be traced runs as the ordinary call -------------------------------------------------


UNTRACEABLE = {
    "item": (lambda x: x * x.sum().item(), "_local_scalar_dense"),
    "numpy": (lambda x: x * torch.from_numpy(x.detach().numpy()), "numpy"),
    "a list": (lambda x: x * sum(x.tolist()), "a value is read"),
    "a branch": (lambda x: x.sin() if x.sum() > 0 else x.cos(), "a value is read"),
    "a mask": (lambda x: x[x > 0] ** 2, "nonzero|dynamic|Dynamic"),
    "random numbers": (lambda x: x * torch.rand(4, dtype=F64, generator=torch.manual_seed(1)), "Generator"),
    "dropout": (lambda x: nn.functional.dropout(x, torch.manual_seed(1) and 0.5), "random"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_values_that_python_reads(name):
    func, why = UNTRACEABLE[name]
    compiled = compile(func, torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=F64))
    for x in torch.randn(4, 4, dtype=F64):
        agree(compiled, func, x)
    assert compiled.graph is None and "runs eagerly" in repr(compiled)
    assert any(w in compiled.reason for w in why.split("|")), compiled.reason


def test_an_eager_call_is_told_once(caplog):
    with caplog.at_level(logging.WARNING, "jactri"):
        compiled = compile(lambda x: x * x.sum().item(), torch.ones(4))
        compiled(torch.ones(5)), compiled(torch.ones(5))
    assert compiled.traces == 2
    assert [r.getMessage() for r in caplog.records] == [
        f"compiled jacobian runs eagerly: {compiled.reason}"
    ]


def test_samples_that_values_prove_apart():
    """As where rows are picked by index: the ordinary call, unless they are taken to be apart."""
    rows = torch.tensor([2, 0, 1])

    def func(x):
        return torch.zeros_like(x).index_put((rows,), x[rows].sin())

    x = torch.randn(3, 2, dtype=F64)
    proven = compile(func, x, per_sample=True, engine="fx")
    assert 'per_sample="assume"' in proven.reason
    assumed = compile(func, x, per_sample="assume", engine="fx")
    assert assumed.reason is None
    for call in (proven, assumed):
        torch.testing.assert_close(call(x), torch.diag_embed(x.cos()))


def test_writes_to_what_is_not_its_own():
    w = torch.zeros(4, dtype=F64)

    def func(x):
        w.add_(1)
        return x * w

    x = torch.randn(4, dtype=F64)
    compiled = compile(func, x)
    assert w[0] == 1  # the ordinary call's write alone
    torch.testing.assert_close(compiled(x), torch.diag(w))
    assert w[0] == 2 and "writes to a tensor that it holds" in compiled.reason


def test_autograd_functions_of_python():
    x = torch.randn(4, dtype=F64)
    compiled = compile(lambda x: Cube.apply(x).sin(), x)
    agree(compiled, lambda x: Cube.apply(x).sin(), x + 1)


def test_tensors_of_other_classes():
    class Own(torch.Tensor):
        pass

    x = torch.randn(4, dtype=F64)
    compiled = compile(torch.sin, x)
    found = compiled(x.as_subclass(Own))
    torch.testing.assert_close(torch.Tensor(found), jactri.jacobian(torch.sin, x))


def test_who_watches_the_ops_sees_an_ordinary_call():
    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    net, x = seeded(6, 9, 4), torch.randn(5, 6, dtype=F64)
    compiled = compile(net, x)
    with Count() as count:
        compiled(x)
    with Count() as ordinary:
        jactri.jacobian(net, x)
    assert count.seen == ordinary.seen


def test_a_graph_that_is_wrong_is_not_used(monkeypatch, caplog):
    x = torch.randn(4, dtype=F64)
    monkeypatch.setattr(
        jactri._src.compile.engines,
        "_fx",
        lambda graph, like: lambda ts: [t * 2 for t in graph(*ts)],
    )
    compiled = compile(torch.sin, x)
    assert "off by" in compiled.reason and "off by" in caplog.text
    agree(compiled, torch.sin, x + 1)


def test_what_is_computed_in_less_precision_is_compared_in_it(monkeypatch):
    """As norms of language models are, whose inputs and outputs are wider."""
    net = nn.LayerNorm(4)

    def narrow(x):
        return net(x.float()).double()

    monkeypatch.setattr(
        jactri._src.compile.engines,
        "_fx",
        lambda graph, like: lambda ts: [t * (1 + 1e-6) for t in graph(*ts)],
    )
    x = torch.randn(3, 4, dtype=F64)
    compiled = compile(narrow, x)
    assert compiled.reason is None and 1e-7 < compiled.verify(x) < 1e-5
    assert "off by" in compile(torch.tanh, x).reason


def test_verify():
    x = torch.randn(4, dtype=F64)
    compiled = compile(torch.sin, x)
    assert compiled.verify(x + 1) < 1e-12
    plan = next(iter(compiled._plans.values()))
    run, plan.run = plan.run, lambda ts: [t + 1 for t in run(ts)]
    with pytest.raises(RuntimeError, match="tensor 0 is off by"):
        compiled.verify(x)


# -- samples ------------------------------------------------------------------------------------------


def test_samples_that_only_a_probe_tells_apart():
    lstm = nn.LSTM(3, 4, batch_first=True).double()

    def func(x):
        return torch.stack([lstm(row[None])[0][0] for row in x])

    x = torch.randn(3, 2, 3, dtype=F64)
    compiled = compile(func, x, per_sample=True)
    agree(compiled, func, torch.randn(3, 2, 3, dtype=F64), per_sample=True)


def test_samples_that_an_index_keeps_apart_here_may_meet_there():
    def func(x, index):
        return x.tanh()[index.long()]

    x, own = torch.randn(4, 3, dtype=F64), torch.arange(4.0, dtype=F64)
    with pytest.raises(RuntimeError, match="samples mix"):
        compile(lambda x: func(x, own.flip(0)), x, per_sample=True)
    compiled = compile(lambda x: func(x, own), x, per_sample=True)
    own.copy_(own.flip(0))
    with pytest.raises(RuntimeError, match="samples mix"):
        compiled(x)


# -- the rest -----------------------------------------------------------------------------------------


def test_bad_input():
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    compiled = compile(net, x)
    with pytest.raises(TypeError, match="inputs"):
        compiled([1.0])
    with pytest.raises(TypeError):
        compiled(x, x)
    with pytest.raises(TypeError, match="jacobian takes tensors, got 0"):
        compiled()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(compiled)(x[None])
    with pytest.raises(IndexError, match="example_inputs"):
        compile(net)
    with pytest.raises(AssertionError, match="strategy"):
        compile(net, x, strategy="sideways")
    with pytest.raises(RuntimeError, match="samples mix"):
        compile(lambda x: x - x.mean(0), x, per_sample=True)
    with pytest.raises(RuntimeError):
        compiled(torch.randn(5, 7, dtype=F64))
    with pytest.raises(ValueError, match="engine must be one of 'inductor', 'aot', 'fx', got 'C'"):
        jactri.compile(net, x, engine="C")
    with pytest.raises(TypeError, match=r"takes no 'static'.*engine="):
        jactri.compile(net, x, static=True)
    agree(compiled, net, x)


def test_threads():
    net = seeded(6, 9, 4)
    compiled = compile(net, torch.randn(5, 6, dtype=F64))
    wrong = []

    def work(seed):
        gen = torch.Generator().manual_seed(seed)
        for n in (5, 5, 3, 5, 4) * 3:
            x = torch.randn(n, 6, dtype=F64, generator=gen)
            if not torch.allclose(compiled(x), jactri.jacobian(net, x)):
                wrong.append(seed)

    in_threads(4, work)
    assert not wrong


def test_nothing_of_a_call_is_kept():
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    compiled = compile(net, x)
    J = compiled(x)
    alive = [weakref.ref(x), weakref.ref(J)]
    del x, J
    gc.collect()
    assert all(ref() is None for ref in alive)
