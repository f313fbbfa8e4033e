"""Bundle adjustment: where cameras stood and points lie, from blurred sightings, by sparse least squares.

The camera is Snavely's, with two radial distortions, as in the problems of Agarwal, Snavely, Seitz and Szeliski,
"Bundle Adjustment in the Large" (2010): a rotation, a translation, a focal length. A residual knows one camera and one
point, so nearly all entries of the Jacobian are zero. ``jactri.normal_equations`` gives J'J by blocks of cameras and
points, and J'r, from one run of the residuals; the steps of Levenberg and Marquardt (damped by Nielsen's rule, 1999)
eliminate the points by the Schur complement and factorise what is left: by CHOLMOD where scikit-sparse is installed,
else by SuperLU.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import jactri
from jactri.examples import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOISE = 0.5  # pixels, standard deviation of a sighting along each axis
SEEN = 6  # cameras that see a point: those that it faces most
DISTANCE = 9.0  # of the cameras from the middle; the knot is 6 wide
FIRST = {"points": 0.4, "rotations": 0.03, "translations": 0.3, "focal": 60.0}
"""Standard deviations of what the first guess gets wrong; of distortions it knows nothing."""


# -- the problem ----------------------------------------------------------------------------------


def project(cameras: Tensor, points: Tensor) -> Tensor:
    """Where cameras (..., 9) see points (..., 3): (..., 2) in pixels. They look along their own -z."""
    turn, shift = cameras[..., :3], cameras[..., 3:6]
    focal, first, second = cameras[..., 6:7], cameras[..., 7:8], cameras[..., 8:9]
    angle = turn.square().sum(-1, keepdim=True).sqrt()
    axis = turn / angle
    across = torch.linalg.cross(axis, points)
    along = axis * (axis * points).sum(-1, keepdim=True)
    at = points * angle.cos() + across * angle.sin() + along * (1 - angle.cos()) + shift
    p = -at[..., :2] / at[..., 2:]
    r2 = p.square().sum(-1, keepdim=True)
    return focal * (1 + r2 * (first + r2 * second)) * p


def knot(count: int) -> tuple[Tensor, Tensor]:
    """Points on a tube around a trefoil knot, and their normals, both (count, 3)."""
    t = 2 * torch.pi * torch.rand(count, dtype=torch.float64)
    turned = 2 * torch.pi * torch.rand(count, dtype=torch.float64)
    middle = torch.stack(
        [t.sin() + 2 * (2 * t).sin(), t.cos() - 2 * (2 * t).cos(), -(3 * t).sin()], 1
    )
    ahead = torch.stack(
        [t.cos() + 4 * (2 * t).cos(), -t.sin() + 4 * (2 * t).sin(), -3 * (3 * t).cos()], 1
    )
    up = torch.linalg.cross(
        ahead, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(count, 3)
    )
    up = up / up.norm(dim=1, keepdim=True)
    side = torch.linalg.cross(ahead, up)
    side = side / side.norm(dim=1, keepdim=True)
    normal = turned.cos()[:, None] * up + turned.sin()[:, None] * side
    return middle + 0.4 * normal, normal


def around(count: int) -> tuple[Tensor, Tensor]:
    """Cameras (count, 9) on a wavy ring, which look at the middle, and where they stand (count, 3)."""
    t = 2 * torch.pi * torch.arange(count, dtype=torch.float64) / count
    where = torch.stack([t.cos(), t.sin(), 0.7 * (3 * t).sin() + 0.3], 1)
    where = DISTANCE * where / where.norm(dim=1, keepdim=True)
    back = where / DISTANCE  # their own z
    right = torch.linalg.cross(
        torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(count, 3), back
    )
    right = right / right.norm(dim=1, keepdim=True)
    R = torch.stack([right, torch.linalg.cross(back, right), back], 1)
    angle = ((R.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).acos()
    axis = torch.stack(
        [R[:, 2, 1] - R[:, 1, 2], R[:, 0, 2] - R[:, 2, 0], R[:, 1, 0] - R[:, 0, 1]], 1
    )
    turn = axis * (angle / (2 * angle.sin()))[:, None]
    shift = -(R @ where.unsqueeze(2)).squeeze(2)
    lens = torch.tensor([900.0, -0.05, 0.02], dtype=torch.float64).expand(count, 3)
    lens = lens * (1 + 0.1 * torch.randn(count, 3, dtype=torch.float64))
    return torch.cat([turn, shift, lens], 1), where


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sightings (O, 2), in pixels, of ``point`` by ``camera``, both (O,); the truth, and a guess."""

    camera: Tensor
    point: Tensor
    sightings: Tensor
    true: tuple[Tensor, Tensor]
    guess: tuple[Tensor, Tensor]

    def residual(self, cameras: Tensor, points: Tensor) -> Tensor:
        """(C, 9) and (P, 3) to (O, 2)."""
        return project(cameras[self.camera], points[self.point]) - self.sightings


