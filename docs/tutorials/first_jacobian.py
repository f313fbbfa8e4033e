# %% [markdown]
# # A first Jacobian
#
# Ten minutes: the Jacobian of a network, what it looks like for a batch, how to see what jactri did, how to check it,
# what happens if you ask for something that does not exist, and a Jacobian in a loss.

# %%
import torch
from torch import nn

import jactri

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 3))
x = torch.randn(4, 5)  # a batch of 4 samples, 5 features each

# %% [markdown]
# ## All of it
#
# `jactri.jacobian` takes what `torch.autograd.functional.jacobian` takes and returns what that returns: the derivative
# of every output entry in every input entry. Its shape is the output's, then the input's.

# %%
J = jactri.jacobian(net, x)
print("output", tuple(net(x).shape), "  input", tuple(x.shape), "  Jacobian", tuple(J.shape))

theirs = torch.autograd.functional.jacobian(net, x)
assert torch.allclose(J, theirs, atol=1e-6)

# %% [markdown]
# `J[n, i, m, j]` says how output `i` of sample `n` moves with feature `j` of sample `m`. The samples of this network do
# not see one another, so all blocks with `n != m` are zero: three quarters of this tensor, and with a batch of 1,000
# all but a thousandth.

# %%
blocks = J.abs().amax((1, 3))  # the largest entry of each block, (4, 4)
print(blocks)

# %% [markdown]
# ## A Jacobian for each sample
#
# `per_sample=True` returns the blocks that are left: `(N, *out, *in)`. They are what is computed, too. That samples do
# not mix is *proven*, op by op, from the graph; you need not promise it.

# %%
J = jactri.jacobian(net, x, per_sample=True)
print(tuple(J.shape))

for n in range(len(x)):
    assert torch.allclose(J[n], theirs[n, :, n], atol=1e-6)

# %% [markdown]
# The function runs once. `return_output=True` returns its output beside the Jacobian, which saves the second forward
# pass that you would otherwise write.

# %%
y, J = jactri.jacobian(net, x, per_sample=True, return_output=True)
assert torch.equal(y, net(x))

# %% [markdown]
# ## What did it do?
#
# `explain` prints the plan: a row a step, what structure it has, and what it costs. A `Tanh` is a diagonal, a `Linear`
# layer one matrix that all samples share. Here three outputs are fewer than five inputs, so the sweep goes in reverse.

# %%
print(jactri.explain(net, x, per_sample=True))

# %% [markdown]
# What has no rule is computed by autograd, a row at a time: exact, and slower. The plan marks such steps as fallbacks,
# and `jactri.fallback("error")` refuses them.

# %% [markdown]
# ## Trust, but verify
#
# `check` compares with torch's own Jacobian in your dtype and in float64; where the two differ it asks finite
# differences. It runs on *your* function, so it is worth a line in your tests.

# %%
report = jactri.check(net, x, raise_on_error=True)
print(report)

# %% [markdown]
# ## Asking for what is not there
#
# A batch norm in training mode takes its mean over the batch: every sample's output depends on every other sample. A
# Jacobian "per sample" is then not defined, and jactri says so. The usual trick, the gradient of a sum over the batch,
# returns a number without a warning.

# %%
mixing = nn.Sequential(nn.Linear(5, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 3))
try:
    jactri.jacobian(mixing, x, per_sample=True)
except RuntimeError as error:
    print(error)

# %% [markdown]
# In evaluation mode the statistics are constants, and samples are apart:

# %%
mixing.eval()
print(tuple(jactri.jacobian(mixing, x, per_sample=True).shape))

# %% [markdown]
# ## A Jacobian in a loss
#
# With `create_graph=True` the Jacobian can itself be differentiated, in the parameters and in the input. Here a network
# learns `sin` and is told not to be steeper than it must: the penalty is the squared Frobenius norm of its Jacobian.


# %%
def fit(penalty):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        at = 6 * torch.rand(64, 1) - 3
        y, J = jactri.jacobian(model, at, per_sample=True, return_output=True, create_graph=True)
        loss = (y - at.sin()).square().mean() + penalty * J.square().sum((1, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    grid = torch.linspace(-3, 3, 200).unsqueeze(1)
    slope = jactri.jacobian(model, grid, per_sample=True)
    return slope.square().mean().sqrt().item()


free, held = fit(0.0), fit(0.3)
print(f"root mean square slope: {free:.2f} without the penalty, {held:.2f} with it")
assert held < 0.8 * free

# %% [markdown]
# ## Where to go on
#
# - Only products with some vectors? `jactri.jvp` and `jactri.vjp` take a block of them.
# - Derivatives of second order: [a PINN](pinn.py).
# - The same Jacobian thousands of times: [linearising dynamics](control.py).
# - Images, whose Jacobians are mostly zero: [convolutional networks](images.py).
# - Derivatives in the parameters: [NTK, GGN and Laplace](parameters.py).
