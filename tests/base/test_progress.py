"""progress=True: a bar on standard error, and the same answer."""

import sys

import pytest
import torch
from common import F64, MODES, make
from tolerances import assert_close
from torch import nn

import jactri


def network():
    return make(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7)))


@pytest.mark.parametrize("mode", MODES)
def test_a_bar_on_standard_error(mode, capfd):
    pytest.importorskip("rich", reason="the bar is drawn by rich")
    net = network()
    x = torch.randn(4, 6, dtype=F64)
    quiet = jactri.jacobian(net, x, strategy=mode, chunk_size=2)
    assert capfd.readouterr() == ("", "")
    shown = jactri.jacobian(net, x, strategy=mode, chunk_size=2, progress=True)
    out, err = capfd.readouterr()
    assert not out
    assert "jacobian" in err
    assert "/" in err  # so many of so many chunks
    assert_close(shown, quiet, F64)


def test_tqdm_where_rich_is_missing(monkeypatch, capfd):
    """And an error that says what to install where neither is there."""
    steps = []

    class Bar:
        def __init__(self, total, desc):
            steps.append(total)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

        def update(self, n):
            steps.append(n)

    x = torch.randn(2, 6, dtype=F64)
    for name in [m for m in sys.modules if m == "rich" or m.startswith("rich.")]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "tqdm", type("tqdm", (), {"tqdm": Bar}))
    jactri.jacobian(network(), x, strategy="reverse-mode", chunk_size=2, progress=True)
    assert steps[0] == sum(steps[1:]) == len(steps) - 1 > 1
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="rich or tqdm"):
        jactri.jacobian(network(), x, progress=True)


def test_a_failure_under_the_bar_is_its_own(capfd):
    pytest.importorskip("rich", reason="the bar is drawn by rich")

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        jactri.jacobian(Broken.apply, torch.ones(3), progress=True)
