"""Poisson's equation by a network: -(u_xx + u_yy) = f on the unit square, u = 0 on its border.

A physics-informed network (Raissi, Perdikaris and Karniadakis 2019; the border is kept exactly, as by Lagaris et al.
1998, by a factor that vanishes there): the loss is the mean squared residual of the equation at random points, whose
Laplacian is ``jactri.laplacian(u, points, create_graph=True)``. f is chosen so that the solution is known, and the
network is compared with it on a grid; training never sees it.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import jactri
from jactri.examples import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAVES = ((1, 1, 1.0), (2, 3, 0.5), (4, 2, -0.3))  # of the solution: along x, along y, amplitude
POINTS = 1024
GRID = 101


class Solution(nn.Module):
    """u(x, y), (N, 2) to (N,): a network, times what vanishes on the border."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
        )

    def forward(self, points: Tensor) -> Tensor:
        x, y = points.unbind(1)
        return 16 * x * (1 - x) * y * (1 - y) * self.net(2 * points - 1).squeeze(1)


def exact(points: Tensor) -> Tensor:
    """The solution, (N, 2) to (N,)."""
    x, y = (torch.pi * points).unbind(1)
    return sum(a * torch.sin(k * x) * torch.sin(l * y) for k, l, a in WAVES)


def source(points: Tensor) -> Tensor:
    """f = -(u_xx + u_yy) of the solution, (N, 2) to (N,)."""
    x, y = (torch.pi * points).unbind(1)
    return sum(
        a * torch.pi**2 * (k**2 + l**2) * torch.sin(k * x) * torch.sin(l * y) for k, l, a in WAVES
    )


@dataclasses.dataclass(frozen=True)
class Found:
    predicted: Tensor  # (GRID, GRID), at y (rows) and x
    truth: Tensor
    steps: list[int]  # of training, before which the next two were taken
    residuals: list[float]  # of the equation on the grid, over f, root mean square
    errors: list[float]  # relative L2 error on the grid
    switch: int  # the step at which L-BFGS takes over from Adam
    apart: float  # jactri's Laplacian against nested autograd, relative
    milliseconds: dict[str, float]  # a Laplacian and the gradient of its square, by who computes it


def laplacian_by_autograd(func: nn.Module, points: Tensor) -> Tensor:
    """The same (N,) by torch.autograd.grad within torch.autograd.grad, an axis at a time."""
    points = points.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(func(points).sum(), points, create_graph=True)
    return sum(
        torch.autograd.grad(gradient[:, i].sum(), points, create_graph=True)[0][:, i]
        for i in range(points.shape[1])
    )


