"""jactri inside torch.func, and modules inside autocast, DDP, DataParallel and torch.compile."""

import pytest
import torch
import torch.autograd.forward_ad as fwd
from common import F64, MODES, make, x3, x23
from tolerances import assert_close, assert_same_tree
from torch import nn

import jactri


def test_inside_vmap():
    xs = torch.stack([x3(), x3() + 1])
    ours = torch.func.vmap(lambda x: jactri.jacobian(lambda y: y**3, x))(xs)
    assert_close(ours, torch.diag_embed(3 * xs**2), F64)


def test_inside_grad():
    def penalty(x):
        return jactri.jacobian(lambda y: y.sin() * y, x).square().sum()

    def truth(x):
        return torch.func.jacrev(lambda y: y.sin() * y)(x).square().sum()

    assert_close(torch.func.grad(penalty)(x3()), torch.func.grad(truth)(x3()), F64, length=9)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_inside_jacrev_and_jacfwd(transform):
    ours = transform(lambda x: jactri.jacobian(lambda y: (y**3).sum(), x))(x3())
    theirs = transform(lambda x: torch.func.grad(lambda y: (y**3).sum())(x))(x3())
    assert_close(ours, theirs, F64, length=27)


def test_inside_vmap_with_options_and_structure():
    xs = torch.stack([x3(), x3() + 1])

    def func(x):
        return x.sin(), (x * x[0]).sum()

    for mode in MODES:
        ours = torch.func.vmap(lambda x, m=mode: jactri.jacobian(func, (x,), strategy=m))(xs)
        for n, x in enumerate(xs):
            truth = torch.autograd.functional.jacobian(func, (x,))
            assert_same_tree(tuple(tuple(j[n] for j in row) for row in ours), truth, F64, length=9)


def test_inside_vmap_per_sample():
    xs = torch.stack([x23(), x23() + 1])
    ours = torch.func.vmap(lambda x: jactri.jacobian(lambda y: y**3, x, per_sample=True))(xs)
    assert_close(ours, torch.diag_embed(3 * xs**2), F64)


def test_forward_ad_is_not_silently_dropped():
    """Under a dual level the tangent of the Jacobian cannot be carried: an error, or right."""
    with fwd.dual_level():
        dual = fwd.make_dual(x3(), torch.ones(3, dtype=F64))
        try:
            j = jactri.jacobian(lambda y: y**3, dual)
        except RuntimeError:
            return
        tangent = fwd.unpack_dual(j).tangent
        if tangent is not None:
            assert_close(tangent, torch.diag(6 * x3()), F64)
        assert_close(fwd.unpack_dual(j).primal, torch.diag(3 * x3() ** 2), F64)


def test_autocast_bfloat16():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    x = x23().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = torch.autograd.functional.jacobian(net, x)
        for mode in MODES:
            ours = jactri.jacobian(net, x, strategy=mode)
            assert ours.dtype == (torch.bfloat16 if mode == "forward-mode" else torch.float32)
            assert_close(ours, theirs.double(), torch.bfloat16, length=8)
        assert torch.is_autocast_enabled("cpu")
    exact = torch.autograd.functional.jacobian(net.double(), x.double())
    assert_close(theirs, exact, torch.bfloat16, length=8)


def test_autocast_inside_func():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def func(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x).float()

    x = x23().float()
    theirs = torch.autograd.functional.jacobian(func, x)
    for options in ({}, {"strategy": "forward-mode"}):
        assert_close(jactri.jacobian(func, x, **options), theirs.double(), torch.bfloat16, length=8)
    ours = jactri.jacobian(func, x, per_sample=True)
    truth = theirs.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    assert_close(ours, truth.double(), torch.bfloat16, length=8)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_distributed_data_parallel():
    """One process over gloo."""
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("this build of torch has no distributed package")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = make(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        wrapped = nn.parallel.DistributedDataParallel(net)
        truth = torch.autograd.functional.jacobian(net, x23())
        for options in ({}, {"strategy": "forward-mode"}, {"strategy": "reverse-mode"}):
            ours = jactri.jacobian(wrapped, x23(), **options)
            assert_close(ours, truth, F64, length=32)
        j = jactri.jacobian(wrapped, x23(), per_sample=True)
        assert_close(j, truth.diagonal(dim1=0, dim2=2).movedim(-1, 0), F64, length=32)
        assert all(p.grad is None for p in net.parameters())
    finally:
        dist.destroy_process_group()


def test_data_parallel_without_devices():
    net = make(lambda: nn.Linear(3, 2))
    wrapped = nn.DataParallel(net)
    truth = torch.autograd.functional.jacobian(net, x23())
    assert_close(jactri.jacobian(wrapped, x23()), truth, F64, length=32)


def test_a_compiled_module_is_read_through_its_original():
    net = make(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    compiled = []

    def backend(graph_module, example_inputs):
        compiled.append(graph_module)
        return graph_module.forward

    wrapped = torch.compile(net, backend=backend)
    truth = torch.autograd.functional.jacobian(net, x23())
    with jactri.fallback("error"):
        for mode in MODES:
            assert_close(jactri.jacobian(wrapped, x23(), strategy=mode), truth, F64, length=32)
        j = jactri.jacobian(wrapped, x23(), per_sample=True)
    assert_close(j, truth.diagonal(dim1=0, dim2=2).movedim(-1, 0), F64, length=32)
    assert not compiled
    assert wrapped._orig_mod is net


def test_a_compiled_function_is_read_through_its_original():
    compiled = []

    def backend(graph_module, example_inputs):
        compiled.append(graph_module)
        return graph_module.forward

    def func(x):
        return torch.tanh(x) * x

    wrapped = torch.compile(func, backend=backend)
    truth = torch.autograd.functional.jacobian(func, x23())
    assert_close(jactri.jacobian(wrapped, x23()), truth, F64)
    assert not compiled


def test_dispatch_modes_may_watch():
    """A flop counter sees every op, also those on the numbers that autograd wrapped."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(3, dtype=torch.float64)

    def func(x):
        return 2.0 / (x.tanh() / 2.0 * 3 + 5)

    with FlopCounterMode(display=False):
        ours = jactri.jacobian(func, x)
    torch.testing.assert_close(ours, torch.autograd.functional.jacobian(func, x))
