"""The workloads that ask for something else than a Jacobian, at tiny sizes: every contender is right. No times."""

import json

import pytest
import torch

from benchmarks import checks, operators, peers, peers_jax, workloads
from benchmarks.gpu.items import main
from benchmarks.gpu.sizes import distance, problem, sized, truth

NAMES = list(workloads.OPERATORS_OF)


@pytest.fixture(params=NAMES)
def tiny(request, monkeypatch):
    """A workload at a few samples; the wide network is there at a sixteenth of its width."""
    if request.param == "W8-wide":
        return workloads._laplacian("W8-wide", (5, 48, 48, 32, 32, 1), 2.0, 3)
    (w,) = workloads.select([request.param])
    return workloads.resized(w, 3)


def test_every_contender_is_right(tiny):
    found, left_out = peers.peers_of(tiny)
    assert found[0].name == "jactri" and not left_out
    assert {"jactri", "torch"} <= {p.kind for p in found}
    for peer in found:
        if peer.built and tiny.name != "W8-divergence":
            continue  # takes long to compile; each operator is compiled in test_compiled_operators.py
        call = peers.contender(tiny, peer)
        call()  # memory that is kept is written again
        assert checks.error_of(tiny, call()) <= checks.TOLERANCE, peer.name


def test_a_wrong_answer_is_not_timed(tiny):
    (peer,) = (p for p in peers.peers_of(tiny)[0] if p.name == "jactri")
    right = tiny.operator.flat(peers.contender(tiny, peer)())
    with pytest.raises(checks.WrongResult, match="of the largest entry"):
        checks.error_of(tiny, right * 1.001)
    with pytest.raises(checks.WrongResult, match="shape"):
        checks.error_of(tiny, right[:2])


def test_the_truth_of_the_laplacian_is_a_closed_form(monkeypatch):
    net = torch.nn.Sequential(torch.nn.Linear(3, 1, dtype=torch.float64), torch.nn.Tanh())
    x = torch.randn(4, 3, dtype=torch.float64)
    y, w = net(x), net[0].weight
    want = torch.cat([(1 - y * y) * w, -2 * y * (1 - y * y) * w.square().sum()], 1)
    torch.testing.assert_close(operators.LAPLACIAN.truth(net, x), want)


def test_work_at_another_size():
    for name in NAMES:
        (w,) = workloads.select([name])
        twice = workloads.resized(w, 2 * w.samples)
        assert twice.samples == 2 * w.samples and f"N={2 * w.samples}" in twice.title
        assert w.flops < twice.flops <= 4 * w.flops and twice.shape[0] == 2 * w.samples
    lap = workloads.select(["W8-laplacian"])[0]
    # forward pass 3-128-128-128-1, and four columns through all but the first layer
    products = 3 * 128 + 2 * 128 * 128 + 128 + 4 * (2 * 128 * 128 + 128)
    assert lap.flops == 4096 * 2 * products


@pytest.mark.parametrize("name", [n for n in NAMES if n != "W8-wide"])
def test_truth_on_a_gpu_is_of_the_first_samples(name):
    (size,) = (s for s in sized([name], 1 << 20) if s.name == name)
    w = workloads.resized(size.workload, 5)
    net, x = problem(w, torch.device("cpu"))
    want = truth(w, net, x, 2)
    assert want.dtype is torch.float64 and want.shape[0] == 2
    assert distance(w.operator.jactri(net, x), want, w.operator) < 1e-5


@pytest.mark.parametrize("name", [n for n in NAMES if n != "W8-wide"])
def test_the_gpu_command_takes_them(name, tmp_path, traced_only):
    file = tmp_path / "r.json"
    for kind in ("bench", "accuracy", "capture"):
        words = [f"{kind}:{name}", "--device", "cpu", "--shrink", "4000", "--json", str(file)]
        assert main(words) == 0 and json.loads(file.read_text())["results"]


@pytest.mark.skipif(not peers_jax.installed(), reason="needs jax")
@pytest.mark.parametrize("operator", peers.JAX_OPERATORS, ids=lambda o: o.name)
def test_jax_is_right_too(operator):
    w = workloads.resized(next(w for w in workloads.OPERATORS if w.operator == operator), 3)
    assert (
        checks.error_of(w, peers.contender(w, peers.JAX_OPERATORS[operator])()) <= checks.TOLERANCE
    )
