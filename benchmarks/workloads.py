"""What is timed: networks, inputs, shapes, and the least work that the answer needs.

``flops`` counts a multiply-add as two and is the count of the structured chain: the first step of
a sweep is free (its seed is the identity), samples do not mix, weights are shared, activations are
scalings and cost nothing, the forward pass is included. ``bytes`` is the input, the weights and
the Jacobian, each moved once. Both are predictions to hold a measured time against, not measured.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from . import nets, operators


@dataclass(frozen=True)
class Goal:
    """Be at least `ratio` times as fast as a peer ("best": as the best torch peer)."""

    ratio: float
    peer: str = "best"


@dataclass(frozen=True)
class Workload:
    """One thing to differentiate. `full` asks for the drop-in shape (N, *out, N, *in).

    `operator` asks for something else than a Jacobian; `shape` is then that of its answer.
    """

    name: str
    title: str
    module: Callable[[], nn.Module]
    samples: int
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    flops: int
    weights: int
    full: bool = False
    no_forward: str = ""
    goal: Goal | None = None
    operator: operators.Operator | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The Jacobian's shape."""
        if self.operator is not None:
            return self.operator.shape(self)
        batch = (self.samples,)
        return batch + self.out_shape + (batch if self.full else ()) + self.in_shape

    @property
    def measures_memory(self) -> bool:
        """Whether memory is a part of the comparison."""
        return self.full or self.name == "W8-wide"

    @property
    def answer_bytes(self) -> int:
        """Bytes of the Jacobian in float32."""
        return 4 * math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes that have to move: input and weights in, the Jacobian out."""
        return self.answer_bytes + 4 * (self.weights + self.samples * self.columns)

    @property
    def rows(self) -> int:
        """Outputs of one sample: the seeds of a reverse sweep."""
        return math.prod(self.out_shape)

    @property
    def columns(self) -> int:
        """Inputs of one sample: the seeds of a forward sweep."""
        return math.prod(self.in_shape)

    def build(self) -> nn.Module:
        """The network, the same at every call."""
        trains = self.operator is not None and self.operator.trains
        return nets.frozen(self.module).requires_grad_(trains)

    def draw(self, net: nn.Module) -> Tensor:
        """The input batch, the same at every call."""
        return nets.draw(net, self.samples, self.in_shape)


CPU = torch.device("cpu")


@lru_cache(maxsize=2)
def problem(workload: Workload, device: torch.device = CPU) -> tuple[nn.Module, Tensor]:
    """The workload's network and input, drawn on the CPU: every device gets the same numbers."""
    net = workload.build()
    x = workload.draw(net)
    return net.to(device), x.to(device)


@lru_cache(maxsize=1)
def truth(workload: Workload) -> Tensor:
    """The Jacobian in float64, one `autograd.grad` a row: the plainest way there is."""
    net, x = problem(workload)
    net = copy.deepcopy(net).double()
    if workload.operator is not None:
        return workload.operator.truth(net, x.double())
    x = x.double().requires_grad_()
    y = net(x)
    # Samples do not mix in these networks, so the sum over the batch has every sample's gradient.
    heads = y.reshape(-1) if workload.full else y.reshape(len(y), -1).sum(0)
    grads = (torch.autograd.grad(heads[k], x, retain_graph=True)[0] for k in range(len(heads)))
    if workload.full:
        jac = torch.stack(list(grads))
    else:
        jac = torch.empty(len(x), len(heads), *x.shape[1:], dtype=torch.float64)
        for k, g in enumerate(grads):
            jac[:, k] = g
    return jac.reshape(workload.shape)


def chain_flops(widths: Sequence[int]) -> int:
    """Flops a sample of a product of Linear layers in its cheapest order, and the forward pass.

    With activations as scalings an MLP's Jacobian is a product of its weights. Its cheapest order
    (matrix chain multiplication) is reverse, forward, or a meeting at a bottleneck.
    """
    n = len(widths) - 1
    cost = {(i, i + 1): 0 for i in range(n)}
    for span in range(2, n + 1):
        for i in range(n - span + 1):
            j = i + span
            cost[i, j] = min(
                cost[i, k] + cost[k, j] + widths[i] * widths[k] * widths[j] for k in range(i + 1, j)
            )
    return 2 * (cost[0, n] + chain_weights(widths))


