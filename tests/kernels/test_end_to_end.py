"""jactri.jacobian(..., backend="triton") against float64, and that kernels really ran."""

import copy
import logging
import warnings
from itertools import pairwise

import pytest
import torch
from precision import distance
from torch import nn
from torch.nn import functional as F

import jactri
from jactri._src.base import backends
from jactri._src.device import chooser
from jactri._src.run import launch
from jactri.kernels import chain as chains
from jactri.kernels import elementwise, linear, rows
from jactri.kernels.support import Unfit

MODES = ["forward-mode", "reverse-mode"]
ACTIVATIONS = [
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.Tanh, nn.Softplus, nn.Hardtanh, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Softsign, nn.LogSigmoid,
    lambda: nn.ELU(inplace=True), lambda: nn.LeakyReLU(0.2, inplace=True), lambda: nn.ReLU(inplace=True),
    lambda: nn.CELU(0.7, inplace=True), nn.PReLU, nn.Tanhshrink, nn.Hardshrink, nn.Identity,
    lambda: nn.Threshold(0.1, 2),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    chooser.forget()
    monkeypatch.setattr(backends, "_warned", False)
    yield
    chooser.forget()


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that ran, in order."""
    names = []
    for module, name in (
        (linear, "step"), (chains, "chain"), (chains, "pair"), (rows, "rows"), (elementwise, "scaled_sum")
    ):  # fmt: skip
        plain = getattr(module, name)

        def spy(*args, _plain=plain, _name=name, **options):
            names.append(_name)
            return _plain(*args, **options)

        monkeypatch.setattr(module, name, spy)
    return names


def mlp(widths, act=nn.Tanh, last=None, bias=True):
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), act()]
    return nn.Sequential(*layers[:-1], *([last] if last else []))


def truth(f, x, **options):
    f = copy.deepcopy(f).double() if isinstance(f, nn.Module) else f
    options.pop("out", None)
    return jactri.jacobian(f, x.double(), backend="torch", **options)


def check(f, x, most=2e-6, **options):
    got = jactri.jacobian(f, x, backend="triton", **options)
    want = truth(f, x, **{k: v for k, v in options.items() if k in ("per_sample", "strategy")})
    assert got.shape == want.shape and got.dtype == x.dtype
    assert distance(got, want) <= most
    return got


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act, mode, device, launched):
    f = mlp((5, 40, 33, 4), act).to(device)
    check(f, torch.randn(6, 5, device=device), per_sample=True, strategy=mode)
    # matrices with nothing between are one on a CPU, which no kernel takes
    folded = act is nn.Identity and torch.device(device).type == "cpu"
    assert bool(launched) != folded


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "widths, forward, reverse",
    [
        ((7, 33, 5), ["step"], ["step"]),
        ((32, 256, 256, 32), ["pair"], ["pair"]),
        ((3, 17, 64, 100, 2), ["chain"], ["chain"]),
        ((12, 200, 30, 150), ["step", "step"], ["pair"]),
        ((9, 200, 200, 200, 3), ["step", "pair"], ["step", "pair"]),
        ((2, 1, 1, 2), ["chain"], ["chain"]),
    ],
)
def test_widths_and_depths(widths, forward, reverse, bias, mode, device, launched):
    f = mlp(widths, nn.SiLU, nn.Sigmoid(), bias).to(device)
    check(f, torch.randn(3, widths[0], device=device), per_sample=True, strategy=mode)
    assert launched == (forward if mode == "forward-mode" else reverse)


@pytest.mark.parametrize(
    "options", [{}, {"per_sample": True}, {"chunk_size": 3}, {"memory_limit": 40_000}]
)
@pytest.mark.parametrize("mode", MODES)
def test_shapes_of_the_answer(mode, options, device, launched):
    """The drop-in shape, per sample, and in chunks."""
    check(
        mlp((10, 40, 24, 8)).to(device), torch.randn(5, 10, device=device), strategy=mode, **options
    )
    assert launched


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(6,), (1, 6), (0, 6), (2, 3, 6), (2, 1, 3, 6)])
def test_shapes_of_the_input(shape, mode, device):
    f = mlp((6, 40, 24, 4), nn.GELU).to(device)
    check(f, torch.randn(shape, device=device), strategy=mode)
    if len(shape) > 1:
        check(f, torch.randn(shape, device=device), strategy=mode, per_sample=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("order", [None, (0, 2, 1), (2, 1, 0)])
def test_the_last_step_writes_into_out(order, chunk, mode, device, monkeypatch):
    """No block is copied: the kernel writes the caller's tensor, in its own memory order."""
    copies = []
    monkeypatch.setattr("jactri._src.run.executor.scatter", lambda *a, **k: copies.append(a))
    f, x = mlp((10, 40, 24, 8)).to(device), torch.randn(5, 10, device=device)
    shape = (5, 8, 10)
    out = torch.full(shape, float("nan"), device=device)
    if order is not None:
        out = torch.full([shape[a] for a in order], float("nan"), device=device)
        out = out.permute([order.index(a) for a in range(3)])
    got = check(f, x, per_sample=True, strategy=mode, out=out, chunk_size=chunk)
    assert got is out and not copies


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype, most", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half(dtype, most, mode, device, launched):
    f = mlp((10, 40, 24, 8)).to(device, dtype)
    check(f, torch.randn(5, 10, device=device, dtype=dtype), most, per_sample=True, strategy=mode)
    assert launched


def test_float64_goes_to_torch(device, launched):
    x = torch.randn(5, 10, dtype=torch.float64, device=device)
    check(mlp((10, 40, 24, 8)).to(device).double(), x, 1e-14, per_sample=True)
    assert not launched


@pytest.mark.parametrize("name", ["tf32", "ieee"])
def test_precision_follows_torch(name, device):
    """tf32 only where torch allows it."""
    f, x = mlp((64, 128, 128, 64)).to(device), torch.randn(4, 64, device=device)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = name
    try:
        got = jactri.jacobian(f, x, per_sample=True, backend="triton")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    off = distance(got, truth(f, x, per_sample=True))
    assert 1e-4 < off < 4e-3 if name == "tf32" else off < 5e-7


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 40), nn.Linear(40, 6)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.g, self.out = nn.Linear(6, 20), nn.Linear(6, 20), nn.Linear(20, 4)

    def forward(self, x):
        return self.out(self.a(x) * torch.sigmoid(self.g(x)))


