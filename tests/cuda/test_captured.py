"""Compiled calls as CUDA graphs: when they are captured again, and what happens where a capture is refused."""

import pytest
import torch
from torch import nn

import jactri
from jactri._src.compile import captured


@pytest.fixture
def captures(monkeypatch):
    """A list that grows by each capture."""
    found, capture = [], captured.Captured._capture

    def counted(self, held):
        found.append(self)
        return capture(self, held)

    monkeypatch.setattr(captured.Captured, "_capture", counted)
    return found


def compiled(net, *shape, **options):
    return jactri.compile(
        net, torch.empty(shape, device="cuda"), per_sample=True, engine="fx", **options
    )


def network(device):
    return device.net(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)))


def test_signatures_and_weights_are_captured(device, captures):
    net = network(device)
    made = compiled(net, 8, 12)
    for n, count in ((8, 1), (3, 2), (8, 2), (3, 2)):
        assert made(torch.empty(n, 12, device="cuda")).shape == (n, 4, 12)
        assert len(captures) == count
    with torch.no_grad():
        net[0].weight.mul_(2)
    made(torch.empty(8, 12, device="cuda"))
    assert len(captures) == 2  # read where it lies
    net[0].weight = nn.Parameter(torch.empty(16, 12, device="cuda"))
    for n, count in ((8, 3), (8, 3), (3, 4), (3, 4)):
        made(torch.empty(n, 12, device="cuda"))
        assert len(captures) == count
    assert made.traces == 2 and not device.refused


def test_inputs_on_another_device(device, captures):
    """There, too, are its weights: it is another function, and on a CPU no CUDA graph."""
    made = compiled(network(device), 8, 12)
    assert "one CUDA graph" in repr(made) and made.explain().cuda_graph
    made.func[0], made.func[2] = nn.Linear(12, 16), nn.Linear(16, 4)
    made(torch.empty(8, 12))
    assert made.traces == 2 and len(captures) == 1
    assert "CUDA graph" not in repr(made)


def test_an_engine_of_its_own_events(device, captures):
    made = compiled(network(device), 8, 12, create_graph=True)
    assert made.graph is not None and not captures  # autograd's backward is another call


def test_what_waits_is_not_captured(device, captures, caplog, monkeypatch):
    """torch.linalg.solve asks whether its matrix is singular."""

    def refused(found):
        if device.capturing:
            raise RuntimeError(f"{found.op}: operation not permitted when stream is capturing")

    monkeypatch.setattr(device, "_refuse", refused)
    matrix = device.net(nn.Linear(4, 4)).weight
    made = compiled(lambda x: torch.linalg.solve(matrix, x.T).T, 5, 4)
    assert made.graph is not None and "CUDA graph" not in repr(made)
    assert "not captured as a CUDA graph: _linalg_check_errors: operation not" in caplog.text
    assert made(torch.empty(5, 4, device="cuda")).shape == (5, 4, 4)
    assert made.traces == len(captures) == 1
