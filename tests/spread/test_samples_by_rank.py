"""Batches that are DTensors: each rank's samples, without a collective, equal to one process."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import jactri

F64 = torch.float64


class Net:
    """No module, whose uses CommDebugMode would hook."""

    def __init__(self):
        make = torch.Generator().manual_seed(1)
        self.first, self.last = (
            torch.randn(*shape, dtype=F64, generator=make).requires_grad_()
            for shape in ((3, 5), (5, 3))
        )

    def __call__(self, x):
        return (x @ self.first).tanh() @ self.last

    def parameters(self):
        return self.first, self.last


def data(n):
    return torch.randn(n, 3, dtype=F64, generator=torch.Generator().manual_seed(2))


def two(x):
    return x.sin(), x.flip(1) * x


def total(x):
    return x.pow(3).sum(1)


M = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 3.0]], dtype=F64)

CALLS = {
    "jacobian": lambda f, x: jactri.jacobian(f, x, per_sample=True),
    "forward": lambda f, x: jactri.jacobian(f, x, per_sample=True, strategy="forward-mode"),
    "assume": lambda f, x: jactri.jacobian(f, x, per_sample="assume"),
    "output": lambda f, x: jactri.jacobian(f, x, per_sample=True, return_output=True),
    "two outputs": lambda f, x: jactri.jacobian(two, x, per_sample=True),
    "a tuple": lambda f, x: jactri.jacobian(lambda a, b: f(a) * b, (x, x), per_sample=True),
    "jtj": lambda f, x: jactri.jtj(f, x, M, per_sample=True),
    "jtj of each": lambda f, x: jactri.jtj(f, x, x.unsqueeze(2) * x.unsqueeze(1), per_sample=True),
    "jjt": lambda f, x: jactri.jjt(f, x, per_sample=True),
    "diagonal": lambda f, x: jactri.diagonal(f, x, per_sample=True),
    "divergence": lambda f, x: jactri.divergence(f, x, return_lower=True),
    "gradient": lambda f, x: jactri.gradient(f, x),
    "laplacian": lambda f, x: jactri.laplacian(f, x, return_lower=True),
    "weighted laplacian": lambda f, x: jactri.laplacian(f, x, M),
    "bilaplacian": lambda f, x: jactri.bilaplacian(total, x),
    "compiled": lambda f, x: jactri.compile(f, x, per_sample=True, engine="fx")(x),
}


def flat(answer):
    return [t for a in answer for t in flat(a)] if isinstance(answer, tuple) else [answer]


def all_calls(n):
    """Each call on this rank's samples, held against the whole batch."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    x, f = data(n), Net()
    given = distribute_tensor(x, mesh, [Shard(0)])
    seen = []

    def func(t):
        seen.append((type(t), len(t)))
        return f(t)

    wrong = []
    for name, call in CALLS.items():
        want = flat(call(f, x))
        seen.clear()
        with CommDebugMode() as comm:
            got = flat(call(func, given))
        assert comm.get_total_counts() == 0, (name, comm.get_comm_counts())
        assert all(kind is torch.Tensor for kind, _ in seen) and len(seen) <= 1 + (
            name == "compiled"
        )
        for a, b in zip(got, want, strict=True):
            assert type(a) is DTensor and tuple(a.placements) == (Shard(0),), name
            assert a.shape == b.shape and a.to_local().shape[1:] == b.shape[1:], name
            if not torch.allclose(a.full_tensor(), b):
                wrong.append(name)
    return wrong


@pytest.mark.parametrize("world, n", [(1, 3), (2, 5), (4, 5), (4, 2), (2, 1), (2, 0)])
def test_calls_equal_one_process(ranks, world, n):
    """Uneven parts, ranks with one sample, and with none."""
    assert ranks(world, all_calls, n) == [[]] * world


