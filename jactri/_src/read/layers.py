"""Which layer every node of autograd's graph comes from, noted while the function runs and somebody looks.

Somebody looks who has a torch profiler on, sets ``JACTRI_NVTX=1``, or calls `jactri.profile`. While nobody does,
nothing is noted and no range opened: `watching` is asked where the function runs and where its graph is read.
"""

from __future__ import annotations

import inspect
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from torch.autograd import _get_sequence_nr, _profiler_enabled
from torch.nn import Module
from torch.nn.modules import module as modules

NVTX = os.environ.get("JACTRI_NVTX", "0") not in ("", "0")
"""Whether to push NVTX ranges where torch's profiler is off, as Nsight and proton need them. Read at the import."""

session_now: ContextVar = ContextVar("session", default=None)
"""The `ranges.Session` that measures what runs, or None."""

_thread = threading.local()


def watching() -> bool:
    """Whether anybody looks at what runs."""
    return _profiler_enabled() or NVTX or session_now.get() is not None


class Layers:
    """Which layer made an autograd node, for all nodes that are made in this context, in this thread.

    A call of a module covers the sequence numbers of the nodes that it makes; a node belongs to the innermost one.
    Names are paths within ``func`` (a module or its method, or a function that holds modules in variables), and of
    modules that are not found there, within the outermost one that is called, under its class name.
    """

    def __init__(self, func: Callable | None = None):
        self._names: dict[Module, str] = {}
        self._open: list[tuple[Module | None, str]] = [(None, "")]
        self._starts, self._layers = [0], [""]
        self._thread = threading.get_ident()  # sequence numbers are counted by thread
        for variable, root in _roots(func):
            self._add(root, variable)

    def _add(self, root: Module, prefix: str) -> None:
        for path, part in root.named_modules():
            kind = type(part).__name__
            where = ".".join(p for p in (prefix, path) if p)
            self._names.setdefault(part, kind if where in ("", kind) else f"{where} {kind}")

    def __enter__(self) -> Layers:
        self._hooks = [
            modules.register_module_forward_pre_hook(self._enter),
            # also where a module raises: the function may go on without it
            modules.register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()
        self._mark("")
        self._names.clear()  # what is kept for the reader must not keep models alive
        self._open.clear()
        _thread.layers = self

    def _enter(self, part: Module, args) -> None:
        if threading.get_ident() != self._thread:
            return
        if part not in self._names:
            self._add(part, type(part).__name__)
        self._open.append((part, self._names[part]))
        self._mark(self._names[part])

    def _leave(self, part: Module, args, result) -> None:
        if threading.get_ident() != self._thread or not any(p is part for p, _ in self._open):
            return
        while self._open.pop()[0] is not part:
            pass
        self._mark(self._open[-1][1])

    def _mark(self, layer: str) -> None:
        self._starts.append(_get_sequence_nr())
        self._layers.append(layer)

    def of(self, node) -> str:
        """The layer of an autograd node, or an empty text."""
        return self._layers[bisect_right(self._starts, node._sequence_nr()) - 1]


def _roots(func) -> Iterator[tuple[str, Module]]:
    """The modules that a function is or holds in variables, with the names of those."""
    for root in (func, getattr(func, "__self__", None)):
        if isinstance(root, Module):
            yield "", root
    if inspect.isfunction(func):
        try:
            found = inspect.getclosurevars(func)
        except ValueError:  # a variable that is not set yet
            return
        for name, value in {**found.globals, **found.nonlocals}.items():
            if isinstance(value, Module):
                yield name, value


def noted() -> Layers | None:
    """The layers of the function that this thread ran last while somebody looked, or in `named_layers`."""
    session = session_now.get()
    return getattr(_thread, "layers", None) if session is None or session.named else None
