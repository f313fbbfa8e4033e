"""Weights that are DTensors while the module runs, as tensor parallel ones are: Jacobians by autograd, row by row.

Every rank computes all rows of its part of the weights. A sum over the weights is one all_reduce of every rank's part
of it, in which what ranks have alike is counted by one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..base.elsewhere import check_graph, is_distributed
from ..parameters.factored import Factors
from ..parameters.pairs import flat
from ..parameters.recorded import Recorded
from .shards import ALONE, Share, local
from .sums import summed


def check(run: Recorded, share: Share) -> None:
    """Raise RuntimeError for weights whose parts, or batches whose parts beside them, are not known to be right."""
    from torch.distributed.tensor import Shard

    first: Any = run.params[run.sharded[0]]
    for name in run.sharded:
        p: Any = run.params[name]
        if p.device_mesh != first.device_mesh:
            raise RuntimeError(
                f"{name} is on {p.device_mesh}, and {run.sharded[0]} on {first.device_mesh}; pass parameters of one "
                "mesh as params"
            )
        if not all(s.is_replicate() or type(s) is Shard for s in p.placements):
            raise RuntimeError(
                f"{name} has the placements {tuple(p.placements)}, which are not Shard and Replicate; redistribute it "
                "to those, or use a module with the whole weights (full_tensor())"
            )
    for d in _common(first.device_mesh, share).values():
        if d in share.dims:
            raise RuntimeError(
                f"the batch is shared out among the ranks that share {run.sharded[0]} ({share.mesh}, dimension {d}); "
                "have it Replicate() there"
            )


# -- results in the weights ---------------------------------------------------------------------------


def pulled(run: Recorded, c: Tensor, block: bool, share: Share) -> dict[str, Tensor]:
    """``J^T u`` for each row of ``c`` by a backward pass, summed over the ranks that share the samples.

    DTensors placed as the weights are; without the axis of rows, of which there is one, unless ``block``.
    """
    made = summed(_rows(run, c), share)
    params = run.params.items()
    return {
        name: _placed(t if block else t[0], p, int(block))
        for (name, p), t in zip(params, made, strict=True)
    }


def dense(of: Factors[Recorded], share: Share) -> dict[str, Tensor]:
    """``(N, *out, *parameter)``, sharded by samples as the batch is, and along a weight's axes as the weight is.

    Raises RuntimeError where the batch is a DTensor on a mesh that the weights' is no part of.
    """
    run = of.run
    lead = run.y.dim()
    of.budget("the Jacobian", _bytes(run))
    with run.computing():
        parts = _all(run)
    made: dict[str, Tensor] = {}
    for (name, p), t in zip(run.params.items(), parts, strict=True):
        if is_distributed(p):
            made[name] = _placed(share.dropped(t, 0), p, lead, share)
        else:
            made[name] = share.rows(t)
    return made


def diagonal(run: Recorded, h: Tensor, share: Share) -> dict[str, Tensor]:
    """The diagonal of ``sum_n J_n^T H_n J_n``, placed as the weights are; ``h``: ``(N, m)`` or ``(N, m, m)``."""
    parts = [_mine(p) for p in run.params.values()]
    made = [t.new_zeros(t.shape, dtype=t.dtype.to_real()) for t in parts]
    for n, rows in _samples(run):
        for i, j in enumerate(rows):
            j = flat(j, len(j))
            w = h[n].to(j.dtype)
            hj = w.unsqueeze(-1) * j if w.dim() == 1 else w @ j
            each = (hj * j).sum(0)  # of a complex entry, two
            made[i] += each.reshape(*made[i].shape, 1 + parts[i].is_complex()).sum(-1)
    params = run.params.items()
    return {
        name: _placed(t, p, 0) for (name, p), t in zip(params, summed(made, share), strict=True)
    }


# -- sums over the weights ----------------------------------------------------------------------------


def pushed(run: Recorded, v: dict[str, Tensor], k: int | None) -> Tensor:
    """``J v``, ``(N, *out)`` or ``(k, N, *out)``: of ``v`` whole tensors, or DTensors."""
    block = int(k is not None)
    made = run.y.new_zeros((1 if k is None else k, *run.y.shape))
    parts = [_like(v[name], p, block).to(p.dtype) for name, p in run.params.items()]
    counted = _counted(run)
    for n, rows in _samples(run) if k != 0 else ():
        for i in counted:
            part = flat(parts[i], len(made)) @ flat(rows[i], len(rows[i])).t()
            made[:, n] += part.reshape(made[:, n].shape).to(made.dtype)
    made = _whole(run, made)
    return made if block else made[0]


def variance(run: Recorded, v: dict[str, Tensor], is_diagonal: bool) -> Tensor:
    """``J_n diag(v) J_n^T``, ``(N, m, m)``, or its diagonal, ``(N, m)``."""
    m = prod(run.out)
    made = run.y.new_zeros((run.n, m) if is_diagonal else (run.n, m, m))
    parts = []
    for name, p in run.params.items():
        w = _like(v[name], p, 0).to(p.dtype)
        parts.append(flat(torch.complex(w.real, w.real) if w.is_complex() else w, 1))
    counted = _counted(run)
    for n, rows in _samples(run):
        for i in counted:
            j, w = flat(rows[i], m), parts[i]
            part = (j * w * j).sum(-1) if is_diagonal else (j * w) @ j.mT
            made[n] += part.to(made.dtype)
    return _whole(run, made)


def gram(first: Factors[Recorded], second: Factors[Recorded]) -> Tensor:
    """``J K^T`` of two Jacobians, ``(*output, *output)``. One Jacobian is held, of this rank's part of the weights."""
    run, other = first.run, second.run
    _check_alike(run, other)
    m, m2 = prod(run.out), prod(other.out)
    made = run.y.new_zeros(run.n * m, other.n * m2)
    first.budget("J J^T", made.nbytes + _bytes(run))
    counted = _counted(run)
    with run.computing():
        held = _all(run)
        left = [flat(held[i], run.n * m) for i in counted]
        if second is first:
            for j in left:
                made += (j @ j.t()).to(made.dtype)
        else:
            for n, rows in _samples(other):
                to = made[:, n * m2 : (n + 1) * m2]
                for i, j in zip(counted, left, strict=True):
                    to += (j @ flat(rows[i], m2).t()).to(made.dtype)
        return _whole(run, made).reshape(*run.y.shape, *other.y.shape)


