"""What goes through nodes that are called instead of understood: right in any case, and no more of it than it takes."""

import subprocess
import sys
import threading

import pytest
import torch
from common import F64
from tolerances import assert_close
from torch.autograd.function import once_differentiable

import jactri
from jactri._src.base.constants import arbitrary
from jactri._src.read import opaque, vmapped


def elementwise(name, backward):
    """``x**3`` with a backward of ``(g, x)``."""

    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    def pull(ctx, g):
        return backward(g, *ctx.saved_tensors)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(pull)}
    return type(name, (torch.autograd.Function,), methods).apply


def by_numpy(g, x):
    return torch.as_tensor(3 * g.detach().numpy() * x.detach().numpy() ** 2)


def but_one(g, x):
    """Autograd does not see that the gradient of one sample depends on its cotangent."""
    return torch.cat([g[:7], g[7:8].detach(), g[8:]]) * 3 * x**2


def loudly(g, x):
    assert not g.requires_grad, "no second derivative"
    return 3 * g * x**2


RECORDED = {
    "recorded": lambda g, x: 3 * g * x**2,
    "input detached": lambda g, x: 3 * g * x.detach() ** 2,
    "in place": lambda g, x: g.mul_(3 * x**2),
}
UNRECORDED = {
    "numpy": by_numpy,
    "cotangent detached": lambda g, x: 3 * g.detach() * x**2,
    "that of one sample detached": but_one,
    "refused": loudly,
    "once_differentiable": once_differentiable(lambda g, x: 3 * g * x**2),
}


class Scan(torch.autograd.Function):
    """Samples mix."""

    @staticmethod
    def forward(ctx, x):
        return x.cumsum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g.flip(0).cumsum(0).flip(0)


@pytest.fixture
def pulled(monkeypatch):
    """How many cotangents every pull had."""
    sizes, pull = [], opaque.OpaqueCall.pull

    def counted(self, nr, c):
        sizes.append(len(c))
        return pull(self, nr, c)

    monkeypatch.setattr(opaque.OpaqueCall, "pull", counted)
    return sizes


def weights(*sizes, dtype=F64):
    numbers = torch.linspace(-1, 1, sizes[0] * sizes[1], dtype=F64).sin()
    return numbers.reshape(sizes).to(dtype)


def field(own, dtype=F64):
    a, b = weights(3, 9, dtype=dtype), weights(9, 3, dtype=dtype)
    return lambda x: own(x @ a) @ b


def points(n=40, dtype=F64):
    return torch.randn(n, 3, dtype=F64, generator=torch.Generator().manual_seed(0)).to(dtype)


def cubed(x):
    return x**3


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("kind", [*RECORDED, *UNRECORDED])
def test_a_jvp_takes_one_cotangent_or_a_block_a_sample(kind, dtype, pulled):
    own = elementwise("Own", {**RECORDED, **UNRECORDED}[kind])
    x = points(dtype=dtype)
    for count in (1, 4):
        t = torch.stack([(k + 1.0) * x.cos() + k for k in range(count)])
        f = field(cubed)
        want = torch.stack([torch.func.jvp(f, (x.double(),), (v.double(),))[1] for v in t])
        pulled.clear()
        found = jactri.jvp(field(own, dtype), x, t)[1]
        torch.testing.assert_close(
            found.double(), want, rtol=1e-4 if dtype != F64 else 1e-11, atol=1e-5
        )
        assert sum(pulled) <= (1 if kind in RECORDED else 1 + 9 + 10)


@pytest.mark.parametrize("kind", UNRECORDED)
def test_a_jvp_that_can_be_differentiated(kind, pulled):
    x = points(12).requires_grad_()
    v = torch.ones_like(x).requires_grad_()
    made = jactri.jvp(field(elementwise("Own", UNRECORDED[kind])), x, v, create_graph=True)[1]
    want = torch.autograd.functional.jvp(field(cubed), x, v, create_graph=True)[1]
    torch.testing.assert_close(made, want)
    c = made.detach().cos()
    # in the tangents it is linear, and that is known
    for a, b in zip(
        *(torch.autograd.grad(y, v, c, retain_graph=True) for y in (made, want)), strict=True
    ):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match=r"has no second derivative|once_differentiable"):
        torch.autograd.grad(made, x, c)


