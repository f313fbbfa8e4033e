"""jactri.jacobian beside torch.autograd.functional.jacobian, call by call: the drop-in promise."""

import functools

import pytest
import torch
from common import in_threads
from tolerances import assert_same_tree
from torch import nn
from torch.autograd.functional import jacobian as torch_jacobian

import jactri

F64 = torch.float64


def x3(dtype=F64, **options):
    return torch.tensor([0.5, -1.5, 2.0], dtype=dtype, **options)


def x23():
    return torch.arange(6, dtype=F64).reshape(2, 3).div(5).sub(0.4)


def structure(j):
    """Nesting, shapes, dtypes, devices, and whether gradients flow."""
    if isinstance(j, tuple):
        return tuple(structure(e) for e in j)
    return tuple(j.shape), j.dtype, j.device, j.requires_grad


def leaf_of(j):
    return leaf_of(j[0]) if isinstance(j, tuple) else j


def both(func, inputs, **options):
    """Both answers; inputs is a callable that makes fresh ones."""
    theirs = torch_jacobian(func, inputs(), **options)
    ours = jactri.jacobian(func, inputs(), **options)
    return ours, theirs


SITUATIONS = {
    "tensor to tensor": (torch.sin, x3),
    "matrix to vector": (lambda x: x.sin().sum(1), x23),
    "scalar to scalar": (torch.sin, lambda: torch.tensor(0.3, dtype=F64)),
    "scalar to vector": (lambda x: x * x3(), lambda: torch.tensor(0.3, dtype=F64)),
    "vector to scalar": (lambda x: x.prod(), x3),
    "1-tuple in": (torch.sin, lambda: (x3(),)),
    "1-tuple out": (lambda x: (x.sin(),), x3),
    "1-tuple in and out": (lambda x: (x.sin(),), lambda: (x3(),)),
    "two in": (lambda x, y: x * y.sum(), lambda: (x3(), x23())),
    "two out": (lambda x: (x.sin(), x.sum()), x3),
    "two in, two out": (lambda x, y: (x * y[0], y.sum(0)), lambda: (x3(), x23())),
    "the same tensor twice": (lambda x, y: x * y, lambda: (lambda x: (x, x))(x3())),
    "named tuple out": (lambda x: x.max(1), x23),
    "identity": (lambda x: x, x3),
    "identity of one of two": (lambda x, y: x, lambda: (x3(), x23())),
    "independent input": (lambda x, y: x.sin(), lambda: (x3(), x23())),
    "constant output": (lambda x: torch.ones(2, dtype=F64), x3),
    "float32 constant output": (lambda x: torch.ones(2), x3),
    "one constant output": (lambda x: (x.sin(), torch.ones(2, dtype=F64)), x3),
    "integer output": (lambda x: x.long(), x3),
    "integer output beside another": (lambda x: (x.argmax(), x.exp()), x3),
    "boolean output": (lambda x: x > 0, x3),
    "detached": (lambda x: x.detach() * 2, x3),
    "partly detached": (lambda x: x.detach() * x, x3),
    "func under no_grad": (torch.no_grad()(torch.sin), x3),
    "float32": (torch.sin, functools.partial(x3, torch.float32)),
    "bfloat16": (lambda x: x * 2, functools.partial(x3, torch.bfloat16)),
    "float16": (lambda x: x * 2, functools.partial(x3, torch.float16)),
    "float32 to float64": (lambda x: x.double().sin(), functools.partial(x3, torch.float32)),
    "float64 to float32": (lambda x: x.float() * 2, x3),
    "two dtypes in": (lambda x, y: x.double() * y, lambda: (x3(torch.float32), x3())),
    "two dtypes out": (lambda x: (x.float(), x.double()), x3),
    "view of a larger tensor": (torch.sin, lambda: x23()[:, 1]),
    "transposed": (lambda x: x @ x.T, lambda: x23().T),
    "expanded": (torch.sin, lambda: x3()[:1].expand(3)),
    "strided with offset": (lambda x: x.sin().cumsum(0), lambda: x23().flatten()[1::2]),
    "parameter": (torch.sin, lambda: nn.Parameter(x3())),
    "requires grad": (torch.sin, lambda: x3().requires_grad_()),
    "non-leaf": (torch.sin, lambda: x3().requires_grad_() * 2),
    "non-leaf view": (torch.sin, lambda: (x23().requires_grad_() * 2)[0]),
    "output is a view of the input": (lambda x: x.view(3, 2), x23),
    "output is a slice of the input": (lambda x: x[1:], x3),
    "input and its view": (lambda x: (x, x[0]), x23),
    "same output twice": (lambda x: (lambda y: (y, y))(x.sin()), x3),
    "in place on an intermediate": (lambda x: x.clone().mul_(x).add_(1), x3),
    "in place on a view": (lambda x: (lambda y: (y[0].mul_(3), y)[1])(x * 2), x23),
    "empty slice in the middle": (lambda x: torch.cat([x[:0], x.sin()]), x3),
    "relu at zero": (torch.relu, lambda: torch.tensor([0.0, -0.0, 1.0, -1.0], dtype=F64)),
    "maximum at a tie": (lambda x: torch.maximum(x, x.detach()), x3),
    "large network": (nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5)).double(), x23),
}  # fmt: skip
# torch's stack refuses an empty list; jactri answers with an empty Jacobian.
EMPTY = {
    "empty input": (torch.sin, lambda: torch.ones(0, 3, dtype=F64), (0, 3, 0, 3)),
    "empty output": (lambda x: x[:0], x3, (0, 3)),
    "empty features": (lambda x: x.sum(1), lambda: torch.ones(2, 0, dtype=F64), (2, 2, 0)),
}


