"""The forward Laplacian's step and chain against float64: values, every element written, nothing else touched."""

from itertools import pairwise

import pytest
import torch
from guard import Canvas, guarded
from precision import distance, limit
from test_activations import BLOWS_UP, CASES, FAR, KINKS
from torch.nn import functional as F

from jactri.kernels import chain as chains
from jactri.kernels import laplacian, naive
from jactri.kernels.activations import DERIVATIVES
from jactri.kernels.support import Factor, Unfit

SHAPES = [
    # tangents, samples, widths
    (3, 5, (20, 33, 17)),
    (0, 3, (4, 5, 6)),
    (1, 1, (1, 1, 1)),
    (4, 70, (3, 100, 128)),
    (33, 3, (9, 40, 12)),
]


def curve(R, width, device, name="tanh", dtype=torch.float32, gap=1):
    """An activation for a kernel, from what it saved, and both its derivatives in float64 as autograd has them."""
    ways = {n: (op, c) for n, op, c in reversed(CASES)}
    x = torch.randn(R, width, device=device).to(dtype)
    if name == "flat":
        return Factor(guarded(x, gap=gap)), (x.double(), torch.zeros_like(x).double())
    if name == "ready":
        d, dd = x, torch.randn_like(x)
        return Factor(guarded(d, gap=gap), second=guarded(dd, (1, 0), gap)), (
            d.double(),
            dd.double(),
        )
    op, numbers = ways[name]
    _, y, d, dd = derivatives(op, x)
    if DERIVATIVES[name].of == "y":  # the derivatives at the value that was saved, which is rounded
        saved = y.to(dtype)
        if name == "tanh":
            y = saved.double()
            d, dd = 1 - y**2, -2 * y * (1 - y**2)
    else:
        saved = x
    return Factor(guarded(saved, gap=gap), name, tuple(numbers)), (d, dd)


def derivatives(op, x):
    x = x.double().requires_grad_()
    y = op(x)
    (d,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    dd = torch.zeros_like(x)
    if (
        d.requires_grad and op is not F.hardsigmoid
    ):  # piecewise linear; torch has no second derivative of it
        (dd,) = torch.autograd.grad(d.sum(), x)
    return x.detach(), y.detach(), d.detach(), dd


def double(x):
    return None if x is None else x.double()


def check(
    K, R, widths, device, way, *, name="tanh", dtype=torch.float32, last=0, weights=0, order=None, gap=1, config=None
):  # fmt: skip
    """Both kernels: the chain over all widths, the step over the first two with an activation before and behind."""
    t = guarded(torch.randn(K + 1, R, widths[0], device=device).to(dtype), order, gap)
    swap = None if order is None else (1, 0)
    matrices = [
        guarded((torch.randn(a, b, device=device) / a**0.5).to(dtype), swap, gap)
        for a, b in pairwise(widths)
    ]
    curves = [curve(R, w, device, name, dtype, gap) for w in widths]
    w = torch.randn((R, K)[-weights:], device=device) if weights else None
    tail = guarded(torch.randn(widths[-1], last, device=device).to(dtype)) if last else None
    short = guarded(torch.randn(widths[1], last, device=device).to(dtype)) if last else None
    kept = [x.clone() for x in (t, *matrices)]
    for kernel in ("chain", "step"):
        canvas = Canvas(
            (K + 1, R, last or widths[-1 if kernel == "chain" else 1]), dtype, device, order, gap
        )
        if kernel == "chain":
            given = (t, matrices, [f for f, _ in curves[1:]])
            options = {"last": tail}
            plain, pairs, steps = naive.laplacian_chain, [p for _, p in curves[1:]], len(matrices)
            want = plain(t.double(), [m.double() for m in matrices], pairs, double(tail), double(w))
            torch32 = plain(
                t.float(), [m.float() for m in matrices], [(d.float(), b.float()) for d, b in pairs],
                None if tail is None else tail.float(), w,
            )  # fmt: skip
        else:
            given = (t, matrices[0], curves[1][0])
            options = {"before": curves[0][0], "last": short}
            plain, (before, after), steps = naive.laplacian_step, [p for _, p in curves[:2]], 1
            want = plain(t.double(), matrices[0].double(), after, before, double(short), double(w))
            torch32 = plain(
                t.float(), matrices[0].float(), tuple(d.float() for d in after), tuple(d.float() for d in before),
                None if short is None else short.float(), w,
            )  # fmt: skip
        got = getattr(laplacian, kernel)(
            *given, precision=way, out=canvas.view, weights=w, config=config, **options
        )
        assert got is canvas.view
        off, allowed = distance(got, want), limit(way, dtype, 2 * steps, distance(torch32, want))
        canvas.check()
        assert off <= allowed, (kernel, off, allowed)
    assert all(torch.equal(a, b) for a, b in zip(kept, (t, *matrices), strict=True))


@pytest.mark.parametrize("way", ["ieee", "tf32", "bf16x6"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_precisions(shape, way, device):
    check(*shape, device, way)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype, device):
    check(*SHAPES[0], device, "half", dtype=dtype)


@pytest.mark.parametrize("last", [1, 4])
@pytest.mark.parametrize("weights", [0, 1, 2], ids=["unweighted", "weights", "weights a sample"])
def test_a_last_layer_and_weights(last, weights, device):
    """The second width takes several tiles of features, each with its part of the last layer."""
    check(
        3,
        5,
        (7, 200, 40) if last == 1 else (7, 40, 24),
        device,
        "tf32x3",
        last=last,
        weights=weights,
    )


@pytest.mark.parametrize("name", ["ready", "flat", "relu", "gelu", "exp", "sin", "softplus"])
def test_derivatives_ready_or_formed(name, device):
    check(2, 3, (5, 20, 18), device, "tf32x3", name=name)


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0)])
def test_strides(order, device):
    check(3, 5, (20, 33, 17), device, "bf16x6", order=order, gap=3)


