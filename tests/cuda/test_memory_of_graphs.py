"""What a compiled call copies beside its CUDA graph: the answer, once, also to ``out=``."""

import pytest
import torch

import jactri
from benchmarks.gpu.sizes import sized

aten = torch.ops.aten
WORKLOADS = {s.workload.name: s.workload for s in sized([])}


class Ops:
    """The ops on the device, with the bytes of what they return."""

    def __init__(self, device, monkeypatch):
        self.found, mode = [], type(device.mode)
        plain = mode.__torch_dispatch__

        def noted(self_, func, types, args=(), kwargs=None):
            made = plain(self_, func, types, args, kwargs)
            if isinstance(made, torch.Tensor) and made.device.type == "cuda":
                self.found.append((func, made.numel() * made.element_size()))
            return made

        monkeypatch.setattr(mode, "__torch_dispatch__", noted)

    def large(self, size):
        """Copies and new tensors of at least this many bytes since the last question."""
        found, self.found = self.found, []
        new = (aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default)
        return {
            "copies": sum(f in (aten.copy_.default, aten.clone.default) and n >= size for f, n in found),
            "new": sum((f in new or f is aten.clone.default) and n >= size for f, n in found),
        }  # fmt: skip


@pytest.mark.parametrize("name", ["W1-tanh", "W2", "W3", "W4", "W5"])
def test_out(name, device, monkeypatch):
    w = WORKLOADS[name]
    net, x = device.problem(w)
    made = jactri.compile(net, x, per_sample=True, engine="fx")
    out, other = (torch.empty(w.shape, device="cuda") for _ in range(2))
    size = out.numel() * out.element_size()
    made(x, out=out)
    assert "one CUDA graph" in repr(made) and not device.refused
    device.clear()
    ops = Ops(device, monkeypatch)
    for given in (out, out, other):
        assert made(x, out=given) is given
        assert ops.large(size) == {"copies": 1, "new": 0}
    assert not device.launches and not device.waits
    made(x)
    assert ops.large(size) == {"copies": 1, "new": 1}
    assert made.traces == 2  # without out=, and with it


def test_what_is_not_shown_is_not_copied(device, monkeypatch):
    net, x = device.problem(WORKLOADS["W3"])
    ops = Ops(device, monkeypatch)
    for shown in (False, True):
        made = jactri.compile(net, x, per_sample=True, return_output=shown, engine="fx")
        y = made(x)[0] if shown else net(x)
        ops.large(0)
        made(x)
        assert ops.large(y.numel() * y.element_size())["copies"] == 1 + shown