@pytest.mark.parametrize("options", [{}, {"vectorize": True}, {"create_graph": True}], ids=str)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_same_answer(situation, options):
    ours, theirs = both(*SITUATIONS[situation], **options)
    assert structure(ours) == structure(theirs)
    narrow = torch.float32 if "float32" in situation else leaf_of(theirs).dtype
    assert_same_tree(ours, theirs, narrow)


# What torch's forward mode cannot do, or does otherwise than its reverse mode, which jactri follows.
NO_TORCH_FORWARD = {
    "func under no_grad",  # forward mode differentiates through no_grad
    "expanded",  # its tangents would overlap
}


def as_tuples(j):
    """torch's forward mode nests lists where its reverse mode nests tuples."""
    return tuple(map(as_tuples, j)) if isinstance(j, (tuple, list)) else j.detach()


@pytest.mark.parametrize("situation", [s for s in SITUATIONS if s not in NO_TORCH_FORWARD])
def test_same_answer_forward(situation):
    """Torch's forward mode needs vectorize=True, and gives the dtype of the output."""
    ours, theirs = both(*SITUATIONS[situation], strategy="forward-mode", vectorize=True)
    theirs = as_tuples(theirs)
    assert structure(ours) == structure(theirs)
    narrow = torch.float32 if "float32" in situation else leaf_of(theirs).dtype
    if not narrow.is_floating_point:
        narrow = F64
    assert_same_tree(ours, theirs, narrow)
    func, inputs = SITUATIONS[situation]
    assert_same_tree(jactri.jacobian(func, inputs(), strategy="forward-mode"), theirs, narrow)


def test_an_empty_input_beside_another():
    ours, theirs = both(lambda x, y: x.sum() + y, lambda: (x3()[:0], x3()))
    assert structure(ours) == structure(theirs)
    assert_same_tree(ours, theirs, F64)


@pytest.mark.parametrize("strategy", ["auto", "forward-mode", "reverse-mode"])
@pytest.mark.parametrize("situation", EMPTY)
def test_empty_tensors_give_empty_jacobians(situation, strategy):
    func, inputs, shape = EMPTY[situation]
    assert jactri.jacobian(func, inputs(), strategy=strategy).shape == shape


