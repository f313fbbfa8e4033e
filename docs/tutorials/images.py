# %% [markdown]
# # Convolutional networks: windows instead of matrices
#
# An image of 24 x 24 pixels mapped to another has a Jacobian of 576 x 576 entries; one of a megapixel has 10¹².
# Almost all are zero, because an output pixel of a convolutional network sees a window of the input. This tutorial
# looks at that structure, computes those entries only, and uses them: to see what a denoiser averages, to estimate its
# error without the clean image, and to see which pixels a classifier's scores hang on.

# %%
import warnings

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import jactri

warnings.filterwarnings("ignore", "Sparse CSR tensor support")  # torch's own remark
torch.manual_seed(0)
NOISE = 0.4

# %% [markdown]
# ## Data and a denoiser
#
# Pages of nine handwritten digits, and noise on them. The denoiser has three convolutions without biases.

# %%
raw = load_digits()
digits = torch.from_numpy(raw.images).float() / 16  # (1797, 8, 8)
order = torch.randperm(len(digits))
pages = digits[order[: 199 * 9]].view(-1, 3, 3, 8, 8).transpose(2, 3).reshape(-1, 1, 24, 24)

denoiser = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1, bias=False),
    nn.ReLU(),
    nn.Conv2d(16, 16, 3, padding=1, bias=False),
    nn.ReLU(),
    nn.Conv2d(16, 1, 3, padding=1, bias=False),
)
optimizer = torch.optim.Adam(denoiser.parameters(), lr=5e-3)
for _ in range(200):
    clean = pages[torch.randint(180, (8,))]
    loss = (denoiser(clean + NOISE * torch.randn_like(clean)) - clean).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
denoiser.requires_grad_(False)
print(f"root mean square error a pixel: {NOISE} before, {loss.sqrt():.2f} after")

# %% [markdown]
# ## The pattern
#
# `sparsity` says which entries can be non-zero, whatever the weights and pixels are. It computes none of them.

# %%
clean = pages[190:191]
noisy = clean + NOISE * torch.randn_like(clean)  # (1, 1, 24, 24)
mask = jactri.sparsity(denoiser, noisy)
print(tuple(mask.shape), f"{mask._nnz():,} of {mask.numel():,} entries")

# %% [markdown]
# Three 3 x 3 convolutions: a window of 7 x 7 = 49 pixels, less at the border. Pixels whose windows never meet share a
# seed, so the whole Jacobian takes 49 backward passes; their number does not grow with the image.
#
# ## The entries
#
# `layout="banded"` returns the values of every window and the pixels that they belong to.

# %%
band = jactri.jacobian(denoiser, noisy, layout="banded")
print("values", tuple(band.values.shape), "columns", tuple(band.columns.shape))

dense = jactri.jacobian(denoiser, noisy)
assert torch.equal(band.to_dense(), dense)

# %% [markdown]
# `torch.sparse_csr` is a matrix, for linear algebra. This network has no biases and its activation is piecewise linear,
# so it is linear near any image: the Jacobian *times the image* is the output. Every entry is checked by that.

# %%
matrix = jactri.jacobian(denoiser, noisy, layout=torch.sparse_csr)  # (576, 576)
denoised = (matrix @ noisy.view(-1, 1)).view(1, 1, 24, 24)
assert torch.allclose(denoised, denoiser(noisy), atol=1e-5)

# %% [markdown]
# ## What does the denoiser average?
#
# So each row of the Jacobian is the filter that the network applies at one pixel, and it is another one at every pixel
# (Mohan et al. 2020, arXiv:1906.05478): along a stroke it averages along the stroke.

