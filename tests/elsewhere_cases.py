"""Run by test_elsewhere.py in a process of its own: weights that are freed or distributed, one line of JSON a case.

What reads freed memory ends the process, and a process group belongs to one.
"""

import copy
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import Function

import jactri

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)


def told(name, want, call, *given):
    """Print what became of a case: "right", "wrong" or the error."""
    try:
        got = call(*given)
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        found = "right" if got.shape == want.shape and torch.allclose(got, want) else "wrong"
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    print(json.dumps([name, found]), flush=True)


# -- freed memory ----------------------------------------------------------------------------------


class Product(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.t(), x.t() @ g


def mlp(x, w):
    return F.linear(F.linear(x, w[:12].view(3, 4)).tanh(), w[12:].view(4, 3))


# name: shape of the weight, the function of both
OPS = {
    "linear": ((3, 4), F.linear),
    "linear with a bias": ((3, 4), lambda x, w: F.linear(x, w, torch.ones(3))),
    "linear of tokens": ((3, 4), lambda x, w: F.linear(x.unsqueeze(1), w).flatten(1)),
    "product on the left": ((5, 5), lambda x, w: w @ x),
    "einsum": ((3, 4), lambda x, w: torch.einsum("ni,oi->no", x, w).tanh()),
    "scaling": ((4,), lambda x, w: x * w),
    "scaling from the left": ((4,), lambda x, w: w * x.sin()),
    "quotient": ((4,), lambda x, w: x / w),
    "convolution": ((2, 1, 3), lambda x, w: F.conv1d(x.unsqueeze(1), w).flatten(1)),
    "norm": ((4,), lambda x, w: F.layer_norm(x, (4,), w)),
    "prelu": ((1,), F.prelu),
    "where": ((4,), lambda x, w: torch.where(x > 0, x * w, x)),
    "Function": ((4, 3), Product.apply),
    "bilinear": ((2, 4, 4), lambda x, w: F.bilinear(x, x, w)),
    "addcmul": ((4,), lambda x, w: torch.addcmul(x, x, w)),
    "distance": ((3, 4), lambda x, w: torch.cdist(x, w)),
    "attention": ((1, 3, 4), lambda x, w: F.scaled_dot_product_attention(x.unsqueeze(0), w, w)[0]),
    "a view of a larger one": ((24,), mlp),
}
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

CALLS = {
    "forward": lambda f: jactri.jacobian(f, X, strategy="forward-mode"),
    "reverse": lambda f: jactri.jacobian(f, X, strategy="reverse-mode"),
    "differentiable": lambda f: jactri.jacobian(f, X, create_graph=True),
    "laplacian": lambda f: jactri.laplacian(f, X),
    "vjp": lambda f: jactri.vjp(f, X, f.ones())[1],
    "jvp": lambda f: jactri.jvp(f, X, X)[1],
    "hessian": lambda f: jactri.func.hessian(lambda x: f(x).sum())(X),
    "jjt": lambda f: jactri.jjt(f, X),
    "explain": lambda f: jactri.explain(f, X),
}


class Freed:
    """A function that frees its weight when it has run."""

    def __init__(self, op, trained):
        shape, self.op = OPS[op]
        self.shape, self.trained = shape, trained

    def __call__(self, x):
        weight = torch.rand(self.shape, generator=torch.Generator().manual_seed(1))
        weight.requires_grad_(self.trained)
        y = self.op(x, weight)
        weight.untyped_storage().resize_(0)
        return y

    def ones(self):
        with torch.no_grad():
            return torch.ones_like(self(X))


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.first(x).tanh())


def freed():
    nothing = torch.zeros(())
    for op in OPS:
        for trained in (False, True):
            for name, call in CALLS.items():
                f = Freed(op, trained)
                kind = "trained" if trained else "frozen"
                told(f"{op}/{kind}/{name}", nothing, call, f)
    products = {
        "dense": lambda p: p.dense(),
        "J v": lambda p: p @ {n: torch.ones_like(t) for n, t in m.named_parameters()},
        "J^T u": lambda p: p.T @ torch.ones(5, 2),
        "gram": lambda p: p.gram(),
    }
    for name, call in products.items():
        m = Weighted()
        jac = jactri.parameter_jacobian(m, X)
        m.first.weight.untyped_storage().resize_(0)
        told(f"parameters/{name}", nothing, call, jac)


# -- distributed weights ---------------------------------------------------------------------------


