"""Geodesics of a VAE: the shortest paths between digits, measured in pixels and not in codes.

Arvanitidis, Hansen and Hauberg 2018, "Latent space oddity": the decoder draws mean(z) + std(z) * noise, so a step dz
of the code changes the image by dz' M dz in expectation, with M the sum of J'J of the mean and of the standard
deviation (their eq. 8). That is ``jactri.jtj`` of the two stacked. The standard deviation comes from a network of
radial bases (their eq. 11), which is large where no digit was encoded: paths through the unknown are long. A geodesic
minimises the curve's energy (their eq. 4) over sine series between its ends, by gradients through ``jtj``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jactri
from jactri.demo.digits import load
from jactri.examples import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOISE = 0.15  # standard deviation of a pixel, while the mean is trained
BASES = 64
FLOOR = 1.0  # the least precision of a pixel: where nothing is known, its standard deviation is 1
PAIRS = 24
SEGMENTS = 48  # of a curve, while it is optimised; lengths are measured with 8 times as many
WAVES = 12
SHOWN = 3


class VAE(nn.Module):
    """64 pixels to a normal distribution over the plane, and a point of the plane to 64 means."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 4)
        )
        self.decoder = nn.Sequential(
            nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Sigmoid(),
        )  # fmt: skip

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log variances, (N, 2) each."""
        return self.encoder(images).chunk(2, 1)


class Spread(nn.Module):
    """The standard deviation of every pixel, (N, 2) to (N, 64): small near codes of digits, large elsewhere."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        from sklearn.cluster import KMeans

        found = KMeans(BASES, n_init=1, random_state=0).fit(codes.numpy())
        self.centres = torch.from_numpy(found.cluster_centers_).to(codes)
        distances = torch.cdist(codes, self.centres)
        near = F.one_hot(distances.argmin(1), BASES).to(codes)
        radius = (near * distances).sum(0) / near.sum(0)
        self.widths = 0.5 / (1.5 * radius.clamp_min(0.5 * radius.mean())).square()
        self.weights = nn.Parameter(torch.full((64, BASES), 3.0))

    def forward(self, code: Tensor) -> Tensor:
        squares = (code.unsqueeze(1) - self.centres).square().sum(2)
        bases = torch.exp(-self.widths * squares)
        return torch.rsqrt(F.linear(bases, F.softplus(self.weights)) + FLOOR)


class Drawer(nn.Module):
    """The stochastic decoder: codes (N, 2) to means and standard deviations side by side, (N, 128)."""

    def __init__(self, mean: nn.Module, spread: nn.Module) -> None:
        super().__init__()
        self.mean, self.spread = mean, spread

    def forward(self, code: Tensor) -> Tensor:
        return torch.cat([self.mean(code), self.spread(code)], 1)


