"""Jacobians between layers, and of outputs that are there, by the ranks of a mesh: the cotangents of one prompt."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from alone import as_rank
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import jactri

F64 = torch.float64
WIDTH, WORDS = 6, 11


class Block(nn.Module):
    def __init__(self, again=False):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.again = again

    def mixed(self, x, mask):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        allowed = torch.ones(x.shape[1], x.shape[1]).tril().bool() & mask[:, None, :].bool()
        x = x + self.out((q @ k.mT).masked_fill(~allowed, -1e9).softmax(-1) @ v)
        return x + self.mlp(x).tanh()

    def forward(self, x, mask):
        if self.again:
            return checkpoint(self.mixed, x, mask, use_reentrant=False)
        return self.mixed(x, mask)


class Model(nn.Module):
    """Tokens in; a dict out."""

    def __init__(self, again=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList(Block(again) for _ in range(3))

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return {"hidden": x, "logits": self.head(x)}


def made(again=False):
    torch.manual_seed(1)
    return Model(again).to(F64).eval().requires_grad_(False)


def prompt(seed=0, tokens=5):
    draw = torch.Generator().manual_seed(seed)
    given = {"input_ids": torch.randint(WORDS, (2, tokens), generator=draw)}
    return given | {"attention_mask": torch.ones(2, tokens).tril(2)}


def weights(*shape):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(3))


ENDS = ["layers.0", "layers.1"], "layers.2"
# name: (options of layer_jacobian, where the answer is cut)
CASES = {
    "lens": ({}, Shard(0)),
    "last token": ({"reduce": (-1, "mean")}, Shard(0)),
    "rows": ({"rows": weights(3, WIDTH), "reduce": (0, "sum")}, Shard(0)),
    "random rows": ({"rows": 5, "seed": 7}, Shard(0)),
    "one row": ({"rows": 1}, Shard(0)),
    "a token in each": ({"reduce": (1, None)}, Shard(0)),
    "weights": ({"reduce": (weights(5, 3), weights(2, 5, 2))}, Shard(1)),
    "nothing is reduced": ({"reduce": (None, None)}, Shard(2)),
    "chunks": ({"chunk_size": 1}, Shard(0)),
}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_parts_make_the_answer(name, count):
    model, (options, where) = made(), CASES[name]
    want = jactri.layer_jacobian(model, prompt(), *ENDS, **options)
    parts = []
    for rank in range(count):
        with as_rank(rank, count) as mesh:
            found = jactri.layer_jacobian(model, prompt(), *ENDS, **options, mesh=mesh)
            assert list(found) == ENDS[0]
            for layer, J in found.items():
                assert J.placements == (where,) and J.shape == want[layer].shape
            parts.append({layer: J.to_local() for layer, J in found.items()})
    for layer, J in want.items():
        found = torch.cat([p[layer] for p in parts], where.dim)
        assert torch.allclose(found, J, rtol=1e-12, atol=1e-12)


def lens(again):
    """On one rank: answers of the mesh, and of this process alone."""
    mesh, model = init_device_mesh("cpu", (dist.get_world_size(),)), made(again)
    for options in ({}, {"rows": 3}, {"reduce": (-1, None)}):
        found = jactri.layer_jacobian(model, prompt(), *ENDS, **options, mesh=mesh)
        want = jactri.layer_jacobian(model, prompt(), *ENDS, **options)
        for layer, J in want.items():
            assert torch.allclose(found[layer].full_tensor(), J, rtol=1e-12, atol=1e-12)
    return True


@pytest.mark.parametrize("count, again", [(1, False), (2, True), (4, False)])
def test_processes(ranks, count, again):
    assert all(ranks(count, lens, again))


def test_a_rank_runs_its_cotangents():
    """But for what all have to form once: the weights that belong to tokens."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(9, 32), *[nn.Linear(32, 32) for _ in range(4)]).to(F64)
    tokens = torch.tensor([[1, 2, 3]])

    def flops(**options):
        with FlopCounterMode(display=False) as forward:
            model(tokens)
        with FlopCounterMode(display=False) as counted:
            jactri.layer_jacobian(model, tokens, ["1", "2"], "4", **options)
        return counted.get_total_flops() - forward.get_total_flops()

    whole = flops()
    for count in (2, 4):
        for rank in range(count):
            with as_rank(rank, count) as mesh:
                assert flops(mesh=mesh) == whole / count


# -- means over prompts -------------------------------------------------------------------------------


def means(path):
    mesh, model = init_device_mesh("cpu", (dist.get_world_size(),)), made()
    rank, prompts = dist.get_rank(), [prompt(k, 5 + k) for k in range(3)]
    one = jactri.JacobianMean(model, *ENDS).run(prompts)
    many = jactri.JacobianMean(model, *ENDS, mesh=mesh)
    many.run(prompts[:2], path)
    dist.barrier()
    if rank == 0:
        assert jactri.JacobianMean.load(path).count == 2
    many = jactri.JacobianMean.load(path, model, mesh=mesh).run(prompts, path)
    for mean, other in (
        (many, one), (jactri.JacobianMean.load(path), one)
    ):  # fmt: skip
        assert mean.count == 3
        for layer, t in other.value().items():
            assert torch.allclose(mean.value()[layer], t, rtol=1e-12, atol=1e-12)
            error = other.standard_error()[layer]
            assert torch.allclose(mean.standard_error()[layer], error, rtol=1e-9, atol=1e-12)
    assert type(many.value()["layers.0"]) is torch.Tensor
    with pytest.raises(RuntimeError, match="merge_ranks would count them again"):
        many.merge_ranks(mesh)
    return os.path.exists(path)


