"""Forward pass and accumulation as one CUDA graph, for repeated calls at fixed shapes."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .constants import constants
from .held import Held
from .hooks import check_hooks
from .memory import free_bytes
from .operators.jobs import Ends, Job
from .tape import Stale, Unrecordable, tensors

_WARM_UPS = 3
"""Runs before the capture: kernels are compiled, tuned and loaded, which a capture forbids."""


class Graphed:
    """One captured call; its inputs stay in place between replays.

    Its answer is written to the tensors ``out`` that it was captured for, for as long as they are those of every call;
    then, and without ``out``, to memory of its own, from where it is copied.
    """

    def __init__(self, job: Job, xs, out: Any):
        device = next(x.device for x in xs if x.is_cuda)
        if any(x.device != device for x in xs):
            raise Unrecordable("the inputs lie on several devices")
        # asking for the free memory is not possible in a capture
        job = job.within(max(free_bytes(device) // 2, 1))
        self.job, self.inputs = job, [x.detach().clone() for x in xs]
        self._device, self._lock, self._done = device, threading.Lock(), None
        self.how = "replays a CUDA graph"
        self.held = Held(job.func, lambda: job.forward(tuple(self.inputs)))
        if out is not None:  # checked, and written to for the first time
            job.rows(job.forward(tuple(self.inputs)), out)
        self._capture(out if all(t.device == device for t in tensors(out)) else None)

    def _capture(self, out: Any) -> None:
        job, device = self.job, self._device

        def run():
            ends = job.forward(tuple(self.inputs))
            check_hooks(job, ends)
            return ends, job.rows(ends, out)

        with torch.cuda.device(device):
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    run()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    ends, rows = run()
            except RuntimeError as error:
                raise Unrecordable(f"CUDA could not capture it ({error})") from error
        self.graph, self.ends = graph, job.lean(ends)
        self.shown = tensors(ends.result) if job.shows_output else []
        # addresses, not tensors: a caller may drop what was ``out``
        self.rows, self._places = (rows, None) if out is None else ([], _places(tensors(out)))
        self._constants = constants()  # which the graph reads, wherever else they are kept
        self.held.settle()

    def __call__(self, xs, given: list[Tensor]) -> tuple[Ends, list[Tensor]]:
        """The forward pass's ends, and the tensors of the answer: ``given``, or new ones.

        Raises Stale if something was replaced.
        """
        changed = self.held.changed()
        if changed is not None:
            raise Stale(changed)
        with self._lock:
            if self._places is not None and self._places != _places(given):
                try:
                    self._capture(None)
                except Unrecordable as error:
                    raise Stale(f"other tensors for out=: {error}") from error
            return self._replayed(xs, given)

    @torch.no_grad()
    def _replayed(self, xs, given: list[Tensor]) -> tuple[Ends, list[Tensor]]:
        stream = torch.cuda.current_stream(self._device)
        if self._done is not None:  # another thread's stream may still read the buffers
            stream.wait_event(self._done)
        for static, x in zip(self.inputs, xs, strict=True):
            static.copy_(x)
        self.graph.replay()
        ends, rows = self.ends, given or [block.clone() for block in self.rows]
        if self.shown:
            shown = [t.detach().clone() for t in self.shown]
            ends = ends._replace(
                result=tuple(shown) if isinstance(ends.result, tuple) else shown[0]
            )
        if given and self._places is None:
            for dest, block in zip(given, self.rows, strict=True):
                dest.copy_(block)
        self._done = stream.record_event()
        return ends, rows


def _places(given: list[Tensor]) -> list[int]:
    """Where tensors lie; plans are kept by their shapes and strides."""
    return [t.data_ptr() for t in given]
