"""The choice between oneDNN and torch.mm: right with either, measured once, and never needed."""

import pytest
import torch

import jactri
from jactri import backends


@pytest.fixture
def net():
    return torch.nn.Sequential(torch.nn.Linear(96, 160), torch.nn.Tanh(), torch.nn.Linear(160, 64))


def relative_error(net, x, **kw):
    truth = jactri.jacobian(net.double(), x.double(), per_sample=True, strategy="reverse-mode")
    got = jactri.jacobian(net.float(), x.float(), per_sample=True, **kw)
    return ((got - truth).abs().max() / truth.abs().max()).item()


def fixed(onednn):
    found = backends.Probe(1.0, 2.0 if onednn else 0.5, "fixed by a test")
    assert found.use_onednn == onednn
    return found


@pytest.mark.skipif(backends._linear_pointwise() is None, reason="this torch has no oneDNN product")
@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_onednn_products_are_used_and_right(net, strategy, monkeypatch):
    calls = []

    def counted(a, b, real=backends._onednn):
        calls.append(a.shape)
        return real(a, b)

    monkeypatch.setattr(backends, "_probe", fixed(True))
    monkeypatch.setattr(backends, "_onednn", counted)
    assert relative_error(net, torch.randn(32, 96), strategy=strategy) < 1e-5
    assert len(calls) == 1


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_torch_mm_serves_without_onednn(net, strategy, monkeypatch):
    monkeypatch.setattr(backends, "_probe", None)
    monkeypatch.setattr(backends, "_linear_pointwise", lambda: None)
    monkeypatch.setattr(backends, "_onednn", lambda a, b: pytest.fail("oneDNN was called"))
    assert relative_error(net, torch.randn(32, 96), strategy=strategy) < 1e-5
    assert "torch.mm" in backends.probe().reason


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, of restoring its flags
def test_mkldnn_switched_off_by_the_user_is_respected(net, monkeypatch):
    monkeypatch.setattr(backends, "_probe", fixed(True))
    monkeypatch.setattr(backends, "_onednn", lambda a, b: pytest.fail("oneDNN was called"))
    with torch.backends.mkldnn.flags(enabled=False):
        assert relative_error(net, torch.randn(32, 96)) < 1e-5


def test_the_probe_runs_once(monkeypatch):
    monkeypatch.setattr(backends, "_probe", None)
    first = backends.probe()
    assert backends.probe() is first
    assert first.reason


@pytest.mark.parametrize(
    ("device", "dtype", "flops", "chosen"),
    [
        ("cuda", torch.float32, 1e9, "torch.mm"),
        ("cpu", torch.float64, 1e9, "torch.mm"),
        ("cpu", torch.float32, 10, "torch.mm"),
        ("cpu", torch.float32, 1e9, "oneDNN"),
    ],
)
def test_explain_tells_the_choice(device, dtype, flops, chosen, monkeypatch):
    monkeypatch.setattr(backends, "_probe", fixed(True))
    name, why = backends.product_choice(device, dtype, flops)
    assert name == chosen and why


def test_importing_jactri_does_not_import_triton():
    import subprocess
    import sys

    code = "import jactri, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
