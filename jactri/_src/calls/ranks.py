"""`samples`: plain batches that are shared out among ranks; `all_reduce`: the sum over ranks of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..base.elsewhere import is_distributed
from ..spread.shards import Share, sharing
from ..spread.sums import summed


def samples(mesh: Any) -> AbstractContextManager[None]:
    """A context in which batches are this rank's samples, of those that the ranks of a mesh have together.

    For batches that are plain tensors, as a DataLoader gives them to each rank, of any lengths, 0 too. Results of
    samples are then plain tensors of this rank's samples; sums over samples are those over all ranks, and kernels have
    this rank's rows: of `jacobian` and its like under ``per_sample``, `gradient`, `divergence`, `laplacian`,
    `parameter_jacobian`, `ggn` and `empirical_ntk`; other calls are as ever. A batch that is a DTensor needs no
    context, and gives DTensors.

    Args:
        mesh: a ``DeviceMesh``, among whose ranks the samples are shared out; of several dimensions, take the one that
            does so: ``samples(mesh["dp"])``.

    Returns:
        The context.

    Raises:
        TypeError: ``mesh`` is no DeviceMesh.
        RuntimeError: this rank is not in the mesh.

    Cost:
        None, and no collective: that samples do not mix is proven by every rank of its own. One that has a single
        sample runs it twice, for of one sample nothing can be told.

    Examples:
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> net, mine = nn.Linear(3, 2), torch.randn(5, 3)
        >>> with jactri.distributed.samples(mesh):
        ...     G = jactri.ggn(net, mine, torch.ones(5, 2))
        >>> G.diagonal()["weight"].shape  # the sum over the samples of all ranks
        torch.Size([2, 3])
        >>> dist.destroy_process_group()
    """
    everyone(mesh)
    return sharing(mesh)


def all_reduce(value: Any, mesh: Any) -> Any:
    """The sum over the ranks of a mesh, of every tensor of an answer: for what each has a part of.

    For ``J^T J`` of a function whose outputs differ by rank, say, with the same inputs on all.

    Args:
        value: a tensor, or a tuple, a list or a dict of such values; of the same keys and shapes on all ranks.
        mesh: a ``DeviceMesh``; all of its dimensions are summed over.

    Returns:
        The same on every rank, nested as ``value``; float16 and bfloat16 are summed in float32. With graphs: what of a
        loss that all ranks have flows back to this rank's part.

    Raises:
        TypeError: ``mesh`` is no DeviceMesh; ``value`` holds what is no tensor.
        RuntimeError: this rank is not in the mesh.

    Cost:
        One all_reduce of all tensors of a dtype, for each dimension of the mesh.

    Examples:
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> data, theta = torch.randn(9, 3), torch.randn(3)  # other data on each rank
        >>> part = jactri.jtj(lambda theta: (data @ theta).sin(), theta)
        >>> jactri.distributed.all_reduce(part, mesh).shape
        torch.Size([3, 3])
        >>> dist.destroy_process_group()
    """
    share, found = everyone(mesh), list[Tensor]()
    _collect(value, found)
    made = iter(summed(found, share))
    return _rebuilt(value, made)


def everyone(mesh: Any) -> Share:
    """That all ranks of a mesh have a part. Raises for what is no mesh that this rank is in."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh must be a DeviceMesh, got {type(mesh)}; write init_device_mesh(device, (dist.get_world_size(),)), "
            "or DeviceMesh.from_group(group, device)"
        )
    if mesh.get_coordinate() is None:
        raise RuntimeError(f"this rank is not in {mesh}; call it on the ranks of the mesh only")
    return Share(mesh, tuple(range(mesh.ndim)))


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        if is_distributed(value):
            raise TypeError(
                "value holds a DTensor, whose sums are redistribute's: pass plain tensors"
            )
        if value.layout is not torch.strided:
            raise TypeError(
                f"value holds a tensor of layout {value.layout}, whose entries may lie elsewhere on other ranks; pass "
                "to_dense(), or values() where all ranks have one pattern"
            )
        found.append(value)
    elif isinstance(value, Mapping):
        for k in sorted(value, key=str):  # other ranks may have made theirs in another order
            _collect(value[k], found)
    elif isinstance(value, (tuple, list)):
        for v in value:
            _collect(v, found)
    else:
        raise TypeError(f"value must hold tensors in tuples, lists or dicts, got {type(value)}")


def _rebuilt(value: Any, made: Any) -> Any:
    if isinstance(value, Tensor):
        return next(made)
    if isinstance(value, Mapping):
        parts = {k: _rebuilt(value[k], made) for k in sorted(value, key=str)}
        return {k: parts[k] for k in value}
    items = [_rebuilt(v, made) for v in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
