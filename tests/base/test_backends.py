"""Which backend runs: oneDNN or torch.mm, right with either; Triton where it can run, refused elsewhere."""

import os
import subprocess
import sys
import types

import pytest
import torch

import jactri
from jactri._src.base import backends
from jactri.kernels import support


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


def run_in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**kept, **environment}
    )  # fmt: skip


def test_a_cpu_user_never_imports_triton():
    code = """
import sys, torch, jactri
net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3), torch.nn.Softmax(-1))
jactri.jacobian(net, torch.randn(7, 4), per_sample=True)
jactri.explain(net, torch.randn(7, 4))
sys.exit("triton" in sys.modules)
"""
    done = run_in_a_process(code)
    assert done.returncode == 0, done.stderr


def test_triton_on_a_cpu_tensor_is_refused(net):
    if support.interpreted():
        pytest.fail("the main suite runs without TRITON_INTERPRET")
    for call in (jactri.jacobian, jactri.explain):
        with pytest.raises(
            RuntimeError, match=r"needs inputs on a CUDA device, got cpu; pass backend='auto'"
        ):
            call(net, torch.randn(3, 96), backend="triton")
    x = torch.randn(3, 96, requires_grad=True)
    with pytest.raises(RuntimeError, match="needs inputs on a CUDA device"):
        jactri.jacobian_of(net(x), x, backend="triton")


@pytest.mark.parametrize("call", [jactri.jacobian, jactri.explain])
def test_an_unknown_backend_is_refused(net, call):
    with pytest.raises(
        ValueError, match="backend must be one of 'auto', 'torch', 'triton', got 'cuda'"
    ):
        call(net, torch.randn(3, 96), backend="cuda")


@pytest.mark.parametrize(
    "why", ["triton does not import (no module)", "triton 3.1.0 is older than 3.6"]
)
def test_without_triton_torch_computes_and_says_so(net, monkeypatch, why):
    monkeypatch.setattr(support, "missing", lambda: why)
    with pytest.raises(RuntimeError, match="pass backend='auto'") as error:
        jactri.jacobian(net, torch.randn(3, 96), backend="triton")
    assert why in str(error.value)
    assert not backends.kernels_on(torch.device("cuda"))
    jactri.jacobian(net, torch.randn(3, 96))


def test_an_old_triton_is_not_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.1.0"))
    assert support.missing.__wrapped__() == "triton 3.1.0 is older than 3.6"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "does not import" in support.missing.__wrapped__()


def test_the_interpreter_as_it_comes_computes_what_it_can():
    """Triton's own interpreter multiplies no bfloat16: float32 takes plain products there, bfloat16 goes to torch."""
    code = """
import torch, jactri
torch.manual_seed(0)
from torch.nn import Linear, Sequential, Tanh
net = Sequential(Linear(9, 20), Tanh(), Linear(20, 20), Tanh(), Linear(20, 3))
x = torch.randn(5, 9)
got = jactri.jacobian(net, x, per_sample=True, backend="triton")
torch.testing.assert_close(got, jactri.jacobian(net, x, per_sample=True, backend="torch"))
assert "chain (ieee" in str(jactri.explain(net, x, per_sample=True, backend="triton"))
net, x = net.bfloat16(), x.bfloat16()
got = jactri.jacobian(net, x, per_sample=True, backend="triton")
torch.testing.assert_close(got, jactri.jacobian(net, x, per_sample=True, backend="torch"))
assert "bfloat16 has no kernels" in str(jactri.explain(net, x, per_sample=True, backend="triton"))
"""
    done = run_in_a_process(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
