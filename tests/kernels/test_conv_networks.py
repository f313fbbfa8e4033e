"""jactri.jacobian(..., backend="triton") of convolutional networks against float64, and that kernels really ran."""

import copy

import pytest
import torch
from precision import distance
from test_end_to_end import MODES, _fresh, check  # noqa: F401
from torch import nn

import jactri
from jactri._src.device import chooser
from jactri._src.maps.convolution import Conv, Geometry
from jactri._src.plan.convolving import ConvKind, Shape
from jactri.kernels import conv, direct, pool
from jactri.kernels.support import Unfit


@pytest.fixture
def launched(monkeypatch):
    """The kernels that ran, in order, each with the diagonals around it."""
    ran = []
    for module, name in ((conv, "convolve"), (direct, "direct")):
        plain = getattr(module, name)

        def spy(t, weight, window, before=None, after=None, _plain=plain, _name=name, **options):
            ran.append((_name, *("" if f is None else f.name for f in (before, after))))
            return _plain(t, weight, window, before, after, **options)

        monkeypatch.setattr(module, name, spy)
    return ran


def net(act=nn.ReLU, last=12, **first):
    return nn.Sequential(
        nn.Conv2d(2, 9, 3, padding=1, **first), act(), nn.Conv2d(9, 12, 3, stride=2, padding=1), act(),
        nn.Conv2d(12, last, 3, stride=2, padding=1), act(), nn.Flatten(), nn.Linear(4 * last, 3),
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_classifier(mode, device, launched):
    """Activations are a convolution's epilogue; a first one, after the free Linear, is the prologue."""
    check(net().to(device), torch.randn(3, 2, 6, 6, device=device), per_sample=True, strategy=mode)
    if mode == "reverse-mode":
        assert launched == [
            ("convolve", "relu", "relu"),
            ("convolve", "", "relu"),
            ("direct", "", ""),
        ]
    else:
        assert launched == [("convolve", "relu", "relu"), ("convolve", "", "relu")]


@pytest.mark.parametrize("act", [nn.SiLU, nn.PReLU, nn.Hardshrink, lambda: nn.ELU(inplace=True)])
def test_activations(act, device, launched):
    """Those that kernels differentiate, those that they are given ready, those in place."""
    f = nn.Sequential(nn.Conv1d(2, 3, 3), act(), nn.Conv1d(3, 2, 2), act()).to(device)
    for mode in MODES:
        check(f, torch.randn(2, 2, 4, device=device), per_sample=True, strategy=mode)
    assert len(launched) == 2


NETWORKS = {
    "batch norm": nn.Sequential(
        nn.Conv2d(2, 9, 3), nn.BatchNorm2d(9), nn.SiLU(), nn.Conv2d(9, 4, 1), nn.BatchNorm2d(4)
    ).eval(),
    "decoder": nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.Tanh(), nn.ConvTranspose2d(3, 10, 3, 2, 1, 1), nn.ELU(), nn.ConvTranspose2d(10, 1, 2)
    ),
    "depthwise": nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.Hardswish(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(), nn.Conv2d(8, 3, 1)
    ),
    "groups and dilation": nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=2, dilation=2), nn.GELU(), nn.Conv2d(4, 6, 3, groups=2)
    ),
    "pool": nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 3, 2)),
    "no activations": nn.Sequential(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 9, 2, padding=1), nn.Flatten(), nn.Linear(144, 2)),
    "two readers": None,
}  # fmt: skip


