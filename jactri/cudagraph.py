"""Forward pass and accumulation as one CUDA graph, for repeated calls at fixed shapes."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .held import Held
from .hooks import check_hooks
from .memory import free_bytes
from .operators.jobs import Ends, Job
from .tape import Stale, Unrecordable

_WARM_UPS = 3
"""Runs before the capture: kernels are compiled, tuned and loaded, which a capture forbids."""


class Graphed:
    """One captured call; its inputs and results stay in place between replays."""

    def __init__(self, job: Job, xs, out: Any):
        device = next(x.device for x in xs if x.is_cuda)
        if any(x.device != device for x in xs):
            raise Unrecordable("the inputs lie on several devices")
        # asking for the free memory is not possible in a capture
        job = job.within(max(free_bytes(device) // 2, 1))
        self.job, self.inputs = job, [x.detach().clone() for x in xs]
        self._lock, self._done = threading.Lock(), None
        self.how = "replays a CUDA graph"
        self.held = Held(job.func, lambda: job.forward(tuple(self.inputs)))
        if out is not None:  # checked, and written to for the first time
            job.rows(job.forward(tuple(self.inputs)), out)

        def run():
            ends = job.forward(tuple(self.inputs))
            check_hooks(job, ends)
            return ends, job.rows(ends, None)

        with torch.cuda.device(device):
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    run()
            current.wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph):
                    self.ends, self.rows = run()
            except RuntimeError as error:
                raise Unrecordable(f"CUDA could not capture it ({error})") from error
        self.held.settle()

    def __call__(self, xs, given: list[Tensor]) -> tuple[Ends, list[Tensor]]:
        """The forward pass's ends, and the tensors of the answer: ``given``, or new ones.

        Raises Stale if something was replaced.
        """
        changed = self.held.changed()
        if changed is not None:
            raise Stale(changed)
        with self._lock, torch.no_grad():
            stream = torch.cuda.current_stream(self.inputs[0].device)
            if self._done is not None:  # another thread's stream may still read the buffers
                stream.wait_event(self._done)
            for static, x in zip(self.inputs, xs, strict=True):
                static.copy_(x)
            self.graph.replay()
            result = self.ends.result
            if isinstance(result, Tensor):
                result = result.detach().clone()
            elif isinstance(result[0], Tensor):
                result = tuple(r.detach().clone() for r in result)
            if given:
                for dest, block in zip(given, self.rows, strict=True):
                    dest.copy_(block)
                rows = given
            else:
                rows = [block.clone() for block in self.rows]
            self._done = stream.record_event()
        return self.ends._replace(result=result), rows
