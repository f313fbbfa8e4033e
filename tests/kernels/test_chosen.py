"""Every kernel is timed and held against float64 before it is taken: a wrong one, or a slow one, never is."""

import copy
import re

import pytest
import torch
from precision import distance
from test_conv_networks import POOLS
from test_end_to_end import Gated, _fresh, mlp  # noqa: F401
from test_window_networks import SIZE, w6
from torch import nn

import jactri
from jactri._src.device import chooser
from jactri._src.plan.convolving import ConvKind
from jactri._src.plan.patching import PatchKind
from jactri._src.second.fused import LayersKind
from jactri.kernels import band, elementwise, first, laplacian, patches, pool, rows
from jactri.kernels.support import Unfit

FORWARD, REVERSE = "forward-mode", "reverse-mode"


def jacobian(f, x, backend, mode=FORWARD, per_sample=True):
    return jactri.jacobian(f, x, per_sample=per_sample, strategy=mode, backend=backend)


def spread(f, x, backend, mode=FORWARD):
    """With the samples on both sides."""
    return jacobian(f, x, backend, mode, False)


def curvature(f, x, backend, mode=FORWARD):
    return jactri.laplacian(f, x, backend=backend)


def weighted(f, x, backend, mode=FORWARD):
    weight = torch.tensor([[1.0, 0.5], [0.5, -2.0]]).to(x)
    return jactri.laplacian(f, x, weight, backend=backend)


def softmax():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Softmax(-1))


def pooled():
    return nn.Sequential(nn.Conv2d(2, 3, 1), POOLS["overlapping"](), nn.Tanh())


