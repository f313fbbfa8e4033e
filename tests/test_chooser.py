"""What decides between ways to run kernels is the device's time, which the host's must not hide."""

import time

import pytest
import torch

from jactri import chooser


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
