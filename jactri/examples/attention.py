"""Normalising flow of digits, with attention between their patches and an exact trace.

A transformer moves the four quarters of an image, each a token of its 5 principal components, from data at time 0 to
normal noise at time 1. It starts from flow matching (Lipman et al. 2023) and is then trained by maximum likelihood
(Chen et al. 2018, eq. 8: along dz/dt = f(t, z) the log density falls by the divergence of f), once with the exact
divergence of ``jactri.divergence(..., create_graph=True)`` and once with Hutchinson's estimate of it from one random
vector (FFJORD, Grathwohl et al. 2019). Both go through torch's fused attention, which autograd cannot differentiate
twice on a CPU. Runge and Kutta's steps are of random length, so that the flow cannot learn to use their error.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jactri
from jactri.demo.digits import load
from jactri.examples import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS, PARTS = 4, 5  # quarters of an image, and principal components of each
SIZE = TOKENS * PARTS
WIDTH, HEADS, BLOCKS = 32, 2, 2
BATCH = 96
STEPS = 2  # of Runge and Kutta, while it trains; twice as many where it is judged
REPEATED = 100  # unseen images, whose log-likelihood is estimated again and again
VECTORS = (1, 2, 4, 8, 16)  # of an estimate
SHOWN = 48


class Parts:
    """Images (N, 64) to standardised principal components of their quarters (N, SIZE), and back."""

    def __init__(self, images: Tensor) -> None:
        quarters = self.cut(images)
        self.mean = quarters.mean(0)
        apart = (quarters - self.mean).transpose(0, 1)
        _, lengths, axes = torch.linalg.svd(apart, full_matrices=False)
        self.axes, self.scale = axes[:, :PARTS], lengths[:, :PARTS] / math.sqrt(len(images))

    def cut(self, images: Tensor) -> Tensor:
        """(N, TOKENS, 16); of 17 greys each pixel is spread evenly over its own, so that there is a density."""
        smooth = (16 * images + torch.rand(images.shape)) / 17
        return smooth.view(-1, 2, 4, 2, 4).transpose(2, 3).reshape(-1, TOKENS, 16)

    def of(self, images: Tensor) -> Tensor:
        parts = torch.einsum("ntp,tcp->ntc", self.cut(images) - self.mean, self.axes)
        return (parts / self.scale).flatten(1)

    def drawn(self, z: Tensor) -> Tensor:
        parts = z.view(-1, TOKENS, PARTS) * self.scale
        quarters = torch.einsum("ntc,tcp->ntp", parts, self.axes) + self.mean
        return quarters.view(-1, 2, 2, 4, 4).transpose(2, 3).reshape(-1, 64)


class Field(nn.Module):
    """f(t, z) at times t, () or (N, 1): (N, SIZE) to (N, SIZE)."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.time = nn.Linear(PARTS, WIDTH), nn.Linear(4, WIDTH)
        self.place = nn.Parameter(0.5 * torch.randn(TOKENS, WIDTH))
        self.blocks = nn.Sequential()
        for _ in range(BLOCKS):
            own = {"activation": F.silu, "batch_first": True, "norm_first": True}
            self.blocks.append(nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, **own))
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, PARTS))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        angles = torch.pi * t.view(-1, 1, 1) * torch.tensor([1.0, 2.0])
        told = self.time(torch.cat([angles.sin(), angles.cos()], 2))
        h = self.part(z.view(-1, TOKENS, PARTS)) + self.place + told
        return self.out(self.blocks(h)).flatten(1)


def moments(steps: int, jitter: bool) -> Tensor:
    """Times from 0 to 1, ``steps + 1``: closer together near the data, and at random between their neighbours."""
    times = torch.linspace(0, 1, steps + 1) ** 1.5
    if jitter:
        times[1:-1] += 0.8 * times.diff()[:-1] * (torch.rand(steps - 1) - 0.5)
    return times