def _check_alike(run: Recorded, other: Recorded) -> None:
    for name, p in run.params.items():
        ends: tuple[Any, Any] = p, other.params[name]
        mine, its = [(t.device_mesh, t.placements) if is_distributed(t) else None for t in ends]
        if mine != its:
            raise RuntimeError(
                f"{name!r} is placed as {mine} in one module and {its} in the other (None: a plain tensor); "
                "use modules with weights that are placed alike"
            )


# -- rows ---------------------------------------------------------------------------------------------


def _all(run: Recorded) -> list[Tensor]:
    """This rank's part of the Jacobian: ``(N, *out, *part)`` of every parameter."""
    mine = [_mine(p) for p in run.params.values()]
    made = [t.new_zeros((*run.y.shape, *t.shape)) for t in mine]
    for n, rows in _samples(run):
        for t, j in zip(made, rows, strict=True):
            t[n] = j.reshape(t.shape[1:])
    return made


def _samples(run: Recorded) -> Iterator[tuple[int, list[Tensor]]]:
    """By sample: its rows ``(m, *part)`` of this rank's part of every parameter. Nothing where all are zero."""
    run.check_unchanged()
    if not run.by_autograd:
        return
    m = prod(run.out)
    eye = torch.eye(m, dtype=run.y.dtype, device=run.y.device).reshape(m, *run.out)
    for n in range(run.n if m else 0):
        c = run.y.new_zeros((m, *run.y.shape))
        c[:, n] = eye
        yield n, _rows(run, c)