def timed(func: Solution, points: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of a Laplacian and of the gradient of its square, in turns."""
    ways = {
        "jactri.laplacian": lambda: jactri.laplacian(func, points, create_graph=True),
        "nested autograd.grad": lambda: laplacian_by_autograd(func, points),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            torch.autograd.grad(way().square().mean(), list(func.parameters()), allow_unused=True)
            spent[name].append(1e3 * (time.perf_counter() - begun))
    return {name: statistics.median(times) for name, times in spent.items()}


def run(quick: bool) -> Found:
    switch, rest = (100, 40) if quick else (500, 700)
    solution = Solution().double()
    axis = torch.linspace(0, 1, GRID, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x, y], 2).view(-1, 2)
    truth = exact(grid)
    steps, residuals, errors = [], [], []

    def residual(points: Tensor, create_graph: bool) -> Tensor:
        return jactri.laplacian(solution, points, create_graph=create_graph) + source(points)

    def note(step: int) -> None:
        with torch.no_grad():
            error = solution(grid) - truth
        steps.append(step)
        residuals.append((residual(grid, False).norm() / source(grid).norm()).item())
        errors.append((error.norm() / truth.norm()).item())

    adam = torch.optim.Adam(solution.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, 0.1 ** (1 / switch))
    for step in range(switch):
        if step % 10 == 0:
            note(step)
        loss = residual(torch.rand(POINTS // 2, 2, dtype=torch.float64), True).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()

    points = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(POINTS).double()
    newton = torch.optim.LBFGS(
        solution.parameters(), max_iter=1, max_eval=25, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=0, tolerance_change=0,
    )  # fmt: skip

    def closure() -> Tensor:
        newton.zero_grad()
        loss = residual(points, True).square().mean()
        loss.backward()
        return loss

    for step in range(switch, switch + rest):
        if step % 10 == 0:
            note(step)
        newton.step(closure)
    note(switch + rest)

    theirs = laplacian_by_autograd(solution, points)
    apart = ((jactri.laplacian(solution, points) - theirs).norm() / theirs.norm()).item()
    with torch.no_grad():
        predicted = solution(grid)
    return Found(
        predicted.view(GRID, GRID), truth.view(GRID, GRID), steps, residuals, errors, switch, apart,
        timed(solution, points, 5 if quick else 20),
    )  # fmt: skip


def tell(found: Found) -> Iterator[str]:
    difference = (found.predicted - found.truth).abs().max() / found.truth.abs().max()
    adam = found.steps.index(found.switch)
    rows: list[tuple[str, float, float]] = [
        ("before training", found.residuals[0], found.errors[0]),
        ("after Adam", found.residuals[adam], found.errors[adam]),
        ("after L-BFGS", found.residuals[-1], found.errors[-1]),
    ]
    yield from common.table(
        ["relative, root mean square", "equation's residual", "error of u (L2)"],
        [[name, f"{r:.1e}", f"{e:.1e}"] for name, r, e in rows],
    )
    yield f"largest error of u: {difference:.1e} of its largest value\n"
    yield from common.table(
        [f"Laplacian at {POINTS} points and a gradient through it", "ms"],
        [[name, value] for name, value in found.milliseconds.items()],
    )
    yield f"the two Laplacians: within {found.apart:.0e}"


def draw(found: Found) -> Figure:
    figure = common.figure(
        "Poisson's equation, solved by a network",
        "-(u_xx + u_yy) = f on the unit square, u = 0 on its border. The network is trained on the equation's residual "
        "alone and never sees the solution.\n"
        f"In the end it is {found.errors[-1]:.1e} away from it (relative L2 error on {GRID} x {GRID} points).",
        (15, 5.4),
    )
    solved, wrong, course = common.panels(
        figure, 1, 3, left=0.045, right=0.985, bottom=0.11, top=0.75, wspace=0.36, width_ratios=[1, 1, 1.05]
    )  # fmt: skip
    limit = found.truth.abs().max().item()
    error = found.predicted - found.truth
    off = error.abs().max().item()
    x = torch.linspace(0, 1, GRID).numpy()
    for axes, values, most, colours, title, name in (
        (solved, found.predicted, limit, "PuOr_r", "the network's u; lines: the exact one", "u"),
        (wrong, error, off, "RdBu_r", "its error", "network minus exact"),
    ):
        shown = axes.imshow(
            values.numpy(), extent=(0, 1, 0, 1), origin="lower", cmap=colours, vmin=-most, vmax=most,
            interpolation="bicubic",
        )  # fmt: skip
        common.label(axes, title, "x", "y")
        bar = common.colour_bar(figure, shown, axes, name)
        bar.formatter.set_powerlimits((-2, 2))
    solved.contour(x, x, found.truth.numpy(), levels=11, colors=common.INK, linewidths=0.7)
    course.plot(
        found.steps,
        found.residuals,
        color=common.SKY,
        lw=1,
        label="residual of the equation, over f",
    )
    course.plot(found.steps, found.errors, color=common.RED, lw=1.8, label="error of u (L2)")
    course.axvline(found.switch, color=common.MUTED, lw=1, ls=":")
    course.set_yscale("log")
    course.set_xlim(0, found.steps[-1])
    at = course.get_xaxis_transform()
    course.text(
        found.switch, 0.02, "Adam ", ha="right", fontsize=9, color=common.MUTED, transform=at
    )
    course.text(found.switch, 0.02, " L-BFGS", fontsize=9, color=common.MUTED, transform=at)
    common.label(course, "what training does to both", "step", "relative, root mean square")
    course.legend(
        edgecolor="none", framealpha=1, fontsize=9, labelcolor=common.INK, loc="upper right"
    )
    return figure


def main(argv: list[str] | None = None) -> Found:
    return common.main("poisson", __doc__, run, tell, draw, argv)


if __name__ == "__main__":
    main()
