# %% [markdown]
# # Derivatives in the parameters
#
# The Jacobian of a network's outputs in its parameters has a row for every output of every sample and a column for
# every weight: it is nearly always too large to want. What one wants are products with it. This tutorial shows what it
# is kept as, and four uses: the linearised network, the tangent kernel, the Gauss-Newton matrix, and the error bars of
# a Laplace approximation.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

import jactri

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## A regression problem with a hole
#
# Noisy values of a wave, none of them between -1 and 1.


# %%
def truth(x):
    return torch.sin(1.6 * x) + 0.25 * x


NOISE = 0.15
x = torch.cat([-4 + 3 * torch.rand(40, 1), 1 + 2.5 * torch.rand(40, 1)])
y = truth(x)[:, 0] + NOISE * torch.randn(80)

net = nn.Sequential(
    nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1), nn.Flatten(0)
)
PRIOR = 0.3  # precision of the weights
optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200, line_search_fn="strong_wolfe")


def closure():
    optimizer.zero_grad()
    misfit = (net(x) - y).square().sum() / NOISE**2
    loss = 0.5 * (misfit + PRIOR * sum(p.square().sum() for p in net.parameters()))
    loss.backward()
    return loss


optimizer.step(closure)
print(f"misfit: {(net(x) - y).square().mean().sqrt():.3f}, noise: {NOISE}")

# %% [markdown]
# ## Factors, not a matrix
#
# For a `Linear` layer the derivative of an output in the weight is an outer product: of the layer's input and the
# output's cotangent. `parameter_jacobian` keeps those two. Its `repr` says what they take and what the formed matrix
# would.

# %%
P = jactri.parameter_jacobian(net, x)
print(P)

# %% [markdown]
# `dense()` forms it if you ask, a tensor for each parameter, `(N, *out, *parameter)`:

# %%
dense = P.dense()
print({name: tuple(J.shape) for name, J in dense.items()})

parameters = dict(net.named_parameters())
theirs = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, x))(parameters)
assert all(torch.allclose(dense[name], theirs[name]) for name in parameters)

# %% [markdown]
# ## Products: the linearised network
#
# `P @ v` is how the outputs move along a change `v` of the parameters, `P.T @ u` pulls a change of the outputs back.
# Both cost about a pass through the network. Moving the weights by a small step moves the outputs as predicted:

# %%
step = {name: 1e-4 * torch.randn_like(p) for name, p in parameters.items()}
predicted = P @ step  # (80,)
moved = torch.func.functional_call(net, {n: p + step[n] for n, p in parameters.items()}, x) - net(x)
print(f"relative difference: {((predicted - moved).norm() / moved.norm()):.1e}")
assert torch.allclose(predicted, moved.detach(), atol=1e-5)

# %% [markdown]
# ## The tangent kernel
#
# `K(x, x') = J(x) J(x')ᵀ` (Jacot et al. 2018) compares samples by how they pull at the weights. It has the samples'
# size, `(N1, N2, *out, *out)`, and is contracted from the factors.

# %%
kernel = jactri.empirical_ntk(net, x)
matrix = torch.cat([J.flatten(1) for J in dense.values()], 1)  # (80, all parameters)
print(tuple(kernel.shape))
assert torch.allclose(kernel, matrix @ matrix.T)

eigenvalues = torch.linalg.eigvalsh(kernel).flip(0)
most = int((eigenvalues.cumsum(0) < 0.99 * eigenvalues.sum()).sum()) + 1
print(f"{most} of 80 directions hold 99% of the trace")

# %% [markdown]
# ## The Gauss-Newton matrix
#
# `G = Σ_n J_nᵀ H_n J_n`, with `H_n` the Hessian of the loss in the output, is the curvature that optimisers and
# Laplace approximations use. It is an operator: `G @ v` and `G.diagonal()`. For half the squared error `H_n` is 1.

# %%
G = jactri.ggn(net, x, torch.ones(80))
diagonal = G.diagonal()
flat = torch.cat([d.flatten() for d in diagonal.values()])
assert torch.allclose(flat, matrix.square().sum(0))

product = torch.cat([p.flatten() for p in (G @ step).values()])
flat_step = torch.cat([s.flatten() for s in step.values()])
assert torch.allclose(product, matrix.T @ (matrix @ flat_step))

# %% [markdown]
# ## Error bars
#
# Around the trained weights the posterior is taken as normal, with precision `JᵀJ/σ² + λ` (MacKay
# 1992). The variance of the prediction at `x` is then `J(x) Σ J(x)ᵀ`. By Woodbury's identity this is a
# Gaussian process with the tangent kernel, so that no matrix of the parameters' size is needed:
#
# `var(x) = (K(x, x) - K(x, X) (K(X, X) + λσ²)⁻¹ K(X, x)) / λ`, with `X` the data

# %%
at = torch.linspace(-6, 6, 241).unsqueeze(1)
across = jactri.empirical_ntk(net, at, x)  # (241, 80)
own = jactri.parameter_jacobian(net, at).variance(
    {n: torch.ones_like(p) for n, p in parameters.items()}
)
known = kernel + PRIOR * NOISE**2 * torch.eye(80)
variance = (own - (torch.linalg.solve(known, across.T).T * across).sum(1)) / PRIOR

# the same with the whole covariance of the weights, which this network is small enough for
J = torch.cat([J.flatten(1) for J in jactri.parameter_jacobian(net, at).dense().values()], 1)
precision = matrix.T @ matrix / NOISE**2 + PRIOR * torch.eye(matrix.shape[1])
assert torch.allclose(variance, (J @ torch.linalg.inv(precision) * J).sum(1), rtol=1e-4)

# %% [markdown]
# The network has no data in the hole and beyond the ends, and says so:

# %%
spread = variance.sqrt()
with torch.no_grad():
    mean = net(at)
figure, axes = plt.subplots(figsize=(9, 3.8), layout="constrained")
for times, alpha, text in ((1.96, 0.15, "95% band"), (0.674, 0.25, "50% band")):
    width = times * (variance + NOISE**2).sqrt()
    axes.fill_between(
        at[:, 0], mean - width, mean + width, color="#0072b2", alpha=alpha, lw=0, label=text
    )
axes.plot(at, truth(at), "--", color="#22262e", label="truth")
axes.plot(at, mean, color="#0072b2", label="network")
axes.plot(x, y, ".", color="#d55e00", label="data")
axes.set(xlabel="x", ylabel="y", ylim=(-4, 4), title="a network that knows where it knows nothing")
axes.legend(frameon=False, ncols=5, loc="lower center")
axes.spines[["top", "right"]].set_visible(False)

hole, data = spread[(at[:, 0].abs() < 0.4)], spread[((at[:, 0] > -3.5) & (at[:, 0] < -1.5))]
print(f"standard deviation: {data.mean():.3f} among the data, {hole.mean():.3f} in the hole")
assert hole.mean() > 2 * data.mean()

# %% [markdown]
# ## Where to go on
#
# - Noise and prior chosen by the evidence, and the posterior beside its diagonal: `python -m jactri.examples.laplace`.
# - All of these calls take `create_graph=True`, and `params=` for some of the parameters.
