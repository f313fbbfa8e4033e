"""Weights that are DTensors while the module runs, as tensor parallel ones are: what autograd gives of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base.elsewhere import check_graph, is_distributed
from ..parameters.recorded import Recorded
from .shards import Share, local
from .sums import summed


def pulled(run: Recorded, c: Tensor, block: bool, share: Share) -> dict[str, Tensor]:
    """``J^T u`` for each row of ``c`` by a backward pass, summed over the ranks that share the samples.

    DTensors placed as the weights are; without the axis of rows, of which there is one, unless ``block``.
    """
    check_graph([run.y])
    params = list(run.params.values())
    found = []
    for row in c:
        grads = torch.autograd.grad(
            [run.y], params, [row], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        found.append([_part(g, p) for g, p in zip(grads, params, strict=True)])
    made = []
    for i, p in enumerate(params):
        rows = [parts[i] for parts in found]
        mine = local(p.detach(), False)
        made.append(torch.stack(rows) if rows else mine.new_zeros((0, *mine.shape)))
    if not block:
        made = [t[0] for t in made]
    whole = summed(made, share)
    return {
        name: _placed(t, p, int(block))
        for (name, p), t in zip(run.params.items(), whole, strict=True)
    }


def _part(g: Any, p: Any) -> Tensor:
    """This rank's part of a gradient, which may be a sum that is pending, as the weight is placed."""
    if not is_distributed(p):
        return g
    return local(g.redistribute(p.device_mesh, p.placements), False)


def _placed(t: Tensor, p: Any, lead: int) -> Tensor:
    """A rank's part as a DTensor placed as a weight, behind so many axes."""
    if not is_distributed(p):
        return t
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((*t.shape[:lead], *p.shape))
    stride = torch.empty(shape, device="meta").stride()
    placements = [Shard(s.dim + lead) if s.is_shard() else s for s in p.placements]
    return DTensor.from_local(
        t.contiguous(), p.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