IMAGES = (2, 1, *SIZE)
CASES = {
    "rows": (rows, "rows", softmax, (5, 6), jacobian),
    "sums": (elementwise, "scaled_sum", Gated, (5, 6), jacobian),
    "gathers": (pool, "gather", pooled, (2, 2, 5, 5), jacobian),
    "scatters": (pool, "scatter", pooled, (2, 2, 5, 5), jacobian, REVERSE),
    "first": (first, "first", lambda: w6(2), IMAGES, jacobian),
    "first, of cotangents": (first, "first", lambda: w6(2), IMAGES, jacobian, REVERSE),
    "first, no scaling": (
        first, "first", lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 1)), IMAGES, jacobian,
    ),
    "bands": (band, "dense", lambda: w6(2), IMAGES, jacobian),
    "bands, of cotangents": (band, "dense", lambda: w6(2), IMAGES, jacobian, REVERSE),
    "bands of a batch": (band, "dense", lambda: w6(2), IMAGES, spread),
    "bands of a batch, of cotangents": (band, "dense", lambda: w6(2), IMAGES, spread, REVERSE),
    "patches": (patches, "patches", lambda: w6(2), (2, 1, 3, 20), jacobian, REVERSE),
    "patches of tangents": (patches, "patches", lambda: w6(2), (2, 1, 3, 20), jacobian),
    "patches of a batch": (patches, "patches", lambda: w6(2), (2, 1, 3, 20), spread, REVERSE),
    "laplacian chain": (laplacian, "chain", lambda: mlp((2, 18, 17, 1), nn.SiLU), (5, 2), curvature),
    "laplacian chain, signed": (laplacian, "chain", lambda: mlp((2, 18, 17, 3)), (5, 2), weighted),
    "laplacian steps": (laplacian, "step", lambda: mlp((2, 140, 17, 1)), (3, 2), curvature),
    "laplacian steps, no last": (
        laplacian, "step", lambda: mlp((2, 140, 17, 1), last=nn.Softplus()), (3, 2), curvature,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(request, monkeypatch):
    """No other kernels, and one tile of those that have several."""
    for kind in (chooser.ChainKind, ConvKind):
        monkeypatch.setattr(kind, "offers", lambda self: [])
    for kind in (LayersKind, PatchKind):

        def fewer(self, plain=kind.offers):
            return [(kernels, tiles[:1], dots[:1]) for kernels, tiles, dots in plain(self)]

        monkeypatch.setattr(kind, "offers", fewer)
    if "patches" not in request.node.name:
        request.getfixturevalue("by_images")


@pytest.fixture(params=CASES)
def case(request, device):
    module, name, net, shape, call, *mode = CASES[request.param]
    torch.manual_seed(0)
    f, x = net().to(device), torch.randn(shape, device=device)
    want = call(copy.deepcopy(f).double(), x.double(), "torch", *mode)

    def check(backend="triton", most=2e-6):
        got = call(f, x, backend, *mode)
        assert got.shape == want.shape and distance(got, want) <= most

    return module, name, check, (f, x)


def of(name):
    """What was chosen where this kernel is one of the ways."""
    name = "band" if name == "dense" else "pool" if name in ("gather", "scatter") else name
    found = [
        c
        for k, c in chooser._choices.items()
        if re.search(rf"\b{name}s?\b", str([*c.tried, c.way]))
    ]
    assert found
    return found


def test_a_wrong_kernel_is_never_taken(case, timed, monkeypatch):
    module, name, check, _ = case
    timed["torch"] = 1e6
    plain, calls = getattr(module, name), []

    def wrong(*args, **options):
        calls.append(name)
        return plain(*args, **options).mul_(1.00001)

    monkeypatch.setattr(module, name, wrong)
    check(most=5e-6)
    for choice in of(name):
        assert any("off by" in str(v) for v in choice.tried.values())
        assert choice.way is chooser.TORCH or "off by" not in str(choice.tried[str(choice.way)])
    calls.clear()
    check(most=5e-6)
    assert not calls


def test_the_faster_of_torch_and_a_kernel_is_taken(case, timed, monkeypatch):
    module, name, check, _ = case
    plain, calls = getattr(module, name), []

    def spy(*args, **options):
        calls.append(name)
        return plain(*args, **options)

    monkeypatch.setattr(module, name, spy)
    timed["torch"] = 1e6
    check()
    assert all("1e+03 ms measured, torch 1e+06 ms" in c.why for c in of(name)), of(name)
    calls.clear()
    check()
    assert calls
    chooser.forget()
    timed["torch"] = 1.0
    check()
    calls.clear()
    check()  # kernels are asked for
    assert calls and all(c.way is chooser.TORCH for c in of(name))
    monkeypatch.setattr("jactri._src.base.backends.forced", lambda: False)
    check()
    calls.clear()
    check()
    assert not calls


def test_a_kernel_that_does_not_fit_is_remembered(case, monkeypatch):
    module, name, check, _ = case
    calls = []

    def refuse(*args, **options):
        calls.append(name)
        raise Unfit("no registers left")

    monkeypatch.setattr(module, name, refuse)
    with pytest.warns(RuntimeWarning, match="does not run here .*no registers left"):
        check()
    calls.clear()
    check()
    assert not calls


def test_data_that_is_not_finite_decides_nothing(timed, device):
    f, x = softmax().to(device), torch.randn(5, 6, device=device)
    x[0, 0] = float("nan")
    got = jacobian(f, x, "triton")
    assert got[0].isnan().all() and got[1:].isfinite().all() and not chooser._choices


@pytest.mark.parametrize("name", ["rows", "sums", "gathers", "first", "bands"])
def test_explain_says_what_was_chosen(name, timed, device):
    _, kernel, net, shape, call, *_ = CASES[name]
    f, x = net().to(device), torch.randn(shape, device=device)
    kernel = {"dense": "band", "gather": "pool"}.get(kernel, kernel)

    def told():
        return str(jactri.explain(f, x, per_sample=True, strategy=FORWARD, backend="triton"))

    assert f"triton ({kernel}: 1 launch" in told()
    timed[kernel] = 0.25
    call(f, x, "triton")
    assert f"triton ({kernel}: 0.25 ms measured, torch 1e+03 ms)" in told()


@pytest.mark.parametrize("most", [1, 40])
@pytest.mark.parametrize("name", CASES)
def test_parts_are_compared_with_parts(name, most, timed, device, monkeypatch):
    """What is timed and checked is a part of a large problem, whichever of its axes is cut."""
    for at in (
        "jactri._src.device.passes.CHECKED_ENTRIES",
        "jactri._src.device.chooser.CHECKED_ROWS",
        "jactri._src.second.fused.CHECKED_ROWS",
    ):
        monkeypatch.setattr(at, most)
    monkeypatch.setattr("jactri._src.device.passes.TIMED_ENTRIES", 100 * most)
    _, kernel, net, shape, call, *mode = CASES[name]
    f, x = net().to(device), torch.randn(shape, device=device)
    want = call(copy.deepcopy(f).double(), x.double(), "torch", *mode)
    timed["torch"] = 1e6
    assert distance(call(f, x, "triton", *mode), want) <= 2e-6
    assert all("1e+03 ms measured" in c.why for c in of(kernel))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_bands_of_any_dtype_are_held_against_truth(dtype, timed, device):
    timed["torch"] = 1e6
    kernel = torch.randn(1, 1, 3, dtype=dtype, device=device)

    def f(x):
        return sum(kernel[..., i] * x[..., i : i + 18] for i in range(3))

    x = torch.randn(2, 1, 20, dtype=dtype, device=device)
    got = jactri.jacobian(f, x, per_sample=True, backend="triton")
    want = jactri.jacobian(f, x, per_sample=True, backend="torch")
    torch.testing.assert_close(got, want)


def test_what_decides_is_predicted_time():
    """Bytes count as flops do: a pass over 100 MB is worth timing, one over 100 kB is not."""
    from jactri._src.device.passes import PassKind

    def tunable(*size):
        return chooser._tunable(PassKind.of("rows", *size, (), torch.float32, torch.device("cuda")))

    assert tunable(64, 1024, 400, 400) and not tunable(4, 64, 100, 100)
    chain = chooser.ChainKind.of(
        64, 16384, (64, 64), ("", ""), False, torch.float32, torch.device("cuda")
    )
    assert chooser._tunable(chain)
