"""What decides between ways to run kernels is the device's time, which the host's must not hide."""

import time
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from jactri._src.base import backends
from jactri._src.device import chooser
from jactri.kernels.support import Unfit


class Queue:
    """A device that runs what is queued, one after the other, on a clock of its own."""

    def __init__(self, monkeypatch):
        self.host = self.free = 0.0
        for name in ("_sleep", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name), raising=False)
        queue = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(queue.free, queue.host)

            def synchronize(self):
                queue.host = max(queue.host, self.at)

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(time, "perf_counter", lambda: self.host)

    def queue(self, host: float, device: float) -> None:
        """A launch that takes the host and the device so many seconds."""
        self.host += host
        self.free = max(self.free, self.host) + device

    def _sleep(self, cycles):
        self.free = max(self.free, self.host) + cycles / 1.7e9

    def synchronize(self):
        self.host = max(self.host, self.free)


@pytest.mark.parametrize("launches", [1, 4])
@pytest.mark.parametrize(("host", "device"), [(2e-5, 2e-6), (1e-5, 3e-3)])
def test_the_time_of_the_device_is_what_is_measured(monkeypatch, launches, host, device):
    queue = Queue(monkeypatch)

    def call():
        for _ in range(launches):
            queue.queue(host, device)

    assert chooser._milliseconds(call) == pytest.approx(1e3 * launches * device)


@dataclass(frozen=True)
class Kind:
    """Of a problem that three kernels can run."""

    name: str = "any"
    dtype = torch.float32
    device = torch.device("cpu")
    precision, flops, bytes = "fp32", 0.0, 0.0

    def offers(self):
        return [(((name, 1),), (None,), ("",)) for name in ("wrong", "fast", "slow")]

    def plain(self):
        return {}


class Problem:
    """The number 1, by kernels of which ``unfit`` do not run; ``launched`` tells which were tried."""

    def __init__(self, value=1.0):
        self.value, self.unfit, self.launched = value, set(), []

    def kind(self):
        return Kind()

    def timed(self):
        return self

    few = timed

    def torch(self, dtype=None):
        return torch.full((2,), self.value, dtype=dtype or torch.float32)

    def launch(self, way, out=None):
        ((name, _),) = way.kernels
        self.launched.append(name)
        if name in self.unfit:
            raise Unfit("no registers left")
        return self.torch() * (1.001 if name == "wrong" else 1.0)


@pytest.fixture
def problem(monkeypatch):
    """One for which the wrong kernel is the fastest; torch is in between the others."""
    times = {"wrong": 1.0, "fast": 2.0, "torch": 3.0, "slow": 4.0}

    def milliseconds(call):
        call()
        way = call.args[0] if isinstance(call, partial) else chooser.TORCH
        return times[str(way)]

    monkeypatch.setattr(chooser, "_tunable", lambda kind: True)
    monkeypatch.setattr(chooser, "_milliseconds", milliseconds)
    monkeypatch.setattr(backends, "_warned", True)
    chooser.forget()
    yield Problem()
    chooser.forget()


def test_the_fastest_that_is_right_runs(problem):
    assert torch.equal(chooser.run(problem), torch.ones(2))
    assert problem.launched == ["wrong", "fast", "fast", "slow", "slow", "fast"]
    assert chooser.described(Kind()) == ("triton", "fast: 2 ms measured, torch 3 ms")


@pytest.mark.parametrize("asked", ["auto", "triton"])
def test_what_was_wrong_does_not_take_the_place_of_what_no_longer_fits(problem, asked):
    with backends.use(asked):
        chooser.run(problem)
        problem.unfit.add("fast")
        problem.launched.clear()
        made = chooser.run(problem)
        assert (made is None) == (asked == "auto")  # torch is faster than the one that is left
        assert "wrong" not in problem.launched
        problem.unfit.add("slow")
        assert chooser.run(problem) is None
        problem.launched.clear()
        assert chooser.run(problem) is None
    assert not problem.launched or asked == "auto"


def test_a_wrong_kernel_is_not_taken_where_data_are_no_measure(problem):
    """Once it was found wrong: neither inside a CUDA graph nor for data that are not finite."""
    chooser.run(problem)
    chooser._choices.clear()
    other = Problem(float("nan"))
    assert chooser.run(other).isnan().all()
    assert other.launched == ["fast"] and not chooser._choices