# %%
filters = matrix.to_dense().view(24, 24, 24, 24)
spots = {"a": (4, 5), "b": (11, 12), "c": (18, 19)}
figure, axes = plt.subplots(2, 3, figsize=(7.5, 5), layout="constrained")
pages_shown = {"clean": clean, "noisy": noisy, "denoised": denoised}
for panel, (name, image) in zip(axes[0], pages_shown.items(), strict=True):
    panel.imshow(image[0, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
    panel.set_title(name)
limit = max(filters[spot].abs().max() for spot in spots.values())
for panel, (letter, (row, column)) in zip(axes[1], spots.items(), strict=True):
    shown = panel.imshow(filters[row, column].numpy(), cmap="PuOr", vmin=-limit, vmax=limit)
    panel.contour(clean[0, 0].numpy(), levels=[0.5], colors="#22262e", linewidths=0.7)
    panel.set(xlim=(column - 5.5, column + 5.5), ylim=(row + 5.5, row - 5.5))
    panel.set_title(f"the filter at {letter}")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes[0, 2].text(column, row, letter, color="#d55e00", ha="center", va="center", bbox=box)
figure.colorbar(shown, ax=axes[1], label="d output / d pixel")
for panel in axes.flat:
    panel.set(xticks=[], yticks=[])

# %% [markdown]
# ## How good is it, without the clean image?
#
# Stein's unbiased risk estimate needs the noise and the *trace* of the Jacobian alone:
# `‖y - f(y)‖²/n - σ² + 2σ² tr(J)/n`. `jactri.divergence` returns the trace, exactly; usually one settles for a
# random estimate.

# %%
test = pages[180:]
seen = test + NOISE * torch.randn_like(test)
output, trace = jactri.divergence(denoiser, seen, return_lower=True)
pixels = seen[0].numel()
sure = (seen - output).square().flatten(1).mean(1) - NOISE**2 + 2 * NOISE**2 * trace / pixels
truth = (output - test).square().flatten(1).mean(1)
print(f"mean squared error of {len(test)} pages: {truth.mean():.4f}, estimated {sure.mean():.4f}")
assert (sure.mean() - truth.mean()).abs() < 0.1 * truth.mean()

one = jactri.divergence(denoiser, noisy)
assert torch.allclose(one, filters.reshape(576, 576).diagonal().sum(), rtol=1e-4)

# %% [markdown]
# ## Windows that jump: strides and pooling
#
# A classifier shrinks its image. The window of a score at the end is the whole image, so the Jacobian of the *scores*
# is dense: 10 rows, in reverse. Its features still have windows, and `sparsity` knows them through the stride and the
# maximum: which of its four pixels a pooled value comes from depends on the image, the window does not.

# %%
features = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1),
    nn.ReLU(),
)
classifier = nn.Sequential(features, nn.Flatten(), nn.Linear(32 * 4 * 4, 10))

images, labels = digits.unsqueeze(1), torch.from_numpy(raw.target).long()
optimizer = torch.optim.Adam(classifier.parameters(), lr=3e-3)
for _ in range(150):
    batch = order[torch.randint(1500, (64,))]
    augmented = images[batch] + 0.2 * torch.randn(64, 1, 8, 8)
    loss = nn.functional.cross_entropy(classifier(augmented), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
classifier.requires_grad_(False)
unseen = order[1500:]
print(f"right: {(classifier(images[unseen]).argmax(1) == labels[unseen]).float().mean():.1%}")

mask = jactri.sparsity(features, images[:1])
print(f"features by pixels: {mask._nnz() / mask.numel():.0%} of the entries")

# %% [markdown]
# ## Saliency
#
# A row of the Jacobian per class: ink on a red pixel raises the score of the class, on a blue one lowers it.

# %%
picks = torch.stack([unseen[labels[unseen] == digit][0] for digit in range(10)])
scores, J = jactri.jacobian(classifier, images[picks], per_sample=True, return_output=True)
print("Jacobian", tuple(J.shape))  # (10 images, 10 scores, 1, 8, 8)
saliency = J[torch.arange(10), scores.argmax(1), 0]

gradient = torch.func.vmap(torch.func.grad(lambda image: classifier(image.unsqueeze(0)).max()))
assert torch.allclose(saliency, gradient(images[picks])[:, 0], atol=1e-4)

figure, axes = plt.subplots(2, 10, figsize=(9, 2.3), layout="constrained")
limit = saliency.abs().max()
for column in range(10):
    axes[0, column].imshow(images[picks[column], 0].numpy(), cmap="gray_r")
    shown = axes[1, column].imshow(saliency[column].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes[1, column].contour(
        images[picks[column], 0].numpy(), levels=[0.5], colors="#22262e", linewidths=0.7
    )
for panel in axes.flat:
    panel.set(xticks=[], yticks=[])
bar = figure.colorbar(shown, ax=axes[1], label="d score / d pixel")

# %% [markdown]
# ## Where to go on
#
# - Larger than memory: `out=` takes a `numpy.memmap`, `memory_limit=` bounds the call.
# - The same picture over all classes, with rivals: `python -m jactri demo`.
