"""Products that leave out what a ReLU set to zero: the same Jacobians, where the planner says that it pays."""

import itertools

import pytest
import torch
from common import F64
from tolerances import assert_close
from torch import nn

import jactri
from jactri import contraction, planner, planning


@pytest.fixture
def always(monkeypatch):
    """Gather from the first seed and multiply-add on."""
    monkeypatch.setattr(planner, "FEWEST_ACTIVE", 1)
    monkeypatch.setattr(planner, "LEAST_ACTIVE", 1)
    monkeypatch.setattr(planning, "_plans", {})


def network(*widths, dtype=F64):
    torch.manual_seed(0)
    layers = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
@pytest.mark.parametrize("shape", [(3, 7), (1, 7), (2, 4, 7), (7,)], ids=str)
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"create_graph": True}], ids=str)
def test_results_are_the_same(strategy, shape, options):
    net = network(7, 20, 30, 5)
    x = torch.randn(shape, dtype=F64)
    told = str(jactri.explain(net, x, strategy=strategy))
    assert "active units" in told
    truth = torch.autograd.functional.jacobian(net, x)
    assert_close(jactri.jacobian(net, x, strategy=strategy, **options), truth, F64, length=30)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("bias", [-100.0, 100.0, float("nan")])
def test_none_or_all_active(bias):
    net = network(7, 20, 30, 5)
    with torch.no_grad():
        net[2].bias.fill_(bias)
    x = torch.randn(3, 7, dtype=F64)
    for strategy in ("forward-mode", "reverse-mode"):
        ours = jactri.jacobian(net, x, strategy=strategy)
        truth = torch.autograd.functional.jacobian(net, x)
        torch.testing.assert_close(ours, truth, equal_nan=True)


def test_half_of_the_flops_are_planned():
    net = network(300, 1200, 1200, 300, dtype=torch.float32)
    plan = jactri.explain(net, torch.randn(1, 300), per_sample=True, strategy="reverse-mode")
    active = [s for s in plan.steps if "active" in s.structure]
    assert [s.flops for s in active] == [300 * 1200 * 1200]
    assert [s.structure for s in plan.steps if s.flops == 2 * 300 * 300 * 1200] == ["shared matrix"]
    tanh = nn.Sequential(*[nn.Tanh() if isinstance(m, nn.ReLU) else m for m in net])
    assert "active" not in str(jactri.explain(tanh, torch.randn(1, 300), per_sample=True))


@pytest.mark.usefixtures("always")
def test_dense_rows_are_multiplied_whole(monkeypatch):
    net = network(7, 20, 30, 5)
    with torch.no_grad():
        for k in (0, 2):
            net[k].bias.fill_(100.0)
    whole = []
    real = contraction.MatMul._multiply

    def counted(self, t, transposed):
        whole.append(1)
        return real(self, t, transposed)

    monkeypatch.setattr(contraction.MatMul, "_multiply", counted)
    jactri.jacobian(net, torch.randn(3, 7, dtype=F64), strategy="reverse-mode")
    assert len(whole) == 2
