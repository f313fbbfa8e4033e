"""A batch whose samples are shared out among ranks: what of it a call gets here, and what its result is.

Samples do not influence one another, so a rank's blocks are those of its own samples, and no collective is needed.
That they do not is proven on every rank, of two samples at least: a rank with one runs it twice, and one with none runs
stand-ins, so that collectives of the function's own, as FSDP's, are the same on all ranks. What they give is dropped.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..base.elsewhere import is_distributed

ASSUMED = "assume"

_sharing: ContextVar[Any] = ContextVar("jactri_sharing", default=None)
"""The mesh among whose ranks plain batches are shared out."""


@contextmanager
def sharing(mesh: Any) -> Iterator[None]:
    """Within: plain batches are this rank's part of one that the ranks of a mesh have together."""
    token = _sharing.set(mesh)
    try:
        yield
    finally:
        _sharing.reset(token)


@dataclass(frozen=True)
class Share:
    """Among which ranks a batch is shared out, and what this one has of it.

    ``dims``: the dimensions of ``mesh`` along which samples differ; none: this process has all of them. ``placements``:
    of a batch that is a DTensor, of ``total`` samples; None for one that is given as a plain tensor, as results then
    are. ``few``: this rank has so many samples, 1 or 0, of the two that it runs.
    """

    mesh: Any = None
    dims: tuple[int, ...] = ()
    placements: tuple[Any, ...] | None = None
    total: int | None = None
    few: int | None = None

    def dropped(self, t: Tensor, axis: int) -> Tensor:
        """What has samples on an axis, without stand-ins."""
        return t if self.few is None else t.narrow(axis, 0, self.few)

    # -- what comes in ----------------------------------------------------------------------------

    def batch(self, x: Tensor, graph: bool) -> Tensor:
        """What func gets of an input."""
        x = local(x, graph)
        if self.few is None:
            return x
        return torch.cat([x, x if self.few else _stand_ins(x)])

    def proving(self, per_sample: bool | str) -> bool | str:
        """``per_sample`` for this rank's call: of stand-ins nothing is to be proven."""
        return ASSUMED if per_sample and self.few == 0 else per_sample

    def own(self, t: Any, name: str, axis: int = 0, graph: bool = False) -> Any:
        """This rank's part of a cotangent or the like, which has the samples on an axis; of a stand-in's zeros."""
        if not isinstance(t, Tensor):
            return t
        if self.placements is not None:
            t = self._part(t, name, axis, graph)
        elif is_distributed(t):
            raise RuntimeError(
                f"{name} is a DTensor, but the batch is not; pass {name}.to_local(), or a batch that is one"
            )
        return self.filled(t, axis) if axis < t.dim() else t

    def filled(self, t: Tensor, axis: int) -> Tensor:
        """What has this rank's samples on an axis, with zeros for stand-ins."""
        if self.few is None:
            return t
        shape = [2 - self.few if a == axis else n for a, n in enumerate(t.shape)]
        return torch.cat([t, t.new_zeros(shape)], axis)

    def _part(self, t: Tensor, name: str, axis: int, graph: bool) -> Tensor:
        want = self.placed(axis)
        if not is_distributed(t):
            if not self.dims:
                return t
            raise RuntimeError(
                f"{name} of shape {tuple(t.shape)} is a plain tensor, but the batch is a DTensor of placements "
                f"{self.placements}; pass distribute_tensor({name}, mesh, {list(want)}), or DTensor.from_local of this "
                "rank's part"
            )
        if t.device_mesh != self.mesh or tuple(t.placements) != want:
            raise RuntimeError(
                f"{name} has the placements {tuple(t.placements)}, and the batch is on {self.mesh}; write "
                f"{name}.redistribute(placements={list(want)})"
            )
        return local(t, graph)

    def check_out(self, call: str) -> None:
        """Raise RuntimeError where a result cannot be written to the caller's tensors."""
        if self.mesh is not None and (self.placements is not None or self.few is not None):
            raise RuntimeError(
                f"out= of {call} is not possible for a batch that is shared out among ranks; leave it out, or pass "
                "x.to_local() without jactri.distributed.samples for this rank's part"
            )

    # -- what goes out ----------------------------------------------------------------------------

    def placed(self, axis: int) -> tuple[Any, ...]:
        """The placements of what has the samples on an axis."""
        from torch.distributed.tensor import Replicate, Shard

        ndim = self.mesh.ndim
        return tuple(Shard(axis) if d in self.dims else Replicate() for d in range(ndim))

    def rows(self, t: Tensor, axis: int = 0) -> Tensor:
        """A result that has this rank's samples on an axis, as the caller gets it."""
        t = self.dropped(t, axis)
        if self.placements is None:
            return t
        from torch.distributed.tensor import DTensor

        shape = list(t.shape)
        if self.dims:
            shape[axis] = self.total
        with torch.set_grad_enabled(t.requires_grad):
            return DTensor.from_local(
                t, self.mesh, self.placed(axis), run_check=False, shape=torch.Size(shape),
                stride=_strides(t, shape),
            )  # fmt: skip


