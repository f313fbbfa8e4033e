"""Random small networks: what no author of a case thought of putting together."""

import pytest
import torch
import torch.nn.functional as F
from common import F64
from common import MODES as DIRECTIONS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_close, assert_same_tree

import jactri

MODES = [*DIRECTIONS, "mixed"]
LARGEST = 72  # elements of an intermediate value


class Opaque(torch.autograd.Function):
    """A node of which nothing is known but its backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x) * 0.7

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.cos(x) * 0.7


ACTIVATIONS = [
    torch.tanh, torch.relu, F.silu, F.gelu, F.softplus, torch.sigmoid, torch.sin, F.elu, F.mish,
    F.hardswish, F.leaky_relu, lambda x: F.gelu(x, approximate="tanh"), lambda x: x / (1 + x * x),
    lambda x: torch.exp(-x * x), lambda x: x.clamp(-0.7, 0.9), lambda x: torch.sqrt(x * x + 0.1),
    lambda x: torch.where(x > 0, x, 0.1 * x), lambda x: 0.5 - x, lambda x: x**3 * 0.3, Opaque.apply,
    lambda x: torch.sin(x).mul_(0.9).add_(0.1), F.selu, torch.atan, F.logsigmoid,
]  # fmt: skip

# An op takes the values so far, the drawer of constants and two small integers, and returns a
# function of the values, or None where it does not apply.


def activation(values, draw, a, b):
    return lambda vs: ACTIVATIONS[(a * 5 + b) % len(ACTIVATIONS)](vs[-1])


def dense(values, draw, a, b):
    x = values[-1]
    if x.ndim < 2:
        return None
    w, bias = draw(1 + a, x.shape[-1]), draw(1 + a)
    return lambda vs: F.linear(vs[-1], w, bias if b % 2 else None)


def dense_of_merged_samples(values, draw, a, b):
    x = values[-1]
    if x.ndim < 3:
        return None
    w = draw(x.shape[-1], 1 + a)
    return lambda vs: (vs[-1].reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], 1 + a)


def convolution(values, draw, a, b):
    x = values[-1]
    if x.ndim == 3:
        w = draw(1 + a % 3, x.shape[1], 1 + b % 3)
        return lambda vs: F.conv1d(vs[-1], w, padding=b % 3, stride=1 + a % 2)
    if x.ndim == 4:
        w = draw(1 + a % 3, x.shape[1], 2, 1 + b % 3)
        return lambda vs: F.conv2d(vs[-1], w, padding=1, stride=1 + b % 2)
    return None


def transposed_convolution(values, draw, a, b):
    x = values[-1]
    if x.ndim != 3:
        return None
    w = draw(x.shape[1], 1 + a % 2, 2)
    return lambda vs: F.conv_transpose1d(vs[-1], w, stride=1 + b % 2)


def attention(values, draw, a, b):
    x = values[-1]
    if x.ndim != 3:
        return None
    q, k, v = (draw(x.shape[-1], 2) for _ in range(3))
    if b % 2:
        return lambda vs: F.scaled_dot_product_attention(
            *(vs[-1][:, None] @ m for m in (q, k, v)), is_causal=a % 2 == 1
        )[:, 0]
    return lambda vs: ((vs[-1] @ q) @ (vs[-1] @ k).mT / 1.4).softmax(-1) @ (vs[-1] @ v)


def normalisation(values, draw, a, b):
    x = values[-1]
    if x.ndim < 2 or x.shape[-1] < 2:
        return None
    w = draw(x.shape[-1]) + 1.5
    if a % 3 == 0:
        return lambda vs: F.layer_norm(vs[-1], w.shape, w, eps=0.1)
    if a % 3 == 1:
        return lambda vs: F.rms_norm(vs[-1], w.shape, w, eps=0.1)
    return lambda vs: F.group_norm(vs[-1], 1, eps=0.1)


def residual(values, draw, a, b):
    same = [k for k, v in enumerate(values) if v.shape == values[-1].shape]
    k = same[a % len(same)]
    combine = [torch.add, torch.mul, torch.sub, torch.maximum, lambda p, q: p * q.sigmoid()][b % 5]
    return lambda vs: combine(vs[-1], vs[k] * 0.8)


def broadcast(values, draw, a, b):
    x = values[-1]
    fit = [k for k, v in enumerate(values) if v.ndim == x.ndim
           and all(s in (1, t) for s, t in zip(v.shape[1:], x.shape[1:], strict=True))]  # fmt: skip
    k = fit[a % len(fit)]
    return lambda vs: vs[-1] * vs[k] + vs[k]


def joined(values, draw, a, b):
    same = [k for k, v in enumerate(values) if v.shape == values[-1].shape]
    k, axis = same[a % len(same)], -1
    if values[-1].ndim < 2:
        return lambda vs: torch.stack([vs[-1], vs[k]], 1)
    if b % 2:
        return lambda vs: torch.stack([vs[-1], vs[k]], axis)
    return lambda vs: torch.cat([vs[-1], vs[k]], axis)


def rearranged(values, draw, a, b):
    x = values[-1]
    n, d = x.shape[0], x.shape[-1]
    options = [
        lambda vs: vs[-1].flatten(1),
        lambda vs: vs[-1].flip(-1),
        lambda vs: vs[-1][..., ::2],
    ]
    if x.ndim >= 2:
        options += [
            lambda vs: vs[-1].roll(1, -1),
            lambda vs: vs[-1][..., -1:],
            lambda vs: F.pad(vs[-1], (1, 1)),
            lambda vs: vs[-1].unsqueeze(1).expand(-1, 2, *[-1] * (x.ndim - 1)),
            lambda vs: vs[-1].tril() if x.ndim > 2 else vs[-1],
            lambda vs: vs[-1][..., torch.tensor([0, d - 1, 0])],
        ]
    else:
        return lambda vs: vs[-1].unsqueeze(1)
    if d % 2 == 0:
        options += [
            lambda vs: vs[-1].unflatten(-1, (2, d // 2)),
            lambda vs: (lambda p, q: p * q.tanh())(*vs[-1].chunk(2, -1)),
            lambda vs: torch.cat(vs[-1].split(d // 2, -1)[::-1], -1),
        ]
    if x.ndim >= 3:
        options += [
            lambda vs: vs[-1].transpose(1, -1),
            lambda vs: vs[-1].transpose(0, 1).cos().transpose(0, 1),
            lambda vs: vs[-1].movedim(0, -1).cumsum(0).movedim(-1, 0),
            lambda vs: vs[-1].reshape(n, d, -1),
            lambda vs: vs[-1] @ vs[-1].mT * 0.3,
            lambda vs: vs[-1].unbind(1)[0],
            lambda vs: vs[-1][:, -1],
            lambda vs: torch.einsum("n...i,n...j->n...ij", vs[-1], vs[-1]).sum(-1),
        ]
    return options[(a * 7 + b) % len(options)]


def reduced(values, draw, a, b):
    if values[-1].ndim < 2:
        return None
    keep = b % 2 == 0
    options = [
        lambda vs: vs[-1].sum(-1, keepdim=keep),
        lambda vs: vs[-1].mean(-1, keepdim=keep),
        lambda vs: vs[-1].logsumexp(-1, keepdim=keep),
        lambda vs: vs[-1].cumsum(-1),
        lambda vs: vs[-1].softmax(-1),
        lambda vs: vs[-1].log_softmax(-1),
        lambda vs: vs[-1].amax(-1, keepdim=keep),
        lambda vs: (vs[-1].square().sum(-1, keepdim=keep) + 0.1).sqrt(),
        lambda vs: vs[-1].mean(1, keepdim=keep),
        lambda vs: vs[-1].sort(-1).values,
    ]
    return options[a % len(options)]


def pooled(values, draw, a, b):
    x = values[-1]
    if x.ndim != 3 or x.shape[-1] < 2:
        return None
    if a % 3 == 0:
        return lambda vs: F.max_pool1d(vs[-1], 2, stride=1 + b % 2)
    if a % 3 == 1:
        return lambda vs: F.avg_pool1d(vs[-1], 2, stride=1 + b % 2)
    return lambda vs: F.interpolate(vs[-1], scale_factor=2, mode="linear" if b % 2 else "nearest")


def written(values, draw, a, b):
    x = values[-1]
    if x.ndim < 2:
        return None

    def run(vs):
        y = vs[-1].clone()
        y[..., 0].mul_(2.0)
        if a % 2:
            y[..., -1] = vs[-1][..., 0].sin()
        if b % 2:
            y.transpose(0, -1)[0].add_(0.3)
        return y

    return run


def stopped(values, draw, a, b):
    return lambda vs: vs[-1] * vs[-1].detach().cos()


def with_a_constant(values, draw, a, b):
    x = values[-1]
    shape = [x.shape, x.shape[-1:], (1,) * x.ndim, (x.shape[0], *(1,) * (x.ndim - 1))][a % 4]
    c = draw(*shape) + 1.2
    return [lambda vs: vs[-1] * c, lambda vs: c - vs[-1], lambda vs: vs[-1] / c][b % 3]


KEEPING = [
    activation, activation, dense, dense, dense_of_merged_samples, convolution,
    transposed_convolution, attention, normalisation, residual, broadcast, joined, rearranged,
    rearranged, reduced, pooled, written, stopped, with_a_constant,
]  # fmt: skip


def mixing(values, draw, a, b):
    x = values[-1]
    n = x.shape[0]
    m = draw(n, n)
    options = [
        lambda vs: vs[-1] - vs[-1].mean(0),
        lambda vs: vs[-1].cumsum(0),
        lambda vs: vs[-1].roll(1, 0),
        lambda vs: vs[-1].flip(0),
        lambda vs: vs[-1].softmax(0),
        lambda vs: vs[-1] * vs[-1][:1],
        lambda vs: torch.einsum("nm,m...->n...", m, vs[-1]),
        lambda vs: vs[-1][torch.arange(n - 1, -1, -1)],
        lambda vs: (
            F.batch_norm(vs[-1], None, None, training=True, eps=0.1)
            if vs[-1].ndim >= 2 and n * vs[-1][:, 0].numel() > n
            else vs[-1] + vs[-1].sum(0, keepdim=True)
        ),
        lambda vs: vs[-1].reshape(-1).reshape(*x.shape[::-1]).movedim(-1, 0).reshape(x.shape),
    ]
    return options[(a * 3 + b) % len(options)]


class Network:
    """A list of steps, each a function of all values before it."""

    def __init__(self, codes, shapes, seed, outputs):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            w = torch.randn(shape, generator=generator, dtype=F64)
            return w / max(shape[-1], 1) ** 0.5 if shape else w

        self.inputs = tuple(torch.randn(s, generator=generator, dtype=F64) for s in shapes)
        self.steps, self.names, self.mixes = [], [], False
        values = list(self.inputs)
        for op, a, b in codes:
            step = op(values, draw, a, b)
            if step is None:
                continue
            value = step(values)
            if value.numel() > LARGEST or value.numel() == 0 or value.ndim > 4:
                continue
            if not torch.isfinite(value).all() or value.abs().max() > 30:
                continue
            self.steps.append(step)
            self.names.append(f"{op.__name__}({a}, {b}) -> {tuple(value.shape)}")
            self.mixes |= op is mixing
            values.append(value)
        self.taken = [len(values) - 1 - k % len(values) for k in range(outputs)]

    def __call__(self, *inputs):
        values = list(inputs)
        for step in self.steps:
            values.append(step(values))
        taken = tuple(values[k] for k in self.taken)
        return taken[0] if len(taken) == 1 else taken

    def __repr__(self):
        return f"inputs {[tuple(x.shape) for x in self.inputs]}: " + ", ".join(self.names)


@st.composite
def networks(draw, ops, longest=9):
    n = draw(st.integers(1, 3))
    trail = draw(
        st.sampled_from([(3,), (4,), (1,), (2, 3), (3, 2), (1, 4), (2, 2, 3), (1, 3, 3), ()])
    )
    several = draw(st.integers(1, 2))
    code = st.tuples(st.sampled_from(ops), st.integers(0, 5), st.integers(0, 5))
    codes = draw(st.lists(code, min_size=2, max_size=longest))
    seed = draw(st.integers(0, 2**16))
    return Network(codes, [(n, *trail)] * several, seed, draw(st.integers(1, 2)))


def rows_of(j):
    return j if isinstance(j[0], tuple) else (j,)


def true_jacobian(network):
    return rows_of(torch.autograd.functional.jacobian(network, network.inputs))


def rounding(network):
    """Every step rounds, and errors are proportional to the largest Jacobian inside, not to the last."""
    return {"length": LARGEST, "factor": 8.0 * (2 + len(network.steps)), "scale": scale_of(network)}


def scale_of(network):
    """How large the Jacobians inside get: they may cancel by the end, in sums that should be zero."""
    largest = 1.0
    for k in range(len(network.inputs), len(network.inputs) + len(network.steps)):
        values = list(network.inputs)
        leaves = [v.clone().requires_grad_() for v in values]
        values = list(leaves)
        for step in network.steps[: k - len(network.inputs) + 1]:
            values.append(step(values))
        grads = torch.autograd.grad(values[-1].square().sum(), leaves, allow_unused=True)
        largest = max([largest, *(g.abs().max().item() for g in grads if g is not None)])
    return largest


common = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.usefixtures("one_thread")
@settings(common, max_examples=150)
@given(network=networks([*KEEPING, mixing]))
def test_whole_jacobian(network):
    truth = true_jacobian(network)
    for mode in MODES:
        ours = rows_of(jactri.jacobian(network, network.inputs, strategy=mode))
        assert_same_tree(ours, truth, F64, what=mode, **rounding(network))


@pytest.mark.usefixtures("one_thread")
@settings(common, max_examples=150)
@given(network=networks([*KEEPING, *KEEPING, mixing]))
def test_per_sample_is_right_or_refused(network):
    """Samples kept apart by every op are answered; any answer given is the true one."""
    n = network.inputs[0].shape[0]
    truth = true_jacobian(network)
    expected, mixed = [], False
    for row in truth:
        blocks = []
        for full, x in zip(row, network.inputs, strict=True):
            axis = full.ndim - x.ndim
            grid = full.movedim(axis, 1)
            for a in range(n):
                for b in range(n):
                    mixed |= a != b and bool((grid[a, b] != 0).any())
            blocks.append(torch.stack([grid[a, a] for a in range(n)]))
        expected.append(tuple(blocks))
    for mode in MODES:
        try:
            ours = jactri.jacobian(network, network.inputs, strategy=mode, per_sample=True)
        except RuntimeError as refusal:
            if network.mixes and "per_sample" in str(refusal):
                continue
            raise  # refused, though no op mixes samples
        assert not mixed, "answered, though samples mix"
        assert_same_tree(rows_of(ours), tuple(expected), F64, what=mode, **rounding(network))


@pytest.mark.usefixtures("one_thread")
@settings(common, max_examples=100)
@given(
    network=networks([*KEEPING, *KEEPING, mixing]),
    chunk_size=st.sampled_from([None, 1, 2, 5]),
    limit=st.sampled_from([None, 300, 1000, 3000, 10_000]),
    mode=st.sampled_from(MODES),
)
def test_chunks_and_memory_limits_change_nothing(network, chunk_size, limit, mode):
    """Seeds in chunks, samples in ranges: the same answer, or an error that names memory_limit."""
    truth = true_jacobian(network)
    for per_sample in (False, True):
        whole = {"strategy": mode, "per_sample": per_sample}
        try:
            expected = rows_of(jactri.jacobian(network, network.inputs, **whole))
        except RuntimeError as refusal:
            if not (per_sample and network.mixes and "per_sample" in str(refusal)):
                raise
            continue
        if not per_sample:
            expected = truth
        try:
            ours = jactri.jacobian(
                network, network.inputs, chunk_size=chunk_size, memory_limit=limit, **whole
            )
        except ValueError as refusal:
            if limit is None or "memory_limit" not in str(refusal):
                raise
            continue
        assert_same_tree(rows_of(ours), expected, F64, **rounding(network))


@pytest.mark.usefixtures("one_thread")
@settings(common, max_examples=40)
@given(network=networks(KEEPING, longest=5))
def test_create_graph(network):
    """The gradient of a combination of the Jacobian's entries, where torch can compute it."""
    generator = torch.Generator().manual_seed(0)

    def gradients(take):
        leaves = tuple(x.clone().requires_grad_() for x in network.inputs)
        total = 0.0
        generator.manual_seed(0)
        for row in rows_of(take(leaves)):
            for j in row:
                total = total + (j * torch.randn(j.shape, generator=generator, dtype=F64)).sum()
        if not isinstance(total, torch.Tensor) or not total.requires_grad:
            return tuple(torch.zeros_like(x) for x in leaves)
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truth = gradients(
            lambda xs: torch.autograd.functional.jacobian(network, xs, create_graph=True)
        )
    largest = max([1.0, *(t.abs().max().item() for t in truth)])
    allowed = rounding(network)
    allowed["scale"] = largest * allowed["scale"] ** 2
    for mode in MODES:
        ours = gradients(
            lambda xs, m=mode: jactri.jacobian(network, xs, create_graph=True, strategy=m)
        )
        for g, t in zip(ours, truth, strict=True):
            assert_close(g, t, F64, what=mode, **allowed)


def test_the_generator_builds_what_it_claims():
    """Enough of the random networks are deep, mix samples, have several inputs, and run every op."""
    seen, deep, mixing_count, several = set(), 0, 0, 0

    @settings(common, max_examples=300)
    @given(network=networks([*KEEPING, mixing]))
    def collect(network):
        nonlocal deep, mixing_count, several
        seen.update(name.split("(")[0] for name in network.names)
        deep += len(network.steps) >= 4
        mixing_count += network.mixes
        several += len(network.inputs) > 1

    collect()
    assert seen == {op.__name__ for op in [*KEEPING, mixing]}
    assert deep > 60
    assert 30 < mixing_count < 270
    assert several > 60
