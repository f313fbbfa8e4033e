# %% [markdown]
# # Linearising learned dynamics
#
# Controllers and filters want a model as two matrices: how the next state moves with the state, `A`, and with the
# control, `B`. For a learned model these are Jacobians, needed anew at every step, at one state: small, and always of
# the same shape. This tutorial balances a pendulum with a linear-quadratic regulator (LQR) over a learned model, and
# compiles its linearisation.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

import jactri

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
STEP = 0.05  # seconds

# %% [markdown]
# ## A model of one time step
#
# The truth is a pendulum of 1 m with a motor: a state is an angle (0 is upright) and a speed, a control is a torque.
# Only the simulator knows this; the network learns from simulated transitions.


# %%
def pendulum(state, torque):
    """(N, 2) and (N, 1) to the next state (N, 2), by small Euler steps."""
    angle, speed = state.unbind(1)
    for _ in range(10):
        speed = speed + STEP / 10 * (9.81 * angle.sin() - 0.1 * speed + torque[:, 0])
        angle = angle + STEP / 10 * speed
    return torch.stack([angle, speed], 1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 2)
        )

    def forward(self, state, torque):
        angle, speed = state.unbind(1)
        known = torch.stack([angle.sin(), angle.cos(), speed / 5, torque[:, 0] / 10], 1)
        return state + STEP * self.net(known)


def draw(count):
    """Random states and torques."""
    state = (2 * torch.rand(count, 2) - 1) * torch.tensor([torch.pi, 6.0])
    return state, 20 * (2 * torch.rand(count, 1) - 1)


model = Model()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=800)
for _ in range(800):
    state, torque = draw(256)
    loss = ((model(state, torque) - pendulum(state, torque)) / STEP).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
model.requires_grad_(False)
print(f"error of the learned rates: {loss.sqrt():.3f} (root mean square)")

# %% [markdown]
# ## A and B
#
# Two inputs give two Jacobians from one evaluation; nothing has to be concatenated. With `per_sample=True` the shapes
# are `(N, 2, 2)` and `(N, 2, 1)`: a batch of states is linearised at once, a trajectory for example.

# %%
upright, still = torch.zeros(1, 2), torch.zeros(1, 1)
A, B = jactri.jacobian(model, (upright, still), per_sample=True)
print("A", tuple(A.shape), "B", tuple(B.shape))
print(A[0])

true_A, true_B = jactri.jacobian(pendulum, (upright, still), per_sample=True)
print(f"against the true dynamics: {(A - true_A).abs().max():.3f}, {(B - true_B).abs().max():.3f}")

# %% [markdown]
# The eigenvalues of `A` tell that the pendulum falls: one lies outside of the unit circle.

# %%
print(torch.linalg.eigvals(A[0]).abs())

# %% [markdown]
# ## LQR
#
# The regulator minimises `Σ xᵀQx + uᵀRu` along `x' = Ax + Bu`. Iterating Riccati's equation gives the
# gain `K` of the best control `u = -Kx`.


# %%
def gain(A, B, rounds=200):
    Q, R = torch.diag(torch.tensor([10.0, 1.0])), torch.tensor([[0.1]])
    P = Q
    for _ in range(rounds):
        K = torch.linalg.solve(R + B.mT @ P @ B, B.mT @ P @ A)
        P = Q + A.mT @ P @ (A - B @ K)
    return K


K = gain(A[0], B[0])
closed = torch.linalg.eigvals(A[0] - B[0] @ K).abs()
print("K", K, "  closed loop", closed)
assert closed.max() < 1

# %% [markdown]
# ## The same linearisation, at every step
#
# Far from upright the matrices at upright are not those of the state. A controller that linearises where it *is* asks
# for the same Jacobian hundreds of times, and then the work around it (running the function under autograd, reading
# its graph, planning) is more than the arithmetic. `jactri.compile` does that work once: it traces the call into one
# graph of tensor operations.
#
# `engine="fx"` runs that graph as it is and is ready at once. `"inductor"` compiles it (some seconds, kept on disk),
# and `"aot"` makes a package in which a call runs no Python.

# %%
linearise = jactri.compile(model, upright, still, per_sample=True, return_output=True, engine="fx")
print(linearise)

# %%
y, (A, B) = linearise(upright, still)
assert torch.allclose(A, jactri.jacobian(model, (upright, still), per_sample=True)[0])

# %% [markdown]
# A compiled call has a contract: shapes and dtypes are those of the examples (others are traced anew), and the
# function's Python ran while it was traced. A branch on a value, a counter, a global that changes: none is seen again.
# `verify` runs the ordinary call beside it and returns the largest difference, relative to the largest entry.

# %%
state, torque = draw(1)
print(f"{linearise.verify(state, torque):.0e}")
assert linearise.verify(state, torque) < 1e-8

# %% [markdown]
# ## Balancing
#
# From 1 rad, a third of the way down, three ways: no torque, the gain of the upright pendulum, and a gain for the
# matrices of the present state. The simulator is the truth; the controllers know the learned model only.


# %%
def simulate(control, steps=80):
    state, path = torch.tensor([[1.0, 0.0]]), []
    for _ in range(steps):
        torque = control(state)
        path.append(torch.cat([state, torque], 1)[0])
        state = pendulum(state, torque)
    return torch.stack(path)


def relinearised(state):
    _, (A, B) = linearise(state, still)
    return -(state @ gain(A[0], B[0], rounds=60).mT)


paths = {
    "no torque": simulate(lambda state: still),
    "gain at upright": simulate(lambda state: -(state @ K.mT)),
    "gain where it is": simulate(relinearised),
}
for name, path in paths.items():
    print(
        f"{name:17} ends at {path[-1, 0]:6.2f} rad, torque squared {path[:, 2].square().sum():8.1f}"
    )
assert paths["gain where it is"][-1, 0].abs() < 0.05

figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
time = STEP * torch.arange(80)
for (name, path), colour in zip(paths.items(), ("#6b7280", "#e69f00", "#0072b2"), strict=True):
    axes[0].plot(time, path[:, 0], color=colour, label=name)
    axes[1].plot(time, path[:, 2], color=colour)
axes[0].set(xlabel="time (s)", ylabel="angle (rad)", ylim=(-0.5, 7), title="angle; 0 is upright")
axes[1].set(xlabel="time (s)", ylabel="torque (N m)", title="what the motor does")
axes[0].legend(frameon=False)
for panel in axes:
    panel.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Where to go on
#
# - An extended Kalman filter needs the same two lines: `python -m jactri.examples.kalman`, and in C++ `examples/cpp`.
# - `jactri.export` writes the linearised step as a package for a process without Python.
