"""A model that runs again, with another activation in the place of one: the function from a layer to a later one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..prologue.tapping import Tap, Tapping, check_no_cache, spec_of
from ..read.behind import reached
from ..read.overriding import own


class Replay:
    """The function from the activation ``start`` to ``end``, of a model as it was called in a context of taps."""

    def __init__(self, model: torch.nn.Module, tapping: Tapping, start: Tap, end: Tap):
        if tapping.inside:
            raise RuntimeError(
                "function is for taps whose context is over; call it after the with block"
            )
        if len(tapping.calls) != 1:
            raise RuntimeError(
                f"the model was called {len(tapping.calls)} times in the context of these taps: function needs one "
                "call, of the model itself"
            )
        if end.tensor is start.tensor or not reached([end.tensor], [start.tensor]):
            raise RuntimeError(
                f"target {end.name!r} does not depend on source {start.name!r}"
                + (", which comes after it" if start.order > end.order else "")
            )
        ((args, kwargs),) = tapping.calls
        check_no_cache(kwargs, "the arguments of the model")
        self._model, self._args, self._kwargs = model, args, kwargs
        self._start, self._end = start, end
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        self._given = [(t, t._version) for t in given if not t.is_inference()]
        self._specs = [spec_of(start.name), spec_of(end.name)]

    def tried(self) -> Replay:
        """This, where it gives again what it gave."""
        wanted = self._end.tensor
        found = self(self._start.tensor.detach())
        rounding = torch.finfo(wanted.dtype).eps ** (2 / 3)
        with torch.no_grad():
            size = rounding * float(wanted.abs().nan_to_num().max()) if wanted.numel() else 0.0
            same = found.shape == wanted.shape and torch.allclose(
                found, wanted, rtol=rounding, atol=size, equal_nan=True
            )
        if not same:
            raise RuntimeError(
                f"the model gives another {self._end.name!r} when it runs again with the same arguments: it draws "
                "random numbers, as dropout does (call model.eval()), keeps a state, or writes to its arguments"
            )
        return self

    def __call__(self, activation: Tensor) -> Tensor:
        start, end, runs = self._start, self._end, 0

        def change(name: str, y: Tensor) -> Tensor:
            nonlocal runs
            runs += name == start.name
            if name != start.name or runs != start.run + 1:
                kept = y.clone()  # what the model writes to it later is not of the layer
                own(kept, y)
                return kept
            if activation.shape != y.shape:
                raise RuntimeError(
                    f"{start.name!r} has shape {tuple(y.shape)}, got an activation of {tuple(activation.shape)}"
                )
            return activation

        if any(t._version != version for t, version in self._given):
            raise RuntimeError(
                "an argument of the model was written to since it was called: make other taps, of another call"
            )
        with Tapping(self._model, self._specs, change) as tapping:
            self._model(*self._args, **self._kwargs)
        return tapping.made[end.name][end.run].tensor
