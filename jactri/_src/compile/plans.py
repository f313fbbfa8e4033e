"""What runs the calls of a signature: a compiled graph, or the ordinary call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from . import engines
from .captured import Captured
from .compilation import Compilation
from .reached import Reached

if TYPE_CHECKING:
    from .traced import Traced


class Plan:
    """What runs the calls of a signature: a function of the inputs and of what ``func`` holds, looked up each time."""

    def __init__(
        self,
        traced: Traced,
        reached: Reached,
        run: engines.Run,
        built: Sequence[engines.Built],
        seconds: tuple[float, float],
    ):
        self.graph, self.spec = traced.graph, traced.spec
        self.leaf = traced.spec.is_leaf()
        self.run, self._reached = run, reached
        self.built, self.seconds = built, seconds
        self._held = list(traced.held)
        self._states = [state(t) for t in traced.held]
        self._at = [_at(t) for t in traced.held]
        # where modules hold each of them; nowhere: it is as it was
        found = [reached.places.get(id(t), []) for t in traced.held]
        self._places = [places[0] if places else None for places in found]
        self._tied = [(p.table, p.name, places[0]) for places in found for p in places[1:]]

    def held(self) -> list[Tensor] | str:
        """What the function holds now, or what of it asks for another plan."""
        changed = self._reached.changed()
        if changed is not None:
            return changed
        found, at = self._held, self._at
        for k, place in enumerate(self._places):
            t = found[k] if place is None else place.table.get(place.name)
            # of the same tensor in the same memory, laid out alike, all else is the same
            if t is found[k] and _at(t) == at[k]:
                continue
            if t is None or state(t) != self._states[k]:
                return "a tensor that func holds" if place is None else f"the tensor {place.path}"
            found[k], at[k] = t, _at(t)
        for table, name, first in self._tied:
            if table.get(name) is not first.table.get(first.name):
                return f"with which tensor {name} is one"
        return found

    @property
    def cuda_graph(self) -> bool:
        """Whether it is replayed as one CUDA graph."""
        return isinstance(self.run, Captured) and not self.run.refused

    def explained(self, name: str) -> Compilation:
        """What the engine made of it."""
        names = ("the call", "its backward")
        return Compilation(
            name,
            reason=None,
            parts=tuple(b.part(n) for n, b in zip(names, self.built, strict=False)),
            looked_up=tuple(p.path for p in self._places if p is not None),
            fixed=self._places.count(None),
            constants=len(list(self.graph.buffers())),
            seconds=self.seconds,
            cuda_graph=self.cuda_graph,
        )


def _at(t: Tensor) -> tuple:
    return t.data_ptr(), t.requires_grad, t.shape, t.stride()


def state(t: Tensor) -> tuple:
    """What a graph takes for granted of a tensor, beside its values."""
    memory = t.untyped_storage().size() > 0  # which others may free, as FSDP does
    lazy = t.is_conj(), t.is_neg()
    return t.__class__, t.shape, t.stride(), t.dtype, t.device, t.requires_grad, memory, lazy


class Eager:
    """An ordinary call each time, and why; until the modules change."""

    graph = None

    def __init__(self, reason: str, reached: Reached):
        self.reason, self.changed = reason, reached.changed

    def explained(self, name: str) -> Compilation:
        return Compilation(name, self.reason)
