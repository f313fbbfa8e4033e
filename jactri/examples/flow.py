"""Continuous normalising flow of two moons, with an exact trace.

Chen et al. 2018, "Neural ordinary differential equations", eq. 8: along dz/dt = f(t, z) the log density falls by the
divergence of f. FFJORD estimates it with random probes, because it costs one reverse sweep a dimension; here
``jactri.divergence(f, z, create_graph=True, return_lower=True)`` gives f and its exact divergence from one
evaluation. Runge-Kutta steps of fixed size carry data to normal noise, maximum likelihood trains f through them, and
the flow run backward draws samples. The data's true density is known, so there is a best score to compare with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import jactri
from jactri.examples import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUR = 0.1  # standard deviation of the data around the two arcs
STEPS = 6  # of Runge and Kutta, while it trains; twice as many where it is judged
BATCH = 256
JUDGED = 2000
SIDE = 120
SNAPSHOTS = 5


def arcs(angle: Tensor, upper: Tensor) -> Tensor:
    """Points (N, 2) of the two half circles, at angles (N,) in 0 to pi."""
    x = torch.where(upper, angle.cos() - 0.5, 0.5 - angle.cos())
    y = torch.where(upper, angle.sin() - 0.25, 0.25 - angle.sin())
    return torch.stack([x, y], 1)


def two_moons(count: int) -> Tensor:
    """``count`` points (N, 2), half of them on average of either moon."""
    points = arcs(torch.pi * torch.rand(count), torch.rand(count) < 0.5)
    return points + BLUR * torch.randn(count, 2)


def true_log_density(points: Tensor) -> Tensor:
    """(N,): the arcs' normal distributions, summed over 500 middles of each."""
    count = 500
    angle = torch.pi * (torch.arange(count) + 0.5) / count
    upper = torch.arange(2 * count) < count
    middles = arcs(torch.cat([angle, angle]), upper)
    squares = torch.cdist(points, middles).square() / (2 * BLUR**2)
    return torch.logsumexp(-squares, 1) - math.log(2 * count * 2 * torch.pi * BLUR**2)


class Field(nn.Module):
    """f(t, z) at a time t: (N, 2) to (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.time = nn.Linear(2, 64), nn.Parameter(torch.randn(64))
        self.rest = nn.Sequential(nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, t: float, z: Tensor) -> Tensor:
        return self.rest(self.place(z) + t * self.time)


def rates(field: Field, t: float, z: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
    """dz/dt (N, 2), and the divergence of the field (N,)."""
    return jactri.divergence(lambda z: field(t, z), z, create_graph=create_graph, return_lower=True)


def to_noise(
    field: Field, points: Tensor, steps: int, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Data (N, 2) at time 0 carried to time 1, and the integral of the divergence on the way (N,)."""
    h, z, total = 1 / steps, points, torch.zeros(len(points))
    for k in range(steps):
        t = k * h
        a, da = rates(field, t, z, create_graph)
        b, db = rates(field, t + h / 2, z + h / 2 * a, create_graph)
        c, dc = rates(field, t + h / 2, z + h / 2 * b, create_graph)
        d, dd = rates(field, t + h, z + h * c, create_graph)
        z = z + h / 6 * (a + 2 * b + 2 * c + d)
        total = total + h / 6 * (da + 2 * db + 2 * dc + dd)
    return z, total


def log_likelihood(field: Field, points: Tensor, steps: int, create_graph: bool = False) -> Tensor:
    """log p of every point, (N,): that of its noise, plus the flow's change of volume."""
    noise, total = to_noise(field, points, steps, create_graph)
    return -0.5 * noise.square().sum(1) - math.log(2 * torch.pi) + total