def carried(rates: Callable, z: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """z after Runge-Kutta steps over the times, and the integral (N,) of the second of the rates on the way."""
    total = torch.zeros(len(z))
    for t, h in zip(times, times.diff(), strict=False):
        a, da = rates(t, z)
        b, db = rates(t + h / 2, z + h / 2 * a)
        c, dc = rates(t + h / 2, z + h / 2 * b)
        d, dd = rates(t + h, z + h * c)
        z = z + h / 6 * (a + 2 * b + 2 * c + d)
        total = total + h / 6 * (da + 2 * db + 2 * dc + dd)
    return z, total


def log_likelihood(
    field: Field, z: Tensor, times: Tensor, create_graph: bool = False, estimate: int | None = None
) -> Tensor:
    """log p of points, (N,); ``estimate``: from how many random vectors the divergence is estimated, if at all."""

    def rates(t: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        options = {"estimate": estimate, "return_lower": True}
        return jactri.divergence(lambda z: field(t, z), z, create_graph, **options)[:2]

    noise, total = carried(rates, z, times)
    return total - 0.5 * noise.square().sum(1) - SIZE / 2 * math.log(2 * torch.pi)


def train(field: Field, loss_of: Callable[[], Tensor], rate: float, steps: int) -> None:
    optimizer = torch.optim.Adam(field.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def match(field: Field, parts: Parts, images: Tensor, steps: int) -> None:
    """Flow matching: the field becomes the mean of noise - data over the lines between them."""

    def loss_of() -> Tensor:
        data = parts.of(images[torch.randint(len(images), (256,))])
        noise, t = torch.randn_like(data), torch.rand(len(data), 1)
        return F.mse_loss(field(t, (1 - t) * data + t * noise), noise - data)

    train(field, loss_of, 8e-3, steps)


def maximise(field: Field, parts: Parts, images: Tensor, steps: int, estimate: int | None) -> None:
    """Maximum likelihood, of batches that are the same at each call."""
    generator = torch.Generator().manual_seed(1)

    def loss_of() -> Tensor:
        data = parts.of(images[torch.randint(len(images), (BATCH,), generator=generator)])
        return -log_likelihood(field, data, moments(STEPS, jitter=True), True, estimate).mean()

    train(field, loss_of, 2e-3, steps)


def gradient(field: Field, z: Tensor, estimate: int | None) -> Tensor:
    """Of the mean log-likelihood in all parameters, as one vector."""
    likelihood = log_likelihood(field, z, moments(STEPS, jitter=False), True, estimate).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(likelihood, [*field.parameters()])])


def normals(z: Tensor, labels: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """log p of points by one normal distribution fitted to z (N, SIZE), and by a mixture of one for each label."""

    def log_prob(of: Tensor) -> Tensor:
        return torch.distributions.MultivariateNormal(of.mean(0), of.T.cov()).log_prob(at)

    each = [log_prob(z[labels == k]) + (labels == k).float().mean().log() for k in range(10)]
    return log_prob(z), torch.stack(each).logsumexp(0)


@dataclasses.dataclass(frozen=True)
class Found:
    scores: dict[str, float]  # mean log-likelihood of the unseen images
    seconds: dict[str, float]  # that maximum likelihood took
    unseen: Tensor  # (N, 64), as their parts draw them
    exact: Tensor  # (N,), log-likelihood of each
    estimates: dict[int, Tensor]  # by the random vectors: (draws, REPEATED), estimates of the first
    samples: Tensor  # (SHOWN, 64)
    spread: dict[str, float]  # of the gradient, relative to it, by what else is drawn
    apart: float  # jactri's divergence against autograd's trace, relative to the largest

    @property
    def errors(self) -> dict[int, float]:
        """Root mean square of the estimates' errors, in nats."""
        exact = self.exact[:REPEATED]
        return {k: (e - exact).square().mean().sqrt().item() for k, e in self.estimates.items()}


def run(quick: bool) -> Found:
    data = load(0)
    images = data.train_images.flatten(1)
    parts = Parts(images)
    known = parts.of(images)
    unseen = parts.of(data.test_images.flatten(1))[: REPEATED if quick else None]
    fine = moments(2 * STEPS, jitter=False)
    field = Field()
    match(field, parts, images, 80 if quick else 1000)

    one, ten = normals(known, data.train_labels, unseen)
    scores = {"one normal distribution": one.mean().item(), "one for each digit": ten.mean().item()}
    scores["the flow, by flow matching"] = log_likelihood(field, unseen, fine).mean().item()
    batches = known[torch.randperm(len(known))[: 2 * BATCH]].split(BATCH)
    truth, other = (gradient(field, batch, None) for batch in batches)
    guess = gradient(field, batches[0], 1)
    spread = {
        "another random vector": ((guess - truth).norm() / truth.norm()).item(),
        "another batch": ((other - truth).norm() / truth.norm() / math.sqrt(2)).item(),
    }
    seconds = {}
    for name, estimate in (("estimated", 1), ("exact", None)):
        trained, begun = copy.deepcopy(field), time.perf_counter()
        maximise(trained, parts, images, 2 if quick else 40, estimate)
        seconds[name] = time.perf_counter() - begun
        trained.requires_grad_(False)
        exact = log_likelihood(trained, unseen, fine)
        scores[f"by maximum likelihood, trace {name}"] = exact.mean().item()

    few = unseen[:REPEATED]
    estimates = {
        k: torch.stack([log_likelihood(trained, few, fine, estimate=k) for _ in range(1 if quick else 5)])
        for k in (VECTORS[::4] if quick else VECTORS)
    }  # fmt: skip
    noise = torch.randn(SHOWN, SIZE)
    drawn, _ = carried(lambda t, z: (trained(t, z), 0.0), noise, fine.flip(0))
    half = torch.tensor(0.5)
    J = torch.autograd.functional.jacobian(lambda z: trained(half, z).sum(0), few)
    trace = torch.einsum("ini->n", J)
    mine = jactri.divergence(lambda z: trained(half, z), few)
    apart = ((mine - trace).abs().max() / trace.abs().max()).item()
    images = parts.drawn(unseen)
    return Found(scores, seconds, images, exact, estimates, parts.drawn(drawn), spread, apart)


def tell(found: Found) -> Iterator[str]:
    yield from common.table(
        [f"log-likelihood of {len(found.exact)} unseen digits, {SIZE} numbers each", "nats"],
        [[name, f"{value:.2f}"] for name, value in found.scores.items()],
    )
    for k, error in found.errors.items():
        yield f"one digit's log-likelihood, estimated from random vectors ({k}): off by {error:.2f} nats"
    for name, value in found.spread.items():
        yield f"the gradient of a batch of {BATCH} differs by {value:.0%} with {name}"
    took = ", ".join(f"trace {name} {seconds:.1f} s" for name, seconds in found.seconds.items())
    yield f"maximum likelihood took: {took}"
    yield f"jactri's divergence against autograd's trace: within {found.apart:.0e}"


def draw(found: Found) -> Figure:
    errors = found.errors
    figure = common.figure(
        "How likely is a digit?",
        "A transformer flow over the four quarters of each digit, trained by maximum likelihood. With its divergence "
        "estimated from one random vector it learns about as much as with the exact one;\n"
        f"but the log-likelihood of one digit is then off by {errors[1]:.1f} nats, and by {errors[16]:.1f} with "
        f"16 vectors, hardly fewer than the {SIZE} directions of the exact divergence.",
        (15, 8.6),
    )
    order = found.exact.argsort()
    ends = torch.cat([order[: SHOWN // 2], order[-SHOWN // 2 :]])
    sets = [
        ("real digits, as the flow sees them", found.unseen[:SHOWN], common.INK),
        ("digits that the flow draws", found.samples, common.RED),
        ("real digits: the least likely (two rows), and the most likely", found.unseen[ends], common.INK),
    ]  # fmt: skip
    left = common.panels(figure, 3, 1, left=0.03, right=0.42, bottom=0.03, hspace=0.14)
    for axes, (name, images, colour) in zip(left, sets, strict=True):
        common.mosaic(axes, images, 12)
        axes.set_title(name, fontsize=11, color=colour, loc="left")

    bars = common.panels(figure, 1, 1, left=0.67, right=0.98, bottom=0.54)
    names, values = [*found.scores], [*found.scores.values()]
    low = min(values) - 2
    colours = [common.MUTED] * 3 + [common.BLUE, common.RED]
    bars.barh(names, [v - low for v in values], left=low, color=colours, height=0.64)
    for k, value in enumerate(values):
        bars.text(value - 0.1, k, f"{value:.2f}", va="center", ha="right", color="white")
    bars.invert_yaxis()
    common.label(bars, "log-likelihood of unseen digits", "nats a digit (longer is better)")
    bars.tick_params(axis="y", labelsize=10, labelcolor=common.INK, length=0)

    guess, error = common.panels(figure, 1, 2, left=0.5, right=0.98, top=0.41, wspace=0.25)
    estimates = found.estimates[1].numpy()
    exact = found.exact[:REPEATED].expand(len(estimates), -1).numpy()
    guess.scatter(
        exact, estimates, s=7, color=common.BLUE, lw=0, alpha=0.6, label="from one vector"
    )  # fmt: skip
    guess.axline((-15, -15), slope=1, color=common.INK, lw=1.3, ls="--", label="exact")
    common.label(guess, "digits, estimated again and again", "exact (nats)", "estimated (nats)")
    guess.legend(frameon=False, fontsize=9, labelcolor=common.INK, loc="lower right")
    error.plot([*errors], [*errors.values()], color=common.BLUE, marker="o", ms=6, lw=1.8)
    error.set(xscale="log", xticks=[*errors], xticklabels=[*errors], ylim=(0, None))
    error.minorticks_off()
    common.label(error, "how far an estimate is off", "random vectors", "root mean square (nats)")
    return figure


def main(argv: list[str] | None = None) -> Found:
    return common.main("attention", __doc__, run, tell, draw, argv, needs=("scikit-learn",))


if __name__ == "__main__":
    main()
