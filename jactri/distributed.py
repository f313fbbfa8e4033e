"""Jacobians on many devices: what `torch.distributed` and DTensors share out among ranks.

Examples:
    >>> import torch.distributed as dist
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from torch.distributed.tensor import Shard, distribute_tensor
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun's, in a program
    >>> mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    >>> x = distribute_tensor(torch.randn(8, 3), mesh, [Shard(0)])
    >>> jactri.jacobian(torch.tanh, x, per_sample=True).shape  # a DTensor, of which this rank has its samples
    torch.Size([8, 3, 3])
    >>> dist.destroy_process_group()
"""

from ._src.calls.ranks import all_reduce, samples

__all__ = ["all_reduce", "samples"]
