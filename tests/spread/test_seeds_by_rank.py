"""One Jacobian by the ranks of a mesh: its parts, what they cost and send, and what is refused on all of them."""

import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from alone import flat, put_together
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import jactri

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def mlp(*widths):
    torch.manual_seed(0)
    layers = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o, dtype=F64), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Attention(nn.Module):
    def __init__(self, causal=False):
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.outer = nn.Linear(4, 12, dtype=F64), nn.Linear(4, 4, dtype=F64)
        self.causal = causal

    def forward(self, x):
        q, k, v = self.inner(x).chunk(3, -1)
        return self.outer(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)).tanh()


def hooked(x):
    """What autograd alone can compute: a hook that changes the gradient."""
    y = x.sin()
    y.register_hook(lambda g: 2 * g)
    return y.cumsum(0)


def conv(size):
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(2, 3, size, padding=size // 2, dtype=F64), nn.Tanh(),
        nn.Conv2d(3, 2, size, padding=size // 2, dtype=F64),
    )  # fmt: skip


# name: (function, inputs, options, where the first block is cut)
CASES = {
    "rows": (mlp(5, 8, 3), draw(2, 5), {}, Shard(1)),
    "columns": (mlp(3, 8, 5), draw(2, 3), {}, Shard(3)),
    "columns that are asked for": (mlp(5, 8, 3), draw(5), {"strategy": "forward-mode"}, Shard(1)),
    "mixed": (mlp(9, 2, 8), draw(9), {"strategy": "mixed"}, Shard(0)),
    "samples": (mlp(5, 8, 3), draw(7, 5), {}, Shard(0)),
    "blocks of samples": (mlp(5, 8, 3), draw(7, 5), {"per_sample": True}, Shard(0)),
    "rows of blocks": (mlp(5, 8, 4), draw(2, 5), {"per_sample": True}, Shard(1)),
    "columns of blocks": (mlp(3, 8, 5), draw(2, 3), {"per_sample": True}, Shard(2)),
    "samples by word": (lambda x: x.sin() + 0 * x.mean(0), draw(7, 5), {"per_sample": "assume"}, Shard(1)),
    "samples that mix": (lambda x: x.softmax(0), draw(7, 3), {}, Shard(0)),
    "tokens": (Attention(), draw(1, 6, 4), {}, Shard(1)),
    "causal tokens": (Attention(True), draw(2, 9, 4), {}, Shard(1)),
    "columns of tokens": (Attention(True), draw(1, 9, 4), {"strategy": "forward-mode"}, Shard(4)),
    "lines of an image": (conv(3), draw(1, 2, 6, 5), {}, Shard(2)),
    "elementwise": (torch.sin, draw(7), {}, Shard(0)),
    "a view": (lambda x: x.sin().view(3, 4), draw(12), {}, Shard(1)),
    "one number": (lambda x: x.sin().prod(), draw(7), {}, Replicate()),
    "rows of one number": (lambda x: x.sin() * torch.ones(5, dtype=F64), draw(), {}, Shard(0)),
    "fewer rows than ranks": (lambda x: x.sin()[:2] * x.sum(), draw(9), {}, Shard(0)),
    "no rows": (lambda x: x[:0], draw(4), {}, Shard(0)),
    "not contiguous": (mlp(5, 8, 3), draw(5, 3).t(), {}, Shard(0)),
    "several": (
        lambda x, z: (x.sin() @ draw(5, 3), (z * x.sum()).cumsum(0)), (draw(3, 5), draw(4)), {}, Shard(0)
    ),
    "constant": (lambda x: (x * 0 + 1, torch.ones(3, dtype=F64)), draw(5), {}, Shard(0)),
    "complex inside": (lambda x: torch.fft.fft(x.sin()).abs(), draw(7), {}, Shard(0)),
    "by autograd": (hooked, draw(7), {}, Shard(0)),
    "chunks": (mlp(5, 8, 3), draw(5), {"chunk_size": 1}, Shard(0)),
    "a memory limit": (mlp(9, 64, 64, 5), draw(9), {"memory_limit": 4000}, Shard(0)),
}  # fmt: skip


def truth(name):
    func, inputs, options, _ = CASES[name]
    if name == "no rows":
        return [torch.zeros(0, 4, dtype=F64)]
    whole = torch.autograd.functional.jacobian(func, inputs)
    blocks = list(whole if isinstance(whole, tuple) else (whole,))
    blocks = [b for row in blocks for b in (row if isinstance(row, tuple) else (row,))]
    if not options.get("per_sample"):
        return blocks
    (block,) = blocks
    at = torch.arange(len(inputs))
    return [block.movedim(inputs.dim(), 1)[at, at]]


MIXED = {
    "complex": (lambda z: torch.view_as_real(z.sin()).sum(-1), torch.view_as_complex(draw(5, 2))),
    "complex, by rules": (
        lambda z: (z * z.conj()).real.cumsum(0),
        torch.view_as_complex(draw(5, 2)),
    ),
    "wider": (lambda x: (x.double() ** 2).cumsum(0), draw(6).float()),
    "narrower": (lambda x: x.sin().float().cumsum(0), draw(6)),
    "poles behind a selection": (lambda x: x.clamp(0, 1).sqrt() * x.sum(), draw(7)),
    "integers beside": (lambda x: (x.argmax(-1), x.sin()), draw(3, 4)),
}


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("name", MIXED)
def test_dtypes_and_poles_are_those_of_one_process(name, strategy):
    func, x = MIXED[name]
    found, _ = put_together(func, x, 3, strategy=strategy)
    want = flat(jactri.jacobian(func, x, strategy=strategy))
    for mine, block in zip(found, want, strict=True):
        assert mine.dtype == block.dtype
        torch.testing.assert_close(mine, block, rtol=1e-6, atol=1e-6)
        assert mine.isfinite().all()


@pytest.mark.filterwarnings("ignore:a hook on gradients")
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_parts_make_the_jacobian(name, ranks):
    func, inputs, options, where = CASES[name]
    found, placed = put_together(func, inputs, ranks, **options)
    assert placed[0] == where
    for mine, want in zip(found, truth(name), strict=True):
        assert mine.dtype == F64
        assert torch.allclose(mine, want, rtol=1e-12, atol=1e-12)


def everything():
    """On one rank: all cases, gathered."""
    warnings.filterwarnings("ignore", message="a hook on gradients")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for name, (func, inputs, options, _) in CASES.items():
        blocks = flat(jactri.jacobian(func, inputs, mesh=mesh, **options))
        found[name] = [b.full_tensor().tolist() for b in blocks]
    return found


@pytest.mark.parametrize("count", [2, 4])
def test_dtensors_of_processes(ranks, count):
    found = ranks(count, everything)
    for name in CASES:
        want = truth(name)
        for rank in found:
            for mine, block in zip(rank[name], want, strict=True):
                mine = torch.tensor(mine, dtype=F64).view(block.shape)
                assert torch.allclose(mine, block, rtol=1e-12, atol=1e-12), name


# -- what it costs and sends ------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Notes the collectives within."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            self.found.append((func._schema.name.split("::")[1], sum(t.nbytes for t in args[1])))
        return func(*args, **(kwargs or {}))


def counted(widths, inputs):
    """The flops of a rank but for the function's, and what it sent."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    func, x = mlp(*widths), draw(*inputs)
    with FlopCounterMode(display=False) as forward:
        func(x)
    with FlopCounterMode(display=False) as flops, Sent() as sent:
        output, J = jactri.jacobian(func, x, mesh=mesh, return_output=True)
    assert isinstance(output, torch.Tensor) and torch.equal(output, func(x))
    return (
        flops.get_total_flops() - forward.get_total_flops(),
        sent.found,
        tuple(J.to_local().shape),
    )


@pytest.mark.parametrize(
    "widths, inputs",
    [((32, 64, 64, 24), (32,)), ((24, 64, 64, 32), (24,)), ((9, 16, 12), (12, 9))],
    ids=["rows", "columns", "samples"],
)
def test_a_rank_runs_its_seeds_and_sends_a_digest(ranks, widths, inputs):
    ((whole, _, _),) = ranks(1, counted, widths, inputs)
    for found in (ranks(n, counted, widths, inputs) for n in (2, 4)):
        for flops, sent, _ in found:
            assert flops == whole / len(found)
            assert [name for name, _ in sent] == ["allgather_"]
            assert sent[0][1] < 1024


# -- what is refused, on every rank ------------------------------------------------------------------


def called(name):
    """A call that goes wrong, on this rank."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    func, x, options = mlp(5, 8, 3), draw(4, 5), {"mesh": mesh}
    if name == "inputs":
        x = draw(4, 5, seed=rank // 2)
    elif name == "weights" and rank == 1:
        with torch.no_grad():
            func[0].weight[0, 0] += 1e-3
    elif name == "frozen weights":
        func[0].requires_grad_(False).weight[0, 0] += 1e-3 * (rank == 1)
    elif name == "weights at the origin":  # where outputs are alike
        func, x = nn.Linear(5, 3, bias=False, dtype=F64), 0 * x
        func.weight.data *= 1 + (rank == 1)
    elif name == "shapes" and rank:
        x = draw(4 + rank, 5)
    elif name == "options" and rank == 2:
        options["strategy"] = "forward-mode"
    elif name == "ops" and rank:
        func = nn.Sequential(func, nn.Identity(), Twice())
    elif name == "one fails":
        func = Failing(func, rank == 1)
    elif name == "too small on one" and rank == 3:
        options["memory_limit"] = 100
    elif name == "an option of one" and rank == 2:
        options["chunk_size"] = 0
    elif name == "create_graph":
        options["create_graph"] = True
    elif name == "layout":
        options["layout"] = torch.sparse_coo
    elif name == "pattern":
        options["pattern"] = torch.ones(4, 3, 4, 5, dtype=torch.bool)
    elif name == "out":
        options["out"] = torch.empty(4, 3, 4, 5, dtype=F64)
    elif name == "no mesh":
        options["mesh"] = 2
    elif name == "two axes":
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    elif name == "DTensor":
        x = distribute_tensor(x, mesh, [Shard(0)])
    elif name == "transform":
        return torch.func.vmap(lambda x: jactri.jacobian(func, x, mesh=mesh))(x)
    return jactri.jacobian(func, x, **options)


class Twice(nn.Module):
    """The same numbers by other ops."""

    def forward(self, x):
        return (x * 2) / 2


class Failing(nn.Module):
    def __init__(self, func, fails):
        super().__init__()
        self.func, self.fails = func, fails

    def forward(self, x):
        if self.fails:
            raise KeyError("mine")
        return self.func(x)


REFUSED = {
    "inputs": "ranks 2, 3 and rank 0 differ in the numbers in inputs",
    "weights": "rank 1 and rank 0 differ in the weights of the function; load the same weights",
    "frozen weights": "rank 1 and rank 0 differ in the numbers that the function returned; load the same weights",
    "weights at the origin": "rank 1 and rank 0 differ in the weights of the function; load the same weights",
    "shapes": "ranks 1, 2, 3 and rank 0 differ in the shapes and dtypes",
    "options": "rank 2 and rank 0 differ in the options of the call",
    "ops": "ranks 1, 2, 3 and rank 0 differ in the ops of the function",
    "create_graph": "mesh= and create_graph=True exclude each other",
    "layout": "mesh= cuts dense Jacobians; leave it out for layout=torch.sparse_coo",
    "pattern": "mesh= and pattern= exclude each other",
    "out": "out has to be a numpy.memmap of a file that all ranks opened",
    "no mesh": "mesh must be a torch.distributed.device_mesh.DeviceMesh, got <class 'int'>",
    "two axes": "mesh has 2 axes, (2, 2), and jacobian deals seeds out over one; pass one of them, as mesh['a']",
    "DTensor": "inputs of jacobian is a DTensor, and with mesh= every rank has all of it; pass inputs.full_tensor()",
    "transform": "mesh= is not possible inside of a torch.func transform",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank(ranks, name):
    found = ranks(4, called, name, errors=True, timeout=20)
    for error in found:
        assert error.kind in ("RuntimeError", "ValueError", "TypeError")
        assert REFUSED[name] in error.text


@pytest.mark.parametrize(
    "name, failed, kind, text",
    [
        ("one fails", 1, "KeyError", "mine"),
        ("an option of one", 2, "ValueError", "chunk_size must be a positive integer"),
        ("too small on one", 3, "MemoryLimitTooSmall", "memory_limit is 100 B"),
    ],
)
def test_the_error_of_one_rank_is_told_by_the_others(ranks, name, failed, kind, text):
    found = ranks(4, called, name, errors=True, timeout=20)
    for rank, error in enumerate(found):
        if rank == failed:
            assert error.kind == kind and text in error.text
        else:
            assert error.kind == "RuntimeError" and f"rank {failed} failed" in error.text
