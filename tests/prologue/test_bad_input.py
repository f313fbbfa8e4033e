"""Every wrong call ends in the right exception, naming the argument, with the caller's things untouched."""

import pytest
import torch
from tolerances import assert_close, assert_same_tree
from torch import nn

import jactri

F64 = torch.float64


def x3():
    return torch.tensor([0.5, -1.5, 2.0], dtype=F64)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 30)).double()


# name: call, exception, what the message must say
WRONG = {
    "list of inputs": (lambda: jactri.jacobian(torch.sin, [x3()]), TypeError, "inputs.*list"),
    "None": (lambda: jactri.jacobian(torch.sin, None), TypeError, "inputs.*NoneType"),
    "string in a tuple": (lambda: jactri.jacobian(torch.sin, (x3(), "x")), TypeError, "inputs.*1.*str"),
    "output is a list": (lambda: jactri.jacobian(lambda x: [x], x3()), TypeError, "outputs.*list"),
    "output is a number": (lambda: jactri.jacobian(lambda x: 2.0, x3()), TypeError, "outputs.*float"),
    "output is None": (lambda: jactri.jacobian(lambda x: None, x3()), TypeError, "outputs.*NoneType"),
    "None among outputs": (lambda: jactri.jacobian(lambda x: (x, None), x3()), TypeError,
                           "outputs.*1.*NoneType"),
    "a model's own output class": (lambda: jactri.jacobian(lambda x: {"logits": x}, x3()), TypeError,
                                   "outputs.*dict"),
    "integer input": (lambda: jactri.jacobian(lambda x: x * 1.0, torch.arange(3)), RuntimeError,
                      "float"),
    "boolean input": (lambda: jactri.jacobian(lambda x: x * 1.0, torch.ones(3) > 0), RuntimeError,
                      "float"),
    "empty inputs": (lambda: jactri.jacobian(lambda: x3(), ()), IndexError, "inputs"),
    "empty outputs": (lambda: jactri.jacobian(lambda x: (), x3()), IndexError, "output"),
    "strict, detached": (lambda: jactri.jacobian(torch.Tensor.detach, x3(), strict=True),
                         RuntimeError, "(?i)output 0.*strict"),
    "strict, second output detached": (lambda: jactri.jacobian(lambda x: (x, x.detach()), x3(),
                                       strict=True), RuntimeError, "(?i)output 1.*strict"),
    "strict, independent": (lambda: jactri.jacobian(lambda x, y: x * 2, (x3(), x3()), strict=True),
                            RuntimeError, "(?i)input 1.*strict"),
    "strict, constant Jacobian": (lambda: jactri.jacobian(lambda x: x * 2, x3(), create_graph=True,
                                  strict=True), RuntimeError, "(?i)jacobian.*strict"),
    "strategy": (lambda: jactri.jacobian(torch.sin, x3(), strategy="fwd"), AssertionError,
                 "(?s)forward-mode.*reverse-mode"),
    "strategy None": (lambda: jactri.jacobian(torch.sin, x3(), strategy=None), AssertionError,
                      "strategy"),
    "chunk_size 0": (lambda: jactri.jacobian(torch.sin, x3(), chunk_size=0), ValueError, "chunk_size.*0"),
    "chunk_size negative": (lambda: jactri.jacobian(torch.sin, x3(), chunk_size=-2), ValueError,
                            "chunk_size.*-2"),
    "chunk_size a fraction": (lambda: jactri.jacobian(torch.sin, x3(), chunk_size=1.5),
                              (ValueError, TypeError), "chunk_size.*1.5"),
    "chunk_size a string": (lambda: jactri.jacobian(torch.sin, x3(), chunk_size="2"),
                            (ValueError, TypeError), "chunk_size"),
    "memory_limit smaller than a row": (lambda: jactri.jacobian(net(), x3(), memory_limit=8),
                                        ValueError, "memory_limit"),
    "memory_limit 0": (lambda: jactri.jacobian(net(), x3(), memory_limit=0), ValueError, "memory_limit"),
    "memory_limit negative": (lambda: jactri.jacobian(net(), x3(), memory_limit=-1), ValueError,
                              "memory_limit"),
    "memory_limit unreadable": (lambda: jactri.jacobian(net(), x3(), memory_limit="much"), ValueError,
                                "memory_limit.*much"),
    "memory_limit of a wrong type": (lambda: jactri.jacobian(net(), x3(), memory_limit=[1]),
                                     (ValueError, TypeError), "memory_limit"),
    "backend": (lambda: jactri.jacobian(torch.sin, x3(), backend="cuda-graphs"), ValueError,
                "backend.*cuda-graphs"),
    "out of a wrong shape": (lambda: jactri.jacobian(torch.sin, x3(), out=torch.empty(3, 4, dtype=F64)),
                             RuntimeError, r"out.*\(3, 3\)"),
    "out of a wrong dtype": (lambda: jactri.jacobian(torch.sin, x3(), out=torch.empty(3, 3)),
                             RuntimeError, "out.*float64"),
    "out of a wrong device": (lambda: jactri.jacobian(torch.sin, x3(), out=torch.empty(3, 3, dtype=F64,
                              device="meta")), RuntimeError, "out.*cpu"),
    "out of a wrong nesting": (lambda: jactri.jacobian(torch.sin, x3(), out=(torch.empty(3, 3, dtype=F64),)),
                               (RuntimeError, TypeError), "out"),
    "out too short": (lambda: jactri.jacobian(lambda x, y: x * y, (x3(), x3()),
                      out=(torch.empty(3, 3, dtype=F64),)), RuntimeError, "out"),
    "out holds None": (lambda: jactri.jacobian(lambda x, y: x * y, (x3(), x3()),
                       out=(torch.empty(3, 3, dtype=F64), None)), (RuntimeError, TypeError), "out"),
    "out requires grad": (lambda: jactri.jacobian(torch.sin, x3(), out=torch.empty(3, 3, dtype=F64,
                          requires_grad=True)), RuntimeError, "out"),
    "out with create_graph": (lambda: jactri.jacobian(torch.sin, x3(), create_graph=True,
                              out=torch.empty(3, 3, dtype=F64)), RuntimeError, "out.*create_graph"),
    "per_sample without a batch": (lambda: jactri.jacobian(torch.sum, x3(), per_sample=True), ValueError,
                                   "output"),
    "per_sample of a scalar": (lambda: jactri.jacobian(torch.sin, torch.tensor(1.0), per_sample=True),
                               ValueError, "inputs"),
    "per_sample of mixing samples": (lambda: jactri.jacobian(lambda x: x - x.mean(0), torch.ones(3, 2),
                                     per_sample=True), RuntimeError, "per_sample"),
    "not callable": (lambda: jactri.jacobian(3, x3()), TypeError, "callable"),
    "unknown option": (lambda: jactri.jacobian(torch.sin, x3(), batched=True), TypeError, "batched"),
    "in place on the input": (lambda: jactri.jacobian(lambda x: x.mul_(2), x3()), RuntimeError, "in-place"),
    "jacobian_of a detached input": (lambda: jactri.jacobian_of(x3() * 2, x3()), RuntimeError,
                                     "inputs.*require"),
    "jacobian_of a list": (lambda: jactri.jacobian_of([x3()], x3()), TypeError, "outputs.*list"),
    "jacobian_of inputs in a list": (lambda: jactri.jacobian_of(x3(), [x3()]), TypeError, "inputs.*list"),
    "jacobian_of nothing": (lambda: jactri.jacobian_of((), x3().requires_grad_()), IndexError, "outputs"),
    "jacobian_of for nothing": (lambda: jactri.jacobian_of(x3(), ()), IndexError, "inputs"),
    "fallback's mode": (lambda: jactri.fallback("maybe").__enter__(), ValueError, "maybe"),
    "explain of a list": (lambda: jactri.explain(torch.sin, [x3()]), TypeError, "inputs.*list"),
    "check of a list": (lambda: jactri.check(torch.sin, [x3()]), TypeError, "inputs.*list"),
    "check of an integer": (lambda: jactri.check(torch.sin, torch.arange(3)), RuntimeError, "float"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name):
    call, exception, message = WRONG[name]
    before = torch.get_rng_state()
    with torch.no_grad():
        with pytest.raises(exception, match=message):
            call()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    if name.startswith("memory_limit"):
        return  # building the network draws random numbers
    assert torch.equal(before, torch.get_rng_state())


def test_an_exception_inside_func_is_the_callers_own():
    class Own(Exception):
        pass

    def func(x):
        raise Own

    for call in (jactri.jacobian, jactri.check, jactri.explain):
        with pytest.raises(Own):
            call(func, x3())


def test_a_freed_graph_is_autograds_own_error():
    x = x3().requires_grad_()
    y = torch.tanh(x * x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match=r"(?i)backward through the graph a second time|freed"):
        jactri.jacobian_of(y, x)


def test_a_saved_tensor_written_to_is_autograds_own_error():
    def func(x):
        y = x.exp()  # saves its result
        z = y * 2
        y.mul_(3.0)
        return z * y

    x = x3()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.functional.jacobian(func, x)
    for strategy in ("auto", "forward-mode", "reverse-mode"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            jactri.jacobian(func, x, strategy=strategy)


@pytest.mark.parametrize("strategy", ["auto", "forward-mode", "reverse-mode"])
def test_an_op_without_a_derivative_is_autograds_own_error(strategy):
    def func(x):
        return torch.floor_divide(x, 0.7) * x

    with pytest.raises(RuntimeError, match="floor_divide is not implemented"):
        torch.autograd.functional.jacobian(func, x3())
    with pytest.raises(RuntimeError, match="floor_divide is not implemented"):
        jactri.jacobian(func, x3(), strategy=strategy)


@pytest.mark.parametrize("call", [jactri.jacobian, jactri.diagonal, jactri.jjt])
def test_sparse_inputs_are_refused(call):
    """Autograd leaves out derivatives in what they do not store: those in what they do are right."""
    x = x3().diag().to_sparse().coalesce()
    with pytest.raises(
        RuntimeError, match=r"inputs\[0\] is of layout .*lambda v: func\(torch.sparse"
    ):
        call(lambda x: x.to_dense() * 2, x)
    rows = torch.nested.nested_tensor([x3()[None], x3()[None]], layout=torch.jagged)
    with pytest.raises(RuntimeError, match=r"inputs\[0\] is nested.*_from_jagged\(v"):
        jactri.jacobian(lambda x: x.to_padded_tensor(0.0).sin(), rows)
    J = jactri.jacobian(
        lambda v: torch.sparse_coo_tensor(
            x.indices(), v, x.shape, check_invariants=True
        ).to_dense(),
        x.values(),
    )
    assert_close(J, torch.eye(3, dtype=F64).diag_embed(), F64)


@pytest.mark.parametrize("strategy", ["auto", "forward-mode", "reverse-mode"])
def test_nothing_of_the_callers_is_touched(strategy):
    model = net()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    model.train()
    x = x3().requires_grad_()
    x.grad = torch.full_like(x, 5.0)
    grads = [p.grad.clone() for p in model.parameters()]
    versions = [p._version for p in (*model.parameters(), x)]
    hooks = []
    x.register_hook(hooks.append)
    rng = torch.get_rng_state()
    for options in ({}, {"per_sample": True}, {"create_graph": True}):
        jactri.jacobian(
            model, x[None] if "per_sample" in options else x, strategy=strategy, **options
        )
    assert torch.equal(rng, torch.get_rng_state())
    assert not hooks, "hooks of the caller's tensor ran, though nothing was propagated to it"
    assert model.training
    assert torch.equal(x.grad, torch.full_like(x, 5.0))
    for p, g in zip(model.parameters(), grads, strict=True):
        assert p.requires_grad
        assert torch.equal(p.grad, g)
    assert versions == [p._version for p in (*model.parameters(), x)]


def test_nothing_is_touched_after_a_failure():
    model = net()
    x = x3().requires_grad_()

    def func(x):
        model(x)
        raise KeyError("late")

    with torch.no_grad(), pytest.raises(KeyError):
        jactri.jacobian(func, x)
    with pytest.raises(ValueError, match="memory_limit"):
        jactri.jacobian(model, x, memory_limit=8)
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert_same_tree(
        jactri.jacobian(model, x), torch.autograd.functional.jacobian(model, x), F64, length=64
    )


def test_an_enormous_answer_is_refused_before_it_is_allocated():
    """10^6 x 10^6 float64 would be 8 TB: the message speaks of memory, and comes at once."""
    x = torch.ones(1_000_000, dtype=F64)
    with pytest.raises((ValueError, RuntimeError, MemoryError), match=r"(?i)memory|allocate|bytes"):
        jactri.jacobian(torch.sin, x)
