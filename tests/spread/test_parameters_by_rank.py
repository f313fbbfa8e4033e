"""Jacobians in parameters of batches that ranks share: sums in one all_reduce, kernels in tiles."""

import datetime
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import jactri

F64 = torch.float64


class Tokens(nn.Module):
    """Rows of an embedding, tokens, a weight that is used twice, an output of two axes."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, i):
        h = self.mix(self.table(i)).tanh()
        return (self.mix(h) * self.scale).sum(1).unflatten(1, (2, 2))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 2, 3, padding=1), nn.LayerNorm(3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.norm(self.conv(x.unsqueeze(1)).tanh()).mean(1)


class Waves(Tokens):
    """Complex numbers in an op without a rule: autograd computes it as a whole."""

    def forward(self, i):
        h = torch.fft.fft(self.table(i), dim=1)
        return h.prod(1).abs()


def model(kind):
    torch.manual_seed(1)
    made = {"mlp": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
            "tokens": Tokens, "conv": Conv}[kind]()  # fmt: skip
    return made.to(F64)


def data(kind, n, seed=2):
    make = torch.Generator().manual_seed(seed)
    if kind == "tokens":
        return torch.randint(7, (n, 3), generator=make)
    return torch.randn(n, 3, dtype=F64, generator=make)


def direction(net):
    make = torch.Generator().manual_seed(4)
    return {n: torch.randn(p.shape, dtype=F64, generator=make) for n, p in net.named_parameters()}


def same(got, want, name):
    if isinstance(want, dict):
        assert got.keys() == want.keys(), name
        for k in want:
            same(got[k], want[k], f"{name} {k}")
        return
    got = got.full_tensor() if isinstance(got, DTensor) else got
    assert got.shape == want.shape and got.dtype == want.dtype, (name, got.shape, want.shape)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-11), (name, (got - want).abs().max())


def counted(name, want, call):
    with CommDebugMode() as comm:
        made = call()
    assert comm.get_total_counts() == want, (name, comm.get_comm_counts())
    return made


def all_methods(kind, n):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, net = data(kind, n), model(kind)
    given = distribute_tensor(x, mesh, [Shard(0)])
    whole, jac = jactri.parameter_jacobian(net, x), jactri.parameter_jacobian(net, given)
    out, v = tuple(whole.output.shape[1:]), direction(net)
    make = torch.Generator().manual_seed(5)
    u = torch.randn(n, *out, dtype=F64, generator=make)
    block = torch.randn(2, n, *out, dtype=F64, generator=make)
    mine, mine2 = (distribute_tensor(t, mesh, [Shard(a)]) for t, a in ((u, 0), (block, 1)))
    square = {k: t.square() for k, t in v.items()}
    of_samples = {
        "output": lambda j: j.output,
        "dense": lambda j: j.dense(),
        "matrix": lambda j: j.matrix(),
        "J v": lambda j: j @ v,
        "J block": lambda j: j @ {k: torch.stack([t, 2 * t]) for k, t in v.items()},
        "variance": lambda j: j.variance(square),
        "its diagonal": lambda j: j.variance(square, diagonal=True),
    }
    for name, call in of_samples.items():
        got = counted(name, 0, lambda call=call: call(jac))
        for t in got.values() if isinstance(got, dict) else [got]:
            assert tuple(t.placements) == (Shard(1 if name == "J block" else 0),)
        same(got, call(whole), name)
    one = int(dist.get_world_size() > 1)  # all_reduce
    same(counted("J^T u", one, lambda: jac.T @ mine), whole.T @ u, "J^T u")
    same(counted("J^T block", one, lambda: jac.T @ mine2), whole.T @ block, "J^T block")
    m = u[0].numel() if n else 4
    root = torch.randn(n, m, m, dtype=F64, generator=make)
    full = (root @ root.mT).reshape(n, *out, *out)
    hessians = {
        "diagonal": (u.square(), mine.square()),
        "dense": (full, distribute_tensor(full, mesh, [Shard(0)])),
        "a function": (lambda b: 3 * b, lambda b: 3 * b),
        "of each": (lambda b: u * b, lambda b: mine.to_local() * b),
    }
    for name, (h, own) in hessians.items():
        G, g = jactri.ggn(net, x, h), jactri.ggn(net, given, own)
        same(counted(name, one, lambda g=g: g @ v), G @ v, f"G v, {name}")
        same(counted(name, one, g.diagonal), G.diagonal(), f"diagonal, {name}")
    gathers = 2  # of the descriptions' lengths, and of them
    gram = counted("gram", gathers, jac.gram)
    assert tuple(gram.placements) == (Shard(0),)
    same(gram, whole.gram(), "gram")
    assumed = jactri.parameter_jacobian(net, given, per_sample="assume")  # no stand-ins
    same(assumed.gram(), whole.gram(), "gram, assumed")
    same(assumed.T @ mine, whole.T @ u, "J^T u, assumed")
    for x2 in (data(kind, 3, 6), data(kind, 1, 6)):
        given2 = distribute_tensor(x2, mesh, [Shard(0)])
        for compute in ("full", "diagonal", "trace"):
            want = jactri.empirical_ntk(net, x, x2, compute=compute)
            got = jactri.empirical_ntk(net, given, given2, compute=compute, chunk_size=1)
            assert got.to_local().shape[1] == len(x2) and tuple(got.placements) == (Shard(0),)
            same(got, want, compute)
            same(jactri.empirical_ntk(net, given, distribute_tensor(x2, mesh, [Replicate()]), compute=compute),
                 want, f"{compute}, columns whole")  # fmt: skip
        got = jactri.empirical_ntk(net, distribute_tensor(x, mesh, [Replicate()]), given2)
        assert tuple(got.placements) == (Shard(1),)
        same(got, jactri.empirical_ntk(net, x, x2), "rows whole")


@pytest.mark.parametrize(
    "kind, world, n",
    [("mlp", 1, 3), ("mlp", 2, 5), ("tokens", 2, 4), ("conv", 2, 3), ("mlp", 4, 5), ("tokens", 4, 2), ("mlp", 2, 1)],
)  # fmt: skip
def test_methods_equal_one_process(ranks, kind, world, n):
    """Uneven parts, ranks with one sample, and with none."""
    ranks(world, all_methods, kind, n)


def plain_batches():
    """Other numbers of samples on every rank, none among them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    net, counts = model("mlp"), [3, 0, 1, 2][:world]
    x = data("mlp", sum(counts))
    begin = sum(counts[:rank])
    mine = x[begin : begin + counts[rank]]
    v = direction(net)
    with jactri.distributed.samples(mesh):
        jac = jactri.parameter_jacobian(net, mine)
        g = jactri.ggn(net, mine, torch.ones(len(mine), 2, dtype=F64))
        trace = jactri.empirical_ntk(net, mine, compute="trace")
    whole = jactri.parameter_jacobian(net, x)
    rows = slice(begin, begin + len(mine))
    same(jac.dense(), {k: t[rows] for k, t in whole.dense().items()}, "dense")
    same(jac.gram(), whole.gram()[rows], "gram")
    same(trace, jactri.empirical_ntk(net, x, compute="trace")[rows], "trace")
    same(jac.T @ jac.output, whole.T @ whole.output, "J^T y")
    same(g @ v, jactri.ggn(net, x, torch.ones(len(x), 2, dtype=F64)) @ v, "G v")
    part = {"a": [torch.full((2,), rank + 0.5, dtype=torch.bfloat16)], "b": (torch.ones(1) * 1j,)}
    total = jactri.distributed.all_reduce(part, mesh)
    assert total["a"][0].dtype == torch.bfloat16 and total["b"][0] == world * 1j
    assert total["a"][0].tolist() == [sum(r + 0.5 for r in range(world))] * 2
    names = ["a", "b"] if rank else ["b", "a"]  # in any order
    total = jactri.distributed.all_reduce({k: torch.tensor(ord(k)) for k in names}, mesh)
    assert list(total.items()) == [(k, world * ord(k)) for k in names]
    theta = torch.randn(3, dtype=F64, generator=torch.Generator().manual_seed(3))
    part = jactri.jtj(lambda theta: (mine @ theta).sin(), theta)
    got = counted("jtj", int(world > 1), lambda: jactri.distributed.all_reduce(part, mesh))
    same(got, jactri.jtj(lambda theta: (x @ theta).sin(), theta), "jtj")


