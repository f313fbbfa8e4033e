"""Products that are left unformed: right, and with fewer flops where a batched product meets a matrix."""

from math import inf

import pytest
import torch
from common import F64
from test_memory import live_peak
from tolerances import assert_close
from torch import nn
from torch.autograd.functional import jacobian as truth_of
from torch.nn.functional import scaled_dot_product_attention as sdpa

import jactri
from jactri._src.plan import condensing
from jactri._src.plan.needs import Asked
from jactri._src.plan.planner import make_plan
from jactri._src.read.reading import read


def net(seed=0, **weights):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*shape, dtype=F64, generator=generator) / shape[0] ** 0.5
        for name, shape in weights.items()
    }


D, H, E = 6, 2, 3
W = net(q=(D, D), k=(D, D), v=(D, D), o=(D, D), packed=(D, 3 * D), few=(D, E), bilinear=(5, 4, D))


def heads(x):
    return x.unflatten(-1, (H, E)).transpose(1, 2)


def together(x):
    return x.transpose(1, 2).flatten(2)


def scores(q, k):
    return (q @ k.transpose(-1, -2) / 2).softmax(-1)


def written(x):
    q, k, v = (heads(x @ W[n]) for n in "qkv")
    return x + together(scores(q, k) @ v) @ W["o"]


def fused(x, **options):
    q, k, v = (heads(x @ W[n]) for n in "qkv")
    return together(sdpa(q, k, v, **options)) @ W["o"]


def packed(x):
    q, k, v = (x @ W["packed"]).unflatten(-1, (3, H, E)).permute(2, 0, 3, 1, 4)
    return together(scores(q, k) @ v) @ W["o"]


def shared_keys(x):
    """Two heads of queries to one of keys and values."""
    q, k, v = heads(x @ W["q"]), *((x @ W["few"]).unsqueeze(1).expand(-1, H, -1, -1) for _ in "kv")
    return together(scores(q, k) @ v) @ W["o"]


def rotary(x):
    def turned(t):
        half = t[..., 1:], t[..., :1]
        angle = torch.arange(t.shape[-2], dtype=F64)[:, None]
        return t * angle.cos() + torch.cat(half, -1) * angle.sin()

    q, k, v = turned(heads(x @ W["q"])), turned(heads(x @ W["k"])), heads(x @ W["v"])
    return together(scores(q, k) @ v) @ W["o"]


def linear(x):
    """Attention without a softmax, keys and values first."""
    q, k, v = (heads(x @ W[n]) for n in "qkv")
    return together(q.sigmoid() @ (k.sigmoid().transpose(-1, -2) @ v)) @ W["o"]


def of_memory(m):
    """Cross-attention, in what is attended to."""
    x = torch.linspace(-1, 1, 4 * D, dtype=F64).view(1, 4, D).expand(len(m), -1, -1)
    q, k, v = heads(x @ W["q"]), heads(m @ W["k"]), heads(m @ W["v"])
    return together(sdpa(q, k, v)) @ W["o"]


def scaled(x):
    """What follows the matrix is a scaling."""
    y = nn.functional.rms_norm(x, (D,), torch.linspace(1, 2, D, dtype=F64))
    return written(nn.functional.layer_norm(y, (D,), torch.linspace(1, 2, D, dtype=F64)))


def mixing(x):
    """Tokens mixed by a matrix that depends on them, then features, twice."""
    for _ in range(2):
        x = (x @ x.transpose(1, 2)).tanh() @ (x @ W["q"]) @ W["o"]
    return x


def encoder(x, layers=2, norm=True):
    """Blocks of attention and of what acts on each token by itself."""
    for k in range(layers):
        y = nn.functional.layer_norm(x, (D,), torch.linspace(1, 2, D, dtype=F64)) if norm else x
        x = written(y)
        x = x + nn.functional.gelu(x @ M[f"up{k}"]) @ M[f"down{k}"]
    return x


M = net(1, up0=(D, 24), down0=(24, D), up1=(D, 24), down1=(24, D))

FUNCTIONS = {
    f.__name__: f
    for f in (written, fused, packed, shared_keys, rotary, linear, of_memory, scaled, mixing)
}
FUNCTIONS["causal"] = lambda x: fused(x, is_causal=True)
FUNCTIONS["encoder"] = encoder


def blocks(J):
    return J.diagonal(0, 0, 3).movedim(-1, 0)


def draw(*shape, dtype=F64):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1)).to(dtype)


def structures(func, x, **options):
    return {s.structure for s in jactri.explain(func, x, **options).steps}