# Calls that torch refuses: the exception's type is the same, and no answer comes.
REFUSED = {
    "list of inputs": (lambda x, y: x, lambda: [x3(), x3()], {}),
    "dict of inputs": (lambda x: x, lambda: {"x": x3()}, {}),
    "None as input": (lambda x: x, lambda: None, {}),
    "number as input": (lambda x: x, lambda: 1.5, {}),
    "array as input": (lambda x: x, lambda: x3().numpy(), {}),
    "None in a tuple": (lambda x, y: x, lambda: (x3(), None), {}),
    "nested tuple of inputs": (lambda x: x, lambda: ((x3(),),), {}),
    "list out": (lambda x: [x, x], x3, {}),
    "dict out": (lambda x: {"y": x}, x3, {}),
    "None out": (lambda x: None, x3, {}),
    "number out": (lambda x: 1.5, x3, {}),
    "None in a tuple out": (lambda x: (x, None), x3, {}),
    "nested tuple out": (lambda x: (x, (x,)), x3, {}),
    "integer input": (lambda x: x.double(), lambda: torch.arange(3), {}),
    "boolean input": (lambda x: x.double(), lambda: torch.ones(3, dtype=torch.bool), {}),
    "integer beside a float": (lambda x, y: x * y, lambda: (x3(), torch.arange(3)), {}),
    "complex input": (lambda x: x**2, lambda: x3().to(torch.complex128), {}),
    "complex output": (lambda x: x * 1j, x3, {}),
    "empty tuple in": (lambda *x: x3(), lambda: (), {}),
    "empty tuple out": (lambda x: (), x3, {}),
    "bad strategy": (torch.sin, x3, {"strategy": "sideways"}),
    "no strategy": (torch.sin, x3, {"strategy": None}),
    "strict, detached": (lambda x: x.detach(), x3, {"strict": True}),
    "strict, integer output": (lambda x: x.long(), x3, {"strict": True}),
    "strict, constant output": (lambda x: torch.ones(2), x3, {"strict": True}),
    "strict, one constant output": (lambda x: (x, torch.ones(2)), x3, {"strict": True}),
    "strict, independent input": (lambda x, y: x.sin(), lambda: (x3(), x3()), {"strict": True}),
    "strict, output of another input": (lambda x, y: (x, y), lambda: (x3(), x3()),
                                        {"strict": True}),
    "strict, constant Jacobian": (lambda x: 2 * x, x3, {"strict": True, "create_graph": True}),
    "strict, one constant Jacobian": (lambda x, y: x**2 + y, lambda: (x3(), x3()),
                                      {"strict": True, "create_graph": True}),
    "func is not callable": (3, x3, {}),
    "func takes another number": (lambda x, y: x, x3, {}),
    "func raises": (lambda x: x.reshape(7), x3, {}),
    "in place on the input": (lambda x: x.mul_(2), x3, {}),
    "in place on the input, differentiable": (lambda x: x.mul_(2), lambda: x3().requires_grad_(),
                                              {"create_graph": True}),
}  # fmt: skip


@pytest.mark.parametrize("situation", REFUSED)
def test_same_refusal(situation):
    func, inputs, options = REFUSED[situation]
    with pytest.raises(Exception) as theirs:
        torch_jacobian(func, inputs(), **options)
    with pytest.raises(theirs.type) as ours:
        jactri.jacobian(func, inputs(), **options)
    assert type(ours.value) is theirs.type or isinstance(ours.value, theirs.type)
    assert torch.is_grad_enabled()


ACCEPTED_STRICT = {
    "plain": (torch.sin, x3, {}),
    "linear without create_graph": (lambda x: 2 * x, x3, {}),
    "all pairs depend": (lambda x, y: (x * y, x + y), lambda: (x3(), x3()), {}),
    "create_graph": (torch.sin, x3, {"create_graph": True}),
}