def train(images: Tensor, epochs: int) -> tuple[VAE, Drawer]:
    """First the VAE with one fixed standard deviation, then the standard deviations of its pixels."""
    vae = VAE()
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(128):
            mean, log_variance = vae.encode(images[batch])
            code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            misfit = (vae.decoder(code) - images[batch]).square().sum(1) / (2 * NOISE**2)
            divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
            loss = (misfit + divergence).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    vae.requires_grad_(False)

    mean, log_variance = vae.encode(images)
    spread = Spread(mean)
    optimizer = torch.optim.Adam(spread.parameters(), lr=0.1)
    for _ in range(10 * epochs // 3):
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        std = spread(code)
        loss = (0.5 * ((vae.decoder(code) - images) / std).square() + std.log()).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vae, Drawer(vae.decoder, spread).requires_grad_(False)


def metric(drawer: Drawer, codes: Tensor, create_graph: bool = False) -> Tensor:
    """M of the codes (..., 2): (..., 2, 2)."""
    M = jactri.jtj(drawer, codes.reshape(-1, 2), create_graph=create_graph, per_sample=True)
    return M.view(*codes.shape, 2)


def curve(ends: Tensor, waves: Tensor, count: int) -> Tensor:
    """Points (P, count + 1, 2) of a line between the ends (P, 2, 2) plus a series of sines (P, WAVES, 2)."""
    t = torch.linspace(0, 1, count + 1).unsqueeze(1)
    sines = torch.sin(torch.pi * t * torch.arange(1, WAVES + 1)) / torch.arange(1, WAVES + 1)
    return torch.lerp(ends[:, :1], ends[:, 1:], t) + sines @ waves


def squared_steps(drawer: Drawer, points: Tensor, create_graph: bool = False) -> Tensor:
    """Every segment's squared length (P, T), by the metric at its middle."""
    steps, middles = points.diff(dim=1), (points[:, 1:] + points[:, :-1]) / 2
    M = metric(drawer, middles, create_graph)
    return torch.einsum("pti,ptij,ptj->pt", steps, M, steps)


def shorten(drawer: Drawer, ends: Tensor, steps: int) -> Tensor:
    """The sine series (P, WAVES, 2) of least energy."""
    waves = torch.zeros(len(ends), WAVES, 2, requires_grad=True)
    optimizer = torch.optim.Adam([waves], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        squares = squared_steps(drawer, curve(ends, waves, SEGMENTS), create_graph=True)
        # The logarithm: every pair counts alike, however far apart it is.
        loss = (SEGMENTS * squares.sum(1)).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return waves.detach()


@dataclasses.dataclass(frozen=True)
class Found:
    codes: Tensor  # (N, 2), of the test images
    labels: Tensor
    lines: Tensor  # (P, T, 2)
    geodesics: Tensor  # (P, T, 2)
    line_lengths: Tensor  # (P,)
    lengths: Tensor  # (P,)
    chords: Tensor  # (P,), the geodesics' lengths as polygons of drawn images, with no Jacobian
    drawer: Drawer


def run(quick: bool) -> Found:
    data = load(0)
    vae, drawer = train(data.train_images.flatten(1), 40 if quick else 150)
    codes = vae.encode(data.test_images.flatten(1))[0]
    ends = codes[torch.randperm(len(codes))[: 2 * PAIRS]].view(PAIRS, 2, 2)
    waves = shorten(drawer, ends, 40 if quick else 150)
    lines, geodesics = (curve(ends, w, 8 * SEGMENTS) for w in (torch.zeros_like(waves), waves))
    line_lengths, lengths = (squared_steps(drawer, c).sqrt().sum(1) for c in (lines, geodesics))
    drawn = drawer(geodesics.flatten(0, 1)).view(PAIRS, -1, 128)
    chords = drawn.diff(dim=1).norm(dim=2).sum(1)
    return Found(codes, data.test_labels, lines, geodesics, line_lengths, lengths, chords, drawer)


def tell(found: Found) -> Iterator[str]:
    ratio = found.lengths / found.line_lengths
    rows = [
        [f"length, {name}", getattr(found.line_lengths, name)().item(), getattr(found.lengths, name)().item()]
        for name in ("mean", "median", "max")
    ]  # fmt: skip
    yield from common.table([f"{PAIRS} random pairs of digits", "straight line", "geodesic"], rows)
    yield "lengths: 1 is one pixel going from white to black"
    yield f"geodesic over line: median {ratio.median():.2f}, least {ratio.min():.2f}, most {ratio.max():.2f}"
    apart = ((found.chords - found.lengths).abs() / found.lengths).max()
    yield f"length by the metric against that of the drawn images' polygon: within {apart:.1e}"


def most_gained(found: Found) -> list[int]:
    """The SHOWN pairs that a geodesic shortens most, leaving out those that begin or end beside a shown one."""
    picks: list[int] = []
    for pick in (found.lengths / found.line_lengths).argsort().tolist():
        ends = found.lines[[*picks, pick]][:, [0, -1]].flatten(0, 1)
        if torch.cdist(ends[:-2], ends[-2:]).gt(0.8).all():
            picks.append(pick)
        if len(picks) == SHOWN:
            break
    return picks


def draw(found: Found) -> Figure:
    from matplotlib.patheffects import withStroke

    figure = common.figure(
        "The shortest way from digit to digit",
        "Left: how much the decoder and its doubt change per step of the code, and where the test digits lie. "
        "A straight line crosses bright ridges, where the image changes fast or is not known;\n"
        f"the geodesic goes around. Of {PAIRS} random pairs, shown are {SHOWN} that gain most, with ends apart. "
        "Right: what is drawn on the way, at equal steps of the path's length.",
        (15, 8.2),
    )
    low, high = found.codes.min(0).values - 0.4, found.codes.max(0).values + 0.4
    side = 160
    x, y = (torch.linspace(a, b, side) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    plane = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2)
    volume = 0.5 * torch.linalg.slogdet(metric(found.drawer, plane)).logabsdet / math.log(10)
    heat = common.panels(figure, 1, 1, left=0.045, right=0.52, bottom=0.07)
    shown = heat.imshow(
        volume.numpy(), extent=(x[0].item(), x[-1].item(), y[0].item(), y[-1].item()), origin="lower", cmap="cividis",
        aspect="auto", interpolation="bilinear", vmin=volume.quantile(0.005).item(), vmax=volume.quantile(0.995).item(),
    )  # fmt: skip
    outline = [withStroke(linewidth=1.5, foreground=common.INK)]
    for digit in range(10):
        mine = found.codes[found.labels == digit].numpy()
        heat.scatter(*mine.T, marker=f"${digit}$", s=30, color="white", lw=0, path_effects=outline)
    common.colour_bar(
        figure,
        shown,
        heat,
        "log10 of the volume element sqrt(det M), pixels² per unit² of the code",
    )

    picks = most_gained(found)
    strips = figure.add_gridspec(
        2 * SHOWN, 11, left=0.575, right=0.985, bottom=0.05, top=0.8, wspace=0.06, hspace=0.32
    )
    for place, pick in enumerate(picks):
        ways = (
            ("line", found.lines, found.line_lengths, common.SKY, "--"),
            ("geodesic", found.geodesics, found.lengths, common.RED, "-"),
        )
        for row, (name, curves, lengths, colour, dashes) in enumerate(ways):
            points = curves[pick]
            heat.plot(
                *points.T.numpy(), dashes, color=colour, lw=2.4,
                path_effects=[withStroke(linewidth=4.4, foreground=common.INK)],
            )  # fmt: skip
            gone = squared_steps(found.drawer, points.unsqueeze(0))[0].sqrt().cumsum(0)
            at = torch.searchsorted(gone, torch.linspace(0, 1, 11) * gone[-1]).clamp_max(
                len(gone) - 1
            )
            for column, image in enumerate(found.drawer.mean(points[at]).view(-1, 8, 8)):
                axes = figure.add_subplot(strips[2 * place + row, column])
                axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
                for spine in axes.spines.values():
                    spine.set(color=colour, lw=1.5)
                if column == 0:
                    axes.set_title(
                        f"{'ABC'[place]}: {name}, {lengths[pick]:.2f} pixels long", fontsize=10, color=common.INK,
                        loc="left",
                    )  # fmt: skip
        heat.annotate(
            "ABC"[place], found.lines[pick, 0].tolist(), fontsize=13, fontweight="bold", color="white", ha="center",
            va="center", path_effects=[withStroke(linewidth=3.5, foreground=common.INK)],
        )  # fmt: skip
    common.label(heat, "", "code 1", "code 2")
    return figure


def main(argv: list[str] | None = None) -> Found:
    return common.main("geodesic", __doc__, run, tell, draw, argv, needs=("scikit-learn",))


if __name__ == "__main__":
    main()
