"""Draws structure.png: the Jacobians of each step of two small networks, and their products.

``python docs/pictures/structure.py``, run by hand. Every matrix is what ``jactri.jacobian`` returns, and
``jactri.sparsity`` says which of its entries can be other than zero.
"""

import tempfile
from pathlib import Path

import torch
from gallery import shrink
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor, nn

import jactri
from jactri.demo.pictures import save
from jactri.examples import common

SIDE = 8  # of the image, in pixels
SAMPLES, WIDTH = 8, 8
COLOURS = LinearSegmentedColormap.from_list("signs", [common.ORANGE, "#e9ecf0", common.BLUE])


def matrices(net: nn.Sequential, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The Jacobian of every layer and of the whole, each (m, n), and where it can be other than zero."""
    found = []
    for func, at in ((net[0], x), (net[1], net[0](x)), (net[2], net[:2](x)), (net, x)):
        shape = (net(x).numel(), x.numel())  # of all: no layer here changes it
        J = jactri.jacobian(func, at.detach()).reshape(shape).detach()
        found.append((J, jactri.sparsity(func, at.detach()).to_dense().reshape(shape)))
    return found


def draw_row(figure, bottom: float, title: str, factors, texts) -> None:
    """Last layer first, as the chain rule multiplies them, and the product."""
    wide, high = figure.get_size_inches()
    size, left = 2.42, 0.37  # inches
    gap = (wide - 2 * left - 4 * size) / 3
    text = {"color": common.INK, "va": "center"}
    figure.text(
        left / wide, (bottom + size + 0.55) / high, title, fontsize=13, weight="bold", **text
    )
    *layers, product = factors
    shown = zip([*reversed(layers), product], texts, strict=True)
    for k, ((J, mask), (name, held)) in enumerate(shown):
        at = left + k * (size + gap)
        axes = figure.add_axes((at / wide, bottom / high, size / wide, size / high))
        limit = J.abs().max().item()
        values = J.masked_fill(~mask, torch.nan).numpy()
        axes.imshow(values, cmap=COLOURS, vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color("#b6bcc6")
        axes.set_title(name, fontsize=12.5, color=common.INK, pad=6)
        axes.set_xlabel(held, fontsize=12, color=common.MUTED, labelpad=7)
        if k < 3:
            x, y = (at + size + gap / 2) / wide, (bottom + size / 2) / high
            figure.text(x, y, "=" if k == 2 else "×", fontsize=20, ha="center", **text)


def main() -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 1, SIDE, SIDE)
    conv = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1))
    batch = torch.randn(SAMPLES, WIDTH)
    dense = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    windows, samples = matrices(conv, image), matrices(dense, batch)

    def computed(factors) -> str:
        return f"{int(factors[-1][1].sum()):,} of {factors[-1][1].numel():,} computed"

    figure = common.figure(
        "Every step of a network has a structure, and so has their product",
        "Jacobians of two small networks, entry by entry: blue is positive, orange negative, and what is white is zero "
        "by structure.",
        (12.3, 8.35),
    )
    draw_row(
        figure, 4.2, f"one image of {SIDE} x {SIDE} pixels through Conv2d, ReLU, Conv2d", windows,
        [
            ("second Conv2d", "a window: 9 numbers"),
            ("ReLU", f"a diagonal: {SIDE**2} numbers"),
            ("first Conv2d", "a window: 9 numbers"),
            ("Jacobian: a wider window", computed(windows)),
        ],
    )  # fmt: skip
    draw_row(
        figure, 0.5, f"a batch of {SAMPLES} samples through Linear, Tanh, Linear", samples,
        [
            ("second Linear", f"one matrix for all: {WIDTH**2} numbers"),
            ("Tanh", f"a diagonal: {SAMPLES * WIDTH} numbers"),
            ("first Linear", f"one matrix for all: {WIDTH**2} numbers"),
            ("Jacobian: a block a sample", computed(samples)),
        ],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        shrink(save(figure, Path(folder) / "drawn.png"), "structure.png", width=1600)


if __name__ == "__main__":
    main()