ALONE = Share()
"""Of a batch that is not shared out."""


def _stand_ins(x: Tensor) -> Tensor:
    """Two samples like those of ``x``: an index of whatever is looked up, or numbers at which few functions have poles.

    Between 1/4 and 3/4, no two alike: differences are not 0, matrices not singular. A pole would make gradients of
    weights NaN, though what comes of these samples is dropped.
    """
    shape = (2, *x.shape[1:])
    if not (x.is_floating_point() or x.is_complex()):
        return x.new_zeros(shape)
    steps = torch.arange(1, prod(shape) + 1, dtype=torch.float32, device=x.device)
    return (steps * 0.618034 % 1 / 2 + 0.25).reshape(shape).to(x.dtype)


def local(x: Tensor, graph: bool) -> Tensor:
    """This rank's part of a DTensor, in its graph if that is asked for; a plain tensor as it is."""
    if not is_distributed(x):
        return x
    with torch.set_grad_enabled(graph):
        part: Any = x.to_local()
    return part.wait() if hasattr(part, "wait") else part  # it may be on its way


def _strides(t: Tensor, shape: list[int]) -> tuple[int, ...]:
    """The strides of a whole tensor whose part lies in memory as ``t`` does."""
    order = sorted(range(t.dim()), key=lambda d: -t.stride(d))
    made, step = [0] * t.dim(), 1
    for d in reversed(order):
        made[d] = step
        step *= max(shape[d], 1)
    return tuple(made)


def share_of(call: str, name: str, xs: tuple[Tensor, ...], prove: bool) -> Share:
    """How the inputs of a call are shared out. Raises RuntimeError for what is not by samples.

    ``prove``: samples must be shown not to mix.
    """
    spread = [is_distributed(x) for x in xs]
    if not any(spread):
        mesh = _sharing.get()
        if mesh is None:
            return ALONE
        few = None
        if prove and mesh.size() > 1 and xs and xs[0].dim() and xs[0].shape[0] < 2:
            few = xs[0].shape[0]
        return Share(mesh, tuple(range(mesh.ndim)), few=few)
    names = [name if len(xs) == 1 else f"{name}[{i}]" for i in range(len(xs))]
    first: Any = xs[0]
    for n, x, is_spread in zip(names, xs, spread, strict=True):
        if not is_spread:
            raise RuntimeError(
                f"{n} of {call} is a plain tensor, and others are DTensors; pass it as one, by distribute_tensor({n}, "
                f"mesh, placements), or close over it: lambda x: func(x, {n})"
            )
        _check_placements(call, n, x)
        if x.device_mesh != first.device_mesh or x.placements != first.placements:
            raise RuntimeError(
                f"{n} of {call} has the placements {tuple(x.placements)} on {x.device_mesh}, and {names[0]} "
                f"{tuple(first.placements)} on {first.device_mesh}; write {n}.redistribute(...) for the same ones"
            )
    mesh, placements = first.device_mesh, tuple(first.placements)
    dims = tuple(d for d, p in enumerate(placements) if p.is_shard())
    if not dims:
        return Share(mesh, (), placements)
    total = first.shape[0]
    n = local(first, False).shape[0]
    few = n if prove and n < min(total, 2) else None
    return Share(mesh, dims, placements, total, few)


