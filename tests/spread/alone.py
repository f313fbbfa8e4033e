"""What each of n ranks computes, one after another in this process: for tests of many functions.

The group is torch's fake one, which sends nothing; what the ranks agree on is tested elsewhere.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import jactri
from jactri._src.spread.agreement import Ranks


@contextmanager
def as_rank(rank, ranks):
    """Within: this process is a rank of so many; gives their mesh."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    agree, Ranks.agree = Ranks.agree, lambda self, *facts: None
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        Ranks.agree = agree
        dist.destroy_process_group()


def flat(tree):
    return [t for part in tree for t in flat(part)] if isinstance(tree, tuple) else [tree]


def put_together(func, inputs, ranks, **options):
    """All blocks of the Jacobian, flat, from the parts of all ranks; and where each is cut."""
    shares = []
    for rank in range(ranks):
        with as_rank(rank, ranks) as mesh:
            blocks = flat(jactri.jacobian(func, inputs, mesh=mesh, **options))
            shapes = [b.shape for b in blocks]
            placed = [b.placements[0] for b in blocks]
            shares.append([b.to_local() for b in blocks])
    whole = []
    for k, (shape, at) in enumerate(zip(shapes, placed, strict=True)):
        parts = [share[k] for share in shares]
        if at.is_replicate():
            assert all(p.shape == shape for p in parts)
            whole.append(parts[0])
            continue
        sizes = [len(c) for c in torch.arange(shape[at.dim]).chunk(ranks)] if shape[at.dim] else [0]
        sizes += [0] * (ranks - len(sizes))
        assert [p.shape[at.dim] for p in parts] == sizes, "as DTensor deals an axis out"
        made = torch.cat(parts, at.dim)
        assert made.shape == shape
        whole.append(made)
    return whole, placed