def mixed_calls():
    """What each call of a function says, whose samples mix."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    given = distribute_tensor(data(4), mesh, [Shard(0)])
    said = {}
    for name, call in CALLS.items():
        if name in ("assume", "two outputs", "bilaplacian"):
            continue
        try:
            call(lambda x: x.sin() - x.sin().mean(0), given)
            said[name] = "nothing"
        except RuntimeError as error:
            said[name] = str(error)
    return said


@pytest.mark.parametrize("world", [2, 4])
def test_samples_that_mix_are_refused(ranks, world):
    """Also where each rank has a single one, of which nothing could be told."""
    for said in ranks(world, mixed_calls):
        wrong = {k: v for k, v in said.items() if "mix" not in v}
        assert len(said) > 10 and not wrong


def in_two_dimensions():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x, f = data(5), Net()
    want = jactri.jacobian(f, x, per_sample=True)
    for placements in ([Shard(0), Replicate()], [Replicate(), Shard(0)], [Shard(0), Shard(0)]):
        given = distribute_tensor(x, mesh, placements)
        with CommDebugMode() as comm:
            got = jactri.jacobian(f, given, per_sample=True)
        assert comm.get_total_counts() == 0
        assert list(got.placements) == placements and got.device_mesh == mesh
        assert torch.allclose(got.full_tensor(), want)
    whole = distribute_tensor(x, mesh, [Replicate(), Replicate()])
    got = jactri.jacobian(f, whole)  # all of it is here
    assert list(got.placements) == [Replicate(), Replicate()] and got.shape == (5, 3, 5, 3)
    assert torch.allclose(got.to_local(), jactri.jacobian(f, x))


def test_a_mesh_of_two_dimensions(ranks):
    ranks(4, in_two_dimensions)


def not_contiguous():
    mesh = init_device_mesh("cpu", (2,))
    f, x = Net(), data(6)
    base = torch.randn(3, 6, dtype=F64, generator=torch.Generator().manual_seed(3))
    for whole in (base.t(), base.t().contiguous()[:, [2, 0, 1]].as_strided((6, 3), (1, 6))):
        given = DTensor.from_local(
            whole[3 * mesh.get_local_rank() :][:3], mesh, [Shard(0)], shape=(6, 3), stride=(1, 6)
        )
        got = jactri.jacobian(f, given, per_sample=True)
        assert torch.allclose(got.full_tensor(), jactri.jacobian(f, whole, per_sample=True))
        assert torch.allclose(
            (got @ got.mT).full_tensor(), (got.full_tensor() @ got.full_tensor().mT)
        )
    each = torch.randn(6, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(4))
    with jactri.distributed.samples(mesh):  # plain tensors stay plain
        mine = x[:1] if mesh.get_local_rank() else x
        got = jactri.jacobian(f, mine, per_sample=True)
        assert type(got) is torch.Tensor
        assert torch.allclose(got, jactri.jacobian(f, x, per_sample=True)[: len(mine)])
        with pytest.raises(RuntimeError, match="mix"):
            jactri.jacobian(lambda x: x - x.mean(0), mine, per_sample=True)
        for n in (len(mine), 0):  # weights of each sample, and of all
            for m in (each, each[0], each[0, 0]):
                own = m[:n] if m.dim() == 3 else m
                got = jactri.jtj(f, x[:n], own, per_sample=True)
                assert torch.allclose(got, jactri.jtj(f, x, m, per_sample=True)[:n])
        for options in ({"layout": "banded"}, {"out": torch.empty(len(mine), 3, 3, dtype=F64)}):
            with pytest.raises(RuntimeError, match="per_sample='assume'"):
                jactri.jacobian(f, mine, per_sample=True, **options)
        out = jactri.jacobian(
            f, mine, per_sample="assume", out=torch.empty(len(mine), 3, 3, dtype=F64)
        )
        assert torch.allclose(out, jactri.jacobian(f, x, per_sample=True)[: len(mine)])
        point = x[0, :1]  # no batch of one sample
        for call in (jactri.gradient, jactri.laplacian, jactri.bilaplacian):
            assert call(lambda p: p.prod() ** 5, point).tolist() == pytest.approx(
                call(lambda p: p[0] ** 5, point).tolist()
            )
        leaf = mine.clone().requires_grad_()
        if len(mine) == 1:
            with pytest.raises(RuntimeError, match="one sample on this rank"):
                jactri.jacobian_of(f(leaf), leaf, per_sample=True)
        assert torch.allclose(jactri.jacobian_of(f(leaf), leaf, per_sample="assume"), out)


def test_strides_and_plain_batches(ranks):
    ranks(2, not_contiguous)


def gradients(n):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    f, x = Net(), data(n)
    whole = x.clone().requires_grad_()
    want = torch.autograd.grad(
        jactri.jacobian(f, whole, True, per_sample=True).pow(2).sum(), whole
    )[0]
    given = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    loss = jactri.jacobian(f, given, True, per_sample=True).pow(2).sum()
    loss.backward()
    assert given.grad.placements == (Shard(0),)
    assert torch.allclose(given.grad.full_tensor(), want)
    parts = [p.grad for p in f.parameters() if p.grad is not None]
    assert not jactri.jacobian(f, given, per_sample=True).requires_grad
    return [t.sum().item() for t in parts]


@pytest.mark.parametrize("n", [5, 2, 1])
def test_gradients_of_losses(ranks, n):
    """They go to the batch as a DTensor, and to weights from this rank's samples."""
    found = ranks(2, gradients, n)
    f, x = Net(), data(n)
    jactri.jacobian(f, x, True, per_sample=True).pow(2).sum().backward()
    want = [p.grad.sum().item() for p in f.parameters() if p.grad is not None]
    assert [a + b for a, b in zip(*found, strict=True)] == pytest.approx(want)