def test_a_backward_that_is_not_linear_in_its_cotangent():
    """Its derivative at one cotangent and its value there may agree: they are those of different ones."""
    guided = elementwise("Guided", lambda g, x: torch.relu(g) * 3 * x**2)
    x, t = points(), points().cos()
    want = torch.func.jvp(field(cubed), (x,), (t,))[1]
    torch.testing.assert_close(jactri.jvp(field(guided), x, t)[1], want)


def test_a_function_without_slope_takes_no_rows(pulled):
    own = elementwise("Steps", lambda g, x: torch.zeros_like(x))
    assert not jactri.jvp(field(own), points(), points())[1].any()
    assert pulled == [1]


def test_where_samples_mix_rows_come_some_at_a_time(pulled, monkeypatch):
    monkeypatch.setattr(opaque, "ROWS_BYTES", 7 * 360 * 8)
    x, t = points(), torch.stack([points().cos(), points()])
    found = jactri.jvp(field(Scan.apply), x, t)[1]
    torch.testing.assert_close(found, torch.stack([field(lambda v: v.cumsum(0))(v) for v in t]))
    assert max(pulled) == 7
    assert 360 <= sum(pulled) <= 360 + 1 + 7


def test_a_function_of_numbers_alone():
    own = elementwise("Own", by_numpy)
    for shape in ((), (1,), (50,), (1, 40), (2, 3, 20)):
        x = torch.rand(shape, dtype=F64)
        torch.testing.assert_close(jactri.jvp(own, x, x.cos())[1], 3 * x**2 * x.cos())
        J = jactri.jacobian(own, x, strategy="forward-mode").reshape(x.numel(), -1)
        torch.testing.assert_close(J, torch.diag(3 * x.flatten() ** 2))


def test_infinities_are_not_taken_for_agreement():
    own = elementwise("Own", but_one)
    x = points()
    x[3, 1] = torch.inf
    found = jactri.jvp(field(own), x, torch.ones_like(x))[1]
    want = torch.autograd.functional.jvp(field(cubed), x, torch.ones_like(x))[1]
    assert (found.isnan() | torch.isclose(found, want)).all()


# -- what needs the diagonal only ---------------------------------------------------------------------

MOST = 3 + 9 + 2
"""Rows of a sample, masks that tell 40 samples apart, and what it takes to see that blocks are right."""


@pytest.mark.parametrize("kind", [*RECORDED, *UNRECORDED])
def test_samples_that_do_not_mix_take_the_rows_of_one(kind, pulled):
    f = field(elementwise("Own", {**RECORDED, **UNRECORDED}[kind]))
    x = points()
    rows = torch.func.vmap(torch.func.jacrev(field(cubed)))(x).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(jactri.diagonal(f, x), rows)
    assert sum(pulled) <= MOST
    for claim in (True, "assume"):
        pulled.clear()
        torch.testing.assert_close(jactri.divergence(f, x, per_sample=claim), rows.sum(1))
        assert sum(pulled) <= MOST


def test_samples_that_mix():
    x, f = points(), field(Scan.apply)
    want = torch.autograd.functional.jacobian(field(lambda v: v.cumsum(0)), x)
    rows = want.reshape(120, 120).diagonal().reshape(40, 3)
    torch.testing.assert_close(jactri.diagonal(f, x), rows)
    torch.testing.assert_close(jactri.divergence(f, x, per_sample="assume"), rows.sum(1))
    with pytest.raises(RuntimeError, match="samples mix: the op ScanBackward"):
        jactri.divergence(f, x)


