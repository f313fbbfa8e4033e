"""Sums over ranks: all tensors of an answer in one all_reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..base.elsewhere import is_distributed
from .shards import Share, local

T = TypeVar("T")


def summed(tensors: Sequence[Tensor], share: Share) -> list[Tensor]:
    """The sums over the ranks that a batch is shared out among, each of its tensor's shape and dtype.

    Those of one dtype go as one; half types are summed in float32, complex numbers as pairs. Gradients of a loss that
    all ranks have alike flow back to the part of this rank.
    """
    if not share.dims:
        return list(tensors)
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((_wide(t.dtype), t.device), []).append(i)
    made: list[Any] = [None] * len(tensors)
    for (dtype, _), members in groups.items():
        flat = [_real(tensors[i]).reshape(-1).to(dtype) for i in members]
        whole = _reduced(flat[0] if len(flat) == 1 else torch.cat(flat), share)
        for i, part in zip(members, whole.split([t.numel() for t in flat]), strict=True):
            t = tensors[i]
            part = part.reshape(_real(t).shape)
            made[i] = (torch.view_as_complex(part) if t.is_complex() else part).to(t.dtype)
    return made


def totals(values: dict[str, Tensor], share: Share) -> dict[str, Tensor]:
    """Sums over this rank's samples, for each parameter, as sums over all ranks: by names, in whatever order."""
    names = sorted(values)
    made = dict(zip(names, summed([values[name] for name in names], share), strict=True))
    return {name: made[name] for name in values}


def gathered(mine: T, share: Share) -> list[T]:
    """What every rank has, in the order of their samples: small things, as descriptions."""
    import torch.distributed as dist

    found = [mine]
    for d in reversed(share.dims):
        group = share.mesh.get_group(d)
        each: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(each, found, group=group)
        found = [t for part in each for t in part]
    return found


def whole_of(values: dict[str, Tensor], graph: bool) -> dict[str, Tensor]:
    """Tangents of parameters, whole: of a DTensor, by an all_gather."""
    if not isinstance(values, dict) or not any(map(is_distributed, values.values())):
        return values
    with torch.set_grad_enabled(graph):
        return {
            name: t.full_tensor() if is_distributed(t) else t  # type: ignore[attr-defined]
            for name, t in values.items()
        }


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers are summed."""
    dtype = dtype.to_real() if dtype.is_complex else dtype
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _reduced(flat: Tensor, share: Share) -> Tensor:
    """The sum of vectors, of which every rank has one."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = share.mesh
    parts = [Partial() if d in share.dims else Replicate() for d in range(mesh.ndim)]
    with torch.set_grad_enabled(flat.requires_grad):
        whole = DTensor.from_local(flat, mesh, parts, run_check=False)
        return local(whole.redistribute(placements=[Replicate()] * mesh.ndim), flat.requires_grad)


def merged(
    mean: dict[str, Tensor], squares: dict[str, Tensor], counts: tuple[int, int], share: Share
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The mean over all ranks of means, and the sum of squared deviations from it (Chan, Golub and LeVeque 1983).

    ``counts``: of what is behind this rank's, and of all. One all_reduce, and for ``squares`` one more.
    """
    n, total = counts
    whole = totals({name: t * (n / total) for name, t in mean.items()}, share)
    more = {
        name: t + (mean[name] - whole[name].to(t.device)) ** 2 * n for name, t in squares.items()
    }
    return whole, totals(more, share) if more else {}