def taken_here(
    call: str, name: str, x: Any, per_sample: bool | str, graph: bool
) -> tuple[Share, Any, bool | str]:
    """How a batch is shared out, what of it is here, nested as it was given, and ``per_sample`` of that."""
    xs = tuple(_tensors([x]))
    share = share_of(call, name, xs, bool(per_sample) and per_sample != ASSUMED)
    if share.mesh is None:
        return share, x, per_sample
    return share, _mapped(lambda t: share.batch(t, graph), x), share.proving(per_sample)


def _check_placements(call: str, name: str, x: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    if x.device_mesh.get_coordinate() is None:
        raise RuntimeError(
            f"this rank has no part of {name} of {call}: it is not in {x.device_mesh}; call {call} on the ranks of the "
            "mesh only"
        )
    better = [
        p if p.is_replicate() or (type(p) is Shard and p.dim == 0)
        else Replicate() if p.is_partial() or x.dim() == 0
        else Shard(0)
        for p in x.placements
    ]  # fmt: skip
    if better != list(x.placements):
        raise RuntimeError(
            f"{name} of {call} is a DTensor with the placements {tuple(x.placements)}, so this rank has no whole "
            f"samples, which lie on the first axis; write {name}.redistribute(placements={better})"
        )


def by_rank(name: str, *more: str) -> Callable[[Callable], Callable]:
    """A call of samples whose input ``name`` may be shared out among ranks; arguments ``more`` may be DTensors too.

    func runs on this rank's samples, as plain tensors; results are DTensors placed as the input is.
    """

    def decorate(call: Callable) -> Callable:
        signature = inspect.signature(call)

        @functools.wraps(call)
        def called(*args, **options):
            if not _concerned(args, options):
                return call(*args, **options)
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            return _here(call, bound, name, more)

        return called

    return decorate


def _concerned(args: tuple, options: dict[str, Any]) -> bool:
    """Whether a batch may be shared out."""
    if _sharing.get() is not None:
        return True
    if "torch.distributed.tensor" not in sys.modules:
        return False
    return any(map(is_distributed, _tensors([*args, *options.values()])))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for v in values:
        if isinstance(v, tuple):
            yield from _tensors(v)
        elif isinstance(v, Tensor):
            yield v


def _here(call: Callable, bound: inspect.BoundArguments, name: str, more: tuple[str, ...]) -> Any:
    """The call of this rank's samples."""
    given = bound.arguments
    xs = tuple(_tensors([given[name]]))
    per_sample, graph = given["per_sample"], bool(given.get("create_graph"))
    share = share_of(call.__name__, name, xs, bool(per_sample) and per_sample != ASSUMED)
    if share.placements is None:
        for other in more:
            if any(map(is_distributed, _tensors([given[other]]))):
                raise RuntimeError(
                    f"{other} of {call.__name__} is a DTensor, and {name} is not; pass {name} as one, or "
                    f"{other}.full_tensor()"
                )
        if share.mesh is not None and per_sample and per_sample != ASSUMED:
            _check_plain(call.__name__, given)
        if share.few is None or _is_point(call.__name__, name, xs):
            return call(*bound.args, **bound.kwargs)
    elif given.get("mesh") is not None:
        raise RuntimeError(
            f"{name} of {call.__name__} is a DTensor, and with mesh= every rank has all of it; pass "
            f"{name}.full_tensor(), or leave mesh= out for what each rank computes of its own samples"
        )
    elif share.dims:
        _check_asked(call.__name__, name, given, xs)
    given[name] = _mapped(lambda x: share.batch(x, graph), given[name])
    given["per_sample"] = share.proving(per_sample)
    for other in more:
        given[other] = _mapped(partial(_beside, share, other, graph), given[other])
    return _mapped(share.rows, call(*bound.args, **bound.kwargs))


def _beside(share: Share, name: str, graph: bool, w: Any) -> Any:
    """An operand beside the inputs: a DTensor has something of its own for each sample, or is whole on every rank.

    Of a plain one beside plain inputs the shape tells; where it does not, the call refuses it.
    """
    if share.placements is None and isinstance(w, Tensor):
        each = w.shape[:1] == (share.few,) and (w.dim() > 2 or share.few == 0)
        return share.filled(w, 0) if each else w
    if not is_distributed(w) or not share.dims:
        return local(w, graph) if isinstance(w, Tensor) else w
    if all(p.is_replicate() for p in w.placements):
        return local(w, graph)
    return share.own(w, name, 0, graph)


def _check_plain(call: str, given: dict[str, Any]) -> None:
    """Raise RuntimeError for what a rank with one sample could not give, which runs two, on all ranks alike."""
    asked = [n for n in ("out", "mesh") if given.get(n) is not None]
    if given.get("layout", torch.strided) is not torch.strided:
        asked.append("layout")
    if asked:
        raise RuntimeError(
            f"{asked[0]}= of {call} is not possible within jactri.distributed.samples but with per_sample='assume': "
            "that samples do not mix is proven of two at least; or call it outside, for this rank's samples alone"
        )


def check_several(call: str, xs: tuple[Tensor, ...], per_sample: bool | str) -> None:
    """Raise RuntimeError where a rank has one sample of many, and a graph in which it cannot run twice."""
    if _sharing.get() is None or not per_sample or per_sample == ASSUMED:
        return
    if not any(map(is_distributed, xs)) and share_of(call, "inputs", xs, True).few == 1:
        raise RuntimeError(
            f"{call} within jactri.distributed.samples has one sample on this rank, of which nothing tells whether it "
            "mixes with others; pass per_sample='assume', or the function to jactri.jacobian"
        )


def _check_asked(call: str, name: str, given: dict[str, Any], xs: tuple[Tensor, ...]) -> None:
    """Raise RuntimeError for what is not of each sample, and for forms that DTensors do not have."""
    if not given["per_sample"]:
        raise RuntimeError(
            f"{name} of {call} is a DTensor, so a process has a part of its numbers only: pass per_sample=True for "
            f"what is computed of each sample on its own rank, or {name}.full_tensor() for all of it on every rank"
        )
    if "layout" in given and given["layout"] is not torch.strided:
        raise RuntimeError(
            f"layout={given['layout']} of {call} is not possible for a DTensor, which is dense; pass "
            f"{name}.to_local() for this rank's blocks"
        )
    if given.get("out") is not None:
        raise RuntimeError(
            f"out= of {call} takes plain tensors, and the result is a DTensor; pass {name}.to_local(), and an out for "
            "this rank's blocks"
        )
    if _is_point(call, name, xs):
        raise RuntimeError(
            f"x of {call} has one axis, so it is a single point, whose coordinates lie on several ranks; pass "
            "x.full_tensor(), or a batch (N, n)"
        )


def _is_point(call: str, name: str, xs: tuple[Tensor, ...]) -> bool:
    """Whether an input of one axis is a single point, not a batch of numbers."""
    return name == "x" and xs[0].dim() == 1 and call != "diagonal"


def _mapped(f: Callable[[Tensor], Any], value: Any) -> Any:
    """``f`` of every tensor in tuples."""
    if isinstance(value, tuple):
        return tuple(_mapped(f, v) for v in value)
    return f(value) if isinstance(value, Tensor) else value
