"""Maps that are one term of a sum, as those of residual connections are in reverse mode: kernels run the term."""

import copy

import pytest
import torch
from precision import distance
from test_end_to_end import _fresh  # noqa: F401
from torch import nn

import jactri
from jactri._src.device import chooser
from jactri.kernels import chain as chains
from jactri.kernels import conv, direct, linear, patches, pool, rows
from jactri.kernels.support import Unfit


class Sum(nn.Module):
    """``sum of part(h)`` for several parts, between two other layers or alone."""

    def __init__(self, before, parts, after):
        super().__init__()
        self.before, self.parts, self.after = before, nn.ModuleList(parts), after

    def forward(self, x):
        h = self.before(x)
        return self.after(sum(part(h) for part in self.parts))


class Tokens(nn.Module):
    def forward(self, x):
        return x.flatten(0, -2).tanh().view(x.shape)


class Twice(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return 2 * self.part(x)


def lines(*parts, after=True):
    return Sum(nn.Linear(6, 9), parts, nn.Linear(9, 4) if after else nn.Identity())


def images(*parts, after=True):
    own = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Tanh()) if after else nn.Identity()
    return Sum(nn.Conv2d(2, 3, 1), parts, own)


LINES, IMAGES = (3, 6), (2, 2, 4, 3)
CASES = {
    "norm": (lambda: lines(nn.Identity(), nn.LayerNorm(9)), LINES, "rows"),
    "norm first": (lambda: lines(nn.LayerNorm(9), nn.Identity()), LINES, "rows"),
    "pre-norm": (
        lambda: lines(nn.Identity(), nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 9), nn.Tanh())), LINES, "rows",
    ),
    "with the seed itself": (
        lambda: lines(nn.Identity(), nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 9), nn.Tanh()), after=False), LINES,
        "rows",
    ),
    "softmax": (lambda: lines(nn.Identity(), nn.Softmax(-1)), LINES, "rows"),
    "scaled": (lambda: lines(nn.Tanh(), nn.Softmax(-1)), LINES, "rows"),
    "two rows": (lambda: lines(nn.LogSoftmax(-1), nn.LayerNorm(9)), LINES, "rows"),
    "three": (lambda: lines(nn.Identity(), nn.Tanh(), nn.LayerNorm(9)), LINES, "rows"),
    "chain": (
        lambda: lines(nn.Identity(), nn.Sequential(nn.Tanh(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 9))), LINES,
        "chain",
    ),
    "chain that ends in a scaling": (
        lambda: lines(nn.Identity(), nn.Sequential(nn.Tanh(), nn.Linear(9, 9), nn.Tanh())), (2, 3, 6), "chain",
    ),
    "tokens": (lambda: lines(nn.Identity(), nn.LayerNorm(9)), (2, 3, 6), "rows"),
    "convolution": (lambda: images(nn.Identity(), nn.Conv2d(3, 3, 3, padding=1)), IMAGES, "conv"),
    "convolution, scaled": (
        lambda: images(nn.Identity(), Twice(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh()))), IMAGES, "conv",
    ),
    "pool": (lambda: images(nn.Identity(), nn.MaxPool2d(3, 1, 1)), IMAGES, "pool"),
    "pool, with the seed itself": (
        lambda: images(nn.Identity(), nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 3, 1)), after=False), IMAGES,
        "pool",
    ),
}  # fmt: skip
KERNELS = {
    "chain": [(linear, "step"), (chains, "pair"), (chains, "chain")],
    "rows": [(rows, "rows")],
    # of small images the windows may be cheaper
    "conv": [(conv, "convolve"), (direct, "direct"), (patches, "patches")], "pool": [(pool, "scatter")]
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request, device):
    net, shape, kernel = CASES[request.param]
    torch.manual_seed(0)
    return net().to(device), torch.randn(shape, device=device), KERNELS[kernel]


def check(f, x, mode="reverse-mode", **options):
    got = jactri.jacobian(f, x, strategy=mode, backend="triton", **options)
    exact = copy.deepcopy(f).double()
    want = torch.autograd.functional.jacobian(exact, x.double())
    assert got.shape == want.shape and distance(got, want) <= 2e-6
    return got


def test_a_kernel_runs_the_term(case, monkeypatch):
    f, x, kernels = case
    ran = []
    for module, name in kernels:
        plain = getattr(module, name)

        def spy(*args, _plain=plain, **options):
            ran.append(_plain)
            return _plain(*args, **options)

        monkeypatch.setattr(module, name, spy)
    check(f, x)
    assert ran
    ran.clear()
    out = torch.full((*f(x).shape, *x.shape), float("nan"), device=x.device)
    assert check(f, x, out=out) is out and ran
    check(f, x, chunk_size=2)


def test_where_none_fits_torch_runs_all(case, monkeypatch):
    def refuse(*args, **options):
        raise Unfit("no registers left")

    f, x, kernels = case
    for module, name in kernels:
        monkeypatch.setattr(module, name, refuse)
    with pytest.warns(RuntimeWarning, match="no registers left"):
        check(f, x)
    assert any(c.way is chooser.TORCH for c in chooser._choices.values())


def test_explain_names_the_kernel_of_a_term(device):
    f = lines(nn.Identity(), nn.LayerNorm(9)).to(device)
    x = torch.randn(3, 6, device=device)
    found = jactri.explain(f, x, strategy="reverse-mode", backend="triton")
    (step,) = (s for s in found.steps if "low rank" in s.structure)
    assert (step.backend, step.why) == ("triton", "rows: 1 launch")


@pytest.mark.parametrize("mode", ["forward-mode", "reverse-mode"])
def test_what_goes_around_is_added_by_the_kernel(mode, device, monkeypatch):
    """A pre-norm block: the layer norm's launch adds in reverse, that of the products forward."""
    added = []
    for module, name in ((linear, "step"), (chains, "pair"), (chains, "chain"), (rows, "rows")):
        plain = getattr(module, name)

        def spy(*args, plus=None, _plain=plain, **options):
            added.append(plus is not None)
            return _plain(*args, plus=plus, **options)

        monkeypatch.setattr(module, name, spy)
    torch.manual_seed(0)
    part = nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 9))
    f = lines(nn.Identity(), part).to(device)
    x = torch.randn(2, 3, 6, device=device)
    check(f, x, mode)
    assert sum(added) == 1
    added.clear()
    tokens = lines(nn.Identity(), nn.Sequential(nn.Tanh(), nn.Linear(9, 9), Tokens())).to(device)
    check(tokens, x, mode)  # a view between the products and the sum
    assert sum(added) == 1
