"""The demo from start to end: train, compute, check, time, draw."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import torch

import jactri
from jactri.demo.measure import DemoFailure, Row, Workload, measure

__all__ = ["DemoFailure", "MissingExtra", "run"]

CHECKED = 24  # samples of each workload that are held against float64 autograd
QUICK_IMAGES = 120  # of the test images, under --quick


class MissingExtra(ImportError):
    """The demo needs packages that are not installed; the message says how to get them."""


def _require_extra() -> None:
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}
    missing = [
        package for module, package in packages.items() if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise MissingExtra(
            f"the demo needs {', '.join(missing)} (the extra 'demo'): run pip install {' '.join(missing)}, "
            "or pip install -e '.[demo]' in a checkout"
        )


def run(out: Path, *, seed: int = 0, quick: bool = False) -> list[Row]:
    """Run the main job, print its table and write its pictures into ``out``.

    Args:
        out: the folder for ``saliency.png``, ``spectrum.png``, ``metric.png`` and ``comparison.png``; made if missing.
        seed: decides the split, the initial weights and the noise.
        quick: train for less long, take fewer images and time fewer rounds; timings then mean
            little.

    Returns:
        The lines of the table.

    Raises:
        MissingExtra: scikit-learn, matplotlib or rich is not installed.
        DemoFailure: a Jacobian is wrong.
        OSError: ``out`` cannot be written to.
    """
    _require_extra()
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from jactri.demo import digits, pictures

    out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    console = Console()
    if not console.is_terminal:
        console = Console(width=128)  # a log file has no width; the table needs this much
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        data = digits.load(seed)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
        )
        # No refresh thread: it would take its time from what is measured.
        with Progress(
            *columns, TimeElapsedColumn(), console=console, transient=True, auto_refresh=False
        ) as progress:

            def ticker(description: str, total: int):
                task = progress.add_task(description, total=total)

                def tick() -> None:
                    progress.advance(task)
                    progress.refresh()

                return tick

            epochs = (2, 8, 30) if quick else (12, 20, 200)
            denoiser, classifier, autoencoder = (
                train(data, count, ticker(f"train the {name}", count))
                for name, train, count in zip(
                    ("denoiser", "classifier", "autoencoder"),
                    (digits.train_denoiser, digits.train_classifier, digits.train_autoencoder),
                    epochs,
                    strict=True,
                )
            )
            trained = time.perf_counter() - begun

            used = QUICK_IMAGES if quick else len(data.test_labels)
            images, labels = data.test_images[:used], data.test_labels[:used]
            clean = digits.pages(data.test_images, 2 if quick else 3)
            noisy = clean + digits.NOISE * torch.randn_like(clean)
            with torch.no_grad():
                left = (denoiser(noisy) - clean).square().mean().sqrt().item()
                scores = classifier(images)
                codes = autoencoder.encoder(images)
                error = (autoencoder(images) - images.flatten(1)).square().mean().sqrt().item()
            x, y, plane_codes = _grid(codes, side=40 if quick else 100)
            works = (
                Workload("denoiser: page to page", denoiser, noisy[:1]),
                Workload("autoencoder: image to image", autoencoder, images),
                Workload("decoder: code to image", autoencoder.decoder, codes),
                Workload("decoder: over the latent plane", autoencoder.decoder, plane_codes),
                Workload("classifier: image to scores", classifier, images),
            )
            rounds, budget = ((2, 2), 0.0) if quick else ((3, 40), 3.0)
            rows, jacobians = [], []
            for work in works:
                picks = torch.randperm(len(work.inputs))[:CHECKED]
                tick = ticker(f"time {work.name}", rounds[1])
                row, jacobian = measure(work, picks, budget, rounds, tick)
                rows.append(row)
                jacobians.append(jacobian)

    _, _, of_codes, of_plane, of_images = jacobians
    with torch.no_grad():
        side = len(x)
        plane = pictures.Plane(
            x,
            y,
            _metric(of_plane).unflatten(0, (side, side)),
            autoencoder.decoder(plane_codes).view(side, side, 8, 8),
        )
    written = [
        pictures.saliency(out / "saliency.png", images, labels, scores, of_images),
        pictures.spectrum(out / "spectrum.png", labels, scores, of_images),
        pictures.metric(out / "metric.png", plane, codes, labels),
        pictures.comparison(out / "comparison.png", rows),
    ]

    right = digits.accuracy(classifier, data.test_images, data.test_labels)
    metric = _metric(of_codes.double())
    volume = torch.linalg.det(metric).sqrt()
    console.print(
        f"[bold]jactri {jactri.__version__}[/] on torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, seed {seed}; trained in {trained:.1f} s\n"
        f"denoiser: {digits.NOISE} RMS noise a pixel made {left:.2f}\n"
        f"classifier: {right:.1%} of {len(data.test_labels)} test images right\n"
        f"autoencoder: {digits.LATENT} codes an image, {error:.3f} RMS error a pixel\n"
        f"pullback metric JᵀJ {tuple(metric.shape)}: volume element {volume.min():.2g} to "
        f"{volume.max():.2g}, median {volume.median():.2g}",
        highlight=False,
    )
    _print_table(console, rows, rounds, quick)
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    console.print(f"done in {time.perf_counter() - begun:.1f} s", highlight=False)
    return rows


def _metric(jacobian: torch.Tensor) -> torch.Tensor:
    """JᵀJ for each sample of (N, out, in)."""
    return jacobian.mT @ jacobian


def _grid(codes: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A square grid over nearly all codes: x and y (side,), and its points by rows (side**2, 2)."""
    # Quantiles: a lone far code would shrink all others.
    low, high = codes.quantile(torch.tensor([0.01, 0.99]), dim=0)
    margin = 0.1 * (high - low)
    x, y = (torch.linspace(a, b, side) for a, b in zip(low - margin, high + margin, strict=True))
    return x, y, torch.cartesian_prod(y, x).flip(1).contiguous()


def _print_table(console, rows: list[Row], rounds: tuple[int, int], quick: bool) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title="\nper-sample Jacobians", title_justify="left"
    )
    table.add_column("workload")
    for heading in (
        "shape of J", "jactri\nms", "autograd.\nfunctional\nms", "torch.\nfunc\nms", "speed-up\non the\nbetter",
        "max\nerror", "peak MiB\njactri /\nbetter",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            str(row.shape),
            *(f"{ms:.2f}" for ms in row.ms.values()),
            f"[bold]{row.speedup:.1f}x[/]",
            f"{row.error:.0e}",
            f"{row.mib['jactri']:.1f} / {row.mib[row.peer]:.1f}",
        )
    console.print(table)
    turns = f"{rounds[0]}" if rounds[0] == rounds[1] else f"{rounds[0]} to {rounds[1]}"
    console.print(
        f"ms: medians of {turns} interleaved calls, each way warmed up and its result checked first\n"
        "autograd.functional: the better of loop and vectorize, on the batch sum\n"
        "torch.func: the better of vmap(jacrev) and vmap(jacfwd)\n"
        f"max error: of {CHECKED} samples against float64 autograd, relative to the largest entry\n"
        "peak: most memory that torch's CPU allocator held at once, above its start (torch.profiler)"
        + ("\n--quick: too few calls for timings to quote" if quick else ""),
        highlight=False,
        style="dim",
    )