def problem(cameras: int, points: int) -> Problem:
    true_points, normal = knot(points)
    true_cameras, where = around(cameras)
    to = where[None] - true_points[:, None]
    facing = (normal[:, None] * to / to.norm(dim=2, keepdim=True)).sum(2)
    camera = facing.topk(SEEN, dim=1).indices.sort(1).values.flatten()
    point = torch.arange(points).repeat_interleave(SEEN)
    sightings = project(true_cameras[camera], true_points[point])
    sightings = sightings + NOISE * torch.randn_like(sightings)
    off = torch.cat([
        FIRST["rotations"] * torch.randn(cameras, 3), FIRST["translations"] * torch.randn(cameras, 3),
        FIRST["focal"] * torch.randn(cameras, 1), torch.zeros(cameras, 2),
    ], 1)  # fmt: skip
    guess = true_cameras + off
    guess[:, 7:] = 0
    around_points = true_points + FIRST["points"] * torch.randn_like(true_points)
    return Problem(camera, point, sightings, (true_cameras, true_points), (guess, around_points))


# -- the solver -----------------------------------------------------------------------------------


def factorised(S: Any) -> tuple[str, Callable[[Any], Any]]:
    """Who factorises a sparse positive definite matrix, and what solves with it."""
    try:
        from sksparse import cholmod
    except ModuleNotFoundError:
        from scipy.sparse.linalg import splu

        options = {"SymmetricMode": True}
        made = splu(S, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0, options=options)
        return "SuperLU", made.solve
    if hasattr(cholmod, "cho_factor"):  # from 0.5 on
        return "CHOLMOD", cholmod.cho_factor(S).solve
    return "CHOLMOD", cholmod.cholesky(S)


def diagonal(blocks: Tensor) -> Any:
    """Blocks (n, c, c) as a sparse matrix with these on its diagonal."""
    import scipy.sparse

    n, c, _ = blocks.shape
    where = torch.arange(n + 1)
    return scipy.sparse.bsr_array(
        (blocks.numpy(), where[:n].numpy(), where.numpy()), shape=(n * c, n * c)
    )


Step = tuple[Tensor, Tensor]
"""Of cameras (C, 9) and of points (P, 3)."""


def step(equations: jactri.NormalEquations, damping: float) -> tuple[Step, Any, str]:
    """``(JᵀJ + damping * its diagonal) d = -Jᵀr``: d, the matrix that was factorised, and by whom.

    A residual has one camera and one point, so JᵀJ is ``[[U, W], [Wᵀ, V]]`` with blocks on the diagonals of U and V,
    and ``(U - W V⁻¹ Wᵀ) d_cameras = W V⁻¹ g_points - g_cameras``.
    """
    of_cameras, of_points = equations.gradient
    U, V = (
        D + damping * torch.diag_embed(D.diagonal(dim1=1, dim2=2))
        for D in equations.block_diagonal()
    )
    W = jactri.to_scipy(equations.matrix[0][1])
    inverse = torch.linalg.inv(V)
    WV = W @ diagonal(inverse)
    S = (diagonal(U) - WV @ W.T).tocsc()
    by, solve = factorised(S)
    d_cameras = solve(WV @ of_points.flatten().numpy() - of_cameras.flatten().numpy())
    left = of_points.flatten() + torch.from_numpy(W.T @ d_cameras)
    d_points = -(inverse @ left.view(-1, 3, 1)).squeeze(2)
    return (torch.from_numpy(d_cameras).view_as(of_cameras), d_points), S, by


@dataclasses.dataclass(frozen=True)
class Course:
    """What each step of the solver left, the guess first."""

    rms: list[float]  # pixels, of a coordinate of a sighting
    damping: list[float]
    cameras: Tensor
    points: Tensor
    reduced: Any  # the last matrix that was factorised, sparse
    by: str
    refused: int  # steps that would have raised the cost