@pytest.mark.parametrize("count", [2, 3])
def test_a_mean_by_rows(ranks, tmp_path, count):
    pytest.importorskip("safetensors")
    assert all(ranks(count, means, str(tmp_path / "mean.safetensors")))


# -- what is refused, on every rank ------------------------------------------------------------------


def called(name, path):
    mesh, rank, model = init_device_mesh("cpu", (2,)), dist.get_rank(), made()
    given, options = prompt(), {"mesh": mesh}
    if name == "prompt":
        given["input_ids"][0, 0] = rank
    elif name == "weights":
        model.layers[2].mlp.bias[0] += 1e-9 * rank
    elif name == "rows":
        options |= {"rows": 3, "seed": rank}
    elif name == "sources":
        return jactri.layer_jacobian(model, given, f"layers.{rank}", "layers.2", mesh=mesh)
    elif name == "one fails" and rank:
        given["input_ids"] += WORDS
    elif name == "an option of one" and rank:
        options["rows"] = 0
    elif name == "tokenizer":
        return jactri.JacobianMean(model, *ENDS, mesh=mesh).run(prompts_of(rank))
    elif name == "limit":
        limit = 300 if rank else None
        mean = jactri.JacobianMean(model, *ENDS, mesh=mesh, memory_limit=limit)
        return mean.add(given)
    elif name == "file":
        mean = jactri.JacobianMean(model, *ENDS, mesh=mesh)
        return mean.run([given], f"{path}/{rank}/mean.safetensors")
    elif name == "no mesh":
        options["mesh"] = 2
    return jactri.layer_jacobian(model, given, *ENDS, **options)


def prompts_of(rank):
    yield prompt(0)
    if rank:
        raise KeyError("mine")
    yield prompt(1)


REFUSED = {
    "prompt": ("differ in the numbers in inputs", None),
    "weights": ("differ in the weights of the function", None),
    "rows": ("differ in the options of the call", None),
    "sources": ("differ in the options of the call", None),
    "one fails": ("rank 1 failed", "IndexError"),
    "an option of one": ("rank 1 failed", "ValueError"),
    "tokenizer": ("rank 1 failed", "KeyError"),
    "limit": ("rank 1 failed", "MemoryLimitTooSmall"),
    "no mesh": ("mesh must be a torch.distributed.device_mesh.DeviceMesh", "TypeError"),
    "file": ("differ in what an interrupted call left", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank(ranks, tmp_path, name):
    if name == "file":
        pytest.importorskip("safetensors")
        for rank in range(2):
            (tmp_path / str(rank)).mkdir()
        alone = jactri.JacobianMean(made(), *ENDS)
        alone.add(prompt()).save(tmp_path / "1" / "mean.safetensors")
    text, other = REFUSED[name]
    zero, one = ranks(2, called, name, str(tmp_path), errors=True, timeout=20)
    if name != "no mesh":
        assert zero.kind == "RuntimeError"
    assert text in zero.text
    assert one.kind == (other or "RuntimeError") and (other or text in one.text)


# -- outputs that are there --------------------------------------------------------------------------


def of_outputs(name):
    """On one rank: `jacobian_of` of tensors amid a graph."""
    mesh, rank = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()
    x, options = weights(4, 5).requires_grad_(), {}
    if name == "values" and rank:
        x = (2 * x).detach().requires_grad_()
    hidden = (x @ weights(5, 7)).tanh()
    if name == "hooks":
        warnings.filterwarnings("ignore", message="a hook on gradients")
        hidden.register_hook(lambda g: 2 * g)
    y = (hidden @ weights(7, 6)).sin().cumsum(1)
    z = y.sum() if name == "one number" else y
    if name == "per_sample":
        options["per_sample"] = True
    elif name == "create_graph":
        options["create_graph"] = True
    want = jactri.jacobian_of(z, (x, hidden), **options)
    found = jactri.jacobian_of(z, (x, hidden), **options, mesh=mesh)
    (gradient,) = torch.autograd.grad(y.sum(), x)  # the graph is still there
    assert gradient.isfinite().all()
    for mine, block in zip(found, want, strict=True):
        assert mine.placements[0].is_replicate() == (name == "one number")
        assert torch.allclose(mine.full_tensor(), block, rtol=1e-12, atol=1e-12)
    return True


@pytest.mark.parametrize("name", ["plain", "per_sample", "hooks", "one number"])
def test_outputs_that_are_there(ranks, name):
    assert all(ranks(2, of_outputs, name))


@pytest.mark.parametrize(
    "name, text",
    [
        ("values", "differ in the numbers in inputs"),
        ("create_graph", "mesh= and create_graph=True exclude each other"),
    ],
)
def test_refused_of_outputs(ranks, name, text):
    for error in ranks(2, of_outputs, name, errors=True):
        assert error.kind == "RuntimeError" and text in error.text
