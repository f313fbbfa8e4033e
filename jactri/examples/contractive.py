"""Contractive autoencoder: a code that ignores noise and follows the digit.

Rifai et al. 2011, "Contractive auto-encoders", eq. 5: the reconstruction error plus the squared Frobenius norm of the
encoder's Jacobian at every sample. For one sigmoid layer the norm has a closed form; for this encoder of three layers
it comes from ``jactri.jacobian(..., per_sample=True, create_graph=True)``. Both networks start from the same weights,
see the same batches, and decode with the encoder's weights transposed, so that no decoder can undo a shrunk code.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jactri
from jactri.demo.digits import Digits, load
from jactri.examples import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = (64, 128, 64, 24)
PENALTY = 0.01
NOISE = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)  # a pixel, of images in [0, 1]
TANGENTS = 3  # drawn of each digit
EMPTY = 0.1  # a pixel whose ink varies less than this over the images


class TiedAutoencoder(nn.Module):
    """64 pixels to 24 codes in (-1, 1) and back through the same weights."""

    def __init__(self) -> None:
        super().__init__()
        layers = []
        for inner, outer in itertools.pairwise(WIDTHS):
            layers += [nn.Linear(inner, outer), nn.Tanh()]
        self.encoder = nn.Sequential(*layers)
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(w)) for w in WIDTHS[-2::-1]])

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encoder(images))

    def decode(self, code: Tensor) -> Tensor:
        *inner, last = zip(reversed(self.encoder[::2]), self.shifts, strict=True)
        for layer, shift in inner:
            code = torch.tanh(F.linear(code, layer.weight.T, shift))
        return torch.sigmoid(F.linear(code, last[0].weight.T, last[1]))


@dataclasses.dataclass(frozen=True)
class Trained:
    """One autoencoder on the test images."""

    name: str
    error: float  # root mean square, a pixel
    decoded: Tensor  # (N, 64)
    spectrum: Tensor  # (N, 24), singular values of the encoder's Jacobian
    tangents: Tensor  # (N, 24, 64), its right singular vectors: the directions of pixels that the code follows
    moved: list[float]  # by noise: how far the codes move, in units of the distance between codes
    unused: float  # share of the leading tangents in pixels where ink is rare
    right: list[
        float
    ]  # by noise: share of the noisy images that the nearest clean training code labels right


@dataclasses.dataclass(frozen=True)
class Found:
    images: Tensor
    labels: Tensor
    plain: Trained
    contractive: Trained


def train(net: TiedAutoencoder, images: Tensor, penalty: float, epochs: int) -> None:
    """Least squares and ``penalty`` times the mean squared Frobenius norm of the encoder's Jacobian."""
    generator = torch.Generator().manual_seed(1)  # both networks see the same batches
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(128):
            x = images[batch]
            if penalty:
                code, J = jactri.jacobian(
                    net.encoder, x, create_graph=True, per_sample=True, return_output=True
                )
                contraction = J.square().sum((1, 2)).mean()
            else:
                code, contraction = net.encoder(x), 0.0
            loss = (net.decode(code) - x).square().sum(1).mean() + penalty * contraction
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    net.requires_grad_(False)


def look(name: str, net: TiedAutoencoder, data: Digits) -> Trained:
    """What a trained network does with the test images."""
    images, train_images = data.test_images.flatten(1), data.train_images.flatten(1)
    J = jactri.jacobian(net.encoder, images, per_sample=True)
    _, spectrum, tangents = torch.linalg.svd(J, full_matrices=False)
    known, codes = net.encoder(train_images), net.encoder(images)
    apart = torch.pdist(codes).mean()
    generator = torch.Generator().manual_seed(2)
    moved, right = [], []
    for sigma in NOISE:
        noisy = net.encoder(images + sigma * torch.randn(images.shape, generator=generator))
        nearest = torch.cdist(noisy, known).argmin(1)
        moved.append(((noisy - codes).norm(dim=1).mean() / apart).item())
        right.append((data.train_labels[nearest] == data.test_labels).float().mean().item())
    decoded = net(images)
    error = (decoded - images).square().mean().sqrt().item()
    empty = train_images.std(0) < EMPTY
    unused = tangents[:, 0, empty].square().sum(1).mean().item()
    return Trained(name, error, decoded, spectrum, tangents, moved, unused, right)


