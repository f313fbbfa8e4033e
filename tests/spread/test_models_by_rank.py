"""Models that are distributed themselves, FSDP2, DDP and tensor parallel, on batches that ranks share."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import jactri

F64 = torch.float64


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).to(F64)


def data(n):
    return torch.randn(n, 3, dtype=F64, generator=torch.Generator().manual_seed(2))


def sharded(net, mesh, keep=True):
    net = copy.deepcopy(net)
    options = {"mesh": mesh, "reshard_after_forward": not keep}
    fully_shard(net[0], **options)
    fully_shard(net[2], **options)
    return fully_shard(net, **options)


OF_INPUTS = {
    "jacobian": lambda m, x: jactri.jacobian(m, x, per_sample=True),
    "forward": lambda m, x: jactri.jacobian(m, x, per_sample=True, strategy="forward-mode"),
    "create_graph": lambda m, x: jactri.jacobian(m, x, True, per_sample=True),
    "jtj": lambda m, x: jactri.jtj(m, x, per_sample=True),
    "laplacian": lambda m, x: jactri.laplacian(m, x),
    "gradient": lambda m, x: jactri.gradient(m, x),
}


def last(values):
    return next(t for name, t in values.items() if name.endswith("2.weight"))


OF_PARAMETERS = {
    "dense": lambda m, x: last(jactri.parameter_jacobian(m, x).dense()),
    "J^T y": lambda m, x: last((j := jactri.parameter_jacobian(m, x)).T @ j.output),
    "gram": lambda m, x: jactri.parameter_jacobian(m, x).gram(),
    "kernel": lambda m, x: jactri.empirical_ntk(m, x, x, compute="trace"),
    "ggn": lambda m, x: last(jactri.ggn(m, x, lambda b: 2 * b).diagonal()),
    "G v": lambda m, x: last(
        jactri.ggn(m, x, lambda b: 2 * b) @ {n: torch.ones_like(p) for n, p in m.named_parameters()}
    ),
}  # fmt: skip


def outcome(call, want, *given):
    try:
        got = call(*given)
    except RuntimeError as error:
        return str(error)
    got = got.full_tensor() if isinstance(got, DTensor) else got
    return "right" if got.shape == want.shape and torch.allclose(got, want) else "wrong"


def distributed_models(n):
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    net, x = mlp(), data(n)
    given = distribute_tensor(x, mesh, [Shard(0)])
    ways = {
        "DDP": DistributedDataParallel(copy.deepcopy(net)),
        "kept": sharded(net, mesh),
        "freed": sharded(net, mesh, keep=False),
    }
    said = {}
    for way, m in ways.items():
        for name, call in {**OF_INPUTS, **OF_PARAMETERS}.items():
            said[way, name] = outcome(call, call(net, x), m, given)
    # the model trains on as it would have
    for way in ("DDP", "kept"):
        m, one = ways[way], copy.deepcopy(net)
        m(given.to_local()).square().sum().backward()
        one(x).square().sum().backward()
        grad = last({k: p.grad for k, p in m.named_parameters()})
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        assert torch.allclose(grad * world, last({k: p.grad for k, p in one.named_parameters()})), (
            way
        )
    return said


@pytest.mark.parametrize("world, n", [(2, 5), (2, 2), (4, 5)])
def test_models_of_data_parallel(ranks, world, n):
    """With uneven parts, and ranks with one sample or none: all of them run the model equally often."""
    for said in ranks(world, distributed_models, n):
        for (way, name), told in said.items():
            if way == "freed":
                assert "reshard_after_forward=False" in told, (way, name, told)
            else:
                assert told == "right", (way, name, told)


def tensor_parallel():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net, x = mlp(), data(5)
    given = distribute_tensor(x, mesh, [Shard(0), Replicate()])
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    m = parallelize_module(copy.deepcopy(net), mesh["tp"], plan)
    calls = {**OF_INPUTS, **OF_PARAMETERS}
    jac, whole = jactri.parameter_jacobian(m, given), jactri.parameter_jacobian(net, x)
    make = torch.Generator().manual_seed(3)
    for n in (0, 1, 3):  # blocks of cotangents
        u = torch.randn(n, 5, 2, dtype=F64, generator=make)
        got = jac.T @ distribute_tensor(u, mesh, [Shard(1), Replicate()])
        for (name, p), t in zip(m.named_parameters(), (whole.T @ u).values(), strict=True):
            moved = [Shard(s.dim + 1) if s.is_shard() else s for s in p.placements]
            assert list(got[name].placements) == moved and got[name].shape == t.shape
            assert torch.allclose(got[name].full_tensor(), t), name
    for name, t in (jac.T @ jac.output).items():
        assert t.placements == dict(m.named_parameters())[name].placements
    with pytest.raises(RuntimeError, match="create_graph=True is not possible"):
        jactri.parameter_jacobian(m, given, create_graph=True)
    # seeds by ranks that compute it together would be added up
    assert torch.allclose(
        jactri.jacobian(m, x, mesh=mesh["dp"]).full_tensor(), jactri.jacobian(net, x)
    )
    for frozen in (m, copy.deepcopy(m).requires_grad_(False)):
        with pytest.raises(RuntimeError, match="leave mesh= out, or pass the dimension"):
            jactri.jacobian(frozen, x, mesh=mesh["tp"])
    placed = dict(m.named_parameters())
    for name, t in jac.dense().items():  # sharded by samples, and along the weight's axes
        moved = [Shard(s.dim + 2) if s.is_shard() else s for s in placed[name].placements]
        assert list(t.placements) == [Shard(0), *moved] and t.device_mesh == mesh
        assert torch.allclose(t.full_tensor(), whole.dense()[name]), name
    assert jac.matrix().placements == (Shard(0), Replicate())
    assert torch.allclose(jac.matrix().full_tensor(), whole.matrix())
    kernel = jactri.empirical_ntk(m, given, given.redistribute(placements=[Replicate()] * 2))
    assert kernel.placements == (Shard(0), Replicate())
    assert torch.allclose(kernel.full_tensor(), jactri.empirical_ntk(net, x))
    return {name: outcome(call, call(net, x), m, given) for name, call in calls.items()}


def test_tensor_parallel_weights(ranks):
    for said in ranks(4, tensor_parallel):
        for name, told in said.items():
            if name in ("gram", "kernel"):
                assert "has no factors to go to other ranks" in told and "DTensor" in told, (
                    name,
                    told,
                )
            elif name == "laplacian":
                assert "no second derivative" in told
            else:
                assert told == "right", (name, told)


def both_ways(n):
    """Said where weights stay after a backward pass, and where one frees them."""
    # torch's, of layers that return views
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net, x = mlp(), data(n)
    given = distribute_tensor(x, mesh, [Shard(0), Replicate()])
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    said = {}
    for keep in (True, False):
        m = parallelize_module(copy.deepcopy(net), mesh["tp"], plan)
        for part in (m[0], m[2], m):
            fully_shard(part, mesh=mesh["dp"], reshard_after_forward=False)
        if keep:
            m.set_reshard_after_backward(False)
        for name in ("dense", "J^T y", "ggn", "G v"):
            call = OF_PARAMETERS[name]
            said[keep, name] = outcome(call, call(net, x), m, given)
    return said


@pytest.mark.parametrize("n", [5, 1])
def test_tensor_parallel_weights_under_fsdp(ranks, n):
    """Ranks have other numbers of rows: no backward pass may gather weights."""
    for said in ranks(4, both_ways, n):
        for (keep, name), told in said.items():
            assert told == "right" if keep else "set_reshard_after_backward(False)" in told, (
                name,
                told,
            )


# -- means ------------------------------------------------------------------------------------------


def lens(net, prompts, **options):
    made = jactri.JacobianMean(net, ["1", "2"], "3", **options)
    for prompt in prompts:
        made.add(prompt)
    return made


def means(counts):
    mesh, rank = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()
    torch.manual_seed(1)
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    prompts = [torch.randint(10, (1, 2 + i)) for i in range(sum(counts))]
    begin = sum(counts[:rank])
    mine = lens(net, prompts[begin : begin + counts[rank]])
    whole, made = lens(net, prompts), mine.merge_ranks(mesh)
    assert made.count == len(prompts) and mine.count == counts[rank]
    for name, t in whole.value().items():
        assert torch.allclose(made.value()[name], t, atol=1e-6)
        assert torch.allclose(made.standard_error()[name], whole.standard_error()[name], atol=1e-6)
    assert made.add(prompts[0]).count == len(prompts) + 1
    few = lens(net, prompts[:1], errors=False).merge_ranks(mesh)
    assert few.count == len(counts)
    other = lens(net, prompts[:1], errors=bool(rank))
    with pytest.raises(RuntimeError, match="mean of rank 1"):
        other.merge_ranks(mesh)
    nothing = lens(net, []).merge_ranks(mesh)
    assert nothing.count == 0


def loaded_by_one(path):
    """A file has its tensors by name, 10 before 2."""
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    torch.manual_seed(1)
    net = nn.Sequential(nn.Embedding(10, 4), *[nn.Linear(4, 4) for _ in range(11)])
    prompts = [torch.randint(10, (1, 2)) for _ in range(2)]
    mine, whole = (jactri.JacobianMean(net, ["2", "10"], "11") for _ in range(2))
    mine.run(prompts[rank : rank + 1])
    if rank:
        mine.save(path)
        mine = jactri.JacobianMean.load(path)
    want, made = whole.run(prompts).value(), mine.merge_ranks(mesh).value()
    assert all(torch.allclose(made[name], t, atol=1e-6) for name, t in want.items())


def test_a_mean_that_was_loaded(ranks, tmp_path):
    pytest.importorskip("safetensors")
    ranks(2, loaded_by_one, str(tmp_path / "mean"))


@pytest.mark.parametrize("counts", [(3, 1), (2, 0, 1, 4)])
def test_means_of_ranks(ranks, counts):
    ranks(len(counts), means, counts)
