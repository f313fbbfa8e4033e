"""Extended Kalman filter over learned dynamics: a pendulum's angle and speed from noisy sightings of its tip.

A small network learns one time step from simulated transitions. The filter (Anderson and Moore 1979, ch. 8.2) carries
a state and its covariance P through it: P goes to F P F' + Q with F the Jacobian of the learned step, and each sighting
is weighed by H, the Jacobian of the camera. Both are needed anew at every step, at one state: what ``jactri.compile``
is for. The same filter without Python, in C++: examples/cpp.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jactri
from jactri.examples import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEP = 0.05  # seconds between sightings
GRAVITY, DRAG = 9.81, 0.1  # of a pendulum of 1 m: m/s^2, 1/s
KICK = 0.15  # rad/s, standard deviation of what the wind adds to the speed in a step
BLUR = 0.2  # m, standard deviation of a sighting, along each axis
START = torch.tensor([2.5, 0.0], dtype=torch.float64)  # rad and rad/s
DOUBT = torch.tensor(
    [0.5, 1.0], dtype=torch.float64
)  # of the filter's first guess, standard deviations


class Learned(nn.Module):
    """One time step: states (N, 2), an angle and a speed, to the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 2)
        )

    def forward(self, state: Tensor) -> Tensor:
        angle, speed = state.unbind(1)
        known = torch.stack([angle.sin(), angle.cos(), 0.2 * speed], 1)
        return state + STEP * self.net(known)


def pendulum(state: Tensor) -> Tensor:
    """One time step of the true equations: angle'' = -g sin(angle) - drag angle', by four Runge-Kutta steps."""
    h = STEP / 4

    def rate(s: Tensor) -> Tensor:
        angle, speed = s.unbind(1)
        return torch.stack([speed, -GRAVITY * angle.sin() - DRAG * speed], 1)

    for _ in range(4):
        a = rate(state)
        b = rate(state + h / 2 * a)
        c = rate(state + h / 2 * b)
        d = rate(state + h * c)
        state = state + h / 6 * (a + 2 * b + 2 * c + d)
    return state


def tip(state: Tensor) -> Tensor:
    """What the camera sees: states (N, 2) to positions (N, 2) of the tip, in metres."""
    angle = state[:, 0]
    return torch.stack([angle.sin(), -angle.cos()], 1)


