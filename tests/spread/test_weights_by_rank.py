"""Tensor parallel weights: Jacobians in them equal those of one process, in DTensors placed as the weights are."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import jactri

F64 = torch.float64


class Tokens(nn.Module):
    """A block whose residual stream is sharded along tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.last = nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.down(self.up(self.norm(self.first(x).tanh())).tanh()))


def mlp(n):
    return nn.Sequential(nn.Linear(3, n), nn.Tanh(), nn.Linear(n, 4), nn.Tanh(), nn.Linear(4, 2))


def parallel(kind, mesh):
    """A model, and its like with weights that are shared out; inputs of three samples."""
    torch.manual_seed(1)
    if kind == "sequence":
        net = Tokens().to(F64)
        plan = {
            "first": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(use_local_output=False),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
            "last": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        x = torch.randn(3, 2, 3, dtype=F64)
    else:
        # of 5, parts are uneven; plain ones, as between the layers of "mixed", torch takes for even
        net, x = mlp(6 if kind == "mixed" else 5).to(F64), torch.randn(3, 3, dtype=F64)
        plan = {
            # the third layer stays whole, a plain tensor on every rank
            "mixed": {"0": ColwiseParallel(), "2": RowwiseParallel()},
            "colwise": {f"{i}": ColwiseParallel(output_layouts=Replicate()) for i in (0, 2, 4)},
            "rowwise": {f"{i}": RowwiseParallel(input_layouts=Replicate()) for i in (0, 2, 4)},
        }[kind]
    return net, parallelize_module(copy.deepcopy(net), mesh, plan), x


def placed(p, lead):
    if not isinstance(p, DTensor):
        return None
    return tuple(Shard(s.dim + lead) if s.is_shard() else s for s in p.placements)


def alike(got, want, m, lead):
    """Placed as the weights are, and right; parts too, which ``full_tensor`` would not tell of a replicated one."""
    for name, p in m.named_parameters():
        t, w = got[name], want[name]
        assert getattr(t, "placements", None) == placed(p, lead), (name, t)
        if isinstance(t, DTensor):
            assert t.device_mesh == p.device_mesh and t.shape == w.shape and t.is_contiguous()
            part = distribute_tensor(w, t.device_mesh, t.placements).to_local()
            t, w = t.to_local(), part
        assert t.shape == w.shape and t.dtype == w.dtype and torch.allclose(t, w), name
    assert list(got) == list(want)


def tangents(net, *lead):
    make = torch.Generator().manual_seed(5)
    return {
        n: torch.randn(*lead, *p.shape, dtype=F64, generator=make)
        for n, p in net.named_parameters()
    }


def as_weights(v, m, lead):
    return {
        name: distribute_tensor(v[name], p.device_mesh, placed(p, lead))
        if isinstance(p, DTensor)
        else v[name]
        for name, p in m.named_parameters()
    }


def all_of_it(kind):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    net, m, x = parallel(kind, mesh)
    jac, want = jactri.parameter_jacobian(m, x), jactri.parameter_jacobian(net, x)
    assert torch.allclose(jac.output, want.output)
    alike(jac.dense(), want.dense(), m, want.output.dim())
    assert type(jac.matrix()) is torch.Tensor and torch.allclose(jac.matrix(), want.matrix())
    for lead in ((), (0,), (2,)):
        v = tangents(net, *lead)
        for given in (v, as_weights(v, m, len(lead))):
            got = jac @ given
            assert got.shape == (want @ v).shape and torch.allclose(got, want @ v), lead
    v = {name: t.square() for name, t in tangents(net).items()}
    for diagonal in (False, True):
        got = jac.variance(as_weights(v, m, 0), diagonal)
        assert torch.allclose(got, want.variance(v, diagonal)), diagonal
    assert torch.allclose(jac.gram(), want.gram())
    for compute in ("full", "trace", "diagonal"):
        args = x[:2], x
        got = jactri.empirical_ntk(m, *args, compute=compute)
        assert torch.allclose(got, jactri.empirical_ntk(net, *args, compute=compute)), compute
    k = want.output[0].numel()
    h = torch.randn(3, k, k, dtype=F64, generator=torch.Generator().manual_seed(7))
    h = (h + h.mT).reshape(3, *want.output.shape[1:], *want.output.shape[1:])
    for hessian in (h, torch.ones_like(want.output), lambda block: block * 3):
        got, whole = jactri.ggn(m, x, hessian), jactri.ggn(net, x, hessian)
        alike(got.diagonal(), whole.diagonal(), m, 0)
        for lead in ((), (2,)):
            v = tangents(net, *lead)
            alike(got @ as_weights(v, m, len(lead)), whole @ v, m, len(lead))
    assert all(p.grad is None for p in m.parameters())


@pytest.mark.parametrize("kind", ["mixed", "colwise", "rowwise", "sequence"])
def test_all_results_in_weights(ranks, kind):
    ranks(2, all_of_it, kind)


def some():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    net, m, x = parallel("mixed", mesh)
    # empty, one sample, not contiguous
    for given in (x[:0], x[:1], x.t().contiguous().t()):
        jac, want = jactri.parameter_jacobian(m, given), jactri.parameter_jacobian(net, given)
        v = tangents(net)
        alike(jac.dense(), want.dense(), m, 2)
        assert torch.allclose(jac @ v, want @ v) and torch.allclose(jac.gram(), want.gram())
        assert torch.allclose(jac.matrix(), want.matrix())
    # of some parameters, in an order of their own
    names = ["2.bias", "0.weight"]
    jac, want = (jactri.parameter_jacobian(of, x, names) for of in (m, net))
    assert jac.names == want.names and torch.allclose(jac.gram(), want.gram())
    assert torch.allclose(jac.matrix(), want.matrix())
    # with a batch that is a DTensor on the weights' own mesh
    got = jactri.parameter_jacobian(m, distribute_tensor(x, mesh, [Replicate()])).dense()
    assert {t.placements for t in got.values()} == {(Shard(2),), (Shard(3),), (Replicate(),)}
    # compiled, at another point and of other weights
    kernel = jactri.compile(m, x, of=jactri.empirical_ntk, engine="fx")
    with torch.no_grad():
        for p in (m[0].bias, net[0].bias):
            p.add_(1)
    assert torch.allclose(kernel(x + 1), jactri.empirical_ntk(net, x + 1))
    # of two models, the same weights later
    later = copy.deepcopy(m)
    with torch.no_grad():
        later[0].bias.add_(1)
    one = copy.deepcopy(net)
    with torch.no_grad():
        one[0].bias.add_(1)
    ours = jactri.parameter_jacobian(m, x).gram(jactri.parameter_jacobian(later, x[:2]))
    assert torch.allclose(
        ours, jactri.parameter_jacobian(net, x).gram(jactri.parameter_jacobian(one, x[:2]))
    )


def test_some_of_it(ranks):
    ranks(2, some)


def counted(kind):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    net, m, x = parallel(kind, mesh)
    jac = jactri.parameter_jacobian(m, x)
    v, y = as_weights(tangents(net), m, 0), m(x)
    G = jactri.ggn(m, x, torch.ones_like(jac.output))
    calls = {
        "dense": jac.dense, "J v": lambda: jac @ v, "gram": jac.gram, "G v": lambda: G @ v,
        "variance": lambda: jac.variance(v, True), "diagonal": G.diagonal, "J^T u": lambda: jac.T @ jac.output,
    }  # fmt: skip
    found = {}
    for name, call in calls.items():
        with CommDebugMode() as seen:
            call()
        found[name] = seen.get_total_counts()
    with CommDebugMode() as seen:
        grads = torch.autograd.grad(y, list(m.parameters()), torch.ones_like(y))
    pending = sum(isinstance(g, DTensor) and g.placements[0].is_partial() for g in grads)
    return found, y[0].numel(), seen.get_total_counts(), pending


@pytest.mark.parametrize("kind", ["mixed", "sequence"])
def test_what_is_sent(ranks, kind):
    """What backward passes send, pending gradients for each sample, and one all_reduce for a sum over the weights."""
    for found, m, each, pending in ranks(2, counted, kind):
        assert bool(pending) == (kind == "sequence")
        one, rows = each + pending, 3 * (m * each + pending)
        assert found == {
            "dense": rows, "diagonal": rows, "J v": rows + 1, "gram": rows + 1, "variance": rows + 1,
            "J^T u": one, "G v": rows + 1 + one,
        }  # fmt: skip


def refused():
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("tp", "dp"))
    net, m, x = parallel("mixed", mesh["tp"])
    jac = jactri.parameter_jacobian(m, x)
    calls = {
        "graph": lambda: jactri.parameter_jacobian(m, x, create_graph=True),
        "out": lambda: jac.dense(out={}),
        "memory": lambda: jactri.parameter_jacobian(m, x, memory_limit=64).dense(),
        "shared": lambda: jactri.ggn(m, distribute_tensor(x, mesh, [Shard(0), Replicate()]), lambda b: b),
        "other": lambda: jac.gram(jactri.parameter_jacobian(net, x)),
        "whole": lambda: jactri.parameter_jacobian(net, x).gram(jac),
        "apart": lambda: jactri.parameter_jacobian(m, distribute_tensor(x, mesh["dp"], [Shard(0)])).dense(),
        "names": lambda: jac @ {"0.weight": x},
        "shape": lambda: jac @ dict.fromkeys(jac.names, x),
    }  # fmt: skip
    with torch.no_grad():
        changed = jactri.parameter_jacobian(m, x)
    said = {}
    for name, call in calls.items():
        with pytest.raises((RuntimeError, ValueError)) as error:
            call()
        said[name] = str(error.value)
    with torch.no_grad():
        m[0].bias.add_(1)
    with pytest.raises(RuntimeError, match="was modified in place after the forward pass"):
        changed.gram()
    return said


def test_refusals(ranks):
    want = {
        "graph": "create_graph=True is not possible for parameters that are DTensors",
        "out": "out= of dense is not possible for parameters that are DTensors",
        "memory": "memory_limit",
        "shared": "have it Replicate() there",
        "other": "placed alike",
        "whole": "placed alike",
        "apart": "the mesh that has the dimensions of both",
        "names": "v must have the names of this Jacobian",
        "shape": "must have the parameter's shape",
    }
    for said in ranks(2, refused):
        for name, text in want.items():
            assert text in said[name], (name, said[name])
