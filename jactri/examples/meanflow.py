"""One-step generator of digits: a MeanFlow, trained by its own derivative along the path.

Geng et al. 2025, "Mean flows for one-step generative modeling", eqs. 6 and 11: u(z, r, t) is the mean of the velocity
v = noise - data over the times r to t, so that z - (t - r) u is where the flow is at r; one evaluation from t = 1 to
r = 0 makes a sample. Differentiated in t, u = v - (t - r) (v du/dz + du/dt), which is the target, without a gradient:
``jactri.jvp(..., differentiate="output")`` gives u with its graph and the bracket without one, from one run. Beside
it a network of the same size learns v alone (flow matching, Lipman et al. 2023) and needs steps to draw a digit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jactri
from jactri.demo.digits import Digits, accuracy, load, train_classifier
from jactri.examples import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 160
BLOCKS = 3
WAVES = 3
BATCH = 128
APART = 0.75  # of the batch has r < t; the rest learns v, the limit r = t
STEPS = (1, 2, 4, 8, 16)  # of the samplers
ROWS = 5  # drawn of each sampler
JUMPS = (1.0, 0.9, 0.8, 0.6, 0.4)  # times


class Block(nn.Module):
    """A residual layer, whose norm is scaled and shifted by what time and class say."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.told = nn.Linear(WIDTH, 2 * WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.told(told).chunk(2, 1)
        return h + self.narrow(F.silu(self.wide(self.norm(h) * (1 + scale) + shift)))


class Velocity(nn.Module):
    """u of images (N, 64) at times r, t (N, 1), for digits (N,): (N, 64). With r = t it is the velocity itself."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.digit = nn.Linear(64, WIDTH), nn.Embedding(10, WIDTH)
        self.times = nn.Linear(4 * WAVES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.out = nn.Linear(WIDTH, 64)
        nn.init.zeros_(self.out.weight)

    def forward(self, z: Tensor, r: Tensor, t: Tensor, digit: Tensor) -> Tensor:
        waves = torch.pi / 2 * torch.arange(1, WAVES + 1)
        angles = torch.cat([t * waves, (t - r) * waves], 1)
        told = F.silu(self.times(torch.cat([angles.sin(), angles.cos()], 1)) + self.digit(digit))
        h = self.image(z)
        for block in self.blocks:
            h = block(h, told)
        return self.out(h)


def along_the_path(
    net: Velocity, z: Tensor, r: Tensor, t: Tensor, digit: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """u, which has a graph, and its derivative in t where z moves with v, which has none; (N, 64) each."""
    tangents = (v, torch.zeros_like(r), torch.ones_like(t))
    return jactri.jvp(
        lambda z, r, t: net(z, r, t, digit), (z, r, t), tangents, differentiate="output"
    )


def train(images: Tensor, digits: Tensor, steps: int, mean: bool) -> tuple[Velocity, list[float]]:
    """A network of the mean velocity, or of the velocity itself, and its squared error a pixel at every step."""
    net = Velocity()
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-3, total_steps=steps, pct_start=0.1
    )
    course = []
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,))
        data, digit, noise = images[batch], digits[batch], torch.randn(BATCH, 64)
        r, t = torch.rand(2, BATCH, 1).sort(0).values
        if mean:
            r = torch.where(torch.rand(BATCH, 1) < APART, r, t)
        else:
            r = t = torch.rand(BATCH, 1)
        z, v = (1 - t) * data + t * noise, noise - data
        if mean:
            u, derivative = along_the_path(net, z, r, t, digit, v)
            target = v - (t - r) * derivative
        else:
            u, target = net(z, t, t, digit), v
        loss = F.mse_loss(u, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        course.append(loss.item())
    return net.requires_grad_(False), course


def sample(net: Velocity, noise: Tensor, digit: Tensor, steps: int, mean: bool) -> Tensor:
    """Images (N, 64) made of noise in equal steps of time; by the velocity, those of Euler."""
    z = noise
    for k in range(steps, 0, -1):
        t = torch.full((len(z), 1), k / steps)
        z = z - net(z, t - 1 / steps if mean else t, t, digit) / steps
    return z


def frechet(one: Tensor, other: Tensor) -> float:
    """Fréchet's squared distance of two sets of images (N, 64), by their means and covariances."""
    one, other = one.double(), other.double()
    C, D = one.T.cov(), other.T.cov()
    root = torch.linalg.eigvals(C @ D).real.clamp_min(0).sqrt().sum()
    shift = (one.mean(0) - other.mean(0)).square().sum()
    return (shift + C.trace() + D.trace() - 2 * root).item()


@dataclasses.dataclass(frozen=True)
class Judged:
    """A set of images of known digits, against the training images."""

    images: Tensor  # (N, 64), in [0, 1]
    digits: Tensor
    distance: float  # Fréchet's
    right: float  # share that a classifier of real digits reads as what they should be
    nearest: (
        float  # mean distance to the nearest training image: nearer than unseen ones are copies
    )


@dataclasses.dataclass(frozen=True)
class Found:
    unseen: Judged
    mean: dict[int, Judged]  # by the evaluations of a sample
    instant: dict[int, Judged]
    courses: dict[str, list[float]]  # mean squared error a pixel, step by step
    path: Tensor  # (len(JUMPS), 64): an image on the way to noise
    jumps: dict[str, Tensor]  # the same, carried to time 0 in one evaluation
    apart: float  # jactri's product against autograd's, relative to the largest


def judge(images: Tensor, digits: Tensor, data: Digits, classifier: nn.Module) -> Judged:
    images, known = images.clamp(0, 1), data.train_images.flatten(1)
    right = accuracy(classifier, images.view(-1, 1, 8, 8), digits)
    nearest = torch.cdist(images, known).min(1).values.mean().item()
    return Judged(images, digits, frechet(images, known), right, nearest)


