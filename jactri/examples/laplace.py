"""Laplace approximation: a regression network that knows where it knows nothing.

MacKay 1992, "A practical Bayesian framework for backpropagation networks", and Immer, Korzepa and Bauer 2021 for the
linearised predictive: around trained weights the posterior is normal, with precision J'J / noise² + prior, the
generalised Gauss-Newton matrix of all data. The prediction's variance at x is J(x) cov J(x)'. All of it comes from
``jactri.parameter_jacobian(net, x)``: ``dense()`` for the full covariance, ``variance(...)`` for a diagonal one (from
``jactri.ggn(...).diagonal()``), and ``gram()`` for the same full variance in function space, as a Gaussian process has
it. Noise and prior are the data's own choice, by the evidence.
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

NOISE = 0.15  # standard deviation of the data around the truth, which nobody tells the network
CLUSTERS = ((-4.0, -1.2), (1.0, 3.2))  # where there are data
COUNT = 40  # of data in each
SPAN = 6.0  # the picture goes from -SPAN to SPAN


def truth(x: Tensor) -> Tensor:
    return torch.sin(1.6 * x) + 0.25 * x


def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1), nn.Flatten(0)
    ).double()  # (N, 1) to (N,)


def jacobian_matrix(net: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian in all parameters side by side, (N, P)."""
    return torch.cat([J.flatten(1) for J in jactri.parameter_jacobian(net, x).dense().values()], 1)


@dataclasses.dataclass(frozen=True)
class Posterior:
    """Trained weights with what the evidence says of them."""

    net: nn.Module
    prior: float  # precision of the weights
    noise: float  # standard deviation of the data
    effective: float  # how many of the parameters the data determine
    parameters: int