@pytest.mark.parametrize("config", [*laplacian.CONFIGS, *chains.CHAIN_CONFIGS])
def test_every_configuration(config, device):
    config = laplacian.Config(config.rows, config.out or 64, config.inner or 32, config.warps, 1)
    check(6, 40, (40, 64, 33), device, "bf16x6", config=config)


@pytest.mark.parametrize("together", [1, 2, 4, 8, 16])
def test_rows_of_a_sample_in_several_tiles(together, device, monkeypatch):
    monkeypatch.setattr(laplacian, "_together", lambda *given: together)
    check(18, 20, (17, 33, 5), device, "tf32x3", weights=1)


@pytest.mark.parametrize("K", [1, 3, 6, 12, 63])
def test_tiles_hold_every_row_once(K):
    for rows in (64, 128):
        for together in (1, 2, 4, 8, 16, 32, 64):
            tile = laplacian._tile(rows, together)
            assert tile[1] * tile[3] == together and tile[0] * tile[2] * together == rows
    assert 1 <= laplacian._together(K, 1000, 3, 64) <= 16


def test_a_whole_network_from_its_input(device):
    """By steps from the weights, by steps and by one chain from the directions: the trace of the Hessian."""
    n, R = 3, 6
    w1, w2, w3 = (torch.randn(b, a, device=device) / a**0.5 for a, b in pairwise((n, 40, 33, 2)))
    directions, weights = torch.randn(5, n, device=device), torch.randn(5, device=device)
    x = torch.randn(R, n, device=device)
    y1 = torch.tanh(x @ w1.t())
    y2 = torch.tanh(y1 @ w2.t())
    f1, f2 = Factor(y1, "tanh"), Factor(y2, "tanh")
    t = laplacian.seeds(w1, directions, weights)[:, None].expand(-1, R, -1)
    options = {"weights": weights, "precision": "tf32x3"}
    by_steps = laplacian.step(t, w2.t(), f2, before=f1, last=w3.t(), **options)
    t = torch.cat((directions, directions.new_zeros(1, n)))[:, None].expand(-1, R, -1)
    by_chain = laplacian.chain(t, [w1.t(), w2.t()], [f1, f2], last=w3.t(), **options)
    whole = laplacian.chain(t, [w1.t(), w2.t(), w3.t()], [f1, f2, None], **options)

    def network(x):
        return torch.tanh(torch.tanh(x @ w1.double().t()) @ w2.double().t()) @ w3.double().t()

    J = torch.func.vmap(torch.func.jacrev(network))(x.double())
    H = torch.func.vmap(torch.func.hessian(network))(x.double())
    d = directions.double()
    A = d.t() @ (weights.double()[:, None] * d)
    truth = torch.cat((torch.einsum("rmi,ki->krm", J, d), torch.einsum("rmij,ij->rm", H, A)[None]))
    for got in (by_steps, by_chain, whole):
        assert got.shape == truth.shape
        assert distance(got, truth) < 2e-6 and distance(got[-1], truth[-1]) < 4e-6
    plain = laplacian.seeds(w1)
    torch.testing.assert_close(plain[:-1], w1.t())
    torch.testing.assert_close(plain[-1], (w1**2).sum(1))