@torch.no_grad()
def from_noise(field: Field, noise: Tensor, steps: int) -> list[Tensor]:
    """Where normal noise (N, 2) is after every step from time 1 back to 0; no divergence is needed."""
    h, course = 1 / steps, [noise]
    for k in range(steps, 0, -1):
        t, z = k * h, course[-1]
        a = field(t, z)
        b = field(t - h / 2, z - h / 2 * a)
        c = field(t - h / 2, z - h / 2 * b)
        d = field(t - h, z - h * c)
        course.append(z - h / 6 * (a + 2 * b + 2 * c + d))
    return course


def plane() -> tuple[Tensor, float, tuple[float, ...]]:
    """The points of a grid (SIDE**2, 2) that holds all but the tails, their cells' area, and the grid's extent."""
    x, y = torch.linspace(-2.2, 2.2, SIDE), torch.linspace(-1.5, 1.5, SIDE)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2).view(-1, 2)
    return points, ((x[1] - x[0]) * (y[1] - y[0])).item(), (-2.2, 2.2, -1.5, 1.5)


@dataclasses.dataclass(frozen=True)
class Found:
    unseen: Tensor  # (JUDGED, 2), of the data
    before: float  # mean log-likelihood of the unseen data, untrained
    after: float
    normal: float  # and of one normal distribution fitted to as many other points
    best: float  # and by the density that they were drawn from
    course: list[float]  # mean log-likelihood of the batch, step by step
    density: Tensor  # (SIDE, SIDE), at y (rows) and x
    mass: float  # its sum over the grid; 1 for a density
    snapshots: list[Tensor]  # noise on its way to samples, SNAPSHOTS of (JUDGED, 2)
    returned: float  # how far a sample misses its noise when carried back, largest
    apart: float  # jactri's divergence against autograd's trace, relative to the largest


def run(quick: bool) -> Found:
    field = Field()
    unseen, fine = two_moons(JUDGED), 2 * STEPS
    before = log_likelihood(field, unseen, fine).mean().item()
    steps = 100 if quick else 800
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    course = []
    for _ in range(steps):
        likelihood = log_likelihood(field, two_moons(BATCH), STEPS, create_graph=True).mean()
        optimizer.zero_grad()
        (-likelihood).backward()
        optimizer.step()
        schedule.step()
        course.append(likelihood.item())
    field.requires_grad_(False)

    others = two_moons(JUDGED)
    normal = torch.distributions.MultivariateNormal(others.mean(0), others.T.cov())
    points, cell, _ = plane()
    density = log_likelihood(field, points, fine).exp()
    noise = torch.randn(JUDGED, 2)
    way = from_noise(field, noise, fine)
    returned = (to_noise(field, way[-1], fine)[0] - noise).norm(dim=1).max().item()
    picks = torch.linspace(0, len(way) - 1, SNAPSHOTS).round().long().tolist()
    J = torch.autograd.functional.jacobian(lambda z: field(0.5, z).sum(0), unseen)
    trace = torch.einsum("ini->n", J)
    _, divergence = rates(field, 0.5, unseen, False)
    apart = (divergence - trace).abs().max() / trace.abs().max()
    return Found(
        unseen, before, log_likelihood(field, unseen, fine).mean().item(), normal.log_prob(unseen).mean().item(),
        true_log_density(unseen).mean().item(), course, density.view(SIDE, SIDE), density.sum().item() * cell,
        [way[k] for k in picks], returned, apart.item(),
    )  # fmt: skip


def tell(found: Found) -> Iterator[str]:
    rows: list[tuple[str, float]] = [
        ("the flow, untrained", found.before),
        ("one normal distribution", found.normal),
        ("the flow, trained", found.after),
        ("the density they come from: the best there is", found.best),
    ]
    yield from common.table(
        [f"log-likelihood a point, {JUDGED} unseen points", "nats"],
        [[name, f"{value:.3f}"] for name, value in rows],
    )
    yield f"the flow's density sums to {found.mass:.4f} over the grid"
    yield f"samples carried back miss their noise by {found.returned:.0e} at most"
    yield f"jactri's divergence against autograd's trace: within {found.apart:.0e}"