def with_poles(func):
    mesh = init_device_mesh("cpu", (2,))
    given = distribute_tensor(data(1).tanh().cosh() - 1, mesh, [Shard(0)])
    weight = torch.ones(3, dtype=F64, requires_grad=True)
    J = jactri.jacobian(lambda x: POLES[func](x * weight), given, True, per_sample=True)
    J.square().sum().backward()
    return weight.grad.tolist()


POLES = {
    "at one": torch.acos,
    "of differences": lambda x: (x[:, :2] - x[:, 1:]).norm(dim=1, keepdim=True),
    "of matrices": lambda x: torch.linalg.inv(x.unsqueeze(1) ** torch.tensor([[0], [1], [2]])),
}


@pytest.mark.parametrize("func", POLES)
def test_a_rank_without_samples_adds_nothing_to_gradients(ranks, func):
    mine, none = ranks(2, with_poles, func)
    assert none == [0.0] * 3 and 0 < min(map(abs, mine)) < float("inf")


def refusals():
    mesh = init_device_mesh("cpu", (2,))
    x, f = data(4), Net()
    given = distribute_tensor(x, mesh, [Shard(0)])
    columns = distribute_tensor(x, mesh, [Shard(1)])
    partial = DTensor.from_local(x, mesh, [Partial()])
    tries = {
        "columns": lambda: jactri.jacobian(f, columns, per_sample=True),
        "partial": lambda: jactri.gradient(f, partial),
        "dense": lambda: jactri.jacobian(f, given),
        "jtj": lambda: jactri.jtj(f, given),
        "diagonal": lambda: jactri.diagonal(f, given),
        "plain beside": lambda: jactri.jacobian(lambda a, b: a * b, (given, x), per_sample=True),
        "other placement": lambda: jactri.jacobian(
            lambda a, b: a * b, (given, distribute_tensor(x, mesh, [Replicate()])), per_sample=True
        ),
        "weight": lambda: jactri.jtj(f, x, given, per_sample=True),
        "sparse": lambda: jactri.jacobian(f, given, per_sample=True, layout=torch.sparse_coo),
        "out": lambda: jactri.jacobian(f, given, per_sample=True, out=torch.empty(2, 3, 3)),
        "a point": lambda: jactri.gradient(torch.sin, distribute_tensor(x[0], mesh, [Shard(0)])),
        "vjp": lambda: jactri.vjp(f, given, given),
        "linearize": lambda: jactri.linearize(f, given),
        "check": lambda: jactri.check(f, given, per_sample=True),
        "a DTensor out": lambda: jactri.jacobian(
            lambda t: DTensor.from_local(t, mesh, [Shard(0)]), given, per_sample=True
        ),
    }
    said = {}
    for name, call in tries.items():
        try:
            call()
            said[name] = "nothing"
        except RuntimeError as error:
            said[name] = str(error)
    return said


def test_refusals_say_what_to_write(ranks):
    words = {
        "columns": "redistribute(placements=[Shard(dim=0)])",
        "partial": "redistribute(placements=[Replicate()])",
        "dense": "per_sample=True",
        "jtj": "per_sample=True",
        "diagonal": "per_sample=True",
        "plain beside": "inputs[1] of jacobian is a plain tensor",
        "other placement": "inputs[1].redistribute",
        "weight": "weight of jtj is a DTensor",
        "sparse": "inputs.to_local()",
        "out": "inputs.to_local()",
        "a point": "single point",
        **dict.fromkeys(
            ("vjp", "linearize", "check", "a DTensor out"), "is a DTensor, so a process"
        ),
    }
    for said in ranks(2, refusals):
        assert {k: v for k, v in said.items() if words[k] not in v} == {}
