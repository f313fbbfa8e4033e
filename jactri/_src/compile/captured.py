"""What an engine built as one CUDA graph, replayed at each call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from .engines import Run

_log = logging.getLogger("jactri")

_WARM_UPS = 3
"""Runs before a capture: kernels are compiled, tuned and loaded, which a capture forbids."""


class Captured:
    """A function of a list of tensors as one CUDA graph.

    The first ``inputs`` tensors are copied to the memory of the graph, the ``written`` ones after them from it; the
    rest, weights, are read where they lie, and captured again where they moved.
    """

    def __init__(self, run: Run, like: Sequence[Tensor], inputs: int, written: int):
        self.run, self._inputs, self._own = run, inputs, inputs + written
        self._device, self._lock, self._done = like[0].device, threading.Lock(), None
        self.refused = False
        self._static = [_copied(t) for t in like[: self._own]]
        self._capture(list(like[self._own :]))

    def _capture(self, held: list[Tensor]) -> None:
        given = [*self._static, *(t.detach() for t in held)]
        with torch.cuda.device(self._device):
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self.run(list(given))
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # what other threads do with the device meanwhile is no part of it, and nothing that it forbids
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._results = list(self.run(list(given)))
        self._graph, self._held = graph, given[self._own :]  # whose memory the graph reads
        self._at = [t.data_ptr() for t in held]

    def __call__(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        if self.refused or torch.cuda.is_current_stream_capturing():
            return self.run(tensors)
        with self._lock, torch.no_grad():
            if self.refused:
                return self.run(tensors)
            held = tensors[self._own :]
            if [t.data_ptr() for t in held] != self._at:
                try:
                    self._capture(held)
                except RuntimeError as error:
                    _log.warning("not captured again as a CUDA graph: %s", str(error))
                    self.refused = True
                    self._graph = self._done = None  # with its memory
                    self._static, self._results, self._held = [], [], []
                    return self.run(tensors)
            return self._replayed(tensors)

    def _replayed(self, tensors: list[Tensor]) -> list[Tensor]:
        stream = torch.cuda.current_stream(self._device)
        if self._done is not None:  # another thread's stream may still read the buffers
            stream.wait_event(self._done)
        for k in range(self._inputs):
            _copy(self._static[k], tensors[k])
        self._graph.replay()
        found = [_copied(t) for t in self._results]
        for k in range(self._inputs, self._own):
            _copy(tensors[k], self._static[k])
        self._done = stream.record_event()
        return found


def captured(
    run: Run, graph: fx.GraphModule, like: Sequence[Tensor], inputs: int, written: int
) -> Run:
    """``run``, which runs ``graph``, as one CUDA graph; on a CPU, and where CUDA refuses, itself."""
    devices = _devices(graph, like)
    if all(d.type != "cuda" for d in devices):
        return run
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        _log.info("not captured as a CUDA graph: it is on several devices, %s", names)
        return run
    try:
        with torch.no_grad():
            return Captured(run, like, inputs, written)
    except RuntimeError as error:  # what it raises by itself, it raises at the next call, too
        # not the error itself: its frames hold the graph, and whoever keeps the record would keep the memory
        _log.warning("not captured as a CUDA graph: %s", str(error))
        return run


def _devices(graph: fx.GraphModule, like: Sequence[Tensor]) -> set[torch.device]:
    values = [n.meta.get("val") for n in graph.graph.nodes]
    return {t.device for t in (*like, *values) if isinstance(t, Tensor)}


def _copied(t: Tensor) -> Tensor:
    """A copy with the same strides, also of a tensor whose entries share memory."""
    made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    _copy(made, t)
    return made


def _copy(to: Tensor, t: Tensor) -> None:
    """Write ``t`` to a tensor of the same shape and strides."""
    to, t = to.detach(), t.detach()
    if _shares(
        t
    ):  # of which no copy is defined: all that lies between its first and its last entry is copied
        length = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        to, t = (a.as_strided((length,), (1,), a.storage_offset()) for a in (to, t))
    to.copy_(t)


def _shares(t: Tensor) -> bool:
    """Whether entries of a tensor may lie in the same memory, as those of an expanded one, or of windows, do."""
    if t.numel() == 0:
        return False
    end = 0
    for stride, n in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride <= end:
            return True
        end += (n - 1) * stride
    return False