@pytest.mark.parametrize("situation", ACCEPTED_STRICT)
def test_strict_lets_through(situation):
    func, inputs, options = ACCEPTED_STRICT[situation]
    ours, theirs = both(func, inputs, strict=True, **options)
    assert structure(ours) == structure(theirs)
    assert_same_tree(ours, theirs, F64)


@pytest.mark.parametrize("options", [{"strategy": "forward-mode"}, {"vectorize": True}], ids=str)
def test_strict_where_torch_cannot(options):
    """Torch refuses the pair of options; jactri answers, and is as strict as in reverse."""
    with pytest.raises(RuntimeError):
        torch_jacobian(torch.sin, x3(), strict=True, **options)
    ours = jactri.jacobian(torch.sin, x3(), strict=True, **options)
    assert_same_tree(ours, torch_jacobian(torch.sin, x3()), F64)
    for func, inputs in [(lambda x, y: x.sin(), (x3(), x3())), (lambda x: x.detach(), x3())]:
        with pytest.raises(RuntimeError, match="strict"):
            jactri.jacobian(func, inputs, strict=True, **options)


@pytest.mark.parametrize("strategy", ["auto", "forward-mode", "reverse-mode"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_inf_propagate(value, strategy):
    """Non-finite derivatives stand where autograd has them, but for entries of no dependence at all.

    There autograd has 0 * NaN or a zero as its sweep happens to meet them; a structural zero stays zero.
    """
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    finite, weight = torch.tensor([[1.0, 3.0, 2.0], [1.0, value, 2.0]], dtype=F64)
    x = x23()
    x[1, 2] = value
    for family in (
        lambda w: net,
        lambda w: lambda x: x * w,
        lambda w: lambda x: x**3,
        lambda w: lambda x: (x * w).sum(1),
    ):
        depends = torch_jacobian(family(finite), x23() + 0.1) != 0
        theirs = torch_jacobian(family(weight), x)
        ours = jactri.jacobian(family(weight), x, strategy=strategy)
        assert_same_tree(ours[depends], theirs[depends], F64)
        rest = ours[~depends]
        assert (rest.eq(0) | rest.isnan()).all()


@pytest.mark.parametrize("strategy", ["auto", "forward-mode", "reverse-mode"])
def test_func_is_called_exactly_once(strategy):
    calls = []

    def func(x):
        calls.append(x)
        return x.sin(), x.sum()

    jactri.jacobian(func, x3(), strategy=strategy)
    assert len(calls) == 1
    jactri.jacobian(func, x23(), strategy=strategy, per_sample=False, chunk_size=1)
    assert len(calls) == 2


def test_func_sees_leaves_that_share_storage_and_require_grad():
    seen = []
    x = x23()

    def func(a):
        seen.append((a.data_ptr(), a.requires_grad, a.is_leaf, a is x, torch.is_grad_enabled()))
        return a.sin()

    with torch.no_grad():
        jactri.jacobian(func, x)
    assert seen == [(x.data_ptr(), True, True, False, True)]
    assert not x.requires_grad


def test_create_graph_keeps_the_way_back_to_the_inputs():
    for strategy in ("reverse-mode", "forward-mode", "auto"):
        x = x3().requires_grad_()
        j = jactri.jacobian(lambda x: x**3, x, create_graph=True, strategy=strategy)
        (g,) = torch.autograd.grad(j.sum(), x)
        assert_same_tree(g, 6 * x.detach(), F64)


def test_create_graph_under_no_grad():
    x = x3().requires_grad_()
    with torch.no_grad():
        theirs = torch_jacobian(lambda x: x**3, x, create_graph=True)
        ours = jactri.jacobian(lambda x: x**3, x, create_graph=True)
    assert ours.requires_grad
    assert theirs.requires_grad
    (g,) = torch.autograd.grad(ours.sum(), x)
    assert_same_tree(g, 6 * x.detach(), F64)


def test_forward_with_create_graph_answers_where_torch_cannot():
    with pytest.raises(NotImplementedError):
        torch_jacobian(torch.sin, x3(), create_graph=True, strategy="forward-mode", vectorize=True)
    x = x3().requires_grad_()
    j = jactri.jacobian(torch.sin, x, create_graph=True, strategy="forward-mode")
    (g,) = torch.autograd.grad(j.sum(), x)
    assert_same_tree(g, -x.detach().sin(), F64)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
def test_grad_mode_is_kept(grad):
    with grad():
        before = torch.is_grad_enabled()
        ours = jactri.jacobian(torch.sin, x3())
        assert torch.is_grad_enabled() == before
    assert_same_tree(ours, x3().cos().diag(), F64)


def test_grad_mode_is_kept_when_func_raises():
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            jactri.jacobian(lambda x: 1 / 0, x3())
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("make", [x3, lambda: x3().clone()], ids=["outside", "inside"])
@pytest.mark.parametrize(
    "options", [{}, {"strategy": "forward-mode"}, {"per_sample": True}], ids=str
)
def test_inference_mode_is_right_or_an_error_and_never_zeros(make, options):
    outside = x3()
    with torch.inference_mode():
        x = make() if make is not x3 else outside
        try:
            j = jactri.jacobian(lambda x: x**2, x, **options)
        except RuntimeError as error:
            assert "inference" in str(error)  # noqa: PT017 (either outcome is right)
            return
        finally:
            assert torch.is_inference_mode_enabled()
    expected = 2 * x3()
    assert_same_tree(j.clone(), expected if "per_sample" in options else expected.diag(), F64)


KINKS = {
    "relu": (torch.relu, (0.0,), (0.0,)),
    "leaky_relu": (lambda x: nn.functional.leaky_relu(x, 0.3), (0.0,), (0.3,)),
    "prelu": (lambda x: nn.functional.prelu(x, torch.tensor([0.3], dtype=F64)), (0.0,), (0.3,)),
    "elu": (lambda x: nn.functional.elu(x, 1.0), (0.0,), (1.0,)),
    "celu": (lambda x: nn.functional.celu(x, 2.0), (0.0,), (1.0,)),
    "hardtanh": (nn.functional.hardtanh, (-1.0, 1.0), (0.0, 0.0)),
    "relu6": (nn.functional.relu6, (0.0, 6.0), (0.0, 0.0)),
    "hardswish": (nn.functional.hardswish, (-3.0, 3.0), (0.0, 1.0)),
    "clamp": (lambda x: x.clamp(-1, 1), (-1.0, 1.0), (0.0, 0.0)),
    "relu of NaN": (torch.relu, (torch.nan,), (1.0,)),
    "abs": (torch.abs, (0.0,), (0.0,)),
}


@pytest.mark.parametrize("strategy", ["auto", "forward-mode", "reverse-mode"])
@pytest.mark.parametrize("name", KINKS)
def test_kinks(name, strategy):
    func, at, slopes = KINKS[name]
    for value, slope in zip(at, slopes, strict=True):
        x = torch.tensor([[value]], dtype=F64)
        truth = torch.tensor(slope, dtype=F64).reshape(1, 1, 1, 1)
        if name not in ("hardswish", "clamp"):  # whose ends differ from version to version
            assert_same_tree(torch_jacobian(func, x), truth, F64)
        else:
            truth = torch_jacobian(func, x)
        assert_same_tree(jactri.jacobian(func, x, strategy=strategy), truth, F64)


def test_max_pool_tie_goes_to_the_first():
    x = torch.zeros(1, 1, 4, dtype=F64)
    j = jactri.jacobian(lambda x: nn.functional.max_pool1d(x, 2), x)
    assert j.reshape(2, 4).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


def test_strategy_auto_is_the_default_and_gives_the_inputs_dtype():
    for func in (lambda x: x.double().sum(), lambda x: x.double().expand(9, 3)):
        j = jactri.jacobian(func, x3(torch.float32))
        assert j.dtype == torch_jacobian(func, x3(torch.float32)).dtype == torch.float32


def test_positional_arguments_stand_where_torchs_do():
    ours = jactri.jacobian(torch.sin, x3(), True, False, True, "reverse-mode")
    theirs = torch_jacobian(torch.sin, x3(), True, False, True, "reverse-mode")
    assert structure(ours) == structure(theirs)
    with pytest.raises(TypeError):
        jactri.jacobian(torch.sin, x3(), False, False, False, "auto", True)


@pytest.mark.parametrize("strategy", ["auto", "forward-mode", "reverse-mode"])
def test_the_answer_is_the_callers_own_memory(strategy):
    """Writing to a Jacobian spoils neither the network nor another block of the answer."""
    linear = nn.Linear(3, 3, bias=False).double()
    weight = linear.weight.detach().clone()
    x = x23()
    for func in (linear, lambda x: x, lambda x: (x, x), lambda x: x.T, lambda x: x.expand(2, 2, 3),
                 lambda x: x * 2, lambda x: x @ weight, lambda x: (linear(x), linear(x))):  # fmt: skip
        theirs = torch_jacobian(func, x)
        ours = jactri.jacobian(func, x, strategy=strategy)
        for j in ours if isinstance(ours, tuple) else (ours,):
            j.fill_(7.0)
            assert torch.equal(j, torch.full_like(j, 7.0))
        assert torch.equal(linear.weight, weight)
        assert_same_tree(x, x23(), F64, what="input")
        assert_same_tree(jactri.jacobian(func, x, strategy=strategy), theirs, F64)
        first = jactri.jacobian(func, x, strategy=strategy)
        if isinstance(first, tuple):
            first[0].fill_(7.0)
            assert_same_tree(first[1], theirs[1], F64)


def test_two_calls_do_not_share_memory():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    first = jactri.jacobian(net, x23())
    kept = first.clone()
    jactri.jacobian(net, x23() + 1)
    jactri.jacobian(net, x23() + 1, per_sample=True)
    assert torch.equal(first, kept)


def test_return_output():
    output, j = jactri.jacobian(lambda x: (x.sin(), x.sum()), x3(), return_output=True)
    assert_same_tree(output, (x3().sin(), x3().sum()), F64)
    assert_same_tree(j, torch_jacobian(lambda x: (x.sin(), x.sum()), x3()), F64)
    assert not output[0].requires_grad
    output, _ = jactri.jacobian(torch.sin, (x3(),), return_output=True)
    assert isinstance(output, torch.Tensor)
    x = x3().requires_grad_()
    output, j = jactri.jacobian(torch.sin, x, return_output=True, create_graph=True)
    assert output.requires_grad
    assert_same_tree(torch.autograd.grad(output.sum(), x)[0], x3().cos(), F64)
    calls = []
    jactri.jacobian(lambda x: (calls.append(1), x.sin())[1], x3(), return_output=True)
    assert len(calls) == 1


def test_many_threads_at_once():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    points = [x23() + k for k in range(6)]
    results = [None] * len(points)

    def work(k):
        results[k] = jactri.jacobian(net, points[k])

    in_threads(len(points), work)
    for x, j in zip(points, results, strict=True):
        assert_same_tree(j, torch_jacobian(net, x), F64)


def test_a_failing_func_passes_its_own_error_on():
    class OwnError(ValueError):
        pass

    def func(x):
        raise OwnError("mine")

    with pytest.raises(OwnError, match="mine"):
        jactri.jacobian(func, x3())


def test_meta_tensors_give_shapes():
    ours, theirs = both(lambda x: x * 2, lambda: torch.ones(3, device="meta"))
    assert structure(ours) == structure(theirs)


def test_saved_tensor_hooks_of_the_caller_are_respected():
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ours = jactri.jacobian(lambda x: x.sin() * x, x3())
    assert packed
    assert_same_tree(ours, torch_jacobian(lambda x: x.sin() * x, x3()), F64)


def test_default_dtype_does_not_leak_in():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        assert jactri.jacobian(torch.sin, x3()).dtype == F64
        torch.set_default_dtype(F64)
        assert jactri.jacobian(torch.sin, x3(torch.float32)).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
