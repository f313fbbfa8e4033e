"""Inputs on which structure has nothing to gain, or has cost too much: see `benchmarks.worst`.

Each is a function of a dtype and of sizes that gives jactri's call and what people write without it: a loop of backward
passes, torch's forward mode, `torch.autograd.functional` or torch.func. All return one tensor of the same entries. What
forward mode, or else the first of the others, finds in float64 is what every answer is held against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import jactri

from . import nets
from .naive import (
    Function,
    Given,
    Limit,
    draw,
    entries,
    frozen,
    leaf,
    of_samples,
    parameter_rows,
    pulled,
    pushed,
    sample_rows,
    traced,
    whole,
)
from .operators import trace


@dataclass(frozen=True)
class Case:
    """An input. `quick` holds sizes for tests and counts; `limits` what it is also run under."""

    name: str
    title: str
    make: Callable[..., Given]
    sizes: Mapping[str, int]
    quick: Mapping[str, int]
    limits: Sequence[str] = ()
    dtype: torch.dtype = torch.float32

    def given(self, quick: bool = False, dtype: torch.dtype | None = None) -> Given:
        """The case at its sizes: the same numbers at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(nets.SEED)
            return self.make(dtype or self.dtype, **(self.quick if quick else self.sizes))


# ---- complex numbers inside


