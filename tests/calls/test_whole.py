"""Functions computed as a whole by autograd: by rows or by columns, in chunks sized by what a first one took."""

import gc
import math

import pytest
import torch
from common import F64, unfollowed
from test_memory import live_peak
from tolerances import assert_close
from torch.autograd.functional import jacobian as truth_of

import jactri
from jactri._src.base.memory import MemoryLimitTooSmall, Taken
from jactri._src.calls import whole

W = torch.linspace(0, 1, 50, dtype=F64)


def transfer(p):
    return torch.view_as_real(unfollowed(p[0] / (1 + 1j * W * p[1]) ** 2))


def of_samples(x):
    """(N, 2) to (N, 9)."""
    return (unfollowed(torch.exp(1j * x[:, :1] * W[:9])) * x[:, 1:]).imag


def spectrum(x):
    return unfollowed(torch.fft.rfft(x.exp())).abs()


def p2():
    return torch.tensor([0.7, 1.3], dtype=F64)


def x52():
    return torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ran(monkeypatch):
    """How many rows or columns each product had."""
    found = []

    class Counted(whole.Vmapped):
        def __call__(self, block):
            found.append(("columns" if "columns" in self.name else "rows", block.shape[0]))
            return super().__call__(block)

    monkeypatch.setattr(whole, "Vmapped", Counted)
    return found


def blocks(J):
    return J.diagonal(0, 0, 2).movedim(-1, 0)