def run(quick: bool) -> Found:
    data = load(0)
    epochs = 15 if quick else 150
    nets = []
    for penalty in (0.0, PENALTY):
        torch.manual_seed(0)
        nets.append(TiedAutoencoder())
        train(nets[-1], data.train_images.flatten(1), penalty, epochs)
    plain, contractive = (
        look(name, net, data) for name, net in zip(("plain", "contractive"), nets, strict=True)
    )
    return Found(data.test_images.flatten(1), data.test_labels, plain, contractive)


def tell(found: Found) -> Iterator[str]:
    nets = (found.plain, found.contractive)
    rows = [
        ["RMS error a pixel", *(net.error for net in nets)],
        ["encoder's largest singular value, mean", *(net.spectrum[:, 0].mean().item() for net in nets)],
        ["its squared Frobenius norm, mean", *(net.spectrum.square().sum(1).mean().item() for net in nets)],
    ]  # fmt: skip
    rows.append(
        ["leading tangent in pixels where ink is rare", *(f"{net.unused:.1%}" for net in nets)]
    )
    for k in (2, 4, 6, 8):
        rows.append(
            [f"code moved by noise of {NOISE[k]}", *(f"{net.moved[k]:.1%}" for net in nets)]
        )
    for k in (0, 2, 4, 6, 8):
        rows.append(
            [f"label right under noise of {NOISE[k]}", *(f"{net.right[k]:.1%}" for net in nets)]
        )
    yield from common.table([f"{len(found.images)} test digits", *(net.name for net in nets)], rows)


def draw(found: Found) -> Figure:
    picks = [(found.labels == digit).nonzero()[0].item() for digit in range(10)]
    figure = common.figure(
        "A code that ignores noise",
        "Two autoencoders, alike but for a penalty on the encoder's Jacobian J. Tangents are J's leading right "
        "singular vectors: the changes of the image that the code follows most.\n"
        f"Without the penalty, {found.plain.unused:.0%} of the first lies in pixels where ink is rare; "
        f"with it, {found.contractive.unused:.0%} does.",
        (15, 8.2),
    )
    grid = figure.add_gridspec(
        1, 2, width_ratios=[1.55, 1], left=0.1, right=0.98, bottom=0.07, top=0.83, wspace=0.17
    )
    plain, contractive = found.plain, found.contractive
    rows = [
        ("test image", found.images),
        *((f"{n.name}\ndecoded", n.decoded) for n in (plain, contractive)),
    ]
    for net, count in ((plain, 2), (contractive, TANGENTS)):
        rows += [(f"{net.name}\ntangent {k + 1}", net.tangents[:, k]) for k in range(count)]
    tiles = grid[0].subgridspec(len(rows), 10, wspace=0.08, hspace=0.08)
    for r, (name, values) in enumerate(rows):
        for column, pick in enumerate(picks):
            axes = figure.add_subplot(tiles[r, column])
            image, limit = values[pick].view(8, 8).numpy(), values[pick].abs().max().item()
            if r < 3:
                axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            else:
                axes.imshow(image, cmap="PuOr", vmin=-limit, vmax=limit)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_color("#d5d9e0")
            if column == 0:
                axes.set_ylabel(
                    name, rotation=0, ha="right", va="center", fontsize=9.5, color=common.INK
                )

    spectrum, moved, right = common.panels(figure, 3, 1, left=0.69, right=0.98, hspace=0.62)
    for net, colour, mark in ((plain, common.ORANGE, "s"), (contractive, common.BLUE, "o")):
        style = {"color": colour, "marker": mark, "ms": 4, "lw": 1.8, "label": net.name}
        order = range(1, WIDTHS[-1] + 1)
        low, median, high = net.spectrum.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0)
        spectrum.fill_between(order, low, high, color=colour, alpha=0.2, lw=0)
        spectrum.plot(order, median, **style)
        moved.plot(NOISE, [100 * m for m in net.moved], **style)
        right.plot(NOISE, [100 * m for m in net.right], **style)
    spectrum.set_yscale("log")
    common.label(
        spectrum,
        "what the encoder lets through",
        "rank by size",
        "singular value of J\n(median, 10-90%)",
    )
    common.label(
        moved,
        "how far noise moves the code",
        "noise a pixel (standard deviation)",
        "% of distance\nbetween codes",
    )
    common.label(
        right,
        "is the nearest training code's label right?",
        "noise a pixel (standard deviation)",
        "% of test digits",
    )
    spectrum.legend(frameon=False, fontsize=9, labelcolor=common.INK)
    return figure


def main(argv: list[str] | None = None) -> Found:
    return common.main("contractive", __doc__, run, tell, draw, argv, needs=("scikit-learn",))


if __name__ == "__main__":
    main()
