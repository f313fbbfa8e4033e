"""What the examples share: their options, how they print and how they draw."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

import jactri
from jactri.demo.digits import one_thread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind eyes tell apart, and two greys for text.
BLUE, ORANGE, GREEN, RED, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9"
INK, MUTED = "#22262e", "#6b7280"

IMPORTED = {"scikit-learn": "sklearn"}  # names of packages that are not those of their modules

Found = TypeVar("Found")


def main(
    name: str,
    text: str,
    run: Callable[[bool], Found],
    tell: Callable[[Found], Iterable[str]],
    draw: Callable[[Found], Figure],
    argv: list[str] | None,
    needs: tuple[str, ...] = (),
    extra: str = "demo",
) -> Found:
    """Runs one example from its command line: computes, prints what it found, saves ``NAME.png``.

    Args:
        name, text: the module's name and docstring.
        run: computes everything; its argument is whether to be quick.
        tell: the lines to print of what ``run`` found.
        draw: the picture of it.
        argv: the words of the command line; those of the process if None.
        needs: packages that ``run`` imports beside torch, by the name to install.
        extra: which brings them.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m jactri.examples.{name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    folder = Path("jactri-examples")
    parser.add_argument(
        "--output", type=Path, default=folder, metavar="FOLDER", help=f"default: {folder}"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, with worse figures")
    parser.add_argument("--no-plot", action="store_true", help="print only")
    options = parser.parse_args(argv)
    wanted = needs if options.no_plot else ("matplotlib", *needs)
    modules = {w: IMPORTED.get(w, w.replace("-", "_")) for w in wanted}
    if missing := [w for w in wanted if importlib.util.find_spec(modules[w]) is None]:
        parser.error(
            f"{', '.join(missing)} is missing (the extra {extra!r}): run pip install {' '.join(missing)}"
        )
    if not options.no_plot:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--output {options.output}: {error.strerror}")

    begun = time.perf_counter()
    with reproducible():
        found = run(options.quick)
    print(f"{text.splitlines()[0]}\njactri {jactri.__version__}, torch {torch.__version__}\n")
    for line in tell(found):
        print(line)
    if options.quick:
        print("--quick: a short run; its figures are not the best that this can do")
    if not options.no_plot:
        from jactri.demo.pictures import save

        print(f"wrote {save(draw(found), options.output / f'{name}.png')}")
    print(f"done in {time.perf_counter() - begun:.1f} s")
    return found


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """A fixed seed, and one thread, so that sums keep their order."""
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def table(headings: list[str], rows: Iterable[Iterable[str | float]]) -> Iterator[str]:
    """Lines of a table with aligned columns: the first to the left, the others to the right."""
    cells = [headings] + [
        [value if isinstance(value, str) else f"{value:.3g}" for value in row] for row in rows
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    for row in cells:
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *rest])
    yield ""


def figure(title: str, subtitle: str, size: tuple[float, float]) -> Figure:
    """An empty figure with its heading; matplotlib's Agg canvas draws it, without a window."""
    from matplotlib.figure import Figure

    from jactri.demo.pictures import heading

    made = Figure(figsize=size, dpi=130, facecolor="white")
    heading(made, title, subtitle, top=1 - 0.2 / size[1])
    return made


def panels(figure: Figure, rows: int, columns: int, *, sharex: bool = False, **place):
    """Panels in a part of the figure: ``left``, ``right``, ``bottom``, ``top``, as shares of it, and their spacing."""
    return figure.subplots(
        rows, columns, sharex=sharex, gridspec_kw={"bottom": 0.07, "top": 0.82, **place}
    )


def label(axes, title: str = "", x: str = "", y: str = "") -> None:
    """Titles a panel and names its axes, in the demo's plain style."""
    from jactri.demo.pictures import plain

    plain(axes)
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=9.5, color=MUTED)
    axes.set_ylabel(y, fontsize=9.5, color=MUTED)


def mosaic(axes, images: Tensor, columns: int, gap: float = 0.0) -> None:
    """Images (N, 64) of 8x8 pixels, 0 white and 1 black, side by side, row by row of ``columns``."""
    framed = F.pad(images.view(-1, columns, 8, 8), (1, 1, 1, 1), value=gap)
    whole = framed.transpose(1, 2).reshape(-1, 10 * columns)
    axes.imshow(whole.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color("#d5d9e0")


def colour_bar(figure: Figure, shown, axes, text: str, **options):
    """The scale of a map, beside ``axes``."""
    bar = figure.colorbar(shown, ax=axes, **{"fraction": 0.046, "pad": 0.03, **options})
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=2)
    bar.set_label(text, fontsize=9, color=MUTED)
    return bar