def chain_weights(widths: Sequence[int]) -> int:
    """Entries of an MLP's weight matrices."""
    return sum(a * b for a, b in pairwise(widths))


def conv_flops() -> int:
    """W5, a sample: ten rows pulled through three convolutions (the Linear is free), forward."""
    convs = 9 * 64 * 64 * 8 * 8 + 9 * 32 * 64 * 16 * 16 + 9 * 3 * 32 * 32 * 32
    return 2 * (10 * convs + convs + 64 * 8 * 8 * 10)


def band_flops() -> int:
    """W6, a sample: only what lies in the receptive field.

    An output pixel sees 3 x 3 pixels of the second hidden layer (free: the last kernel itself),
    and 5 x 5 of the first; each of those positions gathers 3 x 3 taps.
    """
    jacobian = 9 * 9 * 16 * 16 + 25 * 9 * 16
    forward = 9 * (16 + 16 * 16 + 16)
    return 2 * 32 * 32 * (jacobian + forward)


def block_flops(tokens: int = 16, d: int = 64, heads: int = 4, hidden: int = 256) -> int:
    """W7, a sample: tokens mix in attention only, and there with rank one a head.

    Per output token: the Jacobian P of the feed-forward network (d x hidden x d), P times the output weights, what
    follows times the value weights and the scores' derivatives, and the queries' block by its weights. For each pair of
    tokens the sums over heads: of values, and of keys, each times its weights.
    """
    one = d * hidden * d + 3 * d * d * d + 2 * d * tokens * d
    pair = d * d * 2 * heads + d * d
    return 2 * tokens * (one + tokens * pair) + tokens * _forward_flops(d, hidden)


def encoder_flops(tokens: int, d: int, heads: int, hidden: int, layers: int) -> int:
    """Such blocks behind one another: all but the last see d rows a token.

    Their feed-forward networks are one matrix a token, made once; queries and keys go by their weights, or by the
    weights times the other of the two, whichever is smaller.
    """
    rows = tokens * d
    through = 3 * d * d + 2 * d * min(d, heads * tokens) + 3 * tokens * d
    behind = rows * tokens * through + tokens * d * hidden * d
    more = 2 * behind + tokens * _forward_flops(d, hidden)
    return block_flops(tokens, d, heads, hidden) + (layers - 1) * more


def _forward_flops(d: int, hidden: int) -> int:
    return 2 * (4 * d * d + 2 * d * hidden)


def mlp(name, title, widths, act, last=None, *, samples, **more) -> Workload:
    """An MLP as a workload."""
    return Workload(
        name=name,
        title=f"{title} {'-'.join(map(str, widths))}, {act.__name__}, N={samples}",
        module=partial(nets.mlp, tuple(widths), act, last),
        samples=samples,
        in_shape=(widths[0],),
        out_shape=(widths[-1],),
        flops=samples * chain_flops(widths),
        weights=chain_weights(widths),
        **more,
    )


def resnet_multiply_adds() -> tuple[int, int]:
    """Multiply-adds of the convolutions of a ResNet-18 for one row or one image of 3 x 64 x 64, and its weights."""
    total, weights = 49 * 3 * 64 * 32 * 32, 49 * 3 * 64
    for k, (channels, out) in enumerate(pairwise((64, 64, 128, 256, 512))):
        pixels = (16 >> k) ** 2
        own = 9 * channels * out + 3 * 9 * out * out + (channels * out if k else 0)
        total, weights = total + own * pixels, weights + own
    return total, weights


def _resnet(name: str, classes: int, goal: Goal | None) -> Workload:
    """A ResNet-18 at a number of classes: each is a row that is pulled through all convolutions."""
    adds, weights = resnet_multiply_adds()
    return Workload(
        name=name,
        title=f"ResNet-18 3x64x64, eval, {classes} classes, N=4",
        module=partial(nets.ResNet18, classes),
        samples=4,
        in_shape=(3, 64, 64),
        out_shape=(classes,),
        flops=4 * 2 * adds * (classes + 1),
        weights=weights + 512 * classes,
        goal=goal,
    )