class Beside(torch.autograd.Function):
    """Samples mix by an amount that is zero here, and not beside."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x + (x - x.roll(1, 0)) ** 2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        slope = 2 * g * (x - x.roll(1, 0))
        return g + slope - slope.roll(-1, 0)


def test_samples_that_mix_beside_the_point():
    x = torch.ones(40, 3, dtype=F64, requires_grad=True)
    made = jactri.diagonal(Beside.apply, x, create_graph=True)
    (found,) = torch.autograd.grad(made[:, 0] @ torch.arange(40.0, dtype=F64), x)
    want = torch.zeros(40, 3, dtype=F64)
    want[:, 0] = 2 * (torch.arange(40.0) - torch.arange(40.0).roll(-1))
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(made, torch.ones_like(x))
    with pytest.raises(RuntimeError, match="samples mix"):
        jactri.divergence(Beside.apply, x, create_graph=True)


# -- nothing is said of loops -------------------------------------------------------------------------

QUIET = """
import torch, jactri
@torch.library.custom_op("jactri_test::times", mutates_args=())
def times(x: torch.Tensor, k: float) -> torch.Tensor:
    return x * k
times.register_autograd(
    lambda ctx, g: (times(g, ctx.k), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "k", inputs[1]),
)
x = torch.rand(4, 3, dtype=torch.float64)
J = jactri.jacobian(lambda v: times(v.sin(), 2.0), x)
assert torch.allclose(J.reshape(12, 12), torch.diag(2 * x.cos().flatten()))
"""


def test_a_custom_op_without_a_batching_rule_leaves_nothing_on_stderr():
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_last_thread_to_leave_lets_torch_speak_again(monkeypatch):
    said = []
    monkeypatch.setattr(vmapped, "_set_vmap_fallback_warning_enabled", said.append)
    inside, leave = threading.Event(), threading.Event()

    def other():
        with vmapped.looping():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with vmapped.looping():
        thread.start()
        assert inside.wait(10)
    assert said == [False, False]
    leave.set()
    thread.join()
    assert said == [False, False, True]
    with pytest.raises(ZeroDivisionError), vmapped.looping():
        raise ZeroDivisionError
    assert said[-1] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_entry_that_a_backward_loses_shows(dtype):
    """Also among many: the pull that confirms a push weighs none lightly, and half precision is coarse."""
    n = 400 if dtype == torch.float32 else 100
    x = torch.linspace(0.5, 1, n).to(dtype)
    for at in (54, 88, 232):
        lost = elementwise(
            "Lost",
            lambda g, x, k=at: torch.cat([g[:k], g[k : k + 1].detach(), g[k + 1 :]]) * 3 * x**2,
        )
        _, got = jactri.jvp(lost, x, torch.ones_like(x))
        assert_close(got, (3 * x.double() ** 2).to(dtype), dtype, length=4)


def test_figures_are_those_of_every_sample():
    seen = []

    def look(x):
        seen.append(vmapped.figures([x.sum(), x.max()]))
        return x

    x = torch.arange(12.0, dtype=F64).reshape(2, 3, 2)
    torch.vmap(look, in_dims=1)(x.sum(0))
    torch.vmap(torch.vmap(look), in_dims=1)(x)
    torch.func.grad(lambda x: look(x).sum())(x)
    for rows, pairs in zip(seen, (x.sum(0).T, x.reshape(6, 2), x.reshape(1, -1)), strict=True):
        assert sorted(rows) == sorted([float(p.sum()), float(p.max())] for p in pairs)


@pytest.mark.parametrize("wrong", [False, True])
def test_rows_that_cancel_are_no_contradiction(wrong, caplog):
    """Of what is left, nothing but rounding, no digit agrees: it is their size that tells."""
    a = weights(7, 5, dtype=torch.float32)
    rows = torch.stack([w * torch.ones(7) for w in torch.tensor([1, 1, -2]) / arbitrary((3,), a)])
    inside = torch._C._functorch.is_batchedtensor

    def product(row):
        return (row @ a * (1 + wrong * inside(row) * row[0]),)

    with caplog.at_level("INFO", logger="jactri"):
        (made,) = vmapped.Vmapped(product, "rows")(rows)
    torch.testing.assert_close(made, torch.stack([product(row)[0] for row in rows]))
    assert ("another result" in caplog.text) is wrong
