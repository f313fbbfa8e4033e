# %% [markdown]
# # A network that solves the heat equation
#
# A physics-informed network (Raissi, Perdikaris and Karniadakis 2019) is trained on the residual of an equation
# instead of on data. The residual holds derivatives of the network in its *input*, and training differentiates them
# once more, in the parameters. This tutorial computes them with `jactri.laplacian`, which needs neither nested
# gradients nor a Hessian.
#
# The equation: heat in a rod, `u_t = κ u_xx` on `0 ≤ x ≤ 1`, ends held at 0.

# %%
import math

import matplotlib.pyplot as plt
import torch
from torch import nn

import jactri

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)  # the optimizer at the end profits from it
KAPPA, END = 0.05, 1.0

# %% [markdown]
# ## The Laplacian of a field
#
# A *field* is a function of points `(N, n)` with a value for each point. `jactri.laplacian(field, points)` returns
# `Σ_i ∂²u/∂x_i²`, one number a point.
#
# It goes through the network once, forward: value, Jacobian and Laplacian together, `n + 2` rows a point (the *forward
# Laplacian*, Li et al. 2023). Nested reverse mode goes through it twice for each of the `n` axes.

# %%
field = nn.Sequential(
    nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0)
)  # (N, 3) to (N,)
points = torch.randn(10, 3)

u, gradient, laplacian = jactri.laplacian(field, points, return_lower=True)
print(tuple(u.shape), tuple(gradient.shape), tuple(laplacian.shape))

rows = torch.func.jacrev(torch.func.jacrev(lambda p: field(p.unsqueeze(0))[0]))
hessian = torch.func.vmap(rows)(points)
assert torch.allclose(laplacian.detach(), hessian.diagonal(dim1=1, dim2=2).sum(1).detach())

# %% [markdown]
# ## Not all second derivatives
#
# The heat equation wants `u_xx`, but not `u_tt`. A weight `A` gives `Σ_ij A_ij ∂_i ∂_j u`:
# here a matrix with a single one. It has rank 1, so one direction is carried instead of two. The first derivative `u_t`
# comes from the same sweep.

# %%
A = torch.tensor([[0.0, 0.0], [0.0, 1.0]])  # the coordinates of a point are (t, x)


def start(x):
    """The temperature at time 0."""
    return torch.sin(math.pi * x) + 0.5 * torch.sin(3 * math.pi * x)


def exact(points):
    """The solution, to compare with; training never sees it."""
    t, x = points.unbind(1)
    waves = ((1, 1.0), (3, 0.5))
    return sum(
        a * torch.exp(-KAPPA * (k * math.pi) ** 2 * t) * torch.sin(k * math.pi * x)
        for k, a in waves
    )


# %% [markdown]
# What is known goes into the network's form (Lagaris et al. 1998): the factor `t x (1 - x)` leaves the start and the
# ends as they are, whatever the network says. Only the equation is left to be learned.


# %%
class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 32),
            nn.Tanh(),
            nn.Linear(32, 32),
            nn.Tanh(),
            nn.Linear(32, 1),
            nn.Flatten(0),
        )

    def forward(self, points):
        t, x = points.unbind(1)
        return start(x) + 4 * t * x * (1 - x) * self.net(2 * points - 1)


def residual(model, points, create_graph=False):
    """u_t - kappa u_xx at every point, (N,)."""
    _, gradient, second = jactri.laplacian(
        model, points, weight=A, return_lower=True, create_graph=create_graph
    )
    return gradient[:, 0] - KAPPA * second


model = Temperature()
points = torch.rand(512, 2) * torch.tensor([END, 1.0])

# %% [markdown]
# The residual of the exact solution is zero, which checks the equation, the weight and the signs at once:

# %%
print(f"untrained: {residual(model, points).square().mean().sqrt():.2f}")
print(f"exact:     {residual(exact, points).square().mean().sqrt():.1e}")
assert residual(exact, points).abs().max() < 1e-12

# %% [markdown]
# ## Training
#
# `create_graph=True` makes the residual differentiable in the parameters. L-BFGS suits problems of this size: few
# parameters, the same points at every step.

# %%
optimizer = torch.optim.LBFGS(
    model.parameters(), max_iter=150, history_size=30, line_search_fn="strong_wolfe"
)
history = []


def closure():
    optimizer.zero_grad()
    loss = residual(model, points, create_graph=True).square().mean()
    loss.backward()
    history.append(loss.item())
    return loss


optimizer.step(closure)
print(f"loss: {history[0]:.1e} to {history[-1]:.1e} in {len(history)} evaluations")

# %% [markdown]
# ## What it found

# %%
side = 81
t, x = torch.linspace(0, END, side), torch.linspace(0, 1, side)
grid = torch.cartesian_prod(t, x)
with torch.no_grad():
    found, truth = model(grid).view(side, side), exact(grid).view(side, side)
error = (found - truth).norm() / truth.norm()
print(f"relative L2 error: {error:.1e}")
assert error < 0.02

figure, (map_of, course) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
shown = map_of.imshow(
    found.numpy(), extent=(0, 1, 0, END), origin="lower", aspect="auto", cmap="inferno"
)
map_of.contour(x, t, truth.numpy(), levels=8, colors="white", linewidths=0.8)
map_of.set(xlabel="x", ylabel="t", title="the network's temperature; lines: exact")
figure.colorbar(shown, ax=map_of, label="u")
course.semilogy(history, color="#0072b2")
course.set(xlabel="evaluation", ylabel="mean squared residual", title="training")
course.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Where to go on
#
# - `jactri.compile(lambda p: residual(model, p, create_graph=True).square().mean(), points, of=None)` compiles a loss
#   that contains such calls into one training step.
# - `jactri.bilaplacian` for plates, `jactri.divergence` and `jactri.gradient` for flows.
# - A harder equation with a picture: `python -m jactri.examples.poisson`.