def _rows(run: Recorded, c: Tensor) -> list[Tensor]:
    """One backward pass for every row of ``c``: ``(rows, *part)`` of every parameter.

    A gradient that is a sum over ranks which is pending is summed once for all rows, as all of them have it alike.
    """
    params: list[Any] = list(run.params.values())
    found: list[Sequence[Any]] = []
    for row in c:
        check_graph([run.y])
        found.append(
            torch.autograd.grad(
                [run.y], params, [row], retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )
    made = []
    for i, p in enumerate(params):
        grads = [g[i] for g in found]
        if not grads:
            made.append(_mine(p).new_zeros((0, *_mine(p).shape)))
        elif is_distributed(p):
            made.append(_stacked(grads, p))
        else:
            made.append(torch.stack(grads))
    return made


def _stacked(grads: Sequence[Any], p: Any) -> Tensor:
    """This rank's parts of gradients, as the weight is placed."""
    placements = {tuple(g.placements) for g in grads}
    if len(placements) > 1:  # one that is not there is zero, and has the weight's
        return torch.stack(
            [local(g.redistribute(p.device_mesh, p.placements), False) for g in grads]
        )
    (given,) = placements
    rows = torch.stack([local(g, False) for g in grads])
    if given == tuple(p.placements):
        return rows
    g = _as_dtensor(rows, p.device_mesh, _behind(given, 1), (len(grads), *p.shape))
    return local(g.redistribute(p.device_mesh, _behind(p.placements, 1)), False)


def _counted(run: Recorded) -> list[int]:
    """The parameters that this rank counts in a sum over all: of what ranks have alike, the first one does."""
    mesh, dims = _summed_over(run)
    at = mesh.get_coordinate()
    params: list[Any] = list(run.params.values())
    return [
        i for i, p in enumerate(params)
        if not any(at[d] for d in dims if not is_distributed(p) or p.placements[d].is_replicate())
    ]  # fmt: skip


def _summed_over(run: Recorded) -> tuple[Any, tuple[int, ...]]:
    """The mesh of the weights, and its dimensions along which one is sharded."""
    spread: list[Any] = [run.params[name] for name in run.sharded]
    mesh = spread[0].device_mesh
    return mesh, tuple(
        d for d in range(mesh.ndim) if any(p.placements[d].is_shard() for p in spread)
    )


def _whole(run: Recorded, part: Tensor) -> Tensor:
    """The sum of every rank's part, by one all_reduce."""
    mesh, dims = _summed_over(run)
    return summed([part], Share(mesh, dims))[0]


# -- parts --------------------------------------------------------------------------------------------


def _mine(p: Tensor) -> Tensor:
    return local(p.detach(), False)


def _bytes(run: Recorded) -> int:
    return run.y.numel() * sum(_mine(p).nbytes for p in run.params.values())


def _behind(placements: Sequence[Any], lead: int) -> list[Any]:
    """Placements of what has so many axes before those of a weight."""
    from torch.distributed.tensor import Shard

    return [Shard(s.dim + lead) if s.is_shard() else s for s in placements]


def _like(t: Any, p: Any, lead: int) -> Tensor:
    """This rank's part of an operand, as the parameter is placed; ``lead`` axes come before."""
    if not is_distributed(p):
        return t.full_tensor() if is_distributed(t) else t
    from torch.distributed.tensor import Replicate

    mesh, t = p.device_mesh, t.detach()
    if is_distributed(t) and t.device_mesh != mesh:
        t = t.full_tensor()
    if not is_distributed(t):
        t = _as_dtensor(t, mesh, [Replicate()] * mesh.ndim, tuple(t.shape))
    return local(t.redistribute(mesh, _behind(p.placements, lead)), False)


def _placed(t: Tensor, p: Any, lead: int, share: Share = ALONE) -> Tensor:
    """A rank's part as a DTensor placed as a weight, behind so many axes, of which samples are the first in a batch."""
    if not is_distributed(p):
        return t
    placements, shape = _behind(p.placements, lead), [*t.shape[:lead], *p.shape]
    if share.placements is None:
        return _as_dtensor(t, p.device_mesh, placements, shape)
    common, both = _common(p.device_mesh, share), list(share.placed(0))
    for d, s in enumerate(placements):
        if d in common:
            both[common[d]] = s
        elif p.device_mesh.size(d) > 1:
            raise RuntimeError(
                f"the weights are on {p.device_mesh}, and the batch on {share.mesh}, so no DTensor has both; pass the "
                "batch on the mesh that has the dimensions of both, Replicate() on those of the weights"
            )
    if share.dims:
        shape[0] = share.total
    return _as_dtensor(t, share.mesh, both, shape)


def _common(mesh: Any, share: Share) -> dict[int, int]:
    """The dimensions of a mesh, of several ranks, that a batch's mesh has too: which of its they are."""
    if share.mesh is None:
        return {}
    from torch.distributed import get_process_group_ranks

    def ranks(of: Any, d: int) -> tuple[int, ...]:
        return tuple(get_process_group_ranks(of.get_group(d)))

    its = {ranks(share.mesh, d): d for d in range(share.mesh.ndim) if share.mesh.size(d) > 1}
    return {d: its[r] for d in range(mesh.ndim) if (r := ranks(mesh, d)) in its}


def _as_dtensor(t: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int]) -> Any:
    from torch.distributed.tensor import DTensor

    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(
        t.contiguous(), mesh, placements, run_check=False, shape=size, stride=stride
    )