@pytest.mark.parametrize("world", [1, 4])
def test_plain_batches(ranks, world):
    ranks(world, plain_batches)


def within_limits():
    """How many parts go round under each limit, or the error."""
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    net, x, y = model("mlp"), data("mlp", 23), data("mlp", 9, 6)
    want = {c: jactri.empirical_ntk(net, x, y, compute=c) for c in ("full", "diagonal", "trace")}
    given, other = (distribute_tensor(t, mesh, [Shard(0)]) for t in (x, y))
    found = []
    for limit in (100, 3_000, 6_000, 80_000):
        mine = 1 << 20 if rank and limit < 80_000 else limit  # ranks may differ
        runs = [jactri.parameter_jacobian(net, t, memory_limit=mine) for t in (given, other)]
        try:
            with CommDebugMode() as comm:
                gram = runs[0].gram(runs[1])
        except (ValueError, RuntimeError) as error:
            found.append(f"{limit}: {error}")
            continue
        found.append(comm.get_total_counts() // 2)
        same(gram.full_tensor().movedim(2, 1), want["full"], "gram")
        for compute, expected in want.items():
            got = jactri.empirical_ntk(net, given, other, compute=compute, memory_limit=mine)
            same(got, expected, compute)
    return found


def test_kernels_within_a_memory_limit(ranks):
    for found in ranks(2, within_limits):
        one, rows, parts, whole = found
        assert "one output entry of one sample" in one and "memory_limit is 100 B" in one
        assert "rows of the kernel on rank 0 take 3.46 kB" in rows
        assert parts > 1 and whole == 1


def in_two_dimensions():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net, x = model("mlp"), data("mlp", 5)
    whole = jactri.parameter_jacobian(net, x)
    for placements, sums in (
        ([Shard(0), Replicate()], 1), ([Replicate(), Shard(0)], 1), ([Shard(0), Shard(0)], 2)
    ):  # fmt: skip
        jac = jactri.parameter_jacobian(net, distribute_tensor(x, mesh, placements))
        with CommDebugMode() as comm:
            got = jac.T @ jac.output
        assert 1 <= comm.get_total_counts() <= sums
        same(got, whole.T @ whole.output, "J^T y")
        gram = jac.gram()
        assert list(gram.placements) == placements
        same(gram, whole.gram(), "gram")
    at = mesh.get_coordinate()[0]  # plain parts, alike on the ranks of the other dimension
    mine = x[3 * at :][: 3 - at]
    with jactri.distributed.samples(mesh["dp"]):
        jac = jactri.parameter_jacobian(net, mine)
    same(jac.gram(), whole.gram()[3 * at :][: 3 - at], "gram, of a part of the mesh")
    same(jac.T @ jac.output, whole.T @ whole.output, "J^T y, of a part of the mesh")


def test_a_mesh_of_two_dimensions(ranks):
    ranks(4, in_two_dimensions)


def with_graph():
    mesh = init_device_mesh("cpu", (2,))
    net, x = model("mlp"), data("mlp", 5)
    given = distribute_tensor(x, mesh, [Shard(0)])

    def loss(x, h):
        g = jactri.ggn(net, x, h, create_graph=True)
        return sum(t.square().sum() for t in g.diagonal().values())

    want = torch.autograd.grad(loss(x, torch.ones(5, 2, dtype=F64)), list(net.parameters())[:3])
    ones = distribute_tensor(torch.ones(5, 2, dtype=F64), mesh, [Shard(0)])
    parts = torch.autograd.grad(loss(given, ones), list(net.parameters())[:3])
    got = jactri.distributed.all_reduce(parts, mesh)  # each rank's are of its samples
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*full_tensor"):
        jactri.parameter_jacobian(net, given, create_graph=True).gram()


def test_gradients_of_sums(ranks):
    ranks(2, with_graph)


def refusals():
    mesh = init_device_mesh("cpu", (2,))
    net, x = model("mlp"), data("mlp", 4)
    given = distribute_tensor(x, mesh, [Shard(0)])
    jac, u = jactri.parameter_jacobian(net, given), torch.ones(4, 2, dtype=F64)
    tries = {
        "u": lambda: jac.T @ u,
        "u replicated": lambda: jac.T @ distribute_tensor(u, mesh, [Replicate()]),
        "hessian": lambda: jactri.ggn(net, given, u),
        "out": lambda: jac.dense(jac.dense()),
        "mixing": lambda: jactri.parameter_jacobian(
            nn.Sequential(net, nn.BatchNorm1d(2, affine=False, dtype=F64)), given
        ),
        "mixing ones": lambda: jactri.parameter_jacobian(
            nn.Sequential(net, nn.BatchNorm1d(2, affine=False, dtype=F64)),
            distribute_tensor(x[:2], mesh, [Shard(0)]),
        ),
        "unproven": lambda: jactri.parameter_jacobian(
            Waves(), distribute_tensor(data("tokens", 4), mesh, [Shard(0)])
        ),
        "columns": lambda: jactri.parameter_jacobian(net, distribute_tensor(x, mesh, [Shard(1)])),
        "mesh": lambda: jactri.distributed.samples("dp"),
        "value": lambda: jactri.distributed.all_reduce([1.0], mesh),
        "sparse": lambda: jactri.distributed.all_reduce(u.to_sparse(), mesh),
        "DTensor": lambda: jactri.distributed.all_reduce(given, mesh),
    }
    said = {}
    for name, call in tries.items():
        try:
            call()
            said[name] = "nothing"
        except (RuntimeError, TypeError) as error:
            said[name] = str(error)
    return said


def test_refusals_say_what_to_write(ranks):
    words = {
        "u": "distribute_tensor(u, mesh, [Shard(dim=0)])",
        "u replicated": "u.redistribute(placements=[Shard(dim=0)])",
        "hessian": "loss_hessian of shape",
        "out": "leave it out",
        "mixing": "mix",
        "mixing ones": "mix",
        "unproven": "per_sample='assume'",
        "columns": "x.redistribute(placements=[Shard(dim=0)])",
        "mesh": "init_device_mesh",
        "value": "value must hold tensors",
        "sparse": "to_dense()",
        "DTensor": "redistribute",
    }
    for said in ranks(2, refusals):
        assert {k: v for k, v in said.items() if words[k] not in v} == {}


def one_fails(where):
    """One of two ranks fails before its part of a sum, or of a kernel."""
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=2))
    mesh = DeviceMesh.from_group(group, "cpu")
    net, x = model("mlp"), data("mlp", 4)
    jac = jactri.parameter_jacobian(net, distribute_tensor(x, mesh, [Shard(0)]))
    g = jactri.ggn(net, distribute_tensor(x, mesh, [Shard(0)]), one_of_two)
    begin = time.monotonic()
    try:
        if where == "kernel":
            if dist.get_rank():
                with torch.no_grad():
                    net[0].weight.add_(1)
            jac.gram()
        else:
            g @ direction(net)
        return "nothing"
    except RuntimeError as error:
        assert time.monotonic() - begin < 30
        return str(error)


def one_of_two(block):
    if dist.get_rank():
        raise RuntimeError("no Hessian here")
    return block


def test_a_rank_that_fails_is_an_error_on_the_others(ranks):
    other, own = ranks(2, one_fails, "sum")
    assert own == "no Hessian here" and other != "nothing"  # gloo's, when the time is over
    other, own = ranks(2, one_fails, "kernel")
    assert "modified in place" in own
    assert other.startswith("rank 1 raised RuntimeError: ") and "modified in place" in other