BY = {
    "few inputs": (transfer, p2, {}, "columns", 2),
    "asked for": (spectrum, lambda: x52()[:, 0], {"strategy": "forward-mode"}, "columns", 5),
    "rows asked for": (transfer, p2, {"strategy": "reverse-mode"}, "rows", 100),
    "as many outputs": (spectrum, lambda: x52()[:, 0], {}, "rows", 3),
    "per_sample": (of_samples, x52, {"per_sample": True}, "columns", 2),
    "per_sample, rows": (of_samples, x52, {"per_sample": True, "strategy": "reverse-mode"}, "rows", 9),
    "assumed": (of_samples, x52, {"per_sample": "assume"}, "rows", 9),
    "assumed, forward": (
        of_samples, x52, {"per_sample": "assume", "strategy": "forward-mode"}, "columns", 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY)
def test_columns_where_they_are_fewer_or_asked_for(name, ran):
    func, make, options, kind, count = BY[name]
    want = truth_of(func, make())
    want = blocks(want) if "per_sample" in options else want
    assert_close(jactri.jacobian(func, make(), **options), want, F64, length=60)
    assert {k for k, _ in ran} == {kind} and sum(n for _, n in ran) == count
    report = jactri.explain(func, make(), **options)
    assert f"{count} {kind}, " in report.note and f"up to {count} at once" in report.note
    assert math.isnan(report.flops) and "flop not predicted" in str(report)
    assert report.peak_bytes > report.answer_bytes == want.nbytes
    shape = want.shape
    out = torch.empty(*shape[:-1], shape[-1] + 1, dtype=F64)[..., 1:]
    assert jactri.jacobian(func, make(), out=out, **options) is out
    assert_close(out, want, F64, length=60)


def test_several_outputs_and_inputs(ran):
    def func(a, b, c):
        z = unfollowed(torch.exp(1j * a * W))
        return (z * b.sum()).real, b * 2, (z.abs() * 0 + a).reshape(5, 10), torch.ones(3, dtype=F64)

    given = tuple(torch.tensor(v, dtype=F64) for v in (0.3, [1.0, 2.0], [4.0]))
    want = truth_of(func, given)
    for strategy in ("auto", "forward-mode", "reverse-mode"):
        got = jactri.jacobian(func, given, strategy=strategy)
        for ours, theirs in zip(got, want, strict=True):
            for o, t in zip(ours, theirs, strict=True):
                assert_close(o, t, F64, length=50)
    assert {k for k, _ in ran[:3]} == {"columns"}


def test_forward_mode_has_the_dtype_of_the_output():
    x = torch.tensor([0.5, 2.0])
    got = jactri.jacobian(
        lambda x: unfollowed(torch.exp(1j * x.double() * W[:, None])).real,
        x,
        strategy="forward-mode",
    )
    assert got.dtype == F64
    rows = jactri.jacobian(lambda x: unfollowed(torch.exp(1j * x.double())).real, x)
    assert rows.dtype == torch.float32


@pytest.mark.parametrize("strategy", ["auto", "forward-mode"])
def test_complex_inputs(strategy, ran):
    z = torch.tensor([0.3 + 0.5j, -0.2 + 1j], dtype=torch.complex128)

    def func(z):
        return (torch.exp(z[0] * W) * z[1].conj() + z[0].abs()).imag

    assert_close(jactri.jacobian(func, z, strategy=strategy), truth_of(func, z), torch.float64)
    assert {k for k, _ in ran} == {"columns"} and sum(
        n for _, n in ran
    ) == 4  # real and imaginary parts


@pytest.mark.parametrize("per_sample", [False, True])
def test_columns_can_be_differentiated(per_sample):
    func, x = (of_samples, x52()) if per_sample else (transfer, p2())

    def loss(jacobian, x, **options):
        J = jacobian(func, x, create_graph=True, **options)
        return ((J if per_sample or x.dim() == 1 else blocks(J)).sin() * torch.arange(1, 3)).sum()

    x.requires_grad_()
    want = (
        blocks(truth_of(func, x, create_graph=True)) if per_sample else truth_of(func, x, True)
    ).sin()
    (want,) = torch.autograd.grad((want * torch.arange(1, 3)).sum(), x)
    for strategy in ("auto", "forward-mode"):
        got = loss(jactri.jacobian, x, per_sample=per_sample, strategy=strategy)
        assert_close(torch.autograd.grad(got, x)[0], want, F64, length=100)


class Half(torch.autograd.Function):
    """A part of its backward is not recorded."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.5

    @staticmethod
    def backward(ctx, g):
        return g + 0.5 * g.detach()


def detached(p):
    return torch.view_as_real(unfollowed(Half.apply(p)[0] * torch.exp(1j * W * p[1])))


def infinite(p):
    """Zeros meet what is infinite: rows have it as autograd has."""
    return torch.view_as_real(unfollowed(torch.stack([p[0].sqrt() * W, p[1] * W]) + 0j))


@pytest.mark.parametrize("func", [detached, infinite])
def test_columns_that_rows_contradict_are_not_used(func, monkeypatch, caplog):
    p = torch.tensor([0.0 if func is infinite else 0.4, 0.6], dtype=F64)
    # what is known of Functions beforehand left aside
    monkeypatch.setattr(whole, "why_not", lambda ys: None)
    for strategy in ("auto", "forward-mode"):
        with caplog.at_level("INFO", logger="jactri"), jactri.fallback("allow"):
            got = jactri.jacobian(func, p, strategy=strategy)
        assert_close(got, truth_of(func, p), F64, length=60)
        assert "the function has no columns" in caplog.text
        caplog.clear()


def test_a_fault_of_a_backward_is_raised():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            raise ValueError("broken backward")

    with pytest.raises(ValueError, match="broken backward"):
        jactri.jacobian(lambda p: detached(Broken.apply(p)), p2(), strategy="forward-mode")


# ---- memory


def wide(p):
    w = torch.linspace(0, 1, 4000, dtype=F64)
    z = unfollowed(1 / (1 + 1j * w * p[:, None] + p[:, None] ** 2))
    return torch.fft.irfft(z).sum(0)


def images(x):
    z = unfollowed(torch.fft.rfft2(x.repeat(8, 1, 1) ** 2) * 1j)
    return torch.fft.irfft2(z, s=x.shape).sum(0)


def hooked(x):
    h = torch.tanh(x @ torch.linspace(-1, 1, 12 * 20000, dtype=F64).view(12, -1))
    if h.requires_grad:
        h.register_hook(lambda g: 0.5 * g)
    return h.view(len(x), 40, -1).sum(-1)


LIMITED = {
    "columns": (wide, lambda: torch.linspace(1, 2, 5, dtype=F64), {}, 4.0),
    "rows": (images, lambda: torch.randn(24, 24, dtype=F64), {}, 1.0),
    "rows of samples": (
        hooked, lambda: torch.randn(2, 12, dtype=F64), {"per_sample": True, "strategy": "reverse-mode"}, 4.0,
    ),
    "columns of samples": (hooked, lambda: torch.randn(2, 12, dtype=F64), {"per_sample": True}, 3.0),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:a hook on gradients")
@pytest.mark.parametrize("name", LIMITED)
def test_limits_are_kept(name, ran):
    func, make, options, beside = LIMITED[name]
    x = make()
    answer = jactri.explain(func, x, **options).answer_bytes
    limit = int(answer + beside * 2**20)
    J = jactri.jacobian(func, x, **options)
    ran.clear()
    y = func(leaf := x.clone().requires_grad_())
    peak = live_peak(lambda: jactri.jacobian_of(y, leaf, memory_limit=limit, **options))
    assert peak <= 1.2 * limit
    assert {k for k, _ in ran} == {name.split()[0]}
    assert len(ran) > 2 and max(n for _, n in ran) > 1
    plan = jactri.explain(func, x, memory_limit=limit, **options)
    assert plan.peak_bytes <= limit and plan.chunks <= len(ran)
    assert_close(jactri.jacobian(func, x, memory_limit=limit, **options), J, F64, length=1000)


def test_rows_where_what_columns_record_does_not_fit(ran):
    x = torch.linspace(1, 2, 5, dtype=F64)

    def func(x):
        return wide(x)[:20]

    least = jactri.explain(func, x, chunk_size=1, strategy="reverse-mode").peak_bytes
    assert jactri.explain(func, x, chunk_size=1).peak_bytes > 1.1 * least
    ran.clear()
    J = jactri.jacobian(func, x, memory_limit=int(1.05 * least))
    assert ran[-1][0] == "rows" and "columns" in dict(ran)
    assert_close(J, truth_of(func, x), F64, length=8000)


@pytest.mark.parametrize("strategy", ["auto", "reverse-mode"])
def test_a_refusal_names_a_limit_that_works(strategy):
    x = torch.linspace(1, 2, 20, dtype=F64)

    def func(x):
        return wide(x)[:60]

    with pytest.raises(
        MemoryLimitTooSmall, match=r"one seed at a time takes .* of it for the answer"
    ) as refused:
        jactri.jacobian(func, x, memory_limit=200_000, strategy=strategy)
    least = refused.value.need
    jactri.jacobian(func, x, memory_limit=least, strategy=strategy)
    with pytest.raises(MemoryLimitTooSmall):
        jactri.explain(func, x, memory_limit=int(0.99 * least), strategy=strategy)


def test_what_ops_take_is_counted():
    a = torch.ones(1000, dtype=F64, requires_grad=True)
    b = (a * 2).exp()
    with Taken() as taken:
        c = a.detach() + 1
        view = c[:10].view(2, 5)
        assert taken.now == taken.peak == 8000
        c.add_(1)  # in place
        b.detach().t() if b.dim() == 2 else b.detach()[:3]  # there before
        assert taken.now == 8000
        del c
        assert taken.now == 8000  # the view holds it
        del view
        assert taken.now == 0
        (g,) = torch.autograd.grad(b.sum(), a)
        gc.collect()
        assert taken.now == 8000 and 16000 <= taken.peak <= 32000
        many = torch.vmap(lambda t: t * a.detach())(torch.ones(3, 1000, dtype=F64))
        assert many.nbytes + g.nbytes <= taken.now <= many.nbytes + g.nbytes + 24000
    assert torch.equal(g, 2 * b)


def test_without_a_limit_chunks_stay_small(monkeypatch, ran):
    """They gain nothing from more memory than caches have."""
    monkeypatch.setattr(whole, "CACHE_BYTES", 1 << 18)
    x = torch.randn(24, 24, dtype=F64)
    peak = live_peak(lambda: jactri.jacobian(images, x))
    assert peak <= 1.2 * ((1 << 20) + x.numel() ** 2 * 8)
    assert max(n for _, n in ran) > 3
