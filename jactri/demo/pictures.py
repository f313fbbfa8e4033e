"""The demo's four figures. Only matplotlib's object interface: no window, no global state."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator
from torch.nn import functional as F

from jactri.demo.measure import PACKAGES, Row

INK = "#22262e"
MUTED = "#6b7280"
ACCENT = "#0f6e84"
ALARM = "#c8402f"


def save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure).print_png(path)
    return path


def heading(figure: Figure, title: str, subtitle: str, *, top: float) -> None:
    figure.text(0.03, top, title, fontsize=16, fontweight="bold", color=INK, va="top")
    figure.text(
        0.03, top - 0.42 / figure.get_figheight(), subtitle, fontsize=10.5, color=MUTED, va="top"
    )


def plain(axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b6bcc6")
    axes.tick_params(colors=MUTED, labelsize=9, which="both")


def _percent(share: float) -> str:
    return "<1%" if share < 0.005 else ">99%" if share > 0.995 else f"{share:.0%}"


def saliency(
    path: Path,
    images: torch.Tensor,
    labels: torch.Tensor,
    scores: torch.Tensor,
    jacobian: torch.Tensor,
) -> Path:
    """One digit of each class, and what each pixel does to the score of the predicted class and of its rival."""
    probabilities = scores.softmax(1)
    top = scores.topk(2, dim=1).indices
    margin = scores.gather(1, top).diff(dim=1).neg().squeeze(1)
    # Of each class the correctly read digit that was closest to being read as something else: its rival is real.
    right = top[:, 0] == labels
    picks = []
    for digit in labels.unique().tolist():
        mine = ((labels == digit) & right).nonzero().squeeze(1)
        if len(mine):
            picks.append(mine[margin[mine].argmin()].item())

    columns = len(picks)
    figure = Figure(figsize=(1.25 * columns + 1.6, 5.5), dpi=150, facecolor="white")
    grid = figure.add_gridspec(
        3, columns + 1, left=0.105, right=0.95, bottom=0.04, top=0.79, wspace=0.12, hspace=0.24,
        width_ratios=[1] * columns + [0.14],
    )  # fmt: skip
    rows = ("the image", "raises the\npredicted class", "raises its\nrival")
    # One scale for the whole figure, so that maps may be compared with each other.
    maps = jacobian[torch.tensor(picks).unsqueeze(1), top[picks]].squeeze(2)
    limit = maps.abs().max().item()
    shown = None
    for column, pick in enumerate(picks):
        for row in range(3):
            axes = figure.add_subplot(grid[row, column])
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color("#d5d9e0")
            if column == 0:
                axes.set_ylabel(
                    rows[row],
                    rotation=0,
                    ha="right",
                    va="center",
                    fontsize=10,
                    color=INK,
                    labelpad=8,
                )
            if row == 0:
                axes.imshow(images[pick, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
                continue
            digit = top[pick, row - 1].item()
            shown = axes.imshow(
                maps[column, row - 1].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit
            )
            # The digit's outline, so that the eye can tell strokes from background.
            axes.contour(
                images[pick, 0].numpy(), levels=[0.5], colors=INK, linewidths=0.8, alpha=0.55
            )
            axes.set_title(
                f"{digit}: {_percent(probabilities[pick, digit].item())}",
                fontsize=10,
                color=INK,
                pad=3,
            )
    bar = figure.colorbar(shown, cax=figure.add_subplot(grid[1:, columns]))
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=2)
    bar.set_label("d score / d pixel", color=MUTED, fontsize=9)
    heading(
        figure,
        "Which pixels decide?",
        "Two rows of each digit's input Jacobian: ink on a red pixel raises the score of the class above the map, "
        "ink on a blue one lowers it.\nShown is the most doubtful correctly read digit of each class, "
        "with the probabilities that the classifier gave.",
        top=0.965,
    )
    return save(figure, path)


def spectrum(
    path: Path, labels: torch.Tensor, scores: torch.Tensor, jacobian: torch.Tensor
) -> Path:
    """The singular values of the classifier's Jacobian over the test set, and where it is easiest to fool."""
    values = torch.linalg.svdvals(jacobian.flatten(2).double()).numpy()
    wrong = (scores.argmax(1) != labels).numpy()
    margin = scores.topk(2, dim=1).values.diff(dim=1).neg().squeeze(1).numpy()
    figure = Figure(figsize=(12.5, 5.6), dpi=150, facecolor="white")
    left, right = figure.subplots(
        1, 2, gridspec_kw={"left": 0.07, "right": 0.97, "bottom": 0.12, "top": 0.77, "wspace": 0.2}
    )

    order = np.arange(1, values.shape[1] + 1)
    bands = ((0, 100, 0.12, "all test images"), (10, 90, 0.28, "10th to 90th percentile"))
    for low, high, alpha, label in bands:
        left.fill_between(
            order,
            *np.percentile(values, (low, high), axis=0),
            color=ACCENT,
            alpha=alpha,
            lw=0,
            label=label,
        )
    left.plot(
        order, np.median(values, axis=0), color=ACCENT, lw=2.2, marker="o", ms=5, label="median"
    )
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_locator(NullLocator())
    left.set_xticks(order)
    left.set_xlim(0.8, order[-1] + 0.2)
    left.set_xlabel("singular value, by size", color=INK)
    left.set_title(
        "how much a change of the image can move the scores", fontsize=11, color=INK, loc="left"
    )
    left.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower left")

    right.scatter(
        margin[~wrong],
        values[~wrong, 0],
        s=16,
        color=ACCENT,
        alpha=0.5,
        lw=0,
        label="read correctly",
    )
    right.scatter(
        margin[wrong],
        values[wrong, 0],
        s=46,
        color=ALARM,
        marker="X",
        lw=0.6,
        edgecolor="white",
        label="misread",
    )
    right.set_xlabel("margin: best score minus second best", color=INK)
    right.set_title("largest singular value against the margin", fontsize=11, color=INK, loc="left")
    right.set_xlim(left=0)
    right.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    for axes in (left, right):
        plain(axes)
        axes.grid(axis="y", color="#e7eaee", lw=0.8)
        axes.set_axisbelow(True)
    heading(
        figure,
        "How sensitive is the classifier?",
        f"Singular values of the {values.shape[1]} x {jacobian[0, 0].numel()} input Jacobian at each of "
        f"{len(values):,} test images. Upper left in the right panel is fragile: small margin, large response.",
        top=0.955,
    )
    return save(figure, path)