def solve(seen: Problem, steps: int) -> Course:
    """Levenberg and Marquardt's iteration; it ends where a step lowers the cost by less than a millionth of it."""
    now, damping, growth = seen.guess, 1e-3, 2.0
    course: list[float] = []
    dampings: list[float] = []
    refused, S, by = 0, None, ""
    equations = jactri.normal_equations(seen.residual, now)
    cost = equations.residual.square().sum().item() / 2
    while True:
        course.append(rms(2 * cost, seen))
        dampings.append(damping)
        if len(course) > steps:
            break
        while True:
            d, S, by = step(equations, damping)
            moved = now[0] + d[0], now[1] + d[1]
            new = seen.residual(*moved).square().sum().item() / 2
            foreseen = sum(
                (v * (damping * v * D.diagonal(dim1=1, dim2=2) - g)).sum().item() / 2
                for v, g, D in zip(d, equations.gradient, equations.block_diagonal(), strict=True)
            )
            if new < cost or foreseen < 1e-9 * cost:
                break
            damping, growth, refused = damping * growth, 2 * growth, refused + 1
        gained = (cost - new) / cost
        if not gained > 0:
            break
        ratio = (cost - new) / foreseen
        damping, growth = damping * max(1 / 3, 1 - (2 * ratio - 1) ** 3), 2.0
        now, cost = moved, new
        if gained < 1e-6:
            course.append(rms(2 * cost, seen))
            dampings.append(damping)
            break
        equations = jactri.normal_equations(seen.residual, now)
    return Course(course, dampings, *now, S, by, refused)


def rms(squares: float, seen: Problem) -> float:
    return (squares / seen.sightings.numel()) ** 0.5


def aligned(points: Tensor, to: Tensor) -> Tensor:
    """Points, turned, moved and scaled to lie near others, as sightings do not tell these (Umeyama 1991)."""
    mean, to_mean = points.mean(0), to.mean(0)
    a, b = points - mean, to - to_mean
    left, values, right = torch.linalg.svd(b.T @ a)
    signs = torch.ones(3, dtype=points.dtype)
    signs[2] = torch.linalg.det(left @ right).sign()
    R = left @ torch.diag(signs) @ right
    return (values * signs).sum() / a.square().sum() * a @ R.T + to_mean


# -- what it finds --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Found:
    seen: Problem
    course: Course
    floor: float  # pixels, the RMS that sightings as blurred as these leave after a fit of as many unknowns
    guessed: Tensor  # (P, 3), the guess, aligned with the truth
    solved: Tensor  # (P, 3), the solution, aligned with the truth
    apart: float  # jactri's Jacobian against that of each residual by torch.func, relative
    milliseconds: dict[str, float]  # of a Jacobian, and of what a step needs, by who computes it