def run(quick: bool) -> Found:
    data = load(0)
    classifier = train_classifier(data, 2 if quick else 12, lambda: None)
    steps, each = (100, 20) if quick else (1200, 100)
    nets, courses = {}, {}
    for name in ("MeanFlow", "flow matching"):
        images = 2 * data.train_images.flatten(1) - 1
        nets[name], courses[name] = train(images, data.train_labels, steps, name == "MeanFlow")
    mean, instant = nets.values()

    digits = torch.arange(10).repeat(each)
    noise = torch.randn(len(digits), 64)
    judged = [
        {k: judge((sample(net, noise, digits, k, of) + 1) / 2, digits, data, classifier) for k in STEPS}
        for net, of in ((mean, True), (instant, False))
    ]  # fmt: skip
    unseen = judge(data.test_images.flatten(1), data.test_labels, data, classifier)

    t, digit = torch.tensor(JUMPS).unsqueeze(1), torch.full((len(JUMPS),), 2)
    image = 2 * unseen.images[unseen.digits == 2][:1] - 1
    path = (1 - t) * image + t * noise[:1]
    jumps = {
        "MeanFlow": path - t * mean(path, torch.zeros_like(t), t, digit),
        "flow matching": path - t * instant(path, t, t, digit),
    }

    r, t = torch.rand(2, len(noise), 1).sort(0).values
    v = torch.randn_like(noise)
    _, mine = along_the_path(mean, noise, r, t, digits, v)
    _, truth = torch.autograd.functional.jvp(
        lambda z, t: mean(z, r, t, digits), (noise, t), (v, torch.ones_like(t))
    )
    apart = (mine - truth).abs().max() / truth.abs().max()
    return Found(unseen, judged[0], judged[1], courses, path, jumps, apart.item())


def tell(found: Found) -> Iterator[str]:
    rows = [("real digits, unseen", "", found.unseen)]
    for name, judged in (("MeanFlow", found.mean), ("flow matching", found.instant)):
        rows += [(name, str(k), one) for k, one in judged.items()]
    yield from common.table(
        [f"{len(found.mean[1].images)} samples", "evaluations", "Fréchet distance", "read as asked", "to nearest"],
        [[name, k, f"{j.distance:.3f}", f"{j.right:.1%}", f"{j.nearest:.2f}"] for name, k, j in rows],
    )  # fmt: skip
    yield "distances to the training digits, a pixel from white to black being 1; Fréchet's is squared"
    yield f"jactri's product against autograd's: within {found.apart:.0e}"


def draw(found: Found) -> Figure:
    one, some = found.mean[1], found.instant[1]
    figure = common.figure(
        "Digits in one step",
        "A MeanFlow learns how far noise has to go, from its own derivative along the path: one jvp each time it is "
        "trained. One evaluation then makes a digit.\n"
        "A network of the same size that learns only the direction at each moment (flow matching) makes the mean "
        "of a digit in one step, and needs many steps for a sharp one.",
        (15, 7.2),
    )
    sets = (
        ("real digits", found.unseen, common.INK),
        ("MeanFlow: one evaluation", one, common.RED),
        ("flow matching: one evaluation", some, common.BLUE),
        ("flow matching: 8 evaluations, of the same noise", found.instant[8], common.BLUE),
    )
    left = common.panels(
        figure, 2, 2, left=0.03, right=0.63, bottom=0.03, top=0.8, wspace=0.06, hspace=0.1
    )
    for axes, (name, judged, colour) in zip(left.flat, sets, strict=True):
        picks = [(judged.digits == d).nonzero()[:ROWS, 0] for d in range(10)]
        common.mosaic(axes, judged.images[torch.stack(picks, 1).flatten()], 10)
        axes.set_title(name, fontsize=11, color=colour, loc="left")

    scores = common.panels(figure, 1, 1, left=0.69, right=0.98, bottom=0.46, top=0.79)
    for name, by_steps, colour, mark in (
        ("flow matching", found.instant, common.BLUE, "s"),
        ("MeanFlow", found.mean, common.RED, "o"),
    ):
        distances = [j.distance for j in by_steps.values()]
        scores.plot(STEPS, distances, color=colour, marker=mark, ms=6, lw=1.8, label=name)
    scores.axhline(
        found.unseen.distance, color=common.INK, lw=1.3, ls="--", label="real digits, unseen"
    )
    scores.set(xscale="log", yscale="log", xticks=STEPS, xticklabels=STEPS)
    scores.minorticks_off()
    common.label(
        scores,
        "how far from the training digits",
        "evaluations a sample",
        "squared Fréchet distance (pixels²)",
    )
    scores.legend(frameon=False, fontsize=9, labelcolor=common.INK)

    way = common.panels(figure, 1, 1, left=0.75, right=0.98, bottom=0.05, top=0.33)
    rows = {"image and noise": found.path, **found.jumps}
    common.mosaic(way, (torch.cat([*rows.values()]) + 1) / 2, len(JUMPS))
    way.set_xticks([10 * k + 4.5 for k in range(len(JUMPS))], [f"t = {t:g}" for t in JUMPS])
    way.set_yticks([10 * k + 4.5 for k in range(len(rows))], [*rows])
    way.tick_params(length=0, labelsize=9, labelcolor=common.INK)
    way.set_title("from a time t to 0 in one evaluation", fontsize=11, color=common.INK, loc="left")
    return figure


def main(argv: list[str] | None = None) -> Found:
    return common.main("meanflow", __doc__, run, tell, draw, argv, needs=("scikit-learn",))


if __name__ == "__main__":
    main()
