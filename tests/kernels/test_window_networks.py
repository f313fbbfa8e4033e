"""Image-to-image networks under backend="triton": convolution kernels under coloured seeds, and the band writer."""

import copy
import re

import pytest
import torch
from precision import distance
from test_end_to_end import MODES, _fresh  # noqa: F401
from torch import nn

import jactri
from jactri._src.plan import planning
from jactri._src.read.reading import read
from jactri.kernels import band, conv, direct, first
from jactri.kernels.support import Unfit

pytestmark = pytest.mark.usefixtures("by_images")


@pytest.fixture
def launched(monkeypatch):
    """The kernels that ran, in order."""
    ran = []
    for module, name in ((first, "first"), (conv, "convolve"), (direct, "direct"), (band, "dense")):
        plain = getattr(module, name)

        def spy(*args, _plain=plain, _name=name, **options):
            ran.append(_name)
            return _plain(*args, **options)

        monkeypatch.setattr(module, name, spy)
    return ran


SIZE = (3, 10)
"""Of which columns are coloured, with 7 colours; lines are too few."""


def w6(channels=4):
    """W6 of the benchmarks, with fewer channels."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.Tanh(), nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(),
        nn.Conv2d(channels, 1, 3, padding=1),
    )  # fmt: skip


def truth(f, x, per_sample):
    J = torch.autograd.functional.jacobian(copy.deepcopy(f).double(), x.double())
    if not per_sample:
        return J
    return torch.stack([J[n].select(J.dim() - x.dim() - 1, n) for n in range(len(x))])


def check(f, x, per_sample=True, most=2e-6, **options):
    got = jactri.jacobian(f, x, backend="triton", per_sample=per_sample, **options)
    want = truth(f, x, per_sample)
    assert got.shape == want.shape and distance(got, want) <= most
    return got


@pytest.mark.parametrize(
    "n, per_sample, given", [(1, True, True), (2, True, False), (2, False, True)]
)
@pytest.mark.parametrize("mode", MODES)
def test_w6(mode, n, per_sample, given, device, launched):
    f, x = w6().to(device), torch.randn(n, 1, *SIZE, device=device)
    out = None
    if given:
        shape = (n, 1, *SIZE, *([] if per_sample else [n]), 1, *SIZE)
        out = torch.full(shape, float("nan"), device=device)
    got = check(f, x, per_sample, strategy=mode, out=out)
    assert out is None or got is out
    assert launched == ["first", "convolve", "direct", "dense"]


def test_explain_says_so(device):
    f, x = w6().to(device), torch.randn(2, 1, *SIZE, device=device)
    text = str(jactri.explain(f, x, per_sample=True, backend="triton"))
    assert "triton (first: 1 launch)" in text
    assert "tile 128x64x32, 4 warps): 1 launch)" in text
    assert "as kernels are asked for, written out by triton (band: 1 launch)" in text
    x = torch.randn(2, 1, 10, 11, device=device)
    text = str(jactri.explain(f, x, per_sample=True, backend="torch"))
    assert ", by patches (predicted" in text and "triton" not in text


NETWORKS = {
    "both axes": (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1)), (7, 8)),
    "strides": (nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.Tanh(), nn.ConvTranspose2d(3, 2, 4, 2, 1)), (3, 10)),
    "lines": (nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 3, padding=2)), (9,)),
    "nothing between": (nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, (1, 3), padding=(0, 1))), (3, 8)),
    "depthwise": (nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.Tanh()), (3, 6)),
    "groups": (nn.Sequential(nn.Conv2d(4, 6, (1, 3), padding=(0, 1), groups=2), nn.Tanh()), (2, 6)),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, mode, device, launched):
    f, size = NETWORKS[name]
    f = f.to(device)
    x = torch.randn(2, f[0].in_channels, *size, device=device)
    check(f, x, mode == "forward-mode", strategy=mode)
    assert launched.count("dense") == 1
    assert launched.count("first") == (name not in ("depthwise", "groups"))


def test_chunks_memory_orders_and_dtypes(device, launched):
    f, x = w6().to(device), torch.randn(1, 1, *SIZE, device=device)
    check(f, x, strategy="forward-mode", chunk_size=9)
    out = torch.empty(1, 1, *SIZE, 1, *SIZE[::-1], device=device).transpose(-1, -2)
    assert check(f, x, strategy="reverse-mode", out=out) is out
    check(f.half(), x.half(), most=4e-3, strategy="forward-mode")
    launched.clear()
    check(f.double(), x.double(), strategy="forward-mode")  # torch's sweep
    assert "first" not in launched


def test_what_the_kernels_do_not_fit_goes_to_torch(device, launched, monkeypatch):
    def refuse(*args, **options):
        raise Unfit("no registers left")

    f, x = w6().to(device), torch.randn(1, 1, *SIZE, device=device)
    monkeypatch.setattr(first, "first", refuse)
    with pytest.warns(RuntimeWarning, match="first does not run here .*no registers left"):
        check(f, x)
    assert launched == ["convolve", "direct", "dense"]
    monkeypatch.setattr(band, "dense", refuse)
    check(f, x)


def test_the_cheaper_of_patches_and_images(device):
    """Without the word, predicted time decides: kernels write a block once a layer, torch's steps more often."""
    f, x = w6(), torch.randn(2, 1, 10, 11, requires_grad=True)
    y = f(x)
    with torch.no_grad():
        graph = read((y,), (x,))
        plans = {}
        for kernels in ("", "auto", "triton"):
            answer = planning.Asked(True, False, kernels=kernels)
            plans[kernels] = planning.make_plan(graph, "forward-mode", device="cuda", answer=answer)
    (torchs,), (auto,), (asked,) = (p.sweeps for p in plans.values())
    assert torchs.windows and "by patches (predicted" in torchs.why
    assert not asked.windows and asked.items
    chosen = "patches" if auto.windows else "images"
    assert f"by {chosen} (predicted" in auto.why

    def by_images(sweep):
        return float(re.search(r"([\d.e+-]+) (?:ms, .* by patches|by images)", sweep.why)[1])

    assert by_images(auto) < by_images(torchs)