def joined(found):
    return any("factors" in s for s in found)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_right_in_every_order(name, monkeypatch):
    monkeypatch.setattr(condensing, "LOOK", 0.0)
    func, x = FUNCTIONS[name], draw(2, 5, D)
    want = truth_of(func, x)
    for strategy in ("reverse-mode", "forward-mode", "mixed", "auto"):
        for more in (
            {},
            {"chunk_size": 4},
            {"per_sample": True},
            {"per_sample": True, "chunk_size": 7},
        ):
            got = jactri.jacobian(func, x, strategy=strategy, **more)
            assert_close(got, blocks(want) if "per_sample" in more else want, F64, length=100)
    used = structures(func, draw(2, 12, D), per_sample=True, strategy="reverse-mode")
    assert joined(used) or name == "linear"  # which is small
    assert ("matrices" in used) == (name in ("encoder", "scaled"))
    for y in (x[:1], x[:0], x[:, :1], x.mT.contiguous().mT):
        want = blocks(truth_of(func, y)) if len(y) else want.new_empty(0, *func(x).shape[1:], 5, D)
        assert_close(jactri.jacobian(func, y, per_sample=True), want, F64, length=100)


V = net(2, t=(6, 6), a=(6, 6, 2), packed=(8, 24), mix=(12, 12), **dict.fromkeys("uvw", (8, 8)))


def gated(x):
    h = (x @ V["u"]) * (x @ V["v"]).tanh()
    return (h.sum(1, keepdim=True) * h) @ V["w"]


def expanded(x):
    y = V["t"] @ x
    return y + together(torch.einsum("tsh,bhse->bhte", V["a"], heads(y)))


def pairs(x):
    return (x @ x.mT).tanh()