class TwoReaders(nn.Module):
    """The block between is read twice: nothing may be fused across it."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(32, 2)
        self.a, self.b, self.c = (
            nn.Conv2d(2, 4, 1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 2, 1),
        )

    def forward(self, x):
        h = self.b(torch.sin(self.a(x)))
        return self.last(self.c(torch.tanh(h) + h.exp()).flatten(1))


NETWORKS["two readers"] = TwoReaders()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, mode, device, launched):
    f = NETWORKS[name].to(device)
    side = {"decoder": 1, "groups and dilation": 3, "no activations": 5}.get(name, 4)
    # without activations, more samples would share their blocks, which torch does once
    samples = 1 if name == "no activations" else 2
    check(f, torch.randn(samples, 2, side, side, device=device), per_sample=True, strategy=mode)
    if name == "depthwise":
        check(f, torch.randn(2, 3, 3, device=device), strategy=mode)
    assert launched


@pytest.mark.parametrize("mode", MODES)
def test_chunks_and_out(mode, device, launched):
    f, x = net().to(device), torch.randn(2, 2, 6, 6, device=device)
    out = torch.full((2, 3, 2, 6, 6), float("nan"), device=device)
    got = check(f, x, per_sample=True, strategy=mode, out=out, chunk_size=2)
    assert got is out and launched
    f, x = f.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    check(f, x, per_sample=True, strategy=mode)


@pytest.mark.parametrize("dtype, most", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half(dtype, most, device, launched):
    f, x = net().to(device, dtype), torch.randn(2, 2, 6, 6, device=device, dtype=dtype)
    check(f, x, most, per_sample=True, strategy="reverse-mode")
    assert launched


def test_images_of_three_axes_go_to_torch(device, launched):
    f = nn.Sequential(nn.Conv3d(2, 3, 2), nn.Tanh(), nn.Conv3d(3, 2, 2)).to(device)
    x = torch.randn(2, 2, 4, 4, 4, device=device)
    check(f, x, per_sample=True)
    assert not launched
    assert "no kernel covers it" in str(jactri.explain(f, x, per_sample=True, backend="triton"))


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_precision_follows_torch(setting, device):
    f, x = net().to(device), torch.randn(2, 2, 6, 6, device=device)
    want = jactri.jacobian(copy.deepcopy(f).double(), x.double(), per_sample=True)
    switch, before = torch.backends.cudnn.conv, torch.backends.cudnn.conv.fp32_precision
    switch.fp32_precision = setting
    try:
        got = jactri.jacobian(f, x, per_sample=True, backend="triton", strategy="reverse-mode")
    finally:
        switch.fp32_precision = before
    off = distance(got, want)
    assert 1e-4 < off < 4e-3 if setting == "tf32" else off < 1e-6


def test_explain_names_kernels_and_reasons(device):
    f, x = net().to(device), torch.randn(2, 2, 6, 6, device=device)
    options = {"per_sample": True, "strategy": "reverse-mode"}
    text = str(jactri.explain(f, x, backend="triton", **options))
    assert text.count("triton (conv (bf16x6, tile 128x64x32, 4 warps): 1 launch)") == 2
    assert "in the step below" in text
    f = nn.Sequential(nn.Conv2d(2, 5, 1), nn.Flatten(), nn.Linear(20, 2)).to(device)
    text = str(jactri.explain(f, x[..., :2, :2], backend="triton", **options))
    assert "once for all samples" in text


# -- the choice ------------------------------------------------------------------------------------


def kind(channels, groups=1, taps=3, transposed=False, size=(8, 8)):
    I, O = channels
    edge = Conv(
        torch.empty(O, I // groups, *(taps,) * len(size)), Geometry((1,) * len(size), *[(1,) * len(size)] * 2, False,
        (0,) * len(size), groups), size,
    )  # fmt: skip
    shape = Shape.of(edge, not transposed, size, size)
    return ConvKind.of(4, 16, shape, ("", ""), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    "given, first",
    [
        ({"channels": (32, 64)}, "conv"),
        ({"channels": (32, 64), "transposed": True}, "conv"),
        ({"channels": (32, 32), "groups": 32}, "direct"),
        ({"channels": (16, 1)}, "direct"),
        ({"channels": (1, 16), "transposed": True}, "direct"),
        ({"channels": (1, 16)}, "conv"),
        ({"channels": (3, 4), "taps": 1}, "direct"),
        ({"channels": (4, 4), "size": (4, 4, 4)}, "torch"),
    ],
)
def test_predicted_ways(given, first):
    assert str(chooser._predicted(kind(**given)).way).split(" (")[0] == first


def test_flops_are_those_of_the_convolution():
    assert kind((32, 64)).flops == 4 * 16 * 2 * 32 * 64 * 9 * 64
    assert kind((32, 64), transposed=True).flops == kind((32, 64)).flops
    assert kind((32, 32), groups=32).flops == 4 * 16 * 2 * 32 * 9 * 64


@pytest.fixture
def one_tile(monkeypatch):
    for module in (conv, direct):
        monkeypatch.setattr(module, "CONFIGS", module.CONFIGS[:1])


@pytest.mark.parametrize("best", ["conv", "direct", "torch"])
def test_the_fastest_way_wins_unless_kernels_are_asked_for(
    best, timed, one_tile, device, launched, monkeypatch
):
    timed |= {"conv": 3.0, "direct": 2.0, "torch": 4.0, best: 1.0}
    f = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Conv2d(4, 6, 3, padding=1), nn.Tanh()).to(
        device
    )
    x = torch.randn(2, 2, 2, 2, device=device)
    options = {"per_sample": True, "strategy": "forward-mode"}
    check(f, x, **options)
    (choice,) = chooser._choices.values()
    assert str(choice.way).split(" (")[0] == best
    assert choice.tried["torch"] == (1.0 if best == "torch" else 4.0)
    forced = "direct" if best == "torch" else best
    assert launched[-1] == ({"conv": "convolve"}.get(forced, forced), "tanh", "tanh")
    (report,) = chooser.chosen()
    assert report["channels"] == (4, 6) and report["tried"] == choice.tried
    # without the word, torch's way is torch's
    monkeypatch.setattr("jactri._src.base.backends.forced", lambda: False)
    launched.clear()
    check(f, x, **options)
    assert bool(launched) == (best != "torch")


def test_a_wrong_result_cannot_win(timed, one_tile, device, monkeypatch):
    timed |= {"direct": 1.0, "conv": 2.0}
    plain = direct.direct
    monkeypatch.setattr(direct, "direct", lambda *a, **k: plain(*a, **k).mul_(1.0001))
    f = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Conv2d(4, 6, 2)).to(device)
    check(f, torch.randn(2, 2, 2, 2, device=device), per_sample=True, strategy="forward-mode")
    (choice,) = chooser._choices.values()
    assert str(choice.way).split(" (")[0] == "conv"
    assert any(isinstance(v, str) and "off by" in v for v in choice.tried.values())


def test_a_kernel_that_does_not_fit_gives_way(device, monkeypatch, launched):
    def refuse(*args, **options):
        raise Unfit("no registers left")

    monkeypatch.setattr(conv, "convolve", refuse)
    f, x = net().to(device), torch.randn(1, 2, 6, 6, device=device)
    with pytest.warns(RuntimeWarning, match="conv .* does not run here .*no registers left"):
        check(f, x, per_sample=True, strategy="reverse-mode")
    assert launched == [("direct", "", "")]
    monkeypatch.setattr(direct, "direct", refuse)
    check(f, x, per_sample=True, strategy="reverse-mode")
    ways = {str(c.way) for c in chooser._choices.values()}
    assert ways == {"torch"}


POOLS = {
    "apart": lambda: nn.MaxPool2d(2),
    "overlapping": lambda: nn.MaxPool2d(3, 2, 1),
    "dilated": lambda: nn.MaxPool2d(2, 1, dilation=2),
    "lines": lambda: nn.MaxPool1d(3, 2),
    "adaptive": lambda: nn.AdaptiveMaxPool2d((3, 2)),
}


@pytest.mark.parametrize("mode", ["forward-mode", "reverse-mode"])
@pytest.mark.parametrize("kind", POOLS)
def test_pools(kind, mode, device, monkeypatch):
    """A pool between two activations is one launch with both; an adaptive one in reverse goes to torch."""
    ran = []
    for name in ("gather", "scatter"):
        plain = getattr(pool, name)

        def spy(t, index, *rest, _plain=plain, _name=name, **options):
            ran.append((_name, *("" if f is None else f.name for f in rest[-2:])))
            return _plain(t, index, *rest, **options)

        monkeypatch.setattr(pool, name, spy)
    lines = kind == "lines"
    conv_of = nn.Conv1d if lines else nn.Conv2d
    f = nn.Sequential(
        conv_of(2, 3, 3), nn.Tanh(), POOLS[kind](), nn.SiLU(), nn.Flatten(), nn.LazyLinear(4)
    ).to(device)
    x = torch.randn(2, 2, *((11,) if lines else (9, 8)), device=device)
    f(x)
    check(f, x, per_sample=True, strategy=mode)
    if mode == "forward-mode":  # torch pools lines as images: a view lies between
        assert ran == [("gather", "", "") if lines else ("gather", "tanh", "silu")]
    elif kind == "adaptive":
        assert not ran
    else:
        assert ran == [("scatter", "", "") if lines else ("scatter", "silu", "tanh")]


@pytest.mark.parametrize("pool", [False, True])
def test_blocks_between_convolutions_have_channels_side_by_side(pool, device, monkeypatch):
    """Where one that reads them so follows; what goes to the answer, or on as a row, is written in rows."""
    seen = []
    plain = conv.convolve

    def spy(t, *given, **options):
        made = plain(t, *given, **options)
        seen.append((t.stride(2) == 1, made.stride(2) == 1))
        return made

    monkeypatch.setattr(conv, "convolve", spy)
    between = nn.MaxPool2d(2) if pool else nn.Identity()
    f = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), between, nn.Conv2d(16, 20, 3, padding=1), nn.Tanh(),
        nn.Conv2d(20, 18, 1), nn.Tanh(), nn.Flatten(), nn.LazyLinear(9), nn.Tanh(), nn.Linear(9, 3),
    )  # fmt: skip
    f = f.to(device)
    x = torch.randn(2, 3, 4, 4, device=device)
    f(x)
    check(f, x, per_sample=True, strategy="reverse-mode")
    # 18 channels do not lie in groups of four; the last convolution writes the answer
    assert seen == [(False, True), (True, True), (True, False)]
    seen.clear()
    check(f, x, per_sample=True, strategy="forward-mode")
    assert seen[-1] == (True, False)