def minimise(net: nn.Module, x: Tensor, y: Tensor, prior: float, noise: float) -> None:
    """Trains for the least misfit / noise² + prior |weights|²."""
    weights = list(net.parameters())
    optimizer = torch.optim.LBFGS(
        weights, max_iter=200, history_size=30, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        misfit = (net(x) - y).square().sum() / noise**2
        loss = 0.5 * (misfit + prior * sum(w.square().sum() for w in weights))
        loss.backward()
        return loss

    optimizer.step(closure)


def fit(x: Tensor, y: Tensor, rounds: int) -> Posterior:
    """Trains in rounds; after each, noise and prior make a step of MacKay's fixed point."""
    net = make_net()
    prior, noise, effective = 0.1, 0.3, 0.0
    for _ in range(rounds):
        minimise(net, x, y, prior, noise)
        # JJ' has the eigenvalues of J'J, but for zeros.
        gram = jactri.parameter_jacobian(net, x).gram()
        curvature = torch.linalg.eigvalsh(gram).clamp_min(0) / noise**2
        effective = (curvature / (curvature + prior)).sum().item()
        with torch.no_grad():
            prior = effective / sum(w.square().sum() for w in net.parameters()).item()
            noise = math.sqrt((net(x) - y).square().sum().item() / (len(x) - effective))
    return Posterior(net, prior, noise, effective, sum(w.numel() for w in net.parameters()))


def full_covariance(posterior: Posterior, x: Tensor) -> Tensor:
    """Of all parameters, (P, P)."""
    J = jacobian_matrix(posterior.net, x)
    precision = J.mT @ J / posterior.noise**2
    precision.diagonal().add_(posterior.prior)
    return torch.linalg.inv(precision)


def function_space_variance(posterior: Posterior, x: Tensor, at: Tensor) -> Tensor:
    """The full variance at ``at`` (M, 1), (M,), with no matrix of the parameters' size."""
    gram = jactri.parameter_jacobian(posterior.net, torch.cat([x, at])).gram() / posterior.prior
    n = len(x)
    known, across, here = gram[:n, :n], gram[n:, :n], gram.diagonal()[n:]
    noisy = known + posterior.noise**2 * torch.eye(n, dtype=x.dtype)
    return here - (torch.linalg.solve(noisy, across.mT).mT * across).sum(1)


def diagonal_variance(posterior: Posterior, x: Tensor, at: Tensor) -> Tensor:
    """The variance (M,) if the parameters were independent: what is left for large networks."""
    ones = torch.ones(len(x), dtype=x.dtype)  # the Hessian of half the squared error
    curvature = jactri.ggn(posterior.net, x, ones).diagonal()
    covariance = {
        name: 1 / (c / posterior.noise**2 + posterior.prior) for name, c in curvature.items()
    }
    return jactri.parameter_jacobian(posterior.net, at).variance(covariance)


def draws(posterior: Posterior, covariance: Tensor, at: Tensor, count: int) -> Tensor:
    """Linearised networks with weights drawn from the posterior, at ``at``: (count, M)."""
    jacobian = jactri.parameter_jacobian(posterior.net, at)
    changes = (
        torch.randn(count, len(covariance), dtype=at.dtype) @ torch.linalg.cholesky(covariance).mT
    )
    parameters = dict(posterior.net.named_parameters())
    parts = changes.split([p.numel() for p in parameters.values()], 1)
    block = {
        name: part.reshape(count, *p.shape)
        for (name, p), part in zip(parameters.items(), parts, strict=True)
    }
    return jacobian.output + jacobian @ block


@dataclasses.dataclass(frozen=True)
class Found:
    posterior: Posterior
    x: Tensor  # (N, 1)
    y: Tensor  # (N,)
    at: Tensor  # (M, 1), where the next are
    mean: Tensor  # (M,)
    spreads: dict[
        str, Tensor
    ]  # (M,) each: the prediction's standard deviation without the noise of data
    samples: Tensor  # (K, M)
    covered: dict[
        str, tuple[float, float]
    ]  # share of new data in the 95% band, where data were and elsewhere
    likelihood: dict[str, tuple[float, float]]  # mean log-likelihood of new data, likewise
    apart: float  # the variance over weights against that over functions, relative


def among_data(x: Tensor) -> Tensor:
    return torch.stack([(x >= low) & (x <= high) for low, high in CLUSTERS]).any(0)


def run(quick: bool) -> Found:
    float64 = torch.float64
    x = torch.cat(
        [low + (high - low) * torch.rand(COUNT, 1, dtype=float64) for low, high in CLUSTERS]
    )
    y = truth(x[:, 0]) + NOISE * torch.randn(len(x), dtype=float64)
    posterior = fit(x, y, 4 if quick else 15)
    covariance = full_covariance(posterior, x)

    def variances(at: Tensor) -> dict[str, Tensor]:
        rows = jacobian_matrix(posterior.net, at)
        return {
            "noise alone": torch.zeros(len(at), dtype=float64),
            "diagonal Laplace": diagonal_variance(posterior, x, at),
            "full Laplace": ((rows @ covariance) * rows).sum(1),
        }

    at = torch.linspace(-SPAN, SPAN, 401, dtype=float64).unsqueeze(1)
    found = variances(at)
    by_functions = function_space_variance(posterior, x, at)
    apart = ((found["full Laplace"] - by_functions).abs() / by_functions).max().item()

    new = SPAN * (2 * torch.rand(4000, 1, dtype=float64) - 1)
    seen = truth(new[:, 0]) + NOISE * torch.randn(len(new), dtype=float64)
    near = among_data(new[:, 0])
    with torch.no_grad():
        mean, error = posterior.net(at), seen - posterior.net(new)
    covered, likelihood = {}, {}
    for name, variance in variances(new).items():
        whole = variance + posterior.noise**2
        inside = (error.abs() < 1.96 * whole.sqrt()).to(float64)
        score = -0.5 * (error.square() / whole + (2 * torch.pi * whole).log())
        covered[name] = tuple(inside[where].mean().item() for where in (near, ~near))
        likelihood[name] = tuple(score[where].mean().item() for where in (near, ~near))
    return Found(
        posterior, x, y, at, mean, {name: v.sqrt() for name, v in found.items()},
        draws(posterior, covariance, at, 6), covered, likelihood, apart,
    )  # fmt: skip


def tell(found: Found) -> Iterator[str]:
    p = found.posterior
    yield f"noise {p.noise:.3f} (true: {NOISE}), prior precision {p.prior:.3g}"
    yield f"the data determine {p.effective:.1f} of {p.parameters} parameters\n"
    rows = [
        [name, *(f"{share:.0%}" for share in found.covered[name]), *(f"{nats:.2f}" for nats in found.likelihood[name])]
        for name in found.covered
    ]  # fmt: skip
    yield from common.table(
        ["new data", "in 95% band, among data", "elsewhere", "log-likelihood, among data", "elsewhere"], rows
    )  # fmt: skip
    yield f"full variance over weights against that over functions: within {found.apart:.0e}"


def draw(found: Found) -> Figure:
    figure = common.figure(
        "A network that knows where it knows nothing",
        "The Laplace approximation's band is narrow where there are data and widens away from them, from one trained "
        "network and its parameter Jacobian.\n"
        "New data away from the old ones are in the full posterior's 95% band "
        f"{found.covered['full Laplace'][1]:.0%} of the time, in that of the noise alone "
        f"{found.covered['noise alone'][1]:.0%}.",
        (15, 7.6),
    )
    at, mean = found.at[:, 0].numpy(), found.mean.numpy()
    full = common.panels(figure, 1, 1, left=0.045, right=0.585, bottom=0.08, top=0.8)
    diagonal, spread = common.panels(
        figure, 2, 1, left=0.645, right=0.985, bottom=0.08, top=0.8, hspace=0.4
    )
    for axes, name in ((full, "full Laplace"), (diagonal, "diagonal Laplace")):
        width = (found.spreads[name].square() + found.posterior.noise**2).sqrt().numpy()
        for times, alpha, text in ((1.96, 0.15, "95% band"), (0.674, 0.25, "50% band")):
            axes.fill_between(
                at, mean - times * width, mean + times * width, color=common.BLUE, alpha=alpha, lw=0, label=text
            )  # fmt: skip
        if axes is full:
            axes.plot(at, found.samples.T.numpy(), color=common.SKY, lw=0.8)
            axes.plot([], [], color=common.SKY, lw=0.8, label="draws of the posterior")
        axes.plot(
            at, truth(found.at[:, 0]).numpy(), color=common.INK, lw=1.5, ls="--", label="truth"
        )
        axes.plot(at, mean, color=common.BLUE, lw=2.2, label="network")
        axes.plot(
            found.x[:, 0].numpy(),
            found.y.numpy(),
            "o",
            color=common.RED,
            ms=3.5,
            mew=0,
            label="data",
        )
        axes.set(xlim=(-SPAN, SPAN), ylim=(-6, 6))
    common.label(full, "all parameters' covariance", "x", "y")
    common.label(diagonal, "parameters taken as independent", "x", "y")
    full.legend(frameon=False, fontsize=9, labelcolor=common.INK, ncols=3, loc="upper center")
    for name, colour in (("diagonal Laplace", common.ORANGE), ("full Laplace", common.BLUE)):
        spread.plot(at, found.spreads[name].numpy(), color=colour, lw=2, label=name)
    spread.axhline(found.posterior.noise, color=common.INK, lw=1.3, ls=":", label="noise found")
    for low, high in CLUSTERS:
        spread.axvspan(low, high, color="#e7eaee", lw=0)
    spread.set_yscale("log")
    spread.set(xlim=(-SPAN, SPAN), ylim=(0.02, 15))
    common.label(
        spread, "the network's own doubt; grey: where data are", "x", "standard deviation of y"
    )
    spread.legend(
        frameon=False,
        fontsize=9,
        labelcolor=common.INK,
        ncols=3,
        loc="upper center",
        columnspacing=1,
    )
    return figure


def main(argv: list[str] | None = None) -> Found:
    return common.main("laplace", __doc__, run, tell, draw, argv)


if __name__ == "__main__":
    main()