def by_hand(seen: Problem, cameras: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks (O, 2, 9) and (O, 2, 3), by who knows that residual o has one camera and one point."""
    of_one = torch.func.vmap(torch.func.jacfwd(project, argnums=(0, 1)))
    return of_one(cameras[seen.camera], points[seen.point])


def timed(seen: Problem, at: Step, rounds: int) -> dict[str, float]:
    """Median milliseconds, in turns."""

    def whole() -> None:
        equations = jactri.normal_equations(seen.residual, at)
        assert equations.matrix and equations.gradient

    ways: dict[str, Callable[[], Any]] = {
        "J, torch.func.vmap(jacfwd) by hand": lambda: by_hand(seen, *at),
        "J, jactri.jacobian": lambda: jactri.jacobian(seen.residual, at, layout=torch.sparse_bsr),
        "JᵀJ, Jᵀr and r, jactri.normal_equations": whole,
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            spent[name].append(1e3 * (time.perf_counter() - begun))
    return {name: statistics.median(times) for name, times in spent.items()}


def run(quick: bool) -> Found:
    warnings.filterwarnings("ignore", "Sparse ... tensor support is in beta")  # torch's remark
    seen = problem(16, 300) if quick else problem(64, 4000)
    course = solve(seen, 15 if quick else 40)
    at = course.cameras, course.points
    J = jactri.jacobian(seen.residual, at, layout=torch.sparse_bsr)
    theirs = by_hand(seen, *at)  # a block a row, in the order of the residuals
    apart = max(
        ((mine.values() - block).norm() / block.norm()).item()
        for mine, block in zip(J, theirs, strict=True)
    )
    unknowns = (
        sum(t.numel() for t in seen.guess) - 7
    )  # where all is, how turned, how large: nobody sees
    count = seen.sightings.numel()
    return Found(
        seen, course, NOISE * ((count - unknowns) / count) ** 0.5, aligned(seen.guess[1], seen.true[1]),
        aligned(course.points, seen.true[1]), apart, timed(seen, at, 3 if quick else 9),
    )  # fmt: skip


def wrong(points: Tensor, found: Found) -> float:
    """How far points lie from the truth, root mean square."""
    return (points - found.seen.true[1]).square().sum(1).mean().sqrt().item()


def tell(found: Found) -> Iterator[str]:
    seen, course = found.seen, found.course
    cameras, points = (len(t) for t in seen.guess)
    size = course.reduced.shape[0]
    entries = seen.sightings.numel() * 12
    whole = seen.sightings.numel() * (9 * cameras + 3 * points)
    yield (
        f"{cameras} cameras, {points} points, {len(seen.sightings)} sightings: {seen.sightings.numel()} residuals of "
        f"{9 * cameras + 3 * points} unknowns"
    )
    yield f"J: {entries} entries that can be non-zero, {8 * entries / 1e6:.1f} MB; dense {8 * whole / 1e6:.0f} MB"
    share = course.reduced.nnz / size**2
    yield f"without the points: {size} unknowns, {share:.0%} of the matrix not zero, factorised by {course.by}\n"
    rows = [
        [str(k), f"{r:.5g}", f"{d:.1e}"]
        for k, (r, d) in enumerate(zip(course.rms, course.damping, strict=True))
    ]
    yield from common.table(["step", "RMS (pixels)", "damping"], rows)
    yield f"what the blur of {NOISE} pixels leaves: {found.floor:.5g} pixels; steps refused: {course.refused}\n"
    yield from common.table(
        ["points against the truth", "root mean square"],
        [["the guess", wrong(found.guessed, found)], ["the solution", wrong(found.solved, found)]],
    )
    yield from common.table(
        ["at the solution", "ms"], [[k, v] for k, v in found.milliseconds.items()]
    )
    yield f"the two Jacobians: within {found.apart:.0e}"


def draw(found: Found) -> Figure:
    seen, course = found.seen, found.course
    cameras, points = (len(t) for t in seen.guess)
    figure = common.figure(
        "Bundle adjustment",
        f"{points} points on a knot, seen by {cameras} cameras around it, {SEEN} sightings each with a blur of {NOISE} "
        "pixels. Where the points lie, where the cameras stood and what their\nlenses do to an image is found from "
        "these sightings alone, by least squares. A residual knows one camera and one point: the Jacobian is sparse.",
        (15, 5.6),
    )  # fmt: skip
    before, after, steps, matrix = common.panels(
        figure, 1, 4, left=0.015, right=0.985, bottom=0.12, top=0.74, wspace=0.2, width_ratios=[1.15, 1.15, 0.95, 0.85]
    )  # fmt: skip
    depth = seen.true[1][:, 2].numpy()
    order = depth.argsort()
    for axes, at, title in (
        (before, found.guessed, "the first guess"), (after, found.solved, "the solution"),
    ):  # fmt: skip
        x, y = at[:, 0].numpy()[order], at[:, 1].numpy()[order]
        axes.scatter(x, y, c=depth[order], s=7, cmap="viridis", lw=0)
        axes.set(xlim=(-3.8, 3.8), ylim=(-3.8, 3.8), xticks=[], yticks=[], aspect="equal")
        common.label(axes, title)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.text(
            0.5, -0.02, f"{wrong(at, found):.2g} from the truth", transform=axes.transAxes, ha="center", va="top",
            fontsize=9.5, color=common.MUTED,
        )  # fmt: skip
    steps.plot(course.rms, "o-", color=common.BLUE, ms=4, lw=1.6)
    steps.axhline(found.floor, color=common.RED, lw=1.2, ls="--")
    steps.text(
        len(course.rms) - 1, found.floor * 1.12, "what the blur leaves", ha="right", fontsize=9, color=common.RED
    )  # fmt: skip
    steps.set_yscale("log")
    common.label(steps, "what is left of the sightings", "step", "reprojection error, RMS (pixels)")
    blocks = course.reduced.toarray().reshape(cameras, 9, cameras, 9)
    there = (abs(blocks).max((1, 3)) > 0).astype(float)
    matrix.set_anchor("N")
    matrix.imshow(there, cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
    common.label(matrix, "cameras that share points", "camera", "camera")
    return figure


def main(argv: list[str] | None = None) -> Found:
    return common.main("bundle", __doc__, run, tell, draw, argv, needs=("scipy",))


if __name__ == "__main__":
    main()