def draw(found: Found) -> Figure:
    figure = common.figure(
        "From noise to two moons, and what every point on the plane is worth",
        "A velocity field carries normal noise to samples. Its exact divergence says how it squeezes the plane, and so "
        "the density of every point.\n"
        f"Unseen data get {found.after:.3f} nats a point from the flow, {found.best:.3f} from the density that they "
        "were drawn from.",
        (15, 8.6),
    )
    moments = common.panels(figure, 1, SNAPSHOTS, left=0.04, right=0.985, bottom=0.52, wspace=0.12)
    end = found.snapshots[-1]
    angle = torch.linspace(0, torch.pi, 200)
    above, below = (arcs(angle, torch.full((200,), upper)) for upper in (True, False))
    first = torch.cdist(end, above).min(1).values < torch.cdist(end, below).min(1).values
    times = torch.linspace(1, 0, SNAPSHOTS)
    for axes, points, t in zip(moments, found.snapshots, times, strict=True):
        for side, colour in ((first, common.BLUE), (~first, common.ORANGE)):
            axes.scatter(*points[side].T.numpy(), s=4, color=colour, lw=0, alpha=0.7)
        axes.set(xlim=(-3, 3), ylim=(-2.6, 2.6), aspect="equal")
        common.label(axes, f"time {t:.2f}" + {1: ": noise", 0: ": samples"}.get(t.item(), ""), "x")
    moments[0].set_ylabel("y", fontsize=9.5, color=common.MUTED)

    mine, data, course = common.panels(figure, 1, 3, left=0.04, right=0.985, top=0.42, wspace=0.3)
    points, _, extent = plane()
    truth = true_log_density(points).exp().view(SIDE, SIDE).numpy()
    shown = mine.imshow(
        found.density.numpy(), extent=extent, origin="lower", cmap="cividis", interpolation="bilinear", vmin=0
    )  # fmt: skip
    common.label(mine, "the flow's density", "x", "y")
    common.colour_bar(figure, shown, mine, "probability per unit area")
    levels = [0.02 * truth.max(), 0.2 * truth.max(), 0.6 * truth.max()]
    grid = points.view(SIDE, SIDE, 2)
    x, y = grid[0, :, 0].numpy(), grid[:, 0, 1].numpy()
    data.scatter(*found.unseen.T.numpy(), s=4, color="#b6bcc6", lw=0, label="unseen data")
    for values, colour, dashes in (
        (truth, common.INK, "dashed"),
        (found.density.numpy(), common.RED, "solid"),
    ):
        data.contour(x, y, values, levels=levels, colors=colour, linewidths=1.4, linestyles=dashes)
        data.plot(
            [],
            [],
            color=colour,
            ls=dashes,
            label="true density" if dashes == "dashed" else "the flow's",
        )
    data.set(xlim=extent[:2], ylim=extent[2:], aspect="equal")
    common.label(data, "where it is 2%, 20% and 60% of the highest", "x", "y")
    data.legend(
        frameon=False,
        fontsize=9,
        labelcolor=common.INK,
        loc="upper right",
        ncols=3,
        columnspacing=1,
    )
    course.plot(found.course, color=common.SKY, lw=1.2, label="flow, on each training batch")
    for value, dashes, name in (
        (found.best, "--", "true density"),
        (found.normal, ":", "one normal distribution"),
    ):
        course.axhline(value, color=common.INK, lw=1.3, ls=dashes, label=f"{name}, on unseen data")
    course.set_xlim(0, len(found.course))
    course.set_ylim(bottom=found.normal - 0.5)
    common.label(course, "what it learns", "step", "log-likelihood (nats a point)")
    course.legend(frameon=False, fontsize=9, labelcolor=common.INK, loc="lower right")
    return figure


def main(argv: list[str] | None = None) -> Found:
    return common.main("flow", __doc__, run, tell, draw, argv)


if __name__ == "__main__":
    main()