def wrapped(net, mesh):
    """The same net under every way of distributing it, on one process."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )
    from torch.nn.parallel import DistributedDataParallel

    def sharded(parts, **options):
        m = copy.deepcopy(net)
        for part in (*(m[i] for i in parts), m):
            fully_shard(part, mesh=mesh, **options)
        return m

    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return {
        "DDP": lambda: DistributedDataParallel(copy.deepcopy(net)),
        "DDP, static graph": lambda: DistributedDataParallel(copy.deepcopy(net), static_graph=True),
        "FSDP that keeps": lambda: sharded((0, 2), reshard_after_forward=False),
        "FSDP of the root": lambda: sharded(()),
        "FSDP that frees": lambda: sharded((0, 2)),
        "FSDP that frees, the root too": lambda: sharded((0, 2), reshard_after_forward=True),
        "flat FSDP": lambda: FullyShardedDataParallel(
            copy.deepcopy(net), use_orig_params=True, device_id=torch.device("cpu")
        ),
        "tensor parallel": lambda: parallelize_module(copy.deepcopy(net), mesh, plan),
    }


def last(values):
    return next(t for name, t in values.items() if name.endswith("2.weight"))


def picked(m):
    return [name for name, _ in m.named_parameters() if name.endswith("2.weight")]


def backward_after(m):
    """A training step after calls of jactri is what it would have been without."""
    jactri.jacobian(m, X, per_sample=True)
    m(X).square().sum().backward()
    return last({name: p.grad for name, p in m.named_parameters()})


def ends(mesh):
    """Inputs and outputs that are DTensors."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    def spread(x):
        return DTensor.from_local(x, mesh, [Replicate()]).sin()

    given = distribute_tensor(X, mesh, [Replicate()])
    calls = {
        "jacobian": lambda f, x: jactri.jacobian(f, x),
        "per_sample": lambda f, x: jactri.jacobian(f, x, per_sample=True),
        "laplacian": lambda f, x: jactri.laplacian(f, x),
        "diagonal": lambda f, x: jactri.diagonal(f, x),
        "jjt": lambda f, x: jactri.jjt(f, x),
        "jacrev": lambda f, x: jactri.func.jacrev(f)(x),
    }
    for name, call in calls.items():
        want = call(torch.sin, X)
        told(f"a DTensor in/{name}", want, call, torch.sin, given)
        told(f"a DTensor out/{name}", want, call, spread, X)
        told(f"a DTensor inside/{name}", want, call, lambda x: spread(x).to_local(), X)


def outside(make):
    """Parameters of FSDP that are not what the output was computed from, and weights that were freed since."""
    m, nothing = make(), torch.zeros(())
    y = m(X)
    told(
        "FSDP that frees/jacobian_of", nothing, lambda: jactri.jacobian_of(y, tuple(m.parameters()))
    )
    told("FSDP that frees/check", nothing, lambda: jactri.check(m, X))


U = torch.ones(5, 3)
OF_INPUTS = {
    "jacobian": lambda m: jactri.jacobian(m, X),
    "forward": lambda m: jactri.jacobian(m, X, strategy="forward-mode"),
    "per_sample": lambda m: jactri.jacobian(m, X, per_sample=True),
    "create_graph": lambda m: jactri.jacobian(m, X, create_graph=True),
    "chunks": lambda m: jactri.jacobian(m, X, chunk_size=1),
    "laplacian": lambda m: jactri.laplacian(m, X),
    "vjp": lambda m: jactri.vjp(m, X, U)[1],
    "jvp": lambda m: jactri.jvp(m, X, X)[1],
    "jacrev": lambda m: jactri.func.jacrev(m)(X),
    "hessian": lambda m: jactri.func.hessian(lambda x: m(x).sum())(X),
    "jtj": lambda m: jactri.jtj(m, X, per_sample=True),
    "compile": lambda m: jactri.compile(m, X, engine="fx")(X),
    "backward after": backward_after,
}
OF_PARAMETERS = {
    "dense": lambda m: last(jactri.parameter_jacobian(m, X).dense()),
    "gram": lambda m: jactri.parameter_jacobian(m, X).gram(),
    "J^T u": lambda m: last(jactri.parameter_jacobian(m, X).T @ U),
    "kernel": lambda m: jactri.empirical_ntk(m, X),
    "kernel of two": lambda m: jactri.empirical_ntk(m, X, X[:2]),
    "kernel of one weight": lambda m: jactri.empirical_ntk(m, X, params=picked(m)),
    "kernel of a tensor": lambda m: jactri.empirical_ntk(
        m, X, params=[dict(m.named_parameters())[name] for name in picked(m)]
    ),
    "ggn": lambda m: last(jactri.ggn(m, X, U).diagonal()),
    "compiled kernel": lambda m: jactri.compile(m, X, of=jactri.empirical_ntk, engine="fx")(X),
}


def distributed():
    from torch.distributed.device_mesh import init_device_mesh

    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
            mesh = init_device_mesh("cpu", (1,))
            ways = wrapped(net, mesh)
            ends(mesh)
            outside(ways["FSDP that frees"])
            for way, make in ways.items():
                for name, call in {**OF_INPUTS, **OF_PARAMETERS}.items():
                    want = call(copy.deepcopy(net))
                    told(f"{way}/{name}", want, lambda make=make, call=call: call(make()))
        finally:
            dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    {"freed": freed, "distributed": distributed}[sys.argv[1]]()