@dataclasses.dataclass(frozen=True)
class Plane:
    """The decoder over a square grid of codes: x and y (side,), metric (side, side, 2, 2), one image a code."""

    x: torch.Tensor
    y: torch.Tensor
    metric: torch.Tensor
    decoded: torch.Tensor


def metric(path: Path, plane: Plane, codes: torch.Tensor, labels: torch.Tensor) -> Path:
    """What the decoder draws over the plane of codes, and how much it stretches the plane there."""
    extent = (*plane.x[[0, -1]].tolist(), *plane.y[[0, -1]].tolist())
    figure = Figure(figsize=(14, 7.9), dpi=150, facecolor="white")
    grid = figure.add_gridspec(
        1, 3, left=0.03, right=0.945, bottom=0.05, top=0.83, wspace=0.06, width_ratios=[1, 1, 0.03]
    )
    drawn, heat, bar_axes = (figure.add_subplot(cell) for cell in grid)

    tiles = 13
    side = len(plane.x)
    at = ((torch.arange(tiles) + 0.5) * side / tiles).long()
    framed = F.pad(
        plane.decoded[at[:, None], at].flip(0), (1, 1, 1, 1)
    )  # a white frame parts the tiles
    mosaic = framed.permute(0, 2, 1, 3).reshape(tiles * 10, tiles * 10).numpy()
    drawn.imshow(mosaic, cmap="gray_r", vmin=0, vmax=1, extent=extent, aspect="auto")
    drawn.set_title("what the decoder draws at each code", fontsize=11, color=INK, loc="left")

    volume = 0.5 * torch.linalg.slogdet(plane.metric).logabsdet / np.log(10)
    low, high = volume.quantile(0.01).item(), volume.quantile(0.995).item()
    shown = heat.imshow(
        volume.numpy(),
        cmap="magma",
        vmin=low,
        vmax=high,
        extent=extent,
        origin="lower",
        aspect="auto",
        interpolation="bilinear",
    )
    heat.set_title(
        "how far a step in the plane moves the drawn image", fontsize=11, color=INK, loc="left"
    )
    bar = figure.colorbar(shown, cax=bar_axes, extend="both")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=9, length=2)
    bar.set_label("log10 of the volume element, sqrt(det JᵀJ)", color=MUTED, fontsize=9.5)

    _circles(heat, plane, at=at, room=0.9 * (extent[1] - extent[0]) / tiles)
    _embedded(heat, codes, labels)
    for axes in (drawn, heat):
        axes.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[])
        axes.set_xlabel("code 1", color=MUTED, fontsize=9.5)
        for spine in axes.spines.values():
            spine.set_color("#b6bcc6")
    drawn.set_ylabel("code 2", color=MUTED, fontsize=9.5)
    heat.legend(
        handles=[Line2D([], [], marker="o", ls="", mfc="none", mec="white", ms=9, label="equal steps of the image")],
        loc="lower right", fontsize=9, facecolor="#000000", framealpha=0.55, labelcolor="white", edgecolor="none",
    )  # fmt: skip
    heading(
        figure,
        "The shape of the latent plane",
        "The decoder's pullback metric JᵀJ at every code. Where it is bright, a small step redraws the digit; "
        "where it is dark, it hardly changes.\nDots are the codes of the test images. The steps to an ellipse's edge "
        "all change the drawing equally; the longest are cut short.",
        top=0.965,
    )
    return save(figure, path)