class Two(nn.Module):
    """The hidden layer is an output too: nothing may be fused across it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 20), nn.Linear(20, 5)

    def forward(self, x):
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return torch.cat([h, self.b(torch.sin(self.a(x))), h.exp()], -1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "f, wanted",
    [
        (Residual(), "chain"),
        (nn.Sequential(Residual(), Residual()), "rows"),
        (Gated(), "scaled_sum"),
        (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 9), nn.Softmax(-1)), "rows"),
        (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 9), nn.LogSoftmax(-1)), "rows"),
        (nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 3)), "rows"),
        (nn.Sequential(nn.Linear(6, 9), nn.RMSNorm(9), nn.Tanh(), nn.Linear(9, 3)), ""),
        (Two(), ""),
        (nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.0), nn.Linear(9, 4), nn.Softmax(0)), ""),
    ],
)  # fmt: skip
def test_networks(f, wanted, mode, device, launched):
    f = f.to(device)
    for x in (torch.randn(5, 6, device=device), torch.randn(2, 3, 6, device=device)):
        check(f, x, strategy=mode)
    if wanted and not (mode == "reverse-mode" and wanted == "scaled_sum"):
        assert {wanted, "step", "pair", "chain"} & set(launched)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape", [(), (1,), (9,), (1, 9), (3, 1), (3, 9), (1, 1, 9), (2, 1, 1), (2, 3, 9), (2, 1, 9)]
)
def test_scalings_that_broadcast(shape, mode, device, launched):
    """A constant factor of any shape that broadcasts, between two layers and after a softmax."""
    a, b, c = nn.Linear(6, 9).to(device), nn.Linear(9, 9).to(device), nn.Linear(9, 3).to(device)
    factor = torch.rand(shape, device=device) + 0.5

    def f(x):
        dtype = x.dtype
        h = torch.tanh(F.linear(x, a.weight.to(dtype), a.bias.to(dtype)))
        h = torch.tanh(F.linear(h, b.weight.to(dtype)) * factor.to(dtype))
        h = torch.softmax(h * factor.to(dtype), -1) * factor.to(dtype)
        return F.linear(h, c.weight.to(dtype))

    check(f, torch.randn(2, 3, 6, device=device), strategy=mode)
    assert launched


def test_several_outputs(device):
    a, b = nn.Linear(6, 20).to(device), nn.Linear(20, 5).to(device)

    def f(x):
        h = torch.tanh(b(torch.tanh(a(x))))
        return h, torch.sin(h) * h

    x = torch.randn(3, 6, device=device)
    got = jactri.jacobian(f, x, backend="triton")
    want = jactri.jacobian(f, x, backend="torch")
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


def test_inputs_and_weights_are_left_alone(device):
    f, x = mlp((10, 40, 24, 8)).to(device), torch.randn(5, 10, device=device)
    kept = [p.detach().clone() for p in (x, *f.parameters())]
    jactri.jacobian(f, x, per_sample=True, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, *f.parameters()), strict=True))


def test_explain_names_kernels_and_reasons(device):
    f, x = (
        mlp((32, 256, 256, 32), nn.Tanh, nn.Softmax(-1)).to(device),
        torch.randn(5, 32, device=device),
    )
    text = str(jactri.explain(f, x, per_sample=True, backend="triton"))
    assert "pair (bf16x6, tile 128x64x32, 8 warps): 1 launch" in text
    assert "triton (rows: 1 launch)" in text and "in the step below" in text
    assert "triton" not in str(jactri.explain(f, x, per_sample=True, backend="torch"))


# -- the chooser ------------------------------------------------------------------------------------


def kind(widths, rows=16, dtype=torch.float32):
    names = ("",) * len(widths)
    return chooser.ChainKind.of(4, rows, widths, names, False, dtype, torch.device("cpu"))


@pytest.mark.parametrize(
    "widths, name",
    [
        ((64, 64, 8), "chain (bf16x6, tile 128, 8 warps)"),
        ((256, 256, 32), "pair (bf16x6, tile 128x64x32, 8 warps)"),
        ((256, 256, 784), "2 steps (bf16x6, tile 128x128x32, 8 warps)"),
        ((256, 256, 256, 32), "step + pair (bf16x6, tile 128x64x32, 8 warps)"),
        ((20, 30), "step (bf16x6, tile 128x128x32, 8 warps)"),
    ],
)
def test_predicted_ways(widths, name):
    assert str(chooser._predicted(kind(widths)).way) == name


def refusing(monkeypatch, *names):
    for module, name in ((linear, "step"), (chains, "chain"), (chains, "pair")):
        if name in names:

            def refuse(*args, _name=name, **options):
                raise Unfit(f"{_name} is out of shared memory")

            monkeypatch.setattr(module, name, refuse)


def test_a_kernel_that_does_not_fit_gives_way(device, monkeypatch, launched):
    """To the next configuration, then to the next kernels; with one warning, and never an exception."""
    refusing(monkeypatch, "chain")
    f, x = mlp((10, 40, 24, 8)).to(device), torch.randn(5, 10, device=device)
    with pytest.warns(
        RuntimeWarning, match="chain .* does not run here .*out of shared memory"
    ) as caught:
        check(f, x, per_sample=True)
    told = [w for w in caught if "does not run here" in str(w.message)]
    assert len(told) == 1 and launched == ["pair"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(f, x, per_sample=True)  # remembered
    assert launched == ["pair"] * 2


def test_where_no_kernel_fits_torch_computes(device, monkeypatch, caplog):
    refusing(monkeypatch, "chain", "pair", "step")
    f, x = mlp((10, 40, 24, 8)).to(device), torch.randn(5, 10, device=device)
    with pytest.warns(RuntimeWarning), caplog.at_level(logging.INFO, "jactri"):
        check(f, x, per_sample=True)
    assert "the kernel 2 steps (tf32x3" in caplog.text
    found = jactri.explain(f, x, per_sample=True, backend="triton")
    assert "none of the kernels runs here" in str(found)


@pytest.mark.parametrize("module, name", [(rows, "rows"), (elementwise, "scaled_sum")])
def test_other_kernels_that_do_not_fit(module, name, device, monkeypatch):
    def refuse(*args, **options):
        raise Unfit("no registers left")

    monkeypatch.setattr(module, name, refuse)
    f = nn.Sequential(Gated(), nn.Tanh(), nn.Softmax(-1)).to(device)
    with pytest.warns(RuntimeWarning, match="no registers left"):
        check(f, torch.randn(5, 6, device=device), per_sample=True, strategy="forward-mode")


@pytest.mark.parametrize("best", ["chain", "pair", "2 steps", "torch"])
def test_the_fastest_way_wins(best, timed, device):
    timed[best] = 1.0
    f, x = mlp((10, 40, 24, 8)).to(device), torch.randn(5, 10, device=device)
    check(f, x, per_sample=True)
    (choice,) = chooser._choices.values()
    assert str(choice.way).split(" (")[0] == best
    assert "1 ms measured" in choice.why and len(choice.tried) > 3
    assert f"{best}" in str(jactri.explain(f, x, per_sample=True, backend="triton"))


def test_a_wrong_result_cannot_win(timed, device, monkeypatch):
    timed["chain"] = 1.0
    plain = chains.chain
    monkeypatch.setattr(chains, "chain", lambda *a, **k: plain(*a, **k).mul_(1.0001))
    f, x = mlp((10, 40, 24, 8)).to(device), torch.randn(5, 10, device=device)
    check(f, x, per_sample=True)
    (choice,) = chooser._choices.values()
    assert str(choice.way).split(" (")[0] != "chain"
    assert any(isinstance(v, str) and "off by" in v for v in choice.tried.values())


def test_data_that_is_not_finite_decides_nothing(timed, device):
    f, x = mlp((10, 40, 24, 8)).to(device), torch.randn(5, 10, device=device)
    x[0, 0] = float("nan")
    got = jactri.jacobian(f, x, per_sample=True, backend="triton")
    assert got[0].isnan().all() and got[1:].isfinite().all() and not chooser._choices


def test_a_choice_is_made_once_for_similar_batches(timed, device, monkeypatch):
    made = []
    plain = chooser._tuned
    monkeypatch.setattr(chooser, "_tuned", lambda *a: made.append(a) or plain(*a))
    f = mlp((10, 40, 24, 8)).to(device)
    for n in (9, 16, 12):
        check(f, torch.randn(n, 10, device=device), per_sample=True)
    assert len(made) == 1


# -- what is refused --------------------------------------------------------------------------------


def test_create_graph_is_refused(device):
    x = torch.randn(3, 10, device=device)
    with pytest.raises(RuntimeError, match="no derivative"):
        jactri.jacobian(mlp((10, 4)).to(device), x, create_graph=True, backend="triton")
    jactri.jacobian(mlp((10, 4)).to(device), x, create_graph=True)


def test_every_item_is_described(device, monkeypatch):
    """explain covers what launch runs."""
    seen = []
    plain = launch.described
    monkeypatch.setattr(launch, "described", lambda *a: seen.append(a[2].kind) or plain(*a))
    f = nn.Sequential(Gated(), nn.Tanh(), nn.Softmax(-1)).to(device)
    jactri.explain(f, torch.randn(5, 6, device=device), strategy="forward-mode", backend="triton")
    assert set(seen) == {"chain", "rows", "sum"}


# -- profilers --------------------------------------------------------------------------------------


def test_what_a_kernel_runs_is_one_range(device, launched):
    f, x = mlp((3, 17, 33, 2)).to(device), torch.randn(5, 3, device=device)
    options = {"per_sample": True, "strategy": "reverse-mode", "backend": "triton"}
    plain = jactri.jacobian(f, x, **options)
    launched.clear()
    with torch.profiler.profile() as profiler:
        assert torch.equal(jactri.jacobian(f, x, **options), plain)
    names = sorted(e.name for e in profiler.events() if e.name.startswith("jactri #"))
    assert launched == ["chain"]
    (whole,) = [
        n for n in names if n.startswith("jactri #1-4 reverse 3 Tanh 2 Linear 1 Tanh 0 Linear ")
    ]
    assert names == ["jactri #0 reverse 4 Linear AddmmBackward0 [0 FLOP 0 B]", whole]
    found = jactri.profile(f, x, repeats=1, **options)
    assert [s.measured_ms is None for s in found.steps] == [False, True, True, True, False]


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_given_tangents_and_cotangents(chunk_size, device, launched):
    f = mlp((5, 40, 33, 4), nn.Tanh, nn.Softmax(-1)).to(device)
    x = torch.randn(6, 5, device=device)
    wide = copy.deepcopy(f).double()
    for call, v in (
        (jactri.jvp, torch.randn(7, 6, 5, device=device)),
        (jactri.vjp, torch.randn(7, 6, 4, device=device)),
    ):
        launched.clear()
        _, got = call(f, x, v, backend="triton", chunk_size=chunk_size)
        _, want = call(wide, x.double(), v.double(), backend="torch")
        assert distance(got, want) <= 2e-6
        assert {"chain", "rows"} <= set(launched)


def test_gram_matrices_and_diagonals(device, launched):
    f = mlp((6, 40, 33, 6), nn.Tanh, nn.Sigmoid()).to(device)
    x = torch.randn(5, 6, device=device)
    wide = copy.deepcopy(f).double()
    for call in (jactri.jtj, jactri.jjt, jactri.diagonal):
        for chunk_size in (None, 2):
            launched.clear()
            options = {} if call is jactri.diagonal else {"per_sample": True}
            got = call(f, x, backend="triton", chunk_size=chunk_size, **options)
            want = call(wide, x.double(), backend="torch", **options)
            assert distance(got, want) <= 2e-6
            assert launched