@pytest.mark.parametrize("shape", [(3, 0, (4, 5)), (3, 2, (4, 0))])
def test_nothing_to_compute(shape, device):
    K, R, (I, O) = shape
    t, m = torch.randn(K + 1, R, I, device=device), torch.randn(I, O, device=device)
    f = Factor(torch.randn(R, O, device=device), "tanh")
    assert laplacian.step(t, m, f, precision="ieee").shape == (K + 1, R, O)
    assert laplacian.chain(t, [m], [f], precision="ieee").shape == (K + 1, R, O)
    last = torch.randn(O, 2, device=device)
    got = laplacian.step(t, m, f, last=last, precision="ieee")
    assert torch.equal(got, torch.zeros(K + 1, R, 2, device=device))


def test_what_the_kernels_refuse(device):
    t, m = torch.randn(4, 2, 5, device=device), torch.randn(5, 6, device=device)
    with pytest.raises(Unfit, match="5 features"):
        laplacian.step(t, m, last=torch.randn(6, 5, device=device), precision="ieee")
    with pytest.raises(Unfit, match="65 tangents"):
        laplacian.chain(t[:1].expand(66, -1, -1), [m], [None], precision="ieee")
    assert laplacian.chain_configs((5, 128, 1), 63, device)
    assert not laplacian.chain_configs((5, 128, 1), 64, device)
    assert not laplacian.chain_configs((5, 129, 1), 3, device)


@pytest.mark.clean_memory
def test_offsets_beyond_32_bits(device):
    """Samples 2^30 elements apart: the memory in between is reserved, and never touched."""

    def far(*shape):
        strides = (64, 1 << 30, 1)[-len(shape) :]
        t = torch.empty((1 << 31) + 4096, device=device)[64:].as_strided(shape, strides)
        return t.copy_(torch.randn(shape, device=device).tanh())

    t, z, m = far(3, 3, 20), far(3, 9), torch.randn(20, 9, device=device)
    out, y = far(3, 3, 9), z.double()
    want = naive.laplacian_step(t.double(), m.double(), (1 - y**2, -2 * y * (1 - y**2)))
    f = Factor(z, "tanh")
    assert distance(laplacian.step(t, m, f, precision="bf16x6", out=out), want) < 1e-6
    assert distance(laplacian.chain(t, [m], [f], precision="bf16x6", out=out), want) < 1e-6


def second(name, numbers, saved):
    """f'' as the kernels form it: the Laplacian of one direction of ones through an identity."""
    n = saved.numel()
    t = torch.zeros(2, n, 1, device=saved.device)
    t[0] = 1
    f = Factor(saved.reshape(n, 1), name, numbers)
    m = torch.ones(1, 1, device=saved.device)
    return laplacian.step(t, m, f, precision="ieee")[1, :, 0]


@pytest.mark.parametrize("name, op, numbers", CASES)
def test_second_derivatives(name, op, numbers, device):
    x = torch.linspace(-12, 12, 401, device=device)
    _, y, _, truth = derivatives(op, x)
    saved = x if DERIVATIVES[name].of == "x" else y.float()
    got = second(name, numbers, saved)
    assert ((got - truth).abs() / truth.abs().clamp_min(1)).max() < 2e-6


@pytest.mark.parametrize("name, op, numbers", CASES)
def test_autograds_choice_of_second_derivatives_at_kinks_and_far_out(name, op, numbers, device):
    points = KINKS[:-1] + ([] if name in BLOWS_UP else FAR)
    x = torch.tensor(points, device=device)
    _, y, _, truth = derivatives(op, x)
    got = second(name, numbers, x if DERIVATIVES[name].of == "x" else y.float())
    known = ~truth.isnan() & (x.abs() != float("inf"))
    torch.testing.assert_close(got[known], truth[known].float(), rtol=1e-6, atol=2e-6)


def test_which_second_derivatives_are_zero():
    flat = {"relu", "leaky_relu", "hardtanh", "hardsigmoid", "ready"}
    assert {n for n, d in DERIVATIVES.items() if d.second is None} == flat