SPECIAL = {
    # no residual: two products meet behind attention; a slice of what a weight made; of what mixes tokens
    "alone": (lambda x: sdpa(*((x @ V["u"]) @ V[k] for k in "uvw")) @ V["u"], (2, 5, 8)),
    "piece": (lambda x: pairs(x) @ ((x @ V["packed"])[..., 8:16] @ V["u"]) @ V["v"], (2, 12, 8)),
    "piece of tokens": (
        lambda x: pairs(x)[..., :6] @ (V["mix"] @ (x @ V["u"]))[:, 2:8], (2, 12, 8),
    ),
    "expanded": (expanded, (2, 6, 6)),
    "gated": (gated, (1, 4, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
def test_letters_of_pieces_of_chunks_and_of_nothing(name, monkeypatch):
    monkeypatch.setattr(condensing, "LOOK", 0.0)
    func, shape = SPECIAL[name]
    x = draw(*shape)
    want = truth_of(func, x)
    for strategy in ("reverse-mode", "forward-mode", "mixed"):
        for chunk_size in (None, 1, 3):
            got = jactri.jacobian(func, x, strategy=strategy, chunk_size=chunk_size)
            assert_close(got, want, F64, length=100)


def test_a_factor_that_is_tied_in_one_partial_jacobian_alone():
    def func(q, k):
        return (((q @ V["t"]) @ k.mT).softmax(-1) @ k).sum(-1, keepdim=True).tanh() * V["t"][0]

    given = draw(2, 3, 6), draw(2, 5, 6)
    want = truth_of(func, given)
    for chunk_size in (None, 1, 2, 5):
        found = jactri.jacobian(func, given, strategy="mixed", chunk_size=chunk_size)
        for got, true in zip(found, want, strict=True):
            assert_close(got, true, F64, length=100)


@pytest.mark.parametrize("name", ["written", "packed", "rotary", "encoder"])
def test_contractions_and_limits(name):
    func, x = FUNCTIONS[name], draw(3, 4, D)
    J = blocks(truth_of(func, x)).flatten(3).flatten(1, 2)
    assert_close(
        jactri.jtj(func, x, per_sample=True).reshape(3, 4 * D, -1), J.mT @ J, F64, length=300
    )
    assert_close(
        jactri.jjt(func, x, per_sample=True).reshape(3, 4 * D, -1), J @ J.mT, F64, length=300
    )
    assert_close(jactri.diagonal(func, x).flatten(1), J.diagonal(0, 1, 2), F64, length=100)
    assert_close(jactri.divergence(func, x), J.diagonal(0, 1, 2).sum(1), F64, length=300)
    whole = jactri.explain(func, x, per_sample=True).peak_bytes
    for part in (0.9, 0.75, 0.65):
        got = jactri.jacobian(func, x, per_sample=True, memory_limit=int(part * whole))
        assert_close(got.reshape(J.shape), J, F64, length=100)


@pytest.mark.parametrize("name", ["written", "packed", "encoder"])
def test_create_graph(name):
    func, x = FUNCTIONS[name], draw(2, 3, D).requires_grad_()
    for strategy in ("reverse-mode", "forward-mode"):
        got = jactri.jacobian(func, x, per_sample=True, create_graph=True, strategy=strategy)
        want = blocks(truth_of(func, x, create_graph=True))
        ours, theirs = (torch.autograd.grad(j.square().sum(), x)[0] for j in (got, want))
        assert_close(ours, theirs, F64, length=1000)


def test_float32():
    x = draw(2, 5, D, dtype=torch.float32)
    weights = {n: w.float() for n, w in W.items()}

    def func(x):
        q, k, v = (heads(x @ weights[n]) for n in "qkv")
        return together(scores(q, k) @ v) @ weights["o"]

    assert joined(structures(func, x, per_sample=True))
    got = jactri.jacobian(func, x, per_sample=True)
    want = blocks(truth_of(lambda x: written(x) - x, x.double()))
    assert_close(got, want.float(), torch.float32, length=100)


TOKENS = torch.randn(24, 24, dtype=F64, generator=torch.Generator().manual_seed(3)) / 5


def all_mixed(x):
    return TOKENS @ (x @ W["q"].repeat(3, 3) / 2)


SCALED = {
    "behind": lambda x: all_mixed(x).tanh().sin().exp(),
    "before": lambda x: all_mixed(x.tanh().sin().exp()),
    "between": lambda x: all_mixed(all_mixed(x).tanh().sin().exp()),
}


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
@pytest.mark.parametrize("name", [*SCALED, "scaled", "encoder", "rotary"])
def test_parts_take_little_memory(name, strategy, monkeypatch):
    """What was scaled in place still is, by the product of all derivatives; copies for a batched product count."""
    monkeypatch.setattr(condensing, "LOOK", 0.0)
    func = SCALED[name] if name in SCALED else FUNCTIONS[name]
    x = draw(2, 24, 3 * D if name in SCALED else D).requires_grad_()
    y = func(x)
    graph = read([y], [x])
    answer = Asked(True, False)
    whole = {"chunk_size": 10**6, "answer": answer}
    plan = make_plan(graph, strategy, **whole)
    plain = make_plan(graph, strategy, rows=True, **whole)
    assert plan.peak <= (1 + condensing.MORE) * plain.peak
    if name in SCALED:
        options = {"per_sample": True, "strategy": strategy, "chunk_size": 10**6}
        found = max(live_peak(lambda: jactri.jacobian_of(y, x, **options)) for _ in range(2))
        assert 0.8 <= plan.peak / found <= 1.2
        want = blocks(truth_of(func, x))
        assert_close(jactri.jacobian_of(y, x, **options), want, F64, length=100)
    if (name, strategy) in (("behind", "forward-mode"), ("before", "reverse-mode")):
        assert plan.parts


def test_kernels_run_the_steps_that_parts_left():
    """Where kernels run several steps as one, these are found in the sweep that multiplies with the parts."""
    wide = {n: w.float().repeat(8, 8) for n, w in (W | M).items() if w.dim() == 2}

    def func(x):
        x = x @ wide["o"]
        x = x + (x @ wide["up0"]).relu().sqrt() @ wide["down0"]
        q, k, v = ((x @ wide[n]).unflatten(-1, (2, -1)).transpose(1, 2) for n in "qkv")
        return together(scores(q, k) @ v) @ wide["o"]

    x = draw(4, 64, 8 * D, dtype=torch.float32).requires_grad_()
    graph = read([func(x)], [x])
    asked = Asked(True, False, kernels="auto", fused=True)
    plan = make_plan(graph, "reverse-mode", device="cuda", answer=asked)
    (sweep,) = plan.sweeps
    assert "matrices" in {t.map_in(graph).structure for s in sweep.steps for t in s.terms}
    for stage in (*plan.parts, sweep):
        ran = [s for item in stage.items for s in getattr(item, "steps", [item])]
        assert sorted(s.value for s in ran) == sorted(stage.values)
    assert plan.seconds["reverse-mode"] < plan.rows < inf


def test_weights_meet_tokens_not_pairs():
    """What acts on all pairs of tokens is the sums over heads, for keys and for values."""
    wide = {n: w.repeat(8, 8) for n, w in W.items() if n in "qkvo"}
    h, t, d = 2, 32, 8 * D

    def func(x):
        q, k, v = ((x @ wide[n]).unflatten(-1, (h, -1)).transpose(1, 2) for n in "qkv")
        return together(scores(q, k) @ v) @ wide["o"]

    plan = jactri.explain(func, draw(1, t, d), per_sample=True, strategy="reverse-mode")
    pairs = t * t * d * d
    behind = sum(s.flops for s in plan.steps if s.columns == t * d)
    assert 2 * 2 * h * pairs <= behind <= 1.2 * (2 * 2 * h * pairs) + 4 * pairs


def test_an_infinite_derivative_goes_by_rows():
    """A part that is made first multiplies in another order than a backward pass."""

    def func(x):
        x = written(x)
        x = x + (torch.where(x > 0, x, 0).sqrt() @ M["up0"]).relu() @ M["down0"]
        return written(x)

    x = draw(1, 4, D)
    got, want = jactri.jacobian(func, x), truth_of(func, x)
    assert torch.equal(got.isnan(), want.isnan())
    assert_close(got.nan_to_num(), want.nan_to_num(), F64, length=1000)