def _image(samples: int) -> Workload:
    """W6 at a batch size."""
    return Workload(
        name=f"W6-n{samples}",
        title=f"image to image 1x32x32, three conv3x3, 16 channels, ReLU, dense, N={samples}",
        module=nets.image_to_image,
        samples=samples,
        in_shape=(1, 32, 32),
        out_shape=(1, 32, 32),
        flops=samples * band_flops(),
        weights=9 * (16 + 16 * 16 + 16),
        goal=Goal(80.0),
    )


def _block(name: str, fused: bool) -> Workload:
    """W7 with attention written out or fused."""
    kind = "scaled_dot_product_attention" if fused else "attention written out"
    return Workload(
        name=name,
        title=f"pre-norm transformer block d=64, T=16, 4 heads, GELU MLP of 256, {kind}, N=4",
        module=partial(nets.TransformerBlock, fused=fused),
        samples=4,
        in_shape=(16, 64),
        out_shape=(16, 64),
        flops=4 * block_flops(),
        weights=4 * 64 * 64 + 2 * 64 * 256,
        no_forward="torch has no forward mode for fused attention" if fused else "",
    )


DYNAMICS = (32, 256, 256, 32)

MLP = (
    mlp("W1-tanh", "dynamics MLP", DYNAMICS, nn.Tanh, samples=1024, goal=Goal(2.3)),
    mlp("W1-silu", "dynamics MLP", DYNAMICS, nn.SiLU, samples=1024, goal=Goal(2.3)),
    mlp(
        *("W1-batch1", "dynamics MLP", DYNAMICS, nn.Tanh),
        samples=1,
        goal=Goal(1.0, "compile vmap(jacrev)"),
    ),
    mlp("W2", "classifier MLP", (784, 512, 512, 10), nn.ReLU, samples=64, goal=Goal(1.9)),
    mlp(
        *("W3", "VAE decoder with sigmoid output", (32, 256, 512, 784), nn.Tanh, nn.Sigmoid),
        samples=64,
        goal=Goal(2.0),
    ),
    mlp("W4", "autoencoder", (784, 256, 32, 256, 784), nn.Tanh, samples=16),
)
CONV = (
    Workload(
        name="W5",
        title="conv classifier 3x32x32, three conv3x3 (two of stride 2), ReLU, Linear 10, N=16",
        module=nets.conv_classifier,
        samples=16,
        in_shape=(3, 32, 32),
        out_shape=(10,),
        flops=16 * conv_flops(),
        weights=9 * (3 * 32 + 32 * 64 + 64 * 64) + 64 * 64 * 10,
        goal=Goal(1.4),
    ),
    _image(1),
    _image(4),
    _resnet("resnet18", 10, Goal(1.2)),
)
ATTENTION = (_block("W7", fused=False), _block("W7-fused", fused=True))
ELEMENTWISE = (
    Workload(
        name="square",
        title="pytorch#105220: (x**2).sum(-1), 10^4 x 10^4, a row a sample",
        module=nets.SumOfSquares,
        samples=10_000,
        in_shape=(10_000,),
        out_shape=(),
        flops=3 * 10**8,
        weights=0,
        goal=Goal(1 / 3, "2*x"),
    ),
)
DROPIN = (
    mlp(
        *("dropin", "drop-in shape (N, out, N, in) of the dynamics MLP", DYNAMICS, nn.Tanh),
        samples=64,
        full=True,
        goal=Goal(30.0, "functional loop"),
    ),
)
OVERHEAD = (
    mlp("overhead", "time a call above the forward pass,", (12, 64, 64, 64, 4), nn.Tanh, samples=1),
)


def laplacian_flops(widths: Sequence[int]) -> int:
    """Flops a sample of value, gradient and Laplacian of a scalar MLP: the first layer's tangents are its weights."""
    n = widths[0]
    return 2 * (chain_weights(widths) + (n + 1) * chain_weights(widths[1:]))


def _laplacian(name: str, widths: tuple[int, ...], goal: float, samples: int) -> Workload:
    """Gradient and Laplacian of a scalar function of each sample."""
    w = mlp(name, "gradient and Laplacian, MLP", widths, nn.Tanh, samples=samples)
    flops = samples * laplacian_flops(widths)
    return replace(w, flops=flops, goal=Goal(goal), operator=operators.LAPLACIAN)