def transfer(dtype: torch.dtype, outputs: int) -> Given:
    """Impulse response of seven resonators in their frequencies and dampings: rational functions, then an FFT."""
    w = torch.linspace(0, 8, outputs // 2 + 1).to(dtype)

    def response(p: Tensor) -> Tensor:
        at, damping = p[:7, None], p[7:, None]
        return torch.fft.irfft((1 / (at * at - w * w + 2j * damping * at * w)).sum(0), n=outputs)

    return whole(response, torch.cat([torch.linspace(1, 7, 7), torch.full((7,), 0.3)]).to(dtype))


def fourier(dtype: torch.dtype, side: int, modes: int) -> Given:
    return whole(frozen(nets.FourierBlock(4, modes), dtype), draw(dtype, 1, 1, side, side))


# ---- values that are made again, or lie elsewhere


def deep(width: int, layers: int) -> nn.Sequential:
    """Linear layers, each with a tanh."""
    pairs = ((nn.Linear(width, width), nn.Tanh()) for _ in range(layers))
    return nn.Sequential(*(layer for pair in pairs for layer in pair))


def checkpointed(dtype: torch.dtype, samples: int, width: int) -> tuple[Function, Tensor]:
    """Three segments of 12 layers, each checkpointed."""
    segment = frozen(deep(width, 12), dtype)

    def f(x: Tensor) -> Tensor:
        for _ in range(3):
            x = checkpoint(lambda v: v + segment(v), x, use_reentrant=False)
        return x

    return f, draw(dtype, samples, width)


def checkpoint_vjp(dtype: torch.dtype, samples: int, width: int) -> Given:
    return pulled(*checkpointed(dtype, samples, width))


def checkpoint_rows(dtype: torch.dtype, samples: int, width: int) -> Given:
    return of_samples(*checkpointed(dtype, samples, width))


def saved_on_cpu(dtype: torch.dtype, samples: int, width: int) -> Given:
    net = frozen(deep(width, 12), dtype)

    def f(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return net(x)

    return pulled(f, draw(dtype, samples, width))


# ---- long graphs of small nodes


def ode(dtype: torch.dtype, steps: int) -> Given:
    """Runge and Kutta's fourth-order steps of a neural field: the final state in the initial one."""
    field, h = frozen(nets.mlp((3, 16, 3), nn.Tanh), dtype), 4.0 / steps

    def final(y: Tensor) -> Tensor:
        for _ in range(steps):
            a = field(y)
            b = field(y + 0.5 * h * a)
            c = field(y + 0.5 * h * b)
            d = field(y + h * c)
            y = y + h / 6 * (a + 2 * b + 2 * c + d)
        return y

    return whole(final, draw(dtype, 3))


def recurrence(dtype: torch.dtype, steps: int) -> Given:
    """The last state of a recurrence in all that it was given."""
    cell = frozen(nn.RNNCell(4, 16), dtype)

    def last(x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 16)
        for k in range(x.shape[1]):
            h = cell(x[:, k], h)
        return h

    return of_samples(last, draw(dtype, 2, steps, 4))


def lstm(dtype: torch.dtype, steps: int) -> Given:
    """A length that was not seen before is a graph that is to be planned: see the first call."""
    net = frozen(nn.LSTM(3, 5, batch_first=True), dtype)
    return of_samples(lambda v: net(v)[0][:, -1], draw(dtype, 3, steps, 3))


def arm(dtype: torch.dtype, joints: int) -> Given:
    """Forward kinematics by 4 x 4 matrices that are written entry by entry (Denavit and Hartenberg 1955)."""
    length, twist, offset = torch.rand(3, joints).to(dtype)
    tool = torch.tensor([0.1, 0.05, 0.1, 1.0]).to(dtype)

    def link(q: Tensor, i: int) -> Tensor:
        c, s, ca, sa = q[:, i].cos(), q[:, i].sin(), twist[i].cos(), twist[i].sin()
        out = q.new_zeros(len(q), 4, 4)
        rows = (
            (c, -s, 0, length[i]), (s * ca, c * ca, -sa, -offset[i] * sa),
            (s * sa, c * sa, ca, offset[i] * ca), (0, 0, 0, 1),
        )  # fmt: skip
        for r, row in enumerate(rows):
            for k, value in enumerate(row):
                out[:, r, k] = value
        return out

    def end(q: Tensor) -> Tensor:
        pose = link(q, 0)
        for i in range(1, joints):
            pose = pose @ link(q, i)
        return (pose @ tool)[:, :3]

    return of_samples(end, draw(dtype, 2, joints))


# ---- opaque ops


class Swish(torch.autograd.Function):
    """An activation that saves its input alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * s * (1 + x * (1 - s))


def through_function(dtype: torch.dtype, samples: int) -> tuple[Function, Tensor]:
    a, b = (frozen(nn.Linear(*ends), dtype) for ends in ((8, 32), (32, 8)))
    return lambda x: b(Swish.apply(a(x))), draw(dtype, samples, 8)


def function_jvp(dtype: torch.dtype, samples: int) -> Given:
    return pushed(*through_function(dtype, samples))


def function_divergence(dtype: torch.dtype, samples: int) -> Given:
    f, x = through_function(dtype, samples)

    def loop() -> Tensor:
        v = leaf(x)
        return trace(f(v), v)

    return Given(
        lambda: f(leaf(x)),
        lambda limit: jactri.divergence(f, x, memory_limit=limit),
        {"grad loop": loop},
    )


def function_diagonal(dtype: torch.dtype, samples: int) -> Given:
    f, x = through_function(dtype, samples)
    return Given(
        lambda: f(leaf(x)),
        lambda limit: jactri.diagonal(f, x, memory_limit=limit),
        {"grad loop": lambda: sample_rows(f, x).diagonal(dim1=1, dim2=2).clone()},
    )


@torch.library.custom_op("jactri_worst::cubed", mutates_args=())
def cubed(x: Tensor) -> Tensor:
    """An op that torch knows nothing of but its backward, which is of ops again."""
    return x**3


@torch.library.custom_op("jactri_worst::times", mutates_args=())
def times(x: Tensor, k: float) -> Tensor:
    """An op that vmap has no rule for, in its own backward too."""
    return x * k


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _keep_factor(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.k = inputs[1]


cubed.register_autograd(lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g, setup_context=_keep)
times.register_autograd(lambda ctx, g: (times(g, ctx.k), None), setup_context=_keep_factor)


def custom_op_jvp(dtype: torch.dtype, samples: int, width: int) -> Given:
    weight = draw(dtype, width, width) / 8
    return pushed(lambda a: torch.tanh(cubed(a @ weight) @ weight), draw(dtype, samples, width))


def custom_op_rows(dtype: torch.dtype, samples: int, width: int) -> Given:
    return whole(lambda v: times(v.sin(), 2.0), draw(dtype, samples, width), forward=False)


# ---- parameters


class Losses(nn.Module):
    """A loss of each sample."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nets.mlp((width // 2, width, width, 10), nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).square().sum(1)


def parameter_gramian(dtype: torch.dtype, samples: int, width: int) -> Given:
    """``J J^T`` of losses in all parameters, which are inputs here."""
    net, x = Losses(width).to(dtype), draw(dtype, samples, width // 2)
    params = {n: p.detach() for n, p in net.named_parameters()}

    def losses(*values: Tensor) -> Tensor:
        return functional_call(net, dict(zip(params, values, strict=True)), (x,))

    def loop() -> Tensor:
        jac = parameter_rows(lambda: net(x), list(net.parameters()))
        return jac @ jac.T

    return Given(
        lambda: net(x),
        lambda limit: jactri.jjt(losses, tuple(params.values()), memory_limit=limit),
        {"grad loop": loop},
    )


def output_variance(dtype: torch.dtype, samples: int, outputs: int) -> Given:
    """The diagonal of ``J diag(v) J^T`` of each sample, under unit variances."""
    net, x = nets.mlp((8, 32, outputs), nn.Tanh).to(dtype), draw(dtype, samples, 8)
    params = dict(net.named_parameters())
    v = {n: torch.ones_like(p) for n, p in params.items()}

    def ours(limit: Limit) -> Tensor:
        jac = jactri.parameter_jacobian(net, x, memory_limit=limit)
        return jac.variance(v, diagonal=True)

    def loop() -> Tensor:
        made = []
        for out in entries(net(x)):
            row = torch.autograd.grad(out, list(params.values()), retain_graph=True)
            made.append(sum(g.square().sum() for g in row))
        return torch.stack(made).reshape(samples, outputs)

    return Given(lambda: net(x), ours, {"grad loop": loop})


def pooled(dtype: torch.dtype, samples: int, channels: int) -> tuple[nn.Module, Tensor]:
    """A convolution, and the average of what it gives."""
    net = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10),
    )  # fmt: skip
    return net.to(dtype), draw(dtype, samples, 1, 28, 28)


def gauss_newton_diagonal(dtype: torch.dtype, samples: int, channels: int) -> Given:
    """Of half the squared error."""
    net, x = pooled(dtype, samples, channels)
    names = sorted(dict(net.named_parameters()))
    params = [dict(net.named_parameters())[n] for n in names]

    def ours(limit: Limit) -> Tensor:
        ones = torch.ones(samples, 10, dtype=dtype)
        made = jactri.ggn(net, x, ones, memory_limit=limit).diagonal()
        return torch.cat([made[n].flatten() for n in names])

    def loop() -> Tensor:
        total = [torch.zeros_like(p) for p in params]
        for out in entries(net(x)):
            row = torch.autograd.grad(out, params, retain_graph=True)
            for t, g in zip(total, row, strict=True):
                t += g * g
        return torch.cat([t.flatten() for t in total])

    return Given(lambda: net(x), ours, {"grad loop": loop})


def pooled_kernel(dtype: torch.dtype, samples: int, channels: int) -> Given:
    """The tangent kernel of a convolution and an average."""
    net, x = pooled(dtype, samples, channels)

    def loop() -> Tensor:
        jac = parameter_rows(lambda: net(x), list(net.parameters()))
        return (jac @ jac.T).reshape(samples, 10, samples, 10).transpose(1, 2)

    return Given(
        lambda: net(x),
        lambda limit: jactri.empirical_ntk(net, x, memory_limit=limit),
        {"grad loop": loop},
    )


def jacrev_parameters(dtype: torch.dtype, samples: int) -> Given:
    """Of parameters that are trained, as laplace-torch asks for it."""
    net, x = nets.mlp((32, 64, 64, 8), nn.Tanh).to(dtype), draw(dtype, samples, 32)
    params = dict(net.named_parameters())

    def predict(p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        y = functional_call(net, p, (x,))
        return y, y

    def flat(transform: Callable) -> Tensor:
        made, _ = transform(predict, has_aux=True)(params)
        return torch.cat([made[n].flatten(2) for n in params], 2).detach()

    def loop() -> Tensor:
        return parameter_rows(lambda: net(x), list(params.values())).reshape(samples, 8, -1)

    peers = {"grad loop": loop, "func.jacrev": lambda: flat(jacrev)}
    return Given(lambda: net(x), lambda limit: flat(jactri.func.jacrev), peers)


# ---- second derivatives


def point_laplacian(dtype: torch.dtype, points: int) -> Given:
    def f(x: Tensor) -> Tensor:
        return (torch.exp(x @ x.mT) @ x).mean((-1, -2))

    return traced(f, 0.2 * draw(dtype, 2, points, 2))


def determinant_laplacian(dtype: torch.dtype, walkers: int) -> Given:
    """The logarithm of a Slater determinant of six particles in as many orbitals."""
    centres = draw(dtype, 6, 3)

    def f(r: Tensor) -> Tensor:
        near = (r[:, :, None] - centres).square().sum(-1)
        return torch.linalg.slogdet(torch.exp(-0.5 * near))[1]

    return traced(f, draw(dtype, walkers, 6, 3))


# ---- the whole function by autograd, and plain networks


def hooked(dtype: torch.dtype, samples: int, width: int) -> Given:
    """A hook that changes gradients in a network with narrow ends."""
    a, b = (frozen(nn.Linear(*ends), dtype) for ends in ((4, width), (width, 32)))

    def f(x: Tensor) -> Tensor:
        h = torch.tanh(a(x))
        if h.requires_grad:
            h.register_hook(lambda g: 0.5 * g)
        return b(h)

    return of_samples(f, draw(dtype, samples, 4))


def cnn_five(dtype: torch.dtype, samples: int) -> Given:
    net = nets.conv_classifier()
    net[-1] = nn.Linear(net[-1].in_features, 5)
    net, x = frozen(net, dtype), draw(dtype, samples, 3, 32, 32)

    def by_sum() -> Tensor:
        return jacrev(lambda v: net(v).sum(0))(x).movedim(0, 1)

    return of_samples(
        net, x, **{"vmap(jacrev)": lambda: vmap(jacrev(net))(x), "jacrev of sum": by_sum}
    )


D = torch.float64
CASES = (
    Case("transfer", "FFT of a transfer function, 14 inputs", transfer,
         {"outputs": 9015}, {"outputs": 31}, ("50MB",)),
    Case("fourier", "Fourier neural operator block, 32 x 32", fourier,
         {"side": 32, "modes": 8}, {"side": 6, "modes": 2}, ("50MB",)),
    Case("checkpoint-vjp", "vjp, three checkpointed segments of 12 layers", checkpoint_vjp,
         {"samples": 1024, "width": 128}, {"samples": 3, "width": 4}, ("50MB",)),
    Case("checkpoint-rows", "Jacobians, three checkpointed segments of 12 layers", checkpoint_rows,
         {"samples": 256, "width": 32}, {"samples": 3, "width": 4}, ("20MB",)),
    Case("save-on-cpu", "vjp, 12 layers under save_on_cpu", saved_on_cpu,
         {"samples": 1024, "width": 128}, {"samples": 3, "width": 4}),
    Case("ode", "Runge-Kutta, 900 calls of a neural field", ode,
         {"steps": 225}, {"steps": 4}, dtype=D),
    Case("recurrence", "last state of 900 steps of an RNN cell", recurrence,
         {"steps": 900}, {"steps": 6}, ("20MB",)),
    Case("lstm", "last output of an LSTM, 36 steps", lstm, {"steps": 36}, {"steps": 4}, dtype=D),
    Case("arm", "kinematics of 7 joints, written in place", arm, {"joints": 7}, {"joints": 3}, dtype=D),
    Case("function-jvp", "jvp through an autograd.Function, N=256", function_jvp,
         {"samples": 256}, {"samples": 3}, ("10MB",)),
    Case("function-divergence", "divergence through an autograd.Function, N=256", function_divergence,
         {"samples": 256}, {"samples": 3}, ("10MB",)),
    Case("function-diagonal", "diagonal through an autograd.Function, N=256", function_diagonal,
         {"samples": 256}, {"samples": 3}, ("10MB",)),
    Case("custom-op-jvp", "jvp through a custom op, 32 x 64", custom_op_jvp,
         {"samples": 32, "width": 64}, {"samples": 2, "width": 3}, ("10MB",), D),
    Case("custom-op-rows", "Jacobian through a custom op that vmap cannot batch", custom_op_rows,
         {"samples": 16, "width": 8}, {"samples": 2, "width": 3}, dtype=D),
    Case("jjt-parameters", "Gramian of 32 losses in 401,930 parameters, by jjt", parameter_gramian,
         {"samples": 32, "width": 512}, {"samples": 3, "width": 4}, ("60MB",)),
    Case("variance", "variances of 3,100 outputs", output_variance,
         {"samples": 2, "outputs": 3100}, {"samples": 2, "outputs": 5}, ("50MB",)),
    Case("ggn-diagonal", "diagonal of the Gauss-Newton matrix, convolution and average", gauss_newton_diagonal,
         {"samples": 32, "channels": 64}, {"samples": 2, "channels": 3}, ("50MB",)),
    Case("ntk-pool", "tangent kernel, convolution and average", pooled_kernel,
         {"samples": 32, "channels": 64}, {"samples": 2, "channels": 3}, ("50MB",)),
    Case("laplacian-points", "Laplacian of exp(x x') x, 2 x 400 coordinates", point_laplacian,
         {"points": 200}, {"points": 4}, ("20MB",), D),
    Case("laplacian-logdet", "Laplacian of log|det|, 2,048 walkers", determinant_laplacian,
         {"walkers": 2048}, {"walkers": 3}, ("20MB",), D),
    Case("hook", "Jacobians, a hook on the gradient of 32,768 features", hooked,
         {"samples": 16, "width": 32768}, {"samples": 2, "width": 7}, ("50MB",), D),
    Case("jacrev-parameters", "func.jacrev in trained parameters, MLP 32-64-64-8, N=64", jacrev_parameters,
         {"samples": 64}, {"samples": 2}),
    Case("cnn-five", "convolutional classifier of five classes, N=16", cnn_five,
         {"samples": 16}, {"samples": 2}),
)  # fmt: skip


def select(names: Sequence[str]) -> list[Case]:
    """The cases of these names; a name that ends with "-" stands for all that begin so; no name for all."""
    found = []
    for name in names or [c.name for c in CASES]:
        hits = [c for c in CASES if c.name == name or (name[-1] == "-" and c.name.startswith(name))]
        if not hits:
            raise KeyError(f"no case {name!r}; there are {', '.join(c.name for c in CASES)}")
        found += [c for c in hits if c not in found]
    return found
