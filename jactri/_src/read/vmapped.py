"""Linear products over blocks: by ``torch.vmap`` where that is sound, which is found out, and row by row elsewhere."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from math import inf

import torch
from torch import Tensor
from torch._C._functorch import (
    _set_vmap_fallback_warning_enabled,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
)
from torch.autograd.graph import _engine_run_backward

from ..base import backends
from ..base.cache import Cache
from ..base.constants import arbitrary, fixed
from .unrecorded import UNUSUAL, loose

logger = logging.getLogger("jactri")

# what was found of torch's own nodes, by what determines them
_verified: Cache[Hashable, bool] = Cache(4096)
_lock = threading.RLock()  # a plain one stops torch.compile
_loops = 0


@contextlib.contextmanager
def looping():
    """A context in which vmap loops over ops without a rule and says nothing: that is right, and no news.

    Torch says it in C++, which only some of its bindings turn into a Python warning. The switch is one for the process:
    the last to leave turns it on again.
    """
    global _loops
    with _lock:
        _loops += 1
        _set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        with _lock:
            _loops -= 1
            if not _loops:
                _set_vmap_fallback_warning_enabled(True)


class Vmapped:
    """``one_row``, a linear product, over the first axis of blocks: by vmap, or row by row where that is not sound.

    Some ops have no vmap rule, and some have a wrong one (the backward of a batched ``torch.cdist`` in torch 2.13), so
    what vmap gives is checked before it is used: the product is linear, and a combination of all rows of the block must
    give the same combination of all rows of the result.

    ``key``: what determines ``one_row`` but for the values in it; None if nothing does, then what is found holds for
    this object only.
    """

    __slots__ = ("_sound", "key", "name", "one_row")

    def __init__(
        self,
        one_row: Callable[[Tensor], tuple[Tensor, ...]],
        name: str,
        key: Hashable | None = None,
    ):
        self.one_row, self.name, self.key = one_row, name, key
        self._sound: bool | None = None

    def __call__(self, block: Tensor) -> tuple[Tensor, ...]:
        one_row, key = self.one_row, self.key
        if block.shape[0] == 1:
            return tuple(o.unsqueeze(0) for o in one_row(block[0]))
        sound = self._sound
        if key is not None:
            key = key, tuple(block.shape), block.dtype
            sound = _verified.get(key)
        # a check costs a row, and reads a value
        unknown = sound is None
        if unknown and (block.shape[0] == 2 or backends.capturing(block.device)):
            sound = unknown = False
        if sound is not False:
            out = self._by_vmap(block)
            sound = False if out is None else self._agrees(block, out) if unknown else True
            if unknown and sound is not None:
                self._sound = sound
                if key is not None:
                    _verified[key] = sound
            if sound:
                return out
        rows = [one_row(row) for row in block.unbind(0)]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def _by_vmap(self, block: Tensor) -> tuple[Tensor, ...] | None:
        try:
            with looping():
                return torch.vmap(self.one_row)(block)
        except UNUSUAL as error:  # without vmap, any other fault is raised again
            self._log(str(error).split("\n")[0])
            return None

    def _agrees(self, block: Tensor, out: tuple[Tensor, ...]) -> bool | None:
        """Whether a combination of all rows gives the same combination of the results; None if these are infinite."""
        with torch.no_grad():
            weights = _weights(len(block), block.real)
            wants = self.one_row(combined(weights, block))
            pairs = [
                (g, combined(weights, g), w) for g, w in zip(out, wants, strict=True) if g.numel()
            ]
            close = finite = fits = True
            for got, made, want in pairs:
                size, gap = made.abs().max(), (made - want).abs().max()
                # no combination is larger than the sum of its terms
                close = close & (gap <= loose(got.dtype) * size) & (size < inf)
            if shown(close):
                return True
            for got, made, want in pairs:
                size = combined(weights.abs(), got.abs()).max()
                gap = (made - want).abs()
                finite = finite & size.isfinite()
                fits = fits & (gap <= loose(got.dtype) * size).all()
            if shown(finite & fits):
                return True
            if not shown(finite):
                return None
        self._log("its vmap rule gives another result than the op itself")
        return False

    def _log(self, why: str) -> None:
        logger.info("fallback: %s is not vmapped (%s); one row at a time", self.name, why)


def fitting(ys: Sequence[Tensor], ends: Sequence[Tensor], cs: Sequence[Tensor], create_graph: bool):
    """``torch.autograd.grad`` where nobody need ask whether a cotangent fits: torch imports sympy for that."""
    return _engine_run_backward(
        tuple(ys), tuple(cs), True, create_graph, tuple(ends), True, accumulate_grad=False
    )


def shown(holds) -> bool:
    """Whether something holds, for all samples where vmap is around."""
    while isinstance(holds, Tensor) and is_functorch_wrapped_tensor(holds):
        holds = get_unwrapped(holds)
    return bool(holds.all()) if isinstance(holds, Tensor) else holds


def figures(found: Sequence[Tensor]) -> list[list[float]]:
    """The numbers in some tensors without axes, of one dtype and device, for every sample where vmap is around."""
    t = torch.stack([*found])
    while is_functorch_wrapped_tensor(t):
        at = maybe_get_bdim(t)
        t = get_unwrapped(t)
        t = t.movedim(at, -1) if at >= 0 else t
    return t.reshape(len(found), -1).mT.tolist()


def combined(weights: Tensor, block: Tensor) -> Tensor:
    """The sum of the rows of a block, each times its weight."""
    return (weights.to(block.dtype) @ block.unsqueeze(-1).flatten(1)).view(block.shape[1:])


def _weights(n: int, like: Tensor) -> Tensor:
    def make() -> tuple[Tensor]:
        return (arbitrary((n,), torch.empty((), dtype=like.dtype, device=like.device)),)

    (found,) = fixed(("weights", n, like.dtype, like.device), make)
    return found