def _divergence(samples: int) -> Workload:
    """W8's vector field: a product of weights alone, then one product and two scalings a sample."""
    widths = (64, 256, 256, 64)
    w = mlp("W8-divergence", "divergence, MLP", widths, nn.Tanh, samples=samples)
    n, a, b, _ = widths
    flops = 2 * (a * n * b + samples * (chain_weights(widths) + a * b))
    return replace(w, flops=flops, goal=Goal(40.0), operator=operators.DIVERGENCE)


SMALL = (32, 64, 64, 8)


def _cotangent_flops(samples: int) -> int:
    """The forward pass of `SMALL`, and the cotangents of all its layers: the last one's are its weights."""
    return 2 * samples * (chain_weights(SMALL) + SMALL[3] * SMALL[1] * SMALL[2])


def _parameters(samples: int) -> Workload:
    """W9's Jacobian: products for the cotangents, then each entry is one product of two numbers."""
    w = mlp("W9-parameters", "Jacobian in all parameters, MLP", SMALL, nn.Tanh, samples=samples)
    flops = _cotangent_flops(samples)
    return replace(w, flops=flops, goal=Goal(1.1), operator=operators.PARAMETERS)


def _kernel(samples: int) -> Workload:
    """W9's tangent kernel: for each layer a product of cotangents and one of activations."""
    w = mlp("W9-ntk", "empirical tangent kernel, MLP", SMALL, nn.Tanh, samples=samples)
    cotangents = 2 * (samples * w.rows) ** 2 * (SMALL[1] + SMALL[2])
    flops = _cotangent_flops(samples) + cotangents + 2 * samples**2 * sum(SMALL[:3])
    return replace(w, flops=flops, goal=Goal(40.0), operator=operators.KERNEL)


OPERATORS_OF = {
    "W8-laplacian": (partial(_laplacian, "W8-laplacian", (3, 128, 128, 128, 1), 2.5), 4096),
    "W8-wide": (partial(_laplacian, "W8-wide", (50, 768, 768, 512, 512, 1), 2.0), 256),
    "W8-divergence": (_divergence, 512),
    "W9-parameters": (_parameters, 128),
    "W9-ntk": (_kernel, 160),
}
"""By name: a workload for a number of samples, and that number."""
OPERATORS = tuple(make(samples) for make, samples in OPERATORS_OF.values())


def resized(w: Workload, samples: int) -> Workload:
    """The same workload for another number of samples."""
    if w.name in OPERATORS_OF:
        return OPERATORS_OF[w.name][0](samples)
    title = f"{w.title.rsplit(', N=', 1)[0]}, N={samples}"
    return replace(w, title=title, samples=samples, flops=w.flops // w.samples * samples)


LARGE = (
    _resnet("resnet18-1000", 1000, Goal(1.2)),
    Workload(
        name="encoder",
        title="transformer encoder of MiniLM's sizes: 6 layers, d=384, T=12, 12 heads, GELU MLP of 1536, N=1",
        module=nets.encoder,
        samples=1,
        in_shape=(12, 384),
        out_shape=(12, 384),
        flops=encoder_flops(12, 384, 12, 1536, 6),
        weights=6 * (4 * 384 * 384 + 2 * 384 * 1536),
        no_forward="torch has no forward mode for fused attention",
    ),
)
"""Run by name only: minutes."""
ALL = MLP + CONV + ATTENTION + OPERATORS + ELEMENTWISE + DROPIN + OVERHEAD


def select(names: Sequence[str]) -> list[Workload]:
    """The workloads of these names; `W1` stands for every `W1-...`; no name stands for all."""
    if not names:
        return list(ALL)
    found: list[Workload] = []
    known = (*ALL, *LARGE)
    for name in names:
        hits = [w for w in known if w.name == name] or [
            w for w in ALL if w.name.startswith(name + "-")
        ]
        if not hits:
            raise KeyError(f"no workload {name!r}; there are {', '.join(w.name for w in known)}")
        found += [w for w in hits if w not in found]
    return found
