"""Values that torch.utils.checkpoint computes anew whenever they are read: a segment at a time, and each of them once.

A checkpointed segment leaves promises with autograd's nodes. Whoever takes one up runs the segment again: for all that
is read in the same backward pass or in the same group (see `torch.utils.checkpoint.GraphExecGroup`), or, outside of
both, for this one value. So each graph that is read has a group, in which its values are read and its nodes are called.
In a group of torch's a value may be read once, and lasts until then; in this one all that a segment made lasts until
another segment is asked for. So a segment runs once when a graph is read, and once in a sweep, and its values are there
while the sweep is in it, as in a backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from types import CodeType
from typing import Any, TypeVar

from torch._C import _get_graph_exec_group, _set_graph_exec_group

from ...kernels.support import Factor
from .classes import plain

T = TypeVar("T")

_CHECKPOINT = "torch.utils.checkpoint"
_LOOKS_UP = {
    "_checkpoint_hook": ("unpack_hook", {"frame", "holder", "ret"}),
    "_recomputation_hook": ("pack_hook", {"target_frame"}),
}
"""By the class of torch's hooks: the function that looks a group up, and its variables that tell for what."""


class _Group:
    """What torch looks up in the dictionaries of each segment, and so is told, by its hash, of what happens to them."""

    __slots__ = ("_before", "_segments", "_taken", "reads")

    def __init__(self):
        self.reads = 0
        """How often a segment was asked for a value."""
        self._segments: dict[Any, bool] = {}  # last used last; whether they began to run
        self._taken: tuple[Any, Any] | None = None
        self._before: list[Any] = []

    def __enter__(self) -> None:
        self._before.append(_get_graph_exec_group())
        _set_graph_exec_group(self)

    def __exit__(self, kind, *_) -> None:
        _set_graph_exec_group(self._before.pop())
        if kind is not None:  # a segment may have run in part
            self.forget()

    def __hash__(self) -> int:
        at = sys._getframe(1)
        if at.f_code.co_name == "unpack_hook":
            self.reads += 1
            self._is_read(at.f_locals)
        elif at.f_code.co_name == "pack_hook":
            self._runs(at.f_locals["target_frame"])
        return id(self)

    def _is_read(self, at: dict[str, Any]) -> None:
        """A value is asked for, or about to be taken."""
        segment, holder = at["frame"], at["holder"]
        if "ret" in at:
            self._taken = holder, holder.handles[self]
            return
        if self._taken is not None:
            taken, handle = self._taken
            taken.handles[self], self._taken = handle, None  # it may be read again
        if self._segments.get(segment, True):
            self._segments[segment] = self._segments.pop(segment, False)

    def _runs(self, segment) -> None:
        """A segment computes a value. When it begins, others end, but for those that it lies in: it asked for them."""
        if not self._segments.get(segment):
            for other in list(self._segments):
                if other is segment:
                    break
                if self._segments[other]:
                    self._end(other)
            self._segments[segment] = True

    def _end(self, segment) -> None:
        for reference in segment.weak_holders:
            holder = reference()
            if holder is not None:
                holder.handles.pop(self, None)
        for made in (segment.recomputed, segment.recomp_counter, segment.is_recomputed):
            made.pop(self, None)
        del self._segments[segment]

    def forget(self) -> None:
        """Let all that is held go: it is computed again when it is asked for."""
        self._taken = None
        for segment in list(self._segments):
            self._end(segment)


class Recomputed:
    """Of one graph: what is computed anew. Where torch.utils.checkpoint was never imported, nothing is."""

    __slots__ = ("group",)

    def __init__(self):
        self.group = _Group() if _CHECKPOINT in sys.modules and _known() else None

    def __enter__(self) -> None:
        """Here rules read, and no backward pass runs."""
        if self.group is not None:
            self.group.__enter__()

    def __exit__(self, *error) -> None:
        if self.group is not None:
            self.group.__exit__(*error)

    def __del__(self) -> None:
        if self.group is not None:  # segments know it, and the function's graph may live on
            self.group.forget()

    def calling(self, node) -> Callable:
        """A node as a function of cotangents, for now or later."""
        return node if self.group is None else partial(self.read, node)

    def read(self, reads: Callable[..., T], *args) -> T:
        """What a function returns that reads what nodes saved."""
        group = self.group
        if group is None:
            return reads(*args)
        before, done = _get_graph_exec_group(), False
        _set_graph_exec_group(group)  # as `with group`, for every node that is called
        try:
            made = reads(*args)
            done = True
            return made
        finally:
            _set_graph_exec_group(before)
            if not done:
                group.forget()

    def factor(self, node, form: Callable) -> Callable[[], Factor | None]:
        """The derivative of an elementwise node as kernels compute it, made when it is asked for, and then known."""
        return _Later(self, node, form)


class _Later:
    """See `Recomputed.factor`; a long graph has many."""

    __slots__ = ("_form", "_found", "_node", "_recomputed")

    def __init__(self, recomputed: Recomputed, node, form: Callable):
        self._recomputed, self._node, self._form = recomputed, node, form

    def __call__(self) -> Factor | None:
        if not hasattr(self, "_found"):
            self._found = self._form(self._read).factor(self._read)
        return self._found

    def _read(self, name: str):
        return plain(self._recomputed.read(getattr, self._node, "_saved_" + name))


@cache
def _known() -> bool:
    """Whether torch's hooks are those that a group of ours understands."""
    module = vars(sys.modules[_CHECKPOINT])
    for kind, (name, variables) in _LOOKS_UP.items():
        constants = module[kind].__init__.__code__.co_consts if kind in module else ()
        codes = [c for c in constants if isinstance(c, CodeType) and c.co_name == name]
        if not any(variables <= {*c.co_varnames, *c.co_cellvars, *c.co_freevars} for c in codes):
            return False
    return True
