"""Forward pass and accumulation as one CUDA graph, for repeated calls at fixed shapes."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor

from .memory import free_bytes
from .operators.jobs import Ends, Job
from .tape import Stale, Unrecordable

_WARM_UPS = 3
"""Runs before the capture: kernels are compiled, tuned and loaded, which a capture forbids."""

_DEPTH = 4
"""How many callables in callables are searched for tensors."""


class Held:
    """The tensors and modules that a callable holds, as they are now: whether one was replaced, or a mode changed."""

    def __init__(self, func):
        self._tensors: list[tuple[dict, str, Tensor, int]] = []
        self._modes: list[tuple[torch.nn.Module, bool]] = []
        self._seen: set[int] = set()
        self._search(func, _DEPTH)

    def _search(self, thing, depth: int) -> None:
        if depth == 0 or id(thing) in self._seen:
            return
        self._seen.add(id(thing))
        if isinstance(thing, torch.nn.Module):
            for module in thing.modules():
                self._modes.append((module, module.training))
                for where in (module._parameters, module._buffers):
                    self._entries(where)
        elif isinstance(thing, functools.partial):
            for inner in (thing.func, *thing.args, *thing.keywords.values()):
                self._search(inner, depth - 1)
        elif isinstance(thing, (list, tuple)):
            for inner in thing:
                self._search(inner, depth - 1)
        elif isinstance(thing, dict):
            self._entries(thing)
            for inner in thing.values():
                self._search(inner, depth - 1)
        elif hasattr(thing, "__self__") and hasattr(thing, "__func__"):
            self._search(thing.__self__, depth - 1)
            self._search(thing.__func__, depth - 1)
        elif hasattr(thing, "__code__"):
            names = thing.__code__.co_names
            self._entries(thing.__globals__, names)
            for name in names:
                self._search(thing.__globals__.get(name), depth - 1)
            for cell in thing.__closure__ or ():
                where = _Cell(cell)
                self._entries(where)
                self._search(where.get("contents"), depth - 1)
        elif hasattr(thing, "__dict__") and not isinstance(thing, type):
            self._entries(vars(thing))
            for inner in list(vars(thing).values()):
                self._search(inner, depth - 1)

    def _entries(self, where, names=None) -> None:
        for name in list(where) if names is None else names:
            value = where.get(name)
            if isinstance(value, Tensor):
                self._tensors.append((where, name, value, value.data_ptr()))

    def changed(self) -> str | None:
        """What is no longer as it was, or None."""
        for where, name, tensor, pointer in self._tensors:
            now = where.get(name)
            if now is not tensor or now.data_ptr() != pointer:
                return f"the tensor {name!r}"
        for module, training in self._modes:
            if module.training is not training:
                return f"the mode of {type(module).__name__}"
        return None


class _Cell:
    """A closure's cell, looked at as a dictionary of one entry."""

    def __init__(self, cell):
        self._cell = cell

    def __iter__(self):
        return iter(("contents",))

    def get(self, name):
        try:
            return self._cell.cell_contents
        except ValueError:  # not filled yet
            return None


class Graphed:
    """One captured call; its inputs and results stay in place between replays."""

    def __init__(self, job: Job, xs, out: Any):
        device = next(x.device for x in xs if x.is_cuda)
        if any(x.device != device for x in xs):
            raise Unrecordable("the inputs lie on several devices")
        # asking for the free memory is not possible in a capture
        job = job.within(max(free_bytes(device) // 2, 1))
        self.job, self.inputs = job, [x.detach().clone() for x in xs]
        self.held, self._lock, self._done = Held(job.func), threading.Lock(), None
        self.how = "replays a CUDA graph"
        if out is not None:  # checked, and written to for the first time
            job.rows(job.forward(tuple(self.inputs)), out)

        def run():
            ends = job.forward(tuple(self.inputs))
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