def learn(steps: int) -> Learned:
    """Fits the network to simulated transitions from random states."""
    net = Learned().double()
    span = torch.tensor([torch.pi, 9.0], dtype=torch.float64)
    states = (2 * torch.rand(8192, 2, dtype=torch.float64) - 1) * span
    rates = (pendulum(states) - states) / STEP
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(states), (256,))
        predicted = (net(states[batch]) - states[batch]) / STEP
        loss = F.mse_loss(predicted, rates[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(False)


Linearised = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A state (1, n) to a function's value (1, m) and its Jacobian (1, m, n) there."""


def extended_kalman(
    move: Linearised, see: Linearised, sightings: Iterable[Tensor], first: Tensor
) -> tuple[Tensor, Tensor]:
    """The filter's states (T, 2) and covariances (T, 2, 2), each after the sighting of its time.

    Args:
        move, see: the dynamics and the camera, with their Jacobians.
        sightings: T of (2,), in metres.
        first: (2,), the state guessed before the first sighting.
    """
    wind = torch.diag(torch.tensor([1e-6, KICK**2], dtype=first.dtype))
    blur = BLUR**2 * torch.eye(2, dtype=first.dtype)
    state, P = first, torch.diag(DOUBT.square())
    states, covariances = [], []
    for time_step, sighting in enumerate(sightings):
        if time_step:
            moved, A = move(state.unsqueeze(0))
            state, A = moved[0], A[0]
            P = A @ P @ A.mT + wind
        seen, H = see(state.unsqueeze(0))
        seen, H = seen[0], H[0]
        gain = torch.linalg.solve(H @ P @ H.mT + blur, H @ P).mT
        state = state + gain @ (sighting - seen)
        kept = torch.eye(2, dtype=first.dtype) - gain @ H
        P = kept @ P @ kept.mT + gain @ blur @ gain.mT  # Joseph's form, which stays positive
        states.append(state)
        covariances.append(P)
    return torch.stack(states), torch.stack(covariances)


@dataclasses.dataclass(frozen=True)
class Found:
    model_error: float  # of the learned step's rates at unseen states, relative
    truth: Tensor  # (T, 2)
    sightings: Tensor  # (T, 2)
    alone: Tensor  # (T, 2), the learned model without sightings, from the first guess
    states: Tensor  # (T, 2), filtered
    covariances: Tensor  # (T, 2, 2)
    informed: Tensor  # (T, 2), filtered with the true equations in place of the learned ones
    tip_error: dict[str, float]  # m, root mean square distance from the true tip
    speed_error: dict[str, float]  # rad/s, root mean square
    covered: float  # share of true speeds within the filter's 95% band
    # of the processor, a time step of the filter, by how it linearises
    microseconds: dict[str, float]
    apart: float  # the largest difference between those ways' states


def simulate(count: int) -> tuple[Tensor, Tensor]:
    """A pendulum in the wind, and what the camera makes of it."""
    state, truth = START.unsqueeze(0), []
    for _ in range(count):
        truth.append(state[0])
        kick = torch.tensor([0.0, KICK]) * torch.randn(1, dtype=state.dtype)
        state = pendulum(state) + kick
    truth = torch.stack(truth)
    return truth, tip(truth) + BLUR * torch.randn(truth.shape, dtype=truth.dtype)


def linearised(how: str, func: Callable[[Tensor], Tensor], engine: str = "fx") -> Linearised:
    """``func`` with its Jacobian, by one of three ways; ``engine``: of ``jactri.compile``."""
    if how == "jactri.compile":
        first = torch.zeros(1, 2, dtype=torch.float64)
        return jactri.compile(func, first, per_sample=True, return_output=True, engine=engine)
    if how == "jactri.jacobian":
        return lambda state: jactri.jacobian(func, state, per_sample=True, return_output=True)

    def with_autograd(state: Tensor) -> tuple[Tensor, Tensor]:
        J = torch.autograd.functional.jacobian(func, state)
        return func(state), J[:, :, 0]

    return with_autograd


WAYS = ("jactri.compile", "jactri.jacobian", "autograd.functional")


def run(quick: bool) -> Found:
    net = learn(600 if quick else 6000)
    unseen = (2 * torch.rand(2000, 2, dtype=torch.float64) - 1) * torch.tensor([torch.pi, 9.0])
    right = pendulum(unseen) - unseen
    model_error = ((net(unseen) - pendulum(unseen)).norm() / right.norm()).item()

    truth, sightings = simulate(100 if quick else 300)
    first = START + DOUBT * torch.randn(2, dtype=torch.float64)
    found = {}
    spent: dict[str, list[Tensor]] = {way: [] for way in WAYS}
    engine = "fx" if quick else "aot"  # which compiles for some seconds, and calls no Python
    filters = {way: tuple(linearised(way, func, engine) for func in (net, tip)) for way in WAYS}
    for _ in range(2 if quick else 7):  # in turns, so that a busy machine slows all alike
        for way, (move, see) in filters.items():
            asked: list[float] = []
            found[way] = extended_kalman(move, see, stamped(sightings, asked), first)
            spent[way].append(1e6 * torch.tensor(asked, dtype=torch.float64).diff())
    least = {way: torch.stack(times).amin(0).median().item() for way, times in spent.items()}
    states, covariances = found[WAYS[0]]
    informed, _ = extended_kalman(
        linearised(WAYS[0], pendulum), linearised(WAYS[0], tip), sightings, first
    )
    alone = [first]
    while len(alone) < len(truth):
        alone.append(net(alone[-1].unsqueeze(0))[0])
    alone = torch.stack(alone)

    of = {"model alone": alone, "filter": states, "filter, true equations": informed}
    tip_error = {"sightings": rms(sightings - tip(truth))}
    tip_error |= {name: rms(tip(guess) - tip(truth)) for name, guess in of.items()}
    speed_error = {name: rms((guess - truth)[:, 1:]) for name, guess in of.items()}
    within = (states - truth)[:, 1].abs() < 1.96 * covariances[:, 1, 1].sqrt()
    return Found(
        model_error, truth, sightings, alone, states, covariances, informed, tip_error, speed_error,
        within.double().mean().item(), least,
        max((found[way][0] - states).abs().max().item() for way in WAYS),
    )  # fmt: skip


def stamped(sightings: Tensor, asked: list[float]) -> Iterator[Tensor]:
    """The sightings; ``asked`` gets the processor's time when each was asked for, which a busy machine leaves alone."""
    for sighting in sightings:
        asked.append(time.process_time())
        yield sighting


def rms(error: Tensor) -> float:
    return error.square().sum(1).mean().sqrt().item()


def tell(found: Found) -> Iterator[str]:
    yield f"learned step, at unseen states: {found.model_error:.1e} relative error of the change of state\n"
    rows = [
        [name, error, found.speed_error.get(name, "-")] for name, error in found.tip_error.items()
    ]
    yield from common.table(["root mean square error", "tip (m)", "speed (rad/s)"], rows)
    yield f"true speed inside of the filter's 95% band: {found.covered:.0%} of {len(found.truth)} times\n"
    yield from common.table(
        ["the filter, linearised by", "processor's microseconds a time step"],
        [[way, f"{value:.0f}"] for way, value in found.microseconds.items()],
    )
    yield f"largest difference between the three ways' states: {found.apart:.0e}"


def draw(found: Found) -> Figure:
    figure = common.figure(
        "A pendulum in the wind, through a blurred camera",
        f"The filter knows a network's idea of one time step and a camera that is wrong by {BLUR} m. "
        "It is told neither the angle nor the speed.\n"
        "The band holds the speed with 95% probability, if the filter is right about its own doubt; "
        f"here it does {found.covered:.0%} of the time.",
        (15, 8.2),
    )
    times = (STEP * torch.arange(len(found.truth))).numpy()
    true_tip, my_tip, lost_tip = (tip(s).numpy() for s in (found.truth, found.states, found.alone))
    sightings, guess = found.sightings.numpy(), found.states[:, 1].numpy()
    spread = 1.96 * found.covariances[:, 1, 1].sqrt().numpy()
    seen, speed = common.panels(figure, 2, 1, sharex=True, left=0.055, right=0.63, hspace=0.2)
    # The true curve is wide and pale, the estimate thin and dark on it: both stay visible where they agree.
    true = {
        "color": common.SKY,
        "lw": 5,
        "alpha": 0.55,
        "label": "truth",
        "solid_capstyle": "round",
    }
    mine = {"color": common.INK, "lw": 1.3, "label": "filter"}
    lost = {"color": common.ORANGE, "lw": 1.2, "ls": "--", "label": "model alone"}
    seen.plot(times, true_tip[:, 0], **true)
    seen.plot(times, sightings[:, 0], "x", color=common.RED, ms=4, mew=1, label="sightings")
    seen.plot(times, lost_tip[:, 0], **lost)
    seen.plot(times, my_tip[:, 0], **mine)
    speed.fill_between(
        times,
        guess - spread,
        guess + spread,
        color=common.INK,
        alpha=0.15,
        lw=0,
        label="its 95% band",
    )
    speed.plot(times, found.truth[:, 1].numpy(), **true)
    speed.plot(times, found.alone[:, 1].numpy(), **lost)
    speed.plot(times, guess, **mine)
    common.label(seen, "what the camera sees", "", "tip, sideways (m)")
    common.label(speed, "what it never sees", "time (s)", "angular speed (rad/s)")
    for axes in (seen, speed):
        axes.set_xlim(0, times[-1])
        axes.legend(
            ncols=4, loc="lower right", bbox_to_anchor=(1, 0.98), frameon=False, fontsize=9, labelcolor=common.INK
        )  # fmt: skip

    place, costs = common.panels(
        figure, 2, 1, left=0.735, right=0.985, hspace=0.3, height_ratios=[3, 1]
    )
    place.scatter(*sightings.T, marker="x", s=18, lw=1, color=common.RED, label="sightings")
    place.plot(*true_tip.T, **true)
    place.plot(*my_tip.T, color=common.INK, lw=0.8, alpha=0.8, label="filter")
    place.plot(0, 0, "o", color=common.MUTED, ms=5)
    place.set_aspect("equal")
    common.label(place, "the tip, as a camera sees the pendulum", "sideways (m)", "up (m)")
    errors = [f"{name}: {error:.2f} m" for name, error in found.tip_error.items()]
    place.text(
        0, -0.07, "\n".join(["root mean square error", *errors]), ha="center", va="top", fontsize=8,
        color=common.INK, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 3},
    )  # fmt: skip
    if (
        not found.microseconds
    ):  # a picture that is shown elsewhere than on the machine that took them
        costs.remove()
        return figure
    names, values = zip(*found.microseconds.items(), strict=True)
    costs.barh(names, values, color=[common.BLUE, common.SKY, "#b6bcc6"], height=0.65)
    costs.bar_label(costs.containers[0], fmt="%.0f", padding=3, fontsize=9, color=common.INK)
    costs.invert_yaxis()
    costs.set_xlim(0, 1.12 * max(values))
    common.label(
        costs,
        "the filter's whole time step, by how it linearises",
        "microseconds of this processor",
        "",
    )
    return figure


def main(argv: list[str] | None = None) -> Found:
    return common.main("kalman", __doc__, run, tell, draw, argv)


if __name__ == "__main__":
    main()