def _embedded(axes, codes: torch.Tensor, labels: torch.Tensor) -> None:
    """The codes as dots in the colour of their class, and each class's digit among its dots."""
    for digit in labels.unique().tolist():
        mine, colour = codes[labels == digit], colormaps["tab10"].colors[digit]
        axes.scatter(*mine.T.numpy(), s=15, color=colour, lw=0.4, edgecolor="white", zorder=3)
        # At the code nearest to the median: inside of the cloud even where that is bent or split.
        spot = mine[(mine - mine.median(0).values).norm(dim=1).argmin()].tolist()
        axes.text(
            *spot, str(digit), fontsize=15, fontweight="bold", color="white", ha="center", va="center",
            zorder=4, path_effects=[withStroke(linewidth=3.2, foreground=colour)],
        )  # fmt: skip


def _circles(axes, plane: Plane, at: torch.Tensor, room: float) -> None:
    """Tissot's ellipses {u : uᵀ G u = c} at the grid points ``at`` x ``at``; the largest fits in ``room``."""
    lengths, directions = torch.linalg.eigh(plane.metric[at[:, None], at].reshape(-1, 2, 2))
    axes_lengths = 2 * lengths.clamp_min(1e-12).rsqrt()
    scale = room / axes_lengths[:, 0].quantile(0.75)
    fits = axes_lengths.mul(scale)
    fits = fits * (room / fits[:, :1]).clamp_max(1)  # keeps the shape of the few that would overlap
    angle = torch.rad2deg(torch.atan2(directions[:, 1, 0], directions[:, 0, 0]))
    centres = torch.cartesian_prod(plane.y[at], plane.x[at]).flip(1)
    axes.add_collection(
        EllipseCollection(
            fits[:, 0].numpy(), fits[:, 1].numpy(), angle.numpy(), units="xy", offsets=centres.numpy(),
            offset_transform=axes.transData, facecolors="none", edgecolors="white", linewidths=0.8, alpha=0.7, zorder=2,
        )
    )  # fmt: skip


def comparison(path: Path, rows: list[Row]) -> Path:
    """Time and memory of every row of the table, for jactri and for torch's two packages."""
    figure = Figure(figsize=(14, 1.7 + 1.0 * len(rows)), dpi=150, facecolor="white")
    time, memory = figure.subplots(
        1,
        2,
        gridspec_kw={
            "left": 0.215, "right": 0.985, "bottom": 0.02, "top": 1 - 1.6 / figure.get_figheight(), "wspace": 0.05,
        },
    )  # fmt: skip
    for axes, title in ((time, "time"), (memory, "memory, at its peak")):
        axes.set(xlim=(0, 1.45), ylim=(len(rows) - 0.45, -0.5), xticks=[], yticks=[])
        axes.set_title(title, fontsize=11, color=INK, loc="left")
        for side in ("top", "right", "bottom"):
            axes.spines[side].set_visible(False)
        axes.spines["left"].set_color("#b6bcc6")
    for k, row in enumerate(rows):
        shape = " x ".join(map(str, row.shape))
        place = {"ha": "right", "va": "center", "transform": time.get_yaxis_transform()}
        time.text(-0.03, k - 0.12, row.name, fontsize=10.5, color=INK, **place)
        time.text(-0.03, k + 0.17, shape, fontsize=9, color=MUTED, **place)
        _bars(time, k, row.ms, _milliseconds, ("faster", "slower"))
        _bars(memory, k, row.mib, _mebibytes, ("less", "more"))
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in _COLOURS.items()],
        loc="upper right", bbox_to_anchor=(0.985, 1 - 0.1 / figure.get_figheight()), ncols=3, frameon=False,
        fontsize=9.5, labelcolor=INK,
    )  # fmt: skip
    heading(
        figure,
        "Per-sample Jacobians: time and memory against torch",
        "The fastest way of each package, on this machine; the longest bar of each group has the whole length.\n"
        "In colour: against the better of torch's two. Under each name: the Jacobian's shape.",
        top=1 - 0.2 / figure.get_figheight(),
    )
    return save(figure, path)


_COLOURS = dict(zip(PACKAGES, (ACCENT, "#9aa3af", "#ccd1d9"), strict=True))


def _bars(axes, at: int, values: dict[str, float], text, words: tuple[str, str]) -> None:
    """A group of bars, the longest of length 1; jactri's says how it compares with the better of the others."""
    most, (ours, *theirs) = max(values.values()), values.values()
    for k, (name, value) in enumerate(values.items()):
        y = at + 0.26 * (k - 1)
        axes.barh(y, value / most, height=0.22, color=_COLOURS[name])
        told = axes.annotate(
            text(value), (value / most, y), (5, 0), textcoords="offset points", va="center", fontsize=9,
            color=MUTED if k else INK, fontweight="normal" if k else "bold",
        )  # fmt: skip
        if not k:
            times = min(theirs) / ours
            compared = f"{max(times, 1 / times):.1f}x"
            axes.annotate(
                "the same" if compared == "1.0x" else f"{compared} {words[times < 1]}", (1, 0.5), (8, 0),
                xycoords=told, textcoords="offset points", va="center", fontsize=9,
                color=ALARM if compared != "1.0x" and times < 1 else ACCENT,
            )  # fmt: skip


def _milliseconds(value: float) -> str:
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.3g} ms"


def _mebibytes(value: float) -> str:
    return f"{value:.3g} MiB"
